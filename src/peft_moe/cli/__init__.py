"""The command `peft-moe`: a module for each of its subcommands."""

from __future__ import annotations

import argparse
import sys

from ..output import print_any_text
from . import check, compose, fold, inspect, report

COMMANDS = (fold, compose, inspect, check, report)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="peft-moe", description="Work with mixture-of-LoRA-experts adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    arguments = parser.parse_args(argv)
    print_any_text()
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        from ..report.layout import clean

        # names and texts of an adapter or of data may be in it
        print(f"peft-moe: {clean(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    return 0
