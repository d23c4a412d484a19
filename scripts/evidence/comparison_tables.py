"""The tables of what is compared: families with verdicts, what stands beside, and the mean without one task."""

from collections.abc import Callable, Mapping
from typing import Any

from cells import NONE, NOT_RUN, difference, number, probability, table, verdict
from families import ONE, THREE
from page_tables import Results, named


def summary(found: Results) -> str:
    """What the experiment was made for: each method beside its LoRA."""
    rows = []
    for part in (ONE, THREE):
        for each in found["families"][f"{part}: mean"]:
            names = [within(found, each[key]) for key in ("name", "against")]
            detectable = number(each.get("detectable"))
            rows.append([part, *names, difference(each["difference"]), verdict(each), detectable])
    return table(["after", "method", "against", "difference of mean scores", "verdict", "detectable"], rows)


def in_short(found: Results) -> str:
    """What came out of the main comparisons, in a sentence."""
    told = "; ".join(f"after {part}, {of_counts(found['counts'][f'{part}: mean'])}" for part in (ONE, THREE))
    return f"The methods, each against the stock LoRA with its parameters, by the mean score: {told}."


def of_counts(counted: Mapping[str, int]) -> str:
    """How many comparisons came out in each way."""
    made = counted["all"] - counted["missing"]
    ways = [way for way in VERBS if counted[way] or (made and way != "missing")]
    told = [f"{counted[way] or 'none'} {VERBS[way][counted[way] > 1]}" for way in ways]
    return f"of {counted['all']} {' and '.join([', '.join(told[:-1]), told[-1]] if told[1:] else told)}"


VERBS = {
    "win": ("wins", "win"),
    "tie": ("ties", "tie"),
    "loss": ("loses", "lose"),
    "missing": ("is not run yet", "are not run yet"),
}


def within(found: Results, system: str) -> str:
    """What the page calls a system, where it says beside how long it was trained."""
    return named(found, system).removesuffix(f", {ONE}").removesuffix(f", {THREE}")


def others(found: Results) -> str:
    """What came out of the other families, by name."""
    rows = []
    for family, counted in found["counts"].items():
        if family not in (f"{ONE}: mean", f"{THREE}: mean"):
            members = found["families"][family]
            better, worse = (
                "; ".join(in_family(found, family, each) for each in members if each["verdict"] == way) or NONE
                for way in ("win", "loss")
            )
            tied = NONE if counted["missing"] == counted["all"] else str(counted["tie"])
            rows.append([family, str(counted["all"]), better, worse, tied, str(counted["missing"])])
    return table(["family", "comparisons", "better", "worse", "tied", NOT_RUN], rows)


def in_family(found: Results, family: str, each: Mapping[str, Any]) -> str:
    """A comparison in a few words."""
    name = within(found, each["name"])
    return f"{name} in {each['target']}" if family.endswith(": tasks") else name


def family(*names: str) -> Callable[[Results], str]:
    """The comparisons of families with their verdicts."""

    def made(found: Results) -> str:
        head = ["what", "against", "difference", "p", "p, corrected", "verdict", "by own seeds", "detectable"]
        rows = []
        for name in names:
            part = f"{name.partition(':')[0]}: " if len(names) > 1 else ""
            for each in found["families"][name]:
                systems = [part + within(found, each["name"]), within(found, each["against"])]
                values = [probability(each.get(key), found["smallest_p"]) for key in ("p", "p_corrected")]
                values += [verdict(each), each.get("own") or NONE, number(each.get("detectable"))]
                rows.append([*systems, difference(each["difference"]), *values])
        return table(head, rows)

    return made


def family_by_task(part: str) -> Callable[[Results], str]:
    """The differences by task of a part, a column for each method, with the verdicts that are no ties."""

    def made(found: Results) -> str:
        cells: dict[str, dict[str, str]] = {task: {} for task in found["tasks"]}
        for each in found["families"][f"{part}: tasks"]:
            is_tie = each["verdict"] in (None, "tie")
            word = "" if is_tie else f"{verdict(each)} "
            cells[each["target"]][each["name"]] = word + difference(each["difference"])
        names = list(next(iter(cells.values())))
        rows = [[task, *(of_task[name] for name in names)] for task, of_task in cells.items()]
        return table(["task", *(within(found, name) for name in names)], rows)

    return made


def beside(found: Results) -> str:
    """Comparisons of methods without a verdict."""
    rows = []
    for part, comparisons in found["beside"].items():
        for each in comparisons:
            names = [named(found, each[key]) for key in ("name", "against")]
            p = probability(each.get("p"), found["smallest_p"])
            rows.append([part, *names, difference(each["difference"]), p])
    return table(["after", "method", "against", "difference", "p, not corrected"], rows)


def without_one_task(part: str) -> Callable[[Results], str]:
    """The difference of the means when any one of the tasks is left out, and how far seeds spread then."""

    def made(found: Results) -> str:
        whole = found["families"][f"{part}: mean"]
        names, rows = [each["name"] for each in whole], []
        for task in (None, *found["tasks"]):
            target = f"without {task}" if task else "mean"
            among = found["without"][part] if task else whole
            there = {each["name"]: each["difference"] for each in among if each["target"] == target}
            spread = number(found["seed_spread"][part].get(target))
            rows.append([target if task else "all", *(difference(there[name]) for name in names), spread])
        return table(["tasks", *(within(found, name) for name in names), "spread of seeds"], rows)

    return made
