"""Scores (..., E) to expert weights (..., E): pure functions.

Shapes: ... any leading axes · E experts · G groups
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .control import Control


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Weights of all experts that add up to 1: the softmax over W_T e_j of MOELoRA (arXiv 2310.18339, section III)."""
    return scores.softmax(-1)


def top_k(scores: torch.Tensor, *, k: int) -> torch.Tensor:
    """The softmax over the k largest scores, 0 elsewhere (MING-MOE, arXiv 2404.09027); all of them if there are fewer.

    The same as the softmax over all scores, cut to the k largest and renormalised.
    """
    if k >= scores.shape[-1]:
        return scores.softmax(-1)
    largest, experts = scores.topk(k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, experts, largest.softmax(-1))


def top_p(scores: torch.Tensor, *, p: float) -> torch.Tensor:
    """The softmax over the fewest experts whose probabilities add up to p, 0 elsewhere; at least one expert.

    Huang et al., Harder Tasks Need More Experts (arXiv 2403.07652), renormalised.
    """
    probabilities, experts = scores.softmax(-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities  # what the larger ones add up to
    kept = probabilities * (before < p)
    return torch.zeros_like(scores).scatter(-1, experts, kept / kept.sum(-1, keepdim=True))


def grouped(
    groups: torch.Tensor | None, experts: torch.Tensor, *, sizes: Sequence[int], control: Control
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of groups, and of experts within their group: two softmaxes (AT-MoE, arXiv 2410.10896, section 3).

    `W'_G = softmax(M_G / τ_G)` over the groups, and `W'_D = softmax(M_D / τ_D)` within each. The paper has W_D as a
    matrix whose short rows are padded with -inf; a softmax over each row's own experts is the same.

    Args:
        groups: (..., G) scores M_G / τ_G; None for those that make the product of both softmaxes the softmax over all
            experts, whatever their groups.
        experts: (..., E) scores M_D / τ_D.
        sizes: experts of each group; group by group is their order.
        control: what is fixed or switched off.

    Returns:
        (..., G) and (..., E), each group's summing up to 1; the weight of an expert is their product.
    """
    rows = (experts + control.expert_bias).split(list(sizes), dim=-1)
    if groups is None:
        groups = torch.stack([row.logsumexp(-1) for row in rows], dim=-1)
    weights = (groups + control.group_bias).softmax(-1) * control.group_rest + control.group_fixed
    within = torch.cat([row.softmax(-1) for row in rows], dim=-1)
    return weights, within * control.expert_rest + control.expert_fixed
