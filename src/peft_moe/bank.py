"""A bank of LoRA experts.

Shapes: ... any leading axes · E experts · r_i rank of expert i · R = sum of r_i
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from . import kernels


class FrozenLinear(nn.Module):
    """A linear layer without bias whose weight is a buffer: saved and moved as a parameter is, and never trained.

    Frozen parameters would not do: checkpoints of FSDP2 and ZeRO-3 leave them out, and peft takes an adapter's
    parameters to be trained whenever the adapter is active.
    """

    weight: torch.Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


class GramLinear(nn.Linear):
    """A linear layer without bias that can be asked about its own weight: called with a number of ranks instead of an
    input, it gives the inner products between the vectors of the first so many ranks, in float32.

    FSDP and ZeRO-3 keep weights in parts and put them together for a call of the layer that has them, and only then.

    Args:
        in_features, out_features: sizes; one of them is the number of ranks.
        rank_first: whether ranks are the weight's rows (A), or its columns (B).
    """

    def __init__(self, in_features: int, out_features: int, *, rank_first: bool) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.rank_first = rank_first

    def forward(self, x: torch.Tensor | int) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return super().forward(x)
        vectors = (self.weight[:x] if self.rank_first else self.weight[:, :x].T).float()
        return vectors @ vectors.T


class ExpertBank(nn.Module):
    """E LoRA experts stored as one LoRA of rank R: `B · (s ⊙ (A · dropout(x)))`, s the scaled weights of the experts.

    The rows of `lora_A.weight` (R, in) and the columns of `lora_B.weight` (out, R) belong to expert 0, then expert 1,
    and so on.

    Args:
        in_features, out_features: sizes of the linear layer that the bank extends.
        ranks: rank of each expert; 0 is an expert that adds nothing here.
        scaling: factor on each expert (alpha over rank), or one for all.
        dropout: probability of dropping an element of x, applied once for all experts.
        num_anchored: how many of the first experts are pulled back to zero by `anchor_loss`.
        anchor_coefficient: its weight in the loss.
        pretrained: its weights are made elsewhere and come in by `fill` or a state dict; using it before is an error.
        frozen: its weights are buffers, not parameters.
    """

    expert_of_rank: torch.Tensor | None
    scaling: torch.Tensor | None
    spread: torch.Tensor

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
        pretrained: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.pretrained, self._awaits_weights = pretrained, pretrained
        self.num_anchored, self.anchor_coefficient = num_anchored, anchor_coefficient
        self.factors = (scaling,) * len(ranks) if isinstance(scaling, (int, float)) else tuple(scaling)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_A: nn.Linear | FrozenLinear
        self.lora_B: nn.Linear | FrozenLinear
        if frozen:
            self.lora_A, self.lora_B = FrozenLinear(in_features, sum(ranks)), FrozenLinear(sum(ranks), out_features)
        elif num_anchored:
            self.lora_A = GramLinear(in_features, sum(ranks), rank_first=True)
            self.lora_B = GramLinear(sum(ranks), out_features, rank_first=False)
        else:
            self.lora_A = nn.Linear(in_features, sum(ranks), bias=False)
            self.lora_B = nn.Linear(sum(ranks), out_features, bias=False)
        self.register_buffer("expert_of_rank", None, persistent=False)  # where ranks differ
        self.register_buffer("scaling", None, persistent=False)  # where factors differ
        # (E, R) for kernels: the scaling of the expert that a rank belongs to, 0 for the others
        self.register_buffer("spread", None, persistent=False)
        self._set_constants()

    def _set_constants(self) -> None:
        device = self.lora_A.weight.device
        device = torch.device("cpu") if device.type == "meta" else device  # what they hold would be lost there
        if len(set(self.ranks)) > 1:
            index = [expert for expert, rank in enumerate(self.ranks) for _ in range(rank)]
            self.expert_of_rank = torch.tensor(index, device=device)
        if len(set(self.factors)) > 1:
            self.scaling = torch.tensor(self.factors, dtype=self._wide, device=device)
        ranks = torch.tensor(self.ranks, device=device)
        factors = torch.tensor(self.factors, dtype=self._wide, device=device)
        self.spread = factors.diag().repeat_interleave(ranks, dim=1, output_size=sum(self.ranks))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ExpertBank:
        # without the constants: .to(bfloat16) casts buffers too, and to_empty() empties them
        constants = {name: self._buffers.pop(name) for name in ("expert_of_rank", "scaling", "spread")}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(constants)
        moved = self.lora_A.weight.device not in (self.spread.device, torch.device("meta"))
        if moved or self.spread.dtype != self._wide:
            self._set_constants()
        self.spread = self.spread.view_as(self.spread)  # another object, which tells who has it that something changed
        return self

    @property
    def _wide(self) -> torch.dtype:
        """The type of constants: float32, or float64 if that is the bank's."""
        return torch.promote_types(self.lora_A.weight.dtype, torch.float32)

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
            for rows in self.lora_A.weight.split([rank for rank in self.ranks if rank]):
                nn.init.normal_(rows, std=1 / len(rows))
        else:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(self.lora_B.weight, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B.weight)

    @torch.no_grad()
    def fill(self, experts: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> None:
        """Take the experts' weights in their order, A (r_i, in) and B (out, r_i) each; None for one of rank 0."""
        present = [expert for expert in experts if expert is not None]
        self.lora_A.weight.copy_(torch.cat([a for a, _ in present]))
        self.lora_B.weight.copy_(torch.cat([b for _, b in present], dim=1))
        self._awaits_weights = False

    @torch.no_grad()
    def take(self, other: ExpertBank) -> None:
        """Start with the weights of another bank of the same experts."""
        self.lora_A.weight.copy_(other.lora_A.weight)
        self.lora_B.weight.copy_(other.lora_B.weight)
        self._awaits_weights = other._awaits_weights

    @torch.no_grad()
    def await_weights(self) -> None:
        """Fill up with what no file holds, so that weights that never come are noticed."""
        self.lora_A.weight.fill_(math.nan)
        self.lora_B.weight.fill_(math.nan)

    def check_weights(self) -> None:
        """Raise a RuntimeError if its weights should have come from elsewhere and have not."""
        if self._awaits_weights and not torch.compiler.is_compiling():
            self._check_weights()

    def _check_weights(self) -> None:
        self._awaits_weights = False  # looked at once: looking waits for the device
        if self.lora_A.weight.isnan().any() or self.lora_B.weight.isnan().any():
            self._awaits_weights = True
            raise RuntimeError(
                "Experts have no weights: the config is that of a saved adapter, whose weights are in its directory. "
                "Load it with PeftModel.from_pretrained(base_model, directory), or make a new config that names the "
                "experts' sources."
            )

    def forward(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Add up the experts' outputs.

        Args:
            x: (..., in).
            weights: (..., E), leading axes broadcast against those of x; None for 1 everywhere (a bank of one).

        Returns:
            (..., out)
        """
        self.check_weights()
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

    def scaled_weights(self, h: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """The scaled weight of the expert that each rank belongs to, (..., R) as h."""
        return self._weigh(torch.ones_like(h), weights)

    @property
    def is_bare(self) -> bool:
        """Whether kernels may read its weights without calling it."""
        if not (kernels.is_unseen(self) and kernels.is_unseen(self.dropout)):
            return False
        return all(kernels.is_bare(m, nn.Linear, FrozenLinear, GramLinear) for m in (self.lora_A, self.lora_B))

    def anchor_loss(self) -> torch.Tensor:
        """`Σ_i ‖s_i B_i A_i‖²` (Frobenius) over the anchored experts, in float32: how far they are from zero."""
        ranks = self.ranks[: self.num_anchored]
        with torch.autocast(self.lora_A.weight.device.type, enabled=False):
            # tr(AᵀBᵀBA) in rank space, without the (out, in) product
            of_both = self.lora_A(sum(ranks)) * self.lora_B(sum(ranks))  # (ranks, ranks)
            blocks = [of_rows.split(ranks, dim=1)[i] for i, of_rows in enumerate(of_both.split(ranks))]
            factors = zip(self.factors, blocks, strict=False)  # they are of all experts
            return torch.stack([s**2 * block.sum() for s, block in factors]).sum()

    def folded(self, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The bank under fixed weights (E,) as one LoRA of rank R and scaling 1: A (R, in), B (out, R)."""
        if self._awaits_weights:
            self._check_weights()
        b = self.lora_B.weight
        each = self.factors[0] if weights is None else kernels.each_rank(weights.unsqueeze(0), self.spread, b.dtype)
        return self.lora_A.weight, b * each

    def delta_weight(self, weights: torch.Tensor | None) -> torch.Tensor:
        """What the bank adds to the base weight (out, in) under fixed weights (E,)."""
        a, b = self.folded(weights)
        # Half precision products are slow on some CPUs and round twice; peft's LoRA widens them too.
        return (b.float() @ a.float()).to(b.dtype) if b.dtype in (torch.float16, torch.bfloat16) else b @ a
