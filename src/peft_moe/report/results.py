"""What a report is made of: numbers by layer, expert and task; and a few rows token by token.

Shapes: n tokens · E experts · G groups
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
MOST_BYTES = 500_000_000  # of a file to read: what 200 layers of 64 experts and 100 tasks need is a tenth of it

# What a layer has, and of which length: a number of experts, of groups, or None for a value of its own.
_EXPERTS, _GROUPS = "experts", "groups"
_LAYER: dict[str, tuple[type | tuple[type, ...], str | None]] = {
    "name": (str, None),
    "module": (str, None),
    "experts": (list, _EXPERTS),
    "ranks": (list, _EXPERTS),
    "tokens": (int, None),
    "load": (list, _EXPERTS),
    "top1": (list, _EXPERTS),
    "chosen": (list, _EXPERTS),
    "entropy": ((int, float), None),
    "effective_experts": ((int, float), None),
    "chosen_per_token": ((int, float), None),
    "tasks": (dict, None),
}
_OPTIONAL: dict[str, tuple[type | tuple[type, ...], str | None]] = {
    "block": (int, None),
    "group_of": (list, _EXPERTS),
    "group_load": (list, _GROUPS),
    "similarity": (list, _EXPERTS),
    "chance_divergence": ((int, float), None),
}


@dataclass(frozen=True)
class Routing:
    """What an adapter's routers did over some rows.

    Args:
        adapter: where it was loaded from, or its name.
        method: such as "MOELoRA".
        base_model: name of the base model; empty if it has none.
        rows: how many.
        tokens: of all rows, without padding.
        tasks: of the rows, sorted; "a+b" for rows of two tasks.
        groups: names of AT-MoE's groups; None for other methods.
        layers: by routed place, in the order of the model, a dict; see `collect`.
        findings: see `findings`.
    """

    adapter: str
    method: str
    base_model: str
    rows: int
    tokens: int
    tasks: list[str]
    groups: list[str] | None
    layers: list[dict[str, Any]]
    findings: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists, dicts and numbers, which JSON can hold."""
        return {"format": FORMAT} | {item.name: getattr(self, item.name) for item in fields(self)}

    def write(self, path: str | Path) -> None:
        """Write it as JSON."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8", newline="\n")

    @classmethod
    def read(cls, path: str | Path) -> Routing:
        """What `write` has written.

        Raises:
            ValueError: the file is something else, or of another format; the message says where.
            OSError: it cannot be opened.
        """
        path = Path(path)
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {MOST_BYTES} of any report.")
        try:
            data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON of a report ({error}); make the report again.") from None
        try:
            return cls.of(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def of(cls, data: Any) -> Routing:
        """From what `to_dict` gives.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"this is no routing of format {FORMAT} but {found!r}; make the report again.")
        kinds: dict[str, type] = {"adapter": str, "method": str, "base_model": str, "rows": int, "tokens": int}
        kinds |= {"tasks": list, "layers": list, "findings": list}
        for name, kind in kinds.items():
            _check(name, data.get(name), kind)
        for name in ("tasks", "groups"):
            if not all(isinstance(entry, str) for entry in data.get(name) or ()):
                raise ValueError(f"{name} is no list of names; make the report again.")
        for i, layer in enumerate(data["layers"]):
            _check(f"layers[{i}]", layer, dict)
            _check_layer(f"layers[{i}]", layer, len(data.get("groups") or ()))
        for i, finding in enumerate(data["findings"]):
            _check(f"findings[{i}]", finding, dict)
            for name, kind in {"level": str, "title": str, "text": str, "where": list, "numbers": dict}.items():
                _check(f"findings[{i}].{name}", finding.get(name), kind)
        values: dict[str, Any] = {item.name: data.get(item.name) for item in fields(cls)}
        return cls(**values)


@dataclass(frozen=True)
class Sample:
    """A row, token by token.

    Args:
        task: its task or tasks.
        tokens: n pieces of text, which joined read as the text; empty for a token in the middle of a character.
        prompt_tokens: how many of them are the prompt; the others are the answer.
        weights: by layer of the `Routing`, (n, E), or (1, E) where they are the same for all tokens; on the CPU.
        cut: how many tokens of the row are left out before these.
    """

    task: str | None
    tokens: list[str]
    prompt_tokens: int
    weights: list[torch.Tensor]
    cut: int = 0


Samples = list[Sample]


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _check(name: str, value: Any, kind: type | tuple[type, ...], length: int | None = None) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {str(value)[:80]!r}, which does not belong there; make the report again.")
    if length is not None and len(value) != length:  # type: ignore[arg-type]  # a list
        raise ValueError(f"{name} has {len(value)} entries and not {length}; make the report again.")  # type: ignore[arg-type]


def _check_numbers(name: str, values: list[Any]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} has {str(value)[:80]!r}, which is no number; make the report again.")


def _check_layer(where: str, layer: Mapping[str, Any], groups: int) -> None:
    _check(f"{where}.experts", layer.get("experts"), list)
    lengths = {_EXPERTS: len(layer["experts"]), _GROUPS: groups, None: None}
    there = {name: kind for name, kind in _OPTIONAL.items() if layer.get(name) is not None}
    for name, (kind, of) in (_LAYER | there).items():
        _check(f"{where}.{name}", layer.get(name), kind, lengths[of])
        if kind is list and name not in ("experts", "similarity"):
            _check_numbers(f"{where}.{name}", layer[name])
    if not all(isinstance(expert, str) for expert in layer["experts"]):
        raise ValueError(f"{where}.experts is no list of names; make the report again.")
    for row in layer.get("similarity") or ():
        _check(f"{where}.similarity", row, list, len(layer["experts"]))
        _check_numbers(f"{where}.similarity", row)
    for task, values in layer["tasks"].items():
        _check(f"{where}.tasks[{task!r}]", values, dict)
        _check(f"{where}.tasks[{task!r}].load", values.get("load"), list, len(layer["experts"]))
        _check_numbers(f"{where}.tasks[{task!r}]", [*values["load"], values.get("tokens"), values.get("entropy")])
