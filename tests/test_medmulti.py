"""The data that ships with the repository: whole, in the documented shape, and without leaks."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

MEDMULTI = Path(__file__).parents[1] / "data" / "medmulti"
ROWS_PER_TASK = {"tiny": {"train": 48, "dev": 8, "test": 24}, "mini": {"train": 250, "dev": 40, "test": 80}}


def read_rows(size, split):
    return [json.loads(line) for line in (MEDMULTI / size / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def inputs(size, split):
    return {row["input"] for row in read_rows(size, split)}


@pytest.mark.parametrize("size", ROWS_PER_TASK)
def test_files_are_those_that_were_summed(size):
    sums = dict(reversed(line.split()) for line in (MEDMULTI / size / "SHA256SUMS").read_text().splitlines())
    assert sums == {
        name: hashlib.sha256((MEDMULTI / size / name).read_bytes()).hexdigest()
        for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "tasks.json")
    }


@pytest.mark.parametrize("size", ROWS_PER_TASK)
def test_every_task_has_its_number_of_rows_and_known_labels(size):
    tasks = json.loads((MEDMULTI / size / "tasks.json").read_text(encoding="utf-8"))["tasks"]
    for split, rows_per_task in ROWS_PER_TASK[size].items():
        rows = read_rows(size, split)
        assert Counter(row["task"] for row in rows) == dict.fromkeys(tasks, rows_per_task)
        for row in rows:
            labels = tasks[row["task"]]["labels"]
            assert labels is None or row["output"] in labels


@pytest.mark.parametrize("trained_on", ROWS_PER_TASK)
@pytest.mark.parametrize("scored_on", ROWS_PER_TASK)
def test_no_dev_or_test_input_is_in_train(trained_on, scored_on):
    train = inputs(trained_on, "train")
    assert not train & inputs(scored_on, "dev")
    assert not train & inputs(scored_on, "test")


def test_tasks_of_a_group_share_inputs_and_disagree_on_answers():
    rows = read_rows("mini", "train")
    answers = {(row["task"], row["input"]): row["output"] for row in rows}
    for one, other in [("icd_chapter", "icd_chronic"), ("rad_modality", "rad_topic"), ("def_term", "def_system")]:
        shared = [text for task, text in answers if task == one]
        assert len(shared) == 250
        assert all(answers[one, text] != answers[other, text] for text in shared)
