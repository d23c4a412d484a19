"""The one tuner: puts `MoeLinear` layers into a model and hands them what a call was told."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import get_quantization_kwargs
from peft.utils.constants import DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.pytorch_utils import Conv1D

from .bank import ExpertBank
from .checkpointing import undo_checkpointing
from .config import MoeConfig
from .entry import Entry
from .integrity import adapter_tensors, check_gathered, check_tensors, check_weights_file, names_of_tensors
from .layer import MoeLinear, check_base_layer
from .matching import check_saved_modules, check_trained_tokens, settle_patterns, warn_unmatched
from .mixing import check_adapter_names, wrappers_told
from .quantised import check_can_merge, measured
from .routing import Router, RoutingContext, adapters_of
from .targets import (
    SEQUENCE_FIRST,
    check_adapter_name,
    linear_layers_in_blocks,
    modules_outside_adapters,
    warn_of_base_experts,
)

# Methods that only some tuners have, and whose they are.
METHODS = {
    **dict.fromkeys(("set_task", "task", "task_weights"), "MOELoRA, which is told tasks"),
    **dict.fromkeys(
        ("record_routing", "routing_statistics", "set_balance_scale"), "MoLoRA and Med-MoE-LoRA, which choose by tokens"
    ),
    **dict.fromkeys(("set_group_weights", "routing", "explain"), "AT-MoE, which weighs named groups"),
}
CHECKPOINTED = "_checkpoint_wrapped_module."
# Their output projection hands its weight to a fused kernel and is never called.
MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


class MoeTuner(BaseTuner):
    """What all methods share; a method adds `build_router`.

    Args:
        model: the model to extend.
        config: its config, or a dict of them by adapter name.
        adapter_name: name of the first adapter.
    """

    # The one prefix of all our types, since they share the layer; long enough to occur in no base model's module names.
    prefix = "moelora_"
    tuner_layer_cls = MoeLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (peft declares it so)
    context: RoutingContext
    recording = False  # whether routers add up statistics
    is_causal = False  # whether the model makes text that goes on from its input
    looked_at_labels = False  # whether labels have been seen to leave prompts
    in_peft_model = False  # else adapters are switched by telling the layers
    trained_before: Sequence[str] = ()  # parameters that were trained before the last adapter came

    @abstractmethod
    def build_router(
        self, config: MoeConfig, adapter_name: str, *, key: str, in_features: int
    ) -> tuple[Router | None, bool]:
        """The router of a layer, or None for a single expert; and whether the tuner shares it among layers."""

    @classmethod
    def bank_options(cls, config: MoeConfig) -> dict[str, Any]:
        """What else a method's banks are made with."""
        return {}

    def routes_by_task(self, adapter_names: Sequence[str]) -> bool:
        """Whether the task of a row chooses its experts in one of these adapters."""
        return False

    def fill_bank(self, bank: ExpertBank, config: MoeConfig, key: str) -> None:
        """Give the bank of the module at `key` its first weights."""
        bank.reset_parameters(self.initialisation(config))

    # -- putting layers in --------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: MoeConfig, adapter_name: str) -> None:
        model_type = self.get_model_config(model).get("model_type")
        reason = f"the layers of a {model_type} model do not see the rows of a batch first"
        # transformers makes a tuner for each adapter that it adds; the layers know the first one's context only
        there = vars(model).get("forward")
        if isinstance(there, Entry) and there.tuner.model is model:
            self.context = there.tuner.context
        else:
            self.context = RoutingContext(one_task_only=reason if model_type in SEQUENCE_FIRST else None)
        self.is_encoder_decoder = bool(self.get_model_config(model).get("is_encoder_decoder"))
        # whether the loss leaves the first label of a row out, by Trainer's own rule
        loss = LOSS_MAPPING.get(str(getattr(model, "loss_type", None)))
        self.shifts_labels = loss is ForCausalLMLoss and not self.is_encoder_decoder
        self.adapters_enabled = True
        self.calibrations: dict[str, Any] = {}  # by adapter, what `calibrate` has returned
        generates = getattr(model, "can_generate", None)
        self.is_causal = bool(callable(generates) and generates()) and not self.is_encoder_decoder
        self.moelora_router = nn.ModuleDict()  # adapter -> number of experts -> Router

    def _post_injection_hook(self, model: nn.Module, config: MoeConfig, adapter_name: str) -> None:
        for method in ("forward", "generate"):
            if callable(getattr(model, method, None)):
                Entry.install(model, method, self)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name, model)
        config: Any = self.peft_config[adapter_name]
        if config.read_from is not None:  # its weights are loaded next, and peft would leave it in if that failed
            heads = [key for key, module in modules_outside_adapters(model) if any(True for _ in module.parameters())]
            named = config.modules_to_save or ()
            check_weights_file(config.read_from, [n for n in named if any(f".{k}".endswith(f".{n}") for k in heads)])
        if not any(isinstance(m, MoeLinear) and adapter_name in m.moelora_bank for m in model.modules()):
            self.context.forget(adapter_name)  # of this name, which transformers deletes without telling
        self.trained_before = [name for name, p in model.named_parameters() if p.requires_grad]
        others = [(p, p.requires_grad) for p in self.moelora_router.parameters()]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.context.used = False
        self._move_adapter_to_device_of_base_layer(adapter_name)
        config = self.peft_config[adapter_name]
        self.context.know(adapter_name, config)
        for parameter, requires_grad in others:  # a new adapter leaves the others as they were, as peft has it
            parameter.requires_grad = requires_grad

    def _prepare_adapter_config(self, peft_config: MoeConfig, model_config: dict[str, Any]) -> MoeConfig:
        if peft_config.target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
            warn_of_base_experts(self.model)
        peft_config.resolve([key for key, _ in modules_outside_adapters(self.model)])
        if peft_config.target_modules is None and model_config.get("model_type") not in (None, "custom"):
            peft_config.target_modules = sorted(linear_layers_in_blocks(self.model))
        return cast(MoeConfig, super()._prepare_adapter_config(peft_config, model_config))

    def _prepare_model(self, peft_config: MoeConfig, model: nn.Module) -> None:
        """Check every target before the first is replaced."""
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        _maybe_include_all_linear_layers(peft_config, model)
        keys = []
        for key, module in modules_outside_adapters(model):
            if self._check_target_module_exists(peft_config, key):
                check_base_layer(module, key)
                keys.append(key)
        every = dict(modules_outside_adapters(model))
        peft_config.resolve_layers(list(every), keys)
        self.check_routing(peft_config, keys)
        check_trained_tokens(peft_config, model, every)
        check_saved_modules(peft_config, list(every))
        warn_unmatched(peft_config, keys)
        settle_patterns(peft_config, keys)

    @abstractmethod
    def check_routing(self, config: MoeConfig, keys: list[str]) -> None:
        """Raise a ValueError if routers in the modules at `keys` could not know what they have to."""

    def _check_target_module_compatiblity(self, peft_config: MoeConfig, model: nn.Module, target_name: str) -> None:
        if target_name != "out_proj":  # asked for every module, and the model's config is copied for each answer
            return
        model_type = self.get_model_config(model).get("model_type")
        if model_type in MAMBA_TYPES:
            raise ValueError(
                f"Module {target_name!r} of a {model_type} model hands its weight to a fused kernel and is never "
                "called, so that an adapter would have no effect; name it in exclude_modules."
            )

    def _create_and_replace(
        self,
        peft_config: MoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = target if isinstance(target, MoeLinear) else self._new_layer(peft_config, adapter_name, target)
        experts = peft_config.experts_at(current_key)
        bank = ExpertBank(
            in_features=layer.in_features,
            out_features=layer.out_features,
            ranks=experts.ranks,
            scaling=experts.scaling,
            dropout=peft_config.lora_dropout,
            **self.bank_options(peft_config),
        )
        self.fill_bank(bank, peft_config, current_key)
        router, shared = self.build_router(peft_config, adapter_name, key=current_key, in_features=layer.in_features)
        layer.update_layer(adapter_name, bank=bank, router=router, shared=shared)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, config: MoeConfig, adapter_name: str, target: nn.Module) -> MoeLinear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, Conv1D):
            config.fan_in_fan_out = True  # saved, so that a folded adapter says it too
        return MoeLinear(
            target,
            adapter_name,
            context=self.context,
            fan_in_fan_out=config.fan_in_fan_out and not isinstance(base, nn.Linear),
            **get_quantization_kwargs(self.model),
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As in peft, which sends adapters to where the base layer is, but not to the meta device.

        Trained experts and routers would be lost there. Where all is in one place already, as it is after
        `update_layer`, peft would go through each part of the layer and those within it for nothing. What comes back
        when adapters are unloaded is the base's own module, which may have no weight that peft could hand on.
        """
        settled = not hasattr(new_module, "base_layer")
        if isinstance(new_module, MoeLinear):
            on_meta = any(p.is_meta for p in new_module.get_base_layer().parameters())
            settled = on_meta or len({t.device for t in chain(new_module.parameters(), new_module.buffers())}) == 1
        if settled:
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @staticmethod
    def initialisation(config: MoeConfig) -> bool | str:
        """What `init_lora_weights=True` stands for."""
        return config.init_lora_weights

    # peft's walks over layers do not reach what the tuner itself holds, so each is continued here

    def _sync_routers(self, *, inference_mode: bool = False, enabled: bool = True) -> None:
        for name, routers in self.moelora_router.items():
            routers.requires_grad_(enabled and not inference_mode and name in self.active_adapters)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._sync_routers(inference_mode=inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self.adapters_enabled = enabled
        self._sync_routers(enabled=enabled)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """As in peft, whose `bias="all"` goes by the ends of names, which those of other adapters' routers have too."""
        routers = [(p, p.requires_grad) for name, p in model.named_parameters() if "moelora_router." in name]
        super()._mark_only_adapters_as_trainable(model)
        for parameter, requires_grad in routers:
            parameter.requires_grad = requires_grad

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.moelora_router:
                self.moelora_router[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if adapter_name in self.moelora_router:
            del self.moelora_router[adapter_name]
        self.context.forget(adapter_name)
        self.calibrations.pop(adapter_name, None)
        if was_active:  # another one is now, and is trained
            self._sync_routers()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.model.modules():
            if isinstance(layer, MoeLinear):
                layer.cast_adapter(adapter_name, widen=autocast_adapter_dtype)
        if autocast_adapter_dtype and adapter_name in self.moelora_router:
            half = {p.dtype for p in self.moelora_router[adapter_name].parameters()} & {torch.float16, torch.bfloat16}
            if half:
                self.moelora_router[adapter_name].float()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Put shared routers where the first layer is; peft calls this too, after loading with low_cpu_mem_usage."""
        routers = self.moelora_router[adapter_name] if adapter_name in self.moelora_router else nn.ModuleDict()
        if any(p.is_meta for p in routers.parameters()):
            return
        for layer in self.model.modules():
            if isinstance(layer, MoeLinear) and adapter_name in layer.moelora_bank:
                like = cast(ExpertBank, layer.moelora_bank[adapter_name]).lora_A.weight
                routers.to(device=device or like.device, dtype=like.dtype)
                return

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        found = _part_of(adapter_name).search(key)
        if found is None:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return f"{key[: found.end('part')]}{key[found.end() - 1 :]}"

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoeConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As in peft; the last thing that runs before weights are loaded, so they are checked here."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        wanted = adapter_tensors(model, adapter_name)
        try:
            if wanted is not None:
                check_tensors(wanted, found, names_of_tensors(model), adapter_name)
        except ValueError:
            if config.read_from is not None and isinstance(model, PeftModel):
                take_out(model, adapter_name)
            raise
        config.read_from = None
        return found

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MoeConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # FSDP's activation checkpointing puts a wrapper into names of modules and takes it out of those in a state dict
        wrapped = any(CHECKPOINTED in f"{key}." for key, _ in model.named_modules(remove_duplicate=False))
        all_names = names_of_tensors(model) if wrapped else ()
        names = {name.replace(CHECKPOINTED, ""): name for name in all_names if CHECKPOINTED in name}
        state_dict = {names.get(key, key): tensor for key, tensor in state_dict.items()} if names else state_dict
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        check_gathered(found, adapter_name)
        return {key.replace(CHECKPOINTED, ""): tensor for key, tensor in found.items()} if names else found

    # calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name in METHODS:
                raise AttributeError(f"{type(self).__name__} has no {name!r}: that is for {METHODS[name]}.") from error
            raise

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """peft calls this around forward and generate, whose `adapter_names` are not for the model."""
        names = kwargs.get("adapter_names")
        with self.mixed(names), wrappers_told(self, names):
            yield

    @property
    def chosen(self) -> Sequence[str]:
        """The adapters that calls run unless they are disabled: those of a mixed batch's rows, or the active ones."""
        if self.context.names is not None:
            return adapters_of(self.context.names)
        layer = self._a_layer
        return self.active_adapters if layer is None else layer.active_adapters

    @property
    def present(self) -> Sequence[str]:
        """The adapters that calls run."""
        layer = self._a_layer
        enabled = self.adapters_enabled if layer is None else not layer.disable_adapters
        return self.chosen if enabled else ()

    @property
    def _a_layer(self) -> MoeLinear | None:
        """A layer to ask what is active, where the tuner is not told: outside of a `PeftModel`."""
        if self.in_peft_model:
            return None
        return next((m for m in self.model.modules() if isinstance(m, MoeLinear) and m.context is self.context), None)

    @property
    def reads_prompts(self) -> bool:
        """Whether a chosen adapter routes by prompts, which it no longer does when merged."""
        return any(name in self.context.by_prompt and name not in self.context.in_base for name in self.chosen)

    @contextmanager
    def mixed(self, names: Sequence[str] | None) -> Iterator[None]:
        """Give each row of the calls in a `with` block its adapter, or `"__base__"` for none.

        Args:
            names: one per row; None for no change.

        Raises:
            ValueError: unknown adapters, training, merged adapters, or a model whose layers do not show rows.
            TypeError: not a list of names.
        """
        if names is None or not self.adapters_enabled:
            yield
            return
        check_adapter_names(self, names)
        with self.context.mixed(names):
            yield

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Not for experts; peft's LoRA makes a new adapter of a weighted sum here.

        A sum of adapters with a router each is none with one router: as much of an expert as a softmax over its own
        adapter's experts gives it cannot come from a softmax over all.

        Raises:
            NotImplementedError: always; the message says what to do instead.
        """
        raise NotImplementedError(
            f"add_weighted_adapter cannot combine {adapters}: each has a router that weighs its own experts, and no "
            "single router does what they do together. To add adapters up, activate them together with "
            "model.base_model.set_adapter([...]); to weigh them, fold each (peft_moe.fold) and call "
            "add_weighted_adapter on the stock LoRAs, or make these the experts of one adapter (peft_moe.from_loras, "
            "GroupedMoeConfig)."
        )

    # merging

    def known_adapters(self, adapter_names: Sequence[str] | None) -> Sequence[str]:
        """Names of adapters; None for the active ones.

        Raises:
            TypeError: not a list.
            ValueError: there is none of such a name, so that nothing would be done for it.
        """
        if adapter_names is None:
            return self.active_adapters
        if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
            raise TypeError(f"Names of adapters should be a list of strings, got {adapter_names!r}.")
        if unknown := [name for name in adapter_names if name not in self.peft_config]:
            raise ValueError(f"There is no adapter {unknown[0]!r}; the model has {sorted(self.peft_config)}.")
        return adapter_names

    def check_mergeable(self, adapter_name: str) -> None:
        """Raise a ValueError if what an adapter adds depends on the input, and no calibration stands in for it."""
        for layer in self.model.modules():
            if isinstance(layer, MoeLinear):
                layer.check_mergeable(adapter_name)

    def _check_all_mergeable(self, adapter_names: list[str] | None, *, safe_merge: bool) -> None:
        """Raise a ValueError unless adapters, None for the active ones, can be merged into all of their layers."""
        names = self.known_adapters(adapter_names)
        for name in names:
            self.check_mergeable(name)
        for key, layer in self.model.named_modules():
            if isinstance(layer, MoeLinear) and any(name in layer.moelora_bank for name in names):
                check_can_merge(layer, key)
                if safe_merge:  # peft looks at each merged weight, when those before it are merged
                    layer.check_finite(names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in peft; into quantised weights with a warning of what was measured to be lost.

        Raises:
            ValueError: what an adapter adds depends on the input and was not calibrated, or a quantised layer cannot be
                merged into; nothing is merged then.
        """
        self._check_all_mergeable(adapter_names, safe_merge=safe_merge)
        with measured(self.context):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_all_mergeable(adapter_names, safe_merge=safe_merge)
        with measured(self.context):
            unloaded = super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        model = cast(nn.Module, unloaded)
        undo_checkpointing(model, self.context)
        for method in ("forward", "generate"):
            Entry.remove(model, method)
        return model


@cache
def _part_of(adapter_name: str) -> re.Pattern[str]:
    """Finds an adapter's part of a layer or of the tuner in the name of a tensor."""
    return re.compile(rf"(^|\.)(?P<part>moelora_(?:bank|router))\.{re.escape(adapter_name)}\.")


def take_out(model: PeftModel, adapter_name: str) -> None:
    """Leave the model as it was before an adapter was put in whose weights could not be loaded."""
    tuner = cast(MoeTuner, model.base_model)
    if tuner.context.used:  # a config that was read can also be that of a new adapter, which may be trained by now
        return
    if list(model.peft_config) != [adapter_name]:
        model.delete_adapter(adapter_name)
        return
    for name, parameter in tuner.unload().named_parameters():
        parameter.requires_grad_(name in tuner.trained_before)


def _welcome_peft_model(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Runs when a module becomes part of another: a PeftModel that gets our tuner also gets an entry for task ids."""
    if name == "base_model" and isinstance(child, MoeTuner) and isinstance(parent, PeftModel):
        Entry.install(parent, "forward", child)
        child.in_peft_model = True


# The tuner is built before the PeftModel knows it and is never told of it; this is torch's hook for such cases.
register_module_module_registration_hook(_welcome_peft_model)
