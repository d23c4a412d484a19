"""How the cost of one linear layer grows with its tokens and its experts.

    python scripts/bench/scaling.py --output runs/bench/scaling.json
    python scripts/bench/scaling.py --dtype fp32 --method molora --axis experts

Forward and backward with gradients for the input and the adapter, beside a stock LoRA of the same total rank and the
frozen layer alone, in turns in one process. Three axes: tokens from 64 to 4096 at 8 experts of rank 16; experts from 1
to 64 of rank 16 each; and experts from 1 to 64 that share a total rank of 128; the latter two at 1024 tokens. moelora
has a task for each row, molora chooses 2 experts, medmoelora weighs all (here of one rank). Peak memory is counted, as
in layer.py.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from counting import peak_memory
from layer import TARGETS, random_input, training_step
from methods import DTYPE_LABELS, DTYPES, Layers, adapt, config_of, dtypes_here, ranks_of, stock_lora
from timing import add_options, interleave, shown, start, summary, write

ROOT = Path(__file__).parents[2]
FACTORS = [1, 2, 4, 8, 16, 32, 64]
METHODS = ["moelora", "molora", "medmoelora"]
AXES = {  # tokens, experts and the rank of each, for each factor
    "tokens": [(64 * factor, 8, 16) for factor in FACTORS],
    "experts": [(1024, factor, 16) for factor in FACTORS],
    "experts_of_one_rank": [(1024, factor, 128 // factor) for factor in FACTORS],
}
MIB = 2**20


def main() -> None:
    """Measure along the axes, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ROOT / "runs" / "bench" / "scaling.json", rounds=9)
    parser.add_argument("--axis", choices=list(AXES), nargs="+", default=list(AXES))
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=dtypes_here(["fp32", "bf16"]))
    parser.add_argument("--shape", type=int, nargs=2, default=(576, 1536), metavar=("IN", "OUT"))
    parser.add_argument("--factors", type=int, nargs="+", choices=FACTORS, default=FACTORS)
    arguments = parser.parse_args()
    start(arguments)
    rows = []
    for axis in arguments.axis:
        for dtype in arguments.dtype:
            print(f"\n{axis}, {DTYPE_LABELS[dtype]}, {arguments.threads} threads\n")
            print("| | tokens | experts | rank of each | ms | / LoRA of total rank | / base alone | peak, MiB |")
            print("|---|---|---|---|---|---|---|---|")
            for method in arguments.method:
                for factor in arguments.factors:
                    sizes = AXES[axis][FACTORS.index(factor)]
                    row = measure(method, tuple(arguments.shape), dtype, *sizes, rounds=arguments.rounds)
                    rows.append({"axis": axis, "dtype": dtype, "method": method, "factor": factor, **row})
                    print(line(rows[-1]), flush=True)
                write(arguments, rows, ("axis", "dtype", "method", "factor"))  # should the rest be interrupted


def measure(
    method: str, shape: tuple[int, int], dtype: str, tokens: int, experts: int, r: int, *, rounds: int
) -> dict[str, Any]:
    """Times, ratios and peaks of a training step at these sizes."""
    torch.manual_seed(0)

    def base() -> Layers:
        return Layers(*shape).requires_grad_(False)

    sizes: dict[str, Any] = {"num_experts": experts}
    if method == "medmoelora":
        sizes |= {"expert_ranks": r}
    else:
        sizes |= {"r": r * experts if method == "moelora" else r}
    ours = adapt(base(), config_of(method, base, TARGETS, **sizes), dtype)
    models = {
        "base": base().to(DTYPES[dtype][0]),
        "total": adapt(base(), stock_lora(ranks_of(ours), TARGETS), dtype),
        "ours": ours,
    }
    x = random_input(4, tokens // 4, shape[0], dtype)
    steps = {name: training_step(model, x, method if name == "ours" else "lora") for name, model in models.items()}
    row = summary(interleave(steps, rounds))
    peaks = {name: peak_memory(step) for name, step in steps.items()}
    return {"tokens": tokens, "experts": experts, "r": r, **row, "peak_bytes": peaks}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    peaks = row["peak_bytes"]
    sizes = f"{row['tokens']} | {row['experts']} | {row['r']} | {row['ms']['ours']:.1f}"
    beyond = f"{(peaks['ours'] - peaks['base']) / MIB:.2f} of {(peaks['total'] - peaks['base']) / MIB:.2f}"
    return f"| {row['method']} | {sizes} | {shown(row, 'total')} | {shown(row, 'base')} | {beyond} |"


if __name__ == "__main__":
    main()
