"""The type of base weights that a device computes with fastest."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch


def resolve_dtype(name: str, device: torch.device | str) -> str:
    """`name` as it is, unless it is `fastest`: then `bfloat16` where `device` computes with it, else `float32`.

    Without instructions for it, bfloat16 saves memory and costs time: on a CPU that has AVX2 alone, a product of
    matrices took eight times as long as in float32.

    Args:
        name: a type as `from_pretrained` takes it (`auto`, `float32`, ...), or `fastest`.
        device: where the model will be.

    Example:
        `AutoModelForCausalLM.from_pretrained(base, dtype=resolve_dtype("fastest", "cpu"))`
    """
    if name != "fastest":
        return name
    return "bfloat16" if _has_bfloat16(torch.device(device)) else "float32"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False  # not known
    told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # newer than torch 2.6
    return cpu_has_bfloat16(platform.machine(), told)


def cpu_has_bfloat16(machine: str, capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU multiplies matrices of bfloat16 by instructions of its own.

    Args:
        machine: its architecture, as `platform.machine()` names it.
        capabilities: what `torch.cpu.get_capabilities()` tells.
    """
    arm = machine.lower() in {"aarch64", "arm64"}
    return any(capabilities.get(name, False) for name in (("bf16",) if arm else ("avx512_bf16", "amx_bf16")))
