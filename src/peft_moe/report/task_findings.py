"""Whether tasks use different experts, in plain words with the numbers.

Shapes: E experts · T tasks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..routing.measures import Layer, divergence, overlap, separation
from .wording import Finding, advice, count, finding

# Separation of tasks, from 0, the same load, to 1, no expert in common. Of two tasks with two experts, (0.5, 0.5) and
# (0.62, 0.38) are at 0.01, and (0.79, 0.21) and (0.21, 0.79) at 0.25. Gates whose scores are drawn with a standard
# deviation of 0.5 are at 0.06 to 0.10.
ALIKE, APART = 0.01, 0.25


def compare_tasks(layers: Sequence[Layer], method: str) -> Finding | None:
    """What the loads of tasks say; None if there are not two.

    Args:
        layers: of `Routing.to_dict()`.
        method: such as "MOELoRA".
    """
    several = [layer for layer in layers if len(layer["tasks"]) > 1 and len(layer["experts"]) > 1]
    if not several:
        return None
    chances = {layer["name"]: layer.get("chance_divergence") for layer in several}
    known = [layer for layer in several if chances[layer["name"]] is not None]
    if not known:
        text = "Two rows or more of each task are needed to tell a difference between tasks from one between rows."
        return finding("note", "Too few rows to compare tasks", text, (), {"layers": len(several)})
    loads = {layer["name"]: [task["load"] for task in layer["tasks"].values()] for layer in known}
    chance = sum(float(chances[name] or 0) for name in loads) / len(loads)
    bits = sum(map(divergence, loads.values())) / len(loads)
    values = {name: separation(load, float(chances[name] or 0)) for name, load in loads.items()}
    mean, (top, most) = sum(values.values()) / len(values), max(values.items(), key=lambda item: item[1])
    shared, closest = _overlaps(known)
    numbers: dict[str, Any] = {"mean_separation": max(0.0, mean), "max_separation": max(0.0, most), "alike": ALIKE}
    numbers |= {"apart": APART, "mean_divergence": bits, "chance_divergence": chance, "mean_overlap": shared} | closest
    text = f"Two tasks share {shared:.0%} of their weight, on average over pairs and {count(len(known), 'layer')}"
    if closest and len(loads[top]) > 2:
        a, b = closest["closest"]
        text += f"; closest are {a} and {b} with {closest['closest_overlap']:.0%}"
    text += (
        f". On a scale from 0, the same load, to 1, nothing in common, tasks are {max(0.0, mean):.2f} apart (at most "
        f"{max(0.0, most):.2f}, in {top}; from the Jensen-Shannon divergence"
        + (f", less what chance gives these rows, {chance:.3f} of {bits:.3f} bits). " if chance > 1e-6 else "). ")
    )
    if mean < ALIKE or bits < 2 * chance:
        return _alike(text, method, list(values), numbers, everywhere=most < ALIKE)
    if mean >= APART:
        return finding("good", "Tasks are well separated", text.strip(), (), numbers)
    return finding("good", "Tasks differ in part", text.strip(), (), numbers)


def _overlaps(layers: Sequence[Layer]) -> tuple[float, dict[str, Any]]:
    """The mean over layers and pairs of tasks, and the pair with the largest, of those that are in all layers."""
    every = [overlap([task["load"] for task in layer["tasks"].values()]) for layer in layers]
    pairs = [float(found[np.triu_indices(len(found), 1)].mean()) for found in every]
    names = [list(layer["tasks"]) for layer in layers]
    shared = sum(pairs) / len(pairs)
    if any(own != names[0] for own in names):
        return shared, {}
    mean = np.triu(np.mean(every, axis=0), 1)
    a, b = np.unravel_index(int(mean.argmax()), mean.shape)
    return shared, {"closest": [names[0][a], names[0][b]], "closest_overlap": float(mean[a, b])}


def _alike(text: str, method: str, where: Sequence[str], numbers: Mapping[str, Any], *, everywhere: bool) -> Finding:
    if method == "MOELoRA":  # whose weights depend on nothing but the task
        text += f"So all tasks have the same LoRA. If they should differ, try {advice('alike', method)}."
        return finding("bad" if everywhere else "note", "Tasks share everything", text, where, numbers)
    text += (
        "So the mean load does not tell these tasks apart; single tokens may get different experts all the same. If "
        f"tasks should differ, try {advice('alike', method)}."
    )
    return finding("note", "Tasks have the same mean load", text, where, numbers)
