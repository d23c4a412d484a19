"""What is healthy about a routing and what is not, in plain words with the numbers.

Shapes: E experts · T tasks
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

Finding = dict[str, Any]
Layer = Mapping[str, Any]

# An expert with less than this part of an even share is called dead, as in training's statistics.
DEAD = 0.01
# 0 is all weight on one expert, 1 an even load; below this, 8 experts are used like 2.4 or fewer.
FEW = 0.2
# Entropy of a token's weights, as a part of that of even ones. At 0.99, weights of 4 experts differ from even ones by
# a sixth of their size, root mean square.
UNDECIDED = 0.99
# Jensen-Shannon divergence between tasks' loads, in bits: 0 is the same load, 1 two tasks that share no expert. Two
# experts with (0.5, 0.5) for one task and (0.62, 0.38) for the other are at 0.01, (0.68, 0.32) and (0.32, 0.68) at 0.1.
ALIKE, APART = 0.01, 0.1
# Cosine of two experts' updates, above which one could stand for both: what differs is below a third of either.
COPY = 0.95

BASE, GENERAL = "base ", "general"  # experts that are meant to be as they are


def findings(routing: Mapping[str, Any]) -> list[Finding]:
    """A summary of a routing, the bad first, then what to note, then what is good.

    Args:
        routing: what `Routing.to_dict()` gives.

    Returns:
        dicts of `level` ("bad", "note" or "good"), `title`, `text`, `where` (names of layers) and `numbers`.

    Example:
        >>> for finding in findings(Routing.read("report/routing.json").to_dict()):
        ...     print(finding["level"], finding["title"])
    """
    layers = routing["layers"]
    if not layers:
        return []
    found = [
        _untrained(layers),
        _dead(layers),
        _few(layers),
        _undecided(layers),
        _tasks(layers, routing["tasks"]),
        _copies(layers),
    ]
    there = [finding for finding in found if finding is not None]
    return sorted(there, key=lambda finding: ("bad", "note", "good").index(finding["level"]))


def divergence(loads: Sequence[Sequence[float]]) -> float:
    """Jensen-Shannon divergence of distributions (T, E), each with the same weight, in bits: from 0 to log2 T."""
    mean = [sum(column) / len(loads) for column in zip(*loads, strict=True)]
    return max(0.0, (_entropy(mean) - sum(map(_entropy, loads)) / len(loads)) / math.log(2))


def undecided_entropy(layer: Layer) -> float | None:
    """Entropy, in nats, of the weights of a router whose scores are all equal; None where tokens get some experts only.

    Those that a token gets say nothing then of how near the choice was. A general expert keeps its mean weight. Equal
    scores give groups the same weight, or experts, where groups are not weighed by themselves: what is nearer.
    """
    experts, group_of = layer["experts"], layer["group_of"]
    if layer["chosen_per_token"] < len(experts) - 0.5:
        return None
    if group_of is None:
        return math.log(len(experts))
    general = sum(load for load, group in zip(layer["load"], group_of, strict=True) if group < 0)
    load = [load for load, group in zip(layer["load"], group_of, strict=True) if group >= 0]
    if not sum(load):
        return None
    groups = [group for group in group_of if group >= 0]
    by_group = [1 / len(set(groups)) / groups.count(group) for group in groups]
    even = [by_group, [1 / len(groups)] * len(groups)]
    shares = [value / sum(load) for value in load]
    nearest = min(even, key=lambda weights: divergence([weights, shares]))
    return _entropy([general, 1 - general]) + (1 - general) * _entropy(nearest)


def _untrained(layers: Sequence[Layer]) -> Finding | None:
    """All updates are zero."""
    known = [layer for layer in layers if layer["similarity"] is not None]
    zero = [layer for layer in known if not any(map(any, layer["similarity"]))]
    if not zero:
        return None
    numbers = {"layers": len(known), "zero": len(zero)}
    if len(zero) == len(known):
        text = (
            f"All experts' updates are zero in all {len(known)} places, as in a new adapter: the model does what its "
            "base model does. Train it, or look whether the weights were saved and loaded."
        )
        return _finding("bad", "The adapter is untrained", text, zero, numbers)
    text = (
        f"All experts' updates are zero in {len(zero)} of {len(known)} places, which then do what the base model does. "
        "Look whether these layers were to be trained."
    )
    return _finding("bad", f"{len(zero)} places are untrained", text, zero, numbers)


def _dead(layers: Sequence[Layer]) -> Finding:
    dead = {layer["name"]: names for layer in layers if (names := _dead_in(layer))}
    count, total = sum(map(len, dead.values())), sum(len(list(_meant(layer))) for layer in layers)
    numbers = {"dead": count, "experts": total, "threshold": DEAD, "names": dead}
    if not count:
        text = f"Each of the {total} experts gets at least {DEAD:.0%} of an even share of the weight in its place."
        return _finding("good", "No dead experts", text, (), numbers)
    text = (
        f"{count} of {total} experts get less than {DEAD:.0%} of an even share of the weight over these rows. If other "
        "rows do not use them either, they are wasted: try a balance_loss, a lower learning rate, or fewer experts."
    )
    return _finding("bad", f"{count} dead expert{'s' * (count > 1)}", text, _named(layers, dead), numbers)


def _dead_in(layer: Layer) -> list[str]:
    even = 1 / len(layer["experts"])
    return [layer["experts"][i] for i in _meant(layer) if layer["load"][i] < DEAD * even]


def _meant(layer: Layer) -> list[int]:
    """Experts that the router is meant to use."""
    experts = enumerate(layer["experts"])
    if layer["group_of"] is not None:
        return [i for i, _ in experts if layer["group_of"][i] >= 0]
    return [i for i, name in experts if not name.startswith(BASE)]


def _few(layers: Sequence[Layer]) -> Finding | None:
    wide = [layer for layer in layers if len(layer["experts"]) > 1]
    spread = {layer["name"]: (layer["effective_experts"] - 1) / (len(layer["experts"]) - 1) for layer in wide}
    few = {name: value for name, value in spread.items() if value < FEW}
    mean = sum(layer["effective_experts"] for layer in wide) / len(wide) if wide else 0.0
    experts = sum(len(layer["experts"]) for layer in wide) / len(wide) if wide else 0.0
    numbers = {"mean_effective_experts": mean, "mean_experts": experts, "threshold": FEW, "few": len(few)}
    if not wide:
        return None
    used = f"by its load, a place uses its {experts:.3g} experts on average like {mean:.3g} with even shares"
    if few:
        text = (
            f"In {len(few)} of {len(wide)} places nearly all weight goes to the same few experts; {used}. With rows of "
            "one task that may be meant; otherwise try a balance_loss, a higher temperature or a lower learning rate."
        )
        return _finding("bad", "Routing has collapsed to few experts", text, _named(layers, few), numbers)
    return _finding("good", "The load is spread", f"No place leaves most experts unused: {used}.", (), numbers)


def _undecided(layers: Sequence[Layer]) -> Finding | None:
    """Weights near even for every token."""
    most = {layer["name"]: undecided_entropy(layer) for layer in layers}
    dense = [layer for layer in layers if most[layer["name"]]]
    if not dense:
        return None
    parts = {layer["name"]: layer["entropy"] / (most[layer["name"]] or 1.0) for layer in dense}
    even = {name: part for name, part in parts.items() if part >= UNDECIDED}
    mean = sum(parts.values()) / len(parts)
    numbers = {"mean_part_of_even_entropy": mean, "threshold": UNDECIDED, "undecided": len(even), "layers": len(dense)}
    if not even:
        text = f"The entropy of a token's weights is {mean:.1%} of that of even weights, on average over places."
        return _finding("good", "Routers decide", text, (), numbers)
    text = (
        f"In {len(even)} of {len(dense)} places a token's weights are nearly even: their entropy is {UNDECIDED:.0%} or "
        "more of the highest there is, so that the router decides next to nothing. Try a higher learning rate, longer "
        "training, a lower temperature or a smaller top_k."
    )
    level = "bad" if 2 * len(even) > len(dense) else "note"
    title = "Routing is uniform" if level == "bad" else f"Routing is uniform in {len(even)} places"
    return _finding(level, title, text, _named(layers, even), numbers)


def _tasks(layers: Sequence[Layer], tasks: Sequence[str]) -> Finding | None:
    several = [layer for layer in layers if len(layer["tasks"]) > 1]
    if not several:
        return None
    values = {layer["name"]: divergence([t["load"] for t in layer["tasks"].values()]) for layer in several}
    mean, (top, most) = sum(values.values()) / len(values), max(values.items(), key=lambda item: item[1])
    pairs = {
        pair: sum(_of_pair(layer, pair) for layer in several) / len(several)
        for pair in itertools.combinations(
            [task for task in tasks if all(task in layer["tasks"] for layer in several)], 2
        )
    }
    numbers: dict[str, Any] = {"mean_divergence": mean, "max_divergence": most, "alike": ALIKE, "apart": APART}
    text = (
        f"The tasks' loads differ by {mean:.3f} bits (Jensen-Shannon divergence, mean over {len(values)} places; at "
        f"most {most:.3f}, in {top}); 0 is no difference. "
    )
    if pairs:
        (a, b), least = min(pairs.items(), key=lambda item: item[1])
        numbers |= {"closest": [a, b], "closest_divergence": least}
        text += f"Closest are {a} and {b} with {least:.3f} bits. " if len(tasks) > 2 else ""
    if mean < ALIKE:
        text += (
            "So tasks share the experts in the same parts, as in one LoRA for all. If they should differ, try a "
            "higher learning rate for the router, a smaller top_k, or a weaker balance_loss."
        )
        return _finding("bad" if most < ALIKE else "note", "Tasks share everything", text, list(values), numbers)
    if mean >= APART:
        return _finding("good", "Tasks are well separated", text + "Tasks use experts of their own.", (), numbers)
    return _finding("good", "Tasks differ in part", text + "Tasks share experts in different parts.", (), numbers)


def _of_pair(layer: Layer, pair: tuple[str, str]) -> float:
    return divergence([layer["tasks"][task]["load"] for task in pair])


def _copies(layers: Sequence[Layer]) -> Finding | None:
    """Pairs of experts with nearly the same update."""
    pairs: list[float] = []
    copies: dict[str, list[str]] = {}
    for layer in layers:
        cosine = layer["similarity"] or []
        there = [i for i, row in enumerate(cosine) if row[i] != 0]
        for i, j in itertools.combinations(there, 2):
            pairs.append(cosine[i][j])
            if cosine[i][j] > COPY:
                copies.setdefault(layer["name"], []).append(f"{layer['experts'][i]} = {layer['experts'][j]}")
    if not pairs:
        return None
    count, mean, most = sum(map(len, copies.values())), sum(pairs) / len(pairs), max(pairs)
    numbers = {"pairs": len(pairs), "copies": count, "mean_cosine": mean, "max_cosine": most, "threshold": COPY}
    if count:
        text = (
            f"{count} of {len(pairs)} pairs of experts in the same place have updates with a cosine above {COPY} (mean "
            f"{mean:.2f}): one could stand for both. Try fewer experts, a smaller top_k, or another seed."
        )
        level = "bad" if 10 * count > len(pairs) else "note"
        return _finding(level, "Experts are copies", text, _named(layers, copies), numbers | {"names": copies})
    text = (
        f"The cosine of two experts' updates is {mean:.2f} on average over {len(pairs)} pairs, and at most {most:.2f}."
    )
    return _finding("good", "Experts differ", text, (), numbers)


def _entropy(values: Sequence[float]) -> float:
    return -sum(value * math.log(value) for value in values if value > 0)


def _named(layers: Sequence[Layer], names: Mapping[str, Any]) -> list[Layer]:
    return [layer for layer in layers if layer["name"] in names]


def _finding(level: str, title: str, text: str, where: Sequence[Layer | str], numbers: Mapping[str, Any]) -> Finding:
    names = [layer if isinstance(layer, str) else layer["name"] for layer in where]
    return {"level": level, "title": title, "text": text, "where": names, "numbers": dict(numbers)}
