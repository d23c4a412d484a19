"""Gradient checkpointing: layers that run again in backward see the call of their own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from .routing import RoutingContext


class Recomputation:
    """Stands before a module's checkpoint function, so that what runs again in backward has the call of its forward."""

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


def keep_call_through_checkpointing(model: nn.Module, context: RoutingContext) -> None:
    """Wrap, once, the checkpoint functions that transformers or torch's `CheckpointWrapper` have put on modules."""
    for attributes, name, checkpoint in _checkpoint_functions(model):
        if context not in _contexts(checkpoint):
            attributes[name] = Recomputation(checkpoint, context)


def undo_checkpointing(model: nn.Module, context: RoutingContext) -> None:
    """Take the wrappers away again."""
    for attributes, name, checkpoint in _checkpoint_functions(model):
        if isinstance(checkpoint, Recomputation) and checkpoint.context is context:
            attributes[name] = checkpoint.checkpoint


def _checkpoint_functions(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Callable[..., Any]]]:
    for module in model.modules():
        attributes = vars(module)
        if isinstance(module, CheckpointWrapper):
            yield attributes, "checkpoint_fn", attributes["checkpoint_fn"]
        elif callable(checkpoint := attributes.get("_gradient_checkpointing_func")):
            yield attributes, "_gradient_checkpointing_func", checkpoint


def _contexts(checkpoint: Callable[..., Any]) -> list[RoutingContext]:
    """Whose wrappers stand before a checkpoint function, outermost first."""
    found = []
    while isinstance(checkpoint, Recomputation):
        found.append(checkpoint.context)
        checkpoint = checkpoint.checkpoint
    return found
