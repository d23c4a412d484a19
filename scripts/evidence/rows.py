"""What runs start from and the repository does not have: the base model with a shorter prompt, and derived rows.

Rows are derived from MedMulti: fewer rows, tasks of unequal sizes, and instructions that need two tasks at once.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from setups import ROOT, Setup
from store import finish, new_folder

Row = dict[str, Any]
TEMPLATE = "chat_template.jinja"


def prepare(setup: Setup) -> None:
    """Make the folders that are not there yet; the same setup makes the same files."""
    if setup.source and not Path(setup.model).exists():
        make_model(Path(setup.source), setup.model)
    if not Path(setup.unequal_data).exists():
        make_unequal(Path(setup.data), setup.unequal_data, sizes(setup))
    prepare_composites(setup)


def prepare_composites(setup: Setup) -> None:
    """Make the rows that need two tasks at once, from the rows that all others are trained on."""
    if setup.inputs is not None and not (ROOT / setup.train_data).exists():
        make_fewer(ROOT / setup.data, str(ROOT / setup.train_data), setup.groups, setup.inputs)
    if not (ROOT / setup.composite_data).exists():
        sys.path.append(str(ROOT / "scripts"))  # last: evaluate.py is there, whose name a library has
        from make_composites import main

        main(["--source", str(ROOT / setup.train_data), "--out", str(ROOT / setup.composite_data), *setup.composites])


def make_model(source: Path, out: str) -> None:
    """Link a model's files, and leave the system prompt out of its chat template: 21 of 65 tokens of a row on average.

    Raises:
        ValueError: the template has no system prompt of its own.
    """
    template = (source / TEMPLATE).read_text(encoding="utf-8")
    begin, end = template.find("{% if loop.first and"), template.find("{% endif %}")
    if not 0 <= begin < end:
        raise ValueError(f"{source / TEMPLATE} adds no system prompt to a conversation; use a setup without `source`.")
    folder = new_folder(out)
    for path in source.iterdir():
        if path.name != TEMPLATE:
            (folder / path.name).symlink_to(path.resolve())
    (folder / TEMPLATE).write_text(template[:begin] + template[end + len("{% endif %}") :], encoding="utf-8")
    finish(folder)


def sizes(setup: Setup) -> dict[str, int]:
    """How many training rows each task keeps: a geometric row from the largest to the smallest.

    First come the first tasks of all groups, then the second ones and so on, so that groups have large and small ones.
    """
    most = max(map(len, setup.groups.values()))
    order = [tasks[i] for i in range(most) for tasks in setup.groups.values() if i < len(tasks)]
    largest, smallest = setup.unequal
    steps = max(1, len(order) - 1)
    return {task: round(largest * (smallest / largest) ** (i / steps)) for i, task in enumerate(order)}


def make_unequal(source: Path, out: str, keep: dict[str, int]) -> None:
    """Copy a folder of rows, with the first rows of each task only in train.jsonl.

    Raises:
        ValueError: a task has fewer rows than are to be kept.
    """
    rows: dict[str, list[Row]] = {}
    there = read_rows(source, "train")
    for row in there:
        rows.setdefault(row["task"], []).append(row)
    for task, number in keep.items():
        if len(rows.get(task, ())) < number:
            raise ValueError(f"{number} rows of {task} are to be kept, and {source} has {len(rows.get(task, ()))}.")
    kept = {id(row) for task, number in keep.items() for row in rows[task][:number]}
    copy(source, out, [row for row in there if id(row) in kept])


def make_fewer(source: Path, out: str, groups: Mapping[str, Sequence[str]], inputs: int) -> None:
    """Copy a folder of rows, with all rows of the first inputs of each group only in train.jsonl.

    Raises:
        ValueError: a group has fewer inputs.
    """
    copy(source, out, first_rows(read_rows(source, "train"), groups, inputs))


def first_rows(rows: Sequence[Row], groups: Mapping[str, Sequence[str]], inputs: int | None) -> list[Row]:
    """The rows of the first inputs of each group, in their order; all rows if `inputs` is None.

    Raises:
        ValueError: a group has fewer inputs.
    """
    if inputs is None:
        return list(rows)
    group_of = {task: group for group, tasks in groups.items() for task in tasks}
    first: dict[str, list[str]] = {group: [] for group in groups}
    for row in rows:
        of_group = first[group_of[row["task"]]]
        if row["input"] not in of_group and len(of_group) < inputs:
            of_group.append(row["input"])
    for group, found in first.items():
        if len(found) < inputs:
            raise ValueError(f"{inputs} inputs of {group} are to be kept, and there are {len(found)}.")
    return [row for row in rows if row["input"] in first[group_of[row["task"]]]]


def read_rows(source: Path, split: str) -> list[Row]:
    """The rows of a split, in their order."""
    return [json.loads(line) for line in (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def copy(source: Path, out: str, train: Sequence[Row]) -> None:
    """Copy a folder of rows, with other rows for training."""
    folder = new_folder(out)
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in train)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    for name in ("dev.jsonl", "test.jsonl"):
        (folder / name).write_bytes((source / name).read_bytes())
    description = json.loads((source / "tasks.json").read_text(encoding="utf-8"))
    for task, number in Counter(row["task"] for row in train).items():
        description["tasks"][task].setdefault("n", {})["train"] = number
    (folder / "tasks.json").write_text(json.dumps(description, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    finish(folder)
