"""The LoRA that comes closest to a bank whose weights depend on its input.

A bank gives `B z` with `z = s(x) ⊙ A x`, where s are its scaled weights. Its closest linear stand-in over the tokens x
of a calibration set has the same B and `A' = E[z xᵀ] (E[x xᵀ] + εI)⁻¹`: least squares, with a ridge ε. It has the
bank's rank R, and nothing of a higher rank would be closer, because B reaches all that the bank can give.

Shapes: t tokens · E experts · R sum of ranks · r rank of the stand-in
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class StandIn(NamedTuple):
    """A LoRA of scaling 1 that takes the place of a bank: `b @ a`.

    Args:
        a: (r, in).
        b: (out, r).
        made_for: `fingerprint` of what it was made for.
    """

    a: torch.Tensor
    b: torch.Tensor
    made_for: float

    def delta_weight(self) -> torch.Tensor:
        """What it adds to the base weight (out, in), in float32."""
        return self.b.float() @ self.a.float()


class Moments:
    """What a calibration set leaves of the tokens that one bank sees: sums of `x xᵀ`, `z xᵀ`, s and their number.

    Args:
        in_features: of the bank.
        rank: R.
        device: where they are added up.
    """

    def __init__(self, in_features: int, rank: int, device: torch.device) -> None:
        self.xx = torch.zeros(in_features, in_features, device=device)
        self.zx = torch.zeros(rank, in_features, device=device)
        self.s = torch.zeros(rank, device=device)
        self.count = torch.zeros((), device=device)

    @staticmethod
    def size(in_features: int, rank: int) -> int:
        """Bytes that they take."""
        return 4 * (in_features + rank + 1) * in_features

    def add(self, x: torch.Tensor, h: torch.Tensor, s: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Add tokens.

        Args:
            x: (t, in).
            h: (t, R), A x.
            s: (t, R), the scaled weight of the expert that each rank belongs to.
            keep: (t,) true for tokens that count; None for all.
        """
        x, h, s = x.float(), h.float(), s.float()
        if keep is not None:  # zeros instead of fewer rows, whose number would depend on the data
            # not by a product: what padding holds may not be finite
            x, h, s = (v.masked_fill(~keep.unsqueeze(-1), 0.0) for v in (x, h, s))
        self.xx.addmm_(x.T, x)
        self.zx.addmm_((h * s).T, x)
        self.s += s.sum(0)
        self.count += len(x) if keep is None else keep.sum()

    def covariance(self, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`E[x xᵀ] + εI` in units in which every feature has a mean square of 1, and these units.

        Features of hidden states differ by orders of magnitude, so that a ridge in their own units would be nothing to
        some and everything to others, and float32 sums would not be positive definite.

        Returns:
            (in, in) in float64, positive definite; (in,) what features are divided by.
        """
        c = self.xx.double() / self.count
        units = c.diagonal().sqrt()
        units = torch.where(units > 0, units, torch.ones_like(units))  # features that are always zero
        c = c / units / units.unsqueeze(1)
        c.diagonal().add_(damping)
        return c, units

    def mean_gate(self) -> torch.Tensor:
        """(R,) the mean of s."""
        return self.s / self.count


def least_squares(a: torch.Tensor, moments: Moments, damping: float) -> torch.Tensor:
    """A' (R, in) for a bank with A (R, in), in float64.

    The ridge pulls to the mean gate `Ā = E[s] ⊙ A` and not to zero: `A' = Ā + E[(z - Ā x) xᵀ] (E[x xᵀ] + εI)⁻¹`. So
    directions that the calibration set does not have are answered by the mean gate.

    Args:
        damping: ε, beside a mean square of 1.
    """
    mean = moments.mean_gate().double().unsqueeze(1) * a.double()
    residual = (moments.zx.double() - mean @ moments.xx.double()) / moments.count
    c, units = moments.covariance(damping)
    return mean + torch.cholesky_solve((residual / units).T, torch.linalg.cholesky(c)).T / units


def compress(
    a: torch.Tensor, b: torch.Tensor, moments: Moments, *, rank: int, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The LoRA of a lower rank whose output over the calibration set is closest to that of `b @ a`.

    Args:
        a: (R, in).
        b: (out, R).
        rank: r, up to R.
        damping: ε.

    Returns:
        a (r, in) and b (out, r) in float64: the singular value decomposition of `b a L`, where `L Lᵀ` is the
        covariance, cut off at r.
    """
    c, units = moments.covariance(damping)
    q, triangle = torch.linalg.qr(b.double())
    a = triangle @ a.double()
    u, _, _ = torch.linalg.svd((a * units) @ torch.linalg.cholesky(c), full_matrices=False)
    u = u[:, :rank]
    return u.T @ a, q @ u


def fingerprint(tensors: list[torch.Tensor]) -> float:
    """A number that changes when weights do, and not when they are copied or moved."""
    total = 0.0
    for tensor in tensors:
        flat = tensor.detach().double().flatten()
        total += float(flat @ torch.linspace(1, 2, len(flat), dtype=torch.float64, device=flat.device))
    return total
