"""`peft-moe report`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILES = ("routing.json", "index.html")


def add_to(commands: Any) -> None:
    """Add the subcommand to those of `peft-moe`."""
    report = commands.add_parser("report", help="show what an adapter's routers do", description=run.__doc__)
    report.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id of the adapter")
    report.add_argument(
        "--data", required=True, help="a file, folder or Hub dataset of the form that training takes; loads the model"
    )
    report.add_argument(
        "--out", required=True, type=Path, help="directory to write routing.json, heat maps and index.html into"
    )
    report.add_argument("--base-model", help="base model, in place of the one that the adapter names")
    report.add_argument("--revision", help="revision of a Hub adapter")
    report.add_argument("--split", help="split of the data; by default the only one, or train")
    report.add_argument("--rows", type=int, default=64, help="rows to draw, as many of each task; at least one")
    report.add_argument("--batch-size", type=int, default=8, help="rows run at once")
    report.add_argument("--max-length", type=int, default=1024, help="tokens of a row")
    report.add_argument("--samples", type=int, default=8, help="rows to show token by token")
    report.add_argument("--no-pictures", action="store_true", help="no PNG files, which take matplotlib")
    report.add_argument("--overwrite", action="store_true", help="replace a report that is there already")
    report.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run an adapted model over rows of data and show where its routers send what: numbers, heat maps, an HTML page."""
    from dataclasses import replace

    from ..checks import check_count
    from ..data import read_examples
    from ..directory import read_config
    from ..report.collect import collect
    from ..report.page import write_page
    from .loading import Source

    for option, low in {"rows": 1, "batch_size": 1, "max_length": 1, "samples": 0}.items():
        check_count(f"--{option.replace('_', '-')}", getattr(arguments, option), "no count", low=low)
    check_free(arguments.out, overwrite=arguments.overwrite)
    write_pictures = None if arguments.no_pictures else _pictures()
    hub = {"revision": arguments.revision} if arguments.revision else {}
    config = _routed(read_config(arguments.adapter, **hub), arguments.adapter)
    examples = _draw(read_examples(arguments.data, split=arguments.split), arguments.rows)
    if config.needs_tasks:
        from ..data import check_tasks

        check_tasks(examples, config.task_names)  # before the model is loaded
    source = Source(arguments.adapter, config, base_model=arguments.base_model, hub=hub)
    routing, samples = collect(
        source.model(),
        source.tokenizer(),
        examples,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        samples=arguments.samples,
    )
    routing = replace(routing, adapter=str(arguments.adapter), base_model=str(source.base or ""))
    arguments.out.mkdir(parents=True, exist_ok=True)
    routing.write(arguments.out / "routing.json")
    numbers = routing.to_dict()
    pictures = write_pictures(numbers, arguments.out) if write_pictures else []
    write_page(numbers, samples, arguments.out / "index.html")
    show(numbers, [arguments.out / name for name in FILES], pictures)


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise an error if a directory cannot be written, or holds files of a report and `overwrite` is False."""
    file = next((path for path in (out, *out.parents) if path.is_file()), None)
    if file is not None:
        raise NotADirectoryError(f"{out} cannot be a directory, since {file} is a file; choose another directory.")
    there = [name for name in FILES if (out / name).exists()] + sorted(path.name for path in out.glob("*.png"))
    if there and not overwrite:
        raise FileExistsError(f"{out} holds {there[:5]} already; choose another directory, or pass --overwrite.")


def _pictures() -> Any:
    """What writes heat maps; an error that says what to install, before the work."""
    from ..report.heatmaps import write_pictures

    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "Heat maps need matplotlib; install it with `pip install 'peft_moe[plot]'`, or pass --no-pictures."
        ) from error
    return write_pictures


def _routed(config: Any, adapter: str) -> Any:
    """The config of an adapter of ours; a ValueError for another."""
    from ..config import MoeConfig

    if not isinstance(config, MoeConfig):
        raise ValueError(f"{adapter} is a {config.peft_type.value} adapter, which routes nothing; give one of ours.")
    return config


def _draw(examples: Any, rows: int) -> Any:
    """Some rows, as many of each task, and at least one."""
    from ..data import take_per_task, task_key

    tasks = set(map(task_key, examples["task"]))
    return take_per_task(examples.shuffle(seed=0), max(1, rows // max(1, len(tasks))))


def show(routing: Mapping[str, Any], files: Sequence[Path], pictures: Sequence[Path]) -> None:
    """Print what was found, and where it is written."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    colours = {"bad": "red", "note": "yellow", "good": "green"}
    console.print(
        _shown(
            f"{routing['method']} adapter {routing['adapter']}: {routing['rows']} rows, {routing['tokens']} tokens, "
            f"{len(routing['tasks'])} tasks, {len(routing['layers'])} routed places"
        )
    )
    for finding in routing["findings"]:
        colour = colours[finding["level"]]
        console.print(
            f"[{colour}]{finding['level']:>4}[/{colour}]  [bold]{_shown(finding['title'])}.[/bold] "
            f"{_shown(finding['text'])}"
        )
    for path in files:
        console.print(f"written: {_shown(str(path))}")
    if pictures:
        console.print(f"written: {len(pictures)} pictures in {_shown(str(pictures[0].parent))}")


def _shown(text: str) -> str:
    """Text of an adapter or of data for the console: no markup, and nothing that moves a terminal's cursor."""
    from rich.markup import escape

    return escape("".join(letter if letter.isprintable() else "\ufffd" for letter in text))
