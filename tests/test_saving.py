"""Save, load, switch, merge, unload: as with stock LoRA."""

import json

import pytest
import torch
from helpers import TARGETS, TASKS, config_for, logits, routed, routed_layers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import make_inputs, make_model

ARCHITECTURES = ["llama", "gpt2", "opt", "bert", "t5", "vit"]
IDS = [2, 0, 1]


def train_a_step(model, inputs, ids):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**inputs, task_ids=ids).loss.backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("gate_scope", ["model", "layer"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_train_save_load_merge_give_the_same_outputs(name, gate_scope, tmp_path):
    inputs = make_inputs(name)
    model = routed(name, gate_scope=gate_scope, default_task="icd")
    before = {n: p.clone() for n, p in model.named_parameters()}
    train_a_step(model, inputs, IDS)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}  # gates among them
    assert any("router" in n for n in changed)
    expected = logits(model, inputs, task_ids=IDS)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(make_model(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded, inputs, task_ids=IDS), expected)
        assert not any(p.requires_grad for p in loaded.parameters())
    for i, task in enumerate(TASKS):
        merged = (
            PeftModel.from_pretrained(make_model(name), tmp_path).eval().merge_and_unload(safe_merge=i == 0, task=task)
        )
        of_task = logits(model, inputs, task_ids=task)
        torch.testing.assert_close(logits(merged, inputs), of_task, rtol=1e-4, atol=1e-5)
        assert not routed_layers(merged)


def test_a_checkpoint_holds_every_trained_parameter_and_no_name_of_an_adapter(tmp_path):
    model = routed("llama", num_experts_pattern={"q_proj": 2})
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in trained.values())
    assert len(saved) == len(trained)
    assert not any("default" in key for key in saved)
    assert {k for k in saved if "router" in k} == {
        f"base_model.moelora_router.{n}.gate.{part}.weight" for n in (2, 4) for part in ("embedding", "proj")
    }


def test_an_adapter_for_inference_freezes_no_other():
    model = routed("llama")
    model.add_adapter("second", config_for("llama", inference_mode=True))
    assert all(p.requires_grad for n, p in model.named_parameters() if ".default." in n)


def test_disabling_takes_gradients_from_gates_too_and_gives_them_back():
    model, inputs = routed("llama"), make_inputs("llama")
    base = logits(make_model("llama"), inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)  # and needs no task
        assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for n, p in model.named_parameters() if "moelora" in n)


@pytest.mark.parametrize("name", ["gate", "lora_A", "bias", "8", "model", "q_proj", "0"])
def test_an_adapter_name_that_collides_with_our_keys_is_refused(name):
    with pytest.raises(ValueError, match=f"adapter_name='{name}' is also part of the names"):
        get_peft_model(make_model("llama"), config_for("llama"), adapter_name=name)


# merging


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_and_unmerging_a_task(name):
    model, inputs = routed(name), make_inputs(name)
    by_ids, rad = logits(model, inputs, task_ids=IDS), logits(model, inputs, task_ids="rad")
    weights = [layer.get_base_weight().clone() for layer in routed_layers(model)]
    model.merge_adapter(task="rad")
    torch.testing.assert_close(logits(model, inputs), rad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model, inputs, task_ids=1), rad, rtol=1e-4, atol=1e-5)
    for other in ("icd", IDS, [["rad", "icd"]] * 3):
        with pytest.raises(ValueError, match=r"merged into the base weights for \['rad'\].*unmerge_adapter"):
            logits(model, inputs, task_ids=other)
    with model.disable_adapter():  # as a reference pass does, with the batch's own ids
        assert torch.allclose(logits(model, inputs, task_ids=IDS), logits(make_model(name), inputs), atol=1e-5)
    model.merge_adapter(task="rad")
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(task="rad")
    model.unmerge_adapter()
    for layer, weight in zip(routed_layers(model), weights, strict=True):
        torch.testing.assert_close(layer.get_base_weight(), weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(model, inputs, task_ids=IDS), by_ids, rtol=1e-4, atol=1e-5)


def test_merging_takes_the_chosen_or_the_default_task_or_several():
    inputs = make_inputs("llama")
    for chosen, task in (({"default_task": "def"}, "def"), ({}, "rad")):
        model = routed("llama", **chosen)
        if not chosen:
            model.set_task("rad")
        of_task = logits(model, inputs, task_ids=task)
        model.merge_adapter()
        torch.testing.assert_close(logits(model, inputs), of_task, rtol=1e-4, atol=1e-5)
    model = routed("llama")
    mean = logits(model, inputs, task_ids=[["icd", "def"]] * 3)
    torch.testing.assert_close(logits(model.merge_and_unload(task=["icd", "def"]), inputs), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    ("chosen", "asked", "named"),
    [
        (None, {"task": "icd"}, "icd"),
        (None, {"task": 0}, "icd"),
        (None, {"task": ["rad", "icd"]}, "rad', 'icd"),
        ("icd", {}, "icd"),
        (None, {}, "def"),  # the default
        (None, {"task": "icd", "adapter_names": ["other", "default"]}, "icd"),
    ],
    ids=str,
)
def test_what_is_merged_for_one_task_is_not_given_for_another(chosen, asked, named, how):
    model, inputs = routed("llama", default_task="def"), make_inputs("llama")
    model.add_adapter("other", config_for("llama"))
    model.merge_adapter(task="rad")
    if chosen is not None:
        model.set_task(chosen)
    before = [layer.get_base_weight().clone() for layer in routed_layers(model)]
    message = rf"'default' is merged.*\['rad'\], and \['{named}'\] is asked for.*unmerge_adapter.*pass task='rad'"
    with pytest.raises(ValueError, match=message):
        getattr(model, how)(**asked)
    assert [layer.merged_adapters for layer in routed_layers(model)] == [["default"]] * len(before)
    for layer, weight in zip(routed_layers(model), before, strict=True):
        assert torch.equal(layer.get_base_weight(), weight)
    model.set_task(None)
    model.unmerge_adapter()
    expected = logits(model, inputs, task_ids="icd")
    torch.testing.assert_close(logits(model.merge_and_unload(task="icd"), inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("merged", "asked"), [("rad", 1), (["rad"], "rad"), (["icd", "rad"], [1, 0]), ("rad", ["rad", 1])], ids=str
)
def test_a_merged_task_can_be_merged_again_in_any_form(merged, asked):
    model, inputs = routed("llama"), make_inputs("llama")
    model.merge_adapter(task=merged)
    expected = logits(model, inputs)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        unloaded = model.merge_and_unload(task=asked)
    assert torch.equal(logits(unloaded, inputs), expected)


def test_adapters_can_be_merged_for_a_task_each():
    model, inputs = routed("llama"), make_inputs("llama")
    model.add_adapter("other", config_for("llama"))
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(["default"], task="rad")
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"], task="icd")
    both = logits(model, inputs)
    with pytest.raises(ValueError, match=r"'other' is merged into the base weights for \['icd'\]"):
        model.merge_and_unload(task="rad")
    model.unmerge_adapter()
    deltas = []
    for name, task in (("default", "rad"), ("other", "icd")):
        with model.base_model.task(task):
            deltas.append([layer.get_delta_weight(name) for layer in routed_layers(model)])
    base = model.unload()
    targets = [m for name, m in base.named_modules() if name.endswith(tuple(TARGETS["llama"]))]
    with torch.no_grad():
        for module, one, two in zip(targets, *deltas, strict=True):
            module.weight += one + two
    torch.testing.assert_close(logits(base, inputs), both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    ("task", "message"),
    [({}, r"none was chosen; pass task= with one of 'icd' \(0\)"), ({"task": "mri"}, "Unknown task 'mri'")],
)
def test_merging_without_a_task_merges_nothing(how, task, message):
    model, inputs = routed("llama", num_experts_pattern={"q_proj": 1}), make_inputs("llama")
    before = logits(model, inputs, task_ids=IDS)
    with pytest.raises(ValueError, match=message):
        getattr(model, how)(**task)
    assert not any(layer.merged for layer in routed_layers(model))
    assert torch.equal(logits(model, inputs, task_ids=IDS), before)


def test_what_was_merged_is_taken_out_again_even_if_the_gate_has_changed():
    model = routed("llama")
    before = [layer.get_base_weight().clone() for layer in routed_layers(model)]
    model.merge_adapter(task="rad")
    model.base_model.moelora_router["default"]["4"].gate.embedding.weight.data.normal_()
    with model.disable_adapter():
        logits(model, make_inputs("llama"))
    for layer, weight in zip(routed_layers(model), before, strict=True):
        torch.testing.assert_close(layer.get_base_weight(), weight, rtol=1e-6, atol=1e-6)


# what else peft users have


@pytest.mark.parametrize(
    ("fields", "targeted"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": None}, 14),
        ({"target_modules": None, "layers_to_transform": [1]}, 7),
        ({"target_modules": None, "layers_to_transform": 0, "layers_pattern": "layers"}, 7),
        ({"target_modules": r".*\.[qv]_proj"}, 4),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]}, 3),
        ({"target_modules": ["layers.1.mlp.up_proj"]}, 1),
    ],
)
def test_target_modules_choose_what_they_choose_in_peft(fields, targeted):
    assert len(routed_layers(routed("llama", **fields))) == targeted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["nope"]}, "nope"),
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is a Embedding, which is not supported"),
        (
            {"rank_pattern": {"down_proj": 6}},
            "r=6 does not split over num_experts=4 at 'model.layers.0.mlp.down_proj'; use r=8",
        ),
    ],
)
def test_what_cannot_be_injected_leaves_the_model_alone(fields, message):
    base, inputs = make_model("llama"), make_inputs("llama")
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config_for("llama", **fields))
    assert not routed_layers(base)
    assert "forward" not in vars(base)
    assert torch.equal(logits(base, inputs), logits(make_model("llama"), inputs))


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern", "num_experts_pattern"])
def test_patterns_that_overlap_mean_the_same_when_they_have_been_saved_which_sorts_them(name, tmp_path):
    pattern = {r"layers\.0\..*": 4, "gate_proj": 8, "nope": 2}  # the first of these that matches counts
    with pytest.warns(RuntimeWarning, match="nope"):
        model = routed("llama", num_experts=2, **{name: pattern})
    (of_0, of_1) = (m for m in routed_layers(model) if m.out_features == 64)
    banks = [layer.moelora_bank["default"] for layer in (of_0, of_1)]
    found = {
        "rank_pattern": [sum(bank.ranks) for bank in banks],
        "alpha_pattern": [bank.factors[0] * 8 for bank in banks],
        "num_experts_pattern": [len(bank.ranks) for bank in banks],
    }
    assert found[name] == [4, 8]
    expected = logits(model, make_inputs("llama"), task_ids=IDS)
    model.save_pretrained(tmp_path)
    with pytest.warns(RuntimeWarning, match="nope"):
        loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, make_inputs("llama"), task_ids=IDS), expected)


def test_a_pattern_that_matches_nothing_warns():
    with pytest.warns(RuntimeWarning, match=r"num_experts_pattern keys \['nope'\] match nothing"):
        routed("llama", num_experts_pattern={"nope": 2, "q_proj": 2})


def test_a_custom_model_must_say_its_targets():
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config_for(task_type=None, target_modules=None))


def test_the_file_says_all_that_loading_needs(tmp_path):
    routed("gpt2", tasks=["b", "a"], default_task="a", gate_scope="layer").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["tasks"], saved["default_task"], saved["gate_scope"], saved["fan_in_fan_out"]) == (
        ["b", "a"],
        "a",
        "layer",
        True,
    )
