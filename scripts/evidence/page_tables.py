"""The tables of docs/evidence.md from docs/evidence/results.json, and from nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

from cells import (
    NONE,
    NOT_RUN,
    difference,
    millions,
    minutes,
    number,
    of_runs,
    probability,
    score,
    signed,
    table,
    verdict,
)

Results = Mapping[str, Any]


def state(found: Results) -> str:
    """What is done, and what is missing."""
    rows = []
    for entry in found["state"]:
        left = ", ".join(f"`{system}` ({runs})" for system, runs in entry["missing"].items()) or NONE
        what = f"{entry['experiment']}, {entry['protocol']}, {entry['purpose']}"
        rows.append([what, str(entry["planned"]), str(entry["done"]), left if entry["done"] else "all"])
    text = table(["runs", "planned", "done", "missing, and how many"], rows)
    if found["unplanned"]:
        text += "\n\nNot used, as the plan has no such runs: " + ", ".join(f"`{each}`" for each in found["unplanned"])
        text += "."
    return text


def setup(found: Results) -> str:
    """What all runs have in common, and the flags of each system."""
    given = found["setup"]
    rates = ", ".join(f"{rate:g}" for rate in given["rates"])
    below, above = (", ".join(f"{rate:g}" for rate in each) for each in given["beyond"])
    seeds = "; ".join(f"{name.replace('_', ' ')}: {', '.join(map(str, each))}" for name, each in given["seeds"].items())
    flags = " ".join(f"`{name}={value}`" for name, value in given["flags"].items())
    rows = [
        ["base model", f"`{given['model']}`"],
        ["rows", f"`{given['data']}`"],
        [
            "rows for training",
            f"those of the first {given['inputs']} inputs of each group" if given["inputs"] else "all",
        ],
        ["learning rates tried", f"{rates}; while the best is the lowest, {below}; the highest, {above}"],
        ["seed of searches", "0"],
        ["rates of the bare protocol", "searched too" if given["search_bare"] else "those of the instruction protocol"],
        ["seeds of final runs", seeds],
        ["tasks held out", ", ".join(given["held_out"])],
        ["training, all runs", flags],
    ]
    systems = [
        [
            found["labels"][name],
            " ".join(f"`{flag}={value}`" for flag, value in flags.items() if flag != "lora_dropout"),
        ]
        for name, flags in given["systems"].items()
    ]
    return table(["", ""], rows) + "\n\n" + table(["system", "its flags"], systems)


def provenance(found: Results) -> str:
    """Where the records come from."""
    given = found["provenance"]
    if not given["commits"]:
        return "No run is there yet."
    machines = [
        f"{each['cpu']} ({each['vectors']}), {each['beside']} processes side by side of {each['threads']} thread each"
        for each in given["machines"]
    ]
    versions = [", ".join(f"{name} {value}" for name, value in each.items()) for each in given["versions"]]
    rows = [
        ["commits (+: with changes)", ", ".join(f"`{each}`" for each in given["commits"])],
        ["versions", "; ".join(versions)],
        ["machines", "; ".join(machines)],
        ["CPU hours of these runs", number(given["hours"], ".3f")],
    ]
    return table(["", ""], rows)


def summary(found: Results) -> str:
    """How many comparisons were won, tied and lost."""
    rows = [
        [name, *(str(counted[each]) for each in ("all", "win", "tie", "loss", "missing"))]
        for name, counted in found["counts"].items()
    ]
    return table(["family", "comparisons", "won", "tied", "lost", NOT_RUN], rows)


def scores(protocol: str, experiment: str = "main") -> Callable[[Results], str]:
    """Mean scores with sizes and times, of the systems of an experiment."""

    def made(found: Results) -> str:
        rows, kinds = [], sorted({each["vectors"] for each in found["provenance"]["machines"]})
        for name, entry in entries(found, protocol, experiment).items():
            size, stages = entry.get("parameters"), entry.get("all_stages")
            trains = bool(size and size["trainable"])
            rows.append(
                [
                    found["labels"][name],
                    score(entry["targets"]["mean"] if entry["targets"] else None),
                    of_runs(entry),
                    number(entry.get("learning_rate"), "g"),
                    millions(stages["trainable"]) if trains else NONE,
                    number(size["active_rank"], "g") if trains else NONE,
                    times(entry, "train_cpu", kinds) if trains else NONE,
                    times(entry, "answer_cpu", kinds) if size else NONE,
                    number(entry.get("answer_tokens"), ".1f"),
                ]
            )
        head = ["system", "mean score", "seeds", "rate", "trained", "active rank"]
        of_each = f": {' / '.join(kinds)}" if len(kinds) > 1 else ""
        head += [f"{what}, CPU min{of_each}" for what in ("training", "answers")]
        return table([*head, "tokens an answer"], rows)

    return made


def times(entry: Mapping[str, Any], what: str, kinds: list[str]) -> str:
    """CPU minutes of a system on each kind of CPU; a dash where there is no run."""
    found = (entry["times"].get(kind, {}).get(what) for kind in kinds)
    return " / ".join(NONE if seconds is None else minutes(seconds) for seconds in found)


def by_task(protocol: str) -> Callable[[Results], str]:
    """Scores by task of the systems of the main experiment."""

    def made(found: Results) -> str:
        rows = [
            [SIMPLE[name], *(number(scores[task]) for task in found["tasks"])]
            for name, scores in found["simple"].items()
        ]
        for name, entry in entries(found, protocol, "main").items():
            targets = entry["targets"]
            cells = [number(targets[task]["value"] if targets else None, missing=NOT_RUN) for task in found["tasks"]]
            rows.append([found["labels"][name], *cells])
        metrics = ["*metric*", *(f"*{task['metric']}*" for task in found["tasks"].values())]
        return table(["system", *found["tasks"]], [metrics, *rows])

    return made


def family(*names: str) -> Callable[[Results], str]:
    """The comparisons of families with their verdicts."""

    def made(found: Results) -> str:
        head = ["what", "against", "difference", "p", "p, corrected", "verdict", "detectable"]
        rows = []
        for name in names:
            protocol = name.partition(":")[0] if ":" in name else ""
            for each in found["families"][name]:
                parts = [protocol] if len(names) > 1 else []
                parts += [each["target"]] if each["target"] != "mean" else []
                what = ": ".join([*parts, found["labels"][each["name"]]])
                values = [probability(each.get(key), found["smallest_p"]) for key in ("p", "p_corrected")]
                values += [verdict(each), number(each.get("detectable_corrected"))]
                rows.append([what, found["labels"][each["against"]], difference(each["difference"]), *values])
        return table(head, rows)

    return made


def beside(found: Results) -> str:
    """Comparisons of methods without a verdict."""
    rows = [
        [protocol, *of_pair(found, each), of_runs(found["scores"][protocol][each["name"]])]
        for protocol, comparisons in found["beside"].items()
        for each in comparisons
    ]
    return table(["protocol", "method", "against", "difference", "p, not corrected", "seeds"], rows)


def longer(found: Results) -> str:
    """Comparisons of what was trained for longer."""
    rows = [of_pair(found, each) for each in found["longer"]]
    return table(["what", "against", "difference", "p, not corrected"], rows)


def of_pair(found: Results, each: Mapping[str, Any]) -> list[str]:
    """The cells of a comparison without a verdict."""
    names = [found["labels"][each[key]] for key in ("name", "against")]
    return [*names, difference(each["difference"]), probability(each.get("p"), found["smallest_p"])]


def without_one_task(found: Results) -> str:
    """The difference of the means when any one of the tasks is left out."""
    tasks, rows = list(found["tasks"]), []
    for each in found["families"]["instruction: mean"]:
        left, cells = found["without_one_task"].get(each["name"]), [NOT_RUN, *[NONE] * len(tasks)]
        if left:
            cells = [signed(value) for value in (each["difference"]["value"], *(left[task] for task in tasks))]
        rows.append([found["labels"][each["name"]], *cells])
    return table(["difference of the means", "of all tasks", *(f"without {task}" for task in tasks)], rows)


def constant(found: Results) -> str:
    """Runs that gave all rows of a task the same answer."""
    rows = []
    for protocol, systems in found["scores"].items():
        for name, entry in systems.items():
            told = ", ".join(f"{task} ({runs} of {entry['runs']})" for task, runs in entry.get("constant", {}).items())
            if told and name != "base":
                rows.append([f"{protocol}: {found['labels'][name]}", told])
    if not rows:
        return "No such run among those that are there."
    return table(["system", "tasks, and in how many of its runs"], rows)


def gates(found: Results) -> str:
    """What equal gates at test time do, and how much gates tell about tasks."""
    rows = []
    for protocol, routed in found["routing"].items():
        for name, routing in routed.items():
            entry = found["scores"][protocol][name]
            missing = name in ROUTED and entry["targets"] is None
            if entry["experiment"] not in ("main", "ablations") or (routing is None and not missing):
                continue
            asked = found["equal_gates"][protocol].get(name)
            rows.append([f"{protocol}: {found['labels'][name]}", *of_routing(routing), *of_equal_gates(asked, name)])
    head = ["system", "seeds", "gates", "bits", "of at most", "bias up to", "in groups", "diversity"]
    return table([*head, "score at equal gates", "change"], rows)


def of_routing(routing: Mapping[str, Any] | None) -> list[str]:
    """The cells of a system's gates."""
    if routing is None:
        return [NOT_RUN] + [NONE] * 6
    bits = routing["mutual_information"]
    within = ", ".join(f"{group} {value:.2f}" for group, value in routing["within"].items())
    return [
        str(routing["seeds"]),
        str(routing["gates"]),
        f"{bits['mean']:.2f} ({bits['lowest']:.2f} to {bits['highest']:.2f})",
        f"{routing['ceiling']:.2f}",
        f"{routing['bias_bound']:.2f}",
        within,
        f"{routing['diversity']:.2f}",
    ]


def of_equal_gates(asked: Mapping[str, Any] | None, name: str) -> list[str]:
    """The cells of a system at equal gates, which only the methods have."""
    if asked is None:
        return [NOT_RUN if name in ROUTED else NONE] * 2
    return [score(asked["score"]), difference(asked["difference"])]


SIMPLE = {
    "most_common": "*most common answer*",
    "nearest": "*answer of the nearest input, TF-IDF*",
    "regression": "*logistic regression on TF-IDF*",
}
ROUTED = ("moelora", "molora", "medmoelora", "at_moe")


def entries(found: Results, protocol: str, experiment: str) -> dict[str, Any]:
    """The systems of an experiment."""
    return {name: each for name, each in found["scores"][protocol].items() if each["experiment"] == experiment}
