"""What a user of stock LoRA may expect of every config here: a table of configs, behaviours and tiny models.

peft's own tests say the same of peft's types (docs/conformance.md has the run of those); here it is held without them.
Stock LoRA is in the table wherever a behaviour could be misremembered, so that the tests are true of it first.
"""

import copy
import json
import pickle

import pytest
import torch
from conformance_helpers import (
    ALL,
    MADE,
    MERGEABLE,
    MLP,
    MODELS,
    NATIVE,
    OURS,
    STOCK,
    TOKEN_ROUTED,
    TRAINED,
    adapted,
    add,
    backward,
    base_of,
    batch_for,
    by_adapter,
    close,
    config_of,
    copy_of,
    out,
    train_a_step,
    trainable,
    tuner_layers,
)
from grouped_helpers import without_dropout
from helpers import enable_checkpointing, transformers_own_adapter_methods
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_moe import fold

EVERYWHERE = [(kind, name) for kind in ALL for name in MODELS] + [(kind, MLP) for kind in MADE]
every_kind = pytest.mark.parametrize("kind", ALL)
every_model = pytest.mark.parametrize(("kind", "name"), EVERYWHERE)
where_mergeable = pytest.mark.parametrize("kind", MERGEABLE)


# configs


@every_kind
def test_a_config_comes_back_from_its_file(kind, tmp_path):
    model = adapted(kind, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    config, saved = model.peft_config["default"], json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == config.peft_type.value
    assert saved["inference_mode"] is True  # peft saves adapters for use
    in_any_order = {"inference_mode": None, "target_modules": set(config.target_modules)}
    for loaded in (PeftConfig.from_pretrained(tmp_path), type(config).from_pretrained(tmp_path)):
        assert type(loaded) is type(config)
        assert loaded.to_dict() | {"inference_mode": None} == config.to_dict() | in_any_order


@every_kind
def test_a_config_can_be_copied_pickled_and_made_into_json(kind):
    config = config_of(kind)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert isinstance(json.loads(json.dumps(adapted(kind).peft_config["default"].to_dict(), default=list)), dict)


@every_kind
def test_fields_of_a_later_version_are_left_out_with_a_warning(kind, tmp_path):
    adapted(kind).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_tomorrow": 1}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments.*of_tomorrow"):
        loaded = PeftModel.from_pretrained(base_of("llama"), tmp_path)
    assert torch.equal(out(loaded), out(adapted(kind)))


# making adapters


@every_model
def test_training_changes_the_adapter_and_nothing_else(kind, name):
    model = adapted(kind, name)
    before, wanted = copy_of(model), trainable(model)
    assert all(model.base_model.prefix in key or "modules_to_save" in key for key in wanted)
    train_a_step(model, name)
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == wanted
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == sum(before[key].numel() for key in wanted)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", MLP])
def test_a_new_adapter_changes_no_output(kind, name):
    assert torch.equal(out(adapted(kind, name, init_lora_weights=True), name), out(base_of(name), name))


CHOICES = [
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.[qv]_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    {"target_modules": ["layers.1.mlp.up_proj"]},
    {"target_modules": ["lm_head", "q_proj"], "exclude_modules": r".*layers\.0.*"},
]


@pytest.mark.parametrize("fields", CHOICES, ids=str)
@pytest.mark.parametrize("kind", MADE[1:])
def test_the_fields_choose_the_layers_that_they_choose_in_stock_lora(kind, fields):
    assert list(tuner_layers(adapted(kind, **fields))) == list(tuner_layers(adapted(STOCK, **fields)))


@pytest.mark.parametrize("kind", MADE)
def test_targets_that_are_not_there_leave_the_model_alone(kind):
    base = base_of("llama")
    with pytest.raises(ValueError, match="Target modules .*nowhere.* not found"):
        get_peft_model(base, config_of(kind, target_modules=["nowhere"]))
    assert not tuner_layers(base)
    assert "forward" not in vars(base)
    assert torch.equal(out(base), out(base_of("llama")))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # the same in other words
@every_kind
def test_a_second_adapter_on_an_adapted_base_model_is_warned_of(kind):
    base = adapted(kind).get_base_model()
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        get_peft_model(base, config_of(kind))


@every_kind
def test_an_adapter_name_inside_of_the_prefix_is_warned_of(kind):
    prefix = adapted(kind).base_model.prefix
    with pytest.warns(UserWarning, match="should not be contained in the prefix"):
        adapted(kind, adapter_name=prefix.removesuffix("_"))


@pytest.mark.parametrize("adapter_name", ["an.adapter", "ünï code"])
@every_kind
def test_unusual_adapter_names_are_as_in_stock_lora(kind, adapter_name, tmp_path):
    def attempt(kind):
        try:
            model = adapted(kind, adapter_name=adapter_name)
            model.save_pretrained(tmp_path / kind)
            loaded = PeftModel.from_pretrained(base_of("llama"), tmp_path / kind / adapter_name)
            return torch.equal(out(loaded), out(model))
        except (KeyError, ValueError):  # for a dot: torch's KeyError, or ours, which says what to do
            return "refused"

    assert attempt(kind) == attempt(STOCK)


@pytest.mark.parametrize("kind", MADE)
def test_no_task_type_is_needed(kind):
    model = adapted(kind, task_type=None)
    assert type(model) is PeftModel
    assert torch.equal(out(model), out(adapted(kind)))
    model.generate(batch_for("llama")["input_ids"], max_new_tokens=2)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float16, True), (torch.bfloat16, False)], ids=str)
@pytest.mark.parametrize("kind", MADE)
def test_adapters_of_half_precision_models_are_of_the_type_that_stock_lora_has(kind, dtype, autocast, tmp_path):
    base = base_of("llama").to(dtype)
    model = get_peft_model(base, config_of(kind), autocast_adapter_dtype=autocast).eval()
    assert {p.dtype for n, p in model.named_parameters() if "default" in n} == {torch.float32 if autocast else dtype}
    assert out(model).dtype == dtype
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of("llama").to(dtype), tmp_path, autocast_adapter_dtype=autocast)
    assert torch.equal(out(loaded), out(model))


@every_kind
def test_a_model_can_be_printed(kind, capsys):
    model = adapted(kind)
    assert "default" in repr(model)
    model.print_trainable_parameters()
    assert "trainable%" in capsys.readouterr().out


# saving and loading


@every_model
def test_what_is_saved_is_what_is_loaded(kind, name, tmp_path):
    model = train_a_step(adapted(kind, name), name)
    expected = out(model, name)
    model.save_pretrained(tmp_path)
    for how in ({"is_trainable": True}, {"low_cpu_mem_usage": True, "adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(base_of(name), tmp_path, **how)
        # tensors that stay in the file's memory lie at other addresses, for which some CPUs round differently
        torch.testing.assert_close(out(loaded, name), expected, rtol=1e-6, atol=1e-6)
        renamed = {key.replace(".other.", ".default.") for key in trainable(loaded)}
        assert renamed == (trainable(model) if how.get("is_trainable") else set())


@every_kind
def test_the_file_holds_the_adapter_and_no_name_of_it(kind, tmp_path):
    model = adapted(kind, adapter_name="mine")
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    assert not [key for key in saved if "mine" in key]
    assert all(key.startswith("base_model.") and model.base_model.prefix in key for key in saved)
    ours = {key: value for key, value in model.state_dict().items() if ".mine." in key}
    assert sum(v.numel() for v in saved.values()) == sum(v.numel() for v in ours.values())
    loaded = get_peft_model(base_of("llama"), config_of(kind, inference_mode=True), adapter_name="yours").eval()
    found = set_peft_model_state_dict(loaded, get_peft_model_state_dict(model, adapter_name="mine"), "yours")
    assert not found.unexpected_keys
    assert torch.equal(out(loaded), out(model))


@pytest.mark.parametrize("kind", MADE)
def test_a_pickle_file_is_written_and_read_if_asked_for(kind, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(out(PeftModel.from_pretrained(base_of("llama"), tmp_path)), out(model))


@every_kind
def test_adapters_of_different_sizes_are_saved_side_by_side_or_by_choice(kind, tmp_path):
    model = adapted(kind)
    add(model, "second", kind, **({"learn_mix": True} if kind == TRAINED else {"lora_alpha": 4}))
    add(model, "third", kind)
    expected = {}
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        expected[name] = out(model)
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "some", selected_adapters=["second"])
    assert sorted(p.name for p in (tmp_path / "some").iterdir() if p.is_dir()) == ["second"]
    assert not (tmp_path / "some" / "adapter_config.json").exists()
    with pytest.raises(ValueError, match="invalid `selected_adapters`.*fourth"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["fourth"])
    loaded = PeftModel.from_pretrained(base_of("llama"), tmp_path / "all")
    for name in ("second", "third"):
        assert not loaded.load_adapter(tmp_path / "all" / name, name).missing_keys
    for name, value in expected.items():
        loaded.set_adapter(name)
        assert torch.equal(out(loaded), value)


@pytest.mark.parametrize("kind", MADE)
def test_heads_and_tokens_are_trained_and_saved_with_the_adapter(kind, tmp_path):
    model = adapted(kind, modules_to_save=["lm_head"], trainable_token_indices=[3, 4, 5])
    stock = adapted(STOCK, modules_to_save=["lm_head"], trainable_token_indices=[3, 4, 5])
    outside = {key for key in trainable(stock) if stock.base_model.prefix not in key}
    assert {key for key in trainable(model) if model.base_model.prefix not in key} == outside
    train_a_step(model).save_pretrained(tmp_path)
    assert torch.equal(out(PeftModel.from_pretrained(base_of("llama"), tmp_path)), out(model))


@pytest.mark.parametrize("with_head", ["default", "second"])
@pytest.mark.parametrize("kind", MADE)
def test_one_adapter_can_have_a_head_and_another_none(kind, with_head):
    fields = {name: {"modules_to_save": ["lm_head"]} if name == with_head else {} for name in ("default", "second")}
    model = adapted(kind, **fields["default"])
    add(model, "second", kind, **fields["second"])
    model.set_adapter(with_head)
    alone = next(name for name in fields if name != with_head)
    train_a_step(model)
    trained = out(model)
    model.set_adapter(alone)
    assert torch.equal(out(model), out(adapted(kind, seed=int(alone == "second"))))
    model.set_adapter(with_head)
    assert torch.equal(out(model), trained)


@every_kind
def test_an_adapter_loads_from_its_directory_alone(kind, tmp_path):
    base_of("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config_of(kind)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(out(loaded), out(model))


@every_kind
def test_the_model_card_says_base_model_and_library(kind, tmp_path):
    model = adapted(kind)
    model.get_base_model().config.name_or_path = model.peft_config["default"].base_model_name_or_path = "me/base"
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # or peft looks for the vocabulary of me/base
    card = (tmp_path / "README.md").read_text()
    for line in ("base_model: me/base", "library_name: peft", "- transformers", "pipeline_tag: text-generation"):
        assert line in card


@every_kind
def test_models_can_be_copied_and_pickled_and_live_apart(kind):
    model = adapted(kind)
    expected = out(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(twin), expected)
        assert not torch.equal(out(train_a_step(twin)), expected)
        assert torch.equal(out(model), expected)


# several adapters


@every_kind
def test_gradients_are_wanted_of_the_adapters_that_stock_lora_wants_them_of(kind):
    def story(kind):
        model = adapted(kind)
        seen = [by_adapter(model, "default")]

        def look():
            found = by_adapter(model, "default", "second")
            seen.append({adapter: flags for adapter, flags in found.items() if flags})

        add(model, "second", kind)
        look()
        for act in (
            lambda: model.set_adapter("second"),
            lambda: model.base_model.set_adapter(["default", "second"]),
            lambda: model.set_requires_grad("default", False),
            lambda: model.set_adapter("default"),
            lambda: model.base_model.disable_adapter_layers(),
            lambda: model.base_model.enable_adapter_layers(),
            lambda: model.set_adapter("second", inference_mode=True),
            lambda: model.set_requires_grad(["default", "second"]),
            lambda: model.delete_adapter("default"),
        ):
            act()
            look()
        return seen

    assert story(kind) == story(STOCK)


@every_kind
def test_adapters_are_switched_deleted_and_missed_as_in_stock_lora(kind):
    model = adapted(kind)
    first = out(model)
    add(model, "second", kind)
    assert torch.equal(out(model), first)  # adding activates nothing
    assert model.active_adapters == ["default"]
    model.set_adapter("second")
    second = out(model)
    assert not torch.allclose(second, first, atol=1e-4)
    add(model, "third", kind, seed=2)
    model.delete_adapter("third")  # one that is not active
    assert torch.equal(out(model), second)
    for act, error in (
        (lambda: model.set_adapter("third"), "Adapter third not found"),
        (lambda: model.delete_adapter("third"), "Adapter third does not exist"),
        (lambda: add(model, "second", kind), "Adapter with name 'second' already exists"),
    ):
        with pytest.raises(ValueError, match=error):
            act()
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    assert not [key for key in model.state_dict() if "second" in key]
    assert list(model.peft_config) == ["default"]
    assert torch.equal(out(model), first)


@pytest.mark.parametrize("kind", MADE)
def test_active_adapters_add_up(kind):
    model = adapted(kind, MLP, target_modules=["lin1"])
    add(model, "second", kind, MLP, target_modules=["lin1"])
    base, first = out(base_of(MLP), MLP), out(model, MLP)
    model.set_adapter("second")
    second = out(model, MLP)
    model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default", "second"]
    close(out(model, MLP), first + second - base)


@pytest.mark.parametrize("kind", MADE)
def test_adapters_of_different_layers_are_each_where_they_belong(kind):
    model = adapted(kind, MLP, target_modules=["lin0"])
    first = out(model, MLP)
    add(model, "second", kind, MLP, target_modules=["lin1"])
    assert torch.equal(out(model, MLP), first)
    model.set_adapter("second")
    second = out(model, MLP)
    model.delete_adapter("default")
    assert torch.equal(out(model, MLP), second)


@every_kind
def test_an_adapter_of_another_method_is_refused(kind):
    model = adapted(kind)
    other = next(k for k in ALL if config_of(k).peft_type != model.peft_config["default"].peft_type)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        add(model, "second", other)
    assert list(model.peft_config) == ["default"]


@every_kind
def test_status_is_that_of_stock_lora(kind):
    def status(kind):
        model = adapted(kind, **({} if kind == TRAINED else {"target_modules": "all-linear"}))
        add(model, "second", kind, **({} if kind == TRAINED else {"target_modules": "all-linear"}))
        whole = model.get_model_status()
        fields = ("num_adapter_layers", "enabled", "active_adapters", "merged_adapters", "available_adapters")
        layers = [(s.name, s.enabled, s.active_adapters, s.requires_grad) for s in model.get_layer_status()]
        return [getattr(whole, field) for field in fields], whole.requires_grad, layers, whole.trainable_params > 0

    stock, ours = status(STOCK), status(kind)
    if kind == TRAINED:  # which has fewer layers, and two of three without parameters
        stock[0][0], *_ = (ours[0][0],)
        assert stock[0] == ours[0]
    else:
        assert ours == stock
    assert adapted(kind).get_model_status().peft_types == {"default": config_of(kind).peft_type.value}


# disabling, merging, unloading


@every_kind
def test_disabling_gives_the_base_model_and_enabling_the_adapter(kind):
    model, base = adapted(kind), out(base_of("llama"))
    expected = out(model)
    with model.disable_adapter():
        assert torch.equal(out(model), base)
        with model.disable_adapter():
            assert torch.equal(out(model), base)
    assert torch.equal(out(model), expected)
    with pytest.raises(RuntimeError, match="on the way"), model.disable_adapter():
        raise RuntimeError("on the way")
    assert torch.equal(out(model), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit"])
@where_mergeable
def test_merging_changes_no_output_and_unmerging_gives_the_weights_back(kind, name):
    model = adapted(kind, name, **MERGEABLE[kind])
    before, expected = copy_of(model), out(model, name)
    model.merge_adapter()
    assert all(layer.merged for layer in tuner_layers(model).values())
    close(out(model, name), expected)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-6, atol=1e-6)
    merged = model.merge_and_unload(safe_merge=True)
    assert not tuner_layers(merged)
    assert type(merged) is type(base_of(name))
    close(out(merged, name), expected)


@where_mergeable
def test_a_merged_adapter_is_taken_out_for_a_call_without_adapters(kind):
    model = adapted(kind, **MERGEABLE[kind])
    expected = out(model)
    model.merge_adapter()
    with model.disable_adapter():
        close(out(model), out(base_of("llama")))
    close(out(model), expected)


@where_mergeable
def test_several_adapters_are_merged_together(kind):
    model = adapted(kind, **MERGEABLE[kind])
    add(model, "second", kind, **MERGEABLE[kind])
    model.base_model.set_adapter(["default", "second"])
    both = out(model)
    model.set_adapter("second")
    second = out(model)
    close(out(copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])), both)
    close(out(model.merge_and_unload(adapter_names=["second"])), second)


@where_mergeable
def test_a_broken_adapter_is_not_merged_if_that_is_to_be_checked(kind):
    model = adapted(kind, **MERGEABLE[kind])
    layer = next(iter(tuner_layers(model).values()))
    next(value for key, value in layer.state_dict().items() if "lora_A" in key).fill_(torch.nan)
    before = copy_of(layer)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items() if "base_layer" in key)
    assert not layer.merged


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("kind", TOKEN_ROUTED)
def test_an_adapter_that_reads_its_input_is_not_merged_in_part(kind, how):
    model = adapted(kind, **({} if kind == TRAINED else {"target_modules": ["q_proj", "up_proj"]}))
    before, expected = copy_of(model), out(model)
    with pytest.raises(ValueError, match=r"Adapter 'default' .*peft_moe\.calibrate\(model, batches\)"):
        getattr(model, how)()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(out(model), expected)


@every_model
def test_unloading_gives_back_the_base_model(kind, name):
    model = adapted(kind, name)
    base = model.unload()
    assert not tuner_layers(base)
    assert base.state_dict().keys() == base_of(name).state_dict().keys()
    assert torch.equal(out(base, name), out(base_of(name), name))
    assert not {"forward", "generate"} & vars(base).keys()
    get_peft_model(base, config_of(kind, name))  # and without a warning


# biases of the base model


def biases(model):
    return {key for key in trainable(model) if key.endswith(".bias") and "moelora_" not in key}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["gpt2", MLP])
@pytest.mark.parametrize("kind", MADE[1:])
def test_biases_are_trained_saved_and_loaded_as_with_stock_lora(kind, name, bias, tmp_path):
    fields = {"bias": bias, **({"target_modules": ["lin0"]} if name == MLP else {})}
    model, stock = adapted(kind, name, **fields), adapted(STOCK, name, **fields)
    assert biases(model) == biases(stock) != set()
    train_a_step(model, name).save_pretrained(tmp_path)
    saved, by_stock = load_file(tmp_path / "adapter_model.safetensors"), get_peft_model_state_dict(stock)
    assert {key for key in saved if "moelora_" not in key} == {key for key in by_stock if ".lora_" not in key}
    loaded = PeftModel.from_pretrained(base_of(name), tmp_path)
    assert torch.equal(out(loaded, name), out(model, name))
    with pytest.warns(UserWarning, match=f"bias configured to be '{bias}' does not produce the same output"):
        model.base_model.disable_adapter_layers()


@pytest.mark.parametrize("kind", MADE)
def test_one_adapter_can_have_the_biases_and_others_stay_frozen(kind):
    model = adapted(kind, "gpt2", bias="all")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        add(model, "second", kind, "gpt2", bias="all")
    assert "second" not in model.peft_config
    add(model, "third", kind, "gpt2")
    assert by_adapter(model, "default", "third") == {"default": {True}, "third": {False}}


@pytest.mark.parametrize(("kind", "how"), [("MOELoRA", {"task": "rad"}), ("AT-MoE, new experts", {})], ids=str)
def test_a_folded_adapter_has_the_biases(kind, how, tmp_path):
    model = train_a_step(adapted(kind, "gpt2", bias="all", **MERGEABLE[kind]), "gpt2")
    fold(model, tmp_path, **how)
    folded = PeftModel.from_pretrained(base_of("gpt2"), tmp_path)
    close(out(folded, "gpt2"), out(model, "gpt2", **({"task_ids": "rad"} if how else {})))


# calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@every_kind
def test_generating_is_as_with_any_model(kind, name, dtype):
    model = get_peft_model(base_of(name).to(dtype), config_of(kind, name)).eval()
    ids, greedy = batch_for(name)["input_ids"], {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        tokens = model.generate(input_ids=ids, **greedy)
        if name != "t5":  # which peft takes by name alone
            assert torch.equal(model.generate(ids, **greedy), tokens)
        beams = model.generate(input_ids=ids, num_beams=2, num_return_sequences=2, **greedy)
        assert beams.shape[0] == 2 * len(ids)
        assert torch.equal(model.get_base_model().generate(ids, **greedy), tokens)
    with pytest.raises(ValueError, match="model_kwargs.*not_known"):
        model.generate(input_ids=ids, not_known=1, **greedy)


@every_kind
def test_forward_takes_what_the_base_model_takes(kind):
    model, inputs = adapted(kind), batch_for("llama")
    expected = out(model)
    with torch.no_grad():
        assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, expected)
        assert torch.equal(model(**inputs, return_dict=False)[1], expected)
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        assert torch.equal(model(inputs_embeds=embeddings).logits, expected)
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
    with pytest.raises(TypeError, match="not_known"):
        adapted(STOCK if kind == TRAINED else kind, MLP)(batch_for(MLP)["x"], not_known=1)


@pytest.mark.parametrize("name", ["llama", "bert"])
@every_kind
def test_checkpointing_gives_the_same_gradients_with_frozen_embeddings(kind, name):
    found = []
    for with_checkpoints in (False, True):
        model = adapted(kind, name)
        model.enable_input_require_grads()
        if with_checkpoints:
            enable_checkpointing(model)
        backward(without_dropout(model).train(), name)  # BERT has some of its own
        found.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = found
    assert plain
    for key, gradient in plain.items():
        close(checkpointed[key], gradient)


@pytest.mark.parametrize("kind", MADE)
def test_a_compiled_model_has_no_graph_breaks(kind):
    torch.compiler.reset()
    model = adapted(kind, MLP)
    expected = out(model, MLP)
    close(out(torch.compile(model, backend="aot_eager", fullgraph=True), MLP), expected)


@every_kind
def test_a_config_that_is_given_for_loading_is_the_adapters(kind, tmp_path):
    model = adapted(kind)
    config = model.peft_config["default"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of("llama"), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode


# without a PeftModel


@pytest.mark.parametrize("kind", NATIVE)
def test_an_adapter_can_be_injected_without_a_wrapper(kind):
    torch.manual_seed(0)
    base = inject_adapter_in_model(config_of(kind), base_of("llama")).eval()
    model = adapted(kind)
    assert torch.equal(out(base), out(model))
    prefix = "base_model.model."
    ours = {key.removeprefix(prefix): value for key, value in get_peft_model_state_dict(model).items()}
    theirs = get_peft_model_state_dict(base)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@transformers_own_adapter_methods
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # said of every second adapter
@pytest.mark.parametrize("kind", NATIVE)
def test_transformers_own_methods_and_peft_read_each_other_s_files(kind, tmp_path):
    torch.manual_seed(0)
    native = base_of("llama")
    native.add_adapter(config_of(kind))
    native.eval()
    expected = out(native)
    native.save_pretrained(tmp_path / "native")
    assert torch.equal(out(PeftModel.from_pretrained(base_of("llama"), tmp_path / "native")), expected)
    other = adapted(kind, seed=3)
    other.save_pretrained(tmp_path / "peft")
    native.load_adapter(str(tmp_path / "peft"), "second")
    native.set_adapter("second")
    assert torch.equal(out(native), out(other))
    native.disable_adapters()
    assert torch.equal(out(native), out(base_of("llama")))
    native.enable_adapters()
    native.set_adapter("default")
    native.delete_adapter("second")
    assert torch.equal(out(native), expected)


@transformers_own_adapter_methods
def test_a_gate_that_layers_share_is_refused_there_before_anything_changes(tmp_path):
    adapted("MOELoRA").save_pretrained(tmp_path)
    for put_in in (
        lambda base: inject_adapter_in_model(config_of("MOELoRA"), base),
        lambda base: base.add_adapter(config_of("MOELoRA")),
        lambda base: base.load_adapter(str(tmp_path)),
    ):
        base = base_of("llama")
        with pytest.raises(ValueError, match="does not support .*MOELORA because it uses shared state"):
            put_in(base)
        assert not tuner_layers(base)


@pytest.mark.parametrize("kind", OURS)
def test_a_model_of_mixed_methods_is_refused_by_name(kind):
    config = config_of(kind)
    with pytest.raises(ValueError, match=f"'{config.peft_type.value}' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base_of("llama"), config, mixed=True)
