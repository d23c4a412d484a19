"""MoLoRA and Med-MoE-LoRA in an evaluation."""

from __future__ import annotations

from typing import Any, cast

from ..callbacks import RoutingCallback, read_recorded
from ..routing.names import by_number
from ..token_routed import TokenRoutedTuner
from .source import Layer, Source, place_of


class OfTokens(Source):
    """MoLoRA and Med-MoE-LoRA: the statistics that RoutingCallback logs, which it may read too."""

    own = False  # it has started the recording, and nobody else reads it

    def start(self) -> None:
        tuner = cast(TokenRoutedTuner, self.tuner)
        if self._other() is None:
            self.own = True
            tuner.record_routing()

    def stop(self) -> None:
        if self.own:
            self.own = False
            cast(TokenRoutedTuner, self.tuner).record_routing(False)

    def _other(self) -> RoutingCallback | None:
        callbacks = self.trainer.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, RoutingCallback)), None)

    def layers(self, asking: object) -> list[Layer]:
        tuner, other = cast(TokenRoutedTuner, self.tuner), self._other()
        if not tuner.recording:
            return []
        callbacks = self.trainer.callback_handler.callbacks
        if other is not None and callbacks.index(other) < callbacks.index(asking):  # it has read and forgotten them
            read = other.evaluated
        else:
            read = read_recorded(tuner, self.trainer.args.device, training=False, reset=other is None)
        base = {key: router.num_base for key, router in tuner.routers()}
        return [place_of(key) | self._numbers(values, base[key]) for key, values in read.items()]

    @staticmethod
    def _numbers(values: dict[str, Any], base: int) -> Layer:
        same = ("tokens", "load", "top1", "chosen", "effective_experts", "chosen_per_token", "tasks")
        names = by_number(len(values["load"]) - base, base=base)
        return {"experts": names, "entropy": values["entropy_after"]} | {name: values[name] for name in same}
