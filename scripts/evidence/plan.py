"""What a run is, and how a learning rate is chosen: pure functions of the scores of the runs that are done."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from setups import Setup

Scores = Mapping[str, float]  # mean score of the runs that are done, by id: on dev for searches, on test for finals
MEASURES = ("uniform", "routing", "general")  # what can be measured beside answers; a record has it by the same name


@dataclass(frozen=True)
class Run:
    """One run: what is trained, if anything, and what is measured of it.

    Args:
        id: such as "instruction/molora/lr-0.001/seed-1"; no other run has it.
        experiment: one of `grid.EXPERIMENTS`.
        system: what is trained; "base" is nothing.
        protocol: "instruction" or "bare".
        seed, learning_rate: None for the base model.
        purpose: "search": scored on dev; "final": on test.
        settings: flags of scripts/train.py, but for its output_dir.
        needs: ids of the runs whose adapters have to be there first.
        after: what the ids of searches begin with whose results the run follows from.
        parts: tasks that get an adapter each; empty for one adapter for all.
        scored: tasks whose rows are answered; empty for all.
        adapter: id of the run whose adapter is measured; nothing is trained then.
        measure: what is measured beside the answers, of `MEASURES`.
        limit: answer the first rows of each task only; None for all.
    """

    id: str
    experiment: str
    system: str
    protocol: str
    seed: int | None
    learning_rate: float | None
    purpose: str
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    scored: tuple[str, ...] = ()
    adapter: str | None = None
    measure: tuple[str, ...] = ()
    limit: int | None = None

    @property
    def split(self) -> str:
        """The split that is answered."""
        return "dev" if self.purpose == "search" else "test"

    @property
    def trains(self) -> bool:
        """Whether an adapter is trained."""
        return self.adapter is None and self.learning_rate is not None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Run":
        """From what `to_dict` gave, also by way of JSON."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """All fields, which JSON can hold."""
        return asdict(self)


def run_id(protocol: str, system: str, rate: float, seed: int) -> str:
    """The id of a run that trains."""
    return f"{protocol}/{system}/lr-{rate:g}/seed-{seed}"


def search(
    rates: Sequence[float], beyond: tuple[Sequence[float], Sequence[float]], scores: Mapping[float, float]
) -> tuple[list[float], float | None]:
    """The rates to try, and the chosen one, or None while some of them are not scored.

    Args:
        rates: to try in any case, rising; a single one is chosen without a score.
        beyond: rates below them, falling, and above them, rising: the next one is tried while the best lies at that
            edge, so that the chosen rate has a worse one on either side, or is the last there is.
        scores: by rate; of equal ones the lower rate wins.
    """
    if len(rates) == 1:
        return [], rates[0]
    tried, below, above = list(rates), list(beyond[0]), list(beyond[1])
    while (found := best(tried, scores)) is not None:
        if found == min(tried) and below:
            tried.append(below.pop(0))
        elif found == max(tried) and above:
            tried.append(above.pop(0))
        else:
            break
    return tried, found


def best(rates: Sequence[float], scores: Mapping[float, float]) -> float | None:
    """The rate with the highest score, of equal ones the lowest; None while one has no score."""
    if not all(rate in scores for rate in rates):
        return None
    return max(rates, key=lambda rate: (scores[rate], -rate))


def searched(setup: Setup, done: Scores, protocol: str, system: str) -> tuple[list[float], float | None]:
    """The rates to try for a system in a protocol, and the chosen one, if it can be named now."""
    if protocol == "bare" and not setup.search_bare:
        return [], searched(setup, done, "instruction", system)[1]
    ids = {rate: run_id(protocol, system, rate, 0) for rate in setup.all_rates}
    return search(setup.rates, setup.beyond, {rate: done[ids[rate]] for rate in ids if ids[rate] in done})


def make(
    setup: Setup,
    experiment: str,
    system: str,
    rate: float,
    seed: int,
    settings: Mapping[str, Any],
    *,
    protocol: str = "instruction",
    purpose: str = "final",
    measure: tuple[str, ...] = (),
    **fields: Any,
) -> Run:
    """A run of a system with settings beside those of all runs; fields are further ones of `Run`."""
    flags = {
        "model_name_or_path": setup.model,
        "dataset": setup.train_data,
        "protocol": protocol,
        **setup.common,
        **settings,
    }
    return Run(
        id=run_id(protocol, system, rate, seed),
        experiment=experiment,
        system=system,
        protocol=protocol,
        seed=seed,
        learning_rate=rate,
        purpose=purpose,
        settings=flags | {"learning_rate": rate, "seed": seed},
        measure=allowed(setup, measure),
        limit=setup.limit,
        **fields,
    )


def allowed(setup: Setup, measure: tuple[str, ...]) -> tuple[str, ...]:
    """What a setup lets a run measure."""
    return tuple(what for what in measure if what != "general" or setup.general)
