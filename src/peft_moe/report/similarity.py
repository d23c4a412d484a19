"""How alike experts are: the cosine of their updates, without making them.

Shapes: E experts · R ranks in all · in, out features
"""

from __future__ import annotations

import torch


@torch.no_grad()
def similarity(a: torch.Tensor, b: torch.Tensor, ranks: list[int]) -> torch.Tensor:
    """The cosines (E, E) of the experts' updates B_i A_i as vectors of in · out numbers, in float64.

    `<B_i A_i, B_j A_j> = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ)`, which takes products of (R, R) instead of (out, in). An expert
    that changes nothing, such as one whose B is still zero or one of rank 0, has 0 with all, itself too.

    Args:
        a: (R, in).
        b: (out, R).
        ranks: r_i of each expert, which add up to R.

    Raises:
        ValueError: they do not.

    Example:
        >>> similarity(bank.lora_A.weight, bank.lora_B.weight, list(bank.ranks))
    """
    if sum(ranks) != a.shape[0] or a.shape[0] != b.shape[1]:
        raise ValueError(f"ranks={ranks} add up to {sum(ranks)}, and A is {tuple(a.shape)}, B {tuple(b.shape)}.")
    a, b = a.double(), b.double()
    products = (b.T @ b) * (a @ a.T)
    owner = torch.arange(len(ranks), device=a.device).repeat_interleave(torch.tensor(ranks, device=a.device))
    inner = torch.zeros(len(ranks), len(ranks), dtype=a.dtype, device=a.device)
    rows = torch.zeros(len(ranks), a.shape[0], dtype=a.dtype, device=a.device).index_add_(0, owner, products)
    inner.index_add_(1, owner, rows)
    length = inner.diagonal().clamp_min(0).sqrt()
    scale = length.outer(length)
    return torch.where(scale > 0, inner / scale.where(scale > 0, 1), 0).clamp(-1, 1)
