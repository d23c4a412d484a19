"""What the results page is made from: records that it takes or leaves, general knowledge, the committed files."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from evidence_records import general_for, record_of, save, search_scores
from grid import forecast
from knowledge import beside_other, general
from page import filled
from page_pictures import PICTURES
from records import Records
from results import build
from setups import ROOT, full
from store import write as write_record

PAGE = ROOT / "docs" / "evidence.md"


def test_records_of_other_settings_are_refused_and_those_of_other_rates_left_out(tmp_path):
    setup = replace(full(), folder=str(tmp_path / "derived"), inputs=None)
    save(setup, tmp_path / "runs", {})
    run = next(run for run in forecast(setup, search_scores(setup)) if run.id == "instruction/molora/lr-0.003/seed-1")
    other = replace(run, id="instruction/molora/lr-0.001/seed-1", learning_rate=1e-3)
    write_record(tmp_path / "runs" / "main" / "other.json", record_of(setup, other, 0.5))
    assert Records(setup, tmp_path / "runs").unplanned == [other.id]
    changed = record_of(setup, run, 0.5)
    write_record(tmp_path / "runs" / "main" / "changed.json", changed | {"settings": {**changed["settings"], "r": 7}})
    with pytest.raises(ValueError, match=f"Done with other settings than now: {run.id}"):
        Records(setup, tmp_path / "runs")


def test_general_knowledge_is_compared_with_the_base_model():
    base, after = general_for(0.0), [{"general": general_for(-0.1)}, {"general": general_for(-0.2)}]
    found = general(after, base)
    assert found["perplexity"]["novels"] == {"value": 42.5, "lowest": 40, "highest": 45, "ratio": pytest.approx(0.85)}
    choice = found["choice"]["mean"]
    changes = np.repeat([0, -0.5, -1, 0], [40, 10, 10, 40])  # of 100 questions, 20 of which were right before
    reach = 1.959964 * np.sqrt(changes.var(ddof=1) / 100)
    assert (choice["difference"], choice["low"], choice["high"]) == pytest.approx((-0.15, -0.15 - reach, -0.15 + reach))
    assert general(after, None)["choice"]["mean"]["difference"] is None
    beside = beside_other(after, after[:1])
    assert beside["perplexity"]["novels"] == pytest.approx(42.5 / 45)
    assert beside["choice"]["difference"] == pytest.approx(-0.05)
    assert beside_other(after, [{}]) is None
    assert general([{}], base) is None


def test_the_committed_page_has_the_tables_of_its_json():
    results = json.loads((PAGE.with_suffix("") / "results.json").read_text(encoding="utf-8"))
    drawn = {name for name in PICTURES if (PAGE.with_suffix("") / f"{name}.png").exists()}
    assert filled(PAGE.read_text(encoding="utf-8"), results, "evidence", drawn) == PAGE.read_text(encoding="utf-8")


def test_the_page_says_what_was_asked_and_names_every_threat():
    text = PAGE.read_text(encoding="utf-8")
    threats = text.partition("## Threats to validity")[2].partition("\n## ")[0]
    assert [int(number) for number in re.findall(r"^(\d+)\. ", threats, flags=re.MULTILINE)] == list(range(1, 17))
    for word in ("--match_lora parameters", "--hours", "page.py"):
        assert word in text


@pytest.mark.slow
def test_the_committed_numbers_are_those_of_the_committed_records():
    def leaves(value, path=()):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        found = {path: value} if not isinstance(value, (dict, list)) else {}
        for key, entry in items:
            found |= leaves(entry, (*path, key))
        return found

    committed = leaves(json.loads((PAGE.with_suffix("") / "results.json").read_text(encoding="utf-8")))
    found = leaves(build(Records(full(), PAGE.with_suffix("") / "runs")))
    assert found.keys() == committed.keys()
    for path, value in found.items():
        is_measured = isinstance(value, float)
        assert value == (pytest.approx(committed[path], rel=1e-3, abs=1e-4) if is_measured else committed[path]), path
