"""Records of runs that nobody made: answers that are right with a probability that a test chooses."""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from grid import ABLATIONS, EXPERIMENTS, SYSTEMS, forecast
from plan import Run
from rows import make_unequal, prepare_composites, sizes
from setups import ROOT, Setup, full
from store import plain, write
from tallies import Sheet, read_test, sheet_of, tally_rows, value

from peft_moe.data import task_key

BEST = 3e-3
GENERAL = {"novels": 50.0, "words": 0.6}
LAYERS = 6


@cache
def rows_of(folder: str) -> tuple[list[dict], dict[str, str]]:
    return read_test(ROOT / folder)


@cache
def sheet_for(folder: str, scored: tuple[str, ...]) -> Sheet:
    """The sheet of a run's rows, without strata that matter here."""
    rows, metrics = rows_of(folder)
    rows = [row for row in rows if not scored or task_key(row["task"]) in scored]
    names = [task_key(row["task"]) for row in rows]
    return sheet_of(names, [str(i) for i in range(len(rows))], [row["output"] for row in rows], metrics)


def search_scores(setup: Setup) -> dict[str, float]:
    """Scores on dev for all searches, no two alike, of which the middle rate is the best."""
    searches = [run for run in forecast(setup, {}) if run.purpose == "search"]
    return {run.id: (0.5 if run.learning_rate == BEST else 0.4) + i / 1000 for i, run in enumerate(searches)}


def setup_in(folder: Path) -> Setup:
    """The page's setup, with the derived rows in a folder of the test."""
    setup = replace(full(), folder=str(folder))
    make_unequal(ROOT / setup.data, setup.unequal_data, sizes(setup))
    prepare_composites(setup)
    return setup


def answers_for(sheet: Sheet, right: float, seed: str) -> list[str]:
    """The reference with this probability, else the answer to another row of the task."""
    draw, texts = random.Random(seed), [""] * sheet.rows
    for task in sheet.tasks.values():
        for row, reference in zip(task.rows, task.references, strict=True):
            texts[row] = reference if draw.random() < right else draw.choice(task.references)
    return texts


def scores_of(sheet: Sheet, answers: list[str]) -> dict[str, dict]:
    """As `peft_moe.evaluation.score` has them."""
    found = {}
    for name, task in sheet.tasks.items():
        sums = tally_rows(task.metric, [answers[row] for row in task.rows], task.references).sum(0)
        found[name] = {"metric": task.metric, "score": float(value(task.metric, sums)), "n": len(task.rows)}
    mean = float(np.mean([entry["score"] for entry in found.values()]))
    return found | {"mean": {"metric": "mean", "score": mean, "n": sheet.rows}}


def general_for(better: float) -> dict:
    """Perplexity by a factor, and as many more right answers of 100; of 40 other questions the first half is right."""
    right = round(100 * (GENERAL["words"] + better))
    correct = {"words": [1] * right + [0] * (100 - right), "capitals": [1] * 20 + [0] * 20}
    return {
        "perplexity": {"novels": {"per_token": GENERAL["novels"] * (1 + better)}},
        "choice": {name: {"n": len(each), "chance": 0.25, "correct": each} for name, each in correct.items()},
    }


def known_by(system: str) -> float:
    """How much better than the base model a system knows things in general: no two alike."""
    return 0.0 if system == "base" else -0.02 * (1 + [*SYSTEMS, *ABLATIONS].index(system))


def routing_for(setup: Setup, system: str) -> dict:
    """MOELoRA: one gate, an expert for each task. Others: a gate for each of some blocks, all alike but in the last.

    Tasks stand in another order than the page's, and gates that are alike have half as many experts.
    """
    tasks, one = sorted(setup.tasks), system == "moelora"
    each = [np.eye(8)[setup.tasks.index(task)].tolist() for task in tasks]
    alike = [[1 / 4] * 4 + [0.0] * 4] * 8
    names = ["all layers"] if one else [f"model.layers.{block}.mlp.up_proj" for block in range(LAYERS)]
    layers, counts = ([each], [8]) if one else ([alike] * (LAYERS - 1) + [each], [4] * (LAYERS - 1) + [8])
    return {"tasks": tasks, "experts": 8, "names": names, "counts": counts, "layers": layers}


def record_of(setup: Setup, run: Run, right: float, dev: float = 0.0) -> dict:
    """A record as one.py writes it."""
    head = {name: getattr(run, name) for name in ("id", "experiment", "system", "protocol", "seed", "purpose")}
    trained = (
        {"trainable": 0, "active_rank": 0} if run.learning_rate is None else {"trainable": 4_884_480, "active_rank": 16}
    )
    seconds = {"train_cpu": 600.0, "train_wall": 660.0} if run.trains else {}
    record = head | {
        "learning_rate": run.learning_rate,
        "settings": plain(run.settings),
        "commit": "c0ffee",
        "losses": [],
    }
    record |= {"versions": {"torch": "2.13.0"}, "machine": {"cpu": "a CPU", "threads": 1, "beside": 2}}
    record |= {
        "parameters": trained,
        "seconds": seconds | {"answer_cpu": 90.0, "total_cpu": 700.0},
        "answer_tokens": 3200,
        "split": run.split,
    }
    if run.purpose == "search":
        return record | {"scores": {"mean": {"score": dev}}}
    sheet = sheet_for(run.settings["dataset"], run.scored)
    record["answers"] = answers_for(sheet, right, run.id)
    record["scores"] = scores_of(sheet, record["answers"])
    if "uniform" in run.measure:
        answers = answers_for(sheet, right / 4, run.id + "uniform")
        record["uniform"] = {"answers": answers, "scores": scores_of(sheet, answers)}
    if "routing" in run.measure:
        record["routing"] = routing_for(setup, run.system)
    if "general" in run.measure:
        record["general"] = general_for(known_by(run.system))
    return record


def save(
    setup: Setup, folder: Path, truth: dict[str, float], *, seeds: dict[str, int] | None = None, spread: float = 0.0
) -> None:
    """Write the records of all searches and of some final runs.

    Args:
        setup: of the runs.
        folder: for the JSON files.
        truth: how probable right answers are, by protocol and system: "bare/moelora".
        seeds: how many of the seeds are there, of the systems where some are missing.
        spread: how much more probable right answers are with seed 3 than with seed 2, and with seed 2 than with 1.
    """
    dev, left = search_scores(setup), dict(seeds or {})
    for run in forecast(setup, dev):
        key = f"{run.protocol}/{run.system}"
        if run.purpose == "final":
            if key not in truth or left.get(key, 1) <= 0:
                continue
            left[key] = left.get(key, 99) - 1
        right = truth.get(key, 0.0) + (spread * (run.seed - 2) if run.seed else 0.0)
        record = record_of(setup, run, right, dev.get(run.id, 0.0))
        assert run.experiment in EXPERIMENTS
        write(folder / run.experiment / f"{run.id.replace('/', '_')}.json", record)
