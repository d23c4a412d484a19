"""Gradient checkpointing: layers that run again in backward see the call of their own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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
