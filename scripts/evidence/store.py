"""The files of runs: a JSON file for each that is done, and folders of adapters. They are there whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plan import MEASURES, Run
from setups import Setup


class Store:
    """What is done, as files say.

    Args:
        setup: says where adapters go.
        results: folder of the JSON files.
    """

    def __init__(self, setup: Setup, results: Path) -> None:
        self.setup, self.results = setup, results
        self.records: dict[str, dict[str, Any]] = {}
        for path in sorted(results.glob("*/*.json")):
            record = read(path)
            self.records[record["id"]] = brief(record)

    def path(self, run: Run) -> Path:
        """The JSON file of a run."""
        return self.results / run.experiment / f"{run.id.replace('/', '_')}.json"

    def log(self, run: Run) -> Path:
        """What a run prints."""
        return Path(self.setup.folder, "logs", f"{run.id.replace('/', '_')}.log")

    def scores(self) -> dict[str, float]:
        """Mean scores of the runs that are done."""
        return {name: record["score"] for name, record in self.records.items()}

    def has_adapter(self, run_id: str) -> bool:
        """Whether the adapter of a run is there."""
        return Path(self.setup.adapter(run_id)).is_dir()

    def add(self, run: Run) -> bool:
        """Take note of a run that has ended; False if it has left no record."""
        if self.path(run).exists():
            self.records[run.id] = brief(read(self.path(run)))
        return self.path(run).exists()

    def stale(self, runs: list[Run]) -> list[str]:
        """Ids of runs that were done with other settings than they have now."""
        return stale(runs, self.records)


def stale(runs: Iterable[Run], records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Ids of runs whose records, by id, have other settings than they have now."""
    return [run.id for run in runs if run.id in records and records[run.id]["settings"] != plain(run.settings)]


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are after a way through JSON."""
    return json.loads(json.dumps(settings))


def brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is needed of a record to go on, without its answers."""
    kept = {name: record[name] for name in ("experiment", "system", "purpose", "settings")}
    seconds = record["seconds"]
    kept |= {"cpu": seconds["total_cpu"], "answer_cpu": seconds["answer_cpu"]}
    kept["train_cpu"] = seconds.get("train_cpu", 0.0)  # absent where nothing is trained
    kept["measure"] = [what for what in MEASURES if what in record]
    return kept | {"score": record["scores"]["mean"]["score"]}


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        ValueError: the file is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        brief(record)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a run ({error!r}); delete it, and the run is done again.") from None
    return record


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, a line for each entry; whoever reads finds all of it or none, even if this process is killed."""
    lines = ",\n".join(
        f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False, allow_nan=False)}" for k, v in record.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(f"{{\n{lines}\n}}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def new_folder(folder: str) -> Path:
    """An empty folder beside `folder`, in which to make what `finish` puts there; what stands in either is removed."""
    partial = Path(f"{folder}.partial")
    for old in (partial, Path(folder)):
        if old.exists():
            shutil.rmtree(old)
    partial.mkdir(parents=True)
    return partial


def finish(partial: Path) -> None:
    """Put a folder of `new_folder` in its place."""
    partial.rename(str(partial).removesuffix(".partial"))
