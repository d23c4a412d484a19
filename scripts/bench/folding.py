"""How close a stock LoRA comes to adapters whose experts are chosen by the input, by method and compression.

    python scripts/get_model.py
    python scripts/train.py recipes/medmoelora.yaml --max_rows_per_task 125
    python scripts/train.py recipes/molora.yaml --max_rows_per_task 125
    python scripts/bench/folding.py outputs/medmoelora outputs/molora outputs/at_moe --output docs/folding.json

Each adapter is calibrated on rows of the training split of MedMulti mini (a fifth of them held out for errors and KL),
folded into a directory, loaded from there as a stock LoRA and merged into the base model, and scored on the first test
rows of each task beside the adapter itself and the base model. What is in the output file already is not done again.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from peft_moe import calibrate, fold
from peft_moe.data import encode, take_per_task
from peft_moe.evaluation import evaluate_tasks
from peft_moe.reading import read_examples, read_task_info

ROOT = Path(__file__).resolve().parents[2]
DATA = "data/medmulti/mini"
Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", help="directories of adapters, trained on SmolLM2-135M")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "folding.json")
    parser.add_argument("--rows", type=int, default=160, help="rows to calibrate and measure on")
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 16], help="ranks to compress to")
    parser.add_argument("--limit", type=int, default=10, help="test rows of each task")
    args = parser.parse_args()
    os.chdir(ROOT)  # the recipes' paths start here
    settings = {"rows": args.rows, "limit": args.limit, "data": DATA}
    found = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {"settings": settings}
    if found["settings"] != settings:
        raise SystemExit(f"{args.output} was made with {found['settings']}; choose another file.")
    results: dict[str, dict[str, Row]] = found.setdefault("results", {})
    for adapter in args.adapters:
        rows = results.setdefault(Path(adapter).name, {})
        for name, row in measure(adapter, args, done=set(rows)):
            rows[name] = row
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{Path(adapter).name}: {name}: {line(row)}", flush=True)
    print("\n| adapter | as | rank | error | KL, nats | score |\n|---|---|---|---|---|---|")
    for adapter, rows in results.items():
        for name, row in rows.items():
            print(f"| {adapter} | {name} | {line(row)} |")


def line(row: Row) -> str:
    """The cells of a row of the table."""
    rank, error, kl = row.get("rank", ""), row.get("error"), row.get("kl")
    cells = [str(rank), *("" if v is None else f"{v:.3f}" for v in (error, kl)), f"{row['score']:.3f}"]
    return " | ".join(cells)


def measure(adapter: str, args: argparse.Namespace, done: set[str]) -> Iterator[tuple[str, Row]]:
    """Name and figures of each form of an adapter that is not done."""
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(base)
    test = take_per_task(read_examples(DATA, split="test"), args.limit)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16")

    def score(model: Any) -> Row:
        scores = evaluate_tasks(model, tokenizer, test, read_task_info(DATA), batch_size=32, max_new_tokens=32)
        return {"score": scores["mean"]["score"], "tasks": {t: r["score"] for t, r in scores.items() if t != "mean"}}

    if "base model" not in done:
        yield "base model", score(load())
    model = PeftModel.from_pretrained(load(), adapter)
    if "adapter" not in done:
        yield "adapter", score(model)
    batches = batches_of(tokenizer, args.rows)
    forms = [("least squares", {}), *((f"least squares, compressed to {r}", {"rank": r}) for r in args.ranks)]
    for name, options in [*forms, ("mean weights", {"method": "mean_gate"})]:
        if name in done:
            continue
        found = calibrate(model, batches, progress=True, **options)
        with tempfile.TemporaryDirectory() as folder:
            fold(model, Path(folder) / "lora")
            rank = PeftConfig.from_pretrained(str(Path(folder) / "lora")).r
            merged = PeftModel.from_pretrained(load(), str(Path(folder) / "lora")).merge_and_unload()
        errors = {key: asdict(layer) for key, layer in found.layers.items()}
        yield name, {"rank": rank, "error": found.error, "kl": found.kl, "layers": errors, **score(merged)}


def batches_of(tokenizer: Any, rows: int) -> list[Any]:
    """Rows of the training split, padded in batches."""
    examples: Dataset = read_examples(DATA, split="train").shuffle(seed=0).select(range(rows))
    encoded = encode(examples, tokenizer, tasks=None, max_length=512)
    return list(DataLoader(encoded, batch_size=8, collate_fn=DataCollatorForSeq2Seq(tokenizer)))


if __name__ == "__main__":
    main()
