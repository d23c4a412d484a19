"""Where a call enters a transformer block: routers that the block's linear layers share read what enters it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from .routing import GroupedRouter, RoutingContext, View


class Readers(Protocol):
    """What a tuner tells a block's entry."""

    context: RoutingContext

    def wrap_checkpoints(self, block: nn.Module) -> None:
        """Let what a block runs again in backward enter the block's span."""

    def readers(self, block: str) -> list[tuple[GroupedRouter, View]]:
        """The routers of a block that are to read its input, each with what it sees of the call."""


class BlockEntry:
    """Stands in for the `forward` of one block: its routers decide by its input, for the span of the call.

    Args:
        block: the module.
        key: its name.
        tuner: whose routers read.
    """

    def __init__(self, block: nn.Module, key: str, tuner: Readers) -> None:
        self.block, self.key, self.tuner = block, key, tuner
        self.replaced = block.__dict__.get("forward")
        self._wrapped: Any = None  # the checkpoint function that is known to enter the span
        self.parameters = list(inspect.signature(type(block).forward).parameters)[1:]

    @classmethod
    def install(cls, block: nn.Module, key: str, tuner: Readers) -> None:
        """Put an entry before the block's forward, once."""
        there = vars(block).get("forward")
        if not (isinstance(there, cls) and there.tuner is tuner):
            vars(block)["forward"] = cls(block, key, tuner)

    @classmethod
    def remove(cls, block: nn.Module, tuner: Readers) -> None:
        """Take the entry away again."""
        there = vars(block).get("forward")
        if isinstance(there, cls) and there.tuner is tuner:
            del vars(block)["forward"]
            if there.replaced is not None:
                vars(block)["forward"] = there.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = self.replaced or type(self.block).forward.__get__(self.block)
        if self._checkpoints():  # its forward runs a checkpoint function, which enters the span, in backward too
            with self.tuner.context.entering(self):
                return forward(*args, **kwargs)
        with self.span(args, kwargs):
            return forward(*args, **kwargs)

    def _checkpoints(self) -> bool:
        """Whether the block's own forward is what checkpoints, and may run again for backward.

        It is in transformers from 5.23 on, and in 5.23 without gradients too. Before, `__call__` is what checkpoints,
        so that this forward runs inside of the checkpoint, and again with it.
        """
        name = "_gradient_checkpointing_func"
        on = getattr(self.block, "gradient_checkpointing", False) and self.block.training and name in vars(self.block)
        if not on or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if name not in type(self.block).forward.__code__.co_names:  # the name is one that the function reads
            return False
        if vars(self.block)[name] is not self._wrapped:
            self.tuner.wrap_checkpoints(self.block)
            self._wrapped = vars(self.block)[name]
        return True

    @contextmanager
    def span(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Routers decide by the arguments of the block's forward, until the end of the `with` block."""
        readers, context = self.tuner.readers(self.key), self.tuner.context
        before, context.deciders = context.deciders, (*context.deciders, *(router for router, _ in readers))
        try:
            for router, view in readers:
                router.read(view.own(self._entering(router, args, kwargs)), view)
            yield
        finally:
            context.deciders = before
            for router, _ in readers:
                router.leave()

    def _entering(self, router: GroupedRouter, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """What enters the block; what the encoder has read, for a router that reads that.

        Raises:
            ValueError: the block gets no such tensor.
        """
        if router.reads_encoder:
            name = "encoder_hidden_states"
            at = self.parameters.index(name) if name in self.parameters else len(args)
            found = args[at] if at < len(args) else kwargs.get(name)
        else:
            name = self.parameters[0] if self.parameters else "hidden_states"
            found = args[0] if args else kwargs.get(name, kwargs.get("hidden_states"))
        if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.dim() < 2:
            raise ValueError(
                f"Block {self.key!r} ({type(self.block).__name__}) gets no tensor {name!r}, which its router reads; "
                "leave its layers' experts out"
                + ("." if not router.reads_encoder else ", or use router_input='token'.")
            )
        return found
