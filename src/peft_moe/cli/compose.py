"""`peft-moe compose`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the subcommand to those of `peft-moe`."""
    compose = commands.add_parser("compose", help="make one out of trained LoRAs", description=run.__doc__)
    compose.add_argument(
        "recipe", metavar="FILE.yaml", type=Path, help="fields of GroupedMoeConfig; docs/at_moe.md has one"
    )
    compose.add_argument("--out", required=True, type=Path, help="directory to write")
    compose.add_argument("--base-model", help="base model, in place of the one that the file or the experts name")
    compose.add_argument("--overwrite", action="store_true", help="replace an adapter that is there already")
    compose.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Make an AT-MoE adapter out of trained LoRAs; the base model's weights are not loaded."""
    from ..compose import compose

    out = compose(arguments.recipe, arguments.out, base_model=arguments.base_model, overwrite=arguments.overwrite)
    print(f"The adapter is in {out}. Its routers are new and weigh experts evenly until they are trained.")
