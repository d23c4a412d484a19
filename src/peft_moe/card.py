"""The model card of a trained adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .config import MoeConfig, PeftMoeType
from .medmoe import MedMoeLoraConfig
from .moelora import MoeLoraConfig
from .molora import MoLoraConfig

if TYPE_CHECKING:
    from .data import TaskInfo

TAGS = ("peft-moe", "moelora", "mixture-of-lora-experts")  # of MOELoRA adapters

MEDMULTI_NOTE = (
    "MedMulti is made for research and software tests: parts of it are unvalidated, it is no clinical benchmark, and "
    "neither it nor this adapter gives medical advice."
)

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
    "Experts are chosen for each token by what the layer sees of it. So the adapter needs no task, and it can neither "
    "be merged into the base model nor folded into a stock LoRA."
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
}  # fmt: skip


def tags_of(config: peft.PeftConfig) -> list[str]:
    """The Hub tags of an adapter. peft takes the base model's for the cards that it writes itself.

    Example:
        `base_model.add_model_tags(tags_of(config))`
    """
    return list(_method_of(config).tags)


def model_card(
    model: peft.PeftModel,
    *,
    name: str,
    dataset: str,
    info: Mapping[str, TaskInfo],
    hyperparameters: Mapping[str, object],
    results: Mapping[str, Mapping[str, Any]] | None = None,
    split: str = "test",
    license: str | None = None,
) -> ModelCard:
    """The card of `model`'s active adapter, of one of our methods or a stock LoRA.

    Args:
        model: the trained model.
        name: what loads the adapter: its Hub id or its folder.
        dataset: the training data: a Hub id, a file or a folder.
        info: the data's tasks, from `read_task_info`; may be empty.
        hyperparameters: what to list under Training after the adapter's own settings.
        results: scores per task, from `evaluate_tasks`.
        split: the split the results are of.
        license: the adapter's licence, such as "apache-2.0".

    Raises:
        ValueError: an adapter of another method.

    Example:
        `model_card(model, name="me/icd", dataset="data", info={}, hyperparameters={"epochs": 3}).save("out/README.md")`
    """
    config = model.active_peft_config
    method = _method_of(config)
    title = name.rstrip("/").split("/")[-1]
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation" if config.task_type == "CAUSAL_LM" else None,
        base_model=_hub_id(config.base_model_name_or_path),
        datasets=_hub_id(dataset),
        license=license,
        tags=tags_of(config),
        model_name=title,
        eval_results=_eval_results(results, dataset, split) or None,
    )
    sections = [
        f"# {title}",
        _opening(config),
        _tasks(getattr(config, "task_names", None) or list(info), info),  # a stock LoRA has none
        f"## Data\n\nTrained on `{dataset}`." + (f" {MEDMULTI_NOTE}" if "medmulti" in dataset.lower() else ""),
        _training(model, hyperparameters),
        _scores(results, split),
        _loading(model, name),
        _folding(config, name) if method.by_task else "",
        f"## Citation\n\n```bibtex\n{method.citation}\n```" if method.citation else "",
        # Where peft's own update of the card looks for its version; without it peft appends another section.
        f"### Framework versions\n\n- PEFT {peft.__version__}",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _hub_id(source: str | None) -> str | None:
    # The Hub refuses metadata that names a local path.
    return None if source is None or Path(source).exists() else source


def _eval_results(results: Mapping[str, Mapping[str, Any]] | None, dataset: str, split: str) -> list[EvalResult]:
    dataset_name = "/".join(Path(dataset).parts[-2:])  # a Hub id, or as much of a path as says what it is
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_name,
            dataset_name=dataset_name,
            dataset_config=task,
            dataset_split=split,
            metric_type=result["metric"],
            metric_value=round(result["score"], 4),
        )
        for task, result in (results or {}).items()
        if task != "mean"
    ]


def _method_of(config: peft.PeftConfig) -> Method:
    peft_type: Any = config.peft_type
    if peft_type not in METHODS:
        raise ValueError(f"There is no card for a {peft_type} adapter; there are for {', '.join(METHODS)}.")
    return METHODS[peft_type]


def _opening(config: Any) -> str:
    method = _method_of(config)
    source = f" ({method.source})" if method.source else ""
    base = f"`{config.base_model_name_or_path}`"
    return f"A {method.name} adapter{source} for {base}, trained with peft_moe. {method.describe(config)}"


def _tasks(names: list[str], info: Mapping[str, TaskInfo]) -> str:
    rows = [(i, name, (info[name].instruction if name in info else None) or "") for i, name in enumerate(names)]
    return f"## Tasks\n\n{_table(('id', 'task', 'instruction'), rows)}" if rows else ""


def _training(model: peft.PeftModel, hyperparameters: Mapping[str, object]) -> str:
    trainable, total = model.get_nb_trainable_parameters()
    counts = f"Trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})."
    config = model.active_peft_config
    rows = _settings(config) | dict(hyperparameters)
    return f"## Training\n\n{counts}\n\n{_table(('hyper-parameter', 'value'), rows.items())}"


def _settings(config: Any) -> dict[str, object]:
    """What the card lists of a config."""
    values = {name: getattr(config, name) for name in _method_of(config).fields}
    if "balance_loss" in values:
        values["balance_loss"] = config.coefficients or "none"  # in the form that says the coefficients too
    targets = config.target_modules
    values["target_modules"] = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    listed = {name: value for name, value in values.items() if value is not None and value != {}}
    # as code: regexes have characters that mean something in Markdown
    return {name: f"`{value}`" if isinstance(value, dict) else value for name, value in listed.items()}


def _scores(results: Mapping[str, Mapping[str, Any]] | None, split: str) -> str:
    if not results:
        return ""
    header = ("task", "metric", "score", "exact match", "rows")
    rows = [
        (task, r.get("metric", ""), f"{r['score']:.3f}", f"{r['exact_match']:.3f}", r["n"])
        for task, r in results.items()
    ]
    return f"## Scores\n\nGreedy answers on the `{split}` split.\n\n{_table(header, rows)}"


def _loading(model: peft.PeftModel, name: str) -> str:
    config: Any = model.active_peft_config
    ours = isinstance(config, MoeConfig)
    choose = 'model.set_task("{}")  # or task_ids=[...] per call, one task for each row'
    auto = f"Auto{type(model).__name__}"
    base = config.base_model_name_or_path
    lines = [
        *([f"import peft_moe  # registers {config.peft_type.value} with peft"] if ours else []),
        f"from peft import {auto}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        *([choose.format(config.task_names[0])] if _method_of(config).by_task else []),
    ]
    install = "`pip install peft_moe`, then:\n\n" if ours else ""
    local = "" if _hub_id(base) else f"\n\nThe base model is a local folder, `{base}`, and must be there to load."
    return f"## Use\n\n{install}```python\n" + "\n".join(lines) + f"\n```{local}"


def _folding(config: MoeLoraConfig, name: str) -> str:
    task = config.task_names[0]
    return (
        "## As a stock LoRA\n\nOne task as a plain LoRA directory, which peft and servers load without peft_moe:\n\n"
        f"```bash\npeft-moe fold {name} --task {task} --out {task}-lora\n```"
    )


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    # A pipe inside a cell would start another cell.
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
