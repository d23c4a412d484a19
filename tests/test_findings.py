"""The plain-language summary: tables of routings and what is said of them."""

import copy
import math

import numpy as np
import pytest

from peft_moe.report.findings import findings, undecided_entropy
from peft_moe.report.wording import ADVICE
from peft_moe.routing.measures import chance_divergence, divergence, overlap, separation, spread

EYE = [[float(i == j) for j in range(4)] for i in range(4)]


def layer_of(
    loads,
    *,
    entropy=0.7,
    similarity=EYE,
    names="0123",
    chosen=None,
    group_of=None,
    chance=0.0,
    name="model.layers.0.up",
):
    """A layer with tasks of these loads, 100 tokens each."""
    chosen = float(len(names) if chosen is None else chosen)
    load = [sum(column) / len(loads) for column in zip(*loads.values(), strict=True)]
    return {
        "name": name,
        "block": 0,
        "module": "up",
        "experts": list(names),
        "ranks": [2] * len(names),
        "group_of": group_of,
        "tokens": 100 * len(loads),
        "load": load,
        "top1": load,
        "chosen": [1.0] * len(names) if chosen == len(names) else [min(1.0, chosen * value) for value in load],
        "entropy": entropy,
        "effective_experts": math.exp(-sum(v * math.log(v) for v in load if v)),
        "chosen_per_token": chosen,
        "group_load": None,
        "tasks": {task: {"tokens": 100, "load": load, "entropy": entropy} for task, load in loads.items()},
        "chance_divergence": chance,
        "similarity": similarity,
    }


def routing_of(*layers, method="MOELoRA"):
    tasks = sorted({task for layer in layers for task in layer["tasks"]})
    return {"format": 1, "method": method, "tasks": tasks, "layers": list(layers)}


def titles(routing):
    return {finding["title"]: finding["level"] for finding in findings(routing)}


HEALTHY = {"icd": [0.6, 0.2, 0.1, 0.1], "rad": [0.1, 0.2, 0.1, 0.6]}
EVEN = {"icd": [0.25] * 4, "rad": [0.25] * 4}


def test_a_healthy_routing_has_good_findings_only():
    assert titles(routing_of(layer_of(HEALTHY))) == {
        "No dead experts": "good",
        "The load is spread": "good",
        "Routers decide": "good",
        "Tasks are well separated": "good",
        "Experts differ": "good",
    }


def cosines(value):
    return [[1.0 if i == j else value for j in range(4)] for i in range(4)]


ZERO = [[0.0] * 4] * 4
TABLE = {
    "dead": (layer_of({"icd": [0.5, 0.4, 0.1, 0.0]}), "1 dead expert", "bad"),
    "two dead": (layer_of({"icd": [0.5, 0.499, 0.001, 0.0]}), "2 dead experts", "bad"),
    "just alive": (layer_of({"icd": [0.5, 0.4, 0.097, 0.003]}), "No dead experts", "good"),
    "few": (layer_of({"icd": [0.95, 0.02, 0.02, 0.01]}), "Routing has collapsed to few experts", "bad"),
    "the same 2 for all": (
        layer_of({"icd": [0.5, 0.5, 0.0, 0.0]}, chosen=2.0),
        "Routing has collapsed to few experts",
        "bad",
    ),
    "2 of 4": (layer_of({"icd": [0.4, 0.4, 0.1, 0.1]}, chosen=2.0), "The load is spread", "good"),
    "even": (layer_of(EVEN, entropy=math.log(4)), "Routing is uniform", "bad"),
    "nearly even": (layer_of(EVEN, entropy=0.985 * math.log(4)), "Routers decide", "good"),
    "alike": (layer_of({"a": [0.7, 0.1, 0.1, 0.1], "b": [0.7, 0.1, 0.1, 0.1]}), "Tasks share everything", "bad"),
    "in part": (layer_of({"a": [0.7, 0.1, 0.1, 0.1], "b": [0.4, 0.3, 0.1, 0.2]}), "Tasks differ in part", "good"),
    "copies": (layer_of(HEALTHY, similarity=cosines(0.96)), "Experts are copies", "bad"),
    "mirror images": (layer_of(HEALTHY, similarity=cosines(-0.96)), "Experts are copies", "bad"),
    "not quite": (layer_of(HEALTHY, similarity=cosines(0.94)), "Experts differ", "good"),
    "untrained": (layer_of(HEALTHY, similarity=ZERO), "The adapter is untrained", "bad"),
}


@pytest.mark.parametrize("what", TABLE)
def test_findings(what):
    layer, title, level = TABLE[what]
    found = {finding["title"]: finding for finding in findings(routing_of(layer))}
    assert found[title]["level"] == level
    assert found[title]["where"] == (["model.layers.0.up"] if level == "bad" else [])
    assert found[title]["text"].endswith(".")
    assert found[title]["numbers"]


def test_the_bad_comes_first():
    levels = [finding["level"] for finding in findings(routing_of(layer_of({"icd": [0.5, 0.5, 0.0, 0.0]})))]
    assert levels == sorted(levels, key=["bad", "note", "good"].index)
    assert levels[0] == "bad"


def test_numbers_say_what_the_text_says():
    routing = routing_of(
        layer_of({"icd": [0.5, 0.4, 0.1, 0.0]}), layer_of({"icd": [0.4, 0.4, 0.1, 0.1]}, name="model.layers.1.up")
    )
    found = next(finding for finding in findings(routing) if "dead" in finding["title"])
    names = {"model.layers.0.up": ["3"]}
    assert found["numbers"] == {"dead": 1, "experts": 8, "threshold": 0.01, "tokens": 100, "names": names}
    assert found["where"] == ["model.layers.0.up"]
    assert found["text"].startswith(
        "1 of 8 experts get less than 1% of an even share of the weight over these 100 tokens"
    )


@pytest.mark.parametrize(("tokens", "chosen", "enough"), [(10, 4, True), (9, 4, False), (20, 2, True), (19, 2, False)])
def test_of_few_tokens_it_is_not_said_that_experts_are_dead(tokens, chosen, enough):
    layer = layer_of({"icd": [0.5, 0.4, 0.1, 0.0]}, chosen=chosen) | {"tokens": tokens}
    found = next(finding for finding in findings(routing_of(layer)) if "dead" in finding["title"])
    assert found["level"] == ("bad" if enough else "note")
    assert f"{tokens} tokens" in found["text"]


@pytest.mark.parametrize("method", ["MOELoRA", "MoLoRA", "Med-MoE-LoRA", "AT-MoE", "another"])
def test_what_is_advised_is_what_the_method_has(method):
    even = layer_of(EVEN, entropy=math.log(4), similarity=cosines(1.0))
    layers = layer_of({"icd": [1.0, 0.0, 0.0, 0.0]}, name="model.layers.1.up"), even
    said = " ".join(finding["text"] for finding in findings(routing_of(*layers, method=method)))
    assert said.count("ry ") >= 4  # "try", "Try"
    for word, methods in {
        "balance_loss": ["MoLoRA", "Med-MoE-LoRA"],
        "top_k": ["MoLoRA"],
        " temperature": ["Med-MoE-LoRA"],
        "group_temperature": ["AT-MoE"],
    }.items():
        assert (word in said) == (method in methods), word
    assert all("" in texts for texts in ADVICE.values())


def test_experts_that_are_meant_to_be_idle_are_not_called_dead():
    base = layer_of({"icd": [0.0, 0.4, 0.3, 0.3]}, names=["base 0", "0", "1", "2"])
    general = layer_of({"icd": [0.4, 0.3, 0.3, 0.0]}, names=["f/a", "f/b", "s/c", "general"], group_of=[0, 0, 1, -1])
    assert "No dead experts" in titles(routing_of(base))
    assert "No dead experts" in titles(routing_of(general))


def test_experts_that_stand_apart_do_not_make_a_collapse():
    grouped = {"names": ["f/a", "f/b", "s/c", "general"], "group_of": [0, 0, 1, -1]}
    fixed = layer_of({"icd": [0.05 / 3] * 3 + [0.95]}, **grouped, entropy=0.24)
    assert titles(routing_of(fixed, method="AT-MoE"))["The load is spread"] == "good"
    assert titles(routing_of(fixed, method="AT-MoE"))["Routers decide"] == "good"  # by what is beside the general one
    one = layer_of({"icd": [0.05, 0.0, 0.0, 0.95]}, **grouped, entropy=0.2)
    assert titles(routing_of(one, method="AT-MoE"))["Routing has collapsed to few experts"] == "bad"
    assert titles(routing_of(one, method="AT-MoE"))["2 dead experts"] == "bad"
    base = layer_of({"icd": [0.97, 0.01, 0.01, 0.01]}, names=["base 0", "0", "1", "2"])
    assert titles(routing_of(base, method="Med-MoE-LoRA"))["The load is spread"] == "good"


@pytest.mark.parametrize(("method", "level"), [("MOELoRA", "bad"), ("MoLoRA", "note"), ("AT-MoE", "note")])
def test_the_same_mean_load_is_the_same_lora_only_where_the_task_alone_decides(method, level):
    alike = {"a": [0.7, 0.1, 0.1, 0.1], "b": [0.7, 0.1, 0.1, 0.1]}
    (found,) = [f for f in findings(routing_of(layer_of(alike), method=method)) if "Tasks" in f["title"]]
    assert found["level"] == level
    assert ("all tasks have the same LoRA" in found["text"]) == (method == "MOELoRA")
    assert ("mean load does not tell" in found["text"]) == (method != "MOELoRA")


def test_tasks_that_differ_by_no_more_than_rows_do_are_not_told_apart():
    loads = {"a": [0.4, 0.3, 0.1, 0.2], "b": [0.2, 0.3, 0.3, 0.2]}
    bits = divergence(list(loads.values()))
    for chance, title in {0.0: "Tasks differ in part", 0.9 * bits: "Tasks have the same mean load"}.items():
        assert title in titles(routing_of(layer_of(loads, chance=chance), method="MoLoRA"))
    assert titles(routing_of(layer_of(loads, chance=None), method="MoLoRA"))["Too few rows to compare tasks"] == "note"


def test_what_tasks_share_is_said_and_random_gates_are_not_called_separate():
    random = np.random.default_rng(0)
    for count in (2, 4, 8):
        scores = np.exp(random.normal(0, 0.5, (count, 8)))
        loads = dict(zip("abcdefgh", (scores / scores.sum(1, keepdims=True)).tolist(), strict=False))
        layer = layer_of(loads, names="01234567", similarity=None)
        (found,) = [f for f in findings(routing_of(layer)) if "Tasks" in f["title"]]
        pairs = [sum(map(min, loads[a], loads[b])) for a in loads for b in loads if a < b]
        assert found["title"] == "Tasks differ in part"
        assert f"Two tasks share {sum(pairs) / len(pairs):.0%} of their weight" in found["text"]


def test_a_new_adapter_is_untrained_and_nothing_else():
    assert titles(routing_of(layer_of({"icd": [1.0, 0.0, 0.0, 0.0]}, similarity=ZERO))) == {
        "The adapter is untrained": "bad"
    }


def test_one_task_is_not_compared():
    assert not any("Tasks" in title for title in titles(routing_of(layer_of({"icd": [0.25] * 4}))))
    assert not any("Tasks" in title for title in titles(routing_of(layer_of({"icd": [0.25] * 4}) | {"tasks": {}})))


def test_the_closest_tasks_are_named():
    loads = {"a": [0.7, 0.1, 0.1, 0.1], "b": [0.1, 0.7, 0.1, 0.1], "c": [0.1, 0.69, 0.11, 0.1]}
    found = next(f for f in findings(routing_of(layer_of(loads))) if "Tasks" in f["title"])
    assert found["numbers"]["closest"] == ["b", "c"]
    assert "closest are b and c with 99%" in found["text"]


def test_some_even_places_of_many_are_a_note():
    places = [layer_of(HEALTHY, name=f"model.layers.{i}.up") for i in range(3)]
    places[1] |= {"entropy": math.log(4)}
    found = next(f for f in findings(routing_of(*places)) if "uniform" in f["title"])
    assert (found["level"], found["title"]) == ("note", "Routing is uniform in 1 layer")
    assert found["where"] == ["model.layers.1.up"]


def test_of_experts_that_only_some_tokens_get_it_is_not_said_that_the_router_decides_nothing():
    layer = layer_of(EVEN, entropy=math.log(2), chosen=2.0)
    assert undecided_entropy(layer) is None
    assert not any("uniform" in title or "decide" in title for title in titles(routing_of(layer)))


@pytest.mark.parametrize(
    "load",
    [
        [0.125, 0.125, 0.25, 0.5],  # even groups, and even experts in each
        [0.5 / 3, 0.5 / 3, 0.5 / 3, 0.5],  # even experts, whatever their groups
    ],
)
def test_even_weights_of_groups_with_a_general_expert(load):
    even = -sum(w * math.log(w) for w in load)
    names, group_of = ["f/a", "f/b", "s/c", "general"], [0, 0, 1, -1]
    layer = layer_of({"icd": load}, names=names, group_of=group_of, entropy=even)
    assert undecided_entropy(layer) == pytest.approx(even)
    assert titles(routing_of(layer))["Routing is uniform"] == "bad"
    assert "Routing is uniform" not in titles(routing_of(layer | {"entropy": 0.98 * even}))


def test_a_general_expert_that_has_all_leaves_nothing_to_decide():
    group_of = [0, 0, 1, -1]
    layer = layer_of({"icd": [0.0, 0.0, 0.0, 1.0]}, names=["a", "b", "c", "general"], group_of=group_of, entropy=0.0)
    assert undecided_entropy(layer) is None


@pytest.mark.parametrize(
    ("loads", "bits"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], 0.0),
        ([[1.0, 0.0], [0.0, 1.0]], 1.0),
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 2.0),
        ([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], 0.5),
        ([[0.5, 0.5], [0.62, 0.38]], 0.0106),
        ([[0.68, 0.32], [0.32, 0.68]], 0.0956),
    ],
)
def test_divergence_in_bits(loads, bits):
    assert divergence(loads) == pytest.approx(bits, abs=5e-4)


def test_separation_is_from_the_same_load_to_none_in_common_however_many_tasks():
    for count in (2, 3, 5):
        own = np.eye(5)[:count].tolist()
        assert separation(own) == pytest.approx(1)
        assert overlap(own).tolist() == np.eye(count).tolist()
        assert separation([[0.2] * 5] * count) == pytest.approx(0)
    assert separation([[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]) <= 1  # more tasks than experts


@pytest.mark.parametrize(("load", "chosen", "value"), [
    ([0.25] * 4, 4, 1.0), ([1.0, 0, 0, 0], 4, 0.0), ([0.5, 0.5, 0, 0], 2, 0.0), ([0.25] * 4, 2, 1.0),
    ([1 / 3] * 3 + [0], 1, 2 / 3), ([0.5, 0.5, 0, 0], 3.9, 1 / 3),
])  # fmt: skip
def test_spread_is_from_collapse_to_an_even_load(load, chosen, value):
    assert spread(load, chosen) == pytest.approx(value)


@pytest.mark.parametrize(("tasks", "rows", "experts"), [(2, 200, 4), (5, 100, 3)])
def test_chance_is_what_tasks_without_a_difference_come_to(tasks, rows, experts):
    random, load = np.random.default_rng(0), np.arange(1, experts + 1) / sum(range(1, experts + 1))
    found = random.multinomial(rows, load, size=(2000, tasks)) / rows
    measured = np.mean([divergence(own) for own in found])
    variance = [(load * (1 - load) / rows).tolist()] * tasks
    chance = chance_divergence([load.tolist()] * tasks, variance)
    assert chance == pytest.approx((experts - 1) * (tasks - 1) / (2 * tasks * rows * math.log(2)))
    assert chance == pytest.approx(measured, rel=0.05)


def test_layers_without_known_similarity_and_no_places():
    assert findings(routing_of()) == []
    assert not any("xperts" in title and "dead" not in title for title in titles(routing_of(_without_similarity())))


def _without_similarity():
    return layer_of(HEALTHY) | {"similarity": None}


def test_the_routing_is_left_as_it_was():
    routing = routing_of(layer_of(HEALTHY))
    before = copy.deepcopy(routing)
    findings(routing)
    assert routing == before
