"""MOELoRA in an evaluation.

Shapes: E experts · T tasks
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import functional_call
from transformers import Trainer

from ..routing import TaskRouter
from ..routing.names import by_number
from ..tuner import MoeTuner
from .source import Layer, Source, place_of


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
            place_of(key) | self._numbers(found)
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
            "experts": by_number(len(load)),
            "load": load.tolist(),
            "entropy": entropies.mean().item(),
            "effective_experts": torch.special.entr(load).sum().exp().item(),
            "chosen_per_token": float(len(load)),
            "tasks": tasks,
        }


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter of which FSDP keeps a part in each process, put together."""
    gather: Callable[[], torch.Tensor] | None = getattr(parameter, "full_tensor", None)  # of DTensor alone
    return parameter.detach() if gather is None else gather().detach()
