"""Putting trained LoRAs together: AT-MoE adapters from LoRAs on disk, on the Hub or in a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .directory import adapter_directory, check_not_over
from .grouped import GroupedMoeConfig, read_expert
from .grouped.config import check_groups
from .grouped.fit import check_expert
from .grouped.sources import Expert, check_source, read_loaded
from .targets import modules_outside_adapters

# The class of a model of transformers for peft's task type.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    None: "AutoModel",
}


def from_loras(
    model: nn.Module,
    groups: Mapping[str, Any],
    *,
    general_expert: Any = None,
    adapter_name: str = "default",
    **fields: Any,
) -> PeftModel:
    """An AT-MoE adapter (arXiv 2410.10896) on a model, whose experts are trained LoRAs.

    Args:
        model: the base model; or a `PeftModel` with stock LoRAs, whose adapters can be sources by their names. They
            are taken out of the model, which then has the new adapter alone.
        groups: sources of the experts by group and name, as in `GroupedMoeConfig`.
        general_expert: the source of the general expert, or None.
        adapter_name: name of the new adapter.
        fields: other fields of `GroupedMoeConfig`; `task_type` is by default that of the first expert.

    Returns:
        the model with the adapter, as from `get_peft_model`.

    Raises:
        ValueError, FileNotFoundError: sources that cannot be experts, with the reason; the model is as it was.
        TypeError: no model, or a field that `GroupedMoeConfig` does not have.

    Example:
        >>> model = PeftModel.from_pretrained(base_model, "loras/triage", adapter_name="triage")
        >>> model.load_adapter("loras/concise", "concise")
        >>> model = from_loras(model, {"function": {"triage": "triage"}, "style": {"concise": "concise"}})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"from_loras takes a model, and {model!r} is a {type(model).__name__}; load the base model first."
        )
    loaded = model if isinstance(model, PeftModel) else None
    if loaded is not None and not isinstance(loaded.base_model, LoraModel):
        raise ValueError(
            f"The model has a {type(loaded.base_model).__name__} already; give the base model, or one with stock LoRAs."
        )
    config, experts = _read_all(groups, general_expert, fields, loaded)
    if loaded is None:
        return cast(PeftModel, get_peft_model(cast(Any, model), config, adapter_name=adapter_name))
    base = loaded.get_base_model()
    if any(layer.merged for layer in base.modules() if isinstance(layer, BaseTunerLayer)):
        raise ValueError("LoRAs are merged into the model's weights, where they stay; call unmerge_adapter() first.")
    # what get_peft_model would find out only after the LoRAs have been taken out
    modules = dict(modules_outside_adapters(base))
    for expert in experts:
        name = str(expert.origin["source"])
        check_expert(name, expert, modules, getattr(base, "name_or_path", None) if config.check_base_model else None)
    before = [(module, dict(module._modules)) for module in base.modules()]
    try:
        return cast(PeftModel, get_peft_model(cast(Any, loaded.unload()), config, adapter_name=adapter_name))
    except Exception:
        for module, children in before:  # put the LoRAs back
            module._modules.update(children)
        cast(Any, base).peft_config = loaded.peft_config
        raise


def _read_all(
    groups: Any, general_expert: Any, fields: Mapping[str, Any], loaded: PeftModel | None = None
) -> tuple[GroupedMoeConfig, list[Expert]]:
    """A config with the experts themselves as sources, so that they are read once; and these experts."""

    def read(name: str, source: Any) -> Expert | None:
        source = check_source(name, source)
        if source is None:
            return None
        if loaded is not None and isinstance(source, Mapping) and source["source"] in loaded.peft_config:
            return read_loaded(loaded, source["source"])
        return read_expert(source, name=name)

    found = {
        group: {name: read(f"Expert {group}/{name}", source) for name, source in experts.items()}
        for group, experts in check_groups(groups).items()
    }
    general = read("The general expert", general_expert)
    experts = [expert for part in (*found.values(), {"": general}) for expert in part.values() if expert]
    task_type = experts[0].task_type if experts else None
    config = GroupedMoeConfig(groups=found, general_expert=general, **{"task_type": task_type, **fields})
    return config, experts


def compose(recipe: str | Path, out_dir: str | Path, *, base_model: str | None = None, overwrite: bool = False) -> Path:
    """Write an AT-MoE adapter from a YAML file of `GroupedMoeConfig` fields; the base model's weights are not loaded.

    Args:
        recipe: the file; `base_model_name_or_path` in it names the base model, if the experts do not, and `base_class`
            the class of transformers that makes it, if that does not follow from the experts' task type. Relative paths
            are from where the command runs.
        out_dir: where to write; made if missing.
        base_model: another base model.
        overwrite: replace the adapter and README.md that are in `out_dir`.

    Returns:
        `out_dir`.

    Raises:
        ValueError: fields that `GroupedMoeConfig` does not have or take, sources that cannot be experts, or `out_dir`
            is one of them.
        FileNotFoundError: no such file or source.
        FileExistsError: `out_dir` holds files of these names, and `overwrite` is False.

    Example:
        >>> compose("groups.yaml", "composed")
        >>> PeftModel.from_pretrained(base_model, "composed")
    """
    out = Path(out_dir)
    with adapter_directory(out, overwrite=overwrite) as work:
        _composed(Path(recipe), base_model, out).save_pretrained(str(work))
    return Path(out_dir)


def _composed(recipe: Path, base_model: str | None, out: Path) -> PeftModel:
    """The adapter that is to be written to a directory, on a base model without weights."""
    fields = _read_recipe(recipe)
    base_class = fields.pop("base_class", None)
    named = fields.pop("base_model_name_or_path", None)
    groups, general = fields.pop("groups", None), fields.pop("general_expert", None)
    if unknown := sorted(fields.keys() - {f.name for f in dataclasses.fields(GroupedMoeConfig)}):
        raise ValueError(f"{recipe} has {unknown}, which are no fields of GroupedMoeConfig.")
    config, experts = _read_all(groups, general, fields)
    check_not_over(out, [Path(e.origin["source"], e.origin.get("subfolder") or "") for e in experts])
    base = base_model or named or next((e.base_model for e in experts if e.base_model), None)
    if base is None:
        raise ValueError(
            "Neither the file nor an expert names the base model; add base_model_name_or_path to the file."
        )
    class_name = base_class or AUTO_CLASSES.get(config.task_type, "AutoModel")
    model = cast(PeftModel, get_peft_model(cast(Any, _skeleton(base, class_name)), config))
    if lost := [name for name, tensor in get_peft_model_state_dict(model).items() if tensor.is_meta]:
        raise ValueError(
            f"The adapter would hold {lost[0]!r}, a copy from the base model, whose weights are not loaded here; make "
            "it with from_loras, or compose with bias='none' and without modules_to_save (a task_type of classifiers "
            "adds their heads)."
        )
    return model


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(
            f"{path} holds a {type(fields).__name__}; write one `name: value` per line, groups among them."
        )
    return fields


def _skeleton(base: str, class_name: str) -> nn.Module:
    """The base model without weights, made from its config alone."""
    import transformers

    auto: Any = getattr(transformers, str(class_name), None)
    if not hasattr(auto, "from_config"):
        raise ValueError(
            f"transformers has no {class_name!r} that makes models from configs; set base_class to a class such as "
            "AutoModelForCausalLM."
        )
    config = transformers.AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = auto.from_config(config)
    model.config.name_or_path = base
    model.name_or_path = base
    return cast(nn.Module, model)
