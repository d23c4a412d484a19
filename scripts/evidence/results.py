"""All numbers of the page, from the records of runs: what docs/evidence/results.json holds."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from families import (
    KNOWING,
    ONE,
    PARTS,
    REPEATED,
    THREE,
    Pair,
    compare,
    counts,
    described,
    judged,
    of_ablations,
    of_methods,
    of_others,
    of_sweeps,
)
from grid import ABLATIONS, LONGER, NUMBERS, RANKS, SYSTEMS, VARIANTS
from knowledge import BASE, beside_other, general, general_study, measured, routing
from labels import labels
from records import AT_EQUAL_GATES, TEST_ROWS, Finals, Record, Records, equal_gates, systems_of
from rows import sizes
from scipy.stats import norm
from setups import ROOT
from simple import simple
from stats import LEVEL, Study
from tallies import Sheet, System
from times import times, vectors
from variance import without
from verdicts import POWER

SMALLEST_P = 0.001  # smaller ones are shown as such
COSTS = "docs/performance/avx2/model.json"
MADE = "python scripts/evidence/page.py"
CHANGES = {
    name: {"of": of, "flags": flags} for name, (of, flags) in (ABLATIONS | LONGER | NUMBERS | RANKS | VARIANTS).items()
}
Numbers = dict[str, Any]


def build(records: Records, *, draws: int = 10_000) -> Numbers:
    """The page's numbers; without any record they say what is missing.

    Args:
        records: of the runs.
        draws: of the bootstrap.
    """
    info = json.loads((ROOT / records.setup.data / "tasks.json").read_text(encoding="utf-8"))["tasks"]
    groups = {task: group for group, tasks in records.setup.groups.items() for task in tasks}
    rows = sum(info[task]["n"]["dev"] for task in groups)
    found: Numbers = {"made_by": MADE, "level": LEVEL, "power": POWER, "smallest_p": SMALLEST_P, "draws": draws}
    found |= {"labels": labels(records.setup), "setup": setup_of(records), "provenance": provenance(records)}
    found["tasks"] = {task: {"group": groups[task], "metric": info[task]["metric"]} for task in groups}
    found["state"], found["unplanned"] = records.state(), records.unplanned
    found["searches"] = searches(records)
    found["simple"] = simple(records.setup)
    studies = {name: part_study(records, name, draws) for name in PARTS}
    gates = {protocol: gate_study(records, protocol, draws) for protocol in records.setup.protocols}
    found["scores"] = {protocol: all_scores(records, protocol, studies) for protocol in records.setup.protocols}
    found["unstable"] = {name: unstable(study) for name, study in studies.items()}
    found["seed_spread"] = {name: seed_spread(study) for name, study in studies.items()}
    found["seed_reach"] = seed_reach(found["seed_spread"][ONE].get("mean"))
    found["families"] = families(records, studies, gates["instruction"])
    found["counts"] = {name: counts(family) for name, family in found["families"].items()}
    found["without"] = {
        name: made(records, name, studies[name], of_methods(PARTS[name], planned(records, name), targets))
        for name, targets in ((each, [without(task) for task in groups]) for each in (ONE, THREE))
    }
    found["beside"] = {
        name: made(records, name, study, of_others(planned(records, name))) for name, study in studies.items()
    }
    found["sweeps"] = made(records, ONE, studies[ONE], of_sweeps())
    found["sampling"] = sampling(records, studies[ONE])
    found["equal_gates"] = {name: at_equal_gates(study) for name, study in gates.items()}
    found["composite"] = composite(records, draws)
    found["held_out"] = held_out(records, draws)
    found |= knowledge(records, draws)
    found["routing"] = {
        protocol: {
            name: routing(
                each.done, groups, None if name.startswith("moelora") else rows, of_tasks=name.startswith("at_moe")
            )
            for name, each in records.of(protocol, TEST_ROWS).items()
        }
        for protocol in records.setup.protocols
    }
    found["routing_rows"], found["costs"] = rows, costs()
    return short(found)


def costs() -> Numbers:
    """Time beside stock LoRAs, by method, step of a whole model and kind of LoRA, from scripts/bench."""
    rows = json.loads((ROOT / COSTS).read_text(encoding="utf-8"))["rows"]
    found: Numbers = {}
    for row in rows:
        if row["dtype"] == "fp32" and "ratios" in row:
            found.setdefault(row["method"], {})[row["step"]] = row["ratios"]
    return found


def setup_of(records: Records) -> Numbers:
    """What all runs have in common."""
    setup = records.setup
    return {
        "model": (setup.source or setup.model).rpartition("/")[2],
        "data": setup.data,
        "rates": setup.rates,
        "beyond": setup.beyond,
        "seeds": {name or "all others": seeds for name, seeds in setup.seeds.items()},
        "inputs": setup.inputs,
        "search_bare": setup.search_bare,
        "held_out": setup.held_out or setup.tasks,
        "unequal": setup.unequal,
        "flags": setup.common,
        "systems": SYSTEMS,
        "changes": CHANGES,
    }


def provenance(records: Records) -> Numbers:
    """Commits, versions and machines of the runs, each once, and the CPU hours of all."""
    found: Numbers = {"commits": [], "versions": [], "machines": [], "hours": 0.0}
    for record in (record for run_id, record in records.found.items() if run_id in records.runs):
        found["hours"] += record["seconds"]["total_cpu"] / 3600
        for name, key in (("commits", "commit"), ("versions", "versions"), ("machines", "machine")):
            value = record[key] | {"vectors": vectors(record)} if key == "machine" else record[key]
            if value is not None and value not in found[name]:
                found[name].append(value)
    return found


def searches(records: Records) -> list[Numbers]:
    """Learning rates and their scores on dev, and by how much the best is ahead of the second."""
    return [
        {"protocol": protocol, "system": system, "chosen": chosen, "lead": lead(rates)}
        | {"rates": [{"rate": rate, "score": score} for rate, score in rates.items()]}
        for protocol, system, rates, chosen in records.searches()
    ]


def lead(rates: Mapping[float, float | None]) -> float | None:
    """The best score minus the second; None while some are missing."""
    scores = sorted(score for score in rates.values() if score is not None)
    return scores[-1] - scores[-2] if len(scores) == len(rates) > 1 else None


def part_study(records: Records, name: str, draws: int) -> Study | None:
    """All systems of a part of the experiment that answered all test rows."""
    return study_of(systems_of(records.sheet, finals_of(records, name)), draws, REPEATED)


def finals_of(records: Records, name: str) -> dict[str, Finals]:
    """The systems of a part of the experiment, those without runs too."""
    part = PARTS[name]
    return {system: each for system, each in records.of(part.protocol, TEST_ROWS).items() if part.has(system)}


def gate_study(records: Records, protocol: str, draws: int) -> Study | None:
    """The complete methods beside themselves with equal gates: a study of its own, as these were not trained so."""
    there = {name: each for name, each in records.of(protocol, ("main",)).items() if each.complete}
    return study_of(equal_gates(records.sheet, there), draws)


def study_of(systems: Mapping[str, System], draws: int, repeated: Sequence[str] = ()) -> Study | None:
    """A study, if there are systems."""
    return Study(systems, draws=draws, repeated=repeated) if systems else None


def all_scores(records: Records, protocol: str, studies: Mapping[str, Study | None]) -> Numbers:
    """Scores of the systems of a protocol; AT-MoE's are those beside the systems of one epoch."""
    found: Numbers = {}
    for name, part in PARTS.items():
        if part.protocol == protocol:
            new = {system: each for system, each in finals_of(records, name).items() if system not in found}
            found |= scores(studies[name], new, records.sheet)
    order = records.of(protocol, TEST_ROWS)
    return {system: found[system] for system in order}


def scores(study: Study | None, finals: Mapping[str, Finals], sheet: Sheet) -> Numbers:
    """By system: seeds, sizes, times, and scores with intervals; `targets` is None where nothing has been run."""
    return {
        name: described_runs(each, sheet) | {"targets": estimates(study, name) if study and each.done else None}
        for name, each in finals.items()
    }


def estimates(study: Study, name: str) -> Numbers:
    """The scores of a system by task, and their mean."""
    return {target: asdict(estimate) for target, estimate in study.estimate(name).items() if is_shown(study, target)}


def is_shown(study: Study, target: str) -> bool:
    """Whether a target is a task or the mean of all."""
    return target in study.sheet.tasks or target == "mean"


def unstable(study: Study | None) -> dict[str, list[str]]:
    """By task and for the mean, the systems whose seeds differ more than those of the others."""
    found = study.seeds.unstable.items() if study else ()
    return {target: names for target, names in found if study and is_shown(study, target)}


def seed_spread(study: Study | None) -> dict[str, float | None]:
    """The standard deviation of one run's score from its seed, by target; None where no system has several seeds."""
    found = study.seeds.shared.items() if study else ()
    return {target: seeds.observed**0.5 if seeds.observed else None for target, seeds in found}


def seed_reach(spread: float | None) -> float | None:
    """How far apart two runs lie by their seeds alone, in 95 of 100 cases, if one run's score has this spread."""
    return None if spread is None else float(norm.ppf(1 - LEVEL / 2)) * 2**0.5 * spread


def described_runs(finals: Finals, sheet: Sheet) -> Numbers:
    """What a system's runs say beside their scores. `all_stages` adds the runs whose adapters they start from."""
    found: Numbers = {"experiment": finals.experiment, "planned": len(finals.planned)}
    found |= {"runs": len(finals.done), "seeds": [record["seed"] for record in finals.done]}
    if not finals.done:
        return found
    first = finals.done[0]
    return found | {
        "learning_rate": first["learning_rate"],
        "parameters": first["parameters"],
        "constant": constant(finals.done, sheet),
        "answer_tokens": mean(record["answer_tokens"] / record["scores"]["mean"]["n"] for record in finals.done),
        "all_stages": {
            "trainable": first["parameters"]["trainable"]
            + sum(need["parameters"]["trainable"] for need in finals.needs[0]),
        },
        "times": times(finals),
    }


def constant(done: Sequence[Record], sheet: Sheet) -> dict[str, int]:
    """By task, how many runs gave all of its rows the same answer; tasks without such a run are left out."""
    found = {
        name: sum(len({record["answers"][row] for row in task.rows}) == 1 for record in done)
        for name, task in sheet.tasks.items()
    }
    return {name: runs for name, runs in found.items() if runs}


def families(records: Records, studies: Mapping[str, Study | None], gates: Study | None) -> Numbers:
    """Verdicts, by family: see families.py."""
    found = {}
    for name, part in PARTS.items():
        runs = planned(records, name)
        for kind, targets in (("mean", ("mean",)), ("tasks", records.setup.tasks)):
            pairs = of_methods(part, runs, targets)
            found[f"{name}: {kind}"] = judged(compare(studies[name], pairs, complete(records, name)))
    ablations = compare(studies[ONE], of_ablations(), complete(records, ONE))
    asked = [pair for pair in of_ablations() if pair.name == AT_EQUAL_GATES.format(pair.other)]
    ablations |= compare(gates, asked, set(gates.systems if gates else ()))
    found["ablations"] = judged(ablations)
    return found


def planned(records: Records, name: str) -> dict[str, int]:
    """How many runs each system of a part has in the plan."""
    return {system: len(each.planned) for system, each in finals_of(records, name).items()}


def complete(records: Records, name: str) -> set[str]:
    """The systems of a part that have all their seeds."""
    return {system for system, each in finals_of(records, name).items() if each.complete}


def made(records: Records, name: str, study: Study | None, pairs: Iterable[Pair]) -> list[Numbers]:
    """Comparisons within a part, without verdicts."""
    return [described(pair, each) for pair, each in compare(study, pairs, complete(records, name)).items()]


def sampling(records: Records, study: Study | None) -> list[Numbers]:
    """By task, its training rows, and what drawing tasks evenly changes beside drawing them in proportion to these."""
    rows = sizes(records.setup)
    pairs = [
        Pair(pair.name, pair.other, task) for task in rows for pair in of_sweeps() if pair.name.endswith("-uniform")
    ]
    return [each | {"rows": rows[each["target"]]} for each in made(records, ONE, study, pairs)]


def at_equal_gates(study: Study | None) -> Numbers:
    """Methods with equal gates: their scores, and the difference from the gates that they have."""
    if study is None:
        return {}
    equal = {
        name: AT_EQUAL_GATES.format(name) for name in study.systems if AT_EQUAL_GATES.format(name) in study.systems
    }
    # with their own gates they are the same adapters, whose seeds would count twice
    alone = Study({name: study.systems[name] for name in equal.values()}, draws=study.draws)
    return {
        name: {
            "score": asdict(alone.estimate(other)["mean"]),
            "difference": asdict(study.compare(other, name, shared=True)["mean"].difference),
        }
        for name, other in equal.items()
    }


def knowledge(records: Records, draws: int) -> Numbers:
    """General knowledge of systems, and of methods beside their LoRA, with seeds pooled as those of scores are."""
    finals = records.of("instruction", ("main", "ablations"))
    base = next(iter(measured(finals[BASE].done)), None)
    parts = {
        name: {system: each for system, each in finals.items() if PARTS[name].has(system) or system == BASE}
        for name in (ONE, THREE)
    }
    studies = {
        name: general_study({system: each.done for system, each in systems.items()}, draws)
        for name, systems in parts.items()
    }
    part_of = {system: ONE if system in parts[ONE] else THREE for system in finals}
    beside = []
    for pair in KNOWING:
        there = all(finals[name].complete for name in pair)
        study, (done, others) = studies[part_of[pair[1]]], (finals[name].done for name in pair)
        found = beside_other(pair, done, others, study) if there else None
        beside.append({"name": pair[0], "against": pair[1], "found": found})
    return {
        "general": {name: general(name, each.done, base, studies[part_of[name]]) for name, each in finals.items()},
        "general_beside": beside,
        "general_unstable": {name: unstable(study) for name, study in studies.items()},
    }


def composite(records: Records, draws: int) -> Numbers:
    """Scores on rows that need two tasks, and differences from the stock LoRA that was trained on the same rows."""
    finals = records.of("instruction", ("composite",))
    is_there = any(each.done for each in finals.values())
    sheet = records.composite_sheet if is_there else records.sheet  # which is not made for nothing
    study = study_of(systems_of(sheet, finals), draws)
    found = scores(study, finals, sheet)
    for name, entry in found.items():
        other = f"lora-r16-{name.partition('-')[2]}"
        there = other in finals and finals[name].complete and finals[other].complete
        difference = study.compare(name, other)["mean"].difference if study and there else None
        entry["difference"] = asdict(difference) if difference else None
    return found


def held_out(records: Records, draws: int) -> list[Numbers]:
    """Scores on tasks that were left out of training; of one seed, so that intervals are of inputs alone."""
    found = []
    finals = records.of("instruction", ("held_out",))
    for task in records.setup.held_out or records.setup.tasks:
        sheet = records.held_out_sheet(task)
        for name in [name for name in finals if name.endswith(f"-without-{task}")]:
            entry: Numbers = {"task": task, "name": name, "system": name.removesuffix(f"-without-{task}")}
            entry |= {"score": one_score(systems_of(sheet, {name: finals[name]}), draws, name)}
            equal = AT_EQUAL_GATES.format(name)
            entry["equal_gates"] = one_score(equal_gates(sheet, {name: finals[name]}), draws, equal)
            found.append(entry)
    return found


def one_score(systems: Mapping[str, System], draws: int, name: str) -> Numbers | None:
    """The mean score of a system, if it is there."""
    return asdict(Study(systems, draws=draws).estimate(name)["mean"]) if name in systems else None


def short(value: Any) -> Any:
    """Numbers to six digits, as far as they mean anything; and what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): short(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(entry) for entry in value]
    if isinstance(value, float) or hasattr(value, "dtype"):
        value = float(value)
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value
