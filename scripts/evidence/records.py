"""The records of an experiment as its page needs them: what was planned, what is done of it, and what is missing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from estimates import Estimates
from grid import all_runs, forecast
from plan import Run, searched
from rows import prepare_composites
from setups import ROOT, Setup
from store import brief, read, stale
from tallies import Sheet, System, read_test, sheet_of_rows, system_of_runs

from peft_moe.data import task_key

Record = dict[str, Any]
# experiments whose finals answer all test rows
TEST_ROWS = ("main", "longer", "ablations", "sampling", "variants", "experts", "rank")
AT_EQUAL_GATES = "{}, equal gates at test time"


@dataclass(frozen=True)
class Finals:
    """The final runs of a system in a protocol: planned ones, and the records of those that are done, seed by seed."""

    experiment: str
    planned: list[Run]
    done: list[Record]
    needs: list[list[Record]]

    @property
    def complete(self) -> bool:
        """Whether all seeds are there."""
        return len(self.done) == len(self.planned)


class Records:
    """The records of a setup's runs.

    Args:
        setup: says which runs there are.
        folder: of the JSON files, a folder for each experiment.

    Raises:
        ValueError: a file that is no record, or a run that was done with other settings than it has now.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup = setup
        self.found: dict[str, Record] = {}
        for path in sorted(folder.glob("*/*.json")):
            record = read(path)
            self.found[record["id"]] = record
        self.scores = {run_id: record["scores"]["mean"]["score"] for run_id, record in self.found.items()}
        self.runs = {run.id: run for run in all_runs(setup, self.scores)}
        self.planned = forecast(setup, self.scores)
        if old := stale(self.runs.values(), self.found):
            raise ValueError(
                f"Done with other settings than now: {' '.join(old)}. Do them again with "
                "`python scripts/evidence/run.py --again --only` and these ids, or delete their files."
            )

    @cached_property
    def unplanned(self) -> list[str]:
        """Ids of records that no run of the plan has, such as those of a rate that is not the chosen one."""
        return sorted(self.found.keys() - self.runs.keys())

    @cached_property
    def finals(self) -> dict[tuple[str, str], Finals]:
        """Final runs by protocol and system, in the order of the plan, those without any record too."""
        planned: dict[tuple[str, str], list[Run]] = {}
        done: dict[tuple[str, str], list[Run]] = {}
        for run in self.planned:
            if run.purpose == "final":
                planned.setdefault((run.protocol, run.system), []).append(run)
        for run in self.runs.values():
            if run.purpose == "final" and run.id in self.found:
                done.setdefault((run.protocol, run.system), []).append(run)
        return {
            key: Finals(
                runs[0].experiment,
                runs,
                [self.found[run.id] for run in done.get(key, ())],
                [[self.found[need] for need in run.needs if need in self.found] for run in done.get(key, ())],
            )
            for key, runs in planned.items()
        }

    def of(self, protocol: str, experiments: Sequence[str]) -> dict[str, Finals]:
        """Final runs of experiments by system."""
        return {
            system: finals
            for (of, system), finals in self.finals.items()
            if of == protocol and finals.experiment in experiments
        }

    def searches(self) -> Iterator[tuple[str, str, dict[float, float | None], float | None]]:
        """Protocol, system, the mean score on dev by rate (None while missing), and the chosen rate or None."""
        planned: dict[tuple[str, str], dict[float, float | None]] = {}
        for run in self.planned:
            if run.purpose == "search":
                rates = planned.setdefault((run.protocol, run.system), {})
                rates[run.learning_rate or 0.0] = self.scores.get(run.id)
        for (protocol, system), rates in planned.items():
            chosen = searched(self.setup, self.scores, protocol, system)[1]
            yield protocol, system, dict(sorted(rates.items())), chosen

    def state(self) -> list[dict[str, Any]]:
        """How many runs are planned and done, and which systems lack some, by experiment, protocol and purpose.

        `hours` are CPU hours of the runs that are done, `hours_left` of the others, by those that are most like them.
        """
        kinds: dict[tuple[str, str, str], list[Run]] = {}
        estimates = Estimates({run_id: brief(record) for run_id, record in self.found.items()})
        for run in self.planned:
            kinds.setdefault((run.experiment, run.protocol, run.purpose), []).append(run)
        found = []
        for (experiment, protocol, purpose), runs in kinds.items():
            left = [run for run in runs if run.id not in self.runs or run.id not in self.found]
            systems = dict.fromkeys(run.system for run in left)
            missing = {system: sum(run.system == system for run in left) for system in systems}
            hours = sum(self.found[run.id]["seconds"]["total_cpu"] for run in runs if run not in left) / 3600
            found.append(
                {"experiment": experiment, "protocol": protocol, "purpose": purpose, "planned": len(runs)}
                | {"done": len(runs) - len(left), "missing": missing}
                | {"hours": hours, "hours_left": sum(map(estimates.seconds, left)) / 3600}
            )
        return found

    @cached_property
    def sheet(self) -> Sheet:
        """The test rows."""
        return sheet_of_rows(*read_test(ROOT / self.setup.data))

    def held_out_sheet(self, task: str) -> Sheet:
        """The test rows of one task, in their order."""
        rows, metrics = read_test(ROOT / self.setup.data)
        return sheet_of_rows([row for row in rows if task_key(row["task"]) == task], metrics)

    @cached_property
    def composite_sheet(self) -> Sheet:
        """The test rows that need two tasks at once.

        They are made anew where they are not there, as for the runs. An input can be in several pairs
        of tasks, drawn without plan: so a stratum is here a group of tasks, of which inputs are drawn.
        """
        prepare_composites(self.setup)
        rows, metrics = read_test(ROOT / self.setup.composite_data)
        group_of = {task: group for group, tasks in self.setup.groups.items() for task in tasks}
        return sheet_of_rows(rows, metrics, {row["input"]: group_of[np.atleast_1d(row["task"])[0]] for row in rows})


def systems_of(sheet: Sheet, finals: dict[str, Finals]) -> dict[str, System]:
    """The systems that have a record, as `stats.Study` takes them."""
    return {name: system_of_runs(sheet, with_seeds(each.done)) for name, each in finals.items() if each.done}


def equal_gates(sheet: Sheet, finals: dict[str, Finals]) -> dict[str, System]:
    """Routed systems that were also asked with equal gates, each beside itself so."""
    found = {}
    for name, each in finals.items():
        runs = [record for record in each.done if "uniform" in record]
        if runs and len(runs) == len(each.done):
            found[name] = system_of_runs(sheet, runs)
            found[AT_EQUAL_GATES.format(name)] = system_of_runs(sheet, runs, "uniform")
    return found


def with_seeds(records: Sequence[Record]) -> list[Record]:
    """Records whose seed is a number: the base model has none, and is one run."""
    return [record | {"seed": record["seed"] or 0} for record in records]
