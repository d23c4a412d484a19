"""Where a call enters a model and leaves it: the border with peft's and transformers' calls.

peft's `PeftModelFor*.forward` have a `task_ids` argument of their own and pass it on for one other method only;
transformers' `generate` refuses arguments it does not know, and its Trainer drops columns that the base model's forward
does not name. So the instances (not the classes) get a `forward`, and the base model a `generate`, that take `task_ids`
and hand on the rest. They also see padding and prompts on the way in, and on the way out what the loss is made of.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .checkpointing import keep_call_through_checkpointing
from .packing import refuse_mixed_tasks
from .prompts import for_forward, for_generate
from .routing import Batch, Ledger, keep_mask

if TYPE_CHECKING:
    from .tuner import MoeTuner

INPUTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")


class Entry:
    """Stands in for a method of one model: tells the tuner's context of a call for its span.

    Args:
        owner: the model.
        method: name of its method.
        tuner: whose context is told.
    """

    def __init__(self, owner: nn.Module, method: str, tuner: MoeTuner) -> None:
        self.owner, self.method, self.tuner = owner, method, tuner
        # Somebody else's replacement, such as accelerate's hooks, or the entry of a tuner further in.
        self.replaced = owner.__dict__.get(method)

    @property
    def whole(self) -> bool:
        """Whether the owner is the model, or the `PeftModel` around it, and no part that generate calls by itself."""
        return self.owner is self.tuner.model or getattr(self.owner, "base_model", None) is self.tuner

    @property
    def _drafts(self) -> bool:
        """Whether a `generate` inside of one makes drafts for it, leaving early: other blocks have still to read."""
        return not self.tuner.context.in_forward and vars(self.owner).get(self.method) is self

    @classmethod
    def install(cls, owner: nn.Module, method: str, tuner: MoeTuner) -> None:
        """Put an entry before `owner.method`, once.

        transformers makes a tuner for each adapter that it adds, and takes none away. One of the same type that has the
        same context takes its predecessor's entry, so that adding and deleting adapters does not pile them up.
        """
        there = owner.__dict__.get(method)
        while isinstance(there, cls):
            if there.tuner is tuner or there._serves(tuner):
                there.tuner = tuner
                return
            there = there.replaced
        setattr(owner, method, cls(owner, method, tuner))

    def _serves(self, tuner: MoeTuner) -> bool:
        alike = type(self.tuner) is type(tuner) and self.tuner.context is tuner.context
        return alike and not self.tuner.in_peft_model

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
        # a PeftModel has adapter_names from its caller, and tells the tuner of them on the way to the model in it
        names = kwargs.get("adapter_names") if self.owner is not self.tuner.model else None
        # other threads wait from here on, so that what this call finds set is meant for it
        with self.tuner.context.turn(), self.tuner.mixed(names):
            return self._call(args, task_ids, kwargs)

    def _call(self, args: Sequence[Any], task_ids: Any, kwargs: dict[str, Any]) -> Any:
        tuner, context = self.tuner, self.tuner.context
        answering = self.method == "generate"
        training = self.owner.training and torch.is_grad_enabled() and not answering
        if training and not context.open and not torch.compiler.is_compiling():
            keep_call_through_checkpointing(self.owner, context)
        active = tuner.present
        prompts = tuner.reads_prompts and bool(active)
        batch = self._batch(args, kwargs, masks=training or tuner.recording or prompts)
        told: dict[str, Any] = {}
        first = self.method == "forward" and self.whole and not context.in_forward
        if first and batch is not None and not context.open:  # generate makes rows of its own
            named = partial(self._named, args, kwargs)
            refuse_mixed_tasks(tuner, batch, named, task_ids, training=training)
        if prompts and batch is not None:
            arguments = self._named(args, kwargs)
            if answering and (not context.open or self._drafts):
                told = for_generate(tuner, self.owner, batch, arguments)
            elif first:
                batch, told = for_forward(tuner, batch, arguments, training=training)
            elif self.whole:  # inside a forward, which has marked the prompts
                batch = None
            elif context.prompt_mask is not None:  # an encoder, which has a batch of its own
                batch = batch.with_prompt(context.prompt_mask)
        if tuner.reads_prompts:
            kwargs.pop("prompt_mask", None)
        with context.call(
            task_ids, active=active, batch=batch, training=training, counted=not answering, in_forward=first, **told
        ) as ledger:
            if isinstance(self.replaced, Entry):  # a tuner inside a tuner is told the same
                kwargs["task_ids"] = context.told
            if self.replaced is not None:
                outputs = self.replaced(*args, **kwargs)
            else:
                outputs = getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)
            if prompts and first:
                context.prompt_was_read(batch, _cache_in(outputs))
            outputs = outputs if ledger is None else self._settle(ledger, outputs, kwargs)
            context.keep_with(outputs)
            return outputs

    def _batch(self, args: Sequence[Any], kwargs: dict[str, Any], *, masks: bool) -> Batch | None:
        """The batch of a call, as far as its arguments show it."""
        named = [kwargs.get(name) for name in (getattr(self.owner, "main_input_name", INPUTS[0]), *INPUTS)]
        for value in (*named, *args[:1], *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                tokens = value.shape[1] if value.dim() in (2, 3) else None
                found = self._masks(args, kwargs) if masks else {}
                return Batch(value.shape[0], tokens, images=value.dim() > 3, device=value.device, **found)
        return None

    def _masks(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
        kwargs = self._named(args, kwargs) if len(args) > 1 else kwargs
        mask, decoder_mask = kwargs.get("attention_mask"), kwargs.get("decoder_attention_mask")
        labels = kwargs.get("labels")
        if decoder_mask is None and self.tuner.is_encoder_decoder and kwargs.get("decoder_input_ids") is None:
            # such a model makes its decoder's inputs from the labels
            decoder_mask = labels != -100 if isinstance(labels, torch.Tensor) and labels.dim() == 2 else None
        return {"mask": keep_mask(mask), "decoder_mask": keep_mask(decoder_mask)}

    def _named(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        if not args or (self.method == "generate" and len(args) == 1):
            return kwargs
        signature = inspect.signature(getattr(type(self.owner), self.method))
        return kwargs | signature.bind(self.owner, *args, **kwargs).arguments

    def _settle(self, ledger: Ledger, outputs: Any, kwargs: dict[str, Any]) -> Any:
        """Let the balance losses follow the loss of a training call, or what it will be made of."""
        ledger.is_open = False
        if not ledger.charged:
            return outputs
        named = isinstance(outputs, dict)
        scalar = isinstance(outputs, tuple) and isinstance(outputs[0], torch.Tensor) and outputs[0].dim() == 0
        loss = outputs.get("loss") if named else outputs[0] if scalar else None
        log_probs, mask = (outputs.get(name) if named else None for name in ("log_probs", "label_mask"))  # TRL's
        if loss is None and log_probs is None and ledger.in_graphs:
            raise RuntimeError(
                "A compiled model adds its balance loss to the loss it returns, and this call returns none; pass "
                "labels, set balance_loss='none', or do not compile."
            )
        loss, log_probs = ledger.settle(loss, self._share(kwargs), log_probs, mask)
        if named and loss is not None:
            outputs["loss"] = loss
        if log_probs is not None:
            outputs["log_probs"] = log_probs
        return (loss, *outputs[1:]) if scalar else outputs

    def _share(self, kwargs: dict[str, Any]) -> torch.Tensor | float:
        """The part of a step's label tokens that this call has, counted as Trainer does; 1 if its loss is a mean."""
        total, labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
        if labels is None and isinstance(labels := kwargs.get("labels"), torch.Tensor) and self.tuner.shifts_labels:
            labels = labels[..., 1:]
        if total is None or not isinstance(labels, torch.Tensor):
            return 1.0
        return (labels != -100).sum() / torch.as_tensor(total, device=labels.device)

    @property
    def __code__(self) -> CodeType:
        """The method's own, which torch.export asks a forward for."""
        return cast(CodeType, inspect.unwrap(getattr(type(self.owner), self.method)).__code__)

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's own signature and what is added to it, so that Trainer keeps columns of these names."""
        method = self.replaced or getattr(type(self.owner), self.method).__get__(self.owner)
        signature = inspect.signature(method)
        if "task_ids" in signature.parameters:
            return signature
        parameters = list(signature.parameters.values())
        at = -1 if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else len(parameters)
        for name in ("task_ids", "prompt_mask") if self.tuner.reads_prompts else ("task_ids",):
            parameters.insert(at, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None))
        return signature.replace(parameters=parameters)


def _cache_in(outputs: Any) -> Any:
    """The cache of keys and values in what a model returns; None if there is none."""
    if isinstance(outputs, tuple):  # with return_dict=False
        return next((part for part in outputs if hasattr(part, "get_seq_length")), None)
    # its name since transformers 5.24, which warns of the old one
    return outputs.cache if hasattr(outputs, "cache") else getattr(outputs, "past_key_values", None)
