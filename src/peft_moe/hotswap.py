"""Put the weights of a saved adapter into one that is in a model, so that a compiled model stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from .bank import ExpertBank
from .config import MoeConfig
from .directory import read_config
from .grouped.config import GroupedMoeConfig
from .integrity import read_weights
from .layer import MoeLinear
from .token_routed import TokenRoutedTuner
from .tuner import MoeTuner

# Only training knows them: the layers, and so the config, keep theirs.
OF_TRAINING = {
    "inference_mode", "init_lora_weights", "lora_dropout", "balance_loss", "balance_coefficient", "localized_delta",
    "router_jitter", "base_coefficient",
}  # fmt: skip
# Told by what they come to in each layer: which there are, ranks and scalings.
BY_LAYER = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "r", "lora_alpha",
    "rank_pattern", "alpha_pattern", "use_rslora", "num_experts", "num_experts_pattern", "expert_schedule",
    "experts_per_layer", "expert_ranks", "base_expert_rank", "expert_layout",
}  # fmt: skip
# They can be another's, and then are.
TAKEN_OVER = {
    "peft_version", "moe_version", "auto_mapping", "base_model_name_or_path", "revision", "tasks", "default_task",
    "groups", "general_expert", "group_weights", "check_base_model",
}  # fmt: skip
REMEDY = "load it beside the other with model.load_adapter instead."


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **hub_kwargs: Any,
) -> None:
    """Replace an adapter by a saved one of the same type and shape, in place.

    Afterwards the model does what it would do had it loaded the saved adapter under that name: weights, names of tasks,
    default task and stored group weights are the saved one's. What only matters in training (dropout, balance losses)
    stays. All is compared before the first weight is written. As `peft.utils.hotswap.hotswap_adapter`, which is for
    LoRA only, it spares a compiled model the compilation.

    Args:
        model: a `PeftModel`, compiled or not.
        model_name_or_path: the directory or Hub id of the saved adapter.
        adapter_name: the adapter in the model.
        torch_device: where the weights are read to on their way; None for the CPU.
        hub_kwargs: for a Hub id: `revision`, `token`, `subfolder`, `cache_dir`.

    Raises:
        ValueError: adapters of different types, layers, ranks, scalings or routing; files that are broken, or hold
            numbers that are not finite; a merged adapter; a task chosen with `set_task` that the new one does not know.
            The model is then as before.
        TypeError: not a `PeftModel` with one of our adapters.

    Example:
        >>> model = torch.compile(PeftModel.from_pretrained(base_model, "monday"))
        >>> hotswap_adapter(model, "tuesday")
    """
    peft_model, tuner, old = _adapter_of(model, adapter_name)
    where = str(model_name_or_path)
    config: Any = read_config(model_name_or_path, **hub_kwargs)
    check_configs(old, config, where)
    check_layers(tuner, config, adapter_name, where)
    tuner.context.check_choice(adapter_name, config)
    of_groups = isinstance(config, GroupedMoeConfig) and config.group_weights is not None
    control = config.control(config.group_weights) if of_groups else None
    weights = read_weights(model_name_or_path, device=torch_device or "cpu", **hub_kwargs)
    places = get_peft_model_state_dict(
        peft_model, state_dict=saved_tensors(peft_model), adapter_name=adapter_name, save_embedding_layers=False
    )
    leave_out_base_layers(peft_model, places, weights, where)
    check_weights(places, weights, where)

    with tuner.context.turn(), torch.no_grad():  # calls of other threads wait
        for key, place in places.items():
            place.copy_(weights[key])
        for name in OF_TRAINING & vars(old).keys():
            setattr(config, name, getattr(old, name))
        peft_model.peft_config[adapter_name] = config
        tuner.context.know(adapter_name, config)
        tuner.context.fix(adapter_name, control)
    if isinstance(tuner, TokenRoutedTuner) and tuner.recording:
        tuner.record_routing(adapters=[adapter_name])


def _adapter_of(model: nn.Module, adapter_name: str) -> tuple[PeftModel, MoeTuner, MoeConfig]:
    """The model that is not compiled, its tuner, and the config of the adapter that is to be replaced."""
    peft_model = getattr(model, "_orig_mod", model)  # of torch.compile
    tuner = getattr(peft_model, "base_model", None)
    if not isinstance(peft_model, PeftModel) or not isinstance(tuner, MoeTuner):
        raise TypeError(
            f"hotswap_adapter takes a PeftModel with an adapter of peft_moe, not a {type(peft_model).__name__}; for "
            "LoRA there is peft.utils.hotswap.hotswap_adapter."
        )
    config = peft_model.peft_config.get(adapter_name)
    if not isinstance(config, MoeConfig):
        raise ValueError(f"adapter_name={adapter_name!r}; the model has {sorted(peft_model.peft_config)}.")
    if adapter_name in tuner.context.in_base:
        raise ValueError(
            f"Cannot hot-swap adapter {adapter_name!r} because it is merged into the base weights; call "
            "model.unmerge_adapter() first."
        )
    return peft_model, tuner, config


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a state dict would have, without the copies that one of a quantised base has."""
    passing = {f"{key}.{name}" for key, module in model.named_modules() for name in module._non_persistent_buffers_set}
    named = chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach() for name, tensor in named if name not in passing}


def check_configs(old: MoeConfig, new: PeftConfig, where: str) -> None:
    """Raise a ValueError unless a saved adapter's layers compute as those of the adapter that is there."""
    if type(new) is not type(old):
        types = [getattr(config.peft_type, "value", config.peft_type) for config in (new, old)]
        raise ValueError(f"{where!r} is a {types[0]} adapter and the one in the model {types[1]}; {REMEDY}")
    # the tasks tell which experts are meant for a row, where any are
    for_groups = getattr(old, "expert_groups", None) or getattr(old, "general_tasks", None)
    may_differ = OF_TRAINING | BY_LAYER | (TAKEN_OVER - {"tasks"} if for_groups else TAKEN_OVER)
    names = [name for name in old.__dataclass_fields__ if name not in may_differ]
    pairs = {name: (getattr(new, name), getattr(old, name)) for name in names}
    # names that peft adds to it each time it makes a model
    pairs["modules_to_save"] = (set(new.modules_to_save or ()), set(old.modules_to_save or ()))
    if isinstance(old, GroupedMoeConfig) and isinstance(new, GroupedMoeConfig):
        pairs["names of experts in groups"] = (new.names, old.names)
        pairs["general_expert"] = (new.general_expert is not None, old.general_expert is not None)
    for name, (value, there) in pairs.items():
        if _plain(value) != _plain(there):
            raise ValueError(
                f"{where!r} cannot be swapped in: its {name} is {value!r}, that of the adapter in the model is "
                f"{there!r}; {REMEDY}"
            )


def check_layers(tuner: MoeTuner, config: MoeConfig, adapter_name: str, where: str) -> None:
    """Raise a ValueError unless a saved adapter has the ranks and scalings of the one that is there in all layers."""
    for key, layer in tuner.model.named_modules():
        if not isinstance(layer, MoeLinear) or adapter_name not in layer.moelora_bank:
            continue
        bank, experts = cast(ExpertBank, layer.moelora_bank[adapter_name]), config.experts_at(key)
        for what, new, old in (("ranks", experts.ranks, bank.ranks), ("scaling", experts.scaling, bank.factors)):
            if tuple(new) != tuple(old):
                raise ValueError(
                    f"{where!r} cannot be swapped in: the {what} of its experts in {key!r} are {tuple(new)}, those in "
                    f"the model are {tuple(old)}; {REMEDY}"
                )


def leave_out_base_layers(
    model: nn.Module, places: Mapping[str, torch.Tensor], weights: dict[str, torch.Tensor], where: str
) -> None:
    """Drop embeddings and heads of the base model, which peft saves beside an adapter that has them for targets.

    Raises:
        ValueError: one of them is not as in the model, so that the adapter was trained on another base model.
    """
    there = saved_tensors(model)
    for key in [key for key in weights if key not in places and key.rpartition(".")[0].endswith(".base_layer")]:
        weight, own = weights.pop(key), there.get(key)
        if own is None or own.shape != weight.shape or not torch.equal(own.cpu(), weight.to("cpu", own.dtype)):
            raise ValueError(
                f"{where!r} cannot be swapped in: {key!r}, which was saved beside it, is not as in this base model; "
                f"{REMEDY}"
            )


def check_weights(places: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise a ValueError unless there is a weight for each place, and a place of its shape for each weight."""
    if empty := [key for key, place in places.items() if place.is_meta]:
        raise ValueError(f"The adapter in the model has no weights yet, such as {empty[0]!r}; {REMEDY}")
    if different := sorted(places.keys() ^ weights.keys()):
        has = "lacks" if different[0] in places else "has"
        raise ValueError(
            f"{where!r} cannot be swapped in: it {has} {different[0]!r}, unlike the adapter in the model "
            f"({len(different)} such weights); {REMEDY}"
        )
    for key, place in places.items():
        if weights[key].shape != place.shape:
            raise ValueError(
                f"{where!r} cannot be swapped in: its {key!r} has shape {tuple(weights[key].shape)}, and that in the "
                f"model {tuple(place.shape)}; {REMEDY}"
            )


def _plain(value: Any) -> Any:
    """Without the difference between a set and a list, which JSON does not have."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
