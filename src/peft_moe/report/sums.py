"""What routers gave, added up: a column for everything that is summed over tokens, and sums as numbers.

Shapes: ... any leading axes · E experts · G groups
"""

from __future__ import annotations

from typing import Any

import torch


def columns_of(weights: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """(..., 3 E + 2 + G): of a token the weights, top 1 and choice by expert, entropy, 1, and weights of groups.

    Experts that share the largest weight share the top 1.

    Args:
        weights: (..., E).
        groups: (..., G); they may broadcast.
    """
    total = weights.sum(-1, keepdim=True)
    shares = weights / total.where(total > 0, torch.ones_like(total))
    tied = (weights == weights.amax(-1, keepdim=True)) & (weights > 0)
    top1 = tied / tied.sum(-1, keepdim=True).clamp_min(1)
    entropy = torch.special.entr(shares).sum(-1, keepdim=True)
    parts = [weights, top1, (weights > 0).to(weights), entropy, torch.ones_like(entropy)]
    return torch.cat(parts if groups is None else [*parts, groups.expand(*weights.shape[:-1], -1)], dim=-1)


def numbers_of(sums: torch.Tensor, e: int) -> dict[str, Any]:
    """What a report says of sums (3 E + 2 + G,) of `columns_of` over tokens; see `collect`."""
    tokens, load = sums[3 * e + 1].item(), shares_of(sums[:e])
    groups = sums[3 * e + 2 :] / tokens
    return {
        "tokens": round(tokens),
        "load": load.tolist(),
        "top1": (sums[e : 2 * e] / tokens).tolist(),
        "chosen": (sums[2 * e : 3 * e] / tokens).tolist(),
        "entropy": sums[3 * e].item() / tokens,
        "effective_experts": torch.special.entr(load).sum().exp().item(),
        "chosen_per_token": sums[2 * e : 3 * e].sum().item() / tokens,
        "group_load": groups.tolist() if len(groups) else None,
    }


def shares_of(load: torch.Tensor) -> torch.Tensor:
    """Parts of their sum; zeros if there is none, as where all experts are switched off."""
    total = load.sum()
    return load / total if total > 0 else torch.zeros_like(load)
