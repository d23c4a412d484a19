"""A small tokenizer with a chat template, and two tasks that want different answers to the same inputs."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<bot>")
INPUTS = ("ash", "elm", "fir", "oak", "yew", "fig", "bay", "box")
ANSWERS = {"leaf": ("broad", "needle"), "size": ("small", "tall", "large")}
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; ids 0, 1 and 2 are pad, bos and eos as in tiny_models."""
    words = [*SPECIAL, *INPUTS, *(word for answers in ANSWERS.values() for word in answers), "Name", "the", *ANSWERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<bot>"],
        chat_template=TEMPLATE,
    )


def write_data(folder: Path) -> Path:
    """A folder of train, dev and test rows (16 each) with tasks.json, whose first task comes second in the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"task": task, "input": name, "output": ANSWERS[task][i % len(ANSWERS[task])]}
        for i, name in enumerate(INPUTS)
        for task in ("leaf", "size")
    ]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {task: {"instruction": f"Name the {task}", "metric": "accuracy"} for task in ("size", "leaf")}
    (folder / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    return folder
