"""Whether an expert belongs to a model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from .sources import Expert


def last_part(name: str) -> str:
    """The last part of a folder's path, as any system writes it, or of a Hub id."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def check_expert(name: str, expert: Expert, modules: Mapping[str, nn.Module], base_model: str | None) -> None:
    """Raise a ValueError if an expert does not belong to a model with these modules.

    Args:
        name: what errors call it.
        expert: the expert.
        modules: the model's, by name.
        base_model: the model's name, to be compared by its last part, since one may be a folder and one a Hub id; None
            for no comparison.
    """
    ours, theirs = (last_part(path or "") for path in (base_model, expert.base_model))
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"{name} was trained on {expert.base_model!r}, and the base model is {base_model!r}; if they are the same, "
            "set check_base_model=False."
        )
    for key, lora in expert.layers.items():
        module = modules.get(key)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if base is None:
            raise ValueError(
                f"{name} adapts {key!r}, which the base model does not have; it is of another base model, or of "
                "another class of it."
            )
        shape = (
            _get_in_out_features(base)
            if isinstance(base, (nn.Linear, Conv1D)) or hasattr(base, "in_features")
            else None
        )
        if shape != (lora.a.shape[1], lora.b.shape[0]):
            raise ValueError(
                f"{name} adapts {key!r} from {lora.a.shape[1]} to {lora.b.shape[0]} features, and in the base model "
                f"that is a {type(base).__name__} of {shape or 'no such sizes'}; it is of another base model."
            )
