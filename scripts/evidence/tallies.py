"""Answers as numbers per test input, so that any metric of any resample of the inputs is one matrix product.

Every metric of `peft_moe.metrics` is a function of sums over rows: of scores and their number, of shared and of all
slots, of right, given and true labels. `tally_rows` gives the summands, `value` the metric of a sum; together they
agree with `load_metric`, which takes milliseconds a call.

Shapes: J seeds · I test inputs · K summands of a task's metric · `...` any resamples
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_moe.data import task_key
from peft_moe.metrics import load_metric, normalise
from peft_moe.reading import read_task_info

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task: its metric, where its rows are among those of the split, their inputs and answers."""

    metric: str
    rows: npt.NDArray[np.intp]
    inputs: npt.NDArray[np.intp]
    references: list[str]


@dataclass(frozen=True)
class Sheet:
    """The rows of a split. Rows with the same input are one unit, and units with the same tasks are a stratum."""

    inputs: list[str]
    strata: npt.NDArray[np.intp]
    tasks: dict[str, TaskRows]
    rows: int


@dataclass(frozen=True)
class System:
    """A system's answers as summands by task, (J, I, K), an entry of J for each seed; `trained` where seeds matter."""

    sheet: Sheet
    seeds: tuple[int, ...]
    tallies: dict[str, Array]
    trained: bool


def read_test(folder: str | Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The test rows of a folder such as `data/medmulti/mini`, and the metrics of their tasks."""
    lines = (Path(folder) / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows, info = [json.loads(line) for line in lines], read_task_info(str(folder))
    names = {task_key(row["task"]) for row in rows}
    return rows, {name: info[name].metric if name in info else "exact_match" for name in names}


def sheet_of_rows(
    rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str], kinds: Mapping[str, str] | None = None
) -> Sheet:
    """The sheet of rows as files have them. Arguments and errors are those of `sheet_of`."""
    columns = ([row[name] for row in rows] for name in ("input", "output"))
    return sheet_of([task_key(row["task"]) for row in rows], *columns, metrics, kinds)


def sheet_of(
    tasks: Sequence[str],
    inputs: Sequence[str],
    references: Sequence[str],
    metrics: Mapping[str, str],
    kinds: Mapping[str, str] | None = None,
) -> Sheet:
    """The sheet of rows given as columns.

    Args:
        tasks, inputs, references: a text for each row.
        metrics: by task.
        kinds: the stratum of each input; None for the set of tasks that it has rows of.

    Raises:
        ValueError: a stratum of a single input, which has no spread to estimate.
    """
    units = sorted(set(inputs))
    unit_of = {unit: index for index, unit in enumerate(units)}
    if kinds is None:
        sharing: dict[str, list[str]] = {unit: [] for unit in units}
        for task, unit in zip(tasks, inputs, strict=True):
            sharing[unit].append(task)
        kinds = {unit: ", ".join(sorted(names)) for unit, names in sharing.items()}
    of_units = [kinds[unit] for unit in units]
    strata = np.array([sorted(set(of_units)).index(kind) for kind in of_units])
    for kind in sorted(set(of_units)):
        if of_units.count(kind) < 2:
            raise ValueError(
                f"Only one input has rows of the tasks {kind}; give at least 2 inputs of every such set of tasks."
            )
    by_task = {}
    for task in sorted(set(tasks)):
        where = np.array([row for row, name in enumerate(tasks) if name == task])
        of_input = np.array([unit_of[inputs[row]] for row in where])
        by_task[task] = TaskRows(metrics[task], where, of_input, [references[row] for row in where])
    return Sheet(units, strata, by_task, len(tasks))


def system_of_runs(sheet: Sheet, runs: Sequence[Mapping[str, Any]], part: str | None = None) -> System:
    """A system from the JSON of its final runs, one for each seed.

    Args:
        sheet: the split that the runs answered.
        runs: `seed`, `parameters`, `answers` in the order of the split, and `scores` by task.
        part: `"uniform"` for the answers under equal gates, which are a run inside the run.

    Raises:
        ValueError: a seed given twice; or answers that do not give the scores beside them, because rows, order or
            metrics are not those that the run was scored with.
    """
    runs = sorted(runs, key=lambda run: int(run["seed"]))
    seeds = tuple(int(run["seed"]) for run in runs)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"Runs of seeds {list(seeds)}; give one run for each of one or more seeds.")
    parts = [run if part is None else run[part] for run in runs]
    system = tally(sheet, seeds, [each["answers"] for each in parts], trained=any(map(_is_trained, runs)))
    for name, task in sheet.tasks.items():
        found = value(task.metric, system.tallies[name].sum(1))
        for run, each, score in zip(runs, parts, found, strict=True):
            if abs(each["scores"][name]["score"] - score) > 1e-9:
                raise ValueError(
                    f"{run['id']}: its answers to {name} score {score:.6f} here, but "
                    f"{each['scores'][name]['score']:.6f} in the file; use the data and code it was scored with."
                )
    return system


def _is_trained(run: Mapping[str, Any]) -> bool:
    return bool(run["parameters"]["trainable"])


def tally(sheet: Sheet, seeds: Sequence[int], answers: Sequence[Sequence[str]], *, trained: bool = True) -> System:
    """A system from its answers: for each seed a text per row of the split.

    Raises:
        ValueError: another number of answers than the split has rows, or of lists than there are seeds.
    """
    if len(answers) != len(seeds) or any(len(texts) != sheet.rows for texts in answers):
        raise ValueError(
            f"{[len(texts) for texts in answers]} answers of {len(seeds)} seeds for {sheet.rows} rows; give one for "
            "each row, seed by seed."
        )
    tallies = {}
    for name, task in sheet.tasks.items():
        per_row = [tally_rows(task.metric, [texts[row] for row in task.rows], task.references) for texts in answers]
        summed = np.zeros((len(seeds), len(sheet.inputs), per_row[0].shape[1]))
        for of_seed, rows in zip(summed, per_row, strict=True):
            np.add.at(of_seed, task.inputs, rows)
        tallies[name] = summed
    return System(sheet, tuple(seeds), tallies, trained)


def tally_rows(metric: str, predictions: Sequence[str], references: Sequence[str]) -> Array:
    """The summands of a metric, (rows, K); `value` of their sum is the metric.

    Raises:
        ValueError: a metric that `peft_moe.metrics` does not have.
    """
    if metric == "slot_f1":
        return np.array([_count_slots(*row) for row in zip(predictions, references, strict=True)], dtype=float)
    if metric == "macro_f1":
        given, true = np.array([*map(normalise, predictions)]), np.array([*map(normalise, references)])
        labels = np.unique(true)
        is_given, is_true = given[:, None] == labels, true[:, None] == labels
        return np.concatenate([is_given & is_true, is_given, is_true], axis=1).astype(float)
    # _compute is what evaluate asks of metrics; compute would write every pair to an Arrow table first.
    compute = load_metric(metric)._compute
    pairs = list(zip(predictions, references, strict=True))
    score = {(p, r): compute(predictions=[p], references=[r])[metric] for p, r in set(pairs)}
    return np.array([(score[pair], 1) for pair in pairs], dtype=float)


def value(metric: str, totals: Array) -> Array:
    """The metric of summed summands: (..., K) to (...)."""
    if metric == "slot_f1":
        return _ratio(2 * totals[..., 0], totals[..., 1], where_empty=1.0)
    if metric == "macro_f1":
        right, given, true = np.split(totals, 3, axis=-1)
        f1 = _ratio(2 * right, given + true, where_empty=0.0)
        return np.asarray((f1 * (true > 0)).sum(-1) / (true > 0).sum(-1))
    return np.asarray(totals[..., 0] / totals[..., 1])


def _ratio(above: Array, below: Array, *, where_empty: float) -> Array:
    return np.divide(above, below, out=np.full_like(above, where_empty), where=below > 0)


def _count_slots(prediction: str, reference: str) -> tuple[int, int]:
    given, true = _slots(prediction), _slots(reference)
    return len(given & true), len(given) + len(true)


def _slots(text: str) -> set[tuple[str, str]]:
    parts = (slot.partition(":") for slot in normalise(text).split(";") if slot.strip())
    return {(name.strip(), value.strip()) for name, _, value in parts}
