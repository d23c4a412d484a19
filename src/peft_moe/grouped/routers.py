"""Routers of AT-MoE: new ones, and what those of a saved adapter say when no input has a say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import takewhile

import torch

from ..folding import StateDict, WeightsAt, module_from
from ..layer import IN_BASE_EXPERTS
from ..routing import Control, GroupedGate, GroupedRouter
from ..schedule import layer_of
from ..token_routed import OF_ENCODER
from .config import GroupedMoeConfig

ROUTER = re.compile(r"^base_model\.model\.(?P<key>.+)\.moelora_router\.(?=gate\.)")


def new_router(
    config: GroupedMoeConfig,
    in_features: int,
    *,
    name: str = "",
    owned: bool = False,
    in_decoder: bool = False,
    reads_encoder: bool = False,
) -> GroupedRouter:
    """A router with new weights, for what has so many features."""
    names = config.names
    gate = GroupedGate(
        in_features=in_features,
        num_groups=0 if config.flat_routing or len(names) == 1 else len(names),
        num_experts=sum(map(len, names.values())),
        static=config.within_group == "static",
        group_temperature=config.group_temperature,
        expert_temperature=config.expert_temperature,
        mix=config.start_mix,
        learn_mix=config.learn_mix,
    )
    gate.reset_parameters(even=config.init_lora_weights is not False)
    return GroupedRouter(
        gate=gate,
        groups=names,
        has_general=config.general_expert is not None,
        name=name,
        per_prompt=config.router_input == "prompt",
        normalize=config.router_norm,
        reads_encoder=reads_encoder,
        owned=owned,
        in_decoder=in_decoder,
    )


def fixed_weights(config: GroupedMoeConfig, state_dict: StateDict, control: Control | None) -> WeightsAt:
    """The weights of a saved adapter's experts by module, if no input has a say in them.

    Raises:
        ValueError: something depends on the input; the message says what.
    """
    routers: dict[str, GroupedRouter] = {}
    for match in filter(None, map(ROUTER.match, state_dict)):
        gate = {k: v for k, v in state_dict.items() if k.startswith(match[0])}
        in_features = next((v.shape[1] for k, v in gate.items() if k.endswith("gate.weight")), 1)
        routers[match["key"]] = module_from(partial(new_router, config, in_features), gate, match[0])
    for router in routers.values():
        if free := router.free_choices(control):
            raise ValueError(
                f"Weights cannot be folded while {', '.join(free)} depend on the input; fix them (routing= with the "
                "arguments of model.set_group_weights), or call peft_moe.calibrate(model, batches) before fold(model, "
                "...) for the LoRA that comes closest."
            )

    holders = by_layer(routers)

    @cache  # since modules share the router of their block
    def weights_of(key: str) -> torch.Tensor | None:
        with torch.no_grad():
            return routers[key].constant(control)

    def weights_at(key: str) -> torch.Tensor | None:
        return weights_of(holder_of(key, holders))

    return weights_at


def has_own_router(key: str) -> bool:
    """Whether a layer in a block does not see the tokens that enter it, where routers decide for each token."""
    return bool(OF_ENCODER.search(key) or IN_BASE_EXPERTS.search(key))


def by_layer(holders: Iterable[str]) -> dict[tuple[str, int] | None, list[str]]:
    """Names of the layers that hold a router, by `layer_of`."""
    found: dict[tuple[str, int] | None, list[str]] = {}
    for key in holders:
        found.setdefault(layer_of(key), []).append(key)
    return found


def holder_of(key: str, holders: Mapping[tuple[str, int] | None, Sequence[str]]) -> str:
    """The layer that holds the router of the layer at `key`: itself, or another one of its block.

    Args:
        key: its name.
        holders: from `by_layer`.

    Raises:
        KeyError: there is none.
    """
    place = layer_of(key)
    near = holders.get(place, ())
    if key in near:
        return key
    near = [other for other in near if not has_own_router(other)] or near
    if place is None or not near:
        raise KeyError(f"a router for {key}")
    # where a stage has several blocks, the nearest is in the same
    return max(near, key=lambda other: len(common_name([key, other])))


def common_name(keys: Iterable[str]) -> str:
    """The name of the innermost module around modules."""
    columns = zip(*(key.split(".") for key in keys), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
