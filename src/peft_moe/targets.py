"""Which modules of a model get experts, and which names an adapter in it may have."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer, _find_minimal_target_modules
from torch import nn
from transformers.pytorch_utils import Conv1D

from .layer import IN_BASE_EXPERTS
from .quantised import is_quantised_linear

# Names in our own state-dict keys: an adapter called so would be taken for one of them when another adapter is saved.
RESERVED = {"moelora_bank", "moelora_router", "gate", "embedding", "proj", "lora_A", "lora_B", "weight", "bias"}
# Models whose layers see (seq, batch, hidden), or windows of the sequence before the batch.
SEQUENCE_FIRST = {"chatglm", "fsmt", "led", "longformer", "transfo-xl", "xlnet"}


def check_adapter_name(adapter_name: str, model: nn.Module) -> None:
    """Raise a ValueError for a name that cannot be told from other parts of the names of a model's tensors."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(
            f"adapter_name={adapter_name!r} becomes a part of the names of tensors, between two dots; choose one "
            "without a dot that is not empty."
        )
    # peft tells adapters' tensors apart by name, and would take those of such a module for this adapter's.
    names = {part for key, _ in modules_outside_adapters(model) for part in key.split(".") if "moelora_" not in key}
    if adapter_name in RESERVED | names or adapter_name.isdigit():
        raise ValueError(
            f"adapter_name={adapter_name!r} is also part of the names of modules, so that saving another adapter "
            "would lose weights; choose a name that no module has."
        )


def warn_of_base_experts(model: nn.Module) -> None:
    """Say that the experts of a mixture-of-experts base model are not adapted, if it has them as fused parameters."""
    fused = [
        key
        for key, module in modules_outside_adapters(model)
        if key.endswith("experts") and any(p.dim() == 3 for p in module.parameters(recurse=False))
    ]
    if fused:
        warnings.warn(
            "The base model has experts of its own whose weights are fused parameters and no linear layers, such "
            f"as {fused[0]!r}. They are not adapted, only the linear layers beside them "
            "are; to put LoRA on them, use peft's LoraConfig(target_parameters=[...]).",
            UserWarning,
            stacklevel=2,
        )


def linear_layers_in_blocks(model: nn.Module) -> set[str]:
    """Name endings of the linear layers in a model's repeated blocks, which the paper adapts; no pooler, no head."""
    bases = {k: m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for k, m in modules_outside_adapters(model)}
    linear = (key for key, base in bases.items() if isinstance(base, (nn.Linear, Conv1D)) or is_quantised_linear(base))
    # a base model's own router is a linear layer in some, and not called like one
    left_out = (IN_BASE_EXPERTS, re.compile(r"(^|\.)router(\.|$)"))
    chosen = {key for key in linear if re.search(r"\.\d+\.", f".{key}") and not any(r.search(key) for r in left_out)}
    if not chosen:
        raise ValueError("No linear layers in repeated blocks were found in the model; give target_modules.")
    return _find_minimal_target_modules(chosen, bases.keys() - chosen)


def modules_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model without the parts of layers that are adapted already."""
    inside: tuple[str, ...] = ()
    for key, module in model.named_modules():
        if key and not (inside and key.startswith(inside)):
            yield key, module
            if isinstance(module, BaseTunerLayer):
                inside += (f"{key}.",)
