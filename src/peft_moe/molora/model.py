"""The MoLoRA tuner."""

from __future__ import annotations

from functools import partial

from ..routing import TokenGate, TokenRouter, top_k, top_p
from ..token_routed import TokenRoutedTuner, matches_by_group
from .config import ATTENTION, MoLoraConfig


class MoLoraModel(TokenRoutedTuner):
    """Extends the linear layers of a model with LoRA experts that a router chooses per token (arXiv 2404.09027).

    Made by `get_peft_model(model, MoLoraConfig(...))`; its methods can be called on the `PeftModel`.
    """

    def check_routing(self, config: MoLoraConfig, keys: list[str]) -> None:
        super().check_routing(config, keys)
        for num_experts in sorted({config.routed_at(key) for key in keys} - {1}):
            config.check_switch(num_experts)
        recipe = config.num_experts > 1 and config.num_experts_pattern == {ATTENTION: 1}
        if recipe and keys and all(config.routed_at(key) == 1 for key in keys):
            raise ValueError(
                "The recipe has experts in feed-forward layers and a plain LoRA in attention, and all linear "
                "layers of this model are attention's; give num_experts_pattern={} for experts there, or list "
                "target_modules."
            )

    def build_router(
        self, config: MoLoraConfig, adapter_name: str, *, key: str, in_features: int
    ) -> tuple[TokenRouter | None, bool]:
        num_experts = config.routed_at(key)
        if num_experts == 1:
            return None, False
        groups = list((config.expert_groups or {}).values())
        router = TokenRouter(
            gate=TokenGate(
                in_features=in_features,
                num_experts=num_experts,
                bias=config.router_bias,
                jitter=config.router_jitter,
            ),
            select=partial(top_k, k=config.top_k) if config.top_p is None else partial(top_p, p=config.top_p),
            num_shared=config.num_shared_experts,
            balance=self.balance(config),
            matches=matches_by_group(config.task_names, groups, num_experts) if groups else None,
            in_decoder=self.reads_decoder(key),
        )
        return router, False
