"""What users get wrong, in one table: configs, models, batches, calls, data and commands.

Each is refused with the value, the rule and the remedy, and leaves models and folders as they were. What only one field
or function has to refuse also stands in the tests of that one.
"""

import json
import math
import runpy
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from grouped_helpers import grouped, make_experts
from helpers import TARGETS, config_for, logits, routed
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import make_inputs, make_model
from tiny_text import make_tokenizer
from torch import nn
from train import AdapterArguments
from transformers import default_data_collator

from peft_moe import (
    GroupedMoeConfig,
    MedMoeLoraConfig,
    MoeLoraConfig,
    MoLoraConfig,
    compose,
    fold,
    from_loras,
    read_expert,
)
from peft_moe.cli import main
from peft_moe.data import check_tasks, encode, mix, read_examples, read_task_info, take_per_task
from peft_moe.evaluation import evaluate_tasks, generate_answers, score, table
from peft_moe.metrics import load_metric
from peft_moe.training import TaskCollator

INPUTS = make_inputs("llama")
IDS = [0, 1, 2]
SOURCES = {"groups": {"g": {"x": "some/folder"}, "h": {"y": "some/folder"}}, "general_expert": "some/folder"}
LEAF = [{"role": "user", "content": "ash"}, {"role": "assistant", "content": "broad"}]
ROWS = Dataset.from_dict({"task": ["a", "b"], "messages": [LEAF, LEAF]})
ASK = {"task": "a", "prompt": "p", "completion": "c"}
FIELDS_OF_ALL = {"task_type": "CAUSAL_LM", "target_modules": TARGETS["llama"], "init_lora_weights": False}
CONFIGS = {
    "MOELoRA": partial(MoeLoraConfig),
    "MoLoRA": partial(MoLoraConfig),
    "Med-MoE-LoRA": partial(MedMoeLoraConfig),
    "AT-MoE": partial(GroupedMoeConfig, **SOURCES),
}


class Bench:
    """What the rows of the table are tried on: adapted models, made when first asked for, and fresh ones."""

    def __init__(self, shared: Path) -> None:
        self.shared = self.folder = shared
        self.models: dict[str, PeftModel] = {}
        self.states: dict[str, dict[str, object]] = {}
        self.begin(shared)

    def begin(self, folder: Path) -> None:
        """Start a row in a folder of its own."""
        self.folder, self.used, self.fresh = folder, set(), []

    def _model(self, name: str, make: Callable[[], PeftModel]) -> PeftModel:
        if name not in self.models:
            torch.manual_seed(0)
            self.models[name] = make()
            self.states[name] = state_of(self.models[name])
        self.used.add(name)
        return self.models[name]

    @property
    def base(self) -> nn.Module:
        self.fresh.append(make_model("llama"))
        return self.fresh[-1]

    @property
    def moelora(self) -> PeftModel:
        return self._model("moelora", lambda: routed("llama"))

    @property
    def molora(self) -> PeftModel:
        return self._model(
            "molora", lambda: adapted(MoLoraConfig(**FIELDS_OF_ALL, r=2, num_experts=3, tasks=["a", "b"]))
        )

    @property
    def medmoe(self) -> PeftModel:
        return self._model("medmoe", lambda: adapted(MedMoeLoraConfig(**FIELDS_OF_ALL, expert_ranks=[1, 2])))

    @property
    def at_moe(self) -> PeftModel:
        return self._model("at_moe", lambda: grouped("llama", self.shared))

    @property
    def by_prompt(self) -> PeftModel:
        return self._model("by_prompt", lambda: grouped("llama", self.shared, router_input="prompt"))

    @cached_property
    def saved(self) -> Path:
        """A directory of a MOELoRA adapter."""
        routed("llama").save_pretrained(self.shared / "saved")
        self.written = contents(self.shared / "saved")
        return self.shared / "saved"

    def edited(self, **fields) -> Path:
        """A directory of the same adapter whose config says something else."""
        folder = self.folder / "edited"
        folder.mkdir()
        written = json.loads((self.saved / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**written, **fields}))
        (folder / "adapter_model.safetensors").write_bytes((self.saved / "adapter_model.safetensors").read_bytes())
        return folder

    def rows(self, *rows, name="train.jsonl", text=None) -> str:
        """A file of data."""
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) if text is None else text)
        return str(path)

    def info(self, text: str) -> str:
        """A folder with a tasks.json."""
        (self.folder / "tasks.json").write_text(text)
        return str(self.folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def adapted(config) -> PeftModel:
    return get_peft_model(make_model("llama"), config).eval()


# what peft's own generate puts there
BY_GENERATE = {("base_model", "prepare_inputs_for_generation")}


def state_of(model: PeftModel) -> dict[str, object]:
    """Logits, the names of all attributes, which adapter is active, merged and fixed, and the config."""
    tuner = model.base_model
    tasks = {"task_ids": IDS} if model.active_peft_config.needs_tasks else {}
    answer = logits(model, INPUTS, **tasks)
    call = {"_call", "_depth", "last_ledger"}  # what the last call was told
    context = {key: str(value) for key, value in vars(tuner.context).items() if key not in call}
    return {
        "logits": answer.tolist(),
        "names": {(key, name) for key, module in model.named_modules() for name in vars(module)} - BY_GENERATE,
        "training": [module.training for module in model.modules()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "context": context,
        "recording": tuner.recording,
        "active": (model.active_adapters, sorted(model.peft_config), model.get_model_status().merged_adapters),
        "config": {name: str(value) for name, value in vars(model.active_peft_config).items()},
    }


def assert_untouched(base: nn.Module) -> None:
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert not any("forward" in vars(module) or "generate" in vars(module) for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(logits(base, INPUTS), logits(make_model("llama"), INPUTS))


class Row(NamedTuple):
    """What is done wrong, and the words of the error; or of the warning where something of use is left."""

    call: Callable[[Bench], object]
    message: str
    error: type[Exception] = ValueError


def new(message, error=ValueError, /, **fields) -> Row:
    """An adapter that cannot be put into a model."""
    return Row(lambda b: get_peft_model(b.base, config_for("llama", **fields)), message, error)


def told(task_ids, message, error=ValueError) -> Row:
    """A batch with wrong tasks."""
    return Row(lambda b: b.moelora(**INPUTS, task_ids=task_ids), message, error)


def loaded(message, /, **fields) -> Row:
    """A saved adapter whose config was edited by hand."""
    return Row(lambda b: PeftModel.from_pretrained(b.base, b.edited(**fields)), message)


def row(message, *rows, **file) -> Row:
    """A file of data with something wrong in it."""
    return Row(lambda b: read_examples(b.rows(*rows, **file)), message)


MODELS = {
    "modules that are not there": new(r"Target modules \{'nope'\} not found", target_modules=["nope"]),
    "a regex that matches none": new(r"Target modules \.\*nope not found", target_modules=r".*nope"),
    "no modules": new("Please check the values", target_modules=[]),
    "all modules excluded": new("No modules were targeted", exclude_modules=TARGETS["llama"]),
    "no layer of such an index": new(r"'layers_to_transform': \[5\]", layers_to_transform=[5]),
    "experts of no module": new(
        r"num_experts_pattern keys \['nope'\] match nothing", RuntimeWarning, num_experts_pattern={"nope": 4}
    ),
    "no list of layers of such a name": new("'layers_pattern': h", layers_to_transform=[0], layers_pattern="h"),
    "ranks of no module": new(
        r"rank_pattern keys did not match .*\['nope'\]", RuntimeWarning, rank_pattern={"nope": 4}
    ),
    "alphas of no module": new(r"alpha_pattern keys .*\['nope'\]", RuntimeWarning, alpha_pattern={"nope": 4}),
    "a head that is not there": new(
        r"modules_to_save=\['lm_haed'\]: no module of the model is called 'lm_haed'.*correct the name, or leave it out",
        modules_to_save=["lm_haed"],
    ),
    "a token beyond the embedding": new(
        r"trainable_token_indices=\[5, 128\]: the embedding has the tokens 0 to 127; give ids of these, or call model",
        trainable_token_indices=[5, 128],
    ),
    "a token beyond a named embedding": new(
        r"\{'embed_tokens': \[999\]\}: the embedding has the tokens 0 to 127",
        trainable_token_indices={"embed_tokens": [999]},
    ),
    "a module that is no linear layer": new("'model.embed_tokens' is a Embedding", target_modules=["embed_tokens"]),
    "a name with a dot": Row(
        lambda b: get_peft_model(b.base, config_for("llama"), adapter_name="a.b"),
        "adapter_name='a.b' becomes a part of the names of tensors.*choose one without a dot",
    ),
    "a second adapter with a dot": Row(
        lambda b: b.moelora.add_adapter("v1.0", config_for("llama")), "adapter_name='v1.0' becomes a part"
    ),
    "a second adapter of a taken name": Row(
        lambda b: b.moelora.add_adapter("default", config_for("llama")), "'default' already exists"
    ),
    "a second adapter of another method": Row(
        lambda b: b.moelora.add_adapter("second", MoLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])),
        "Cannot combine adapters with different peft types",
    ),
    "a schedule for another depth": Row(
        lambda b: get_peft_model(b.base, MedMoeLoraConfig(target_modules=["q_proj"], expert_schedule=[2, 3, 4])),
        r"expert_schedule=\[2, 3, 4\] has 3 entries, and the model has 2 layers; give one per layer",
    ),
    "experts of no layer": Row(
        lambda b: get_peft_model(
            b.base, MedMoeLoraConfig(target_modules=["q_proj"], experts_per_layer={"model.layers": [2]})
        ),
        r"experts_per_layer is for layers \{'model.layers': 1\} and .* are \{'model.layers': 2\}.*leave exp",
    ),
    "an adapter for another architecture": Row(
        lambda b: PeftModel.from_pretrained(make_model("gpt2"), b.saved), "not found in the base model"
    ),
    "LoRAs put together on no model": Row(
        lambda b: from_loras("llama", {"g": {"x": make_experts("llama", b.shared)["a"]}}),
        "from_loras takes a model, and 'llama' is a str; load the base model first",
        TypeError,
    ),
    "LoRAs put together with a field that is none": Row(
        lambda b: from_loras(b.base, {"g": {"x": make_experts("llama", b.shared)["a"]}}, top_k=2), "'top_k'", TypeError
    ),
    "LoRAs put together on a routed model": Row(
        lambda b: from_loras(b.moelora, {"g": {"x": "default"}}), "has a MoeLoraModel already; give the base model"
    ),
    "an expert without a source": Row(lambda b: read_expert(None), "expert has no source; give a folder or Hub id"),
    "an expert whose revision is a number": Row(
        lambda b: read_expert({"source": "me/lora", "revision": 2}), "revision=2 in its source, .* int; give a text"
    ),
    "an expert whose folder is a list": Row(
        lambda b: read_expert({"source": ["a"]}), r"the source \{'source': \['a'\]\}; give a folder or Hub id"
    ),
}

NO_ID = "is no task id; give a name or a position, or a list with one of them per row"
BATCHES = {
    "tasks as floats": told([0.0, 1.0, 2.0], rf"0\.0 {NO_ID}", TypeError),
    "tasks as floats in an array": told(np.array([0.0, 1, 2]), rf"0\.0 {NO_ID}", TypeError),
    "tasks as floats in a tensor": told(torch.tensor([0.0, 1, 2]), r"shape \(3,\) and torch.float32; give integers"),
    "tasks as yes and no": told([True, False, True], f"True {NO_ID}", TypeError),
    "a row whose task is nothing": told(["icd", None, "rad"], f"None {NO_ID}", TypeError),
    "a row whose task is nan": told([0, math.nan, 1], f"nan {NO_ID}", TypeError),
    "tasks as bytes": told(b"icd", f"b'icd' {NO_ID}", TypeError),
    "tasks as a set, which has no order": told(
        {"icd", "rad", "def"}, "is a set, whose order is not that of rows; give a list", TypeError
    ),
    "tasks as a mapping": told({"icd": 1, "rad": 1, "def": 1}, NO_ID, TypeError),
    "a mapping for a row": told([{"icd": 0.5, "rad": 0.5}, "icd", "rad"], NO_ID, TypeError),
    "tasks as an iterator": told(iter(["icd", "rad", "def"]), NO_ID, TypeError),
    "lists of lists of lists": told([[["icd"]], "rad", "def"], rf"\['icd'\] {NO_ID}", TypeError),
    "an id as a text": told("1", r"Unknown task '1'; this adapter knows 'icd' \(0\)"),
    "a task in other letters": told(["ICD", "rad", "def"], "Unknown task 'ICD'; this adapter knows"),
    "an id beyond the last": told([0, 1, 3], "Unknown task 3; this adapter knows"),
    "an id below 0": told(-1, "Unknown task -1; this adapter knows"),
    "too few tasks": told(["icd", "rad"], "2 entries and the batch has 3 rows; give one task per row, or one for all"),
    "too many tasks": told(torch.tensor([0, 1, 2, 0]), "4 entries and the batch has 3 rows"),
    "a row without a task": told([["icd"], [], ["rad"]], "leaves a row without a task; give at least one of 'icd'"),
    "a column of one row too many": told(torch.zeros(4, 1, dtype=torch.long), "4 entries and the batch has 3 rows"),
    "padding alone in a row": told(torch.tensor([[0, 1], [-1, -1], [2, -1]]), "or leaves a row without a task"),
    "a multi-hot of one axis": told(torch.ones(3, dtype=torch.bool), r"shape \(3,\); a multi-hot needs \(batch, 3\)"),
    "a multi-hot of too few tasks": told(torch.ones(3, 2, dtype=torch.bool), r"shape \(3, 2\); a multi-hot needs"),
    "a multi-hot with an empty row": told(torch.eye(3).bool() & False, "or leaves a row without a task"),
    "tasks of three axes": told(torch.zeros(3, 1, 1, dtype=torch.long), r"shape \(3, 1, 1\)"),
    "complex tasks": told(torch.zeros(3, dtype=torch.complex64), "torch.complex64; give integers"),
    "no tasks for no rows": Row(
        lambda b: b.moelora(input_ids=INPUTS["input_ids"][:0], task_ids=[]),
        r"task_ids=\[\] leaves a row without a task",
    ),
    "tasks of another batch": Row(
        lambda b: b.moelora(input_ids=INPUTS["input_ids"][:2], task_ids=IDS), "3 entries and the batch has 2 rows"
    ),
    "no task": Row(lambda b: b.moelora(**INPUTS), "No task was given, .*pass task_ids=.*model.set_task.*default_task"),
    "no task to generate for": Row(
        lambda b: b.moelora.generate(INPUTS["input_ids"], max_new_tokens=1), "No task was given"
    ),
    "wrong tasks to generate for": Row(
        lambda b: b.moelora.generate(INPUTS["input_ids"], task_ids=[0, 1]), "2 entries and the batch has 3 rows"
    ),
    "tasks where they are labels and not known": Row(
        lambda b: b.molora(**INPUTS, task_ids=["a", "b", "c"]),
        r"Unknown task 'c'; this adapter knows 'a' \(0\), 'b' \(1\)",
    ),
    "tasks where there are none": Row(
        lambda b: b.medmoe(**INPUTS, task_ids=IDS),
        r"task_ids=\[0, 1, 2\] were given, and adapter 'default' knows no tasks; name them in its config",
    ),
    "tasks for named groups": Row(
        lambda b: b.at_moe(**INPUTS, task_ids="icd"), "task_ids='icd' were given, and .* knows no tasks"
    ),
    "a prompt as a list": Row(
        lambda b: b.by_prompt(**INPUTS, prompt_mask=[[1] * 5] * 3),
        r"prompt_mask of type list; give bool \(batch, tokens\)",
    ),
    "a prompt as fractions": Row(
        lambda b: b.by_prompt(**INPUTS, prompt_mask=torch.ones(3, 5)),
        r"prompt_mask of torch.float32 \(3, 5\); give bool",
    ),
    "a prompt of other rows": Row(
        lambda b: b.by_prompt(**INPUTS, prompt_mask=torch.ones(2, 5).bool()), r"\(2, 5\); give .* is \(3, 5\) here"
    ),
    "a row without a prompt": Row(
        lambda b: b.by_prompt(**INPUTS, prompt_mask=torch.eye(3, 5).bool() & (torch.arange(3) < 2).unsqueeze(1)),
        "prompt_mask leaves a row without a prompt; mark at least one token",
    ),
    "too few adapters by row": Row(
        lambda b: b.molora(**INPUTS, adapter_names=["default"] * 2), "same as the number of inputs, but got 2 and 3"
    ),
}

CALLS = {
    "to choose an unknown task": Row(lambda b: b.moelora.set_task("mri"), "Unknown task 'mri'; this adapter knows"),
    "to choose no task of a list": Row(lambda b: b.moelora.set_task([]), "leaves a row without a task"),
    "to choose a fraction": Row(lambda b: b.moelora.set_task(1.5), rf"1\.5 {NO_ID}", TypeError),
    "to choose yes": Row(lambda b: b.moelora.set_task(True), f"True {NO_ID}", TypeError),
    "to choose a mapping": Row(lambda b: b.moelora.set_task({"icd": 1.0}), NO_ID, TypeError),
    "to choose by row": Row(lambda b: b.moelora.set_task([["icd"], ["rad"]]), rf"\['icd'\] {NO_ID}", TypeError),
    "to choose an unknown one of several": Row(lambda b: b.moelora.set_task(torch.tensor([0, 7])), "Unknown task 7"),
    "to choose for a block": Row(lambda b: b.moelora.task("mri").__enter__(), "Unknown task 'mri'"),
    "a task where tokens choose": Row(
        lambda b: b.molora.set_task("a"), "MoLoraModel has no 'set_task': that is for MOELoRA, which", AttributeError
    ),
    "a task for a block where groups are weighed": Row(
        lambda b: b.at_moe.task("a"), "GroupedMoeModel has no 'task': that is for MOELoRA", AttributeError
    ),
    "to record where tasks choose": Row(
        lambda b: b.moelora.record_routing(), "MoeLoraModel has no 'record_routing': .* Med-MoE-LoRA", AttributeError
    ),
    "group weights where there are no groups": Row(
        lambda b: b.medmoe.set_group_weights({"g": 1.0}),
        "has no 'set_group_weights': that is for AT-MoE",
        AttributeError,
    ),
    "to explain tasks": Row(
        lambda b: b.moelora.explain(INPUTS), "has no 'explain': that is for AT-MoE", AttributeError
    ),
    "statistics of nothing": Row(
        lambda b: b.molora.routing_statistics(), "is not being recorded; call model.record_routing"
    ),
    "to record an unknown adapter": Row(
        lambda b: b.molora.record_routing(adapters=["other"]), r"no adapter 'other'; the model has \['default'\]"
    ),
    "to record an adapter by a text": Row(
        lambda b: b.molora.record_routing(adapters="default"), "should be a list of strings, got 'default'", TypeError
    ),
    "to record maybe": Row(lambda b: b.molora.record_routing("default"), "enabled='default' is a yes or no"),
    "routers of an unknown adapter": Row(lambda b: list(b.molora.routers("other")), "no adapter 'other'"),
    "routers of groups of an unknown adapter": Row(lambda b: list(b.at_moe.routers("other")), "no adapter 'other'"),
    "a scale as a text": Row(lambda b: b.molora.set_balance_scale("1"), "scale='1' is the factor on balance losses"),
    "a scale that is nan": Row(lambda b: b.medmoe.set_balance_scale(math.nan), "scale=nan .* give a number from 0 up"),
    "to merge without a task": Row(
        lambda b: b.moelora.merge_adapter(), "none was chosen; pass task= with one of 'icd'"
    ),
    "to merge an unknown task": Row(lambda b: b.moelora.merge_adapter(task="mri"), "Unknown task 'mri'"),
    "to merge tasks by row": Row(lambda b: b.moelora.merge_adapter(task=[["icd"], ["rad"]]), NO_ID, TypeError),
    "to merge an unknown adapter": Row(
        lambda b: b.moelora.merge_adapter(["other"], task="icd"), r"no adapter 'other'; the model has \['default'\]"
    ),
    "to merge and unload an unknown adapter": Row(
        lambda b: b.moelora.merge_and_unload(adapter_names=["other"], task="icd"), "no adapter 'other'"
    ),
    "to merge an adapter by a text": Row(
        lambda b: b.moelora.merge_and_unload(adapter_names="default", task="icd"),
        "list of strings, got 'default'",
        TypeError,
    ),
    "to merge what tokens choose": Row(lambda b: b.molora.merge_adapter(), "chooses experts for each token"),
    "to unload what tokens choose": Row(
        lambda b: b.medmoe.merge_and_unload(), r"keep it as an adapter, or let peft_moe\.calibrate"
    ),
    "to merge an unknown adapter of groups": Row(lambda b: b.at_moe.merge_adapter(["other"]), "no adapter 'other'"),
    "to merge what the input decides": Row(
        lambda b: b.at_moe.merge_and_unload(),
        r"while the weights of the groups, .*fix them with model.set_group_weights",
    ),
    "to store weights maybe": Row(
        lambda b: b.at_moe.set_group_weights(off=["s"], store="yes"), "store='yes' is a yes or no; give True or False"
    ),
    "a number switched off": Row(
        lambda b: b.at_moe.set_group_weights(off=[1]), r"'1' is no group; there are \['f', 's'\]"
    ),
    "weights as a list": Row(lambda b: b.at_moe.set_group_weights(["f"]), r"weights=\['f'\] is no mapping; give"),
    "to explain without names": Row(
        lambda b: b.at_moe.explain(INPUTS["input_ids"]), "Tensor has no names; give a mapping", TypeError
    ),
    "to explain an unknown adapter": Row(
        lambda b: b.at_moe.explain(INPUTS, "other"), "adapter_name='other'; the model has"
    ),
    "an adapter that is not there": Row(lambda b: b.moelora.set_adapter("other"), "other not found"),
    "to delete one that is not there": Row(lambda b: b.moelora.delete_adapter("other"), "other does not exist"),
    "to fold a number": Row(lambda b: fold(42, b.folder / "f", task="icd"), "fold takes .* not a int", TypeError),
    "to fold a config": Row(
        lambda b: fold(config_for("llama"), b.folder / "f", task="icd"), "not a MoeLoraConfig", TypeError
    ),
    "to fold what is not there": Row(
        lambda b: fold(b.folder / "no", b.folder / "f", task="icd"),
        "adapter_config.json of .*no cannot be read: Can't find",
    ),
    "to fold without a task": Row(
        lambda b: fold(b.moelora, b.folder / "f"), r"pass task= with one of \['icd', 'rad', 'def'\]"
    ),
    "to fold a fraction": Row(lambda b: fold(b.moelora, b.folder / "f", task=1.5), rf"1\.5 {NO_ID}", TypeError),
    "to fold no task of a list": Row(lambda b: fold(b.saved, b.folder / "f", task=[]), "leaves a row without a task"),
    "to fold tasks by row": Row(
        lambda b: fold(b.saved, b.folder / "f", task=[["icd"], ["rad"]]), rf"\['icd'\] {NO_ID}", TypeError
    ),
    "to fold an unknown one of several": Row(
        lambda b: fold(b.saved, b.folder / "f", task=np.array([0, 9])), "Unknown task 9; this adapter knows"
    ),
    "to fold with an argument that is none": Row(
        lambda b: fold(b.moelora, b.folder / "f", task="icd", overwrit=True),
        "fold has no argument 'overwrit'",
        TypeError,
    ),
    "to fold a directory with an argument that is none": Row(
        lambda b: fold(b.saved, b.folder / "f", task="icd", overwrit=True), "fold has no argument 'overwrit'", TypeError
    ),
    "to fold a model at a revision": Row(
        lambda b: fold(b.moelora, b.folder / "f", task="icd", revision="v1"), "no argument 'revision' here", TypeError
    ),
    "to fold into a file": Row(
        lambda b: fold(b.saved, b.rows(ASK), task="icd"),
        "since .*train.jsonl is a file; choose another",
        NotADirectoryError,
    ),
    "to fold into a folder below a file": Row(
        lambda b: fold(b.saved, Path(b.rows(ASK)) / "a" / "b", task="icd"),
        "is a file; choose another",
        NotADirectoryError,
    ),
    "to fold over an adapter": Row(
        lambda b: fold(b.moelora, b.saved, task="icd"),
        "already; choose another directory, or pass overwrite",
        FileExistsError,
    ),
    "to fold an adapter over itself": Row(
        lambda b: fold(b.saved, b.saved, task="icd", overwrite=True),
        "holds the adapter that this is made of; choose another directory",
    ),
    "to fold an unknown adapter": Row(
        lambda b: fold(b.moelora, b.folder / "f", task="icd", adapter_name="other"),
        "adapter_name='other'; the model has",
    ),
    "to fold fixed weights of tasks": Row(
        lambda b: fold(b.moelora, b.folder / "f", task="icd", routing={}), "MOELORA adapters are folded for a task"
    ),
    "to fold weights that are a text": Row(
        lambda b: fold(b.at_moe, b.folder / "f", routing="style"), "'style' fixes no weights; give a mapping of some of"
    ),
    "to compose what is not there": Row(
        lambda b: compose(b.folder / "no.yaml", b.folder / "f"), "no.yaml", FileNotFoundError
    ),
}

FILES = {
    "a config that is no JSON": Row(
        lambda b: fold(
            (b.edited(), (b.folder / "edited" / "adapter_config.json").write_text("{"))[0], b.folder / "f", task=0
        ),
        "adapter_config.json of .*edited is no JSON",
    ),
    "a config that is a list": Row(
        lambda b: fold(
            (b.edited(), (b.folder / "edited" / "adapter_config.json").write_text("[]"))[0], b.folder / "f", task=0
        ),
        "adapter_config.json of .*edited cannot be read",
    ),
    "a config of a strange type": Row(
        lambda b: fold(b.edited(peft_type="MOELORA2"), b.folder / "f", task=0),
        "adapter of type 'MOELORA2', which peft does",
    ),
    "a config of a value out of range": Row(
        lambda b: fold(b.edited(r=0), b.folder / "f", task=0),
        "edited cannot be read: r=0 is the total rank .* from 1 up",
    ),
    "an edited rank": loaded(r"r='8' is the total rank of a layer; give a whole number", r="8"),
    "an edited number of experts": loaded("r=8 does not split over num_experts=3; use r=9", num_experts=3),
    "edited tasks": loaded(r"tasks=\{'icd': 0\}; give a list", tasks={"icd": 0}),
    "edited targets": loaded(r"target_modules=\[1\]; give a list of name endings", target_modules=[1]),
    "edited patterns": loaded(r"rank_pattern=\['q_proj'\]; give a mapping", rank_pattern=["q_proj"]),
    "an edited flag": loaded("use_rslora='false' is a yes or no", use_rslora="false"),
    "an edited alpha": loaded("lora_alpha=None scales the adapter", lora_alpha=None),
    "rows without the column": row("has no column 'task', only .*task_column=", {"prompt": "p", "completion": "c"}),
    "a second row without a task": row("Row 2 of .*its task is None", ASK, {"prompt": "p", "completion": "c"}),
    "a task that is a fraction": row(r"Row 1 of .*its task is 1\.5; use a name", {**ASK, "task": 1.5}),
    "a task that is yes": row("Row 1 of .*its task is True; use a name", {**ASK, "task": True}),
    "a task that is blank": row("Row 1 of .*its task is '  '; use a name", {**ASK, "task": "  "}),
    "a task that is a mapping": row(r"Row 1 of .*its task is \{'a': 1\}", {**ASK, "task": {"a": 1}}),
    "a task of nothing among others": row(r"its task is \['a', None\]", {**ASK, "task": ["a", None]}),
    "messages that are a text": row("its messages are no list of them; use", {"task": "a", "messages": "hello"}),
    "messages that are texts": row("its messages are no list of them", {"task": "a", "messages": ["hello", "you"]}),
    "one message alone": row("its messages are no list of them", {"task": "a", "messages": LEAF[0]}),
    "messages in parts": row(
        "not all a role and a text; use",
        {"task": "a", "messages": [{"role": "user", "content": [{"type": "text"}]}, LEAF[1]]},
    ),
    "messages without texts": row(
        "it has no answer", {"task": "a", "messages": [{"role": "user"}, {"role": "assistant"}]}
    ),
    "a conversation as a prompt": row(
        "is no text; write a text, or a conversation as 'messages'",
        {"task": "a", "prompt": LEAF[:1], "completion": LEAF[1:]},
    ),
    "an answer that is a list": row("is no text; write a text", {**ASK, "completion": ["x"]}),
    "broken JSON lines": row(
        "train.jsonl has a file that cannot be read as what its name ends in", text='{"task": "a"\n{"x'
    ),
    "JSON lines of numbers": row("cannot be read as what its name ends in", text="1\n2\n"),
    "rows of other lengths in CSV": row(
        "cannot be read .*Expected 3 fields in line 3, saw 4",
        name="train.csv",
        text="task,prompt,completion\na,b\nc,d,e,f\n",
    ),
    "no Parquet in a Parquet file": row("cannot be read as what its name ends in", name="train.parquet", text="rows"),
    "no source of data": Row(lambda b: read_examples(""), "No data at ''; use a file, a folder", FileNotFoundError),
    "a split that is a number": Row(lambda b: read_examples(b.rows(ASK), split=1), "has no split 1; use split= one of"),
    "a protocol that is none": Row(
        lambda b: read_examples(b.rows(ASK), protocol=None), "protocol=None is unknown; use"
    ),
    "a tasks.json that is no JSON": Row(lambda b: read_task_info(b.info("{")), "tasks.json is no JSON .*; correct it"),
    "tasks that are a list": Row(lambda b: read_task_info(b.info("[]")), "does not describe tasks; write"),
    "a metric that is not known": Row(
        lambda b: read_task_info(b.info('{"tasks": {"a": {"metric": "bleu"}}}')), "metric of 'a' is 'bleu'; use one of"
    ),
    "a metric that is a number": Row(
        lambda b: read_task_info(b.info('{"tasks": {"a": {"metric": 1}}}')), "the metric of 'a' is 1; use one of"
    ),
    "an instruction that is a number": Row(
        lambda b: read_task_info(b.info('{"tasks": {"a": {"instruction": 5}}}')),
        "the instruction of 'a' is 5; write a text",
    ),
    "labels that are one text": Row(
        lambda b: read_task_info(b.info('{"tasks": {"a": {"labels": "yes"}}}')), "labels of 'a' are 'yes'; write a list"
    ),
    "no rows to encode": Row(
        lambda b: encode(ROWS.select([]), make_tokenizer(), tasks=["a"]), "0 rows of .* cannot be encoded; give rows"
    ),
    "other rows to encode": Row(
        lambda b: encode(Dataset.from_dict({"text": ["x"]}), make_tokenizer(), tasks=None),
        r"1 rows of \['text'\] cannot be",
    ),
    "names of tasks as one text": Row(
        lambda b: encode(ROWS, make_tokenizer(), tasks="ab"), "tasks='ab' is one text; give a list"
    ),
    "a length that is a text": Row(
        lambda b: encode(ROWS, make_tokenizer(), tasks=None, max_length="512"), "max_length='512' is the longest row"
    ),
    "tasks of rows that are not known": Row(lambda b: check_tasks(ROWS, ["a"]), r"tasks \['b'\] that are not among"),
    "no rows to mix": Row(lambda b: mix(ROWS.select([]), strategy="uniform"), "no rows to mix; give at least one"),
    "a temperature that is nan": Row(
        lambda b: mix(ROWS, strategy="temperature", temperature=math.nan),
        "temperature=nan must be a number from 0.1 up",
    ),
    "a temperature that is a text": Row(
        lambda b: mix(ROWS, strategy="temperature", temperature="2"), "temperature='2' must be a number"
    ),
    "half a row of each task": Row(
        lambda b: take_per_task(ROWS, 0.5), "limit=0.5 is how many rows of each task to take"
    ),
    "no rows to score": Row(lambda b: score([], ROWS.select([]), {}), "no rows to score; give at least one"),
    "no rows to evaluate": Row(
        lambda b: evaluate_tasks(b.molora, make_tokenizer(), ROWS.select([]), {}), "no rows to score; give at least one"
    ),
    "predictions as one text": Row(lambda b: score("ab", ROWS, {}), "predictions='ab' is one text; give a list"),
    "too few predictions": Row(lambda b: score(["a"], ROWS, {}), "1 predictions for 2 examples; give one for each row"),
    "no results": Row(lambda b: table({}), "no results to lay out; give those of at least one system"),
    "a metric that is a list": Row(lambda b: load_metric(["token_f1"]), r"Unknown metric \['token_f1'\]; use one of"),
    "a batch of no rows to answer": Row(
        lambda b: generate_answers(b.molora, make_tokenizer(), ROWS, batch_size=0), "batch_size=0 is the number of rows"
    ),
    "a batch of less than no rows to answer": Row(
        lambda b: generate_answers(b.molora, make_tokenizer(), ROWS, batch_size=-1), "batch_size=-1 .* from 1 up"
    ),
    "answers of no tokens": Row(
        lambda b: generate_answers(b.molora, make_tokenizer(), ROWS, max_new_tokens=0),
        "max_new_tokens=0 is the longest",
    ),
    "rows of tasks that the adapter does not have": Row(
        lambda b: generate_answers(b.moelora, make_tokenizer(), ROWS, progress=False),
        r"tasks \['a', 'b'\] that are not among",
    ),
    "a collator that is none": Row(lambda b: TaskCollator(None, ["a"]), "collator=None cannot be called", TypeError),
    "a collator with a task twice": Row(
        lambda b: TaskCollator(default_data_collator, ["a", "a"]), r"tasks names \['a'\] more than once"
    ),
    "a collator with names as one text": Row(
        lambda b: TaskCollator(default_data_collator, "icd"), "tasks='icd'; give a list of the tasks' names"
    ),
    "a collator of no rows": Row(
        lambda b: TaskCollator(default_data_collator, ["a"])([]), "no rows to make a batch of"
    ),
}


def collated(value, message) -> Row:
    """A row whose task a collator cannot turn into an id."""
    return Row(
        lambda b: TaskCollator(default_data_collator, ["a", "b"])([{"task_ids": value, "input_ids": [1]}]), message
    )


def command(message, *words) -> Row:
    """A command that ends with one line and status 1."""

    def run(b: Bench) -> None:
        assert main([str(word).format(saved=b.saved, folder=b.folder) for word in words]) == 1

    return Row(run, message, SystemExit)


def script(message, **arguments) -> Row:
    """Arguments of scripts/train.py."""
    return Row(lambda b: AdapterArguments(**arguments).config(["a", "b"]), message)


EVALUATE = str(Path(__file__).parents[1] / "scripts" / "evaluate.py")
COMMANDS = {
    "a task that is yes, collated": collated(True, "Unknown task True in 'task_ids'; use one of"),
    "a task that is a fraction, collated": collated(1.0, r"Unknown task 1\.0 in 'task_ids'"),
    "a task that is nothing, collated": collated(None, "Unknown task None in 'task_ids'"),
    "lists of lists, collated": collated([["a"]], r"Unknown task \['a'\] in 'task_ids'"),
    "options that are no JSON": script(r"--adapter_options='\{r: 4\}' is no JSON", adapter_options="{r: 4}"),
    "options that are a list": script(
        r"--adapter_options='\[1\]' holds no names; write a mapping", adapter_options="[1]"
    ),
    "options of another method": script("--method moelora has no top_p", adapter_options='{"top_p": 0.5}'),
    "an option that is wrong": script(
        "task_embedding_dim='big' is the size", adapter_options='{"task_embedding_dim": "big"}'
    ),
    "a pattern that is no JSON": script(
        r"--num_experts_pattern='\{q_proj: 1\}' is no JSON", num_experts_pattern="{q_proj: 1}"
    ),
    "a pattern that is a number": script("num_experts_pattern='4'; give a mapping", num_experts_pattern="4"),
    "a schedule that is not known": script(
        "expert_schedule='pyramid': this shape is not known", method="medmoelora", expert_schedule="pyramid"
    ),
    "groups that are no JSON": script(r"--groups='\{g: a\}' is no JSON", method="at_moe", groups="{g: a}"),
    "an own task that is not among the data's": script("default_task='c' is not among tasks", default_task="c"),
    "scores written into a folder": Row(
        lambda b: runpy.run_path(EVALUATE)["EvaluationArguments"](dataset="x", adapter="y", output=str(b.folder)),
        "output='.*' is a folder; name a JSON file to write",
    ),
    "folding no adapter": command(
        "adapter_config.json of .*no cannot", "fold", "{folder}/no", "--task", "a", "--out", "o"
    ),
    "folding an unknown task": command("Unknown task 'mri'", "fold", "{saved}", "--task", "mri", "--out", "{folder}/o"),
    "folding an id beyond the last": command("Unknown task 3", "fold", "{saved}", "--task", "3", "--out", "{folder}/o"),
    "folding over itself": command("that this is made of", "fold", "{saved}", "--task", "icd", "--out", "{saved}"),
    "folding into a file": command(
        "is a file; choose another", "fold", "{saved}", "--task", "icd", "--out", "{saved}/adapter_config.json"
    ),
    "composing from no file": command("no.yaml", "compose", "{folder}/no.yaml", "--out", "{folder}/o"),
}

# For every config: the field, the value, the words of the error.
FIELDS = {
    "a kind of task": ({"task_type": "CAUSAL"}, "task type: 'CAUSAL'. Must be one of"),
    "a path as the base model's name": (
        {"base_model_name_or_path": Path("x")},
        "base_model_name_or_path=.* give a text",
    ),
    "a number as revision": ({"revision": 2}, "revision=2 is of type int; give a text"),
    "inference as a text": ({"inference_mode": "no"}, "inference_mode='no' is a yes or no"),
    "targets as a number": ({"target_modules": 5}, "target_modules=5; give a list of name endings, or a regex"),
    "targets with nothing among them": ({"target_modules": ["q", None]}, r"target_modules=\['q', None\]; give a list"),
    "targets as a broken regex": ({"target_modules": "(q|v"}, r"target_modules='\(q\|v' is no regex \(missing \)"),
    "exclusions as a broken regex": ({"exclude_modules": "*q"}, r"exclude_modules='\*q' is no regex"),
    "exclusions as a mapping": ({"exclude_modules": {"q": 1}}, r"exclude_modules=\{'q': 1\}; give a list"),
    "layers as texts": (
        {"target_modules": ["q"], "layers_to_transform": ["0"]},
        r"layers_to_transform=\['0'\]; give the index of a layer",
    ),
    "a layer below 0": (
        {"target_modules": ["q"], "layers_to_transform": -1},
        r"layers_to_transform=-1; give the index .* counted from 0",
    ),
    "a layer that is yes": ({"target_modules": ["q"], "layers_to_transform": True}, "layers_to_transform=True; give"),
    "names of layers as a number": (
        {"layers_pattern": 5, "layers_to_transform": 0},
        r"layers_pattern=5; give a list of names",
    ),
    "names of layers as a broken regex": (
        {"layers_pattern": "(h", "layers_to_transform": 0},
        r"layers_pattern='\(h' is no regex",
    ),
    "alpha below 0": ({"lora_alpha": -1}, "lora_alpha=-1 scales the adapter; give a number above 0"),
    "alpha without end": ({"lora_alpha": math.inf}, "lora_alpha=inf scales the adapter"),
    "alpha as a text": ({"lora_alpha": "16"}, "lora_alpha='16' scales the adapter"),
    "alpha that no float holds": ({"lora_alpha": 10**400}, "lora_alpha=1000.* scales the adapter"),
    "dropout of all": ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 is a probability; give a number from 0 up to, not"),
    "dropout below 0": ({"lora_dropout": -0.1}, r"lora_dropout=-0\.1 is a probability"),
    "dropout that is nan": ({"lora_dropout": math.nan}, "lora_dropout=nan is a probability"),
    "dropout that is no": ({"lora_dropout": False}, "lora_dropout=False is a probability"),
    "ranks as a list": ({"rank_pattern": [4]}, r"rank_pattern=\[4\]; give a mapping such as"),
    "ranks that are no": ({"rank_pattern": False}, "rank_pattern=False; give a mapping"),
    "ranks of a number": (
        {"rank_pattern": {1: 4}},
        "rank_pattern has the key 1; keys are names of modules, or regexes",
    ),
    "ranks of a broken regex": ({"rank_pattern": {"(q": 4}}, r"A key of rank_pattern='\(q' is no regex"),
    "alphas as a text": ({"alpha_pattern": "q_proj"}, "alpha_pattern='q_proj'; give a mapping"),
    "experts of a broken regex": (
        {"num_experts_pattern": {"q[": 4}},
        r"A key of num_experts_pattern='q\[' is no regex",
    ),
    "rslora as a text": ({"use_rslora": "true"}, "use_rslora='true' is a yes or no; give True or False"),
    "fan-in as a number": ({"fan_in_fan_out": 1}, "fan_in_fan_out=1 is a yes or no"),
    "an unknown beginning": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not known; use one of"),
    "a beginning as a list": ({"init_lora_weights": ["normal"]}, r"init_lora_weights=\['normal'\] is not known"),
    "an unknown bias": ({"bias": "everything"}, "bias='everything'"),
    "modules to save as a text": ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head'; give a list of names"),
    "modules to save as numbers": ({"modules_to_save": [1]}, r"modules_to_save=\[1\]; give a list of names"),
    "modules to save as a broken regex": ({"modules_to_save": ["("]}, r"modules_to_save='\(' is no regex"),
    "tokens as texts": (
        {"trainable_token_indices": ["<x>"]},
        r"trainable_token_indices=\['<x>'\]; give a list of token ids",
    ),
    "tokens below 0": (
        {"trainable_token_indices": [-1]},
        r"trainable_token_indices=\[-1\]; give a list of token ids from 0",
    ),
    "tokens of a number": ({"trainable_token_indices": {5: [1]}}, r"trainable_token_indices=\{5: \[1\]\}; give a list"),
}

# Of one config each.
OWN_FIELDS = {
    "rank as a text": (MoeLoraConfig, {"r": "8"}, "r='8' is the total rank of a layer; give a whole number from 1 up"),
    "rank that is yes": (MoeLoraConfig, {"r": True}, "r=True is the total rank"),
    "rank below 0": (MoeLoraConfig, {"r": -1}, "r=-1 is the total rank"),
    "rank in a tensor": (MoeLoraConfig, {"r": torch.tensor(8)}, r"r=tensor\(8\) is the total rank"),
    "rank that memory cannot hold": (MoLoraConfig, {"r": 10**9}, "r=1000000000 is the rank .* from 1 to 1000000"),
    "tasks with a number": (
        MoeLoraConfig,
        {"tasks": ["icd", 1]},
        r"tasks=\['icd', 1\]; give a list of the tasks' names",
    ),
    "tasks without end": (MoeLoraConfig, {"tasks": 10**12}, "tasks=1000000000000 is .* from 1 to 1000000"),
    "no tasks by number": (MoeLoraConfig, {"tasks": False}, "tasks=False is a number of tasks or a list of names"),
    "a default that is a list": (MoeLoraConfig, {"default_task": ["0"]}, r"default_task=\['0'\] is not among tasks"),
    "a default of two numbers": (
        MoeLoraConfig,
        {"default_task": torch.tensor([0, 1])},
        r"default_task=tensor\(\[0, 1\]\) is not among tasks",
    ),
    "a scope that is a list": (MoeLoraConfig, {"gate_scope": ["layer"]}, r"gate_scope=\['layer'\] is not known; use"),
    "losses as a list": (MoLoraConfig, {"balance_loss": ["z"]}, r"balance_loss=\['z'\] is not known; use one of"),
    "a loss by number": (MoLoraConfig, {"balance_loss": {1: 0.1}}, r"balance_loss=\{1: 0\.1\} is not known"),
    "a weight that no float holds": (MoLoraConfig, {"balance_coefficient": 10**400}, "balance_coefficient=10+ is"),
    "groups by number": (
        MoLoraConfig,
        {"expert_groups": {1: ["a"], "b": ["c"]}},
        r"expert_groups=\{1: \['a'\], 'b': \['c'\]\}; give",
    ),
    "groups of numbers": (
        MoLoraConfig,
        {"tasks": ["a"], "expert_groups": {"g": ["a", 1]}},
        r"expert_groups=\{'g': \['a', 1\]\}; give",
    ),
    "top p of none": (
        MoLoraConfig,
        {"top_p": 0.0},
        r"top_p=0\.0 is a sum of probabilities; give a number from 0\.01 to 1",
    ),
    "top p above all": (MoLoraConfig, {"top_p": 2}, "top_p=2 is a sum of probabilities"),
    "top k as a text": (MoLoraConfig, {"top_k": "2"}, "top_k='2' is the number of experts per token"),
    "a general task as a text": (
        MedMoeLoraConfig,
        {"base_expert_mode": "general", "tasks": ["a", "b"], "general_tasks": "a"},
        r"general_tasks='a'; give a list of names, such as",
    ),
    "general tasks as numbers": (
        MedMoeLoraConfig,
        {"general_tasks": [1]},
        r"general_tasks=\[1\]; give a list of names",
    ),
    "a mode that is a list": (
        MedMoeLoraConfig,
        {"base_expert_mode": ["frozen"]},
        r"base_expert_mode=\['frozen'\] is not kn",
    ),
    "experts by layer as a number": (
        MedMoeLoraConfig,
        {"experts_per_layer": {"layers": 4}},
        r"experts_per_layer=\{'layers': 4\}; it is set by itself",
    ),
    "γ that no float holds": (
        MedMoeLoraConfig,
        {"expert_schedule": {"type": "power", "min": 1, "max": 2, "gamma": 10**400}},
        "gamma is a number",
    ),
    "more experts than memory": (
        MedMoeLoraConfig,
        {"expert_schedule": {"type": "power", "min": 1, "max": 10**9}},
        "min and max are numbers of exp",
    ),
    "experts counted as a fraction": (
        GroupedMoeConfig,
        {"num_experts": 3.0, **SOURCES},
        r"num_experts=3\.0, and groups name",
    ),
    "an order of numbers": (
        GroupedMoeConfig,
        {"expert_order": [1, 2], **SOURCES},
        r"expert_order=\[1, 2\] does not have",
    ),
    "an order that is a number": (
        GroupedMoeConfig,
        {"expert_order": 5, **SOURCES},
        "expert_order=5 does not have the names",
    ),
    "a layout that is none": (
        GroupedMoeConfig,
        {"expert_layout": [{}], **SOURCES},
        r"expert_layout=\[\{\}\] does not say ranks.*leave it out",
    ),
    "a layout of too few experts": (
        GroupedMoeConfig,
        {"expert_layout": [{"ranks": [1], "scaling": [1.0], "modules": ["q"]}], **SOURCES},
        "does not say ranks, scaling and modules of 3 experts",
    ),
    "ranks where experts bring theirs": (
        GroupedMoeConfig,
        {"rank_pattern": {"q": 4}, **SOURCES},
        r"rank_pattern=\{'q': 4\}: experts bring their own",
    ),
    "weights of no group": (
        GroupedMoeConfig,
        {"group_weights": {"off": ["k"]}, **SOURCES},
        r"group_weights=\{'off': \['k'\]\}: 'k' is no group",
    ),
    "weights that do not add up": (
        GroupedMoeConfig,
        {"group_weights": {"weights": {"g": 0.7, "h": 0.7}}, **SOURCES},
        r"group_weights=.* add up to 1\.4; they are shares, so give at most 1",
    ),
}

TABLE = {**MODELS, **BATCHES, **CALLS, **FILES, **COMMANDS}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def models(shared) -> Bench:
    return Bench(shared)


@pytest.fixture
def bench(models, tmp_path) -> Bench:
    """The models of all tests in this file, and a folder for one."""
    models.begin(tmp_path)
    return models


@pytest.mark.parametrize("case", TABLE)
def test_what_is_wrong_is_refused_with_reason_and_remedy_and_changes_nothing(case, bench, capsys, monkeypatch):
    monkeypatch.chdir(bench.folder)
    call, message, error = TABLE[case]
    with_files = {"edited", "train.jsonl", "train.csv", "train.parquet", "tasks.json"}  # made by the row itself
    if error is SystemExit:  # a command, which says it in one line
        call(bench)
        said = capsys.readouterr().err
        assert said.startswith("peft-moe: ")
        assert said.count("\n") == 1
        with pytest.raises(ValueError, match=message):
            raise ValueError(said)
    elif issubclass(error, Warning):
        with pytest.warns(error, match=message):
            call(bench)
        return
    else:
        with pytest.raises(error, match=message):
            call(bench)
    for name in bench.used:
        assert state_of(bench.models[name]) == bench.states[name], name
    for base in bench.fresh:
        assert_untouched(base)
    assert contents(bench.saved) == bench.written
    left = {path.relative_to(bench.folder).parts[0] for path in bench.folder.rglob("*")}
    assert left <= with_files


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(("fields", "message"), FIELDS.values(), ids=FIELDS)
def test_every_config_refuses_a_field_of_the_wrong_kind(method, fields, message):
    with pytest.raises(ValueError, match=message):
        CONFIGS[method](**fields)


@pytest.mark.parametrize(("config", "fields", "message"), OWN_FIELDS.values(), ids=OWN_FIELDS)
def test_a_config_refuses_what_its_own_fields_cannot_be(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_the_table_is_as_long_as_it_is_said_to_be():
    assert len(TABLE) + len(FIELDS) + len(OWN_FIELDS) >= 200
