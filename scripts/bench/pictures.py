"""Draws what the other scripts here have measured, from their JSON.

    pip install '.[plot]'
    python scripts/bench/pictures.py runs/bench

Reads layer.json, model.json and scaling.json in the folder, as far as they are there, and writes layer.png (a training
step and its memory), layer-forward.png, model.png and scaling.png beside them.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from methods import DTYPE_LABELS, LABELS

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's colours, which are told apart by colour-blind readers
COLOURS = {"fp32": "#0072B2", "bf16": "#E69F00", "bf16_fp32": "#009E73"}
OF_METHOD = {"moelora": ("#0072B2", "o"), "molora": ("#D55E00", "s"), "medmoelora": ("#009E73", "^")}
OF_LORA, STYLES = "grey", {"fp32": "-", "bf16": "--"}
STEP_LABELS = {
    "train": "training step, time",
    "memory": "training step, peak memory beyond the base's",
    "prefill": "prefill, time",
    "decode_1": "decode, batch 1, time",
    "decode_8": "decode, batch 8, time",
    "generate_1": "generate, batch 1, time",
    "generate_8": "generate, batch 8, time",
}
AXIS_LABELS = {
    "tokens": "tokens, with 8 experts of rank 16",
    "experts": "experts of rank 16",
    "experts_of_one_rank": "experts that share a rank of 128",
}
Row = dict[str, Any]


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the JSON is, and the pictures go")
    folder = parser.parse_args().folder
    pictures: list[tuple[str, str, Callable[[list[Row]], Figure]]] = [
        ("layer.json", "layer.png", lambda rows: of_layer(rows, ["train", "memory"])),
        ("layer.json", "layer-forward.png", lambda rows: of_layer(rows, ["prefill", "decode_1", "decode_8"])),
        ("model.json", "model.png", of_model),
        ("scaling.json", "scaling.png", of_scaling),
    ]
    drawn = 0
    for source, target, draw in pictures:
        if (folder / source).exists():
            draw(json.loads((folder / source).read_text())["rows"]).savefig(folder / target, dpi=110)
            print(f"Wrote {folder / target}.")
            drawn += 1
    if not drawn:
        parser.error(f"{folder} has none of layer.json, model.json and scaling.json; `make bench` writes them.")


def of_layer(rows: list[Row], steps: list[str]) -> Figure:
    """Bars by method and type: a row of pictures for each shape, a column for each step."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    panels = [[(f"{shape.replace('x', ' → ')}: ", "shape", shape, step) for step in steps] for shape in shapes]
    return _bars(rows, panels)


def of_model(rows: list[Row]) -> Figure:
    """Bars by method and type, a picture for each step."""
    rows = [row for row in rows if row["method"] != "recording"]
    steps = [step for step in STEP_LABELS if any(row["step"] == step for row in rows)]
    panels = [[("", None, None, step) for step in steps[i : i + 2]] for i in range(0, len(steps), 2)]
    return _bars(rows, panels)


def _bars(rows: list[Row], panels: list[list[tuple[str, str | None, Any, str]]]) -> Figure:
    columns = max(map(len, panels))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    size = (3.2 + 4.4 * columns, 1.2 + len(panels) * (0.8 + 0.5 * len(methods)))
    figure, axes = plt.subplots(len(panels), columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    dtypes = [dtype for dtype in COLOURS if any(row["dtype"] == dtype for row in rows)]
    for i, of_row in enumerate(panels):
        for axis in axes[i, len(of_row) :]:
            axis.remove()
        for axis, (title, field, value, step) in zip(axes[i], of_row, strict=False):
            chosen = [row for row in rows if row["step"] == step and (field is None or row[field] == value)]
            bars(axis, chosen, methods, dtypes)
            axis.set_title(title + STEP_LABELS[step], fontsize="medium")
    axes[0, 0].set_yticks(range(len(methods)), [LABELS[method] for method in methods])
    axes[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[dtype], label=DTYPE_LABELS[dtype]) for dtype in dtypes]
    if any(row["target"] for row in rows if row["step"] in {step for of_row in panels for *_, step in of_row}):
        handles.append(Line2D([], [], color="black", marker="|", markersize=12, linestyle="", label="target"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def bars(axis: Axes, rows: list[Row], methods: list[str], dtypes: list[str]) -> None:
    """Ratios to stock LoRA with the middle half of the rounds, and their targets."""
    height = 0.8 / len(dtypes)
    highest, furthest = 1.0, 1.0  # bar, and end of a spread
    for row in rows:
        y = methods.index(row["method"]) + (dtypes.index(row["dtype"]) - (len(dtypes) - 1) / 2) * height
        ratio, spread = row.get("ratio"), None
        if "ratios" in row:
            ratio = row["ratios"]["total"]["median"]
            low, high = row["ratios"]["total"]["quartiles"]
            spread = [[max(0, ratio - low)], [max(0, high - ratio)]]
            furthest = max(furthest, high)
        highest = max(highest, ratio)
        axis.barh(
            y, ratio, height * 0.92, color=COLOURS[row["dtype"]], xerr=spread, error_kw={"elinewidth": 1, "capsize": 2}
        )
        if row["target"]:
            axis.plot([row["target"]] * 2, [y - height / 2, y + height / 2], color="black", linewidth=2.2)
    axis.axvline(1, color="grey", linewidth=0.8, linestyle="--")
    axis.set_xlim(0, max(highest * 1.05, min(furthest * 1.05, highest * 1.3)))
    axis.set_xlabel("ratio to stock LoRA of the same total rank")


def of_scaling(rows: list[Row]) -> Figure:
    """Lines by method and type: a row of pictures for each axis."""
    found = [axis for axis in AXIS_LABELS if any(row["axis"] == axis for row in rows)]
    figure, axes = plt.subplots(len(found), 3, figsize=(14, 3.9 * len(found)), squeeze=False, layout="constrained")
    for i, name in enumerate(found):
        of_axis = [row for row in rows if row["axis"] == name]
        over = "tokens" if name == "tokens" else "experts"
        for j, (label, value) in enumerate(VALUES.items()):
            lines(axes[i, j], of_axis, over, value, of_lora=j > 0)
            axes[i, j].set(xlabel=AXIS_LABELS[name], ylabel=label)
        bands(axes[i, 0], of_axis, over)
        axes[i, 0].axhline(1, color="black", linewidth=0.8, linestyle=":")
        for axis in axes[i]:
            axis.set_ylim(0)
    used = [method for method in OF_METHOD if any(row["method"] == method for row in rows)]
    handles = [
        Line2D([], [], color=OF_METHOD[m][0], marker=OF_METHOD[m][1], label=LABELS[m].split(",")[0]) for m in used
    ]
    handles.append(Line2D([], [], color=OF_LORA, linewidth=1, label="stock LoRA of the same total rank"))
    handles += [Line2D([], [], color="black", linestyle=style, label=DTYPE_LABELS[d]) for d, style in STYLES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def by_line(rows: list[Row], over: str) -> Iterator[tuple[str, str, list[Row]]]:
    """Method, type, and their rows in order."""
    for method in OF_METHOD:
        for dtype in STYLES:
            chosen = [row for row in rows if (row["method"], row["dtype"]) == (method, dtype)]
            if chosen:
                yield method, dtype, sorted(chosen, key=lambda row: row[over])


def lines(axis: Axes, rows: list[Row], over: str, value: Callable[[Row, str], float], *, of_lora: bool) -> None:
    """A line for each method and type over a number of tokens or experts, and those of the stock LoRA."""
    drawn = set()
    for method, dtype, chosen in by_line(rows, over):
        x = [row[over] for row in chosen]
        if of_lora and dtype not in drawn:  # that of the first method: the others' have the same rank
            axis.plot(x, [value(row, "total") for row in chosen], STYLES[dtype], color=OF_LORA, linewidth=1)
            drawn.add(dtype)
        colour, marker = OF_METHOD[method]
        axis.plot(x, [value(row, "ours") for row in chosen], STYLES[dtype], color=colour, marker=marker, markersize=4)
    axis.set_xscale("log", base=2)
    ticks = sorted({row[over] for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])


def bands(axis: Axes, rows: list[Row], over: str) -> None:
    """The middle half of the rounds around each line of ratios to the stock LoRA."""
    for method, _, chosen in by_line(rows, over):
        low, high = zip(*(row["ratios"]["total"]["quartiles"] for row in chosen), strict=True)
        axis.fill_between([row[over] for row in chosen], low, high, color=OF_METHOD[method][0], alpha=0.12, linewidth=0)


def of_base(row: Row, name: str) -> float:
    """Time as a ratio to the frozen layer's."""
    return row["ratios"]["base"]["median"] if name == "ours" else row["ms"][name] / row["ms"]["base"]


def beyond(row: Row, name: str) -> float:
    """MiB of a peak beyond that of the frozen layer."""
    return (row["peak_bytes"][name] - row["peak_bytes"]["base"]) / 2**20


VALUES: dict[str, Callable[[Row, str], float]] = {
    "time / stock LoRA of the same total rank": lambda row, _: row["ratios"]["total"]["median"],
    "time / frozen layer alone": of_base,
    "peak beyond the frozen layer's, MiB": beyond,
}


if __name__ == "__main__":
    main()
