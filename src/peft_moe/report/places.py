"""Where an adapter routes: the places that a report is about, their experts, and what their routers gave.

Shapes: n rows · s tokens · E experts · G groups
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..bank import ExpertBank
from ..grouped import GroupedMoeConfig
from ..layer import IN_BASE_EXPERTS, MoeLinear
from ..routing import GroupedRouter, Router, TaskRouter, TokenRouter
from ..routing.names import by_group, by_number, parts_of
from ..tuner import MoeTuner
from .similarity import similarity

# Gets a router, its weights (k, m, E), k rows or 1 for all, m tokens or 1 for all; and those of groups (k, m, G).
Sink = Callable[[Router, torch.Tensor, "torch.Tensor | None"], None]


@dataclass
class Place:
    """A layer, or a block whose layers share a router.

    Args:
        name: in the model.
        router: its router.
        experts: names of the experts, in the order of the router's weights.
        group_of: by expert, the index of its group, or -1; None where there are no groups.
        banks: of the layers.
    """

    name: str
    router: Router
    experts: list[str]
    group_of: list[int] | None
    banks: list[ExpertBank] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """What a report says of it that does not depend on data."""
        _, block, module = parts_of(self.name)
        ranks = [max(of_expert) for of_expert in zip(*(bank.ranks for bank in self.banks), strict=True)]
        return {
            "name": self.name,
            "block": block,
            "module": module,
            "experts": self.experts,
            "ranks": [0] * self._empty + ranks[self._shared :],
            "group_of": self.group_of,
        }

    def similarity(self) -> list[list[float]] | None:
        """Cosines between the experts' updates, (E, E); None for weights that are offloaded."""
        if any(bank.lora_A.weight.is_meta or bank.lora_B.weight.is_meta for bank in self.banks):
            return None
        of_bank, e, empty = similarity(self.banks), len(self.experts), self._empty
        found = of_bank.new_zeros(e, e)
        found[empty:, empty:] = of_bank[self._shared :, self._shared :]
        return found.tolist()

    @property
    def _shared(self) -> int:
        """How many of a bank's first experts every token gets whole."""
        return self.router.num_shared if isinstance(self.router, TokenRouter) else 0

    @property
    def _empty(self) -> int:
        """How many of the experts have no matrices, and come first."""
        return self.router.num_base if isinstance(self.router, TokenRouter) and self.router.base_is_empty else 0


def places_of(tuner: MoeTuner, adapter: str) -> tuple[list[Place], list[str]]:
    """An adapter's routed places in the order of the model; and names of those that cannot be looked at.

    The latter are in the base model's own experts, which see tokens picked from all rows.
    """
    config = tuner.peft_config[adapter]
    places: dict[str, Place] = {}
    skipped: list[str] = []
    for key, layer in tuner.model.named_modules():
        if not isinstance(layer, MoeLinear) or adapter not in layer.moelora_bank:
            continue
        router, bank = layer.router_of(adapter), layer.bank(adapter)
        if router is None:
            continue
        if IN_BASE_EXPERTS.search(key):
            skipped.append(key)
            continue
        name = key
        if isinstance(router, GroupedRouter) and not router.owned:
            name = router.name.removeprefix(f"{adapter}/")
        place = places.setdefault(name, Place(name, router, *_experts(config, router, bank)))
        place.banks.append(bank)
    return list(places.values()), skipped


def _experts(config: Any, router: Router, bank: ExpertBank) -> tuple[list[str], list[int] | None]:
    if isinstance(router, GroupedRouter) and isinstance(config, GroupedMoeConfig):
        return by_group(config.names, general=router.has_general)
    if isinstance(router, TokenRouter):
        return by_number(router.gate.num_experts - router.num_base, base=router.num_base), None
    return by_number(len(bank.ranks)), None


class Watch:
    """Looks at what routers give, by hooks, which the fast ways of a layer's forward make way for.

    Args:
        routers: which.
        sink: what gets it.
    """

    def __init__(self, routers: list[Router], sink: Sink) -> None:
        self.routers, self.sink = list(dict.fromkeys(routers)), sink
        self.done: set[Router] = set()  # of this batch: a task gate gives the same to all the layers that share it
        self.shape = (0, 0)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Look, for the span of a `with` block."""
        hooks: list[Any] = []
        kept = {router: router.statistics for router in self.routers if isinstance(router, TokenRouter)}
        try:
            for router in self.routers:
                if isinstance(router, GroupedRouter):
                    router.seen = []
                else:
                    hooks.append(router.register_forward_hook(self._hook))
                if isinstance(router, TokenRouter):
                    router.statistics = None  # of training and its evaluations, which this is no part of
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for router in self.routers:
                if isinstance(router, GroupedRouter):
                    router.seen = None
                elif isinstance(router, TokenRouter):
                    router.statistics = kept[router]

    @contextmanager
    def batch(self, rows: int, tokens: int) -> Iterator[None]:
        """A call of the model with an input (rows, tokens)."""
        self.shape, self.done = (rows, tokens), set()
        yield
        for router in self.routers:
            if isinstance(router, GroupedRouter):
                for decision in router.seen or ():
                    self._give(router, router._combine(decision), decision.groups)
                router.seen = []

    def _hook(self, router: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if isinstance(router, TaskRouter):
            if router not in self.done:
                self.done.add(router)
                self._give(router, output, None)
        elif isinstance(router, TokenRouter):
            if router.base_is_empty and router.num_base:  # whose weights are not in the output
                output = router.inference_select(router.gate(args[0]))
            else:
                output = output[..., router.num_shared :]
            self._give(router, output, None)

    def _give(self, router: Router, weights: torch.Tensor, groups: torch.Tensor | None) -> None:
        self.sink(router, self._as_rows(weights), None if groups is None else self._as_rows(groups))

    def _as_rows(self, weights: torch.Tensor) -> torch.Tensor:
        """(..., E) as (n or 1, s or 1, E)."""
        n, s = self.shape
        flat = weights.float().reshape(-1, weights.shape[-1])
        if len(flat) == n * s:
            return flat.view(n, s, -1)
        if len(flat) in (1, n):
            return flat.unsqueeze(1)
        raise ValueError(
            f"A router gave weights of shape {tuple(weights.shape)} in a call of {n} rows of {s} tokens, so that it "
            "cannot be told which token is which; leave the layer out with exclude_modules."
        )
