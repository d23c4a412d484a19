"""Sums over rows of what routers gave, by task, and the weights of the rows that are kept.

Shapes: n rows · s tokens · E experts · G groups · T tasks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..routing import Router
from ..routing.measures import chance_divergence
from .places import Place
from .sums import columns_of, numbers_of, shares_of


class RowSums:
    """Sums by router and task, on the routers' devices; reading them is the only time that is waited for.

    Args:
        routers: which.
        tasks: names.
        chosen: rows whose weights are kept.
        keep: how many of their last tokens.
    """

    def __init__(self, routers: Sequence[Router], tasks: Sequence[str], chosen: Sequence[int], *, keep: int) -> None:
        self.tasks, self.chosen, self.keep = list(tasks), set(chosen), keep
        # (T + 1, C): the last row is for rows without a task
        self.sums: dict[Router, torch.Tensor] = {}
        self.numbers: dict[Router, torch.Tensor] = {}
        self.kept: dict[Router, dict[int, torch.Tensor]] = {router: {} for router in routers}

    def begin(self, rows: list[int], keys: list[str | None], mask: torch.Tensor, lengths: list[int]) -> None:
        """What the next weights are of: rows, their tasks, mask (n, s) and lengths."""
        index = [self.tasks.index(key) if key is not None else len(self.tasks) for key in keys]
        self.rows, self.mask, self.lengths = rows, mask, lengths
        self.index = torch.tensor(index, device=mask.device)

    def add(self, router: Router, weights: torch.Tensor, groups: torch.Tensor | None) -> None:
        """Add what a router gave: weights (n or 1, s or 1, E), and those of groups (n or 1, s or 1, G)."""
        mask, index = self.mask.to(weights.device), self.index.to(weights.device)
        columns = columns_of(weights, groups)
        if columns.shape[1] == 1:  # a row's tokens share the weights
            by_row = columns[:, 0] * mask.sum(1, keepdim=True)
        else:
            by_row = columns.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1)
        if router not in self.sums:
            wide = torch.float32 if by_row.device.type == "mps" else torch.float64
            size = by_row.shape[1] + 2 * weights.shape[-1] + 2
            self.sums[router] = by_row.new_zeros(len(self.tasks) + 1, size, dtype=wide)
        by_row = by_row.to(self.sums[router].dtype).expand(len(index), -1)
        self.sums[router].index_add_(0, index, torch.cat([by_row, _squares(by_row[:, : weights.shape[-1]])], dim=1))
        self._keep(router, weights)

    def _keep(self, router: Router, weights: torch.Tensor) -> None:
        for at in (i for i, row in enumerate(self.rows) if row in self.chosen):
            own = weights[min(at, len(weights) - 1)]
            end = self.lengths[at]
            own = own if len(own) == 1 else own[max(0, end - self.keep) : end]
            self.kept[router][self.rows[at]] = own.clone()

    def read(self, place: Place) -> dict[str, Any]:
        """What a report says of a place; waits for the device once for each router."""
        if place.router not in self.sums:
            raise ValueError(f"The router of {place.name!r} was not asked; is the adapter enabled?")
        if place.router not in self.numbers:
            self.numbers[place.router] = self.sums[place.router].cpu().double()
        values, e = self.numbers[place.router], len(place.experts)
        if not torch.isfinite(values).all():
            raise ValueError(
                f"The router of {place.name!r} gives weights that are NaN or infinite, as after diverged training; "
                "load an earlier checkpoint."
            )
        values, squares = values[:, : -2 * e - 2], values[:, -2 * e - 2 :]
        there = [i for i in range(len(self.tasks)) if values[i, 3 * e + 1] > 0]
        tasks = {self.tasks[i]: numbers_of(values[i], e) for i in there}
        return numbers_of(values.sum(0), e) | {
            "tasks": {
                task: {name: found[name] for name in ("tokens", "load", "entropy")} for task, found in tasks.items()
            },
            "chance_divergence": _chance(values[there, :e], squares[there]) if len(there) > 1 else None,
        }


def _squares(load: torch.Tensor) -> torch.Tensor:
    """(n, 2 E + 2) of rows' loads w (n, E) with sums s: w², w s, s² and 1, from which follows how rows differ."""
    total = load.sum(1, keepdim=True)
    return torch.cat([load.square(), load * total, total.square(), torch.ones_like(total)], dim=1)


def _chance(load: torch.Tensor, squares: torch.Tensor) -> float | None:
    """Bits that tasks would be apart if they had the same load: of (T, E) and the sums of `_squares` (T, 2 E + 2)."""
    ww, ws, ss, rows = squares.split([load.shape[1], load.shape[1], 1, 1], dim=1)
    if rows.min() < 2 or not load.sum(1).all():
        return None
    shares = torch.stack([shares_of(row) for row in load])
    # of a ratio of sums over rows, which are weighed by their tokens
    variances = (ww - 2 * shares * ws + shares.square() * ss) / load.sum(1, keepdim=True).square() * rows / (rows - 1)
    return chance_divergence(shares.tolist(), variances.clamp_min(0).tolist())
