"""The table of tests/test_conformance.py: stock LoRA and our configs, made for the same targets of the same models."""

import tempfile
from pathlib import Path

import torch
from grouped_helpers import grouped_config
from helpers import TARGETS, TASKS
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import TASK_TYPES, make_model
from tiny_models import make_inputs as inputs_of_transformers
from torch import nn

from peft_moe import GroupedMoeConfig, MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig

STOCK = "LoRA"
NEW = {"groups": {"f": ["a", "b"], "s": ["c"]}, "train_experts": True}
# Small, and without dropout; a new adapter changes the output.
FIELDS = {
    STOCK: (LoraConfig, {"r": 4}),
    "MOELoRA": (MoeLoraConfig, {"r": 8, "num_experts": 4, "tasks": TASKS, "default_task": "icd"}),
    "MoLoRA": (MoLoraConfig, {"r": 2, "num_experts": 4}),
    "MedMoELoRA": (MedMoeLoraConfig, {"expert_ranks": [2, 4], "num_experts": 4}),
    "AT-MoE, new experts": (GroupedMoeConfig, {"r": 2, **NEW}),
}
MADE = list(FIELDS)
TRAINED = "AT-MoE"  # of trained LoRAs, frozen: they bring their targets, and a new adapter changes the output
ALL = [*MADE, TRAINED]
OURS = ALL[1:]
NATIVE = [kind for kind in ALL if kind != "MOELoRA"]  # which transformers can put into a model by itself

# With these an adapter is one matrix, and merges; MoLoRA and Med-MoE-LoRA have none but plain LoRA.
MERGEABLE = {
    STOCK: {},
    "MOELoRA": {},
    "MoLoRA": {"num_experts": 1, "num_experts_pattern": {}},
    "AT-MoE, new experts": {"group_weights": {"weights": {"f": {"a": 0.25, "b": 0.75}}, "group_weights": {"f": 0.5}}},
    TRAINED: {"group_weights": {"weights": {"f": {"a": 1.0}}, "group_weights": {"f": 0.5}, "mix": 0.5}},
}
TOKEN_ROUTED = [kind for kind in OURS if kind != "MOELoRA"]

MODELS = ["llama", "gpt2", "opt", "bert", "t5", "vit"]
MLP = "mlp"

_loras = tempfile.TemporaryDirectory(prefix="peft-moe-conformance-")


class Mlp(nn.Module):
    """A model that is not one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.act = nn.Linear(10, 20), nn.Linear(20, 2), nn.ReLU()

    def forward(self, x):
        return self.lin1(self.act(self.lin0(x)))


def base_of(name: str) -> nn.Module:
    """The same base model at every call."""
    if name != MLP:
        return make_model(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mlp().eval()


def batch_for(name: str) -> dict:
    """What every adapter can be called with; with labels, if the model knows any."""
    if name == MLP:
        return {"x": torch.randn(5, 10, generator=torch.Generator().manual_seed(0))}
    return inputs_of_transformers(name)


def config_of(kind: str, name: str = "llama", **changes) -> PeftConfig:
    if kind == TRAINED:
        return grouped_config(name, Path(_loras.name), **changes)
    config, fields = FIELDS[kind]
    common = {
        "task_type": TASK_TYPES.get(name),
        "target_modules": ["lin0", "lin1"] if name == MLP else TARGETS[name],
        "lora_dropout": 0.0,
        "init_lora_weights": False,
        "fan_in_fan_out": name == "gpt2",
    }
    if kind == "MedMoELoRA" and name == MLP:
        common["balance_loss"] = "none"  # it would warn of a loss that is computed outside of the model
    return config(**{**common, **fields, **changes})


def adapted(kind: str, name: str = "llama", *, seed: int = 0, adapter_name: str = "default", **changes) -> PeftModel:
    """A tiny model with an adapter that changes its output, in eval mode."""
    torch.manual_seed(seed)
    return get_peft_model(base_of(name), config_of(kind, name, **changes), adapter_name=adapter_name).eval()


def add(model: PeftModel, adapter_name: str, kind: str, name: str = "llama", *, seed: int = 1, **changes) -> None:
    """Another adapter, of other weights."""
    torch.manual_seed(seed)
    model.add_adapter(adapter_name, config_of(kind, name, **changes))
    model.eval()


def out(model: nn.Module, name: str = "llama", **kwargs) -> torch.Tensor:
    """What the model says to the batch, without a graph."""
    with torch.no_grad():
        outputs = model(**batch_for(name), **kwargs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def backward(model: PeftModel, name: str = "llama") -> None:
    """Gradients of a loss."""
    # for those that have tasks, which warn of training on the default one
    told = {"task_ids": TASKS[0]} if hasattr(model.base_model, "set_task") else {}
    outputs = model(**batch_for(name), **told)
    (outputs.square().mean() if isinstance(outputs, torch.Tensor) else outputs.loss).backward()


def train_a_step(model: PeftModel, name: str = "llama") -> PeftModel:
    """One large step; back to eval mode."""
    backward(model.train(), name)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    model.zero_grad()
    return model.eval()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def by_adapter(model: PeftModel, *adapters: str) -> dict[str, set[bool]]:
    """Whether the parameters of each adapter want gradients."""
    return {a: {p.requires_grad for n, p in model.named_parameters() if f".{a}." in n} for a in adapters}


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
