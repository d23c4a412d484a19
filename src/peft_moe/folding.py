"""A routed adapter under fixed weights as plain matrices, from the state dict that peft saves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from .bank import ExpertBank
from .config import MoeConfig

BANK = re.compile(r"^base_model\.model\.(?P<key>.+)\.moelora_bank\.lora_A\.weight$")

# The weights (E,) of the experts of the module at a key; None for a bank of one.
WeightsAt = Callable[[str], "torch.Tensor | None"]
StateDict = dict[str, torch.Tensor]
# By module, A (r, in) and B (out, r) of a LoRA of scaling 1.
Banks = dict[str, tuple[torch.Tensor, torch.Tensor]]


def keys_of_banks(state_dict: StateDict) -> list[str]:
    """Names of the modules that have experts.

    Raises:
        ValueError: there are none.
    """
    keys = [match["key"] for name in state_dict if (match := BANK.match(name))]
    if not keys:
        raise ValueError("The adapter has no '….moelora_bank.lora_A.weight'.")
    return keys


@torch.no_grad()
def fold_banks(config: MoeConfig, state_dict: StateDict, weights_at: WeightsAt) -> Banks:
    """A (R, in) and B (out, R) of every module, with scaling and weights inside; R is of experts that get weight."""
    return {key: _fold_bank(config, state_dict, key, weights_at(key)) for key in keys_of_banks(state_dict)}


def _fold_bank(
    config: MoeConfig, state_dict: StateDict, key: str, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bank itself computes them, filled from the state dict."""
    prefix = f"base_model.model.{key}.moelora_bank."
    a, b = state_dict[f"{prefix}lora_A.weight"], state_dict[f"{prefix}lora_B.weight"]
    experts = config.experts_at(key)
    with torch.device("meta"):
        bank = ExpertBank(in_features=a.shape[1], out_features=b.shape[0], ranks=experts.ranks, scaling=experts.scaling)
    bank.load_state_dict({"lora_A.weight": a, "lora_B.weight": b}, assign=True)
    if weights is None:
        return bank.folded(None)
    a, b = bank.folded(weights.to(a.device))
    # an expert that gets nothing needs no place
    kept = [i for i, weight in enumerate(weights.tolist()) if weight]
    rows, columns = a.split(bank.ranks), b.split(bank.ranks, dim=1)
    return torch.cat([rows[i] for i in kept] or [a[:0]]), torch.cat([columns[i] for i in kept] or [b[:, :0]], dim=1)


def module_from(make: Callable[[], Any], state_dict: StateDict, prefix: str) -> Any:
    """A module with the entries of a state dict that start with `prefix`."""
    with torch.device("meta"):
        module = make()
    module.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}, assign=True
    )
    return module
