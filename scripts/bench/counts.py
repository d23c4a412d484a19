"""What a step costs by count: multiplications, bytes written, operations, bytes kept; no time is taken.

    python scripts/bench/counts.py
    python scripts/bench/counts.py --method molora at_moe --output runs/bench/counts.json
    python scripts/bench/counts.py --limits

All are ratios to a stock LoRA of the same total rank, and the same on every machine but for the peak in bfloat16, where
a CPU's products need room of their own: tests/test_cost.py holds them against limits. A layer is 576 → 1536 and sees
4 × 64 tokens, or one token for each of 4 rows (decode); the model is a Llama of three layers, hidden size 192 and
feed-forward size 512, that sees 4 × 32 tokens, then one more (decode), or generates 8 after 8 (generate). Products are
what multiplies matrices, two operations for each multiplication; written are the bytes of all results but views;
operations are calls of PyTorch's dispatcher, views included; kept are the bytes saved for backward beside the layer's
input; peak is the most bytes at one time beyond the frozen layer's.

--limits prints them as LIMITS of the test, with its slack.
"""

import argparse
import json
from collections.abc import Callable
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import layer
import model
import torch
from counting import count
from methods import DTYPES
from targets import LAYER
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
SHAPE = (576, 1536)
LAYER_STEPS = ["train", "prefill", "decode"]
MODEL_STEPS = ["train", "prefill", "decode", "generate"]
COLUMNS = ["products", "written", "operations", "kept", "peak"]
SLACK = {"operations": 1.1}  # 1.03 for all else


def main() -> None:
    """Print the table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--method", choices=sorted({method for _, _, method, _ in cases()}), nargs="+")
    parser.add_argument("--limits", action="store_true", help="print limits for tests/test_cost.py too")
    arguments = parser.parse_args()
    print(f"| | type | method | step | {' | '.join(COLUMNS)} |\n|---|---|---|---|{'---|' * len(COLUMNS)}")
    rows = []
    for subject, dtype, method, step in cases():
        if arguments.method and method not in arguments.method:
            continue
        row = (layer_costs if subject == "layer" else model_costs)(method, dtype, step)
        rows.append({"subject": subject, "dtype": dtype, "method": method, "step": step, **row})
        cells = [f"{row[name]:.3f}" if name in row else "–" for name in COLUMNS]
        print(f"| {subject} | {dtype} | {method} | {step} | {' | '.join(cells)} |", flush=True)
    if arguments.limits:
        print_limits(rows)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def print_limits(rows: list[dict[str, Any]]) -> None:
    """Rows as limits: what was counted and the slack, rounded up."""
    before = None
    for row in rows:
        case = (row["subject"], row["dtype"], row["method"])
        if case != before:
            print(("" if before is None else "},\n") + f"{json.dumps(case).replace('[', '(').replace(']', ')')}: {{")
        before = case
        limits = [f"{ceil(100 * SLACK.get(name, 1.03) * row[name]) / 100:.2f}" for name in COLUMNS if name in row]
        print(f'    "{row["step"]}": ({", ".join(limits)}),')
    print("},")


def cases() -> list[tuple[str, str, str, str]]:
    """Subject, type, method and step of every row."""
    of_layer = [("layer", d, m, s) for d in ("fp32", "bf16") for m in LAYER for s in LAYER_STEPS]
    return of_layer + [("model", "fp32", m, s) for m in model.METHODS if m != "lora" for s in MODEL_STEPS]


def layer_costs(method: str, dtype: str, step: str) -> dict[str, float]:
    """Ratios of a step of a layer to those of a stock LoRA of the same total rank."""
    models = _layers(method, dtype)
    x = layer.random_input(4, 1 if step == "decode" else 64, SHAPE[0], dtype)
    make = layer.training_step if step == "train" else layer.forward_step
    names = {name: method if name == "ours" else "lora" for name in models}
    found = _ratios({name: make(models[name], x, names[name]) for name in ("total", "ours")})
    if step == "train":
        memory = layer.memory(models, method, dtype, tokens=64)
        kept = {name: sum(of_shape.values()) for name, of_shape in memory["saved_bytes"].items()}
        found |= {"kept": kept["ours"] / kept["total"], "peak": memory["ratio"]}
    return found


def model_costs(method: str, dtype: str, step: str) -> dict[str, float]:
    """Ratios of a step of a small Llama to those with a stock LoRA of the same total rank in each layer."""
    models = _llamas(method, dtype)
    makers: dict[str, Callable[..., Callable[[], None]]] = {
        "train": model.training_step,
        "prefill": model.prefill,
        "decode": model.decode,
        "generate": lambda *of_model: model.generation(*of_model, tokens=8),
    }
    names = {"total": "lora", "ours": method}
    inputs = {name: model.inputs_for(models[name], names[name], 4, 8 if step == "generate" else 32) for name in names}
    return _ratios({name: makers[step](models[name], inputs[name]) for name in names})


def _ratios(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    costs = {name: count(step) for name, step in steps.items()}
    found: dict[str, Any] = costs["ours"].ratio_to(costs["total"])
    return {"products": found["flops"], "written": found["written"], "operations": found["operations"]}


@cache
def _layers(method: str, dtype: str) -> dict[str, nn.Module]:
    return layer.contestants(method, SHAPE, dtype)


@cache
def _llamas(method: str, dtype: str) -> dict[str, nn.Module]:
    def base() -> LlamaForCausalLM:
        sizes = {"intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=192, **sizes, **special)).to(DTYPES[dtype][0])

    return model.contestants(method, dtype, base)


if __name__ == "__main__":
    main()
