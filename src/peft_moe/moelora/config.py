"""Config of MOELoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checks import check_count, check_tasks
from ..config import Experts, MoeConfig, PeftMoeType, names_of
from ..routing import task_index


@dataclass
class MoeLoraConfig(MoeConfig):
    """MOELoRA: `h = W0 x + (alpha / r) · Σ_i softmax(W_T e_task)_i · B_i A_i x` (arXiv 2310.18339, section III).

    The weights of the experts depend on the task alone, so that each task can be merged or folded into one LoRA
    exactly. Defaults are those of the paper and its code: r 16 in 8 experts, alpha 32, dropout 0.1, 16 tasks embedded
    in 64 numbers, one gate for the whole model, all linear layers.

    Args:
        r: TOTAL rank of a layer, split evenly over its experts: a layer has as many parameters as a LoRA of rank r.
        tasks: names of the tasks, whose order gives their ids; or how many there are.
        default_task: task of calls that give none. Without it such a call is an error.
        task_embedding_dim: size of a task's embedding.
        gate_scope: `"model"`: one gate for all layers with the same number of experts (the paper); `"layer"`: one per
            layer (its ablation "w/ multiple gates").

    See `MoeConfig` for the other fields.

    Raises:
        ValueError: see `MoeConfig`; also a rank that does not split over the experts, or tasks without unique names.

    Example:
        >>> config = MoeLoraConfig(task_type="CAUSAL_LM", r=16, num_experts=8, tasks=["icd", "triage"])
        >>> model = get_peft_model(base_model, config)
        >>> model(**batch, task_ids=["icd", "triage"])
    """

    r: int = 16
    lora_dropout: float = 0.1
    tasks: list[str] | int = 16
    default_task: str | int | None = None
    task_embedding_dim: int = 64
    gate_scope: Literal["model", "layer"] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftMoeType.MOELORA
        check_count("r", self.r, "the total rank of a layer")
        check_count("task_embedding_dim", self.task_embedding_dim, "the size of an embedding")
        if not isinstance(self.gate_scope, str) or self.gate_scope not in ("model", "layer"):
            raise ValueError(
                f"gate_scope={self.gate_scope!r} is not known; use 'model' (one gate for all layers) or 'layer'."
            )
        if not self.rank_pattern and not self.num_experts_pattern:
            self.experts_at("")
        self._check_tasks()

    def _check_tasks(self) -> None:
        self.tasks = check_tasks(self.tasks)
        if self.default_task is not None:
            try:
                index = task_index(self.default_task, self.task_names)
            except (ValueError, TypeError) as error:
                raise ValueError(f"default_task={self.default_task!r} is not among tasks: {error}") from None
            # a number of numpy or torch could not be saved
            self.default_task = self.default_task if isinstance(self.default_task, str) else index

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks by id; `"0"`, `"1"`, … where only their number is known."""
        return names_of(self.tasks)

    @property
    def needs_tasks(self) -> bool:
        """Whether a call has to have a task: the experts are chosen by it."""
        return True

    def experts_at(self, key: str) -> Experts:
        r = int(self.at(self.rank_pattern, key, self.r))
        n = int(self.at(self.num_experts_pattern, key, self.num_experts))
        if r % n:
            where = f" at {key!r}" if key else ""
            raise ValueError(f"r={r} does not split over num_experts={n}{where}; use r={n * max(1, round(r / n))}.")
        return Experts(ranks=(r // n,) * n, scaling=(self._scaling(key, r),) * n)
