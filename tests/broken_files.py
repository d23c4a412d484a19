"""Adapters on disk and ways in which their files can be broken."""

import json
import shutil
from pathlib import Path

import torch
from grouped_helpers import grouped_config
from helpers import TARGETS, config_for
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from peft_moe import MedMoeLoraConfig, MoLoraConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
METHODS = ("moelora", "molora", "medmoelora", "at_moe")
SHARED = {"task_type": "CAUSAL_LM", "lora_dropout": 0.0, "init_lora_weights": False, "target_modules": TARGETS["llama"]}


def make_config(method: str, folder: Path, **changes):
    """A method's config for the tiny Llama, whose new adapter changes the output; `folder` is for AT-MoE's experts."""
    if method == "moelora":
        return config_for("llama", **{"default_task": "icd", **changes})
    if method == "molora":
        return MoLoraConfig(**{**SHARED, "r": 2, "num_experts": 4, **changes})
    if method == "medmoelora":
        return MedMoeLoraConfig(**{**SHARED, "num_experts": 4, "expert_ranks": [2, 4], **changes})
    return grouped_config("llama", folder, **changes)


def make_adapter(method: str, folder: Path, *, seed: int = 0, **changes):
    torch.manual_seed(seed)
    return get_peft_model(make_model("llama"), make_config(method, folder, **changes)).eval()


def save_all(folder: Path) -> Path:
    """One adapter per method, others that do not fit them, and a stock LoRA, each in a folder."""
    for method in METHODS:
        make_adapter(method, folder).save_pretrained(str(folder / method))
    for method, changes in {
        "moelora": {"r": 16},
        "molora": {"r": 4},
        "medmoelora": {"expert_ranks": 8},
        "at_moe": {"router_input": "token", "flat_routing": True},
    }.items():
        make_adapter(method, folder, **changes).save_pretrained(str(folder / f"{method}-other-size"))
    for method, changes in {
        "moelora": {"num_experts": 2},
        "molora": {"num_experts": 3},
        "medmoelora": {"num_experts": 6},
        "at_moe": {"general_expert": None},
    }.items():
        make_adapter(method, folder, **changes).save_pretrained(str(folder / f"{method}-other-number"))
    make_adapter("moelora", folder, tasks=["icd", "rad"]).save_pretrained(str(folder / "moelora-other-tasks"))
    lora = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS["llama"]))
    lora.save_pretrained(str(folder / "lora"))
    return folder


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def one_tensor(tensors: dict, part: str = "lora_B") -> str:
    return sorted(key for key in tensors if part in key)[-1]


def take_weights(folder: Path, other: str) -> None:
    shutil.copy(folder.parent / other / WEIGHTS, folder / WEIGHTS)


def cut(folder: Path, part: float) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(len(content) * part)])


def set_field(folder: Path, **fields) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def lose_routers(tensors: dict) -> None:
    for key in [key for key in tensors if "router" in key]:
        del tensors[key]


def poison(tensors: dict, value: float) -> None:
    tensors[one_tensor(tensors)].view(-1)[-1] = value


def to_pickle(folder: Path, part: float = 1) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    content = (folder / "adapter_model.bin").read_bytes()
    (folder / "adapter_model.bin").write_bytes(content[: int(len(content) * part)])


def _all_in(tensors: dict, dtype: torch.dtype) -> None:
    name = one_tensor(tensors)
    tensors[name] = tensors[name].to(dtype)


def _of_other_base(tensors: dict) -> None:
    for key in list(tensors):
        if key.endswith("lora_A.weight"):
            tensors[key] = tensors[key][:, :-2].contiguous()


UNREADABLE = "cannot be read .*fetch it or save it anew"
OTHER = "saved with another config, or for another base model"
# What is done to the folder of a good adapter, and what the error says.
IN_THE_FILE = {
    "cut in half": (lambda f: cut(f, 0.5), UNREADABLE),
    "cut by its end": (lambda f: cut(f, 0.99), UNREADABLE),
    "empty": (lambda f: cut(f, 0), UNREADABLE),
    "text": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n" * 9), UNREADABLE),
    "without tensors": (lambda f: edit(f, dict.clear), "has no tensors"),
    "a pickle, cut": (lambda f: to_pickle(f, 0.5), UNREADABLE),
}
IN_THE_TENSORS = {
    "of a stock LoRA": (lambda f: take_weights(f, "lora"), f"lacks .*{OTHER}"),
    "of another method": (lambda f: take_weights(f, METHODS[METHODS.index(f.name) - 1]), OTHER),
    "of another rank or router": (lambda f: take_weights(f, f"{f.name}-other-size"), OTHER),
    "of another number of experts": (lambda f: take_weights(f, f"{f.name}-other-number"), OTHER),
    "of another base model": (lambda f: edit(f, _of_other_base), f"of shape .* and the file's is .*{OTHER}"),
    "without routers": (lambda f: edit(f, lose_routers), "the file lacks .*router.*not whole"),
    "without one matrix": (lambda f: edit(f, lambda t: t.pop(one_tensor(t))), "lacks 1 of them, such as '.*lora_B"),
    "with one more": (
        lambda f: edit(f, lambda t: t.update({one_tensor(t).replace("_B", "_C"): torch.ones(2)})),
        "no place for '.*lora_C.weight' of the file",
    ),
    "NaN": (lambda f: edit(f, lambda t: poison(t, torch.nan)), r"has 1 of \d+ numbers that are NaN or infinite"),
    "infinite": (lambda f: edit(f, lambda t: poison(t, torch.inf)), "numbers that are NaN or infinite"),
    "of whole numbers": (lambda f: edit(f, lambda t: _all_in(t, torch.int64)), "is torch.int64, and weights are"),
}
IN_THE_CONFIG = {
    "newer": (lambda f: set_field(f, moe_format=2), "moe_format=2: .* newer peft_moe.*install the newer one"),
    "no format": (lambda f: set_field(f, moe_format="x"), "moe_format='x'"),
}
BREAKS = IN_THE_FILE | IN_THE_TENSORS | IN_THE_CONFIG
