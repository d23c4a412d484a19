"""The tables of gates: what they tell about tasks, what equal ones do, and what choosing costs."""

from collections.abc import Mapping
from typing import Any

from cells import NONE, NOT_RUN, difference, number, score, signed, table
from families import METHODS
from grid import measured
from page_tables import Results, named


def gates(found: Results) -> str:
    """How much gates tell about tasks."""
    rows = []
    for protocol, routed in found["routing"].items():
        for name, routing in routed.items():
            if is_asked(found, protocol, name):
                rows.append([f"{protocol}: {named(found, name)}", *of_routing(routing)])
    head = ["system", "seeds", "gates", "bits", "of at most", "bias up to", "bits in groups", "diversity"]
    return table([*head, "weight on own expert"], rows)


def is_asked(found: Results, protocol: str, name: str) -> bool:
    """Whether a system's gates are shown: the methods in any case, and ablations that have been run."""
    entry = found["scores"][protocol][name]
    there = found["routing"][protocol][name] is not None or (name in METHODS and entry["targets"] is None)
    return there and entry["experiment"] in ("main", "ablations")


def of_routing(routing: Mapping[str, Any] | None) -> list[str]:
    """The cells of a system's gates."""
    if routing is None:
        return [NOT_RUN] + [NONE] * 7
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
        number(routing["own"], ".2f"),
    ]


def equal_gates(found: Results) -> str:
    """What equal gates at test time do."""
    rows = []
    for protocol, systems in found["equal_gates"].items():
        for name in (name for name in METHODS if name in found["scores"][protocol]):
            asked = systems.get(name)
            cells = of_equal_gates(asked) if asked else [NOT_RUN, NONE, NONE]
            if asked or "uniform" in measured(name, protocol):
                rows.append([f"{protocol}: {named(found, name)}", *cells])
    return table(["system", "score at equal gates", "change", "change of each seed"], rows)


def of_equal_gates(asked: Mapping[str, Any]) -> list[str]:
    """The cells of a system at equal gates."""
    change = asked["difference"]
    return [score(asked["score"]), difference(change), ", ".join(map(signed, change["per_seed"]))]


def costs(found: Results) -> str:
    """Time of choosing experts for a task, a prompt or a token, beside stock LoRA."""
    rows = []
    for method, (label, chosen) in CHOSEN.items():
        ratios = found["costs"].get(method, {})
        for kind, words in (("total", label), ("active", f"{label}, LoRA of its active rank")):
            there = [ratios.get(step, {}).get(kind) for step in STEPS]
            if kind == "total" or any(there):
                rows.append([words, chosen, *map(of_ratio, there)])
    return table(["time beside stock LoRA", "experts are chosen", *STEPS.values()], rows)


def of_ratio(found: Mapping[str, Any] | None) -> str:
    """A median ratio and its middle half."""
    if found is None:
        return NONE
    low, high = found["quartiles"]
    return f"{found['median']:.2f} ({low:.2f} to {high:.2f})"


STEPS = {"train": "training step", "prefill": "prefill", "decode_1": "a token, 1 row", "decode_8": "a token, 8 rows"}
CHOSEN = {
    "moelora_one_task": ("MOELoRA, rows of one task", "once for a task"),
    "moelora": ("MOELoRA, rows of different tasks", "once for a task"),
    "at_moe_prompt": ("AT-MoE, routed by prompt", "once for a prompt"),
    "at_moe": ("AT-MoE", "for each token"),
    "molora": ("MoLoRA", "for each token"),
    "medmoelora": ("Med-MoE-LoRA", "for each token"),
    "lora": ("stock LoRA again", NONE),
}
