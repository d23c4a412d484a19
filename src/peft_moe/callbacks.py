"""Token routing inside the Hugging Face Trainer: what routers do, and the weight of balance losses."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from .routing.measures import COLLAPSED, load_of, spread
from .token_routed import TokenRoutedTuner


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
        outside = self.tuner.context.outside
        outside.usual = 1 / self.trainer.current_gradient_accumulation_steps
        # set by trainers that make a loss of their own, which may look like a likelihood in some micro-batches
        outside.own_loss = getattr(self.trainer, "loss_is_scaled_for_ga", None) is not None

    def on_train_end(self, *rest: Any, **kwargs: Any) -> None:
        outside = self.tuner.context.outside
        outside.usual, outside.own_loss = None, False


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
            raise ValueError(
                "RoutingCallback has nothing to look at: the adapter has one expert in every layer. Leave the callback "
                "out, or give layers more experts."
            )
        self.trainer, self.tuner, self.per_layer = trainer, tuner, per_layer
        self.warned = False
        self.evaluated: dict[str, dict[str, Any]] = {}  # what the last evaluation had, for callbacks that come later

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
        layers = read_recorded(self.tuner, self.trainer.args.device, training=training)
        if not training:
            self.evaluated = layers
        if layers:
            self._warn_of_collapse(layers)
            prefix = "routing/" if training else "eval_routing/"
            values = routing_summary(layers) | (flat_routing(layers) if self.per_layer else {})
            # not a subclass's log, which may add metrics of its own that belong to its own entry
            wanted = self.trainer.control.should_log
            Trainer.log(self.trainer, {prefix + name: value for name, value in values.items()})
            self.trainer.control.should_log = wanted  # which logging takes back, and the loss is still to be logged

    def _warn_of_collapse(self, layers: dict[str, dict[str, Any]]) -> None:
        base = {key: router.num_base for key, router in self.tuner.routers()}
        collapsed = [key for key, values in layers.items() if is_collapsed(values, base[key])]
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


def read_recorded(
    tuner: TokenRoutedTuner, device: torch.device, *, training: bool, reset: bool = True
) -> dict[str, dict[str, Any]]:
    """The statistics of all processes, by layer, as `routing_statistics` gives those of one; all processes call this.

    Args:
        tuner: records its routing.
        device: of this process, for the one exchange that there is for all layers.
        training: calls in training mode, or those outside of it.
        reset: start from zero.
    """
    recorded = list(tuner.recorded(training))
    sums = [torch.zeros(s.length, device=device) if s.sums is None else s.sums.to(device) for _, s, _ in recorded]
    total = torch.cat(sums)
    if PartialState().num_processes > 1:
        total = reduce(total, reduction="sum")
    parts = total.cpu().split([s.length for _, s, _ in recorded])
    if reset:
        for _, statistics, _ in recorded:
            statistics.sums = None
    found = {key: s.read(router.num_base, part) for (key, s, router), part in zip(recorded, parts, strict=True)}
    return {key: values for key, values in found.items() if values}


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


def is_collapsed(values: Mapping[str, Any], num_base: int = 0) -> bool:
    """Whether nearly all of a layer's tokens use the same experts, by the rule of `routing.measures`.

    Args:
        values: statistics of one layer.
        num_base: base experts, which come first and are not counted.
    """
    load = load_of(values, range(num_base, len(values["load"])))
    return len(load) > 1 and spread(load, sum(values["chosen"][num_base:])) < COLLAPSED


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
