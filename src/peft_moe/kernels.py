"""The bank's products beside those of the base layer, without a second output and with little to keep for backward.

    project:  out = x Wᵀ + bias,  z = x Aᵀ,  scores = x Gᵀ
    add:      out += f (z ⊙ w S) Bᵀ, in place

A layer in plain PyTorch makes the bank's output beside the base layer's, adds both up into a third, and makes three
gradients of x. Here a gradient of x is made once, by the base layer, and the others are added to it; what is kept for
backward is x, which others keep too, the parameters, and z. What happens between the two functions is a router's
business, in rank space and in plain PyTorch.

Shapes: t tokens · in, out features · R ranks in all · E experts · m rows of weights, of which each is for t / m tokens
in succession · G rows of a gate's weight
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as torch_modules

SWITCH = "PEFT_MOE_KERNELS"
# Tokens that are cast at once where an adapter's type is not the base layer's; a whole copy of x or of the output would
# cost what is saved elsewhere, and this many rows are enough for a product to be fast. What a call costs a device other
# than the CPU counts for more, and was not measured.
CHUNK, CHUNK_ELSEWHERE = 512, 8192
# torch's hooks for all modules, in dicts that it has for good.
GLOBAL_HOOKS = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)


def _read_switch(value: str) -> bool:
    if value not in ("fused", "plain"):
        raise ValueError(f"{SWITCH}={value!r}; set it to 'fused', the default, or to 'plain' for plain PyTorch.")
    return value == "fused"


fused = _read_switch(os.environ.get(SWITCH, "fused"))  # read by layers at each call, so that tests can set it


class Dropout(NamedTuple):
    """Which elements (t, in) of x a bank sees, and what they are multiplied by: 1 / (1 - p)."""

    kept: torch.Tensor
    scale: float

    def __call__(self, part: torch.Tensor, at: slice = slice(None)) -> torch.Tensor:
        """What is left of x, or of some of its tokens."""
        return (part * self.kept[at].view(torch.uint8)).mul_(self.scale)  # numbers are multiplied faster than a bool


def draw_dropout(x: torch.Tensor, p: float) -> Dropout:
    """The same elements of x (..., in) as `torch.nn.functional.dropout(x, p)` would keep, 0 <= p < 1."""
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)  # in the order that x has in memory
    return Dropout(kept.reshape(-1, x.shape[-1]), 1 / (1 - p))


def is_bare(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is nothing but its weights, so that these may be used without calling it.

    Those of a subclass, and those with hooks, such as of FSDP, ZeRO-3 and accelerate's offloading, may not: their
    weights are only there during a call, or somebody wants to see it.
    """
    return type(module) in kinds and is_unseen(module) and type(module.weight) in (nn.Parameter, torch.Tensor)


def is_unseen(module: nn.Module) -> bool:
    """Whether nobody would notice that a module is not called."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def may_fuse(x: torch.Tensor) -> bool:
    """Whether the functions here can take part in what is being done with x."""
    return (
        fused
        and type(x) in (torch.Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()  # which fuses by itself, and does not know functions that work in place
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._get_tracing_state()
        and torch.amp.is_autocast_available(x.device.type)  # not of tensors without data
        and forward_ad._current_level < 0
        and not any(GLOBAL_HOOKS)
        and not (torch_modules._global_backward_hooks or torch_modules._global_backward_pre_hooks)
    )


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The type that autocast gives products on the device of x; None where it is off, or x is wider than it touches."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def project(
    x: torch.Tensor,
    a: torch.Tensor,
    *,
    base: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    gate: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    each: torch.Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """The products that read x.

    Args:
        x: (t, in).
        a: (R, in), the bank's.
        base: weight (out, in) and bias (out,) of the base layer; None if it is called by itself.
        gate: (G, in), read in float32 or wider and without dropout.
        dropout: what the bank sees of x; None for all.
        each: (1, R), what A's rows are multiplied by, in its type; the product is made again for backward.
        low: the type that products are cast to, but not the gate's; None for those of the weights.

    Returns:
        out (t, out), z (t, R), scores (t, G); None for those that were not asked for.
    """
    weight, bias = (None, None) if base is None else base
    kept, scale = (None, 1.0) if dropout is None else dropout
    if torch.is_grad_enabled():
        made: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None] = _Project.apply(
            x, a, weight, bias, gate, kept, scale, each, low
        )
        return made
    return _project(x, _weigh_rows(a, each), weight, bias, gate, dropout, low)


def add(
    out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    spread: torch.Tensor | None = None,
    factor: float = 1.0,
    writable: bool = True,
) -> torch.Tensor:
    """Add the bank's outputs to the base layer's.

    Args:
        out: (t, out).
        z: (t, R).
        b: (out, R).
        weights: (m, E), the experts'; None for `factor` on everything.
        spread: (E, R), what each rank takes of its expert's weight: the expert's scaling, 0 for other experts.
        factor: on everything.
        writable: out may be written to: nobody else has it.

    Returns:
        out itself, if writable.
    """
    if torch.is_grad_enabled():
        added: torch.Tensor = _Add.apply(out, z, b, weights, spread, factor, writable)
        return added
    return add_weighed(out if writable else out.clone(), z, b, _each_rank(weights, spread, z.dtype), factor)


def add_weighed(
    out: torch.Tensor, z: torch.Tensor, b: torch.Tensor, each: torch.Tensor | None, factor: float = 1.0
) -> torch.Tensor:
    """The same in place and without a gradient.

    Args:
        each: (m, R), what z is multiplied by; None for nothing but the factor.
    """
    with _no_autocast(z):
        h, b = _weigh(z, each), b.to(z.dtype).T
        if out.dtype == z.dtype:
            return out.addmm_(h, b, alpha=factor)
        for at in _chunks(z):
            _add_product(out[at], h[at], b, factor)
        return out


def each_rank(weights: torch.Tensor, spread: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(m, R), what each rank is multiplied by, in a type.

    Args:
        weights: (m, E).
        spread: (E, R).
    """
    # A product is as fast for ranks of different sizes, and so is its gradient, which needs no index_add.
    with _no_autocast(weights):
        return (weights @ spread.to(weights.dtype)).to(dtype)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        gate: torch.Tensor | None,
        kept: torch.Tensor | None,
        scale: float,
        each: torch.Tensor | None,
        low: torch.dtype | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        ctx.save_for_backward(x, a, weight, gate, kept, each)
        ctx.scale, ctx.bias_dtype = scale, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        dropout = None if kept is None else Dropout(kept, scale)
        return _project(x, _weigh_rows(a, each), weight, bias, gate, dropout, low)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # ordinary operations on fresh tensors, so that a second derivative comes out right
        x, rows, weight, gate, kept, each = ctx.saved_tensors
        g, g_z, g_scores = grads
        of_x, of_a, of_weight, of_bias, of_gate = ctx.needs_input_grad[:5]
        of_each = ctx.needs_input_grad[7]
        gx = ga = gw = gb = gg = ge = None
        a = _weigh_rows(rows, each)
        with _no_autocast(x):
            if g is not None:
                gx = (g @ weight.to(g.dtype)).to(x.dtype) if of_x else None
                gw = (g.T @ x.to(g.dtype)).to(weight.dtype) if of_weight else None
                gb = g.sum(0).to(ctx.bias_dtype) if of_bias else None
            dropout = None if kept is None else Dropout(kept, ctx.scale)
            if of_x and g_z is not None and g_scores is not None and _read_alike(x, a, gate, dropout, g_z.dtype):
                gx = _onto(gx, torch.cat([g_z, g_scores], dim=1), torch.cat([a, gate]), None, x.dtype)
            elif of_x:
                gx = gx if g_z is None else _onto(gx, g_z, a, dropout, x.dtype)
                if g_scores is not None:
                    # in the type of what it is added to, since a wide product would be rounded to it afterwards
                    gx = _onto(gx, g_scores if gx is None else g_scores.to(gx.dtype), gate, None, x.dtype)
            if (of_a or of_each) and g_z is not None:
                ga = _outer(g_z, x, g_z.dtype, dropout).to(a.dtype)
                ge = (ga * rows).sum(1).unsqueeze(0) if of_each else None
                ga = _weigh_rows(ga, each) if of_a else None
            if of_gate and g_scores is not None:
                gg = _outer(g_scores.to(gate.dtype), x, gate.dtype)
        return None if gx is None else gx.to(x.dtype), ga, gw, gb, gg, None, None, ge, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        z: torch.Tensor,
        b: torch.Tensor,
        weights: torch.Tensor | None,
        spread: torch.Tensor | None,
        factor: float,
        writable: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(z, b, weights, spread)
        ctx.factor = factor
        if writable:
            ctx.mark_dirty(out)
        return add_weighed(out if writable else out.clone(), z, b, _each_rank(weights, spread, z.dtype), factor)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, b, weights, spread = ctx.saved_tensors
        of_out, of_z, of_b, of_weights = ctx.needs_input_grad[:4]
        gz = gw = None
        with _no_autocast(z):
            each = _each_rank(weights, spread, z.dtype)
            # h is not needed any longer than this
            gh, gb = _through(g, b.to(z.dtype), _weigh(z, each) if of_b else None, wanted=of_z or of_weights)
            gb = None if gb is None else _times(gb, ctx.factor).to(b.dtype)
            if gh is not None:
                gh = _times(gh, ctx.factor)
                gw = _of_weights(gh * z, weights, spread) if of_weights else None
                gz = _weigh(gh, each) if of_z else None
        return g if of_out else None, gz, gb, gw, None, None, None


def _project(
    x: torch.Tensor,
    a: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    dropout: Dropout | None,
    low: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    out = scores = None
    with _no_autocast(x):
        if weight is not None:
            kind = low or weight.dtype
            out = F.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
        if gate is not None and _read_alike(x, a, gate, dropout, low or a.dtype):
            z, scores = _rows(x, torch.cat([a, gate]).T).split([len(a), len(gate)], dim=1)
            return out, z, scores
        z = _rows(x, a.to(low or a.dtype).T, dropout)
        if gate is not None:
            scores = _rows(x, gate.to(torch.promote_types(a.dtype, torch.float32)).T)
    return out, z, scores


def _read_alike(
    x: torch.Tensor, a: torch.Tensor, gate: torch.Tensor, dropout: Dropout | None, dtype: torch.dtype
) -> bool:
    """Whether one product does for A and a gate's weight: they read the same x in the same type.

    Not for a few tokens, which would cost less than to put the two together.
    """
    return (
        dropout is None
        and len(x) >= len(a)
        and a.dtype == gate.dtype == dtype == torch.promote_types(a.dtype, torch.float32)
    )


def _each_rank(weights: torch.Tensor | None, spread: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if weights is None or spread is None else each_rank(weights, spread, dtype)


def _weigh(z: torch.Tensor, each: torch.Tensor | None) -> torch.Tensor:
    """z (t, R) times (m, R)."""
    if each is None:
        return z
    return z * each if len(each) in (1, len(z)) else (z.unflatten(0, (len(each), -1)) * each.unsqueeze(1)).flatten(0, 1)


def _weigh_rows(a: torch.Tensor, each: torch.Tensor | None) -> torch.Tensor:
    """A (R, in), its rows times (1, R)."""
    return a if each is None else a * each.T


def _of_weights(g: torch.Tensor, weights: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """The gradient (m, E) of weights from that (t, R) of what each rank is multiplied by."""
    g = g if len(weights) == len(g) else g.unflatten(0, (len(weights), -1)).sum(1)
    return _rows(g, spread.to(weights.dtype).T)


def _rows(x: torch.Tensor, matrix: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
    """x (t, p) times a matrix (p, q), in the type of the matrix."""
    if dropout is None and x.dtype == matrix.dtype:
        return x @ matrix
    return torch.cat([_cast(x, at, matrix.dtype, dropout) @ matrix for at in _chunks(x)])


def _outer(g: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, dropout: Dropout | None = None) -> torch.Tensor:
    """gᵀ x, of (t, p) and (t, q), in a type."""
    if dropout is None and g.dtype == x.dtype == dtype:
        return g.T @ x
    total = torch.zeros(g.shape[1], x.shape[1], dtype=dtype, device=g.device)
    for at in _chunks(x):
        total = total.addmm_(g[at].to(dtype).T, _cast(x, at, dtype, dropout))
    return total


def _through(
    g: torch.Tensor, b: torch.Tensor, h: torch.Tensor | None, *, wanted: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`g b` of (t, out) and (out, R), if wanted, and `gᵀ h`, if there is h (t, R); in the type of b and h."""
    dtype = b.dtype
    if h is None or not wanted or g.dtype == dtype:
        return _rows(g, b) if wanted else None, None if h is None else _outer(g, h, dtype)
    total, parts = torch.zeros_like(b), []
    for at in _chunks(g):  # cast once for both
        part = g[at].to(dtype)
        parts.append(part @ b)
        total = total.addmm_(part.T, h[at])
    return torch.cat(parts), total


def _onto(
    gx: torch.Tensor | None, g: torch.Tensor, matrix: torch.Tensor, dropout: Dropout | None, dtype: torch.dtype
) -> torch.Tensor:
    """gx + g matrix, of (t, p), (t, q) and (q, p), in the type of gx; in `dtype` if there is no gx yet."""
    matrix = matrix.to(g.dtype)
    if gx is None and g.dtype == dtype and dropout is None:
        return g @ matrix
    if gx is None:
        gx = torch.empty(len(g), matrix.shape[1], dtype=dtype, device=g.device)
        for at in _chunks(g):
            part = g[at] @ matrix
            gx[at].copy_(part if dropout is None else dropout(part, at))
        return gx
    if gx.dtype == g.dtype and dropout is None:
        return gx.addmm_(g, matrix)
    for at in _chunks(g):
        if dropout is None:
            _add_product(gx[at], g[at], matrix)
        else:
            gx[at].add_(dropout(g[at] @ matrix, at))
    return gx


def _add_product(total: torch.Tensor, h: torch.Tensor, matrix: torch.Tensor, factor: float = 1.0) -> None:
    """total += factor · h matrix, in types that differ."""
    if torch.promote_types(total.dtype, h.dtype) == total.dtype:
        total.add_(h @ matrix, alpha=factor)
    else:  # rounded once, as a wide sum is; casting there and back is faster than adding types that differ
        total.copy_(total.to(h.dtype).addmm_(h, matrix, alpha=factor))


def _cast(x: torch.Tensor, at: slice, dtype: torch.dtype, dropout: Dropout | None) -> torch.Tensor:
    """Some tokens, in a type."""
    part = x[at].to(dtype)
    return part if dropout is None else dropout(part, at)


def _times(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x if factor == 1 else x * factor


def _chunks(x: torch.Tensor) -> list[slice]:
    size = CHUNK if x.device.type == "cpu" else CHUNK_ELSEWHERE
    return [slice(at, at + size) for at in range(0, max(len(x), 1), size)]


def _no_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
