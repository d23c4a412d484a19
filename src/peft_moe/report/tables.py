"""What `describe` and the checks return, as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .gate_tables import show_gates
from .layout import blocks_of, clean, modules_of, new_console, new_table, show, span

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["new_console", "show_adapter", "show_diversity", "show_parameters", "show_uniform"]


def show_adapter(description: Mapping[str, Any], console: Console, *, each: bool = False) -> None:
    """Print what `describe` returned.

    Args:
        description: what it returned.
        console: of `new_console`.
        each: a line for each layer and router, instead of one for those that are alike.
    """
    _show_facts(description, console)
    if description["provenance"]["experts"]:
        _show_origins(description["provenance"]["experts"], console)
    _show_layers(description["layers"], console, each=each)
    show_gates(description, console, each=each)


def _show_facts(description: Mapping[str, Any], console: Console) -> None:
    counts, origin = description["parameters"], description["provenance"]
    of = {name: origin[f"{name}_version"] or "of unknown version" for name in ("peft", "moe")}
    saved_by = f"peft {of['peft']} and peft_moe {of['moe']}, in format {origin['moe_format']}"
    settings = (f"{name}={value}" for name, value in description["settings"].items() if value not in (None, {}, []))
    parts = [f"{counts[part]:,} in {what}" for part, what in (("experts", "experts"), ("routers", "routers"))]
    parts += [f"{counts['other']:,} beside them"] if counts["other"] else []
    of_base = description["base_revision"]
    revision = f" (revision {of_base})" if of_base not in (None, "main") else ""
    facts = {
        "adapter": description["adapter"],
        "method": f"{description['method']} ({description['paper']})",
        "base model": f"{description['base_model']}{revision}",
        "tasks": ", ".join(description["tasks"]) or "none",
        "groups": "; ".join(f"{group}: {', '.join(names)}" for group, names in (description["groups"] or {}).items()),
        "settings": ", ".join(settings),
        "fixed": description["fixed"] or "",
        "parameters": f"{counts['total']:,}: {', '.join(parts)}",
        "trained": f"{counts['trained']:,}" + ("" if counts["experts_are_trained"] else ", the experts are frozen"),
        "saved by": saved_by,
        "commit": origin["commit"] or "",
        "file": f"{origin['file']}, {origin['bytes'] / 1e6:,.1f} MB",
    }
    table = new_table(["", ""])
    table.show_header = False
    for name, value in facts.items():
        if value:
            table.add_row(name, clean(value))
    console.print(table)


def _show_origins(experts: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = new_table(["expert", "from", "revision or commit", "sha256"])
    for expert in experts:
        place = (str(expert[key]) for key in ("source", "subfolder", "task") if expert.get(key) is not None)
        where = " ".join(place) or "new"
        commit = expert.get("commit") or expert.get("revision") or ""
        table.add_row(*map(clean, (expert["name"], where, commit, str(expert.get("sha256") or "")[:16])))
    show("Experts, and where they came from", table, console)


def _show_layers(layers: Sequence[dict[str, Any]], console: Console, *, each: bool) -> None:
    table = new_table(["modules", "blocks"], ["layers", "experts", "ranks", "scaling", "parameters"])
    for alike in [[layer] for layer in layers] if each else _alike(layers):
        first = alike[0]
        scalings = dict.fromkeys(f"{value:g}" for value in first["scaling"] if value is not None)
        table.add_row(
            clean(modules_of(alike)),
            blocks_of(alike),
            str(len(alike)),
            _kinds_of_experts(first["experts"]),
            _ranks(first["ranks"]),
            ", ".join(scalings),
            f"{sum(layer['parameters'] for layer in alike):,}",
        )
    show("Layers", table, console)


def _alike(layers: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Layers of the same experts, in modules that have them in the same blocks."""
    same: dict[Any, dict[str, list[dict[str, Any]]]] = {}
    for layer in layers:
        what = (
            layer["stack"],
            *(tuple(layer[key]) for key in ("experts", "ranks", "scaling")),
            layer["router"] is None,
        )
        same.setdefault(what, {}).setdefault(layer["module"], []).append(layer)
    found: dict[Any, list[dict[str, Any]]] = {}
    for what, modules in same.items():
        for of_module in modules.values():
            found.setdefault((what, tuple(layer["block"] for layer in of_module)), []).extend(of_module)
    return list(found.values())


def _kinds_of_experts(names: Sequence[str]) -> str:
    """`8`, `8 + 1 shared`, `3 + general`."""
    apart = {what: sum(name.startswith(f"{what} ") for name in names) for what in ("base", "shared")}
    general = names[-1] == "general"
    parts = [str(len(names) - sum(apart.values()) - general), *(f"{n} {what}" for what, n in apart.items() if n)]
    return " + ".join([*parts, *(["general"] if general else [])])


def _ranks(ranks: Sequence[int]) -> str:
    return f"{ranks[0]} each" if len(set(ranks)) == 1 and len(ranks) > 1 else ", ".join(map(str, ranks))


def show_parameters(found: Mapping[str, Any], console: Console) -> None:
    """Print what `verify.parameters` returned."""
    table = new_table(["part"], ["layers", "adapter", "LoRA"])
    for row in found["by_rank"]:
        name = f"experts of total rank {row['total_rank']}"
        table.add_row(name, str(row["layers"]), f"{row['experts']:,}", f"{row['lora']:,}")
    for part, count in found["routers"].items():
        table.add_row(f"routers: {clean(part)}", "", f"{count:,}", "")
    total = found["experts"] + sum(found["routers"].values())
    table.add_row("together", "", f"{total:,}", f"{found['lora']:,}", style="bold")
    table.add_row("of them trained", "", f"{found['trained'] - found['other']:,}", f"{found['lora']:,}")
    table.add_row("trained, adapter less LoRA", "", f"{found['difference']:+,}", "")
    show(f"Parameters of {found['adapter']} ({found['method']})", table, console)
    _say(found, console)


def show_diversity(found: Mapping[str, Any], console: Console) -> None:
    """Print what `verify.diversity` returned; of several gates, the smallest and largest differences."""
    gates = found["gates"]
    where = "" if len(gates) == 1 else f" (smallest to largest of {len(gates)} gates)"
    for what, title in (("tasks", "Over the experts of a task"), ("experts", "Over the tasks of an expert")):
        table = new_table([what.removesuffix("s")], ["largest weight", "smallest", "difference"])
        for name in dict.fromkeys(name for gate in gates for name in gate[what]):
            spreads = [gate[what][name] for gate in gates if name in gate[what]]
            cells = (span([spread[key] for spread in spreads]) for key in ("max", "min", "difference"))
            table.add_row(clean(name), *cells)
        show(f"{title}{where}", table, console)
    _say(found, console)


def show_uniform(found: Mapping[str, Any], console: Console) -> None:
    """Print what `uniform.ablate` returned."""
    before, after = found["as_it_is"], found["uniform"]
    table = new_table(["task", "metric"], ["rows", "as it is", "uniform", "change", "lower", "higher", "p"])
    for task, result in before.items():
        metric = "" if task == "mean" else str(result["metric"])
        scores = [f"{result['score']:.3f}", f"{after[task]['score']:.3f}", f"{found['difference'][task]:+.3f}"]
        sign = found["signs"][task]
        rows = [str(sign["worse"]), str(sign["better"]), f"{sign['p']:.2g}"]
        style = "bold" if task == "mean" else None
        table.add_row(clean(task), clean(metric), str(result["n"]), *scores, *rows, style=style)
    show(
        "Scores of greedy answers as it is and with uniform gates, and rows that then score lower or higher",
        table,
        console,
    )
    _say(found, console)


def _say(found: Mapping[str, Any], console: Console) -> None:
    console.print()
    for sentence in found["says"]:
        console.print(clean(sentence))
