"""Pictures of what changes from the first block to the last: load, entropy, and how alike experts are.

Shapes: L layers · E experts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..routing.measures import highest_entropy
from .by_layer import Layer, alike, by_depth, effective_experts, finite_max, finite_mean
from .panels import Panel, even_text, heat, new_figure, thinned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = "share of the weight"


def draw_depth(layers: Sequence[Layer], of: str) -> Figure:
    """Lines over blocks, means over the layers of a block; with points for layers where a block has several."""
    depths = by_depth(layers)
    x = np.arange(len(depths))
    figure, axes = new_figure(1, 3, 4.2, 3.0, "Load and entropy by depth", of)
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
        lines(entropy, highest_entropy, "even weights of as many experts", "0.4", ":")
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


def draw_similarity(layers: Sequence[Layer], of: str) -> Figure | None:
    """Cosines of experts' updates, mean over layers, and the largest by depth; of layers with the same experts."""
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
    figure, axes = new_figure(1, 2, width, max(3.4, 0.8 * width), f"Are experts copies of each other?{note}", of)
    experts = part[0]["experts"]
    panel = Panel(title="size of the cosine, mean over layers", x="expert", y="expert", columns=experts, rows=experts)
    image = heat(axes[0], grid, panel, top=1.0, size=(width, max(3.4, 0.8 * width)), numbers=True)
    even_text(figure, image, axes[:1], "|cosine| of two experts' updates", None)
    axes[1].plot(largest, marker="o", markersize=3, label="two most alike in a block")
    axes[1].plot(middle, marker="o", markersize=3, label="mean over pairs")
    axes[1].set_title("by depth: 1 is a copy or mirror image", fontsize=9)
    axes[1].set_xlabel("block")
    axes[1].set_ylabel("|cosine|")
    axes[1].set_ylim(0, 1.05)
    axes[1].legend(fontsize=7)
    thinned(axes[1].xaxis, list(depths), most=8)
    return figure
