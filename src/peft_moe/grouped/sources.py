"""Trained LoRAs as experts: where they come from, what can be one, and their weights.

Only safetensors and JSON are read; nothing of a source is executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers.utils.hub import extract_commit_hash

from ..config import MoeConfig, PeftMoeType
from ..folding import fold_banks
from ..moelora.config import MoeLoraConfig
from ..moelora.model import weights_of_task

# Entries of a source that is a mapping: a folder or Hub id, and what else it takes to find the expert.
ENTRIES = ("source", "revision", "subfolder", "task")
FOUND = ("sha256", "commit", "loaded")  # entries that are set when the source has been read
KINDS: dict[str, Any] = {"source": (str, Path), "task": (str, int), "loaded": bool}  # all others are texts
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PICKLES = ("adapter_model.bin", "adapter_model.pt")

# Fields of a stock LoRA that do not change what its A and B mean; any other has to have its default.
HARMLESS = {
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying", "qalora_group_size",
    "megatron_core",
}  # fmt: skip
# Initialisations that leave the base weights alone. Others move a part of them into the adapter, which then belongs to
# changed base weights, unless it was converted when it was saved, which sets the field to True.
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


class Lora(NamedTuple):
    """One module's part of an expert: A (r, in), B (out, r), and the factor on their product."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True, repr=False)
class Expert:
    """A trained LoRA that can be an expert.

    Args:
        layers: its parts by name of the module.
        origin: where it came from: `source`, and as far as they apply `revision`, `subfolder`, `task`, `commit` and
            `sha256`; `loaded` if the source was the name of an adapter in a model.
        base_model: the base model that it was trained on, as its config names it.
        task_type: peft's.
    """

    layers: dict[str, Lora]
    origin: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    task_type: str | None = None

    def __repr__(self) -> str:
        return f"Expert({self.origin}, {len(self.layers)} modules)"


def check_source(name: str, source: Any) -> Any:
    """A source in its canonical form: an `Expert`, None, or a dict of `ENTRIES` and, if it was read, `FOUND`.

    Raises:
        ValueError: it is none of these.
    """
    if source is None or isinstance(source, Expert):
        return source
    entries = {"source": source} if isinstance(source, (str, Path)) else source
    if not isinstance(entries, Mapping) or not isinstance(entries.get("source"), (str, Path)) or not entries["source"]:
        raise ValueError(
            f"{name} has the source {source!r}; give a folder or Hub id, or {{'source': ..., 'revision': ..., "
            "'subfolder': ..., 'task': ...}."
        )
    if unknown := sorted(entries.keys() - {*ENTRIES, *FOUND}, key=str):
        raise ValueError(f"{name} has {unknown} in its source; known are {list(ENTRIES)}.")
    for key, value in entries.items():
        if value is not None and not isinstance(value, KINDS.get(key, str)):
            raise ValueError(
                f"{name} has {key}={value!r} in its source, which is a {type(value).__name__}; give a text."
            )
    return {**entries, "source": os.path.expanduser(entries["source"])}


def read_expert(source: Any, *, name: str = "expert") -> Expert:
    """Read a trained adapter as an expert.

    Args:
        source: a folder or Hub id of a stock LoRA, or a dict with it as `source` and, if they apply, `revision`,
            `subfolder` and, for a MOELoRA adapter, `task`.
        name: what errors call it.

    Raises:
        ValueError: an adapter that cannot be an expert, with the reason.
        FileNotFoundError: there is no adapter.

    Example:
        >>> read_expert("me/triage-lora").layers.keys()
    """
    entries = check_source(name, source)
    if entries is None:
        raise ValueError(f"{name} has no source; give a folder or Hub id, or {{'source': ..., 'revision': ...}}.")
    if isinstance(entries, Expert):
        return entries
    where = f"{name} ({entries['source']})"
    if entries.get("loaded"):
        raise ValueError(f"{where} was an adapter in a model's memory; give the folder or Hub id of it.")
    if entries.get("revision") and Path(entries["source"]).exists():
        raise ValueError(
            f"{where} is a folder here, which has no revision {entries['revision']!r}; leave revision out, or rename "
            "the folder if the Hub's is meant."
        )
    config_path = _find(CONFIG_NAME, entries, where)
    config = _read_config(config_path, where)
    commit = extract_commit_hash(str(config_path), None)  # of a branch that may move on before the next file
    weights_path = _find(SAFETENSORS_WEIGHTS_NAME, {**entries, "revision": commit or entries.get("revision")}, where)
    origin = {key: entries[key] for key in ENTRIES if entries.get(key) is not None} | {"sha256": _sha256(weights_path)}
    if commit:
        origin["commit"] = commit
    if entries.get("sha256") not in (None, origin["sha256"]):
        raise ValueError(
            f"{where} has other weights than when its sha256 {entries['sha256']!r} was noted (now "
            f"{origin['sha256']!r}); leave sha256 out if they are meant."
        )
    try:
        state_dict = load_file(weights_path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{where} has a broken {SAFETENSORS_WEIGHTS_NAME} ({error}); fetch or save it anew.") from None
    return _expert(config, state_dict, entries.get("task"), origin, where)


def read_loaded(model: PeftModel, adapter_name: str) -> Expert:
    """A stock LoRA that is loaded in a model, as an expert.

    Raises:
        ValueError: no such adapter, or one that cannot be an expert, with the reason.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"The model has no adapter {adapter_name!r}, only {sorted(model.peft_config)}.")
    where = f"The loaded adapter {adapter_name!r}"
    config = {f.name: getattr(model.peft_config[adapter_name], f.name) for f in fields(model.peft_config[adapter_name])}
    # only the adapter's tensors, not state_dict(), which would copy or unpack a quantised base
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    state_dict = get_peft_model_state_dict(model, state_dict=tensors, adapter_name=adapter_name)
    state_dict = {key: value.detach().cpu().clone() for key, value in state_dict.items()}
    origin = {"source": adapter_name, "loaded": True, "sha256": hashlib.sha256(save(state_dict)).hexdigest()}
    return _expert(config, state_dict, None, origin, where)


def _expert(
    config: dict[str, Any], state_dict: dict[str, torch.Tensor], task: Any, origin: dict[str, Any], where: str
) -> Expert:
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind == PeftMoeType.MOELORA:
        layers = _of_task(config, state_dict, task, where)
    elif kind == "LORA":
        if task is not None:
            raise ValueError(f"{where} is a stock LoRA and has no task {task!r}; leave 'task' out.")
        _check_config(config, where)
        layers = _of_lora(config, state_dict, where)
    else:
        raise ValueError(
            f"{where} is a {kind} adapter; experts are stock LoRAs, or tasks of a MOELORA adapter. What can be folded "
            "or converted to a stock LoRA can be an expert then."
        )
    for key, lora in layers.items():
        if not (lora.a.isfinite().all() and lora.b.isfinite().all()):
            raise ValueError(f"{where} has weights at {key!r} that are not finite; train or save it anew.")
    return Expert(layers, origin, config.get("base_model_name_or_path"), config.get("task_type"))


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse every setting that gives A and B another meaning than that of a plain LoRA, known or not."""
    if config.get("use_dora"):
        raise ValueError(
            f"{where} is a DoRA, whose magnitudes belong to one sum of weights; merge it, or train a LoRA."
        )
    if config.get("modules_to_save"):
        raise ValueError(
            f"{where} has whole modules {config['modules_to_save']} beside its LoRA (modules_to_save), and experts "
            "share the base model's; train it without them."
        )
    init = config.get("init_lora_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in HARMLESS_INITS):
        raise ValueError(
            f"{where} was initialised with init_lora_weights={init!r}, which changes the base weights; save it with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA."
        )
    for name in ("rank_pattern", "alpha_pattern"):
        try:
            broken = [key for key, value in (config.get(name) or {}).items() if not (re.compile(key) and value)]
        except (AttributeError, TypeError, re.error):
            broken = [config[name]]
        if broken:
            raise ValueError(f"{where} has {name} with {broken[0]!r}; it maps names or regexes to numbers above 0.")
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(LoraConfig)}
    for name, value in config.items():
        if name not in HARMLESS and value not in (None, False, [], {}, defaults.get(name)):
            raise ValueError(f"{where} has {name}={value!r}, which an expert cannot have; train it without.")


def _of_lora(config: Mapping[str, Any], state_dict: dict[str, torch.Tensor], where: str) -> dict[str, Lora]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        key, _, ending = name.removeprefix("base_model.model.").rpartition(".lora_")
        if ending not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise ValueError(
                f"{where} has the tensor {name!r} of shape {tuple(tensor.shape)}; experts have matrices lora_A and "
                "lora_B of linear layers only."
            )
        if tensor.dtype not in WEIGHT_TYPES:
            raise ValueError(f"{where} has {name!r} in {tensor.dtype}; save it in one of {[*map(str, WEIGHT_TYPES)]}.")
        if parts.setdefault(key, {}).setdefault(ending[0], tensor) is not tensor:
            raise ValueError(f"{where} has lora_{ending[0]} at {key!r} twice, under two names; save it anew.")
    if not parts:
        raise ValueError(f"{where} has no LoRA weights.")
    layers = {}
    for key, part in parts.items():
        if part.keys() != {"A", "B"}:
            raise ValueError(f"{where} has only lora_{min(part)} at {key!r}; save it anew.")
        a, b = part["A"], part["B"]
        r = MoeConfig.at(config.get("rank_pattern") or {}, key, config.get("r", 0))
        if not a.numel() or not b.numel() or a.shape[0] != b.shape[1] or a.shape[0] != r:
            raise ValueError(
                f"{where} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} at {key!r}, and its config has "
                f"rank {r} there; they belong to different adapters, or were saved without being gathered."
            )
        alpha = MoeConfig.at(config.get("alpha_pattern") or {}, key, config.get("lora_alpha", r))
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"{where} has alpha {alpha!r} at {key!r}, which scales nothing; save it anew.")
        layers[key] = Lora(a, b, alpha / r**0.5 if config.get("use_rslora") else alpha / r)
    return layers


def _of_task(config: Mapping[str, Any], state_dict: dict[str, torch.Tensor], task: Any, where: str) -> dict[str, Lora]:
    """One task of a MOELoRA adapter, folded."""
    known = {f.name for f in fields(MoeLoraConfig)}
    if unknown := [f"{name}={value!r}" for name, value in config.items() if value and name not in known]:
        raise ValueError(
            f"{where} has {unknown[0]}, which this version of peft_moe does not know; fold it where it is."
        )
    moelora = MoeLoraConfig(**{name: value for name, value in config.items() if name in known})
    others = [name for name in state_dict if ".moelora_" not in name]
    if others:
        raise ValueError(
            f"{where} has the tensor {others[0]!r} beside its experts; train it without modules_to_save, "
            "trainable_token_indices and bias."
        )
    if task is None:
        raise ValueError(f"{where} is a MOELORA adapter; say which of its tasks: 'task': one of {moelora.task_names}.")
    try:
        folded = fold_banks(moelora, state_dict, weights_of_task(moelora, state_dict, task))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{where} lacks weights that its config names ({error}); save it anew.") from None
    return {key: Lora(a, b, 1.0) for key, (a, b) in folded.items()}


def _find(name: str, entries: Mapping[str, Any], where: str) -> Path:
    """The path of a file of an adapter, in a folder or from the Hub."""
    source, subfolder = entries["source"], entries.get("subfolder")
    folder = Path(source, subfolder or "")
    if Path(source).exists() or source.startswith((".", "/", "~")):
        if (folder / name).is_file():
            return folder / name
        pickles = [p for p in PICKLES if (folder / p).exists()]
        rest = _pickled(pickles) if pickles else f"there is no {name} in {folder}; give the folder of an adapter."
        raise FileNotFoundError(f"{where}: {rest}")
    try:
        return Path(hf_hub_download(source, name, revision=entries.get("revision"), subfolder=subfolder))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        pickle = str(Path(subfolder or "") / PICKLES[0])
        online = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if online and name != CONFIG_NAME and file_exists(source, pickle, revision=entries.get("revision")):
            raise FileNotFoundError(f"{where}: {_pickled([pickle])}") from None
        why = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{where}: no {name} in a folder or Hub repository of that name ({why}); give the folder or Hub id of an "
            "adapter, and its revision if it has several."
        ) from None


def _pickled(names: list[str]) -> str:
    return (
        f"its weights are a pickle file ({', '.join(names)}), and opening one can run any code; load it with peft "
        "where you trust it, and save it again, which makes safetensors."
    )


def _read_config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} has a broken {CONFIG_NAME} ({error}); fetch or save it anew.") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{where} has a {CONFIG_NAME} without a peft_type; give the folder of an adapter.")
    return config


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
