"""Adding experts to a layer's output where each token computes its K experts only.

Shapes: t tokens · K experts of each token · E experts · r rank of every expert · a (E·r, in) · b (out, E·r)

The (token, expert) pairs are put in order of their experts. Each expert gets a row of slots, its pairs at the start of
it and empty slots (weight 0) at the end, as many as its neighbours, so that a few experts make one batched product.
Where routing is balanced, a tenth to a quarter of the slots is empty. They are also what makes lengths repeat: a CPU
takes a millisecond to prepare a bfloat16 product of a new shape, and every batch has other loads.

What a training step costs, in multiply-adds per token: 3·E·r·(in + out) densely, and here 3·K·r·(in + out) and as much
of that again as slots are empty. Here rows are moved in addition, in numbers per token: K·in read twice, K·out once
(x and the gradient, to their slots), K·out and K·in added (to `out` and to the gradient of x). Per step B is copied
twice. Moving is the limit in bfloat16, whose products cost a sixth of float32's while rows cost half.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F


class _Group(NamedTuple):
    """Experts of one batched product: which they are, where their slots are, and how many slots each has."""

    experts: slice
    slots: slice
    room: int


def add_experts(
    out: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    weights: torch.Tensor,
    experts: torch.Tensor,
    r: int,
    writable: bool,
) -> torch.Tensor:
    """Add `Σ_k weights[t, k] · B_e A_e x[t]`, e = experts[t, k], to out[t].

    Differentiable once, for everything but `experts`; a second time is a NotImplementedError. Kept for backward: x, a,
    b, weights, and per slot r numbers and two indices. Loads are read to the host: torch.compile breaks its graph here,
    and devices other than the CPU wait.

    Args:
        out: (..., out), any leading axes, the same in x, weights and experts.
        x: (..., in); may have another dtype than a and b, as out may.
        a, b: the bank, (E·r, in) and (out, E·r), of one dtype.
        weights: (..., K), the scaling of the experts included.
        experts: (..., K) int64, numbers from 0 to E - 1.
        r: rank of every expert.
        writable: whether out may be changed in place, since nobody else needs its values.

    Returns:
        (..., out), out itself if it is writable and contiguous.

    Raises:
        ValueError: a and b are not a bank of rank-r experts, or an expert's number is not below E.
    """
    if r < 1 or a.shape[0] % r or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"a {tuple(a.shape)} and b {tuple(b.shape)} are no experts of rank r={r}: "
            "a must have E·r rows, and b as many columns; pass the rank of one expert."
        )
    if torch.is_autocast_enabled(out.device.type) and a.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(out.device.type)
        a, b = a.to(dtype), b.to(dtype)  # and x where it is read, so that no copy of it is kept
    return _AddExperts.apply(out, x, a, b, weights, experts, r, writable)


def pays(*, tokens: int, num_experts: int, k: int, r: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `add_experts` is faster than the dense product in a training step, as scripts/bench/dispatch.py has it.

    Each token is spared (E - K)·r ranks and has its rows moved K times: the ratio of the two decides. A step has a
    fixed cost too, which few tokens do not pay back. Other devices and types were not measured: False.

    Args:
        tokens: rows of x.
        num_experts, k, r: E, K, and the rank of each expert.
        dtype: of the bank.
        device: where it is.
    """
    least = least_tokens(num_experts=num_experts, k=k, r=r, dtype=dtype, device=device)
    return least is not None and tokens >= least


def least_tokens(*, num_experts: int, k: int, r: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """From how many tokens on `pays` is true; None if it never is."""
    measured = {torch.float32: (64, 256), torch.bfloat16: (320, 1024)}  # ranks spared per row moved, and tokens
    if device.type != "cpu" or dtype not in measured:
        return None
    spared, tokens = measured[dtype]
    return tokens if (num_experts - k) * r >= spared * k else None


def add_experts_reference(
    out: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    weights: torch.Tensor,
    experts: torch.Tensor,
    r: int,
) -> torch.Tensor:
    """What `add_experts` computes, densely and in plain PyTorch: all experts, most of them weighed with 0."""
    gates = weights.new_zeros(*weights.shape[:-1], a.shape[0] // r).scatter_add(-1, experts, weights)
    h = F.linear(x.to(a.dtype), a).unflatten(-1, (-1, r)) * gates.unsqueeze(-1).to(a.dtype)
    return out + F.linear(h.flatten(-2), b).to(out.dtype)


def _group(loads: list[int], rows: int) -> list[_Group]:
    """Put neighbouring experts together while their slots are no more than so many rows."""
    groups: list[_Group] = []
    first = start = 0
    while first < len(loads):
        stop, room = first + 1, _room(loads[first])
        while stop < len(loads) and (stop + 1 - first) * max(room, _room(loads[stop])) <= rows:
            room = max(room, _room(loads[stop]))
            stop += 1
        end = start + (stop - first) * room
        groups.append(_Group(slice(first, stop), slice(start, end), room))
        first, start = stop, end
    return groups


def _room(load: int) -> int:
    """Slots for so many pairs: one of a few numbers (see above), at most 15 more or an eighth more."""
    step = max(16, (1 << load.bit_length()) // 16)
    return max(1, -(-load // step)) * step


def _plan(experts: torch.Tensor, num_experts: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, list[_Group]]:
    """The slot of each pair (t·K,), the token of each slot (token 0 for empty ones), and the groups of experts."""
    k, pairs = experts.shape[1], experts.flatten()
    loads = torch.bincount(pairs, minlength=num_experts)
    sizes = loads.tolist()
    if len(sizes) > num_experts:
        raise ValueError(f"experts has {len(sizes) - 1}, but the bank's experts are 0 to {num_experts - 1}.")
    groups = _group(sizes, rows) if len(pairs) else []
    shifts, before = [], 0
    for which, slots, room in groups:
        for place, size in enumerate(sizes[which]):
            shifts.append(slots.start + place * room - before)
            before += size
    order = pairs.argsort()
    shift = torch.tensor(shifts or sizes, device=pairs.device)
    slots_in_order = shift.repeat_interleave(loads, output_size=len(pairs))
    slots_in_order += torch.arange(len(pairs), device=pairs.device)
    slot_of_pair = torch.empty_like(order).scatter_(0, order, slots_in_order)
    num_slots = groups[-1].slots.stop if groups else 0
    tokens = order.new_zeros(num_slots).scatter_(0, slots_in_order, order // k)
    return slot_of_pair, tokens, groups


def _most_slots(groups: list[_Group]) -> int:
    return max((slots.stop - slots.start for _, slots, _ in groups), default=0)


def _gather(rows: torch.Tensor, tokens: torch.Tensor, groups: list[_Group]) -> Iterator[tuple[torch.Tensor, _Group]]:
    """The rows (t, n) in the slots of each group, (experts, room, n), in one buffer: each is gone with the next."""
    buffer = rows.new_empty(_most_slots(groups), rows.shape[1])
    for group in groups:
        indices = tokens[group.slots]
        torch.index_select(rows, 0, indices, out=buffer[: len(indices)])
        yield buffer[: len(indices)].view(-1, group.room, rows.shape[1]), group


def _project(x: torch.Tensor, a: torch.Tensor, r: int, *, tokens: torch.Tensor, groups: list[_Group]) -> torch.Tensor:
    """A_e x of each slot, (slots, r), from x (t, in)."""
    z, a_of = a.new_empty(len(tokens), r), a.unflatten(0, (-1, r))
    for xs, (which, slots, room) in _gather(x, tokens, groups):
        torch.bmm(xs.to(a.dtype), a_of[which].transpose(1, 2), out=z[slots].view(-1, room, r))
    return z


def _add_outputs(
    out: torch.Tensor, h: torch.Tensor, b: torch.Tensor, *, tokens: torch.Tensor, groups: list[_Group]
) -> None:
    """Add B_e h to out (t, out) for each slot of h (slots, r)."""
    b_of = b.unflatten(1, (-1, h.shape[1])).transpose(0, 1)
    buffer = b.new_empty(_most_slots(groups), b.shape[0])
    for which, slots, room in groups:
        y = buffer[: slots.stop - slots.start]
        columns = b_of[which].contiguous()  # strided ones are many times slower in bfloat16
        torch.bmm(h[slots].view(-1, room, h.shape[1]), columns.transpose(1, 2), out=y.view(-1, room, b.shape[0]))
        out.index_add_(0, tokens[slots], y.to(out.dtype))


def _gradients_of_h_and_b(
    g: torch.Tensor, h: torch.Tensor | None, b: torch.Tensor, r: int, *, tokens: torch.Tensor, groups: list[_Group]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """gh (slots, r) from g (t, out), and gb (out, E·r) unless h is None: both in one reading of g."""
    gh, gb = b.new_empty(len(tokens), r), None
    b_of = b.unflatten(1, (-1, r)).transpose(0, 1)
    if h is not None and not groups:
        gb = torch.zeros_like(b)
    for gs, (which, slots, room) in _gather(g, tokens, groups):
        gs = gs.to(b.dtype)
        torch.bmm(gs, b_of[which].contiguous(), out=gh[slots].view(-1, room, r))
        if h is not None:
            gb = torch.empty_like(b) if gb is None else gb  # not before the copy of B's columns is gone
            gb_of = gb.unflatten(1, (-1, r)).transpose(0, 1)
            torch.bmm(gs.transpose(1, 2), h[slots].view(-1, room, r), out=gb_of[which])
    return gh, gb


def _gradient_of_a(
    gz: torch.Tensor, x: torch.Tensor, num_ranks: int, *, tokens: torch.Tensor, groups: list[_Group]
) -> torch.Tensor:
    """(E·r, in), from gz (slots, r) and x (t, in)."""
    ga = (gz.new_empty if groups else gz.new_zeros)(num_ranks, x.shape[1])
    ga_of = ga.unflatten(0, (-1, gz.shape[1]))
    for xs, (which, slots, room) in _gather(x, tokens, groups):
        torch.bmm(gz[slots].view(-1, room, gz.shape[1]).transpose(1, 2), xs.to(gz.dtype), out=ga_of[which])
    return ga


def _gradient_of_x(
    gz: torch.Tensor,
    a: torch.Tensor,
    slot_of_pair: torch.Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
    *,
    tokens: torch.Tensor,
    groups: list[_Group],
) -> torch.Tensor:
    """Each token's sum over its experts of `gz A_e`, (t, in), from gz (slots, r)."""
    a_of = a.unflatten(0, (-1, gz.shape[1]))
    if len(groups) == 1:  # then each token's rows are there at once, and are added up in one pass
        of_slots = gz.new_empty(len(tokens), shape[1])
        room = groups[0].room
        torch.bmm(gz.view(-1, room, gz.shape[1]), a_of, out=of_slots.view(-1, room, shape[1]))
        return F.embedding_bag(slot_of_pair.view(shape[0], -1), of_slots, mode="sum").to(dtype)
    gx = gz.new_zeros(shape, dtype=dtype)
    buffer = gz.new_empty(_most_slots(groups), shape[1])
    for which, slots, room in groups:
        of_slots = buffer[: slots.stop - slots.start]
        torch.bmm(gz[slots].view(-1, room, gz.shape[1]), a_of[which], out=of_slots.view(-1, room, shape[1]))
        gx.index_add_(0, tokens[slots], of_slots.to(dtype))
    return gx


class _AddExperts(torch.autograd.Function):
    """Products with `out=` throughout: they write into one buffer, and autocast leaves them alone."""

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        r: int,
        writable: bool,
    ) -> torch.Tensor:
        if writable and out.is_contiguous():
            ctx.mark_dirty(out)
        else:
            out = out.clone(memory_format=torch.contiguous_format)
        flat_out, flat_x = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        # All experts in one product if K = 1 and loads are balanced, and no buffer much larger than the layer's output.
        rows = len(flat_x) * 5 // 4 * min(x.shape[-1], out.shape[-1]) // x.shape[-1]
        slot_of_pair, tokens, groups = _plan(experts.reshape(-1, experts.shape[-1]), a.shape[0] // r, rows)
        slot_weights = a.new_zeros(len(tokens)).scatter_(0, slot_of_pair, weights.flatten().to(a.dtype)).unsqueeze(1)
        z = _project(flat_x, a, r, tokens=tokens, groups=groups)
        _add_outputs(flat_out, z * slot_weights, b, tokens=tokens, groups=groups)

        need_a, need_b, need_weights = ctx.needs_input_grad[2:5]
        ctx.save_for_backward(
            x if need_a else None,
            a,
            b,
            z if need_b or need_weights else None,
            slot_weights,
            tokens,
            slot_of_pair,
            weights,
        )
        ctx.groups, ctx.r, ctx.x = groups, r, (x.shape, x.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            of_out, *gradients = _AddExperts._gradients(ctx, g)
        if not torch.is_grad_enabled():
            return of_out, *gradients
        sources = [g, *(tensor for tensor in ctx.saved_tensors if tensor is not None)]
        given = [gradient for gradient in gradients if gradient is not None]
        once = iter(_Once.apply(len(sources), *sources, *given))
        return of_out, *(None if gradient is None else next(once) for gradient in gradients)

    @staticmethod
    def _gradients(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, z, slot_weights, tokens, slot_of_pair, weights = ctx.saved_tensors
        need_out, need_x, need_a, need_b, need_weights = ctx.needs_input_grad[:5]
        where = {"tokens": tokens, "groups": ctx.groups}
        gx = ga = gb = gw = None
        if not (need_x or need_a or need_b or need_weights):
            return g, *[None] * 7

        h = z * slot_weights if need_b else None
        gh, gb = _gradients_of_h_and_b(g.reshape(-1, g.shape[-1]), h, b, ctx.r, **where)
        if need_weights:
            gw = torch.sum(gh * z, -1, dtype=torch.promote_types(z.dtype, torch.float32))
            gw = gw.index_select(0, slot_of_pair).view(weights.shape).to(weights.dtype)
        gz = gh.mul_(slot_weights)
        if need_a:
            ga = _gradient_of_a(gz, x.reshape(-1, x.shape[-1]), b.shape[1], **where)
        if need_x:
            shape, dtype = ctx.x
            flat_shape = torch.Size([shape[:-1].numel(), shape[-1]])
            gx = _gradient_of_x(gz, a, slot_of_pair, flat_shape, dtype, **where)
            gx.resize_(shape)  # no view, so that autograd can add the base layer's gradient in place
        return g if need_out else None, gx, ga, gb, gw, None, None, None


class _Once(torch.autograd.Function):
    """Gradients as they are, which have no derivative by what they were made of; all that was kept leads here."""

    @staticmethod
    def forward(ctx: Any, sources: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in tensors[sources:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        raise NotImplementedError(
            "A second derivative of tokens that were dispatched to their experts is not computed: set "
            "PEFT_MOE_KERNELS=plain in the environment, which computes them densely in plain PyTorch."
        )
