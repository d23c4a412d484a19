"""What a method costs on one linear layer, beside stock LoRA of the same rank and the frozen layer alone.

    python scripts/bench/layer.py --output runs/bench/layer.json
    python scripts/bench/layer.py --method molora --shape 576x1536 --dtype fp32
    python scripts/bench/layer.py --steps memory

Steps: train is forward and backward with gradients for the input and the adapter, 4 × 256 tokens; prefill the forward
of it without gradients; decode_1 and decode_8 one token for each of 1 and 8 rows, through eight such layers, as time
per layer. All compared adapters take turns in one process; a ratio is the median over rounds, shown with the middle
half of the rounds. memory is counted, not measured: the peak of what the allocator gives out during a training step,
beyond that of the frozen layer alone, and the tensors kept for backward.

The method lora is a second stock LoRA, of rank 128, against the first: how far from 1 a ratio is for no reason.

--dtype: fp32; bf16, base and adapter; bf16_fp32, the adapter in float32, which is peft's default. Where the CPU has no
instructions for bfloat16, fp32 alone unless another is asked for.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from counting import peak_memory, saved_for_backward
from methods import (
    DTYPE_LABELS,
    DTYPES,
    LABELS,
    Layers,
    adapt,
    config_of,
    dtypes_here,
    ranks_of,
    stock_lora,
    task_ids_of,
)
from targets import LAYER, target_of, verdict
from timing import add_options, interleave, shown, start, summary, write
from torch import nn

ROOT = Path(__file__).parents[2]
SHAPES = {"576x1536": (576, 1536), "2048x5632": (2048, 5632)}
STEPS = ["train", "prefill", "decode_1", "decode_8", "memory"]
METHODS = [*LAYER, "lora"]
TARGETS = ["proj"]
DEPTH = 8  # layers that a single token goes through
MIB = 2**20
# by method, type, tokens and layers: the frozen layer and stock LoRAs, which stand beside several methods
COUNTED: dict[tuple[str, str, int, str], tuple[int, dict[str, int]]] = {}


def main() -> None:
    """Measure what was asked for, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ROOT / "runs" / "bench" / "layer.json", rounds=15)
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=dtypes_here(list(DTYPES)))
    parser.add_argument("--steps", choices=STEPS, nargs="+", default=STEPS)
    others = ["base", "total", "active"]
    parser.add_argument(
        "--against", choices=others, nargs="+", default=others, help="what to time beside; total always"
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout of all")
    arguments = parser.parse_args()
    start(arguments)
    rows = []
    for shape in arguments.shape:
        for dtype in arguments.dtype:
            title = f"{shape.replace('x', ' → ')}, {DTYPE_LABELS[dtype]}, {arguments.threads} threads"
            print(f"\n{title}{f', dropout {arguments.dropout}' if arguments.dropout else ''}\n")
            print("| | step | / LoRA of total rank | / LoRA of active rank | / base alone | target |")
            print("|---|---|---|---|---|---|")
            for method in arguments.method:
                for row in measure(method, shape, dtype, arguments):
                    rows.append({"shape": shape, "dtype": dtype, "method": method, **row})
                    print(line(rows[-1]), flush=True)
                write(arguments, rows, ("shape", "dtype", "method", "step"))  # should the rest be interrupted
    print_memory(rows)
    for row in rows:
        if row["step"] == "memory":
            print_saved(row)


def measure(method: str, shape: str, dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each step."""
    found = []
    make_models = partial(contestants, method, SHAPES[shape], dtype, dropout=arguments.dropout)
    few = make_models() if {"train", "prefill", "memory"} & set(arguments.steps) else {}
    for step in arguments.steps:
        if step == "memory":
            found.append({"step": step, **memory(few, method, dtype)})
            continue
        make = training_step if step == "train" else forward_step
        if step in ("train", "prefill"):
            models, x = few, random_input(4, 256, SHAPES[shape][0], dtype)
        else:
            models = make_models(depth=DEPTH)
            x = random_input(int(step.removeprefix("decode_")), 1, SHAPES[shape][0], dtype)
        timed = {name: model for name, model in models.items() if name in ("ours", "total", *arguments.against)}
        runs = {name: make(model, x, method if name == "ours" else "lora") for name, model in timed.items()}
        row = summary(interleave(runs, arguments.rounds))
        if step.startswith("decode"):
            row["ms"] = {name: ms / DEPTH for name, ms in row["ms"].items()}
        ratio, target = row["ratios"]["total"]["median"], target_of("layer", method, dtype, step)
        found.append({"step": step, **row, "target": target, "met": target and round(ratio, 2) <= target})
    return found


def contestants(
    method: str, shape: tuple[int, int], dtype: str, depth: int = 1, dropout: float = 0.0
) -> dict[str, nn.Module]:
    """The frozen layer, stock LoRAs of the total and of the active rank if it is another, and the method."""
    torch.manual_seed(0)

    def base() -> Layers:
        return Layers(*shape, depth=depth).requires_grad_(False)

    ours = adapt(base(), config_of(method, base, TARGETS, lora_dropout=dropout), dtype)
    models = {"base": base().to(DTYPES[dtype][0])}
    for name, active in (("total", False), ("active", True)):
        ranks = ranks_of(ours, active=active)
        if not active or ranks != ranks_of(ours):
            models[name] = adapt(base(), stock_lora(ranks, TARGETS, lora_dropout=dropout), dtype)
    return models | {"ours": ours}


def random_input(rows: int, tokens: int, features: int, dtype: str) -> torch.Tensor:
    """(rows, tokens, features), the same in every run."""
    x = torch.randn(rows, tokens, features, generator=torch.Generator().manual_seed(1))
    return x.to(DTYPES[dtype][0])


def training_step(model: nn.Module, x: torch.Tensor, method: str) -> Callable[[], None]:
    """Forward and backward, with gradients for the input and the adapter."""
    model.train()
    x = x.clone().requires_grad_()
    tasks = task_ids_of(method, len(x))
    gradient = torch.ones_like(model(x, **tasks))

    def step() -> None:
        model(x, **tasks).backward(gradient)
        x.grad = None
        model.zero_grad()

    return step


def forward_step(model: nn.Module, x: torch.Tensor, method: str) -> Callable[[], None]:
    """Forward without gradients."""
    model.eval()
    tasks = task_ids_of(method, len(x))

    @torch.no_grad()
    def step() -> None:
        model(x, **tasks)

    return step


def memory(models: dict[str, nn.Module], method: str, dtype: str, tokens: int = 256) -> dict[str, Any]:
    """Bytes: peaks of a training step, the frozen layer's among them, and what each keeps for backward beside x."""
    x = random_input(4, tokens, models["base"].layers[0].proj.in_features, dtype)
    peaks, saved = {}, {}
    for name, model in models.items():
        of = method if name == "ours" else "lora"
        key = of, dtype, tokens, repr(model)
        if key not in COUNTED or name == "ours":
            peak = peak_memory(training_step(model, x, of))
            forward = partial(model, x.requires_grad_(), **task_ids_of(of, len(x)))
            COUNTED[key] = peak, saved_for_backward(forward, [x, *model.parameters(), *model.buffers()])
            x = x.detach()
        peaks[name], saved[name] = COUNTED[key]
    ratio = (peaks["ours"] - peaks["base"]) / (peaks["total"] - peaks["base"])
    target = target_of("layer", method, dtype, "memory")
    return {
        "peak_bytes": peaks,
        "ratio": ratio,
        "saved_bytes": saved,
        "target": target,
        "met": target and round(ratio, 2) <= target,
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table of times, or of memory."""
    label = LABELS[row["method"]]
    if row["step"] == "memory":
        peaks = row["peak_bytes"]
        active = peaks.get("active", 0) - peaks["base"]
        ours = peaks["ours"] - peaks["base"]
        of_active = f"{ours / active:.2f}" if "active" in peaks else "–"
        return f"| {label} | memory | {row['ratio']:.2f} | {of_active} | – | {verdict(row['ratio'], row['target'])} |"
    cells = " | ".join(shown(row, name) for name in ("total", "active", "base"))
    return f"| {label} | {row['step']} | {cells} | {verdict(row['ratios']['total']['median'], row['target'])} |"


def print_memory(rows: list[dict[str, Any]]) -> None:
    """A table of bytes."""
    rows = [row for row in rows if row["step"] == "memory"]
    if not rows:
        return
    print("\nPeak of a training step beyond the frozen layer's, MiB; kept for backward beside x, MiB\n")
    print("| shape, type | | peak: ours | LoRA, total rank | LoRA, active rank | kept: ours | LoRA, total rank |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        peaks = row["peak_bytes"]
        names = ("ours", "total", "active")
        cells = [f"{(peaks[name] - peaks['base']) / MIB:.2f}" if name in peaks else "–" for name in names]
        cells += [f"{sum(row['saved_bytes'][name].values()) / MIB:.2f}" for name in ("ours", "total")]
        print(f"| {row['shape']}, {row['dtype']} | {LABELS[row['method']]} | {' | '.join(cells)} |")


def print_saved(row: dict[str, Any]) -> None:
    """What is kept, by shape."""
    print(f"\n{LABELS[row['method']]}, {row['shape']}, {DTYPE_LABELS[row['dtype']]}: kept for backward beside x, KiB\n")
    for name in ("total", "ours"):
        kept = row["saved_bytes"][name].items()
        print(f"* {'stock LoRA' if name == 'total' else name}:", end=" ")
        print(", ".join(f"{shape}: {size / 1024:.1f}" for shape, size in kept) or "nothing")


if __name__ == "__main__":
    main()
