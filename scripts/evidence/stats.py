"""Intervals and tests for the scores of systems that answered the same rows.

    study = Study({"lora": system_of_runs(sheet, lora_runs), "molora": system_of_runs(sheet, molora_runs)})
    study.estimate("molora")["mean"]                          # score, interval
    found = {"molora": study.compare("molora", "lora")["mean"]}
    judge(found)["molora"].verdict                            # of verdicts.py: win, tie or loss

What an interval of 95 % covers: the score that the method would have with other inputs of the same kind, as many from
each group of tasks, and with other seeds of training; not other tasks, models, sizes of data or learning rates. Inputs
are drawn anew with all of their rows, for all tasks and seeds at once (bootstrap). Three seeds have too few resamples
for that, and drawing both ways counts the noise of single answers three times: so seeds are a normal variable, with the
variance that `variance.pool` finds in all systems together. The percentile interval is then stretched by t / z for the
degrees of freedom of the variance. Percentiles, because scores are nearly linear in hundreds of inputs, and the
acceleration of BCa is not defined for two crossed ways of drawing.

What a p-value is about: `p` asks whether the methods differ, over inputs and seeds (t, with Satterthwaite's degrees of
freedom): verdicts are taken from it. `p_own` is the same with the variance of the two systems' own seeds, few as they
are: a verdict that it does not share rests on the seeds of other systems. Two systems that share trained adapters, seed
by seed, are compared seed by seed, and have these differences alone to tell the variance from seeds by.

scipy's bootstrap takes one way of drawing and one statistic; here are strata, two ways, and all tasks from the same
draws. Tests hold it to scipy where they can be compared. Shapes: B draws · J seeds · I inputs
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import stats
from tallies import Array, System, value
from variance import NO_SEEDS, Seeds, influences, pool, scores, seeds_of, variance_of_inputs, with_means

LEVEL = 0.05


@dataclass(frozen=True)
class Estimate:
    """A score, 0 to 1, or a difference of scores, with its interval; `covers` what is drawn anew."""

    value: float
    low: float
    high: float
    standard_error: float
    degrees: float
    per_seed: list[float]
    covers: str


@dataclass(frozen=True)
class Comparison:
    """A difference between two systems, and its p-value over inputs and seeds.

    `p_own` is that over inputs and the seeds of these two systems; None where one of them has a single seed.
    """

    difference: Estimate
    p: float
    p_own: float | None


@dataclass(frozen=True)
class _Panel:
    """One score of a system: by seed (J,), influences of inputs (J, I), bootstrap scores (B,).

    `seeds` are variances from seeds and the numbers of seeds, `own` those without the seeds of other systems.
    """

    per_seed: Array
    influence: Array
    resampled: Array
    seeds: tuple[tuple[Seeds, int], ...]
    own: tuple[tuple[Seeds | None, int], ...]

    def __sub__(self, other: _Panel) -> _Panel:
        return _Panel(
            self.per_seed - other.per_seed,
            self.influence - other.influence,
            self.resampled - other.resampled,
            self.seeds + other.seeds,
            self.own + other.own,
        )

    def seed_by_seed(self, strata: npt.NDArray[np.intp]) -> _Panel:
        """A difference whose variance from seeds is that of its own values."""
        runs = len(self.per_seed)
        if runs == 1:
            return replace(self, seeds=((NO_SEEDS, 1),), own=((None, 1),))
        seeds = seeds_of(self.per_seed, self.influence, strata)
        return replace(self, seeds=((seeds, runs),), own=((seeds, runs),))


class Study:
    """The systems of one experiment, which share their test rows and what is known of the variance from seeds.

    Args:
        systems: by name. Those trained in the same way, so that their seeds can be pooled.
        draws: of the bootstrap.
        seed: of the draws. All systems meet the same ones.
        repeated: systems with the adapters of others among them, whose seeds say nothing new about seeds in general.

    Raises:
        ValueError: no system, or systems of different sheets.
    """

    def __init__(
        self, systems: Mapping[str, System], *, draws: int = 10_000, seed: int = 0, repeated: Collection[str] = ()
    ) -> None:
        sheets = [system.sheet for system in systems.values()]
        if not sheets or any(sheet is not sheets[0] for sheet in sheets):
            raise ValueError(f"Systems {list(systems)} have {len(sheets)} sheets; read one, and give it to them all.")
        self.systems, self.sheet, self.draws, self.seed = dict(systems), sheets[0], draws, seed
        self.seeds = pool(self.systems, repeated)
        self._panels: dict[str, dict[str, _Panel]] = {}

    def estimate(self, name: str) -> dict[str, Estimate]:
        """The scores of a system by target: each task, "mean", and for each task "without" it."""
        return {target: self._estimate(target, panel, 0.0) for target, panel in self._panels_of(name).items()}

    def compare(self, name: str, other: str, *, shared: bool = False) -> dict[str, Comparison]:
        """`name` minus `other` by target, as in `estimate`. A system of a single seed stands beside each of the other.

        Args:
            name: of a system.
            other: of another.
            shared: whether the two share trained adapters, seed by seed: independent seeds they are not.

        Raises:
            ValueError: systems of several and different seeds.
        """
        pair = self.systems[name], self.systems[other]
        if pair[0].seeds != pair[1].seeds and (shared or min(len(system.seeds) for system in pair) > 1):
            raise ValueError(
                f"{name} has seeds {pair[0].seeds} and {other} {pair[1].seeds}; compare runs of the same seeds."
            )
        others, found = self._panels_of(other), {}
        for target, panel in self._panels_of(name).items():
            both = panel - others[target]
            both = both.seed_by_seed(self.sheet.strata) if shared else both
            difference, own = self._estimate(target, both, -1.0), self._own(target, both)
            p_own = None if own is None else _p_of_t(difference.value, *own)
            p = _p_of_t(difference.value, difference.standard_error, difference.degrees)
            found[target] = Comparison(difference, p, p_own)
        return found

    @cached_property
    def _weights(self) -> Array:
        """How often each draw takes each input, (B, I): as many of every stratum as it has."""
        rng, weights = np.random.default_rng(self.seed), np.zeros((self.draws, len(self.sheet.inputs)))
        for stratum in np.unique(self.sheet.strata):
            here = self.sheet.strata == stratum
            weights[:, here] = rng.multinomial(here.sum(), np.full(here.sum(), 1 / here.sum()), self.draws)
        return weights

    def _panels_of(self, name: str) -> dict[str, _Panel]:
        if name not in self._panels:
            system = self.systems[name]
            resampled = with_means(
                {
                    task: value(self.sheet.tasks[task].metric, self._weights @ sums).mean(0)
                    for task, sums in system.tallies.items()
                }
            )
            per_seed, influence = scores(system), influences(system)
            used, own, runs = self.seeds.used[name], self.seeds.own.get(name, {}), len(system.seeds)
            self._panels[name] = {
                target: _Panel(
                    per_seed[target],
                    influence[target],
                    resampled[target],
                    ((used[target], runs),),
                    ((own.get(target, None if system.trained else used[target]), runs),),
                )
                for target in per_seed
            }
        return self._panels[name]

    def _estimate(self, target: str, panel: _Panel, lowest: float) -> Estimate:
        of_inputs, of_seeds, degrees = self._variances(target, panel.influence, panel.seeds)
        score = float(panel.per_seed.mean())
        noise = np.random.default_rng((self.seed, 1)).standard_normal(self.draws)
        ends = np.quantile(panel.resampled + of_seeds**0.5 * noise, [LEVEL / 2, 1 - LEVEL / 2])
        stretch = stats.t.ppf(1 - LEVEL / 2, degrees) / stats.norm.ppf(1 - LEVEL / 2)
        low, high = np.clip(score + stretch * (ends - score), lowest, 1.0)
        covers = "inputs and seeds" if any(seeds.observed for seeds, _ in panel.seeds) else "inputs"
        return Estimate(
            score, float(low), float(high), (of_inputs + of_seeds) ** 0.5, degrees, panel.per_seed.tolist(), covers
        )

    def _own(self, target: str, panel: _Panel) -> tuple[float, float] | None:
        """The standard error and degrees of freedom with the variance of these systems' own seeds, if all have it."""
        seeds = tuple((each, runs) for each, runs in panel.own if each is not None)
        if len(seeds) < len(panel.own):
            return None
        of_inputs, of_seeds, degrees = self._variances(target, panel.influence, seeds)
        return (of_inputs + of_seeds) ** 0.5, degrees

    def _variances(
        self, target: str, influence: Array, seeds: tuple[tuple[Seeds, int], ...]
    ) -> tuple[float, float, float]:
        """The variance from inputs and that from seeds, and Satterthwaite's degrees of freedom (1946) of their sum."""
        of_inputs = float(variance_of_inputs(influence.mean(0), self.sheet.strata))
        of_seeds = sum(each.of_seed / runs for each, runs in seeds)
        task = self.sheet.tasks.get(target)
        inputs = np.arange(len(self.sheet.inputs)) if task is None else np.unique(task.inputs)
        of_rest = float(len(inputs) - len(np.unique(self.sheet.strata[inputs])))
        parts: dict[Seeds, float] = {}
        for each, runs in seeds:  # two systems that share an estimate share its error
            parts[each] = parts.get(each, 0.0) + each.observed / runs
        uncertain = of_inputs**2 / of_rest + sum(part**2 / each.degrees for each, part in parts.items())
        return of_inputs, of_seeds, (of_inputs + of_seeds) ** 2 / uncertain if uncertain else of_rest


def _p_of_t(value: float, standard_error: float, degrees: float) -> float:
    if standard_error == 0:
        return float(value == 0)
    return float(2 * stats.t.sf(abs(value) / standard_error, degrees))
