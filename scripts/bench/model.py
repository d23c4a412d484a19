"""What a method costs on a whole model, SmolLM2-135M, beside stock LoRA of the same rank in each layer.

    python scripts/bench/model.py --output runs/bench/model.json
    python scripts/bench/model.py --method molora --dtype fp32 --steps train decode_1
    python scripts/bench/model.py --method recording medmoelora_unbalanced --rounds 13

Steps: train is forward and backward (no optimiser, which is the same for all) of 4 × 256 tokens; prefill reads the
same without gradients; decode_1 and decode_8 are a forward of one more token for each of 1 and 8 rows, with 128 in the
cache; generate_1 and generate_8 are `model.generate`, greedy, 16 tokens after 16, as time per token. All compared
adapters take turns in one process; a ratio is the median over rounds, shown with the middle half of the rounds. memory
is counted, not measured: the peak of what the allocator gives out during a training step, beyond that of the frozen
model.

For moelora, rows have different tasks, in moelora_one_task the same; molora and medmoelora are as their papers have
them; at_moe is 8 frozen experts of rank 16 in 3 groups and a general one, routed per token, and at_moe_prompt the same
per prompt; lora is a second stock LoRA, of rank 128, against the first: how far from 1 a ratio is for no reason. Two
run only by their names: recording is molora while its routing is recorded, against molora; medmoelora_unbalanced is
medmoelora without its balance loss.

--dtype: fp32; bf16, base and adapter; bf16_fp32, the adapter in float32, which is peft's default. Where the CPU has no
instructions for bfloat16, fp32 alone unless another is asked for.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from counting import peak_memory
from methods import DTYPE_LABELS, DTYPES, LABELS, adapt, config_of, dtypes_here, ranks_of, stock_lora, task_ids_of
from targets import target_of, verdict
from timing import add_options, interleave, shown, start, summary, write
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).parents[2]
METHODS = ["moelora", "moelora_one_task", "molora", "medmoelora", "at_moe", "at_moe_prompt", "lora"]
BY_NAME = ["recording", "medmoelora_unbalanced"]
STEPS = ["train", "memory", "prefill", "decode_1", "decode_8", "generate_1", "generate_8"]
TARGETS = "all-linear"
MIB = 2**20


def main() -> None:
    """Measure what was asked for, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ROOT / "runs" / "bench" / "model.json", rounds=7)
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--method", choices=[*METHODS, *BY_NAME], nargs="+", default=METHODS)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=dtypes_here(list(DTYPES)))
    parser.add_argument("--steps", choices=STEPS, nargs="+", default=STEPS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16, help="that generate makes")
    arguments = parser.parse_args()
    start(arguments)
    disable_progress_bar()
    rows = []
    for dtype in arguments.dtype:
        print(f"\n{Path(arguments.model).name}, {DTYPE_LABELS[dtype]}, {arguments.threads} threads\n")
        print("| | step | ms | / LoRA of total rank | / LoRA of active rank | target |\n|---|---|---|---|---|---|")
        for method in arguments.method:
            models = contestants(method, dtype, partial(AutoModelForCausalLM.from_pretrained, arguments.model))
            for step in arguments.steps:
                row = memory(models, method, arguments) if step == "memory" else timed(models, method, step, arguments)
                ratio, target = row["ratio"], target_of("model", method, dtype, step)
                row = {"dtype": dtype, "method": method, "step": step, **row, "target": target}
                rows.append(row | {"met": target and round(ratio, 2) <= target})
                print(line(row), flush=True)
            write(arguments, rows, ("dtype", "method", "step"))  # should the rest be interrupted
            del models


def contestants(method: str, dtype: str, base: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Stock LoRAs of the total and of the active rank if it is another, and the method; each on its own base."""
    torch.manual_seed(0)
    fields = {"task_type": "CAUSAL_LM"}
    ours = adapt(base(), config_of(method, base, TARGETS, **fields), dtype)
    if method == "recording":
        ours.record_routing()
        return {"total": adapt(base(), config_of("molora", base, TARGETS, **fields), dtype), "ours": ours}
    models = {}
    for name, active in (("total", False), ("active", True)):
        ranks = ranks_of(ours, active=active)
        if not active or ranks != ranks_of(ours):
            models[name] = adapt(base(), stock_lora(ranks, TARGETS, **fields), dtype)
    return models | {"ours": ours}


def timed(models: dict[str, nn.Module], method: str, step: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of a step and their ratios."""
    kind, _, rows = step.partition("_")
    make = {"train": training_step, "prefill": prefill, "decode": decode, "generate": generation}[kind]
    batch = int(rows or arguments.batch)
    seq = {"decode": 128, "generate": 16}.get(kind, arguments.seq)
    runs = {}
    for name, model in models.items():
        inputs = inputs_for(model, method if name == "ours" else "lora", batch, seq)
        runs[name] = make(model, inputs, arguments.tokens) if kind == "generate" else make(model, inputs)
    row = summary(interleave(runs, arguments.rounds))
    if kind == "generate":
        row["ms"] = {name: ms / arguments.tokens for name, ms in row["ms"].items()}
    return row | {"ratio": row["ratios"]["total"]["median"]}


def memory(models: dict[str, nn.Module], method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes: peaks of a training step, and of one of the frozen model with a gradient for its embeddings."""
    peaks = {}
    for name, model in models.items():
        inputs = inputs_for(model, method if name == "ours" else "lora", arguments.batch, arguments.seq)
        peaks[name] = peak_memory(training_step(model, inputs))
    frozen = models["total"]
    with frozen.disable_adapter():
        embedded = frozen.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        labels = {"inputs_embeds": embedded, "labels": inputs["input_ids"]}
        peaks["base"] = peak_memory(lambda: frozen(**labels).loss.backward()) + embedded.nbytes
    ratio = (peaks["ours"] - peaks["base"]) / (peaks["total"] - peaks["base"])
    return {"peak_bytes": peaks, "ratio": ratio}


def inputs_for(model: nn.Module, method: str, batch: int, seq: int) -> dict[str, torch.Tensor]:
    """Random tokens, and tasks for the method that takes them."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(10, model.config.vocab_size, (batch, seq), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **task_ids_of(method, batch)}


def training_step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward and backward over a batch of which a quarter are prompts."""
    model.train()
    labels = inputs["input_ids"].clone()
    labels[:, : labels.shape[1] // 4] = -100

    def step() -> None:
        model(**inputs, labels=labels).loss.backward()
        model.zero_grad()

    return step


def prefill(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Reading a batch of prompts."""
    model.eval()

    @torch.no_grad()
    def step() -> None:
        model(**inputs, logits_to_keep=1)

    return step


def decode(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One more token per row, with the prompt in the cache."""
    model.eval()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    token = inputs | {"input_ids": inputs["input_ids"][:, :1], "attention_mask": mask}

    @torch.no_grad()
    def step() -> None:
        model(**token, past_key_values=cache, logits_to_keep=1)
        cache.crop(-1)

    return step


def generation(model: nn.Module, inputs: dict[str, torch.Tensor], tokens: int) -> Callable[[], None]:
    """Greedy generation of so many tokens."""
    model.eval()
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}

    def step() -> None:
        model.generate(**inputs, **length, do_sample=False, pad_token_id=0)

    return step


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if row["step"] == "memory":
        peaks = row["peak_bytes"]
        active = (
            f"{(peaks['ours'] - peaks['base']) / (peaks['active'] - peaks['base']):.2f}" if "active" in peaks else "–"
        )
        of_both = ", ".join(f"{name} {peaks[name] / MIB:.0f} MiB" for name in ("base", "total", "ours"))
        cells = f"{of_both} | {row['ratio']:.2f} | {active}"
    else:
        cells = " | ".join([f"{row['ms']['ours']:.1f}", shown(row, "total"), shown(row, "active")])
    return f"| {LABELS[row['method']]} | {row['step']} | {cells} | {verdict(row['ratio'], row['target'])} |"


if __name__ == "__main__":
    main()
