"""Routers: a gate and what to make of its scores.

Shapes: n rows · s tokens · E experts · in features
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn.functional import pad

from ..losses import Routed
from .batch import Batch
from .call import View
from .gates import TaskGate, TokenGate
from .select import top_k
from .statistics import RoutingStatistics

Select = Callable[[torch.Tensor], torch.Tensor]


class TaskRouter(nn.Module):
    """Says how much of each expert every row gets, by its task.

    Args:
        gate: makes scores.
        select: turns scores (..., E) into weights (..., E).
    """

    def __init__(self, *, gate: TaskGate, select: Select) -> None:
        super().__init__()
        self.gate = gate
        self.select = select

    def forward(self, x: torch.Tensor, view: View) -> torch.Tensor:
        """Weights for x (rows, ..., in), as (rows or 1, 1, ..., E) on the device of x.

        Raises:
            ValueError: the call has no task, or the rows of x are not those of the batch.
        """
        kept, tasks = view.kept, view.tasks()
        # With a gradient each layer computes its own: reentrant checkpointing cannot reach into another.
        if kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            kept = {}
        if self not in kept:
            kept[self] = self.of_tasks(tasks)
        # A gate that layers share may be on another device than this layer.
        return spread_over_rows(kept[self].to(x.device), x, view.batch)

    def of_tasks(self, tasks: torch.Tensor) -> torch.Tensor:
        """The weights (n, E) of tasks (n,) or (n, k), whatever the input is."""
        return self.select(self.gate(tasks))


class BalanceTerm(NamedTuple):
    """A balance loss of a router: its name, the function, and its weight in the loss."""

    name: str
    loss: Callable[[Routed], torch.Tensor]
    coefficient: float


class TokenRouter(nn.Module):
    """Says how much of each expert every token gets, by what the layer sees of it.

    The experts are, in this order: shared ones, which every token gets whole; base experts; the others.

    Args:
        gate: makes scores of all but the shared experts.
        select: turns scores (..., E) into weights (..., E).
        inference_select: the same outside of training; None for no difference.
        num_shared: shared experts.
        num_base: base experts, which `variance` and `cv2` leave out.
        base_is_empty: base experts have no matrices: what they get goes to the base model alone.
        balance: the balance losses.
        matches: (T, E) bool, true where an expert is meant for the rows of a task; for the localized loss.
        in_decoder: the layer is in the decoder of an encoder-decoder model, whose padding is another.
    """

    matches: torch.Tensor | None

    def __init__(
        self,
        *,
        gate: TokenGate,
        select: Select,
        inference_select: Select | None = None,
        num_shared: int = 0,
        num_base: int = 0,
        base_is_empty: bool = False,
        balance: Sequence[BalanceTerm] = (),
        matches: torch.Tensor | None = None,
        in_decoder: bool = False,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.select = select
        self.inference_select = inference_select or select
        self.num_shared, self.num_base, self.base_is_empty = num_shared, num_base, base_is_empty
        self.balance = tuple(balance)
        self.in_decoder = in_decoder
        self.register_buffer("matches", matches, persistent=False)
        self.statistics: dict[bool, RoutingStatistics] | None = None  # in training and outside of it, while recording

    def forward(self, x: torch.Tensor, view: View, product: torch.Tensor | None = None) -> torch.Tensor:
        """Weights for x (..., in), as (..., shared + E) without the base experts if they are empty.

        Args:
            x: (..., in).
            view: the call.
            product: (..., E), x times the gate's weight, if it has been made elsewhere.
        """
        scores = self.gate(x) if product is None else self.gate.of_product(product)
        weights = (self.select if self.training else self.inference_select)(scores)
        statistics = None if self.statistics is None or not view.counted else self.statistics[self.training]
        ledger = view.ledger if self.training and self.balance else None
        if self.training and self.balance and ledger is None and view.counted and torch.is_grad_enabled():
            warn_of_bypass()
        if ledger is not None or statistics is not None:
            routed = self._routed(scores, weights, x, view)
            labelled = ledger is not None or routed.matches is not None
            terms = {t.name: t.loss(routed) for t in self.balance if labelled or t.name != "localized"}
            if ledger is not None:
                for name, _, coefficient in self.balance:
                    weights = ledger.charge(f"{view.adapter}.{name}", coefficient, terms[name], weights)
            if statistics is not None:
                statistics.add(routed, terms, view.ids)
        if self.base_is_empty:
            weights = weights[..., self.num_base :]
        return pad(weights, (self.num_shared, 0), value=1.0) if self.num_shared else weights

    @property
    def chosen_per_token(self) -> int | None:
        """K, if each token gets K experts of all that there are; None for another choice."""
        select = self.select if self.training else self.inference_select
        if not isinstance(select, partial) or select.func is not top_k or self.num_shared or self.base_is_empty:
            return None
        return min(int(select.keywords["k"]), self.gate.num_experts)

    def record(self, tasks: Sequence[str]) -> None:
        """Start adding up what it does, for these tasks."""
        names = [term.name for term in self.balance]
        self.statistics = {
            training: RoutingStatistics(self.gate.num_experts, names, tasks) for training in (True, False)
        }

    def _routed(self, scores: torch.Tensor, weights: torch.Tensor, x: torch.Tensor, view: View) -> Routed:
        """Scores and weights as rows of tokens (n, s, E)."""
        batch = view.batch or Batch(rows=x.shape[0])
        shape, mask = batch.tokens_of(x, in_decoder=self.in_decoder)
        e, matches = scores.shape[-1], None
        if self.matches is not None and view.ids is not None:
            matches = self._matches_of(view.ids)
            matches = _repeat_rows(matches, x, shape[0], view.batch).expand(shape[0], -1)
        if mask is None and batch.mask is not None and view.ledger is not None and not self.in_decoder:
            warn_of_padding(x.shape)
        return Routed(scores.reshape(*shape, e), weights.reshape(*shape, e), mask, matches, self.num_base)

    def _matches_of(self, ids: torch.Tensor) -> torch.Tensor:
        """(n, E): the experts that are meant for one of a row's tasks (n,) or (n, k)."""
        matches = cast(torch.Tensor, self.matches)
        ids = ids.to(matches.device).reshape(len(ids), -1)
        return (matches[ids.clamp_min(0)] & (ids >= 0).unsqueeze(-1)).any(1)


def warn_of_padding(shape: torch.Size) -> None:
    """Say that padding in an input cannot be told."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"A layer with a balance loss has inputs of shape {tuple(shape)}, which attention_mask does not fit: all "
            "their tokens count in it, padding too if there is any. Leave such layers out with exclude_modules, or set "
            "balance_loss='none'.",
            UserWarning,
            stacklevel=3,
        )


def warn_of_bypass() -> None:
    """Say that a layer was trained outside of a call of the adapted model."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            "Layers with a balance loss were run in training by a call of a part of the model, which does not add it "
            "to the loss; call the adapted model itself, or set balance_loss='none'.",
            UserWarning,
            stacklevel=3,
        )


def spread_over_rows(
    weights: torch.Tensor, x: torch.Tensor, batch: Batch | None, what: str = "task_ids"
) -> torch.Tensor:
    """(n, E) to (rows or 1, 1, ..., E), as x (rows, ..., in); to (E,) for a single x (in,).

    Raises:
        ValueError: which row of x is whose cannot be told; `what` says what there are n rows of.
    """
    if x.dim() == 1 and weights.shape[0] == 1:
        return weights[0]
    weights = _repeat_rows(weights, x, x.shape[0], batch, what)
    return weights.view(weights.shape[0], *(1,) * (x.dim() - 2), weights.shape[-1])


def _repeat_rows(
    values: torch.Tensor, x: torch.Tensor, rows: int, batch: Batch | None, what: str = "task_ids"
) -> torch.Tensor:
    """(n, E) to (rows, E), or (1, E) if that is for all: each of the n rows of a batch may have become several.

    Beams and returned sequences repeat rows, and some models flatten (batch, seq) into rows; both keep the order of the
    batch. Other first axes, such as the patches of all images, do not tell the row.
    """
    n = values.shape[0]
    if n in (1, rows):
        return values
    if rows % n or not (batch is None or batch.explains(x.shape[0], x.dim())):
        remedy = "give one task for the whole batch" if what == "task_ids" else "use router_input='token'"
        raise ValueError(
            f"A routed layer got an input of shape {tuple(x.shape)} for {n} rows of {what}, and cannot tell "
            f"which row is whose; {remedy}, or leave the layer out with exclude_modules."
        )
    return values.repeat_interleave(rows // n, dim=0)
