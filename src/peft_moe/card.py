"""The model card of a trained adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .moelora import MoeLoraConfig

if TYPE_CHECKING:
    from .data import TaskInfo

TAGS = ("peft-moe", "moelora", "mixture-of-lora-experts")

# what the card lists of the adapter's config; a stock LoRA lacks the last three
ADAPTER_FIELDS = ("r", "lora_alpha", "lora_dropout", "num_experts", "gate_scope", "task_embedding_dim")

MEDMULTI_NOTE = (
    "MedMulti is made for research and software tests: parts of it are unvalidated, it is no clinical benchmark, and "
    "neither it nor this adapter gives medical advice."
)

CITATION = """\
```bibtex
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
}
```"""


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
    """The card of `model`'s active adapter, a MOELoRA or a stock LoRA.

    Args:
        model: the trained model.
        name: what loads the adapter: its Hub id or its folder.
        dataset: the training data: a Hub id, a file or a folder.
        info: the data's tasks, from `read_task_info`; may be empty.
        hyperparameters: what to list under Training after the adapter's own settings.
        results: scores per task, from `evaluate_tasks`.
        split: the split the results are of.
        license: the adapter's licence, such as "apache-2.0".

    Example:
        `model_card(model, name="me/icd", dataset="data", info={}, hyperparameters={"epochs": 3}).save("out/README.md")`
    """
    config = model.active_peft_config
    routed = isinstance(config, MoeLoraConfig)
    title = name.rstrip("/").split("/")[-1]
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation" if config.task_type == "CAUSAL_LM" else None,
        base_model=_hub_id(config.base_model_name_or_path),
        datasets=_hub_id(dataset),
        license=license,
        tags=list(TAGS) if routed else ["lora"],
        model_name=title,
        eval_results=_eval_results(results, dataset, split) or None,
    )
    sections = [
        f"# {title}",
        _method(config),
        _tasks(config.task_names if routed else list(info), info),
        f"## Data\n\nTrained on `{dataset}`." + (f" {MEDMULTI_NOTE}" if "medmulti" in dataset.lower() else ""),
        _training(model, hyperparameters),
        _scores(results, split),
        _loading(model, name),
        _folding(config, name) if routed else "",
        f"## Citation\n\n{CITATION}" if routed else "",
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


def _method(config: peft.LoraConfig | MoeLoraConfig) -> str:
    base = f"`{config.base_model_name_or_path}`"
    if not isinstance(config, MoeLoraConfig):
        return f"A LoRA adapter of rank {config.r} for {base}, trained with peft_moe as a baseline."
    gate = "one gate for all layers" if config.gate_scope == "model" else "a gate in each layer"
    return (
        f"A MOELoRA adapter ([arXiv 2310.18339](https://arxiv.org/abs/2310.18339)) for {base}, trained with peft_moe: "
        f"in each target layer {config.num_experts} LoRA experts share a total rank of {config.r}, and {gate} weighs "
        "them by the task of the row. Each task therefore has its own LoRA, which can be merged or taken out."
    )


def _tasks(names: list[str], info: Mapping[str, TaskInfo]) -> str:
    rows = [(i, name, (info[name].instruction if name in info else None) or "") for i, name in enumerate(names)]
    return f"## Tasks\n\n{_table(('id', 'task', 'instruction'), rows)}" if rows else ""


def _training(model: peft.PeftModel, hyperparameters: Mapping[str, object]) -> str:
    trainable, total = model.get_nb_trainable_parameters()
    counts = f"Trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})."
    config = model.active_peft_config
    rows = {name: getattr(config, name) for name in ADAPTER_FIELDS if hasattr(config, name)}
    targets = config.target_modules
    rows["target_modules"] = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    return f"## Training\n\n{counts}\n\n{_table(('hyper-parameter', 'value'), (rows | dict(hyperparameters)).items())}"


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
    config = model.active_peft_config
    routed = isinstance(config, MoeLoraConfig)
    auto = f"Auto{type(model).__name__}"
    base = config.base_model_name_or_path
    lines = [
        *(["import peft_moe  # registers MOELORA with peft"] if routed else []),
        f"from peft import {auto}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        *(
            [f'model.set_task("{config.task_names[0]}")  # or task_ids=[...] per call, one task for each row']
            if routed
            else []
        ),
    ]
    install = "`pip install peft_moe`, then:\n\n" if routed else ""
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
