"""Whether what a config names is in a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from .config import MoeConfig

# What peft itself adds to `modules_to_save`, by task type: a model has one of them.
HEADS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}


def warn_unmatched(config: MoeConfig, keys: Sequence[str]) -> None:
    """Warn of keys of `num_experts_pattern` that match none of the targeted modules, as peft does for `rank_pattern`.

    Not of `target_modules` and `layers_to_transform`: people have one list for models of many kinds.
    """
    unmatched = [p for p in config.num_experts_pattern if not any(get_pattern_key([p], key) == p for key in keys)]
    if unmatched and keys:  # with none at all, peft raises an error
        message = f"num_experts_pattern keys {unmatched} match nothing and have no effect."
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def settle_patterns(config: MoeConfig, keys: Sequence[str]) -> None:
    """Let patterns give the modules at `keys` the same values when they have been saved, which sorts them.

    The first that matches a module counts. Where another one would come first in alphabetical order, the pattern is
    replaced by one with a name of its own for each module.

    Raises:
        ValueError: names of modules end in those of others, so that this would not be told apart either.
    """
    for name in ("rank_pattern", "alpha_pattern", "num_experts_pattern"):
        pattern: dict[str, float] = getattr(config, name) or {}
        values = {key: pattern[found] for key in keys if (found := get_pattern_key(list(pattern), key)) in pattern}
        if _sorted_values(pattern, keys) == values:
            continue
        matched = {get_pattern_key(list(pattern), key) for key in keys}
        settled = values | {entry: value for entry, value in pattern.items() if entry not in matched}
        if _sorted_values(settled, keys) != values:
            raise ValueError(
                f"{name}={pattern!r}: several keys match the same module, the first counts, and a saved config has "
                "them in alphabetical order, where another comes first; write keys of which one alone matches a module."
            )
        setattr(config, name, settled)


def _sorted_values(pattern: Mapping[str, float], keys: Sequence[str]) -> dict[str, float]:
    """What the modules at `keys` get from a pattern that has been saved."""
    found = {key: get_pattern_key(sorted(pattern), key) for key in keys}
    return {key: pattern[entry] for key, entry in found.items() if entry in pattern}


def check_saved_modules(config: MoeConfig, keys: Sequence[str]) -> None:
    """Raise a ValueError if no module that is to be trained whole is in the model; peft would train nothing then.

    Some may be missing, as in lists for models of many kinds.
    """
    names = set(config.modules_to_save or ()) - HEADS.get(str(config.task_type), set())
    if names and not any(key.endswith(name) for name in names for key in keys):
        raise ValueError(
            f"modules_to_save={config.modules_to_save!r}: no module of the model is called {sorted(names)[0]!r}, so "
            "that nothing would be trained and saved for it; correct the name, or leave it out."
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
