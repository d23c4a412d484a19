"""What the fields of a config may be: each check raises a ValueError with the field, its value and what to give."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

MOST = 1_000_000  # of anything that is counted


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, and not True or False."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold, and not True or False."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -sys.float_info.max <= value <= sys.float_info.max


def check_count(name: str, value: Any, what: str, *, low: int = 1) -> None:
    """Raise a ValueError unless `value` is a whole number from `low` up, and one that memory could hold things for."""
    if not is_whole(value) or not low <= value <= MOST:
        limits = f"from {low} to {MOST}" if is_whole(value) and value > MOST else f"from {low} up"
        raise ValueError(f"{name}={value!r} is {what}; give a whole number {limits}.")


def check_fraction(name: str, value: Any, what: str, *, low: float = 0, high: float = math.inf) -> None:
    """Raise a ValueError unless `value` is a number with `low <= value <= high`, finite."""
    if not is_number(value) or not low <= value <= high:
        limits = f"from {low:g} up" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise ValueError(f"{name}={value!r} is {what}; give a number {limits}.")


def check_flag(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is a yes or no; give True or False.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of the names in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} is not known; use one of {choices}.")


def check_text(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a text or None."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}; give a text, or leave it out.")


def as_names(name: str, value: object, *, may_be_empty: bool = False) -> list[str]:
    """A list, tuple or set of names as a list; raise a ValueError if it is none. Sets have no order of their own."""
    names = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"{name}={value!r}; give a list of names, such as ['this', 'that'].")
    if not names and not may_be_empty:
        raise ValueError(f"{name}={value!r} names nothing; give at least one name, or leave it out.")
    return list(names)


def check_regex(name: str, value: str) -> None:
    """Raise a ValueError unless peft can match names of modules with `value`."""
    try:
        re.compile(rf"(.*\.)?({value})$")  # as peft puts it together
    except re.error as error:
        raise ValueError(f"{name}={value!r} is no regex ({error}); names of modules are matched with it.") from None


def check_modules(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a regex for whole names, or a list, tuple or set of name endings."""
    if isinstance(value, str) and value:
        check_regex(name, value)
    elif not isinstance(value, (list, tuple, set)) or not all(isinstance(n, str) and n for n in value):
        raise ValueError(f"{name}={value!r}; give a list of name endings, or a regex for whole names as a text.")


def check_layers(value: object) -> None:
    """Raise a ValueError unless `value` is an index of a layer or a list of them."""
    indices: list[Any] | tuple[Any, ...] = value if isinstance(value, (list, tuple)) else [value]
    if not all(is_whole(i) and i >= 0 for i in indices):
        raise ValueError(
            f"layers_to_transform={value!r}; give the index of a layer, counted from 0, or a list of them."
        )


def check_pattern(name: str, value: object) -> dict[str, Any]:
    """A `*_pattern` field as a dict; raise a ValueError unless it maps names or regexes."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r}; give a mapping such as {{'q_proj': 4}}, or leave it out.")
    for key in value or ():
        if not isinstance(key, str) or not key:
            raise ValueError(f"{name} has the key {key!r}; keys are names of modules, or regexes.")
        check_regex(f"A key of {name}", key)
    return dict(value or {})


def check_token_indices(value: object) -> None:
    """Raise a ValueError unless `value` is a list of token ids, or such lists by name of an embedding."""
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    named = not isinstance(value, Mapping) or all(isinstance(key, str) and key for key in value)
    if not named or not all(isinstance(ids, list) and all(is_whole(i) and i >= 0 for i in ids) for ids in lists):
        raise ValueError(
            f"trainable_token_indices={value!r}; give a list of token ids from 0 up, or such lists by name of the "
            "embedding: {'embed_tokens': [5, 6]}."
        )


def check_tasks(tasks: object) -> list[str] | int:
    """The value of a `tasks` field; raise a ValueError unless it is a list of unique names or a number."""
    if isinstance(tasks, int):
        check_count("tasks", tasks, "a number of tasks or a list of names")
        return tasks
    # a set has no order that would outlive this process
    if not isinstance(tasks, (list, tuple)) or not tasks or not all(isinstance(t, str) and t for t in tasks):
        raise ValueError(f"tasks={tasks!r}; give a list of the tasks' names, or how many there are.")
    names = list(tasks)
    twice = sorted({t for t in names if names.count(t) > 1})
    if twice:
        raise ValueError(f"tasks names {twice} more than once; a task has one id, so name each once.")
    return names
