"""Quantised base layers: what they are read with, and what merging into them loses.

peft's quantisation backends do the work. This is what they leave open: whether a layer can be merged into is known
before the first is changed, what rounding a merged weight anew loses is measured, and unmerging gives it back.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn

from .routing import RoutingContext

# What layers of bitsandbytes know of their weight beside it.
BESIDE_WEIGHT = ("state", "quant_state")
FOLD = "fold the adapter into a stock LoRA instead (peft_moe.fold), or merge it into the model before quantisation"


def backend_of(base: nn.Module, **kwargs: Any) -> Any:
    """peft's quantisation backend of a layer, None if it has none.

    A layer that torchao quantised outside of transformers cannot be quantised anew, and so not merged into; as under
    peft's LoRA, that is a warning, and the rest works.

    Args:
        kwargs: what `peft.utils.get_quantization_kwargs` finds in the model.
    """
    backend = _resolve(base, **kwargs)
    if getattr(backend, "get_apply_tensor_subclass", None) is _unknown:
        backend.supports_merge = False
        warnings.warn(
            "torchao has quantised layers of the model outside of transformers, so that how is not known and nothing "
            "can be merged into them; the rest works. To merge, load the model with "
            "from_pretrained(..., quantization_config=TorchAoConfig(...)).",
            UserWarning,
            stacklevel=2,
        )
    return backend


def _resolve(base: nn.Module, **kwargs: Any) -> Any:
    return resolve_quantization_backend(base, **{"get_apply_tensor_subclass": _unknown} | kwargs)


def _unknown() -> Any:
    """Stands for how torchao quantised a layer."""
    raise NotImplementedError


def is_quantised_linear(module: nn.Module) -> bool:
    """Whether peft knows the module as a quantised linear layer."""
    backend = None if isinstance(module, nn.Embedding) else _resolve(module)
    return backend is not None and backend.layer_type == "linear"


def check_can_merge(layer: BaseTunerLayer, where: str = "these layers") -> None:
    """Raise a ValueError unless the weight of the layer's base can be changed."""
    base, backend = layer.get_base_layer(), layer.quantization_backend
    if backend is not None:
        if not backend.supports_merge:
            raise ValueError(
                f"Weights quantised by {backend.backend_name} cannot be merged into, because peft cannot quantise them "
                f"anew ({where}); {FOLD}."
            )
        return
    weight = getattr(base, "weight", None)
    if type(weight).__module__.startswith("optimum.quanto"):  # it takes a new weight and goes on with the old one
        raise ValueError(f"Weights quantised by quanto cannot be merged into ({where}); {FOLD}.")
    if not isinstance(weight, torch.Tensor) or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        what = f"has weights of type {weight.dtype}" if isinstance(weight, torch.Tensor) else "has no weight"
        raise ValueError(
            f"The base layer is a {type(base).__name__} that {what} and that peft knows no quantisation backend for, "
            f"so that nothing can be merged into it ({where}); {FOLD}."
        )


@torch.no_grad()
def weight_of(layer: BaseTunerLayer) -> torch.Tensor:
    """The base weight as floating-point numbers."""
    base: Any = layer.get_base_layer()
    if not getattr(getattr(getattr(base, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        return layer.get_base_weight()
    # The first call in eval mode makes bitsandbytes lay a 4-bit weight out for the CPU's matrix unit, and its
    # dequantisation does not know that layout: what it returns is another matrix. The layer itself is right.
    bias, base.bias = base.bias, None
    try:
        shape = base.weight.quant_state.shape
        output: torch.Tensor = base(torch.eye(shape[1], device=base.weight.device))
        return output.T.contiguous()
    finally:
        base.bias = bias


class Aside:
    """A base layer's quantised weight before anything was merged into it; no copy."""

    def __init__(self, base: nn.Module) -> None:
        self.base, self.weight = base, getattr(base, "weight", None)
        # peft writes into the attributes of a weight and of what is beside it when it puts another in its place
        self.attributes = dict(vars(self.weight)) if self.weight is not None else {}
        self.beside = {name: copy.copy(vars(base)[name]) for name in BESIDE_WEIGHT if name in vars(base)}

    def put_back(self, layer: BaseTunerLayer) -> bool:
        """Undo all merging; False if the layer has been moved to another device since, which the weight was not."""
        if self.weight is not None:
            now = getattr(layer.get_base_layer(), "weight", None)
            if now is not None and now.device != self.weight.device:
                return False
            vars(self.weight).update(self.attributes)
            if "weight" in vars(self.base):  # peft leaves a plain tensor there when quantising fails
                del self.base.weight
            self.base.weight = self.weight
            vars(self.base).update(self.beside)
        owner: Any = layer
        while isinstance(owner.base_layer, BaseTunerLayer):
            owner = owner.base_layer
        owner.base_layer = self.base  # HQQ has another layer there
        return True


@torch.no_grad()
def requantise(layer: BaseTunerLayer, weight: torch.Tensor, delta: torch.Tensor, *, measure: bool) -> float | None:
    """Put `weight + delta` in place of the base weight, which is `weight`; if that fails, it is as it was.

    Returns:
        if it is to be measured, and delta is not zero, how much of the change was lost: `‖W' - W - Δ‖ / ‖Δ‖`
        (Frobenius) with W' the new weight.
    """
    before = Aside(layer.get_base_layer())
    wanted = weight.float() + delta.float()
    try:
        layer.set_base_weight(wanted.to(weight.dtype))
    except BaseException:
        before.put_back(layer)
        raise
    size = delta.float().norm()
    return ((weight_of(layer).float() - wanted).norm() / size).item() if measure and size > 0 else None


@contextmanager
def measured(context: RoutingContext) -> Iterator[None]:
    """Warn, once for all layers that are merged meanwhile, of what quantising their weights anew has lost."""
    context.requantised = {}
    try:
        yield
        losses = context.requantised
    finally:
        context.requantised = None
    if losses:
        warnings.warn(loss_of_merging(losses), UserWarning, stacklevel=4)


def loss_of_merging(losses: dict[str, list[float]]) -> str:
    """What `measured` says of the losses by backend."""
    figures = []
    for name, found in losses.items():
        layers = f"{len(found)} layer{'s' * (len(found) > 1)}"
        figures.append(f"{name}, {layers}: {sum(found) / len(found):.3g} on average, {max(found):.3g} in the worst")
    return (
        f"Merging rounds quantised weights anew. The error of what was added, relative to it ({'; '.join(figures)}), "
        "is now part of the model, where 1 is as much as if nothing had been merged. To lose nothing, leave the "
        "adapter unmerged, or fold it into a stock LoRA (peft_moe.fold), which goes beside the quantised weights or "
        "can be merged into the model before quantisation. model.unmerge_adapter() gives the weights back as they were."
    )
