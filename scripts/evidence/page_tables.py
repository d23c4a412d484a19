"""The tables of docs/evidence.md from docs/evidence/results.json, and from nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

from cells import NONE, NOT_RUN, millions, minutes, number, of_runs, score, table
from families import LONG

Results = Mapping[str, Any]
LARGE = ("longer", "experts", "rank")  # experiments without which the plan would be a night's


def state(found: Results) -> str:
    """What is done, and what is missing."""
    rows = []
    for entry in found["state"]:
        missing = [f"{named(found, system)} ({runs})" for system, runs in entry["missing"].items()]
        what = f"{entry['experiment'].replace('_', ' ')}, {entry['protocol']}, {entry['purpose']}"
        left = "; ".join(missing) or NONE
        spent = [f"{entry[key]:.1f}" if entry[key] else NONE for key in ("hours", "hours_left")]
        rows.append([what, str(entry["planned"]), str(entry["done"]), *spent, left if entry["done"] else "all"])
    text = table(["runs", "planned", "done", "CPU hours", "to come, about", "missing, and how many"], rows)
    if found["unplanned"]:
        text += "\n\nNot used, as the plan has no such runs: " + ", ".join(f"`{each}`" for each in found["unplanned"])
        text += "."
    return text


def hours(found: Results) -> str:
    """How long the plan takes, whole and without what was not in it at first."""
    whole = sum(map(cpu_hours, found["state"]))
    less = whole - sum(cpu_hours(entry) for entry in found["state"] if entry["experiment"] in LARGE)
    return (
        f"The plan takes about {whole:.0f} CPU hours, {whole / 2:.0f} hours on two cores. Without three epochs and the "
        f"sweeps over ranks and numbers of experts it would be {less / 2:.0f}."
    )


def cpu_hours(entry: Mapping[str, Any]) -> float:
    """Of the runs that are done, and of those to come."""
    return float(entry["hours"] + entry["hours_left"])


def named(found: Results, system: str) -> str:
    """What the page calls a system."""
    return str(found["labels"][system])


def setup(found: Results) -> str:
    """What all runs have in common, and the flags of each system."""
    given = found["setup"]
    rates = ", ".join(f"{rate:g}" for rate in given["rates"])
    below, above = (", ".join(f"{rate:g}" for rate in each) for each in given["beyond"])
    seeds = "; ".join(f"{name.replace('_', ' ')}: {', '.join(map(str, each))}" for name, each in given["seeds"].items())
    flags = " ".join(f"`--{name} {value}`" for name, value in given["flags"].items())
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
    systems = [f"* *{named(found, name)}*: {words(flags)}" for name, flags in given["systems"].items()]
    changed = [
        f"* *{named(found, name)}*: *{named(found, each['of'])}* with {words(each['flags'])}"
        for name, each in given["changes"].items()
    ]
    lists = "\n".join([*systems, "", "And of those that change one:", "", *changed])
    opened = '<details markdown="1">\n<summary>The flags of each system</summary>'
    return f"{table(['', ''], rows)}\n\n{opened}\n\n{lists}\n\n</details>"


def words(flags: Mapping[str, Any]) -> str:
    """Flags as on a command line."""
    values = {flag: " ".join(map(str, value)) if isinstance(value, list) else value for flag, value in flags.items()}
    return " ".join(f"`--{flag} {value}`" for flag, value in values.items())


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
        ["commits", ", ".join(f"`{each[:10]}`{'+' * each.endswith('+')}" for each in given["commits"])],
        ["versions", "; ".join(versions)],
        ["machines", "; ".join(machines)],
        ["CPU hours of these runs", number(given["hours"], ".1f")],
    ]
    return table(["", ""], rows)


def one_epoch(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether a system is one of the main experiment with one epoch."""
    return entry["experiment"] == "main" and name not in LONG


def three_epochs(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether a system is one of three epochs, with those that its experts were trained for."""
    return name in LONG or name == "at_moe"


def ablated(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether a system is a trained ablation."""
    return entry["experiment"] == "ablations"


Which = Callable[[str, Mapping[str, Any]], bool]


def scores(protocol: str, which: Which = one_epoch) -> Callable[[Results], str]:
    """Mean scores with sizes and times, of some of the systems."""

    def made(found: Results) -> str:
        rows, kinds = [], sorted({each["vectors"] for each in found["provenance"]["machines"]})
        for name, entry in entries(found, protocol, which).items():
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


def by_task(protocol: str, which: Which = one_epoch) -> Callable[[Results], str]:
    """Scores by task of some of the systems, the mean first."""

    def made(found: Results) -> str:
        columns = ["mean", *found["tasks"]]
        rows = [[SIMPLE[name], *(number(scores[one]) for one in columns)] for name, scores in found["simple"].items()]
        for name, entry in entries(found, protocol, which).items():
            targets = entry["targets"]
            cells = [number(targets[one]["value"] if targets else None, missing=NOT_RUN) for one in columns]
            rows.append([found["labels"][name], *cells])
        metrics = ["*metric*", NONE, *(f"*{task['metric']}*" for task in found["tasks"].values())]
        return table(["system", *columns], [metrics, *rows])

    return made


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


SIMPLE = {
    "most_common": "*most common answer*",
    "nearest": "*answer of the nearest input, TF-IDF*",
    "regression": "*logistic regression on TF-IDF*",
}


def entries(found: Results, protocol: str, which: Which) -> dict[str, Any]:
    """Some of the systems of a protocol."""
    return {name: each for name, each in found["scores"][protocol].items() if which(name, each)}
