"""A layer's forward on kernels: its modules' weights are read without calling them, where nobody would notice.

Shapes: t tokens · in, out features · R ranks in all · E experts · m rows of weights
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from . import dispatch, kernels
from .bank import ExpertBank
from .routing import Router, TokenGate, TokenRouter, View

if TYPE_CHECKING:
    from .layer import MoeLinear


def can_run(layer: MoeLinear, x: torch.Tensor, adapters: Sequence[str]) -> bool:
    """Whether kernels give what calling the layer's modules gives, to rounding."""
    return kernels.may_fuse(x) and all(layer.bank(name).is_bare for name in adapters)


def run(layer: MoeLinear, x: torch.Tensor, adapters: Sequence[str]) -> torch.Tensor:
    """What the base layer and adapters, at least one, make of x (..., in): (..., out)."""
    base = _weights_of(layer.base_layer, x)
    result = layer.call_base(x) if base is None else None
    if result is not None and type(result) is not torch.Tensor:
        return layer.add(result, x, adapters)
    for name in adapters:
        # what a base layer gives that had to be called may be a view, or somebody else's too
        result = add(layer, name, x, layer.context.view(name), result, base, writable=base is not None)
    assert result is not None
    return result


def add(
    layer: MoeLinear,
    adapter: str,
    x: torch.Tensor,
    view: View,
    result: torch.Tensor | None,
    base: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    *,
    writable: bool,
) -> torch.Tensor:
    """Add what an adapter makes of x.

    Args:
        layer: the layer.
        adapter: the adapter's name.
        x: (..., in).
        view: what the adapter sees of the call.
        result: (..., out), what to add to.
        base: the base layer's weights, what to add to if there is no `result`.
        writable: `result` may be written to.
    """
    bank, router = layer.bank(adapter), layer.router_of(adapter)
    bank.check_weights()
    tokens, a, b = _as_tokens(x), bank.lora_A.weight, bank.lora_B.weight
    gate, k = _gate_of(router, x), experts_to_dispatch(bank, router, x)
    if k is not None:
        return _dispatch(layer, adapter, x, view, result, base, k, writable=writable)
    weights = None if router is None or gate is not None else _as_tokens(layer.weights(adapter, x, view))
    factor = bank.factors[0] if router is None else 1.0
    each = None
    if weights is not None and len(weights) == 1 and len(tokens) > a.shape[1]:
        # one task: there are fewer numbers in A to multiply than in rank space
        each, weights = kernels.each_rank(weights, bank.spread, a.dtype), None
    p = _dropping(bank)
    made, z, product = kernels.project(
        tokens,
        a,
        base=base if result is None else None,
        gate=gate,
        dropout=kernels.draw_dropout(x, p) if p else None,
        each=each,
        low=kernels.autocast_dtype(x),
    )
    out = made if result is None else _as_tokens(result)
    assert out is not None
    if product is not None:
        weights = _as_tokens(layer.weights(adapter, x, view, product.view(*x.shape[:-1], product.shape[-1])))
    out = kernels.add(out, z, b, weights=weights, spread=bank.spread, factor=factor, writable=writable)
    return _shaped(out, x)


def _dispatch(
    layer: MoeLinear,
    adapter: str,
    x: torch.Tensor,
    view: View,
    result: torch.Tensor | None,
    base: tuple[torch.Tensor, torch.Tensor | None] | None,
    k: int,
    *,
    writable: bool,
) -> torch.Tensor:
    """`add`, where each token's k experts are computed and no others."""
    bank, tokens, gate = layer.bank(adapter), _as_tokens(x), _gate_of(layer.router_of(adapter), x)
    product = None
    if gate is not None:  # in float32 or wider, as everywhere, or rounding would choose other experts here
        gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
        product = kernels.project(tokens, gate)[1].view(*x.shape[:-1], len(gate))
    weights, experts = _as_tokens(layer.weights(adapter, x, view, product)).topk(k, dim=-1)
    weights = weights * (bank.factors[0] if bank.scaling is None else bank.scaling[experts])
    # of tokens, not of x, whose output with a bias is a view, which cannot be written to
    out = F.linear(tokens, *base) if result is None and base is not None else _as_tokens(result)
    a, b, r = bank.lora_A.weight, bank.lora_B.weight, bank.ranks[0]
    out = dispatch.add_experts(out, tokens, a, b, weights=weights, experts=experts, r=r, writable=writable)
    return _shaped(out, x)


def experts_to_dispatch(bank: ExpertBank, router: Router | None, x: torch.Tensor) -> int | None:
    """The number of experts of each token of x (..., in), where it pays to compute these alone; else None."""
    least = least_to_dispatch(bank, router, kernels.autocast_dtype(x) or bank.lora_A.weight.dtype)
    pays = least is not None and x.numel() >= least * x.shape[-1] and not _dropping(bank)
    return cast(TokenRouter, router).chosen_per_token if pays else None


def least_to_dispatch(bank: ExpertBank, router: Router | None, dtype: torch.dtype) -> int | None:
    """From how many tokens on it pays to compute each token's experts alone, in a type; None for never."""
    if type(router) is not TokenRouter or not kernels.is_unseen(router):  # others may give a token any experts
        return None
    if len(set(bank.ranks)) > 1 or (k := router.chosen_per_token) is None:
        return None
    device, r = bank.lora_A.weight.device, bank.ranks[0]
    return dispatch.least_tokens(num_experts=len(bank.ranks), k=k, r=r, dtype=dtype, device=device)


def _weights_of(base: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight (out, in) and bias (out,) of a base layer that need not be called; None for another."""
    if not kernels.is_bare(base, nn.Linear, Conv1D):
        return None
    weight, bias = cast(torch.Tensor, base.weight), cast("torch.Tensor | None", base.bias)
    # a base layer that x does not fit is called, for the error that is due
    fits = x.device == weight.device and (x.dtype == weight.dtype or kernels.autocast_dtype(x) is not None)
    return (weight if isinstance(base, nn.Linear) else weight.T, bias) if fits else None


def _gate_of(router: Router | None, x: torch.Tensor) -> torch.Tensor | None:
    """The weight of a gate whose product with x may be made by kernels, None for another."""
    if not isinstance(router, TokenRouter) or not kernels.is_bare(router.gate, TokenGate):
        return None
    if router._forward_pre_hooks or "forward" in router.__dict__:  # which may change x, or not take the product
        return None
    changes_x = router.gate.training and router.gate.jitter
    return None if changes_x or router.gate.weight.device != x.device else router.gate.weight


def _dropping(bank: ExpertBank) -> float:
    """The probability that an element of x is dropped now."""
    return bank.dropout.p if isinstance(bank.dropout, nn.Dropout) and bank.dropout.training else 0.0


def _shaped(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(t, out) with the leading axes of x (..., in)."""
    shape = (*x.shape[:-1], out.shape[-1])
    if torch.is_grad_enabled() or out._is_view():
        return out.view(shape)
    return out.resize_(shape)  # a view made without a gradient could not be written to when there is one


def _as_tokens(x: torch.Tensor | None) -> torch.Tensor:
    """(..., n) as (t, n)."""
    assert x is not None
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
