"""Where multi-task text data comes from: files, folders and Hub datasets, in the usual row shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Protocol = Literal["instruction", "bare"]
Message = dict[str, str]

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(["dev", "val", "valid", "validation"], "validation")


class MissingSplitError(ValueError):
    """The data has no split of that name."""


@dataclass(frozen=True)
class TaskInfo:
    """What the data's `tasks.json` says about one task: how to ask for it and how to score it."""

    name: str
    instruction: str | None = None
    metric: str = "exact_match"
    labels: tuple[str, ...] | None = None


def read_task_info(source: str, *, revision: str | None = None) -> dict[str, TaskInfo]:
    """Read a dataset's `tasks.json`: `{"tasks": {name: {"instruction": ..., "metric": ..., "labels": [...]}}}`.

    Args:
        source: a folder, a data file (its folder is searched) or a Hub dataset id.
        revision: branch, tag or commit of the Hub dataset.

    Returns one `TaskInfo` per task, in the file's order; nothing if there is no such file. Raises `ValueError` if it
    has another shape, or a metric that is not known, and `FileNotFoundError` if the Hub cannot be asked for it.

    Example:
        `read_task_info("data/medmulti/tiny")["icd_chapter"].metric`
    """
    path = Path(source)
    if path.exists():
        path = (path if path.is_dir() else path.parent) / "tasks.json"
    else:
        try:
            path = Path(hf_hub_download(source, "tasks.json", repo_type="dataset", revision=revision))
        except LocalEntryNotFoundError as error:  # which is an EntryNotFoundError too
            known = try_to_load_from_cache(source, "tasks.json", repo_type="dataset", revision=revision)
            if known is _CACHED_NO_EXIST:
                return {}
            raise FileNotFoundError(
                f"No data at {source!r} in a file or folder, and whether it has a tasks.json on the Hub, which says "
                f"how tasks are scored, cannot be told ({error}); go online, or use a local copy."
            ) from None
        except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            return {}  # whoever reads the rows is told what is not there
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); correct it, or take it away.") from None
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
        raise ValueError(f'{path} does not describe tasks; write {{"tasks": {{name: {{"instruction": ..., ...}}}}}}.')
    for name, task in tasks.items():
        _check_info(path, name, task)
    return {
        name: TaskInfo(
            name=name,
            instruction=task.get("instruction"),
            metric=task.get("metric") or "exact_match",
            labels=tuple(task["labels"]) if task.get("labels") else None,
        )
        for name, task in tasks.items()
    }


def _check_info(path: Path, name: str, task: Mapping[str, Any]) -> None:
    """Raise a ValueError if what a tasks.json says of a task cannot be used, long before it would be."""
    from .metrics import METRICS

    instruction, metric, labels = task.get("instruction"), task.get("metric"), task.get("labels")
    if instruction is not None and not isinstance(instruction, str):
        raise ValueError(f"{path}: the instruction of {name!r} is {instruction!r}; write a text.")
    if metric and (not isinstance(metric, str) or metric not in METRICS):
        raise ValueError(f"{path}: the metric of {name!r} is {metric!r}; use one of {list(METRICS)}.")
    if labels and (not isinstance(labels, list) or not all(isinstance(label, str) for label in labels)):
        raise ValueError(f"{path}: the labels of {name!r} are {labels!r}; write a list of texts.")


def read_examples(
    source: str,
    *,
    split: str | None = None,
    task_column: str = "task",
    task_needed: bool = True,
    protocol: Protocol = "instruction",
    revision: str | None = None,
) -> Dataset:
    """Read multi-task data as rows of `task` (a name, or a list of names if any row has several) and `messages`.

    Args:
        source: Hub dataset id; a .jsonl, .json, .csv or .parquet file; or a folder with such files named after splits.
        split: `dev` is another word for `validation`. By default the only split, else `train`. A file is the split it
            is named after, or else `train`.
        task_column: the column with the row's task name or names.
        task_needed: False to take data without this column, whose rows then have the task `""`.
        protocol: `bare` leaves the instruction of instruction/input/output rows out.
        revision: branch, tag or commit of the Hub dataset.

    A row carries `messages`, or `prompt` and `completion`, or `instruction`, `input` and `output`; the instruction may
    come from `tasks.json` instead. Raises `FileNotFoundError` if there is no such data, and `ValueError` for an unknown
    split, a file without rows or with something else, or a row (counted from 1) without task, question or answer.
    Texts in JSON files, and all values in CSV files, stay as they are written: `007` and `2020-01-01` are no number and
    no time.

    Example:
        `read_examples("data/medmulti/tiny", split="dev")[0]["messages"]`
    """
    from datasets import Features, List, Value

    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol={protocol!r} is unknown; use one of {list(get_args(Protocol))}.")
    rows = _with_names(_pick_split(_load(source, revision), source, split))
    named = task_column in rows.column_names
    if not named and task_needed:
        raise ValueError(
            f"{source} has no column {task_column!r}, only {rows.column_names}; name the column that holds each row's "
            "task with task_column=..., on the command line --task-column."
        )
    info = read_task_info(source, revision=revision)
    several = named and any(isinstance(task, list) for task in rows[task_column])

    def convert(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        filled = {key: value for key, value in row.items() if value not in (None, "", [])}
        try:
            tasks = _tasks(filled.pop(task_column, None)) if named else [""]
            messages = _messages(filled, tasks, protocol, info)
        except ValueError as error:
            raise ValueError(
                f"Row {index + 1} of {source}: {error} Besides the task it has {sorted(filled)}."
            ) from None
        return {"task": tasks if several else tasks[0], "messages": messages}

    task, message = Value("string"), {"role": Value("string"), "content": Value("string")}
    return rows.map(
        convert,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features({"task": List(task) if several else task, "messages": List(message)}),
        load_from_cache_file=False,  # a cached result would outlive a change of this package
        desc="Reading examples",
    )


def _load(source: str, revision: str | None) -> DatasetDict:
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetGenerationError
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig
    from pandas.errors import EmptyDataError, ParserError
    from pyarrow import ArrowInvalid

    from .raw_values import as_texts, with_raw_values

    if not str(source):
        raise FileNotFoundError("No data at ''; use a file, a folder, or the id of a Hub dataset.")
    path = Path(source)
    if path.is_file() and path.suffix not in BUILDERS:
        raise ValueError(f"{source} ends in {path.suffix!r}; use a file that ends in one of {list(BUILDERS)}.")
    try:
        name, where = source, dict[str, Any](revision=revision)
        if path.is_file():
            name, where = BUILDERS[path.suffix], {"data_files": {SPLITS.get(path.stem, "train"): str(path)}}
        builder = load_dataset_builder(name, **where)
        if isinstance(builder.config, CsvConfig):
            return load_dataset(name, **where, **as_texts(builder.config))
        splits = load_dataset(name, **where)
        return with_raw_values(splits, builder.config) if isinstance(builder.config, JsonConfig) else splits
    except (FileNotFoundError, ConnectionError, HFValidationError) as error:
        raise FileNotFoundError(
            f"No data at {source!r} ({error}); use a {', '.join(BUILDERS)} file, a folder with train, validation or "
            "test files of these types, or the id of a Hub dataset."
        ) from error
    except EmptyDataError as error:
        raise ValueError(f"{source} has a file without rows; fill it or take it away.") from error
    except (DatasetGenerationError, ArrowInvalid, ParserError, UnicodeDecodeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{source} has a file that cannot be read as what its name ends in: {reason}") from error
    except (StopIteration, ValueError) as error:  # the first from a JSON file of no bytes
        if isinstance(error, StopIteration) or "no data" in str(error):
            raise ValueError(f"{source} has a file without rows; fill it or take it away.") from error
        raise


def _pick_split(splits: DatasetDict, source: str, split: str | None) -> Dataset:
    wanted = split if split else next(iter(splits)) if len(splits) == 1 else "train"
    if wanted not in splits and wanted in SPLITS:  # another word for the same
        wanted = next((name for name in splits if SPLITS.get(name) == SPLITS[wanted]), wanted)
    if wanted not in splits:
        raise MissingSplitError(f"{source} has no split {split or wanted!r}; use split= one of {list(splits)}.")
    return splits[wanted]


def _with_names(rows: Dataset) -> Dataset:
    """Rows whose class labels, which are numbers to the file, are their names."""
    from datasets import ClassLabel, List, Value

    for name, feature in rows.features.items():
        label = feature.feature if isinstance(feature, List) else feature
        if isinstance(label, ClassLabel):
            values = [None if value is None else label.int2str(value) for value in rows[name]]
            texts = List(Value("string")) if isinstance(feature, List) else Value("string")
            rows = rows.remove_columns(name).add_column(name, values, feature=texts)
    return rows


def _tasks(value: Any) -> list[str]:
    names = value if isinstance(value, list) else [value]
    named = (isinstance(name, (str, int)) and not isinstance(name, bool) and str(name).strip() for name in names)
    if not names or not all(named):
        raise ValueError(f"its task is {value!r}; use a name, or a list of names.")
    return [str(name) for name in names]


def _messages(
    row: Mapping[str, Any], tasks: list[str], protocol: Protocol, info: Mapping[str, TaskInfo]
) -> list[Message]:
    if protocol == "bare":
        if not {"input", "output"} <= row.keys():
            raise ValueError("protocol='bare' leaves the instruction out and needs rows with input and output.")
        question, answer = row["input"], row["output"]
    elif "messages" in row:
        return _checked(row["messages"])
    elif {"prompt", "completion"} <= row.keys():
        question, answer = row["prompt"], row["completion"]
    elif "output" in row:
        question, answer = _instruction(row, tasks, info), row["output"]
        if "input" in row:
            question = f"{question}\n{row['input']}" if isinstance(row["input"], (str, int, float)) else row["input"]
    else:
        raise ValueError("it has no question and answer; use messages, or prompt and completion, or input and output.")
    if isinstance(question, (list, dict)) or isinstance(answer, (list, dict)):
        raise ValueError("its prompt, input or answer is no text; write a text, or a conversation as 'messages'.")
    return _checked([{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)}])


def _instruction(row: Mapping[str, Any], tasks: list[str], info: Mapping[str, TaskInfo]) -> str:
    if "instruction" in row:
        if isinstance(row["instruction"], (list, dict)):
            raise ValueError("its instruction is no text; write a text, or a conversation as 'messages'.")
        return str(row["instruction"])
    known = [text for task in tasks if task in info and (text := info[task].instruction)]
    if not known:
        raise ValueError(
            f"it has no instruction, nor has a tasks.json for {tasks}; add one, or ask with the input alone: "
            "protocol='bare', on the command line --protocol bare."
        )
    return "\n".join(known)


def _checked(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError("its messages are no list of them; use [{'role': ..., 'content': ...}, ...].")
    pairs: list[Message] = [{key: message.get(key, "") for key in ("role", "content")} for message in messages]
    if not all(isinstance(text, str) for pair in pairs for text in pair.values()):
        raise ValueError("its messages are not all a role and a text; use {'role': ..., 'content': ...} for each.")
    if len(pairs) < 2 or pairs[-1]["role"] != "assistant" or not pairs[-1]["content"].strip():
        raise ValueError("it has no answer; the last of two or more messages has to be the assistant's and not empty.")
    return pairs
