"""`peft-moe fold`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from .loading import Source, add_options, hub_of

CALIBRATING = {"base_model": None, "dtype": "auto", "protocol": "instruction", "split": None, "rank": None}


def add_to(commands: Any) -> None:
    """Add the subcommand to those of `peft-moe`."""
    fold = commands.add_parser("fold", help="write tasks of an adapter as stock LoRAs", description=run.__doc__)
    fold.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id of the adapter")
    which = fold.add_mutually_exclusive_group()
    which.add_argument("--task", help="MOELoRA: name or id of the task")
    which.add_argument("--all-tasks", action="store_true", help="MOELoRA: every task, each into OUT/TASK")
    which.add_argument(
        "--routing",
        type=_mapping,
        metavar="JSON",
        help='AT-MoE: what set_group_weights takes, such as {"weights": {"style": {"rigorous": 1}}, "group_weights": '
        '{"style": 1}}; by default what the adapter has fixed',
    )
    which.add_argument(
        "--calibrate",
        metavar="DATA",
        help="for experts chosen by the input: a file, folder or Hub dataset of the form that training takes, over "
        "which the LoRA that is written comes closest; loads the base model",
    )
    fold.add_argument("--out", required=True, type=Path, help="directory to write")
    fold.add_argument("--revision", help="revision of a Hub adapter")
    calibrate = fold.add_argument_group("for --calibrate")
    add_options(calibrate)
    calibrate.add_argument("--split", help="split of the data; by default the only one, or train")
    calibrate.add_argument(
        "--rank",
        type=int,
        help="compress experts to this rank; by default their total rank. Plain LoRA beside them keeps its own, and "
        "the largest is that of the LoRA",
    )
    for option, number, what in (
        ("--rows", 256, "rows to draw, a fifth of them to measure errors on"),
        ("--batch-size", 8, "rows run at once"),
        ("--max-length", 1024, "longest row, in tokens"),
    ):
        calibrate.add_argument(option, type=int, default=number, help=f"{what} (default: %(default)s)")
    fold.add_argument("--overwrite", action="store_true", help="replace adapters that are there already")
    fold.set_defaults(run=run)


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def run(arguments: argparse.Namespace) -> None:
    """Write an adapter as a stock LoRA: for a task, with fixed weights, or as what comes closest to it over data."""
    from .. import GroupedMoeConfig, MoeConfig
    from ..directory import check_free, check_not_over, read_config
    from ..fold import fold

    hub = hub_of(arguments)
    config = read_config(arguments.adapter, **hub)
    check_not_over(arguments.out, [Path(arguments.adapter)])
    if arguments.calibrate:
        model = _calibrated(arguments, config, hub)
        fold(model, arguments.out, overwrite=arguments.overwrite)
        print(f"calibrated: {arguments.out}")
        return
    for option, unset in CALIBRATING.items():
        if getattr(arguments, option) != unset:
            raise ValueError(f"--{option.replace('_', '-')} is for --calibrate DATA, which is not given")
    names = config.task_names if isinstance(config, MoeConfig) else []
    if arguments.all_tasks and isinstance(config, GroupedMoeConfig):
        raise ValueError(
            f"{arguments.adapter} knows no tasks, and --all-tasks folds each; fix its weights by --routing."
        )
    if arguments.task is None and not arguments.all_tasks:
        fold(arguments.adapter, arguments.out, routing=arguments.routing, overwrite=arguments.overwrite, **hub)
        print(f"fixed weights: {arguments.out}")
        return
    if arguments.all_tasks and names:
        outs = {name: arguments.out / re.sub(r"[^\w.-]|^\.+$", "_", name) for name in names}
        if len({str(out).casefold() for out in outs.values()}) < len(names):  # some file systems have one case only
            raise ValueError(f"Tasks {names} do not make distinct directory names; fold them one by one with --task.")
        for out in outs.values():
            check_free(out, overwrite=arguments.overwrite)  # all before the first is written
            check_not_over(out, [Path(arguments.adapter)])
    else:
        outs = {arguments.task: arguments.out}
    for task, out in outs.items():
        by_id = task not in names and task is not None and task.isdigit()
        fold(arguments.adapter, out, task=int(task) if by_id else task, overwrite=arguments.overwrite, **hub)
        print(f"task {task}: {out}")


def _calibrated(arguments: argparse.Namespace, config: Any, hub: dict[str, Any]) -> Any:
    """The adapter on its base model, calibrated on rows of the data."""
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForSeq2Seq

    from ..calibrate import calibrate
    from ..checks import check_count
    from ..data import encode, read_examples
    from ..directory import check_free
    from ..fold import check_config

    check_free(arguments.out, overwrite=arguments.overwrite)  # before the work
    check_config(config, arguments.adapter)
    for option in ("rows", "batch_size", "max_length", "rank"):
        if getattr(arguments, option) is not None:
            check_count(f"--{option.replace('_', '-')}", getattr(arguments, option), "no count")
    examples = read_examples(
        arguments.calibrate, split=arguments.split, task_needed=False, protocol=arguments.protocol
    ).shuffle(seed=0)
    examples = examples.select(range(min(arguments.rows, len(examples))))
    source = Source(arguments.adapter, config, base_model=arguments.base_model, dtype=arguments.dtype, hub=hub)
    tokenizer = source.tokenizer()
    rows = encode(examples, tokenizer, tasks=None, max_length=arguments.max_length)
    model = source.model()
    batch_size = min(arguments.batch_size, max(1, len(rows) // 5))  # so that a fifth can be held out
    collator: Any = DataCollatorForSeq2Seq(tokenizer)
    batches: Any = DataLoader(rows, batch_size=batch_size, collate_fn=collator)
    print(calibrate(model, batches, rank=arguments.rank, progress=True))
    return model
