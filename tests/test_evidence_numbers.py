"""What the results page is made from: records that it takes or leaves, general knowledge, the committed files."""

import json
from dataclasses import replace

import numpy as np
import pytest
from evidence_records import record_of, save, search_scores
from grid import forecast
from knowledge import beside_other, general, general_study
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


def known(seed, right):
    """A record of general knowledge: which of 6 and of 4 questions are right."""
    choice = {
        name: {"n": len(each), "chance": 0.25, "correct": each} for name, each in zip(("a", "b"), right, strict=True)
    }
    perplexity = {"novels": {"per_token": 40.0 + (seed or 0)}}
    return {
        "seed": seed,
        "parameters": {"trainable": 0 if seed is None else 1},
        "general": {"perplexity": perplexity, "choice": choice},
    }


def test_general_knowledge_is_compared_over_questions_and_seeds():
    rng, seeds = np.random.default_rng(0), (1, 2, 3)
    right = {name: [rng.integers(0, 2, (2, 6)) for _ in seeds] for name in ("one", "two")}
    systems = {
        name: [known(s, (e[0], e[1, :4])) for s, e in zip(seeds, each, strict=True)] for name, each in right.items()
    }
    systems |= {"base": [known(None, ([1, 1, 0, 0, 0, 0], [1, 0, 0, 0]))], "unasked": [{"seed": 1}]}
    study = general_study(systems, 500)
    assert study.systems.keys() == {"one", "two", "base"}
    found = general("one", systems["one"], systems["base"][0], study)
    assert found["perplexity"]["novels"] == {"value": 42, "lowest": 41, "highest": 43, "ratio": pytest.approx(42 / 40)}
    accuracy = {name: np.array([(e[0].mean() + e[1, :4].mean()) / 2 for e in each]) for name, each in right.items()}
    choice = found["choice"]["mean"]
    assert [choice[key] for key in ("value", "lowest", "highest")] == pytest.approx(
        [accuracy["one"].mean(), accuracy["one"].min(), accuracy["one"].max()]
    )
    assert choice["difference"]["value"] == pytest.approx(accuracy["one"].mean() - (2 / 6 + 1 / 4) / 2)
    assert found["choice"]["b"] == {
        "value": pytest.approx(np.mean([e[1, :4] for e in right["one"]])),
        "n": 4,
        "chance": 0.25,
    }
    assert general("base", systems["base"], systems["base"][0], study)["choice"]["mean"]["difference"] is None
    beside = beside_other(("one", "two"), systems["one"], systems["two"][:1], study)
    assert beside["perplexity"]["novels"] == pytest.approx(42 / 41)
    assert beside["choice"]["value"] == pytest.approx((accuracy["one"] - accuracy["two"]).mean())
    # questions within their sets, and the pooled seeds of both
    changes = np.mean(right["one"], axis=0) - np.mean(right["two"], axis=0)
    of_questions = (changes[0].var(ddof=1) / 6 + changes[1, :4].var(ddof=1) / 4) / 4
    of_seeds = study.seeds.shared["mean"].of_seed * 2 / 3
    assert of_seeds > 0
    assert beside["choice"]["standard_error"] == pytest.approx((of_questions + of_seeds) ** 0.5)
    assert beside["choice"]["covers"] == "inputs and seeds"


def test_general_knowledge_that_was_not_measured_is_none():
    assert general_study({"one": [{"seed": 1}]}, 10) is None
    assert general("one", [{"seed": 1}], None, None) is None
    study = general_study({"one": [known(1, ([1, 0], [1, 0]))]}, 10)
    alone = general("one", [known(1, ([1, 0], [1, 0]))], None, study)
    assert (alone["choice"]["mean"]["difference"], alone["perplexity"]["novels"]["ratio"]) == (None, None)
    assert beside_other(("one", "two"), [known(1, ([1, 0], [1, 0]))], [{}], study) is None


def test_the_committed_page_has_the_tables_of_its_json():
    results = json.loads((PAGE.with_suffix("") / "results.json").read_text(encoding="utf-8"))
    drawn = {name for name in PICTURES if (PAGE.with_suffix("") / f"{name}.png").exists()}
    assert filled(PAGE.read_text(encoding="utf-8"), results, "evidence", drawn) == PAGE.read_text(encoding="utf-8")


def test_the_page_says_what_was_asked():
    text = PAGE.read_text(encoding="utf-8")
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
