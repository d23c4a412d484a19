"""Routing at each evaluation of the Hugging Face Trainer: a line on the console, heat maps in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from .report.heatmaps import draw
from .report.layout import clean
from .routing.measures import highest_entropy, separation
from .routing_evaluated import routes, source_of

__all__ = ["RoutingImages", "routes", "routing_line"]


class RoutingImages(TrainerCallback):
    """Shows what the routers did whenever the Trainer evaluates in training; for all methods of peft_moe.

    It prints a line, and gives TensorBoard the pictures of `peft_moe.report.heatmaps.draw` as images `routing/layers`,
    `routing/tasks`, `routing/groups` and `routing/depth`, of which a method has those that it has numbers for. Only the
    main process shows something, of all processes together. What is looked at is the evaluation's own calls of the
    model, not the answers that `generate` writes. MOELoRA's weights depend on the task alone and are read from its
    gates; each task counts alike, and a gate that ZeRO-3 splits is not shown. AT-MoE in a compiled model is not shown.
    Where the Trainer has several evaluation datasets by name, each has a line and images `routing/NAME/layers`.

    Args:
        trainer: its model has the adapter.
        images: None for images where the Trainer reports to TensorBoard and matplotlib is installed; True to demand
            matplotlib. Without TensorBoard there are none.
        line: print the line; see `routing_line`.

    Raises:
        ValueError: the model has no adapter of peft_moe, or one without routers.
        ImportError: `images=True`, and matplotlib is missing.

    Example:
        `trainer.add_callback(RoutingImages(trainer))`
    """

    def __init__(self, trainer: Trainer, *, images: bool | None = None, line: bool = True) -> None:
        there = find_spec("matplotlib") is not None
        if images and not there:
            raise ImportError("Pictures need matplotlib; install it with `pip install matplotlib`.")
        self.trainer, self.source = trainer, source_of(trainer)
        self.images, self.line = there if images is None else images, line
        self.training = False

    def on_train_begin(self, *rest: Any, **kwargs: Any) -> None:
        self.training = True
        self.source.start()

    def on_train_end(self, *rest: Any, **kwargs: Any) -> None:
        self.training = False
        self.source.stop()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *rest: Any,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.training:
            return
        routing = self.source.routing(self)  # in all processes, which add up what they have
        if routing is None or not state.is_world_process_zero:
            return
        dataset = self._dataset(metrics or {})
        if self.line:
            tqdm.write(routing_line(routing, state.global_step, dataset))  # clears progress bars, and draws them again
        writer = self._writer() if self.images else None
        if writer is not None:
            for name, figure in draw(routing).items():
                tag = "/".join(filter(None, ("routing", dataset, name)))
                writer.add_image(tag, _pixels(figure), state.global_step, dataformats="HWC")

    def _dataset(self, metrics: Mapping[str, float]) -> str:
        """Which of several evaluation datasets this was, by the names of its metrics; empty if there is one."""
        sets = self.trainer.eval_dataset
        names = sorted(sets, key=len, reverse=True) if isinstance(sets, dict) else []  # "b_c" before "b"
        return next((name for name in names if f"eval_{name}_loss" in metrics or f"eval_{name}_runtime" in metrics), "")

    def _writer(self) -> Any | None:
        """That of the Trainer's own callback; None where it does not report to TensorBoard."""
        callbacks = self.trainer.callback_handler.callbacks
        found = (callback for callback in callbacks if isinstance(callback, TensorBoardCallback))
        return next((callback.tb_writer for callback in found if callback.tb_writer is not None), None)


def routing_line(routing: Mapping[str, Any], step: int, dataset: str = "") -> str:
    """What routers did, in one line.

    It has the number of experts; how many are in effect, exp(entropy of load), mean over layers; the expert with the
    smallest part of an even share, of all layers; the entropy of a token's weights in nats and the largest it could be
    with as many experts as a token gets, means over layers; the groups' weights in the mixture; and how far tasks are
    apart, mean over layers: 0 where all have the same load, 1 where they have no expert in common. A report's findings
    have the same number, less what chance gives few rows.

    Args:
        routing: what `Routing.to_dict()` gives, or the part of it that is known in training.
        step: the step of training.
        dataset: name of the evaluation's rows, where there are several such sets.
    """
    layers = routing["layers"]
    counts = sorted({len(layer["load"]) for layer in layers})
    experts = f"{counts[0]} experts" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} experts"
    parts = [experts, f"{_mean([layer['effective_experts'] for layer in layers]):.1f} in effect"]
    share, layer, expert = min(
        (value * len(layer["load"]), i, j) for i, layer in enumerate(layers) for j, value in enumerate(layer["load"])
    )
    name, place = layers[layer]["experts"][expert], layers[layer]["name"]
    parts.append(f"least used {_short(name)} of {_short(place)} ({share:.0%} of an even share)")
    entropy, most = _mean([x["entropy"] for x in layers]), _mean([highest_entropy(x) for x in layers])
    parts.append(f"entropy {entropy:.2f} of {most:.2f}")
    groups = routing.get("groups") or ()
    if groups and all(x.get("group_load") for x in layers):
        means = np.mean([x["group_load"] for x in layers], axis=0)
        parts.append("groups " + " ".join(f"{_short(g)} {value:.2f}" for g, value in zip(groups, means, strict=True)))
    apart = [separation([t["load"] for t in x["tasks"].values()]) for x in layers if len(x["tasks"]) > 1]
    if apart:
        parts.append(f"tasks {_mean(apart):.2f} apart")
    of = f" of {_short(dataset)}" if dataset else ""
    return f"routing{of} at step {step}: " + ", ".join(parts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _short(name: object) -> str:
    """A name that cannot fill the screen nor move the cursor: names are data."""
    text = str(name)
    return clean(text if len(text) <= 60 else f"{text[:20]}…{text[-39:]}")


def _pixels(figure: Any) -> np.ndarray:
    """(height, width, 3) uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
