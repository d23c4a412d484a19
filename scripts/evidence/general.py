"""Measures what a model still knows in general: perplexity on general text, and zero-shot multiple choice.

    python scripts/evidence/general.py --model models/SmolLM2-135M-Instruct --output general.json
    python scripts/evidence/general.py --adapter outputs/moelora --task icd_chapter

lm-eval does the scoring, so that none of the measure is our own: data/general has its task files beside their data, and
they can be given to lm-eval's command as they are. Everything is read from that folder, nothing from a hub.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERAL = Path(__file__).resolve().parents[2] / "data" / "general"

Scores = dict[str, dict[str, dict[str, Any]]]
Samples = list[dict[str, Any]]


def general_scores(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path = GENERAL,
    *,
    task: str | int | list[str] | None = None,
    batch_size: int = 8,
) -> Scores:
    """Perplexity of each text source, and accuracy of each set of multiple choice.

    Log-likelihoods are summed from float32 log-probabilities whatever the model's dtype, but the logits come in that
    dtype: compare models of one dtype only.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: the model's.
        folder: has lm-eval's task files (.yaml) and, with the same names, their rows (.jsonl).
        task: the task of all rows, for an adapter that routes by tasks (MOELoRA): a name or id, or several, for the
            mean of their embeddings. None: the one that `set_task` or the config's `default_task` has chosen. General
            text has no task: which to choose, or a mean of the scores over all, is the caller's decision.
        batch_size: rows per call.

    Returns:
        `{"perplexity": {source: {"per_token", "per_byte", "tokens", "bytes"}},
        "choice": {set: {"acc", "acc_norm", "n", "chance", "correct", "correct_norm"}}}`. Perplexities are exp of the
        mean negative log-likelihood over all tokens or UTF-8 bytes of the source. `acc` is of the option that is most
        likely, `acc_norm` of the one that is most likely per character; `correct` and `correct_norm` have 0 or 1 for
        each row; `chance` is the expected accuracy of a guess. The model is left in the mode it came in, and the
        generators of random numbers as they were.

    Raises:
        ValueError: no task files in `folder`; a `task` for a model that has none; an adapter that routes by prompts,
            to which all of the text would be the prompt: it would see what it is to predict.

    Example:
        >>> general_scores(model, tokenizer)["choice"]["words"]["acc"]
    """
    tasks = read_tasks(folder)
    check_routing(model, task)
    from lm_eval.models.huggingface import HFLM

    chosen = nullcontext() if task is None else model.task(task)
    with left_as_it_was(model), chosen:
        scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        samples = run(scorer, tasks)
    scores: Scores = {"perplexity": {}, "choice": {}}
    for name, config in tasks.items():
        if config["output_type"] == "multiple_choice":
            scores["choice"][name] = accuracy(samples[name])
        else:
            scores["perplexity"][name] = perplexity(samples[name], scorer)
    return scores


def read_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """lm-eval's configs by the names of their files, which read their rows wherever Python was started."""
    tasks = {}
    for path in sorted(folder.glob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = str(path.with_suffix(".jsonl").resolve())
        tasks[path.stem] = config | {"dataset_kwargs": {"data_files": {"test": rows}}}
    if not tasks:
        raise ValueError(f"folder={str(folder)!r} has no .yaml files; give one with task files of lm-eval.")
    return tasks


def check_routing(model: Any, task: Any) -> None:
    """Refuse what cannot be scored, before anything is run."""
    tuner = getattr(model, "base_model", model)  # a stock model has no such things
    if getattr(tuner, "reads_prompts", False):
        raise ValueError(
            "router_input='prompt' routes by the prompt, and all of a text that is scored would count as one, so the "
            "router would see what it is to predict; score an adapter with router_input='token'."
        )
    if task is not None and not hasattr(model, "task"):
        raise ValueError(f"task={task!r} for a model that is not told tasks; leave it out.")


@contextmanager
def left_as_it_was(model: "PreTrainedModel | PeftModel") -> Iterator[None]:
    """Put every module back into the mode it was in, and Python's random numbers, of which lm-eval takes some."""
    modes = {module: module.training for module in model.modules()}
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
        for module, training in modes.items():
            module.training = training


def run(scorer: "HFLM", tasks: Mapping[str, dict[str, Any]]) -> dict[str, Samples]:
    """What lm-eval found for each row, by task, in the order of the files."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    done = lm_eval.simple_evaluate(
        model=scorer,
        tasks=list(tasks.values()),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        random_seed=None,  # nothing is drawn, and the caller's generators are left alone
        numpy_random_seed=None,
        torch_random_seed=None,
        fewshot_random_seed=None,
    )
    return {
        name: sorted(done["samples"][config["task"]], key=lambda row: row["doc_id"]) for name, config in tasks.items()
    }


def accuracy(samples: Samples) -> dict[str, Any]:
    """Of one set of multiple choice."""
    correct = [int(row["acc"]) for row in samples]
    correct_norm = [int(row["acc_norm"]) for row in samples]
    n = len(samples)
    return {
        "acc": sum(correct) / n,
        "acc_norm": sum(correct_norm) / n,
        "n": n,
        "chance": sum(1 / len(row["doc"]["choices"]) for row in samples) / n,
        "correct": correct,
        "correct_norm": correct_norm,
    }


def perplexity(samples: Samples, scorer: "HFLM") -> dict[str, Any]:
    """Of one source of text."""
    texts = [row["target"] for row in samples]
    total = sum(row["filtered_resps"][0] for row in samples)
    tokens = sum(len(scorer.tok_encode(text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    return {
        "per_token": math.exp(-total / tokens),
        "per_byte": math.exp(-total / size),
        "tokens": tokens,
        "bytes": size,
    }


def table(scores: Scores) -> str:
    """The scores as lines of text."""
    lines = [f"{'perplexity':24}{'per token':>10}{'per byte':>10}{'tokens':>8}"]
    for name, row in scores["perplexity"].items():
        lines.append(f"{name:24}{row['per_token']:10.3f}{row['per_byte']:10.4f}{row['tokens']:8}")
    lines.append(f"{'multiple choice':24}{'acc':>10}{'acc_norm':>10}{'chance':>8}{'n':>6}")
    for name, row in scores["choice"].items():
        lines.append(f"{name:24}{row['acc']:10.3f}{row['acc_norm']:10.3f}{row['chance']:8.3f}{row['n']:6}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Load, score, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model: a folder or Hub id; default: the one the adapter names")
    parser.add_argument("--adapter", help="adapter: a folder or Hub id; default: none")
    parser.add_argument("--data", type=Path, default=GENERAL, help="folder with lm-eval's task files and their rows")
    parser.add_argument("--task", nargs="+", help="task or tasks, for MOELoRA")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the base weights")
    parser.add_argument("--output", type=Path, help="JSON file for the scores")
    args = parser.parse_args(argv)
    if args.model is None and args.adapter is None:
        parser.error("give --model, --adapter or both")
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peft_moe  # noqa: F401  # makes its adapters known to peft

    base = args.model or PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, dtype=args.dtype)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    scores = general_scores(model, AutoTokenizer.from_pretrained(base), args.data, task=args.task)
    print(table(scores))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
