"""A router: a gate and what to make of its scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .context import Batch
from .gates import TaskGate


class Router(nn.Module):
    """Says how much of each expert every position gets.

    Args:
        gate: makes scores.
        select: turns scores (..., E) into weights (..., E).
    """

    def __init__(self, *, gate: TaskGate, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate = gate
        self.select = select

    def forward(
        self,
        x: torch.Tensor,
        tasks: torch.Tensor,
        batch: Batch | None = None,
        kept: dict[Router, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Weights for x (rows, ..., in) from task ids (n,) or (n, k), as (rows or 1, 1, ..., E) on the device of x.

        Args:
            x: input of a layer.
            tasks: ids of the rows of the batch.
            batch: the batch, to tell rows that were repeated from rows that are something else.
            kept: weights by router, for the layers and decoding steps of one call; used where there is no gradient.

        Raises:
            ValueError: the rows of x are not those of the batch.
        """
        # With a gradient each layer computes its own: reentrant checkpointing cannot reach into another.
        if kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            kept = {}
        if self not in kept:
            kept[self] = self.of_tasks(tasks)
        # A gate that layers share may be on another device than this layer.
        return _spread_over_rows(kept[self].to(x.device), x, batch)

    def of_tasks(self, tasks: torch.Tensor) -> torch.Tensor:
        """The weights (n, E) of tasks (n,) or (n, k), whatever the input is."""
        return self.select(self.gate(tasks))


def _spread_over_rows(weights: torch.Tensor, x: torch.Tensor, batch: Batch | None) -> torch.Tensor:
    """(n, E) to (rows, 1, ..., E): each of the n rows of a batch may have become several, one after the other.

    Beams and returned sequences repeat rows, and some models flatten (batch, seq) into rows; both keep the order of the
    batch. Other first axes, such as the patches of all images, do not tell the row.
    """
    n, rows = weights.shape[0], x.shape[0]
    if n not in (1, rows):
        if rows % n or not (batch is None or batch.explains(rows, x.dim())):
            raise ValueError(
                f"A routed layer got an input of shape {tuple(x.shape)} for {n} rows of task_ids, and cannot tell "
                "which row is whose; give one task for the whole batch, or leave the layer out with exclude_modules."
            )
        weights = weights.repeat_interleave(rows // n, dim=0)
    return weights.view(weights.shape[0], *(1,) * (x.dim() - 2), weights.shape[-1])
