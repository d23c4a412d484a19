"""Plugins for trainers that have a place for them, a module each that its host imports; and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel, get_peft_config, get_peft_model
from torch import nn

from ..config import MoeConfig, PeftMoeType


def config_from(fields: Mapping[str, Any], task_type: str | None = "CAUSAL_LM") -> MoeConfig:
    """The config that a host's settings describe.

    Args:
        fields: `peft_type`, such as `"molora"`, and the fields of that config.
        task_type: peft's, unless the fields have it.

    Raises:
        ValueError: another type than ours, wrong fields, or experts that are chosen by tasks without a `default_task`.
    """
    known = [member.value for member in PeftMoeType]
    peft_type = str(fields.get("peft_type")).upper()
    if peft_type not in known:
        raise ValueError(f"peft_type={fields.get('peft_type')!r} is none of peft_moe's; give one of {known}.")
    try:
        config: Any = get_peft_config({"task_type": task_type, **fields, "peft_type": peft_type})
    except TypeError as error:  # what a dataclass says of a field that it does not have
        raise ValueError(f"The settings of {peft_type} do not fit: {error}.") from None
    check_one_task(config)
    return config


def check_one_task(config: Any) -> None:
    """Raise a ValueError if rows would need tasks, which the host's own collators drop."""
    if getattr(config, "needs_tasks", False) and config.default_task is None:
        raise ValueError(
            f"{config.peft_type.value} chooses experts by the task of each row, and this trainer's collators drop the "
            f"rows' tasks. Set default_task to one of {config.task_names}, which is then the task of all rows; train "
            "on several with transformers' Trainer or TRL (docs/integrations.md), or use a type that routes by tokens."
        )


def adapt(model: nn.Module, config: MoeConfig, **options: Any) -> PeftModel:
    """`get_peft_model`, with the default task chosen: it is what is meant, and not what rows get that lost theirs."""
    adapted: Any = model
    return choose_default(get_peft_model(adapted, config, **options))


def choose_default(model: PeftModel) -> PeftModel:
    """The model, with its config's default task chosen if it has one."""
    adapted: Any = model
    task = getattr(adapted.active_peft_config, "default_task", None)
    if task is not None:
        adapted.set_task(task)
    return model
