"""Whether what a config names is in a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn

from .config import MoeConfig
from .schedule import layer_of

# What peft itself adds to `modules_to_save`, by task type: a model has one of them.
HEADS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}


def warn_unmatched(config: MoeConfig, keys: Sequence[str]) -> None:
    """Warn of what a config names and the targeted modules at `keys` do not have, as peft does for `rank_pattern`."""
    for name in ("num_experts_pattern", "target_modules", "layers_to_transform") if keys else ():
        unmatched = [entry for entry in _entries(config, name) if not _matches(name, entry, keys)]
        if unmatched:
            kind = "keys " if name.endswith("_pattern") else ""
            warnings.warn(
                f"{name} {kind}{unmatched} match no targeted module and have no effect.", RuntimeWarning, stacklevel=2
            )


def _entries(config: MoeConfig, name: str) -> list[Any]:
    value = getattr(config, name)
    if value is None or isinstance(value, str):
        return []
    return [value] if isinstance(value, int) else sorted(value)


def _matches(name: str, entry: Any, keys: Sequence[str]) -> bool:
    if name == "num_experts_pattern":
        return any(get_pattern_key([entry], key) == entry for key in keys)
    if name == "target_modules":
        return entry == INCLUDE_LINEAR_LAYERS_SHORTHAND or any(k == entry or k.endswith(f".{entry}") for k in keys)
    return any(layer is not None and layer[1] == entry for layer in map(layer_of, keys))


def check_saved_modules(config: MoeConfig, keys: Sequence[str]) -> None:
    """Raise a ValueError if a module to be trained whole is not in the model; peft would train nothing then."""
    added = HEADS.get(str(config.task_type), set())
    for name in set(config.modules_to_save or ()) - added:
        if not any(key.endswith(name) for key in keys):
            raise ValueError(
                f"modules_to_save={config.modules_to_save!r}: no module of the model is called {name!r}, so that "
                "nothing would be trained and saved for it; correct the name, or leave it out."
            )


def check_trained_tokens(config: MoeConfig, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Raise a ValueError if a token that is to be trained is beyond the model's embedding."""
    given = config.trainable_token_indices
    if not given:
        return
    for name, ids in given.items() if isinstance(given, dict) else [(None, given)]:
        if name is None:  # that of the input, as peft has it
            embeddings: Any = getattr(model, "get_input_embeddings", None)
            found = embeddings() if callable(embeddings) else None
        else:
            found = next((module for key, module in modules.items() if key.endswith(name)), None)
        size = getattr(found, "num_embeddings", None)
        if size is not None and any(index >= size for index in ids):
            raise ValueError(
                f"trainable_token_indices={given!r}: the embedding has the tokens 0 to {size - 1}; give ids of these, "
                "or call model.resize_token_embeddings first."
            )
