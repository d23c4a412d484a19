"""`peft-moe report`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .loading import Source, add_options, hub_of

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
    report.add_argument("--revision", help="revision of a Hub adapter")
    report.add_argument("--split", help="split of the data; by default the only one, or train")
    report.add_argument("--task-column", help="column with a row's task; by default task, if there is one")
    add_options(report)
    for option, number, what in (
        ("--rows", 64, "rows to draw, as many of each task; at least one of each"),
        ("--batch-size", 8, "rows run at once"),
        ("--max-length", 1024, "longest row, in tokens"),
        ("--samples", 8, "rows to show token by token"),
    ):
        report.add_argument(option, type=int, default=number, help=f"{what} (default: %(default)s)")
    report.add_argument("--no-pictures", action="store_true", help="no PNG files, which take matplotlib")
    report.add_argument("--overwrite", action="store_true", help="replace a report that is there already")
    report.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run an adapted model over rows of data and show where its routers send what: numbers, heat maps, an HTML page."""
    from dataclasses import replace

    from ..checks import check_count
    from ..directory import check_free
    from ..report.adapter import describe, read_moe_config
    from ..report.collect import look_at
    from ..report.page import write_page
    from ..report.rows import Rows

    for option, low in {"rows": 1, "batch_size": 1, "max_length": 1, "samples": 0}.items():  # all before the work
        check_count(f"--{option.replace('_', '-')}", getattr(arguments, option), "no count", low=low)
    check_free(arguments.out, overwrite=arguments.overwrite, names=_names())
    write_pictures = None if arguments.no_pictures else _pictures()
    hub = hub_of(arguments)
    config = read_moe_config(arguments.adapter, **hub)
    if not describe(arguments.adapter, **hub)["routers"]:
        raise ValueError(
            f"{arguments.adapter!r} has one expert in each layer, and no router; there is nothing to report."
        )
    examples = _examples(arguments, config)
    source = Source(arguments.adapter, config, base_model=arguments.base_model, dtype=arguments.dtype, hub=hub)
    rows = Rows.of(examples, source.tokenizer(), config, max_length=arguments.max_length)
    routing, samples = look_at(source.model(), rows, batch_size=arguments.batch_size, samples=arguments.samples)
    routing = replace(routing, adapter=str(arguments.adapter), base_model=str(source.base))
    numbers = routing.to_dict()
    with report_directory(arguments.out, overwrite=arguments.overwrite) as work:
        routing.write(work / "routing.json")
        pictures = write_pictures(numbers, work) if write_pictures else []
        write_page(numbers, samples, work / "index.html")
    show(numbers, [arguments.out / name for name in FILES], [arguments.out / path.name for path in pictures])


@contextmanager
def report_directory(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write a report into, whose files take their place in `out` at the end of the `with` block.

    Files of the report that was there and that the new one does not have are removed. An error leaves `out` as it was.

    Raises:
        FileExistsError, NotADirectoryError: as `directory.check_free`.
    """
    from ..directory import check_free, folder_near

    check_free(out, overwrite=overwrite, names=_names())
    with folder_near(out) as work:
        yield work
        out.mkdir(exist_ok=True)
        for name in _names():
            if (work / name).exists():
                (work / name).replace(out / name)
            else:
                (out / name).unlink(missing_ok=True)


def _names() -> list[str]:
    """All files that a report can have."""
    from ..report.heatmaps import NAMES

    return [*FILES, *(f"{name}.png" for name in NAMES)]


def _pictures() -> Any:
    """What writes heat maps; an error that says what to install, before the work."""
    from ..report.heatmaps import write_pictures

    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "Heat maps need matplotlib; install it with `pip install matplotlib`, or pass --no-pictures."
        ) from error
    return write_pictures


def _examples(arguments: argparse.Namespace, config: Any) -> Any:
    """Some rows of the data, as many of each task, and at least one."""
    from ..data import check_tasks, read_examples, take_per_task, task_key

    column = arguments.task_column
    needed = config.needs_tasks or column is not None
    examples = read_examples(
        arguments.data,
        split=arguments.split,
        task_column=column or "task",
        task_needed=needed,
        protocol=arguments.protocol,
    )
    tasks = set(map(task_key, examples["task"]))
    examples = take_per_task(examples.shuffle(seed=0), max(1, arguments.rows // max(1, len(tasks))))
    if config.needs_tasks:
        check_tasks(examples, config.task_names)
    return examples


def show(routing: Mapping[str, Any], files: Sequence[Path], pictures: Sequence[Path]) -> None:
    """Print what was found, and where it is written."""
    from rich.text import Text

    from ..report.layout import clean, new_console

    console = new_console()
    colours = {"bad": "red", "note": "yellow", "good": "green"}
    lines: list[Any] = [
        f"{routing['method']} adapter {routing['adapter']}: {routing['rows']} rows, {routing['tokens']} tokens, "
        f"{len(routing['tasks'])} tasks, {len(routing['layers'])} routed layers"
    ]
    for finding in routing["findings"]:
        level, title, text = (clean(finding[name]) for name in ("level", "title", "text"))
        lines.append(Text.assemble((f"{level:>4}", colours[level]), "  ", (f"{title}.", "bold"), f" {text}"))
    lines += [f"written: {path}" for path in files]
    if pictures:
        lines.append(f"written: {len(pictures)} pictures in {pictures[0].parent}")
    for line in lines:
        console.print(clean(line) if isinstance(line, str) else line, soft_wrap=True)
