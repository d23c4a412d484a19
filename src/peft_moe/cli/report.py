"""`peft-moe report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

WRITTEN = ("routing.json", "index.html")


def add_to(commands: Any) -> None:
    """Add the subcommand to those of `peft-moe`."""
    report = commands.add_parser("report", help="show what routers do with your data", description=run.__doc__)
    report.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id of the adapter")
    report.add_argument("--data", required=True, help="file, folder or Hub dataset of the form that training takes")
    report.add_argument("--out", required=True, type=Path, help="directory to write")
    report.add_argument("--split", default="test", help="split of the data")
    report.add_argument("--rows", type=int, default=64, help="rows to draw")
    report.add_argument("--samples", type=int, default=8, help="of these, rows to show token by token")
    report.add_argument("--batch-size", type=int, default=8, help="rows run at once")
    report.add_argument("--max-length", type=int, default=1024, help="tokens of a row")
    report.add_argument("--base-model", help="base model, in place of the one that the adapter names")
    report.add_argument("--revision", help="revision of a Hub adapter")
    report.add_argument("--no-pictures", action="store_true", help="write no PNG files, which need matplotlib")
    report.add_argument("--overwrite", action="store_true", help="replace a report that is there already")
    report.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run an adapter over rows, and write what its routers did: routing.json, pictures, and a page (index.html)."""
    from importlib.util import find_spec

    from .. import MoeConfig
    from ..checks import check_count
    from ..data import read_examples
    from ..directory import read_config
    from ..report.collect import collect
    from ..report.page import write_page
    from .loading import Source

    for option in ("rows", "batch_size", "max_length", "samples"):
        check_count(f"--{option.replace('_', '-')}", getattr(arguments, option), "no count")
    _check_free(arguments.out, overwrite=arguments.overwrite)
    if not arguments.no_pictures and find_spec("matplotlib") is None:
        raise ValueError(
            "Pictures need matplotlib: pip install 'peft_moe[plot]', or leave them out with --no-pictures."
        )
    hub = {"revision": arguments.revision} if arguments.revision else {}
    config = read_config(arguments.adapter, **hub)
    if not isinstance(config, MoeConfig):
        raise ValueError(
            f"{arguments.adapter} is a {config.peft_type} adapter, and has no routers; give one of peft_moe."
        )
    examples = read_examples(arguments.data, split=arguments.split).shuffle(seed=0)
    examples = examples.select(range(min(arguments.rows, len(examples))))
    source = Source(arguments.adapter, config, base_model=arguments.base_model, hub=hub)
    tokenizer = source.tokenizer()
    routing, samples = collect(
        source.model(),
        tokenizer,
        examples,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        samples=arguments.samples,
    )
    routing["adapter"] = str(arguments.adapter)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "routing.json").write_text(json.dumps(routing, ensure_ascii=False), encoding="utf-8")
    if not arguments.no_pictures:
        from ..report.heatmaps import write_pictures

        write_pictures(routing, arguments.out)
    write_page(routing, samples, arguments.out / "index.html")
    _print(routing)
    print(f"The report is in {arguments.out}; open {arguments.out / 'index.html'} in a browser.")


def _check_free(out: Path, *, overwrite: bool) -> None:
    if out.is_file():
        raise NotADirectoryError(f"{out} is a file; give a directory to write.")
    there = [name for name in WRITTEN if (out / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{out} holds {there} already; choose another directory, or pass --overwrite.")


def _print(routing: dict[str, Any]) -> None:
    """The findings, on the console."""
    from rich.console import Console
    from rich.text import Text

    console, styles = Console(highlight=False), {"bad": "bold red", "note": "yellow", "good": "green"}
    for finding in routing["findings"]:
        line = Text(f"{finding['level']:>4}  ", style=styles[finding["level"]])
        console.print(
            line.append(f"{finding['title']}. ", style="bold").append(finding["text"], style="not bold default")
        )
