"""The type of base weights for `--dtype fastest`."""

import platform

import pytest
import torch

from peft_moe.dtypes import cpu_has_bfloat16, resolve_dtype


@pytest.mark.parametrize("name", ["auto", "float32", "bfloat16"])
def test_types_by_name_stay(name):
    assert resolve_dtype(name, "cpu") == name


def test_the_fastest_is_bfloat16_only_on_devices_that_compute_with_it():
    here = cpu_has_bfloat16(platform.machine(), getattr(torch.cpu, "get_capabilities", dict)())  # not in torch 2.6
    assert resolve_dtype("fastest", "cpu") == ("bfloat16" if here else "float32")
    assert resolve_dtype("fastest", torch.device("meta")) == "float32"


@pytest.mark.parametrize(
    ("machine", "capabilities", "expected"),
    [
        ("x86_64", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ("x86_64", {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ("x86_64", {"avx512_bf16": True, "amx_bf16": False}, True),
        ("AMD64", {"amx_bf16": True}, True),
        ("aarch64", {"neon": True, "bf16": True}, True),
        ("arm64", {"neon": True, "bf16": False}, False),
        ("x86_64", {}, False),  # an older torch tells nothing
    ],
)
def test_what_a_cpu_tells_of_its_instructions(machine, capabilities, expected):
    assert cpu_has_bfloat16(machine, capabilities) is expected
