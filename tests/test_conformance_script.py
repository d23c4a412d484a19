"""scripts/conformance.py, as far as it goes without peft's checkout, and the page that it writes into."""

import json
import re
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import conformance
import pytest
from conformance import EXPLAINED, GATED, STOCK, check_sources, find_problems, summarise, table
from peft import LoraConfig

from peft_moe import MoeLoraConfig

PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"
INSTALLED = version("peft")
EXPLANATIONS = [("MoeLora", r"test_that_cannot_apply\[", "it has no such thing")]


def row(test, outcome="passed", suite="custom"):
    return {"suite": suite, "test": test, "function": test.partition("[")[0], "outcome": outcome, "reason": "E"}


def checkout(folder, *, peft_version=INSTALLED, tests=True):
    for path, text in {
        "suite/peft_suite_plugin.py": "",
        "peft/src/peft/__init__.py": f'__version__ = "{peft_version}"\n',
        **({"peft/tests/testing_common.py": ""} if tests else {}),
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return str(folder / "suite"), str(folder / "peft")


def test_a_checkout_of_the_installed_version_is_taken(tmp_path):
    assert check_sources(*checkout(tmp_path), INSTALLED) == tmp_path / "suite"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda suite, src: (None, src), r"no peft_suite_plugin\.py in PEFT_SUITE=; set PEFT_SUITE"),
        (lambda suite, src: (src, src), r"no peft_suite_plugin\.py in PEFT_SUITE=.*peft; set PEFT_SUITE"),
        (lambda suite, src: (suite, None), "PEFT_SRC is not set.*pip download .*peft==.*export PEFT_SRC="),
        (lambda suite, src: (suite, f"{src}/src"), r"has no tests/testing_common\.py.*pip download"),
    ],
    ids=["no suite", "another suite", "unset", "no tests"],
)
def test_what_is_missing_is_said_with_the_commands_that_get_it(change, message, tmp_path):
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        check_sources(*change(*checkout(tmp_path)), INSTALLED)


def test_tests_of_another_version_are_refused(tmp_path):
    with pytest.raises(
        SystemExit, match=rf"(?s)is peft 0\.1\.0, and {INSTALLED} is installed.*git checkout v{INSTALLED}"
    ):
        check_sources(*checkout(tmp_path, peft_version="0.1.0"), INSTALLED)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([row("test_of_all[a]"), row("test_that_cannot_apply[a]", "failed")], None),
        ([row("test_of_all[a]", "failed"), row("test_that_cannot_apply[a]", "failed")], "fails without an explanation"),
        ([row("test_of_all[a]"), row("test_that_cannot_apply[a]")], "explains nothing any more"),
        ([row("test_of_all[a]")], "explains nothing any more"),
        ([row("test_that_cannot_apply[a]", "failed"), row("test_that_cannot_apply[b]")], "passes and is explained"),
        ([row("test_of_all[a]", "skipped"), row("test_that_cannot_apply[a]", "failed")], "skips test_of_all and runs"),
    ],
    ids=["as explained", "new failure", "stale", "gone", "too wide", "gated"],
)
def test_what_is_new_or_stale_is_a_problem(rows, problem, monkeypatch):
    monkeypatch.setattr(conformance, "EXPLAINED", EXPLANATIONS)
    stock = [row("test_of_all[a]"), row("test_that_cannot_apply[a]", "failed")]
    problems = find_problems({"MoeLoraConfig": rows, STOCK: [*stock[:1]]}, whole=True)
    assert len(problems) == bool(problem)
    assert problem is None or problem in problems[0]


def test_outcomes_are_counted_by_suite():
    rows = [row("test_a[1]"), row("test_a[2]", "failed"), row("test_b", "declared", "config"), row("test_c", "skipped")]
    summary = summarise({"MoeLoraConfig": rows, STOCK: [row("test_c")]})
    assert summary["configs"]["MoeLoraConfig"]["gated"] == {"test_c": 1}
    assert table(summary).splitlines()[2:] == [
        "| config | 0 / 0 / 0 / 1 | – |",
        "| custom | 1 / 1 / 1 / 0 | 1 / 0 / 0 / 0 |",
        "| **all** | 1 / 1 / 1 / 1 | 1 / 0 / 0 / 0 |",
    ]


def test_the_page_has_the_numbers_of_the_last_run_and_every_reason():
    text, summary = PAGE.read_text(), json.loads(PAGE.with_suffix(".json").read_text())
    assert list(summary["configs"]) == [spec[0] for spec in conformance.SPECS]
    assert table(summary) in text
    assert summary["configs"][STOCK]["total"]["failed"] == 0
    for config in summary["configs"].values():
        assert all(entry["why"] in text for entry in config["failed"])
        assert config["gated"].keys() <= GATED.keys()
    assert all(why in text for *_, why in EXPLAINED)


def test_the_page_names_every_field_of_stock_lora_that_is_not_here():
    absent = {f.name for f in fields(LoraConfig)} - {f.name for f in fields(MoeLoraConfig)}
    (paragraph,) = re.findall(
        r"^These fields do not exist: (.*?)\n\n", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    assert set(re.findall(r"`(\w+)`", paragraph)) == absent
