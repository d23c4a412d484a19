"""A bank of LoRA experts.

Shapes: ... any leading axes · E experts · r_i rank of expert i · R = sum of r_i
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn


class ExpertBank(nn.Module):
    """E LoRA experts stored as one LoRA of rank R: `B · (s ⊙ (A · dropout(x)))`, s the scaled weights of the experts.

    The rows of `lora_A.weight` (R, in) and the columns of `lora_B.weight` (out, R) belong to expert 0, then expert 1,
    and so on.

    Args:
        in_features, out_features: sizes of the linear layer that the bank extends.
        ranks: rank of each expert.
        scaling: factor on each expert (alpha over rank), or one for all.
        dropout: probability of dropping an element of x, applied once for all experts.
        num_anchored: how many of the first experts are pulled back to zero by `anchor_loss`.
        anchor_coefficient: its weight in the loss.
    """

    expert_of_rank: torch.Tensor | None
    scaling: torch.Tensor | None

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        scaling: Sequence[float] | float,
        dropout: float = 0.0,
        num_anchored: int = 0,
        anchor_coefficient: float = 0.0,
    ) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.num_anchored, self.anchor_coefficient = num_anchored, anchor_coefficient
        self.factors = (scaling,) * len(ranks) if isinstance(scaling, (int, float)) else tuple(scaling)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_A = nn.Linear(in_features, sum(ranks), bias=False)
        self.lora_B = nn.Linear(sum(ranks), out_features, bias=False)
        self.register_buffer("expert_of_rank", None, persistent=False)  # where ranks differ
        self.register_buffer("scaling", None, persistent=False)  # where factors differ
        self._set_constants()

    def _set_constants(self) -> None:
        device = self.lora_A.weight.device
        device = torch.device("cpu") if device.type == "meta" else device  # what they hold would be lost there
        if len(set(self.ranks)) > 1:
            index = [expert for expert, rank in enumerate(self.ranks) for _ in range(rank)]
            self.expert_of_rank = torch.tensor(index, device=device)
        if len(set(self.factors)) > 1:
            self.scaling = torch.tensor(self.factors, device=device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ExpertBank:
        super()._apply(fn, recurse)
        self._set_constants()  # anew: .to(bfloat16) casts buffers too, and to_empty() empties them
        return self

    @torch.no_grad()
    def reset_parameters(self, init: bool | str) -> None:
        """Draw new weights: B is zero, so that the bank adds nothing, unless `init` is False.

        Args:
            init: `"normal"` A ~ N(0, 0.01²); `"kaiming"` A as in peft's LoRA; `"gaussian"` A ~ N(0, 1/r_i²);
                False: A and B kaiming uniform, a bank that does change the output (for tests).
        """
        if init == "normal":
            nn.init.normal_(self.lora_A.weight, std=0.01)
        elif init == "gaussian":
            for rows in self.lora_A.weight.split(self.ranks):
                nn.init.normal_(rows, std=1 / len(rows))
        else:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(self.lora_B.weight, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Add up the experts' outputs.

        Args:
            x: (..., in).
            weights: (..., E), leading axes broadcast against those of x; None for 1 everywhere (a bank of one).

        Returns:
            (..., out)
        """
        h = self.lora_A(self.dropout(x))  # (..., R)
        return self.lora_B(self._weigh(h, weights))  # weighed in rank space: one product out, not E

    def _weigh(self, h: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """h (..., R) times the scaled weight of the expert that each rank belongs to."""
        if weights is None:
            return h * self.factors[0]  # a bank of one
        weights = (weights * (self.factors[0] if self.scaling is None else self.scaling)).to(h.dtype)
        if self.expert_of_rank is not None:
            return h * weights.index_select(-1, self.expert_of_rank)
        return (h.unflatten(-1, (len(self.ranks), -1)) * weights.unsqueeze(-1)).flatten(-2)

    def anchor_loss(self) -> torch.Tensor:
        """`Σ_i ‖s_i B_i A_i‖²` (Frobenius) over the anchored experts, in float32: how far they are from zero."""
        ranks = self.ranks[: self.num_anchored]
        a = self.lora_A.weight[: sum(ranks)].float().split(ranks)
        b = self.lora_B.weight[:, : sum(ranks)].float().split(ranks, dim=1)
        # tr(AᵀBᵀBA) in rank space, without the (out, in) product
        experts = zip(self.factors, a, b, strict=False)  # factors are of all experts
        with torch.autocast(self.lora_A.weight.device.type, enabled=False):
            return torch.stack([s**2 * ((b_i.T @ b_i) * (a_i @ a_i.T)).sum() for s, a_i, b_i in experts]).sum()

    def folded(self, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The bank under fixed weights (E,) as one LoRA of rank R and scaling 1: A (R, in), B (out, R)."""
        return self.lora_A.weight, self._weigh(self.lora_B.weight, weights)

    def delta_weight(self, weights: torch.Tensor | None) -> torch.Tensor:
        """What the bank adds to the base weight (out, in) under fixed weights (E,)."""
        a, b = self.folded(weights)
        # Half precision products are slow on some CPUs and round twice; peft's LoRA widens them too.
        return (b.float() @ a.float()).to(b.dtype) if b.dtype in (torch.float16, torch.bfloat16) else b @ a
