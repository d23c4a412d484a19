"""Putting LoRAs together: from a model, from a YAML file, from the Hub; and what the adapter remembers of them."""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from grouped_helpers import make_experts, make_lora
from helpers import logits, routed, routed_layers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny_models import TASK_TYPES, make_inputs, make_model

from peft_moe import GroupedMoeConfig, compose, from_loras, read_expert
from peft_moe.cli import main

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of trained LoRAs by architecture and name, made when they are asked for."""
    return partial(make_experts, tmp_path=tmp_path_factory.mktemp("experts"))


def groups_of(names):
    """Groups and experts in an order that is not that of their names, as JSON would have them."""
    return {"s": {"c": names["c"]}, "f": {"b": names["b"], "a": names["a"]}}


def same_adapter(model, other):
    """Whether two models have adapters of the same tensors, bit by bit."""
    state_dict, others = get_peft_model_state_dict(model), get_peft_model_state_dict(other)
    return state_dict.keys() == others.keys() and all(torch.equal(state_dict[name], others[name]) for name in others)


def read_config(folder):
    """A saved config, without the order that a set has in JSON."""
    config = json.loads((folder / CONFIG).read_text())
    return config | {"target_modules": sorted(config["target_modules"])}


def mix_up(model):
    """Routers that tell inputs apart, as after training."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "moelora_router" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


# from_loras


def with_loras(arch, folders, names=("a", "b", "c", "p")):
    """A model with stock LoRAs called lora-a and so on."""
    model = None
    for name in names:
        source, adapter = folders(arch)[name], f"lora-{name}"
        if model is None:
            model = PeftModel.from_pretrained(make_model(arch), source, adapter_name=adapter)
        else:
            model.load_adapter(source, adapter)
    return model.eval()


LOADED = {name: f"lora-{name}" for name in "abcp"}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
def test_loras_of_a_base_model_and_of_a_peft_model_make_the_same_adapter(arch, folders):
    inputs, task_type = make_inputs(arch, labels=False), TASK_TYPES[arch]
    fields = {"mix": 0.25, "within_group": "static", "task_type": task_type}
    config = GroupedMoeConfig(groups=groups_of(folders(arch)), general_expert=folders(arch)["p"], **fields)
    expected = get_peft_model(make_model(arch), config).eval()
    of_base = from_loras(make_model(arch), groups_of(folders(arch)), general_expert=folders(arch)["p"], **fields)
    of_loaded = from_loras(with_loras(arch, folders), groups_of(LOADED), general_expert="lora-p", **fields)
    for model in (of_base.eval(), of_loaded.eval()):
        assert type(model) is type(expected)
        assert list(model.peft_config) == ["default"]
        if arch != "bert":  # whose new head is drawn anew
            assert same_adapter(model, expected)
            assert torch.equal(logits(model, inputs), logits(expected, inputs))
        assert model.active_peft_config.expert_layout == expected.active_peft_config.expert_layout


def test_the_loras_are_gone_from_the_model_afterwards(folders):
    loaded, inputs = with_loras("llama", folders), make_inputs("llama")
    model = from_loras(loaded, {"f": {"a": "lora-a"}}, adapter_name="mixture").eval()
    assert list(model.peft_config) == ["mixture"]
    assert not [name for name, module in model.named_modules() if isinstance(module, LoraLayer) or "lora-" in name]
    torch.testing.assert_close(model.get_base_model()(**inputs).logits.detach(), logits(model, inputs))
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(make_model("llama"), inputs))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("moelora_router" in name for name in trained)


def test_loaded_adapters_and_folders_can_be_mixed(folders):
    inputs = make_inputs("llama")
    names = {**folders("llama"), "a": "lora-a", "p": "lora-p"}
    mixed = from_loras(with_loras("llama", folders, ("a", "p")), groups_of(names), general_expert="lora-p").eval()
    expected = from_loras(make_model("llama"), groups_of(folders("llama")), general_expert=folders("llama")["p"]).eval()
    assert same_adapter(mixed, expected)
    assert torch.equal(logits(mixed, inputs), logits(expected, inputs))


def test_the_task_type_is_that_of_the_first_expert_unless_it_is_given(folders):
    source = folders("llama")["a"]
    assert from_loras(make_model("llama"), {"g": {"x": source}}).active_peft_config.task_type == "CAUSAL_LM"
    model = from_loras(make_model("llama"), {"g": {"x": source}}, task_type=None)
    assert type(model) is PeftModel


def test_experts_that_have_been_read_already_are_sources(folders):
    experts = {name: read_expert(folders("llama")[name]) for name in "abc"}
    model = from_loras(make_model("llama"), groups_of(experts))
    assert same_adapter(model, from_loras(make_model("llama"), groups_of(folders("llama"))))


def test_new_experts_start_beside_loaded_ones(folders):
    loaded, inputs = with_loras("llama", folders, ("a",)), make_inputs("llama")
    expected = logits(loaded, inputs)
    model = from_loras(loaded, {"g": {"old": "lora-a", "new": None}}, train_experts=True, r=3).eval()
    with model.routing({"g": {"old": 1.0}}):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    with model.routing({"g": {"new": 1.0}}):
        torch.testing.assert_close(logits(model, inputs), logits(make_model("llama"), inputs))
    assert {ranks for entry in model.active_peft_config.expert_layout for ranks in [tuple(entry["ranks"])]} == {(2, 3)}


GROUPS = groups_of(LOADED)
WRONG = {
    "an adapter that is not loaded": (
        {"groups": {"g": {"x": "./lora-z"}}},
        r"Expert g/x \(./lora-z\): there is no adapter_config.json in lora-z; give the folder of an adapter",
    ),
    "a DoRA": ({"groups": {"g": {"x": "lora-dora"}}}, r"The loaded adapter 'lora-dora' is a DoRA"),
    "a task of a LoRA": (
        {"groups": {"g": {"x": {"source": "./lora-a", "task": "t"}}}},
        r"Expert g/x \(./lora-a\): there is no adapter_config.json",
    ),
    "weights that are not finite": (
        {"groups": {"g": {"x": "lora-nan"}}},
        r"The loaded adapter 'lora-nan' has weights at '.*' that are not finite",
    ),
    "no groups": ({"groups": {}}, r"groups=\{\}; give"),
    "a field that contradicts another": ({"groups": GROUPS, "learn_mix": True}, r"there is none; give general_expert"),
    "a field that is out of range": ({"groups": GROUPS, "group_temperature": 0}, r"group_temperature=0"),
    "a name that a module has": (
        {"groups": GROUPS, "adapter_name": "self_attn"},
        r"adapter_name='self_attn' is also part of the names of modules",
    ),
    "modules left out": (
        {"groups": GROUPS, "exclude_modules": ["q_proj"]},
        r"Experts adapt '.*q_proj', which target_modules or exclude_modules leave out",
    ),
    "fixed weights of no group": (
        {"groups": GROUPS, "group_weights": {"group_weights": {"h": 1.0}}},
        r"'h' is no group",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_when_something_is_wrong_the_loaded_loras_stay_as_they_were(case, folders):
    arguments, message = WRONG[case]
    loaded, inputs = with_loras("llama", folders), make_inputs("llama")
    loaded.add_adapter("lora-dora", LoraConfig(use_dora=True, target_modules=["q_proj"]))
    loaded.add_adapter("lora-nan", LoraConfig(target_modules=["v_proj"]))
    loaded.base_model.model.model.layers[1].self_attn.v_proj.lora_A["lora-nan"].weight.data[0] = torch.nan
    modules, before = dict(loaded.named_modules()), logits(loaded, inputs)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        from_loras(loaded, **arguments)
    assert dict(loaded.named_modules()) == modules
    assert torch.equal(logits(loaded, inputs), before)
    assert loaded.get_base_model().peft_config is loaded.peft_config
    loaded.set_adapter("lora-b")  # all of them are there and can still be used
    assert torch.equal(logits(loaded, inputs), logits(with_loras("llama", folders, ("b",)), inputs))
    model = from_loras(loaded, GROUPS).eval()
    expected = from_loras(make_model("llama"), groups_of(folders("llama"))).eval()
    assert torch.equal(logits(model, inputs), logits(expected, inputs))


@pytest.mark.parametrize("case", [case for case, (_, message) in WRONG.items() if "loaded adapter" not in message])
def test_when_something_is_wrong_a_base_model_stays_as_it_was(case, folders):
    arguments, message = WRONG[case]
    names = {LOADED[name]: folder for name, folder in folders("llama").items()}
    groups = {
        group: {name: names.get(source, source) if isinstance(source, str) else source for name, source in part.items()}
        for group, part in arguments["groups"].items()
    }
    base = make_model("llama")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        from_loras(base, **{**arguments, "groups": groups})
    assert not any("forward" in vars(module) for module in base.modules())
    assert not routed_layers(base)
    assert torch.equal(logits(base, make_inputs("llama")), logits(make_model("llama"), make_inputs("llama")))


def test_loras_that_are_merged_are_refused_since_they_would_count_twice(folders):
    loaded, inputs = with_loras("llama", folders, ("a", "b")), make_inputs("llama")
    loaded.merge_adapter(["lora-a"])
    with pytest.raises(ValueError, match=r"LoRAs are merged into the model's weights.*unmerge_adapter\(\)"):
        from_loras(loaded, {"g": {"x": "lora-b"}})
    loaded.unmerge_adapter()
    model = from_loras(loaded, {"g": {"x": "lora-b"}}).eval()
    expected = logits(with_loras("llama", folders, ("b",)), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_model_with_adapters_of_another_kind_is_refused():
    with pytest.raises(
        ValueError, match="The model has a MoeLoraModel already; give the base model, or one with stock"
    ):
        from_loras(routed("llama"), {"g": {"x": "a"}})


def test_an_adapter_of_loaded_loras_is_saved_and_loaded_as_any_other(folders, tmp_path):
    inputs = make_inputs("llama")
    model = mix_up(from_loras(with_loras("llama", folders), GROUPS, general_expert="lora-p")).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    origin = loaded.active_peft_config.groups["f"]["a"]
    assert (origin["source"], origin["loaded"], len(origin["sha256"])) == ("lora-a", True, 64)


# compose


@pytest.fixture
def write(folders, tmp_path):
    """Write a recipe over an architecture's LoRAs and a base folder that has no weights; returns its path."""

    def write_recipe(arch="llama", **fields):
        make_model(arch).config.save_pretrained(tmp_path / "base")
        names = folders(arch)
        recipe = {
            "base_model_name_or_path": str(tmp_path / "base"),
            "groups": groups_of(names),
            "general_expert": names["p"],
        }
        recipe = {name: value for name, value in (recipe | fields).items() if value is not None}
        path = tmp_path / "groups.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return write_recipe


FIELDS = {
    "plain": {},
    "of many fields": {
        "mix": 0.3,
        "learn_mix": True,
        "router_input": "prompt",
        "group_temperature": 0.5,
        "expert_temperature": 2.0,
        "router_norm": False,
    },
    "flat and static": {"flat_routing": True, "within_group": "static"},
    "without a general expert": {"general_expert": None},
    "with fixed weights": {"group_weights": {"weights": {"f": {"a": 1.0}}, "off": ["s"]}},
    "with routers that are not even": {"init_lora_weights": False},
    "with trained and new experts": {"train_experts": True, "r": 5, "lora_alpha": 10, "lora_dropout": 0.1},
}


@pytest.mark.parametrize(
    "how", [compose, lambda file, out: main(["compose", str(file), "--out", str(out)])], ids=["function", "command"]
)
@pytest.mark.parametrize("case", FIELDS)
def test_a_composed_adapter_is_what_get_peft_model_makes_of_the_same_fields(case, how, write, folders, tmp_path):
    names, fields = folders("llama"), FIELDS[case]
    groups = groups_of(names)
    if "r" in fields:
        groups["s"]["new"] = None
    config = {"task_type": "CAUSAL_LM", "general_expert": names["p"], **fields, "groups": groups}
    file = write(**{**fields, "groups": groups})
    torch.manual_seed(5)
    base = make_model("llama")
    base.name_or_path = str(tmp_path / "base")
    expected = get_peft_model(base, GroupedMoeConfig(**config))
    expected.save_pretrained(tmp_path / "expected")
    torch.manual_seed(5)
    assert how(file, tmp_path / "out") in (0, tmp_path / "out")
    state_dict, others = (load_file(tmp_path / folder / WEIGHTS) for folder in ("out", "expected"))
    assert state_dict.keys() == others.keys()
    assert all(torch.equal(state_dict[name], others[name]) for name in others)
    saved, other = (read_config(tmp_path / folder) for folder in ("out", "expected"))
    assert saved == other
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS, "README.md"}


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("t5", {}),
        ("bert", {"base_class": "AutoModelForSequenceClassification"}),
        ("vit", {"base_class": "AutoModelForImageClassification"}),
    ],
)
def test_a_composed_adapter_loads_without_its_sources(arch, fields, write, folders, tmp_path):
    names, inputs = folders(arch), make_inputs(arch, labels=False)
    moved = {name: str(shutil.copytree(folder, tmp_path / "sources" / name)) for name, folder in names.items()}
    file = write(arch, groups=groups_of(moved), general_expert=moved["p"], **fields)
    compose(file, tmp_path / "out")
    shutil.rmtree(tmp_path / "sources")
    shutil.rmtree(tmp_path / "base")
    base = make_model(arch)
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    for name, group in (("a", "f"), ("b", "f"), ("c", "s")):
        with model.routing({group: {name: 1.0}}, group_weights={group: 1.0}, mix=1.0):
            stock = PeftModel.from_pretrained(make_model(arch), names[name]).eval()
            torch.testing.assert_close(logits(model, inputs), logits(stock, inputs), rtol=1e-4, atol=1e-5)


def test_the_base_model_can_be_named_by_the_file_an_expert_or_the_caller(write, folders, tmp_path, capsys):
    file = write(base_model_name_or_path=None)
    assert main(["compose", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "names the base model; add base_model_name_or_path to the file" in capsys.readouterr().err
    assert main(["compose", str(file), "--out", str(tmp_path / "1"), "--base-model", str(tmp_path / "base")]) == 0
    named = shutil.copytree(folders("llama")["a"], tmp_path / "named")
    config = json.loads((named / CONFIG).read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    (named / CONFIG).write_text(json.dumps(config))
    file = write(base_model_name_or_path=None, groups={"g": {"x": str(named)}}, general_expert=None)
    assert main(["compose", str(file), "--out", str(tmp_path / "2")]) == 0
    for out in ("1", "2"):
        saved = json.loads((tmp_path / out / CONFIG).read_text())
        assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    assert "Its routers are new and weigh experts evenly until they are trained" in capsys.readouterr().out


def test_what_is_there_is_replaced_only_if_that_is_asked_for(write, tmp_path, capsys):
    file, out = write(), tmp_path / "out"
    command = ["compose", str(file), "--out", str(out)]
    out.mkdir()
    (out / "README.md").write_text("mine")
    assert main(command) == 1
    assert (out / "README.md").read_text() == "mine"
    (out / "README.md").unlink()
    (out / "notes.txt").write_text("mine")
    assert main(command) == 0
    before = (out / CONFIG).read_bytes()
    write(mix=0.125)
    assert main(command) == 1
    assert "already; choose another directory, or" in capsys.readouterr().err
    assert (out / CONFIG).read_bytes() == before
    assert main([*command, "--overwrite"]) == 0
    assert json.loads((out / CONFIG).read_text())["mix"] == 0.125
    assert (out / "notes.txt").read_text() == "mine"
    kept = (out / CONFIG).read_bytes()
    write(mix=7)
    assert main([*command, "--overwrite"]) == 1
    assert (out / CONFIG).read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "groups.yaml", "out"]


def test_an_expert_is_not_written_over(write, folders, tmp_path, capsys):
    own = shutil.copytree(folders("llama")["a"], tmp_path / "own")
    before = (own / CONFIG).read_bytes()
    file = write(groups={"g": {"x": str(own)}})
    assert main(["compose", str(file), "--out", str(own), "--overwrite"]) == 1
    assert f"{own} holds the adapter that this is made of" in capsys.readouterr().err
    assert (own / CONFIG).read_bytes() == before


REFUSED = {
    "a field that is none": ({"mixx": 0.5}, r"groups.yaml has \['mixx'\], which are no fields of GroupedMoeConfig"),
    "a value out of range": ({"mix": 2}, r"mix=2 is the share of the mixture; give a number from 0 to 1"),
    "no groups": ({"groups": None}, r"groups=None; give \{'group':"),
    "groups as a list": ({"groups": ["a", "b"]}, r"groups=\['a', 'b'\]; give"),
    "experts as a list of mappings": (
        {"groups": {"g": [{"x": "a"}]}},
        r"groups\['g'\]=\[\{'x': 'a'\}\]; give a mapping",
    ),
    "a source that is not there": (
        {"groups": {"g": {"x": "./nowhere"}}},
        r"Expert g/x \(./nowhere\): there is no adapter_config.json in nowhere; give the folder of an adapter",
    ),
    "a source that is nowhere": ({"groups": {"g": {"x": "me/nowhere"}}}, r"no adapter_config.json in a folder or Hub"),
    "a source with an unknown entry": (
        {"groups": {"g": {"x": {"source": "a", "branch": "b"}}}},
        r"Expert g/x has \['branch'\] in its source; known are \['source', 'revision', 'subfolder', 'task'\]",
    ),
    "a base model that is nowhere": ({"base_model_name_or_path": "me/nowhere"}, r"me/nowhere|huggingface.co"),
    "a class that is none": (
        {"base_class": "AutoModelForFun"},
        r"transformers has no 'AutoModelForFun' that makes models from configs; set base_class to a class such as",
    ),
    "a class of one architecture": (
        {"base_class": "LlamaForCausalLM"},
        r"no 'LlamaForCausalLM' that makes models from",
    ),
    "a class of other module names": (
        {"base_class": "AutoModel"},
        r"Expert s/c adapts 'model.layers.0.*', which the base model does not have; .* class of it",
    ),
    "a task type that is none": ({"task_type": "FUN"}, r"Invalid task type: 'FUN'"),
    "fixed weights that are none": (
        {"group_weights": {"style": 1}},
        r"\{'style': 1\} fixes no weights; give a mapping of",
    ),
    "fixed weights of no group": ({"group_weights": {"off": ["x"]}}, r"'x' is no group; there are \['s', 'f'\]"),
    "modules left out": (
        {"exclude_modules": ["q_proj"]},
        r"Experts adapt '.*q_proj', which target_modules or exclude_",
    ),
    "a module of the base model": (
        {"modules_to_save": ["lm_head"]},  # classifiers have one by their task type
        r"The adapter would hold 'base_model.model.lm_head.weight', a copy from the base model, whose weights are not",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_that_cannot_be_composed_ends_in_one_line_and_nothing_is_written(case, write, tmp_path, capsys):
    fields, message = REFUSED[case]
    with pytest.raises((ValueError, OSError), match=message):
        compose(write(**fields), tmp_path / "out")
    if case == "no groups":
        file = tmp_path / "groups.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "groups"}))
    assert main(["compose", str(tmp_path / "groups.yaml"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("peft-moe: ")
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "groups.yaml"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"No such file or directory: '.*groups.yaml'"),
        ("groups: [", r"groups.yaml cannot be read: while parsing"),
        ("a: b: c\nd: [", r"groups.yaml cannot be read: mapping values"),
        ("- a\n- b\n", r"groups.yaml holds a list; write one `name: value` per line"),
        ("", r"groups.yaml holds a NoneType; write one"),
        ("groups: !!python/object/apply:os.mkdir [exploded]", r"groups.yaml cannot be read: could not determine"),
    ],
)
def test_a_file_that_is_no_recipe_ends_in_one_line(content, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "groups.yaml").write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        compose("groups.yaml", "out")
    assert main(["compose", "groups.yaml", "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("peft-moe: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out").exists()


def test_relative_sources_are_from_where_the_command_runs(write, folders, tmp_path, monkeypatch):
    shutil.copytree(folders("llama")["a"], tmp_path / "here" / "a")
    file = write(groups={"g": {"x": "here/a"}}, general_expert=None)
    monkeypatch.chdir(tmp_path)
    assert compose(file, "out") == Path("out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["groups"]["g"]["x"]["source"] == "here/a"


# what the adapter remembers


def test_the_saved_config_has_the_source_and_sha256_of_every_expert(write, folders, tmp_path):
    out = compose(write(), tmp_path / "out")
    saved = json.loads((out / CONFIG).read_text())
    names = folders("llama")
    expected = {
        name: {
            "source": folder,
            "sha256": hashlib.sha256((Path(folder) / WEIGHTS).read_bytes()).hexdigest(),
        }
        for name, folder in names.items()
    }
    assert saved["groups"] == groups_of(expected)
    assert saved["general_expert"] == expected["p"]
    assert saved["num_experts"] == 4


def test_the_order_of_groups_and_experts_survives_saving(write, folders, tmp_path):
    inputs = make_inputs("llama")
    model = mix_up(PeftModel.from_pretrained(make_model("llama"), compose(write(), tmp_path / "out"))).eval()
    model.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "again").eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert {group: list(names) for group, names in loaded.active_peft_config.groups.items()} == {
        "s": ["c"],
        "f": ["b", "a"],
    }
    assert list(loaded.active_peft_config.groups) == ["s", "f"]
    for group, name in (("s", "c"), ("f", "b"), ("f", "a")):
        with loaded.routing({group: {name: 1.0}}, group_weights={group: 1.0}, mix=1.0):
            stock = PeftModel.from_pretrained(make_model("llama"), folders("llama")[name]).eval()
            torch.testing.assert_close(logits(loaded, inputs), logits(stock, inputs), rtol=1e-4, atol=1e-5)


def test_a_saved_config_has_no_constants_that_json_does_not_know(write, tmp_path):
    def refuse(constant):
        raise ValueError(constant)

    out = compose(write(), tmp_path / "out")
    json.loads((out / CONFIG).read_text(), parse_constant=refuse)


def test_what_is_remembered_is_kept_by_loading_training_and_saving(write, folders, tmp_path):
    adapter = compose(write(groups=groups_of(folders("llama"))), tmp_path / "0")
    first, inputs = read_config(adapter), make_inputs("llama")
    for i in range(2):
        model = PeftModel.from_pretrained(make_model("llama"), tmp_path / str(i), is_trainable=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()(**inputs).loss.backward()
        optimizer.step()
        model.save_pretrained(tmp_path / str(i + 1))
    last = read_config(tmp_path / "2")
    changed = {name for name in first if first[name] != last[name]}
    assert changed <= {"base_model_name_or_path", "inference_mode"}
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("0", "2"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "moelora_router" in name
    }


def test_a_config_that_remembers_makes_a_new_adapter_if_the_sources_are_the_same(write, folders, tmp_path):
    copies = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders("llama").items()}
    compose(write(groups=groups_of({name: str(path) for name, path in copies.items()})), tmp_path / "out")
    saved = GroupedMoeConfig.from_pretrained(tmp_path / "out")
    fields = {"groups": saved.groups, "general_expert": saved.general_expert, "task_type": "CAUSAL_LM"}
    again = get_peft_model(make_model("llama"), GroupedMoeConfig(**fields))
    assert same_adapter(again, PeftModel.from_pretrained(make_model("llama"), tmp_path / "out"))
    make_lora(tmp_path / "b", seed=99)
    with pytest.raises(ValueError, match=r"Expert f/b \(.*\) has other weights than when its sha256 '.*' was noted"):
        get_peft_model(make_model("llama"), GroupedMoeConfig(**fields))


def test_an_adapter_for_another_class_or_size_of_model_says_so(write, tmp_path):
    compose(write(), tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"has experts for 8 modules and the model has 0 .*; they differ in 'model.lay"
    ):
        PeftModel.from_pretrained(make_model("opt"), tmp_path / "out")


# the Hub

HUB = """
import json
import torch
import yaml
from grouped_helpers import make_lora
from helpers import logits
from huggingface_hub import HfApi, hf_hub_download
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny_models import make_inputs, make_model
from peft_moe import GroupedMoeConfig, compose, read_expert
from peft_moe.cli import main

api = HfApi()
inputs = make_inputs("llama")

def push(repo, seed, **fields):
    folder = make_lora(f"lora-{repo}-{seed}", seed=seed, **fields)
    if seed == 1:
        api.create_repo(repo)
    return api.upload_folder(repo_id=f"local/{repo}", folder_path=folder).oid

def alone(model, group, name):
    with model.routing({group: {name: 1.0}}, group_weights={group: 1.0}):
        return logits(model, inputs)

make_model("llama").push_to_hub("local/base")
"""


@pytest.mark.long
def test_experts_from_the_hub_are_of_the_revision_that_was_asked_for_and_note_their_commit(run_with_hub):
    done = run_with_hub(
        HUB
        + """
old = push("triage", 1)
new = push("triage", 2)
assert old != new
many = make_lora("many/styles/concise", seed=3)
api.create_repo("many")
many = api.upload_folder(repo_id="local/many", folder_path="many").oid
groups = {
    "f": {"old": {"source": "local/triage", "revision": old}, "new": "local/triage"},
    "s": {"concise": {"source": "local/many", "subfolder": "styles/concise"}},
}
yaml.safe_dump({"base_model_name_or_path": "local/base", "groups": groups}, open("groups.yaml", "w"))
assert main(["compose", "groups.yaml", "--out", "composed"]) == 0
saved = json.load(open("composed/adapter_config.json"))
found = saved["groups"]
assert saved["base_model_name_or_path"] == "local/base"
assert found["f"]["old"]["commit"] == found["f"]["old"]["revision"] == old
assert found["f"]["new"]["commit"] == new and "revision" not in found["f"]["new"]
assert found["s"]["concise"]["commit"] == many
assert found["s"]["concise"]["subfolder"] == "styles/concise"
assert found["f"]["old"]["sha256"] != found["f"]["new"]["sha256"]

base = type(make_model("llama")).from_pretrained("local/base")
model = PeftModel.from_pretrained(base, "composed").eval()
model.push_to_hub("local/composed")
pulled = AutoPeftModelForCausalLM.from_pretrained("local/composed").eval()
assert torch.equal(logits(pulled, inputs), logits(model, inputs))
assert pulled.active_peft_config.groups == found
for group, name, folder in (
    ("f", "old", "lora-triage-1"), ("f", "new", "lora-triage-2"), ("s", "concise", "many/styles/concise")
):
    stock = PeftModel.from_pretrained(make_model("llama"), folder).eval()
    torch.testing.assert_close(alone(pulled, group, name), logits(stock, inputs), rtol=1e-4, atol=1e-5)
assert main(["fold", "local/composed", "--routing", '{"weights": {"f": {"new": 1}}, "group_weights": {"f": 1}}',
             "--out", "folded"]) == 0
stock = PeftModel.from_pretrained(make_model("llama"), "folded").eval()
torch.testing.assert_close(logits(stock, inputs), alone(pulled, "f", "new"), rtol=1e-4, atol=1e-5)
print("done")
"""
    )
    assert done.stdout.strip().endswith("done")


@pytest.mark.long
def test_what_is_wrong_on_the_hub_is_said_in_a_sentence(run_with_hub):
    done = run_with_hub(
        HUB
        + """
import os
import pickle
import re

class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")

push("triage", 1)
folder = make_lora("pickled", seed=2)
os.remove("pickled/adapter_model.safetensors")
pickle.dump(Bomb(), open("pickled/adapter_model.bin", "wb"))
api.create_repo("pickled")
api.upload_folder(repo_id="local/pickled", folder_path="pickled")
api.create_repo("empty")
os.remove("pickled/adapter_model.bin")
api.create_repo("unsaved")
api.upload_folder(repo_id="local/unsaved", folder_path="pickled")
for source, message in (
    ("local/nothing", r"expert \\(local/nothing\\): no adapter_config.json in a folder or Hub repository of that name"),
    ("local/empty", r"no adapter_config.json in a folder or Hub repository of that name"),
    ("local/unsaved", r"no adapter_model.safetensors in a folder or Hub repository of that name"),
    ({"source": "local/triage", "revision": "v9"}, r"give the folder or Hub id of an adapter, and its revision"),
    ({"source": "local/triage", "subfolder": "x"}, r"no adapter_config.json in a folder or Hub repository"),
    ("local/pickled", r"its weights are a pickle file \\(adapter_model.bin\\), and opening one can run any code"),
):
    try:
        read_expert(source)
    except FileNotFoundError as error:
        assert re.search(message, str(error)), str(error)
        assert "\\n" not in str(error)
    else:
        raise AssertionError(source)
assert not os.path.exists("exploded")
print("done")
"""
    )
    assert done.stdout.strip().endswith("done")


def test_a_model_does_not_hold_its_experts_twice(folders):
    expert = read_expert(folders("llama")["a"])
    model = from_loras(make_model("llama"), {"f": {"a": expert}})
    config = model.peft_config["default"]
    assert config.as_given is config
    assert config.sources == {"f/a": expert.origin}
