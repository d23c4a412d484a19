"""Gradient checkpointing: layers that run again in backward see the call of their own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from .blocks import BlockEntry
from .routing import RoutingContext


class Recomputation:
    """Stands before a module's checkpoint function, so that what runs again in backward has the call of its forward.

    Args:
        checkpoint: the function.
        context: carries the call.
        owner: the module, whose routers read what enters it, now and again in backward, if it is a block.
    """

    def __init__(self, checkpoint: Callable[..., Any], context: RoutingContext, owner: nn.Module) -> None:
        self.checkpoint, self.context, self.owner = checkpoint, context, owner

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, entry = self.context.current, vars(self.owner).get("forward")
        if torch.compiler.is_compiling():  # a compiled graph recomputes itself, from its own inputs
            return self.checkpoint(function, *args, **kwargs)
        entry = entry if isinstance(entry, BlockEntry) and entry.tuner.context is self.context else None
        if call is None and entry is None:
            return self.checkpoint(function, *args, **kwargs)
        named = getattr(function, "keywords", {})  # transformers binds them, so that only tensors are arguments

        def run(*args: Any, **kwargs: Any) -> Any:
            with (
                self.context.replay(call) if call else nullcontext(),
                entry.span(args, named) if entry else nullcontext(),
            ):
                return function(*args, **kwargs)

        return self.checkpoint(run, *args, **kwargs)


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
