"""How long runs take, from the CPU seconds of finished runs of the same kind."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from statistics import mean
from typing import Any

from grid import forecast
from plan import Run
from setups import Setup

UNKNOWN = 900.0  # seconds of a run where nothing like it has been measured


class Estimates:
    """Seconds of runs; a process has one thread, and so takes its CPU seconds on a free core.

    Args:
        records: `Store.records`.
    """

    def __init__(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        self.records = records
        self.found: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for run_id, record in records.items():
            method = record["settings"].get("method", "none")
            protocol = run_id.split("/")[0]
            for kind in kinds(record["experiment"], record["system"], method, protocol, record["purpose"]):
                self.found[kind].append(record["cpu"])

    def seconds(self, run: Run) -> float:
        """The mean of the runs that are most like it."""
        method = run.settings.get("method", "none")
        for kind in kinds(run.experiment, run.system, method, run.protocol, run.purpose):
            if kind in self.found:
                return mean(self.found[kind])
        return UNKNOWN

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
        about = "about " if self.found else "perhaps "
        return f"{done} done, {len(left)} left, {about}{clock(seconds)} to go"


def kinds(experiment: str, system: str, method: str, protocol: str, purpose: str) -> Iterator[tuple[str, ...]]:
    """Kinds that a run is of, from the narrowest to the widest."""
    yield "system", experiment, system, protocol, purpose
    yield "system", experiment, system, purpose
    yield "method", experiment, method, purpose
    yield "method", method, purpose
    yield "purpose", experiment, purpose
    yield "purpose", purpose


def clock(seconds: float) -> str:
    """Such as "2 h 05 min", "3 min" or "40 s"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
