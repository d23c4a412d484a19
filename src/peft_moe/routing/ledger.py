"""How balance losses reach the gradient.

Adding them to `outputs.loss` would not do: trainers scale that loss by what they know of the step (accumulation,
label tokens over all devices, loss scalers), some do not use it at all, and under reentrant checkpointing a layer's
first run has no graph. So a layer's term travels with its expert weights: forward leaves the weights as they are, and
backward adds the term's gradient, scaled by what reached the loss. The value of the loss stays that of the task.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch


class OutsideScale:
    """The factor on balance losses where the loss is computed outside of the model, from its logits, say.

    Attributes:
        chosen: by the user, which then also holds for losses made of log-probabilities; None if not chosen.
        usual: by the trainer's accumulation steps; None if not known.
        own_loss: the trainer makes a loss of its own, so that log-probabilities need not be looked at for a likelihood.
    """

    def __init__(self) -> None:
        self.chosen: float | None = None
        self.usual: float | None = None
        self.own_loss = False
        self.looked = False  # whether a loss of log-probabilities is a likelihood
        self._warned = False

    def value(self, *, warn: bool = True) -> float:
        """The factor, which is 1 with a warning if nobody has said what it should be."""
        known = self.usual if self.chosen is None else self.chosen
        if known is None and warn and not self._warned:
            self._warned = True
            warnings.warn(
                "The loss was computed outside of the model, which does not show how much a call weighs in it, so "
                "that the balance loss is added to each backward with weight 1. With gradient accumulation, call "
                "model.set_balance_scale(1 / steps), or give a Trainer the callback peft_moe.callbacks.BalanceScale.",
                UserWarning,
                stacklevel=2,
            )
        return 1.0 if known is None else known


class Ledger:
    """The balance losses of one training call: what layers charged, and the factor that backward found on the loss.

    Args:
        outside: the factor for losses that are computed outside of the model.
    """

    def __init__(self, outside: OutsideScale) -> None:
        self.outside = outside
        self.is_open = True
        self.scale: torch.Tensor | None = None
        self.charged: dict[str, list[torch.Tensor]] = {}  # by account, one value per routed layer

    def charge(self, account: str, coefficient: float, term: torch.Tensor, carrier: torch.Tensor) -> torch.Tensor:
        """Add `coefficient · mean over layers(term)` to the loss; returns the carrier, which must be used instead.

        Args:
            account: what the mean is taken over: terms of the same account.
            coefficient: weight of the loss.
            term: a number.
            carrier: a tensor of this layer on the way to the output, through which backward comes by.
        """
        if torch.compiler.is_compiling():  # summed up and added to the loss by `settle`
            if self.is_open:
                self.charged.setdefault(account, []).append(coefficient * term)
            return carrier
        if self.is_open:  # not in a recomputation for backward
            self.charged.setdefault(account, []).append(coefficient * term.detach())
        return _Carry.apply(carrier, term, self, account, coefficient) if torch.is_grad_enabled() else carrier

    def total(self) -> torch.Tensor:
        """Sum over accounts of the mean over layers, with coefficients; 0 if nothing was charged."""
        means = [torch.stack([t.to(terms[0].device) for t in terms]).mean() for terms in self.charged.values()]
        return torch.stack([mean.to(means[0].device) for mean in means]).sum() if means else torch.zeros(())

    @property
    def in_graphs(self) -> bool:
        """Whether compiled layers have charged: those of a compiled model, or of compiled parts of one."""
        return any(term.requires_grad for terms in self.charged.values() for term in terms)

    def settle(
        self,
        loss: torch.Tensor | None,
        share: torch.Tensor | float,
        log_probs: torch.Tensor | None = None,
        label_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Watch what a call returns.

        Args:
            loss: the model's loss, if it computed one.
            share: the part of the step's label tokens that this call has, where the loss is a sum over the call divided
                by the tokens of the whole step; 1 where it is a mean.
            log_probs: the labels' log-probabilities, if the loss is made of them elsewhere.
            label_mask: true where there is a label, of the shape of log_probs; a sum over all may go over others too.

        Returns:
            loss and log_probs to hand on instead; their values are the same.
        """
        labelled = torch.ones((), dtype=torch.bool) if label_mask is None else label_mask
        if self.in_graphs:
            total = self.total()
            nothing = total - total.detach()  # 0 with a gradient
            self.charged = {account: [t.detach() for t in terms] for account, terms in self.charged.items()}
            loss = None if loss is None else loss + (nothing * share).to(loss.dtype)
            log_probs = None if log_probs is None else log_probs - (nothing * labelled).to(log_probs.dtype)
        if torch.compiler.is_compiling():
            return loss, log_probs
        return (
            None if loss is None else _Watch.apply(loss, self, lambda g: g.sum() * share),
            None if log_probs is None else _Watch.apply(log_probs, self, lambda g: self._scale_of_tokens(g, labelled)),
        )

    def _scale_of_tokens(self, g: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor:
        """In a negative log-likelihood every label has the same factor, and these add up to the factor on its mean.

        Other losses of log-probabilities, as for preferences, have no such factor, even where they look alike: a
        policy's loss on a single answer, or on answers without advantages, whose gradient is zero.
        """
        if self.outside.chosen is not None or self.outside.own_loss:
            return g.new_tensor(self.outside.value(warn=False))
        low, high = torch.where(labelled, g, math.inf).min(), torch.where(labelled, g, -math.inf).max()
        likelihood = (high < 0) & (high - low <= 1e-3 * low.abs())
        if not self.outside.looked:  # once: looking waits for the device
            self.outside.looked = True
            if not likelihood:
                self.outside.value()
        return torch.where(likelihood, -(g * labelled).sum(), g.new_tensor(self.outside.value(warn=False)))

    def factor(self, account: str) -> torch.Tensor | float:
        """What backward multiplies a layer's term by."""
        return (self.outside.value() if self.scale is None else self.scale) / len(self.charged[account])


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, carrier: torch.Tensor, term: torch.Tensor, ledger: Ledger, account: str, coefficient: float
    ) -> torch.Tensor:
        ctx.ledger, ctx.account, ctx.coefficient = ledger, account, coefficient
        ctx.like = term.new_empty(0)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = ctx.coefficient * ctx.ledger.factor(ctx.account)
        return g, torch.as_tensor(factor).to(ctx.like), None, None, None


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, ledger: Ledger, scale: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ctx.ledger, ctx.scale = ledger, scale
        ctx.set_materialize_grads(False)  # DDP lets backward come by outputs that were not used, too
        return value.clone()  # not a view: Trainer multiplies its loss in place

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if g is not None:
            ctx.ledger.scale = ctx.scale(g).detach()
        return g, None, None
