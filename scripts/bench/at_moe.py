"""AT-MoE on instructions that need two experts at once, beside its own parts: trains routers and scores all.

    python scripts/get_model.py
    python scripts/make_composites.py
    python scripts/train_experts.py recipes/at_moe.yaml
    python scripts/bench/at_moe.py --output docs/at_moe.json

Routers that are there already are not trained again, nor is what has been scored scored again; two calls with --part
untrained and --part trained share the work between two cores (OMP_NUM_THREADS=1), and a last one shows it all. Every
system is scored on the composite test rows, and on the first 20 test rows of each single task of MedMulti mini. The
best single experts are chosen on the composite dev rows.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_moe import GroupedMoeConfig
from peft_moe.data import take_per_task, task_key
from peft_moe.evaluation import Results, evaluate_tasks, table
from peft_moe.reading import TaskInfo, read_examples, read_task_info

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/at_moe.yaml"
settings = yaml.safe_load((ROOT / RECIPE).read_text(encoding="utf-8"))
OUT = settings["output_dir"]
SINGLES = settings["stage1"]["dataset"]

# Stage 2 with the recipe, and with one setting changed; and a stock LoRA on the same rows.
LORA = {"method": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "learning_rate": 1.0e-3}
TRAINED: dict[str, tuple[str, dict[str, object]]] = {
    "grouped router, per token": (OUT, {}),
    "grouped router, per prompt": (f"{OUT}-prompt", {"router_input": "prompt"}),
    "flat router, per token": (f"{OUT}-flat", {"flat_routing": True}),
    "stock LoRA, trained on stage 2's rows": (f"{OUT}-lora", LORA),
}
STAGE_2 = ("groups", "general_expert", "router_input", "stage1")  # what a stock LoRA has not


def main(argv: list[str]) -> None:
    """Train what is missing, score, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the scores")
    parser.add_argument("--part", choices=["untrained", "trained"], help="do one part of the work")
    args = parser.parse_args(argv)
    os.chdir(ROOT)  # the recipe's paths start here
    composite, single = read_rows(settings["dataset"], "test"), take_per_task(read_rows(SINGLES, "test"), 20)
    scores = {}
    if args.part != "trained":
        scores |= score_untrained(composite, single)
    if args.part != "untrained":
        for name, (out, changes) in TRAINED.items():
            train(out, changes)
            scores[name] = once(name, partial(score_trained, out, composite, single))
    if args.part:
        return
    if args.output:
        content = {"recipe": settings, "trained": TRAINED, "scores": scores}
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for rows in ("composite", "single"):
        print(f"\n{rows} rows\n" + table({name: results[rows] for name, results in scores.items() if rows in results}))


def train(out: str, changes: dict[str, object]) -> None:
    """One run of train.py with the recipe and changes, unless its adapter is there."""
    if Path(out, "adapter_model.safetensors").exists():
        return
    dropped = STAGE_2 if changes.get("method") == "lora" else ()
    run = {name: value for name, value in settings.items() if name not in (*dropped, "test_split")}
    path = Path(f"{out}.yaml")
    path.write_text(yaml.safe_dump({**run, **changes, "output_dir": out}, sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, "scripts/train.py", str(path)], check=True)


def once(name: str, make: Callable[[], dict[str, Results]]) -> dict[str, Results]:
    """What has been scored under a name, or is now."""
    path = Path(f"{OUT}-scores", re.sub(r"\W+", "-", name) + ".json")
    if not path.exists():
        results = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results), encoding="utf-8")
    results = json.loads(path.read_text(encoding="utf-8"))
    means = ", ".join(f"{rows} {result['mean']['score']:.3f}" for rows, result in results.items())
    print(f"{time.strftime('%H:%M:%S')} {name}: {means}", flush=True)
    return results


def score_trained(out: str, composite: Dataset, single: Dataset) -> dict[str, Results]:
    """A saved adapter."""
    model = PeftModel.from_pretrained(base_model(), out)
    return {"composite": score(model, composite), "single": score(model, single)}


def score_untrained(composite: Dataset, single: Dataset) -> dict[str, dict[str, Results]]:
    """The base model and what needs no router: the general expert, single experts, and all of them evenly."""
    fields = {name: settings[name] for name in ("groups", "general_expert")}
    model = get_peft_model(base_model(), GroupedMoeConfig(task_type="CAUSAL_LM", **fields))
    scores = {}

    def add(name: str) -> None:
        scores[name] = once(name, lambda: {"composite": score(model, composite), "single": score(model, single)})

    with model.disable_adapter():
        add("base model")
    with model.routing(mix=0):
        add("general LoRA alone")
    add("uniform mixture")
    dev = read_rows(settings["dataset"], "dev")
    dev = dev.select([i for i, task in enumerate(dev["task"]) if len(task) > 1])
    alone = {}
    for group, experts in settings["groups"].items():
        for expert in experts:
            with model.routing({group: {expert: 1.0}}, group_weights={group: 1.0}, mix=1):
                results = once(f"dev: {expert} alone", lambda: {"composite": score(model, dev)})
            alone[group, expert] = results["composite"]
    best = max(alone, key=lambda key: alone[key]["mean"]["score"])
    with model.routing({best[0]: {best[1]: 1.0}}, group_weights={best[0]: 1.0}, mix=1):
        add(f"best single expert ({best[1]})")
    name = "best expert of each pair"
    scores[name] = once(name, lambda: {"composite": best_of_pairs(model, composite, alone)})
    return scores


def best_of_pairs(model: PeftModel, rows: Dataset, alone: dict[tuple[str, str], Results]) -> Results:
    """Each pair of tasks answered by the expert that did best on it in dev."""
    found: Results = {}
    for pair in dict.fromkeys(map(task_key, rows["task"])):
        group, expert = max(alone, key=lambda key: alone[key][pair]["score"])
        with model.routing({group: {expert: 1.0}}, group_weights={group: 1.0}, mix=1):
            of_pair = score(model, rows.select([i for i, task in enumerate(rows["task"]) if task_key(task) == pair]))
        found[pair] = of_pair[pair] | {"expert": expert}
    mean = {key: sum(result[key] for result in found.values()) / len(found) for key in ("score", "exact_match")}
    return found | {"mean": {"metric": "mean", **mean, "n": len(rows)}}


def base_model() -> AutoModelForCausalLM:
    """A fresh base model."""
    return AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"], dtype=settings["dtype"])


def read_rows(folder: str, split: str) -> Dataset:
    """One split."""
    return read_examples(folder, split=split)


def score(model: PeftModel, rows: Dataset) -> Results:
    """Scores per task; composite rows and single ones come from different folders."""
    info: dict[str, TaskInfo] = read_task_info(SINGLES) | read_task_info(settings["dataset"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    sizes = {"batch_size": settings["per_device_eval_batch_size"], "max_new_tokens": settings["max_new_tokens"]}
    return evaluate_tasks(model, tokenizer, rows, info, progress=False, **sizes)


if __name__ == "__main__":
    main(sys.argv[1:])
