"""Folding: a routed adapter under weights that no input changes, written as a stock LoRA that needs no peft_moe.

For task j of MOELoRA the adapter is `Σ_i ω_ji B_i A_i` times the scaling, so A is kept, the columns of expert i of B
are multiplied by ω_ji and the scaling, and a LoRA of the same rank with `lora_alpha = r` gives the same numbers (arXiv
2310.18339, section III). Weights of AT-MoE that a user has fixed are folded in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import pad

from .directory import adapter_directory
from .folding import StateDict, WeightsAt, fold_banks
from .grouped.config import GroupedMoeConfig
from .grouped.routers import fixed_weights
from .moelora.config import MoeLoraConfig
from .moelora.model import weights_of_task
from .routing import Control
from .routing.tasks import Task

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
    """Write the adapter under one task, or under fixed weights, as a stock LoRA directory.

    The directory holds what any peft can load without peft_moe: `lora_A` and `lora_B` with the scaling inside,
    `lora_alpha = r`, one rank throughout (smaller banks are filled up with zeros, because some servers know one rank
    and one alpha only). Modules in `modules_to_save`, trained token embeddings and biases come along if the adapter has
    them; vLLM and llama.cpp do not take those.

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
        ValueError: unknown task, weights that still depend on the input, or an adapter of another kind.
        TypeError: a model that is not a `PeftModel`, such as one that is still wrapped for training.
        FileExistsError: `out_dir` holds files of these names, and `overwrite` is False.

    Example:
        >>> fold(model, "icd-lora", task="icd")
        >>> PeftModel.from_pretrained(base_model, "icd-lora")
    """
    config, state_dict, control = _read(source, adapter_name, hub_kwargs)
    if isinstance(config, MoeLoraConfig):
        if task is None or routing is not None:
            raise ValueError(f"MOELORA adapters are folded for a task; pass task= with one of {config.task_names}.")
        weights_at, choice = weights_of_task(config, state_dict, task), cast(Any, task)
    else:
        if task is not None:
            raise ValueError(f"task={task!r}: GROUPEDMOE adapters know no tasks; pass routing= to fix their weights.")
        control = config.control(routing) if routing is not None else control
        weights_at, choice = fixed_weights(config, state_dict, control), routing or config.group_weights
    lora_config, lora_state_dict = fold_state_dict(config, state_dict, weights_at)
    with adapter_directory(Path(out_dir), overwrite=overwrite) as work:
        lora_config.save_pretrained(str(work))
        save_file(lora_state_dict, work / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (work / "README.md").write_text(_card(config, lora_config, choice), encoding="utf-8")
    return Path(out_dir)


@torch.no_grad()
def fold_state_dict(
    config: MoeLoraConfig | GroupedMoeConfig, state_dict: StateDict, weights_at: WeightsAt
) -> tuple[LoraConfig, StateDict]:
    """Config and state dict of the stock LoRA that an adapter is under fixed weights, in the form that peft saves."""
    banks = fold_banks(config, state_dict, weights_at)
    rank = max(a.shape[0] for a, _ in banks.values())
    folded = {}
    for key, (a, b) in banks.items():
        missing = rank - a.shape[0]
        prefix = f"base_model.model.{key}"
        folded[f"{prefix}.lora_A.weight"] = pad(a, (0, 0, 0, missing)).contiguous()
        folded[f"{prefix}.lora_B.weight"] = pad(b, (0, missing)).contiguous()
    others = {k: v.contiguous() for k, v in state_dict.items() if ".moelora_" not in k}
    fields = {name: getattr(config, name) for name in CARRIED}
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, inference_mode=True, **fields), {**folded, **others}


def _read(
    source: PeftModel | str | Path, adapter_name: str | None, hub_kwargs: dict[str, Any]
) -> tuple[MoeLoraConfig | GroupedMoeConfig, StateDict, Control | None]:
    """Config, state dict and fixed weights of an adapter, in memory or on disk, in peft's own terms."""
    if isinstance(source, PeftModel):
        if adapter_name is None and len(source.active_adapters) != 1:
            raise ValueError(f"The active adapters are {source.active_adapters}; say which with adapter_name=.")
        adapter_name = adapter_name or source.active_adapters[0]
        if adapter_name not in source.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r}; the model has {sorted(source.peft_config)}.")
        config = _check(source.peft_config[adapter_name], adapter_name)
        # Not state_dict(), which would copy or unpack a quantised base too.
        tensors = {n: t.detach() for n, t in chain(source.named_parameters(), source.named_buffers())}
        state_dict = get_peft_model_state_dict(source, state_dict=tensors, adapter_name=adapter_name)
        tuner: Any = source.base_model
        return config, state_dict, tuner.context.controls.get(adapter_name)
    if isinstance(source, nn.Module):
        raise TypeError(
            f"fold takes a PeftModel or a directory, not a {type(source).__name__}; unwrap the model first."
        )
    config = _check(PeftConfig.from_pretrained(str(source), **hub_kwargs), source)
    control = None
    if isinstance(config, GroupedMoeConfig) and config.group_weights:
        control = config.control(config.group_weights)
    return config, load_peft_weights(str(source), device="cpu", **hub_kwargs), control


def _check(config: PeftConfig, source: object) -> MoeLoraConfig | GroupedMoeConfig:
    if not isinstance(config, (MoeLoraConfig, GroupedMoeConfig)):
        raise ValueError(
            f"{str(source)!r} is a {getattr(config.peft_type, 'value', config.peft_type)} adapter; fold takes MOELORA "
            "adapters, whose experts depend on the task alone, and GROUPEDMOE adapters with fixed weights."
        )
    return config


def _card(config: MoeLoraConfig | GroupedMoeConfig, lora_config: LoraConfig, choice: Any) -> str:
    """The README of a folded adapter."""
    base = config.base_model_name_or_path
    data = ModelCardData(base_model=base, library_name="peft", tags=["lora", "peft-moe"])
    if isinstance(config, MoeLoraConfig):
        title, how = f"LoRA for task {choice!r}", f"with `task_ids={choice!r}`"
        what = f"One task of a MOELORA adapter with the tasks {', '.join(config.task_names)}"
    else:
        experts = ", ".join(f"{group} ({', '.join(names)})" for group, names in config.names.items())
        title, how = (
            "LoRA of fixed experts",
            f"with its weights fixed by `{choice}`" if choice else "with those weights",
        )
        what = f"An AT-MoE adapter of the groups {experts} with fixed weights"
    text = f"""---
{data.to_yaml()}
---

# {title}

{what}, folded by peft_moe into a stock LoRA of rank {lora_config.r}. It gives the same outputs as the adapter {how} and
needs only peft:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/directory")  # base_model: {base or "the adapter's"}
```
"""
    return str(ModelCard(text))
