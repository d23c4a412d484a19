"""That every number of the evidence is of what it is said to be: records in which no two cells are alike."""

import json

import pytest
import results as numbers
from comparison_tables import in_short
from evidence_records import known_by, save, setup_in
from families import of_sweeps
from more_tables import TABLES
from page_pictures import of_differences, plt
from page_tables import hours
from records import Records, equal_gates, systems_of
from results import build, costs, finals_of, lead, seed_reach
from stats import Study

DRAWS = 200
TRUTH = {  # systems that share adapters, methods with their LoRAs, and a task held out
    "base": 0.1, "lora-r16": 0.5, "lora-per-task": 0.65, "moelora": 0.8, "lora-like-molora-parameters": 0.7,
    "molora": 0.6, "lora-like-medmoelora-parameters": 0.75, "medmoelora": 0.45, "lora-like-at_moe-active": 0.55,
    "at_moe": 0.85, "at_moe-flat": 0.9, "lora-like-at_moe-passes": 0.95, "lora-r16-without-icd_chronic": 0.4,
    "moelora-without-icd_chronic": 0.7, "medmoelora-no-base-expert": 0.35,
}  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    setup = setup_in(folder / "derived")
    save(setup, folder / "runs", {f"instruction/{name}": right for name, right in TRUTH.items()}, spread=0.06)
    return Records(setup, folder / "runs")


@pytest.fixture(scope="module")
def found(records):
    return build(records, draws=DRAWS)


def cells_of(text):
    """The cells of a table's rows, without its head."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]


def in_json(comparison):
    """What results.json has of a difference, as far as seeds matter to it."""
    return [comparison.difference.standard_error, comparison.difference.low, comparison.p]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("at_moe-flat", "at_moe"),
        ("at_moe", "lora-per-task"),
        ("moelora, equal gates at test time", "moelora"),
        ("at_moe, equal gates at test time", "at_moe"),
    ],
)
def test_systems_that_share_adapters_are_compared_seed_by_seed(records, found, name, other):
    asked = "equal gates" in name
    finals = finals_of(records, "one epoch")
    main = {system: each for system, each in finals.items() if each.experiment == "main"}
    systems = equal_gates(records.sheet, main) if asked else systems_of(records.sheet, finals)
    study = Study(systems, draws=DRAWS, repeated=() if asked else ("at_moe-flat",))
    shared, apart = (study.compare(name, other, shared=each)["mean"] for each in (True, False))
    there = [
        each
        for each in [*found["families"]["ablations"], *found["beside"]["one epoch"]]
        if (each["name"], each["against"]) == (name, other)
    ]
    assert len(there) == 1
    difference = there[0]["difference"]
    told = [difference["standard_error"], difference["low"], there[0]["p"]]
    assert told == pytest.approx(in_json(shared), rel=1e-4)
    assert told[0] != pytest.approx(apart.difference.standard_error, rel=1e-3)
    if asked:
        beside = found["equal_gates"]["instruction"][other]
        assert beside["difference"] == difference
        told = cells_of(TABLES["equal-gates"](found))[("moelora", "molora", "medmoelora", "at_moe").index(other)]
        assert told[-1] == ", ".join(f"{value:+.3f}" for value in difference["per_seed"])


def test_seeds_of_repeated_adapters_are_not_pooled(records, found):
    systems = systems_of(records.sheet, finals_of(records, "one epoch"))
    once, twice = (Study(systems, draws=10, repeated=names).seeds.shared["mean"] for names in (["at_moe-flat"], []))
    assert found["seed_spread"]["one epoch"]["mean"] == pytest.approx(once.observed**0.5, rel=1e-5)
    assert once.observed != pytest.approx(twice.observed, rel=1e-3)
    assert found["seed_reach"] == pytest.approx(1.959964 * (2 * once.observed) ** 0.5, rel=1e-5)
    told = TABLES["composite-seeds"](found)
    assert f"{once.observed**0.5:.3f} over seeds" in told
    assert f"{found['seed_reach']:.3f} apart" in told
    assert seed_reach(None) is None


def test_a_search_shows_each_rate_with_its_score_and_what_the_best_is_ahead_of_the_second(records, found):
    rows = {cells[0]: cells[1:] for cells in cells_of(TABLES["searches"](found))}
    for search in found["searches"]:
        run = "instruction/{}/lr-{:g}/seed-0"
        scores = {f"{rate:g}": records.scores.get(run.format(search["system"], rate)) for rate in (1e-3, 3e-3, 1e-2)}
        best, second, _ = sorted(scores.values(), reverse=True)
        cells = [f"**{score:.3f}**" if score == best else f"{score:.3f}" for score in scores.values()]
        assert rows[found["labels"][search["system"]]] == [*cells, f"{best - second:.3f}"]
    assert lead({1e-3: 0.5, 3e-3: 0.9, 1e-2: 0.8}) == pytest.approx(0.1)
    assert lead({1e-3: 0.5, 3e-3: None}) is lead({1e-3: 0.5}) is None


def test_general_knowledge_stands_beside_that_of_the_lora(found):
    rows = cells_of(TABLES["general-beside"](found))
    assert len(rows) == len(found["general_beside"])
    for cells, each in zip(rows, found["general_beside"], strict=True):
        one, other = known_by(each["name"]), known_by(each["against"])
        assert cells[:2] == [found["labels"][each[key]] for key in ("name", "against")]
        assert cells[2].partition(" ")[0] == f"{(one - other) / 2:+.3f}"  # one of two sets differs
        assert cells[3] == f"novels {(1 + one) / (1 + other):.2f}"
        assert abs(one - other) > 0.01
    for name, each in found["general"].items():
        if each and name != "base":
            assert each["choice"]["mean"]["difference"]["value"] == pytest.approx(known_by(name) / 2)


def test_held_out_scores_are_of_their_own_answers(records, found):
    rows = cells_of(TABLES["held-out"](found))
    there = {each["system"]: each for each in found["held_out"] if each["task"] == "icd_chronic"}
    for system, each in there.items():
        record = records.finals["instruction", f"{system}-without-icd_chronic"].done[0]
        trained = found["scores"]["instruction"][system]["targets"]["icd_chronic"]["value"]
        base = found["scores"]["instruction"]["base"]["targets"]["icd_chronic"]["value"]
        expected = [base, record["scores"]["mean"]["score"]]
        if system == "moelora":
            expected += [record["uniform"]["scores"]["mean"]["score"]]
        expected += [trained]
        assert len(set(expected)) == len(expected)
        cells = next(cells for cells in rows if cells[:2] == ["icd_chronic", found["labels"][system]])
        assert [cell.partition(" ")[0] for cell in cells[2:] if cell != "–"] == [f"{value:.3f}" for value in expected]
        assert each["score"]["value"] == pytest.approx(expected[1], rel=1e-5)
    assert there.keys() == {"lora-r16", "moelora"}


def test_costs_are_those_of_float32(tmp_path, monkeypatch, found):
    def row(dtype, median):
        ratios = {"total": {"median": median, "quartiles": [median - 0.1, median + 0.1]}}
        return {"method": "molora", "step": "train", "dtype": dtype, "ratios": ratios}

    rows = [row("fp32", 1.5), row("bf16", 2.5), {"method": "molora", "step": "train", "dtype": "fp32"}]
    (tmp_path / "model.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(numbers, "COSTS", tmp_path / "model.json")
    table = TABLES["costs"](found | {"costs": costs()})
    assert next(cells for cells in cells_of(table) if cells[0] == "MoLoRA")[2:] == ["1.50 (1.40 to 1.60)", *"–––"]


def test_each_system_is_drawn_with_its_own_difference(found):
    figure = of_differences(found)
    panels = [found["families"][f"{part}: mean"] for part in ("one epoch", "three epochs")]
    drawn = [[list(line.get_xdata()) for line in axis.lines[:-1]] for axis in figure.axes]  # the last is that at 0
    plt.close(figure)
    told = [[each["difference"] for each in panel if each["difference"]] for panel in panels]
    assert drawn == [[xs for each in panel for xs in ([each["low"], each["high"]], [each["value"]])] for panel in told]
    assert len({each["value"] for panel in told for each in panel}) == 5


def test_systems_of_sweeps_stand_beside_what_differs_in_one_thing():
    beside = {pair.name: pair.other for pair in of_sweeps()}
    assert beside["moelora-r32-n32"] == beside["moelora-r32-n32-lower-rate"] == "moelora-r32-n8"
    assert (beside["moelora-r32-n8"], beside["molora-n32"], beside["lora-r64"]) == ("moelora", "molora", "lora-r16")
    assert beside["moelora-sampled-uniform"] == "moelora-sampled-proportional"


def test_hours_are_those_of_the_records_and_of_runs_like_them(records, found):
    done = 700 / 3600  # of every record
    assert found["provenance"]["hours"] == pytest.approx(len(records.found) * done, rel=1e-5)
    assert sum(entry["hours"] for entry in found["state"]) == pytest.approx(len(records.found) * done, rel=1e-5)
    longer, held_out = (
        next(entry for entry in found["state"] if entry["experiment"] == name) for name in ("longer", "held_out")
    )
    assert held_out["hours"] == pytest.approx(2 * done, rel=1e-5)
    assert held_out["hours_left"] == pytest.approx(4 * done, rel=0.1)
    assert longer["hours_left"] == pytest.approx(18 * (done + 1200 / 3600), rel=0.1)  # two more epochs of 600 s
    given = {"main": (2.0, 8.0), "longer": (2.0, 4.0), "rank": (2.0, 0.0)}
    state = [{"experiment": name, "hours": there, "hours_left": left} for name, (there, left) in given.items()]
    told = hours({"state": state})
    assert "about 18 CPU hours, 9 hours on two cores" in told
    assert "would be 5." in told


def test_the_main_comparisons_are_counted_in_a_sentence(found):
    def counted(win, tie, loss, missing):
        all_of_them = {"win": win, "tie": tie, "loss": loss, "missing": missing}
        return all_of_them | {"all": sum(all_of_them.values())}

    def told(one, three):
        text = in_short({"counts": {"one epoch: mean": counted(*one), "three epochs: mean": counted(*three)}})
        return text.partition("mean score: ")[2]

    assert told((0, 1, 3, 0), (1, 0, 2, 1)) == (
        "after one epoch, of 4 none wins, 1 ties and 3 lose; after three epochs, of 4 1 wins, none ties, 2 lose and "
        "1 is not run yet."
    )
    assert told((2, 2, 0, 0), (0, 0, 0, 4)) == (
        "after one epoch, of 4 2 win, 2 tie and none loses; after three epochs, of 4 4 are not run yet."
    )
    wins = [each["verdict"] for each in found["families"]["one epoch: mean"]].count("win")
    assert f"after one epoch, of 4 {wins} win" in in_short(found)
