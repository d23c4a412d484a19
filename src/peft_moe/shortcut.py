"""A layer's forward without a gradient in as few steps as it takes, since decoding spends its time on steps of Python.

What the general way looks up and decides in each call is kept, and used for as long as all is as it was.

Shapes: t tokens · in, out features · R ranks in all · E experts · m rows of weights
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from operator import attrgetter, is_, methodcaller
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import kernels
from .bank import ExpertBank
from .fused import least_to_dispatch
from .routing import GroupedRouter, TaskRouter, TokenGate, TokenRouter, softmax, top_k

if TYPE_CHECKING:
    from .layer import MoeLinear

_TRAINING, _IS_REPLACED = attrgetter("training"), methodcaller("__contains__", "forward")


class Shortcut:
    """What a layer with one active adapter has found out about itself.

    Args:
        layer: the layer.
        adapter: name of the adapter.
        base: its base layer.
    """

    def __init__(self, layer: MoeLinear, adapter: str, base: nn.Linear) -> None:
        bank, router = layer.bank(adapter), layer.router_of(adapter)
        self.adapter, self.context, self.bank, self.router = adapter, layer.context, bank, router
        self.active = layer._active_adapter if isinstance(layer._active_adapter, str) else list(layer._active_adapter)
        self.banks = layer.moelora_bank._modules
        self.factor = bank.factors[0] if router is None else 1.0
        self.weight, self.bias = base.weight, base.bias
        self.a, self.b, self.spread = bank.lora_A.weight, bank.lora_B.weight, bank.spread
        self.device = base.weight.device.type
        least = least_to_dispatch(bank, router, self.a.dtype)  # from there on another way is faster
        self.most = math.inf if least is None else least * base.in_features
        self.kind = type(router)
        self.choice = Choice(router, bank) if type(router) is TokenRouter else None  # a subclass may choose otherwise
        read: list[Any] = [base, bank.lora_A, bank.lora_B]  # instead of being called
        read += [router.gate] if isinstance(router, TokenRouter) else []
        passed = [*read, bank, bank.dropout] if router is None else [*read, bank, bank.dropout, router]
        # what shows whether all is as it was, in forms that take no loop of Python to look at: what is where,
        places: list[tuple[dict[str, Any], str]] = [(layer._modules, "base_layer"), (base._parameters, "bias")]
        places += [(m._parameters if "weight" in m._parameters else m._buffers, "weight") for m in read]
        places += [(self.banks, adapter), (bank._buffers, "spread")]  # it is another one when the bank is cast or moved
        places += [(bank._modules, name) for name in ("lora_A", "lora_B", "dropout")]
        if isinstance(router, TokenRouter):
            places.append((router._modules, "gate"))
        if router is not None and adapter in layer.moelora_router:
            places.append((layer.moelora_router._modules, adapter))
        self.dicts, self.keys = [place for place, _ in places], [key for _, key in places]
        self.found = [place.get(key) for place, key in places]
        # who wants to see it, and what is in training
        self.hooks = [*kernels.GLOBAL_HOOKS, *(h for m in passed for h in (m._forward_hooks, m._forward_pre_hooks))]
        self.attributes = [module.__dict__ for module in passed]
        self.modules = [layer, *passed]
        # in a block that has decided by its prompts, the decision, what was made of it, and for which shape of x
        self.now: torch.Tensor | None = None
        self.each = self.spread
        self.shape = torch.Size()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of a layer finds out for itself

    @classmethod
    def of(cls, layer: MoeLinear, adapters: Sequence[str]) -> Shortcut | None:
        """The shortcut of a layer for active adapters; None if it has to go the general way."""
        base = layer.base_layer
        if len(adapters) != 1 or type(base) is not nn.Linear or not kernels.is_bare(base, nn.Linear):
            return None
        bank, router = layer.bank(adapters[0]), layer.router_of(adapters[0])
        a, b = bank.lora_A.weight, bank.lora_B.weight
        if type(bank) is not ExpertBank or not bank.is_bare or a.dtype != b.dtype:
            return None
        if isinstance(router, TokenRouter) and not kernels.is_bare(router.gate, TokenGate):
            return None
        if router is not None and not kernels.is_unseen(router):  # for as long as somebody looks, nothing is dispatched
            return None
        return cls(layer, adapters[0], base)

    def fits(self, layer: MoeLinear, x: torch.Tensor) -> bool:
        """Whether all is as it was found, and x is what it can be used for."""
        return not (
            torch.is_grad_enabled()
            or type(x) is not torch.Tensor
            or x.dtype is not self.weight.dtype
            or (self.choice is not None and self.choice.router.inference_select is not self.choice.select)
            or torch.is_autocast_enabled(self.device)
            or torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state()
            or forward_ad._current_level >= 0
            or not kernels.fused
            or type(self.router) is not self.kind
            or layer._disable_adapters
            or layer.merged_adapters
            or layer._active_adapter != self.active
            or self.bank._awaits_weights
            or self.context.is_mixed
            or x.numel() >= self.most
            or any(self.hooks)
            or not all(map(is_, map(dict.get, self.dicts, self.keys), self.found))
            or any(map(_IS_REPLACED, self.attributes))
            or any(map(_TRAINING, self.modules))
        )

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """What the base layer and the adapter make of x (..., in): (..., out)."""
        shape = x.shape
        tokens = x.reshape(-1, shape[-1])
        out = F.linear(tokens, self.weight, self.bias)
        seen = tokens if tokens.dtype is self.a.dtype else tokens.to(self.a.dtype)
        z = F.linear(seen, self.a)
        each = None if self.router is None else self._each(x, seen)
        if len(z) > kernels.CHUNK or (each is not None and len(each) not in (1, len(z))):
            kernels.add_weighed(out, z, self.b, each, self.factor)
        else:
            h = z if each is None else z * each
            if out.dtype is h.dtype:
                out.addmm_(h, self.b.t(), alpha=self.factor)
            else:
                out.add_(F.linear(h, self.b), alpha=self.factor)
        return out.resize_(*shape[:-1], out.shape[-1])  # no view, which could not be written to with a gradient

    def _each(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """(m, R), what ranks are multiplied by; seen: (t, in), x in the type of A."""
        router, choice = self.router, self.choice
        if choice is not None and choice.is_simple and choice.router.statistics is None:
            return choice.each(seen, self.context.kept).to(self.a.dtype)
        if isinstance(router, GroupedRouter) and not router.owned:
            return self._each_in_block(router, x)
        view = self.context.view(self.adapter)
        kept, key = view.kept, (self.bank, x.shape[0], x.dim())
        if kept is not None and key in kept:
            return kept[key]
        each = self._spread(router(x, view))  # type: ignore[misc]  # there is one
        if isinstance(router, TaskRouter) and kept is not None:
            kept[key] = each  # for the span of the call, and of a generate
        return each

    def _each_in_block(self, router: GroupedRouter, x: torch.Tensor) -> torch.Tensor:
        now = router.now
        if now is None or now.device != x.device:
            return self._spread(router(x, self.context.view(self.adapter)))
        if not router.per_prompt and now.shape[:-1] == x.shape[:-1]:
            return self._spread(now)
        if now is not self.now or x.shape != self.shape:  # the same weights for all that is generated
            self.each = self._spread(router(x, self.context.view(self.adapter)))
            self.now, self.shape = now, x.shape
        return self.each

    def _spread(self, weights: torch.Tensor) -> torch.Tensor:
        """(..., E) to (m, R)."""
        weights = weights.reshape(-1, weights.shape[-1])
        if weights.dtype is self.spread.dtype is self.a.dtype:
            return weights @ self.spread
        return (weights @ self.spread.to(weights.dtype)).to(self.a.dtype)


class Choice:
    """What a token router does, in the fewest operations: a softmax over the scores, or over the k largest.

    Args:
        router: a router.
        bank: whose experts it weighs.
    """

    def __init__(self, router: TokenRouter, bank: ExpertBank) -> None:
        self.router, self.gate, self.select = router, router.gate, router.inference_select
        select = self.select
        is_top_k = isinstance(select, partial) and select.func is top_k
        self.k: int | None = select.keywords["k"] if isinstance(select, partial) and is_top_k else None
        self.is_simple = is_top_k or select is softmax
        if self.k is not None and self.k >= self.gate.num_experts:
            self.k = None
        spread = bank.spread
        self.always = spread[: router.num_shared].sum(0) if router.num_shared else None
        spread = spread[router.num_shared :]
        if router.base_is_empty:  # experts without matrices, which add nothing
            spread = torch.cat([spread.new_zeros(router.num_base, spread.shape[1]), spread])
        self.spread = spread
        self.nothing = spread.new_zeros(0, self.gate.num_experts)
        self.temperature: torch.Tensor | float | None = self.gate.fixed_temperature
        self.kept: Any = None  # of the call that the temperature was made in

    def each(self, seen: torch.Tensor, kept: Any) -> torch.Tensor:
        """(t, R), what ranks are multiplied by.

        Args:
            seen: x (t, in).
            kept: what is kept for the span of a call; another one is another call.
        """
        gate, dtype = self.gate, self.spread.dtype  # float32 or wider, in which gates compute
        if gate.temperature_bias is not None and (kept is None or kept is not self.kept):
            self.temperature, self.kept = cast(torch.Tensor, gate.temperature).to(dtype), kept
        weight, bias = gate.weight.to(dtype), None if gate.bias is None else gate.bias.to(dtype)
        scores = F.linear(seen.to(dtype), weight, bias)
        if self.k is None:
            weights = (scores if self.temperature is None else scores / self.temperature).softmax(-1)
        else:
            largest, experts = scores.topk(self.k, -1)
            largest = largest if self.temperature is None else largest / self.temperature
            if len(self.nothing) != len(seen):
                self.nothing = self.nothing.new_zeros(len(seen), gate.num_experts)
            weights = self.nothing.scatter(-1, experts, largest.softmax(-1))
        return weights @ self.spread if self.always is None else torch.addmm(self.always, weights, self.spread)
