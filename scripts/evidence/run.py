"""Does the runs of the experiment that are not done yet, several at a time; can be stopped and called again.

    python scripts/evidence/run.py
    python scripts/evidence/run.py --list --experiment main
    python scripts/evidence/run.py --only 'instruction/molora/*' --hours 2
    python scripts/evidence/run.py --quick

A run that is done has a JSON file in docs/evidence/runs; a run that was stopped starts anew. Searches of learning rates
come first, and their results say which runs there are. Adapters and logs are in runs/evidence; the adapters that other
runs need stay there, a few gigabytes, and are trained again if they are missing. `nice -n 10` before the command leaves
the machine to others.
"""

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from estimates import Estimates, clock
from grid import EXPERIMENTS, all_runs, forecast
from plan import Run
from pool import Command, Pool, command
from rows import prepare
from setups import ROOT, Setup, full, quick
from store import Store

Wanted = Callable[[list[Run]], list[Run]]


def main(argv: list[str]) -> int:
    """Do what is missing; 1 if a run failed or nothing could be done, 130 if it was stopped."""
    args = parse(argv)
    os.chdir(ROOT)
    setup = quick() if args.quick else full()
    results = Path(setup.folder, "results") if args.quick else Path("docs/evidence/runs")
    return do(setup, Store(setup, results), args)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ID", help="runs of these ids or patterns, and what they need")
    parser.add_argument("--experiment", nargs="+", choices=list(EXPERIMENTS), help="runs of these, and what they need")
    parser.add_argument("--list", action="store_true", help="show what is done and what is left, and do nothing")
    parser.add_argument("--again", action="store_true", help="do those named by --only although they are done")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time; one per core")
    parser.add_argument("--hours", type=float, help="start nothing that would not end within so many hours")
    parser.add_argument("--quick", action="store_true", help="see in a few minutes that every step works")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers} is no number of processes; use 1 or more.")
    if args.again and not args.only:
        parser.error("--again repeats what --only names; name runs, or delete their JSON files.")
    return args


def do(setup: Setup, store: Store, args: argparse.Namespace, command: Command = command) -> int:
    """Show or do the runs of a setup, each by a command."""
    only = args.only or (None if args.experiment else setup.only)
    wanted = chooser(only, args.experiment)
    runs = forecast(setup, store.scores())
    named = chooser(only, args.experiment, needs=False)
    if not wanted(runs):
        print(f"No run has an id like {' '.join(only or ())}; --list shows them.", file=sys.stderr)
        return 1
    again = {run.id for run in named(runs) if run.id in store.records} if args.again else set()
    if args.list:
        show(setup, store, wanted, args.workers)
        return 0
    if stale := [run_id for run_id in store.stale(wanted(runs)) if run_id not in again]:
        print(f"Done with other settings than now: {' '.join(stale)}. Use --again, or delete them.", file=sys.stderr)
        return 1
    with alone(setup), ended_by_signals():
        prepare(setup)
        pool = Pool(setup, store, wanted, workers=args.workers, again=again, hours=args.hours, command=command)
        try:
            pool.work()
        except KeyboardInterrupt:
            print(
                "Stopped; the same command goes on from here, and runs that were stopped start anew.", file=sys.stderr
            )
            return 130
    return report(pool)


def chooser(only: list[str] | None, experiments: list[str] | None, *, needs: bool = True) -> Wanted:
    """Picks from all runs those with these ids or patterns, of these experiments, and what has to be done before."""

    def wanted(runs: list[Run]) -> list[Run]:
        chosen = [run for run in runs if fits(run)]
        new = chosen if needs else []
        while new:
            ids = {run.id for run in chosen}
            required = {need for run in new for need in run.needs}
            after = tuple({start for run in new for start in run.after})
            before = [r for r in runs if r.id in required or (r.purpose == "search" and r.id.startswith(after))]
            new = [run for run in before if run.id not in ids]
            chosen = chosen + new
        ids = {run.id for run in chosen}
        return [run for run in runs if run.id in ids]

    def fits(run: Run) -> bool:
        by_id = not only or any(run.id == pattern or fnmatchcase(run.id, pattern) for pattern in only)
        return by_id and (not experiments or run.experiment in experiments)

    return wanted


def show(setup: Setup, store: Store, wanted: Wanted, workers: int) -> None:
    """What is done and what is left."""
    estimates = Estimates(store.records)
    there = {run.id for run in all_runs(setup, store.scores())}
    for run in wanted(forecast(setup, store.scores())):
        if run.id in store.records:
            print(f"done  {store.records[run.id]['score']:.3f}  {run.id}")
        else:
            guess = "" if run.id in there else "  (once its learning rate is chosen)"
            print(f"left  ~{clock(estimates.seconds(run))}  {run.id}{guess}")
    print(estimates.progress(setup, wanted, set(), {}, workers))


def report(pool: Pool) -> int:
    """The last lines, and the exit code."""
    if pool.failed:
        print(f"{len(pool.failed)} runs failed, and what needs them was not done:", file=sys.stderr)
        for run_id, log in pool.failed.items():
            print(f"  {run_id}: see {log}", file=sys.stderr)
        return 1
    print(pool.progress(), flush=True)
    return 0


@contextmanager
def alone(setup: Setup) -> Iterator[None]:
    """Hold the folder, so that no second call does the same runs.

    Raises:
        SystemExit: another call holds it.
    """
    path = Path(setup.folder, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"Another call is at work in {setup.folder}; stop it first, or wait.")
        yield


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make a signal to end do what Ctrl-C does, which a shell's background jobs would not notice."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
