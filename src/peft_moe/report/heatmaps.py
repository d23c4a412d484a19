"""Pictures of what routers do, from the numbers of `routing.json`.

Shapes: L layers · E experts · T tasks · G groups
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .by_layer import (
    Layer,
    alike,
    by_depth,
    effective_experts,
    finite_max,
    finite_mean,
    mean_load,
    module_of,
    name_of,
    of_task,
    several_stacks,
)
from .panels import Panel, even_text, heat, label, new_figure, thinned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 16  # layers that share one panel, each with its name; panels of one figure
SHARE = "share of the weight"


def draw(routing: Mapping[str, Any]) -> dict[str, Figure]:
    """Heat maps of a report.

    The figures belong to nobody but the caller: pyplot does not know them, and any thread may draw.

    Args:
        routing: what `Routing.to_dict()` gives, of which only `layers` is needed, with `name`, `experts` and `load`.

    Returns:
        of these, what there are numbers for. `layers`: load of each expert in each layer, a panel per module where
        there are many; `tasks`: load of each expert in each task, mean over layers, and for each task by depth;
        `groups`: AT-MoE's experts by group, and groups by block; `depth`: load and entropy by depth; `similarity`:
        cosines of experts' updates, mean over layers, and the largest by depth. Means over layers have each layer
        weigh as its tokens. Where layers have different experts, `tasks`, `groups` and `similarity` are of the most
        frequent kind of layer, and their titles say so.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no layers, or layers without the needed numbers.
    """
    layers = _layers(routing)
    titles = {key: str(routing[key]) for key in ("method", "adapter") if routing.get(key)}
    of = " of ".join(label(text, 40) for text in titles.values())
    made: dict[str, Callable[[], Figure | None]] = {
        "layers": lambda: _draw_layers(layers, of),
        "tasks": lambda: _draw_tasks(layers, [str(task) for task in routing.get("tasks") or ()], of),
        "groups": lambda: _draw_groups(layers, [str(group) for group in routing.get("groups") or ()], of),
        "depth": lambda: _draw_depth(layers, of),
        "similarity": lambda: _draw_similarity(layers, of),
    }
    figures = {name: make() for name, make in made.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def write_pictures(routing: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write what `draw` gives as PNG files such as `layers.png`.

    Each file is complete or not there: one of the same name is replaced when the new one has been written.

    Args:
        routing: as for `draw`.
        folder: made if it is missing.

    Returns:
        the files.

    Raises:
        ImportError, ValueError: as `draw`.
        OSError: the folder cannot be written to.
    """
    figures = draw(routing)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        handle, draft = tempfile.mkstemp(prefix=f".{name}-", suffix=".png", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                figure.savefig(file, format="png", metadata={"Software": None})
            os.chmod(draft, 0o644)  # mkstemp's are for the owner alone
            os.replace(draft, folder / f"{name}.png")
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
        written.append(folder / f"{name}.png")
    return written


def _layers(routing: Mapping[str, Any]) -> list[Layer]:
    layers = routing.get("layers")
    if not isinstance(layers, Sequence) or not layers:
        raise ValueError("routing has no layers, so there is nothing to draw; give what Routing.to_dict() returns.")
    for i, layer in enumerate(layers):
        if not len(layer["load"]) == len(layer["experts"]) > 0:
            raise ValueError(
                f"layers[{i}] has {len(layer['experts'])} experts and {len(layer['load'])} loads; make the report "
                "again."
            )
    return list(layers)


def _draw_layers(layers: Sequence[Layer], of: str) -> Figure:
    """A panel for each module, with its blocks as rows; one for all where layers are few, or modules too many."""
    panels: dict[str, list[Layer]] = {}
    several = several_stacks(layers)
    for layer in layers:
        panels.setdefault(module_of(layer, several) if layer.get("block") is not None else "", []).append(layer)
    by_module = len(layers) > FEW and 1 < len(panels) <= FEW and "" not in panels
    if not by_module:
        panels = {"": list(layers)}
    same = len({len(layer["load"]) for layer in layers}) == 1
    even = 1 / len(layers[0]["load"]) if same else 1.0
    unit = SHARE if same else "load / even share"
    # colours mean the same in all panels
    top = max(finite_max(layer["load"]) * (1 if same else len(layer["load"])) for layer in layers)
    wide = max(len(layer["load"]) for layer in layers)
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = max(2.2, min(6.5, 0.26 * max(map(len, panels.values()))))
    width = max(2.6, min(9.0, 0.32 * wide)) + (0 if by_module else 2.0)
    figure, axes = new_figure(
        rows, columns, width, height, f"Where the weight goes: load of each expert by layer, {of}"
    )
    for axis, (name, part) in zip(axes, panels.items(), strict=False):
        grid = np.full((len(part), wide), np.nan)
        for row, layer in enumerate(part):
            grid[row, : len(layer["load"])] = np.asarray(layer["load"], float) * (1 if same else len(layer["load"]))
        blocks = by_module or (len(part) > FEW and all(layer.get("block") is not None for layer in part))
        names = [str(layer["block"]) if blocks else name_of(layer) for layer in part]
        experts = max((layer["experts"] for layer in part), key=len)
        panel = Panel(title=name, x="expert", y="block" if blocks else "layer", columns=experts, rows=names)
        image = heat(axis, grid, panel, top=max(top, 2 * even), size=(width, height))
    even_text(figure, image, axes, unit, even)
    return figure


def _draw_tasks(layers: Sequence[Layer], tasks: Sequence[str], of: str) -> Figure | None:
    part, note = alike([layer for layer in layers if layer.get("tasks")], len(layers))
    tasks = [task for task in tasks if any(task in layer["tasks"] for layer in part)]
    if not tasks:
        return None
    experts, even = part[0]["experts"], 1 / len(part[0]["experts"])
    grid = np.stack([of_task(part, task) for task in tasks])
    depths = by_depth(part)
    shown = tasks[: FEW - 1] if len(depths) > 1 else []
    in_depth = [np.stack([of_task(group, task) for group in depths.values()]) for task in shown]
    top = max(2 * even, *(finite_max(values) for values in [grid, *in_depth]))
    columns = min(4, 1 + len(shown))
    rows = math.ceil((1 + len(shown)) / columns)
    width = max(2.8, min(7.0, 0.32 * len(experts)))
    height = max(2.4, min(5.0, 0.26 * max(len(tasks), len(depths))))
    title = f"Do tasks use different experts? Load of each expert by task, {of}{note}"
    figure, axes = new_figure(rows, columns, width, height, title)
    panel = Panel(title="all layers", x="expert", y="task", columns=experts, rows=tasks)
    image = heat(axes[0], grid, panel, top=top, size=(width, height))
    for axis, task, values in zip(axes[1:], shown, in_depth, strict=False):
        panel = Panel(title=f"task {task}", x="expert", y="block", columns=experts, rows=list(depths))
        heat(axis, values, panel, top=top, size=(width, height))
    even_text(figure, image, axes, SHARE, even)
    return figure


def _draw_groups(layers: Sequence[Layer], groups: Sequence[str], of: str) -> Figure | None:
    part, note = alike([layer for layer in layers if layer.get("group_load") and layer.get("group_of")], len(layers))
    if not groups or not part:
        return None
    experts, group_of = part[0]["experts"], part[0]["group_of"]
    load, rows = mean_load(part), [*groups, *(["general"] if -1 in group_of else [])]
    # a row for each group, the general expert's last; experts stand where they do in the list
    grid = np.full((len(rows), len(experts)), np.nan)
    for column, group in enumerate(group_of):
        grid[group if group >= 0 else len(groups), column] = load[column]
    by_block = np.asarray([layer["group_load"] for layer in part], float)
    width = max(4.0, min(9.0, 0.5 * len(experts)))
    height = max(2.6, min(7.0, 0.26 * len(part)))
    title = f"Which groups the input gets, {of}{note}"
    figure, axes = new_figure(1, 2, width, height, title)
    size = (width, height)
    even = 1 / len(experts)
    panel = Panel(title="experts by group, mean over layers", x="expert", y="group", columns=experts, rows=rows)
    image = heat(axes[0], grid, panel, top=max(2 * even, finite_max(grid)), size=size, numbers=True)
    even_text(figure, image, axes[:1], SHARE, even)
    names = [str(layer["block"]) if layer.get("block") is not None else name_of(layer) for layer in part]
    panel = Panel(title="groups by block, without the general expert", x="group", y="block", columns=groups, rows=names)
    even = 1 / len(groups)
    top = min(1.0, max(2 * even, finite_max(by_block)))
    image = heat(axes[1], by_block, panel, top=top, size=size, numbers=True)
    even_text(figure, image, axes[1:], "weight in the mixture", even)
    return figure


def _draw_depth(layers: Sequence[Layer], of: str) -> Figure:
    """Lines over blocks, means over the layers of a block; with points for layers where a block has several."""
    depths = by_depth(layers)
    x = np.arange(len(depths))
    figure, axes = new_figure(1, 3, 4.2, 3.0, f"Load and entropy by depth, {of}")
    load, effective, entropy = axes

    def lines(axis: Any, value: Callable[[Layer], float], text: str, colour: str, style: str = "-") -> None:
        values = [[value(layer) for layer in group] for group in depths.values()]
        axis.plot(
            x, [finite_mean(group) for group in values], style, color=colour, marker="o", markersize=3, label=text
        )
        if style == "-" and any(len(group) > 1 for group in values):
            spread = [(i, v) for i, group in enumerate(values) for v in group]
            axis.scatter(*zip(*spread, strict=True), s=5, color=colour, alpha=0.3, linewidths=0)

    lines(load, lambda layer: finite_max(layer["load"]), "largest of a layer", "C0")
    lines(load, lambda layer: -finite_max([-v for v in layer["load"]], low=-1.0), "smallest of a layer", "C1")
    lines(load, lambda layer: 1 / len(layer["load"]), "even share", "0.4", ":")
    lines(effective, lambda layer: effective_experts(layer["load"]), "in effect: exp(entropy of load)", "C2")
    lines(effective, lambda layer: float(len(layer["load"])), "all there are", "0.4", ":")
    there = [layer for layer in layers if layer.get("entropy") is not None]
    if there:
        depths = by_depth(there)
        x = np.arange(len(depths))
        lines(entropy, lambda layer: float(layer["entropy"]), "of a token's weights", "C3")
        lines(entropy, lambda layer: math.log(len(layer["load"])), "even weights", "0.4", ":")
    else:
        entropy.set_visible(False)
    names = list(by_depth(layers))
    for axis, title, unit in [
        (load, "largest and smallest load", SHARE), (effective, "experts in effect", "experts"),
        (entropy, "how undecided a token is", "entropy in nats"),
    ]:  # fmt: skip
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("block")
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0, top=1.22 * max(axis.get_ylim()[1], 1e-6))
        thinned(axis.xaxis, names, most=8)
        if axis.get_visible():
            axis.legend(
                fontsize=7, loc="upper right", ncols=2 if axis is not load else 3, handlelength=1.2, columnspacing=0.8
            )
    return figure


def _draw_similarity(layers: Sequence[Layer], of: str) -> Figure | None:
    part, note = alike([layer for layer in layers if layer.get("similarity")], len(layers))
    e = len(part[0]["experts"]) if part else 0
    if e < 2:
        return None
    every = np.asarray([layer["similarity"] for layer in part], float)  # (L, E, E)
    grid = np.abs(every).mean(0)
    apart = ~np.eye(e, dtype=bool)
    depths = by_depth(part)
    largest = [
        max(finite_max(np.abs(np.asarray(layer["similarity"], float)[apart])) for layer in g) for g in depths.values()
    ]
    middle = [
        finite_mean([np.abs(np.asarray(layer["similarity"], float)[apart]).mean() for layer in g])
        for g in depths.values()
    ]
    width = max(4.0, min(7.0, 0.4 * e))
    figure, axes = new_figure(1, 2, width, max(3.4, 0.8 * width), f"Are experts copies of each other? {of}{note}")
    experts = part[0]["experts"]
    panel = Panel(title="size of the cosine, mean over layers", x="expert", y="expert", columns=experts, rows=experts)
    image = heat(axes[0], grid, panel, top=1.0, size=(width, max(3.4, 0.8 * width)), numbers=True)
    even_text(figure, image, axes[:1], "|cosine| of two experts' updates", None)
    axes[1].plot(largest, marker="o", markersize=3, label="two most alike in a block")
    axes[1].plot(middle, marker="o", markersize=3, label="mean over pairs")
    axes[1].set_title("by depth: 1 is a copy", fontsize=9)
    axes[1].set_xlabel("block")
    axes[1].set_ylabel("|cosine|")
    axes[1].set_ylim(0, 1.05)
    axes[1].legend(fontsize=7)
    thinned(axes[1].xaxis, list(depths), most=8)
    return figure
