"""Puts the tables of docs/performance.md between their marks, from the JSON that the other scripts here have written.

    python scripts/bench/tables.py

Reads docs/performance, and what is in it for each machine, and changes nothing but the tables. A cell is the median of
the ratios to stock LoRA, with the middle half of the rounds: bold where the median is above its target, in italics
where it is and a quarter of the rounds are not. What was not measured is a dash.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from methods import LABELS
from targets import LAYER, MODEL, target_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- {}: written by scripts/bench/tables.py -->", "<!-- end of {} -->"
SHORT = {"fp32": "float32", "bf16": "bfloat16", "bf16_fp32": "mixed"}
STEPS = {
    "train": "train",
    "memory": "memory",
    "prefill": "prefill",
    "decode_1": "decode, 1 row",
    "decode_8": "8 rows",
    "generate_1": "generate, 1 row",
    "generate_8": "8 rows",
}
SHAPES = {"576x1536": "576 → 1536", "2048x5632": "2048 → 5632"}
OF_TOKEN = {
    "molora_k1_r64": 64,
    "molora_k2_r64": 128,
    "molora_n32": 32,
}  # ranks a token uses of those that dispatch spares
TOKENS = 1024
MIB = 2**20
Row = dict[str, Any]
Column = tuple[str, Callable[[str], str]]  # its title, and the cell of a method


def main(argv: list[str]) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="page to write into; the JSON is in the folder of its name"
    )
    page: Path = parser.parse_args(argv).page
    folder, text = page.with_suffix(""), page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        begin, end = BEGIN.format(name), END.format(name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            parser.error(f"{page} needs a line {begin!r} and, behind it, {end!r}, both once; put them back.")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{table(folder)}\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")
    return 0


def rows_of(path: Path) -> list[Row]:
    """What a benchmark measured."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def find(rows: Iterable[Row], **fields: Any) -> Row | None:
    """The row with these fields, if it is there."""
    return next((row for row in rows if fields.items() <= row.items()), None)


def cell(row: Row | None, target: float | None = None, against: str = "total") -> str:
    """A ratio, with the middle half of the rounds if it is of times."""
    found = ratio_of(row, against)
    if row is None or found is None:
        return "–"
    value, low, high = found
    return marked(value, low, target) + ("" if row["step"] == "memory" else f" {span(low, high)}")


def ratio_of(row: Row | None, against: str = "total") -> tuple[float, float, float] | None:
    """A ratio and the quartiles of the rounds; None if it was not measured. Memory is counted, once."""
    if row is not None and row["step"] == "memory":
        return row["ratio"], row["ratio"], row["ratio"]
    if row is None or against not in row["ratios"]:
        return None
    return row["ratios"][against]["median"], *row["ratios"][against]["quartiles"]


def span(low: float, high: float) -> str:
    """The middle half of the rounds."""
    return f"({low:.2f} to {high:.2f})"


def state(value: float, low: float, target: float) -> str:
    """Whether a target is met, missed, or missed by less than the spread: "near"."""
    return "met" if round(value, 2) <= target else "near" if low <= target else "missed"


def marked(value: float, low: float, target: float | None) -> str:
    """A number: bold if it misses its target, in italics if the lower quartile does not."""
    marks = {"met": "", "near": "*", "missed": "**"}
    around = "" if target is None else marks[state(value, low, target)]
    return f"{around}{value:.2f}{around}"


def table_of(first: str, columns: list[Column], methods: Iterable[str]) -> str:
    """A line for each method."""
    titles = [first, *(title for title, _ in columns)]
    return lines_of(titles, [[LABELS[method], *(of(method) for _, of in columns)] for method in methods])


def lines_of(titles: list[str], lines: Iterable[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *lines))


def titled(titles: Iterable[tuple[str, str]]) -> list[str]:
    """Titles of columns, whose group is said in the first of each: float32 after 576 → 1536 float32 ..."""
    found, before = [], ""
    for group, title in titles:
        found.append(title if group == before else f"{group} {title}")
        before = group
    return found


def of_layer(file: str, step: str, shown: list[tuple[str, str]], against: str = "total") -> Callable[[Path], str]:
    """A step of one layer, by shape and type."""

    def table(folder: Path) -> str:
        rows = rows_of(folder / file)
        targets: list[Column] = []
        if step in ("train", "memory") and against == "total":
            targets = [("target", lambda method: aims(method, step))]
        columns: list[Column] = []
        for (shape, dtype), title in zip(shown, titled((SHAPES[s], SHORT[d]) for s, d in shown), strict=True):

            def of(method: str, shape: str = shape, dtype: str = dtype) -> str:
                row = find(rows, shape=shape, dtype=dtype, method=method, step=step)
                return cell(row, target_of("layer", method, dtype, step) if targets else None, against)

            columns.append((title, of))
            if step == "train" and against == "total" and dtype == "fp32":
                columns.append(("floor", lambda method, shape=shape: floor(rows, shape, method)))
        methods = [method for method in (*LAYER, "lora") if against == "total" or of_others(rows, method)]
        return table_of(STEPS[step], [*targets, *columns], methods)

    return table


def of_others(rows: list[Row], method: str) -> bool:
    """Whether a token uses fewer ranks of a method than there are."""
    return any("active" in row.get("ratios", ()) for row in rows if row["method"] == method)


def aims(method: str, step: str) -> str:
    """The targets in float32 and in bfloat16, or the one of memory."""
    found = [target_of("layer", method, dtype, step) for dtype in ("fp32", "bf16")]
    if found[0] is None:
        return "–"
    return f"{found[0]:g}" if step == "memory" else f"{found[0]:g} / {found[1]:g}"


def floor(rows: list[Row], shape: str, method: str) -> str:
    """The base layer's time, and that of the adapter's products at the rate of the base's, as a ratio to stock LoRA's.

    The base makes two products of (tokens, in) by (in, out), the adapter three with each of its factors. What
    part of stock LoRA's time is the base's is taken from ratios within rounds, since a machine's speed changes.
    """
    train = find(rows, shape=shape, dtype="fp32", method=method, step="train")
    counted = find(rows, shape=shape, dtype="fp32", method=method, step="memory")
    if train is None or counted is None or method == "lora":
        return "–"
    kept = next(name for name in counted["saved_bytes"]["total"] if name.startswith(f"{TOKENS} × "))
    rank = OF_TOKEN.get(method, int(kept.split(" × ")[1].split()[0]))
    wide, high = map(int, shape.split("x"))
    products = 1 + 3 * rank * (wide + high) / (2 * wide * high)
    to_total, to_base = (train["ratios"][name]["median"] for name in ("total", "base"))
    return f"{to_total / to_base * products:.2f}"


def of_forward(file: str, shape: str, dtypes: list[str]) -> Callable[[Path], str]:
    """Steps without gradients of one layer."""

    def table(folder: Path) -> str:
        rows = rows_of(folder / file)
        steps = ("prefill", "decode_1", "decode_8")
        pairs = [(step, dtype) for step in steps for dtype in dtypes]
        titles = titled(
            (STEPS[step] if step != "decode_8" else "decode, 8 rows", SHORT[dtype]) for step, dtype in pairs
        )
        columns: list[Column] = [
            (
                title,
                lambda method, step=step, dtype=dtype: cell(
                    find(rows, shape=shape, dtype=dtype, method=method, step=step)
                ),
            )
            for (step, dtype), title in zip(pairs, titles, strict=True)
        ]
        return table_of(SHAPES[shape], columns, (*LAYER, "lora"))

    return table


def of_peaks(file: str, shown: list[tuple[str, str]]) -> Callable[[Path], str]:
    """What a training step allocates, and what it keeps for backward, in MiB."""

    def table(folder: Path) -> str:
        rows = rows_of(folder / file)
        columns: list[Column] = []
        for (shape, dtype), title in zip(shown, titled((SHAPES[s], SHORT[d]) for s, d in shown), strict=True):

            def of(method: str, shape: str = shape, dtype: str = dtype) -> str:
                row = find(rows, shape=shape, dtype=dtype, method=method, step="memory")
                if row is None:
                    return "–"
                base, *peaks = (row["peak_bytes"][name] / MIB for name in ("base", "total", "ours"))
                kept = [sum(row["saved_bytes"][name].values()) / MIB for name in ("total", "ours")]
                beyond = ", ".join(f"{peak - base:.1f}" for peak in peaks)
                return f"{base:.1f} + {beyond}; {kept[0]:.2f}, {kept[1]:.2f}"

            columns.append((title, of))
        return table_of("MiB", columns, LAYER)

    return table


def of_model(file: str, steps: list[str], dtypes: list[str], against: str = "total") -> Callable[[Path], str]:
    """Steps of the whole model."""

    def table(folder: Path) -> str:
        rows = rows_of(folder / file)
        pairs = [(step, dtype) for step in steps for dtype in dtypes]
        titles = [STEPS[step] for step in steps]
        if len(dtypes) > 1:
            titles = titled((long_step(step), SHORT[dtype]) for step, dtype in pairs)
        targets = {
            pair: target_of("model", "moelora", pair[1], pair[0]) if against == "total" else None for pair in pairs
        }

        def of(method: str, step: str, dtype: str) -> str:
            row = find(rows, dtype=dtype, method=method, step=step)
            return cell(row, target_of("model", method, dtype, step) if against == "total" else None, against)

        columns: list[Column] = [
            (title, lambda method, step=step, dtype=dtype: of(method, step, dtype))
            for (step, dtype), title in zip(pairs, titles, strict=True)
        ]
        there = [method for method in LABELS if find(rows, method=method)]
        if against != "total":
            return table_of("SmolLM2-135M", columns, [method for method in there if of_others(rows, method)])
        last = " | ".join("–" if targets[pair] is None else f"{targets[pair]:g}" for pair in pairs)
        return f"{table_of('SmolLM2-135M', columns, there)}\n| target | {last} |"

    return table


def long_step(step: str) -> str:
    """A step whose title does not lean on that of the one before."""
    return {"decode_8": "decode, 8 rows", "generate_8": "generate, 8 rows"}.get(step, STEPS[step])


def of_dropout(folder: Path) -> str:
    """Time and memory of one layer with dropout."""
    rows = rows_of(folder / "avx2" / "dropout.json")

    def of(method: str, step: str) -> str:
        return cell(find(rows, method=method, step=step), target_of("layer", method, "fp32", step))

    columns: list[Column] = [(step, lambda method, step=step: of(method, step)) for step in ("train", "memory")]
    return table_of("576 → 1536, float32", columns, (*LAYER, "lora"))


def of_dispatch(folder: Path) -> str:
    """Time with dispatch as a ratio to that without, and what the rule says."""
    rows = json.loads((folder / "avx2" / "dispatch.json").read_text(encoding="utf-8"))["results"]
    lines = []
    for experts in dict.fromkeys(row["experts"] for row in rows):
        small, large = ([row for row in rows if (row["shape"], row["experts"]) == (shape, experts)] for shape in SHAPES)
        cells = [f"{row['ratio']:.2f} {span(*row['quartiles'])}" for row in (*small, *large)]
        rule = "dispatched" if large[0]["pays"] else "dense"
        lines.append([experts.replace(":", ", "), cells[0], rule, cells[1]])
    return lines_of(["E, K, r", SHAPES["576x1536"], "by the rule", SHAPES["2048x5632"]], lines)


def of_lifecycle(folder: Path) -> str:
    """Injecting, saving, loading: times and ratios; above 1.20 misses the target."""
    found = json.loads((folder / "avx2" / "lifecycle.json").read_text(encoding="utf-8"))["results"]["adapters"]
    lines = []
    for name, row in found.items():
        method, _, what = name.partition(", ")
        done = "made from 9 folders; stock: loading these 9" if what == "read" else what
        middle = row["ratio_quartiles"]
        ratio = f"{marked(row['ratio'], middle[0], 1.2)} {span(*middle)}"
        label = f"{LABELS[method].split(',')[0]}, {done}"
        lines.append([label, f"{row['reference_ms']:.0f}", f"{row['ms']:.0f}", ratio])
    return lines_of(["", "stock LoRA, ms", "peft_moe, ms", "ratio"], lines)


def of_folding(folder: Path) -> str:
    """Folding an adapter beside reading and writing the file."""
    lines = []
    for file in ("lifecycle", "fold"):
        found = json.loads((folder / "avx2" / f"{file}.json").read_text(encoding="utf-8"))["results"]["fold"]
        for name, row in found.items():
            whole = [f"{row[what]:.0f}" for what in ("file_mib", "reference_ms", "ms")]
            ratio = f"{row['ratio']:.2f} {span(*row['ratio_quartiles'])}"
            peaks = f"{row['reference_peak_mib']:.0f}, {row['peak_mib']:.0f}"
            lines.append([name.removeprefix("fold, "), *whole, ratio, peaks])
    memory = "peak memory: read + write, fold, MiB"
    return lines_of(["", "file, MiB", "read + write, ms", "fold, ms", "ratio", memory], lines)


def summary(folder: Path) -> str:
    """How many targets are met, missed, and not measured, by what they are about."""
    layer, model = (rows_of(folder / "avx2" / f"{name}.json") for name in ("layer", "model"))
    model += rows_of(folder / "avx2" / "model-bf16.json")
    lines = []
    for dtype in ("fp32", "bf16"):
        for step, what in (("train", "time"), ("memory", "memory")):
            found = [
                judged(
                    find(layer, shape=shape, dtype=dtype, method=method, step=step),
                    target_of("layer", method, dtype, step),
                )
                for shape in SHAPES
                for method in LAYER
            ]
            lines.append([f"a layer, {what}, {SHORT[dtype]}", *tally(found)])
    for dtype in ("fp32", "bf16", "bf16_fp32"):
        found = [
            judged(find(model, dtype=dtype, method=method, step=step), target_of("model", method, dtype, step))
            for step in MODEL
            if not step.startswith("generate")
            for method in ("moelora", "molora", "medmoelora", "at_moe")
        ]
        lines.append([f"the whole model, {SHORT[dtype]}", *tally(found)])
    return lines_of(["", "targets", "met", "missed by less than the spread", "missed", "not measured"], lines)


def judged(row: Row | None, target: float | None) -> str | None:
    """The state of a target; None if it was not measured."""
    found = ratio_of(row)
    return None if found is None or target is None else state(*found[:2], target)


def tally(found: list[str | None]) -> list[str]:
    """How many there are, in each state, and not measured."""
    return [str(len(found)), *(str(found.count(what)) for what in ("met", "near", "missed", None))]


EVERY = [(shape, dtype) for shape in SHAPES for dtype in SHORT]
WITHOUT_MIXED = EVERY[:-1]  # of the large layer, mixed types were not measured with AVX2 alone
FORWARD = ["prefill", "decode_1", "decode_8", "generate_1", "generate_8"]
TABLES: dict[str, Callable[[Path], str]] = {
    "summary": summary,
    "layer-time": of_layer("avx2/layer.json", "train", WITHOUT_MIXED),
    "layer-memory": of_layer("avx2/layer.json", "memory", WITHOUT_MIXED),
    "layer-peaks": of_peaks("avx2/layer.json", WITHOUT_MIXED),
    "layer-active": of_layer("avx2/layer.json", "train", EVERY[:4], "active"),
    "layer-forward": of_forward("avx2/layer.json", "576x1536", ["fp32"]),
    "model": of_model("avx2/model.json", ["train", "memory", *FORWARD], ["fp32"]),
    "model-half": of_model("avx2/model-bf16.json", ["train", "memory", *FORWARD], ["bf16", "bf16_fp32"]),
    "model-active": of_model("avx2/model.json", ["train", *FORWARD], ["fp32"], "active"),
    "dropout": of_dropout,
    "dispatch": of_dispatch,
    "lifecycle": of_lifecycle,
    "folding": of_folding,
    "amx-layer-time": of_layer("layer.json", "train", EVERY),
    "amx-layer-memory": of_layer("layer.json", "memory", EVERY),
    "amx-layer-active": of_layer("layer.json", "train", EVERY, "active"),
    "amx-layer-forward": of_forward("layer.json", "576x1536", ["fp32", "bf16", "bf16_fp32"]),
    "amx-model": of_model(
        "model.json", ["train", "memory", "prefill", "generate_1", "generate_8"], ["fp32", "bf16_fp32"]
    ),
    "amx-model-active": of_model(
        "model.json", ["train", "prefill", "generate_1", "generate_8"], ["fp32", "bf16_fp32"], "active"
    ),
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
