"""What routers give to real inputs: sums over all tokens, and a few rows token by token.

Shapes: n rows · s tokens · E experts · T tasks
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from transformers.utils.logging import tqdm

from ..card_methods import method_of
from ..checks import check_count
from ..config import MoeConfig
from ..data import check_tasks, encode, task_key
from ..grouped import GroupedMoeConfig
from ..layer import MoeLinear
from .findings import findings
from .places import Place, places_of, read_sums, statistics_of
from .similarity import similarity

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMAT = 1


@dataclass
class Sample:
    """A row, token by token.

    Args:
        task: its task; None if it has none.
        tokens: its last tokens as texts, (n,).
        prompt_tokens: how many of them belong to the prompt.
        weights: by place, (n, E), or (1, E) where all tokens have the same.
    """

    task: str | None
    tokens: list[str]
    prompt_tokens: int
    weights: list[torch.Tensor]


@torch.no_grad()
def collect(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    samples: int = 8,
    sample_tokens: int = 128,
    progress: bool = True,
) -> tuple[dict[str, Any], list[Sample]]:
    """Run rows, prompt and answer, and add up what the active adapter's routers give each token.

    Args:
        model: a causal language model with one of our adapters. It is left in the mode it came in.
        tokenizer: the one it was trained with.
        examples: rows of `read_examples`.
        batch_size: rows of a call.
        max_length: tokens of a row; longer ones lose the start of their prompt.
        samples: rows to keep token by token, spread over the tasks.
        sample_tokens: of these, the last tokens.
        progress: show a progress bar.

    Returns:
        the routing as plain lists and numbers, of which docs/guides/reading-the-routing.md says what they are, with
        `findings`; and the samples. Padding counts nowhere.

    Raises:
        ValueError: another kind of model, no rows, rows of a task that the adapter does not know and needs, sizes
            below 1, or an adapter without routers.

    Example:
        >>> routing, samples = collect(model, tokenizer, read_examples("data/medmulti/tiny", split="test"))
    """
    for name, value in {"batch_size": batch_size, "sample_tokens": sample_tokens}.items():
        check_count(name, value, "a number of rows or tokens")
    adapter, config = _adapter_of(model)
    groups = config.names if isinstance(config, GroupedMoeConfig) else None
    places = places_of(model.get_base_model(), adapter, groups)
    if not places:
        raise ValueError(f"Adapter {adapter!r} has one expert in every layer, so that there is no routing to look at.")
    rows = encode(examples, tokenizer, tasks=_told(config, examples), max_length=max_length)
    named = [None if task is None else task_key(task) for task in examples["task"]]
    tasks = sorted({task for task in named if task is not None})
    seen = _Seen(places, [len(tasks) if task is None else tasks.index(task) for task in named], len(tasks) + 1)
    shown = {row: Sample(named[row], [], 0, []) for row in _spread(named, samples)}
    # experts in the output layer are to see all tokens; else their logits are not needed
    fewer = {} if isinstance(model.get_output_embeddings(), MoeLinear) else {"logits_to_keep": 1}
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]), reverse=True)
    training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="Routing", disable=not progress):
            part = order[start : start + batch_size]
            batch = _batch([rows[row] for row in part], tokenizer, config, model.device)
            with seen.watching(part, batch["attention_mask"] > 0, shown, sample_tokens):
                model(**batch, **fewer)
    finally:
        model.train(training)
    for row, sample in shown.items():
        write_tokens(sample, rows[row], tokenizer, sample_tokens)
    routing = {
        "format": FORMAT,
        "adapter": adapter,
        "method": method_of(config).name,
        "base_model": config.base_model_name_or_path,
        "rows": len(rows),
        "tokens": sum(len(ids) for ids in rows["input_ids"]),
        "tasks": tasks,
        "groups": None if groups is None else list(groups),
        "layers": seen.read(tasks),
    }
    return routing | {"findings": findings(routing)}, list(shown.values())


class _Seen:
    """Sums by place and task, on the device until they are read."""

    def __init__(self, places: Sequence[Place], task_of: Sequence[int], num_tasks: int) -> None:
        self.places, self.task_of, self.num_tasks = places, task_of, num_tasks
        self.sums: list[torch.Tensor | None] = [None] * len(places)

    @contextmanager
    def watching(self, part: Sequence[int], mask: torch.Tensor, shown: dict[int, Sample], last: int) -> Iterator[None]:
        """A `with` block in which a call of these rows, whose tokens count by the mask (n, s), is added up."""
        lengths = mask.sum(1).tolist() if any(row in shown for row in part) else []
        tasks = torch.tensor([self.task_of[row] for row in part], device=mask.device)

        def saw(index: int, weights: torch.Tensor) -> None:
            if weights.shape[:-1].numel() == mask.numel():  # some models flatten (n, s)
                weights = weights.reshape(*mask.shape, -1)
            self._add(index, weights, mask, tasks)
            for at, row in enumerate(part):
                if row in shown:
                    own = weights[at if len(weights) > 1 else 0]
                    shown[row].weights.append(own[: lengths[at]][-last:].cpu())

        with ExitStack() as stack:
            for index, place in enumerate(self.places):
                stack.enter_context(place.watched(partial(saw, index)))
            yield

    def _add(self, index: int, weights: torch.Tensor, mask: torch.Tensor, tasks: torch.Tensor) -> None:
        columns = statistics_of(weights)  # (n, s), or (n or 1, 1) where all tokens of a row share a decision
        counted = mask.to(columns) if columns.shape[1] > 1 else mask.sum(1, keepdim=True).to(columns)
        rows = (columns * counted.unsqueeze(-1)).sum(1)
        total = columns.new_zeros(self.num_tasks, columns.shape[-1]).index_add(0, tasks.to(rows.device), rows)
        before = self.sums[index]
        self.sums[index] = total if before is None else before.add_(total)

    def read(self, tasks: Sequence[str]) -> list[dict[str, Any]]:
        """What each place did, in numbers."""
        return [self._read(place, sums, tasks) for place, sums in zip(self.places, self.sums, strict=True)]

    def _read(self, place: Place, sums: torch.Tensor | None, tasks: Sequence[str]) -> dict[str, Any]:
        if sums is None:
            raise ValueError(f"{place.name} was not run by the model, so that nothing can be said of its routing.")
        sums = sums.double().cpu()
        of_all = read_sums(sums.sum(0), place)
        by_task = {task: read_sums(row, place) for task, row in zip(tasks, sums, strict=False) if row[-1] > 0}
        bank = place.layer.bank(place.adapter)
        cosines = similarity(bank.lora_A.weight, bank.lora_B.weight, list(bank.ranks))
        if len(cosines) < len(place.experts):  # a base expert without matrices
            cosines = torch.nn.functional.pad(cosines, (1, 0, 1, 0))
        loads = of_all["load"]
        return {
            "name": place.name,
            "block": place.block,
            "module": place.module,
            "experts": place.experts,
            "ranks": place.ranks,
            "group_of": place.group_of,
            **of_all,
            "group_load": None
            if place.group_of is None
            else [
                sum(load for load, g in zip(loads, place.group_of, strict=True) if g == group)
                for group in range(max(place.group_of) + 1)
            ],
            "tasks": {
                task: {name: values[name] for name in ("tokens", "load", "entropy")} for task, values in by_task.items()
            },
            "similarity": cosines.tolist(),
        }


def _adapter_of(model: PeftModel) -> tuple[str, MoeConfig]:
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(config, MoeConfig):
        raise ValueError(
            f"A report needs an adapter of peft_moe on its base model, and this is a {type(model).__name__} with "
            f"{type(config).__name__}; load one with PeftModel.from_pretrained."
        )
    return model.active_adapters[0], config


def _told(config: MoeConfig, examples: Dataset) -> list[str] | None:
    """The task names that rows are told by; None where the adapter knows none, or they are mere labels of others."""
    if not config.task_names:
        return None
    try:
        check_tasks(examples, config.task_names)
    except ValueError:
        if config.needs_tasks:
            raise
        return None
    return config.task_names


def _spread(tasks: Sequence[str | None], count: int) -> list[int]:
    """Rows in turns of the tasks, each in its order."""
    by_task: dict[str | None, list[int]] = {}
    for row, task in enumerate(tasks):
        by_task.setdefault(task, []).append(row)
    turns = [
        rows[turn] for turn in range(max(map(len, by_task.values()))) for rows in by_task.values() if turn < len(rows)
    ]
    return turns[:count]


def _batch(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, config: MoeConfig, device: torch.device
) -> dict[str, torch.Tensor]:
    """Rows padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    pad = cast(int, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows], device=device)

    batch = {"input_ids": padded("input_ids", pad), "attention_mask": padded("attention_mask", 0)}
    if isinstance(config, GroupedMoeConfig) and config.router_input == "prompt":
        batch["prompt_mask"] = (padded("labels", 0) == -100) & (batch["attention_mask"] > 0)
    if "task_ids" in rows[0]:
        ids = [row["task_ids"] if isinstance(row["task_ids"], list) else [row["task_ids"]] for row in rows]
        most = max(map(len, ids))
        batch["task_ids"] = torch.tensor([of_row + [-1] * (most - len(of_row)) for of_row in ids], device=device)
    return batch


def write_tokens(sample: Sample, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, last: int) -> None:
    """The texts of a row's last tokens: those of a character that takes several are in the last of them."""
    ids, labels = row["input_ids"][-last:], row["labels"][-last:]
    before = ""
    for at in range(len(ids)):
        text = str(tokenizer.decode(ids[: at + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        whole = "" if text.endswith("\ufffd") else text[len(before) :]
        sample.tokens.append(whole)
        before = text if whole else before
    sample.prompt_tokens = sum(label == -100 for label in labels)
