"""Gates make one score per expert.

Shapes: n rows of task ids · k tasks per row · T tasks · d embedding size · E experts · in features
... any leading axes · G groups
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from .. import kernels

# Smallest temperature a gate can learn; softplus alone could reach 0 in float32.
COLDEST = 0.05


class TaskGate(nn.Module):
    """Scores that depend on the task alone: `W_T e_j` (MOELoRA, arXiv 2310.18339, section III), no bias.

    A row with several tasks is scored by the mean of their embeddings.

    Args:
        num_tasks: T.
        num_experts: E.
        embedding_dim: d.
    """

    def __init__(self, *, num_tasks: int, num_experts: int, embedding_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tasks, embedding_dim)
        self.proj = nn.Linear(embedding_dim, num_experts, bias=False)

    def forward(self, tasks: torch.Tensor) -> torch.Tensor:
        """tasks: ids (n,), or (n, k) padded with -1. Returns scores (n, E) in float32 or wider."""
        if not self.embedding.weight.is_meta:  # as between calls where accelerate offloads it, whose hooks move inputs
            tasks = tasks.to(self.embedding.weight.device)
        # Autocast would round the scores to half precision, and folding or merging outside of it would then differ.
        with torch.autocast(tasks.device.type, enabled=False):
            if tasks.dim() == 1:
                e = self.embedding(tasks)
            else:
                given = (tasks >= 0).unsqueeze(-1)
                e = (self.embedding(tasks.clamp_min(0)) * given).sum(1) / given.sum(1)
            scores = self.proj(e)
            return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


class TokenGate(nn.Module):
    """Scores of each token: `(W_g x + b) / τ`, computed in float32 or wider whatever the types of x and weights.

    MING-MOE (arXiv 2404.09027) has the bias and no temperature; Med-MoE-LoRA (arXiv 2601.07935, eq. 3) a learnable τ.
    `τ = 0.05 + softplus(temperature_bias)`; it is called a bias so that Trainer gives it no weight decay.

    Args:
        in_features: size of x.
        num_experts: E.
        bias: whether there is b.
        temperature: τ at the start, above 0.05; None for no temperature.
        learn_temperature: whether τ is trained.
        jitter: in training, x is multiplied by numbers drawn from [1 - jitter, 1 + jitter] (Switch Transformers, arXiv
            2101.03961).
    """

    # All parameters in one module without children, which FSDP and ZeRO-3 gather as one.
    def __init__(
        self,
        *,
        in_features: int,
        num_experts: int,
        bias: bool = False,
        temperature: float | None = None,
        learn_temperature: bool = True,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_features, self.num_experts, self.jitter = in_features, num_experts, jitter
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.fixed_temperature = None if learn_temperature else temperature
        learnt = temperature is not None and learn_temperature
        self.temperature_bias = nn.Parameter(torch.empty(1)) if learnt else None
        self._start = temperature
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W_g and b as `nn.Linear` does, and put τ at its start."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        if self.temperature_bias is not None and self._start is not None:
            above = self._start - COLDEST  # log(exp(above) - 1), without the overflow
            nn.init.constant_(self.temperature_bias, above + math.log(-math.expm1(-above)))

    @property
    def temperature(self) -> torch.Tensor | float | None:
        """τ: a tensor (1,) if it is learnt."""
        if self.temperature_bias is None:
            return self.fixed_temperature
        return COLDEST + F.softplus(wide(self.temperature_bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in). Returns scores (..., E)."""
        with torch.autocast(x.device.type, enabled=False):
            x = wide(x)
            if self.training and self.jitter:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            return self.of_product(F.linear(x, wide(self.weight).to(x.dtype)))

    def of_product(self, product: torch.Tensor) -> torch.Tensor:
        """Scores (..., E) of an input whose product with W_g (..., E) has been made elsewhere."""
        scores = product if self.bias is None else product + self.bias.to(product.dtype)
        temperature = self.temperature
        return scores if temperature is None else scores / temperature

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_experts={self.num_experts}, bias={self.bias is not None}"


class GroupedGate(nn.Module):
    """Scores of groups `e · W_G / τ_G` and of experts `e · W_D / τ_D` (AT-MoE, arXiv 2410.10896, section 3), and λ.

    The paper does not say how W_D depends on the input; here it is a projection like W_G, or static scores of its own.

    Args:
        in_features: size of e.
        num_groups: G; 0 for no scores of groups.
        num_experts: E.
        static: the experts' scores are numbers and not a projection of e.
        group_temperature, expert_temperature: τ_G and τ_D.
        mix: λ at the start, the share of the mixture beside the general expert.
        learn_mix: whether λ is trained, as the sigmoid of a number.
    """

    # All parameters in one module without children, which FSDP and ZeRO-3 gather as one.
    def __init__(
        self,
        *,
        in_features: int,
        num_groups: int,
        num_experts: int,
        static: bool = False,
        group_temperature: float = 1.0,
        expert_temperature: float = 1.0,
        mix: float = 0.5,
        learn_mix: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.num_groups, self.num_experts, self.static = in_features, num_groups, num_experts, static
        self.group_temperature, self.expert_temperature = group_temperature, expert_temperature
        self.mix, self.fixed_mix = mix, None if learn_mix else mix
        projected = num_groups + (0 if static else num_experts)
        self.weight = nn.Parameter(torch.empty(projected, in_features)) if projected else None  # W_G above W_D
        # biases by name, so that Trainer gives them no weight decay
        self.expert_bias = nn.Parameter(torch.empty(num_experts)) if static else None
        self.mix_bias = nn.Parameter(torch.empty(1)) if learn_mix else None
        self.reset_parameters()

    def reset_parameters(self, *, even: bool = True) -> None:
        """Start with even weights, or draw them; put λ at its start."""
        for scores in (self.weight, self.expert_bias):
            if scores is not None:
                nn.init.zeros_(scores) if even else nn.init.normal_(scores, std=self.in_features**-0.5)
        if self.mix_bias is not None:
            nn.init.constant_(self.mix_bias, math.log(self.mix / (1 - self.mix)))

    def forward(
        self, e: torch.Tensor, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | float]:
        """Scores (..., G) or None, scores (..., E), and λ, a tensor (1,) if it is learnt.

        Args:
            e: (..., in).
            scale: (..., 1), what e is to be multiplied by; its few scores are instead.
        """
        with torch.autocast(e.device.type, enabled=False):
            dtype = torch.promote_types(e.dtype, torch.float32)
            scores = None if self.weight is None else _product(e, wide(self.weight).to(dtype))
            scores = scores if scale is None or scores is None else scores * scale
            groups = scores[..., : self.num_groups] / self.group_temperature if scores is not None else None
            if self.expert_bias is not None:
                experts = wide(self.expert_bias).to(dtype).expand(*e.shape[:-1], -1)
            else:
                experts = scores[..., self.num_groups :]  # type: ignore[index]  # there unless static
            mix = self.mix if self.mix_bias is None else wide(self.mix_bias).sigmoid().to(dtype)
            return groups if self.num_groups else None, experts / self.expert_temperature, mix

    @property
    def device(self) -> torch.device | None:
        """Where its scores are made."""
        at = self.expert_bias if self.weight is None else self.weight
        return None if at is None else at.device

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_groups={self.num_groups}, num_experts={self.num_experts}"


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., in) times a weight (n, in), in the weight's type: (..., n). For backward x is kept in its own."""
    if x.dtype == weight.dtype or not kernels.may_fuse(x):
        return F.linear(x.to(weight.dtype), weight)
    return kernels.project(x.reshape(-1, x.shape[-1]), weight)[1].view(*x.shape[:-1], len(weight))


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32: in half precision, near ties would be decided by rounding, and differently in each mode."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
