"""What is healthy about a routing and what is not, in plain words with the numbers.

Shapes: E experts · T tasks
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..routing.measures import COLLAPSED, Layer, divergence, entropy, is_dense, load_of, meant, spread
from ..routing.statistics import DEAD
from .task_findings import compare_tasks
from .wording import Finding, advice, count, finding, named

# Tokens that an expert of a layer must have been there for, had all got as many, before it is called dead.
ENOUGH = 10
# Entropy of a token's weights, as a part of that of even ones. At 0.99, weights of 4 experts differ from even ones by
# a sixth of their size, root mean square.
UNDECIDED = 0.99
# Size of the cosine of two experts' updates, above which one could stand for both: what differs is below a third.
COPY = 0.95


def findings(routing: Mapping[str, Any]) -> list[Finding]:
    """A summary of a routing, the bad first, then what to note, then what is good.

    Of an adapter whose updates are all zero there is nothing else to say.

    Args:
        routing: what `Routing.to_dict()` gives.

    Returns:
        dicts of `level` ("bad", "note" or "good"), `title`, `text`, `where` (names of layers) and `numbers`.

    Example:
        >>> for finding in findings(Routing.read("report/routing.json").to_dict()):
        ...     print(finding["level"], finding["title"])
    """
    layers, method = routing["layers"], routing["method"]
    if not layers:
        return []
    untrained = _untrained(layers)
    if untrained is not None and untrained["numbers"]["zero"] == untrained["numbers"]["layers"]:
        return [untrained]
    found = [
        untrained,
        _dead(layers, method),
        _few(layers, method),
        _undecided(layers, method),
        compare_tasks(layers, method),
        _copies(layers, method),
    ]
    there = [one for one in found if one is not None]
    return sorted(there, key=lambda one: ("bad", "note", "good").index(one["level"]))


def _untrained(layers: Sequence[Layer]) -> Finding | None:
    """All updates are zero."""
    known = [layer for layer in layers if layer["similarity"] is not None]
    zero = [layer for layer in known if not any(map(any, layer["similarity"]))]
    if not zero:
        return None
    numbers = {"layers": len(known), "zero": len(zero)}
    if len(zero) == len(known):
        text = (
            f"All experts' updates are zero in all {len(known)} layers, as in a new adapter: the model does what its "
            "base model does. Train it, or look whether the weights were saved and loaded."
        )
        return finding("bad", "The adapter is untrained", text, zero, numbers)
    text = (
        f"All experts' updates are zero in {len(zero)} of {len(known)} layers, which then do what the base model does. "
        "Look whether these layers were to be trained."
    )
    return finding("bad", f"{count(len(zero), 'layer')} untrained", text, zero, numbers)


def _dead(layers: Sequence[Layer], method: str) -> Finding:
    known = [layer for layer in layers if layer["tokens"] * layer["chosen_per_token"] >= ENOUGH * len(layer["experts"])]
    tokens = max(layer["tokens"] for layer in layers)
    if not known:
        text = f"{count(tokens, 'token')} are too few to say of an expert that nobody uses it: give more rows."
        return finding("note", "Too few tokens for dead experts", text, (), {"tokens": tokens, "enough": ENOUGH})
    dead = {layer["name"]: names for layer in known if (names := _dead_in(layer))}
    n, total = sum(map(len, dead.values())), sum(len(meant(layer)) for layer in known)
    numbers = {"dead": n, "experts": total, "threshold": DEAD, "tokens": tokens, "names": dead}
    if not n:
        text = (
            f"Over {tokens} tokens each of the {total} experts gets at least {DEAD:.0%} of an even share in its layer."
        )
        return finding("good", "No dead experts", text, (), numbers)
    text = (
        f"{n} of {total} experts get less than {DEAD:.0%} of an even share of the weight over these {tokens} "
        f"tokens. If other rows do not use them either, they are wasted: try {advice('dead', method)}."
    )
    return finding("bad", count(n, "dead expert"), text, named(layers, dead), numbers)


def _dead_in(layer: Layer) -> list[str]:
    experts = meant(layer)
    load = load_of(layer, experts)
    return [layer["experts"][i] for i, share in zip(experts, load, strict=False) if share < DEAD / len(experts)]


def _few(layers: Sequence[Layer], method: str) -> Finding | None:
    wide = {layer["name"]: load for layer in layers if len(load := load_of(layer, meant(layer))) > 1}
    if not wide:
        return None
    chosen = {layer["name"]: sum(layer["chosen"][i] for i in meant(layer)) for layer in layers}
    few = {name: value for name, load in wide.items() if (value := spread(load, chosen[name])) < COLLAPSED}
    mean = sum(math.exp(entropy(load)) for load in wide.values()) / len(wide)
    experts = sum(map(len, wide.values())) / len(wide)
    numbers = {"mean_effective_experts": mean, "mean_experts": experts, "threshold": COLLAPSED, "few": len(few)}
    beside = (
        ", beside the general expert," if any(layer["group_of"] and -1 in layer["group_of"] for layer in layers) else ""
    )
    used = f"on average the load{beside} is as uneven as if {mean:.1f} of {experts:.3g} experts were used equally"
    if few:
        text = (
            f"In {len(few)} of {len(wide)} layers nearly all tokens go to the same few experts; {used}. With rows of "
            f"one kind that may be meant; otherwise try {advice('few', method)}."
        )
        return finding("bad", "Routing has collapsed to few experts", text, named(layers, few), numbers)
    return finding(
        "good", "The load is spread", f"No layer sends all tokens to the same few experts: {used}.", (), numbers
    )


def undecided_entropy(layer: Layer) -> float | None:
    """Entropy, in nats, of the weights of a router whose scores are all equal; None where tokens get some experts only.

    Those that a token gets say nothing then of how near the choice was. A general expert keeps its mean weight. Equal
    scores give groups the same weight, or experts, where groups are not weighed by themselves: what is nearer.
    """
    experts, group_of = layer["experts"], layer["group_of"]
    if not is_dense(layer["chosen_per_token"], len(experts)):
        return None
    if group_of is None:
        return math.log(len(experts))
    shares = load_of(layer, meant(layer))
    if not shares:
        return None
    groups = [group for group in group_of if group >= 0]
    by_group = [1 / len(set(groups)) / groups.count(group) for group in groups]
    even = [by_group, [1 / len(groups)] * len(groups)]
    nearest = min(even, key=lambda weights: divergence([weights, shares]))
    general = _general(layer)
    return entropy([general, 1 - general]) + (1 - general) * entropy(nearest)


def _general(layer: Layer) -> float:
    """The load of AT-MoE's general expert."""
    return sum(load for load, group in zip(layer["load"], layer["group_of"] or (), strict=False) if group < 0)


def _undecided(layers: Sequence[Layer], method: str) -> Finding | None:
    """Weights near even for every token, of the experts that there is a choice of."""
    parts: dict[str, float] = {}
    for layer in layers:
        general = _general(layer)
        beside = entropy([general, 1 - general])  # λ is the same for all tokens, and no choice
        most = undecided_entropy(layer)
        if most is not None and most - beside > 1e-9:
            parts[layer["name"]] = (layer["entropy"] - beside) / (most - beside)
    if not parts:
        return None
    even = {name: part for name, part in parts.items() if part >= UNDECIDED}
    mean = sum(parts.values()) / len(parts)
    numbers = {"mean_part_of_even_entropy": mean, "threshold": UNDECIDED, "undecided": len(even), "layers": len(parts)}
    if not even:
        text = f"The entropy of a token's weights is {mean:.1%} of that of even weights, on average over layers."
        return finding("good", "Routers decide", text, (), numbers)
    text = (
        f"In {len(even)} of {len(parts)} layers a token's weights are nearly even: their entropy is {UNDECIDED:.0%} or "
        f"more of the highest there is, so that the router decides next to nothing. Try {advice('undecided', method)}."
    )
    level = "bad" if 2 * len(even) > len(parts) else "note"
    title = "Routing is uniform" if level == "bad" else f"Routing is uniform in {count(len(even), 'layer')}"
    return finding(level, title, text, named(layers, even), numbers)


def _copies(layers: Sequence[Layer], method: str) -> Finding | None:
    """Pairs of experts with nearly the same update, or with one that is the other's mirror image."""
    pairs: list[float] = []
    copies: dict[str, list[str]] = {}
    for layer in layers:
        cosine = layer["similarity"] or []
        there = [i for i, row in enumerate(cosine) if row[i] != 0]
        for i, j in itertools.combinations(there, 2):
            pairs.append(abs(cosine[i][j]))
            if pairs[-1] > COPY:
                sign = "=" if cosine[i][j] > 0 else "= -"
                copies.setdefault(layer["name"], []).append(f"{layer['experts'][i]} {sign} {layer['experts'][j]}")
    if not pairs:
        return None
    n, mean, most = sum(map(len, copies.values())), sum(pairs) / len(pairs), max(pairs)
    numbers = {"pairs": len(pairs), "copies": n, "mean_cosine": mean, "max_cosine": most, "threshold": COPY}
    if n:
        text = (
            f"{n} of {len(pairs)} pairs of experts in the same layer have updates whose cosine is above {COPY} in "
            f"size (mean {mean:.2f}), a copy or mirror image: of two such experts one would do. "
            f"Try {advice('copies', method)}."
        )
        level = "bad" if 10 * n > len(pairs) else "note"
        return finding(level, "Experts are copies", text, named(layers, copies), numbers | {"names": copies})
    text = (
        f"The size of the cosine of two experts' updates is {mean:.2f} on average over {count(len(pairs), 'pair')}, "
        f"and at most {most:.2f}; 1 would be a copy or mirror image."
    )
    return finding("good", "Experts differ", text, (), numbers)
