"""One run, in a process of its own: trains, measures what was saved, and writes one JSON file. run.py starts it.

    python scripts/evidence/one.py runs/evidence/jobs/instruction_molora_lr-0.001_seed-1.json

The argument is a job: {"run": the fields of `plan.Run`, "adapter": folder for its adapter, "other": folder of the
adapter that is measured instead, or null, "record": file to write, "keep": whether the adapter stays, "train_only":
make the adapter anew and no record, "beside": number of processes at a time}.

The record has the run's id, experiment, system, protocol, seed, learning_rate, purpose, settings; command, commit,
versions, machine; parameters (trainable, active_rank and total_rank as means over adapted layers), seconds (train_wall,
train_cpu, answer_cpu, total_cpu), answer_tokens (how many tokens the answers have), losses ([step, loss]), split,
scores. Final runs also have answers, by row; and as far as they apply uniform (scores and answers with equal gates),
routing and general.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from plan import Run
from setups import ROOT
from store import finish, new_folder, write

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "peft_moe")


def main(argv: list[str]) -> None:
    """Do the job that a file describes."""
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    os.chdir(ROOT)  # paths in settings start here
    perform(json.loads(Path(argv[0]).read_text(encoding="utf-8")), general_scores)


def end_with_parent(parent: int) -> None:
    """End this process when the one that started it is gone: another run.py would start the same run again."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def general_scores(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What the model still knows of other things."""
    from general import general_scores

    return general_scores(model, tokenizer)


def perform(job: dict[str, Any], general: Any) -> None:
    """Train as the job says, measure and write.

    Args:
        job: see above; paths are as the current folder sees them.
        general: called with a model and its tokenizer for the record's "general".
    """
    from measure import measure, tidy

    run = Run.of(job["run"])
    made = provenance(run, job["beside"])  # before anything else, since files may change while it is being done
    trained = train(run, job["adapter"]) if run.trains else {"seconds": {}, "losses": []}
    if job["train_only"]:
        return
    adapter = job["other"] or (job["adapter"] if run.trains else None)
    found = measure(run, adapter, general)
    seconds = trained["seconds"] | {"answer_cpu": round(found.pop("answer_cpu"), 1)}
    head = {name: value for name, value in run.to_dict().items() if name in KEPT}
    record = (
        head
        | made
        | {"parameters": found.pop("parameters"), "seconds": seconds | {"total_cpu": round(time.process_time(), 1)}}
    )
    record |= {"losses": trained["losses"], "split": run.split, **found}
    if run.trains and not job["keep"]:
        shutil.rmtree(job["adapter"])
    write(Path(job["record"]), tidy(record))


KEPT = ("id", "experiment", "system", "protocol", "seed", "learning_rate", "purpose", "settings")


def train(run: Run, folder: str) -> dict[str, Any]:
    """Train the adapter of a run, or one for each of its parts, into a folder that is there when all are complete."""
    sys.path.append(str(ROOT / "scripts"))  # last: evaluate.py is there, whose name a library has
    from train import main as train_main

    partial = new_folder(folder)
    start = time.perf_counter(), time.process_time()
    losses = []
    for part in run.parts or ("",):
        out = partial / part
        own = {"output_dir": out, **({"train_tasks": [part]} if part else {})}
        train_main(flags({**run.settings, **own}))
        history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        losses.append([[entry["step"], entry["loss"]] for entry in history if "loss" in entry])
        (out / "training_args.bin").unlink(missing_ok=True)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    finish(partial)
    seconds = {"train_wall": round(wall, 1), "train_cpu": round(cpu, 1)}
    return {"seconds": seconds, "losses": mean_losses(losses)}


def mean_losses(curves: list[list[list[float]]]) -> list[list[float]]:
    """The mean of several trainings' losses, step by step."""
    return [[steps[0][0], sum(loss for _, loss in steps) / len(steps)] for steps in zip(*curves, strict=False)]


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def provenance(run: Run, beside: int) -> dict[str, Any]:
    """How the record came about."""
    import torch

    machine = {"cpu": cpu_name(), "vectors": torch.backends.cpu.get_cpu_capability()}
    return {
        "command": f"python scripts/evidence/run.py --only {run.id}",
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "machine": machine | {"threads": torch.get_num_threads(), "beside": beside},
    }


def commit() -> str | None:
    """The commit of the code, with a plus sign if files differ from it; None outside of a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "src", "scripts", "data") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main(sys.argv[1:])
