"""How findings are worded: what to try, by method, and a finding as a dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..routing.measures import Layer

Finding = dict[str, Any]

# What to try, by finding and method: only what the method's config has; "" for a method that is not named.
ADVICE: dict[str, dict[str, str]] = {
    "dead": {
        "MOELoRA": "a lower learning rate or fewer experts",
        "MoLoRA": "a balance_loss, a lower learning rate, or fewer experts",
        "Med-MoE-LoRA": "a balance_loss, a lower learning rate, or fewer experts",
        "AT-MoE": "a higher group_temperature or expert_temperature, or leave these LoRAs out",
        "": "a lower learning rate or fewer experts",
    },
    "few": {
        "MOELoRA": "a lower learning rate or fewer experts",
        "MoLoRA": "a balance_loss or a lower learning rate",
        "Med-MoE-LoRA": "a balance_loss, a higher temperature or a lower learning rate",
        "AT-MoE": "a higher group_temperature or expert_temperature, or a lower learning rate",
        "": "a lower learning rate or fewer experts",
    },
    "undecided": {
        "MOELoRA": "a higher learning rate or longer training",
        "MoLoRA": "a higher learning rate, longer training, or a smaller top_k",
        "Med-MoE-LoRA": "a higher learning rate, longer training, or a lower temperature",
        "AT-MoE": "a higher learning rate, longer training, or a lower group_temperature and expert_temperature",
        "": "a higher learning rate or longer training",
    },
    "alike": {
        "MOELoRA": "a higher learning rate or longer training",
        "MoLoRA": "a higher learning rate, a smaller top_k, or a weaker balance_loss",
        "Med-MoE-LoRA": "a higher learning rate, a lower temperature, or a weaker balance_loss",
        "AT-MoE": "a higher learning rate or a lower group_temperature",
        "": "a higher learning rate or longer training",
    },
    "copies": {
        "MOELoRA": "fewer experts or another seed",
        "MoLoRA": "fewer experts, a smaller top_k, or another seed",
        "Med-MoE-LoRA": "fewer experts or another seed",
        "AT-MoE": "one LoRA less, after a look whether one is named twice",
        "": "fewer experts or another seed",
    },
}


def advice(finding: str, method: str) -> str:
    """What to try, to be put after "try"."""
    texts = ADVICE[finding]
    return texts.get(method, texts[""])


def count(n: int, what: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{n} {what}{'s' * (n != 1)}"


def named(layers: Sequence[Layer], names: Mapping[str, Any]) -> list[Layer]:
    """The layers of these names."""
    return [layer for layer in layers if layer["name"] in names]


def finding(level: str, title: str, text: str, where: Sequence[Layer | str], numbers: Mapping[str, Any]) -> Finding:
    """A finding about layers, or names of layers."""
    names = [layer if isinstance(layer, str) else layer["name"] for layer in where]
    return {"level": level, "title": title, "text": text, "where": names, "numbers": dict(numbers)}
