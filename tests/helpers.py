"""What several test files need: a routed tiny model, stock LoRA beside it, and the layers of either."""

from collections.abc import Iterator
from contextlib import contextmanager

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from tiny_models import TASK_TYPES, make_model
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_moe import MoeLoraConfig, kernels
from peft_moe.layer import MoeLinear

TASKS = ["icd", "rad", "def"]


def since(version: str, before: str) -> pytest.MarkDecorator:
    """For what transformers does only from a version on; `before` says what it did."""
    reason = f"transformers before {version} {before}"
    return pytest.mark.skipif(Version(transformers.__version__) < Version(version), reason=reason)


transformers_own_adapter_methods = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers' add_adapter and load_adapter ask for peft {MIN_PEFT_VERSION}",
)
# Linear layers whose inputs keep one row per example, per architecture.
TARGETS = {
    "llama": ["q_proj", "v_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "opt": ["q_proj", "v_proj", "fc1", "fc2"],
    "bert": ["query", "value", "intermediate.dense", "output.dense"],
    "t5": ["q", "v", "wi", "wo"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
}


def config_for(name: str = "llama", **changes) -> MoeLoraConfig:
    """A config whose new adapter changes the output, without dropout."""
    fields = {
        "task_type": TASK_TYPES[name],
        "r": 8,
        "num_experts": 4,
        "tasks": TASKS,
        "lora_dropout": 0.0,
        "init_lora_weights": False,
        "target_modules": TARGETS[name],
    }
    return MoeLoraConfig(**{**fields, **changes})


def routed(name: str = "llama", *, seed: int = 0, **changes) -> PeftModel:
    """A tiny model with an adapter, in eval mode."""
    torch.manual_seed(seed)
    return get_peft_model(make_model(name), config_for(name, **changes)).eval()


# what transformers calls it, now and some versions before
WORD = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"


def checkpointing(use_reentrant: bool = False) -> dict:
    """For TrainingArguments."""
    return {f"{WORD}_checkpointing": True, f"{WORD}_checkpointing_kwargs": {"use_reentrant": use_reentrant}}


def enable_checkpointing(model: nn.Module, use_reentrant: bool = False) -> None:
    """As TrainingArguments do."""
    getattr(model, f"{WORD}_checkpointing_enable")({"use_reentrant": use_reentrant})


def routed_layers(model: nn.Module) -> list[MoeLinear]:
    return [module for module in model.modules() if isinstance(module, MoeLinear)]


def logits(model: nn.Module, inputs: dict, **kwargs) -> torch.Tensor:
    """Logits without a graph."""
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def first_logits(model: nn.Module, **arguments) -> torch.Tensor:
    """Of the first token that is generated."""
    return model.generate(**arguments, return_dict_in_generate=True, output_logits=True).logits[0]


def adapter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def plain() -> Iterator[None]:
    """Layers run in plain PyTorch."""
    before, kernels.fused = kernels.fused, False
    try:
        yield
    finally:
        kernels.fused = before
