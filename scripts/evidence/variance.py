"""Where the spread of a score comes from: the test inputs, and the seeds of training.

A system's score is the mean over tasks of the mean over seeds. Every seed answers the same inputs, so the two are
crossed, and the variance of the score is that of inputs plus that of seeds (two-way clustering: Cameron, Gelbach and
Miller 2011, https://doi.org/10.1198/jbes.2010.07136). Metrics that are no means are made linear by the jackknife.

Shapes: J seeds · I test inputs. Dictionaries by target: a task, "mean", the unweighted mean over tasks, or "without x",
that of all tasks but x.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from tallies import Array, System, value

UNSTABLE = 0.01  # how improbable a seed variance must be under the pooled one for a system to be left with its own


@dataclass(frozen=True)
class Seeds:
    """The variance of one run's score over seeds, and how much of it is the noise of single answers.

    That noise averages out with more inputs and is counted among them; `of_seed` is what other inputs would not change.
    """

    observed: float
    noise: float
    degrees: float

    @property
    def of_seed(self) -> float:
        """The variance of a score from the seed, beside that from inputs."""
        return max(0.0, self.observed - self.noise)


NO_SEEDS = Seeds(0.0, 0.0, np.inf)


def without(task: str) -> str:
    """The target that is the mean of all other tasks."""
    return f"without {task}"


def with_means(by_task: Mapping[str, Array]) -> dict[str, Array]:
    """Add the unweighted mean over tasks, and those over all but one of them."""
    total = np.sum(list(by_task.values()), axis=0)
    found = {**by_task, "mean": np.asarray(total / len(by_task))}
    if len(by_task) > 1:
        found |= {without(task): np.asarray((total - each) / (len(by_task) - 1)) for task, each in by_task.items()}
    return found


def scores(system: System) -> dict[str, Array]:
    """Each seed's score, (J,) by target."""
    tasks = system.sheet.tasks
    return with_means({task: value(tasks[task].metric, sums.sum(1)) for task, sums in system.tallies.items()})


def influences(system: System) -> dict[str, Array]:
    """What each input adds to each seed's score, (J, I) by target, up to a constant of a stratum.

    `(n - 1) / n · (score - score without the input)`: the jackknife, for a mean over n inputs exactly the input's
    deviation from it, over n.
    """
    found = {}
    for name, task in system.sheet.tasks.items():
        sums, n = system.tallies[name], len(np.unique(task.inputs))
        total = sums.sum(1, keepdims=True)
        found[name] = (n - 1) / n * (value(task.metric, total) - value(task.metric, total - sums))
    return with_means(found)


def variance_of_inputs(influence: Array, strata: npt.NDArray[np.intp]) -> Array:
    """The variance of a score, (...), under other inputs of the same strata, from influences (..., I)."""
    total = np.zeros(influence.shape[:-1])
    for stratum in np.unique(strata):
        here = influence[..., strata == stratum]
        total += here.shape[-1] * here.var(-1, ddof=1)
    return total


def seeds_of(score: Array, influence: Array, strata: npt.NDArray[np.intp]) -> Seeds:
    """The variance from seeds, of one system alone, from its scores (J,) and influences (J, I); J at least 2."""
    degrees = len(score) - 1
    noise = variance_of_inputs(influence - influence.mean(0), strata).sum() / degrees
    return Seeds(float(score.var(ddof=1)), float(noise), degrees)


@dataclass(frozen=True)
class Pool:
    """The variance from seeds of systems, by system and target.

    Args:
        used: what intervals and tests take: the shared one, or a system's own if it is unstable there.
        own: of each system with several seeds, from its seeds alone.
        unstable: by target, the systems whose seeds differ much more than those of the others.
        shared: by target, of all systems but the unstable and the repeated ones.
    """

    used: dict[str, dict[str, Seeds]]
    own: dict[str, dict[str, Seeds]]
    unstable: dict[str, list[str]]
    shared: dict[str, Seeds]


def pool(systems: Mapping[str, System], repeated: Collection[str] = ()) -> Pool:
    """The variance from seeds by system and target, shared by all systems whose seeds differ alike.

    A few seeds say too little about one system. So those of all are taken together, weighted by their degrees of
    freedom; but a system whose scores vary so much more than those of the others (F test of level `UNSTABLE`) keeps
    its own, and is named. Systems that are not trained have none; those of one seed have the shared one, and so do
    `repeated` ones, whose adapters are those of others: they are not counted twice.
    """
    names = [name for name, system in systems.items() if system.trained]
    own: dict[str, dict[str, Seeds]] = {}
    for name in (name for name in names if len(systems[name].seeds) > 1):
        score, influence, strata = scores(systems[name]), influences(systems[name]), systems[name].sheet.strata
        own[name] = {target: seeds_of(score[target], influence[target], strata) for target in score}
    targets = [*scores(next(iter(systems.values())))]
    counted = {name: each for name, each in own.items() if name not in repeated}
    unstable = {target: _unstable({name: each[target] for name, each in counted.items()}) for target in targets}
    shared = {
        target: _together([each[target] for name, each in counted.items() if name not in unstable[target]])
        for target in targets
    }
    found = {
        name: {target: own[name][target] if name in unstable[target] else shared[target] for target in targets}
        for name in names
    }
    used = {name: found.get(name, dict.fromkeys(targets, NO_SEEDS)) for name in systems}
    return Pool(used, own, unstable, shared)


def _together(seeds: list[Seeds]) -> Seeds:
    if not seeds:
        return NO_SEEDS
    weights = [each.degrees for each in seeds]
    observed, noise = np.average([[each.observed, each.noise] for each in seeds], axis=0, weights=weights)
    return Seeds(float(observed), float(noise), sum(weights))


def _unstable(seeds: Mapping[str, Seeds]) -> list[str]:
    found = []
    for name, each in seeds.items():
        others = _together([other for key, other in seeds.items() if key != name])
        if others.observed > 0:
            improbable = stats.f.sf(each.observed / others.observed, each.degrees, others.degrees) < UNSTABLE
            found += [name] if improbable else []
    return found
