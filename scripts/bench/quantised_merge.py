"""What merging an adapter into quantised weights loses, beside leaving it unmerged, on SmolLM2-135M.

    python scripts/train.py recipes/quickstart.yaml
    python scripts/bench/quantised_merge.py outputs/quickstart --output runs/quantised_merge.json

For one task of a MOELORA adapter and each way to quantise its base: the loss of answers to the task's rows that it was
not trained on without the adapter, with it, with it merged, and unmerged again; and how much of what was added to a
layer's weights the merged ones miss, ‖W' - W - Δ‖ / ‖Δ‖, over all layers.
"""

import argparse
import json
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import concatenate_datasets
from peft import PeftModel
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    TorchAoConfig,
)

from peft_moe.data import encode, read_examples
from peft_moe.layer import MoeLinear
from peft_moe.quantised import weight_of

ROOT = Path(__file__).parents[2]
BASES: dict[str, Any] = {
    "none": None,
    "bnb int8": BitsAndBytesConfig(load_in_8bit=True),
    "bnb nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb nf4, double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao int8, dynamic": TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "torchao int4 per row": TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "torchao float8": TorchAoConfig(Float8WeightOnlyConfig()),
}


def main() -> None:
    """Measure every base, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="a MOELORA adapter")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quantised_merge.json")
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "medmulti" / "mini")
    parser.add_argument("--task", default="icd_chapter")
    parser.add_argument("--rows", type=int, default=64, help="rows to score")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.adapter)
    rows = concatenate_datasets([read_examples(str(arguments.data), split=split) for split in ("dev", "test")])
    rows = rows.filter(lambda row: row["task"] == arguments.task)
    rows = encode(rows.select(range(min(arguments.rows, len(rows)))), tokenizer, tasks=None)
    collate = DataCollatorForSeq2Seq(tokenizer)
    batches = [collate([rows[j] for j in range(i, min(i + 8, len(rows)))]) for i in range(0, len(rows), 8)]
    results = {}
    print("| base | loss | with the adapter | merged | unmerged again | lost of Δ, mean | worst |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.bases:
        r = results[name] = measure(arguments, BASES[name], batches)
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in r.values()) + " |", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = vars(arguments) | {"scored": len(rows)}
    arguments.output.write_text(json.dumps({"settings": settings, "results": results}, default=str, indent=1))


@torch.no_grad()
def measure(arguments: argparse.Namespace, quantisation: Any, batches: list[Any]) -> dict[str, float]:
    """Losses of answers and what merging lost, on one base."""
    base = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=quantisation, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(arguments.adapter)).eval()
    model.set_task(arguments.task)

    def score() -> float:
        return mean(model(**batch).loss.item() for batch in batches)

    layers = [layer for layer in model.modules() if isinstance(layer, MoeLinear)]
    before = [weight_of(layer).float().clone() for layer in layers]
    with model.disable_adapter():
        found = {"alone": score()}
    found["with"] = score()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is measured here
        model.merge_adapter()
    lost = []
    for layer, old in zip(layers, before, strict=True):
        delta = layer.get_delta_weight("default")
        lost.append(((weight_of(layer).float() - old - delta).norm() / delta.norm()).item())
    found["merged"] = score()
    model.unmerge_adapter()
    return found | {"unmerged": score(), "lost_mean": mean(lost), "lost_worst": max(lost)}


if __name__ == "__main__":
    main()
