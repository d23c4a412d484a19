"""One linear layer with an adapter, and what it computes: on kernels, and in plain PyTorch."""

import torch
from helpers import TASKS, plain, routed_layers
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_moe import MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig

IN, OUT = 5, 7


class Net(nn.Module):
    """A linear layer with a name."""

    def __init__(self, conv=False, bias=True):
        super().__init__()
        self.lin = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT, bias=bias)

    def forward(self, x):
        return self.lin(x)


COMMON = {"target_modules": ["lin"], "lora_dropout": 0.0, "init_lora_weights": False}
ADAPTERS = {
    "moelora": (MoeLoraConfig, {"r": 12, "num_experts": 4, "lora_alpha": 7, "tasks": TASKS, "default_task": "rad"}),
    "moelora-layer": (
        MoeLoraConfig,
        {"r": 4, "num_experts": 2, "tasks": TASKS, "default_task": "rad", "gate_scope": "layer"},
    ),
    "moelora-one": (MoeLoraConfig, {"r": 4, "num_experts": 1, "lora_alpha": 7, "tasks": TASKS}),
    "molora": (MoLoraConfig, {"r": 2, "num_experts": 4}),
    "molora-k1": (MoLoraConfig, {"r": 2, "num_experts": 4, "top_k": 1, "balance_loss": "z"}),
    "molora-dense": (MoLoraConfig, {"r": 2, "num_experts": 4, "top_k": 4, "router_bias": False}),
    "molora-top_p": (MoLoraConfig, {"r": 2, "num_experts": 4, "top_p": 0.7}),
    "molora-shared": (MoLoraConfig, {"r": 2, "num_experts": 4, "num_shared_experts": 2}),
    "molora-dropout": (MoLoraConfig, {"r": 2, "num_experts": 4, "lora_dropout": 0.4}),
    "molora-jitter-dropout": (MoLoraConfig, {"r": 2, "num_experts": 4, "router_jitter": 0.5, "lora_dropout": 0.4}),
    "molora-balanced": (MoLoraConfig, {"r": 2, "num_experts": 4, "balance_loss": {"switch": 0.3, "z": 0.1}}),
    "medmoe": (MedMoeLoraConfig, {"num_experts": 3, "expert_ranks": [2, 1, 3], "balance_loss": "none"}),
    "medmoe-balanced": (MedMoeLoraConfig, {"num_experts": 3, "expert_ranks": [2, 1, 3]}),
    "medmoe-temperature": (MedMoeLoraConfig, {"num_experts": 3, "expert_ranks": 2, "temperature": 0.4}),
    "medmoe-anchored": (
        MedMoeLoraConfig,
        {"num_experts": 3, "expert_ranks": [2, 1], "base_expert_mode": "regularized", "base_coefficient": 0.3},
    ),
    "medmoe-dropout": (MedMoeLoraConfig, {"num_experts": 3, "expert_ranks": [2, 1], "lora_dropout": 0.4}),
}


def net(adapter, *, conv=False, with_bias=True, dtype=torch.float32, adapter_dtype=None, seed=0, **fields):
    """A layer with an adapter: the peft model, in training mode."""
    torch.manual_seed(seed)
    config, own = ADAPTERS[adapter]
    model = get_peft_model(Net(conv, with_bias).to(dtype), config(**COMMON | own | fields))
    if config is not MoeLoraConfig:
        model.set_balance_scale(1.0)
    if conv:
        nn.init.normal_(model.base_model.model.lin.base_layer.bias)
    if adapter_dtype is not None:
        for name, parameter in model.named_parameters():
            if "moelora" in name:
                parameter.data = parameter.data.to(adapter_dtype)
        # as `.to` does
        routed_layers(model)[0].bank("default").to(adapter_dtype)
    return model.train()


def count_calls(monkeypatch, module, name):
    """A list that has an entry for each call from now on: whether it had a gradient."""
    calls, function = [], getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def result(model, x, *, told=None, loss=False, x_frozen=False, seed=5):
    """Output and gradients by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(not x_frozen)
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x, **(told or {}))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(y.dtype)
    total = (y * upstream).sum()
    if (extra := getattr(model.base_model, "balance_loss", None)) is not None and loss:
        assert extra.isfinite()
    total.backward()
    found = {"output": y.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_as_plain(model, x, *, rtol=1e-5, atol=1e-6, **how):
    ours = result(model, x, **how)
    with plain():
        expected = result(model, x, **how)
    compare(ours, expected, rtol=rtol, atol=atol)
    return ours


def compare(ours, expected, *, rtol, atol):
    """Tolerances are relative to each tensor's largest number."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert ours[name] is None, name
            continue
        assert ours[name].dtype == value.dtype, name
        size = value.abs().max().item() if value.numel() else 1.0
        torch.testing.assert_close(
            ours[name], value, rtol=rtol, atol=atol * size, msg=lambda m, name=name: f"{name}: {m}"
        )


# float32 and wider differ by rounding. In bfloat16 (2⁻⁸ for one rounding) plain PyTorch rounds the bank's output, the
# sum, and each of the gradients of x before they are added up, and kernels do not; scores are in float32 in both.
BF16 = {"rtol": 3e-2, "atol": 3e-2}
TYPES = {
    "float64": (torch.float64, torch.float64, None, {"rtol": 1e-12, "atol": 1e-12}),
    "float32": (torch.float32, torch.float32, None, {"rtol": 1e-5, "atol": 1e-6}),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None, BF16),
    "a float32 adapter on bfloat16": (torch.bfloat16, torch.float32, None, BF16),
    "float16": (torch.float16, torch.float16, None, {"rtol": 4e-3, "atol": 4e-3}),  # 2⁻¹¹
    "a float32 adapter on float16": (torch.float16, torch.float32, None, {"rtol": 4e-3, "atol": 4e-3}),
    "autocast": (torch.float32, torch.float32, torch.bfloat16, BF16),
    "autocast of a bfloat16 base": (torch.bfloat16, torch.float32, torch.bfloat16, BF16),
    "autocast to float16": (torch.float32, torch.float32, torch.float16, {"rtol": 4e-3, "atol": 4e-3}),
}
