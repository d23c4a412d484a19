"""Task ids through any data collator, and per-task scores inside the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checks import check_tasks, is_whole
from .config import names_of
from .evaluation import generate_answers, score

if TYPE_CHECKING:
    from datasets import Dataset

    from .data import TaskInfo


class TaskCollator:
    """Wraps a data collator: builds the batch with it and adds the rows' tasks as `task_ids`.

    Args:
        collator: any collator that turns a list of rows into one batch and keeps one batch row per row, or makes all
            chosen and then all rejected answers of them, as TRL's `DataCollatorForPreference` does.
        tasks: the adapter's task names in order; needed where the column holds names, and checks the range of ids.
        column: the rows' key that holds the task: an id, a name, or a list of them for a row of several tasks.

    The added tensor is of shape (batch,), or (batch, k) padded with -1 if rows have several tasks. The call raises a
    `ValueError` for no rows, a row without the column, an unknown task, and a collator that merges rows. Making one
    raises a `ValueError` for names that are not unique.

    Example:
        `Trainer(model, args, data_collator=TaskCollator(DataCollatorForSeq2Seq(tokenizer), tasks=["icd", "rad"]), ...)`
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Any],
        tasks: Sequence[str] | None = None,
        column: str = "task_ids",
    ) -> None:
        if not callable(collator):
            raise TypeError(
                f"collator={collator!r} cannot be called; give a data collator such as DataCollatorForSeq2Seq."
            )
        self.collator = collator
        self.tasks = None if tasks is None else names_of(check_tasks(tasks))
        self.column = column

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        if not features:
            raise ValueError("There are no rows to make a batch of; give at least one.")
        ids = [self._ids(row) for row in features]
        batch = self.collator([{key: value for key, value in row.items() if key != self.column} for row in features])
        rows = len(batch["input_ids"]) if "input_ids" in batch else len(ids)
        if rows == 2 * len(ids) and "chosen_ids" in features[0]:
            ids = ids + ids  # TRL's preference collators: the chosen answers of all rows, then the rejected ones
        # Collators that pack rows (TRL's packing and padding_free) leave fewer batch rows than tasks.
        if rows != len(ids):
            raise ValueError(
                f"{type(self.collator).__name__} made {rows} batch rows of {len(ids)} rows, so their tasks cannot be "
                "told apart; turn off packing and padding-free batches."
            )
        longest = max(len(row) for row in ids)
        padded = torch.tensor([row + [-1] * (longest - len(row)) for row in ids])
        batch["task_ids"] = padded[:, 0] if longest == 1 else padded
        return batch

    def _ids(self, row: Mapping[str, Any]) -> list[int]:
        if self.column not in row:
            raise ValueError(
                f"A row has no '{self.column}', only {sorted(row)}. If the dataset has it, it was dropped on the way: "
                "by Trainer (set remove_unused_columns=False), by packing, which mixes tasks within rows (turn it "
                "off), or by the trainer's own preparation of the data."
            )
        value = row[self.column]
        value = value.tolist() if hasattr(value, "tolist") else value  # a tensor or a numpy number
        entries = list(value) if isinstance(value, (list, tuple)) else [value]
        if not entries:
            raise ValueError(f"A row's '{self.column}' is empty; a row needs at least one task.")
        return [self._id(entry) for entry in entries]

    def _id(self, entry: int | str) -> int:
        if self.tasks is None:
            if is_whole(entry) and int(entry) >= 0:
                return int(entry)
            raise ValueError(f"Task {entry!r} in '{self.column}' is no id; give TaskCollator the names as tasks=[...].")
        if entry in self.tasks:
            return self.tasks.index(str(entry))
        if is_whole(entry) and 0 <= int(entry) < len(self.tasks):
            return int(entry)
        raise ValueError(
            f"Unknown task {entry!r} in '{self.column}'; use one of {self.tasks} or an id below {len(self.tasks)}."
        )


def score_with_trainer(
    trainer: Trainer, examples: Dataset, info: Mapping[str, TaskInfo], **generation: Any
) -> dict[str, dict[str, Any]]:
    """What `evaluation.evaluate_tasks` gives for the trainer's model, the rows shared out over all processes.

    Args:
        trainer: its model and processing class (tokenizer) answer; a model sharded by FSDP or ZeRO-3 cannot.
        examples: rows of `read_examples`.
        info: the tasks' metrics, from `read_task_info`.
        generation: keywords of `evaluation.generate_answers`, such as `batch_size` and `max_new_tokens`.

    Example:
        `score_with_trainer(trainer, read_examples("data", split="test"), read_task_info("data"))["mean"]["score"]`
    """
    generation.setdefault("progress", not trainer.args.disable_tqdm and trainer.is_world_process_zero())
    with PartialState().split_between_processes(list(range(len(examples)))) as share:
        model: Any = trainer.model  # like the tokenizer, of a wider type in the Trainer
        tokenizer: Any = trainer.processing_class
        answers = generate_answers(model, tokenizer, examples.select(share), **generation)
    return score(gather_object(answers), examples, info)


class TaskEvaluation(TrainerCallback):
    """Scores generated answers per task whenever the Trainer evaluates.

    Adds `eval_<task>` for each task and `eval_mean` to the metrics, where `metric_for_best_model="mean"` finds them,
    and logs them. Takes the arguments of `score_with_trainer`.

    Example:
        `trainer.add_callback(TaskEvaluation(trainer, read_examples("data", split="dev"), read_task_info("data")))`
    """

    def __init__(self, trainer: Trainer, examples: Dataset, info: Mapping[str, TaskInfo], **generation: Any) -> None:
        self.trainer, self.examples, self.info, self.generation = trainer, examples, info, generation

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        results = score_with_trainer(self.trainer, self.examples, self.info, **self.generation)
        scores = {f"eval_{task}": result["score"] for task, result in results.items()}
        metrics.update(scores)  # the dict that Trainer.evaluate returns and the choice of the best checkpoint reads
        self.trainer.log(scores)
