"""Two checks of an adapter's files: its size beside a LoRA's, and how far its gate tells tasks apart.

`uniform` has the third, what the gate is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def parameters(description: Mapping[str, Any]) -> dict[str, Any]:
    """Count an adapter's parameters beside those of a LoRA of the same total rank on the same layers.

    Args:
        description: what `describe` returned, best with `strict=False`, so that a file of other ranks is counted too.

    Returns:
        `lora`: r · (in + out) summed over layers, r the total rank by the config; what the file has: `experts`,
        `routers` by part, `other`; `trained`: what training changes; `difference`: trained and without `other`, minus
        `lora`; `by_rank`: layers, and counts, for each total rank; `rank_of_equal_size`: the rank of a LoRA on these
        layers that would have as many; `equal`: whether experts have just the parameters of the LoRA, as MOELoRA's
        paper says, whose gate comes on top; `says`: the same in sentences.
    """
    layers, counts = description["layers"], description["parameters"]
    by_rank: dict[int, dict[str, int]] = {}
    for layer in layers:
        row = by_rank.setdefault(layer["total_rank"], {"layers": 0, "experts": 0, "lora": 0})
        row["layers"] += 1
        row["experts"] += layer["parameters"]
        row["lora"] += layer["total_rank"] * (layer["in_features"] + layer["out_features"])
    routers: dict[str, int] = {}
    for router in description["routers"]:
        for tensor, count in router["parameters"].items():
            part = tensor.removeprefix("gate.").removesuffix(".weight").replace("weight", "gate")
            routers[part] = routers.get(part, 0) + count
    lora, experts = sum(row["lora"] for row in by_rank.values()), counts["experts"]
    trained = counts["trained"] - counts["other"]
    per_rank = sum(layer["in_features"] + layer["out_features"] for layer in layers)
    found = {
        "check": "parameters",
        "adapter": description["adapter"],
        "method": description["method"],
        "experts": experts,
        "experts_are_trained": counts["experts_are_trained"],
        "routers": routers,
        "other": counts["other"],
        "trained": counts["trained"],
        "lora": lora,
        "difference": trained - lora,
        "by_rank": [{"total_rank": rank, **row} for rank, row in sorted(by_rank.items())],
        "rank_of_equal_size": trained / per_rank,
        "equal": experts == lora,
    }
    return found | {"says": _of_parameters(found)}


def _of_parameters(found: Mapping[str, Any]) -> list[str]:
    ranks = [row["total_rank"] for row in found["by_rank"]]
    total = (
        f"total rank {ranks[0]}" if len(ranks) == 1 else f"the same total rank per layer ({ranks[0]} to {ranks[-1]})"
    )
    gate, lora = sum(found["routers"].values()), found["lora"]
    same = "just as many as" if found["equal"] else "NOT as many as"
    says = [f"The experts have {found['experts']:,} parameters, {same} a LoRA of {total} on these layers ({lora:,})."]
    if not found["equal"]:
        says.append("So the file and its config do not belong together, and nothing loads them.")
    if found["experts_are_trained"]:
        says.append(f"Routers add {gate:,} ({gate / lora:.2%} of the LoRA).")
    else:
        says.append(f"The experts are frozen: training changes the {gate:,} parameters of routers alone.")
    if found["other"]:
        says.append(f"Whole modules, tokens or biases beside them ({found['other']:,}) would be the same with a LoRA.")
    rank = found["rank_of_equal_size"]
    says.append(f"In trained parameters the adapter is the size of a LoRA of rank {rank:.2f} on the same layers.")
    return says


def diversity(description: Mapping[str, Any]) -> dict[str, Any]:
    """How much the weights of a MOELoRA gate differ: over the experts of a task, and over the tasks of an expert.

    Args:
        description: what `describe` returned.

    Returns:
        `gates`, each with `name`, number of `layers`, `even` (1 / E), `tasks`: by task the largest and smallest weight
        and their `difference`, and `experts`: the same over tasks; `over_experts` and `over_tasks`: the largest of the
        differences, and where; `says`: what that means.

    Raises:
        ValueError: the adapter has no gate that weighs experts by task.

    Example:
        >>> diversity(describe("outputs/moelora"))["over_tasks"]["difference"]
    """
    adapter, method = description["adapter"], description["method"]
    gates = [router for router in description["routers"] if router["kind"] == "task"]
    if not gates and description["routers"]:
        raise ValueError(
            f"Routers of {method} adapters read the input, so that no weights of a task are in the file; to see what "
            f"they do over data of yours: peft-moe report {adapter} --data FILE --out DIR"
        )
    if not gates:
        raise ValueError(f"{adapter!r} has one expert in each layer, and no gate; there is nothing to compare.")
    rows = [_spread_of_gate(gate) for gate in gates]
    found = {
        "check": "diversity",
        "adapter": adapter,
        "method": method,
        "gates": rows,
        "over_experts": _largest(rows, "tasks"),
        "over_tasks": _largest(rows, "experts"),
    }
    return found | {"says": _of_diversity(found)}


def _spread_of_gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    of_tasks: Mapping[str, Sequence[float]] = gate["weights"]
    columns = zip(*of_tasks.values(), strict=True)
    return {
        "name": gate["name"],
        "layers": len(gate["layers"]),
        "even": 1 / len(gate["experts"]),
        "tasks": {task: _spread(weights) for task, weights in of_tasks.items()},
        "experts": {name: _spread(column) for name, column in zip(gate["experts"], columns, strict=True)},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"max": max(values), "min": min(values), "difference": max(values) - min(values)}


def _largest(gates: Sequence[Mapping[str, Any]], what: str) -> dict[str, Any]:
    candidates = [
        {"difference": spread["difference"], "of": name, "gate": gate["name"]}
        for gate in gates
        for name, spread in gate[what].items()
    ]
    return max(candidates, key=lambda candidate: candidate["difference"])


def _of_diversity(found: Mapping[str, Any]) -> list[str]:
    experts, tasks, gates = found["over_experts"], found["over_tasks"], found["gates"]
    where = f" in the gate of {experts['gate']!r}", f" in the gate of {tasks['gate']!r}"
    at = where if len(gates) > 1 else ("", "")
    within, between = (f"{found[over]['difference']:.4f}" for over in ("over_experts", "over_tasks"))
    says = [f"Within a task weights differ by up to {within} (task {experts['of']!r}{at[0]}). 0 would be even weights."]
    if len(gates[0]["tasks"]) == 1:
        return [*says, "There is one task, so that there are no others whose weights could differ from its own."]
    return [
        *says,
        f"Between tasks the weight of an expert differs by up to {between} (expert {tasks['of']}{at[1]}). 0 would be "
        "the same weights, and one LoRA, for all tasks.",
        "This says how much the gate tells tasks apart, not whether that helps: peft-moe check uniform measures that.",
    ]
