"""Several adapters in one model, two alike and two that differ, as users of stock LoRA have them."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from grouped_helpers import answered, grouped, grouped_config
from helpers import (
    TARGETS,
    TASKS,
    adapter_gradients,
    config_for,
    logits,
    routed_layers,
    transformers_own_adapter_methods,
)
from kinds import KINDS, config_of, two_adapters
from peft import LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter as peft_hotswap_adapter
from tiny_models import make_inputs, make_model
from transformers import AutoModelForCausalLM

from peft_moe import MedMoeLoraConfig, MoLoraConfig, fold

PAIRS = pytest.mark.parametrize("same", [True, False], ids=["alike", "different"])
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loras")


def alone(model, name) -> PeftModel:
    """A model that has one of the adapters of another, with the same weights."""
    single = get_peft_model(make_model("llama"), config_like(model, name), adapter_name=name)
    weights = get_peft_model_state_dict(model, adapter_name=name)
    places = get_peft_model_state_dict(single, adapter_name=name)
    assert places.keys() == weights.keys()
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(weights[key])
    return single.eval()


def config_like(model, name):
    config = model.peft_config[name]
    return config.as_given if hasattr(config, "as_given") else config


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def of(model, name) -> set[str]:
    return {key for key, _ in model.named_parameters() if name in key.split(".")}


# -- the same for every config ----------------------------------------------------------------------------------------


@PAIRS
@EVERY_KIND
def test_each_does_what_it_does_alone_however_often_they_are_switched(kind, same, folder):
    model, inputs = two_adapters((kind, kind), "llama", folder, same=same), make_inputs("llama")
    assert trainable(model) == of(model, "one")
    expected = {name: logits(alone(model, name), inputs) for name in ("one", "two")}
    assert not torch.allclose(expected["one"], expected["two"], atol=1e-4)
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert trainable(model) == of(model, name)
        torch.testing.assert_close(logits(model, inputs), expected[name], atol=1e-6, rtol=1e-6)
        with model.disable_adapter():
            assert torch.equal(logits(model, inputs), logits(make_model("llama"), inputs))


@PAIRS
@EVERY_KIND
def test_the_active_one_can_be_deleted_and_added_again(kind, same, folder):
    model, inputs = two_adapters((kind, kind), "llama", folder, same=same), make_inputs("llama")
    expected = logits(model, inputs)
    model.set_adapter("two")
    with pytest.warns(UserWarning, match="Setting active adapter to one"):
        model.delete_adapter("two")
    assert not [key for key in model.state_dict() if "two" in key.split(".")]
    assert torch.equal(logits(model, inputs), expected)
    assert trainable(model) <= of(model, "one")
    model.add_adapter("two", config_of(kind, "llama", folder))
    model.set_adapter("two")
    torch.testing.assert_close(logits(model.eval(), inputs), logits(alone(model, "two"), inputs), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="Adapter x does not exist"):
        model.delete_adapter("x")


@PAIRS
@EVERY_KIND
def test_several_active_ones_add_up(kind, same, folder):
    """In the first block, whose input no adapter has changed."""
    model, inputs = two_adapters((kind, kind), "llama", folder, same=same), make_inputs("llama")
    layer, seen = model.get_base_model().model.layers[0].self_attn.q_proj, []
    layer.register_forward_hook(lambda _layer, _args, out: seen.append(out))
    with model.disable_adapter():
        logits(model, inputs)
    for active in (["one"], ["two"], ["one", "two"], ["two", "one"]):
        model.base_model.set_adapter(active)
        logits(model, inputs)
        assert trainable(model) == {key for name in active for key in of(model, name)}
    base, one, two, both, reversed_ = seen
    torch.testing.assert_close(both, one + two - base, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(reversed_, both, atol=1e-6, rtol=1e-5)


@PAIRS
@EVERY_KIND
def test_training_one_leaves_the_other_as_it_was(kind, same, folder):
    model, inputs = two_adapters((kind, kind), "llama", folder, same=same), answered("llama")
    model.set_adapter("two")
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tasks = {"task_ids": 0} if kind == "moelora" else {}
    model.train()(**inputs, **tasks).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= of(model, "two")


@PAIRS
@EVERY_KIND
def test_both_are_saved_and_loaded_again_under_other_names(kind, same, folder, tmp_path):
    model, inputs = two_adapters((kind, kind), "llama", folder, same=same), make_inputs("llama")
    expected = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "two", adapter_name="first").eval()
    loaded.load_adapter(tmp_path / "one", "second", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded, inputs), expected["two"])
    loaded.set_adapter("second", inference_mode=True)
    # tensors that stay in the file's memory lie at other addresses, for which some CPUs round differently
    torch.testing.assert_close(logits(loaded, inputs), expected["one"], rtol=1e-6, atol=1e-6)
    assert not trainable(loaded)
    loaded.load_adapter(tmp_path / "two", "third", is_trainable=True)
    loaded.set_adapter("third")
    assert trainable(loaded) == of(loaded, "third")
    assert len(trainable(loaded)) == len(of(model, "two"))
    assert torch.equal(logits(loaded.eval(), inputs), expected["two"])


# -- adapters of different types --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "other"), [*pairwise([*KINDS, "moelora"]), ("molora", "lora")])
def test_one_model_has_one_type_as_with_lora_and_loha(kind, other, folder):
    lora = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError) as of_lora:
        lora.add_adapter("two", LoHaConfig(target_modules=["q_proj"]))
    model = two_adapters((kind, kind), "llama", folder)
    config = LoraConfig(target_modules=["q_proj"]) if other == "lora" else config_of(other, "llama", folder)
    with pytest.raises(ValueError) as of_ours:
        model.add_adapter("three", config)
    types = [str(model.peft_config["one"].peft_type), str(config.peft_type)]
    words = str(of_lora.value).replace("PeftType.LOHA", types[1])
    assert str(of_ours.value) == words.replace("PeftType.LORA", types[0], 1)
    assert "three" not in model.peft_config
    assert not [key for key in model.state_dict() if "three" in key.split(".")]


# -- what is for LoRA only --------------------------------------------------------------------------------------------


@EVERY_KIND
def test_a_weighted_sum_says_why_not_and_what_instead(kind, folder, tmp_path):
    model = two_adapters((kind, kind), "llama", folder)
    with pytest.raises(NotImplementedError, match=r"cannot combine \['one', 'two'\].*set_adapter.*fold.*from_loras"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "three", combination_type="cat")
    assert set(model.peft_config) == {"one", "two"}


def test_the_way_by_folding_gives_the_weighted_sum(folder, tmp_path):
    model, inputs = two_adapters(("moelora", "moelora"), "llama", folder), make_inputs("llama")
    for name, task in (("one", "icd"), ("two", "u")):
        fold(model, tmp_path / name, task=task, adapter_name=name)
    lora = PeftModel.from_pretrained(make_model("llama"), tmp_path / "one", adapter_name="one")
    lora.load_adapter(tmp_path / "two", "two")
    lora.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="cat")
    lora.set_adapter("sum")
    model.base_model.set_adapter(["one", "two"])
    model.base_model.context.choose(0, ["one", "two"])  # icd, and u
    torch.testing.assert_close(logits(lora.eval(), inputs), logits(model, inputs), atol=1e-5, rtol=1e-5)


@EVERY_KIND
def test_what_peft_has_for_lora_only_is_refused_by_name(kind, folder, tmp_path):
    model = two_adapters((kind, kind), "llama", folder)
    model.save_pretrained(tmp_path)
    peft_type = model.peft_config["one"].peft_type.value
    with pytest.raises(ValueError, match=f"Hotswapping only supports LORA but {peft_type} was passed"):
        peft_hotswap_adapter(model, str(tmp_path / "one"), "one")
    with pytest.raises(ValueError, match="scaling is only supported for models with `LoraLayer`s"):
        rescale_adapter_scale(model, 0.5).__enter__()
    with pytest.raises(ValueError, match=f"'{peft_type}' is not compatible with the `PeftMixedModel`"):
        PeftMixedModel(make_model("llama"), config_of(kind, "llama", folder))
    with pytest.raises(ValueError, match="is not supported for mixed models"):
        PeftMixedModel.from_pretrained(make_model("llama"), tmp_path / "one")
    with pytest.raises(AttributeError, match="subtract_mutated_init"):
        model.subtract_mutated_init({}, "one")


def test_the_page_on_several_adapters_runs_as_shown(tmp_path, monkeypatch):
    """With adapters, a base model and a batch as it takes them to be there."""
    for seed, (name, tasks) in enumerate({"monday": TASKS, "tuesday": TASKS[::-1], "wednesday": TASKS}.items()):
        torch.manual_seed(seed)
        config = config_for("llama", tasks=tasks, default_task="icd", target_modules=["q_proj"])
        get_peft_model(make_model("llama"), config).save_pretrained(tmp_path / name)
    text = (Path(__file__).parents[1] / "docs" / "several_adapters.md").read_text()
    first, second = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"base_model": make_model("llama"), "batch": make_inputs("llama", labels=False)}
    exec(first, names)
    swapped = PeftModel.from_pretrained(make_model("llama"), "wednesday").eval()
    inputs = names["batch"]
    assert torch.equal(logits(names["model"], inputs), logits(swapped, inputs))
    exec(second, names | {"base_model": make_model("llama")})


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["molora", "medmoelora"])
def test_statistics_are_kept_by_adapter(kind, folder):
    model, inputs = two_adapters((kind, kind), "llama", folder), make_inputs("llama")
    model.record_routing()
    model.base_model.set_adapter(["one", "two"])
    logits(model, inputs)
    one, two = (model.routing_statistics(adapter_name=name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    sizes = [{len(values["load"]) for values in found.values()} for found in (one, two)]
    assert sizes[0] != sizes[1]
    assert model.routing_statistics() == one
    model.set_adapter("two")
    assert model.routing_statistics() == two
    with pytest.raises(ValueError, match=r"adapter_name='x'; the model has \['one', 'two'\]"):
        model.routing_statistics(adapter_name="x")
    model.add_adapter("three", config_of(kind, "llama", folder))
    model.set_adapter("three")
    logits(model, inputs)
    assert model.routing_statistics().keys() == one.keys()
    with pytest.warns(UserWarning, match="Setting active adapter to one"):
        model.delete_adapter("three")
    assert model.routing_statistics() == one


# -- transformers' own methods ----------------------------------------------------------------------------------------

BALANCED = {"target_modules": TARGETS["llama"], "init_lora_weights": False, "lora_dropout": 0.0, "num_experts": 4}
BALANCED |= {"task_type": "CAUSAL_LM", "balance_loss": "localized"}
native_adapters = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # said of every second


def gradients(model, task_ids) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(**make_inputs("llama"), task_ids=task_ids).loss.backward()
    return {name.removeprefix("base_model.model."): grad for name, grad in adapter_gradients(model).items()}


@transformers_own_adapter_methods
@native_adapters
@pytest.mark.parametrize("second", [MoLoraConfig, MedMoeLoraConfig], ids=["alike", "different"])
def test_balance_losses_know_the_tasks_of_the_active_one(second):
    def first_config():
        return MoLoraConfig(**BALANCED, tasks=["x", "y"], expert_groups={"g": ["x"], "h": ["y"]})

    def second_config():
        return second(**BALANCED, tasks=["u", "v", "w"], expert_groups={"g": ["u"], "h": ["v", "w"]})

    native = make_model("llama")
    adapters = {"one": (first_config, ["x", "y", "x"]), "two": (second_config, ["u", "v", "w"])}
    for seed, (name, (config, _)) in enumerate(adapters.items()):
        torch.manual_seed(seed)
        native.add_adapter(config(), name)
    for seed, (name, (config, task_ids)) in enumerate(adapters.items()):
        native.set_adapter(name)
        for key, parameter in native.named_parameters():
            parameter.requires_grad_(f".{name}." in key)
        torch.manual_seed(seed)
        single = get_peft_model(make_model("llama"), config(), adapter_name=name)
        expected, found = gradients(single, task_ids), gradients(native, task_ids)
        assert found.keys() == expected.keys()
        for key, grad in expected.items():
            torch.testing.assert_close(found[key], grad, atol=1e-7, rtol=1e-5)
        others = {"one": "u", "two": "x"}[name]
        with pytest.raises(ValueError, match=f"Unknown task {others!r}"):
            native(**make_inputs("llama"), task_ids=others)
    native.delete_adapter("one")
    assert gradients(native, ["u", "v", "w"]).keys() == expected.keys()


@transformers_own_adapter_methods
@native_adapters
@pytest.mark.parametrize("first", ["one", "two"])
def test_prompts_are_asked_for_by_the_active_one_only(first, folder):
    native, inputs = make_model("llama"), answered("llama")
    ids = {"input_ids": inputs["input_ids"]}
    configs = {"one": grouped_config("llama", folder, router_input="prompt"), "two": grouped_config("llama", folder)}
    for name in (first, *(configs.keys() - {first})):
        torch.manual_seed(0)
        native.add_adapter(configs[name], name)
    native.set_adapter("two")
    native.train()(**ids)
    assert torch.equal(logits(native.eval(), inputs), logits(grouped("llama", folder), inputs))
    native.set_adapter("one")
    with pytest.raises(ValueError, match="must not see answers in training"):
        native.train()(**ids)
    native.disable_adapters()
    native(**ids)
    native.enable_adapters()
    expected = grouped("llama", folder, router_input="prompt")
    assert torch.equal(logits(native.eval(), inputs), logits(expected, inputs))
    length = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(native.generate(**ids, **length), expected.generate(**ids, **length))


@transformers_own_adapter_methods
@native_adapters
def test_a_router_of_prompts_works_below_one_of_tokens(folder):
    """Whichever was added last sees a call first."""
    native, inputs = make_model("llama"), answered("llama")
    torch.manual_seed(0)
    native.add_adapter(grouped_config("llama", folder, router_input="prompt"), "one")
    native.add_adapter(MoLoraConfig(target_modules=TARGETS["llama"], num_experts=4), "two")
    native.set_adapter("one")
    expected = grouped("llama", folder, router_input="prompt")
    assert torch.equal(logits(native.eval(), inputs), logits(expected, inputs))
    native.train()(**inputs).loss.backward()
    expected.train()(**inputs).loss.backward()
    for key, parameter in expected.named_parameters():
        if parameter.grad is not None:
            name = key.removeprefix("base_model.model.").replace(".default.", ".one.")
            torch.testing.assert_close(native.get_parameter(name).grad, parameter.grad)


@transformers_own_adapter_methods
@native_adapters
def test_a_name_that_is_used_again_is_a_new_adapter(folder):
    native, inputs = make_model("llama"), answered("llama")
    native.add_adapter(MoLoraConfig(target_modules=["q_proj"]), "kept")
    native.add_adapter(grouped_config("llama", folder, router_input="prompt"), "two")
    native.set_adapter("kept")
    native.delete_adapter("two")
    native.add_adapter(MoLoraConfig(target_modules=["q_proj"], tasks=["x"], num_experts=3), "two")
    native.train()(input_ids=inputs["input_ids"], task_ids="x")
    routers = filter(None, (layer.router_of("two") for layer in routed_layers(native)))
    assert {router.gate.num_experts for router in routers} == {3}


def test_hotswapping_of_transformers_names_itself_lora_only(folder, tmp_path):
    two_adapters(("molora", "molora"), "llama", folder).save_pretrained(tmp_path)
    make_model("llama").save_pretrained(tmp_path / "base")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    native.load_adapter(str(tmp_path / "one"), "one")
    with pytest.raises(ValueError, match="currently only supported for LoRA"):
        native.load_adapter(str(tmp_path / "one"), "one", hotswap=True)


def test_tasks_of_several_active_ones_are_those_that_both_know(folder):
    model, inputs = two_adapters(("moelora", "moelora"), "llama", folder, same=True), make_inputs("llama")
    model.add_adapter("three", config_for("llama", tasks=TASKS[::-1]))
    model.base_model.set_adapter(["one", "three"])
    by_name = logits(model, inputs, task_ids="icd")
    assert not torch.allclose(by_name, logits(model, inputs, task_ids=0), atol=1e-5)  # the first of each
    model.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(logits(model, inputs, task_ids="icd"), logits(model, inputs, task_ids=0))


@transformers_own_adapter_methods
@native_adapters
@pytest.mark.parametrize("kind", ["molora", "at_moe"])
def test_adding_and_deleting_through_transformers_does_not_slow_a_model_down(kind, folder):
    native, inputs = make_model("llama").eval(), make_inputs("llama", labels=False)
    native.add_adapter(config_of("molora", "llama", folder), "kept")
    expected, first = logits(native, inputs), vars(native)["forward"]
    for _ in range(3):
        native.add_adapter(config_of(kind, "llama", folder), "passing")
        native.set_adapter("kept")
        native.delete_adapter("passing")
    entries = []
    entry = vars(native)["forward"]
    while entry is not None:
        entries.append(entry)
        entry = entry.replaced
    assert entries[-1] is first
    assert len(entries) == (1 if kind == "molora" else 2)  # one for each type
    assert torch.equal(logits(native, inputs), expected)
