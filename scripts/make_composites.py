"""Makes data/medmulti/composite: rows whose instruction needs two tasks at once, from data of single tasks.

    python scripts/make_composites.py
    python scripts/make_composites.py --source data/medmulti/tiny --out data/my_composites --train 20 --dev 4 --test 10

The tasks of a group (`group` in tasks.json) have the same inputs, so any two of them can be asked of one input: the row
has both instructions, and an answer on a line for each, in the order of tasks.json. Train and dev have rows of the
single tasks too, so that a router sees both; test has none. The same arguments make the same files.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

MEDMULTI = Path(__file__).resolve().parents[1] / "data" / "medmulti"
LAST_SENTENCE = "Answer each on a line of its own."

Tasks = dict[str, dict[str, Any]]
Names = tuple[str, ...]  # of the one or two tasks of a row


def main(argv: list[str]) -> None:
    """Make the rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=MEDMULTI / "mini", help="folder with the rows of single tasks")
    parser.add_argument("--out", type=Path, default=MEDMULTI / "composite", help="folder to make")
    parser.add_argument("--train", type=int, default=50, help="rows of each pair of tasks in train")
    parser.add_argument("--dev", type=int, default=10, help="rows of each pair of tasks in dev")
    parser.add_argument("--test", type=int, default=40, help="rows of each pair of tasks in test")
    parser.add_argument("--single", type=int, default=50, help="rows of each task alone in train; dev in proportion")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--overwrite", action="store_true", help="replace what a call with other arguments made")
    args = parser.parse_args(argv)
    numbers = {
        "train": (args.single, args.train),
        "dev": (round(args.single * args.dev / args.train) if args.train else 0, args.dev),
        "test": (0, args.test),
    }
    if args.out.resolve() == args.source.resolve():
        raise ValueError(f"{args.out} is what the rows come from; choose another folder with --out.")
    files = make(args.source, numbers, args.seed)
    write(files, args.out, args.overwrite)
    rows = ", ".join(f"{files[f'{split}.jsonl'].count(chr(10))} {split}" for split in numbers)
    print(f"{args.out} has {rows} rows.")


def make(source: Path, numbers: Mapping[str, tuple[int, int]], seed: int) -> dict[str, str]:
    """The texts of the new folder's files, by name.

    Args:
        source: folder with tasks.json and a .jsonl file for each split.
        numbers: for each split, the rows of each task alone and of each pair of tasks.
        seed: of the draw; what is drawn for a pair in a split does not depend on the numbers of the others.

    Raises:
        ValueError: no tasks with a common group, a number below 0, or one above that of the inputs there are.
    """
    description = json.loads((source / "tasks.json").read_text(encoding="utf-8"))
    tasks: Tasks = description["tasks"]
    pairs = [pair for pair in combinations(tasks, 2) if same_group(*(tasks[name] for name in pair))]
    if not pairs:
        raise ValueError(
            f"{source}/tasks.json has no two tasks of one group; give tasks with the same inputs a `group`."
        )
    files, counts = {}, {}
    for split, (single, paired) in numbers.items():
        path = source / f"{split}.jsonl"
        answers = read_answers(path)
        wanted: dict[Names, int] = dict.fromkeys([(name,) for name in tasks], single) | dict.fromkeys(pairs, paired)
        rows = [row for names, n in wanted.items() for row in draw(names, n, tasks, answers, f"{seed} {split}", path)]
        random.Random(f"{seed} {split}").shuffle(rows)  # or the first rows would be of one task
        counts[split] = Counter("+".join(row["task"]) for row in rows)
        files[f"{split}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    entries = tasks | {"+".join(pair): pair_entry(*(tasks[name] for name in pair)) for pair in pairs}
    description["name"] = f"{description.get('name', source.name)} composites"
    description["seed"] = seed
    description["tasks"] = {
        name: entry | {"n": {split: counts[split][name] for split in numbers}} for name, entry in entries.items()
    }
    return files | {"tasks.json": json.dumps(description, ensure_ascii=False, indent=1) + "\n"}


def same_group(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries of tasks.json are of one group, and so have the same inputs."""
    return one.get("group") is not None and one["group"] == other.get("group")


def read_answers(path: Path) -> dict[str, dict[str, str]]:
    """The answers in a file, by task and input, in the order of its rows.

    Raises:
        ValueError: an answer of several lines, which could not be told from answers to several tasks.
    """
    answers: dict[str, dict[str, str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        row = json.loads(line)
        if len(row["output"].splitlines()) != 1:
            raise ValueError(f"Row {number} of {path} answers {row['output']!r}; use rows with an answer of one line.")
        answers.setdefault(row["task"], {})[row["input"]] = row["output"]
    return answers


def draw(
    names: Names, number: int, tasks: Tasks, answers: Mapping[str, Mapping[str, str]], seed: str, path: Path
) -> list[dict[str, Any]]:
    """Rows of one task or pair of tasks, each with an input of its own."""
    first, *others = (answers.get(name, {}) for name in names)
    inputs = [text for text in first if all(text in other for other in others)]
    if not 0 <= number <= len(inputs):
        raise ValueError(
            f"{number} rows of {' and '.join(names)} are wanted from the {len(inputs)} inputs of {path}; use 0 to "
            f"{len(inputs)} with --{path.stem} or --single."
        )
    instruction = " ".join(tasks[name]["instruction"] for name in names)
    if others:
        instruction += f" {LAST_SENTENCE}"
    return [
        {
            "task": list(names),
            "instruction": instruction,
            "input": text,
            "output": "\n".join(answers[name][text] for name in names),
        }
        for text in random.Random(f"{seed} {'+'.join(names)}").sample(inputs, number)
    ]


def pair_entry(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What tasks.json says of a pair of tasks."""
    entry = {"group": one["group"], "kind": "composite", "metric": "line_f1"}
    entry["instruction"] = f"{one['instruction']} {other['instruction']} {LAST_SENTENCE}"
    for key in ("source", "license"):
        entry[key] = "; ".join(dict.fromkeys(str(task[key]) for task in (one, other) if key in task))
    return entry | {"labels": None}


def write(files: Mapping[str, str], out: Path, overwrite: bool) -> None:
    """Put the files into the folder `out`, all or none.

    Raises:
        ValueError: there are other files, or files with other content and no `overwrite`.
    """
    if out.exists():
        foreign = sorted(path.name for path in out.iterdir() if path.name not in files) if out.is_dir() else [out.name]
        if foreign:
            raise ValueError(
                f"{out} has {', '.join(foreign)}, which is not made here; choose another folder with --out."
            )
        if all((out / name).exists() and (out / name).read_bytes() == text.encode() for name, text in files.items()):
            return
        if not overwrite and any(out.iterdir()):
            raise ValueError(
                f"{out} has other rows; replace them with --overwrite, or choose another folder with --out."
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    # built beside the folder and renamed when complete: an interrupted run leaves no half folder behind
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".making-") as work:
        new, old = Path(work, "new"), Path(work, "old")
        new.mkdir()
        for name, text in files.items():
            (new / name).write_bytes(text.encode())
        if out.exists():
            os.rename(out, old)
        os.rename(new, out)


if __name__ == "__main__":
    main(sys.argv[1:])
