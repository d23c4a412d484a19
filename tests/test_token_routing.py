"""Adapters whose experts are chosen by the tokens: generation, saving, merging and the rest of what adapters do."""

import pytest
import torch
from helpers import TARGETS, adapter_gradients, first_logits, logits, routed_layers, transformers_own_adapter_methods
from peft import AutoPeftModelForCausalLM, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from tiny_models import BUILDERS, FURTHER, HIDDEN, PAD, SIZES, TASK_TYPES, make_inputs, make_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils.quantization_config import BitsAndBytesConfig

from peft_moe import MedMoeLoraConfig, MoLoraConfig, fold
from peft_moe.routing import Batch

ATTENTION = ["q_proj", "v_proj"]
ALL_TARGETS = TARGETS | dict.fromkeys(["qwen2", "gemma2", "gemma3"], TARGETS["llama"]) | {"mixtral": ATTENTION}
CAUSAL = ["llama", "gpt2", "opt", *FURTHER]
ALL = [*BUILDERS, *FURTHER]

# Table of configs: what a call to `routed` fills in for each.
COMMON = {"lora_dropout": 0.0, "init_lora_weights": False, "num_experts": 4}
KINDS = {
    "molora": (MoLoraConfig, {"r": 4, "top_k": 2}),
    "molora-top_p-shared": (MoLoraConfig, {"r": 4, "top_p": 0.6, "num_shared_experts": 1}),
    "medmoe": (MedMoeLoraConfig, {"expert_ranks": [2, 4]}),
    "medmoe-regularized-top_k": (
        MedMoeLoraConfig,
        {"expert_ranks": [2, 4], "base_expert_mode": "regularized", "inference_top_k": 2},
    ),
}
MAIN = ["molora", "medmoe"]


def inputs_for(name, **sizes):
    return make_inputs(name if name in BUILDERS else "llama", **sizes)


def config_of(kind, name="llama", **changes):
    config, fields = KINDS[kind]
    base = {"task_type": TASK_TYPES.get(name, "CAUSAL_LM"), "target_modules": ALL_TARGETS[name], **COMMON}
    return config(**{**base, **fields, **changes})


def routed(kind="molora", name="llama", *, base=None, seed=0, **changes):
    """A tiny model whose adapter changes the output, in eval mode."""
    torch.manual_seed(seed)
    return get_peft_model(base or make_model(name), config_of(kind, name, **changes)).eval()


def every_router(model):
    """Routers of the active adapter and their layers' names."""
    return list(model.routers())


def train_a_step(model, inputs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


# generation

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def left_padded(lengths=(5, 3, 4, 2)):
    inputs = make_inputs("llama", batch=len(lengths), seq=max(lengths), labels=False)
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - n).long() for n in lengths])
    return {"input_ids": inputs["input_ids"] * mask, "attention_mask": mask}


VARIANTS = [
    *((name, kind, {}) for name in [*CAUSAL, "t5"] for kind in MAIN),
    *(("llama", kind, {}) for kind in KINDS if kind not in MAIN),
    *((name, kind, {"num_beams": 3}) for name in ("llama", "t5") for kind in MAIN),
    *(("llama", kind, {"num_beams": 2, "num_return_sequences": 2}) for kind in MAIN),
    *(("llama", kind, {"use_cache": False}) for kind in MAIN),
]


@pytest.mark.parametrize(("name", "kind", "variant"), VARIANTS, ids=str)
def test_generating_for_a_left_padded_batch_is_as_each_row_alone(name, kind, variant):
    model, inputs = routed(kind, name), left_padded()
    together = model.generate(**inputs, **GREEDY, **variant)
    n = len(together) // 4
    for i in range(4):
        kept = inputs["attention_mask"][i].bool()
        row = {key: value[i : i + 1, kept] for key, value in inputs.items()}
        alone = model.generate(**row, **GREEDY, **variant)
        assert torch.equal(together[i * n : (i + 1) * n, -6:], alone[:, -6:])
    scores = first_logits(model, **inputs, **GREEDY, **variant)
    with model.disable_adapter():  # or the comparison would say nothing about the adapter
        assert not torch.allclose(first_logits(model, **inputs, **GREEDY, **variant), scores, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_token_by_token_with_a_cache_gives_the_logits_of_the_full_forward(name, kind):
    model, ids = routed(kind, name), inputs_for(name, batch=2, seq=7)["input_ids"]
    steps, cache = [], None
    for position in [slice(0, 3), *(slice(i, i + 1) for i in range(3, 7))]:
        with torch.no_grad():
            outputs = model(input_ids=ids[:, position], past_key_values=cache, use_cache=True)
        steps, cache = [*steps, outputs.logits], outputs.past_key_values
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, {"input_ids": ids}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MAIN)
def test_sampling_draws_from_the_full_forwards_probabilities_and_a_seed_repeats_it(kind):
    model, inputs = routed(kind), left_padded()
    sampled = []
    for _ in range(2):
        torch.manual_seed(3)
        sampled.append(model.generate(**inputs, **{**GREEDY, "do_sample": True, "top_k": 0}, num_return_sequences=2))
    assert torch.equal(*sampled)
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(2, 0), torch.ones(8, 6, dtype=torch.long)], 1)
    scores = logits(model, {"input_ids": sampled[0], "attention_mask": mask})
    torch.manual_seed(3)
    for position in range(5, 11):
        drawn = torch.multinomial(scores[:, position - 1].softmax(-1), 1)[:, 0]
        assert torch.equal(drawn, sampled[0][:, position])


@pytest.mark.parametrize("kind", MAIN)
def test_assisted_decoding_gives_what_greedy_decoding_gives(kind):
    """Several tokens are checked at once, and some rejected ones are taken out of the cache again."""
    model = routed(kind)
    prompt = {key: value[:1] for key, value in left_padded().items()}
    lengths = []
    hook = model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda _module, args, _out: lengths.append(args[0].shape[1])
    )
    for assistant in (make_model("llama"), make_model("llama", seed=1)):
        expected = model.generate(**prompt, **GREEDY)
        lengths.clear()
        assert torch.equal(model.generate(**prompt, **GREEDY, assistant_model=assistant), expected)
        assert max(lengths[1:]) > 1
    hook.remove()


# what decides a token's experts


def selected(model, call):
    """The experts that each router gives any weight to, by layer, during a call."""
    found = {}
    hooks = [
        router.register_forward_hook(lambda _router, _args, out, key=key: found.update({key: out > 0}))
        for key, router in every_router(model)
    ]
    outputs = call()
    for hook in hooks:
        hook.remove()
    return found, outputs


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "regularized" not in kind])  # which has inference_top_k
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "mixtral"])  # have no dropout of their own
def test_in_bfloat16_training_and_inference_choose_the_same_experts_and_give_the_same_outputs(
    name, kind, autocast_adapter_dtype
):
    torch.manual_seed(0)
    config = config_of(kind, name)
    base = make_model(name).to(torch.bfloat16)
    model, inputs = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype), inputs_for(name)
    found, outputs = zip(
        *(selected(model.train(training), lambda: logits(model, inputs)) for training in (True, False)), strict=True
    )
    assert found[0].keys() == {key for key, _ in every_router(model)}
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert torch.equal(*outputs)
    assert outputs[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_rows_of_a_batch_does_not_matter(name, kind):
    model, inputs = routed(kind, name), inputs_for(name)
    order = torch.tensor([2, 0, 1])
    shuffled = logits(model, {key: value[order] for key, value in inputs.items()})
    torch.testing.assert_close(shuffled, logits(model, inputs)[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_autocast_to_bfloat16_trains_every_parameter(name, kind):
    model = routed(kind, name).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs_for(name)).loss.backward()
    gradients = adapter_gradients(model)
    assert gradients.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(grad).all() and grad.abs().sum() > 0 for grad in gradients.values())


# saving and loading


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, kind) for name in ALL for kind in MAIN), *(("llama", kind) for kind in KINDS)]
)
def test_what_is_trained_is_saved_and_comes_back_with_nothing_but_the_directory(name, kind, tmp_path):
    inputs = inputs_for(name)
    model = routed(kind, name)
    before = {key: p.clone() for key, p in model.named_parameters()}
    expected = logits(train_a_step(model, inputs), inputs)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {key for key, p in model.named_parameters() if not torch.equal(p, before[key])} == trained.keys()
    assert {key.split(".moelora_router.")[0] for key in trained if ".moelora_router." in key} == {
        f"base_model.model.{key}" for key, _ in every_router(model)
    }
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(trained)
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in trained.values())
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(make_model(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded, inputs), expected)
        assert not any(p.requires_grad for p in loaded.parameters())


def test_the_number_of_experts_of_each_layer_comes_back(tmp_path):
    """In MoLA they must be typed again. Eq. 2 of Med-MoE-LoRA is 2 + ⌊2 (l / 2)²⌋ here, and there is a base expert."""
    for kind, fields, expected in (
        ("medmoe", {}, [3, 5]),
        ("molora", {"num_experts_pattern": {"layers.0.*": 2, "layers.1.mlp.down_proj": 6}}, [2, 4, 6]),
    ):
        model = routed(kind, **fields)
        model.save_pretrained(tmp_path / kind)
        loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / kind)
        counts = [[router.gate.num_experts for _, router in every_router(m)] for m in (model, loaded)]
        assert counts[0] == counts[1]
        assert sorted(set(counts[0])) == expected


@pytest.mark.parametrize("kind", MAIN)
def test_auto_peft_model_needs_nothing_but_the_directory(kind, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    model, inputs = routed(kind, base=AutoModelForCausalLM.from_pretrained(tmp_path / "base")), make_inputs("llama")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("kind", MAIN)
def test_the_head_of_a_classifier_is_trained_and_saved(kind, tmp_path):
    model, inputs = routed(kind, "bert"), make_inputs("bert")
    train_a_step(model, inputs)
    model.save_pretrained(tmp_path)
    assert {key for key in load_file(tmp_path / "adapter_model.safetensors") if "moelora" not in key} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    other = make_model("bert", seed=0)
    other.classifier.reset_parameters()
    loaded = PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("kind", MAIN)
def test_adapters_are_added_switched_saved_and_deleted_like_stock_ones(kind, tmp_path):
    model, inputs = routed(kind), make_inputs("llama")
    first = logits(model, inputs)
    model.add_adapter("second", config_of(kind, num_experts=6, balance_loss="cv2"))
    assert torch.equal(logits(model, inputs), first)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".second." in key)
    model.set_adapter("second")
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        key for key, _ in model.named_parameters() if ".second." in key
    }
    second = logits(model, inputs)
    assert not torch.allclose(second, first, atol=1e-4)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    assert not [key for key, _ in model.named_parameters() if "second" in key]
    assert torch.equal(logits(model, inputs), first)
    model.load_adapter(tmp_path / "second", "again")
    model.set_adapter("again")
    assert torch.equal(logits(model, inputs), second)


def test_two_active_adapters_add_up():
    model = routed("molora")
    model.add_adapter("second", config_of("molora", num_experts=6))
    (layer, *_), x = routed_layers(model), torch.randn(3, 5, HIDDEN)
    base = layer.base_layer(x)
    alone = []
    for active in ("default", "second"):
        model.set_adapter(active)
        alone.append(layer(x) - base)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x) - base, alone[0] + alone[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_disabling_and_unloading_give_back_the_base_model(name, kind):
    model, inputs = routed(kind, name), inputs_for(name)
    base = make_model(name)
    if name == "bert":  # peft trains a copy of the head, whose start is the base model's
        assert torch.equal(model.base_model.model.classifier.modules_to_save["default"].weight, base.classifier.weight)
    expected = logits(base, inputs)
    assert not torch.allclose(logits(model, inputs), expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
        assert not any(p.requires_grad for p in model.parameters())
    assert any(p.requires_grad for p in model.parameters())
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, inputs), expected)
    assert not routed_layers(unloaded)
    assert type(unloaded).forward is unloaded.forward.__func__


# merging

MERGES = {
    "merge_adapter": lambda model, _folder: model.merge_adapter(),
    "safe_merge": lambda model, _folder: model.merge_adapter(safe_merge=True),
    "merge_and_unload": lambda model, _folder: model.merge_and_unload(),
    "named": lambda model, _folder: model.merge_adapter(adapter_names=["default"]),
    "layer.merge": lambda model, _folder: routed_layers(model)[-1].merge(),
    "get_delta_weight": lambda model, _folder: routed_layers(model)[-1].get_delta_weight("default"),
}
REFUSAL = r"Adapter 'default' chooses experts for each token.*keep it as an adapter, or let peft_moe.calibrate\(model"


@pytest.mark.parametrize("how", MERGES)
@pytest.mark.parametrize("kind", MAIN)
def test_merging_is_refused_before_anything_changes(kind, how, tmp_path):
    # The first layers are plain LoRA, which alone could be merged.
    model, inputs = routed(kind, num_experts_pattern={"q_proj": 1}, **no_base_expert(kind)), make_inputs("llama")
    before = logits(model, inputs)
    weights = [layer.get_base_weight().clone() for layer in routed_layers(model)]
    with pytest.raises(ValueError, match=REFUSAL):
        MERGES[how](model, tmp_path)
    assert not any(layer.merged for layer in routed_layers(model))
    assert all(torch.equal(w, layer.get_base_weight()) for w, layer in zip(weights, routed_layers(model), strict=True))
    assert torch.equal(logits(model, inputs), before)


def no_base_expert(kind):
    return {"num_base_experts": 0} if kind.startswith("medmoe") else {}


@pytest.mark.parametrize("kind", MAIN)
def test_folding_is_refused_and_writes_nothing(kind, tmp_path):
    model = routed(kind)
    model.save_pretrained(tmp_path / "adapter")
    for source in (model, tmp_path / "adapter"):
        with pytest.raises(ValueError, match=r"call peft_moe.calibrate\(model, batches\) before.*--calibrate DATA"):
            fold(source, tmp_path / "folded")
        with pytest.raises(ValueError, match=r"task=0: M\S+ adapters choose experts by no task; leave task= out"):
            fold(source, tmp_path / "folded", task=0)
        with pytest.raises(ValueError, match=r"M\S+ adapters have no groups; leave routing= out"):
            fold(source, tmp_path / "folded", routing={"off": ["f"]})
    assert not (tmp_path / "folded").exists()


@pytest.mark.parametrize("kind", MAIN)
def test_converting_to_a_stock_lora_is_refused(kind):
    model = routed(kind)
    assert not any(layer.supports_lora_conversion() for layer in routed_layers(model))
    with pytest.raises(TypeError, match="do not support LoRA conversion: .*MoeLinear"):
        convert_to_lora(model, rank=4)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but")  # peft's conversion leaves it out
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "convert_to_lora"])
@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_without_routed_layers_is_a_lora_and_merges(name, kind, how):
    fields = {"num_experts": 1, "expert_schedule": "uniform"} if kind == "medmoe" else {"num_experts": 1}
    model, inputs = routed(kind, name, **fields, **no_base_expert(kind)), inputs_for(name)
    assert not every_router(model)
    expected = logits(model, inputs)
    if how == "convert_to_lora":
        config, state_dict = convert_to_lora(model, rank=4)
        merged = get_peft_model(make_model(name), config).eval()
        merged.load_state_dict(
            {key.replace(".weight", ".default.weight"): v for key, v in state_dict.items()}, strict=False
        )
    elif how == "merge_adapter":
        merged = model
        model.merge_adapter()
        assert all(layer.merged for layer in routed_layers(model))
    else:
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-5)
    if how == "merge_adapter":
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


# mixtures of experts as base models

FUSED = r"experts of its own whose weights are fused parameters.*'model\.layers\.0\.mlp\.experts'.*target_parameters"


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
@pytest.mark.parametrize("kind", MAIN)
def test_on_a_mixture_of_experts_it_is_said_that_the_fused_experts_are_not_adapted(kind, target_modules):
    recipe = {"num_experts_pattern": {}} if kind == "molora" else {}
    with pytest.warns(UserWarning, match=FUSED):
        model = routed(kind, "mixtral", target_modules=target_modules, **recipe)
    adapted = {key.rpartition(".")[2] for key, _ in every_router(model)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    train_a_step(model, make_inputs("llama"))
    model.generate(**left_padded(), **GREEDY)


@pytest.mark.filterwarnings("ignore:The base model has experts of its own")
def test_the_recipe_of_moloras_paper_has_nothing_to_route_on_a_base_model_whose_linears_are_all_attention():
    base = make_model("mixtral")
    with pytest.raises(
        ValueError, match=r"all linear layers of this model are attention's; give num_experts_pattern=\{\}"
    ):
        routed("molora", base=base, target_modules=None)
    assert not routed_layers(base)
    assert len(every_router(routed("molora", base=base, target_modules=None, num_experts_pattern={}))) == 8


def test_targets_that_are_listed_bring_no_warning_of_a_mixture():
    routed("molora", "mixtral")  # warnings are errors


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "t5", "vit", "qwen2", "gemma2", "gemma3"])
def test_by_default_molora_routes_feed_forward_layers_and_puts_a_plain_lora_on_attention(name):
    """The paper's recipe (arXiv 2404.09027)."""
    model = routed("molora", name, target_modules=None)
    kinds = {bool(layer.router_of("default")): set() for layer in routed_layers(model)}
    for key, layer in model.named_modules():
        if layer in set(routed_layers(model)):
            kinds[layer.router_of("default") is not None].add("attn" in key.lower() or "attention" in key.lower())
    assert kinds == {True: {False}, False: {True}}


# quantised base models


@pytest.mark.parametrize("kind", MAIN)
def test_a_quantised_base_trains_generates_and_saves(kind, tmp_path):
    # bitsandbytes' 4-bit blocks need layers of 64 and more
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bits, dtype=torch.float32)

    model, inputs = routed(kind, base=load(), balance_loss="variance"), make_inputs("llama")
    assert all(layer.quantization_backend is not None for layer in routed_layers(model))
    model.train()(**inputs).loss.backward()
    gradients = adapter_gradients(model)
    assert gradients.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(grad.abs().sum() > 0 for grad in gradients.values())
    model.eval()
    expected = logits(model, inputs)
    assert model.generate(**left_padded(), **GREEDY).shape == (4, 11)
    with pytest.raises(ValueError, match=REFUSAL):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter").eval(), inputs), expected)


# transformers' own adapter methods


@transformers_own_adapter_methods
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # said of every second adapter
@pytest.mark.parametrize("kind", MAIN)
def test_transformers_own_adapter_methods_save_and_load_what_peft_does(kind, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    native, inputs = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), make_inputs("llama")
    torch.manual_seed(0)
    native.add_adapter(config_of(kind))
    native.eval()
    expected = logits(native, inputs)
    assert torch.equal(
        expected, logits(routed(kind, base=AutoModelForCausalLM.from_pretrained(tmp_path / "base")), inputs)
    )
    native.disable_adapters()
    assert torch.equal(logits(native, inputs), logits(make_model("llama"), inputs))
    native.enable_adapters()
    native.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    through_peft = PeftModel.from_pretrained(make_model("llama"), tmp_path / "adapter")
    for model in (loaded, auto, through_peft):
        assert torch.equal(logits(model.eval(), inputs), expected)
    assert torch.equal(auto.generate(**left_padded(), **GREEDY), native.generate(**left_padded(), **GREEDY))
    routed(kind, seed=5).save_pretrained(tmp_path / "of_peft")
    auto.load_adapter(str(tmp_path / "of_peft"), "second")
    auto.set_adapter("second")
    assert torch.equal(logits(auto, inputs), logits(routed(kind, seed=5), inputs))
    auto.set_adapter("default")
    auto.delete_adapter("second")
    assert torch.equal(logits(auto, inputs), expected)


@transformers_own_adapter_methods
@pytest.mark.parametrize("kind", MAIN)
def test_an_adapter_added_by_transformers_gets_its_balance_loss(kind):
    gradients = []
    for balance_loss in ({"z": 1.0}, "none"):
        native = make_model("llama").train()
        torch.manual_seed(0)
        native.add_adapter(config_of(kind, balance_loss=balance_loss))
        native(**make_inputs("llama")).loss.backward()
        gradients.append(adapter_gradients(native))
    routers = [key for key in gradients[0] if "moelora_router" in key]
    assert routers
    assert not any(torch.allclose(gradients[0][key], gradients[1][key], rtol=1e-3) for key in routers)


def test_a_reload_into_empty_tensors_keeps_routers_exact_on_a_half_precision_base(tmp_path):
    torch.manual_seed(0)
    config = MoLoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], init_lora_weights=False)
    model = get_peft_model(make_model("llama").bfloat16(), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama").bfloat16(), tmp_path, low_cpu_mem_usage=True)
    routers = dict(model.routers())
    assert len(routers) == 2
    for key, router in loaded.routers():
        assert router.gate.weight.dtype == torch.float32
        assert torch.equal(router.gate.weight, routers[key].gate.weight), key


def test_an_adapter_that_is_added_while_recording_is_recorded_too():
    config = MoLoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"])
    model = get_peft_model(make_model("llama"), config).eval()
    model.record_routing()
    model.add_adapter("second", config)
    model.set_adapter("second")
    model(**make_inputs("llama"))
    assert len(model.routing_statistics()) == 2


def test_what_is_generated_is_not_recorded():
    config = MoLoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"])
    model = get_peft_model(make_model("llama"), config).eval()
    model.record_routing()
    inputs = make_inputs("llama", labels=False)
    model(**inputs)
    before = model.routing_statistics()
    model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
    assert model.routing_statistics() == before


def test_padding_that_cannot_be_told_is_warned_of_where_a_balance_loss_would_count_it():
    config = MoLoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], balance_loss="cv2")
    model, inputs = get_peft_model(make_model("llama"), config).train(), make_inputs("llama")
    (_, router), *_ = model.routers()
    batch = Batch(3, tokens=9, mask=torch.ones(3, 9, dtype=torch.bool))
    said = r"inputs of shape \(3, 4, 32\), which attention_mask does not fit"
    call = model.context.call(None, active=["default"], batch=batch, training=True)
    with call, pytest.warns(UserWarning, match=said):
        router(torch.randn(3, 4, 32), model.context.view("default"))
    model(**inputs).loss.backward()  # no warning where it fits
