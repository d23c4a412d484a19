"""What is in a saved adapter, as a plain dict; the base model is not needed.

Read are the config, the header of the weights' file, which has the shapes, and the weights of routers, which are small.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils.hub import extract_commit_hash

from ..card_methods import method_of
from ..config import MoeConfig
from ..directory import read_config
from ..folding import BANK
from ..grouped.config import GroupedMoeConfig
from ..integrity import FITS, OURS, whole
from ..medmoe.config import MedMoeLoraConfig
from ..molora.config import MoLoraConfig
from ..schedule import layer_of
from .contents import Contents, find_file
from .routers import describe_routers

FORMAT = 1  # of what `describe` returns


def describe(adapter: str | Path, **hub_kwargs: Any) -> dict[str, Any]:
    """What is in a saved adapter.

    Args:
        adapter: a directory or Hub id.
        hub_kwargs: for a Hub id: `revision`, `token`, `subfolder`, `cache_dir`.

    Returns:
        what JSON can hold: `method`, `peft_type`, `paper`, `base_model`, `tasks`, `groups` (AT-MoE), `settings` of the
        method, `fixed` (AT-MoE: weights that a user has fixed), `provenance`, `parameters` (`experts`, `routers`,
        `other`, `trained`: those of them that training changes, and `total`), `layers`, `routers`. A layer has `name`,
        `stack`, `block` and `module` (parts of the name; block None where it has no number), sizes, `experts` (names),
        their `ranks` and `scaling`, `dtype`, `parameters`, and the name of its `router`, None for a plain LoRA. A
        router has `kind`: `task`, `token` or `group`; see `describe_routers`.

    Raises:
        ValueError: no adapter, one of another package, broken files, or weights that the config does not fit.
        FileNotFoundError: no weights.

    Example:
        >>> describe("outputs/moelora")["parameters"]["total"]
    """
    commit = None
    if not Path(adapter).exists():
        commit = extract_commit_hash(str(find_file(adapter, CONFIG_NAME, hub_kwargs)), None)
        hub_kwargs = hub_kwargs | ({"revision": commit} if commit else {})  # a branch may move on between two files
    config = read_moe_config(adapter, **hub_kwargs)
    path = find_file(adapter, SAFETENSORS_WEIGHTS_NAME, hub_kwargs)
    contents = Contents.of(path)
    _check_names(adapter, contents)
    layers = [_layer(config, contents, key) for key in _keys_in_order(adapter, contents)]
    with whole(adapter):
        routers = describe_routers(config, layers, contents.routers)
    frozen = isinstance(config, GroupedMoeConfig) and not config.train_experts
    experts, counts = sum(layer["parameters"] for layer in layers), contents.counts
    in_routers = sum(count for name, count in counts.items() if "moelora_" in name) - experts
    other = sum(counts.values()) - experts - in_routers
    method = method_of(config)
    return {
        "format": FORMAT,
        "adapter": str(adapter),
        "method": method.name,
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "paper": next(iter(re.findall(r"arXiv [\d.]+", method.source)), None),
        "base_model": config.base_model_name_or_path,
        "base_revision": config.revision,
        "task_type": config.task_type,
        "tasks": config.task_names,
        "groups": config.names if isinstance(config, GroupedMoeConfig) else None,
        "settings": {name: _plain(getattr(config, name)) for name in method.fields if name != "group_weights"},
        "fixed": config.group_weights if isinstance(config, GroupedMoeConfig) else None,
        "provenance": {
            "peft_version": config.peft_version,
            "moe_format": config.moe_format,
            "commit": commit,
            "file": SAFETENSORS_WEIGHTS_NAME,
            "bytes": path.stat().st_size,
            "experts": _origins(config),
        },
        "parameters": {
            "experts": experts,
            "experts_are_trained": not frozen,
            "routers": in_routers,
            "other": other,
            "trained": in_routers + other + (0 if frozen else experts),
            "total": experts + in_routers + other,
        },
        "layers": layers,
        "routers": routers,
    }


def read_moe_config(adapter: str | Path, **hub_kwargs: Any) -> MoeConfig:
    """The config of an adapter of this package.

    Raises:
        ValueError: there is none, it is broken, or it is another package's.
    """
    if Path(adapter).exists() and not (Path(adapter) / (hub_kwargs.get("subfolder") or "") / CONFIG_NAME).is_file():
        raise ValueError(f"{str(adapter)!r} is no adapter: it has no {CONFIG_NAME}; give the folder of an adapter.")
    config = read_config(adapter, **hub_kwargs)
    if not isinstance(config, MoeConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"{str(adapter)!r} is a {kind} adapter, which has no experts and no router of peft_moe; give an adapter of "
            "MOELoRA, MoLoRA, Med-MoE-LoRA or AT-MoE."
        )
    return config


def _check_names(adapter: str | Path, contents: Contents) -> None:
    if foreign := [name for name in contents.shapes if "moelora_" in name and not OURS.search(name)]:
        raise ValueError(f"The adapter {str(adapter)!r} has no place for {foreign[0]!r} of the file; {FITS}.")


def _keys_in_order(adapter: str | Path, contents: Contents) -> list[str]:
    """Names of the modules that have experts, block by block."""
    keys = [match["key"] for name in contents.shapes if (match := BANK.match(name))]
    if not keys:
        raise ValueError(f"The weights of {str(adapter)!r} have no '….moelora_bank.lora_A.weight'; {FITS}.")
    # 2 before 10; the first entry keeps texts and numbers apart
    return sorted(
        keys, key=lambda key: [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in key.split(".")]
    )


def _layer(config: MoeConfig, contents: Contents, key: str) -> dict[str, Any]:
    prefix = f"base_model.model.{key}.moelora_bank."
    a, b = (contents.shapes.get(f"{prefix}lora_{part}.weight", ()) for part in "AB")
    experts = config.experts_at(key)
    if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == sum(experts.ranks):
        raise ValueError(
            f"The file has lora_A {a} and lora_B {b} at {key!r}, and the config has experts of ranks "
            f"{list(experts.ranks)} there; {FITS}."
        )
    place = layer_of(key)
    stack, block = place if place else ("", None)
    names, empty = expert_names(config, key), len(expert_names(config, key)) - len(experts.ranks)
    return {
        "name": key,
        "stack": stack,
        "block": block,
        "module": key if block is None else key.removeprefix(f"{stack}.").partition(".")[2],
        "in_features": a[1],
        "out_features": b[0],
        "experts": names,
        "ranks": [0] * empty + list(experts.ranks),  # base experts that are nothing but a share of the weight
        "scaling": [None] * empty + list(experts.scaling),
        "dtype": contents.dtypes[f"{prefix}lora_A.weight"],
        "parameters": math.prod(a) + math.prod(b),
        "router": None,
    }


def expert_names(config: MoeConfig, key: str) -> list[str]:
    """Names of the experts of the module at `key`, in the order of its bank, before them base experts without matrices.

    They are numbers; `base 0` and `shared 0` for those that stand apart; AT-MoE has `group/name` and `general`.
    """
    if isinstance(config, GroupedMoeConfig):
        names = [f"{group}/{name}" for group, experts in config.names.items() for name in experts]
        return [*names, *(["general"] if config.general_expert is not None else [])]
    if isinstance(config, MoLoraConfig):
        n = config.routed_at(key)
        shared = config.num_shared_experts if n > 1 else 0
        return [*(f"shared {i}" for i in range(shared)), *map(str, range(n))]
    if isinstance(config, MedMoeLoraConfig):
        base = [f"base {i}" for i in range(config.num_base_experts)]
        return [*base, *map(str, range(config.routed_at(key)))]
    return [str(i) for i in range(len(config.experts_at(key).ranks))]


def _origins(config: MoeConfig) -> list[dict[str, Any]] | None:
    """AT-MoE: where each expert came from; None for the other methods."""
    if not isinstance(config, GroupedMoeConfig):
        return None
    names = expert_names(config, "")
    return [
        {"name": name, **(source or {"source": None})}
        for name, source in zip(names, config.sources.values(), strict=True)
    ]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value
