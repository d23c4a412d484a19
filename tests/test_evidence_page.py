"""The results page from records of known truths: what its tables must say, and that the rest stays as it is."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evidence_records import BEST, record_of, routing_for, save, search_scores, setup_in
from families import BESIDE, MATCHED, of_ablations
from grid import forecast
from knowledge import routing
from more_tables import TABLES
from page import BEGIN, END, NO_PICTURE, filled, write
from page_pictures import PICTURES
from records import Finals, Records
from results import constant
from rows import read_rows
from setups import ROOT, full
from store import write as write_record
from times import times
from verdicts import holm

from peft_moe.evaluation import score
from peft_moe.reading import read_examples, read_task_info

PAGE = ROOT / "docs" / "evidence.md"
TRUTH = {  # moelora wins, molora ties, medmoelora loses; at_moe wins after one epoch, and loses after three
    "base": 0.1, "lora-r16": 0.5, "moelora": 0.8, "lora-like-molora-parameters": 0.6, "molora": 0.6,
    "lora-like-medmoelora-parameters": 0.7, "medmoelora": 0.4, "lora-like-at_moe-active": 0.6,
    "molora-k1": 0.6, "moelora-gate-per-layer": 0.5, "moelora-r32-n8": 0.7, "lora-r8": 0.5,
    "base-composite": 0.1, "lora-r16-of-single-tasks": 0.4, "moelora-of-single-tasks": 0.8,
    "moelora-without-icd_chronic": 0.7, "lora-r16-sampled-uniform": 0.5, "lora-r16-sampled-proportional": 0.7,
    "moelora-longer": 0.9, "lora-r16-longer": 0.6, "at_moe": 0.8, "lora-like-at_moe-passes": 0.95,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of the truths above with instructions, and of one seed in the bare protocol; and its numbers."""
    folder = tmp_path_factory.mktemp("evidence")
    setup = setup_in(folder / "derived")
    truth = {f"instruction/{name}": right for name, right in TRUTH.items()}
    bare = {"lora-r16": 0.2, "moelora": 0.8, "lora-per-task": 0.7, "at_moe": 0.3}
    truth |= {f"bare/{name}": right for name, right in bare.items()}
    save(setup, folder / "runs", truth, seeds={f"bare/{name}": 1 for name in bare})
    page = folder / "evidence.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    return setup, folder / "runs", page, write(Records(setup, folder / "runs"), page, draws=300)


def part(text, name):
    """What stands between a pair of marks."""
    return text.partition(BEGIN.format(name))[2].partition(END.format(name))[0]


def rows_of(text, name):
    """The cells of a table's rows by the first one."""
    lines = [line.strip("| ").split(" | ") for line in part(text, name).splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in lines[2:]}


def test_methods_that_are_better_alike_and_worse_win_tie_and_lose(made):
    *_, page, results = made
    rows = rows_of(page.read_text(), "methods")
    verdicts = {name: cells[-3:-1] for name, cells in rows.items() if name.startswith("one epoch")}
    assert verdicts == {
        "one epoch: MOELoRA": ["**win**", "win"], "one epoch: MoLoRA": ["tie", "tie"],
        "one epoch: Med-MoE-LoRA": ["**loss**", "loss"], "one epoch: AT-MoE": ["**win**", "win"],
    }  # fmt: skip
    assert rows["three epochs: MoLoRA"] == ["LoRA, parameters of MoLoRA", "not run yet", "–", "–", "–", "–", "–"]
    assert rows["three epochs: MOELoRA"][-3] == "**win**"
    assert rows["three epochs: AT-MoE"][-3] == "**loss**"
    lines = [
        line.strip("| ").split(" | ") for line in part(page.read_text(), "summary").splitlines() if "epoch" in line
    ]
    assert [(cells[0], cells[1], cells[4]) for cells in lines] == [
        (when, name, {"MOELoRA": "**win**"}.get(name, other.get(name, "–")))
        for when, other in (
            ("one epoch", {"MoLoRA": "tie", "Med-MoE-LoRA": "**loss**", "AT-MoE": "**win**"}),
            ("three epochs", {"AT-MoE": "**loss**"}),
        )
        for name in ("MOELoRA", "MoLoRA", "Med-MoE-LoRA", "AT-MoE")
    ]
    assert rows_of(page.read_text(), "others")["bare: mean"] == ["1", "–", "–", "–", "1"]
    better, worse = rows_of(page.read_text(), "others")["ablations"][1:3]
    assert better == "–"
    at_equal_gates = [f"{name}, equal gates at test time" for name in ("MOELoRA", "MoLoRA", "Med-MoE-LoRA", "AT-MoE")]
    assert worse.split("; ") == ["MOELoRA, a gate per layer", *at_equal_gates]
    found = {each["name"]: each for each in results["families"]["one epoch: mean"]}
    for name, other in MATCHED.items():
        difference = found[name]["difference"]
        assert difference["low"] < difference["value"] < difference["high"]
        assert found[name]["against"] == other
    assert found["moelora"]["difference"]["value"] == pytest.approx(0.25, abs=0.08)  # 0.3, less what is guessed right


def test_missing_comparisons_count_in_their_family(made):
    *_, results = made
    there = [each for each in results["families"]["three epochs: mean"] if each["verdict"]]
    assert len(there) == 2
    assert holm([each["p"] for each in there] + [1.0, 1.0])[:2] == pytest.approx(
        [each["p_corrected"] for each in there], rel=1e-4
    )
    ablations = results["families"]["ablations"]
    assert [each["name"] for each in ablations] == [pair.name for pair in of_ablations()]
    verdicts = {each["name"]: each["verdict"] for each in ablations}
    assert verdicts["molora-k1"] == "tie"
    assert verdicts["moelora-gate-per-layer"] == verdicts["moelora, equal gates at test time"] == "loss"
    assert verdicts["at_moe-flat"] is None


def test_one_seed_has_a_score_and_no_verdict(made):
    *_, page, results = made
    text = page.read_text()
    assert rows_of(text, "methods")["bare: MOELoRA"][1:] == ["not run yet", "–", "–", "–", "–", "–"]
    cells = rows_of(text, "scores-bare")["MOELoRA"]
    assert re.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", cells[0])
    assert cells[1:3] == ["1 of 3", f"{BEST:g}"]
    assert results["counts"]["bare: mean"] == {"win": 0, "tie": 0, "loss": 0, "missing": 1, "all": 1}
    assert results["scores"]["bare"]["moelora"]["targets"]["mean"]["covers"] == "inputs"
    assert results["scores"]["instruction"]["moelora-r32-n8"]["targets"]["mean"]["covers"] == "inputs and seeds"


def test_methods_with_one_planned_seed_are_in_no_family_and_stand_beside(made):
    *_, page, results = made
    assert {each["name"] for each in results["families"]["bare: tasks"]} == {"moelora"}
    beside = {(each["name"], each["against"]) for each in results["beside"]["bare"]}
    assert beside == {("moelora", "lora-per-task")}
    assert {each["name"] for each in results["beside"]["one epoch"]} == {pair.name for pair in BESIDE}
    assert "| bare | MOELoRA | a LoRA of rank 16 per task | not run yet | – |" in part(page.read_text(), "beside")


def test_a_task_left_out_changes_the_mean_by_its_own_difference(made):
    *_, page, results = made
    by_task = {each["target"]: each for each in results["families"]["one epoch: tasks"] if each["name"] == "moelora"}
    values = {task: each["difference"]["value"] for task, each in by_task.items()}
    left = {each["target"]: each["difference"] for each in results["without"]["one epoch"] if each["name"] == "moelora"}
    assert left.keys() == {f"without {task}" for task in values}
    cells = rows_of(page.read_text(), "without-one-task")
    for task, value in values.items():
        found = left[f"without {task}"]
        assert found["value"] == pytest.approx((sum(values.values()) - value) / 7, abs=1e-5)
        assert cells[f"without {task}"][0] == f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        assert rows_of(page.read_text(), "without-one-task-longer")[f"without {task}"][1] == "not run yet"  # MoLoRA
    assert re.fullmatch(r"0\.\d{3}", cells["all"][-1])


def test_a_method_of_three_epochs_is_pooled_with_its_like(made):
    *_, results = made
    spread = results["seed_spread"]
    assert spread["one epoch"]["mean"] != spread["three epochs"]["mean"]
    assert spread["bare"]["mean"] is None  # one seed each


def test_a_sweep_stands_beside_what_it_changes(made):
    *_, page, results = made
    cells = rows_of(page.read_text(), "experts")["MOELoRA, rank 32, 8 experts"]
    found = next(each for each in results["sweeps"] if each["name"] == "moelora-r32-n8")
    assert found["against"] == "moelora"
    scores = [
        results["scores"]["instruction"][name]["targets"]["mean"]["value"] for name in ("moelora-r32-n8", "moelora")
    ]
    assert found["difference"]["value"] == pytest.approx(scores[0] - scores[1], abs=1e-5)
    assert cells[1:3] == [
        f"{found['difference']['value']:+.3f} [{found['difference']['low']:+.3f}, {found['difference']['high']:+.3f}]",
        "MOELoRA",
    ]
    drawn = rows_of(page.read_text(), "sampling-by-task")
    assert [cells[0] for cells in drawn.values()] == ["250", "174", "121", "85", "59", "41", "29", "20"]
    assert all(cells[2] == "not run yet" and cells[1].startswith(("+", "-")) for cells in drawn.values())


def test_runs_that_answer_alike_throughout_are_counted(made):
    setup, runs, *_ = made
    records = Records(setup, runs)
    record = records.finals["instruction", "moelora"].done[0]
    rows = records.sheet.tasks["icd_chronic"].rows
    alike = ["no" if row in rows else answer for row, answer in enumerate(record["answers"])]
    other = record | {"answers": alike}
    assert constant([record, other, other], records.sheet) == {"icd_chronic": 2}
    assert "icd_chronic (2 of 3)" in TABLES["constant"](
        {"labels": {"moelora": "MOELoRA"}, "scores": {"bare": {"moelora": {"runs": 3, "constant": {"icd_chronic": 2}}}}}
    )


def test_scores_without_a_language_model_are_of_the_rows_that_are_trained_on(made):
    setup, *_, results = made
    found, folder = results["simple"], str(ROOT / setup.data)
    test, train = read_examples(folder, split="test"), read_rows(Path(setup.train_data), "train")
    common = {t: Counter(r["output"] for r in train if r["task"] == t).most_common(1)[0][0] for t in setup.tasks}
    expected = score([common[row["task"]] for row in test], test, read_task_info(folder))
    assert all(scores.keys() == {*setup.tasks, "mean"} for scores in found.values())
    for task, value in found["most_common"].items():
        assert value == pytest.approx(expected[task]["score"], rel=1e-5)
    assert found["regression"]["mean"] is None
    # words tell more than nothing about labels, and of the others the nearest input's answer is the better guess
    labelled = [task for task in setup.tasks if found["regression"][task] is not None]
    assert labelled == ["icd_chapter", "icd_chronic", "rad_modality", "rad_topic", "def_system"]
    for task in setup.tasks:
        assert max(found["nearest"][task], found["regression"][task] or 0) > found["most_common"][task]


def test_parameters_and_time_count_what_was_trained_before(made):
    *_, page, results = made
    entry = results["scores"]["bare"]["at_moe"]
    assert entry["all_stages"] == {"trainable": 3 * 4_884_480}  # and its two kinds of experts
    assert entry["parameters"]["trainable"] == 4_884_480
    assert entry["times"] == {"AVX2": {"train_cpu": 1800, "answer_cpu": 90}}
    cells = ["1", f"{BEST:g}", "14.65 M", "16", "30.0", "1.5", "5.0"]
    assert rows_of(page.read_text(), "scores-bare")["AT-MoE"][1:] == cells


def test_times_are_apart_for_each_kind_of_cpu():
    def record(train, vectors=None):
        machine = {"cpu": "a CPU"} | ({"vectors": vectors} if vectors else {})
        return {"machine": machine, "seconds": {"train_cpu": train, "answer_cpu": 9.0}}

    expert, fast_expert = record(100.0), record(60.0, "AVX512")
    mixed = [record(20.0), record(30.0, "AVX2"), record(10.0, "AVX512")]
    assert times(Finals("main", [], mixed, [[expert], [expert], [expert]])) == {
        "AVX2": {"train_cpu": 125.0, "answer_cpu": 9.0},
        "AVX512": {"train_cpu": None, "answer_cpu": 9.0},  # nobody knows how long its expert takes there
    }
    found = times(Finals("main", [], mixed, [[expert], [fast_expert], [expert]]))
    assert [found[kind]["train_cpu"] for kind in ("AVX2", "AVX512")] == [125.0, 70.0]
    assert times(Finals("main", [], mixed, [[], [], []]))["AVX512"]["train_cpu"] == 10.0


def test_what_is_missing_is_said(made):
    setup, *_, page, results = made
    text = page.read_text()
    rows = rows_of(text, "scores-instruction")
    assert rows["LoRA, active rank of MoLoRA"] == ["not run yet", "0 of 3", *"––––––"]
    assert "LoRA, rank 144, three epochs" not in rows
    assert rows_of(text, "scores-longer")["AT-MoE"] == rows["AT-MoE"]
    assert rows["base model"][1:] == ["1", *"––––", "1.5", "5.0"]
    assert "LoRA, active rank of MoLoRA (3)" in rows_of(text, "state")["main, instruction, final"][-1]
    knowledge = rows_of(text, "general")
    assert knowledge["Med-MoE-LoRA, no base expert"][:2] == ["0 of 3", "not run yet"]
    assert knowledge["MOELoRA"][0] == "3"
    beside = {each["name"]: each["found"] for each in results["general_beside"] if each["name"] != "at_moe"}
    assert beside.pop("medmoelora") is None  # the last of its two, without its base expert
    assert all(beside.values())
    assert rows_of(text, "state")["main, instruction, search"][-1] == "–"
    assert sum(entry["planned"] for entry in results["state"]) == len(forecast(setup, search_scores(setup)))
    held_out = [line.split(" | ") for line in part(text, "held-out").splitlines() if "icd_chronic" in line]
    assert [["not run yet" in cell for cell in cells[2:]] for cells in held_out] == [
        [False, True, False, False], [False, False, False, False]
    ]  # fmt: skip


def test_the_tables_of_the_page_are_made_of_its_json_alone(made):
    *_, page, _ = made
    results = json.loads((page.with_suffix("") / "results.json").read_text())
    for name, make in TABLES.items():
        assert part(page.read_text(), name).strip() == make(results), name


def test_the_text_around_the_marks_stays_and_a_second_call_changes_nothing(made):
    setup, runs, page, _ = made
    marked = "|".join([*TABLES, *(f"picture-{name}" for name in PICTURES)])
    outside = re.compile(rf"(<!-- ({marked}): .*?-->).*?(<!-- end of \2 -->)", re.DOTALL)
    assert outside.sub(r"\1\3", page.read_text()) == outside.sub(r"\1\3", PAGE.read_text())
    folder = page.with_suffix("")
    before = {path: path.read_bytes() for path in (page, *folder.iterdir())}
    assert {path.name for path in folder.iterdir()} == {"results.json", *(f"{name}.png" for name in PICTURES)}
    write(Records(setup, runs), page, draws=300)
    assert {path: path.read_bytes() for path in (page, *folder.iterdir())} == before


@pytest.mark.parametrize("only_base", [False, True])
def test_a_page_of_no_runs_or_the_base_alone_has_no_results_and_takes_old_pictures_away(tmp_path, only_base):
    setup = replace(full(), folder=str(tmp_path / "derived"))
    if only_base:
        run = next(run for run in forecast(setup, {}) if run.id == "instruction/base")
        write_record(tmp_path / "runs" / "main" / "base.json", record_of(setup, run, 0.3))
    page = tmp_path / "evidence.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    page.with_suffix("").mkdir()
    (page.with_suffix("") / "differences.png").write_bytes(b"old")
    results = write(Records(setup, tmp_path / "runs"), page, draws=50)
    assert {counted["missing"] - counted["all"] for counted in results["counts"].values()} == {0}
    assert part(page.read_text(), "picture-differences").strip() == NO_PICTURE
    assert not (page.with_suffix("") / "differences.png").exists()
    cells = rows_of(page.read_text(), "scores-instruction")
    assert {row[0] for name, row in cells.items() if name != "base model"} == {"not run yet"}
    assert (cells["base model"][0] != "not run yet") == only_base
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", "".join(part(page.read_text(), name) for name in TABLES))


def test_a_page_without_a_mark_is_refused(made):
    *_, page, results = made
    text = page.read_text()
    for broken in (text.replace(END.format("gates"), ""), text + BEGIN.format("gates")):
        with pytest.raises(ValueError, match="The page needs a line .*gates.* both once"):
            filled(broken, results, "evidence", set())


def test_gates_are_shown_by_depth(made):
    setup, *_, results = made
    groups = {task: group for group, tasks in setup.groups.items() for task in tasks}
    blocks = routing([{"routing": routing_for(setup, "molora")}], groups, 320)
    assert [block for block, _ in blocks["by_depth"]] == list(range(6))
    assert [bits for _, bits in blocks["by_depth"]] == pytest.approx([0] * 5 + [3])
    assert blocks["mutual_information"]["mean"] == pytest.approx(0.5)
    assert blocks["within"] == pytest.approx({"icd": 2 / 6, "rad": 1 / 6, "def": 1 / 6})
    of_moelora, of_molora = (results["routing"]["instruction"][name] for name in ("moelora", "molora"))
    assert of_moelora["by_depth"] == [[None, 3]]
    assert of_moelora["bias_bound"] == 0 < of_molora["bias_bound"]  # a gate that reads the task alone has no bias
    assert (blocks["own"], blocks["ceiling"]) == (None, pytest.approx((5 * 2 + 3) / 6))
    assert blocks["bias_bound"] == pytest.approx(7 * (5 * 3 + 7) / 6 / (2 * 320 * math.log(2)))
    assert blocks["clearest"]["weights"] == np.eye(8).tolist()  # the tasks in the order of the page
    of_tasks = routing([{"routing": routing_for(setup, "at_moe")}], groups, 320, of_tasks=True)
    assert of_tasks["own"] == pytest.approx((5 / 8 + 1) / 6)
    assert of_tasks["clearest"]["experts"] == of_tasks["clearest"]["tasks"] == list(setup.tasks)
    assert routing([{}], groups, 320) is None


def test_composite_answers_score_as_in_the_library(made):
    setup, runs, *_, results = made
    rows, info = read_examples(setup.composite_data, split="test"), read_task_info(setup.composite_data)
    path = next((runs / "composite").glob("*moelora-of-single-tasks*seed-1*"))
    expected = score(json.loads(path.read_text())["answers"], rows, info)
    entry = results["composite"]["moelora-of-single-tasks"]
    assert entry["targets"]["mean"]["per_seed"] == pytest.approx([expected["mean"]["score"]], rel=1e-5)
    assert entry["difference"]["low"] > 0.1
