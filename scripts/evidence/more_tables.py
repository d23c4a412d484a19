"""The other tables: learning rates, general knowledge, and what has no verdicts."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from cells import NONE, NOT_RUN, difference, millions, number, of_runs, score, table
from comparison_tables import beside, family, family_by_task, in_short, others, summary, without_one_task
from families import BARE, KNOWING, ONE, THREE
from page_tables import (
    Results,
    ablated,
    by_task,
    constant,
    hours,
    named,
    provenance,
    scores,
    setup,
    state,
    three_epochs,
)
from routing_tables import costs, equal_gates, gates


def searches(found: Results) -> str:
    """Scores on dev by learning rate, the chosen one bold."""
    rates = sorted({each["rate"] for search in found["searches"] for each in search["rates"]})
    rows = []
    for search in found["searches"]:
        values = {each["rate"]: number(each["score"], missing=NOT_RUN) for each in search["rates"]}
        if search["chosen"] is not None:
            values[search["chosen"]] = f"**{values[search['chosen']]}**"
        label = named(found, search["system"])
        several = len({each["protocol"] for each in found["searches"]}) > 1
        label = f"{search['protocol']}: {label}" if several else label
        rows.append([label, *(values.get(rate, NONE) for rate in rates), number(search["lead"])])
    return table(["mean score on dev", *(f"{rate:g}" for rate in rates), "lead"], rows)


def general(found: Results) -> str:
    """General knowledge before (the base model) and after."""
    expected = {"base", *chain.from_iterable(KNOWING)}  # named in the table if they are missing
    wanted = {name: each for name, each in found["general"].items() if each or name in expected}
    first: Mapping[str, Any] | None = next((each for each in wanted.values() if each), None)
    sources = list(first["perplexity"]) if first else []
    rows = []
    for name, each in wanted.items():
        seeds = {"runs": each["seeds"] if each else 0, "planned": found["scores"]["instruction"][name]["planned"]}
        if each is None:
            rows.append([found["labels"][name], of_runs(seeds), NOT_RUN, *[NONE] * (len(sources) + 1)])
            continue
        texts = [perplexity(each["perplexity"][source], each["seeds"]) for source in sources]
        choice = each["choice"]["mean"]
        ends = f" ({choice['lowest']:.3f} to {choice['highest']:.3f})" if each["seeds"] > 1 else ""
        change = difference(choice["difference"]) if choice["difference"] else NONE
        rows.append([found["labels"][name], of_runs(seeds), *texts, f"{choice['value']:.3f}{ends}", change])
    head = [
        "system",
        "seeds",
        *(f"perplexity: {source}" for source in sources),
        "multiple choice, mean accuracy",
        "change",
    ]
    return table(head, rows)


def perplexity(entry: Mapping[str, Any], seeds: int) -> str:
    """A perplexity with the ends of its seeds, and what it is of the base model's."""
    ends = f" ({entry['lowest']:.2f} to {entry['highest']:.2f})" if seeds > 1 else ""
    ratio = "" if entry["ratio"] is None else f", × {entry['ratio']:.2f}"
    return f"{entry['value']:.2f}{ends}{ratio}"


def general_beside(found: Results) -> str:
    """General knowledge of a method beside that of its LoRA: ratios of perplexities, difference in accuracy."""
    rows = []
    for each in found["general_beside"]:
        names, there = [named(found, each[key]) for key in ("name", "against")], each["found"]
        ratios = ", ".join(f"{source} {ratio:.2f}" for source, ratio in there["perplexity"].items()) if there else NONE
        rows.append([*names, difference(there["choice"] if there else None), ratios])
    return table(["system", "against", "difference in accuracy", "perplexity, as a ratio"], rows)


def choices(found: Results) -> str:
    """Accuracy in each set of questions."""
    there = {name: each["choice"] for name, each in found["general"].items() if each}
    if not there:
        return "No run is there yet."
    sets = [name for name in next(iter(there.values())) if name != "mean"]
    rows = [[found["labels"][name], *(number(each[one]["value"]) for one in sets)] for name, each in there.items()]
    first = next(iter(there.values()))
    chance = ["*chance*", *(number(first[one]["chance"]) for one in sets)]
    return table(["accuracy", *(f"{one}, {first[one]['n']} questions" for one in sets)], [chance, *rows])


def held_out(found: Results) -> str:
    """Tasks that were left out of training, beside systems that were trained with them."""
    rows = []
    for each in found["held_out"]:
        base, trained = (of_task(found, name, each["task"]) for name in ("base", each["system"]))
        equal = score(each["equal_gates"]) if each["system"] == "moelora" else NONE
        system = found["labels"][each["system"]]
        rows.append([each["task"], system, score(base), score(each["score"]), equal, score(trained)])
    head = ["task", "system", "base model", "trained without it", "the same, equal gates", "trained with it"]
    return table(head, rows)


def of_task(found: Results, name: str, task: str) -> Mapping[str, Any] | None:
    """A system's score on a task, with instructions."""
    targets = found["scores"]["instruction"][name]["targets"]
    return targets[task] if targets else None


def composite(found: Results) -> str:
    """Rows that need two tasks at once."""
    rows = []
    for name, entry in found["composite"].items():
        value = score(entry["targets"]["mean"] if entry["targets"] else None)
        is_other = name.startswith(("lora-r16", "base"))
        against = NONE if is_other else difference(entry["difference"])
        rows.append([found["labels"][name], value, of_runs(entry), against])
    return table(["system", "mean score", "seeds", "difference from the LoRA of rank 16"], rows)


def composite_seeds(found: Results) -> str:
    """How much of a difference can be a matter of the seed."""
    spread, reach = found["seed_spread"][ONE].get("mean"), found["seed_reach"]
    if reach is None:
        return "How far seeds spread is not known yet."
    return (
        f"After one epoch on single tasks, a run's mean score has a standard deviation of {spread:.3f} over seeds. "
        f"Were it the same here, two seeds of one system would be up to {reach:.3f} apart in 95 of 100 cases "
        "(1.96 · √2 · as much)."
    )


def sweep(experiment: str, *first: str) -> Any:
    """An exploratory experiment, behind the systems of the main one that belong into its row."""

    def made(found: Results) -> str:
        there, pairs = found["scores"]["instruction"], {each["name"]: each for each in found["sweeps"]}
        names = [*first, *(name for name, each in there.items() if each["experiment"] == experiment)]
        rows = []
        for name in names:
            entry, stages = there[name], there[name].get("all_stages")
            value = score(entry["targets"]["mean"] if entry["targets"] else None)
            pair = pairs.get(name)
            against = [difference(pair["difference"]), named(found, pair["against"])] if pair else [NONE, NONE]
            bits = found["routing"]["instruction"].get(name)
            told = number(bits["mutual_information"]["mean"], ".2f") if bits else NONE
            size = millions(stages["trainable"]) if stages else NONE
            rate = number(entry.get("learning_rate"), "g")
            rows.append([named(found, name), value, *against, of_runs(entry), rate, size, told])
        return table(["system", "mean score", "difference", "from", "seeds", "rate", "trained", "bits"], rows)

    return made


def sampling_by_task(found: Results) -> str:
    """What drawing tasks evenly changes for tasks with many and with few rows."""
    of_task: dict[str, list[str]] = {}
    for each in found["sampling"]:
        of_task.setdefault(each["target"], [str(each["rows"])]).append(difference(each["difference"]))
    names = list(dict.fromkeys(named(found, each["name"]) for each in found["sampling"]))
    return table(["task", "training rows", *names], [[task, *cells] for task, cells in of_task.items()])


def unstable(found: Results) -> str:
    """Systems whose seeds differ more than those of the others."""
    rows = []
    parts = found["unstable"] | {f"{part}, general knowledge": each for part, each in found["general_unstable"].items()}
    for part, by_target in parts.items():
        for target, names in by_target.items():
            if names:
                rows.append([part, target, ", ".join(found["labels"][name] for name in names)])
    if not rows:
        return "No such system among the runs that are there."
    return table(["systems of", "score", "which"], rows)


def seeds(found: Results) -> str:
    """Each seed's mean score."""
    rows = []
    for protocol, systems in found["scores"].items():
        for name, entry in systems.items():
            if entry["experiment"] in ("main", "longer", "ablations") and entry["targets"] and name != "base":
                values = ", ".join(number(value) for value in entry["targets"]["mean"]["per_seed"])
                error = entry["targets"]["mean"]["standard_error"]
                rows.append([f"{protocol}: {found['labels'][name]}", values, number(error)])
    return table(["system", "mean score of each seed", "standard error"], rows) if rows else "No run is there yet."


TABLES = {
    "in-short": in_short,
    "state": state,
    "hours": hours,
    "summary": summary,
    "others": others,
    "setup": setup,
    "provenance": provenance,
    "searches": searches,
    "scores-instruction": scores("instruction"),
    "scores-bare": scores("bare"),
    "scores-longer": scores("instruction", three_epochs),
    "tasks-instruction": by_task("instruction"),
    "tasks-longer": by_task("instruction", three_epochs),
    "tasks-bare": by_task("bare"),
    "methods": family(f"{ONE}: mean", f"{THREE}: mean", f"{BARE}: mean"),
    "without-one-task": without_one_task(ONE),
    "without-one-task-longer": without_one_task(THREE),
    "constant": constant,
    "beside": beside,
    "methods-by-task-one": family_by_task(ONE),
    "methods-by-task-three": family_by_task(THREE),
    "methods-by-task-bare": family_by_task(BARE),
    "ablations": family("ablations"),
    "ablated-scores": scores("instruction", ablated),
    "general": general,
    "general-beside": general_beside,
    "choices": choices,
    "gates": gates,
    "equal-gates": equal_gates,
    "costs": costs,
    "composite": composite,
    "composite-seeds": composite_seeds,
    "held-out": held_out,
    "experts": sweep("experts", "moelora", "molora"),
    "ranks": sweep("rank", "lora-r16", "moelora", "molora"),
    "sampling": sweep("sampling"),
    "sampling-by-task": sampling_by_task,
    "variants": sweep("variants", "molora"),
    "unstable": unstable,
    "seeds": seeds,
}
