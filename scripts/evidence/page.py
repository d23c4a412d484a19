"""Writes the results page from the records of runs: numbers, pictures, and the tables of docs/evidence.md.

    python scripts/evidence/page.py

Reads docs/evidence/runs, writes docs/evidence/results.json and the pictures beside it, and puts tables and pictures
between their marks in docs/evidence.md; the page's text is written by hand and stays. Works with some of the runs or
none: cells then say so. Takes a minute or two with all runs; the same records give the same files.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from more_tables import TABLES
from page_pictures import PICTURES, WORDS, plt
from records import Records
from results import build
from setups import ROOT, full

BEGIN, END = "<!-- {}: written by scripts/evidence/page.py -->", "<!-- end of {} -->"
NO_PICTURE = "*No picture yet: its runs are not there.*"


def main(argv: list[str]) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "docs" / "evidence" / "runs", help="records to read")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "evidence.md", help="page to write into")
    parser.add_argument("--draws", type=int, default=10_000, help="of the bootstrap")
    args = parser.parse_args(argv)
    try:
        results = write(Records(full(), args.runs), args.page, draws=args.draws)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    done, planned = (sum(entry[what] for entry in results["state"]) for what in ("done", "planned"))
    print(f"{args.page}: from {done} of {planned} runs.")
    return 0


def write(records: Records, page: Path, *, draws: int = 10_000) -> dict[str, Any]:
    """Write a page, and its numbers and pictures into the folder of its name; gives the numbers.

    Args:
        records: of the runs.
        page: Markdown with all marks.
        draws: of the bootstrap.

    Raises:
        ValueError: records that do not fit the rows, or a mark that is not there once; nothing is written then.
    """
    folder, results = page.with_suffix(""), build(records, draws=draws)
    figures = {name: picture(results) for name, picture in PICTURES.items()}
    drawn = {name for name, figure in figures.items() if figure}
    text = filled(page.read_text(encoding="utf-8"), results, folder.name, drawn)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(as_lines(results), encoding="utf-8")
    save(figures, folder)
    page.write_text(text, encoding="utf-8")
    return results


def as_lines(results: dict[str, Any]) -> str:
    """JSON with a line for each entry."""
    lines = ",\n".join(
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}" for key, value in results.items()
    )
    return f"{{\n{lines}\n}}\n"


def save(figures: dict[str, Figure | None], folder: Path) -> None:
    """Write the pictures whose numbers are there, and take away the others."""
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            figure.savefig(path, dpi=150, metadata={"Software": None})  # else each version of matplotlib left its own
            plt.close(figure)


def filled(text: str, results: dict[str, Any], folder: str, drawn: set[str]) -> str:
    """The page with its tables and pictures, and the rest as it was.

    Raises:
        ValueError: the page lacks a mark, or has one twice.
    """
    parts = {name: table(results) for name, table in TABLES.items()}
    for name in PICTURES:
        there = f"![{WORDS[name]}]({folder}/{name}.png)"
        parts[f"picture-{name}"] = there if name in drawn else NO_PICTURE
    for name, content in parts.items():
        begin, end = BEGIN.format(name), END.format(name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"The page needs a line {begin!r} and, behind it, {end!r}, both once; put them back.")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
