"""Files that are cut off, foreign, of other shapes, not finite or newer: a clear error, and nothing is changed."""

import json
import shutil
import warnings

import pytest
import torch
from broken_files import (
    BREAKS,
    CONFIG,
    IN_THE_FILE,
    IN_THE_TENSORS,
    METHODS,
    OTHER,
    WEIGHTS,
    make_adapter,
    save_all,
    set_field,
    to_pickle,
)
from helpers import logits, routed_layers
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tiny_models import make_inputs, make_model

from peft_moe import MoeLoraConfig, __version__, fold
from peft_moe.cli import main
from peft_moe.saved import FORMAT

INPUTS = make_inputs("llama")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = save_all(tmp_path_factory.mktemp("saved"))
    make_model("llama").save_pretrained(folder / "base")
    return folder


@pytest.fixture
def adapter(saved, request):
    """A copy of a good adapter, to be broken, beside those it can be mixed up with."""
    folder = saved / "broken"
    folder.mkdir()

    def copy(method):
        shutil.copytree(saved / method, folder / method)
        return folder / method

    for other in saved.iterdir():
        if other.is_dir() and other.name not in ("broken", *METHODS):
            (folder / other.name).symlink_to(other)
    yield copy
    shutil.rmtree(folder)


def everything(model):
    """All that a failed load could have changed."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": model.training,
        "adapters": sorted(getattr(model, "peft_config", {})),
        "active": getattr(model, "active_adapters", None) if isinstance(model, PeftModel) else None,
        "logits": logits(model, INPUTS),
    }


def assert_unchanged(model, before):
    after = everything(model)
    for name in ("tensors",):
        assert after[name].keys() == before[name].keys()
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in after.pop(name).items())
        before = {key: value for key, value in before.items() if key != name}
    assert torch.equal(after.pop("logits"), before["logits"])
    assert after == {key: value for key, value in before.items() if key != "logits"}


def fails(what, message, *arguments, **keywords):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # peft's, of a newer config
        with pytest.raises(ValueError, match=message):
            what(*arguments, **keywords)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_adapter_is_refused_and_the_model_stays_as_it_was(broken, method, adapter, saved):
    folder = adapter(method)
    break_it, message = BREAKS[broken]
    if broken == "of another method":
        shutil.copytree(saved / METHODS[METHODS.index(method) - 1], folder.parent / METHODS[METHODS.index(method) - 1])
    break_it(folder)
    base = make_model("llama")
    before = everything(base)
    fails(PeftModel.from_pretrained, message, base, folder)
    assert_unchanged(base, before)
    model = PeftModel.from_pretrained(base, saved / method)  # which is as good as ever
    before = everything(model)
    fails(model.load_adapter, message, folder, "second")
    assert_unchanged(model, before)
    model.load_adapter(saved / method, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model, INPUTS), before["logits"])


def break_all(adapter, saved, method, breaks):
    """Folders of a method's adapter, each broken in another way, and what the errors say."""
    for broken, (break_it, message) in breaks.items():
        folder = adapter(method)
        beside = folder.parent / METHODS[METHODS.index(method) - 1]
        if broken == "of another method":
            beside.symlink_to(saved / beside.name)
        break_it(folder)
        yield folder, message
        shutil.rmtree(folder)
        beside.unlink(missing_ok=True)


@pytest.mark.parametrize("method", METHODS)
def test_what_trainer_resumes_from_is_looked_at_before_the_adapter_that_is_there_changes(method, adapter, saved):
    model = make_adapter(method, saved, seed=1)
    before = everything(model)
    for folder, message in break_all(adapter, saved, method, IN_THE_FILE | IN_THE_TENSORS):
        if IN_THE_FILE["empty"][1] == message or message == "has no tensors":
            with pytest.raises(Exception, match=r".") as raised:  # safetensors', torch's and peft's own words
                model.load_adapter(folder, "default", is_trainable=True)
            assert not isinstance(raised.value, AssertionError)
        else:
            fails(model.load_adapter, message, folder, "default", is_trainable=True)
            fails(set_peft_model_state_dict, message, model, load_file(folder / WEIGHTS))
        assert_unchanged(model, before)


@pytest.mark.parametrize(("method", "low_cpu_mem_usage"), [("molora", False), ("moelora", True), ("at_moe", True)])
def test_other_ways_to_load_say_the_same(method, low_cpu_mem_usage, adapter, saved):
    for folder, message in break_all(adapter, saved, method, IN_THE_TENSORS):
        set_field(folder, base_model_name_or_path=str(saved / "base"))
        fails(AutoPeftModelForCausalLM.from_pretrained, message, folder, low_cpu_mem_usage=low_cpu_mem_usage)


ROUTING = {"weights": {"f": {"a": 1.0}, "s": {"c": 1.0}}, "group_weights": {"f": 1.0}, "mix": 1.0}


@pytest.mark.parametrize(
    ("method", "how", "flags"),
    [
        ("moelora", {"task": "icd"}, ["--task", "icd"]),
        ("at_moe", {"routing": ROUTING}, ["--routing", json.dumps(ROUTING)]),
    ],
)
def test_nothing_is_folded_from_a_broken_adapter(method, how, flags, adapter, saved, tmp_path, capsys):
    fold(saved / method, tmp_path / "good", **how)  # so that what follows fails for what is broken
    left_out = ("of another base model",)  # there is none to compare with
    breaks = {name: entry for name, entry in BREAKS.items() if name not in left_out}
    for folder, _ in break_all(adapter, saved, method, breaks):
        fails(fold, ".", folder, tmp_path / "folded", **how)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
            assert main(["fold", str(folder), "--out", str(tmp_path / "folded"), *flags]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_an_adapter_that_the_error_of_another_would_not_describe_is_not_folded(adapter, saved, tmp_path):
    folder = adapter("moelora")
    BREAKS["without routers"][0](folder)
    fails(fold, f"does not have what its config says .*{OTHER}", folder, tmp_path / "folded", task="icd")
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS} in "):
        fold(folder, tmp_path / "folded", task="icd")


# what is good


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_were_pickled_load_as_in_peft(method, adapter, saved):
    folder = adapter(method)
    to_pickle(folder)
    expected = logits(PeftModel.from_pretrained(make_model("llama"), saved / method), INPUTS)
    assert torch.equal(logits(PeftModel.from_pretrained(make_model("llama"), folder), INPUTS), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_format_is_saved_and_an_adapter_from_before_there_was_one_loads(method, adapter, saved):
    folder = adapter(method)
    config = json.loads((folder / CONFIG).read_text())
    assert config.pop("moe_format") == FORMAT == 1
    assert config.pop("moe_version") == __version__
    (folder / CONFIG).write_text(json.dumps(config))
    expected = logits(PeftModel.from_pretrained(make_model("llama"), saved / method), INPUTS)
    assert torch.equal(logits(PeftModel.from_pretrained(make_model("llama"), folder), INPUTS), expected)


def test_a_field_that_is_not_known_is_peft_s_warning(adapter):
    folder = adapter("moelora")
    set_field(folder, new_field=1)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['new_field'\]"):
        PeftModel.from_pretrained(make_model("llama"), folder)


def test_a_config_from_a_folder_makes_a_new_adapter(saved):
    config = MoeLoraConfig.from_pretrained(saved / "moelora")
    config.inference_mode = False
    model = get_peft_model(make_model("llama"), config)
    assert all(p.requires_grad for name, p in model.named_parameters() if "moelora" in name)


def test_a_config_that_was_read_by_the_user_is_as_good_as_one_that_peft_reads(adapter, saved):
    folder = adapter("molora")
    BREAKS["NaN"][0](folder)
    for config_cls in (PeftConfig, MoeLoraConfig):  # either gives the config that the file names
        config = config_cls.from_pretrained(saved / "molora")
        assert type(config).__name__ == "MoLoraConfig"
        PeftModel.from_pretrained(make_model("llama"), saved / "molora", config=config)
        fails(PeftModel.from_pretrained, "NaN", make_model("llama"), folder, config=config)


def test_a_lost_head_is_named(adapter, tmp_path):
    model = make_adapter("molora", tmp_path, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "saved")
    base, before = make_model("llama"), everything(make_model("llama"))
    assert torch.equal(
        logits(PeftModel.from_pretrained(make_model("llama"), tmp_path / "saved"), INPUTS), logits(model, INPUTS)
    )
    tensors = load_file(tmp_path / "saved" / WEIGHTS)

    save_file({k: v for k, v in tensors.items() if "lm_head" not in k}, tmp_path / "saved" / WEIGHTS)
    fails(
        PeftModel.from_pretrained,
        "lacks 'lm_head', which the config names in modules_to_save",
        base,
        tmp_path / "saved",
    )
    assert_unchanged(base, before)


def test_a_save_after_a_refused_load_holds_the_adapter_that_was_there(adapter, saved, tmp_path):
    model = PeftModel.from_pretrained(make_model("llama"), saved / "moelora")
    folder = adapter("moelora")
    BREAKS["NaN"][0](folder)
    fails(model.load_adapter, "NaN", folder, "second")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    kept = get_peft_model_state_dict(model)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in load_file(tmp_path / WEIGHTS).items())


def test_deleting_an_adapter_that_is_not_active_leaves_the_others_frozen_or_trained(saved):
    for trainable in (True, False):
        model = PeftModel.from_pretrained(make_model("llama"), saved / "moelora", is_trainable=trainable)
        model.load_adapter(saved / "moelora", "second")
        before = {name: p.requires_grad for name, p in model.named_parameters() if ".second." not in name}
        assert any(before.values()) == trainable
        model.delete_adapter("second")
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_new_adapter_made_of_a_config_that_was_read_survives_weights_that_do_not_fit(saved):
    model = get_peft_model(make_model("llama"), MoeLoraConfig.from_pretrained(saved / "moelora", inference_mode=False))
    before = logits(model, INPUTS)
    weights = get_peft_model_state_dict(model)
    weights.pop(next(iter(weights)))
    with pytest.raises(ValueError, match="the file lacks 1 of them"):
        set_peft_model_state_dict(model, weights)
    assert torch.equal(logits(model, INPUTS), before)
    assert routed_layers(model)
