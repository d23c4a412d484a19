"""The plain-language summary: tables of routings and what is said of them."""

import copy
import math

import pytest

from peft_moe.report.findings import divergence, findings, undecided_entropy

EYE = [[float(i == j) for j in range(4)] for i in range(4)]


def layer_of(loads, *, entropy=0.7, similarity=EYE, names="0123", chosen=None, group_of=None, name="model.layers.0.up"):
    """A place with tasks of these loads, one token each."""
    load = [sum(column) / len(loads) for column in zip(*loads.values(), strict=True)]
    return {
        "name": name,
        "block": 0,
        "module": "up",
        "experts": list(names),
        "ranks": [2] * len(names),
        "group_of": group_of,
        "tokens": len(loads),
        "load": load,
        "top1": load,
        "chosen": [1.0] * len(names),
        "entropy": entropy,
        "effective_experts": math.exp(-sum(v * math.log(v) for v in load if v)),
        "chosen_per_token": len(names) if chosen is None else chosen,
        "group_load": None,
        "tasks": {task: {"tokens": 1, "load": load, "entropy": entropy} for task, load in loads.items()},
        "similarity": similarity,
    }


def routing_of(*layers):
    tasks = sorted({task for layer in layers for task in layer["tasks"]})
    return {"format": 1, "method": "MOELoRA", "tasks": tasks, "layers": list(layers)}


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
    "even": (layer_of(EVEN, entropy=math.log(4)), "Routing is uniform", "bad"),
    "nearly even": (layer_of(EVEN, entropy=0.985 * math.log(4)), "Routers decide", "good"),
    "alike": (layer_of({"a": [0.7, 0.1, 0.1, 0.1], "b": [0.7, 0.1, 0.1, 0.1]}), "Tasks share everything", "bad"),
    "in part": (layer_of({"a": [0.7, 0.1, 0.1, 0.1], "b": [0.4, 0.3, 0.1, 0.2]}), "Tasks differ in part", "good"),
    "copies": (layer_of(HEALTHY, similarity=cosines(0.96)), "Experts are copies", "bad"),
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
    assert found["numbers"] == {"dead": 1, "experts": 8, "threshold": 0.01, "names": {"model.layers.0.up": ["3"]}}
    assert found["where"] == ["model.layers.0.up"]
    assert found["text"].startswith("1 of 8 experts")


def test_experts_that_are_meant_to_be_idle_are_not_called_dead():
    base = layer_of({"icd": [0.0, 0.4, 0.3, 0.3]}, names=["base 0", "0", "1", "2"])
    general = layer_of({"icd": [0.4, 0.3, 0.3, 0.0]}, names=["f/a", "f/b", "s/c", "general"], group_of=[0, 0, 1, -1])
    assert "No dead experts" in titles(routing_of(base))
    assert "No dead experts" in titles(routing_of(general))


def test_one_task_is_not_compared():
    assert not any("Tasks" in title for title in titles(routing_of(layer_of({"icd": [0.25] * 4}))))
    assert not any("Tasks" in title for title in titles(routing_of(layer_of({"icd": [0.25] * 4}) | {"tasks": {}})))


def test_the_closest_tasks_are_named():
    loads = {"a": [0.7, 0.1, 0.1, 0.1], "b": [0.1, 0.7, 0.1, 0.1], "c": [0.1, 0.69, 0.11, 0.1]}
    found = next(f for f in findings(routing_of(layer_of(loads))) if "Tasks" in f["title"])
    assert found["numbers"]["closest"] == ["b", "c"]
    assert "Closest are b and c" in found["text"]


def test_some_even_places_of_many_are_a_note():
    places = [layer_of(HEALTHY, name=f"model.layers.{i}.up") for i in range(3)]
    places[1] |= {"entropy": math.log(4)}
    found = next(f for f in findings(routing_of(*places)) if "uniform" in f["title"])
    assert (found["level"], found["title"]) == ("note", "Routing is uniform in 1 places")
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


def test_places_without_known_similarity_and_no_places():
    assert findings(routing_of()) == []
    assert not any("xperts" in title and "dead" not in title for title in titles(routing_of(_without_similarity())))


def _without_similarity():
    return layer_of(HEALTHY) | {"similarity": None}


def test_the_routing_is_left_as_it_was():
    routing = routing_of(layer_of(HEALTHY))
    before = copy.deepcopy(routing)
    findings(routing)
    assert routing == before
