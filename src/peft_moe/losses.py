"""Balance losses: how evenly tokens are spread over experts, as one float32 number per routed layer.

Shapes: n rows · s tokens · E experts
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

# Smallest divisor, for batches of padding alone.
TINY = 1e-9


class Routed(NamedTuple):
    """What a token router did with one input.

    Args:
        scores: (n, s, E) of the gate, float32.
        weights: (n, s, E) after selection: zero for experts that a token does not get.
        mask: (n, s), true for tokens that count; None if all do.
        matches: (n, E), true where an expert is meant for the row's group; without columns for base experts if these
            take no part; None without labels.
        num_base: how many of the first experts are base experts, which `variance` and `cv2` leave out.
    """

    scores: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor | None = None
    matches: torch.Tensor | None = None
    num_base: int = 0


def switch(routed: Routed) -> torch.Tensor:
    """`E · Σ_i f_i P_i`: 1 when tokens are spread evenly, up to E / K when the same K experts get everything.

    f_i is expert i's share of all (token, chosen expert) pairs, so that Σ f_i = 1 for every K; P_i is its mean
    probability in the softmax over all experts. Fedus et al., Switch Transformers (arXiv 2101.03961, eq. 4 to 6),
    where K is 1. Gradient flows through P only. Some code counts f_i per token instead, which makes the number K
    times larger.
    """
    share = mean_over_tokens((routed.weights > 0).float(), routed.mask)
    probability = mean_over_tokens(routed.scores.softmax(-1), routed.mask)
    return routed.scores.shape[-1] * (share / share.sum().clamp_min(TINY) * probability).sum()


def variance(routed: Routed) -> torch.Tensor:
    """`Var_i(u_i)`, u_i the share of the special experts' weight that expert i gets over the batch (population
    variance).

    Med-MoE-LoRA (arXiv 2601.07935, eq. 5): the variance of gating probabilities across a batch, over the special
    experts. The shares are of the special experts' total, so that what goes to a base expert neither helps nor hurts.
    """
    return _shares(routed).var(correction=0)


def cv2(routed: Routed) -> torch.Tensor:
    """`Var_i(u_i) / mean_i(u_i)²`, the squared coefficient of variation of the experts' total weights.

    Shazeer et al. (arXiv 1701.06538, eq. 6 and 7: importance), with the population variance; LoRAMoE (arXiv 2312.09979)
    without labels. 0 when even, E - 1 when one expert gets everything.
    """
    return _cv2(_shares(routed))


def localized(routed: Routed, *, delta: float) -> torch.Tensor:
    """`cv²(I ∘ Q)`: balanced within the experts of a row's group, which are to get more than the others.

    Q (n, E) is the mean weight of each expert over a row's tokens; I is `1 - δ` where the expert is meant for the
    row's group and `1 + δ` elsewhere, divided by the row's harmonic mean, so that the minimum is 0 for groups of any
    size. The localized balancing constraint of LoRAMoE (arXiv 2312.09979) has the signs the other way round and
    divides by the mean, its code by the squared mean. The loss is smallest when I ∘ Q is constant, Q ∝ 1 / I, so the
    paper's signs would give matching experts less. Q is a mean and not a sum over tokens, so that long rows do not
    count as imbalance.

    Raises:
        ValueError: no labels.
    """
    if routed.matches is None:
        raise ValueError(
            "The localized balance loss compares experts with the rows' groups, and no task_ids were given."
        )
    weight = routed.weights if routed.mask is None else routed.weights * routed.mask.unsqueeze(-1)
    tokens = weight.new_full(weight.shape[:1], weight.shape[1]) if routed.mask is None else routed.mask.float().sum(1)
    q = weight.sum(1) / tokens.clamp_min(1).unsqueeze(-1)  # (n, E)
    if routed.matches.shape[1] < q.shape[1]:
        q = q[:, q.shape[1] - routed.matches.shape[1] :]
        q = q / q.sum(1, keepdim=True).clamp_min(TINY)
    importance = torch.where(routed.matches, 1 - delta, 1 + delta).to(q)
    importance = importance * (1 / importance).mean(1, keepdim=True)
    return _cv2(q * importance, (tokens > 0).unsqueeze(-1).expand_as(q))


def z(routed: Routed) -> torch.Tensor:
    """`mean_t (log Σ_i exp(s_ti))²`: keeps scores small, so that they stay exact in low precision.

    Zoph et al., ST-MoE (arXiv 2202.08906, eq. 5). It does not balance.
    """
    return mean_over_tokens(routed.scores.logsumexp(-1, keepdim=True).square(), routed.mask).squeeze(-1)


BALANCE_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "switch": switch,
    "variance": variance,
    "cv2": cv2,
    "localized": localized,
    "z": z,
}


def mean_over_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(n, s, k) to (k,): the mean over the tokens that count."""
    if mask is None:
        return values.flatten(0, -2).mean(0)
    return _sum_over_tokens(values, mask) / mask.sum().clamp_min(1)


def _sum_over_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return (values if mask is None else values * mask.unsqueeze(-1)).flatten(0, -2).sum(0)


def _shares(routed: Routed) -> torch.Tensor:
    """How the special experts' weight is shared among them."""
    weight = _sum_over_tokens(routed.weights, routed.mask)[routed.num_base :]
    return weight / weight.sum().clamp_min(TINY)


def _cv2(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    count = torch.ones_like(values) if mask is None else mask.float()
    total = count.sum().clamp_min(1)
    mean = (values * count).sum() / total
    return ((values - mean).square() * count).sum() / total / mean.square().clamp_min(TINY)
