"""Stage 1 of AT-MoE: trains the experts that a recipe of method at_moe names, a stock LoRA each, one after the other.

    python scripts/train_experts.py recipes/at_moe.yaml
    python scripts/train_experts.py recipes/at_moe.yaml --again --model_name_or_path Qwen/Qwen3-0.6B --bf16 true

Each expert is a run of scripts/train.py with method lora and the recipe's settings; the recipe's `stage1` replaces some
of them, and flags win over both. An expert learns the task that it is named after, or those that `tasks` in stage1 has
for it ({expert: [task, ...]}); the general expert learns all. An expert whose folder has an adapter is left as it is,
so that an interrupted call goes on where it stopped; --again trains all anew.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TRAIN = Path(__file__).with_name("train.py")
CONFIG = "adapter_config.json"  # written last: with it an adapter is whole

# settings of stage 2, which a stock LoRA does not have
STAGE_2 = {
    "groups", "general_expert", "stage1", "router_input", "mix", "learn_mix", "within_group", "flat_routing",
    "group_temperature", "expert_temperature", "router_norm", "train_experts", "adapter_options",
}  # fmt: skip
OURS = ("method", "output_dir", "train_tasks")  # differ from expert to expert, or have to be what they are


@dataclass(frozen=True)
class Expert:
    """A stock LoRA to train: where it goes, and the tasks it learns (None: all)."""

    name: str
    path: str
    tasks: list[str] | None


def main(argv: list[str]) -> None:
    """Check the recipe and the flags, then train what is not there yet."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s FILE.yaml [--again] [--NAME VALUE ...]", description=(__doc__ or "").split("\n")[0],
        epilog="All other flags are those of scripts/train.py.", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("recipe", metavar="FILE.yaml", help="recipe of method at_moe, such as recipes/at_moe.yaml")
    parser.add_argument("--again", action="store_true", help="train experts that are there already, too")
    args, flags = parser.parse_known_args(argv)
    for name in OURS:
        if any(flag.split("=")[0].replace("-", "_") == f"__{name}" for flag in flags):
            parser.error(f"--{name} is not for flags: {TRAIN.name} gets one for each expert, from the recipe.")
    recipe = read_recipe(args.recipe)
    experts, settings = experts_of(recipe), stage1_settings(recipe)
    for number, expert in enumerate(experts, start=1):
        label = f"Expert {number} of {len(experts)}, {expert.name}"
        if not args.again and Path(expert.path, CONFIG).exists():
            print(f"{label}: is in {expert.path} already; --again trains it anew.", flush=True)
            continue
        print(f"{label}: training on {' '.join(expert.tasks or ['all tasks'])} into {expert.path}.", flush=True)
        if code := train(expert, settings, flags):
            print(f"{label}: {TRAIN.name} failed with exit code {code}; its message is above.", file=sys.stderr)
            sys.exit(code)
    print(f"All {len(experts)} experts are there; next: python scripts/train.py {args.recipe}")


def read_recipe(path: str) -> dict[str, Any]:
    """The entries of the YAML file.

    Raises:
        ValueError: it holds no mapping.
    """
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}; write one `name: value` per line.")
    return entries


def experts_of(recipe: Mapping[str, Any]) -> list[Expert]:
    """The experts of all groups in the recipe's order, then the general one.

    Raises:
        ValueError: groups of another shape, a path that is no local folder or of two experts, or tasks of no expert.
    """
    paths = expert_paths(recipe.get("groups"))
    tasks = stage1_of(recipe).get("tasks") or {}
    if not isinstance(tasks, dict) or not all(is_names(names) for names in tasks.values()):
        raise ValueError(f"stage1 has tasks={tasks!r}; write {{expert: [task, ...]}}.")
    if unknown := sorted(tasks.keys() - paths.keys()):
        raise ValueError(f"stage1 has tasks for {unknown}, which groups does not have; use some of {list(paths)}.")
    experts = [Expert(name, at_home(path), tasks.get(name, [name])) for name, path in paths.items()]
    if (general := recipe.get("general_expert")) is not None:
        experts.append(Expert("the general one", at_home(general), None))
    used: dict[Path, str] = {}
    for expert in experts:
        check_path(expert)
        if other := used.get(Path(expert.path).resolve()):
            raise ValueError(
                f"{expert.path!r} is the path of {other} and of {expert.name}; give each a folder of its own."
            )
        used[Path(expert.path).resolve()] = expert.name
    return experts


def at_home(path: Any) -> Any:
    """A path with the home directory in place of "~", as stage 2 and the Trainer read it."""
    return os.path.expanduser(path) if isinstance(path, str) else path


def expert_paths(groups: Any) -> dict[str, Any]:
    """The path of every expert, by its name."""
    if (
        not isinstance(groups, dict)
        or not groups
        or not all(isinstance(part, dict) and part for part in groups.values())
    ):
        raise ValueError(f"The recipe has groups={groups!r}; write {{group: {{expert: path, ...}}, ...}}.")
    paths: dict[str, Any] = {}
    for experts in groups.values():
        if twice := sorted(paths.keys() & experts.keys()):
            raise ValueError(f"groups has {twice} in two groups; give each expert a name of its own.")
        paths |= experts
    if not is_names(list(paths)):
        raise ValueError(f"groups has the experts {list(paths)}; use texts as names.")
    return paths


def is_names(value: Any) -> bool:
    """Whether it is a list of texts, not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)


def check_path(expert: Expert) -> None:
    """Raise a `ValueError` if no adapter can be written there."""
    path = expert.path
    if not isinstance(path, str) or not path:
        raise ValueError(f"{expert.name} has path {path!r}; name the folder to write it to.")
    # user/name is a Hub id to stage 2 unless there is such a folder, and one made by mistake would hide it
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).parent.is_dir()
    if hub_id or "://" in path:
        raise ValueError(
            f"{expert.name} has path {path!r}, which looks like a Hub id or an address; name a local folder to "
            "write it to (./user/name if it is one), or take experts that need no training out of the recipe."
        )
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{expert.name} has path {path!r}, which is a file; name a folder to write it to.")


def stage1_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's stage1.

    Raises:
        ValueError: it is no mapping, or sets what differs from expert to expert.
    """
    stage1 = recipe.get("stage1") or {}
    if not isinstance(stage1, dict):
        raise ValueError(f"The recipe has stage1={stage1!r}; write a mapping of settings of {TRAIN.name}.")
    if fixed := sorted(stage1.keys() & set(OURS)):
        raise ValueError(f"stage1 sets {', '.join(fixed)}, which follow from groups and tasks; leave them out.")
    return stage1


def stage1_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What all experts are trained with: the recipe without stage 2, and with stage1 in its place."""
    settings = {name: value for name, value in recipe.items() if name not in STAGE_2}
    return settings | {name: value for name, value in stage1_of(recipe).items() if name != "tasks"} | {"method": "lora"}


def train(expert: Expert, settings: Mapping[str, Any], flags: list[str]) -> int:
    """Run train.py in a process of its own, so that no expert inherits state or memory; returns its exit code."""
    own = {"output_dir": expert.path, "train_tasks": expert.tasks}
    with tempfile.TemporaryDirectory(prefix="train-experts-") as folder:
        path = Path(folder, "expert.yaml")
        path.write_text(yaml.safe_dump({**settings, **own}, allow_unicode=True), encoding="utf-8")
        return subprocess.run([sys.executable, str(TRAIN), str(path), *flags]).returncode


if __name__ == "__main__":
    main(sys.argv[1:])
