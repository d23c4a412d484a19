"""The model card of a trained adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import peft
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .card_methods import hub_id, method_of, table
from .config import MoeConfig
from .grouped.fit import last_part
from .moelora import MoeLoraConfig

if TYPE_CHECKING:
    from .data import TaskInfo

MEDMULTI_NOTE = (
    "MedMulti is made for research and software tests: parts of it are unvalidated, it is no clinical benchmark, and "
    "neither it nor this adapter gives medical advice."
)


def tags_of(config: peft.PeftConfig) -> list[str]:
    """The Hub tags of an adapter. peft takes the base model's for the cards that it writes itself.

    Example:
        `base_model.add_model_tags(tags_of(config))`
    """
    return list(method_of(config).tags)


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
    method = method_of(config)
    title = last_part(name)
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation" if config.task_type == "CAUSAL_LM" else None,
        base_model=hub_id(config.base_model_name_or_path),
        datasets=hub_id(dataset),
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


def _opening(config: Any) -> str:
    method = method_of(config)
    source = f" ({method.source})" if method.source else ""
    base = f"`{config.base_model_name_or_path}`"
    article = "An" if method.name[0] in "AEIOU" else "A"
    return f"{article} {method.name} adapter{source} for {base}, trained with peft_moe. {method.describe(config)}"


def _tasks(names: list[str], info: Mapping[str, TaskInfo]) -> str:
    rows = [(i, name, (info[name].instruction if name in info else None) or "") for i, name in enumerate(names)]
    return f"## Tasks\n\n{table(('id', 'task', 'instruction'), rows)}" if rows else ""


def _training(model: peft.PeftModel, hyperparameters: Mapping[str, object]) -> str:
    trainable, total = model.get_nb_trainable_parameters()
    counts = f"Trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})."
    config = model.active_peft_config
    rows = _settings(config) | dict(hyperparameters)
    return f"## Training\n\n{counts}\n\n{table(('hyper-parameter', 'value'), rows.items())}"


def _settings(config: Any) -> dict[str, object]:
    """What the card lists of a config."""
    values = {name: getattr(config, name) for name in method_of(config).fields}
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
    return f"## Scores\n\nGreedy answers on the `{split}` split.\n\n{table(header, rows)}"


def _loading(model: peft.PeftModel, name: str) -> str:
    config: Any = model.active_peft_config
    ours = isinstance(config, MoeConfig)
    choose = "model.set_task({})  # or task_ids=[...] per call, one task for each row"
    auto = f"Auto{type(model).__name__}"
    base = config.base_model_name_or_path
    lines = [
        *([f"import peft_moe  # registers {config.peft_type.value} with peft"] if ours else []),
        f"from peft import {auto}",
        "from transformers import AutoTokenizer",
        "",
        f"model = {auto}.from_pretrained({json.dumps(name, ensure_ascii=False)})",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name, ensure_ascii=False)})",
        *([choose.format(json.dumps(config.task_names[0], ensure_ascii=False))] if method_of(config).by_task else []),
    ]
    install = "With peft_moe installed, from its repository:\n\n" if ours else ""
    local = "" if hub_id(base) else f"\n\nThe base model is a local folder, `{base}`, and must be there to load."
    return f"## Use\n\n{install}```python\n" + "\n".join(lines) + f"\n```{local}"


def _folding(config: MoeLoraConfig, name: str) -> str:
    task = config.task_names[0]
    return (
        "## As a stock LoRA\n\nOne task as a plain LoRA directory, which peft and servers load without peft_moe:\n\n"
        f"```bash\npeft-moe fold {quote(name)} --task {quote(task)} --out {quote(f'{task}-lora')}\n```"
    )
