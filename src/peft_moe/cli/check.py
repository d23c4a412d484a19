"""`peft-moe check parameters | diversity | uniform`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .loading import Source, add_options, hub_of


def add_to(commands: Any) -> None:
    """Add the subcommand to those of `peft-moe`."""
    check = commands.add_parser("check", help="check an adapter's size and gates", description=__doc__)
    checks = check.add_subparsers(required=True, metavar="CHECK")
    for name, run, what in (
        ("parameters", run_parameters, "count its parameters beside a LoRA's"),
        ("diversity", run_diversity, "MOELoRA: how much the gate's weights differ"),
        ("uniform", run_uniform, "scores with uniform gates beside its own; loads the base model"),
    ):
        parser = checks.add_parser(name, help=what, description=run.__doc__)
        parser.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id of the adapter")
        parser.add_argument("--revision", help="revision of a Hub adapter")
        parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
        parser.set_defaults(run=run)
    parser.add_argument("--data", required=True, help="file, folder or Hub dataset, of the form that training takes")
    parser.add_argument("--split", help="split of the data; by default test, and for a file the split that it is")
    parser.add_argument("--task-column", help="column with a row's task; by default task, if there is one")
    parser.add_argument("--limit", type=int, help="rows to draw of each task; by default all")
    add_options(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="rows answered at once (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=48, help="longest answer, in tokens (default: %(default)s)"
    )


def run_parameters(arguments: argparse.Namespace) -> None:
    """Count the parameters of an adapter beside those of a LoRA of the same total rank on the same layers."""
    from ..report.adapter import describe
    from ..report.verify import parameters

    found = parameters(describe(arguments.adapter, strict=False, **hub_of(arguments)))
    if not _printed_as_json(arguments, found):
        from ..report.tables import new_console, show_parameters

        show_parameters(found, new_console())
    if not found["equal"]:
        raise ValueError(found["says"][0])


def run_diversity(arguments: argparse.Namespace) -> None:
    """Say how much the weights of a MOELoRA gate differ, over experts and over tasks."""
    from ..report.verify import diversity

    found = diversity(_described(arguments))
    if not _printed_as_json(arguments, found):
        from ..report.tables import new_console, show_diversity

        show_diversity(found, new_console())


def run_uniform(arguments: argparse.Namespace) -> None:
    """Score an adapter as it is, and with the same weight for all experts."""
    from ..checks import check_count
    from ..data import read_task_info, task_key, tokenize
    from ..evaluation import generate_answers, metrics_of, score
    from ..report.adapter import read_moe_config
    from ..report.uniform import ablate, check_can_be_uniform, rate_rows

    for option in ("limit", "batch_size", "max_new_tokens"):  # all before the work
        if getattr(arguments, option) is not None:
            check_count(f"--{option.replace('_', '-')}", getattr(arguments, option), "no count")
    hub = hub_of(arguments)
    config = read_moe_config(arguments.adapter, **hub)
    check_can_be_uniform(config, _described(arguments))
    info = read_task_info(arguments.data)
    split, examples = _rows(arguments, config)
    metrics_of(examples, info)  # what cannot be scored
    source = Source(arguments.adapter, config, base_model=arguments.base_model, dtype=arguments.dtype, hub=hub)
    tokenizer = source.tokenizer()
    for messages in examples["messages"]:
        tokenize(messages, tokenizer)  # for its errors
    model = source.model()
    sizes = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
    found = ablate(
        model,
        answer=lambda: generate_answers(model, tokenizer, examples, **sizes),
        score=lambda answers: score(answers, examples, info),
        rate=rate_rows(examples, info),
        tasks=[task_key(task) for task in examples["task"]],
    )
    found |= {"adapter": arguments.adapter, "data": arguments.data, "split": split, "limit": arguments.limit, **sizes}
    if not _printed_as_json(arguments, found):
        from ..report.tables import new_console, show_uniform

        show_uniform(found, new_console())


def _rows(arguments: argparse.Namespace, config: Any) -> tuple[str | None, Any]:
    """The split, and its rows that are to be answered."""
    from ..data import check_tasks, read_examples, take_per_task, with_tasks

    split = arguments.split or (None if Path(arguments.data).is_file() else "test")
    column = arguments.task_column
    needed = config.needs_tasks or column is not None
    examples = with_tasks(
        read_examples(
            arguments.data,
            split=split,
            task_column=column or "task",
            task_needed=needed,
            protocol=arguments.protocol,
        )
    )
    if arguments.limit is not None:
        examples = take_per_task(examples.shuffle(seed=0), arguments.limit)
    if config.needs_tasks:
        check_tasks(examples, config.task_names)
    return split, examples


def _described(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..report.adapter import describe

    return describe(arguments.adapter, **hub_of(arguments))


def _printed_as_json(arguments: argparse.Namespace, found: dict[str, Any]) -> bool:
    if arguments.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    return bool(arguments.json)
