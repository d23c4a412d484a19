"""What the routers of any adapter did in an evaluation of the Trainer, as `routing.json` has it.

Shapes: E experts · T tasks · G groups
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from peft import PeftModel
from torch import nn
from torch.func import functional_call
from transformers import Trainer

from .callbacks import RoutingCallback, read_recorded
from .card_methods import method_of
from .grouped import GroupedMoeConfig
from .layer import MoeLinear
from .routing import Decision, GroupedRouter, Router, TaskRouter
from .schedule import layer_of
from .token_routed import TokenRoutedTuner
from .tuner import MoeTuner

Layer = dict[str, Any]


def source_of(trainer: Trainer) -> Source:
    """What fits the trainer's model.

    Raises:
        ValueError: the model has no adapter of ours, or one that routes nothing.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, MoeTuner):
        raise ValueError(
            f"RoutingImages is for adapters of peft_moe, and the trainer's model is a {type(model).__name__}"
            f"{'' if tuner is None else f' with a {type(tuner).__name__}'}; make it with a config of peft_moe."
        )
    adapter = tuner.active_adapters[0]
    routers = _routers(tuner, adapter)
    if not routers:
        raise ValueError(
            "RoutingImages has nothing to look at: the adapter has one expert in every layer. Leave the callback out, "
            "or give layers more experts."
        )
    if isinstance(tuner, TokenRoutedTuner):
        return OfTokens(trainer, tuner, adapter)
    if all(isinstance(router, TaskRouter) for router in routers.values()):
        return OfTasks(trainer, tuner, adapter, cast(dict[str, TaskRouter], routers))
    return OfGroups(trainer, tuner, adapter, cast(dict[str, GroupedRouter], routers), cast(PeftModel, model))


def routes(model: nn.Module) -> bool:
    """Whether a model's active adapter is one of ours and has routers."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return isinstance(tuner, MoeTuner) and bool(_routers(tuner, tuner.active_adapters[0]))


def _routers(tuner: MoeTuner, adapter: str) -> dict[str, Router]:
    """By routed linear layer."""
    return {
        key: router
        for key, layer in tuner.model.named_modules()
        if isinstance(layer, MoeLinear) and (router := layer.router_of(adapter)) is not None
    }


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
        return [_place(key) | self._numbers(values, base[key]) for key, values in read.items()]

    @staticmethod
    def _numbers(values: dict[str, Any], base: int) -> Layer:
        same = ("tokens", "load", "top1", "chosen", "effective_experts", "chosen_per_token", "tasks")
        names = [f"base {i}" for i in range(base)] + [str(i) for i in range(len(values["load"]) - base)]
        return {"experts": names, "entropy": values["entropy_after"]} | {name: values[name] for name in same}


class OfTasks(Source):
    """MOELoRA: weights depend on the task alone, so that they are read from the gates; each task counts alike.

    Args:
        routers: by layer.
    """

    def __init__(self, trainer: Trainer, tuner: MoeTuner, adapter: str, routers: dict[str, TaskRouter]) -> None:
        super().__init__(trainer, tuner, adapter)
        self.routers = routers

    @torch.no_grad()
    def layers(self, asking: object) -> list[Layer]:
        weights = {router: self._weights(router) for router in dict.fromkeys(self.routers.values())}
        return [
            _place(key) | self._numbers(found)
            for key, router in self.routers.items()
            if (found := weights[router]) is not None
        ]

    def _weights(self, router: TaskRouter) -> torch.Tensor | None:
        """(T, E) on the CPU; None where ZeRO-3 keeps the gate's weights in parts."""
        named = dict(router.gate.named_parameters())
        if any(parameter.numel() == 0 for parameter in named.values()):
            return None
        whole = {name: _whole(parameter) for name, parameter in named.items()}
        device = next(iter(whole.values())).device
        ids = torch.arange(len(self.config.task_names), device=device)
        return router.select(functional_call(router.gate, whole, (ids,))).float().cpu()

    def _numbers(self, weights: torch.Tensor) -> Layer:
        entropies = torch.special.entr(weights).sum(-1)
        load = weights.mean(0)
        tasks = {
            task: {"load": row.tolist(), "entropy": entropy.item()}
            for task, row, entropy in zip(self.config.task_names, weights, entropies, strict=True)
        }
        return {
            "experts": [str(i) for i in range(len(load))],
            "load": load.tolist(),
            "entropy": entropies.mean().item(),
            "effective_experts": torch.special.entr(load).sum().exp().item(),
            "tasks": tasks,
        }


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
        experts = [f"{group}/{name}" for group, names in self.config.names.items() for name in names]
        group_of = [i for i, names in enumerate(self.config.names.values()) for _ in names]
        wide = {router: len(experts) + router.has_general for router in self.names}
        sizes = [3 * e + 2 + groups for e in wide.values()]
        sums = [
            self.sums[router].to(device) if router in self.sums else torch.zeros(size, device=device)
            for router, size in zip(self.names, sizes, strict=True)
        ]
        total = torch.cat(sums)
        if PartialState().num_processes > 1:
            total = reduce(total, reduction="sum")
        self.sums = {}
        found = []
        for (router, name), values in zip(self.names.items(), total.double().cpu().split(sizes), strict=True):
            if values[3 * wide[router] + 1] > 0:
                general = int(router.has_general)
                named = {"experts": experts + ["general"] * general, "group_of": group_of + [-1] * general}
                found.append(_place(name) | named | _read(values, wide[router]))
        return found


def _sum_of(router: GroupedRouter, decision: Decision) -> torch.Tensor:
    """(3 E + 2 + G,): weight, top 1 and choice of each expert, entropy, count, weight of each group."""
    weights = router._combine(decision).float()
    top1 = torch.zeros_like(weights).scatter_(-1, weights.argmax(-1, keepdim=True), 1.0)
    entropy = torch.special.entr(weights).sum(-1, keepdim=True)
    parts = [weights, top1, (weights > 0).float(), entropy, torch.ones_like(entropy), decision.groups.float()]
    columns = torch.cat(parts, dim=-1)
    if decision.mask is not None:
        columns = columns * decision.mask.to(columns).unsqueeze(-1)
    return columns.flatten(0, -2).sum(0)


def _read(values: torch.Tensor, e: int) -> Layer:
    """The sums as numbers."""
    load, tokens = values[:e] / values[:e].sum(), values[3 * e + 1].item()
    return {
        "tokens": round(tokens),
        "load": load.tolist(),
        "top1": (values[e : 2 * e] / tokens).tolist(),
        "chosen": (values[2 * e : 3 * e] / tokens).tolist(),
        "entropy": values[3 * e].item() / tokens,
        "effective_experts": torch.special.entr(load).sum().exp().item(),
        "chosen_per_token": values[2 * e : 3 * e].sum().item() / tokens,
        "group_load": (values[3 * e + 2 :] / tokens).tolist(),
        "tasks": {},
    }


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter of which FSDP keeps a part in each process, put together."""
    gather: Callable[[], torch.Tensor] | None = getattr(parameter, "full_tensor", None)  # of DTensor alone
    return parameter.detach() if gather is None else gather().detach()


def _place(name: str) -> Layer:
    """A layer's name in parts, as a report has it."""
    found = layer_of(name)
    block = ".".join(filter(None, (found[0], str(found[1])))) if found else ""
    return {"name": name, "block": found[1] if found else None, "module": name.removeprefix(block).removeprefix(".")}
