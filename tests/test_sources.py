"""What can be an expert: a trained LoRA computes as an expert what it does in peft, and all else is refused unread."""

import json
import pickle
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from grouped_helpers import make_experts, make_lora
from helpers import TARGETS, TASKS, config_for, logits, routed, routed_layers
from peft import (
    EvaConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny_models import TASK_TYPES, make_inputs, make_model

from peft_moe import GroupedMoeConfig, from_loras, read_expert

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of trained LoRAs by architecture and name, made when they are asked for."""
    return partial(make_experts, tmp_path=tmp_path_factory.mktemp("experts"))


def fix_to_x(model):
    model.set_group_weights({"g": {"x": 1.0}}, group_weights={"g": 1.0}, mix=1.0)
    return model


def as_expert(arch, source, folders, *, base=None, **fields):
    """A model that has the source as expert g/x among others, with all weight on it."""
    others = folders(arch)
    config = GroupedMoeConfig(
        task_type=TASK_TYPES[arch],
        groups={"f": {"b": others["b"]}, "g": {"c": others["c"], "x": source}},
        general_expert=others["p"],
        init_lora_weights=False,
        **fields,
    )
    return fix_to_x(get_peft_model(make_model(arch) if base is None else base, config).eval())


def lora(folder, arch="llama", **fields):
    return make_lora(folder, arch, seed=7, **fields)


def drawn(folder, arch="llama", save=None, **fields):
    """A LoRA of some initialisation whose weights then changed, as if it had been trained."""
    fields = {"task_type": TASK_TYPES[arch], "r": 4, "lora_alpha": 8, "target_modules": TARGETS[arch], **fields}
    model = get_peft_model(make_model(arch), LoraConfig(**fields))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder), **(save or {}))
    return str(folder)


def converted(folder):
    """A PiSSA that was saved as what it adds to the unchanged base weights."""
    torch.manual_seed(7)
    model = get_peft_model(make_model("llama"), LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(folder / "initial"))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data *= 20
    model.peft_config["default"].init_lora_weights = "pissa"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a second adapter, which this loads for a moment
        model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(folder / "initial"))
    return str(folder)


def of_type(folder, dtype):
    lora(folder)
    save_file({name: t.to(dtype) for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return str(folder)


def set_config(folder, **changes):
    path = Path(folder) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


GOOD = {
    "a rank that is no power of two": ("llama", partial(lora, r=7)),
    "an alpha below the rank": ("llama", partial(lora, lora_alpha=1)),
    "rank_pattern": ("llama", partial(lora, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 9})),
    "alpha_pattern": ("llama", partial(lora, alpha_pattern={"v_proj": 32, r"layers\.0\.self_attn\.q_proj": 1})),
    "both patterns": ("llama", partial(lora, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5, "v_proj": 3})),
    "rslora": ("llama", partial(lora, r=6, use_rslora=True)),
    "rslora and patterns": (
        "llama",
        partial(lora, use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5}),
    ),
    "bfloat16": ("llama", partial(of_type, dtype=torch.bfloat16)),
    "float16": ("llama", partial(of_type, dtype=torch.float16)),
    "float64": ("llama", partial(of_type, dtype=torch.float64)),
    "a regex": ("llama", partial(lora, target_modules=r".*layers\.1\..*(q|down)_proj")),
    "all-linear": ("llama", partial(lora, target_modules="all-linear")),
    "exclude_modules": ("llama", partial(lora, target_modules="all-linear", exclude_modules=["q_proj", "up_proj"])),
    "layers_to_transform": ("llama", partial(lora, layers_to_transform=[1])),
    "layers_pattern": ("llama", partial(lora, layers_to_transform=0, layers_pattern="layers")),
    "an output layer": (
        "llama",
        partial(drawn, target_modules=["q_proj", "lm_head"], save={"save_embedding_layers": False}),
    ),
    "dropout": ("llama", partial(lora, lora_dropout=0.5)),
    "gaussian": ("llama", partial(drawn, init_lora_weights="gaussian")),
    "orthogonal": ("llama", partial(drawn, init_lora_weights="orthogonal")),
    "mica": ("llama", partial(drawn, init_lora_weights="mica")),
    "a PiSSA that was converted": ("llama", converted),
    "gpt2": ("gpt2", partial(lora, arch="gpt2")),
    "gpt2, not told that weights are the other way": ("gpt2", partial(drawn, arch="gpt2")),
    "opt": ("opt", partial(lora, arch="opt")),
    "bert": ("bert", partial(lora, arch="bert")),
    "t5": ("t5", partial(lora, arch="t5")),
    "vit": ("vit", partial(lora, arch="vit")),
    "no task type": ("llama", partial(lora, task_type=None)),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")  # peft's
@pytest.mark.parametrize("case", GOOD)
def test_an_expert_alone_computes_what_the_lora_computes_in_peft(case, folders, tmp_path):
    arch, make = GOOD[case]
    source, inputs = make(tmp_path), make_inputs(arch, labels=False)
    expected = logits(PeftModel.from_pretrained(make_model(arch), source).eval(), inputs)
    assert not torch.allclose(expected, logits(make_model(arch), inputs), atol=1e-3)
    model = as_expert(arch, source, folders)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_an_expert_that_was_initialised_by_eva_is_a_plain_lora(folders, tmp_path):
    source = set_config(lora(tmp_path), init_lora_weights="eva", eva_config=EvaConfig().__dict__)
    inputs = make_inputs("llama")
    expected = logits(PeftModel.from_pretrained(make_model("llama"), source).eval(), inputs)
    torch.testing.assert_close(logits(as_expert("llama", source, folders), inputs), expected, rtol=1e-4, atol=1e-5)


FORMS = {"text": str, "path": Path, "mapping": lambda folder: {"source": folder}, "read": read_expert}


@pytest.mark.parametrize("as_it_is", FORMS.values(), ids=FORMS)
def test_a_source_can_be_given_in_any_of_its_forms(as_it_is, folders):
    source, inputs = folders("llama")["a"], make_inputs("llama")
    expected = logits(PeftModel.from_pretrained(make_model("llama"), source).eval(), inputs)
    model = as_expert("llama", as_it_is(source), folders)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert model.active_peft_config.groups["g"]["x"]["source"] == source


def test_a_source_can_be_in_a_subfolder(folders, tmp_path):
    shutil.copytree(folders("llama")["a"], tmp_path / "of" / "a")
    inputs = make_inputs("llama")
    expected = logits(as_expert("llama", folders("llama")["a"], folders), inputs)
    model = as_expert("llama", {"source": tmp_path, "subfolder": "of/a"}, folders)
    assert torch.equal(logits(model, inputs), expected)
    assert model.active_peft_config.groups["g"]["x"]["subfolder"] == "of/a"


@pytest.mark.parametrize("path", ["someone/base", "{}/elsewhere/base", "{}/base/", "C:\\models\\base", None])
def test_base_models_are_compared_by_the_last_part_of_their_names(path, folders, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    base = type(make_model("llama")).from_pretrained(tmp_path / "base").eval()
    source = shutil.copytree(folders("llama")["a"], tmp_path / "a")
    set_config(source, base_model_name_or_path=path and path.format(tmp_path))
    assert routed_layers(as_expert("llama", source, folders, base=base))


def test_a_source_in_the_home_directory_is_found(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(folders("llama")["a"], tmp_path / "loras" / "a")
    assert routed_layers(as_expert("llama", "~/loras/a", folders))


def test_an_expert_of_another_base_model_is_taken_if_the_user_says_so(folders, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    source = set_config(shutil.copytree(folders("llama")["a"], tmp_path / "a"), base_model_name_or_path="me/other")
    load = partial(type(make_model("llama")).from_pretrained, tmp_path / "base")
    with pytest.raises(ValueError, match="trained on 'me/other', and the base model is '.*/base'"):
        as_expert("llama", source, folders, base=load())
    assert routed_layers(as_expert("llama", source, folders, base=load(), check_base_model=False))


@pytest.mark.parametrize("gate_scope", ["model", "layer"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_task_of_a_moelora_adapter_is_an_expert(arch, gate_scope, folders, tmp_path):
    single, smaller = {"llama": ("down_proj", "q_proj"), "gpt2": ("mlp.c_proj", "c_attn")}[arch]
    fields = {"num_experts_pattern": {single: 1}, "rank_pattern": {smaller: 4}, "use_rslora": arch == "gpt2"}
    moelora, inputs = routed(arch, gate_scope=gate_scope, **fields), make_inputs(arch)
    moelora.save_pretrained(tmp_path)
    for task in TASKS:
        model = as_expert(arch, {"source": tmp_path, "task": task}, folders)
        expected = logits(moelora, inputs, task_ids=task)
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
        assert model.active_peft_config.groups["g"]["x"]["task"] == task


def test_two_tasks_of_one_adapter_and_a_lora_twice_are_experts_beside_each_other(folders, tmp_path):
    moelora, inputs = routed("llama"), make_inputs("llama")
    moelora.save_pretrained(tmp_path)
    tasks = {task: {"source": tmp_path, "task": task} for task in TASKS}
    a = folders("llama")["a"]
    model = get_peft_model(make_model("llama"), GroupedMoeConfig(groups={"t": tasks, "l": {"a": a, "again": a}})).eval()
    for task in TASKS:
        with model.routing({"t": {task: 1.0}}, group_weights={"t": 1.0}):
            expected = logits(moelora, inputs, task_ids=task)
            torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    expected = logits(PeftModel.from_pretrained(make_model("llama"), a).eval(), inputs)
    with model.routing(group_weights={"l": 1.0}):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_a_loaded_adapter_is_an_expert(arch, folders):
    others, inputs = folders(arch), make_inputs(arch, labels=False)
    loaded = PeftModel.from_pretrained(make_model(arch), others["a"], adapter_name="first")
    loaded.load_adapter(others["b"], "second")
    expected = {name: [] for name in ("first", "second")}
    for name in expected:
        loaded.set_adapter(name)
        expected[name] = logits(loaded.eval(), inputs)
    model = from_loras(loaded, {"f": {"y": "first"}, "g": {"x": "second"}}, general_expert=others["c"]).eval()
    for group, name in (("f", "first"), ("g", "second")):
        with model.routing(group_weights={group: 1.0}, mix=1.0):
            torch.testing.assert_close(logits(model, inputs), expected[name], rtol=1e-4, atol=1e-5)


def test_what_was_read_says_where_it_is_from_and_what_it_is_for(folders):
    source = folders("llama")["b"]
    expert = read_expert(source)
    assert list(expert.origin) == ["source", "sha256"]
    assert expert.task_type == "CAUSAL_LM"
    assert sorted(expert.layers) == sorted(
        f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")
    )
    assert all((len(lora.a), lora.b.shape[1], lora.scaling) == (4, 4, 1.0) for lora in expert.layers.values())
    assert repr(expert) == f"Expert({expert.origin}, 4 modules)"


# what cannot be an expert


def change(folder, **changes):
    """A LoRA whose config is other than when it was saved."""
    return set_config(lora(folder), **changes)


def tensors(folder, edit):
    """A LoRA whose weights are other than when it was saved."""
    lora(folder)
    state_dict = load_file(folder / WEIGHTS)
    edit(state_dict)
    save_file({name: t.contiguous() for name, t in state_dict.items()}, folder / WEIGHTS)
    return str(folder)


def move(state_dict, old, new):
    for name in [name for name in state_dict if old in name]:
        state_dict[name.replace(old, new)] = state_dict.pop(name)


def put(value, name):
    def edit(state_dict):
        state_dict[name] = value(state_dict[name])

    return edit


A0, B0 = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


def drop(name):
    return lambda state_dict: state_dict.pop(name)


def put_twice(state_dict):
    state_dict[A0.removeprefix(PREFIX)] = state_dict[A0].clone()


def set_element(tensor, value):
    tensor[0, 0] = value
    return tensor


def write(folder, **files):
    lora(folder)
    for name, content in files.items():
        (folder / {"config": CONFIG, "weights": WEIGHTS}[name]).write_bytes(content)
    return str(folder)


def cut(folder, length):
    return write(folder, weights=Path(lora(folder), WEIGHTS).read_bytes()[:length])


def without(folder, name):
    (Path(lora(folder)) / name).unlink()
    return str(folder)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def only_pickle(folder, name="adapter_model.bin"):
    without(folder, WEIGHTS)
    (folder / name).write_bytes(pickle.dumps(Bomb(folder / "exploded")))
    return str(folder)


def adapter(folder, config, arch="llama"):
    torch.manual_seed(0)
    get_peft_model(make_model(arch), config).save_pretrained(str(folder))
    return str(folder)


def moelora(folder, arch="llama", task=None, **fields):
    get_peft_model(make_model(arch), config_for(arch, **fields)).save_pretrained(str(folder))
    return {"source": folder, "task": task} if task else str(folder)


def odd_moelora(folder, *, task="rad", edit=None, **changes):
    moelora(folder)
    if edit:
        state_dict = load_file(folder / WEIGHTS)
        edit(state_dict)
        save_file(state_dict, folder / WEIGHTS)
    set_config(folder, **changes)
    return {"source": folder, "task": task}


def entry(folder, **entries):
    return {"source": lora(folder), **entries}


HEAD = f"{PREFIX}{Q0}.moelora_bank.lora_B.weight"
X = r"Expert g/x \(.*\)"
ONLY_PICKLE = X + r": its weights are a pickle file \({}\), and opening one can run any code.*save it again"
NO_CONFIG = X + r".*no adapter_config.json"
# name: how the source is made in an empty folder, and what the error says: value, rule and remedy
BAD = {
    "DoRA": (partial(lora, use_dora=True), X + r" is a DoRA, whose magnitudes.*; merge it, or train a LoRA"),
    "IA3": (
        partial(adapter, config=IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])),
        X + r" is a IA3 adapter; experts are stock LoRAs, or tasks of a MOELORA adapter.*converted to a stock LoRA",
    ),
    "VeRA": (
        partial(adapter, config=VeraConfig(target_modules=["q_proj"], r=4)),
        X + r" is a VERA adapter; experts are stock LoRAs",
    ),
    "LoHa": (
        partial(adapter, config=LoHaConfig(target_modules=["q_proj"], r=4)),
        X + r" is a LOHA adapter; experts are stock LoRAs",
    ),
    "a type of the future": (partial(change, peft_type="SUPERLORA"), X + r" is a SUPERLORA adapter"),
    "modules_to_save": (
        partial(lora, modules_to_save=["lm_head"]),
        X + r" has whole modules \['lm_head'\] beside its LoRA \(modules_to_save\).*; train it without them",
    ),
    "a classifier": (
        partial(adapter, arch="bert", config=LoraConfig(task_type="SEQ_CLS", target_modules=["query"])),
        X + r" has whole modules \['classifier', 'score'\] beside its LoRA",
    ),
    "trainable_token_indices": (
        partial(lora, trainable_token_indices=[5, 6]),
        X + r" has trainable_token_indices=\[5, 6\], which an expert cannot have; train it without",
    ),
    "all biases": (partial(lora, bias="all"), X + r" has bias='all', which an expert cannot have; train it without"),
    "its layers' biases": (partial(lora, bias="lora_only"), X + r" has bias='lora_only', which an expert cannot have"),
    "a bias of its own": (partial(change, lora_bias=True), X + r" has lora_bias=True, which an expert cannot have"),
    "PiSSA": (
        partial(lora, init_lora_weights="pissa"),
        X + r" was initialised with init_lora_weights='pissa', which changes the base weights; save it with "
        r"path_initial_model_for_weight_conversion",
    ),
    "OLoRA": (partial(lora, init_lora_weights="olora"), X + r".*init_lora_weights='olora', which changes the base"),
    "LoftQ": (partial(change, init_lora_weights="loftq"), X + r".*init_lora_weights='loftq', which changes the base"),
    "CorDA": (partial(change, init_lora_weights="corda"), X + r".*init_lora_weights='corda', which changes the base"),
    "an init of the future": (partial(change, init_lora_weights="new"), X + r".*init_lora_weights='new'"),
    "target_parameters": (
        partial(change, target_parameters=["mlp.experts.gate_up_proj"]),
        X + r" has target_parameters=\['mlp.experts.gate_up_proj'\], which an expert cannot have",
    ),
    "layer_replication": (
        partial(lora, layer_replication=[[0, 2], [1, 2]], task_type=None),
        X + r" has layer_replication=\[\[0, 2\], \[1, 2\]\], which an expert cannot have",
    ),
    "QALoRA": (partial(change, use_qalora=True), X + r" has use_qalora=True, which an expert cannot have"),
    "aLoRA": (partial(change, alora_invocation_tokens=[4, 5]), X + r" has alora_invocation_tokens=\[4, 5\]"),
    "a switch of the future": (
        partial(change, use_future=True),
        X + r" has use_future=True, which an expert cannot have; train it without",
    ),
    "a mode of the future": (partial(change, scaling_mode="rank"), X + r" has scaling_mode='rank', which an expert"),
    "a number of the future": (partial(change, magnitude=0.5), X + r" has magnitude=0.5, which an expert cannot have"),
    "settings of the future": (partial(change, future_config={"a": 0}), X + r" has future_config=\{'a': 0\}"),
    "a LoRA on embeddings": (
        partial(adapter, config=LoraConfig(target_modules=r".*(embed_tokens|q_proj)", r=2)),
        X + r" has the tensor '.*embed_tokens.*' of shape .*; experts have matrices lora_A and lora_B of linear layers",
    ),
    "a LoRA on a convolution": (
        partial(adapter, arch="vit", config=LoraConfig(target_modules=["patch_embeddings.projection"], r=2)),
        X + r" has the tensor '.*projection.lora_A.weight' of shape \(2, 3, 4, 4\); experts have matrices",
    ),
    "an output layer and base weights beside it": (
        partial(adapter, config=LoraConfig(target_modules=["q_proj", "lm_head"], r=2)),
        X + r" has the tensor '.*(lm_head|embed_tokens).*' of shape .*; experts have matrices lora_A and lora_B",
    ),
    "no weights": (partial(tensors, edit=dict.clear), X + r" has no LoRA weights"),
    "a module that is not there": (
        partial(tensors, edit=partial(move, old="layers.1", new="layers.9")),
        r"Expert g/x adapts 'model.layers.9.*', which the base model does not have; it is of another base model",
    ),
    "a module of another kind": (
        partial(tensors, edit=partial(move, old=Q0, new="model.embed_tokens")),
        r"Expert g/x adapts 'model.embed_tokens' from 32 to 32 features, and in the base model that is a Embedding of "
        r"no such sizes; it is of another base model",
    ),
    "other inputs": (
        partial(tensors, edit=put(lambda a: torch.cat([a, a], dim=1), A0)),
        rf"Expert g/x adapts '{Q0}' from 64 to 32 features, and in the base model that is a Linear of \(32, 32\)",
    ),
    "other outputs": (
        partial(tensors, edit=put(lambda b: b[:16], B0)),
        rf"Expert g/x adapts '{Q0}' from 32 to 16 features, and in the base model that is a Linear of \(32, 32\)",
    ),
    "no A": (partial(tensors, edit=drop(A0)), X + rf" has only lora_B at '{Q0}'; save it anew"),
    "no B": (partial(tensors, edit=drop(B0)), X + rf" has only lora_A at '{Q0}'; save it anew"),
    "another rank": (
        partial(change, r=8),
        X + r" has lora_A \(4, \d+\) and lora_B \(\d+, 4\) at '.*', and its config has rank 8 there; they belong to",
    ),
    "ranks that differ": (
        partial(tensors, edit=put(lambda a: a[:3], A0)),
        X + rf" has lora_A \(3, 32\) and lora_B \(32, 4\) at '{Q0}', and its config has rank 4 there",
    ),
    "a pattern that is a list": (
        partial(change, rank_pattern=["q_proj"]),
        r"rank_pattern with \['q_proj'\]; it maps names or regexes to numbers above 0",
    ),
    "a pattern that is no regex": (
        partial(change, alpha_pattern={"(q_proj": 2}),
        r"alpha_pattern with \{'\(q_proj': 2\}; it maps names or regexes",
    ),
    "a rank of 0 by pattern": (partial(change, rank_pattern={"q_proj": 0}), r"rank_pattern with 'q_proj'; it maps"),
    "another rank by a pattern": (
        partial(change, rank_pattern={"q_proj": 2}),
        X + r" has lora_A \(4, 32\) and lora_B \(32, 4\) at '.*q_proj', and its config has rank 2 there",
    ),
    "an empty tensor": (
        partial(tensors, edit=put(lambda a: a[:0], A0)),
        X + rf" has lora_A \(0, 32\) .* at '{Q0}'.*or were saved without being gathered",
    ),
    "weights that are no numbers": (
        partial(tensors, edit=put(partial(set_element, value=torch.nan), A0)),
        X + rf" has weights at '{Q0}' that are not finite; train or save it anew",
    ),
    "infinite weights": (
        partial(tensors, edit=put(partial(set_element, value=-torch.inf), B0)),
        X + rf" has weights at '{Q0}' that are not finite",
    ),
    "an alpha that is no number": (partial(change, lora_alpha=float("nan")), X + r" has alpha nan at "),
    "an alpha that is text": (partial(change, lora_alpha="16"), X + r" has alpha '16' at "),
    "an alpha that is none": (
        partial(change, alpha_pattern={"q_proj": None}),
        X + r" has alpha_pattern with 'q_proj'; it maps names or regexes to numbers above 0",
    ),
    "no folder": (lambda folder: str(folder / "nowhere"), NO_CONFIG + r" in .*/nowhere; give the folder of an adapter"),
    "no folder here": (lambda folder: "./nowhere", NO_CONFIG + r" in nowhere; give the folder of an adapter"),
    "no subfolder": (partial(entry, subfolder="nowhere"), NO_CONFIG + r" in .*/nowhere; give the folder"),
    "nothing on the Hub": (
        lambda folder: "someone/nowhere",
        X + r": no adapter_config.json in a folder or Hub repository of that name \(.*\); give the folder or Hub id",
    ),
    "no Hub id": (lambda folder: "no/such/hub/id", X + r": no adapter_config.json in a folder or Hub repository"),
    "a file": (lambda folder: str(Path(lora(folder)) / WEIGHTS), NO_CONFIG + r" in .*safetensors; give the folder"),
    "no config": (partial(without, name=CONFIG), NO_CONFIG + r" in .*; give the folder of an adapter"),
    "no weights file": (partial(without, name=WEIGHTS), X + r".*no adapter_model.safetensors in .*; give the folder"),
    "a config that is no JSON": (
        partial(write, config=b'{"peft_type": "LORA", '),
        X + r" has a broken adapter_config.json \(.*line 1.*\); fetch or save it anew",
    ),
    "a config that is no text": (partial(write, config=b"\xff\xfe{"), X + r" has a broken adapter_config.json"),
    "a config that is a list": (
        partial(write, config=b"[1]"),
        X + r" has a adapter_config.json without a peft_type; give the folder of an adapter",
    ),
    "the config of a model": (
        partial(write, config=b'{"model_type": "llama"}'),
        X + r" has a adapter_config.json without a peft_type",
    ),
    "weights that end early": (
        partial(cut, length=1000),
        X + r" has a broken adapter_model.safetensors \(.*\); fetch or save it anew",
    ),
    "weights that are empty": (partial(cut, length=0), X + r" has a broken adapter_model.safetensors"),
    "weights that are something else": (
        partial(write, weights=b"version https://git-lfs.github.com/spec/v1"),
        X + r" has a broken adapter_model.safetensors",
    ),
    "a pickle": (only_pickle, ONLY_PICKLE.format("adapter_model.bin")),
    "a pickle of another name": (partial(only_pickle, name="adapter_model.pt"), ONLY_PICKLE.format("adapter_model.pt")),
    "other weights than noted": (
        partial(entry, sha256="00"),
        X + r" has other weights than when its sha256 '00' was noted \(now '[0-9a-f]{64}'\); leave sha256 out",
    ),
    "a revision of a folder": (
        partial(entry, revision="v1"),
        X + r" is a folder here, which has no revision 'v1'; leave revision out",
    ),
    "what was in a model's memory": (
        partial(entry, loaded=True),
        X + r" was an adapter in a model's memory; give the folder or Hub id of it",
    ),
    "whole numbers": (
        partial(tensors, edit=put(torch.Tensor.int, A0)),
        X + r" has '.*lora_A.weight' in torch.int32; save it in one of \['torch.float32', ",
    ),
    "a matrix under two names": (
        partial(tensors, edit=put_twice),
        X + rf" has lora_A at '{Q0}' twice, under two names; save it anew",
    ),
    "a LoRA with a task": (
        partial(entry, task="icd"),
        X + r" is a stock LoRA and has no task 'icd'; leave 'task' out",
    ),
    "MOELoRA without a task": (
        moelora,
        X + r" is a MOELORA adapter; say which of its tasks: 'task': one of \['icd', 'rad', 'def'\]",
    ),
    "MOELoRA with another task": (partial(moelora, task="mri"), r"Unknown task 'mri'; this adapter knows 'icd' \(0\)"),
    "MOELoRA with a head": (
        partial(moelora, arch="llama", task="rad", modules_to_save=["lm_head"]),
        X + r" has the tensor '.*lm_head.*' beside its experts; train it without modules_to_save",
    ),
    "MOELoRA without a B": (
        partial(odd_moelora, edit=drop(HEAD)),
        X + r" lacks weights that its config names \(.*lora_B.*\); save it anew",
    ),
    "MOELoRA of other sizes": (
        partial(odd_moelora, r=16),
        X + r" lacks weights that its config names \((.|\n)*size mismatch",
    ),
    "MOELoRA of the future": (
        partial(odd_moelora, gate_mode="sharp"),
        X + r" has gate_mode='sharp', which this version of peft_moe does not know",
    ),
    "MOELoRA with weights that are no numbers": (
        partial(odd_moelora, edit=put(partial(set_element, value=torch.nan), HEAD)),
        X + rf" has weights at '{Q0}' that are not finite",
    ),
}
ERRORS = (ValueError, FileNotFoundError)
LATE = {"a module that is not there", "a module of another kind", "other inputs", "other outputs"}


def assert_untouched(base, arch):
    fresh, inputs = make_model(arch), make_inputs(arch)
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert not any("forward" in vars(module) or "generate" in vars(module) for module in base.modules())
    assert not hasattr(base, "peft_config")
    assert all(p.requires_grad for p in base.parameters())
    assert torch.equal(logits(base, inputs), logits(fresh, inputs))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # peft's, of the LoRA on embeddings
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_an_expert_is_refused_with_reason_and_remedy_and_leaves_the_model(case, folders, tmp_path):
    make, message = BAD[case]
    source = make(tmp_path)
    arch = {"a classifier": "bert", "a LoRA on a convolution": "vit"}.get(case, "llama")
    base, a = make_model(arch), folders(arch)["a"]
    with pytest.raises(ERRORS, match=message):
        get_peft_model(base, GroupedMoeConfig(groups={"f": {"a": a}, "g": {"b": a, "x": source}}))
    assert_untouched(base, arch)
    assert not (tmp_path / "exploded").exists()
    if case not in LATE:  # what is wrong with itself is wrong wherever it is to go
        with pytest.raises(ERRORS, match=message.replace("Expert g/x", "triage")):
            read_expert(source, name="triage")


def test_a_pickle_that_would_explode_does_when_it_is_loaded(tmp_path):
    only_pickle(tmp_path)
    pickle.loads((tmp_path / "adapter_model.bin").read_bytes()).close()
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("field", ["use_future", "future_config", "future_list", "future_number"])
def test_a_field_that_is_not_known_and_off_does_no_harm(field, folders, tmp_path):
    """An adapter that was saved by a later peft whose new features it does not use."""
    off = {"use_future": False, "future_config": None, "future_list": [], "future_number": 0}[field]
    a, inputs = folders("llama")["a"], make_inputs("llama")
    source = set_config(shutil.copytree(a, tmp_path / "a"), **{field: off}, peft_version="99.0")
    expected = logits(as_expert("llama", a, folders), inputs)
    assert torch.equal(logits(as_expert("llama", source, folders), inputs), expected)


def test_nothing_that_a_source_names_is_imported(folders, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    source = shutil.copytree(folders("llama")["a"], tmp_path / "a")
    mapping = {"base_model_class": "Trap", "parent_library": "trap"}
    (source / "handler.py").write_text("import trap")
    set_config(source, auto_mapping=mapping, megatron_core="trap", base_model_name_or_path=None)
    model = as_expert("llama", source, folders)
    model.save_pretrained(tmp_path / "saved")
    PeftModel.from_pretrained(make_model("llama"), tmp_path / "saved")
    assert "trap" not in sys.modules
    assert not (tmp_path / "sprung").exists()
    assert "trap" not in (tmp_path / "saved" / CONFIG).read_text()


def test_a_general_expert_is_checked_as_others_are(folders, tmp_path):
    base, good = make_model("llama"), folders("llama")["a"]
    for make, message in ((lora, "is a DoRA"), (partial(tensors, edit=drop(A0)), "has only lora_B")):
        source = make(tmp_path, use_dora=True) if make is lora else make(tmp_path)
        with pytest.raises(ValueError, match=rf"Expert general_expert \(.*\) {message}"):
            get_peft_model(base, GroupedMoeConfig(groups={"f": {"a": good}}, general_expert=source))
        assert_untouched(base, "llama")


def test_a_second_adapter_that_cannot_be_made_leaves_the_first(folders, tmp_path):
    model, inputs = as_expert("llama", folders("llama")["a"], folders), make_inputs("llama")
    before, state_dict = logits(model, inputs), get_peft_model_state_dict(model)
    bad = GroupedMoeConfig(task_type="CAUSAL_LM", groups={"g": {"x": lora(tmp_path, use_dora=True)}})
    with pytest.raises(ValueError, match="is a DoRA"):
        model.add_adapter("second", bad)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, inputs), before)
    assert not [name for name, _ in model.named_modules() if "second" in name]
    good = GroupedMoeConfig(task_type="CAUSAL_LM", groups={"g": {"x": folders("llama")["b"]}})
    model.add_adapter("second", good)
    assert torch.equal(logits(model, inputs), before)
    model.set_adapter("second")
    expected = logits(PeftModel.from_pretrained(make_model("llama"), folders("llama")["b"]).eval(), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, state_dict[name]) for name, value in get_peft_model_state_dict(model).items())


def test_no_part_of_an_expert_is_left_out(folders):
    base = make_model("llama")
    with pytest.raises(
        ValueError, match=r"Experts adapt '.*q_proj', which target_modules or exclude_modules leave out"
    ):
        get_peft_model(base, GroupedMoeConfig(groups={"g": {"a": folders("llama")["a"]}}, exclude_modules=["q_proj"]))
    assert_untouched(base, "llama")


# the config


SOURCE = "some/folder"
ONE = {"g": {"x": SOURCE}}
FULL = {"groups": {"g": {"x": SOURCE, "y": SOURCE}}, "general_expert": SOURCE}
REFUSED = [
    ({}, r"groups=\{\}; give \{'group': \{'expert': 'folder or Hub id', ...\}, ...\}"),
    ({"groups": None}, r"groups=None; give"),
    ({"groups": ["a", "b"]}, r"groups=\['a', 'b'\]; give"),
    ({"groups": {"g": {}}}, r"groups\['g'\]=\{\}; give a mapping of at least one expert to its source"),
    ({"groups": {"g": []}}, r"groups\['g'\]=\{\}; give a mapping of at least one expert"),
    ({"groups": {"g": "folder"}}, r"groups\['g'\]='folder'; give a mapping of at least one expert"),
    ({"groups": {"g": [{"x": SOURCE}]}}, r"groups\['g'\]=\[\{'x': 'some/folder'\}\]; give a mapping"),
    ({"groups": {"g": ["a", "b", "a"]}, "train_experts": True}, r"groups\['g'\]=\['a', 'b', 'a'\] names an expert tw"),
    ({"groups": {"g": {"x/y": SOURCE}}}, r"'x/y' in groups is no name; use a text without '/'"),
    ({"groups": {"g/h": {"x": SOURCE}}}, r"'g/h' in groups is no name"),
    ({"groups": {"": {"x": SOURCE}}}, r"'' in groups is no name"),
    ({"groups": {"g": {1: SOURCE}}}, r"1 in groups is no name"),
    ({"groups": {"g": {"x": 5}}}, r"Expert g/x has the source 5; give a folder or Hub id, or \{'source': ...,"),
    ({"groups": {"g": {"x": ""}}}, r"Expert g/x has the source ''; give a folder or Hub id"),
    ({"groups": {"g": {"x": {"task": "a"}}}}, r"Expert g/x has the source \{'task': 'a'\}; give a folder"),
    ({"groups": {"g": {"x": {"source": SOURCE, "branch": "v1"}}}}, r"Expert g/x has \['branch'\] in its source; kno"),
    ({"groups": ONE, "general_expert": 5}, r"The general expert has the source 5; give a folder or Hub id"),
    ({"groups": ONE, "general_expert": {"source": SOURCE, "tsak": 1}}, r"The general expert has \['tsak'\] in its s"),
    ({"groups": {"g": {"x": None}}}, r"Experts \['g/x'\] have no source, .*; name trained LoRAs, or set train_exp"),
    ({"groups": {"g": ["x", "y"]}}, r"Experts \['g/x', 'g/y'\] have no source"),
    ({"groups": ONE, "target_modules": ["q_proj"]}, r"target_modules=\{'q_proj'\} is for new experts; .*leave it out"),
    ({"groups": ONE, "layers_to_transform": [0]}, r"layers_to_transform=\[0\] selects among target_modules.*leave"),
    ({"groups": ONE, "mix": 0.5}, r"mix=0.5 and learn_mix=False share .* a general expert, and there is none; give ge"),
    ({"groups": ONE, "learn_mix": True}, r"mix=None and learn_mix=True share .* general expert, and there is none"),
    ({**FULL, "mix": 1.5}, r"mix=1.5 is the share of the mixture; give a number from 0 to 1"),
    ({**FULL, "mix": -0.1}, r"mix=-0.1 is the share"),
    ({**FULL, "mix": True}, r"mix=True is the share"),
    ({**FULL, "mix": "0.5"}, r"mix='0.5' is the share"),
    ({**FULL, "mix": 0, "learn_mix": True}, r"mix=0 is where learn_mix cannot start, .*; use 0.01 to 0.99"),
    ({**FULL, "mix": 1.0, "learn_mix": True}, r"mix=1.0 is where learn_mix cannot start"),
    ({**FULL, "learn_mix": 1}, r"learn_mix=1 is a yes or no; give True or False"),
    ({**FULL, "router_input": "sentence"}, r"router_input='sentence' is not known; use one of \('token', 'prompt'\)"),
    ({**FULL, "within_group": "fixed"}, r"within_group='fixed' is not known; use one of \('projection', 'static'\)"),
    ({**FULL, "group_temperature": 0}, r"group_temperature=0 is a temperature; give a number from 0.01 up"),
    ({**FULL, "group_temperature": "hot"}, r"group_temperature='hot' is a temperature"),
    ({**FULL, "expert_temperature": float("inf")}, r"expert_temperature=inf is a temperature"),
    ({**FULL, "expert_temperature": float("nan")}, r"expert_temperature=nan is a temperature"),
    ({**FULL, "flat_routing": "yes"}, r"flat_routing='yes' is a yes or no"),
    ({**FULL, "train_experts": None}, r"train_experts=None is a yes or no"),
    ({**FULL, "router_norm": 0}, r"router_norm=0 is a yes or no"),
    ({**FULL, "check_base_model": "no"}, r"check_base_model='no' is a yes or no"),
    ({**FULL, "num_experts": 2}, r"num_experts=2, and groups name 3; leave it out"),
    ({**FULL, "r": 0}, r"r=0 is the rank of a new expert; give a whole number from 1 up"),
    ({**FULL, "rank_pattern": {"q_proj": 4}}, r"bring their own ranks and alphas; leave the \*_pattern fields out"),
    ({**FULL, "alpha_pattern": {"q_proj": 4}}, r"leave the \*_pattern fields out"),
    ({**FULL, "num_experts_pattern": {"q_proj": 4}}, r"leave the \*_pattern fields out"),
    ({**FULL, "expert_order": ["g/x", "g/z"]}, r"expert_order=\['g/x', 'g/z'\] does not have the names"),
    ({**FULL, "bias": "everything"}, r"bias='everything' is not known"),
    ({**FULL, "lora_dropout": 0.1}, r"lora_dropout=0.1 drops inputs of experts in training, and these are frozen"),
    ({**FULL, "lora_dropout": 1.0}, r"lora_dropout=1.0 is a probability"),
    ({**FULL, "group_weights": {"weights": {"h": 1.0}}}, r"'h' is no group; there are \['g'\]"),
    ({**FULL, "group_weights": {"style": 1.0}}, r"\{'style': 1.0\} fixes no weights; give a mapping of some of"),
    ({**FULL, "group_weights": 1.0}, r"1.0 fixes no weights"),
    ({"groups": ONE, "group_weights": {"mix": 0.5}}, r"mix=0.5: the adapter has no general expert to share with"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_config_that_contradicts_itself_is_refused_before_anything_is_read(fields, message):
    with pytest.raises(ValueError, match=message):
        GroupedMoeConfig(**fields)


def test_a_config_counts_its_experts_and_names_them():
    config = GroupedMoeConfig(groups={"g": {"x": SOURCE, "y": SOURCE}, "h": {"x": SOURCE}}, general_expert=SOURCE)
    assert (config.num_experts, config.names) == (4, {"g": ["x", "y"], "h": ["x"]})
    assert list(config.sources) == ["g/x", "g/y", "h/x", "general_expert"]
    assert GroupedMoeConfig(groups=ONE).start_mix == 1.0
    assert config.start_mix == 0.5
    assert GroupedMoeConfig(**FULL, mix=0.25).start_mix == 0.25


def test_a_config_keeps_the_order_of_its_names_in_json(tmp_path):
    groups = {"z": {"b": SOURCE, "a": SOURCE, "c": SOURCE}, "a": {"z": SOURCE}, "m": {"y": SOURCE, "x": SOURCE}}
    config = GroupedMoeConfig(groups=groups, general_expert=SOURCE)
    config.save_pretrained(tmp_path)
    assert list(json.loads((tmp_path / CONFIG).read_text())["groups"]) == ["a", "m", "z"]  # peft sorts
    loaded = GroupedMoeConfig.from_pretrained(tmp_path)
    assert list(loaded.sources) == ["z/b", "z/a", "z/c", "a/z", "m/y", "m/x", "general_expert"]
    assert [(group, list(names)) for group, names in loaded.groups.items()] == [
        (group, list(names)) for group, names in groups.items()
    ]


def test_a_config_of_experts_in_memory_is_not_saved(folders, tmp_path):
    config = GroupedMoeConfig(groups={"g": {"x": read_expert(folders("llama")["a"])}})
    with pytest.raises(ValueError, match="holds experts that are in memory; make the adapter first"):
        config.save_pretrained(tmp_path)
