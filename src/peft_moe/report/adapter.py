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
from ..moelora.config import MoeLoraConfig
from ..molora.config import MoLoraConfig
from ..routing.names import by_group, by_number, parts_of
from .contents import Contents, find_file
from .routers import describe_routers

FORMAT = 1  # of what `describe` returns


def describe(adapter: str | Path, *, strict: bool = True, **hub_kwargs: Any) -> dict[str, Any]:
    """What is in a saved adapter.

    Args:
        adapter: a directory or Hub id.
        strict: False for a file whose experts have other ranks than its config says too, which nothing loads.
        hub_kwargs: for a Hub id: `revision`, `token`, `subfolder`, `cache_dir`.

    Returns:
        what JSON can hold: `method`, `peft_type`, `paper`, `base_model`, `tasks`, `groups` (AT-MoE), `settings` of the
        method, `fixed` (AT-MoE: weights that a user has fixed), `provenance`, `parameters` (`experts`, `routers`,
        `other`, `trained`: those of them that training changes, and `total`), `layers`, `routers`. A layer has `name`,
        `stack`, `block` and `module` (parts of the name; block None where it has no number), sizes, `experts` (names),
        their `ranks` and `scaling` by the config, `total_rank` (MOELoRA: r; else the sum of the ranks), `dtype`,
        `parameters` in the file, and the name of its `router`, None for a plain LoRA. A router has `kind`: `task`,
        `token` or `group`; see `describe_routers`.

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
    layers = [_layer(config, contents, key, strict=strict) for key in _keys_in_order(adapter, contents)]
    with whole(adapter):
        routers = describe_routers(config, layers, contents.routers)
    grouped = config if isinstance(config, GroupedMoeConfig) else None
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
        "groups": grouped.names if grouped else None,
        "settings": {name: _plain(getattr(config, name)) for name in method.fields if name != "group_weights"},
        "fixed": grouped.group_weights if grouped else None,
        "provenance": _provenance(config, path, commit),
        "parameters": _parameters(layers, contents, frozen=grouped is not None and not grouped.train_experts),
        "layers": layers,
        "routers": routers,
    }


def _provenance(config: MoeConfig, path: Path, commit: str | None) -> dict[str, Any]:
    return {
        "peft_version": config.peft_version,
        "moe_format": config.moe_format,
        "moe_version": config.moe_version,
        "commit": commit,
        "file": SAFETENSORS_WEIGHTS_NAME,
        "bytes": path.stat().st_size,
        "experts": _origins(config),
    }


def _parameters(layers: list[dict[str, Any]], contents: Contents, *, frozen: bool) -> dict[str, Any]:
    """Numbers in the file, by what they are of; the experts may be frozen."""
    experts, counts = sum(layer["parameters"] for layer in layers), contents.counts
    routers = sum(count for name, count in counts.items() if "moelora_" in name) - experts
    other = sum(counts.values()) - experts - routers
    return {
        "experts": experts,
        "experts_are_trained": not frozen,
        "routers": routers,
        "other": other,
        "trained": routers + other + (0 if frozen else experts),
        "total": experts + routers + other,
    }


def read_moe_config(adapter: str | Path, **hub_kwargs: Any) -> MoeConfig:
    """The config of an adapter of this package.

    Raises:
        FileNotFoundError: there is no such folder or Hub repository.
        ValueError: there is no adapter in it, it is broken, or it is another package's.
    """
    if not Path(adapter).exists():
        find_file(adapter, CONFIG_NAME, hub_kwargs)  # peft's error names neither folder nor Hub
    elif not (folder := Path(adapter) / (hub_kwargs.get("subfolder") or "")).joinpath(CONFIG_NAME).is_file():
        if inside := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}")):  # of a model with several
            raise ValueError(f"{str(adapter)!r} has an adapter in each of its folders {inside}; give one of these.")
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


def _layer(config: MoeConfig, contents: Contents, key: str, *, strict: bool) -> dict[str, Any]:
    prefix = f"base_model.model.{key}.moelora_bank."
    a, b = (contents.shapes.get(f"{prefix}lora_{part}.weight", ()) for part in "AB")
    experts = config.experts_at(key)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (strict and a[0] != sum(experts.ranks)):
        raise ValueError(
            f"The file has lora_A {a} and lora_B {b} at {key!r}, and the config has experts of ranks "
            f"{list(experts.ranks)} there; {FITS}."
        )
    stack, block, module = parts_of(key)
    names, empty = expert_names(config, key), len(expert_names(config, key)) - len(experts.ranks)
    return {
        "name": key,
        "stack": stack,
        "block": block,
        "module": module,
        "in_features": a[1],
        "out_features": b[0],
        "experts": names,
        "ranks": [0] * empty + list(experts.ranks),  # base experts that are nothing but a share of the weight
        "scaling": [None] * empty + list(experts.scaling),
        "total_rank": _total_rank(config, key),
        "dtype": contents.dtypes[f"{prefix}lora_A.weight"],
        "parameters": math.prod(a) + math.prod(b),
        "router": None,
    }


def _total_rank(config: MoeConfig, key: str) -> int:
    """The rank of a LoRA of the same size. Of MOELoRA it is what the config calls r, however it is split."""
    if isinstance(config, MoeLoraConfig):
        return int(config.at(config.rank_pattern, key, config.r))
    return sum(config.experts_at(key).ranks)


def expert_names(config: MoeConfig, key: str) -> list[str]:
    """Names of the experts of the module at `key`, in the order of its bank, before them base experts without matrices.

    They are numbers; `base 0` and `shared 0` for those that stand apart; AT-MoE has `group/name` and `general`.
    """
    if isinstance(config, GroupedMoeConfig):
        return by_group(config.names, general=config.general_expert is not None)[0]
    if isinstance(config, MoLoraConfig):
        n = config.routed_at(key)
        shared = config.num_shared_experts if n > 1 else 0
        return by_number(n, shared=shared)
    if isinstance(config, MedMoeLoraConfig):
        return by_number(config.routed_at(key), base=config.num_base_experts)
    return by_number(len(config.experts_at(key).ranks))


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
