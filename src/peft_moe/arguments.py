"""Command lines of the scripts: a YAML file, flags, or both."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser


def parse_arguments(dataclass_types: Sequence[Any], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from a YAML file of their fields, from flags, or from both; flags win.

    `null` is None in flags too, for fields that may be None: `--eval_split null` takes back what the file says.

    Args:
        dataclass_types: dataclasses whose fields are the arguments, as for transformers' `HfArgumentParser`.
        argv: the words after the script's name, by default those of this process. The first one is read as a YAML file
            if it ends in .yaml or .yml.

    Returns one object per dataclass. Wrong arguments end the process with a message on stderr and status 2, as argparse
    does; an unknown key or flag is answered with the names close to it.

    Example:
        `data, training = parse_arguments([DataArguments, TrainingArguments], ["recipes/quickstart.yaml", "--seed=1"])`
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # The generated usage would name every field of every dataclass; --help still does.
    parser = _Parser(dataclass_types, usage="%(prog)s [FILE.yaml] [--NAME VALUE ...]", allow_abbrev=False)
    if words and words[0].endswith((".yaml", ".yml")):
        words[:1] = _flags(parser, words[0])
    try:
        *filled, unknown = parser.parse_args_into_dataclasses(
            args=words, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # what a dataclass says of its own values
        parser.error(str(error))
    if unknown:
        parser.error(_unknown(parser, unknown[0], "on the command line"))
    return tuple(filled)


class _Parser(HfArgumentParser):
    """With the word `null` for None, as in YAML."""

    def __init__(self, dataclass_types: Sequence[Any], **options: Any) -> None:
        super().__init__(dataclass_types, **options)
        hints: dict[str, Any] = {}
        for dataclass_type in dataclass_types:
            hints |= get_type_hints(dataclass_type)
        self.may_be_none = {name for name, hint in hints.items() if NoneType in get_args(hint)}
        for action in self._actions:
            if action.dest in self.may_be_none:
                action.type = _or_null(action.type or str)
                action.choices = action.choices and [*action.choices, "null"]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, and None for `null`."""
        namespace, rest = super().parse_known_args(args, namespace)
        for name in self.may_be_none:
            if getattr(namespace, name, None) in ("null", ["null"]):
                setattr(namespace, name, None)
        return namespace, rest


def _or_null(read: Any) -> Callable[[str], Any]:
    @wraps(read)
    def read_or_null(word: str) -> Any:
        return word if word == "null" else read(word)

    return read_or_null


def _flags(parser: _Parser, path: str) -> list[str]:
    """The file's entries as flags, so that argparse checks them too; what no flag can say becomes a default."""
    try:
        with open(path, encoding="utf-8") as file:
            entries = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"{path} cannot be read: {error}")
    if not isinstance(entries, dict):
        parser.error(f"{path} holds a {type(entries).__name__}; write one `name: value` per line.")
    actions = {action.dest: action for action in parser._actions}
    flags = []
    for name, value in entries.items():
        if name not in actions:
            parser.error(_unknown(parser, str(name), f"in {path}"))
        if value in ("null", ["null"]) and name in parser.may_be_none:
            parser.error(f"{path} has the text {value!r} for {name}, which means nothing; write null, or another name.")
        if isinstance(value, bool):
            value = _word(value, list(actions[name].choices or ()))
        if isinstance(value, list) and actions[name].nargs == "+":
            flags += [f"--{name}", *map(str, value)]
        elif value is None or isinstance(value, list):
            parser.set_defaults(**{name: value})
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _word(value: bool, choices: Sequence[Any]) -> Any:
    """The choice that YAML has read as a boolean, as it does on, off, yes and no without quotes."""
    return next((word for word in (("on", "yes") if value else ("off", "no")) if word in choices), value)


def _unknown(parser: HfArgumentParser, word: str, where: str) -> str:
    known = {action.dest for action in parser._actions}
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    close = get_close_matches(name, known)
    hint = f"did you mean {' or '.join(close)}?" if close else "--help lists the known ones."
    return f"unknown argument {word!r} {where}; {hint}"
