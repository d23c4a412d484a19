"""Run peft's own tests against our configs, beside stock LoRA, and write what comes out into docs/conformance.*.

    export PEFT_SRC=~/peft PEFT_SUITE=~/suite
    python scripts/conformance.py                                                  # all: some 15 minutes of one core
    python scripts/conformance.py --configs MoLoraConfig --suites custom -k merge                     # writes nothing

peft does not install its tests: PEFT_SRC is a checkout, or an unpacked sdist, of the installed version. PEFT_SUITE is
the folder of the pytest plugin that runs them with another config class. It is not published.

The status is 1 if a test fails without an explanation in EXPLAINED, or an explained one passes that is not in
ON_SOME_CPUS, or stock LoRA runs a test that peft skips for us without a word in GATED.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import LoraConfig

from peft_moe import GroupedMoeConfig, MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SUITES = ("config", "custom", "decoder", "seq2seq", "seqcls", "feature", "tokencls_qa")
STOCK = "LoraConfig"
OUTCOMES = ("passed", "failed", "skipped", "declared")

# What the suite is to know of a config: linear layers are targeted, GPT-2's too, and this makes a new adapter change
# the output.
OPTIONS: dict[str, Any] = {"kinds": {"linear", "conv1d_hf"}, "init_off": {"init_lora_weights": False}}
MIXED = OPTIONS | {"mixed_batch": True}  # the tests of `adapter_names`, which peft runs for stock LoRA alone
BY_INPUT = MIXED | {"merge": False}  # experts that the input chooses are in no single matrix
# One test wants every parameter to have moved by 1e-4 after three steps, and takes a rate of 100 for types that are
# slow at it; gates are, since they have a gradient once experts differ.
LARGER_STEPS = {"lora_alpha": 320}
MOELORA = {"r": 8, "num_experts": 4, "tasks": ["a", "b"], "default_task": "a"}  # peft's tests pass no task_ids
NEW_EXPERTS = {"groups": {"a": ["x", "y"], "b": ["z"]}, "train_experts": True}


@dataclass
class NewExperts(GroupedMoeConfig):
    """AT-MoE that need not be told its experts: ten of peft's tests give a config `target_modules` and nothing else.

    The experts are new, since a new adapter is to change nothing in peft's tests, and trained ones do.
    """

    groups: dict[str, Any] = field(default_factory=lambda: dict(NEW_EXPERTS["groups"]))
    train_experts: bool = True


SPECS = [
    (STOCK, LoraConfig, {"r": 8}, OPTIONS),
    ("MoeLoraConfig", MoeLoraConfig, MOELORA, MIXED | {"custom_kwargs": MOELORA | LARGER_STEPS}),
    ("MoLoraConfig", MoLoraConfig, {"r": 4, "num_experts": 4}, BY_INPUT),
    ("MedMoeLoraConfig", MedMoeLoraConfig, {}, BY_INPUT),
    ("GroupedMoeConfig", NewExperts, {"r": 4}, BY_INPUT),
]
# The suite of configs asks for the class that a file is loaded as, and gives all fields.
OF_CONFIGS = [("GroupedMoeConfig", GroupedMoeConfig, {"r": 4} | NEW_EXPERTS, BY_INPUT)]

# Failures that stay: a regex for the configs, one for test and parameters, and why.
EXPLAINED: list[tuple[str, str, str]] = [
    (
        r"^(MoLora|MedMoeLora)Config$",
        r"^test_only_params_are_updated\[Vanilla MLP 4 ",
        "every parameter is to have moved by 1e-4 after three steps, by the sum of log-probabilities for inputs of 0 "
        "to 89. The router of the last layer has a gradient once its experts differ, and by then that loss is flat for "
        "some draws, or diverges at larger steps, as stock LoRA's does. "
        "`test_training_changes_the_adapter_and_nothing_else` holds it for all parameters.",
    ),
    (
        r"^MedMoeLoraConfig$",
        r"^test_generate_with_mixed_adapter_batches\[.*OPTForCausalLM\]$",
        "it wants equal tokens of a beam search with all weights times ten, in float32, and one of its rows has a near "
        "tie: a matrix product of fewer rows rounds otherwise, by 1e-5 of logits up to 4. In float64 the rows of a "
        "mixed batch are those of each adapter alone to the bit; `tests/test_mixed_batches.py` holds it.",
    ),
]
# Of these, the tests that pass on some CPUs, by how they round.
ON_SOME_CPUS = {r"^test_generate_with_mixed_adapter_batches\[.*OPTForCausalLM\]$"}

# Tests that peft runs for stock LoRA and skips for us, since it asks for that class, and what holds the matter here.
GATED = {
    "test_weighted_combination_of_adapters": "`add_weighted_adapter` says what to do instead (`test_adapters.py`)",
}

Rows = list[dict[str, Any]]


def main(argv: list[str]) -> int:
    """Run, print, write; the status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [spec[0] for spec in SPECS]
    parser.add_argument("--configs", nargs="+", choices=names, default=names, metavar="CONFIG", help=", ".join(names))
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES, metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("-k", default="", help="pytest's expression for a choice of tests")
    parser.add_argument("-n", default="0", help="processes of pytest-xdist")
    parser.add_argument(
        "--rows", type=Path, help="folder that keeps the outcomes by config; what is there is not run again"
    )
    args = parser.parse_args(argv)
    if args.rows and (args.k or set(args.suites) != set(SUITES)):
        parser.error("--rows keeps whole runs; leave it out with -k and --suites.")
    suite = check_sources(os.environ.get("PEFT_SUITE"), os.environ.get("PEFT_SRC"), version("peft"))
    results = {}
    for name in args.configs:
        kept = args.rows / f"{name}.json" if args.rows else None
        if kept and kept.is_file():
            results[name] = json.loads(kept.read_text(encoding="utf-8"))
            continue
        results[name] = run(name, suite, args.suites, args.k, args.n)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(results[name]), encoding="utf-8")
    whole = not args.k and set(args.configs) == set(names) and set(args.suites) == set(SUITES)
    summary = summarise(results)
    print(table(summary))
    if whole:
        write(summary)
    problems = find_problems(results, whole=whole)
    for problem in problems:
        print(problem)
    return bool(problems)


def check_sources(peft_suite: str | None, peft_src: str | None, installed: str) -> Path:
    """The suite's folder; a SystemExit that says what to do unless it and tests of the installed version are there."""
    if not peft_suite or not (Path(peft_suite) / "peft_suite_plugin.py").is_file():
        sys.exit(
            f"There is no peft_suite_plugin.py in PEFT_SUITE={peft_suite or ''}; set PEFT_SUITE to its folder. It is "
            "not published: without it, tests/test_conformance.py holds the same behaviours."
        )
    remedy = (
        f"run\n    pip download --no-deps --no-binary :all: peft=={installed} && tar xzf peft-{installed}.tar.gz\n"
        f"    export PEFT_SRC=$PWD/peft-{installed}"
    )
    if not peft_src:
        sys.exit(f"PEFT_SRC is not set; it is a checkout of peft's repository at the installed version. {remedy}")
    there = Path(peft_src)
    if not (there / "tests" / "testing_common.py").is_file():
        sys.exit(f"PEFT_SRC={peft_src} has no tests/testing_common.py; {remedy}")
    source = there / "src" / "peft" / "__init__.py"
    found = re.search(r'__version__ = "(.+)"', source.read_text(encoding="utf-8")) if source.is_file() else None
    if found is None or found[1] != installed:
        sys.exit(
            f"PEFT_SRC={peft_src} is peft {found[1] if found else 'of no version'}, and {installed} is installed; "
            f"{remedy}\nor, in a checkout: git checkout v{installed}"
        )
    return Path(peft_suite)


def run(name: str, suite: Path, suites: Iterable[str], k: str, processes: str) -> Rows:
    """The outcomes of peft's tests for one config; a SystemExit with pytest's words if a run did not end well."""
    print(f"{name}: peft's tests ...", flush=True)
    apart = {"config"} if any(name == spec[0] for spec in OF_CONFIGS) else set()
    rows = run_suites("SPECS", name, suite, [part for part in suites if part not in apart], k, processes)
    rows += run_suites("OF_CONFIGS", name, suite, [part for part in suites if part in apart], k, processes)
    for row in rows:
        file, _, test = row["nodeid"].partition("::")
        row["suite"], row["test"] = Path(file).stem.removeprefix("test_"), test.rpartition("::")[2]
        row["function"] = row["test"].partition("[")[0]
        if row["outcome"] == "skipped" and "declared:" in row["reason"]:
            row["outcome"] = "declared"
    return rows


def run_suites(specs: str, name: str, suite: Path, suites: Sequence[str], k: str, processes: str) -> Rows:
    """What the suite's plugin writes for the config of that name in one of the lists above."""
    if not suites:
        return []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        path = os.pathsep.join(filter(None, [str(suite), os.environ.get("PYTHONPATH")]))
        settings = {
            "PEFT_SUITE_SPEC": f"{Path(__file__).resolve()}:{specs}", "PEFT_SUITE_NAME": name,
            "PEFT_SUITE_NATIVE": "0", "PEFT_SUITE_MODELS": "", "PEFT_SUITE_OUT": str(out), "PYTHONPATH": path,
        }  # fmt: skip
        files = [str(suite / "suites" / f"test_{part}.py") for part in suites]
        options = ["-p", "peft_suite_plugin", "-p", "no:cacheprovider", "--rootdir", str(suite), "-c", os.devnull]
        options += ["-q", "--tb=no", "--disable-warnings", *(["-n", processes] if processes != "0" else [])]
        command = [sys.executable, "-W", "ignore", "-m", "pytest", *options, *(["-k", k] if k else []), *files]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **settings}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    # 0 all passed, 1 some failed, 5 nothing was chosen; anything else did not come to its end
    if done.returncode not in (0, 1, *([5] if k else [])):
        sys.exit(f"{name}: the run ended with status {done.returncode}.\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return rows


def summarise(results: dict[str, Rows]) -> dict[str, Any]:
    """By config: counts per suite, what failed, and what peft does not run for us and runs for stock LoRA."""
    summary: dict[str, Any] = {"versions": {name: version(name) for name in ("peft", "transformers", "torch")}}
    summary["configs"] = {}
    for name, rows in results.items():
        counts = {part: dict.fromkeys(OUTCOMES, 0) for part in SUITES if any(row["suite"] == part for row in rows)}
        for row in rows:
            counts[row["suite"]][row["outcome"]] += 1
        total = {outcome: sum(count[outcome] for count in counts.values()) for outcome in OUTCOMES}
        failed = collections.Counter((row["function"], explanation(name, row)) for row in rows if is_failed(row))
        summary["configs"][name] = {
            "suites": counts,
            "total": total,
            "failed": [{"test": test, "times": n, "why": why} for (test, why), n in sorted(failed.items(), key=str)],
            "gated": gated(rows, results.get(STOCK, [])),
        }
    return summary


def is_failed(row: dict[str, Any]) -> bool:
    """Whether a test failed."""
    return bool(row["outcome"] == "failed")


def explanation(config: str, row: dict[str, Any]) -> str | None:
    """Why a test fails for a config and stays so; None where nothing is known."""
    matches = (why for configs, test, why in EXPLAINED if re.search(configs, config) and re.search(test, row["test"]))
    return next(matches, None)


def gated(rows: Rows, stock: Rows) -> dict[str, int]:
    """How often peft skips tests for a config of which stock LoRA passes some, by test function."""
    runs = {row["function"] for row in stock if row["outcome"] == "passed"}
    skipped = collections.Counter(r["function"] for r in rows if r["outcome"] == "skipped" and r["function"] in runs)
    by_stock = collections.Counter(r["function"] for r in stock if r["outcome"] == "skipped")
    return {test: n - by_stock[test] for test, n in sorted(skipped.items()) if n > by_stock[test]}


def find_problems(results: dict[str, Rows], *, whole: bool) -> list[str]:
    """What is wrong, a line for each; empty if all is as the tables above say."""
    problems = []
    for name, rows in results.items():
        for row in filter(is_failed, rows):
            if explanation(name, row) is None:
                reason = " ".join(row["reason"].split())[:200]
                problems.append(f"{name}: {row['suite']}::{row['test']} fails without an explanation: {reason}")
        for test in gated(rows, results.get(STOCK, [])).keys() - GATED.keys():
            problems.append(f"{name}: peft skips {test} and runs it for stock LoRA; say in GATED what holds it.")
    for configs, test, why in EXPLAINED:
        if test in ON_SOME_CPUS:
            continue
        hit = [(name, row) for name, rows in results.items() for row in rows if explanation(name, row) == why]
        passed = [f"{name}: {row['suite']}::{row['test']}" for name, row in hit if row["outcome"] == "passed"]
        if whole and not any(is_failed(row) for _, row in hit):
            problems.append(f"The explanation {test!r} for {configs!r} explains nothing any more; take it out.")
        elif passed:
            problems.append(f"{passed[0]} passes and is explained as a failure; narrow {test!r}.")
    return problems


def table(summary: dict[str, Any]) -> str:
    """The counts as Markdown: a row per suite and one for all, a column per config."""
    configs = summary["configs"]
    lines = ["| suite | " + " | ".join(f"`{name}`" for name in configs) + " |", "|---" * (len(configs) + 1) + "|"]
    for part in (*SUITES, "all"):
        found = [config["total"] if part == "all" else config["suites"].get(part) for config in configs.values()]
        cells = [" / ".join(str(count[outcome]) for outcome in OUTCOMES) if count else "–" for count in found]
        if any(found):
            lines.append(f"| {'**all**' if part == 'all' else part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def failures(summary: dict[str, Any]) -> str:
    """The failures as a Markdown list."""
    lines = [
        f"* `{name}`, `{entry['test']}` ({entry['times']}): {entry['why'] or '**not explained**'}"
        for name, config in summary["configs"].items()
        for entry in config["failed"]
    ]
    return "\n".join(lines) or "None."


def gates(summary: dict[str, Any]) -> str:
    """What peft runs for stock LoRA alone, as a Markdown table."""
    ours = {name: config["gated"] for name, config in summary["configs"].items() if name != STOCK}
    tests = sorted({test for counts in ours.values() for test in counts})
    rows = [f"| `{test}` | {max(c.get(test, 0) for c in ours.values())} | {GATED.get(test, '')} |" for test in tests]
    return "\n".join(["| peft's test | cases | here |", "|---|---|---|", *rows])


def write(summary: dict[str, Any]) -> None:
    """Put the numbers into docs/conformance.json, and the tables of docs/conformance.md between their marks."""
    (DOCS / "conformance.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = DOCS / "conformance.md"
    text = page.read_text(encoding="utf-8")
    for name, content in (("table", table(summary)), ("failures", failures(summary)), ("gates", gates(summary))):
        start, end = f"<!-- {name}: written by scripts/conformance.py -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n\n{content}\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
