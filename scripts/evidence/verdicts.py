"""What a family of comparisons says once it is corrected for its size, and what it could have seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats
from stats import LEVEL, Comparison, Estimate

POWER = 0.8


@dataclass(frozen=True)
class Verdict:
    """`win`, `tie` or `loss` by the corrected p-value; `detectable`: the true difference found with probability 0.8.

    That is at the first step of Holm's correction, which is its hardest. `own` is the verdict by `p_own`, None where a
    comparison of the family that was made has none.
    """

    verdict: str
    own: str | None
    p_corrected: float
    detectable: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) of a family of p-values, in their order: no false find with 1 - level.

    Raises:
        ValueError: a value that is not within 0 and 1.
    """
    p = np.asarray(p_values, dtype=float)
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p-values {list(p_values)} are not all within 0 and 1; give those of a test.")
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(each) for each in corrected]


def judge(family: Mapping[str, Comparison]) -> dict[str, Verdict]:
    """Verdicts on a family of comparisons: every one that the same claim is made from, and no others.

    Args:
        family: such as the comparison of "mean" of every method with its matched LoRA.
    """
    corrected = holm([each.p for each in family.values()])
    known = [each.p_own for each in family.values() if each.p_own is not None]
    corrected_own = holm(known) if len(known) == len(family) else [None] * len(family)
    return {
        name: Verdict(
            _verdict(each.difference.value, p),
            None if p_own is None else _verdict(each.difference.value, p_own),
            p,
            detectable(each.difference, LEVEL / len(family)),
        )
        for (name, each), p, p_own in zip(family.items(), corrected, corrected_own, strict=True)
    }


def detectable(difference: Estimate, level: float) -> float:
    """The smallest true difference that a test of this level finds with probability `POWER`."""
    critical = stats.t.ppf(1 - level / 2, difference.degrees)
    shift = optimize.brentq(
        lambda shift: stats.nct.sf(critical, difference.degrees, shift) - POWER, 0, 5 * critical + 5
    )
    return float(shift * difference.standard_error)


def _verdict(difference: float, p: float) -> str:
    if p > LEVEL:
        return "tie"
    return "win" if difference > 0 else "loss"
