"""Layers of a report taken together: by depth, by module, and as means.

Shapes: E experts
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Layer = Mapping[str, Any]


def alike(layers: Sequence[Layer], total: int) -> tuple[list[Layer], str]:
    """The layers with the most frequent list of experts, and what a title says if these are not all."""
    if not layers:
        return [], ""
    (experts, count), *_ = Counter(tuple(layer["experts"]) for layer in layers).most_common()
    note = "" if count == total else f" ({count} of {total} layers: those with these {len(experts)} experts)"
    return [layer for layer in layers if tuple(layer["experts"]) == experts], note


def of_task(layers: Sequence[Layer], task: str) -> np.ndarray:
    """(E,): mean load of a task over layers; NaN where none has seen it."""
    seen = [layer["tasks"][task] for layer in layers if task in layer["tasks"]]
    return mean_load(seen) if seen else np.full(len(layers[0]["experts"]), np.nan)


def mean_load(entries: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(E,): mean load, each entry weighing as its tokens, or all alike where these are not known."""
    tokens = [entry.get("tokens") for entry in entries]
    known = all(isinstance(n, (int, float)) and n >= 0 for n in tokens) and sum(n or 0 for n in tokens) > 0
    weights = np.asarray([float(n or 0) if known else 1.0 for n in tokens])
    return np.average([entry["load"] for entry in entries], axis=0, weights=weights)


def by_depth(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers by block, in the order of the model; those without a number by name."""
    found: dict[str, list[Layer]] = {}
    several = several_stacks(layers)
    for layer in layers:
        if layer.get("block") is None:
            name = name_of(layer)
        else:
            name = f"{stack_of(layer)} {layer['block']}" if several else str(layer["block"])
        found.setdefault(name, []).append(layer)
    return found


def stack_of(layer: Layer) -> str:
    """What precedes the number of a block: encoder and decoder both have a block 0."""
    before, number, _ = f"{layer.get('name', '')}.".partition(f".{layer.get('block')}.")
    return before if number else ""


def several_stacks(layers: Sequence[Layer]) -> bool:
    """Whether blocks are numbered more than once, as in an encoder and a decoder."""
    return len({stack_of(layer) for layer in layers if layer.get("block") is not None}) > 1


def module_of(layer: Layer, several: bool) -> str:
    """A layer's module within its block; `several`: with what precedes the number of the block."""
    module = str(layer.get("module") or "block")
    return f"{stack_of(layer)} … {module}" if several else module


def name_of(layer: Layer) -> str:
    """A layer's name."""
    return str(layer.get("name", "?"))


def effective_experts(load: Sequence[float]) -> float:
    """exp(entropy of load)."""
    share = np.asarray([value for value in load if value > 0], float)
    return float(np.exp(-(share * np.log(share)).sum()))


def finite_max(values: Any, low: float = 0.0) -> float:
    """The largest number, or `low` if that is larger or there is none."""
    values = np.asarray(values, float)
    return float(np.max(values[np.isfinite(values)], initial=low))


def finite_mean(values: Sequence[float]) -> float:
    """The mean of what is a number; NaN if nothing is."""
    there = [value for value in values if math.isfinite(value)]
    return sum(there) / len(there) if there else math.nan
