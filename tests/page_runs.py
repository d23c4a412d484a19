"""Runs what a page shows: its Python as one program, its commands up to where their programs have read their arguments.

Each page has a process of its own, forked from one that has imported the heavy libraries and not peft_moe: a page that
forgets `import peft_moe` fails, and a process starts in milliseconds.
"""

import argparse
import importlib.util
import multiprocessing
import os
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "transformers", "transformers.trainer", "peft", "datasets", "accelerate.commands.launch"]
LONGEST = 300  # seconds
# Commands of the shell and of tools that are no part of this project; anything else unknown needs a mark.
TRUSTED = {"cd", "export", "git", ".", "pre-commit"}


def in_a_fork(target: Callable[..., None], *arguments: Any, log: Path) -> None:
    """Call a function of this module in a new process; what went wrong there is an AssertionError here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    process = context.Process(target=_logged, args=(log, target, *arguments))
    process.start()
    process.join(LONGEST)
    process.kill()  # if it did not end: what was to be read only is being done
    process.join()
    assert process.exitcode == 0, log.read_text(encoding="utf-8")


def _logged(log: Path, target: Callable[..., None], *arguments: Any) -> None:
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        target(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def run_python(program: str, page: str, folder: Path) -> None:
    """Run a page's Python in `folder`, with the names that the page takes for given."""
    from page_setups import SETUPS

    os.chdir(folder)
    names = {"__name__": "__main__"} | (SETUPS[page]() if page in SETUPS else {})
    exec(compile(program, str(ROOT / page), "exec"), names)


def check_commands(blocks: list[tuple[str, str]]) -> None:
    """Check the commands of blocks, each with the place that it is named by.

    Raises:
        ValueError: a command that no check is known for, or what its program says of its arguments.
    """
    os.chdir(ROOT)
    for place, text in blocks:
        for words in commands_of(text):
            try:
                check_command(words)
            except (ValueError, OSError, SyntaxError) as error:
                raise ValueError(f"{place}: {shlex.join(words)}: {error}") from None


def commands_of(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, as words."""
    for line in re.sub(r" *\\\n *", " ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();|&"):
                if command:
                    yield command
                command = []
            elif command or not re.match(r"\w+=", word):  # variables before a command are free
                command.append(word)


def check_command(words: list[str]) -> None:
    """Check one command.

    Raises:
        ValueError: it is not as its program wants it, or unknown.
    """
    program, *rest = words
    if program in CHECKS:
        CHECKS[program](rest)
    elif program not in TRUSTED:
        raise ValueError("nothing here can check it; put <!-- not run: why --> before the block.")


def check_python(words: list[str]) -> None:
    """A script of ours up to where it has read its arguments; a module that exists; code that is Python."""
    first, *rest = words
    if first == "-c":
        compile(rest[0], "-c", "exec")
    elif first == "-m":
        if importlib.util.find_spec(rest[0]) is None:
            raise ValueError(f"no module {rest[0]}.")
        _check_files([word.partition("::")[0] for word in rest[1:] if word.endswith(".py") or "::" in word])
    else:
        _check_files([first])
        if "argument" in Path(first).read_text(encoding="utf-8").casefold():
            sys.path.insert(0, str((ROOT / first).parent))
            read_arguments(first, rest, lambda: runpy.run_path(first, run_name="__main__"))
        elif rest:
            raise ValueError(f"{first} takes no arguments.")


def check_accelerate(words: list[str]) -> None:
    """`accelerate launch`: its own arguments, and those of the script."""
    from accelerate.commands.launch import launch_command_parser

    given = launch_command_parser().parse_args(words[1:])
    _check_files([given.config_file] if given.config_file else [])
    check_python([given.training_script, *given.training_script_args])


def check_peft_moe(words: list[str]) -> None:
    """`peft-moe`."""
    from peft_moe.cli import main

    read_arguments("peft-moe", words, main)


def check_make(words: list[str]) -> None:
    """`make`: its targets."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    if unknown := [word for word in words if "=" not in word and word not in targets]:
        raise ValueError(f"the Makefile has no {unknown[0]}, only {targets}.")


def check_pip(words: list[str]) -> None:
    """`pip install`: extras of this project; other packages are not looked up."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for own in filter(None, (re.fullmatch(r"(?:\.|peft_moe)\[(.*)\]", word) for word in words)):
        if unknown := set(own[1].split(",")) - set(setup["options.extras_require"]):
            raise ValueError(f"setup.cfg has no extra {unknown}.")


CHECKS = {
    "python": check_python, "python3": check_python, "accelerate": check_accelerate, "peft-moe": check_peft_moe,
    "make": check_make, "pip": check_pip,
}  # fmt: skip


def _check_files(paths: list[str]) -> None:
    if missing := [path for path in paths if not (ROOT / path).is_file()]:
        raise ValueError(f"no file {missing[0]}.")


class _Read(BaseException):
    """Thrown where a program has read its arguments."""


def read_arguments(program: str, words: list[str], start: Callable[[], Any]) -> None:
    """Start a program, and stop it when its own parser has read the arguments.

    Raises:
        ValueError: the parser did not take them, or has left some over.
    """
    real, depth, execute = argparse.ArgumentParser.parse_known_args, 0, os.execve

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            found, left = real(self, *args, **kwargs)
        finally:
            depth -= 1
        if depth:  # of a subcommand
            return found, left
        raise _Read(left)

    before = sys.argv
    argparse.ArgumentParser.parse_known_args = parse
    os.execve = lambda *unused: None  # benchmarks first start themselves again, with other settings of memory
    sys.argv = [program, *words]
    try:
        start()
    except _Read as stopped:
        if stopped.args[0]:
            raise ValueError(f"{stopped.args[0]} is unknown.") from None
    except SystemExit as end:
        raise ValueError(f"it stopped with status {end.code}; its message is above.") from None
    else:
        raise ValueError("it has read no arguments.")
    finally:
        argparse.ArgumentParser.parse_known_args, os.execve = real, execute
        sys.argv = before
