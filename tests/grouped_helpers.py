"""What tests of AT-MoE need: trained LoRAs in folders, and tiny models that have them as experts."""

from pathlib import Path

import torch
from helpers import TARGETS
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import TASK_TYPES, make_inputs, make_model
from torch import nn

from peft_moe import GroupedMoeConfig

# Each expert: rank, alpha, and which of TARGETS it adapts.
EXPERTS = {"a": (2, 4, slice(None)), "b": (4, 4, slice(0, 2)), "c": (3, 9, slice(1, None)), "p": (5, 8, slice(None))}
GENERAL = "p"


def make_lora(folder, arch: str = "llama", *, seed: int, **lora_fields) -> str:
    """Save a stock LoRA that changes the output of `make_model(arch)`; returns the folder."""
    fields = {
        # without one for classifiers, whose heads peft would save with the LoRA
        "task_type": None if arch == "bert" else TASK_TYPES[arch],
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS[arch],
        "init_lora_weights": False,
        "fan_in_fan_out": arch == "gpt2",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(make_model(arch), LoraConfig(**(fields | lora_fields)))
        model.save_pretrained(str(folder), save_embedding_layers=False)  # of no use beside the LoRA of a head
    return str(folder)


def make_experts(arch: str, tmp_path: Path) -> dict[str, str]:
    """Folders of the experts a, b and c and the general p, of different ranks, alphas and targets; made once."""
    folders = {}
    for seed, (name, (r, alpha, targets)) in enumerate(EXPERTS.items(), start=1):
        folder = Path(tmp_path) / arch / name
        if not folder.exists():
            make_lora(folder, arch, seed=seed, r=r, lora_alpha=alpha, target_modules=TARGETS[arch][targets])
        folders[name] = str(folder)
    return folders


def grouped_config(arch: str, tmp_path: Path, **config_fields) -> GroupedMoeConfig:
    """Groups f (a, b) and s (c) and the general expert p; routers with weights that are not even."""
    folders = make_experts(arch, tmp_path)
    fields = {
        "task_type": TASK_TYPES[arch],
        "groups": {"f": {"a": folders["a"], "b": folders["b"]}, "s": {"c": folders["c"]}},
        "general_expert": folders[GENERAL],
        "init_lora_weights": False,
    }
    return GroupedMoeConfig(**(fields | config_fields))


def grouped(arch: str, tmp_path: Path, *, seed: int = 0, **config_fields) -> PeftModel:
    """A tiny model with an AT-MoE adapter, in eval mode."""
    torch.manual_seed(seed)
    return get_peft_model(make_model(arch), grouped_config(arch, tmp_path, **config_fields)).eval()


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model; what it computes in training is then what it computes otherwise."""
    for module in model.modules():
        for field, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in field or (field == "p" and isinstance(module, nn.Dropout))):
                setattr(module, field, 0.0)
    return model


def answered(arch: str, *, prompt: int = 3, **sizes) -> dict[str, torch.Tensor]:
    """A batch of prompts of so many tokens and answers, which alone have labels."""
    inputs = make_inputs(arch, **sizes)
    if arch in ("llama", "gpt2", "opt"):
        inputs["labels"][:, :prompt] = -100
    return inputs
