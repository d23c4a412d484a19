"""How long runs take, from the CPU seconds of finished runs of the same kind."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from grid import forecast
from plan import MEASURES, Run
from setups import Setup

UNKNOWN = 900.0  # seconds of a run where nothing like it has been measured


class Estimates:
    """Seconds of runs; a process has one thread, and so takes its CPU seconds on a free core.

    Args:
        records: `Store.records`.
    """

    def __init__(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        self.records = records
        self.epoch: dict[tuple[Any, ...], list[float]] = defaultdict(list)  # of training
        self.answers: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        self.beside: dict[tuple[Any, ...], list[float]] = defaultdict(list)  # all else
        for record in records.values():
            settings, training, answers = record["settings"], record["train_cpu"], record["answer_cpu"]
            for kind in alike(record["system"], settings):
                if training:
                    self.epoch[kind].append(training / epochs(settings))
                self.answers[(record["purpose"], *kind)].append(answers)
            beside = record["cpu"] - training - answers
            self.beside[("these", *record["measure"])].append(beside)
            self.beside[("each",)].append(beside / (1 + len(record["measure"])))

    def seconds(self, run: Run) -> float:
        """Training, answers and the rest, each the mean of the runs that are most like it."""
        kinds = list(alike(run.system, run.settings))
        measure = tuple(what for what in MEASURES if what in run.measure)
        training = first_mean(self.epoch, kinds) if run.trains else 0.0
        answers = first_mean(self.answers, [(run.purpose, *kind) for kind in kinds])
        beside = first_mean(self.beside, [("these", *measure)])
        if beside is None and (each := first_mean(self.beside, [("each",)])) is not None:
            beside = each * (1 + len(measure))
        if training is None or answers is None or beside is None:
            return UNKNOWN
        return training * epochs(run.settings) + answers + beside

    def left(self, setup: Setup, wanted: Callable[[list[Run]], list[Run]], again: set[str]) -> tuple[int, list[Run]]:
        """How many of the wanted runs are done, and the others, also those that cannot be named yet."""
        scores = {run_id: record["score"] for run_id, record in self.records.items()}
        runs = wanted(forecast(setup, scores))
        left = [run for run in runs if run.id not in self.records or run.id in again]
        return len(runs) - len(left), left

    def progress(
        self,
        setup: Setup,
        wanted: Callable[[list[Run]], list[Run]],
        again: set[str],
        elapsed: Mapping[str, float],
        workers: int,
    ) -> str:
        """A line; `elapsed` has the seconds of the runs that are being done."""
        done, left = self.left(setup, wanted, again)
        seconds = sum(max(0.0, self.seconds(run) - elapsed.get(run.id, 0.0)) for run in left) / workers
        about = "about " if self.records else "perhaps "
        return f"{done} done, {len(left)} left, {about}{clock(seconds)} to go"


def epochs(settings: Mapping[str, Any]) -> float:
    """How often a run trains on its rows."""
    return float(settings.get("num_train_epochs", 1))


def alike(system: str, settings: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Kinds that a run is of, from the narrowest to the widest."""
    yield "system", system
    yield "method", settings.get("method")
    yield ("any",)


def first_mean(found: Mapping[tuple[Any, ...], list[float]], kinds: Sequence[tuple[Any, ...]]) -> float | None:
    """The mean of the first kind that there is one of."""
    return next((mean(found[kind]) for kind in kinds if kind in found), None)


def clock(seconds: float) -> str:
    """Such as "2 h 05 min", "3 min" or "40 s"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
