"""scripts/make_composites.py: rows that need two tasks at once, the same on every call, readable as any other data."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from make_composites import main
from tiny_text import make_tokenizer

from peft_moe.data import encode, read_examples, read_task_info
from peft_moe.evaluation import score, table

TINY = Path(__file__).parents[1] / "data" / "medmulti" / "tiny"
NUMBERS = ["--train", "20", "--dev", "5", "--test", "10", "--single", "8"]
PAIRS = [
    *combinations(["icd_chapter", "icd_category", "icd_chronic", "icd_slots"], 2),
    ("rad_modality", "rad_topic"),
    ("def_term", "def_system"),
]


def make(out, *flags, source=TINY):
    main(["--source", str(source), "--out", str(out), *NUMBERS, *flags])
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def composite(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "composite")


@pytest.mark.parametrize(("split", "paired", "single"), [("train", 20, 8), ("dev", 5, 2), ("test", 10, 0)])
def test_every_pair_of_a_group_has_its_rows_with_the_answers_of_both(composite, split, paired, single):
    tasks = json.loads((TINY / "tasks.json").read_text())["tasks"]
    answers = {(row["task"], row["input"]): row["output"] for row in read_rows(TINY, split)}
    rows = read_rows(composite, split)
    counts = dict.fromkeys(PAIRS, paired) | {(task,): single for task in tasks if single}
    assert Counter(tuple(row["task"]) for row in rows) == counts
    assert len({(*row["task"], row["input"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["output"].split("\n") == [answers[task, row["input"]] for task in row["task"]]
        words = [tasks[task]["instruction"] for task in row["task"]]
        assert row["instruction"] == " ".join(words + ["Answer each on a line of its own."] * (len(words) == 2))


def test_pairs_are_described_after_the_single_tasks_and_scored_line_by_line(composite):
    before, after = (json.loads((folder / "tasks.json").read_text())["tasks"] for folder in (TINY, composite))
    assert list(after) == [*before, *map("+".join, PAIRS)]
    for task, entry in before.items():
        assert after[task] == entry | {"n": {"train": 8, "dev": 2, "test": 0}}
    entry = after["rad_modality+rad_topic"]
    assert (entry["group"], entry["metric"], entry["n"]) == ("rad", "line_f1", {"train": 20, "dev": 5, "test": 10})
    assert all(before[task]["instruction"] in entry["instruction"] for task in ("rad_modality", "rad_topic"))


def test_the_rows_are_read_encoded_and_scored_a_line_per_pair(composite):
    info = read_task_info(str(composite))
    examples = read_examples(str(composite), split="train")
    rows = encode(examples, make_tokenizer(), tasks=[task for task in info if "+" not in task])
    assert rows["task_ids"] == [[list(info).index(task) for task in names] for names in examples["task"]]
    test = read_examples(str(composite), split="test")
    first_lines = [messages[-1]["content"].split("\n")[0] for messages in test["messages"]]
    results = score(first_lines, test, info)
    assert list(results) == [*map("+".join, PAIRS), "mean"]
    assert all(result["score"] == pytest.approx(1 / 2) for result in results.values())
    assert table({"first lines": results}).count("line_f1") == len(PAIRS)


def test_the_same_arguments_make_the_same_files_and_another_seed_others(composite, tmp_path):
    again, other = make(tmp_path / "again"), make(tmp_path / "other", "--seed", "1")
    assert contents(again) == contents(composite)
    assert sorted(contents(again)) == ["dev.jsonl", "tasks.json", "test.jsonl", "train.jsonl"]
    for split in ("train", "dev", "test"):
        assert sorted(map(str, read_rows(other, split))) != sorted(map(str, read_rows(again, split)))


def test_the_rows_to_test_on_do_not_depend_on_how_many_there_are_to_train_on(composite, tmp_path):
    fewer = make(tmp_path / "fewer", "--train", "2", "--single", "0")
    assert contents(fewer)["test.jsonl"] == contents(composite)["test.jsonl"]
    assert contents(fewer)["train.jsonl"] != contents(composite)["train.jsonl"]


def test_a_folder_with_other_content_is_replaced_only_if_asked(tmp_path):
    out = make(tmp_path / "out")
    before = contents(out)
    make(out)  # the same content is no other
    with pytest.raises(ValueError, match="out has other rows; replace them with --overwrite, or choose another folder"):
        make(out, "--seed", "1")
    assert contents(out) == before
    make(out, "--seed", "1", "--overwrite")
    assert contents(out).keys() == before.keys()
    assert contents(out)["test.jsonl"] != before["test.jsonl"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_what_this_script_did_not_make_is_never_replaced(tmp_path, flags):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError, match="out has thesis.tex, which is not made here; choose another folder with --out"
    ):
        make(out, *flags)
    assert contents(out) == {"thesis.tex": b"years of work"}


def test_the_source_is_never_replaced(tmp_path):
    source = make(tmp_path / "source")
    before = contents(source)
    with pytest.raises(ValueError, match="is what the rows come from; choose another folder with --out"):
        make(source, "--overwrite", source=source)
    assert contents(source) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train", "49"], "49 rows of icd_chapter and icd_category are wanted .*train.jsonl; use 0 to 48 with --tr"),
        (["--test", "-1"], "-1 rows of icd_chapter and icd_category are wanted .*test.jsonl; use 0 to 24 with --test"),
        (["--single", "60"], "60 rows of icd_chapter are wanted from the 48 inputs"),
    ],
)
def test_more_rows_than_there_are_inputs_is_an_error_that_leaves_nothing(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("groups", "output", "message"),
    [
        (("a", "b"), "red", "has no two tasks of one group; give tasks with the same inputs a `group`"),
        ((None, None), "red", "has no two tasks of one group"),
        (("a", "a"), "red\nblue", r"Row 1 of .*train.jsonl answers 'red\\nblue'; use rows with an answer of one line"),
    ],
)
def test_data_that_cannot_be_paired_is_an_error(tmp_path, groups, output, message):
    entries = {f"task{i}": {"instruction": "Which?", "group": group} for i, group in enumerate(groups)}
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": entries}))
    row = {"task": "task0", "input": "sky", "output": output}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", source=tmp_path)
