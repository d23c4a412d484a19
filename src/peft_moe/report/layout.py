"""Tables on a terminal, of texts that nobody vouches for.

No markup in them is read, and characters that would steer a terminal are shown as escapes. rich is imported when
something is shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 110  # columns where there is no terminal that says how many it has
BETWEEN = 3  # columns of the terminal between two of a table
LONGEST = 28  # characters of a name at the head of a column
Row = tuple[Sequence[str], Sequence[str]]  # labels, and numbers


def new_console() -> Console:
    """A console on standard output that reads no markup."""
    from rich.console import Console

    plain: Any = {"markup": False, "emoji": False, "highlight": False}
    console = Console(**plain)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(**plain, width=WIDE)


def clean(text: object) -> str:
    """The text with each character that is not printable as an escape, such as `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def new_table(texts: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    """A table of columns that are texts, and of numbers; all are folded where the terminal is narrow."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table


def show(title: str, table: Table, console: Console) -> None:
    """Print a table under its title."""
    console.print()
    console.print(clean(title), style="bold")
    console.print(table)


def show_numbers(
    title: str, labels: Sequence[str], names: Sequence[str], rows: Sequence[Row], console: Console
) -> None:
    """A table with a column for each name, in several parts if the console is not wide enough."""
    heads = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in map(clean, names)]
    widths = [max(len(head), *(len(row[1][i]) for row in rows)) + BETWEEN for i, head in enumerate(heads)]
    beside = sum(max(len(label), *(len(clean(row[0][i])) for row in rows)) + BETWEEN for i, label in enumerate(labels))
    room = max(console.width + BETWEEN - min(beside, console.width // 2), *widths)
    parts: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if sum(widths[j] for j in parts[-1]) + width > room:
            parts.append([])
        parts[-1].append(i)
    for part in parts:
        table = new_table(labels, [heads[i] for i in part])
        for of_row, numbers in rows:
            table.add_row(*map(clean, of_row), *(numbers[i] for i in part))
        show(title, table, console)


def modules_of(layers: Sequence[Mapping[str, Any]]) -> str:
    """`mlp: down_proj, up_proj; self_attn: q_proj`."""
    parents: dict[str, list[str]] = {}
    for module in dict.fromkeys(layer["module"] for layer in layers):
        parent, _, name = module.rpartition(".")
        parents.setdefault(parent, []).append(name)
    if len(parents) == 1 == len(next(iter(parents.values()))):
        return str(next(layer["module"] for layer in layers))
    return "; ".join(
        f"{parent}: {', '.join(names)}" if parent else ", ".join(names) for parent, names in parents.items()
    )


def blocks_of(layers: Sequence[Mapping[str, Any]]) -> str:
    """`0-11, 13`; with the name of the stack if that is not the usual one."""
    numbers = sorted({layer["block"] for layer in layers if layer["block"] is not None})
    if not numbers:
        return ""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    stack = layers[0]["stack"]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return clean(f"{stack} {text}" if "coder" in stack else text)


def span(values: Sequence[float]) -> str:
    """`0.250-0.300`, the smallest and the largest; one number if they are shown alike."""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low}-{high}"


def number(value: float) -> str:
    """With three places."""
    return f"{value:.3f}"
