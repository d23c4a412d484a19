"""Task ids through any data collator, and per-task scores and routing inside the Hugging Face Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .evaluation import generate_answers, score
from .token_routed import TokenRoutedTuner

if TYPE_CHECKING:
    from datasets import Dataset

    from .data import TaskInfo


class TaskCollator:
    """Wraps a data collator: builds the batch with it and adds the rows' tasks as `task_ids`.

    Args:
        collator: any collator that turns a list of rows into one batch and keeps one batch row per row.
        tasks: the adapter's task names in order; needed where the column holds names, and checks the range of ids.
        column: the rows' key that holds the task: an id, a name, or a list of them for a row of several tasks.

    The added tensor is of shape (batch,), or (batch, k) padded with -1 if rows have several tasks. The call raises a
    `ValueError` for a row without the column, for an unknown task, and for a collator that merges rows.

    Example:
        `Trainer(model, args, data_collator=TaskCollator(DataCollatorForSeq2Seq(tokenizer), tasks=["icd", "rad"]), ...)`
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Any],
        tasks: Sequence[str] | None = None,
        column: str = "task_ids",
    ) -> None:
        self.collator = collator
        self.tasks = None if tasks is None else list(tasks)
        self.column = column

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        ids = [self._ids(row) for row in features]
        batch = self.collator([{key: value for key, value in row.items() if key != self.column} for row in features])
        # Collators that pack rows (TRL's packing and padding_free) leave fewer batch rows than tasks.
        if "input_ids" in batch and len(batch["input_ids"]) != len(ids):
            raise ValueError(
                f"{type(self.collator).__name__} made {len(batch['input_ids'])} batch rows of {len(ids)} rows, so "
                "their tasks cannot be told apart; turn off packing and padding-free batches."
            )
        longest = max(len(row) for row in ids)
        padded = torch.tensor([row + [-1] * (longest - len(row)) for row in ids])
        batch["task_ids"] = padded[:, 0] if longest == 1 else padded
        return batch

    def _ids(self, row: Mapping[str, Any]) -> list[int]:
        if self.column not in row:
            raise ValueError(
                f"A row has no '{self.column}', only {sorted(row)}. If the dataset has it, it was dropped on the way: "
                "by Trainer (set remove_unused_columns=False) or by the trainer's own preparation of the data (TRL: "
                'tokenize the rows and also set dataset_kwargs={"skip_prepare_dataset": True}).'
            )
        value = row[self.column]
        value = value.tolist() if hasattr(value, "tolist") else value  # a tensor or a numpy number
        entries = list(value) if isinstance(value, (list, tuple)) else [value]
        if not entries:
            raise ValueError(f"A row's '{self.column}' is empty; a row needs at least one task.")
        return [self._id(entry) for entry in entries]

    def _id(self, entry: int | str) -> int:
        if self.tasks is None:
            if isinstance(entry, int) and entry >= 0:
                return entry
            raise ValueError(f"Task {entry!r} in '{self.column}' is no id; give TaskCollator the names as tasks=[...].")
        if entry in self.tasks:
            return self.tasks.index(str(entry))
        if isinstance(entry, int) and 0 <= entry < len(self.tasks):
            return entry
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


class BalanceScale(TrainerCallback):
    """Tells a token-routed adapter how many micro-batches a step has, for losses that are computed outside of the
    model.

    With label smoothing, `compute_loss_func` or a preference loss the model cannot see how much a micro-batch weighs,
    and its balance loss is then added with weight 1 / micro-batches. The model's own loss needs no callback.

    Args:
        trainer: its model has the adapter.

    Example:
        `trainer.add_callback(BalanceScale(trainer))`
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.tuner = trainer, _token_routed(trainer, "BalanceScale")

    def on_step_begin(self, *rest: Any, **kwargs: Any) -> None:
        # the last step of an epoch may have fewer
        self.tuner.context.outside.usual = 1 / self.trainer.current_gradient_accumulation_steps

    def on_train_end(self, *rest: Any, **kwargs: Any) -> None:
        self.tuner.context.outside.usual = None


class RoutingCallback(TrainerCallback):
    """Logs what the routers of a token-routed adapter do, whenever the Trainer logs or evaluates.

    The values go through `Trainer.log`, so every logger that the Trainer reports to shows them: `routing/...` of the
    training steps since the last time, `eval_routing/...` of an evaluation. Sums of all processes. A router that gives
    nearly everything to the same experts is warned of once.

    Args:
        trainer: its model has the adapter.
        per_layer: log each layer, in addition to the summary: `load` (share of the weight), `top1` (share of the
            tokens that weigh it most) per expert, entropies in nats, dead experts, balance losses without
            coefficient, load per task.

    The summary is `balance/<name>`, `entropy_before` and `entropy_after` selection and `effective_experts` (exp of
    the entropy of the load), each the mean over routed layers; `effective_experts_min`, `largest_load` and
    `dead_experts` of all layers.

    Example:
        `trainer.add_callback(RoutingCallback(trainer, per_layer=True))`
    """

    def __init__(self, trainer: Trainer, per_layer: bool = False) -> None:
        tuner = _token_routed(trainer, "RoutingCallback")
        if not any(True for _ in tuner.routers()):
            raise ValueError("RoutingCallback has nothing to look at: the adapter has one expert in every layer.")
        self.trainer, self.tuner, self.per_layer = trainer, tuner, per_layer
        self.warned = False

    def on_train_begin(self, *rest: Any, **kwargs: Any) -> None:
        self.tuner.record_routing()

    def on_step_end(self, args: TrainingArguments, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log:
            self.log(training=True)

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log:
            self.log(training=True)

    def on_evaluate(self, *rest: Any, **kwargs: Any) -> None:
        if self.tuner.recording:  # not for Trainer.evaluate outside of training
            self.log(training=False)

    def on_train_end(self, *rest: Any, **kwargs: Any) -> None:
        self.tuner.record_routing(False)

    def log(self, *, training: bool) -> None:
        """Log the routing since the last time, and forget it."""
        layers = self._read(training)
        if layers:
            self._warn_of_collapse(layers)
            prefix = "routing/" if training else "eval_routing/"
            values = routing_summary(layers) | (flat_routing(layers) if self.per_layer else {})
            # not a subclass's log, which may add metrics of its own that belong to its own entry
            Trainer.log(self.trainer, {prefix + name: value for name, value in values.items()})

    def _read(self, training: bool) -> dict[str, dict[str, Any]]:
        """The statistics of all processes, by layer; one exchange and one wait for all layers."""
        recorded = list(self.tuner.recorded(training))
        device = self.trainer.args.device
        sums = [torch.zeros(s.length, device=device) if s.sums is None else s.sums.to(device) for _, s, _ in recorded]
        total = torch.cat(sums)
        if PartialState().num_processes > 1:
            total = reduce(total, reduction="sum")
        parts = total.cpu().split([s.length for _, s, _ in recorded])
        for _, statistics, _ in recorded:
            statistics.sums = None
        found = {key: s.read(router.num_base, part) for (key, s, router), part in zip(recorded, parts, strict=True)}
        return {key: values for key, values in found.items() if values}

    def _warn_of_collapse(self, layers: dict[str, dict[str, Any]]) -> None:
        collapsed = [key for key, values in layers.items() if is_collapsed(values)]
        if collapsed and not self.warned:
            self.warned = True
            key = collapsed[0]
            warnings.warn(
                f"Routing has collapsed in {len(collapsed)} of {len(layers)} routed layers: nearly all tokens use "
                f"the same experts. In {key!r} the load is {[round(x, 3) for x in layers[key]['load']]}. A "
                "balance_loss with a larger balance_coefficient or a lower learning rate spreads them.",
                UserWarning,
                stacklevel=2,
            )


def _token_routed(trainer: Trainer, who: str) -> TokenRoutedTuner:
    """The tuner of a trainer's model; an error that says who needs it if it is of another kind."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, TokenRoutedTuner):
        raise ValueError(
            f"{who} is for routers that choose experts for each token, and the trainer's model is a "
            f"{type(tuner).__name__}; use it with MoLoraConfig or MedMoeLoraConfig."
        )
    return tuner


def is_collapsed(values: Mapping[str, Any]) -> bool:
    """Whether a layer's tokens all use the same experts: as many in effect as one token gets, or one where it gets all.

    Args:
        values: statistics of one layer.
    """
    everything = round(values["chosen_per_token"], 3) >= len(values["load"])
    return bool(values["effective_experts"] < 1.1 * (1 if everything else values["chosen_per_token"]))


def routing_summary(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Statistics of all layers in a few numbers, as `RoutingCallback` describes them.

    Args:
        layers: statistics by layer, from `model.routing_statistics()`.
    """
    every = list(layers.values())

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    names = ("entropy_before", "entropy_after", "effective_experts")
    balance: dict[str, list[float]] = {}
    for layer in every:
        for name, value in layer["balance"].items():
            balance.setdefault(name, []).append(value)
    return {
        **{f"balance/{name}": mean(values) for name, values in balance.items()},
        **{name: mean([layer[name] for layer in every]) for name in names},
        "effective_experts_min": min(layer["effective_experts"] for layer in every),
        "largest_load": max(max(layer["load"]) for layer in every),
        "dead_experts": sum(len(layer["dead"]) for layer in every),
    }


def flat_routing(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Statistics of each layer under names such as `model.layers.0.mlp.up_proj/load_3`.

    Args:
        layers: statistics by layer, from `model.routing_statistics()`.
    """
    flat: dict[str, float] = {}
    for key, layer in layers.items():
        flat |= {f"{key}/{name}_{i}": x for name in ("load", "top1") for i, x in enumerate(layer[name])}
        flat |= {f"{key}/{name}": layer[name] for name in ("entropy_before", "entropy_after")}
        flat |= {f"{key}/balance_{name}": x for name, x in layer["balance"].items()}
        flat[f"{key}/dead_experts"] = len(layer["dead"])
        for task, values in layer["tasks"].items():
            flat |= {f"{key}/{task}/load_{i}": x for i, x in enumerate(values["load"])}
    return flat
