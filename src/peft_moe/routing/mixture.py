"""Rows of one call that belong to different adapters.

Shapes: n rows that a call names adapters for · k rows of one adapter · m rows of a tensor, a multiple of n
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .batch import Batch

BASE = "__base__"  # peft's name for the rows of no adapter


@dataclass(frozen=True)
class Part:
    """The rows of a call that one adapter has.

    Args:
        n: rows of the call.
        rows: which of them, in order; None for all.
        index: the same as a tensor (k,) on the batch's device.
        whole: the call's input.
        batch: the input of these rows alone.
    """

    n: int
    rows: tuple[int, ...] | None = None
    index: torch.Tensor | None = None
    whole: Batch | None = None
    batch: Batch | None = None

    def of_batch(self, batch: Batch | None) -> Part:
        """The same rows of a call's input, in which each may have been repeated."""
        if batch is None or self.index is None:
            return replace(self, whole=batch, batch=batch)
        own = replace(
            batch,
            rows=len(self.index) * batch.rows // self.n,
            mask=self._select(batch.mask),
            decoder_mask=self._select(batch.decoder_mask),
            prompt=self._select(batch.prompt),
        )
        return replace(self, whole=batch, batch=own)

    def positions(self, m: int, device: torch.device) -> torch.Tensor | None:
        """Where the rows are among m, in which each of the call's has become m / n; None for all of them."""
        if self.index is None:
            return None
        index, times = self.index.to(device), m // self.n
        if times == 1:
            return index
        return (index.unsqueeze(1) * times + torch.arange(times, device=device)).flatten()

    def positions_in(self, x: torch.Tensor) -> torch.Tensor | None:
        """The same for a layer's input x (m, ..., in).

        Raises:
            ValueError: which row of x is whose cannot be told.
        """
        m = x.shape[0]
        told = m == self.n or (m % self.n == 0 and (self.whole is None or self.whole.explains(m, x.dim())))
        if self.index is not None and (not told or x.dim() < 2):
            raise ValueError(
                f"A routed layer got an input of shape {tuple(x.shape)} for {self.n} rows of adapter_names, and cannot "
                "tell which row is whose; let adapters take turns with set_adapter, or leave the layer out with "
                "exclude_modules."
            )
        return self.positions(m, x.device)

    def _select(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        if mask is None or len(mask) == 1:
            return mask
        if len(mask) % self.n:
            return None
        positions = self.positions(len(mask), mask.device)
        return mask if positions is None else mask.index_select(0, positions)


def parts_of(names: Sequence[str], batch: Batch | None) -> dict[str, Part]:
    """By adapter, the rows that it has in a call.

    Args:
        names: an adapter for each row, or `"__base__"`.
        batch: the call's input.

    Raises:
        ValueError: another number of names than rows.
    """
    n = len(names)
    if batch is not None and n != batch.rows:
        raise ValueError(  # peft's words, which its users search for
            f"Length of `adapter_names` should be the same as the number of inputs, but got {n} and {batch.rows} "
            "respectively."
        )
    found = {}
    for name in adapters_of(names):
        rows = tuple(i for i, of_row in enumerate(names) if of_row == name)
        if len(rows) == n:
            part = Part(n)
        else:
            part = Part(n, rows, torch.tensor(rows, device=None if batch is None else batch.device))
        found[name] = part.of_batch(batch)
    return found


def adapters_of(names: Sequence[str]) -> list[str]:
    """The adapters among the names of rows, each once."""
    return [name for name in dict.fromkeys(names) if name != BASE]
