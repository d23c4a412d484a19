"""Where a model decides about experts, and what each place gave every token of a call.

Shapes: n rows · E experts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from ..layer import MoeLinear
from ..routing import GroupedRouter, Router, TaskRouter, TokenRouter
from ..schedule import layer_of

Saw = Callable[[torch.Tensor], None]


class Place:
    """One place that decides: a routed layer, or a block of AT-MoE, whose layers share what its router says.

    Layers that share a gate of MOELoRA are a place each, since their experts differ, though their weights do not.

    Args:
        name: of the module.
        layer: the layer, the first one of a block.
        adapter: whose experts.
        groups: names of AT-MoE's experts by group.
    """

    def __init__(self, name: str, layer: MoeLinear, adapter: str, groups: dict[str, list[str]] | None) -> None:
        self.name, self.layer, self.adapter = name, layer, adapter
        self.router = cast(Router, layer.router_of(adapter))
        at = layer_of(name)
        self.block = None if at is None else at[1]
        self.module = name if at is None else name.removeprefix(f"{at[0]}.{at[1]}").lstrip(".")
        ranks = list(layer.bank(adapter).ranks)
        if isinstance(self.router, GroupedRouter):
            of_group = groups or {}
            self.experts = [f"{group}/{expert}" for group, experts in of_group.items() for expert in experts]
            self.group_of: list[int] | None = [g for g, experts in enumerate(of_group.values()) for _ in experts]
            if self.router.has_general:
                self.experts.append("general")
                self.group_of.append(-1)
        elif isinstance(self.router, TokenRouter):
            self.experts, self.group_of = _names(self.router, len(ranks)), None
            ranks = [0, *ranks] if self.router.base_is_empty else ranks
        else:
            self.experts, self.group_of = [str(i) for i in range(len(ranks))], None
        self.ranks = ranks

    @contextmanager
    def watched(self, saw: Saw) -> Iterator[None]:
        """Hand on what it decides in the `with` block.

        Args:
            saw: gets weights (..., E) with the leading axes of the layer's input, or (n or 1, 1, E).
        """
        # a router of several layers does not know for which it is called; what it says there, a layer may ask for again
        of_block = isinstance(self.router, GroupedRouter) and not self.router.owned
        by_layer = of_block or isinstance(self.router, TaskRouter)
        handle = (
            self.layer.register_forward_hook(lambda _, args, __: saw(self._whole(self._asked(args[0]))))
            if by_layer
            else self.router.register_forward_hook(lambda _, __, made: saw(self._whole(made)))
        )
        try:
            yield
        finally:
            handle.remove()

    def _asked(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.layer.weights(self.adapter, x))

    def _whole(self, weights: torch.Tensor) -> torch.Tensor:
        """With what is left for the base model alone, where a base expert has no matrices."""
        weights = weights.detach().float()
        if isinstance(self.router, TokenRouter) and self.router.base_is_empty:
            left = 1 + self.router.num_shared - weights.sum(-1, keepdim=True)
            return torch.cat([left.clamp_min(0), weights], dim=-1)
        return weights


def places_of(model: nn.Module, adapter: str, groups: dict[str, list[str]] | None) -> list[Place]:
    """The places of an adapter, in the order of the model; layers of one expert decide nothing and are left out.

    Args:
        model: has the layers.
        adapter: its name.
        groups: names of AT-MoE's experts by group.
    """
    found, blocks = [], set()
    for name, layer in model.named_modules():
        if not isinstance(layer, MoeLinear) or adapter not in layer.moelora_bank:
            continue
        router = layer.router_of(adapter)
        if router is None or router in blocks:
            continue
        if isinstance(router, GroupedRouter) and not router.owned:
            blocks.add(router)
            at = layer_of(name)
            name = name if at is None else f"{at[0]}.{at[1]}"
        found.append(Place(name, layer, adapter, groups))
    return found


def _names(router: TokenRouter, banks: int) -> list[str]:
    shared = [f"shared {i}" for i in range(router.num_shared)]
    if router.base_is_empty:
        return ["base", *shared, *(str(i) for i in range(banks - router.num_shared))]
    base = [f"base {i}" for i in range(router.num_base)]
    return [*shared, *base, *(str(i) for i in range(banks - router.num_shared - router.num_base))]


def statistics_of(weights: torch.Tensor) -> torch.Tensor:
    """What is added up of weights (..., E): these, top-1, chosen, entropy of their shares, and 1: (..., 3 E + 2)."""
    top = torch.zeros_like(weights).scatter_(-1, weights.argmax(-1, keepdim=True), 1.0)
    share = weights / weights.sum(-1, keepdim=True).clamp_min(1e-9)
    entropy = torch.special.entr(share).sum(-1, keepdim=True)
    return torch.cat([weights, top, (weights > 0).to(weights), entropy, torch.ones_like(entropy)], dim=-1)


def read_sums(sums: torch.Tensor, place: Place) -> dict[str, Any]:
    """Sums (3 E + 2,) of `statistics_of` over tokens as numbers."""
    e = len(place.experts)
    load, tokens = sums[:e], sums[-1].item()
    share = load / load.sum().clamp_min(1e-9)
    return {
        "tokens": round(tokens),
        "load": share.tolist(),
        "top1": (sums[e : 2 * e] / tokens).tolist(),
        "chosen": (sums[2 * e : 3 * e] / tokens).tolist(),
        "entropy": sums[-2].item() / tokens,
        "effective_experts": torch.special.entr(share).sum().exp().item(),
        "chosen_per_token": sums[2 * e : 3 * e].sum().item() / tokens,
    }
