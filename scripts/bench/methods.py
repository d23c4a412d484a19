"""What is compared: the methods of this package, and stock LoRAs of the same size, on a model or on bare layers."""

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_moe import GroupedMoeConfig, MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig, read_expert
from peft_moe.dtypes import resolve_dtype
from peft_moe.layer import MoeLinear

# the type of the base model, and whether the adapter is in float32, which is what peft does with it
DTYPES = {"fp32": (torch.float32, True), "bf16": (torch.bfloat16, False), "bf16_fp32": (torch.bfloat16, True)}
DTYPE_LABELS = {"fp32": "float32", "bf16": "bfloat16", "bf16_fp32": "bfloat16, float32 adapter"}
LABELS = {
    "moelora": "MOELoRA, total rank 64",
    "moelora_one_task": "MOELoRA, all rows of one task",
    "molora": "MoLoRA, N=8 K=2 r=16",
    "molora_k1_r64": "MoLoRA, N=8 K=1 r=64",
    "molora_k2_r64": "MoLoRA, N=8 K=2 r=64",
    "molora_n32": "MoLoRA, N=32 K=2 r=16",
    "medmoelora": "Med-MoE-LoRA",
    "medmoelora_unbalanced": "Med-MoE-LoRA without its balance loss",
    "at_moe": "AT-MoE, 8 frozen r=16 + general",
    "at_moe_prompt": "AT-MoE, routed per prompt",
    "recording": "MoLoRA while it is recorded",
    "lora": "stock LoRA, against itself",
}
Targets = str | Sequence[str]


def dtypes_here(dtypes: Sequence[str]) -> list[str]:
    """Those of these types to measure unasked: float32 alone where the CPU has no instructions for bfloat16.

    There products in it take many times as long, and a benchmark days.
    """
    return list(dtypes) if resolve_dtype("fastest", "cpu") == "bfloat16" else ["fp32"]


class Block(nn.Module):
    """A transformer block that is nothing but a linear layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.proj(hidden_states)


class Layers(nn.Module):
    """Linear layers (in → out) that all read the same input; the output is that of the last.

    Args:
        depth: how many. One for a training step; several for single tokens, so that what a call of the whole model
            costs is as small a part of it as in a real one.
    """

    def __init__(self, in_features: int, out_features: int, depth: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(in_features, out_features) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            out = layer(x)
        return out


@contextmanager
def quiet() -> Iterator[None]:
    """Without two warnings that say nothing here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="top_k=1")  # nothing is trained to be of use
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft asks for it
        yield


def adapt(base: nn.Module, config: PeftConfig, dtype: str) -> PeftModel:
    """A base with an adapter, in types by their name in DTYPES."""
    of_base, in_float32 = DTYPES[dtype]
    with quiet():
        model = get_peft_model(base.to(of_base), config, autocast_adapter_dtype=in_float32)
    if isinstance(base, Layers) and isinstance(config, MedMoeLoraConfig):
        model.set_balance_scale(1.0)  # bare layers compute no loss of their own, which would show it
    return model


def config_of(method: str, base: Callable[[], nn.Module], targets: Targets, **changes: Any) -> PeftConfig:
    """The config of a method; the adapter changes the output, so that all gradients are real ones.

    Args:
        method: a key of LABELS.
        base: makes the base model, for experts to be trained on.
        targets: `target_modules`.
        changes: further fields.
    """
    shared: dict[str, Any] = {"target_modules": targets, "lora_dropout": 0.0, "init_lora_weights": False, **changes}
    if method == "lora":
        return LoraConfig(**{"r": 128, "lora_alpha": 256} | shared)
    if method.startswith("moelora"):
        return MoeLoraConfig(**{"r": 64, "lora_alpha": 128, "num_experts": 8, "tasks": 8} | shared)
    if method.startswith("at_moe"):
        return _grouped(method, base, **shared)
    if method.startswith("medmoelora"):
        unbalanced = {"balance_loss": "none"} if "unbalanced" in method else {}
        uniform = {} if targets == "all-linear" else {"expert_schedule": "uniform"}  # bare layers are no deep model
        return MedMoeLoraConfig(**uniform | unbalanced | shared)
    of_molora = {"molora_k1_r64": (8, 1, 64), "molora_k2_r64": (8, 2, 64), "molora_n32": (32, 2, 16)}
    n, k, r = of_molora.get(method, (8, 2, 16))
    with quiet():
        return MoLoraConfig(**{"num_experts": n, "top_k": k, "r": r, "lora_alpha": 2 * r} | shared)


def _grouped(method: str, base: Callable[[], nn.Module], **shared: Any) -> GroupedMoeConfig:
    """Nine times the same trained LoRA, since their numbers do not matter here."""
    with quiet():
        lora = get_peft_model(base(), LoraConfig(**shared, r=16, lora_alpha=32))
    with tempfile.TemporaryDirectory() as folder:
        lora.save_pretrained(folder)
        expert = read_expert(folder)
    return GroupedMoeConfig(
        task_type=shared.get("task_type"),
        groups={g: {f"{g}{i}": expert for i in range(n)} for g, n in {"a": 3, "b": 3, "c": 2}.items()},
        general_expert=expert,
        router_input="prompt" if method == "at_moe_prompt" else "token",
        init_lora_weights=False,
    )


def ranks_of(model: PeftModel, *, active: bool = False) -> dict[str, int]:
    """Total rank of each layer of an adapted model, or the rank that a token uses of it."""
    top_k = getattr(model.peft_config["default"], "top_k", None) if active else None
    found = {}
    for key, layer in model.base_model.model.named_modules():
        if isinstance(layer, MoeLinear):
            ranks = sorted(layer.moelora_bank["default"].ranks, reverse=True)
            found[key] = sum(ranks[:top_k])
        elif isinstance(layer, LoraLayer):
            found[key] = layer.r["default"]
    return found


def stock_lora(ranks: dict[str, int], targets: Targets, **fields: Any) -> LoraConfig:
    """A stock LoRA with these ranks, which changes the output too."""
    patterns = {re.escape(key): rank for key, rank in ranks.items()}
    return LoraConfig(
        target_modules=targets,
        init_lora_weights=False,
        rank_pattern=patterns,
        alpha_pattern={key: 2 * rank for key, rank in patterns.items()},
        **fields,
    )


def task_ids_of(method: str, rows: int) -> dict[str, torch.Tensor]:
    """The tasks of the rows, for a method that takes them: all different, or one for all."""
    if not method.startswith("moelora"):
        return {}
    return {"task_ids": torch.zeros(1, dtype=torch.long) if "one_task" in method else torch.arange(rows) % 8}
