"""What a saved adapter's routers hold, as plain dicts: the weights of tasks, or what tokens are compared with.

Shapes: T tasks · E experts · G groups · in features
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..config import MoeConfig
from ..folding import StateDict, module_from
from ..grouped.config import GroupedMoeConfig
from ..grouped.routers import by_layer, common_name, has_own_router, holder_of
from ..grouped.routers import new_router as new_grouped_router
from ..medmoe.config import MedMoeLoraConfig
from ..moelora.config import MoeLoraConfig
from ..moelora.model import new_router as new_task_router
from ..molora.config import MoLoraConfig
from ..routing import TokenGate
from ..routing.names import SHARED, by_group
from ..schedule import layer_of

MOST_WEIGHTS = 1_000_000  # of a gate's table; a file of a few kilobytes could ask for one that fills the memory


@torch.no_grad()
def describe_routers(config: MoeConfig, layers: Sequence[dict[str, Any]], tensors: StateDict) -> list[dict[str, Any]]:
    """What the routers of an adapter hold. The layers are told the name of theirs.

    Args:
        config: of the adapter.
        layers: those of `describe`; `router` is set in each.
        tensors: the routers' weights, by their names in the file.

    Returns:
        for each router `name`, `kind`, `layers` that it serves, `experts` that it weighs, `parameters` by tensor, and

        * `task`: `weights`, by task the weight of each expert;
        * `token`: `norms` of the gate's rows, a row for each expert; `bias`; `temperature` and whether it is
          `temperature_learnt`;
        * `group`: `groups`, `group_norms` and `expert_norms` of the gate's rows, `expert_scores` where these are
          numbers of their own, `mix` (λ), and `weights` where no input has a say in them. What does not apply is None.

    Raises:
        KeyError, RuntimeError: tensors are missing, or of other shapes than the config says.
        ValueError: a table of weights that is too large to be shown.
    """
    if isinstance(config, MoeLoraConfig):
        return _task_routers(config, layers, tensors)
    if isinstance(config, GroupedMoeConfig):
        return _group_routers(config, layers, tensors)
    return [_token_router(config, layer, tensors) for layer in layers if _weighed(layer) > 1]


def _task_routers(config: MoeLoraConfig, layers: Sequence[dict[str, Any]], tensors: StateDict) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for layer in layers:
        n = len(layer["experts"])
        if n == 1:
            continue
        shared = config.gate_scope == "model"
        name = f"moelora_router.{n}" if shared else layer["name"]
        prefix = f"base_model.{name}." if shared else f"base_model.model.{name}.moelora_router."
        layer["router"] = name
        if name not in found:
            found[name] = _task_router(config, layer["experts"], tensors, prefix) | {"name": name, "layers": []}
        found[name]["layers"].append(layer["name"])
    return list(found.values())


def _task_router(config: MoeLoraConfig, experts: list[str], tensors: StateDict, prefix: str) -> dict[str, Any]:
    tasks = config.task_names
    if len(tasks) * len(experts) > MOST_WEIGHTS:
        raise ValueError(
            f"The gate weighs {len(experts)} experts for {len(tasks)} tasks; a table has at most {MOST_WEIGHTS}."
        )
    router = module_from(partial(new_task_router, config, len(experts)), tensors, prefix)
    weights = router.of_tasks(torch.arange(len(tasks))).tolist()  # (T, E)
    return {
        "kind": "task",
        "experts": experts,
        "parameters": _counts(tensors, prefix),
        "weights": dict(zip(tasks, weights, strict=True)),
    }


def _token_router(config: MoeConfig, layer: dict[str, Any], tensors: StateDict) -> dict[str, Any]:
    prefix = f"base_model.model.{layer['name']}.moelora_router."
    experts = [name for name in layer["experts"] if not name.startswith(SHARED)]
    if isinstance(config, MoLoraConfig):
        options: dict[str, Any] = {"bias": config.router_bias}
    elif isinstance(config, MedMoeLoraConfig):
        options = {"temperature": config.temperature, "learn_temperature": config.learn_temperature}
    else:
        raise TypeError(f"{type(config).__name__} has no router that sees tokens.")
    make = partial(TokenGate, in_features=layer["in_features"], num_experts=len(experts), **options)
    gate: TokenGate = module_from(make, tensors, f"{prefix}gate.")
    layer["router"] = layer["name"]
    return {
        "name": layer["name"],
        "kind": "token",
        "layers": [layer["name"]],
        "experts": experts,
        "parameters": _counts(tensors, prefix),
        "norms": _norms(gate.weight),
        "bias": None if gate.bias is None else gate.bias.tolist(),
        "temperature": None if gate.temperature is None else float(gate.temperature),
        "temperature_learnt": gate.temperature_bias is not None,
    }


def _group_routers(
    config: GroupedMoeConfig, layers: Sequence[dict[str, Any]], tensors: StateDict
) -> list[dict[str, Any]]:
    """A router is in the file once, with the first layer that it serves; the others of the block share it."""
    prefixes = {layer["name"]: f"base_model.model.{layer['name']}.moelora_router." for layer in layers}
    holders = [key for key, prefix in prefixes.items() if f"{prefix}gate.weight" in tensors or _counts(tensors, prefix)]
    routers = {key: _group_router(config, tensors, prefixes[key]) | {"name": key, "layers": []} for key in holders}
    near = by_layer(holders)
    for layer in layers:
        routers[holder_of(layer["name"], near)]["layers"].append(layer["name"])
    names = {}
    for key, router in routers.items():
        router["name"] = _name_of(key, router["layers"], [k for k in near[layer_of(key)] if not has_own_router(k)])
        names.update(dict.fromkeys(router["layers"], router["name"]))
    for layer in layers:
        layer["router"] = names[layer["name"]]
    return list(routers.values())


def _name_of(key: str, layers: Sequence[str], of_blocks: Sequence[str]) -> str:
    """What to call the router that a layer holds for others: by their block, unless it is its own.

    Args:
        key: the layer.
        layers: those that the router serves.
        of_blocks: of layers with the same number, those that hold routers of blocks.
    """
    place = layer_of(key)
    if place is None or key not in of_blocks:
        return key
    return ".".join(filter(None, (place[0], str(place[1])))) if len(of_blocks) == 1 else common_name(layers)


def _group_router(config: GroupedMoeConfig, tensors: StateDict, prefix: str) -> dict[str, Any]:
    weight = tensors.get(f"{prefix}gate.weight")
    make = partial(new_grouped_router, config, 1 if weight is None else weight.shape[1])
    router = module_from(make, tensors, prefix)
    gate, names = router.gate, config.names
    control = config.control(config.group_weights) if config.group_weights else None
    settled = router.constant(control)
    mix = gate.fixed_mix if gate.mix_bias is None else float(gate.mix_bias.float().sigmoid())
    return {
        "kind": "group",
        "groups": list(names),
        "experts": by_group(names, general=False)[0],
        "parameters": _counts(tensors, prefix),
        "group_norms": _norms(gate.weight[: gate.num_groups]) if gate.num_groups else None,
        "expert_norms": None if gate.static else _norms(gate.weight[gate.num_groups :]),
        "expert_scores": gate.expert_bias.tolist() if gate.static else None,
        "mix": (mix if control is None or control.mix is None else control.mix) if router.has_general else None,
        "weights": None if settled is None else settled.tolist(),
    }


def _weighed(layer: dict[str, Any]) -> int:
    """How many experts of a layer a router that sees tokens weighs; 1 is no router."""
    return sum(not name.startswith(SHARED) for name in layer["experts"])


def _norms(rows: torch.Tensor) -> list[float]:
    return rows.float().norm(dim=-1).tolist()


def _counts(tensors: StateDict, prefix: str) -> dict[str, int]:
    """Numbers in each tensor of a router."""
    return {name.removeprefix(prefix): t.numel() for name, t in tensors.items() if name.startswith(prefix)}
