"""What records say beside answers: general knowledge before and after training, and where gates send tokens."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

import numpy as np
from specialisation import bias_bound, ceiling, normalised, specialisation
from stats import Study
from tallies import Sheet, System, sheet_of

Record = Mapping[str, Any]
BASE = "base"
BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def general_study(systems: Mapping[str, Sequence[Record]], draws: int) -> Study | None:
    """The systems whose general knowledge was measured; None where there are none.

    A question is an input, and a set of questions a task and a stratum, so that "mean" is the mean accuracy over sets.
    """
    there = {name: measured(records) for name, records in systems.items() if measured(records)}
    if not there:
        return None
    sets = next(iter(there.values()))[0]["general"]["choice"]
    names = [name for name, one_set in sets.items() for _ in one_set["correct"]]
    questions = [f"{name} {index}" for name, one_set in sets.items() for index in range(len(one_set["correct"]))]
    sheet = sheet_of(names, questions, [""] * len(names), dict.fromkeys(sets, "exact_match"))
    return Study({name: answered(sheet, records) for name, records in there.items()}, draws=draws)


def measured(records: Sequence[Record]) -> list[Record]:
    """The records that have general knowledge."""
    return [record for record in records if "general" in record]


def answered(sheet: Sheet, records: Sequence[Record]) -> System:
    """A system's answers to the questions: for each seed and question whether it is right, and 1."""
    tallies = {}
    for name, task in sheet.tasks.items():
        tallies[name] = np.zeros((len(records), len(sheet.inputs), 2))
        right = np.array([record["general"]["choice"][name]["correct"] for record in records])
        tallies[name][:, task.inputs] = np.stack([right, np.ones_like(right)], axis=-1)
    seeds = tuple(record["seed"] or 0 for record in records)
    return System(sheet, seeds, tallies, trained=any(record["parameters"]["trainable"] for record in records))


def general(name: str, records: Sequence[Record], base: Record | None, study: Study | None) -> dict[str, Any] | None:
    """General knowledge of a system, means over seeds, beside the base model's; None where it was not measured.

    `ratio` is a perplexity over the base model's, `difference` the mean accuracy minus the base model's; `lowest` and
    `highest` are of single seeds.
    """
    found = [record["general"] for record in measured(records)]
    if not found or study is None:
        return None
    perplexity = {}
    for source in found[0]["perplexity"]:
        values = [each["perplexity"][source]["per_token"] for each in found]
        before = base["general"]["perplexity"][source]["per_token"] if base else None
        perplexity[source] = spread(values) | {"ratio": mean(values) / before if before else None}
    scores, changes = study.estimate(name), base is not None and name != BASE
    choice: dict[str, Any] = {
        one: {"value": scores[one].value, "n": entry["n"], "chance": entry["chance"]}
        for one, entry in found[0]["choice"].items()
    }
    choice["mean"] = spread(scores["mean"].per_seed)
    choice["mean"] |= {"difference": asdict(study.compare(name, BASE)["mean"].difference) if changes else None}
    return {"seeds": len(found), "perplexity": perplexity, "choice": choice}


def beside_other(
    names: tuple[str, str], records: Sequence[Record], others: Sequence[Record], study: Study | None
) -> dict[str, Any] | None:
    """General knowledge beside that of another system: ratios of perplexities, and the difference in mean accuracy.

    None where one of them was not measured.
    """
    found, beside = ([record["general"] for record in measured(some)] for some in (records, others))
    if not found or not beside or study is None:
        return None
    ratios = {
        source: mean(each["perplexity"][source]["per_token"] for each in found)
        / mean(each["perplexity"][source]["per_token"] for each in beside)
        for source in found[0]["perplexity"]
    }
    return {"perplexity": ratios, "choice": asdict(study.compare(*names)["mean"].difference)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """The mean over seeds, and the ends."""
    return {"value": mean(values), "lowest": min(values), "highest": max(values)}


def routing(
    records: Sequence[Mapping[str, Any]], groups: Mapping[str, str], rows: int | None, *, of_tasks: bool = False
) -> dict[str, Any] | None:
    """Mutual information of expert and task in bits, means over seeds; None where routing was not measured.

    Args:
        records: of a system's final runs.
        groups: the group of each task, tasks in the order of the page.
        rows: how many rows the weights are means over; None for gates that read the task alone, and no rows.
        of_tasks: whether each expert was trained on a task, in that order: AT-MoE's.
    """
    found = [record["routing"] for record in records if "routing" in record]
    if not found:
        return None
    measured = [specialisation(each, groups) for each in found]
    by_layer = np.mean([each["mutual_information"] for each in measured], axis=0)
    within = {group: float(np.mean([each["within"][group] for each in measured])) for group in measured[0]["within"]}
    tasks, counts = len(found[0]["tasks"]), found[0]["counts"]
    clearest = int(np.argmax(measured[0]["mutual_information"]))
    order = [found[0]["tasks"].index(task) for task in groups]
    weights = [normalised(each["layers"])[:, order] for each in found]  # (L, T, E)
    own = [float(each.diagonal(axis1=1, axis2=2).mean()) for each in weights] if of_tasks else []
    return {
        "seeds": len(found),
        "gates": len(by_layer),
        "mutual_information": {
            "mean": float(by_layer.mean()),
            "lowest": float(by_layer.min()),
            "highest": float(by_layer.max()),
        },
        "ceiling": mean(ceiling(tasks, count) for count in counts),
        "within": within,
        "diversity": float(np.mean([each["diversity"] for each in measured])),
        "own": mean(own) if own else None,  # mean weight of a task's own expert
        "bias_bound": 0.0 if rows is None else mean(bias_bound(tasks, count, rows) for count in counts),
        "by_depth": by_depth(found[0]["names"], by_layer.tolist()),
        "clearest": {  # of one seed, since experts have no order that seeds share
            "gate": found[0]["names"][clearest],
            "tasks": list(groups),
            "experts": list(groups) if of_tasks else [str(expert) for expert in range(counts[clearest])],
            "weights": weights[0][clearest, :, : counts[clearest]].tolist(),
        },
    }


def by_depth(names: Sequence[str], values: Sequence[float]) -> list[list[float | None]]:
    """Block and mean over its gates, in order; a gate that all blocks share has None for a block."""
    of_block: dict[int | None, list[float]] = {}
    for name, value in zip(names, values, strict=True):
        match = BLOCK.search(name)
        of_block.setdefault(int(match[1]) if match else None, []).append(value)
    ordered = sorted(of_block.items(), key=lambda item: -1 if item[0] is None else item[0])
    return [[block, mean(of_this)] for block, of_this in ordered]
