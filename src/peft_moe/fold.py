"""Folding: a routed adapter under one task, written as a stock LoRA that needs no peft_moe to load.

For task j the adapter is `Σ_i ω_ji B_i A_i` times the scaling, so A is kept, the columns of expert i of B are
multiplied by ω_ji and the scaling, and a LoRA of the same rank with `lora_alpha = r` gives the same numbers (arXiv
2310.18339, section III).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import pad

from .bank import ExpertBank
from .moelora.config import MoeLoraConfig
from .moelora.model import new_router
from .routing import encode_tasks
from .routing.tasks import Task

BANK = re.compile(r"^base_model\.model\.(?P<key>.+)\.moelora_bank\.lora_A\.weight$")
# Fields that mean the same in a stock LoRA.
CARRIED = (
    "task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "trainable_token_indices", "fan_in_fan_out",
)  # fmt: skip


def fold(
    source: PeftModel | str | Path,
    out_dir: str | Path,
    *,
    task: Task | Sequence[Task],
    adapter_name: str | None = None,
    overwrite: bool = False,
    **hub_kwargs: Any,
) -> Path:
    """Write the adapter under one task as a stock LoRA directory.

    The directory holds what any peft can load without peft_moe: `lora_A` and `lora_B` with the scaling inside,
    `lora_alpha = r`, one rank throughout (smaller banks are filled up with zeros, because some servers know one rank
    and one alpha only). Modules in `modules_to_save` and trained token embeddings come along if the adapter has them;
    vLLM and llama.cpp do not take those.

    Args:
        source: a model with the adapter, or a directory or Hub id to read it from; the base model is not needed.
        out_dir: where to write; made if missing.
        task: the task by name or id, or several for the mean of their embeddings.
        adapter_name: which adapter of a model; None for the active one.
        overwrite: replace the adapter and README.md that are in `out_dir`.
        hub_kwargs: for a Hub id: `revision`, `token`, `subfolder`, `cache_dir`.

    Returns:
        `out_dir`.

    Raises:
        ValueError: unknown task, or an adapter of another kind.
        TypeError: a model that is not a `PeftModel`, such as one that is still wrapped for training.
        FileExistsError: `out_dir` holds files of these names, and `overwrite` is False.

    Example:
        >>> fold(model, "icd-lora", task="icd")
        >>> PeftModel.from_pretrained(base_model, "icd-lora")
    """
    config, state_dict = _read(source, adapter_name, hub_kwargs)
    lora_config, lora_state_dict = fold_state_dict(config, state_dict, task)
    _write(Path(out_dir), lora_config, lora_state_dict, _card(config, lora_config, task), overwrite)
    return Path(out_dir)


def _write(out_dir: Path, config: LoraConfig, state_dict: dict[str, torch.Tensor], card: str, overwrite: bool) -> None:
    """Write everything beside `out_dir` first; the config, without which nothing loads, comes last."""
    files = (SAFETENSORS_WEIGHTS_NAME, "README.md", CONFIG_NAME)
    there = [name for name in files if (out_dir / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{out_dir} holds {there} already; choose another directory, or pass overwrite=True.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as work:
        config.save_pretrained(work)
        save_file(state_dict, Path(work) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (Path(work) / "README.md").write_text(card, encoding="utf-8")
        out_dir.mkdir(exist_ok=True)
        for name in files:
            (Path(work) / name).replace(out_dir / name)


@torch.no_grad()
def fold_state_dict(
    config: MoeLoraConfig, state_dict: dict[str, torch.Tensor], task: Task | Sequence[Task]
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Config and state dict of the stock LoRA that an adapter is under one task; state dicts are as peft saves them."""
    banks = {m["key"]: state_dict[name] for name in state_dict if (m := BANK.match(name))}
    if not banks:
        raise ValueError("The adapter has no '….moelora_bank.lora_A.weight'.")
    several = isinstance(task, Sequence) and not isinstance(task, str)
    ids = encode_tasks([task] if several else task, config.task_names)
    rank = max(a.shape[0] for a in banks.values())
    folded = {}
    for key in banks:
        a, b = _fold_layer(config, state_dict, key, ids)
        missing = rank - a.shape[0]
        prefix = f"base_model.model.{key}"
        folded[f"{prefix}.lora_A.weight"] = pad(a, (0, 0, 0, missing)).contiguous()
        folded[f"{prefix}.lora_B.weight"] = pad(b, (0, missing)).contiguous()
    others = {k: v.contiguous() for k, v in state_dict.items() if ".moelora_" not in k}
    fields = {name: getattr(config, name) for name in CARRIED}
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, inference_mode=True, **fields), {**folded, **others}


def _fold_layer(
    config: MoeLoraConfig, state_dict: dict[str, torch.Tensor], key: str, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, in) and B (out, R) of one layer. The layer's own modules compute them, filled from the state dict."""
    prefix = f"base_model.model.{key}.moelora_"
    a, b = state_dict[f"{prefix}bank.lora_A.weight"], state_dict[f"{prefix}bank.lora_B.weight"]
    experts = config.experts_at(key)
    with torch.device("meta"):
        bank = ExpertBank(in_features=a.shape[1], out_features=b.shape[0], ranks=experts.ranks, scaling=experts.scaling)
    bank.load_state_dict({"lora_A.weight": a, "lora_B.weight": b}, assign=True)
    n = len(experts.ranks)
    if n == 1:
        return bank.folded(None)
    at = f"{prefix}router." if config.gate_scope == "layer" else f"base_model.moelora_router.{n}."
    with torch.device("meta"):
        router = new_router(config, n)
    router.load_state_dict({k.removeprefix(at): v for k, v in state_dict.items() if k.startswith(at)}, assign=True)
    return bank.folded(router.of_tasks(ids.to(a.device))[0])


def _read(
    source: PeftModel | str | Path, adapter_name: str | None, hub_kwargs: dict[str, Any]
) -> tuple[MoeLoraConfig, dict[str, torch.Tensor]]:
    """Config and state dict of an adapter, in memory or on disk, in peft's own terms."""
    if isinstance(source, PeftModel):
        if adapter_name is None and len(source.active_adapters) != 1:
            raise ValueError(f"The active adapters are {source.active_adapters}; say which with adapter_name=.")
        adapter_name = adapter_name or source.active_adapters[0]
        if adapter_name not in source.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r}; the model has {sorted(source.peft_config)}.")
        config = _check(source.peft_config[adapter_name], adapter_name)
        # Not state_dict(), which would copy or unpack a quantised base too.
        tensors = {n: t.detach() for n, t in chain(source.named_parameters(), source.named_buffers())}
        return config, get_peft_model_state_dict(source, state_dict=tensors, adapter_name=adapter_name)
    if isinstance(source, nn.Module):
        raise TypeError(
            f"fold takes a PeftModel or a directory, not a {type(source).__name__}; unwrap the model first."
        )
    config = _check(PeftConfig.from_pretrained(str(source), **hub_kwargs), source)
    return config, load_peft_weights(str(source), device="cpu", **hub_kwargs)


def _check(config: PeftConfig, source: object) -> MoeLoraConfig:
    if not isinstance(config, MoeLoraConfig):
        raise ValueError(
            f"{str(source)!r} is a {getattr(config.peft_type, 'value', config.peft_type)} adapter; fold takes MOELORA "
            "adapters, whose experts depend on the task alone."
        )
    return config


def _card(config: MoeLoraConfig, lora_config: LoraConfig, task: Task | Sequence[Task]) -> str:
    """The README of a folded adapter."""
    base = config.base_model_name_or_path
    data = ModelCardData(base_model=base, library_name="peft", tags=["lora", "peft-moe"])
    text = f"""---
{data.to_yaml()}
---

# LoRA for task {task!r}

One task of a MOELoRA adapter with the tasks {", ".join(config.task_names)}, folded by peft_moe into a stock LoRA of
rank {lora_config.r}. It gives the same outputs as the adapter with `task_ids={task!r}` and needs
only peft:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/directory")  # base_model: {base or "the adapter's"}
```
"""
    return str(ModelCard(text))
