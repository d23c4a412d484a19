"""A routed adapter under fixed weights as plain matrices, from the state dict that peft saves."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .bank import ExpertBank
from .config import Experts, MoeConfig

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
    """A (R, in) and B (out, R) of every module, with scaling and weights inside; R is of experts that get weight.

    What every expert's weight leaves as it is, A, is that of the state dict and no copy.
    """
    empty_bank = cache(_empty_bank)  # many modules are alike but for their weights
    return {key: _fold_bank(config, state_dict, key, weights_at(key), empty_bank) for key in keys_of_banks(state_dict)}


def _fold_bank(
    config: MoeConfig,
    state_dict: StateDict,
    key: str,
    weights: torch.Tensor | None,
    empty_bank: Callable[[int, int, Experts], ExpertBank],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bank itself computes them, filled from the state dict."""
    prefix = f"base_model.model.{key}.moelora_bank."
    a, b = state_dict[f"{prefix}lora_A.weight"], state_dict[f"{prefix}lora_B.weight"]
    bank = empty_bank(a.shape[1], b.shape[0], config.experts_at(key))
    bank.load_state_dict({"lora_A.weight": a, "lora_B.weight": b}, assign=True)
    a, b = (tensor.detach() for tensor in bank.folded(None if weights is None else weights.to(a.device)))
    # an expert that gets nothing needs no place
    kept = range(len(bank.ranks)) if weights is None else [i for i, weight in enumerate(weights.tolist()) if weight]
    if len(kept) == len(bank.ranks):
        return a, b
    rows, columns = a.split(bank.ranks), b.split(bank.ranks, dim=1)
    return torch.cat([rows[i] for i in kept] or [a[:0]]), torch.cat([columns[i] for i in kept] or [b[:, :0]], dim=1)


def _empty_bank(in_features: int, out_features: int, experts: Experts) -> ExpertBank:
    with torch.device("meta"):
        return ExpertBank(
            in_features=in_features, out_features=out_features, ranks=experts.ranks, scaling=experts.scaling
        )


def module_from(make: Callable[[], Any], state_dict: StateDict, prefix: str) -> Any:
    """A module with the entries of a state dict that start with `prefix`."""
    with torch.device("meta"):
        module = make()
    return filled(module, state_dict, prefix)


def filled(module: Any, state_dict: StateDict, prefix: str) -> Any:
    """The module, now with the entries of a state dict that start with `prefix`."""
    module.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}, assign=True
    )
    return module
