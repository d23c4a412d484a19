"""Folding: a routed adapter under weights that no input changes, written as a stock LoRA that needs no peft_moe.

For task j of MOELoRA the adapter is `Σ_i ω_ji B_i A_i` times the scaling, so A is kept, the columns of expert i of B
are multiplied by ω_ji and the scaling, and a LoRA of the same rank with `lora_alpha = r` gives the same numbers (arXiv
2310.18339, section III). Weights of AT-MoE that a user has fixed are folded in the same way. Where experts are chosen
by the input, what `calibrate` has found to come closest is written instead, and its errors are on the card.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import pad

from .calibrate import Calibration
from .card_methods import method_of
from .config import MoeConfig
from .directory import adapter_directory, check_not_over, read_config
from .fold_card import How, errors_section, folded_card
from .folding import Banks, StateDict, fold_banks, keys_of_banks
from .grouped.config import GroupedMoeConfig
from .grouped.routers import fixed_weights
from .integrity import read_weights, whole
from .layer import MoeLinear
from .moelora.config import MoeLoraConfig
from .moelora.model import weights_of_task
from .offloading import offloaded
from .routing import Control
from .routing.tasks import Task

# What a LoRA is that was made by each method of `calibrate`.
STAND_INS = {
    "least_squares": "what comes closest to the adapter",
    "mean_gate": "the adapter with the mean weight of each expert",
}
# Fields that mean the same in a stock LoRA.
CARRIED = (
    "task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "trainable_token_indices", "fan_in_fan_out", "bias",
)  # fmt: skip


def fold(
    source: PeftModel | str | Path,
    out_dir: str | Path,
    *,
    task: Task | Sequence[Task] | None = None,
    routing: Mapping[str, Any] | None = None,
    adapter_name: str | None = None,
    overwrite: bool = False,
    **hub_kwargs: Any,
) -> Path:
    """Write an adapter as a stock LoRA directory: exactly under one task or fixed weights, else as it was calibrated.

    The directory holds what any peft can load without peft_moe: `lora_A` and `lora_B` with the scaling inside,
    `lora_alpha = r`, one rank throughout (smaller banks are filled up with zeros, because some servers know one rank
    and one alpha only). Modules in `modules_to_save`, trained token embeddings and biases come along if the adapter has
    them; vLLM and llama.cpp do not take those.

    An adapter whose experts are chosen by the input is folded from a model for which `calibrate` was called; the card
    then has the errors.

    Args:
        source: a model with the adapter, or a directory or Hub id to read it from; the base model is not needed.
        out_dir: where to write; made if missing.
        task: of a MOELoRA adapter, the task by name or id, or several for the mean of their embeddings.
        routing: of an AT-MoE adapter, the arguments of `set_group_weights` that fix all weights, such as `{"weights":
            {"style": {"rigorous": 1.0}}, "group_weights": {"style": 1.0}}`; None for what the model, or the adapter's
            config, has fixed.
        adapter_name: which adapter of a model; None for the active one.
        overwrite: replace the adapter and README.md that are in `out_dir`.
        hub_kwargs: for a Hub id: `revision`, `token`, `subfolder`, `cache_dir`.

    Returns:
        `out_dir`.

    Raises:
        ValueError: unknown task, weights that depend on the input without calibration, an adapter of another kind,
            broken files, or `out_dir` is the adapter's own directory.
        TypeError: a model that is not a `PeftModel`, such as one that is still wrapped for training; an argument that
            is none.
        FileExistsError: `out_dir` holds files of these names, and `overwrite` is False.

    Example:
        >>> fold(model, "icd-lora", task="icd")
        >>> PeftModel.from_pretrained(base_model, "icd-lora")
    """
    known = inspect.signature(hf_hub_download).parameters
    if unknown := sorted(name for name in hub_kwargs if name not in known or isinstance(source, PeftModel)):
        raise TypeError(f"fold has no argument {unknown[0]!r} here; other ones than its own are for a Hub id alone.")
    if isinstance(source, (str, Path)):
        check_not_over(Path(out_dir), [Path(source, hub_kwargs.get("subfolder") or "")])
    adapter = _read(source, adapter_name, hub_kwargs)
    with whole(source):
        banks, how = _banks(adapter, task, routing)
        lora_config, lora_state_dict = to_lora(adapter.config, adapter.state_dict, banks)
    with adapter_directory(Path(out_dir), overwrite=overwrite) as work:
        lora_config.save_pretrained(str(work))
        save_file(lora_state_dict, work / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (work / "README.md").write_text(folded_card(adapter.config, lora_config, how), encoding="utf-8")
    return Path(out_dir)


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory or on disk, in peft's own terms.

    Args:
        config, state_dict: as peft saves them.
        control: what a user has fixed.
        layers: of an adapter in memory, by module.
        name: of an adapter in memory.
        calibration: what `calibrate` said of it; None if it was not called, or all weights are fixed.
    """

    config: MoeConfig
    state_dict: StateDict
    control: Control | None = None
    layers: Mapping[str, MoeLinear] = field(default_factory=dict)
    name: str = ""
    calibration: Calibration | None = None


def _banks(adapter: Adapter, task: Any, routing: Mapping[str, Any] | None) -> tuple[Banks, How]:
    """A and B of every module as a LoRA, and what they are of the adapter.

    Raises:
        ValueError: the arguments do not fix all weights, and no calibration stands in for what depends on the input.
    """
    config, state_dict = adapter.config, adapter.state_dict
    kind = method_of(config).name
    if isinstance(config, MoeLoraConfig):
        if task is None or routing is not None:
            raise ValueError(f"MOELORA adapters are folded for a task; pass task= with one of {config.task_names}.")
        how = How(
            f"LoRA for task {task!r}",
            f"One task of a MOELORA adapter with the tasks {', '.join(config.task_names)}",
            f"It gives the same outputs as the adapter with `task_ids={task!r}`",
        )
        return fold_banks(config, state_dict, weights_of_task(config, state_dict, task)), how
    if task is not None:
        raise ValueError(f"task={task!r}: {kind} adapters choose experts by no task; leave task= out.")
    if isinstance(config, GroupedMoeConfig):
        experts = ", ".join(f"{group} ({', '.join(names)})" for group, names in config.names.items())
        control = config.control(routing) if routing is not None else adapter.control
        if routing is not None or adapter.calibration is None:
            choice = routing if routing is not None else _stored(adapter)
            fixed = f"with its weights fixed by `{choice}`" if choice else "with those weights"
            how = How(
                "LoRA of fixed experts",
                f"An AT-MoE adapter of the groups {experts} with fixed weights",
                f"It gives the same outputs as the adapter {fixed}",
            )
            return fold_banks(config, state_dict, fixed_weights(config, state_dict, control)), how
    elif routing is not None:
        raise ValueError(f"routing={routing!r}: {kind} adapters have no groups; leave routing= out.")
    return _stand_ins(adapter)


def _stored(adapter: Adapter) -> Any:
    """The weights that the adapter's config says, if they are what is fixed now."""
    config = cast(GroupedMoeConfig, adapter.config)
    if not config.group_weights or adapter.control is None:
        return None
    there, stored = adapter.control.numbers(), config.control(config.group_weights).numbers()
    return config.group_weights if there.shape == stored.shape and torch.equal(there, stored) else None


def _stand_ins(adapter: Adapter) -> tuple[Banks, How]:
    config, state_dict = adapter.config, adapter.state_dict
    name = method_of(config).name
    if not any(".moelora_router." in key for key in state_dict):  # one expert everywhere
        what = f"A {name} adapter with one expert in each layer"
        how = How(f"LoRA of a {name} adapter", what, "It gives the same outputs as the adapter")
        return fold_banks(config, state_dict, lambda key: None), how
    if adapter.calibration is None:
        raise ValueError(
            f"Experts of {name} adapters are chosen by the input, so that no LoRA does the same. For the one that "
            "comes closest, load the model and call peft_moe.calibrate(model, batches) before fold(model, ...), or use "
            "peft-moe fold ADAPTER --calibrate DATA."
        )
    banks = {key: adapter.layers[key].folded(adapter.name) for key in keys_of_banks(state_dict)}
    how = How(
        f"LoRA in place of a {name} adapter",
        f"A {name} adapter, whose experts are chosen by the input",
        f"It is {STAND_INS[adapter.calibration.method]} over the calibration data, and not the same",
        errors_section(adapter.calibration),
    )
    return banks, how


@torch.no_grad()
def to_lora(config: MoeConfig, state_dict: StateDict, banks: Banks) -> tuple[LoraConfig, StateDict]:
    """Config and state dict of a stock LoRA with these A and B, in the form that peft saves."""
    rank = max(a.shape[0] for a, _ in banks.values())
    folded = {}
    for key, (a, b) in banks.items():
        missing = rank - a.shape[0]
        prefix = f"base_model.model.{key}"
        # pad copies even where there is nothing to add
        folded[f"{prefix}.lora_A.weight"] = (pad(a, (0, 0, 0, missing)) if missing else a).contiguous()
        folded[f"{prefix}.lora_B.weight"] = (pad(b, (0, missing)) if missing else b).contiguous()
    others = {k: v.contiguous() for k, v in state_dict.items() if ".moelora_" not in k}
    fields = {name: getattr(config, name) for name in CARRIED}
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, inference_mode=True, **fields), {**folded, **others}


def _read(source: PeftModel | str | Path, adapter_name: str | None, hub_kwargs: dict[str, Any]) -> Adapter:
    if isinstance(source, PeftModel):
        if adapter_name is None and len(source.active_adapters) != 1:
            raise ValueError(f"The active adapters are {source.active_adapters}; say which with adapter_name=.")
        name = adapter_name or source.active_adapters[0]
        if name not in source.peft_config:
            raise ValueError(f"adapter_name={name!r}; the model has {sorted(source.peft_config)}.")
        config = check_config(source.peft_config[name], name)
        # Not state_dict(), which would copy or unpack a quantised base too.
        tensors = {n: t.detach() for n, t in chain(source.named_parameters(), source.named_buffers())}
        state_dict = get_peft_model_state_dict(source, state_dict=tensors, adapter_name=name)
        names = {id(tensor): tensor_name for tensor_name, tensor in tensors.items()}
        state_dict = {k: offloaded(source, names[id(t)]) if t.is_meta else t for k, t in state_dict.items()}
        tuner: Any = source.base_model
        layers = {key: layer for key, layer in tuner.model.named_modules() if isinstance(layer, MoeLinear)}
        control = tuner.context.controls.get(name)
        open_choices = any(layer.reads_input(name) for layer in layers.values())
        calibration = tuner.calibrations.get(name) if open_choices else None
        return Adapter(config, state_dict, control, layers, name, calibration)
    if isinstance(source, nn.Module):
        raise TypeError(
            f"fold takes a PeftModel or a directory, not a {type(source).__name__}; unwrap the model first."
        )
    if not isinstance(source, (str, Path)):
        raise TypeError(f"fold takes a PeftModel, a directory or a Hub id, not a {type(source).__name__}.")
    config = check_config(read_config(source, **hub_kwargs), source)
    fixed = isinstance(config, GroupedMoeConfig) and config.group_weights
    control = cast(GroupedMoeConfig, config).control(fixed) if fixed else None
    return Adapter(config, read_weights(str(source), **hub_kwargs), control)


def check_config(config: PeftConfig, source: object) -> MoeConfig:
    """The config of an adapter that can be folded; a ValueError for others."""
    if not isinstance(config, MoeConfig):
        raise ValueError(
            f"{str(source)!r} is a {getattr(config.peft_type, 'value', config.peft_type)} adapter; fold takes adapters "
            "of peft_moe."
        )
    return config
