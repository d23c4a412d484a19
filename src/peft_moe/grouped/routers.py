"""Routers of AT-MoE: new ones, and what those of a saved adapter say when no input has a say."""

from __future__ import annotations

import re
from functools import cache, partial

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

    of_blocks: dict[tuple[str, int] | None, list[str]] = {}
    for key in sorted(routers, key=lambda k: bool(OF_ENCODER.search(k) or IN_BASE_EXPERTS.search(k))):
        of_blocks.setdefault(layer_of(key), []).append(key)

    @cache  # since modules share the router of their block
    def weights_of(key: str) -> torch.Tensor | None:
        with torch.no_grad():
            return routers[key].constant(control)

    def weights_at(key: str) -> torch.Tensor | None:
        # one of its own, or that of its block, which another of its layers holds
        return weights_of(key if key in routers else of_blocks.get(layer_of(key), [])[0])

    return weights_at
