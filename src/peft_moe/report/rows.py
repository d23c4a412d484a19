"""Rows of data as what an adapter's model is called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..config import MoeConfig
from ..data import encode, task_key

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rows:
    """Rows that an adapter can be run over.

    Args:
        examples: of `read_examples`.
        encoded: the same as token ids.
        tokenizer: that made them.
        keys: the task or tasks of each; None for a row without.
        told: whether the model is told the tasks.
        counted: which tokens of each row count; None for all.
    """

    examples: Dataset
    encoded: Dataset
    tokenizer: PreTrainedTokenizerBase
    keys: list[str | None]
    told: bool
    counted: Sequence[Sequence[bool]] | None = None

    @classmethod
    def of(
        cls, examples: Dataset, tokenizer: PreTrainedTokenizerBase, config: MoeConfig, *, max_length: int = 1024
    ) -> Rows:
        """Rows for an adapter of this config, whose model is not needed yet; arguments and errors as for `collect`."""
        names = config.task_names if config.needs_tasks else None
        encoded = encode(examples, tokenizer, tasks=names, max_length=max_length)
        keys = [task_key(task) if task else None for task in examples["task"]]
        return cls(examples, encoded, tokenizer, keys, names is not None)

    @property
    def tasks(self) -> list[str]:
        """Sorted."""
        return sorted({key for key in self.keys if key is not None})

    def padded(self, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
        """Some of them as a batch, padded on the right, as in training."""
        tokenizer = self.tokenizer
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        encoded = [self.encoded[row] for row in rows]
        return {
            name: pad_sequence([torch.tensor(row[name]) for row in encoded], batch_first=True, padding_value=value).to(
                device
            )
            for name, value in {"input_ids": pad, "attention_mask": 0, "labels": -100}.items()
        }

    def counting(self, rows: Sequence[int], mask: torch.Tensor) -> torch.Tensor:
        """Of a batch of some rows with this mask, (n, s), the tokens that count."""
        if self.counted is None:
            return mask
        wanted = pad_sequence([torch.tensor(self.counted[row]) for row in rows], batch_first=True)
        return mask & wanted.to(mask.device)

    def spread(self, count: int) -> list[int]:
        """So many rows, taken from the tasks in turn, each task's in their order; sorted by task and row."""
        rows: dict[str, list[int]] = {}
        for row, key in enumerate(self.keys):
            rows.setdefault(key or "", []).append(row)
        turns = [(turn, key, row) for key, of_task in rows.items() for turn, row in enumerate(of_task)]
        return [row for _, row in sorted((key, row) for _, key, row in sorted(turns)[:count])]
