"""Values of CSV and JSON files as they are written there, where readers would make numbers and times of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig


def as_texts(config: CsvConfig) -> dict[str, Any]:
    """Options of a CSV reader that leave every value a text, also "NA" and "007".

    Raises:
        ValueError: files with different columns, of which the reader would take those of the first.
    """
    import pandas as pd
    from datasets import Features, Value

    options = {name: value for name, value in config.pd_read_csv_kwargs.items() if name != "chunksize"}
    first, *others = (str(file) for files in config.data_files.values() for file in files)
    columns = list(pd.read_csv(first, **{**options, "nrows": 0}).columns)
    for file in others:
        found = list(pd.read_csv(file, **{**options, "nrows": 0}).columns)
        if set(found) != set(columns):
            raise ValueError(
                f"{first} has the columns {columns}, and {file} {found}; give all files of a folder the same ones, "
                "empty where there is nothing to say."
            )
    return {"keep_default_na": False, "features": Features({name: Value("string") for name in columns})}


def with_raw_values(splits: DatasetDict, config: JsonConfig) -> DatasetDict:
    """JSON rows whose columns of times, and of whole numbers among others, are what the files have, as texts."""
    for split, rows in splits.items():
        changed = [name for name, feature in rows.features.items() if any(map(_is_made, _types(feature)))]
        if changed:
            splits[split] = _put_back(rows, changed, [str(file) for file in config.data_files[split]])
    return splits


def _types(feature: Any) -> Iterator[str]:
    """The types of the values in a column, also of those in lists and mappings."""
    if isinstance(feature, dict):
        for part in feature.values():
            yield from _types(part)
    elif hasattr(feature, "feature"):
        yield from _types(feature.feature)
    else:
        yield getattr(feature, "dtype", "")


def _is_made(dtype: str) -> bool:
    """Whether values of this type may have been texts, or whole numbers."""
    return dtype.startswith(("timestamp", "date", "time", "duration", "float"))


def _put_back(rows: Dataset, columns: list[str], files: list[str]) -> Dataset:
    raw = [row for file in files for row in _read(file)]
    if len(raw) != len(rows):
        raise ValueError(
            f"{files[0]} has columns {columns} of times or numbers, and rows that are no JSON lines and no list of "
            "objects; write one object per line."
        )
    for name in columns:
        feature, values = rows.features[name], [row.get(name) for row in raw]
        if all(isinstance(value, float) for whole in values for value in _made(whole, feature)):
            continue  # numbers with a point, as they were
        texts = [_as_text(value, feature) for value in values]
        rows = rows.remove_columns(name).add_column(name, texts, feature=_of_texts(feature))
    return rows


def _made(value: Any, feature: Any) -> Iterator[Any]:
    """The values in a file's value that a reader has made something else of."""
    if value is None:
        return
    if isinstance(feature, dict):
        for name, part in feature.items():
            yield from _made(value.get(name), part)
    elif hasattr(feature, "feature"):
        for each in value:
            yield from _made(each, feature.feature)
    elif _is_made(feature.dtype):
        yield value


def _as_text(value: Any, feature: Any) -> Any:
    """A file's value, with texts where a reader has made something else."""
    if value is None:
        return None
    if isinstance(feature, dict):
        return {name: _as_text(value.get(name), part) for name, part in feature.items()}
    if hasattr(feature, "feature"):
        return [_as_text(each, feature.feature) for each in value]
    return json.dumps(value) if _is_made(feature.dtype) and not isinstance(value, str) else value


def _of_texts(feature: Any) -> Any:
    """The type of what `_as_text` makes."""
    from datasets import Value

    if isinstance(feature, dict):
        return {name: _of_texts(part) for name, part in feature.items()}
    if hasattr(feature, "feature"):
        return type(feature)(_of_texts(feature.feature))
    return Value("string") if _is_made(feature.dtype) else feature


def _read(file: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, or of a list of objects."""
    import fsspec

    with fsspec.open(file, "rt", encoding="utf-8-sig") as opened:
        text = opened.read()
    if text.lstrip().startswith("["):
        found = json.loads(text)
        return found if isinstance(found, list) else []
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # texts may have other line breaks
    except ValueError:  # one object over several lines
        return []
