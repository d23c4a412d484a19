"""What the page calls the systems."""

from grid import ABLATIONS, ASKED_AGAIN, LONGER, LOWER, NUMBERS, RANKS, STRATEGIES, SYSTEMS, VARIANTS
from records import AT_EQUAL_GATES
from setups import Setup

NAMES = {
    "base": "base model",
    "lora-r16": "LoRA, rank 16",
    "lora-per-task": "a LoRA of rank 16 per task",
    "lora-like-molora-parameters": "LoRA, parameters of MoLoRA",
    "lora-like-molora-active": "LoRA, active rank of MoLoRA",
    "lora-like-medmoelora-parameters": "LoRA, parameters of Med-MoE-LoRA",
    "lora-like-at_moe-active": "LoRA, rank 144, one epoch",
    "lora-like-at_moe-passes": "LoRA, rank 144, three epochs",
    "moelora": "MOELoRA",
    "molora": "MoLoRA",
    "medmoelora": "Med-MoE-LoRA",
    "at_moe": "AT-MoE",
}
ABLATED = {
    "moelora-equal-gates": "MOELoRA, trained with equal gates",
    "moelora-gate-per-layer": "MOELoRA, a gate per layer",
    "molora-k1": "MoLoRA, K = 1",
    "molora-k1-switch": "MoLoRA, K = 1, with a balance loss",
    "molora-k3": "MoLoRA, K = 3",
    "molora-attention-too": "MoLoRA, experts in attention too",
    "medmoelora-uniform-schedule": "Med-MoE-LoRA, uniform schedule",
    "medmoelora-descending": "Med-MoE-LoRA, descending schedule",
    "medmoelora-no-base-expert": "Med-MoE-LoRA, no base expert",
    "medmoelora-no-balance-loss": "Med-MoE-LoRA, no balance loss",
    "at_moe-flat": "AT-MoE, flat instead of grouped",
}


def labels(setup: Setup) -> dict[str, str]:
    """The names of all systems that a setup can have.

    Raises:
        ValueError: one of them has no name here.
    """
    if nameless := (SYSTEMS.keys() - NAMES.keys()) | ((ABLATIONS | VARIANTS).keys() - ABLATED.keys()):
        raise ValueError(f"{sorted(nameless)} of grid.py have no name; give them one in labels.py.")
    at_equal_gates = {AT_EQUAL_GATES.format(system): AT_EQUAL_GATES.format(name) for system, name in NAMES.items()}
    found = NAMES | ABLATED | at_equal_gates
    for name, (system, change) in (NUMBERS | RANKS).items():
        parts = [f"rank {change['r']}"] if "r" in change else []
        parts += [f"{change['num_experts']} experts"] if "num_experts" in change else []
        parts += ["next lower rate"] if name.endswith(LOWER) else []
        found[name] = ", ".join([NAMES[system].partition(",")[0], *parts])
    found |= {name: f"{NAMES[system]}, three epochs" for name, (system, _) in LONGER.items()}
    for system in ("lora-r16", "moelora"):
        found |= {f"{system}-sampled-{strategy}": f"{NAMES[system]}, {strategy}" for strategy in STRATEGIES}
    for system in ("lora-r16", "moelora"):
        found |= {f"{system}-without-{task}": f"{NAMES[system]}, without {task}" for task in setup.tasks}
    for system in ASKED_AGAIN:
        found[f"{system}-of-single-tasks"] = f"{NAMES[system]}, trained on single tasks"
        found[f"{system}-of-composites"] = f"{NAMES[system]}, trained on composites too"
    return found | {"base-composite": NAMES["base"]}
