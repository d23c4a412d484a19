"""What the routers of any adapter did in an evaluation of the Trainer, as `routing.json` has it."""

from __future__ import annotations

from typing import cast

from peft import PeftModel
from torch import nn
from transformers import Trainer

from ..layer import MoeLinear
from ..routing import GroupedRouter, Router, TaskRouter
from ..token_routed import TokenRoutedTuner
from ..tuner import MoeTuner
from .groups import OfGroups
from .source import Source
from .tasks import OfTasks
from .tokens import OfTokens

__all__ = ["Source", "routes", "source_of"]


def source_of(trainer: Trainer) -> Source:
    """What fits the trainer's model.

    Raises:
        ValueError: the model has no adapter of ours, or one that routes nothing.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, MoeTuner):
        raise ValueError(
            f"RoutingImages is for adapters of peft_moe, and the trainer's model is a {type(model).__name__}"
            f"{'' if tuner is None else f' with a {type(tuner).__name__}'}; make it with a config of peft_moe."
        )
    adapter = tuner.active_adapters[0]
    routers = _routers(tuner, adapter)
    if not routers:
        raise ValueError(
            "RoutingImages has nothing to look at: the adapter has one expert in every layer. Leave the callback out, "
            "or give layers more experts."
        )
    if isinstance(tuner, TokenRoutedTuner):
        return OfTokens(trainer, tuner, adapter)
    if all(isinstance(router, TaskRouter) for router in routers.values()):
        return OfTasks(trainer, tuner, adapter, cast(dict[str, TaskRouter], routers))
    return OfGroups(trainer, tuner, adapter, cast(dict[str, GroupedRouter], routers), cast(PeftModel, model))


def routes(model: nn.Module) -> bool:
    """Whether a model's active adapter is one of ours and has routers."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return isinstance(tuner, MoeTuner) and bool(_routers(tuner, tuner.active_adapters[0]))


def _routers(tuner: MoeTuner, adapter: str) -> dict[str, Router]:
    """By routed linear layer."""
    return {
        key: router
        for key, layer in tuner.model.named_modules()
        if isinstance(layer, MoeLinear) and (router := layer.router_of(adapter)) is not None
    }
