"""Scores per task: answer examples with a model, compare with the reference answers, and lay results side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import tqdm

from .checks import check_count
from .config import MoeConfig
from .data import TaskInfo, check_tasks, task_key, tokenize
from .metrics import load_metric

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModelForCausalLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Results = dict[str, dict[str, Any]]


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel | PeftModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 48,
    progress: bool = True,
) -> list[str]:
    """Answer examples greedily, in batches of rows of one task, and of similar length within it.

    A batch takes as long as its longest answer, and those of one task are much alike.

    Args:
        model: a causal language model, with or without an adapter; one of ours is told each row's task.
        tokenizer: the one the model was trained with; its padding side does not matter.
        examples: rows of `read_examples`. Their own answers are not shown to the model.
        batch_size: rows per call of `generate`.
        max_new_tokens: tokens per answer at most.
        progress: show a progress bar.

    Returns one text per row, in the order of `examples`. The model is left in the mode it came in. Raises `ValueError`
    for rows of a task that the adapter does not have, and for sizes below 1.

    Example:
        `generate_answers(model, tokenizer, read_examples("data/medmulti/tiny", split="test"))`
    """
    check_count("batch_size", batch_size, "the number of rows answered at once")
    check_count("max_new_tokens", max_new_tokens, "the longest answer in tokens")
    if not len(examples):
        return []
    tasks = _tasks_to_tell(model, examples)
    pairs = [tokenize(messages, tokenizer) for messages in examples["messages"]]
    prompts = [torch.tensor(prompt) for prompt, _ in pairs]
    options = {"do_sample": False, "max_new_tokens": max_new_tokens} | _special_ids(model, tokenizer, pairs[0][1][-1])
    labels = list(map(task_key, examples["task"])) if "task" in examples.column_names else [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: (labels[row], -len(prompts[row])))
    answers = [""] * len(prompts)
    training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="Answering", disable=not progress):
            rows = order[start : start + batch_size]
            batch = _left_padded([prompts[row] for row in rows], options["pad_token_id"], model.device)
            if tasks:
                batch["task_ids"] = [examples[row]["task"] for row in rows]
            # Causal models have generate; their base class does not say so.
            generated = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]  # type: ignore[operator]
            for row, ids in zip(rows, generated, strict=True):
                answers[row] = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    finally:
        model.train(training)
    return answers


def _tasks_to_tell(model: PreTrainedModel | PeftModelForCausalLM, examples: Dataset) -> list[str]:
    """The names of tasks that an adapter is told; where they are mere labels, rows may also have others."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(config, MoeConfig) or not config.task_names:
        return []
    try:
        check_tasks(examples, config.task_names)
    except ValueError:
        if config.needs_tasks:
            raise
        return []
    return config.task_names


def score(predictions: Sequence[str], examples: Dataset, info: Mapping[str, TaskInfo]) -> Results:
    """Score predictions against the answers in `examples`, task by task.

    Args:
        predictions: one text per row of `examples`.
        examples: rows of `read_examples`. Rows of several tasks count as a task of their own, `"a+b"`.
        info: the tasks' metrics, from `read_task_info`; a task that is not in it is scored by `exact_match`.

    Returns `{task: {"metric": name, "score": 0..1, "exact_match": 0..1, "n": rows}}` and, under `"mean"`, the
    unweighted mean over tasks. Raises `ValueError` if the lengths differ, for no rows, or for an unknown metric.

    Example:
        `score(answers, examples, read_task_info("data/medmulti/tiny"))["mean"]["score"]`
    """
    if isinstance(predictions, str):
        raise ValueError(f"predictions={predictions!r} is one text; give a list with one for each row.")
    if len(predictions) != len(examples):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples; give one for each row.")
    metrics = metrics_of(examples, info)
    pairs: dict[str, tuple[list[str], list[str]]] = {task: ([], []) for task in metrics}
    for prediction, task, messages in zip(predictions, examples["task"], examples["messages"], strict=True):
        pairs[task_key(task)][0].append(prediction)
        pairs[task_key(task)][1].append(messages[-1]["content"])
    results: Results = {
        task: {
            "metric": metric,
            "score": _compute(metric, *pairs[task]),
            "exact_match": _compute("exact_match", *pairs[task]),
            "n": len(pairs[task][0]),
        }
        for task, metric in metrics.items()
    }
    mean = {key: sum(result[key] for result in results.values()) / len(results) for key in ("score", "exact_match")}
    return results | {"mean": {"metric": "mean", **mean, "n": len(examples)}}


def evaluate_tasks(
    model: PreTrainedModel | PeftModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    info: Mapping[str, TaskInfo],
    **generation: Any,
) -> Results:
    """`generate_answers`, then `score`.

    Args:
        model, tokenizer, examples: as for `generate_answers`.
        info: the tasks' metrics, as for `score`.
        generation: `batch_size`, `max_new_tokens` and `progress` of `generate_answers`.

    Raises what these two raise; unknown metrics before anything is generated.

    Example:
        `evaluate_tasks(model, tokenizer, examples, read_task_info("data/medmulti/tiny"), batch_size=32)`
    """
    metrics_of(examples, info)
    return score(generate_answers(model, tokenizer, examples, **generation), examples, info)


def table(results: Mapping[str, Results]) -> str:
    """Lay out the results of one or more systems as plain text, a row per task and a column per system.

    Args:
        results: what `score` or `evaluate_tasks` returned, by the system's name.

    A score that a system lacks is shown as a dash. Returns lines without a trailing line break. Raises `ValueError` if
    there are none.

    Example:
        `print(table({"base": before, "MOELoRA": after}))`
    """
    if not results:
        raise ValueError("There are no results to lay out; give those of at least one system.")
    tasks = {task: result for system in results.values() for task, result in system.items()}
    tasks["mean"] = tasks.pop("mean")  # last, also where later systems have other tasks
    rows = [["task", "metric", "n", *results]]
    for task, result in tasks.items():
        scores = [f"{system[task]['score']:.3f}" if task in system else "-" for system in results.values()]
        rows.append([task, "" if task == "mean" else result["metric"], str(result["n"]), *scores])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(_line(row, widths) for row in rows)


def _special_ids(model: Any, tokenizer: PreTrainedTokenizerBase, end_of_answer: int) -> dict[str, Any]:
    """Padding and every token that may end an answer: the model's, the tokenizer's, and the one training puts there."""
    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops]) | {tokenizer.eos_token_id, end_of_answer}
    stops.discard(None)
    pad = tokenizer.pad_token_id
    return {"eos_token_id": sorted(stops), "pad_token_id": end_of_answer if pad is None else pad}


def _left_padded(prompts: list[torch.Tensor], pad: int, device: torch.device) -> dict[str, Any]:
    def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left").to(device)

    return {"input_ids": padded(prompts, pad), "attention_mask": padded([torch.ones_like(row) for row in prompts], 0)}


def metrics_of(examples: Dataset, info: Mapping[str, TaskInfo]) -> dict[str, str]:
    """The metric of each task that occurs, in the order of info, then of the rows.

    Raises:
        ValueError: no rows, a task called "mean", or an unknown metric.
        ImportError: a package that a metric needs is missing; the message says what to install.
    """
    if not len(examples):
        raise ValueError("There are no rows to score; give at least one.")
    found = dict.fromkeys(map(task_key, examples["task"]))
    if "mean" in found:
        raise ValueError("A task is called 'mean', which is what results call the mean over tasks; rename the task.")
    tasks = [task for task in info if task in found] + [task for task in found if task not in info]
    metrics = {task: info[task].metric if task in info else "exact_match" for task in tasks}
    for metric in set(metrics.values()):
        _compute(metric, ["x"], ["x"])  # some need a package
    return metrics


def _compute(metric: str, predictions: list[str], references: list[str]) -> float:
    return load_metric(metric).compute(predictions=predictions, references=references)[metric]


def _line(cells: list[str], widths: list[int]) -> str:
    words, numbers = slice(0, 2), slice(2, None)
    left = [cell.ljust(width) for cell, width in zip(cells[words], widths[words], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[numbers], widths[numbers], strict=True)]
    return "  ".join(left + right).rstrip()
