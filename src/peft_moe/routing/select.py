"""Scores (..., E) to expert weights (..., E): pure functions."""

import torch


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
