"""What is in an adapter's files is looked at before anything is changed: whole, of the right shapes, finite."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import nn

# What opening a broken file raises: safetensors' own error, and what torch and pickle make of other bytes.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, KeyError, OSError)
ANEW = "fetch it or save it anew"
FITS = "these weights were saved with another config, or for another base model; load them with the config beside them"
OURS = re.compile(r"\.moelora_(bank\.lora_[AB]\.weight|router\.(\w+\.)*gate\..+)$")


def check_weights_file(folder: str | Path, whole_modules: Iterable[str] = ()) -> None:
    """Raise a ValueError if the weights in an adapter's folder cannot be read, or lack modules saved whole.

    Of a safetensors file only the header is read. A Hub id, and a folder that has no weights, are left to peft.
    """
    safe, pickled = Path(folder) / SAFETENSORS_WEIGHTS_NAME, Path(folder) / WEIGHTS_NAME
    path = safe if safe.is_file() else pickled
    if not path.is_file():
        return
    try:
        if path == safe:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        else:
            names = list(torch.load(path, map_location="cpu", weights_only=True))
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    if not names:
        raise ValueError(f"{path} has no tensors; {ANEW}.")
    for module in whole_modules:
        if not any(f".{module}." in name for name in names):
            raise ValueError(f"{path} lacks {module!r}, which the config names in modules_to_save; {FITS}.")


def read_weights(source: str | Path, *, device: str = "cpu", **hub_kwargs: Any) -> dict[str, torch.Tensor]:
    """The tensors of an adapter in a folder or on the Hub, on a device.

    Raises:
        ValueError: they cannot be read, or are no finite numbers.
        FileNotFoundError: there are none.
    """
    folder = Path(source) / (hub_kwargs.get("subfolder") or "")
    if folder.is_dir() and not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise FileNotFoundError(f"There is no {SAFETENSORS_WEIGHTS_NAME} in {folder}; give the folder of an adapter.")
    check_weights_file(folder)
    try:
        found: dict[str, torch.Tensor] = load_peft_weights(str(source), device=device, **hub_kwargs)
    except UNREADABLE as error:
        raise _unreadable(Path(source), error) from None
    where = f"The adapter {str(source)!r}"
    if foreign := [key for key in found if "moelora_" in key and not OURS.search(key)]:
        raise ValueError(f"{where} has no place for {foreign[0]!r} of the file; {FITS}.")
    _check_numbers(where, found)
    return found


@contextmanager
def whole(source: object) -> Iterator[None]:
    """Say what it means if what an adapter's config promises is not among its weights, or of another shape."""
    if isinstance(source, nn.Module):  # which is whole
        yield
        return
    try:
        yield
    except (KeyError, IndexError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"The adapter {str(source)!r} does not have what its config says ({what}): {FITS}.") from error


def check_tensors(
    wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], known: Iterable[str], adapter_name: str
) -> None:
    """Raise a ValueError unless a file's tensors can be an adapter's weights.

    Args:
        wanted: the adapter's own tensors, by their names in the model.
        found: those of the file, by the same names, and what it has beside them.
        known: names of all tensors of the model; asked for only if the file has others of ours than `wanted`.
        adapter_name: name of the adapter.
    """
    where = f"Adapter {adapter_name!r}"
    if missing := [key for key in wanted if key not in found]:
        raise ValueError(
            f"{where} has {len(wanted)} tensors and the file lacks {len(missing)} of them, such as {missing[0]!r}: it "
            f"is not whole, or {FITS}."
        )
    for key, tensor in wanted.items():
        # under ZeRO-3 a parameter that is not gathered is empty, and this is what it will be
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        local = tuple(getattr(tensor, "_local_tensor", tensor).shape)  # of a DTensor, for which peft takes shards too
        if tuple(found[key].shape) not in (shape, local if shape == tuple(tensor.shape) else shape):
            raise ValueError(
                f"{where} has {key!r} of shape {shape} and the file's is {tuple(found[key].shape)}; {FITS}."
            )
    # peft leaves out what else it does not know
    foreign = [key for key in found if key not in wanted and "moelora_" in key]
    names = set(known) if foreign else set()
    if foreign := [key for key in foreign if names.isdisjoint((key, key.removeprefix("base_model.model.")))]:
        raise ValueError(f"{where} has no place for {foreign[0]!r} of the file, one of {len(foreign)} such; {FITS}.")
    _check_numbers(where, found)


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor] | None:
    """The saved tensors of an adapter's banks and routers by name; None where FSDP holds them in another form."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if "_fsdp_wrapped_module" in name:
            return None
        if name.endswith((f"moelora_bank.{adapter_name}", f"moelora_router.{adapter_name}")):
            found |= module.state_dict(prefix=f"{name}.", keep_vars=True)
    return found


def names_of_tensors(model: nn.Module) -> Iterator[str]:
    """Names of all parameters and buffers, under each name that they have."""
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        yield from (name for name, _ in tensors)


def check_gathered(state_dict: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Refuse to save what one process holds of weights that several share, which no one could load again.

    Raises:
        ValueError: a tensor without elements, or a matrix of an expert that is flat.
    """
    matrices = (".lora_A.weight", ".lora_B.weight")
    partial = [key for key, t in state_dict.items() if not t.numel() or (key.endswith(matrices) and t.dim() != 2)]
    if partial:
        raise ValueError(
            f"Adapter {adapter_name!r} is not whole in this process: {partial[0]!r} has shape "
            f"{tuple(state_dict[partial[0]].shape)} ({len(partial)} of {len(state_dict)} tensors are like that), as "
            "under DeepSpeed ZeRO-3 and FSDP, which split weights over processes. Nothing was written. In all "
            "processes call trainer.save_model(), or state_dict = accelerator.get_state_dict(prepared_model) and then "
            "model.save_pretrained(folder, state_dict=state_dict) in the main one."
        )


def _check_numbers(where: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError unless the tensors of a file are weights, and finite."""
    extremes: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not (tensor.is_floating_point() or "moelora_" not in key):
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{where}: {key!r} in the file is {kind}, and weights are floating-point numbers; {ANEW}.")
        local = _numbers(tensor)
        if local.is_floating_point() and local.numel():
            # finite if all numbers are, and no tensor of the same size
            extremes.setdefault((local.device, local.dtype), []).extend(local.aminmax())
    # looked at together: each look waits for the device
    if all(bool(torch.stack(values).isfinite().all()) for values in extremes.values()):
        return
    for key, local in ((key, _numbers(tensor)) for key, tensor in tensors.items()):
        if bad := int((~local.isfinite()).sum()):
            raise ValueError(
                f"{where}: {key!r} in the file has {bad} of {local.numel()} numbers that are NaN or infinite, as from "
                "training that diverged; load an earlier checkpoint."
            )


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor this process has, in a type that can be compared."""
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a DTensor, this process's
    return local.float() if local.element_size() == 1 else local


def _unreadable(path: Path, error: Exception) -> ValueError:
    what = " ".join(str(error).split())[:160] or type(error).__name__
    return ValueError(f"{path} cannot be read ({what}); it is cut off or no file of weights: {ANEW}.")
