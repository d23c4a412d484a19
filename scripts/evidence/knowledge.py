"""What records say beside answers: general knowledge before and after training, and where gates send tokens."""

import re
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
from scipy import stats
from specialisation import bias_bound, ceiling, normalised, specialisation

General = Mapping[str, Any]
BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def general(records: Sequence[Mapping[str, Any]], base: General | None) -> dict[str, Any] | None:
    """General knowledge of a system, means over seeds, beside the base model's; None where it was not measured.

    `ratio` is a perplexity over the base model's, `difference` an accuracy minus the base model's; `lowest` and
    `highest` are of single seeds. The interval is of the questions, drawn anew within their sets, and not of seeds.
    """
    found = [record["general"] for record in records if "general" in record]
    if not found:
        return None
    perplexity = {}
    for source in found[0]["perplexity"]:
        values = [each["perplexity"][source]["per_token"] for each in found]
        before = base["perplexity"][source]["per_token"] if base else None
        perplexity[source] = spread(values) | {"ratio": mean(values) / before if before else None}
    choice = {name: one_set(name, found, base) for name in found[0]["choice"]}
    choice["mean"] = of_all_sets(found, base)
    return {"seeds": len(found), "perplexity": perplexity, "choice": choice}


def one_set(name: str, found: Sequence[General], base: General | None) -> dict[str, Any]:
    """Accuracy in a set of questions."""
    first = found[0]["choice"][name]
    accuracy = spread([each["choice"][name]["acc"] for each in found])
    before = base["choice"][name]["acc"] if base else None
    difference = None if before is None else accuracy["value"] - before
    of_length = mean(each["choice"][name]["acc_norm"] for each in found)
    return accuracy | {"difference": difference, "acc_norm": of_length, "n": first["n"], "chance": first["chance"]}


def of_all_sets(found: Sequence[General], base: General | None) -> dict[str, Any]:
    """The mean accuracy over sets, and its difference from the base model's with an interval."""
    sets = list(found[0]["choice"])
    value = spread([mean(each["choice"][name]["acc"] for name in sets) for each in found])
    value |= {"n": sum(found[0]["choice"][name]["n"] for name in sets)}
    return value | (change(found, [base]) if base else {"difference": None, "low": None, "high": None})


def change(found: Sequence[General], others: Sequence[General]) -> dict[str, float]:
    """The mean accuracy over sets minus that of others, means over seeds, with an interval of the questions."""
    sets = list(found[0]["choice"])
    changes = [right(found, name) - right(others, name) for name in sets]
    difference = float(np.mean([each.mean() for each in changes]))
    error = float(np.sqrt(sum(each.var(ddof=1) / len(each) for each in changes)) / len(sets))
    reach = float(stats.norm.ppf(0.975)) * error
    return {"difference": difference, "low": difference - reach, "high": difference + reach}


def right(found: Sequence[General], name: str) -> np.ndarray:
    """The share of seeds that are right, for each question of a set."""
    return np.mean([each["choice"][name]["correct"] for each in found], axis=0)


def beside_other(records: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """General knowledge beside that of another system: ratios of perplexities, and the difference in accuracy.

    None where one of them was not measured.
    """
    found, beside = ([each["general"] for each in some if "general" in each] for some in (records, others))
    if not found or not beside:
        return None
    ratios = {
        source: mean(each["perplexity"][source]["per_token"] for each in found)
        / mean(each["perplexity"][source]["per_token"] for each in beside)
        for source in found[0]["perplexity"]
    }
    return {"perplexity": ratios, "choice": change(found, beside)}


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
