"""Weights that accelerate keeps elsewhere between calls, for work on them that is no call.

peft's `onload_layer` does the same for a whole layer, its base weight included, which on disk is large; and a layer
does not hold the router that it shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn


@contextmanager
def onloaded(*modules: nn.Module | None) -> Iterator[None]:
    """Have the weights of modules where they are computed with, for the span of a `with` block."""
    # a hook is an attribute of the module, which torch's types take for a tensor
    away: list[Any] = [m for module in modules if module is not None for m in module.modules() if _is_away(m)]
    there: list[Any] = []
    try:
        for module in away:
            module._hf_hook.pre_forward(module)
            there.append(module)
        yield
    finally:
        for module in there:
            module._hf_hook.post_forward(module, torch.tensor([]))


def _is_away(module: nn.Module) -> bool:
    """Whether a module's own weights are offloaded; not those that somebody has brought back already."""
    hook = getattr(module, "_hf_hook", None)
    if not isinstance(hook, AlignDevicesHook) or not hook.offload:
        return False
    within = hook.place_submodules
    return any(t.is_meta for t in chain(module.parameters(recurse=within), module.buffers(recurse=within)))


def offloaded(model: nn.Module, name: str) -> torch.Tensor:
    """The values of a parameter or buffer that is offloaded.

    Raises:
        ValueError: it is on the meta device and accelerate does not keep its values.
    """
    owner, _, tensor = name.rpartition(".")
    kept = getattr(getattr(model.get_submodule(owner), "_hf_hook", None), "weights_map", None)
    if kept is None:
        raise ValueError(
            f"{name!r} is on the meta device and has no values; load the adapter's weights first, or give the folder "
            "of the saved adapter, which needs no model."
        )
    values: torch.Tensor = kept[tensor]
    return values
