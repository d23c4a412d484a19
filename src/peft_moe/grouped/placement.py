"""Which block of a model a linear layer belongs to: its router reads what enters that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..targets import modules_outside_adapters

# Layers that are called with embeddings of relative positions, by model type.
OF_POSITIONS = {
    "deberta": r"\.pos_(q_)?proj$",
    "deberta-v2": r"\.pos_(key|query)_proj$",
    "swin2sr": r"\.continuous_position_bias_mlp\.\d$",
    "swinv2": r"\.continuous_position_bias_mlp\.\d$",
}
SHARED_WITH_POSITIONS = r"\.(key|query)_proj$"  # DeBERTa's that are called with them too, under share_att_key
# Funnel's layers behind its pooling, and of these the first, whose keys are not pooled yet.
POOLED = {
    "prompt": r"(.*\.)?encoder\.blocks\.[1-9]\d*\..*",
    "token": r"(.*\.)?encoder\.blocks\.[1-9]\d*\.0\..*",
}
# Models whose blocks are entered by images, channels first, or by what a bottleneck makes smaller for their layers.
ENTERED_OTHERWISE = {"convnext", "convnextv2", "mobilebert", "mobilevit"}


def block_of(model: nn.Module, key: str) -> str | None:
    """The name of the block around the module at `key`; None for a module in no block.

    A block is the outermost module with a number, `model.layers.3` for one, unless that is a list, which is never
    called, as in Funnel, or a stage of several blocks, as in Swin and Segformer: what enters a stage has another size
    than what its blocks read.
    """
    parts = key.split(".")
    numbered = [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
    if len(numbered) > 1 and parts[0].isdigit():  # of an `nn.Sequential` around models
        del numbered[0]
    return next((name for name in numbered if name != key and not _holds_blocks(model.get_submodule(name))), None)


def width_of(model: nn.Module, block: str) -> int:
    """Features of what enters a block: what its first linear layer reads that is not about positions."""
    of_positions = "|".join(OF_POSITIONS.values())
    layers = _linear_layers(model.get_submodule(block))
    first = next(layer for key, layer in layers if not re.search(of_positions, f".{key}"))
    return int(cast(tuple[int, int], _get_in_out_features(first))[0])


def check_placement(model: nn.Module, config: Mapping[str, Any], keys: Sequence[str], router_input: str) -> None:
    """Raise a ValueError if routers of blocks could not weigh the experts of a model's modules.

    Args:
        model: the model.
        config: its config.
        keys: names of the modules.
        router_input: `"token"` or `"prompt"`.
    """
    model_type = str(config.get("model_type"))
    if of_positions := [key for key in keys if _reads_positions(config, key)]:
        endings = sorted({".".join(key.split(".")[-2:]) for key in of_positions})
        raise ValueError(
            f"Target module {of_positions[0]!r} reads embeddings of relative positions, which belong to no token and "
            f"no row, so that no router can weigh its experts; use exclude_modules={endings}, or experts that do not "
            "adapt it."
        )
    pooled = [key for key in keys if model_type == "funnel" and re.fullmatch(POOLED[router_input], key)]
    if pooled:
        raise ValueError(
            f"Target module {pooled[0]!r} sees other tokens than entered its block or the model, since Funnel pools "
            f"them, so that router_input={router_input!r} cannot tell which is which; use "
            f"exclude_modules={POOLED[router_input]!r}, or experts that do not adapt it."
        )
    inside = next((key for key in keys if model_type in ENTERED_OTHERWISE and block_of(model, key)), None)
    if inside is not None:
        raise ValueError(
            f"Target module {inside!r} is in a block of a {model_type} model, which is entered by other features than "
            "its linear layers read, and a router reads what enters its block; use MoLoraConfig, whose routers read "
            "what each layer does, or experts that adapt no layer of these blocks."
        )


def _reads_positions(config: Mapping[str, Any], key: str) -> bool:
    shares = config.get("relative_attention") and config.get("share_att_key")
    found = OF_POSITIONS.get(str(config.get("model_type")))
    return found is not None and bool(re.search(f"{found}|{SHARED_WITH_POSITIONS}" if shares else found, f".{key}"))


def _linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the linear layers in a module, without adapters."""
    for key, found in modules_outside_adapters(module):
        base = found.get_base_layer() if isinstance(found, BaseTunerLayer) else found
        if isinstance(base, (nn.Linear, Conv1D)) or hasattr(base, "in_features"):
            yield key, base


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module is a list, or begins with one of modules of one type, as no block does.

    What a block has in lists is of several types, as in T5, or comes later, as in MobileBERT.
    """
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return True
    first = next((key for key, _ in _linear_layers(module)), "").split(".")
    at = 0 if isinstance(module, nn.Sequential) else 1
    blocks = module.get_submodule(".".join(first[:at]))
    if len(first) < at + 2 or not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        return False
    return len({type(child) for child in blocks if any(True for _ in _linear_layers(child))}) == 1
