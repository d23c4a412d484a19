"""Values of CSV and JSON files as they are written there, where readers would make numbers and times of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig


TIMES = ("timestamp", "date", "time", "duration")
OF_ROWS = {"messages", "prompt", "completion", "instruction", "input", "output"}  # columns that make a row


def as_texts(config: CsvConfig) -> dict[str, Any]:
    """Options of a CSV reader that leave every value a text, also "NA" and "007".

    Raises:
        ValueError: a file lacks columns of the first, or has others that make rows, which would be lost.
    """
    import pandas as pd
    from datasets import Features, Value

    options = {name: value for name, value in config.pd_read_csv_kwargs.items() if name != "chunksize"}
    first, *others = (str(file) for files in config.data_files.values() for file in files)
    columns = list(pd.read_csv(first, **{**options, "nrows": 0}).columns)
    for file in others:
        found = list(pd.read_csv(file, **{**options, "nrows": 0}).columns)
        if set(columns) - set(found) or (set(found) - set(columns)) & OF_ROWS:
            raise ValueError(
                f"{first} has the columns {columns}, and {file} {found}; give all files of a folder the same ones, "
                "empty where there is nothing to say."
            )
    return {"keep_default_na": False, "features": Features({name: Value("string") for name in columns})}


def with_raw_values(splits: DatasetDict, config: JsonConfig) -> DatasetDict:
    """JSON rows whose columns of times, and of whole numbers among others, are what the files have, as texts."""
    for split, rows in splits.items():
        changed = [name for name, feature in rows.features.items() if _may_be_made(feature)]
        if changed:
            splits[split] = _put_back(rows, changed, [str(file) for file in config.data_files[split]])
    return splits


def _leaves(feature: Any) -> Iterator[Any]:
    """The features of single values in a column, also of those in lists and mappings."""
    if isinstance(feature, dict):
        for part in feature.values():
            yield from _leaves(part)
    elif hasattr(feature, "feature"):
        yield from _leaves(feature.feature)
    else:
        yield feature


def _may_be_made(feature: Any) -> bool:
    """Whether a column may have been texts, or whole numbers; within lists and mappings, texts alone."""
    from datasets import Value

    leaves = list(_leaves(feature))
    if leaves == [feature]:
        return isinstance(feature, Value) and feature.dtype.startswith((*TIMES, "float"))
    return all(isinstance(leaf, Value) for leaf in leaves) and any(leaf.dtype.startswith(TIMES) for leaf in leaves)


def _put_back(rows: Dataset, columns: list[str], files: list[str]) -> Dataset:
    raw = [row for file in files for row in _read(file)]
    if len(raw) != len(rows):
        raise ValueError(
            f"{files[0]} has columns {columns} of times or numbers, and rows that are no JSON lines and no list of "
            "objects; write one object per line."
        )
    for name in columns:
        feature, values = rows.features[name], [row.get(name) for row in raw]
        if all(value is None or isinstance(value, float) for value in values):
            continue  # numbers with a point, as they were
        texts = [_as_text(value, feature) for value in values]
        rows = rows.remove_columns(name).add_column(name, texts, feature=_of_texts(feature))
    return rows


def _as_text(value: Any, feature: Any) -> Any:
    """A file's value, with texts where a reader has made something else."""
    if value is None:
        return None
    if isinstance(feature, dict):
        return {name: _as_text(value.get(name), part) for name, part in feature.items()}
    if hasattr(feature, "feature"):
        return [_as_text(each, feature.feature) for each in value]
    return value if isinstance(value, str) or _of_texts(feature).dtype != "string" else json.dumps(value)


def _of_texts(feature: Any) -> Any:
    """The type of what `_as_text` makes."""
    from datasets import Value

    if isinstance(feature, dict):
        return {name: _of_texts(part) for name, part in feature.items()}
    if hasattr(feature, "feature"):
        return type(feature)(_of_texts(feature.feature))
    return Value("string") if feature.dtype.startswith((*TIMES, "float")) else feature


def _read(file: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, or of a list of objects."""
    import fsspec

    with fsspec.open(file, "rt", encoding="utf-8-sig", compression="infer") as opened:
        text = opened.read()
    if text.lstrip().startswith("["):
        found = json.loads(text)
        return found if isinstance(found, list) else []
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # texts may have other line breaks
    except ValueError:  # one object over several lines
        return []
