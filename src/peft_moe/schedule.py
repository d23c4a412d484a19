"""How many experts each layer gets: pure functions from a schedule and the names of a model's modules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .checks import MOST, is_number, is_whole

SHAPES = ("uniform", "ascending", "descending")
# Of the power law behind the named shapes. Med-MoE-LoRA does not state its γ; 2 experts up to layer 10 of 32, as in its
# experiments, need a γ above 1.54.
SMALLEST, GAMMA = 2, 2.0


def power_law(num_layers: int, *, smallest: int, largest: int, gamma: float) -> list[int]:
    """`N_l = N_min + ⌊(N_max - N_min) (l / L)^γ⌋` for l = 1 … L (Med-MoE-LoRA, arXiv 2601.07935, eq. 2)."""
    exact = ((largest - smallest) * (layer / num_layers) ** gamma for layer in range(1, num_layers + 1))
    return [smallest + math.floor(value + 1e-9) for value in exact]  # a product that is whole may fall just below it


def bands(num_layers: int, parts: Iterable[tuple[int, int, int]]) -> list[int]:
    """The number of experts per layer from `[start, stop, experts]`, with layers counted from 0 and `stop` excluded.

    Raises:
        ValueError: bands that overlap, leave a layer out or go beyond the last one.
    """
    found: dict[int, int] = {}
    for start, stop, experts in parts:
        for layer in range(start, stop):
            if layer in found or layer >= num_layers:
                why = "is in two bands" if layer in found else f"is beyond the model's {num_layers} layers"
                raise ValueError(f"bands={list(parts)!r}: layer {layer} {why}; each layer belongs to one band.")
            found[layer] = experts
    missing = sorted(set(range(num_layers)) - found.keys())
    if missing:
        raise ValueError(
            f"bands={list(parts)!r} leave out layers {missing} of a model with {num_layers}; a layer is counted from "
            "0, and a band [start, stop, experts] ends before stop."
        )
    return [found[layer] for layer in range(num_layers)]


def experts_per_layer(
    schedule: str | Mapping[str, Any] | list[int], num_layers: int, num_experts: int, *, stack: str = "the model"
) -> list[int]:
    """A schedule for a stack of layers.

    Args:
        schedule: `"uniform"`: `num_experts` everywhere; `"ascending"`: power law from 2 to `num_experts` with γ = 2;
            `"descending"`: the same upside down; `{"type": "power", "min": 2, "max": 8, "gamma": 1.5}`;
            `{"type": "bands", "bands": [[0, 10, 2], [10, 19, 4], [19, 32, 8]]}`; or a list with a number per layer.
        num_layers: L.
        num_experts: the largest number in the named shapes.
        stack: what the layers are called in errors.

    Raises:
        ValueError: a list or bands that do not fit the number of layers.
    """
    if schedule == "uniform":
        return [num_experts] * num_layers
    if isinstance(schedule, str):
        rising = power_law(num_layers, smallest=min(SMALLEST, num_experts), largest=num_experts, gamma=GAMMA)
        return rising if schedule == "ascending" else rising[::-1]
    if isinstance(schedule, Mapping) and schedule["type"] == "power":
        return power_law(
            num_layers, smallest=schedule["min"], largest=schedule["max"], gamma=schedule.get("gamma", GAMMA)
        )
    if isinstance(schedule, Mapping):
        return bands(num_layers, schedule["bands"])
    if len(schedule) != num_layers:
        raise ValueError(
            f"expert_schedule={schedule!r} has {len(schedule)} entries, and the model has {num_layers} layers; give "
            "one per layer, or a power law, which fits every depth."
        )
    return list(schedule)


def check_schedule(schedule: object) -> None:
    """Raise a ValueError unless `experts_per_layer` takes the schedule for some model."""
    forms = f"one of {SHAPES}, {{'type': 'power', 'min', 'max', 'gamma'}}, {{'type': 'bands', 'bands'}} or a list"

    def refuse(why: str) -> None:
        raise ValueError(f"expert_schedule={schedule!r}: {why}; give {forms}.")

    if isinstance(schedule, str):
        if schedule not in SHAPES:
            refuse("this shape is not known")
    elif isinstance(schedule, (list, tuple)):
        if not schedule or not all(map(_is_count, schedule)):
            refuse("each entry is a number of experts from 1 up")
    elif not isinstance(schedule, Mapping):
        refuse(f"a {type(schedule).__name__} is no schedule")
    elif schedule.get("type") == "power":
        if not {"type", "min", "max"} <= schedule.keys() <= {"type", "min", "max", "gamma"}:
            refuse("a power law has min, max and, if not 2, gamma")
        if not _is_count(schedule["min"]) or not _is_count(schedule["max"]) or schedule["min"] > schedule["max"]:
            refuse("min and max are numbers of experts, 1 <= min <= max")
        gamma = schedule.get("gamma", GAMMA)
        if not is_number(gamma) or gamma <= 0:
            refuse("gamma is a number above 0 (the paper has gamma >= 1)")
    elif schedule.get("type") == "bands":
        parts = schedule.get("bands")
        if schedule.keys() != {"type", "bands"} or not isinstance(parts, (list, tuple)) or not parts:
            refuse("bands has a list of [start, stop, experts]")
        elif not all(_is_band(part) for part in parts):
            refuse("a band is [start, stop, experts] with 0 <= start < stop and experts from 1 up")
    else:
        refuse("type is 'power' or 'bands'")


def layer_of(key: str) -> tuple[str, int] | None:
    """The stack and index of the layer that a module belongs to, by the first number in its name; None without one.

    `"model.layers.3.mlp.up_proj"` is layer 3 of `"model.layers"`; an encoder and a decoder are stacks of their own. A
    number at the very start is that of an `nn.Sequential` around models, and counts only if there is no other.
    """
    parts = key.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    at = next((i for i in numbers if i > 0), numbers[0] if numbers else None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))


def stacks(keys: Iterable[str]) -> dict[str, int]:
    """The stacks of layers in a model and their lengths, from the names of its modules."""
    found: dict[str, int] = {}
    for stack, index in filter(None, map(layer_of, keys)):
        found[stack] = max(found.get(stack, 0), index + 1)
    return found


def _is_count(value: Any) -> bool:
    return is_whole(value) and 1 <= value <= MOST


def _is_band(part: Any) -> bool:
    if not isinstance(part, (list, tuple)) or len(part) != 3 or not all(type(value) is int for value in part):
        return False
    return bool(0 <= part[0] < part[1] and part[2] >= 1)
