"""The blocks of code in README.md, CONTRIBUTING.md and docs/, and the marks that say why one is not run.

A mark is an HTML comment on the line before the block, `<!-- not run: needs a GPU server -->`: a reader of the page
does not see it, a reader of the source does.
"""

import ast
import builtins
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\s*$")
MARK = re.compile(r"^ *<!-- *not run:(?P<reason>.*?)-->\s*$")
# Indented text is a block too; these are commands of ours in it.
COMMAND = re.compile(r"^    (?:(?:python3?|accelerate launch) (?:scripts|-m)|peft-moe |make )")

# What transformers logs where generate() is given rows that are padded on the right.
WRONG_SIDE = "right-padding was detected"


class Block(NamedTuple):
    """One block of code, and why it is not run, if it is marked."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None


def name_of(page: Path) -> str:
    """A page's path within the repository."""
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks, and indented lines with commands of ours, in order.

    Raises:
        ValueError: a block that does not end, or a mark that no block follows.
    """
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    reason, at = None, 0
    while at < len(lines):
        line = lines[at]
        if fence := FENCE.match(line):
            try:
                end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            except StopIteration:
                raise ValueError(f"{page}:{at + 1}: this block does not end.") from None
            text = "\n".join(inner.removeprefix(fence["indent"]) for inner in lines[at + 1 : end]) + "\n"
            found.append(Block(name_of(page), at + 1, fence["language"], text, reason))
            reason, at = None, end
        elif mark := MARK.match(line):
            reason = mark["reason"].strip()
        elif COMMAND.match(line):
            found.append(Block(name_of(page), at + 1, "bash", line.strip() + "\n", reason))
        elif line.strip() and reason is not None:
            raise ValueError(f"{page}:{at + 1}: the mark {reason!r} is not before a block of code.")
        at += 1
    if reason is not None:
        raise ValueError(f"{page}: the mark {reason!r} is not before a block of code.")
    return found


def run_together(blocks: list[Block]) -> str:
    """Blocks as one program, in which every line has the number that it has in the page."""
    program: list[str] = []
    for block in blocks:
        program += [""] * (block.line - len(program)) + block.text.splitlines()
    return "\n".join(program) + "\n"


def names_for_given(program: str) -> set[str]:
    """Names that a program uses and nowhere makes."""
    used, made = set(), set(vars(builtins))
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.alias):
            made.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            made.add(node.name)
    return used - made
