"""Multi-task text data: turn it into token ids and labels, and mix its tasks. `reading` has where it comes from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .checks import check_count, is_number
from .reading import Message, TaskInfo, read_examples, read_task_info

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TaskInfo",
    "check_tasks",
    "encode",
    "mix",
    "prompt_ids",
    "read_examples",
    "read_task_info",
    "take_per_task",
    "task_key",
    "tokenize",
    "with_tasks",
]

Strategy = Literal["proportional", "uniform", "temperature"]
ANSWER = "\ufffc"  # stands for an answer, to find out what a template writes around it


def task_key(task: str | Sequence[str]) -> str:
    """One name for the task or tasks of a row: `"icd"`, `"icd+rad"`."""
    return task if isinstance(task, str) else "+".join(task)


def with_tasks(examples: Dataset) -> Dataset:
    """Rows of `read_examples` with a task each: if they have none, that is `"all"`, as which they are scored."""
    if any(examples["task"]):
        return examples
    return examples.remove_columns("task").add_column("task", ["all"] * len(examples))


def take_per_task(examples: Dataset, limit: int) -> Dataset:
    """The first `limit` rows of each task, in the order of `examples`; a `ValueError` if limit is below 1."""
    check_count("limit", limit, "how many rows of each task to take")
    return examples.select(sorted(index for rows in _rows_of_tasks(examples).values() for index in rows[:limit]))


def encode(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, *, tasks: Sequence[str] | None, max_length: int = 512
) -> Dataset:
    """Tokenize rows of `read_examples` for training a causal language model on the answers.

    Args:
        examples: rows with `task` and `messages`.
        tokenizer: its chat template is used if it has one; otherwise a row reads "prompt, newline, answer, EOS".
        tasks: the adapter's task names in order; None for a model that is not routed by task.
        max_length: tokens per row. Longer rows lose the start of their prompt, never of their answer.

    Returns rows of `input_ids`, `attention_mask`, `labels` (-100 outside the answer and its end token) and, given
    tasks, `task_ids` (an index into tasks, or a list of them if rows have several). Raises `ValueError` for no rows or
    other ones, a task that is not in tasks, an answer longer than max_length, and a chat template that does not
    continue its own prompt.

    Example:
        `encode(read_examples("data/medmulti/tiny"), tokenizer, tasks=config.task_names)`
    """
    check_count("max_length", max_length, "the longest row in tokens")
    if not len(examples) or not {"task", "messages"} <= set(examples.column_names):
        raise ValueError(
            f"{len(examples)} rows of {examples.column_names} cannot be encoded; give rows of task and messages, as "
            "read_examples makes them."
        )
    if tasks is not None:
        check_tasks(examples, tasks)

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = tokenize(row["messages"], tokenizer)
        cut = max(0, len(prompt) + len(answer) - max_length)
        ids = prompt[cut:] + answer
        labels = [-100] * (len(ids) - len(answer)) + answer
        encoded: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        if tasks is not None:
            names = row["task"]
            encoded["task_ids"] = tasks.index(names) if isinstance(names, str) else [tasks.index(n) for n in names]
        return encoded | {"_answer": len(answer), "_cut": cut}

    rows = examples.map(
        convert,
        remove_columns=examples.column_names,
        load_from_cache_file=False,  # a cached result would outlive a change of this package
        desc="Tokenizing",
    )
    longest = max(rows["_answer"])
    if longest >= max_length:
        raise ValueError(
            f"max_length={max_length} has no room for the longest answer of {longest} tokens, and answers are not cut; "
            f"use max_length={longest + 1} or more, or leave such rows out."
        )
    if shortened := sum(cut > 0 for cut in rows["_cut"]):
        warnings.warn(
            f"{shortened} of {len(rows)} rows have more than max_length={max_length} tokens and lost the start of "
            f"their prompt; max_length={max_length + max(rows['_cut'])} would keep all of them whole.",
            stacklevel=2,
        )
    return rows.remove_columns(["_answer", "_cut"])


def tokenize(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with its end token; training and generation both start from these.

    Prompt and answer are tokenized apart, so a model trained on them meets the same prompt when it generates. What a
    template writes before every answer, such as an empty `<think>` block, belongs to the prompt. Raises `ValueError` if
    a chat template does not continue its own prompt, or if neither it nor the tokenizer ends an answer.
    """
    *context, answer = messages
    eos = tokenizer.eos_token_id
    if tokenizer.chat_template is None:
        rest = answer["content"].strip()
        prompt_ids = tokenizer("\n".join(message["content"] for message in context) + "\n")["input_ids"]
        if prompt_ids[-1] == eos:  # what T5-like tokenizers put at the end of any text
            prompt_ids.pop()
    else:
        prompt = str(tokenizer.apply_chat_template(context, add_generation_prompt=True, tokenize=False))
        whole = str(tokenizer.apply_chat_template([*context, answer], tokenize=False))
        if not whole.startswith(prompt):
            raise ValueError(
                "The chat template writes the conversation differently once it is answered, so the answer cannot be "
                f"found: {prompt!r} does not start {whole!r}. Set tokenizer.chat_template to one that only appends."
            )
        rest = whole[len(prompt) :].rstrip()  # templates put a line break after the end-of-turn token
        if not rest.startswith(answer["content"].strip()):
            other = tokenizer.apply_chat_template([*context, answer | {"content": ANSWER}], tokenize=False)
            before, found, _ = str(other)[len(prompt) :].partition(ANSWER)
            if found and rest.startswith(before):
                prompt, rest = prompt + before, rest[len(before) :]
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    if rest.endswith(answer["content"].strip()):  # no template put an end-of-turn token after the answer
        if eos is None:
            raise ValueError("Nothing ends an answer: the tokenizer has no end-of-turn token; set tokenizer.eos_token.")
        answer_ids.append(eos)
    return prompt_ids, answer_ids


def prompt_ids(question: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a question as training has them: up to where the answer begins.

    What a template writes before every answer is there too, such as an empty `<think>` block.

    Args:
        question: messages, `{"role": ..., "content": ...}`, the last of them the user's.
        tokenizer: the one that the model was trained with.

    Raises `ValueError` as `tokenize` does.

    Example:
        `prompt_ids([{"role": "user", "content": "Urgent or routine? Chest pain since noon."}], tokenizer)`
    """
    return tokenize([*question, {"role": "assistant", "content": ANSWER}], tokenizer)[0]


def mix(examples: Dataset, *, strategy: Strategy = "proportional", temperature: float = 2.0, seed: int = 0) -> Dataset:
    """Shuffle one epoch of as many rows as `examples`, its tasks drawn by `strategy`.

    Args:
        examples: rows with a `task` column.
        strategy: `proportional` keeps every row once; `uniform` draws every task equally often; `temperature` draws a
            task of n rows with probability proportional to n^(1 / temperature). Drawn tasks go through their rows in
            turn, so rows repeat only once all rows of the task were used.
        temperature: 1 is proportional, large values approach uniform.
        seed: the same seed gives the same rows in the same order.

    Raises `ValueError` for an unknown strategy, a temperature below 0.1, or no rows.

    Example:
        `mix(read_examples("data/medmulti/tiny"), strategy="temperature", temperature=2.0, seed=0)`
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy={strategy!r} is unknown; use one of {list(get_args(Strategy))}.")
    if not is_number(temperature) or temperature < 0.1:  # where small tasks would hardly ever be drawn
        raise ValueError(
            f"temperature={temperature!r} must be a number from 0.1 up; 1 is proportional, large values are uniform."
        )
    if not len(examples):
        raise ValueError("There are no rows to mix; give at least one.")
    if strategy == "proportional":
        return examples.shuffle(seed=seed)
    parts = [np.array(rows)[_shuffled(len(rows), seed)] for rows in _rows_of_tasks(examples).values()]
    largest = max(map(len, parts))
    weights = [1.0 if strategy == "uniform" else (len(part) / largest) ** (1 / temperature) for part in parts]
    shares = [weight / sum(weights) for weight in weights]
    drawn = np.random.default_rng(seed).choice(len(parts), size=len(examples), p=shares)
    mixed = np.empty(len(examples), dtype=np.int64)
    for index, part in enumerate(parts):
        here = drawn == index
        mixed[here] = np.resize(part, here.sum())  # from the first row again where it has been through
    return examples.select(mixed)


def _shuffled(n: int, seed: int) -> npt.NDArray[np.int64]:
    """The numbers below n, in an order of this seed."""
    return np.random.default_rng(seed).permutation(n)


def check_tasks(examples: Dataset, tasks: Sequence[str]) -> None:
    """Raise a `ValueError` that lists `tasks` if a row of `examples` has another one."""
    if isinstance(tasks, str):
        raise ValueError(f"tasks={tasks!r} is one text; give a list of the tasks' names.")
    found = {name for task in examples["task"] for name in ([task] if isinstance(task, str) else task)}
    if unknown := sorted(found - set(tasks)):
        raise ValueError(
            f"The data has tasks {unknown} that are not among the adapter's tasks {list(tasks)}; leave their rows out, "
            "or train an adapter that has them."
        )


def _rows_of_tasks(examples: Dataset) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for index, task in enumerate(examples["task"]):
        rows.setdefault(task_key(task), []).append(index)
    return rows
