"""Whether the commits at which runs were made train and answer alike: the same few steps by the code of each.

    python scripts/evidence/commits.py [COMMIT ...]

Of every commit that a record names, and of the present one, or of those that are given, a work tree is made. Its own
scripts/train.py trains each method for a few steps on the tiny rows and scores its answers to the test rows. AT-MoE's
experts are two LoRAs that the first commit has trained. All of it on one machine, with one thread.

Writes losses and scores to docs/evidence/commits.json. Prints, for each method and commit, the largest difference of a
step's loss from that of the first commit, relative to it, and the largest difference of a task's score. About half an
hour.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from grid import SYSTEMS
from one import cpu_name, flags
from pool import ENVIRONMENT
from rows import prepare
from setups import COMMON, ROOT, full
from store import write

STEPS = 5
RUNS, OUT = ROOT / "docs" / "evidence" / "runs", ROOT / "docs" / "evidence" / "commits.json"
TRAINED = ("lora-r16", "moelora", "molora", "medmoelora", "at_moe")
Found = dict[str, Any]  # `losses` by step, `scores` by task
Runs = dict[str, dict[str, Found]]  # by commit and system


def main(given: list[str]) -> None:
    """Train and score, write what was found, and print what it says."""
    os.chdir(ROOT)
    prepare(full())
    commits = [git("rev-parse", commit) for commit in given] or commits_of_records()
    runs: Runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for commit in commits:
            tree = Path(folder, "trees", commit[:10])
            git("worktree", "add", "--quiet", "--detach", str(tree), commit)
            try:
                runs[commit] = {system: run(tree, system, Path(folder)) for system in TRAINED}
            finally:
                git("worktree", "remove", "--force", str(tree))
            print(f"{commit[:10]} done", flush=True)
    machine = {"cpu": cpu_name(), "vectors": torch.backends.cpu.get_cpu_capability()}
    write(OUT, {"commits": commits, "steps": STEPS, "machine": machine, "runs": runs})
    print(said(runs))


def said(runs: Runs) -> str:
    """What the runs of commits say: a table, and whether any differs from those of the first commit."""
    first, others = next(iter(runs.values())), []
    lines = ["| method | commit | loss, relative | score |", "|---|---|---|---|"]
    for commit, systems in runs.items():
        for system, found in systems.items():
            loss, score = apart(found, first[system])
            lines.append(f"| {system} | {commit[:10]} | {loss:.1e} | {score:g} |")
            others += [f"{system} at {commit[:10]}"] if loss or score else []
    return "\n".join([*lines, "", f"Not as at the first: {', '.join(others)}." if others else "All are the same."])


def apart(found: Found, first: Found) -> tuple[float, float]:
    """The largest difference of a step's loss, relative to the first, and of a task's score.

    Raises:
        ValueError: other steps or tasks.
    """
    if found["scores"].keys() != first["scores"].keys() or len(found["losses"]) != len(first["losses"]):
        raise ValueError("Runs of other steps or tasks were found; compare commits that log and score the same ones.")
    loss = max(abs(a / b - 1) for a, b in zip(found["losses"], first["losses"], strict=True))
    return loss, max(abs(score - first["scores"][task]) for task, score in found["scores"].items())


def commits_of_records() -> list[str]:
    """Those of all records, as the history has them, and the present one."""
    named = {json.loads(path.read_text(encoding="utf-8"))["commit"] for path in RUNS.glob("*/*.json")}
    named = {commit.removesuffix("+") for commit in named if commit} | {git("rev-parse", "HEAD")}
    return [commit for commit in git("rev-list", "--reverse", "HEAD").split() if commit in named]


def run(tree: Path, system: str, folder: Path) -> Found:
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
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "scores": {task: each["score"] for task, each in scores.items()},
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
