"""Runs in processes of their own, several at a time, in an order that keeps all of them busy."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from estimates import Estimates, clock
from grid import EXPERTS, all_runs, forecast, importance, is_kept
from plan import Run
from setups import Setup
from store import Store

# One thread each: two processes of one thread do more than one of two. Nothing is fetched while runs are going on.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
ONE = Path(__file__).with_name("one.py")
Command = Callable[[Path], list[str]]


def command(job: Path) -> list[str]:
    """What does a job."""
    return [sys.executable, str(ONE), str(job)]


@dataclass(frozen=True)
class Job:
    """A run to do; or its adapter alone, to make anew."""

    run: Run
    train_only: bool = False


@dataclass
class Work:
    """A job that is being done."""

    job: Job
    process: subprocess.Popen
    started: float


class Pool:
    """Does runs until none is left that can be done.

    Args:
        setup: of the runs.
        store: where they are written.
        wanted: picks from all runs, also from those that cannot be named yet.
        workers: processes at a time.
        again: ids to do although they are done.
        hours: start nothing that would not end within so many hours by its estimate; None for no end.
        command: makes the command of a job from its file.
    """

    def __init__(
        self,
        setup: Setup,
        store: Store,
        wanted: Callable[[list[Run]], list[Run]],
        *,
        workers: int,
        again: set[str] | None = None,
        hours: float | None = None,
        command: Command = command,
    ) -> None:
        self.setup, self.store, self.wanted, self.workers, self.command = setup, store, wanted, workers, command
        self.again = again or set()
        self.deadline = None if hours is None else time.monotonic() + 3600 * hours
        self.working: list[Work] = []
        self.failed: dict[str, Path] = {}
        self.ended = 0

    def work(self) -> None:
        """Do them; whatever ends this ends the processes too."""
        try:
            while True:
                jobs = self.ready()
                while jobs and len(self.working) < self.workers:
                    self.start(jobs.pop(0))
                if not self.working:
                    return
                self.wait()
        finally:
            for work in self.working:
                work.process.terminate()
            for work in self.working:
                try:
                    work.process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    work.process.kill()

    def left(self) -> list[Run]:
        """What is wanted, can be named now, is not done, and has not failed."""
        scores = self.store.scores()
        there = {run.id for run in all_runs(self.setup, scores)} - self.failed.keys()
        return [run for run in self.wanted(forecast(self.setup, scores)) if run.id in there and self.is_left(run.id)]

    def is_left(self, run_id: str) -> bool:
        """Whether a run is not done, or is to be done again."""
        return run_id not in self.store.records or run_id in self.again

    def ready(self) -> list[Job]:
        """What can start now and ends in time, the most urgent first."""
        known = {run.id: run for run in all_runs(self.setup, self.store.scores())}
        busy = {work.job.run.id for work in self.working}
        left, estimates = self.left(), Estimates(self.store.records)
        needed = {need for run in left for need in run.needs}
        jobs = [job for run in left for job in self.steps(Job(run), known)]
        once = {job.run.id: job for job in jobs}  # several runs may need the same adapter
        jobs = [job for run_id, job in once.items() if run_id not in busy and run_id not in self.failed]
        if self.deadline is not None:
            room = self.deadline - time.monotonic()
            jobs = [job for job in jobs if estimates.seconds(job.run) <= room]

        def urgency(job: Job) -> tuple[int, int, int, float]:
            run = job.run
            first = job.train_only or run.id in needed or (run.purpose == "search" and run.system in EXPERTS)
            stage = 0 if first else 1 if run.purpose == "search" else 2
            # seed by seed, so that what is there is of the same seeds whenever it is stopped
            return stage, importance(run), run.seed or 0, -estimates.seconds(run)

        return sorted(jobs, key=urgency)

    def steps(self, job: Job, known: Mapping[str, Run]) -> Iterator[Job]:
        """A job, if the adapters it needs are there; otherwise those to make anew that can be made now.

        An adapter of a run that is done may be missing: it was done on another machine, or its adapter was removed.
        """
        missing = [need for need in job.run.needs if not self.store.has_adapter(need)]
        if not missing and not any(self.is_left(need) for need in job.run.needs):
            yield job
        for need in missing:
            if not self.is_left(need):
                yield from self.steps(Job(known[need], train_only=True), known)

    def start(self, job: Job) -> None:
        """Start the process of a job."""
        run, folder = job.run, Path(self.setup.folder)
        path = folder / "jobs" / f"{self.store.log(run).stem}.json"
        values = {
            "run": run.to_dict(),
            "adapter": self.setup.adapter(run.id),
            "other": self.setup.adapter(run.adapter) if run.adapter else None,
            "record": str(self.store.path(run).resolve()),
            "keep": is_kept(run),
            "train_only": job.train_only,
            "beside": self.workers,
        }
        log = self.store.log(run)
        for file in (path, log):
            file.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
        with log.open("w", encoding="utf-8") as out:
            # a session of its own: Ctrl-C reaches this process alone, which then ends the others
            process = subprocess.Popen(
                self.command(path.resolve()),
                stdout=out,
                stderr=out,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )
        self.working.append(Work(job, process, time.monotonic()))
        self.say(f"started {run.id}{' (its adapter alone)' if job.train_only else ''}")

    def wait(self) -> None:
        """Until one has ended."""
        while all(work.process.poll() is None for work in self.working):
            time.sleep(0.1)
        for work in [work for work in self.working if work.process.poll() is not None]:
            self.working.remove(work)
            self.end(work)

    def end(self, work: Work) -> None:
        """Take note of what has ended."""
        run, took = work.job.run, clock(time.monotonic() - work.started)
        found = self.store.has_adapter(run.id) if work.job.train_only else self.store.add(run)
        if work.process.returncode or not found:
            self.failed[run.id] = self.store.log(run)
            self.say(f"FAILED after {took}: {run.id}; its output is in {self.store.log(run)}")
            return
        self.ended += 1
        if work.job.train_only:
            self.say(f"adapter of {run.id} there after {took}")
            return
        self.again.discard(run.id)
        self.say(f"done in {took}: {run.id}, {run.split} {self.store.records[run.id]['score']:.3f}")

    def say(self, what: str) -> None:
        """A line with how far it is."""
        print(f"{time.strftime('%H:%M:%S')} {what} | {self.progress()}", flush=True)

    def progress(self) -> str:
        """How many runs are done and left, and for how long."""
        now = time.monotonic()
        elapsed = {work.job.run.id: now - work.started for work in self.working}
        return Estimates(self.store.records).progress(self.setup, self.wanted, self.again, elapsed, self.workers)
