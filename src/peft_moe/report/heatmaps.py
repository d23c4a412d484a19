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
    finite_max,
    mean_load,
    module_of,
    name_of,
    of_task,
    several_stacks,
)
from .depth_maps import SHARE, draw_depth, draw_similarity
from .panels import Panel, even_text, heat, label, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 16  # layers that share one panel, each with its name; panels of one figure
NAMES = ("layers", "tasks", "groups", "depth", "similarity")  # of the figures


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
        "depth": lambda: draw_depth(layers, of),
        "similarity": lambda: draw_similarity(layers, of),
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
    figure, axes = new_figure(rows, columns, width, height, "Where the weight goes: load of each expert by layer", of)
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
    title = f"Do tasks use different experts? Load of each expert by task{note}"
    figure, axes = new_figure(rows, columns, width, height, title, of)
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
    figure, axes = new_figure(1, 2, width, height, f"Which groups the input gets{note}", of)
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
