"""Rows that hold several texts, one after the other: how they are noticed, and who has to refuse them.

Shapes: n rows · s tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .routing import Batch, keep_mask

if TYPE_CHECKING:
    from .tuner import MoeTuner


def refuse_packing(batch: Batch, arguments: Mapping[str, Any], why: str) -> None:
    """Raise a ValueError if rows hold several texts.

    Packing leaves its trace in `position_ids` that begin anew, or in `cu_seq_lens_q`. Texts that are cut and joined
    without either (TRL's "wrapped" strategy) cannot be told from one text.

    Args:
        batch: of the call.
        arguments: all its arguments by name.
        why: what the message says after the reason: why that is no good, and what to do.
    """
    positions, lengths = arguments.get("position_ids"), arguments.get("cu_seq_lens_q")
    message = f"Rows hold several texts, packed one after the other, and {why}"
    if isinstance(lengths, torch.Tensor) and len(lengths) > batch.rows + 1:
        raise ValueError(message)
    if isinstance(positions, torch.Tensor) and positions.dim() == 2 and positions.shape[1] > 1:
        again = positions[:, 1:] == 0
        mask = keep_mask(arguments.get("attention_mask")) if batch.mask is None else batch.mask
        if mask is not None and mask.shape == positions.shape:
            again = again & mask[:, :-1] & mask[:, 1:]  # padding has any, and behind it a text begins
        packed = again.any()
        if packed.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(~packed, message)  # does not wait for the device
        elif packed:
            raise ValueError(message)


def refuse_mixed_tasks(
    tuner: MoeTuner, batch: Batch, arguments: Callable[[], Mapping[str, Any]], task_ids: Any, *, training: bool
) -> None:
    """Raise a ValueError if rows hold several texts and it is not known that each row is of one task.

    It is if the call has a task per row or one for all, or one was chosen with `set_task`. `default_task` is what rows
    without a task get, and says nothing about texts that may have lost theirs on the way. The call's arguments by name
    are asked for only if need be.
    """
    if torch.compiler.is_compiling():
        return
    active = tuner.present
    if task_ids is None:
        lacking = tuner.context.may_lack_task(active, default_is_enough=not training)
        known = not lacking or not tuner.routes_by_task(active)
        found = "no task was given"
    else:
        entries = 1 if isinstance(task_ids, (str, int)) else _length(task_ids)
        known, found = entries in (1, batch.rows), f"{entries} were given for {batch.rows} row(s)"
    if not known:
        refuse_packing(
            batch,
            arguments(),
            f"that mixes tasks within a row, which has one task for all its tokens ({found}). Turn off packing and "
            "padding-free batches; if all texts are of one task, choose it with model.set_task(...). Adapters that "
            "route by tokens can be trained on packed rows.",
        )


def _length(values: Any) -> int:
    """Entries of a list, array or tensor; 1 for a single number, and for what is no task id at all."""
    return 1 if getattr(values, "ndim", 1) == 0 or not hasattr(values, "__len__") else len(values)
