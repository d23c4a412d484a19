"""The AT-MoE tuner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from ..bank import ExpertBank
from ..blocks import BlockEntry
from ..checkpointing import keep_call_through_checkpointing
from ..checks import check_flag
from ..entry import Entry
from ..layer import IN_BASE_EXPERTS, MoeLinear
from ..routing import (
    Control,
    GroupedRouter,
    GroupWeights,
    View,
    plain,
)
from ..targets import SEQUENCE_FIRST, modules_outside_adapters
from ..token_routed import OF_ENCODER
from ..tuner import MoeTuner
from .config import GroupedMoeConfig
from .explain import Explanation
from .fit import check_expert
from .placement import block_of, check_placement, width_of
from .routers import new_router
from .sources import Expert, read_expert


class GroupedMoeModel(MoeTuner):
    """Extends the linear layers of a model with trained LoRAs, weighed by a router in each block (arXiv 2410.10896).

    Made by `get_peft_model(model, GroupedMoeConfig(...))`; its methods can be called on the `PeftModel`.
    """

    _experts: Sequence[Expert | None] | None = None  # while an adapter is being put in

    # -- putting layers in --------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: GroupedMoeConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self._routers: dict[str, dict[str, GroupedRouter]] = {}  # by adapter and block; registered in a layer each

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._experts = None
        if self._config(adapter_name).router_input == "prompt":
            self.context.by_prompt.add(adapter_name)
        for block in self._routers.get(adapter_name, {}):
            BlockEntry.install(model.get_submodule(block), block, self)
        if self.reads_prompts and self.is_encoder_decoder:  # which generate calls by itself, with masks of its own
            Entry.install(cast(Any, model).get_encoder(), "forward", self)
        config = self._config(adapter_name)
        if config.group_weights is not None:
            self.context.fix(adapter_name, config.control(config.group_weights))

    def _config(self, adapter_name: str) -> GroupedMoeConfig:
        return cast(GroupedMoeConfig, self.peft_config[adapter_name])

    def _prepare_adapter_config(self, peft_config: GroupedMoeConfig, model_config: dict[str, Any]) -> GroupedMoeConfig:
        if peft_config.is_new:  # a saved adapter brings its experts, and its sources may be gone
            self._read_experts(peft_config)
        return cast(GroupedMoeConfig, super()._prepare_adapter_config(peft_config, model_config))

    def _read_experts(self, config: GroupedMoeConfig) -> None:
        """Read all sources and compare them with the model."""
        given = config.as_given
        named = {
            name: None if source is None else read_expert(source, name=f"Expert {name}")
            for name, source in given.sources.items()
        }
        modules = dict(modules_outside_adapters(self.model))
        base = config.base_model_name_or_path or getattr(self.model, "name_or_path", None)
        for name, expert in named.items():
            if expert:
                check_expert(f"Expert {name}", expert, modules, base if config.check_base_model else None)
        self._experts = list(named.values())
        config.note_origins({name: expert.origin if expert else None for name, expert in named.items()})
        adapted = {key for expert in self._experts if expert for key in expert.layers}
        if given.target_modules is None and adapted:
            config.target_modules = sorted(adapted)

    def check_routing(self, config: GroupedMoeConfig, keys: list[str]) -> None:
        if self._experts is not None:
            left_out = sorted({key for e in self._experts if e for key in e.layers} - set(keys))
            if left_out:
                raise ValueError(
                    f"Experts adapt {left_out[0]!r}, which target_modules or exclude_modules leave out, so that a part "
                    "of them would be lost; let these fields cover it."
                )
            config.lay_out(self._experts, keys)
        else:
            config.check_layout(keys)
        check_placement(self.model, self.get_model_config(self.model), keys, config.router_input)
        if config.router_input != "prompt":
            return
        model_type = self.get_model_config(self.model).get("model_type")
        inside = next((key for key in keys if IN_BASE_EXPERTS.search(key)), None)
        outside = next((key for key in keys if self.is_causal and self._block_of(config, key) is None), None)
        if outside is not None and inside is None:
            raise ValueError(
                f"router_input='prompt' routes the layers of blocks, and {outside!r} is in none: generate may not show "
                "it the whole prompt. Use router_input='token', or experts that do not adapt it."
            )
        if model_type in SEQUENCE_FIRST or inside is not None:
            why = f"{inside!r} sees tokens picked from all rows" if inside else f"{model_type} does not see rows first"
            raise ValueError(f"router_input='prompt' routes rows, and {why}; use router_input='token'.")

    @classmethod
    def bank_options(cls, config: GroupedMoeConfig) -> dict[str, Any]:
        return {"pretrained": len(config.new_experts) < len(config.sources), "frozen": not config.train_experts}

    def fill_bank(self, bank: ExpertBank, config: GroupedMoeConfig, key: str) -> None:
        if self._experts is None:  # of a saved adapter, whose weights come next
            twin = self._twin(config, key)
            if twin is None:
                bank.await_weights()
            else:
                bank.take(twin)
            return
        bank.reset_parameters(config.init_lora_weights)
        if bank.pretrained:
            bank.fill([self._lora(bank, i, expert, key) for i, expert in enumerate(self._experts)])

    def _twin(self, config: GroupedMoeConfig, key: str) -> ExpertBank | None:
        """The bank of another adapter in the model with the same frozen experts, as TRL's reference adapter has."""
        layer = self.model.get_submodule(key)
        for name in layer.moelora_bank if isinstance(layer, MoeLinear) and not config.train_experts else ():
            other = self.peft_config.get(name)
            if not isinstance(other, GroupedMoeConfig) or other.train_experts:
                continue
            fields = ("groups", "general_expert", "expert_order", "expert_layout")
            if all(getattr(other, field) == getattr(config, field) for field in fields):
                return cast(ExpertBank, layer.moelora_bank[name])
        return None

    @staticmethod
    def _lora(bank: ExpertBank, i: int, expert: Expert | None, key: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B of an expert in a layer; those of a new one as they have been drawn."""
        if expert is None:
            a, b = bank.lora_A.weight.split(bank.ranks)[i], bank.lora_B.weight.split(bank.ranks, dim=1)[i]
            return a.clone(), b.clone()
        return expert.layers[key][:2] if key in expert.layers else None

    def build_router(
        self, config: GroupedMoeConfig, adapter_name: str, *, key: str, in_features: int
    ) -> tuple[GroupedRouter, bool]:
        block = self._block_of(config, key)
        if block is None:
            return self._new_router(config, key, in_features, name=f"{adapter_name}/{key}", owned=True), False
        shared = self._routers.setdefault(adapter_name, {})
        if block in shared:
            return shared[block], True
        shared[block] = self._new_router(config, key, width_of(self.model, block), name=f"{adapter_name}/{block}")
        return shared[block], False

    def _block_of(self, config: GroupedMoeConfig, key: str) -> str | None:
        """The block whose router a module shares; None for one that does not see the tokens that enter a block."""
        encoders = config.router_input == "token" and self.is_encoder_decoder and OF_ENCODER.search(key)
        return None if encoders or IN_BASE_EXPERTS.search(key) else block_of(self.model, key)

    def _new_router(
        self, config: GroupedMoeConfig, key: str, in_features: int, *, name: str, owned: bool = False
    ) -> GroupedRouter:
        in_decoder = self.is_encoder_decoder and "decoder" in key.split(".") and not OF_ENCODER.search(key)
        return new_router(
            config,
            in_features,
            name=name,
            owned=owned,
            in_decoder=in_decoder,
            reads_encoder=config.router_input == "prompt" and self.is_encoder_decoder and "decoder" in key.split("."),
        )

    # -- calls --------------------------------------------------------------------------------------------------------

    def readers(self, block: str) -> list[tuple[GroupedRouter, View]]:
        """The routers of a block that are to read what enters it."""
        names = [name for name in self.present if name not in self.context.in_base]
        found = [(name, self._routers.get(name, {}).get(block)) for name in names]
        return [(router, self.context.view(name)) for name, router in found if router is not None]

    def wrap_checkpoints(self, block: nn.Module) -> None:
        """Let what a block runs again in backward be routed again."""
        keep_call_through_checkpointing(block, self.context)

    # -- control and explanation --------------------------------------------------------------------------------------

    def set_group_weights(
        self,
        weights: GroupWeights | None = None,
        *,
        group_weights: Mapping[str, float] | None = None,
        off: Sequence[str] = (),
        mix: float | None = None,
        store: bool = False,
        adapter_name: str | None = None,
    ) -> None:
        """Fix weights, or switch off groups and experts, for all later calls; without arguments, take that back.

        Args:
            weights: by group, its own weight among the groups, a number from 0 to 1; or a mapping of its experts to
                their weights within the group. Those that are not named share what is left, as the router says.
            group_weights: by group, its own weight, for groups whose experts `weights` has.
            off: groups (`"style"`) and experts (`"style/concise"`) that get nothing.
            mix: λ, the share of the mixture beside the general expert.
            store: keep it in the adapter's config, so that `save_pretrained` saves it; else it is stored nowhere.
            adapter_name: by default the active adapter.

        Raises:
            ValueError: an unknown name, a number out of range, weights that do not add up, or a merged adapter.

        Example:
            >>> model.set_group_weights({"style": {"rigorous": 1.0}})
            >>> model.set_group_weights({"style": 0.0, "function": {"triage": 0.8}}, mix=1.0)
        """
        check_flag("store", store)
        name = self._one_adapter(adapter_name)
        off = list(off) if isinstance(off, Iterable) and not isinstance(off, str) else off
        given = {"weights": weights, "group_weights": group_weights, "off": off or None, "mix": mix}
        given = {key: plain(value) for key, value in given.items() if value is not None}
        control = self._control(name, given)
        self.context.fix(name, control)
        if store:
            self._config(name).group_weights = given or None

    @contextmanager
    def routing(
        self,
        weights: GroupWeights | None = None,
        *,
        group_weights: Mapping[str, float] | None = None,
        off: Sequence[str] = (),
        mix: float | None = None,
        adapter_name: str | None = None,
    ) -> Iterator[None]:
        """`set_group_weights` for the calls in a `with` block, in place of what it has fixed; then as before.

        Example:
            >>> with model.routing({"style": {"rigorous": 1.0}}, off=["domain/surgery"]):
            ...     model.generate(**inputs)
        """
        name = self._one_adapter(adapter_name)
        with self.context.fixed(name):
            self.set_group_weights(weights, group_weights=group_weights, off=off, mix=mix, adapter_name=name)
            yield

    def _control(self, adapter_name: str, given: Mapping[str, Any]) -> Control | None:
        self._refuse_merged(adapter_name)
        return self._config(adapter_name).control(given) if given else None

    def _refuse_merged(self, adapter_name: str) -> None:
        if adapter_name in self.context.in_base:
            raise ValueError(
                f"Adapter {adapter_name!r} is merged with the weights it had then; call model.unmerge_adapter() first."
            )

    def _one_adapter(self, adapter_name: str | None) -> str:
        if adapter_name is None and len(self.active_adapters) != 1:
            raise ValueError(f"The active adapters are {self.active_adapters}; say which with adapter_name=.")
        name = adapter_name or self.active_adapters[0]
        if name not in self.peft_config:
            raise ValueError(f"adapter_name={name!r}; the model has {sorted(self.peft_config)}.")
        return name

    @torch.no_grad()
    def explain(self, batch: Mapping[str, Any], adapter_name: str | None = None) -> Explanation:
        """Run a batch and say what every block's router decided, with what is fixed now.

        Args:
            batch: arguments of the model, as for `model(**batch)`.
            adapter_name: by default the active adapter.

        Returns:
            weights by block, group and expert, per token or per prompt; see `Explanation`.

        Raises:
            TypeError: `batch` is no mapping.
            ValueError: no such adapter, or a merged one.

        Example:
            >>> print(model.explain(tokenizer("Chest pain.", return_tensors="pt")))
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"explain takes the model's arguments by name, and {type(batch).__name__} has no names; give a mapping "
                "such as the tokenizer makes: {'input_ids': ..., 'attention_mask': ...}."
            )
        name = self._one_adapter(adapter_name)
        self._refuse_merged(name)
        routers = dict(self.routers(name))
        with self.context.turn():
            modes = {module: module.training for module in self.model.modules()}
            self.model.eval()
            self.recording = True  # so that the call keeps its masks
            for router in routers.values():
                router.seen = []
            try:
                self.model(**batch)
                seen = {key: router.seen for key, router in routers.items() if router.seen}
            finally:
                for router in routers.values():
                    router.seen = None
                self.recording = False
                for module, training in modes.items():
                    module.training = training
        if not seen:
            raise ValueError(f"No router of adapter {name!r} was asked; is it active and enabled?")
        return Explanation.of(self._config(name), seen)

    def routers(self, adapter_name: str | None = None) -> Iterator[tuple[str, GroupedRouter]]:
        """Names of blocks, or of linear layers with their own, and their routers; by default of the active adapter."""
        adapter_name = self.active_adapters[0] if adapter_name is None else self.known_adapters([adapter_name])[0]
        yield from self._routers.get(adapter_name, {}).items()
        for key, layer in self.model.named_modules():
            router = layer.router_of(adapter_name) if isinstance(layer, MoeLinear) else None
            if isinstance(router, GroupedRouter) and router.owned:
                yield key, router

    # -- the end ------------------------------------------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._routers.pop(adapter_name, None)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in model.modules():
            BlockEntry.remove(module, self)
        self._routers.clear()  # an entry that somebody has put hooks before stays
        if self.is_encoder_decoder:
            Entry.remove(cast(Any, model).get_encoder(), "forward")
        return model
