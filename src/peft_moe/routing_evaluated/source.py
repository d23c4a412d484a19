"""What all sources have: a trainer with an adapter, whose layers are told as `routing.json` has them."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from ..card_methods import method_of
from ..grouped import GroupedMoeConfig
from ..routing.names import parts_of
from ..tuner import MoeTuner

Layer = dict[str, Any]


class Source:
    """Where the numbers come from; `start` and `stop` are called around training, `layers` after an evaluation.

    Args:
        trainer: evaluates.
        tuner: of its model.
        adapter: the adapter's name.
    """

    def __init__(self, trainer: Trainer, tuner: MoeTuner, adapter: str) -> None:
        self.trainer, self.tuner, self.adapter = trainer, tuner, adapter

    @property
    def config(self) -> Any:
        return self.tuner.peft_config[self.adapter]

    def start(self) -> None:
        """Before training."""

    def stop(self) -> None:
        """After training."""

    def layers(self, asking: object) -> list[Layer]:
        """The layers since the last evaluation; all processes call this.

        Args:
            asking: the callback that wants to know.
        """
        raise NotImplementedError

    def routing(self, asking: object) -> dict[str, Any] | None:
        """The same with what `routing.json` has around it; None if nothing was routed."""
        layers = self.layers(asking)
        if not layers:
            return None
        groups = list(self.config.names) if isinstance(self.config, GroupedMoeConfig) else None
        tasks = sorted({task for layer in layers for task in layer["tasks"]})
        return {"format": 1, "method": method_of(self.config).name, "tasks": tasks, "groups": groups, "layers": layers}


def place_of(name: str) -> Layer:
    """A layer's name in parts, as a report has it."""
    _, block, module = parts_of(name)
    return {"name": name, "block": block, "module": module}
