"""What is measured of a run's adapter, loaded from its folder as a user would load it."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from plan import Run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_moe import MoLoraConfig
from peft_moe.config import MoeConfig
from peft_moe.data import read_examples, read_task_info, take_per_task, task_key
from peft_moe.evaluation import generate_answers, score
from peft_moe.layer import MoeLinear
from peft_moe.report import uniform_gates
from peft_moe.report.collect import Rows, look_at

Model = PreTrainedModel | PeftModel
General = Callable[[Model, PreTrainedTokenizerBase], dict[str, Any]]


def measure(run: Run, adapter: str | None, general: General) -> dict[str, Any]:
    """What the record of a run says of its adapter: see `one.py` for the keys.

    Args:
        run: what was trained.
        adapter: its folder, or the folder of those of `run.parts`; None for the base model.
        general: `general_scores`, called only where the run measures it.
    """
    rows = read_rows(run, run.split)
    found = of_parts(run, str(adapter), rows) if run.parts else of_one(run, adapter, rows, general)
    answers = found.pop("answers")
    found["scores"] = score(answers, rows, read_task_info(run.settings["dataset"]))
    if "uniform" in found:
        found["uniform"] = {
            "scores": score(found["uniform"], rows, read_task_info(run.settings["dataset"])),
            "answers": found["uniform"],
        }
    return found | ({"answers": answers} if run.purpose == "final" else {})


def of_one(run: Run, adapter: str | None, rows: Dataset, general: General) -> dict[str, Any]:
    """A base model with one adapter or none, on all rows."""
    model, tokenizer = load(run, adapter)
    answers, seconds = timed(lambda: answer(run, model, tokenizer, rows))
    found: dict[str, Any] = {"answers": answers, "answer_cpu": seconds, "answer_tokens": tokens_of(answers, tokenizer)}
    found["parameters"] = parameters(model)
    if "uniform" in run.measure:
        with uniform_gates(model):
            found["uniform"] = answer(run, model, tokenizer, rows)
    if "routing" in run.measure:
        found["routing"] = routing(model, tokenizer, run)
    if "general" in run.measure:
        with told_all_tasks(model):
            found["general"] = general(model, tokenizer)
    return found


def of_parts(run: Run, adapter: str, rows: Dataset) -> dict[str, Any]:
    """An adapter for each task, which answers the rows of its own."""
    answers, seconds, tokens, sizes = [""] * len(rows), 0.0, 0, []
    for task in run.parts:
        model, tokenizer = load(run, f"{adapter}/{task}")
        own = [i for i, name in enumerate(rows["task"]) if task_key(name) == task]
        texts, took = timed(partial(answer, run, model, tokenizer, rows.select(own)))
        for i, text in zip(own, texts, strict=True):
            answers[i] = text
        seconds += took
        tokens += tokens_of(texts, tokenizer)
        sizes.append(parameters(model))
    total = {key: sum(size[key] for size in sizes) for key in ("trainable", "total_rank")}
    found = {"answers": answers, "answer_cpu": seconds, "answer_tokens": tokens}
    return found | {"parameters": sizes[0] | total}


def timed(do: Callable[[], list[str]]) -> tuple[list[str], float]:
    """What it gives, and its CPU seconds: cores are shared with another run."""
    start = time.process_time()
    return do(), time.process_time() - start


def tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens answers have."""
    return sum(len(tokenizer(text)["input_ids"]) for text in texts)


def read_rows(run: Run, split: str, protocol: str | None = None) -> Dataset:
    """The rows of a split that the run answers, in its protocol or in another one."""
    rows = read_examples(run.settings["dataset"], split=split, protocol=protocol or run.protocol)
    if run.scored:
        rows = rows.select([i for i, task in enumerate(rows["task"]) if task_key(task) in run.scored])
    return rows if run.limit is None else take_per_task(rows, run.limit)


def load(run: Run, adapter: str | None) -> tuple[Model, PreTrainedTokenizerBase]:
    """The base model with an adapter, and the tokenizer that was saved with it."""
    source = run.settings["model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=run.settings["dtype"])
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)  # or its parameters could not be counted
    tokenizer = AutoTokenizer.from_pretrained(adapter or source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def answer(run: Run, model: Model, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> list[str]:
    """Greedy answers. MOELoRA is told all its tasks for a row of another one: the mean of their embeddings."""
    config = config_of(model)
    if config is not None and config.needs_tasks:
        known, told = set(config.task_names), list(map(as_list, rows["task"]))
        if not known.issuperset(task for row in told for task in row):
            told = [row if known.issuperset(row) else config.task_names for row in told]
            rows = rows.remove_columns("task").add_column("task", told)
    options = {"batch_size": run.settings["per_device_eval_batch_size"]}
    return generate_answers(
        model, tokenizer, rows, max_new_tokens=run.settings["max_new_tokens"], progress=False, **options
    )


def as_list(task: str | list[str]) -> list[str]:
    """The tasks of a row."""
    return [task] if isinstance(task, str) else task


def config_of(model: Model) -> MoeConfig | None:
    """The config of an adapter of ours."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return config if isinstance(config, MoeConfig) else None


@contextmanager
def told_all_tasks(model: Model) -> Iterator[None]:
    """For text that has no task: MOELoRA is told all its tasks at once, the mean of their embeddings."""
    config = config_of(model)
    with model.task(config.task_names) if config is not None and config.needs_tasks else nullcontext():
        yield


def routing(model: PeftModel, tokenizer: PreTrainedTokenizerBase, run: Run) -> dict[str, Any]:
    """By layer and task, the mean share of each expert over the inputs of the dev rows.

    The instruction and the answer do not count, whose words tell the tasks of a group apart; the inputs are the same.
    Nor does AT-MoE's general expert, whose weight is fixed.

    Layers can have different numbers of experts (`counts`); those that one lacks have share 0, so that all lists are as
    long as the longest, `experts`. Layers that share one gate are one entry.
    """
    rows = Rows.of(read_rows(run, "dev"), tokenizer, config_of(model), max_length=run.settings["max_length"])
    inputs = [messages[0]["content"] for messages in read_rows(run, "dev", "bare")["messages"]]
    found, _ = look_at(model, replace(rows, counted=of_inputs(rows, inputs)), samples=0, progress=False)
    counts = [sum(group >= 0 for group in layer["group_of"] or [0] * len(layer["experts"])) for layer in found.layers]
    most, names = max(counts), [layer["name"] for layer in found.layers]
    layers = [
        [padded(layer["tasks"][task]["load"][:count], most) for task in found.tasks]
        for layer, count in zip(found.layers, counts, strict=True)
    ]
    if all(layer == layers[0] for layer in layers):
        layers, names, counts = layers[:1], ["all layers"], counts[:1]
    return {"tasks": found.tasks, "experts": most, "names": names, "counts": counts, "layers": layers}


def of_inputs(rows: Rows, inputs: list[str]) -> list[list[bool]]:
    """Which tokens of each row are of its input.

    Raises:
        ValueError: a row does not end its prompt with its input, or has other tokens than its text.
    """
    found = []
    for messages, text, encoded in zip(rows.examples["messages"], inputs, rows.encoded, strict=True):
        prompt = rows.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        end = prompt.rindex(text) + len(text)
        parts = rows.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids, whole = parts["input_ids"], encoded["input_ids"]
        if whole[: len(ids)] != ids:
            raise ValueError(f"The tokens of {prompt!r} are not those of its row; a row may be longer than max_length.")
        mine = [low < end and high > end - len(text) for low, high in parts["offset_mapping"]]
        found.append(mine + [False] * (len(whole) - len(ids)))
    return found


def padded(values: list[float], length: int) -> list[float]:
    """To five digits, which keeps files small, with zeros behind."""
    return [round(value, 5) for value in values] + [0.0] * (length - len(values))


def parameters(model: Model) -> dict[str, Any]:
    """Numbers that training changes; and mean ranks of the adapted layers: all, and those at work for a token."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if isinstance(model, PeftModel) else 0
    ranks: list[tuple[int, int]] = []  # at work, all
    config = config_of(model)
    for key, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            ranks.append((layer.r["default"],) * 2)
        elif isinstance(layer, MoeLinear):
            ranks.append(ranks_of(config, key.removeprefix("base_model.model."), layer.bank("default").ranks))
    if not ranks:
        return {"trainable": trained, "active_rank": 0, "total_rank": 0}
    active, total = (round(sum(column) / len(ranks), 2) for column in zip(*ranks, strict=True))
    return {"trainable": trained, "active_rank": active, "total_rank": total}


def ranks_of(config: MoeConfig | None, key: str, ranks: tuple[int, ...]) -> tuple[int, int]:
    """The rank at work for a token in a layer, and that of all its experts: only MoLoRA chooses."""
    if isinstance(config, MoLoraConfig) and len(ranks) > 1:
        chosen = min(config.top_k, config.routed_at(key)) + config.num_shared_experts
        return sum(ranks[:chosen]), sum(ranks)
    return sum(ranks), sum(ranks)


def tidy(value: Any) -> Any:
    """The same with numbers that JSON can hold: a number that is none is text."""
    if isinstance(value, Mapping):
        return {str(key): tidy(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(entry) for entry in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return str(value) if isinstance(value, Path) else value
