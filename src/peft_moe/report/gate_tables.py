"""The gates of an adapter as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .layout import Row, blocks_of, modules_of, number, show_numbers, span

if TYPE_CHECKING:
    from rich.console import Console


def show_gates(description: Mapping[str, Any], console: Console, *, each: bool) -> None:
    """Print the weights of tasks, or the norms of what tokens are compared with; arguments as for `show_adapter`."""
    kinds = {"task": _show_task_gates, "token": _show_token_gates, "group": _show_group_gates}
    if not description["routers"]:
        console.print("\nThere is no router: each layer is a plain LoRA.")
        return
    kinds[description["routers"][0]["kind"]](description, console, each)


def _show_task_gates(description: Mapping[str, Any], console: Console, each: bool) -> None:
    for gates in _by_experts(description["routers"]):
        experts, several = gates[0]["experts"], len(gates) > 1
        for shown in [[gate] for gate in gates] if each else [gates]:
            name = f"of {shown[0]['name']}" if each and several else f"for {len(_layers_of(shown))} layers"
            mean = f", means over {len(shown)} gates" if len(shown) > 1 else ""
            rows: list[Row] = [
                ((task,), [number(fmean(column)) for column in zip(*(g["weights"][task] for g in shown), strict=True)])
                for task in description["tasks"]
            ]
            show_numbers(f"Weights of experts by task {name}{mean}", ["task"], experts, rows, console)


def _show_token_gates(description: Mapping[str, Any], console: Console, each: bool) -> None:
    layers = {layer["name"]: layer for layer in description["layers"]}
    for gates in _by_experts(description["routers"]):
        modules: dict[Any, list[Mapping[str, Any]]] = {}
        for gate in gates:
            layer = layers[gate["name"]]
            modules.setdefault(gate["name"] if each else (layer["stack"], layer["module"]), []).append(gate)
        what = "" if each else ", means over the blocks of a line"
        of = [[layers[gate["name"]] for gate in alike] for alike in modules.values()]
        labels = [(modules_of(alike), blocks_of(alike)) for alike in of]
        learnt = gates[0]["temperature"] is not None
        heads = ["module", "blocks", *(["temperature"] if learnt else [])]
        for key, title in (("norms", "Norm of each expert's row of the gate"), ("bias", "Bias of each expert")):
            if gates[0][key] is None:
                continue
            rows: list[Row] = []
            for label, alike in zip(labels, modules.values(), strict=True):
                hot = [span([gate["temperature"] for gate in alike])] if learnt else []
                rows.append(((*label, *hot), _means(alike, lambda gate: gate[key])))  # noqa: B023  # called at once
            show_numbers(f"{title}{what}", heads, gates[0]["experts"], rows, console)


def _show_group_gates(description: Mapping[str, Any], console: Console, each: bool) -> None:
    routers = description["routers"]
    first = routers[0]
    parts = [[router] for router in routers] if each else [routers]
    labels = [router["name"] for router in routers] if each else [f"{len(routers)} routers"]
    what = "" if each or len(routers) == 1 else ", means over routers"
    mix = first["mix"] is not None
    for key, title, names in (
        ("weights", "Weights of experts, whatever the input", [*first["experts"], *(["general"] if mix else [])]),
        ("group_norms", "Norm of each group's row of the gate", first["groups"]),
        ("expert_norms", "Norm of each expert's row of the gate", first["experts"]),
        ("expert_scores", "Scores of experts, the same for all inputs", first["experts"]),
    ):
        if first[key] is None:
            continue
        rows: list[Row] = []
        for label, alike in zip(labels, parts, strict=True):
            share = [span([router["mix"] for router in alike])] if mix else []
            rows.append(((label, *share), _means(alike, lambda router: router[key])))  # noqa: B023  # called at once
        show_numbers(f"{title}{what}", ["router", *(["λ"] if mix else [])], names, rows, console)


def _by_experts(routers: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Routers that weigh the same experts."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for router in routers:
        found.setdefault(tuple(router["experts"]), []).append(router)
    return list(found.values())


def _layers_of(routers: Iterable[Mapping[str, Any]]) -> list[str]:
    return [name for router in routers for name in router["layers"]]


def _means(routers: Sequence[Mapping[str, Any]], values: Callable[[Mapping[str, Any]], Sequence[float]]) -> list[str]:
    return [number(fmean(column)) for column in zip(*map(values, routers), strict=True)]
