"""What heat maps are made of: figures without pyplot, a panel with names that nobody vouches for, a colour bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Names are data: `$` is a dollar, and no TeX is run, whatever the user's matplotlibrc says.
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
DPI = 100
COLOURS = "viridis"  # perceptually uniform


@dataclass(frozen=True)
class Panel:
    """What is written around a heat map.

    Args:
        title: above it.
        x, y: what columns and rows are.
        columns, rows: their names.
    """

    title: str
    x: str
    y: str
    columns: Sequence[str]
    rows: Sequence[str]


def new_figure(rows: int, columns: int, width: float, height: float, title: str, of: str) -> tuple[Figure, list[Axes]]:
    """A figure of panels, each of so many inches, that pyplot does not know; and the panels, row by row.

    Args:
        rows, columns: of panels.
        width, height: of a panel.
        title: a sentence, on as many lines as it takes.
        of: what the figure is of, below it.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_module = _optional("matplotlib.figure")
    _optional("matplotlib.backends.backend_agg")
    size = (min(16.0, columns * (width + 0.9) + 1.0), min(20.0, rows * (height + 0.9) + 0.6))
    figure: Figure = figure_module.Figure(figsize=size, dpi=DPI, layout="constrained")
    _optional("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    wide = int(size[0] * 12)
    figure.suptitle("\n".join([*wrap(title, wide), label(of, wide)]).rstrip(), fontsize=10, **PLAIN)
    return figure, axes


def heat(
    axis: Axes, grid: np.ndarray, panel: Panel, *, top: float, size: tuple[float, float], numbers: bool = False
) -> AxesImage:
    """Draw a grid with colours from 0 to `top`; cells without a number are grey.

    Args:
        axis: where.
        grid: (rows, columns), NaN where there is none.
        panel: what is written around it.
        top: the value of the brightest colour.
        size: inches of the panel.
        numbers: write the values into the cells, where these are large enough.
    """
    colours = _optional("matplotlib").colormaps[COLOURS].with_extremes(bad="0.88")
    image = axis.imshow(grid, aspect="auto", cmap=colours, vmin=0, vmax=top or 1.0, interpolation="nearest")
    axis.set_title(label(panel.title, int(size[0] * 13)), fontsize=9, **PLAIN)
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)
    thinned(axis.xaxis, panel.columns, most=int(size[0] * 4.5))
    thinned(axis.yaxis, panel.rows, most=int(size[1] * 6))
    if numbers and len(panel.columns) <= size[0] * 2.4 and len(panel.rows) <= size[1] * 6:
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                shade = "black" if value > 0.6 * top else "white"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
    return image


def even_text(figure: Figure, image: AxesImage, axes: Sequence[Axes], text: str, even: float | None) -> None:
    """A colour bar beside panels, with a line at the even share; panels that have nothing to show are hidden."""
    for axis in axes:
        axis.set_visible(axis.has_data())
    bar = figure.colorbar(image, ax=list(axes), label=text, shrink=0.9, aspect=30, pad=0.01)
    if even is not None:
        bar.ax.axhline(even, color="white", linewidth=2.5)
        bar.ax.axhline(even, color="black", linewidth=1)
        bar.set_label(f"{text} (line: even share, {even:.3g})")


def thinned(axis: Axis, names: Sequence[str], *, most: int) -> None:
    """Name an axis's positions, or every second, third … where there are more than `most`."""
    step = max(1, -(-len(names) // max(most, 1)))
    shown = [label(name, 28) for name in names[::step]]
    turned = axis is axis.axes.xaxis and max(map(len, shown), default=0) > 3
    options: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axis.set_ticks(range(0, len(names), step), labels=shown, fontsize=7, **options, **PLAIN)


def label(name: object, most: int) -> str:
    """A name as it may be drawn: cut in the middle, and a box for what cannot be printed or the font does not have."""
    text = str(name)
    if len(text) > most:  # first, since it may be of any length
        head = most // 3
        text = f"{text[:head]}…{text[len(text) - (most - head - 1) :]}"
    return "".join(c if c.isprintable() and _in_font(c) else "□" for c in text)


@cache
def _in_font(character: str) -> bool:
    """Whether matplotlib has a picture of it; it would warn for each that it has not."""
    manager: Any = _optional("matplotlib.font_manager")
    font = manager.get_font(manager.findfont(manager.FontProperties()))
    return bool(font.get_char_index(ord(character)))


def _optional(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError("Pictures need matplotlib; install it with `pip install matplotlib`.") from error
