"""Where computing only each token's experts pays: time of it over the dense product, and of both over stock LoRA.

    python scripts/bench/dispatch.py --output runs/dispatch.json
    python scripts/bench/dispatch.py --threads 1 --dtype bfloat16 --shape 576x1536 --experts 8:1:64,8:2:64
    python scripts/bench/dispatch.py --memory

Forward and backward of a frozen linear layer with the experts, in one process, interleaved; medians over rounds. Every
step has another routing, as in training: shapes that differ from step to step are part of the price. `dense` is what
layers do otherwise, `kernels.project` and `kernels.add`, both with a router's gate; `LoRA` is peft's layer of rank E·r.
`pays` is what the rule says. `--memory` prints the peak of the allocations of one step beyond what the base layer alone
has, in MiB.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from counting import peak_memory
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from timing import keep_memory
from torch import nn

from peft_moe import kernels
from peft_moe.dispatch import add_experts, pays

ROOT = Path(__file__).parents[2]
GRID = "8:1:16,8:1:64,8:2:16,8:2:32,8:2:64,8:2:128,16:2:16,32:2:16,32:2:32"


def main() -> None:
    """Measure the grid, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "dispatch.json")
    parser.add_argument("--experts", default=GRID, help="E:K:r, separated by commas")
    parser.add_argument("--tokens", default="1024", help="numbers of tokens, separated by commas")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--shape", default="576x1536,2048x5632", help="inputs x outputs, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--warmup", type=int, default=25, help="steps before the rounds, each with its own routing")
    parser.add_argument("--skew", type=float, default=0.0, help="how much likelier (in logits) the last expert is")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print("| layer | E:K:r, tokens | dispatched, MiB | dense | LoRA |\n|---|---|---|---|---|")
    else:
        print("| layer | E:K:r, tokens | dispatched / dense | middle half | pays | dispatched / LoRA | dense / LoRA |")
        print("|---|---|---|---|---|---|---|")
    rows = []
    lists = (getattr(arguments, name).split(",") for name in ("dtype", "shape", "tokens", "experts"))
    for dtype, shape, tokens, experts in product(*lists):
        row = measure(dtype, shape, int(tokens), experts, arguments)
        rows.append(row)
        print(f"| {shape}, {dtype} | {experts}, {tokens} | {cells(row)} |", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"settings": vars(arguments), "results": rows}, default=str, indent=1))


def measure(dtype: str, shape: str, tokens: int, experts: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times, or with `--memory` peaks, of one layer."""
    n, m = map(int, shape.split("x"))
    e, k, r = map(int, experts.split(":"))
    of_experts: dict[str, Any] = {"num_experts": e, "k": k, "r": r, "tokens": tokens, "dtype": getattr(torch, dtype)}
    steps = make_steps(n=n, m=m, **of_experts, skew=arguments.skew)
    row: dict[str, Any] = {"shape": shape, "dtype": dtype, "experts": experts, "tokens": tokens}
    if arguments.memory:
        peaks = {name: peak_memory(step) for name, step in steps.items()}
        return row | {name: (peaks[name] - peaks["base"]) / 2**20 for name in ("dispatched", "dense", "LoRA")}
    row |= compare(steps, arguments.rounds, arguments.warmup)
    return row | {"pays": pays(**of_experts, device=torch.device("cpu"))}


def cells(row: dict[str, Any]) -> str:
    """What a line of the table says of a layer."""
    if "pays" not in row:
        return " | ".join(f"{row[name]:.1f}" for name in ("dispatched", "dense", "LoRA"))
    low, high = row["quartiles"]
    return (
        f"{row['ratio']:.2f} | {low:.2f} to {high:.2f} | {'yes' if row['pays'] else 'no'} "
        f"| {row['dispatched_to_LoRA']:.2f} | {row['dense_to_LoRA']:.2f}"
    )


def make_steps(
    *, n: int, m: int, num_experts: int, k: int, r: int, tokens: int, dtype: torch.dtype, skew: float
) -> dict[str, Callable[[], None]]:
    """A training step of the base layer, of stock LoRA, and of both ways of adding experts."""
    torch.manual_seed(0)
    base = nn.Linear(n, m, bias=False).to(dtype).requires_grad_(False)
    config = LoraConfig(r=num_experts * r, lora_alpha=num_experts * r)
    lora = LoraLinear(base, "default", config, r=config.r, lora_alpha=config.lora_alpha).to(dtype)
    a, b = (lora.lora_A["default"].weight, lora.lora_B["default"].weight)
    nn.init.normal_(b, std=0.02)
    x, g = torch.randn(tokens, n, dtype=dtype, requires_grad=True), torch.randn(tokens, m, dtype=dtype)

    spread, gate = torch.eye(num_experts).repeat_interleave(r, dim=1), nn.Parameter(torch.randn(num_experts, n))

    def route(gated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.randn(tokens, num_experts) + torch.linspace(0, skew, num_experts)
        scores, experts = (0 * gated + drawn).topk(k)  # another choice in each step, and a gradient for the gate
        return scores.softmax(-1), experts

    def step(forward: Callable[[], torch.Tensor]) -> None:
        forward().backward(g)
        x.grad = a.grad = b.grad = gate.grad = None

    def dispatched() -> torch.Tensor:
        weights, experts = route(kernels.project(x, gate)[1])
        return add_experts(base(x), x, a, b, weights=weights, experts=experts, r=r, writable=True)

    def dense() -> torch.Tensor:
        out, z, scores = kernels.project(x, a, base=(base.weight, None), gate=gate)
        weights, experts = route(scores)
        weights = torch.zeros_like(scores).scatter(1, experts, weights)
        return kernels.add(out, z, b, weights=weights, spread=spread)

    return {
        "base": lambda: step(lambda: base(x)),
        "LoRA": lambda: step(lambda: lora(x)),
        "dense": lambda: step(dense),
        "dispatched": lambda: step(dispatched),
    }


def compare(steps: dict[str, Callable[[], None]], rounds: int, warmup: int) -> dict[str, Any]:
    """Medians of the times, and of the ratios within a round; each round runs the steps in another order."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        steps["dispatched"]()
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name]()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))

    def ratios(one: str, other: str) -> list[float]:
        return [p / q for p, q in zip(times[one], times[other], strict=True)]

    low, middle, high = quantiles(ratios("dispatched", "dense"), n=4)
    return {
        "ratio": middle,
        "quartiles": [low, high],
        "dispatched_to_LoRA": median(ratios("dispatched", "LoRA")),
        "dense_to_LoRA": median(ratios("dense", "LoRA")),
        "base_to_LoRA": median(ratios("base", "LoRA")),
        "ms": {name: median(values) for name, values in times.items()},
    }


if __name__ == "__main__":
    main()
