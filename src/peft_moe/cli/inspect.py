"""`peft-moe inspect`."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_to(commands: Any) -> None:
    """Add the subcommand to those of `peft-moe`."""
    inspect = commands.add_parser("inspect", help="show what is in an adapter", description=run.__doc__)
    inspect.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id of the adapter")
    inspect.add_argument("--revision", help="revision of a Hub adapter")
    how = inspect.add_mutually_exclusive_group()
    how.add_argument("--each", action="store_true", help="a line for each layer, instead of one for those alike")
    how.add_argument("--json", action="store_true", help="print all of it as JSON")
    inspect.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Show what is in an adapter: method, tasks, experts, sizes, where it came from, and its gates; the base model is
    not loaded.
    """
    from ..report.adapter import describe
    from .loading import hub_of

    description = describe(arguments.adapter, **hub_of(arguments))
    if arguments.json:
        print(json.dumps(description, indent=1, allow_nan=False))
        return
    from ..report.tables import new_console, show_adapter

    show_adapter(description, new_console(), each=arguments.each)
