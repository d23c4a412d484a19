"""Times of steps that are to be compared: in turns, in one process, as ratios within a round."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from math import ceil
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

import torch

# glibc gives blocks above 32 MiB back to the system and asks for them anew, and the faults of their pages, which take
# as long as a whole layer, fall on whoever has the larger tensors, differently in each run.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
SHORTEST = 60  # ms that a timing takes at least; shorter steps are repeated
LONG = 10_000  # ms of a step whose first call says well enough how long it takes


def start(arguments: argparse.Namespace) -> None:
    """Make the process ready.

    Raises:
        SystemExit: `--keep`, and the rows that are there cannot stand beside new ones.
    """
    path: Path = arguments.output
    if arguments.keep and path.exists():
        before = json.loads(path.read_text())
        if before["machine"] != _machine():
            raise SystemExit(
                f"{path} was measured on {before['machine']} and this is {_machine()}: give another --output, or leave "
                "out --keep to measure all of it anew."
            )
        alike = {key: value for key, value in _settings(arguments).items() if key not in ("rounds", "threads")}
        other = [row["settings"] for row in before["rows"] if alike != {key: row["settings"].get(key) for key in alike}]
        if other:
            raise SystemExit(f"{path} has rows of other settings, {other[0]}, than {alike}: give another --output.")
    keep_memory()
    torch.set_num_threads(arguments.threads)


def keep_memory() -> None:
    """Start the program again so that its C library, if that is glibc, keeps what it has got from the system."""
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)


def interleave(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every step in every round; each round has an order of its own; two go first, or one if long."""
    names = list(steps)
    shortest = min(_time(steps[name], 1) for name in names)
    if shortest < LONG:
        shortest = min(_time(steps[name], 1) for name in names)
    repeats = ceil(SHORTEST / shortest)
    times: dict[str, list[float]] = {name: [] for name in names}
    order = Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            times[name].append(_time(steps[name], repeats))
    return times


def _time(step: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return 1e3 * (time.perf_counter() - start) / repeats


def summary(times: Mapping[str, list[float]], ours: str = "ours") -> dict[str, Any]:
    """Medians of the times, and of the ratios of ours to each other within a round, with their quartiles."""
    ratios = {}
    for name in times:
        if name != ours:
            of_rounds = [mine / theirs for mine, theirs in zip(times[ours], times[name], strict=True)]
            low, _, high = quantiles(of_rounds, n=4, method="inclusive")
            ratios[name] = {"median": median(of_rounds), "quartiles": [low, high]}
    return {"ms": {name: median(of_name) for name, of_name in times.items()}, "ratios": ratios}


def shown(row: Mapping[str, Any], name: str) -> str:
    """A cell of a table: a ratio and the middle half of its rounds."""
    if name not in row["ratios"]:
        return "–"
    ratio = row["ratios"][name]
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"


def add_options(parser: argparse.ArgumentParser, output: Path, *, rounds: int) -> None:
    """The options that all benchmarks share."""
    parser.add_argument("--output", type=Path, default=output, help="JSON to write")
    parser.add_argument("--keep", action="store_true", help="keep the rows of --output that this run does not measure")
    parser.add_argument("--rounds", type=int, default=rounds, help="at least 2")
    parser.add_argument("--threads", type=int, default=2)


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """Write the rows and what they were measured with: settings for each row, and the machine.

    Args:
        arguments: of the command.
        rows: what was measured.
        names: the fields that tell rows apart.
    """
    settings = _settings(arguments)
    rows = [row | {"settings": settings} for row in rows]
    path: Path = arguments.output
    if arguments.keep and path.exists():
        measured = {tuple(row.get(name) for name in names) for row in rows}
        before = json.loads(path.read_text())["rows"]
        rows = [row for row in before if tuple(row.get(name) for name in names) not in measured] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row, default=str, ensure_ascii=False) for row in rows)  # one for each row
    path.write_text(f'{{"machine": {json.dumps(_machine())},\n"rows": [\n{lines}\n]}}\n')


def _machine() -> dict[str, Any]:
    """What rows have to have in common to stand side by side."""
    matrices = " and AMX" if torch.cpu._is_amx_tile_supported() else ""
    return {
        "cpus": os.cpu_count(),
        "cpu": torch.backends.cpu.get_cpu_capability() + matrices,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "peft", "transformers")},
    }


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that was not a choice of rows; a model by its name, since its path is this machine's."""
    return {
        key: Path(value).name if key == "model" else value
        for key, value in vars(arguments).items()
        if key not in ("output", "keep") and not (isinstance(value, list) and isinstance(value[0], str))
    }
