"""What is measured of loads and weights, here and in training: one definition for each word.

Shapes: E experts · T tasks
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .names import BASE

Layer = Mapping[str, Any]
Loads = Sequence[Sequence[float]]  # (T, E), each row adds up to 1

# 0 is all tokens on the same experts, 1 an even load. At 0.1, of 8 experts 1.7 are in effect where tokens weigh all of
# them, and 2.6 where they get two.
COLLAPSED = 0.1


def entropy(shares: Sequence[float]) -> float:
    """In nats."""
    return -sum(value * math.log(value) for value in shares if value > 0)


def meant(layer: Layer) -> list[int]:
    """The experts that a router is to spread tokens over: not AT-MoE's general one, nor base experts."""
    if layer.get("group_of") is not None:
        return [i for i, group in enumerate(layer["group_of"]) if group >= 0]
    return [i for i, name in enumerate(layer["experts"]) if not str(name).startswith(BASE)]


def load_of(values: Layer, experts: Sequence[int]) -> list[float]:
    """The load of some experts as parts of theirs together; empty where they have none."""
    load = [values["load"][i] for i in experts]
    total = sum(load)
    return [value / total for value in load] if total else []


def spread(load: Sequence[float], chosen: float) -> float:
    """How far experts in effect are on the way from as many as a token gets to all: from 0, collapse, to 1, even.

    Args:
        load: (E,) shares that add up to 1; exp of their entropy is the number of experts in effect.
        chosen: how many experts a token gets; where it gets all, they could collapse to one.
    """
    least = 1.0 if is_dense(chosen, len(load)) else max(1.0, chosen)
    return (math.exp(entropy(load)) - least) / (len(load) - least)


def is_dense(chosen: float, experts: int) -> bool:
    """Whether tokens get all experts, but for weights too small for their number format."""
    return chosen >= experts - 0.5


def highest_entropy(layer: Layer) -> float:
    """The largest entropy, in nats, that weights of a token can have: ln of how many experts it gets."""
    return math.log(max(1.0, layer.get("chosen_per_token", len(layer["load"]))))


def divergence(loads: Loads) -> float:
    """Jensen-Shannon divergence of distributions, each with the same weight, in bits: from 0 to log2 min(T, E)."""
    mean = [sum(column) / len(loads) for column in zip(*loads, strict=True)]
    return max(0.0, (entropy(mean) - sum(map(entropy, loads)) / len(loads)) / math.log(2))


def separation(loads: Loads, chance: float = 0.0) -> float:
    """How far tasks are apart: their divergence less what chance gives, as a part of the largest there could be.

    Args:
        loads: of the tasks.
        chance: bits that tasks are apart where none differ, since each has some rows only; see `chance_divergence`.

    0 for the same loads, 1 for tasks that have no expert in common; below 0 where chance alone would give more.
    """
    most = math.log2(min(len(loads), len(loads[0])))
    return (divergence(loads) - chance) / most if most else 0.0


def overlap(loads: Loads) -> np.ndarray:
    """(T, T) parts of their weight that two tasks give to the same experts: 1 is the same load."""
    values = np.asarray(loads, float)
    return np.minimum(values[:, None], values[None]).sum(-1)


def chance_divergence(loads: Loads, variances: Loads) -> float:
    """The divergence, in bits, to be expected of tasks with the same load, each measured over some rows.

    To second order, Σ_i Σ_t var(p_ti) (1 - 1/T) / (2 T p_i ln 2); with N rows of a token that gets one of the E experts
    this is (E - 1)(T - 1) / (2 N ln 2).

    Args:
        loads: of the tasks.
        variances: of these numbers, from how rows of a task differ.
    """
    values, noise = np.asarray(loads, float), np.asarray(variances, float)
    mean, tasks = values.mean(0), len(values)
    there = mean > 0
    return float((noise.sum(0)[there] / mean[there]).sum() * (1 - 1 / tasks) / (2 * tasks * math.log(2)))
