"""What routers that look at the prompt have made of it, for the tokens that follow.

Shapes: n rows · d features · E experts
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .control import Control


@dataclass
class Prompt:
    """The prompts of one call's rows: read by its first forward or, in chunks, by several, and kept for later ones.

    Args:
        to_come: tokens that are still to be read in other forwards; None if the first forward brings them all.
        done: whether what comes now is no part of the prompt.
        names: an adapter for each row, if rows differ in it.
        sums: by name of the router, what it has added up: (n, d), and (n, 1) the number of tokens.
        read: the same, what a user had fixed, the mean over the prompt (n, d), and the weights that came of it (n, E).
    """

    to_come: int | None = None
    done: bool = False
    names: tuple[str, ...] | None = None
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    read: dict[str, tuple[Control | None, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def add(self, router: str, total: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what a router has read; returns sum and count of the prompt so far."""
        if router in self.sums:
            before, tokens = self.sums[router]
            total, count = before + total, tokens + count
        if self.to_come is not None:  # only then does anybody ask again
            self.sums[router] = total, count
        return total, count

    def passed(self, tokens: int) -> None:
        """Take note that a forward of so many tokens is over."""
        if self.done:
            return
        if self.to_come is not None:
            self.to_come -= tokens
        self.done = self.to_come is None or self.to_come <= 0
        if self.done:
            self.sums.clear()
