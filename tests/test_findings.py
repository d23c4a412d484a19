"""Findings say what a routing is like, on routings that are made to be so."""

import math

import pytest

from peft_moe.report.findings import divergence, findings


def layer(loads, *, chosen=None, entropy=1.0, tasks=None, cosine=0.1, name="model.layers.0.up_proj", zero=False):
    e = len(loads)
    effective = math.exp(-sum(x * math.log(x) for x in loads if x > 0))
    return {
        "name": name,
        "experts": [str(i) for i in range(e)],
        "load": loads,
        "entropy": entropy,
        "effective_experts": effective,
        "chosen_per_token": e if chosen is None else chosen,
        "tasks": {task: {"load": load} for task, load in (tasks or {}).items()},
        "similarity": [[0.0 if zero else 1.0 if i == j else cosine for j in range(e)] for i in range(e)],
    }


def routing(*layers, method="MoLoRA"):
    return {"method": method, "layers": list(layers), "tasks": sorted({t for x in layers for t in x["tasks"]})}


EVEN = [0.25] * 4
TASKS = {"a": [0.7, 0.1, 0.1, 0.1], "b": [0.1, 0.1, 0.1, 0.7]}
CASES = {
    "healthy": (layer([0.4, 0.3, 0.2, 0.1], chosen=2, tasks=TASKS), {}),
    "dead": (layer([0.5, 0.3, 0.199, 0.001], chosen=2), {"dead of 4": "bad"}),
    "collapsed, one expert": (layer([0.991, 0.003, 0.003, 0.003], entropy=0.1), {"Collapse": "bad"}),
    "collapsed, two of top 2": (layer([0.499, 0.498, 0.0015, 0.0015], chosen=2), {"Collapse": "bad", "dead": "bad"}),
    "even": (layer(EVEN, entropy=math.log(4)), {"Even weights": "bad"}),
    "spread over tokens": (layer(EVEN, entropy=0.3), {}),
    "even load of top 2": (layer(EVEN, chosen=2, entropy=math.log(2)), {}),
    "tasks alike": (layer([0.4, 0.3, 0.2, 0.1], tasks={"a": EVEN, "b": EVEN}), {"Tasks share everything": "note"}),
    "copies": (layer([0.4, 0.3, 0.2, 0.1], cosine=0.99), {"copies": "note"}),
    "untrained": (layer(EVEN, entropy=0.4, zero=True), {"change nothing": "bad"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_found_and_nothing_else(case):
    one, expected = CASES[case]
    found = findings(routing(one))
    wrong = {finding["title"]: finding["level"] for finding in found if finding["level"] != "good"}
    assert len(wrong) == len(expected), wrong
    for title, level in expected.items():
        assert [given for name, given in wrong.items() if title in name] == [level]
    assert [f["level"] for f in found] == sorted((f["level"] for f in found), key=("bad", "note", "good").index)


def test_what_is_good_is_said_too_with_numbers():
    good = {f["title"]: f for f in findings(routing(CASES["healthy"][0])) if f["level"] == "good"}
    assert set(good) == {"No dead experts", "No collapse", "Tasks have experts of their own", "Experts are no copies"}
    assert good["Tasks have experts of their own"]["numbers"]["mean"] == pytest.approx(divergence(list(TASKS.values())))


def test_layers_are_named():
    bad, well = CASES["dead"][0] | {"name": "here"}, CASES["healthy"][0]
    (dead,) = [f for f in findings(routing(bad, well)) if "dead of" in f["title"]]
    assert dead["where"] == ["here"]
    assert dead["numbers"] == {"dead": 1, "experts": 8}


def test_weights_by_task_are_not_called_collapsed():
    one = CASES["collapsed, one expert"][0]
    assert not [f for f in findings(routing(one, method="MOELoRA")) if "ollapse" in f["title"]]


@pytest.mark.parametrize(
    ("loads", "bits"),
    [([[1, 0], [0, 1]], 1.0), ([[0.5, 0.5]] * 3, 0.0), ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], math.log2(3))],
)
def test_divergence_in_bits(loads, bits):
    assert divergence(loads) == pytest.approx(bits)
