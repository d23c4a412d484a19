"""Jobs of scripts/evidence/ without training, to see how they are started, stopped and gone on with.

    python tests/evidence_jobs.py work JOB.json        what one.py does with a job, in no time
    python tests/evidence_jobs.py call RUNS RESULTS [--search]    run.py with such jobs, in folders of a test

The environment variable BEHAVIOUR is JSON of run to "fail" or "hang". Imports no PyTorch.
"""

import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "evidence")]

import one  # noqa: E402
import run as command  # noqa: E402
import store as files  # noqa: E402
from plan import Run  # noqa: E402
from setups import Setup, full  # noqa: E402

BEST = 3e-3


def small_setup(folder: str, *, search: bool = False) -> Setup:
    """Few runs: AT-MoE with its experts and one seed, and the base model; with or without a search of their rates."""
    only = ("instruction/at_moe/*", "instruction/base")
    setup = replace(full(), folder=folder, seeds={"": (1,)}, protocols=("instruction",), only=only)
    return setup if search else replace(setup, rates=(BEST,))


def call(folder: str, results: str, *words: str) -> int:
    """run.py on these runs."""
    os.chdir(ROOT)
    setup = small_setup(folder, search="--search" in words)
    args = command.parse(["--workers", "2", *(word for word in words if word != "--search")])
    return command.do(setup, files.Store(setup, Path(results)), args, do_the_job)


def do_the_job(job: Path) -> list[str]:
    """The command of a job."""
    return [sys.executable, __file__, "work", str(job)]


def work(path: str) -> None:
    """Leave what a run leaves."""
    threading.Thread(target=one.end_with_parent, args=(os.getppid(),), daemon=True).start()
    job = json.loads(Path(path).read_text())
    run = Run.of(job["run"])
    with (Path(job["record"]).parents[1] / "started").open("a") as file:
        file.write(run.id + (" alone" if job["train_only"] else "") + "\n")
    behaviour = json.loads(os.environ.get("BEHAVIOUR", "{}")).get(run.id)
    if behaviour == "fail":
        sys.exit("no luck")
    if behaviour == "hang":
        files.new_folder(job["adapter"])
        time.sleep(600)
    adapters = Path(job["adapter"].removesuffix(run.id))
    if not all((adapters / need).is_dir() for need in run.needs):
        sys.exit(f"{run.needs} are not there")
    if run.trains and (job["keep"] or job["train_only"]):
        files.finish(files.new_folder(job["adapter"]))
    if not job["train_only"]:
        files.write(Path(job["record"]), record_of(run, 0.5 if run.learning_rate == BEST else 0.4))


def record_of(run: Run, score: float, train: float = 1.0, answer: float = 1.0, rest: float = 0.0) -> dict[str, object]:
    """What others read of a record."""
    head = {name: value for name, value in run.to_dict().items() if name in one.KEPT}
    head |= {what: {} for what in run.measure}
    seconds = {"train_cpu": train, "answer_cpu": answer, "total_cpu": train + answer + rest}
    return head | {"scores": {"mean": {"score": score}}, "seconds": seconds}


if __name__ == "__main__":
    sys.exit({"work": work, "call": call}[sys.argv[1]](*sys.argv[2:]))
