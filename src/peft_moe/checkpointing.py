"""Gradient checkpointing by functions that modules have: what runs again in backward is told what its forward was.

Where model code calls torch's function itself, `routing.history` finds that out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from .blocks import BlockEntry
from .routing import Call, GroupedRouter, RoutingContext


class Recomputation:
    """Stands before a module's checkpoint function, so that what runs again in backward is routed as in its forward.

    Args:
        checkpoint: the function.
        context: carries the call.
        owner: the module, whose routers read what enters it, now and again in backward, if it is a block.
    """

    def __init__(self, checkpoint: Callable[..., Any], context: RoutingContext, owner: nn.Module) -> None:
        self.checkpoint, self.context, self.owner = checkpoint, context, owner

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context = self.context
        if torch.compiler.is_compiling():  # a compiled graph recomputes itself, from its own inputs
            return self.checkpoint(function, *args, **kwargs)
        entries = [e for e in context.entered if isinstance(e, BlockEntry) and e.block is self.owner]
        call, routers = context.current, context.deciders
        if call is None and not entries and not routers:
            return self.checkpoint(function, *args, **kwargs)
        # inputs of the checkpoint, so that gradients reach routers of a block that this is a part of
        decisions = [router.now for router in routers]
        return self.checkpoint(Rerun(function, context, call, entries, routers), *args, *decisions, **kwargs)


@dataclass
class Rerun:
    """What a checkpoint function runs in forward and again in backward.

    Args:
        function: what it was to run.
        context: carries the call.
        call: the call; None outside of one, when the context finds out for itself.
        entries: of the block that this is, outermost first.
        routers: of the blocks that this is in, whose decisions come as the last arguments.
    """

    function: Callable[..., Any]
    context: RoutingContext
    call: Call | None
    entries: Sequence[BlockEntry]
    routers: Sequence[GroupedRouter]

    @property
    def keywords(self) -> Mapping[str, Any]:
        """What transformers has bound, so that only tensors are arguments."""
        return getattr(self.function, "keywords", {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        n = len(args) - len(self.routers)
        args, decisions = args[:n], args[n:]
        with ExitStack() as stack:
            if self.call is not None:
                stack.enter_context(self.context.replay(self.call))
            stack.enter_context(self.context.decided(self.routers, decisions))
            for entry in self.entries:
                stack.enter_context(entry.span(args, self.keywords))
            return self.function(*args, **kwargs)


def keep_call_through_checkpointing(model: nn.Module, context: RoutingContext) -> None:
    """Wrap, once, the checkpoint functions that transformers or torch's `CheckpointWrapper` have put on modules."""
    for module, name, checkpoint in _checkpoint_functions(model):
        if context not in _contexts(checkpoint):
            vars(module)[name] = Recomputation(checkpoint, context, module)


def undo_checkpointing(model: nn.Module, context: RoutingContext) -> None:
    """Take the wrappers away again."""
    for module, name, checkpoint in _checkpoint_functions(model):
        if isinstance(checkpoint, Recomputation) and checkpoint.context is context:
            vars(module)[name] = checkpoint.checkpoint


def _checkpoint_functions(model: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    for module in model.modules():
        attributes = vars(module)
        if isinstance(module, CheckpointWrapper):
            yield module, "checkpoint_fn", attributes["checkpoint_fn"]
        elif callable(checkpoint := attributes.get("_gradient_checkpointing_func")):
            yield module, "_gradient_checkpointing_func", checkpoint


def _contexts(checkpoint: Callable[..., Any]) -> list[RoutingContext]:
    """Whose wrappers stand before a checkpoint function, outermost first."""
    found = []
    while isinstance(checkpoint, Recomputation):
        found.append(checkpoint.context)
        checkpoint = checkpoint.checkpoint
    return found
