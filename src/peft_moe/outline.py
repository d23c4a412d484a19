"""What an adapter would be in a model, from shapes alone: nothing is put in, and no weight is made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import Experts, MoeConfig
from .grouped import GroupedMoeConfig, GroupedMoeModel
from .matching import HEADS
from .medmoe import MedMoeLoraConfig, MedMoeLoraModel
from .moelora import MoeLoraConfig, MoeLoraModel
from .molora import MoLoraConfig, MoLoraModel
from .targets import modules_outside_adapters
from .tuner import MoeTuner

TUNERS: dict[type[MoeConfig], type[MoeTuner]] = {
    MoeLoraConfig: MoeLoraModel,
    MoLoraConfig: MoLoraModel,
    MedMoeLoraConfig: MedMoeLoraModel,
    GroupedMoeConfig: GroupedMoeModel,
}
NAME = "outline"  # of the adapter that is not made


class Layer(NamedTuple):
    """One linear layer and the experts that it would get.

    Args:
        key: its name in the base model.
        base: the layer itself.
        per_rank: parameters of a rank, in + out.
        experts: ranks and scalings.
        of_router: its part of the router's parameters; those of a router that layers share are spread over them by
            `per_rank`.
    """

    key: str
    base: nn.Module
    per_rank: int
    experts: Experts
    of_router: Fraction

    @property
    def rank(self) -> int:
        """The sum of the experts' ranks."""
        return sum(self.experts.ranks)

    @property
    def parameters(self) -> Fraction:
        """Those of its experts, and its part of a router's."""
        return self.rank * self.per_rank + self.of_router


def tuner_of(config: object) -> type[MoeTuner]:
    """The tuner that makes adapters of such a config.

    Raises:
        ValueError: it is of none of this package's methods.
    """
    found = next((tuner for kind, tuner in TUNERS.items() if isinstance(config, kind)), None)
    if found is None:
        raise ValueError(
            f"A {type(config).__name__} is the config of no method with experts; give one of "
            f"{[kind.__name__ for kind in TUNERS]}."
        )
    return found


def outline(config: MoeConfig, model: nn.Module) -> tuple[MoeConfig, list[Layer]]:
    """The layers that an adapter would extend, in the model's order.

    The model may be on the meta device. Of AT-MoE, the experts are read from their sources.

    Args:
        config: the adapter's config, which is left as it is.
        model: the base model, or a `PeftModel` around it; adapters in it do not count.

    Returns:
        a copy of the config in which what depends on the model is settled, and the layers with a rank above 0.

    Raises:
        ValueError: whatever `get_peft_model` would say of the config in this model; or no layer is targeted.
    """
    base = base_of(model)
    config = _with_heads(config)
    tuner = _asked(tuner_of(config), config, base)
    given = config.target_modules
    config = tuner._prepare_adapter_config(config, tuner.get_model_config(base))
    tuner._prepare_model(config, base)
    targets = {k: _linear_of(m) for k, m in modules_outside_adapters(base) if check_target_module_exists(config, k)}
    targets = {key: linear for key, linear in targets.items() if any(config.experts_at(key).ranks)}
    if not targets:
        raise ValueError(
            f"target_modules={given!r}, with what else the config says of layers, match no module of the "
            f"{type(base).__name__}; give endings of names that model.named_modules() has, or 'all-linear'."
        )
    return config, list(_layers(tuner, config, targets))


def base_of(model: nn.Module) -> nn.Module:
    """The base model of a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _with_heads(config: MoeConfig) -> MoeConfig:
    """A copy; with the heads that peft saves whole by task type, so that they are no targets."""
    config = copy.copy(config)  # fields are replaced and not changed in place; AT-MoE's may hold weights
    if heads := HEADS.get(str(getattr(config.task_type, "value", config.task_type))):
        config.modules_to_save = [*(config.modules_to_save or ()), *sorted(heads)]
    return config


def _asked(tuner_cls: type[MoeTuner], config: MoeConfig, base: nn.Module) -> MoeTuner:
    """A tuner that is only asked: its own constructor would put the adapter into the model."""
    tuner = tuner_cls.__new__(tuner_cls)
    nn.Module.__init__(tuner)
    tuner.model, tuner.peft_config = base, {NAME: config}
    tuner._pre_injection_hook(base, config, NAME)
    return tuner


def _linear_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _layers(tuner: MoeTuner, config: MoeConfig, targets: dict[str, nn.Module]) -> Iterator[Layer]:
    sizes = {key: cast(tuple[int, int], _get_in_out_features(base)) for key, base in targets.items()}
    routers: dict[str, nn.Module | None] = {}
    with torch.device("meta"):  # no memory, and no random numbers drawn
        for key, (in_features, _) in sizes.items():
            routers[key], _ = tuner.build_router(config, NAME, key=key, in_features=in_features)
    under: dict[Any, int] = {}  # per_rank of all layers that a router serves
    for key, router in routers.items():
        under[router] = under.get(router, 0) + sum(sizes[key])
    for key, base in targets.items():
        router, per_rank = routers[key], sum(sizes[key])
        count = 0 if router is None else sum(p.numel() for p in router.parameters())
        yield Layer(key, base, per_rank, config.experts_at(key), Fraction(count * per_rank, under[router]))


def is_conv1d(layer: Layer) -> bool:
    """Whether the base weight is stored (in, out)."""
    return isinstance(layer.base, Conv1D)
