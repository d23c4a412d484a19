"""On quantised bases: every way to quantise on a CPU under every config, beside a loop over experts or stock LoRA."""

import logging
import re
import warnings

import pytest
import torch
from datasets import Dataset
from helpers import adapter_gradients, checkpointing, logits, routed_layers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from quantised_helpers import BASES, CONFIGS, FORWARD_ONLY, TARGET, config_on, fix, load, quantised, save_base, told
from tiny_models import make_inputs
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import Trainer, TrainingArguments

from peft_moe import MoeLoraConfig, fold
from peft_moe.quantised import weight_of

# peft 0.21 asks transformers 5.23 for these under their old names
pytestmark = pytest.mark.filterwarnings("ignore:`(model_)?gradient_checkpointing_enable`:FutureWarning")
INPUTS = make_inputs("llama")
SOME = ("nf4", "int8", "torchao-int8")
ALL = [base if base in SOME else pytest.param(base, marks=pytest.mark.slow) for base in BASES]
MERGEABLE = ("moelora", "grouped")  # whose experts can be had as one matrix


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every product that it casts to float16
    return save_base(tmp_path_factory.mktemp("quantised") / "base")


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def merged(model, **how):
    """Merge; returns what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_adapter(**how)
    return [str(w.message) for w in caught]


def weights_in(model):
    with torch.no_grad():
        return [weight_of(layer).float().clone() for layer in routed_layers(model)]


# -- what is computed --


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("base", ALL)
def test_a_layer_computes_the_loop_over_experts_on_the_dequantised_weight(base, kind, folder):
    """And every parameter of the adapter has a gradient."""
    model = quantised(kind, folder, base).train()
    weights, found = weights_in(model), {}

    def keep_weights(router, args, output):
        found["weights"] = output

    def compare(layer, args, output):
        (x,), bank = args, layer.moelora_bank["default"]
        plain = layer.base_layer(x)
        rows, columns = bank.lora_A.weight.split(bank.ranks), bank.lora_B.weight.split(bank.ranks, dim=1)
        experts = torch.zeros_like(plain)
        for i, (a, b) in enumerate(zip(rows, columns, strict=True)):
            weight = found["weights"][..., i : i + 1] if layer.router_of("default") is not None else 1.0
            experts = experts + weight * bank.factors[i] * (x @ a.T @ b.T)
        assert experts.norm() > 0.05 * plain.norm()
        torch.testing.assert_close(output, plain + experts, rtol=1e-5, atol=1e-5)
        assert relative(plain, x @ weights[layers.index(layer)].T) < BASES[base][1]
        found.setdefault("compared", set()).add(layer)

    layers = routed_layers(model)
    for layer in layers:
        router = layer.router_of("default")
        if router is not None:
            router.register_forward_hook(keep_weights)
        layer.register_forward_hook(compare)
    model(**INPUTS, **told(kind)).loss.backward()
    assert found["compared"] == set(layers)
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    trained = {n for n, g in adapter_gradients(model).items() if g.abs().sum() > 0}
    assert trained == wanted or base in FORWARD_ONLY


@pytest.mark.parametrize("base", BASES)
def test_one_expert_is_stock_lora(base, folder):
    """Outputs, gradients, what is not trained, and the merged model."""

    def run(config):
        model = get_peft_model(load(folder, base), config)
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        output = model.train()(**INPUTS)
        output.loss.backward()
        gradients = [g for _, g in sorted(adapter_gradients(model).items())]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merging = model.eval().merge_and_unload()
        return output.logits.detach(), gradients, logits(merging, INPUTS), [str(w.message) for w in caught]

    fields = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": TARGET, "lora_dropout": 0.0}
    stock, ours = run(LoraConfig(**fields)), run(MoeLoraConfig(**fields, num_experts=1, tasks=["one"]))
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-5, atol=1e-5)
    assert len(ours[1]) == len(stock[1]) > 0
    for a, b in zip(ours[1], stock[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert relative(ours[2], stock[2]) < 1e-3
    assert len(ours[3]) == 1
    assert len(stock[3]) == (0 if base.startswith("torchao") else 8)  # one for each layer


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("base", ALL)
def test_it_generates_saves_loads_and_leaves_the_base_as_it_was(base, kind, folder, tmp_path):
    plain = load(folder, base)
    alone = logits(plain, INPUTS)
    model = quantised(kind, folder, base).eval()
    with model.disable_adapter():
        assert torch.equal(logits(model, INPUTS), alone)
    # before saving: with bitsandbytes 0.50, state_dict() changes what a 4-bit layer computes on CPU, adapter or not
    together = logits(model, INPUTS, **told(kind))
    assert relative(together, alone) > 0.05
    prompt = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
    new = model.generate(**prompt, **told(kind), max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(new[:, 5], together[:, -1].argmax(-1))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder, base), tmp_path).eval()
    assert torch.equal(logits(loaded, INPUTS, **told(kind)), together)


@pytest.mark.parametrize("kind", MERGEABLE)
@pytest.mark.parametrize("base", ALL)
def test_folding_it_loses_nothing_and_reads_the_adapter_only(base, kind, folder, tmp_path):
    model = fix(quantised(kind, folder, base).eval(), kind)
    expected = logits(model, INPUTS)
    how = {"task": "rad"} if kind == "moelora" else {}
    fold(model, tmp_path, **how)
    assert torch.equal(logits(model, INPUTS), expected)
    stock = PeftModel.from_pretrained(load(folder, base), tmp_path).eval()
    assert relative(logits(stock, INPUTS), expected) < max(5e-3, BASES[base][1])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("base", SOME)
def test_the_type_of_the_model_is_that_of_its_outputs_and_adapters_are_float32(base, dtype, folder):
    reference = quantised("moelora", folder, base).train()
    more = {"bnb_4bit_compute_dtype": dtype} if base == "nf4" else {}
    model = quantised("moelora", folder, base, dtype=dtype, **more).train()
    output = model(**INPUTS, **told("moelora"))
    assert output.logits.dtype is dtype
    output.loss.backward()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(g.abs().sum() > 0 for g in adapter_gradients(model).values())
    assert relative(output.logits, logits(reference, INPUTS, **told("moelora"))) < 0.1


def test_peft_reports_the_backend_and_all_linear_finds_quantised_layers(folder):
    model = quantised("moelora", folder, "nf4", changes={"target_modules": "all-linear"})
    assert model.get_model_status().quantization_backend == "bnb 4bit"
    assert len(routed_layers(model)) == 14
    default = quantised("moelora", folder, "nf4", changes={"target_modules": None})
    assert len(routed_layers(default)) == 14
    assert "quantization_backend='bnb 4bit'" in repr(routed_layers(default)[0])


# -- training --


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("base", ["nf4", *(pytest.param(base, marks=pytest.mark.slow) for base in SOME[1:])])
def test_both_kinds_of_checkpointing_give_the_gradients_of_none(base, kind, folder):
    gradients = []
    for again in ({}, {"use_reentrant": True}, {"use_reentrant": False}):
        how = {"gradient_checkpointing_kwargs": again} if again else {}
        prepared = prepare_model_for_kbit_training(load(folder, base), use_gradient_checkpointing=bool(again), **how)
        config = config_on(kind, folder)
        torch.manual_seed(0)
        model = get_peft_model(prepared, config).train()
        model(**INPUTS, **told(kind), use_cache=False).loss.backward()
        gradients.append(adapter_gradients(model))
    assert all(g.abs().sum() > 0 for g in gradients[0].values())
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_qlora_recipe_trains_the_adapter_and_nothing_else(kind, folder, tmp_path):
    base = load(folder, "nf4", dtype=torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = get_peft_model(prepare_model_for_kbit_training(base), config_on(kind, folder))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = {k: v.tolist() for k, v in INPUTS.items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        bf16=True,
        use_cpu=True,
        **checkpointing(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=Dataset.from_dict(rows | told(kind))).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


# -- merging --


@pytest.mark.parametrize("kind", MERGEABLE)
@pytest.mark.parametrize("base", ALL)
def test_merging_warns_once_with_the_loss_and_unmerging_puts_the_weights_back(base, kind, folder):
    alone = logits(load(folder, base), INPUTS)
    model = fix(quantised(kind, folder, base).eval(), kind)
    before = weights_in(model)  # of weights that no call in eval mode has laid out anew
    deltas = [layer.get_delta_weight("default").detach() for layer in routed_layers(model)]
    unmerged = logits(model, INPUTS)
    said = merged(model)
    after = weights_in(model)
    lost = [((w1 - w0 - d).norm() / d.norm()).item() for w0, w1, d in zip(before, after, deltas, strict=True)]
    assert len(said) == 1
    assert "peft_moe.fold" in said[0]
    figures = re.search(rf"{len(lost)} layers: ([\d.e-]+) on average, ([\d.e-]+) in the worst", said[0])
    assert [float(f) for f in figures.groups()] == pytest.approx([sum(lost) / len(lost), max(lost)], rel=0.05, abs=2e-3)
    assert max(lost) < 1
    # the merged model computes what its merged weights do
    reference = load(folder, None)
    for layer, weight in zip(routed_layers(model), after, strict=True):
        name = next(n for n, m in model.base_model.model.named_modules() if m is layer)
        reference.get_submodule(name).weight.data.copy_(weight)
    for name, module in load(folder, base).named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(tuple(TARGET)):
            reference.set_submodule(name, module)
    assert relative(logits(model, INPUTS), logits(reference, INPUTS)) < 0.03
    model.unmerge_adapter()
    assert torch.equal(logits(model, INPUTS), unmerged)
    merged(model)
    with model.disable_adapter():  # which unmerges
        assert torch.equal(logits(model, INPUTS), alone)
    assert torch.equal(logits(model, INPUTS), unmerged)


@pytest.mark.parametrize("base", ALL)
def test_merging_after_a_call_in_eval_mode_is_merging_before_it(base, folder):
    """The call makes bitsandbytes lay 4-bit weights out anew on some CPUs, and its dequantisation misreads that."""
    results = []
    for called in (True, False):
        model = fix(quantised("moelora", folder, base).eval(), "moelora")
        if called:
            logits(model, INPUTS)
        with pytest.warns(UserWarning, match="Merging rounds quantised weights anew"):
            results.append(logits(model.merge_and_unload(), INPUTS))
    assert relative(results[0], results[1]) < 0.1


def test_merging_twice_and_two_adapters_is_undone_at_once(folder):
    model = fix(quantised("moelora", folder, "nf4").eval(), "moelora")
    torch.manual_seed(1)
    model.add_adapter("other", config_on("moelora", folder, default_task="icd"))
    alone = weights_in(model)
    expected = logits(model, INPUTS)
    assert len(merged(model)) == 1
    with pytest.warns(UserWarning, match=r"bnb 4bit, 8 layers"), pytest.warns(UserWarning, match="Already following"):
        model.merge_adapter(adapter_names=["other"])
    assert all(not torch.equal(a, b) for a, b in zip(alone, weights_in(model), strict=True))
    model.unmerge_adapter()
    torch.testing.assert_close(weights_in(model), alone, rtol=0.02, atol=1e-3)
    assert torch.equal(logits(model, INPUTS), expected)


@pytest.mark.parametrize("base", ["nf4", "int8", "torchao-int8"])
def test_layers_that_are_not_quantised_merge_exactly_beside_those_that_are(base, folder):
    name = "modules_to_not_convert" if base.startswith("torchao") else "llm_int8_skip_modules"
    model = fix(quantised("moelora", folder, base, **{name: [".*down_proj", "lm_head"]}).eval(), "moelora")
    assert model.get_model_status().quantization_backend == "irregular"
    plain = [layer for layer in routed_layers(model) if layer.quantization_backend is None]
    before = [layer.get_base_layer().weight.detach().clone() for layer in plain]
    deltas = [layer.get_delta_weight("default") for layer in plain]
    (said,) = merged(model)
    assert "6 layers" in said
    assert len(plain) == 2
    for layer, weight, delta in zip(plain, before, deltas, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight + delta)
    model.unmerge_adapter()
    torch.testing.assert_close([layer.get_base_layer().weight.data for layer in plain], before)


def test_an_adapter_that_adds_nothing_merges_without_a_warning(folder):
    model = fix(quantised("moelora", folder, "nf4", changes={"init_lora_weights": True}).eval(), "moelora")
    assert merged(model) == []


@pytest.mark.parametrize("base", SOME)
def test_a_safe_merge_of_a_broken_adapter_changes_no_quantised_weight(base, folder):
    model = fix(quantised("moelora", folder, base).eval(), "moelora")
    before = logits(model, INPUTS)
    first = routed_layers(model)[0].moelora_bank["default"].lora_B.weight
    kept = first.detach().clone()
    first.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    first.data.copy_(kept)
    assert torch.equal(logits(model, INPUTS), before)


def test_a_layer_that_cannot_be_quantised_anew_is_as_it_was(folder):
    model = fix(quantised("moelora", folder, "torchao-int8").eval(), "moelora")
    before = logits(model, INPUTS)

    def refuse():
        raise RuntimeError("no kernel")

    routed_layers(model)[0].quantization_backend.get_apply_tensor_subclass = refuse
    with pytest.raises(RuntimeError, match="no kernel"):
        model.merge_adapter()
    assert torch.equal(logits(model, INPUTS), before)


def test_merging_is_refused_before_any_layer_is_changed(folder, tmp_path):
    """On a model that torchao has quantised in part, and not through transformers: how is not known later."""
    base = load(folder, None)
    quantize_(base.model.layers[1], Int8WeightOnlyConfig())
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"nothing can be merged.*TorchAoConfig"):
        model = get_peft_model(base, config_on("moelora", folder))
    fix(model.train(), "moelora")(**INPUTS).loss.backward()
    assert all(g.abs().sum() > 0 for n, g in adapter_gradients(model).items() if "router" not in n)
    expected = logits(model.eval(), INPUTS)
    before = weights_in(model)
    with pytest.raises(ValueError, match=r"torchao cannot be merged.*layers\.1\.self_attn\.q_proj.*peft_moe\.fold"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="torchao cannot be merged"):
        model.merge_and_unload()
    assert len(routed_layers(model)) == 8
    assert all(torch.equal(a, b) for a, b in zip(before, weights_in(model), strict=True))
    fold(model, tmp_path, task="rad")
    assert torch.equal(logits(model, INPUTS), expected)


class RowInt8Linear(nn.Module):
    """A quantised layer that no library has: rows of int8 and a scale for each."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.data / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_a_quantised_layer_that_peft_does_not_know_works_and_refuses_to_be_merged(folder):
    base = load(folder, None)
    base.model.layers[1].mlp.down_proj = RowInt8Linear(base.model.layers[1].mlp.down_proj)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="Unsupported layer type"):  # peft's own
        model = get_peft_model(base, config_on("moelora", folder))
    fix(model.train(), "moelora")(**INPUTS).loss.backward()
    first = routed_layers(model)[0].get_base_layer().weight.clone()
    with pytest.raises(ValueError, match=r"RowInt8Linear.*torch\.int8.*layers\.1\.mlp\.down_proj"):
        model.eval().merge_adapter()
    assert torch.equal(routed_layers(model)[0].get_base_layer().weight, first)
