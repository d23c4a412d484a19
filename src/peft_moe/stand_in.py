"""The LoRA that comes closest to a bank whose weights depend on its input.

A bank gives `B z` with `z = s(x) ⊙ A x`, where s are its scaled weights. Its closest linear stand-in over the tokens x
of a calibration set has the same B and `A' = E[z xᵀ] (E[x xᵀ] + εI)⁻¹`: least squares, with a ridge ε. It has the
bank's rank R, and nothing of a higher rank would be closer, because B reaches all that the bank can give.

Shapes: t tokens · E experts · R sum of ranks · r rank of the stand-in
"""

from __future__ import annotations

from collections.abc import Iterable
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
    made_for: int

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
        self.count = torch.zeros((), dtype=torch.long, device=device)

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
        if keep is not None:  # zeros instead of fewer rows, whose number would depend on the data
            # not by a product: what padding holds may not be finite
            x, h, s = (v.masked_fill(~keep.unsqueeze(-1), 0.0) for v in (x, h, s))
        x, h, s = x.float(), h.float(), s.float()
        self.xx.addmm_(x.T, x)
        self.zx.addmm_((h * s).T, x)
        self.s += s.sum(0)
        self.count += len(x) if keep is None else keep.sum()

    def mean_gate(self) -> torch.Tensor:
        """(R,) the mean of s."""
        return self.s / self.count

    def root(self, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        """A square root of `E[x xᵀ] + εI` in units in which every feature has a mean square of 1, and these units.

        Features of hidden states differ by orders of magnitude, so that a ridge in their own units would be nothing to
        some and everything to others, and float32 sums would not be positive definite.

        Returns:
            (in, in) in float64, lower triangular; (in,) what features are divided by.

        Raises:
            ValueError: ε is lost in the rounding of the sums.
        """
        c = _wide(self.xx) / _wide(self.count)
        units = c.diagonal().sqrt()
        units = torch.where(units > 0, units, torch.ones_like(units))  # features that are always zero
        c.div_(units).div_(units.unsqueeze(1)).diagonal().add_(damping)
        root, failed = torch.linalg.cholesky_ex(c)
        if failed:
            raise ValueError(
                f"damping={damping} is too small beside the rounding of sums over {int(self.count)} tokens with "
                f"{len(c)} features; use more tokens, or a larger one, such as 0.01."
            )
        return root, units


def closest(
    a: torch.Tensor, b: torch.Tensor, moments: Moments, *, damping: float, rank: int | None, mean_gate: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The LoRA whose output over a calibration set comes closest to that of a bank.

    The ridge pulls to the mean gate `Ā = E[s] ⊙ A` and not to zero: `A' = Ā + E[(z - Ā x) xᵀ] (E[x xᵀ] + εI)⁻¹`. So
    directions that the calibration set does not have are answered by the mean gate.

    Args:
        a, b: of the bank, (R, in) and (out, R).
        moments: of the calibration set.
        damping: ε, beside a mean square of 1.
        rank: r, by the singular values of `b A' L`, where `L Lᵀ` is the covariance; None, or one that is not below
            those of a and b, for no compression.
        mean_gate: take Ā for A'.

    Returns:
        a (r, in) and b (out, r) in float64, on the CPU if the device has none.

    Raises:
        ValueError: the sums are not finite, or ε is too small for them.
    """
    if not all(torch.isfinite(v).all() for v in (moments.xx, moments.zx, moments.s, a, b)):
        raise ValueError("inputs, experts or weights of experts are not finite numbers; look for NaN in the adapter.")
    a, b = _wide(moments.mean_gate()).unsqueeze(1) * _wide(a), _wide(b)
    cut = rank is not None and rank < min(b.shape)
    if mean_gate and not cut:
        return a, b
    residual = (_wide(moments.zx) - a @ _wide(moments.xx)) / _wide(moments.count)
    root, units = moments.root(damping)
    if not mean_gate:
        a = a + torch.cholesky_solve((residual / units).T, root).T / units
    if cut:
        q, triangle = torch.linalg.qr(b)
        a = triangle @ a
        u = torch.linalg.svd((a * units) @ root, full_matrices=False)[0][:, :rank]
        a, b = u.T @ a, q @ u
    return a, b


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, and so on the CPU where the device has none."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def fingerprint(tensors: Iterable[torch.Tensor]) -> int:
    """A number that changes with any bit of the tensors, and not when they are copied or moved to another device."""
    total = 0
    for tensor in tensors:
        # integers, whose sum does not depend on its order as that of floats does, which differs among devices
        bits = tensor.detach().contiguous().flatten().view(torch.int16).long()
        places = torch.arange(len(bits), device=bits.device) % 65521 + 1
        total = (total * 1_000_003 + int((bits * places).sum())) % (1 << 61)
    return total
