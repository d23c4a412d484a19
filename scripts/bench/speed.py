"""Time of MOELoRA as a ratio to stock LoRA of the same rank on the same layers, in one process, interleaved.

    python scripts/bench/speed.py --output runs/speed.json

Forward and backward of a training step, a prefill, and one decoded token, on SmolLM2-135M; medians over rounds, with
the spread of the ratios between rounds. Rows of the batch have different tasks.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_moe import MoeLoraConfig

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Time both adapters in turns and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "speed.json")
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    results = {}
    print("| | stock LoRA, ms | MOELoRA, ms | ratio | middle half of the ratios |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        models = build(arguments.model, arguments.r, dtype)
        for name, make in (("train", training_step), ("prefill", prefill), ("decode", decode)):
            steps = {method: make(model, arguments.batch, arguments.seq) for method, model in models.items()}
            label = f"{name}, {dtype}".replace("torch.", "")
            r = results[label] = compare(steps, arguments.rounds)
            low, high = r["ratio_quartiles"]
            times = f"{r['lora_ms']:.0f} | {r['moelora_ms']:.0f} | {r['ratio']:.2f} | {low:.2f} to {high:.2f}"
            print(f"| {label} | {times} |", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"settings": vars(arguments), "results": results}, default=str, indent=1))


def build(base: str, r: int, dtype: torch.dtype) -> dict[str, PeftModel]:
    """The two adapters on their own copies of the base."""
    shared = {
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": "all-linear",
        "lora_dropout": 0.0,
    }
    configs = {"lora": LoraConfig(**shared), "moelora": MoeLoraConfig(**shared, num_experts=8, tasks=8)}
    return {m: get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), c) for m, c in configs.items()}


def inputs_for(model: PeftModel, batch: int, seq: int) -> dict[str, torch.Tensor]:
    """Random tokens, and tasks for the model that takes them."""
    inputs = {"input_ids": torch.randint(10, 40000, (batch, seq), generator=torch.Generator().manual_seed(0))}
    return inputs | ({"task_ids": torch.arange(batch) % 8} if model.peft_type == "MOELORA" else {})


def training_step(model: PeftModel, batch: int, seq: int) -> Callable[[], None]:
    """Forward and backward over a batch."""
    inputs = inputs_for(model, batch, seq)

    def step() -> None:
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        model.zero_grad()

    return step


def prefill(model: PeftModel, batch: int, seq: int) -> Callable[[], None]:
    """Reading a batch of prompts."""
    inputs = inputs_for(model, batch, seq)

    @torch.no_grad()
    def step() -> None:
        model.eval()(**inputs, logits_to_keep=1)

    return step


def decode(model: PeftModel, batch: int, seq: int) -> Callable[[], None]:
    """One more token per row, with the prompt in the cache."""
    inputs = inputs_for(model, batch, seq)
    with torch.no_grad():
        cache = model.eval()(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    token = inputs | {"input_ids": inputs["input_ids"][:, :1]}

    @torch.no_grad()
    def step() -> None:
        model.eval()(**token, past_key_values=cache, logits_to_keep=1)
        cache.crop(-1)

    return step


def compare(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, Any]:
    """Time the steps in turns, after one untimed round."""
    times: dict[str, list[float]] = {method: [] for method in steps}
    for turn in range(rounds + 1):
        order = list(steps) if turn % 2 else list(reversed(steps))
        for method in order:
            start = time.perf_counter()
            steps[method]()
            if turn:
                times[method].append(1e3 * (time.perf_counter() - start))
    ratios = [m / stock for m, stock in zip(times["moelora"], times["lora"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    medians = {f"{method}_ms": median(values) for method, values in times.items()}
    return medians | {"ratio": median(ratios), "ratio_quartiles": [low, high]}


if __name__ == "__main__":
    main()
