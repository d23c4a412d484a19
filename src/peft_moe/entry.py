"""Where task ids enter a model: the border with peft's and transformers' calls.

peft's `PeftModelFor*.forward` have a `task_ids` argument of their own and pass it on for one other method only;
transformers' `generate` refuses arguments it does not know, and its Trainer drops columns that the base model's forward
does not name. So the instances (not the classes) get a `forward`, and the base model a `generate`, that take `task_ids`
and hand on the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .routing import Batch, RoutingContext

if TYPE_CHECKING:
    from .tuner import MoeTuner

INPUTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")


class TaskIdsEntry:
    """Stands in for a method of one model: gives `task_ids` to the tuner's context for the span of the call.

    Args:
        owner: the model.
        method: name of its method.
        tuner: whose context is told.
    """

    def __init__(self, owner: nn.Module, method: str, tuner: MoeTuner) -> None:
        self.owner, self.method, self.tuner = owner, method, tuner
        # Somebody else's replacement, such as accelerate's hooks, or the entry of a tuner further in.
        self.replaced = owner.__dict__.get(method)

    @classmethod
    def install(cls, owner: nn.Module, method: str, tuner: MoeTuner) -> None:
        """Put an entry before `owner.method`, once."""
        there = owner.__dict__.get(method)
        if not (isinstance(there, cls) and there.tuner is tuner):
            setattr(owner, method, cls(owner, method, tuner))

    @classmethod
    def remove(cls, owner: nn.Module, method: str) -> None:
        """Take the entry away again."""
        there = owner.__dict__.get(method)
        if isinstance(there, cls):
            delattr(owner, method)
            if there.replaced is not None:
                setattr(owner, method, there.replaced)

    def __call__(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        if args and args[0] is self.owner:  # accelerate's unwrap_model binds what it finds, as if it were a function
            args = args[1:]
        context = self.tuner.context
        training = self.owner.training and torch.is_grad_enabled()
        if training and not context.open and not torch.compiler.is_compiling():
            keep_ids_through_checkpointing(self.owner, context)
        active = self.tuner.active_adapters if self.tuner.adapters_enabled else ()
        with context.call(task_ids, active=active, batch=_batch(self.owner, args, kwargs), training=training):
            if isinstance(self.replaced, TaskIdsEntry):  # a tuner inside a tuner is told the same
                kwargs["task_ids"] = context.told
            if self.replaced is not None:
                return self.replaced(*args, **kwargs)
            return getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's own signature and `task_ids`, so that Trainer keeps a column of that name."""
        method = self.replaced or getattr(type(self.owner), self.method).__get__(self.owner)
        signature = inspect.signature(method)
        if "task_ids" in signature.parameters:
            return signature
        parameters = list(signature.parameters.values())
        at = -1 if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else len(parameters)
        parameters.insert(at, inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None))
        return signature.replace(parameters=parameters)


class Recomputation:
    """Stands before a module's checkpoint function, so that what runs again in backward has the ids of its forward."""

    def __init__(self, checkpoint: Callable[..., Any], context: RoutingContext) -> None:
        self.checkpoint, self.context = checkpoint, context

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.context.current
        if call is None or torch.compiler.is_compiling():  # a compiled graph recomputes itself, from its own inputs
            return self.checkpoint(function, *args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.context.replay(call):
                return function(*args, **kwargs)

        return self.checkpoint(run, *args, **kwargs)


def keep_ids_through_checkpointing(model: nn.Module, context: RoutingContext) -> None:
    """Wrap the checkpoint functions that transformers' `gradient_checkpointing_enable` has put on modules, once."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            checkpoint = vars(module).get("_gradient_checkpointing_func")
            if callable(checkpoint) and context not in _contexts(checkpoint):
                vars(module)["_gradient_checkpointing_func"] = Recomputation(checkpoint, context)


def undo_checkpointing(model: nn.Module, context: RoutingContext) -> None:
    """Take the wrappers away again."""
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if isinstance(checkpoint, Recomputation) and checkpoint.context is context:
            vars(module)["_gradient_checkpointing_func"] = checkpoint.checkpoint


def _contexts(checkpoint: Callable[..., Any]) -> list[RoutingContext]:
    """Whose wrappers stand before a checkpoint function, outermost first."""
    found = []
    while isinstance(checkpoint, Recomputation):
        found.append(checkpoint.context)
        checkpoint = checkpoint.checkpoint
    return found


def _batch(owner: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Batch | None:
    """The batch of a call, as far as its arguments show it."""
    named = [kwargs.get(name) for name in (getattr(owner, "main_input_name", INPUTS[0]), *INPUTS)]
    for value in (*named, *args[:1], *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            tokens = value.shape[1] if value.dim() in (2, 3) else None
            return Batch(rows=value.shape[0], tokens=tokens, images=value.dim() > 3, device=value.device)
    return None
