"""Values of CSV and JSON files as they are written there, where readers would make numbers and times of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig


def as_texts(config: CsvConfig) -> dict[str, Any]:
    """Options of a CSV reader that leave every value a text, also "NA" and "007"."""
    import pandas as pd
    from datasets import Features, Value

    first = next(iter(config.data_files.values()))[0]
    options = {name: value for name, value in config.pd_read_csv_kwargs.items() if name != "chunksize"}
    columns = pd.read_csv(first, **{**options, "nrows": 0}).columns
    return {"keep_default_na": False, "features": Features({name: Value("string") for name in columns})}


def with_raw_values(splits: DatasetDict, config: JsonConfig) -> DatasetDict:
    """JSON rows whose columns of times, and of whole numbers among others, are what the files have, as texts."""
    for split, rows in splits.items():
        changed = [name for name, feature in rows.features.items() if _is_made(getattr(feature, "dtype", ""))]
        if changed:
            splits[split] = _put_back(rows, changed, [str(file) for file in config.data_files[split]])
    return splits


def _is_made(dtype: str) -> bool:
    """Whether a column of this type may have been texts, or whole numbers."""
    return dtype.startswith(("timestamp", "date", "time", "duration", "float"))


def _put_back(rows: Dataset, columns: list[str], files: list[str]) -> Dataset:
    from datasets import Value

    raw = [row for file in files for row in _read(file)]
    if len(raw) != len(rows):
        raise ValueError(
            f"{files[0]} has columns {columns} of times or numbers, and rows that are no JSON lines and no list of "
            "objects; write one object per line."
        )
    for name in columns:
        values = [row.get(name) for row in raw]
        if all(value is None or isinstance(value, float) for value in values):
            continue  # numbers with a point, as they were
        texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        rows = rows.remove_columns(name).add_column(name, texts, feature=Value("string"))
    return rows


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
