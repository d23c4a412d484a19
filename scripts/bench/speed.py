"""Time of a method as a ratio to stock LoRA of the same rank in each layer, in one process, interleaved.

    python scripts/bench/speed.py --output runs/speed.json
    python scripts/bench/speed.py --method molora --rounds 9
    python scripts/bench/speed.py --method medmoelora --rounds 9
    python scripts/bench/speed.py --method at_moe --rounds 9
    python scripts/bench/speed.py --method recording --rounds 13

Forward and backward of a training step, a prefill, and one decoded token, on SmolLM2-135M; medians over rounds, with
the spread of the ratios between rounds. For moelora, rows of the batch have different tasks; molora and medmoelora are
as their papers have them; at_moe is 8 frozen experts of rank 16 in 3 groups and a general one, routed per token, and
at_moe_prompt the same per prompt; recording is molora while its routing is recorded, against molora.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_moe import GroupedMoeConfig, MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig, read_expert
from peft_moe.layer import MoeLinear

ROOT = Path(__file__).parents[2]
METHODS = ["moelora", "molora", "medmoelora", "at_moe", "at_moe_prompt", "recording"]


def main() -> None:
    """Time both adapters in turns and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "speed.json")
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--method", choices=METHODS, default="moelora")
    parser.add_argument("--r", type=int, default=64, help="total rank of moelora")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    results = {}
    reference = "molora" if arguments.method == "recording" else "lora"
    print(f"| | {reference}, ms | {arguments.method}, ms | ratio | middle half of the ratios |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        models = build(arguments.model, arguments.method, arguments.r, dtype)
        for name, make in (("train", training_step), ("prefill", prefill), ("decode", decode)):
            steps = [make(model, arguments.batch, arguments.seq) for model in models]
            label = f"{name}, {dtype}".replace("torch.", "")
            r = results[label] = compare(steps, arguments.rounds)
            low, high = r["ratio_quartiles"]
            times = f"{r['reference_ms']:.0f} | {r['ms']:.0f} | {r['ratio']:.3f} | {low:.3f} to {high:.3f}"
            print(f"| {label} | {times} |", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"settings": vars(arguments), "results": results}, default=str, indent=1))


def build(base: str, method: str, r: int, dtype: torch.dtype) -> list[PeftModel]:
    """The reference and the method, each on its own copy of the base."""

    def adapt(config: PeftConfig) -> PeftModel:
        return get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), config)

    shared = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "lora_dropout": 0.0}
    configs = {
        "moelora": MoeLoraConfig(**shared, r=r, lora_alpha=2 * r, num_experts=8, tasks=8),
        "molora": MoLoraConfig(**shared),
        "medmoelora": MedMoeLoraConfig(**shared),
        "recording": MoLoraConfig(**shared),
    }
    model = adapt(configs[method] if method in configs else trained_experts(base, shared, method))
    if method == "recording":
        model.record_routing()
        return [adapt(MoLoraConfig(**shared)), model]
    layers = [(key, layer) for key, layer in model.base_model.model.named_modules() if isinstance(layer, MoeLinear)]
    ranks = {re.escape(key): sum(layer.moelora_bank["default"].ranks) for key, layer in layers}
    return [adapt(LoraConfig(**shared, rank_pattern=ranks, alpha_pattern={k: 2 * r for k, r in ranks.items()})), model]


def trained_experts(base: str, shared: dict[str, Any], method: str) -> GroupedMoeConfig:
    """Nine times the same LoRA, since their numbers do not matter here."""
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**shared, r=16, lora_alpha=32, init_lora_weights=False)
    )
    with tempfile.TemporaryDirectory() as folder:
        lora.save_pretrained(folder)
        expert = read_expert(folder)
    groups = {"a": 3, "b": 3, "c": 2}
    return GroupedMoeConfig(
        task_type="CAUSAL_LM",
        groups={group: {f"{group}{i}": expert for i in range(n)} for group, n in groups.items()},
        general_expert=expert,
        router_input="prompt" if method == "at_moe_prompt" else "token",
    )


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


def compare(steps: list[Callable[[], None]], rounds: int) -> dict[str, Any]:
    """Time the reference and the method in turns, after one untimed round."""
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            steps[which]()
            if turn:
                times[which].append(1e3 * (time.perf_counter() - start))
    ratios = [ours / reference for reference, ours in zip(*times, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        "reference_ms": median(times[0]),
        "ms": median(times[1]),
        "ratio": median(ratios),
        "ratio_quartiles": [low, high],
    }


if __name__ == "__main__":
    main()
