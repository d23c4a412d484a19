"""Command lines from YAML, from flags, and from both."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from transformers import TrainingArguments

from peft_moe.arguments import parse_arguments


@dataclass
class Fields:
    name: str
    rank: int = 8
    rate: float = 0.1
    kind: Literal["one", "two"] = "one"
    tasks: list[str] | None = None
    fast: bool = True
    start: str | None = "here"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be positive.")


@dataclass
class Choices:
    name: str
    match: Literal["one", "two"] | None = None
    options: dict[str, int] | str | None = None


@dataclass
class More:
    options: dict[str, int] | str | None = None
    when: Literal["auto", "on", "off", "no"] = "auto"
    seed: int = field(default=0, metadata={"aliases": ["--random_seed"]})


def parse(folder: Path, yaml: str, *flags: str) -> tuple[Fields, More]:
    path = folder / "a.yaml"
    path.write_text(yaml)
    return parse_arguments([Fields, More], [str(path), *flags])


def test_yaml_fills_every_kind_of_field(tmp_path):
    yaml = "name: a\nrank: 4\nrate: 2e-4\nkind: two\ntasks: [b, 3]\nfast: false\nstart: null\noptions: {d: 1}\nseed: 5"
    first, second = parse(tmp_path, yaml)
    assert first == Fields(name="a", rank=4, rate=2e-4, kind="two", tasks=["b", "3"], fast=False, start=None)
    assert second == More(options='{"d": 1}', seed=5)


@pytest.mark.parametrize(("word", "expected"), [("on", "on"), ("off", "off"), ("'no'", "no"), ("auto", "auto")])
def test_words_that_yaml_reads_as_booleans_are_choices_where_there_are_such(word, expected, tmp_path):
    assert parse(tmp_path, f"name: a\nwhen: {word}")[1].when == expected


def test_flags_win_over_yaml_which_wins_over_defaults(tmp_path):
    yaml = "name: a\nrank: 4\ntasks: [b, c]\nfast: false\nstart: null"
    first, second = parse(
        tmp_path, yaml, "--rank", "2", "--tasks", "d", "--fast", "--start", "there", "--random_seed=3"
    )
    assert first == Fields(name="a", rank=2, tasks=["d"], fast=True, start="there")
    assert second == More(seed=3)


def test_flags_are_enough_and_come_from_the_process_by_default(monkeypatch):
    assert parse_arguments([Fields, More], ["--name=a"]) == (Fields(name="a"), More())
    monkeypatch.setattr("sys.argv", ["script.py", "--name", "a", "--no_fast"])
    assert parse_arguments([Fields]) == (Fields(name="a", fast=False),)


def test_a_real_recipe_fills_the_trainers_arguments(tmp_path):
    (tmp_path / "a.yml").write_text(
        f"name: a\noutput_dir: {tmp_path}\nlearning_rate: 2e-4\nlr_scheduler_kwargs: {{num_cycles: 2}}\n"
        "report_to: none\nlr_scheduler_type: cosine\neval_strategy: steps\neval_steps: 2\nuse_cpu: true\n"
    )
    first, training = parse_arguments([Fields, TrainingArguments], [str(tmp_path / "a.yml"), "--eval_steps", "5"])
    assert first.name == "a"
    assert (training.learning_rate, training.eval_steps, training.report_to) == (2e-4, 5, [])
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}


NULL = {
    "text": ("", ["--start", "null"], {"start": None}),
    "text with =": ("start: there", ["--start=null"], {"start": None}),
    "list": ("tasks: [b, c]", ["--tasks", "null"], {"tasks": None}),
    "the last one counts": ("", ["--start", "null", "--start", "there"], {"start": "there"}),
    "the last one counts, too": ("", ["--start", "there", "--start", "null"], {"start": None}),
    "no field that may be None": ("name: null", ["--name", "null"], {"name": "null"}),
}


@pytest.mark.parametrize(("yaml", "flags", "expected"), NULL.values(), ids=NULL)
def test_null_takes_a_value_back(yaml, flags, expected, tmp_path):
    first, _ = parse(tmp_path, yaml if "name" in yaml else f"name: a\n{yaml}", *flags)
    assert vars(first) == vars(Fields(name="a")) | expected


def test_null_is_for_choices_and_mappings_and_fields_of_the_trainers_arguments(tmp_path):
    yaml = (
        f"name: a\noutput_dir: {tmp_path}\nuse_cpu: true\nreport_to: none\nmatch: one\noptions: {{d: 1}}\neval_delay: 3"
    )
    (tmp_path / "a.yml").write_text(yaml)
    flags = ["--match", "null", "--options", "null", "--metric_for_best_model", "null", "--eval_steps", "null"]
    first, training = parse_arguments([Choices, TrainingArguments], [str(tmp_path / "a.yml"), *flags])
    assert (first.match, first.options, training.metric_for_best_model) == (None, None, None)
    assert (training.eval_steps, training.eval_delay) == (None, 3)


BAD = {
    "unknown key": ("name: a\nrang: 4", [], r"unknown argument 'rang' in .*a.yaml; did you mean rank"),
    "unknown flag": ("name: a", ["--task", "x"], "unknown argument '--task' on the command line; did you mean tasks?"),
    "nothing close": ("name: a", ["--zzz"], "unknown argument '--zzz' on the command line; --help lists"),
    "key twice a flag": ("name: a", ["--ra", "1"], "unknown argument '--ra'"),
    "wrong type": ("name: a\nrank: 4.5", [], "argument --rank: invalid int value: '4.5'"),
    "null as a name": ("name: a\ntasks: ['null']", [], "has the text \\['null'\\] for tasks, which means nothing"),
    "null where there is none": ("name: a", ["--rank", "null"], "argument --rank: invalid int value: 'null'"),
    "wrong choice": ("name: a\nkind: three", [], "argument --kind: invalid choice: 'three'"),
    "missing": ("rank: 4", [], "the following arguments are required: --name"),
    "not a mapping": ("- name", [], "holds a list; write one `name: value` per line"),
    "not YAML": ("name: [", [], "a.yaml cannot be read"),
    "wrong value": ("name: a", ["--rank=0"], "rank=0 must be positive."),
}


@pytest.mark.parametrize(("yaml", "flags", "message"), BAD.values(), ids=BAD)
def test_wrong_arguments_end_the_process_with_a_message(yaml, flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(tmp_path, yaml, *flags)
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) < 5


def test_a_missing_file_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments([Fields], ["nowhere.yaml"])
    assert "nowhere.yaml cannot be read" in capsys.readouterr().err
