"""Whether the commits at which runs were made train and answer alike: the same few steps by the code of each.

    python scripts/evidence/commits.py [COMMIT ...]

Of every commit that a record names, and of the present one, or of those that are given, a work tree is made. Its own
scripts/train.py trains each method for a few steps on the tiny rows and scores its answers to the test rows. AT-MoE's
experts are two LoRAs that the first commit has trained. All of it on one machine, with one thread.

Prints, for each method and commit, the largest difference of a step's loss from that of the first commit, relative to
it, and the largest difference of a task's score.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from grid import SYSTEMS
from one import flags
from pool import ENVIRONMENT
from rows import prepare
from setups import COMMON, ROOT, full

STEPS = 5
RUNS = ROOT / "docs" / "evidence" / "runs"
TRAINED = ("lora-r16", "moelora", "molora", "medmoelora", "at_moe")


def main(given: list[str]) -> None:
    """Print a table."""
    os.chdir(ROOT)
    prepare(full())
    commits = [git("rev-parse", commit) for commit in given] or commits_of_records()
    print(f"{STEPS} steps of {COMMON['per_device_train_batch_size']} rows; beside {commits[0][:10]}:\n")
    print("| method | commit | loss, relative | score |\n|---|---|---|---|")
    first: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for commit in commits:
            tree = Path(folder, "trees", commit[:10])
            git("worktree", "add", "--quiet", "--detach", str(tree), commit)
            try:
                for system in TRAINED:
                    losses, scores = run(tree, system, Path(folder))
                    of_first = first.setdefault(system, (losses, scores))
                    off = max(abs(a / b - 1) for a, b in zip(losses, of_first[0], strict=True))
                    missed = max(abs(scores[task] - of_first[1][task]) for task in scores)
                    print(f"| {system} | {commit[:10]} | {off:.1e} | {missed:g} |", flush=True)
            finally:
                git("worktree", "remove", "--force", str(tree))


def commits_of_records() -> list[str]:
    """Those of all records, as the history has them, and the present one."""
    named = {json.loads(path.read_text(encoding="utf-8"))["commit"] for path in RUNS.glob("*/*.json")}
    named = {commit.removesuffix("+") for commit in named if commit} | {git("rev-parse", "HEAD")}
    return [commit for commit in git("rev-list", "--reverse", "HEAD").split() if commit in named]


def run(tree: Path, system: str, folder: Path) -> tuple[list[float], dict[str, float]]:
    """Losses by step and scores by task of a method, trained by the code in a work tree."""
    settings = COMMON | SYSTEMS[system] | {"model_name_or_path": str(ROOT / full().model), "learning_rate": 1e-3}
    settings |= {"dataset": str(ROOT / "data" / "medmulti" / "tiny"), "test_split": "test", "max_steps": STEPS}
    settings |= {"logging_steps": 1, "max_new_tokens": 8, "seed": 1}
    experts = [folder / "experts" / str(seed) for seed in (1, 2)]
    if system == "at_moe":
        for seed, expert in enumerate(experts, start=1):
            if not expert.exists():
                train(
                    tree,
                    settings | SYSTEMS["lora-r16"] | {"router_input": None, "output_dir": str(expert), "seed": seed},
                )
        settings |= {"groups": {"one": {"one": str(experts[0])}, "two": {"two": str(experts[1])}}}
    out = folder / "runs" / tree.name / system
    train(tree, settings | {"output_dir": str(out)})
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    scores = json.loads((out / "test_results.json").read_text(encoding="utf-8"))["test"]
    return [entry["loss"] for entry in history if "loss" in entry], {
        task: each["score"] for task, each in scores.items()
    }


def train(tree: Path, settings: dict[str, Any]) -> None:
    """Run the scripts/train.py of a work tree."""
    command = [sys.executable, str(tree / "scripts" / "train.py"), *flags(settings)]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(tree / "src")}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")


def git(*words: str) -> str:
    """What git says."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main(sys.argv[1:])
