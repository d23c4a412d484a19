"""What is healthy in a routing and what is not, in plain sentences with their numbers.

Rules of thumb about the routing alone: none of them says whether answers are good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from statistics import mean
from typing import Any

# An expert with less than this part of an even share of the weight is dead, as in `RoutingStatistics`.
DEAD = 0.01
# Collapse: hardly more experts in effect than a single token gets, as in `callbacks.is_collapsed`.
COLLAPSED = 1.1
# Undecided: a token's weights have at least this part of the entropy of even ones ...
UNDECIDED = 0.98
# ... and all experts get nearly the same; experts in effect as a part of those that there are.
EVEN = 0.98
# Tasks: the Jensen-Shannon divergence of their loads in bits, of the 1 that two tasks without a common expert have.
SHARED, APART = 0.005, 0.05
# Copies: cosine of two experts' updates.
COPIES = 0.95

Finding = dict[str, Any]


def findings(routing: Mapping[str, Any]) -> list[Finding]:
    """Sentences about a routing: what is bad first, then what to note, then what is good.

    Args:
        routing: of `collect`, format 1.

    Returns:
        `level` ("bad", "note" or "good"), `title`, `text`, `where` (names of layers) and `numbers`.
    """
    found = [finding for look in LOOKS if (finding := look(routing)) is not None]
    return sorted(found, key=lambda finding: ("bad", "note", "good").index(finding["level"]))


def divergence(loads: Sequence[Sequence[float]]) -> float:
    """The Jensen-Shannon divergence of several distributions in bits, each with the same weight; 0 if they are alike.

    Lin 1991, Divergence Measures Based on the Shannon Entropy (eq. 5.1).
    """
    middle = [mean(column) for column in zip(*loads, strict=True)]
    return max(0.0, _bits(middle) - mean([_bits(load) for load in loads]))


def _untrained(routing: Mapping[str, Any]) -> Finding | None:
    layers = [layer for layer in routing["layers"] if layer["similarity"] is not None]
    still = [layer["name"] for layer in layers if not any(row[i] for i, row in enumerate(layer["similarity"]))]
    if not still:
        return None
    return _finding(
        "bad",
        f"Experts of {len(still)} of {len(layers)} places change nothing",
        "All their updates are zero, as those of a new adapter are: it has not been trained, or its weights were not "
        "loaded.",
        still,
        places=len(still),
    )


def _dead(routing: Mapping[str, Any]) -> Finding | None:
    dead = {
        layer["name"]: [
            name
            for name, load in zip(layer["experts"], layer["load"], strict=True)
            if load < DEAD / len(layer["load"]) and not name.startswith("base")
        ]
        for layer in routing["layers"]
    }
    where, count = [name for name, names in dead.items() if names], sum(map(len, dead.values()))
    experts = sum(len(layer["experts"]) for layer in routing["layers"])
    if not count:
        return _finding(
            "good", "No dead experts", f"Each of the {experts} experts gets at least a hundredth of an even share."
        )
    return _finding(
        "bad" if count > experts / 10 else "note",
        f"{count} dead of {experts} experts",
        f"In {len(where)} of {len(dead)} places there are experts with less than a hundredth of an even share of the "
        "weight; they hardly take part. If that holds over more data, train with a balance loss or with fewer experts.",
        where,
        dead=count,
        experts=experts,
    )


def _collapsed(routing: Mapping[str, Any]) -> Finding | None:
    if routing["method"] == "MOELoRA":  # its weights are those of tasks; `_tasks` and `_undecided` look at them
        return None
    layers = [layer for layer in routing["layers"] if len(layer["experts"]) > 1]
    where = [layer["name"] for layer in layers if layer["effective_experts"] < COLLAPSED * _each_gets(layer)]
    fewest = min(layers, key=lambda layer: layer["effective_experts"] / len(layer["experts"]), default=None)
    if fewest is None:
        return None
    least = f"{fewest['effective_experts']:.1f} of {len(fewest['experts'])} experts in effect in {fewest['name']}"
    if not where:
        return _finding("good", "No collapse", f"The work is spread everywhere; at the least {least}.")
    return _finding(
        "bad",
        f"Collapse in {len(where)} of {len(layers)} places",
        f"Nearly all tokens use the same experts there: {least}. A balance loss with a larger coefficient, or a "
        "smaller learning rate, spreads them.",
        where,
        effective_experts=fewest["effective_experts"],
        experts=len(fewest["experts"]),
    )


def _undecided(routing: Mapping[str, Any]) -> Finding | None:
    layers = [layer for layer in routing["layers"] if len(layer["experts"]) > 1]
    where = [
        layer["name"]
        for layer in layers
        if layer["effective_experts"] >= EVEN * len(layer["experts"])
        and layer["entropy"] >= UNDECIDED * math.log(max(layer["chosen_per_token"], 1))
        and layer["chosen_per_token"] > len(layer["experts"]) - 0.5
    ]
    if not where:
        return None
    share = mean(layer["entropy"] / math.log(len(layer["experts"])) for layer in layers if layer["name"] in where)
    return _finding(
        "note" if len(where) < len(layers) / 2 else "bad",
        f"Even weights in {len(where)} of {len(layers)} places",
        f"Each token gets about the same of every expert ({share:.1%} of the largest entropy), so that the experts are "
        "one LoRA in parts there. Train longer or with a larger learning rate; a stock LoRA of the same rank is the "
        "thing to compare with.",
        where,
        entropy=share,
    )


def _tasks(routing: Mapping[str, Any]) -> Finding | None:
    between = {
        layer["name"]: divergence([values["load"] for values in layer["tasks"].values()])
        for layer in routing["layers"]
        if len(layer["tasks"]) > 1
    }
    if not between:
        return None
    largest = max(between, key=lambda name: between[name])
    average, tasks = mean(between.values()), len(routing["tasks"])
    add = partial(_finding, mean=average, largest=between[largest])
    measured = (
        f"The loads of the {tasks} tasks are {average:.3f} bits apart in the mean (Jensen-Shannon; 0 is no "
        f"difference), {between[largest]:.3f} in {largest}."
    )
    if between[largest] < SHARED:
        text = " All tasks get the same experts: routing does not tell them apart."
        return add("note", "Tasks share everything", measured + text)
    if average < APART:
        return add("note", "Tasks share most experts", measured, [largest])
    return add("good", "Tasks have experts of their own", measured, [largest])


def _copies(routing: Mapping[str, Any]) -> Finding | None:
    pairs = 0
    where: list[str] = []
    cosines: list[float] = []
    for layer in routing["layers"]:
        table = layer["similarity"] or []
        there = [i for i, row in enumerate(table) if row[i]]  # those that change anything
        alike = [table[i][j] for i, j in combinations(there, 2)]
        cosines += alike
        if close := sum(value > COPIES for value in alike):
            pairs, where = pairs + close, [*where, layer["name"]]
    if not cosines:
        return None
    average = mean(map(abs, cosines))
    if not pairs:
        text = f"The cosine of two experts' updates is {average:.2f} in the mean, {max(cosines):.2f} at the most."
        return _finding("good", "Experts are no copies", text, mean=average, largest=max(cosines))
    return _finding(
        "note",
        f"{pairs} of {len(cosines)} pairs of experts are copies",
        f"Their updates point the same way (cosine above {COPIES}), so that choosing between them changes little. They "
        "may have started alike or be the same LoRA twice.",
        where,
        pairs=pairs,
        mean=average,
    )


LOOKS: tuple[Callable[[Mapping[str, Any]], Finding | None], ...] = (
    _untrained,
    _dead,
    _collapsed,
    _undecided,
    _tasks,
    _copies,
)


def _each_gets(layer: Mapping[str, Any]) -> float:
    """How many experts a token gets; 1 where it gets a part of each."""
    chosen = float(layer["chosen_per_token"])
    return 1.0 if chosen > len(layer["experts"]) - 0.5 else chosen


def _bits(load: Sequence[float]) -> float:
    return -sum(x * math.log2(x) for x in load if x > 0)


def _finding(level: str, title: str, text: str, where: Sequence[str] = (), **numbers: float) -> Finding:
    return {"level": level, "title": title, "text": text, "where": list(where), "numbers": numbers}
