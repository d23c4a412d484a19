"""scripts/evidence/grid.py and rows.py: which runs there are as results arrive, and the rows made for them."""

import json
from dataclasses import replace

import one
import pytest
import run as command
import store as files
from grid import LOWER, all_runs, forecast, is_kept, next_runs
from plan import Run, search
from rows import make_fewer, make_unequal, sizes
from setups import ROOT, full, quick
from train import AdapterArguments, DataArguments, ModelArguments
from transformers import TrainingArguments

from peft_moe.arguments import parse_arguments

RATES, BEYOND = (1e-3, 3e-3), ((3e-4, 1e-4), (1e-2, 3e-2))
LOW, HIGH = RATES
MIDDLE = HIGH


@pytest.mark.parametrize(
    ("scores", "tried", "chosen"),
    [
        ({}, [LOW, HIGH], None),
        ({LOW: 0.9}, [LOW, HIGH], None),
        ({LOW: 0.3, HIGH: 0.2}, [LOW, HIGH, 3e-4], None),
        ({LOW: 0.3, HIGH: 0.2, 3e-4: 0.1}, [LOW, HIGH, 3e-4], LOW),
        ({LOW: 0.3, HIGH: 0.2, 3e-4: 0.3}, [LOW, HIGH, 3e-4, 1e-4], None),  # of equal ones the lower
        ({LOW: 0.3, HIGH: 0.2, 3e-4: 0.4, 1e-4: 0.5}, [LOW, HIGH, 3e-4, 1e-4], 1e-4),  # there is no lower one
        ({LOW: 0.3, HIGH: 0.4}, [LOW, HIGH, 1e-2], None),
        ({LOW: 0.3, HIGH: 0.4, 1e-2: 0.1}, [LOW, HIGH, 1e-2], HIGH),
        ({LOW: 0.3, HIGH: 0.4, 1e-2: 0.5}, [LOW, HIGH, 1e-2, 3e-2], None),
        ({LOW: 0.3, HIGH: 0.4, 1e-2: 0.5, 3e-2: 0.4}, [LOW, HIGH, 1e-2, 3e-2], 1e-2),
    ],
)
def test_a_rate_is_chosen_when_it_has_a_worse_one_on_either_side(scores, tried, chosen):
    assert search(RATES, BEYOND, scores) == (tried, chosen)


def test_a_single_rate_needs_no_search():
    assert search([1e-3], BEYOND, {}) == ([], 1e-3)


def uncut():
    """The experiment of the page with a search in each protocol, all tasks held out, three seeds everywhere."""
    return replace(full(), seeds={"": (1, 2, 3)}, search_bare=True, held_out=())


def results(runs, *, best=MIDDLE):
    """Scores of runs in which one rate does best."""
    return {r.id: 0.5 if r.learning_rate == best else 0.4 for r in runs}


def test_the_list_grows_with_results_until_it_is_what_was_forecast():
    setup, done = full(), {}
    planned = {r.id for r in forecast(setup, {})}
    first = next_runs(setup, done)
    assert {r.purpose for r in first if r.system not in ("base", "base-composite")} == {"search"}
    assert "at_moe" not in {r.system for r in first}  # its experts' rates are not chosen

    rounds = 0
    while new := next_runs(setup, done):
        done |= results(new)
        rounds += 1
    assert done.keys() == planned
    assert rounds == 5  # searches, and beyond the edge; the same of AT-MoE, beside finals; AT-MoE's finals


def test_finals_have_the_best_rate_and_other_seeds_and_only_they_read_test():
    setup, done = uncut(), {}
    while new := next_runs(setup, done):
        done |= results(new, best=HIGH)
    runs = all_runs(setup, done)
    assert len({r.id for r in runs}) == len(runs)
    for r in runs:
        assert (r.split, r.seed) == ("dev", 0) if r.purpose == "search" else r.split == "test" and r.seed != 0
        if r.purpose == "final" and r.learning_rate:
            assert r.learning_rate == (LOW if r.system.endswith(LOWER) else HIGH)
    of_moelora = [r.learning_rate for r in runs if r.system == "moelora" and r.purpose == "search"]
    assert of_moelora == [*RATES, 1e-2] * 2  # both protocols have a search of their own


def test_the_bare_protocol_can_take_the_rate_of_the_other():
    setup = replace(full(), search_bare=False)
    runs = forecast(setup, {})
    assert {r.purpose for r in runs if r.protocol == "bare"} == {"final"}
    assert {r.learning_rate for r in runs if r.protocol == "bare"} == {None, MIDDLE}


def test_the_experiment_of_the_page_is_cut_where_it_says():
    runs = forecast(full(), {})
    assert {r.purpose for r in runs if r.protocol == "bare"} == {"final"}
    for r in runs:
        other = {"sampling": full().unequal_data, "composite": full().composite_data}
        if r.trains:
            assert r.settings["dataset"] == other.get(r.experiment, full().train_data)
    seeds = {r.experiment: {x.seed for x in runs if x.experiment == r.experiment} - {None, 0} for r in runs}
    assert {name for name, found in seeds.items() if found == {1, 2, 3}} == {"main", "longer", "ablations"}
    assert {r.scored[0] for r in runs if r.experiment == "held_out"} == {"icd_chronic", "rad_modality", "def_system"}


def test_experts_of_at_moe_are_adapters_of_the_same_protocol_and_seed_and_are_kept():
    runs = {r.id: r for r in forecast(full(), {})}
    users = [r for r in runs.values() if r.settings.get("method") == "at_moe" and r.trains]
    assert {"at_moe", "at_moe-flat", "at_moe-of-composites"} == {r.system for r in users}
    for r in users:
        per_task, general = (runs[need] for need in r.needs)
        assert (per_task.system, general.system) == ("lora-per-task", "lora-r16")
        assert {(need.protocol, need.seed) for need in (per_task, general)} == {(r.protocol, r.seed)}
        folders = [folder for group in r.settings["groups"].values() for folder in group.values()]
        assert folders == [f"runs/evidence/adapters/{per_task.id}/{task}" for task in per_task.parts]
        assert r.settings["general_expert"] == f"runs/evidence/adapters/{general.id}"
    assert all(is_kept(runs[need]) for r in runs.values() for need in r.needs)


def test_a_task_held_out_is_not_trained_on_and_the_only_one_that_is_asked():
    runs = [r for r in forecast(uncut(), {}) if r.experiment == "held_out"]
    assert {r.scored[0] for r in runs} == set(full().tasks)
    for r in runs:
        assert {*r.settings["train_tasks"], *r.scored} == set(full().tasks)
        assert r.scored[0] not in r.settings["train_tasks"]


def test_the_settings_of_every_system_are_flags_of_train_py_and_make_a_config():
    systems = {(r.experiment, r.system): r for r in forecast(uncut(), {}) if r.trains}
    assert len(systems) > 60
    for r in systems.values():
        assert str(ROOT) not in json.dumps(r.to_dict())  # no paths of this machine
        words = one.flags({**r.settings, "output_dir": "x"})
        _, data, adapter, args = parse_arguments(
            (ModelArguments, DataArguments, AdapterArguments, TrainingArguments), words
        )
        assert args.learning_rate == r.learning_rate
        assert data.train_tasks == r.settings.get("train_tasks")
        if r.system.startswith("molora-k1"):
            with pytest.warns(UserWarning, match="top_k=1"):
                adapter.config(["a", "b"])
        else:
            adapter.config(["a", "b"])


def test_quick_has_a_run_of_every_experiment_that_differs_in_kind():
    setup = quick()
    runs = command.chooser(list(setup.only), None)(forecast(setup, {}))
    assert {r.experiment for r in runs} >= {"main", "sampling", "held_out", "composite"}
    assert {r.settings.get("method") for r in runs} == {None, "lora", "moelora", "molora", "medmoelora", "at_moe"}
    assert "general" not in {what for r in runs for what in r.measure}


def test_choosing_runs_takes_what_they_need_too():
    runs = forecast(uncut(), {})
    found = command.chooser(["instruction/at_moe-flat/*/seed-1"], None)(runs)
    final = [r.system for r in found if r.purpose == "final"]
    assert final == ["lora-r16", "lora-per-task", "at_moe-flat"]
    searches = [r for r in found if r.purpose == "search"]  # the rates of all three are theirs
    assert {r.system for r in searches} == {"lora-r16", "lora-per-task", "at_moe"}
    assert len(searches) == 9
    of_rank = command.chooser(None, ["rank"])(runs)
    assert len([r for r in of_rank if r.experiment == "rank"]) == 18
    assert {r.system for r in of_rank if r.experiment != "rank"} == {"lora-r16", "moelora", "molora"}
    assert command.chooser(["nothing"], None)(runs) == []


def test_a_lower_rate_is_the_next_one_of_the_search_or_a_third():
    for setup, rate in ((full(), LOW), (quick(), 3e-4), (replace(quick(), beyond=((), ())), 1e-3 / 3)):
        by_system = {r.system: r for r in forecast(setup, {})}
        lower = {name: r for name, r in by_system.items() if name.endswith(LOWER)}
        assert len(lower) == 3
        for name, r in lower.items():
            twin = by_system[name.removesuffix(LOWER)]
            assert r.settings == {**twin.settings, "learning_rate": rate}


def test_a_run_comes_back_from_json():
    for r in forecast(full(), {})[::10]:
        assert Run.of(json.loads(json.dumps(r.to_dict()))).to_dict() == {
            **r.to_dict(),
            "settings": files.plain(r.settings),
        }


# rows


def test_fewer_rows_are_those_of_the_same_inputs_for_all_tasks_of_a_group(tmp_path):
    setup = full()
    make_fewer(ROOT / setup.data, str(tmp_path / "fewer"), setup.groups, 30)
    rows = [json.loads(line) for line in (tmp_path / "fewer" / "train.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (ROOT / setup.data / "train.jsonl").read_text().splitlines()]
    assert [row for row in whole if row in rows] == rows  # as they were, in their order
    for tasks in setup.groups.values():
        inputs = [{row["input"] for row in rows if row["task"] == task} for task in tasks]
        assert all(found == inputs[0] and len(found) == 30 for found in inputs)
    assert len(rows) == 8 * 30
    info = json.loads((tmp_path / "fewer" / "tasks.json").read_text())["tasks"]
    assert {task["n"]["train"] for task in info.values()} == {30}
    with pytest.raises(ValueError, match="300 inputs of"):
        make_fewer(ROOT / setup.data, str(tmp_path / "more"), setup.groups, 300)


def test_tasks_of_unequal_sizes_keep_their_first_rows_and_groups_have_large_and_small_ones(tmp_path):
    setup = full()
    keep = sizes(setup)
    assert list(keep.values()) == sorted(keep.values(), reverse=True)
    assert (max(keep.values()), min(keep.values())) == (250, 20)
    assert list(keep)[:3] == [tasks[0] for tasks in setup.groups.values()]
    source = ROOT / setup.data
    make_unequal(source, str(tmp_path / "unequal"), keep)
    read = [json.loads(line) for line in (tmp_path / "unequal" / "train.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    for task, number in keep.items():
        assert [r for r in read if r["task"] == task] == [r for r in whole if r["task"] == task][:number]
    assert (tmp_path / "unequal" / "test.jsonl").read_bytes() == (source / "test.jsonl").read_bytes()
    with pytest.raises(ValueError, match="300 rows of def_term are to be kept"):
        make_unequal(source, str(tmp_path / "other"), {"def_term": 300})
    assert not (tmp_path / "other").exists()
