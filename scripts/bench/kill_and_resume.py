"""Training is killed while it writes a checkpoint, and resumed: are losses and weights those of an undisturbed run?

    python scripts/bench/kill_and_resume.py --output runs/resume

Per method: scripts/train.py to its end; the same command again, sent SIGKILL as soon as the optimizer's file of its
second checkpoint appears; the same command with `--resume_from_checkpoint true`. Prints what was there after the kill,
what was resumed from, the losses of each step, and whether the saved adapters are the same to the bit. A stock LoRA
comes first. AT-MoE's experts are two tasks of the MOELoRA run, folded. About 8 minutes on two free cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS, SAVE = 6, 2
SETTINGS = {
    "dataset": ROOT / "data" / "medmulti" / "tiny",
    "max_rows_per_task": 8,
    "max_length": 96,
    "dtype": "bfloat16",
    "max_steps": STEPS,
    "save_steps": SAVE,
    "save_total_limit": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "report_to": "none",
    "seed": 7,
}
ROUTED = {"lora_dropout": 0.05, "balance_loss": json.dumps({"z": 0.01, "variance": 0.01})}
METHODS = {
    "lora": {"lora_dropout": 0.05},
    "moelora": {"lora_dropout": 0.1},
    "molora": ROUTED | {"adapter_options": json.dumps({"router_jitter": 0.05})},
    "medmoelora": ROUTED,
    "at_moe": {"router_input": "prompt"},
}


def main() -> None:
    """Run all methods one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "resume")
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    for method in arguments.methods:
        options = METHODS[method]
        if method == "at_moe":
            options = options | {"groups": json.dumps({"icd": fold_experts(arguments)})}
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--method", method]
        for name, value in {"model_name_or_path": arguments.model, **SETTINGS, **options}.items():
            command += [f"--{name}", str(value)]
        compare(method, command, arguments.output / method)


def fold_experts(arguments: argparse.Namespace) -> dict[str, str]:
    """Two tasks of the MOELoRA run as stock LoRAs."""
    from peft_moe import fold

    source, tasks = arguments.output / "moelora" / "straight", ("icd_chapter", "icd_category")
    return {t: str(fold(source, arguments.output / "experts" / t, task=t, overwrite=True)) for t in tasks}


def compare(method: str, command: list[str], folder: Path) -> None:
    """Train straight, train and kill, resume; print what came of it."""
    shutil.rmtree(folder, ignore_errors=True)
    straight, killed = folder / "straight", folder / "killed"
    start(command, straight, "straight").wait()
    victim = start(command, killed, "killed")
    newest = killed / f"checkpoint-{2 * SAVE}"
    while not (newest / "optimizer.pt").exists() and victim.poll() is None:
        time.sleep(0.0005)
    victim.kill()
    victim.wait()
    print(f"{method}: killed (exit code {victim.returncode}) while it wrote {newest.name}; there are", flush=True)
    for path in sorted(killed.glob("checkpoint-*")):
        files = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
        lacks = sorted({"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} - files.keys())
        size = files.get("optimizer.pt", 0)
        print(f"    {path.name}: optimizer.pt of {size} bytes; lacks {', '.join(lacks) or 'nothing'}")
    start([*command, "--resume_from_checkpoint", "true"], killed, "resumed").wait()
    log = (folder / "resumed.log").read_text()
    print(*(f"    {' '.join(line.split('/')[-1:])}" for line in log.splitlines() if " is left out: " in line), sep="\n")
    losses = [losses_of(straight), losses_of(killed)]
    for name, values in zip(("straight", "resumed "), losses, strict=True):
        print(f"    losses, {name}: {' '.join(f'{value:.6f}' for value in values)}")
    weights = [(out / "adapter_model.safetensors").read_bytes() for out in (straight, killed)]
    same = losses[0] == losses[1], weights[0] == weights[1]
    print(f"    losses the same: {same[0]}; adapter files the same to the bit: {same[1]}", flush=True)


def start(command: list[str], out: Path, name: str) -> subprocess.Popen[bytes]:
    """Start a run, whose output goes to a file beside its folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--output_dir", str(out)], stdout=log, stderr=log, cwd=ROOT, env=dict(os.environ)
        )


def losses_of(out: Path) -> list[float]:
    """The losses of all steps, as the Trainer kept them."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


if __name__ == "__main__":
    main()
