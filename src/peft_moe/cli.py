"""The command `peft-moe`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 1 with one line on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyError as error:  # what peft makes of an adapter type it does not know
        print(f"peft-moe: {arguments.adapter} is an adapter of type {error}, which peft does not know", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"peft-moe: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-moe", description="Work with mixture-of-LoRA-experts adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fold = commands.add_parser("fold", help="write tasks of an adapter as stock LoRAs", description=_fold.__doc__)
    fold.add_argument(
        "adapter", metavar="ADAPTER", help="directory or Hub id of the adapter; the base model is not loaded"
    )
    which = fold.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", help="name or id of the task")
    which.add_argument("--all-tasks", action="store_true", help="every task, each into OUT/TASK")
    fold.add_argument("--out", required=True, type=Path, help="directory to write")
    fold.add_argument("--revision", help="revision of a Hub adapter")
    fold.add_argument("--overwrite", action="store_true", help="replace adapters that are there already")
    fold.set_defaults(run=_fold)
    return parser


def _fold(arguments: argparse.Namespace) -> None:
    """Write one task of an adapter, or each, as a stock LoRA that peft and servers load without peft_moe."""
    from peft import PeftConfig

    from . import MoeConfig
    from .fold import fold

    hub = {"revision": arguments.revision} if arguments.revision else {}
    config = PeftConfig.from_pretrained(arguments.adapter, **hub)
    names = config.task_names if isinstance(config, MoeConfig) else []
    if arguments.all_tasks and names:
        outs = {name: arguments.out / re.sub(r"[^\w.-]|^\.+$", "_", name) for name in names}
        if len(set(outs.values())) < len(names):
            raise ValueError(f"Tasks {names} do not make distinct directory names; fold them one by one with --task.")
    else:
        outs = {arguments.task: arguments.out}
    for task, out in outs.items():
        by_id = task not in names and task is not None and task.isdigit()
        fold(arguments.adapter, out, task=int(task) if by_id else task, overwrite=arguments.overwrite, **hub)
        print(f"task {task}: {out}")


if __name__ == "__main__":
    sys.exit(main())
