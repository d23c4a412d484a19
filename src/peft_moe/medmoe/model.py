"""The Med-MoE-LoRA tuner."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..losses import localized
from ..routing import BalanceTerm, TokenGate, TokenRouter, softmax, top_k
from ..targets import modules_outside_adapters
from ..token_routed import TokenRoutedTuner, matches_by_group
from .config import MedMoeLoraConfig


class MedMoeLoraModel(TokenRoutedTuner):
    """Extends the linear layers of a model with LoRA experts, more of them in deeper layers (arXiv 2601.07935).

    Made by `get_peft_model(model, MedMoeLoraConfig(...))`; its methods can be called on the `PeftModel`.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = cast(MedMoeLoraConfig, self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config.for_model([key for key, _ in modules_outside_adapters(model)])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def build_router(
        self, config: MedMoeLoraConfig, adapter_name: str, *, key: str, in_features: int
    ) -> tuple[TokenRouter | None, bool]:
        special = config.routed_at(key)
        num_experts = config.num_base_experts + special
        if num_experts == 1:
            return None, False
        router = TokenRouter(
            gate=TokenGate(
                in_features=in_features,
                num_experts=num_experts,
                temperature=config.temperature,
                learn_temperature=config.learn_temperature,
            ),
            select=softmax,
            inference_select=partial(top_k, k=config.inference_top_k) if config.inference_top_k else None,
            num_base=config.num_base_experts,
            base_is_empty=config.base_is_empty,
            balance=self.balance(config),
            matches=self._matches(config, special),
            in_decoder=self.reads_decoder(key),
        )
        return router, False

    @classmethod
    def balance(cls, config: MedMoeLoraConfig) -> list[BalanceTerm]:
        terms = super().balance(config)
        if config.base_expert_mode == "general" and config.base_coefficient:
            loss = partial(localized, delta=config.localized_delta)
            terms.append(BalanceTerm("localized", loss, config.base_coefficient))
        return terms

    @staticmethod
    def _matches(config: MedMoeLoraConfig, special: int) -> torch.Tensor | None:
        base = config.num_base_experts
        if config.general_tasks:
            general = torch.tensor([task in config.general_tasks for task in config.task_names])
            return general.unsqueeze(1) == (torch.arange(base + special) < base)
        if config.expert_groups:
            return matches_by_group(config.task_names, list(config.expert_groups.values()), special)
        return None

    @classmethod
    def bank_options(cls, config: MedMoeLoraConfig) -> dict[str, Any]:
        if config.base_expert_mode != "regularized" or not config.base_coefficient:
            return {}
        return {"num_anchored": config.num_base_experts, "anchor_coefficient": config.base_coefficient}
