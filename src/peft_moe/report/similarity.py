"""How alike the experts of a layer are: the cosine between what they add to its weight.

Shapes: E experts · R sum of their ranks
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..bank import ExpertBank


@torch.no_grad()
def similarity(banks: Sequence[ExpertBank]) -> torch.Tensor:
    """Cosine similarity of the experts' updates `B_i A_i`, (E, E) in float64 on the CPU.

    `<B_i A_i, B_j A_j> = Σ (B_iᵀ B_j) ⊙ (A_i A_jᵀ)` is computed in rank space; no (out, in) matrix is formed.

    Args:
        banks: a layer's bank; or those of several layers that have the same experts, whose updates are then taken as
            one long vector.

    An expert whose update is zero, such as a new one or one of rank 0, has similarity 0 with all, also with itself.

    Raises:
        ValueError: no bank, or banks of different numbers of experts.

    Example:
        >>> similarity([layer.bank("default")])
    """
    counts = sorted({len(bank.ranks) for bank in banks})
    if len(counts) != 1:
        raise ValueError(f"Banks of {counts} experts cannot be compared; give at least one, all of the same experts.")
    inner = sum(map(_inner, banks))
    assert isinstance(inner, torch.Tensor)
    norm = inner.diagonal().clamp_min(0).sqrt()
    there = norm > 0
    norm = norm.where(there, torch.ones_like(norm))
    cosine = (inner / norm.unsqueeze(0) / norm.unsqueeze(1)).clamp(-1, 1)
    cosine = (cosine + cosine.T) / 2
    cosine.fill_diagonal_(1.0)  # which rounding would miss
    return cosine * there.unsqueeze(0) * there.unsqueeze(1)


def _inner(bank: ExpertBank) -> torch.Tensor:
    """(E, E) inner products of the scaled updates, in float64 on the CPU."""
    bank.check_weights()
    a, b = bank.lora_A.weight, bank.lora_B.weight
    wide = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        a, b, spread = a.to(wide), b.to(wide), bank.spread.to(wide)
        # each factor is brought to a size near 1, so that squares of small numbers do not vanish
        size = torch.stack([a.abs().amax() if a.numel() else a.sum(), b.abs().amax() if b.numel() else b.sum()])
        size = size.where(size > 0, torch.ones_like(size))
        a, b = a / size[0], b / size[1]
        inner = spread @ ((b.T @ b) * (a @ a.T)) @ spread.T
    if not torch.isfinite(inner).all():
        raise ValueError("Experts have weights that are NaN or infinite; load an earlier checkpoint.")
    inner, size = inner.cpu().double(), size.cpu().double()  # some devices have no float64
    return inner * (size[0] * size[1]).square()
