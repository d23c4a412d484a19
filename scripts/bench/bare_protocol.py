"""The bare protocol: MedMulti without its instructions, where nothing but the task id tells the tasks apart.

    python scripts/bench/bare_protocol.py --output runs/bare

Trains MOELoRA and a stock LoRA of the same total rank with the same rows, order, steps and learning rate, scores the
test split per task, and writes results.json and table.md to the output folder. Finished runs are not repeated. The two
train side by side with one thread each: about half an hour on two free cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[2]
METHODS = ("lora", "moelora")
SETTINGS = {
    "protocol": "bare",
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "dtype": "bfloat16",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 20,
    "max_new_tokens": 40,
    "test_split": "test",
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 25,
    "report_to": "none",
}


def main() -> None:
    """Train both, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bare")
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "medmulti" / "mini")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = {method: start(method, arguments) for method in METHODS}
    for method, process in started.items():
        if process is not None and process.wait() != 0:
            sys.exit(f"{method} failed; see {arguments.output / method}.log")
    results = {m: json.loads((arguments.output / m / "test_results.json").read_text())["test"] for m in METHODS}
    groups = read_groups(arguments.data)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results, groups)
    (arguments.output / "table.md").write_text(text + "\n")
    print(text)


def start(method: str, arguments: argparse.Namespace) -> subprocess.Popen | None:
    """Start one training in its own process, unless its results are there."""
    output = arguments.output / method
    if (output / "test_results.json").exists():
        return None
    settings = SETTINGS | {
        "method": method,
        "model_name_or_path": arguments.model,
        "dataset": arguments.data,
        "num_train_epochs": arguments.epochs,
        "seed": arguments.seed,
        "output_dir": output,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M')} training {method}; log in {output}.log", flush=True)
    with Path(f"{output}.log").open("w") as log:
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), *flags]
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def read_groups(data: Path) -> dict[str, list[str]]:
    """The tasks of each conflict group: tasks that share their inputs."""
    groups: dict[str, list[str]] = {}
    for name, task in json.loads((data / "tasks.json").read_text())["tasks"].items():
        groups.setdefault(task["group"], []).append(name)
    return groups


def table(results: dict[str, dict], groups: dict[str, list[str]]) -> str:
    """A Markdown table: a row per task, and the mean of each group."""
    lines = ["| task | metric | stock LoRA | MOELoRA | difference |", "|---|---|---|---|---|"]
    for group, tasks in groups.items():
        for task in tasks:
            lines.append(line(task, results["lora"][task]["metric"], *(results[m][task]["score"] for m in METHODS)))
        means = [mean(results[m][task]["score"] for task in tasks) for m in METHODS]
        lines.append(line(f"**group {group}**", "mean", *means))
    lines.append(line("**all tasks**", "mean", *(results[m]["mean"]["score"] for m in METHODS)))
    return "\n".join(lines)


def line(name: str, metric: str, lora: float, moelora: float) -> str:
    """One row of the table."""
    return f"| {name} | {metric} | {lora:.3f} | {moelora:.3f} | {moelora - lora:+.3f} |"


if __name__ == "__main__":
    main()
