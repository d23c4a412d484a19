"""Batches that mix adapters: what a call with `adapter_names` is allowed, and what peft's own wrappers are told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import AuxiliaryTrainingWrapper

from .layer import IN_BASE_EXPERTS, MoeLinear
from .routing import BASE, adapters_of

if TYPE_CHECKING:
    from .tuner import MoeTuner


def check_adapter_names(tuner: MoeTuner, names: Any) -> None:
    """Raise an error unless rows can have these adapters; where peft's LoRA has the same error, in its words.

    Raises:
        ValueError: training, unknown adapters, merged ones, or layers that do not show which row is whose.
        TypeError: not a list of names.
    """
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    layers = [(key, layer) for key, layer in tuner.model.named_modules() if isinstance(layer, MoeLinear)]
    unknown = set(adapters_of(names)) - {name for _, layer in layers for name in layer.moelora_bank}
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    if any(layer.merged for _, layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    elsewhere = next(
        (k for k, m in layers if m.context is not tuner.context and set(names) & set(m.moelora_bank)), None
    )
    if elsewhere is not None:
        raise ValueError(
            f"adapter_names={names!r}: layer {elsewhere!r} belongs to a PeftModel inside this one, which is not told "
            "of rows; put the adapters into one PeftModel with add_adapter."
        )
    if len(set(names)) > 1:
        reason = tuner.context.one_task_only
        inside = next((key for key, _ in layers if IN_BASE_EXPERTS.search(key)), None)
        if inside is not None:
            reason = f"{inside!r} is inside a mixture of experts of the base model and sees tokens picked from all rows"
        if reason is not None:
            raise ValueError(f"adapter_names={names!r} differ, and {reason}; let adapters take turns with set_adapter.")


@contextmanager
def wrappers_told(tuner: MoeTuner, names: Sequence[str] | None) -> Iterator[None]:
    """Tell the wrappers that peft puts around `modules_to_save` and trained embeddings which row is whose."""
    if names is None or not tuner.adapters_enabled:
        yield
        return
    found: list[Any] = [module for module in tuner.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [w.register_forward_pre_hook(partial(_name_rows, names=names), with_kwargs=True) for w in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _name_rows(
    wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An adapter for each row of a wrapper's input, which beams and returned sequences have repeated."""
    rows = next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), len(names))
    times = rows // len(names) if rows % len(names) == 0 else 1
    known = [name if name in wrapper._adapters else BASE for name in names for _ in range(times)]
    return args, kwargs | {"adapter_names": known}
