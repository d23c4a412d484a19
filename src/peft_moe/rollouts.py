"""A task per row for trainers that write the rows' answers themselves: TRL's GRPOTrainer and RLOOTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from .routing import encode_tasks

# What the mixin goes before, in trl 1.16.
METHODS = (
    "_generate_and_score_completions",
    "_generate_single_turn",
    "_get_per_token_logps_and_entropies",
    "_compute_loss",
)


class TaskRollouts:
    """Mixin: answers are sampled, scored and trained under the task of their row.

    These trainers call the model with the tokens alone, and shuffle and split the rows in between. Without the mixin,
    all rows have one task: `trainer.model.set_task(...)`, or the config's `default_task`.

    `task_column` is the dataset's column that holds the task: an id, a name, or a list of them for a row of several
    tasks. A `ValueError` says if a row has none, or if answers come from elsewhere than the model's own `generate`
    (vLLM, `generate_batch`, a `rollout_func`, tools), where rows would have no tasks or other ones. A `TypeError` says
    at the definition of the class that trl has changed what this relies on.

    Example:
        ```python
        class Trainer(TaskRollouts, GRPOTrainer):
            pass
        ```
    """

    task_column = "task_ids"
    _told: torch.Tensor | None = None  # the tasks of the rows that the trainer is at

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        missing = [name for name in METHODS if not hasattr(super(TaskRollouts, cls), name)]
        if missing:
            raise TypeError(
                f"{cls.__name__} has no {', '.join(missing)} to go before. TaskRollouts is a mixin for the GRPOTrainer "
                "or RLOOTrainer of trl 1.16, and comes first: class Trainer(TaskRollouts, GRPOTrainer)."
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        elsewhere = {
            "use_vllm=True": getattr(self, "use_vllm", False),
            "use_transformers_continuous_batching=True": getattr(self, "use_transformers_continuous_batching", False),
            "a rollout_func": getattr(self, "rollout_func", None),
            "tools": getattr(self, "tools", None),
        }
        for name, there in elsewhere.items():
            if there:
                raise ValueError(
                    f"{name}: answers then do not come row by row from the model's own generate, which knows the rows' "
                    "tasks. Leave it out, or train on one task: trainer.model.set_task(...) without TaskRollouts."
                )

    def _generate_and_score_completions(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        self._told = self._tasks_of(inputs)
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        return {**output, "task_ids": self._told}  # the trainer shuffles and splits it with the rest

    def _tasks_of(self, inputs: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        trainer: Any = self
        model = trainer.accelerator.unwrap_model(trainer.model)
        config = model.active_peft_config if isinstance(model, PeftModel) else None
        names = getattr(config, "task_names", None)
        if not names:
            raise ValueError(
                "TaskRollouts is for an adapter that knows tasks, and the trainer's model has none: use MoeLoraConfig, "
                "or name the tasks in the config (tasks=[...])."
            )
        lost = next((row for row in inputs if row.get(self.task_column) is None), None)
        if lost is not None:
            raise ValueError(
                f"A row has no '{self.task_column}', only {sorted(lost)}. If the dataset has it, set "
                "remove_unused_columns=False; if it has another name, set task_column in the class."
            )
        return encode_tasks([row[self.task_column] for row in inputs], names).to(trainer.accelerator.device)

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        fields = {**multimodal_fields, "task_ids": self._told}  # the trainer hands these to model.generate
        return super()._generate_single_turn(prompt_ids, images, fields, *args, **kwargs)  # type: ignore[misc]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        self._told = inputs["task_ids"]
        return super()._compute_loss(model, inputs)  # type: ignore[misc]

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        if model is not getattr(trainer, "ref_model", None) and self._told is not None:
            model = _in_chunks(model, self._told)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)  # type: ignore[misc]


def _in_chunks(model: Callable[..., Any], tasks: torch.Tensor) -> Callable[..., Any]:
    """Calls a model for the rows of a batch, chunk by chunk from the first on, with their tasks."""
    at = 0

    def call(*, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        nonlocal at
        start, at = at, at + len(input_ids)
        return model(input_ids=input_ids, task_ids=tasks[start:at], **kwargs)

    return call
