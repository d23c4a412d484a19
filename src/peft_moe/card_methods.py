"""What the model cards of each method's adapters say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft

from .config import PeftMoeType
from .grouped import GroupedMoeConfig
from .medmoe import MedMoeLoraConfig
from .moelora import MoeLoraConfig
from .molora import MoLoraConfig


def hub_id(source: str | None) -> str | None:
    """A model or dataset as metadata may name it: the Hub refuses a local path."""
    return None if source is None or Path(source).exists() else source


TAGS = ("peft-moe", "moelora", "mixture-of-lora-experts")  # of MOELoRA adapters

MOELORA_CITATION = """\
@inproceedings{liu2024moelora,
  title     = {When {MOE} Meets {LLM}s: Parameter Efficient Fine-tuning for Multi-task Medical Applications},
  author    = {Liu, Qidong and Wu, Xian and Zhao, Xiangyu and Zhu, Yuanshao and Xu, Derong and Tian, Feng and
               Zheng, Yefeng},
  booktitle = {Proceedings of the 47th International ACM SIGIR Conference on Research and Development in
               Information Retrieval},
  pages     = {1104--1114},
  year      = {2024},
  eprint    = {2310.18339},
  archivePrefix = {arXiv}
}"""

MOLORA_CITATION = """\
@misc{liao2024mingmoe,
  title     = {{MING-MOE}: Enhancing Medical Multi-Task Learning in Large Language Models with Sparse Mixture of
               Low-Rank Adapter Experts},
  author    = {Liao and others},
  year      = {2024},
  eprint    = {2404.09027},
  archivePrefix = {arXiv}
}"""

MEDMOELORA_CITATION = """\
@misc{yang2026medmoelora,
  author    = {Yang and Zeng and Yang},
  year      = {2026},
  note      = {Med-MoE-LoRA, arXiv:2601.07935},
  eprint    = {2601.07935},
  archivePrefix = {arXiv}
}"""


ATMOE_CITATION = """\
@misc{atmoe2024,
  title     = {{AT-MoE}: Adaptive Task-planning Mixture of Experts via {LoRA} Approach},
  author    = {Li, Xurui and Yao, Juanjuan},
  year      = {2024},
  eprint    = {2410.10896},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True)
class Method:
    """What the cards of a method's adapters say.

    Args:
        name: the method, as in "A LoRA adapter".
        describe: how the adapter of a config works, in a few sentences.
        fields: what the card lists of the config; fields that are None or empty are left out.
        tags: on the Hub.
        source: a link to the paper.
        citation: in BibTeX.
        by_task: whether the task chooses the experts, so that loading picks a task and each task can be folded.
    """

    name: str
    describe: Callable[[Any], str]
    fields: tuple[str, ...]
    tags: tuple[str, ...]
    source: str = ""
    citation: str = ""
    by_task: bool = False


BY_TOKEN = (
    "Experts are chosen for each token by what the layer sees of it, so that the adapter needs no task. It can be "
    "merged or folded only as what comes closest to it over calibration data (`peft_moe.calibrate`, or `peft-moe fold "
    "--calibrate`)."
)


def _moelora(config: MoeLoraConfig) -> str:
    gate = "one gate for all layers" if config.gate_scope == "model" else "a gate in each layer"
    return (
        f"In each target layer {config.num_experts} LoRA experts share a total rank of {config.r}, and {gate} weighs "
        "them by the task of the row. Each task therefore has its own LoRA, which can be merged or taken out."
    )


def _molora(config: MoLoraConfig) -> str:
    n, such = config.num_experts, f"LoRA experts of rank {config.r}"
    chosen = f"the best {config.top_k} of {n} {such}" if config.top_k < n else f"all {n} {such}"
    if config.top_p is not None:
        chosen = f"the fewest of {n} {such} whose probabilities add up to {config.top_p}"
    shared = f", and {config.num_shared_experts} shared ones to all tokens" if config.num_shared_experts else ""
    plain = " Layers that num_experts_pattern gives one expert have a plain LoRA and no router."
    return (
        f"In each layer with several experts, a router gives each token {chosen}, weighed by their scores{shared}."
        f"{plain if 1 in (config.num_experts_pattern or {}).values() else ''} {BY_TOKEN}"
    )


def _medmoelora(config: MedMoeLoraConfig) -> str:
    counts = {n for layers in (config.experts_per_layer or {}).values() for n in layers} or {config.num_experts}
    span = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else max(counts)
    ranks = [config.expert_ranks] if isinstance(config.expert_ranks, int) else config.expert_ranks
    alpha = " and alpha of twice the rank" if config.lora_alpha is None else ""
    modes = {
        "frozen": "left at zero, so that weight given there stays with the base model",
        "regularized": f"held near zero by a loss of weight {config.base_coefficient}",
        "general": "drawn to the rows of the general tasks "
        f"{', '.join(config.general_tasks or [])} by a localized loss of weight {config.base_coefficient}",
    }
    number = "a base expert" if config.num_base_experts == 1 else f"{config.num_base_experts} base experts"
    base = f", beside {number} {modes[config.base_expert_mode]}" if config.num_base_experts else ""
    return (
        f"In each target layer a router weighs, for each token, {span} LoRA experts of ranks "
        f"{', '.join(map(str, ranks))} in turn{alpha}{base}. {BY_TOKEN}"
    )


def _at_moe(config: GroupedMoeConfig) -> str:
    what = "each row by its prompt" if config.router_input == "prompt" else "each token"
    chosen = "with one softmax over all experts" if config.flat_routing else "over groups, and within each group"
    general = f" The general expert has the share 1 - λ, with λ {'learnt' if config.learn_mix else config.start_mix}."
    trained = "trained on with" if config.train_experts else "frozen under"
    return (
        f"Trained LoRAs are its experts, {trained} a router in each block that weighs them for {what}, {chosen}."
        f"{general if config.general_expert is not None else ''} It needs no task. With weights that are fixed by "
        "`model.set_group_weights` it can be merged into the base model and folded into a stock LoRA.\n\n"
        + table(("expert", "from", "revision or commit", "sha256"), [_origin(*item) for item in config.sources.items()])
    )


def _origin(name: str, source: Any) -> tuple[str, str, str, str]:
    """A row of the table of experts."""
    if source is None:
        return name, "new", "", ""
    place = " ".join(str(source[key]) for key in ("source", "subfolder", "task") if source.get(key) is not None)
    revision = source.get("commit") or source.get("revision") or ""
    return name, f"`{place}`", str(revision), str(source.get("sha256", ""))[:16]


METHODS: dict[str, Method] = {
    peft.PeftType.LORA: Method(
        name="LoRA",
        describe=lambda config: f"It is a baseline of rank {config.r}.",
        fields=("r", "lora_alpha", "lora_dropout"),
        tags=("lora",),
    ),
    PeftMoeType.MOELORA: Method(
        name="MOELoRA",
        describe=_moelora,
        fields=("r", "lora_alpha", "lora_dropout", "num_experts", "gate_scope", "task_embedding_dim"),
        tags=TAGS,
        source="[arXiv 2310.18339](https://arxiv.org/abs/2310.18339)",
        citation=MOELORA_CITATION,
        by_task=True,
    ),
    PeftMoeType.MOLORA: Method(
        name="MoLoRA",
        describe=_molora,
        fields=(
            "r", "lora_alpha", "lora_dropout", "num_experts", "num_experts_pattern", "top_k", "top_p", "router_bias",
            "router_jitter", "num_shared_experts", "balance_loss", "expert_groups",
        ),
        tags=("peft-moe", "molora", "mixture-of-lora-experts"),
        source="MING-MOE, [arXiv 2404.09027](https://arxiv.org/abs/2404.09027)",
        citation=MOLORA_CITATION,
    ),
    PeftMoeType.MEDMOELORA: Method(
        name="Med-MoE-LoRA",
        describe=_medmoelora,
        fields=(
            "expert_ranks", "lora_alpha", "lora_dropout", "num_experts", "num_experts_pattern", "expert_schedule",
            "experts_per_layer", "num_base_experts", "base_expert_mode", "base_expert_rank", "temperature",
            "learn_temperature", "inference_top_k", "balance_loss", "expert_groups",
        ),
        tags=("peft-moe", "med-moe-lora", "mixture-of-lora-experts"),
        source="[arXiv 2601.07935](https://arxiv.org/abs/2601.07935)",
        citation=MEDMOELORA_CITATION,
    ),
    PeftMoeType.GROUPEDMOE: Method(
        name="AT-MoE",
        describe=_at_moe,
        fields=(
            "mix", "learn_mix", "router_input", "within_group", "flat_routing", "group_temperature",
            "expert_temperature", "router_norm", "train_experts", "group_weights",
        ),
        tags=("peft-moe", "at-moe", "mixture-of-lora-experts"),
        source="[arXiv 2410.10896](https://arxiv.org/abs/2410.10896)",
        citation=ATMOE_CITATION,
    ),
}  # fmt: skip


def method_of(config: peft.PeftConfig) -> Method:
    """What the cards of an adapter with this config say; a ValueError if there is nothing."""
    peft_type: Any = config.peft_type
    if peft_type not in METHODS:
        raise ValueError(f"There is no card for a {peft_type} adapter; there are for {', '.join(METHODS)}.")
    return METHODS[peft_type]


def table(header: tuple[str, ...], rows: Any) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    # A pipe inside a cell would start another cell, and a line break another row.
    cells = [[" ".join(str(cell).splitlines()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
