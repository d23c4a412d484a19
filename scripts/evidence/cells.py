"""Cells of the page's tables: how numbers are written, and what stands where there is none."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOT_RUN = "not run yet"
NONE = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def score(found: Mapping[str, Any] | None) -> str:
    """A score with its interval."""
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else NOT_RUN


def difference(found: Mapping[str, Any] | None) -> str:
    """A difference of scores with its interval."""
    return f"{signed(found['value'])} [{signed(found['low'])}, {signed(found['high'])}]" if found else NOT_RUN


def signed(value: float, digits: int = 3) -> str:
    """With a sign in any case."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def number(value: float | None, form: str = ".3f", missing: str = NONE) -> str:
    """A number in a form, or what stands for it."""
    return missing if value is None else f"{value:{form}}"


def probability(value: float | None, smallest: float) -> str:
    """A p-value."""
    if value is None:
        return NONE
    return f"< {smallest}" if value < smallest else f"{value:.3f}"


def verdict(found: Mapping[str, Any]) -> str:
    """A verdict, bold unless it is a tie."""
    if found["verdict"] is None:
        return NONE
    return found["verdict"] if found["verdict"] == "tie" else f"**{found['verdict']}**"


def millions(value: int) -> str:
    """A number of parameters."""
    return f"{value / 1e6:.2f} M"


def minutes(seconds: float) -> str:
    """A time."""
    return f"{seconds / 60:.1f}"


def of_runs(entry: Mapping[str, Any]) -> str:
    """How many of the planned runs there are."""
    runs, planned = entry.get("runs", 0), entry["planned"]
    return f"{runs}" if runs == planned else f"{runs} of {planned}"
