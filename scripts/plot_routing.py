"""Draws what the routers of a training run did, from the log that train.py leaves with --log_routing layers.

    pip install '.[plot]'
    python scripts/plot_routing.py outputs/molora --output docs/routing-molora.png

Four pictures: the entropy of the routers before selection and the number of experts in effect, over the steps and by
depth; the load of each expert over the steps in one layer; and the load of all experts in all layers at the end.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# routing/model.layers.3.mlp.up_proj/load_5
LOAD = re.compile(r"^routing/(?P<layer>[^/]*?\.(?P<depth>\d+)\.(?P<module>[^/]*))/load_(?P<expert>\d+)$")
ENTROPY = re.compile(r"^routing/[^/]*?\.(?P<depth>\d+)\.[^/]*/entropy_before$")


def main() -> None:
    """Read the log and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output_dir of the run")
    parser.add_argument("--output", type=Path, help="a PNG or SVG file; default: routing.png in the folder")
    parser.add_argument("--module", default="mlp.down_proj", help="the layer within a block whose load is drawn")
    arguments = parser.parse_args()
    history = json.loads((arguments.folder / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in history if any(map(LOAD.match, entry))]
    if not entries:
        parser.error(
            f"{arguments.folder}/trainer_state.json has no routing of layers; train with --log_routing layers."
        )
    output = arguments.output or arguments.folder / "routing.png"
    draw(entries, arguments.module).savefig(output, dpi=110)
    print(f"Wrote {output}.")


def draw(entries: list[dict[str, float]], module: str) -> Figure:
    """The four pictures.

    Args:
        entries: the log's entries with routing, in order.
        module: the layer within a block whose load is drawn.
    """
    steps = [entry["step"] for entry in entries]
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    by_depth(figure, axes[0, 0], steps, [entropies(entry) for entry in entries])
    axes[0, 0].set(title="Entropy of the router before selection, mean over a block", ylabel="nats")
    by_depth(figure, axes[0, 1], steps, [effective(entry) for entry in entries])
    axes[0, 1].set(title="Experts in effect, exp(entropy of load), mean over a block", ylabel="experts")
    loads = [load_of(entry, module) for entry in entries]
    depths = sorted(loads[-1])
    middle = depths[len(depths) // 2]
    for expert in range(len(loads[-1][middle])):
        axes[1, 0].plot(steps, [load[middle][expert] for load in loads], label=f"{expert}")
    axes[1, 0].set(
        title=f"Load of each expert, block {middle}, {module}", xlabel="step", ylabel="share of the weight", ylim=0
    )
    axes[1, 0].legend(title="expert", ncols=2, fontsize="small")
    widest = max(map(len, loads[-1].values()))
    grid = np.full((len(depths), widest), np.nan)
    for row, depth in enumerate(depths):
        grid[row, : len(loads[-1][depth])] = loads[-1][depth]
    image = axes[1, 1].imshow(grid, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes[1, 1].set(title=f"Load at the end, {module}", xlabel="expert", ylabel="block")
    axes[1, 1].set_yticks(range(0, len(depths), 5), [str(depths[row]) for row in range(0, len(depths), 5)])
    axes[1, 1].set_xticks(range(widest))
    figure.colorbar(image, ax=axes[1, 1], label="share of the weight")
    return figure


def by_depth(figure: Figure, axis: Axes, steps: list[int], values: list[dict[int, float]]) -> None:
    """A line per block, coloured by its depth."""
    depths = sorted(values[-1])
    colours = plt.get_cmap("plasma")
    for depth in depths:
        axis.plot(steps, [v[depth] for v in values], color=colours(depth / max(depths[-1], 1) * 0.9), linewidth=0.9)
    scale = plt.cm.ScalarMappable(plt.Normalize(depths[0], depths[-1] / 0.9), colours)
    figure.colorbar(scale, ax=axis, label="block", boundaries=np.arange(depths[0], depths[-1] + 1))
    axis.set(xlabel="step")


def entropies(entry: dict[str, float]) -> dict[int, float]:
    """Entropy before selection by depth, mean over the layers of a block."""
    found = defaultdict(list)
    for name, value in entry.items():
        if match := ENTROPY.match(name):
            found[int(match["depth"])].append(value)
    return {depth: float(np.mean(values)) for depth, values in found.items()}


def effective(entry: dict[str, float]) -> dict[int, float]:
    """exp(entropy of load) by depth, mean over the layers of a block."""
    loads: dict[str, list[float]] = defaultdict(list)
    depth_of = {}
    for name, value in entry.items():
        if match := LOAD.match(name):
            loads[match["layer"]].append(value)
            depth_of[match["layer"]] = int(match["depth"])
    found = defaultdict(list)
    for layer, load in loads.items():
        share = np.array([x for x in load if x > 0])
        found[depth_of[layer]].append(np.exp(-(share * np.log(share)).sum()))
    return {depth: float(np.mean(values)) for depth, values in found.items()}


def load_of(entry: dict[str, float], module: str) -> dict[int, list[float]]:
    """Load of each expert by depth, in the layers called `module`."""
    found: dict[int, list[float]] = defaultdict(list)
    for name, value in entry.items():
        if (match := LOAD.match(name)) and match["module"] == module:
            found[int(match["depth"])].append(value)  # the log has experts in order
    if not found:
        known = sorted({match["module"] for match in map(LOAD.match, entry) if match})
        raise SystemExit(f"No layer is called {module!r}; --module is one of {known}.")
    return found


if __name__ == "__main__":
    main()
