"""AT-MoE in an evaluation.

Shapes: E experts · G groups
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from peft import PeftModel
from torch import nn
from transformers import Trainer

from ..report.sums import columns_of, numbers_of
from ..routing import Decision, GroupedRouter
from ..routing.names import by_group
from ..tuner import MoeTuner
from .source import Layer, Source, place_of


class OfGroups(Source):
    """AT-MoE: what the routers of blocks decide in calls of the model outside of training, added up.

    `generate` calls a part of the model and is not counted. A compiled model is not looked at.

    Args:
        routers: by linear layer, of which those of a block share one.
        model: its calls are looked at.
    """

    def __init__(
        self, trainer: Trainer, tuner: MoeTuner, adapter: str, routers: dict[str, GroupedRouter], model: PeftModel
    ) -> None:
        super().__init__(trainer, tuner, adapter)
        self.model = model
        # a router of its own has its layer's name, one of a block the block's
        self.names = {router: router.name.removeprefix(f"{adapter}/") for router in routers.values()}
        self.sums: dict[GroupedRouter, torch.Tensor] = {}
        self.hooks: list[Any] = []

    def start(self) -> None:
        self.stop()  # a training that an error ended has not
        if not self.trainer.args.torch_compile:
            self.hooks = [
                self.model.register_forward_pre_hook(self._before),
                self.model.register_forward_hook(self._after, always_call=True),  # also after an error
            ]

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.sums = [], {}

    def _before(self, model: nn.Module, args: Any) -> None:
        for router in self.names if not model.training else ():
            router.seen = []

    @torch.no_grad()
    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        for router in self.names:
            for decision in router.seen or ():
                added = _sum_of(router, decision)
                self.sums[router] = self.sums[router].add_(added) if router in self.sums else added
            router.seen = None

    def layers(self, asking: object) -> list[Layer]:
        device, groups = self.trainer.args.device, len(self.config.names)
        named = {router: by_group(self.config.names, general=router.has_general) for router in self.names}
        sizes = [3 * len(experts) + 2 + groups for experts, _ in named.values()]
        sums = [
            self.sums[router].to(device) if router in self.sums else torch.zeros(size, device=device)
            for router, size in zip(self.names, sizes, strict=True)
        ]
        total = torch.cat(sums)
        if PartialState().num_processes > 1:
            total = reduce(total, reduction="sum")
        self.sums = {}
        found = []
        for (router, name), values in zip(self.names.items(), total.cpu().double().split(sizes), strict=True):
            experts, group_of = named[router]
            if values[3 * len(experts) + 1] > 0:
                known = {"experts": experts, "group_of": group_of, "tasks": {}}
                found.append(place_of(name) | known | numbers_of(values, len(experts)))
        return found


def _sum_of(router: GroupedRouter, decision: Decision) -> torch.Tensor:
    """(3 E + 2 + G,): the columns that count, summed."""
    columns = columns_of(router._combine(decision).float(), decision.groups.float())
    if decision.mask is not None:
        columns = columns * decision.mask.to(columns).unsqueeze(-1)
    return columns.flatten(0, -2).sum(0)
