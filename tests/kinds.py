"""An adapter of every config, and another one of each that differs from it, for tables of tests."""

import torch
from grouped_helpers import grouped_config
from helpers import TARGETS, TASKS, config_for
from peft import PeftModel, get_peft_model
from tiny_models import TASK_TYPES, make_model

from peft_moe import MedMoeLoraConfig, MoLoraConfig

KINDS = ["moelora", "molora", "medmoelora", "at_moe"]


def config_of(kind: str, arch: str, folder, *, other: bool = False, **fields):
    """A config whose new adapter changes the output; with `other`, of other sizes, tasks and routing."""
    if kind == "at_moe":
        return grouped_config(arch, folder, **({"router_input": "prompt", "learn_mix": True} if other else {}) | fields)
    common = {"task_type": TASK_TYPES[arch], "target_modules": TARGETS[arch], "init_lora_weights": False}
    common |= {"lora_dropout": 0.0, "num_experts": 6 if other else 4} | fields
    if kind == "moelora":
        scope = {"gate_scope": "layer", "r": 6, "tasks": ["u", "v"], "default_task": "v"} if other else {}
        return config_for(arch, **{"tasks": TASKS, "default_task": "rad"} | common | scope | fields)
    if kind == "molora":
        return MoLoraConfig(**{"r": 4 if other else 2, "num_shared_experts": int(other)} | common)
    return MedMoeLoraConfig(
        **{"expert_ranks": [2, 4] if other else 3, "inference_top_k": 2 if other else None} | common
    )


def two_adapters(kinds: tuple[str, str], arch: str, folder, *, same: bool = False, **fields) -> PeftModel:
    """A tiny model in eval mode with the adapters "one" and "two", of which the first is active."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(arch), config_of(kinds[0], arch, folder, **fields), adapter_name="one")
    model.add_adapter("two", config_of(kinds[1], arch, folder, other=not same, **fields))
    return model.eval()
