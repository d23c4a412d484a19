"""A router: a gate and what to make of its scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

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

    def forward(self, x: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        """Weights for x (rows, ..., in) from task ids (n,) or (n, k), as (rows or 1, 1, ..., E).

        Raises:
            ValueError: the rows of x are not a whole number of rows per task id.
        """
        weights = self.select(self.gate(tasks))  # (n, E)
        return _spread_over_rows(weights, x)

    def of_tasks(self, tasks: torch.Tensor) -> torch.Tensor:
        """The weights (n, E) of tasks (n,) or (n, k), whatever the input is."""
        return self.select(self.gate(tasks))


def _spread_over_rows(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(n, E) to (rows, 1, ..., E): each of the n rows of a batch may have become several, one after the other.

    Beams and returned sequences repeat rows, and some models flatten (batch, seq) into rows; both keep the order of the
    batch.
    """
    n, rows = weights.shape[0], x.shape[0]
    if n not in (1, rows):
        if rows % n:
            raise ValueError(
                f"{n} rows of task_ids do not divide {rows} rows of input to a routed layer; give one task id per row "
                "of the batch, or leave layers that mix rows out of target_modules."
            )
        weights = weights.repeat_interleave(rows // n, dim=0)
    return weights.view(weights.shape[0], *(1,) * (x.dim() - 2), weights.shape[-1])
