"""AT-MoE: its equation, what is trained, and what adapters do: decoding, checkpointing, saving, trainers."""

import copy
import io
import pickle
import shutil
import socket
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from datasets import Dataset
from grouped_helpers import EXPERTS, answered, grouped, grouped_config, make_experts, make_lora, without_dropout
from helpers import (
    TARGETS,
    adapter_gradients,
    checkpointing,
    enable_checkpointing,
    first_logits,
    logits,
    routed_layers,
    transformers_own_adapter_methods,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny_models import BUILDERS, PAD, SIZES, make_inputs, make_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils.quantization_config import BitsAndBytesConfig

from peft_moe import GroupedMoeConfig, MoLoraConfig
from peft_moe.blocks import BlockEntry

CAUSAL = ["llama", "gpt2", "opt"]
INPUTS = ["token", "prompt"]
NAMES = ["f/a", "f/b", "s/c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the experts of this file are."""
    return tmp_path_factory.mktemp("experts")


def routers(model):
    """The routers of the active adapter by block."""
    return dict(model.base_model.routers(model.active_adapter))


def stock(arch, folder, expert):
    """The base model with one of the experts as peft loads it."""
    return PeftModel.from_pretrained(make_model(arch), make_experts(arch, folder)[expert]).eval()


def with_routers_of(model, other):
    """The same model with the other's routers."""
    for router, twin in zip(routers(model).values(), routers(other).values(), strict=True):
        router.load_state_dict(twin.state_dict())
    return model


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def same_gradients(found, expected, rtol=1e-5):
    """Relative to the norm of each tensor."""
    assert found.keys() == expected.keys()
    assert found
    for key, value in expected.items():
        assert (found[key] - value).norm() <= rtol * value.norm() + 1e-12, key


# -- the equation -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, hidden_states):
        return hidden_states + self.down(torch.tanh(self.up(hidden_states)))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


# Rank, alpha and targets of the experts in the equation; b adapts `up` alone.
LORAS = {
    "a": (2, 3, ["up", "down"]),
    "b": (3, 4, ["up"]),
    "d": (1, 2, ["up", "down"]),
    "c": (2, 2, ["up", "down"]),
    "p": (4, 6, ["up", "down"]),
}
GROUPS = {"f": ["a", "b", "d"], "s": ["c"]}


@pytest.fixture(scope="module")
def tiny_loras(tmp_path_factory):
    """Their folders."""
    folders = {}
    for seed, (name, (r, alpha, targets)) in enumerate(LORAS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        folders[name] = str(tmp_path_factory.mktemp("loras") / name)
        get_peft_model(Tiny(), config).save_pretrained(folders[name])
    return folders


def two_softmaxes(m_g, m_d, config, groups):
    """W'_G[g] W'_D[g, m] by expert, with W_D as the paper's matrix whose short rows are padded with -inf."""
    w_g = (m_g / config.group_temperature).softmax(0)
    rows, columns = len(groups), max(map(len, groups.values()))
    places = [(g, m, name) for g, names in enumerate(groups.values()) for m, name in enumerate(names)]
    matrix = [[torch.tensor(-torch.inf, dtype=torch.double)] * columns for _ in range(rows)]
    for score, (g, m, _) in zip(m_d, places, strict=True):
        matrix[g][m] = score
    w_d = (torch.stack([torch.stack(row) for row in matrix]) / config.expert_temperature).softmax(1)
    return {name: w_g[g] * w_d[g, m] for g, m, name in places}


def one_softmax(_m_g, m_d, config, groups):
    names = [name for members in groups.values() for name in members]
    return dict(zip(names, (m_d / config.expert_temperature).softmax(0), strict=True))


def equation(x, config, groups, loras, gates, softmaxes):
    """y = W0 x + (λ Σ_g Σ_m W'_G[g] W'_D[g, m] s B A + (1 - λ) s B_p A_p) x, token by token: arXiv 2410.10896, eq. 1.

    `gates` has what is trained, by block: W_G and W_D above each other, the experts' own scores if they are static, and
    the number whose sigmoid is λ.
    """
    base, num_groups = Tiny().double(), 0 if softmaxes is one_softmax else len(groups)

    def of_token(h, block, e):
        gate, layer = gates[block], base.layers[block]
        scores = gate.weight @ e if gate.weight is not None else e.new_zeros(0)
        m_g, m_d = scores[:num_groups], scores[num_groups:]
        weights = softmaxes(m_g, m_d if gate.expert_bias is None else gate.expert_bias, config, groups)
        mix = config.start_mix if gate.mix_bias is None else gate.mix_bias.sigmoid()
        weights = {name: mix * weight for name, weight in weights.items()}
        if config.general_expert is not None:
            weights["p"] = 1 - mix

        def linear(name, x):
            y = getattr(layer, name).weight @ x + getattr(layer, name).bias
            for expert, weight in weights.items():
                r, alpha, targets = LORAS[expert]
                if name in targets:
                    key = f"base_model.model.layers.{block}.{name}.lora_"
                    a, b = (loras[expert][f"{key}{part}.weight"].double() for part in "AB")
                    y = y + weight * (alpha / r) * (b @ (a @ x))
            return y

        return h + linear("down", torch.tanh(linear("up", h)))

    def entering(h):
        return h / (h.square().mean() + 1e-6).sqrt() if config.router_norm else h

    for block in range(2):
        rows = []
        for row in x:
            read = [entering(h) for h in row]
            if config.router_input == "prompt":  # of a model that does not generate, all of the input
                read = [sum(read) / len(read)] * len(read)
            rows.append(torch.stack([of_token(h, block, e) for h, e in zip(row, read, strict=True)]))
        x = torch.stack(rows)
    return x


EQUATIONS = {  # fields of the config, and what makes weights of scores
    "the defaults": ({}, two_softmaxes),
    "no norm": ({"router_norm": False}, two_softmaxes),
    "temperatures": ({"group_temperature": 0.5, "expert_temperature": 2.5}, two_softmaxes),
    "temperatures, no norm": ({"group_temperature": 3, "expert_temperature": 0.3, "router_norm": False}, two_softmaxes),
    "another λ": ({"mix": 0.8}, two_softmaxes),
    "learnt λ": ({"learn_mix": True, "mix": 0.3}, two_softmaxes),
    "no general expert": ({"general_expert": None}, two_softmaxes),
    "static": ({"within_group": "static", "expert_temperature": 0.7}, two_softmaxes),
    "flat": ({"flat_routing": True, "expert_temperature": 0.7, "group_temperature": 9}, one_softmax),
    "flat and static": ({"flat_routing": True, "within_group": "static", "learn_mix": True}, one_softmax),
    "one group": ({"groups": {"g": ["a", "b", "d", "c"]}, "expert_temperature": 0.7}, one_softmax),
    "one group, static": ({"groups": {"g": ["a", "b", "d", "c"]}, "within_group": "static"}, one_softmax),
    "a group each": ({"groups": {"g": ["a"], "h": ["b"], "i": ["c"]}}, two_softmaxes),
    "by prompt": ({"router_input": "prompt", "learn_mix": True}, two_softmaxes),
    "by prompt, no norm": ({"router_input": "prompt", "router_norm": False}, two_softmaxes),
}


@pytest.mark.parametrize(("fields", "softmaxes"), EQUATIONS.values(), ids=EQUATIONS)
def test_at_moe_is_its_equation_in_value_and_gradient(fields, softmaxes, tiny_loras):
    groups = fields.get("groups", GROUPS)
    sources = {group: {name: tiny_loras[name] for name in names} for group, names in groups.items()}
    fields = {"general_expert": tiny_loras["p"], **fields, "groups": sources, "init_lora_weights": False}
    torch.manual_seed(1)
    config = GroupedMoeConfig(**fields)
    model = get_peft_model(Tiny(), config).double()
    assert list(routers(model)) == ["layers.0", "layers.1"]  # one for both linear layers of a block
    loras = {name: load_file(f"{path}/adapter_model.safetensors") for name, path in tiny_loras.items()}
    gates = [router.gate for router in routers(model).values()]
    x = 2 * torch.randn(2, 3, 6, dtype=torch.double)
    x.requires_grad_()
    ours, expected = model(x), equation(x, config, groups, loras, gates, softmaxes)
    torch.testing.assert_close(ours, expected)
    assert not torch.allclose(ours, Tiny().double()(x), atol=1e-2)
    trained = [p for _, p in model.named_parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for gate in gates for p in gate.parameters()}
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, [x, *trained], upstream)
    for a, b in zip(found, torch.autograd.grad(expected, [x, *trained], upstream), strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b)


# -- what it is at its ends -------------------------------------------------------------------------------------------

ENDS = ["llama", "gpt2", "bert", "t5"]


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("arch", ENDS)
def test_with_mix_0_it_is_the_general_lora_alone(arch, router_input, folder):
    model = grouped(arch, folder, mix=0, router_input=router_input)
    inputs = make_inputs(arch)
    close(logits(model, inputs), logits(stock(arch, folder, "p"), inputs))


@pytest.mark.parametrize("arch", ENDS)
def test_with_mix_1_the_general_lora_is_as_if_it_were_not_there(arch, folder):
    inputs = make_inputs(arch)
    model = grouped(arch, folder, mix=1)
    without = with_routers_of(grouped(arch, folder, general_expert=None), model)
    close(logits(model, inputs), logits(without, inputs))
    assert not torch.allclose(logits(model, inputs), logits(grouped(arch, folder), inputs), atol=1e-4)


FIXED = {"a": {"f": {"a": 1.0}}, "b": {"f": {"b": 1.0}}, "c": {"s": 1.0}}


@pytest.mark.parametrize("expert", FIXED)
@pytest.mark.parametrize("arch", ENDS)
def test_all_weight_on_one_expert_is_that_stock_lora(arch, expert, folder):
    model, inputs = grouped(arch, folder), make_inputs(arch)
    group = {"group_weights": {"f": 1.0}} if expert != "c" else {}
    with model.routing(FIXED[expert], mix=1, **group):
        close(logits(model, inputs), logits(stock(arch, folder, expert), inputs))


@pytest.mark.parametrize("within_group", ["projection", "static"])
@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("flat_routing", [False, True])
def test_a_new_router_weighs_evenly(flat_routing, router_input, within_group, folder):
    fields = {"flat_routing": flat_routing, "router_input": router_input, "within_group": within_group}
    model = grouped("llama", folder, init_lora_weights=True, **fields)
    found = model.explain(make_inputs("llama"))
    assert list(found.blocks) == ["model.layers.0", "model.layers.1"]
    expected = [1 / 3, 1 / 3, 1 / 3] if flat_routing else [1 / 4, 1 / 4, 1 / 2]
    for block in found.blocks:
        assert found.mix[block] == 0.5
        weights = [w for experts in found.weights(block).values() for w in experts.values()]
        for weight, value in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight, torch.full_like(weight, value))


def test_an_even_mixture_is_the_mean_of_the_loras(folder):
    """By the stock LoRAs' own matrices, added to the base model's."""
    base, inputs = make_model("llama"), make_inputs("llama")
    weights = {"a": 1 / 8, "b": 1 / 8, "c": 1 / 4, "p": 1 / 2}
    with torch.no_grad():
        for expert, weight in weights.items():
            for key, layer in stock("llama", folder, expert).named_modules():
                if isinstance(layer, BaseTunerLayer):
                    delta = weight * layer.get_delta_weight("default")
                    base.get_submodule(key.removeprefix("base_model.model.")).weight += delta
    close(logits(grouped("llama", folder, init_lora_weights=True), inputs), logits(base, inputs))


# -- what is trained --------------------------------------------------------------------------------------------------


def a_step(model, inputs, lr=0.1):
    """One step of AdamW with much weight decay over everything that is handed to an optimiser."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.5)
    model.train()(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def everything(model):
    """All parameters and buffers, copied."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("learn_mix", [False, True])
@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("arch", BUILDERS)
def test_only_routers_get_gradients_and_change(arch, router_input, learn_mix, folder):
    model = grouped(arch, folder, router_input=router_input, learn_mix=learn_mix)
    blocks = {"llama": "model.layers.", "gpt2": "transformer.h.", "opt": "model.decoder.layers."}
    if arch in blocks:
        assert list(routers(model)) == [f"{blocks[arch]}{i}" for i in range(2)]
    parts = {"weight", "mix_bias"} if learn_mix else {"weight"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in trained if "modules_to_save" in name}  # peft trains the heads of classifiers
    assert {name.rpartition("moelora_router.default.gate.")[2] for name in trained - heads} == parts
    assert len(trained - heads) == len(parts) * len(routers(model))
    assert bool(heads) == (arch == "bert")
    before, inputs = everything(model), answered(arch)
    model.train()(**inputs).loss.backward()
    gradients = adapter_gradients(model)
    assert gradients.keys() == trained
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())  # from the first step on
    assert changed(a_step(model, inputs), before) == trained


@pytest.mark.parametrize("router_input", INPUTS)
def test_experts_can_be_trained_on_from_what_they_are(router_input, folder, tmp_path):
    inputs = answered("llama")
    frozen = grouped("llama", folder, router_input=router_input)
    model = with_routers_of(grouped("llama", folder, router_input=router_input, train_experts=True), frozen)
    assert torch.equal(logits(model, inputs), logits(frozen, inputs))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    banks = {name for name, _ in frozen.named_buffers() if ".moelora_bank.default.lora_" in name}
    assert trained == banks | {name for name, p in frozen.named_parameters() if p.requires_grad}
    before = everything(model)
    assert changed(a_step(model, inputs), before) == trained
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained


def test_new_experts_beside_trained_ones_add_nothing_until_they_are_trained(folder):
    experts, inputs = make_experts("llama", folder), make_inputs("llama")
    groups = {"f": {"a": experts["a"], "new": None}, "s": ["further"]}
    torch.manual_seed(0)
    config = GroupedMoeConfig(task_type="CAUSAL_LM", groups=groups, train_experts=True, r=3, lora_alpha=6)
    model = get_peft_model(make_model("llama"), config).eval()
    for name, expected in (("new", make_model("llama")), ("a", stock("llama", folder, "a"))):
        with model.routing({"f": {name: 1.0}}, group_weights={"f": 1.0}):
            close(logits(model, inputs), logits(expected, inputs))
    for layer in routed_layers(model):
        assert layer.moelora_bank["default"].ranks == (EXPERTS["a"][0], 3, 3)
        assert layer.moelora_bank["default"].factors == (2, 2, 2)
    for _ in range(2):
        a_step(model, inputs, lr=0.01)
    for weights in ({"f": {"new": 1.0}}, {"s": {"further": 1.0}}):
        with model.routing(weights, group_weights=dict.fromkeys(weights, 1.0)):
            assert not torch.allclose(logits(model, inputs), logits(make_model("llama"), inputs), atol=1e-4)


def test_all_experts_can_be_new(folder):
    config = GroupedMoeConfig(
        task_type="CAUSAL_LM", groups={"f": ["a", "b"], "s": ["c"]}, train_experts=True, target_modules=["v_proj"]
    )
    torch.manual_seed(0)
    model, inputs = get_peft_model(make_model("llama"), config).eval(), make_inputs("llama")
    assert torch.equal(logits(model, inputs), logits(make_model("llama"), inputs))
    before = everything(model)
    after = changed(a_step(a_step(model, inputs), inputs), before)
    assert after == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".default.")[2] for name in after} == {"lora_A.weight", "lora_B.weight", "gate.weight"}


# -- decoding ---------------------------------------------------------------------------------------------------------

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def left_padded(lengths=(5, 3, 4, 2), seed=0):
    inputs = make_inputs("llama", batch=len(lengths), seq=max(lengths), labels=False, seed=seed)
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - n).long() for n in lengths])
    return {"input_ids": inputs["input_ids"] * mask, "attention_mask": mask}


@pytest.mark.parametrize("arch", CAUSAL)
def test_decoding_token_by_token_with_a_cache_gives_the_logits_of_the_full_forward(arch, folder):
    model, ids = grouped(arch, folder), make_inputs(arch, batch=2, seq=7)["input_ids"]
    steps, cache = [], None
    for position in [slice(0, 3), *(slice(i, i + 1) for i in range(3, 7))]:
        with torch.no_grad():
            outputs = model(input_ids=ids[:, position], past_key_values=cache, use_cache=True)
        steps, cache = [*steps, outputs.logits], outputs.past_key_values
    close(torch.cat(steps, 1), logits(model, {"input_ids": ids}))


@pytest.mark.parametrize("arch", CAUSAL)
def test_padding_on_the_left_changes_no_row(arch, folder):
    model, inputs = grouped(arch, folder), left_padded()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    together = logits(model, inputs, **({} if arch == "opt" else {"position_ids": positions}))  # OPT counts by itself
    for i, mask in enumerate(inputs["attention_mask"].bool()):
        close(together[i, mask], logits(model, {"input_ids": inputs["input_ids"][i : i + 1, mask]})[0])


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("arch", BUILDERS)
def test_the_order_of_the_rows_of_a_batch_does_not_matter(arch, router_input, folder):
    model, inputs = grouped(arch, folder, router_input=router_input), make_inputs(arch)
    order = torch.tensor([2, 0, 1])
    shuffled = logits(model, {key: value[order] for key, value in inputs.items()})
    close(shuffled, logits(model, inputs)[order])
    for i in range(3):
        close(logits(model, {key: value[i : i + 1] for key, value in inputs.items()}), logits(model, inputs)[i : i + 1])


VARIANTS = [
    *((arch, {}) for arch in [*CAUSAL, "t5"]),
    *((arch, {"num_beams": 3}) for arch in ("llama", "t5")),
    *((arch, {"num_beams": 2, "num_return_sequences": 2}) for arch in ("llama", "t5")),
    ("llama", {"use_cache": False}),
]


@pytest.mark.parametrize(("arch", "variant"), VARIANTS, ids=str)
def test_generating_for_a_left_padded_batch_is_as_each_row_alone(arch, variant, folder):
    model, inputs = grouped(arch, folder), left_padded()
    together = model.generate(**inputs, **GREEDY, **variant)
    n = len(together) // 4
    for i, mask in enumerate(inputs["attention_mask"].bool()):
        row = {key: value[i : i + 1, mask] for key, value in inputs.items()}
        alone = model.generate(**row, **GREEDY, **variant)
        assert torch.equal(together[i * n : (i + 1) * n, -5:], alone[:, -5:])
    scores = first_logits(model, **inputs, **GREEDY, **variant)
    with model.disable_adapter():  # or the comparison would say nothing about the adapter
        assert not torch.allclose(first_logits(model, **inputs, **GREEDY, **variant), scores, atol=1e-2)


def test_an_encoder_decoder_generates_what_full_forwards_say(folder):
    model, inputs = grouped("t5", folder), left_padded()
    ids = torch.full((4, 1), PAD)
    for _ in range(5):
        ids = torch.cat([ids, logits(model, inputs, decoder_input_ids=ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(**inputs, **GREEDY), ids)


# -- checkpointing and compiling --------------------------------------------------------------------------------------


def one_forward(model, arch):
    return model(**answered(arch)).loss


def two_forwards(model, arch):
    """As preference training does: two batches, and a pass without the adapter between, before one backward."""
    first = model(**answered(arch)).loss
    with torch.no_grad(), model.disable_adapter(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # reentrant checkpointing
        reference = model(**answered(arch, seed=1)).loss
    second = model(**answered(arch, seed=1)).loss
    with torch.no_grad(), model.routing(mix=0.1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        model(**answered(arch, seed=2))
    return 2 * first - second + reference


def fixed_meanwhile(model, arch):
    with model.routing({"f": {"a": 0.25}}, mix=0.75):
        loss = model(**answered(arch)).loss
    model.set_group_weights(off=["s"])
    return loss


def in_training(arch, folder, **fields):
    return without_dropout(grouped(arch, folder, **fields)).train()


CHECKPOINTED = [
    *((arch, "token", one_forward) for arch in ("gpt2", "opt", "bert", "t5")),
    *((arch, "prompt", one_forward) for arch in ("gpt2", "bert", "t5")),
    *(("llama", router_input, how) for router_input in INPUTS for how in (one_forward, two_forwards, fixed_meanwhile)),
]


@pytest.mark.parametrize(("arch", "router_input", "losses"), CHECKPOINTED)
def test_checkpointing_gives_the_same_gradients(arch, router_input, losses, folder):
    found = []
    for use_reentrant in (None, True, False):
        model = in_training(arch, folder, router_input=router_input, learn_mix=True)
        if use_reentrant is not None:
            enable_checkpointing(model.get_base_model(), use_reentrant)
        losses(model, arch).backward()
        found.append(adapter_gradients(model))
    assert all(gradient.abs().max() > 0 for gradient in found[0].values())
    for again in found[1:]:
        same_gradients(again, found[0], rtol=1e-4)


@pytest.mark.parametrize("mode", list(CheckpointImpl))
@pytest.mark.parametrize("router_input", INPUTS)
def test_torch_s_checkpoint_wrapper_gives_the_same_gradients(router_input, mode, folder):
    """What FSDP's activation checkpointing uses; two calls before one backward are where it would go wrong."""
    found = []
    for wrapped in (False, True):
        model = in_training("llama", folder, router_input=router_input, learn_mix=True)
        model.enable_input_require_grads()
        if wrapped:
            layers = model.get_base_model().model.layers
            for i, layer in enumerate(layers):
                layers[i] = checkpoint_wrapper(layer, checkpoint_impl=mode)
        losses = [model(**answered("llama", seed=seed), use_cache=False).loss for seed in (0, 1)]
        (losses[0] + 3 * losses[1]).backward()
        gradients = adapter_gradients(model)
        found.append({key.replace("_checkpoint_wrapped_module.", ""): g for key, g in gradients.items()})
    same_gradients(found[1], found[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_backbone_can_be_called_by_itself_with_checkpointing(use_reentrant, folder):
    """Where no call of the adapted model has let its checkpoint functions know of routers."""
    found, inputs = [], make_inputs("llama", labels=False)
    for checkpointed in (False, True):
        model = in_training("llama", folder, learn_mix=True)
        if checkpointed:
            enable_checkpointing(model.get_base_model(), use_reentrant)
        model.base_model.model.model(**inputs).last_hidden_state.square().mean().backward()
        found.append(adapter_gradients(model))
    same_gradients(found[1], found[0])


def test_checkpoint_functions_are_as_they_were_after_unloading(folder):
    model = in_training("llama", folder)
    base = model.get_base_model()
    enable_checkpointing(base)
    before = [vars(layer)["_gradient_checkpointing_func"] for layer in base.model.layers]
    for _ in range(2):
        model(**answered("llama")).loss.backward()
    after = [vars(layer)["_gradient_checkpointing_func"] for layer in model.unload().model.layers]
    assert all(a is b for a, b in zip(after, before, strict=True))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it itself
@pytest.mark.parametrize("router_input", INPUTS)
def test_a_compiled_model_has_no_graph_breaks_no_recompiles_and_the_same_gradients(router_input, tmp_path):
    experts = {
        name: make_lora(tmp_path / name, seed=seed, r=2 + seed, target_modules=["gate_proj"])  # compiling takes seconds
        for seed, name in enumerate("abp")
    }
    torch.manual_seed(0)
    config = GroupedMoeConfig(
        task_type="CAUSAL_LM",
        groups={"f": {"a": experts["a"]}, "s": {"b": experts["b"]}},
        general_expert=experts["p"],
        router_input=router_input,
        learn_mix=True,
        init_lora_weights=False,
    )
    model = get_peft_model(make_model("llama"), config).train()
    torch._dynamo.reset()  # or what was compiled before counts as a recompile
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        inputs, found = answered("llama", seed=seed), []
        for call in (model, compiled):
            with torch._dynamo.config.patch(error_on_recompile=True):
                loss = call(**inputs).loss
            loss.backward()
            found.append((loss, adapter_gradients(model)))
            model.zero_grad()
        torch.testing.assert_close(found[1][0], found[0][0])
        same_gradients(found[1][1], found[0][1])


# -- precision --------------------------------------------------------------------------------------------------------


def own_decisions(model, inputs):
    """What the routers of a token-routed llama ought to say, in float64 from what enters its blocks."""
    entering, found = {}, {}
    hooks = [
        model.get_base_model().get_submodule(block).register_forward_pre_hook(
            lambda _block, args, key=block: entering.update({key: args[0]})
        )
        for block in routers(model)
    ]  # fmt: skip
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    for block, router in routers(model).items():
        e = entering[block].double()
        e = e / (e.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        scores = e @ router.gate.weight.double().T
        found[block] = (
            scores[..., :2].softmax(-1),
            torch.cat([scores[..., 2:4].softmax(-1), scores[..., 4:] * 0 + 1], -1),
        )
    return found, {e.dtype for e in entering.values()}


PRECISIONS = {  # of base, autocast, autocast_adapter_dtype, and the types of what enters blocks
    "float32": (torch.float32, False, True, {torch.float32}),
    "autocast": (torch.float32, True, True, {torch.float32, torch.bfloat16}),
    "bfloat16": (torch.bfloat16, False, True, {torch.bfloat16}),
    "all bfloat16": (torch.bfloat16, False, False, {torch.bfloat16}),
}


@pytest.mark.parametrize(("dtype", "autocast", "widen", "entering"), PRECISIONS.values(), ids=PRECISIONS)
def test_routers_compute_in_float32_whatever_enters(dtype, autocast, widen, entering, folder):
    torch.manual_seed(0)
    base, inputs = make_model("llama").to(dtype), make_inputs("llama")
    model = get_peft_model(base, grouped_config("llama", folder), autocast_adapter_dtype=widen).eval()
    assert {router.gate.weight.dtype for router in routers(model).values()} == {torch.float32 if widen else dtype}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = model.explain(inputs)
        expected, types = own_decisions(model, inputs)
    assert types <= entering
    for block in found.blocks:
        groups, within = expected[block]
        assert found.group_weights[block].dtype == torch.float32
        torch.testing.assert_close(found.group_weights[block].double(), groups, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.within[block].double(), within, rtol=0, atol=1e-6)
    assert logits(model, inputs).dtype == dtype


def expert_parts(model, expert, names=NAMES):
    """A and B of an expert by module, cut out of the banks."""
    i, found = ["f/a", "f/b", "s/c", "p"].index(expert), {}
    for key, layer in model.get_base_model().named_modules():
        if layer in set(routed_layers(model)):
            bank = layer.moelora_bank["default"]
            a, b = bank.lora_A.weight.split(bank.ranks)[i], bank.lora_B.weight.split(bank.ranks, 1)[i]
            if len(a):
                found[key] = a, b
    return found


@pytest.mark.parametrize("widen", [True, False])
@pytest.mark.parametrize("of_source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_base", [torch.float32, torch.bfloat16])
def test_experts_are_exact_copies_of_their_sources_or_of_the_type_of_the_base(of_base, of_source, widen, tmp_path):
    experts = make_experts("llama", tmp_path)
    for path in experts.values():
        tensors = load_file(f"{path}/adapter_model.safetensors")
        save_file(
            {k: v.to(of_source) for k, v in tensors.items()}, f"{path}/adapter_model.safetensors", {"format": "pt"}
        )
    base = make_model("llama").to(of_base)
    model = get_peft_model(base, grouped_config("llama", tmp_path), autocast_adapter_dtype=widen)
    for name, source in zip(["f/a", "f/b", "s/c", "p"], experts.values(), strict=True):
        tensors = load_file(f"{source}/adapter_model.safetensors")
        parts = expert_parts(model, name)
        assert len(tensors) == 2 * len(parts) > 0
        for key, (a, b) in parts.items():
            for part, tensor in (("A", a), ("B", b)):
                expected = tensors[f"base_model.model.{key}.lora_{part}.weight"].to(torch.float32 if widen else of_base)
                assert tensor.dtype == expected.dtype
                assert torch.equal(tensor, expected)


@pytest.mark.parametrize("widen", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_half_precision_adapter_is_widened_when_it_is_loaded(low_cpu_mem_usage, widen, folder, tmp_path):
    base = make_model("llama").bfloat16()
    model = get_peft_model(base, grouped_config("llama", folder), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(
        make_model("llama").bfloat16(),
        tmp_path,
        autocast_adapter_dtype=widen,
        low_cpu_mem_usage=low_cpu_mem_usage,
        is_trainable=True,
    )
    found = {key.replace(".default", ""): value for key, value in loaded.state_dict().items() if "moelora_" in key}
    assert found.keys() == saved.keys()
    for key, value in found.items():
        assert value.dtype == (torch.float32 if widen else torch.bfloat16), key
        assert torch.equal(value.bfloat16(), saved[key])


@pytest.mark.parametrize("router_input", INPUTS)
def test_autocast_trains_every_router(router_input, folder):
    model = grouped("llama", folder, router_input=router_input, learn_mix=True).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**answered("llama")).loss.backward()
    gradients = adapter_gradients(model)
    assert gradients.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(grad.dtype == torch.float32 and grad.abs().sum() > 0 for grad in gradients.values())


# -- saving and loading -----------------------------------------------------------------------------------------------

SAVED = [
    *((arch, router_input, {}) for arch in BUILDERS for router_input in INPUTS),
    ("llama", "token", {"within_group": "static", "learn_mix": True}),
    ("llama", "prompt", {"flat_routing": True, "router_norm": False, "expert_temperature": 0.5}),
]


@pytest.mark.parametrize(("arch", "router_input", "fields"), SAVED, ids=str)
def test_an_adapter_comes_back_with_nothing_but_its_directory(arch, router_input, fields, tmp_path):
    inputs, sources = make_inputs(arch), tmp_path / "sources"
    model = grouped(arch, sources, router_input=router_input, **fields)
    expected = logits(a_step(model, answered(arch)), inputs)
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(sources)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            make_model(arch), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(logits(loaded, inputs), expected)
        assert not any(p.requires_grad for p in loaded.parameters())
        assert list(routers(loaded)) == list(routers(model))


def test_what_is_saved_says_what_the_experts_were_and_holds_no_name_of_the_adapter(folder, tmp_path):
    grouped("llama", folder, mix=0.25).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, GroupedMoeConfig)
    assert (config.mix, config.names, config.num_experts) == (0.25, {"f": ["a", "b"], "s": ["c"]}, 4)
    for name, source in config.sources.items():
        assert source["source"] == make_experts("llama", folder)[name.rpartition("/")[2].replace("general_expert", "p")]
        assert len(source["sha256"]) == 64
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("default" in key for key in saved)
    assert {key.rpartition(".moelora_")[2] for key in saved} == {
        "bank.lora_A.weight",
        "bank.lora_B.weight",
        "router.gate.weight",
    }


def test_auto_peft_model_needs_nothing_but_the_directory(folder, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    base, inputs = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), make_inputs("llama")
    torch.manual_seed(0)
    model = get_peft_model(base, grouped_config("llama", folder)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@transformers_own_adapter_methods
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # said of every second adapter
@pytest.mark.parametrize("router_input", INPUTS)
def test_transformers_own_adapter_methods_do_what_peft_does(router_input, folder, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    native, inputs = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), make_inputs("llama")
    torch.manual_seed(0)
    native.add_adapter(grouped_config("llama", folder, router_input=router_input))
    native.eval()
    expected = logits(native, inputs)
    assert torch.equal(expected, logits(grouped("llama", folder, router_input=router_input), inputs))
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
    other = grouped("llama", folder, seed=5)
    other.save_pretrained(tmp_path / "other")
    auto.load_adapter(str(tmp_path / "other"), "second")
    auto.set_adapter("second")
    assert torch.equal(logits(auto, inputs), logits(other, inputs))
    auto.set_adapter("default")
    auto.delete_adapter("second")
    assert torch.equal(logits(auto, inputs), expected)


@pytest.mark.parametrize("router_input", INPUTS)
def test_training_goes_on_after_loading_as_if_it_had_not_stopped(router_input, folder, tmp_path):
    model, inputs = grouped("llama", folder, router_input=router_input, learn_mix=True), answered("llama")
    a_step(model, inputs).save_pretrained(tmp_path)
    expected = everything(a_step(model, inputs))
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path, is_trainable=True)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    assert not changed(a_step(loaded, inputs), expected)


def test_adapters_are_added_switched_saved_and_deleted_like_stock_ones(folder, tmp_path):
    model, inputs = grouped("llama", folder), make_inputs("llama")
    first = logits(model, inputs)
    model.add_adapter("second", grouped_config("llama", folder, router_input="prompt", learn_mix=True))
    assert torch.equal(logits(model, inputs), first)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".second." in key)
    assert all(p.requires_grad for key, p in model.named_parameters() if ".default." in key)
    model.set_adapter("second")
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        key for key, _ in model.named_parameters() if ".second." in key
    }
    second = logits(model, inputs)
    assert not torch.allclose(second, first, atol=1e-4)
    generated = model.generate(**left_padded(), **GREEDY)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    assert not [key for key in model.state_dict() if "second" in key]
    assert torch.equal(logits(model, inputs), first)
    model.load_adapter(tmp_path / "second", "again")
    model.set_adapter("again")
    assert torch.equal(logits(model, inputs), second)
    assert torch.equal(model.generate(**left_padded(), **GREEDY), generated)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(make_model("llama"), inputs))
    assert torch.equal(logits(model, inputs), second)


def test_two_active_adapters_add_up(folder):
    """In the first block, whose input no adapter has changed."""
    model, inputs = grouped("llama", folder, seed=1), make_inputs("llama")
    model.add_adapter("second", grouped_config("llama", folder, router_input="prompt"))
    layer, seen = model.get_base_model().model.layers[0].self_attn.q_proj, []
    layer.register_forward_hook(lambda _layer, _args, out: seen.append(out))
    with model.disable_adapter():
        logits(model, inputs)
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        logits(model, inputs)
    base, first, second, both = seen
    close(both, first + second - base)


@transformers_own_adapter_methods
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # said of every second adapter
def test_transformers_can_have_it_beside_adapters_of_another_method(folder, tmp_path):
    model, inputs = grouped("llama", folder, router_input="prompt"), answered("llama")
    model.save_pretrained(tmp_path)
    native = make_model("llama")
    torch.manual_seed(0)
    other = MoLoraConfig(target_modules=TARGETS["llama"], num_experts=4, init_lora_weights=False)
    native.add_adapter(other, "other")
    first = logits(native.eval(), inputs)
    native.load_adapter(str(tmp_path), "grouped")
    for name, expected in (("grouped", logits(model, inputs)), ("other", first)):
        native.set_adapter(name)
        assert torch.equal(logits(native.eval(), inputs), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of peft, which warns of wrapping a PeftModel
@pytest.mark.parametrize("router_input", INPUTS)
def test_a_tuner_around_it_changes_nothing(router_input, folder):
    inner, inputs = grouped("llama", folder, router_input=router_input), answered("llama")
    expected = logits(inner, inputs)
    outer = get_peft_model(inner, MoLoraConfig(target_modules=["o_proj"], num_experts=4))  # adds nothing yet
    assert torch.equal(logits(outer.eval(), inputs), expected)


@pytest.mark.parametrize("router_input", INPUTS)
def test_hooks_of_accelerate_can_come_before_and_after(router_input, folder):
    base, inputs = make_model("llama"), answered("llama")
    expected = logits(base, inputs)
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    first, second = base.model.layers
    hooked = vars(add_hook_to_module(first, hook))["forward"]
    torch.manual_seed(0)
    model = get_peft_model(base, grouped_config("llama", folder, router_input=router_input)).eval()
    add_hook_to_module(second, hook)
    assert torch.equal(logits(model, inputs), logits(grouped("llama", folder, router_input=router_input), inputs))
    assert torch.equal(logits(model.unload(), inputs), expected)
    assert vars(first)["forward"] is hooked


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch(model):
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("router_input", INPUTS)
def test_a_copied_model_is_the_same_and_apart(router_input, copied, folder):
    model, inputs = grouped("llama", folder, router_input=router_input), answered("llama")
    model.set_group_weights({"f": {"a": 0.25}})
    expected, generated = logits(model, inputs), model.generate(**left_padded(), **GREEDY)
    twin = copied(model)
    assert torch.equal(logits(twin, inputs), expected)
    assert torch.equal(twin.generate(**left_padded(), **GREEDY), generated)
    a_step(twin, inputs)
    assert not torch.equal(logits(twin, inputs), expected)
    assert torch.equal(logits(model, inputs), expected)
    twin.set_group_weights(mix=0.0)
    assert torch.equal(logits(model, inputs), expected)
    inner = {id(module) for module in twin.modules()}
    entries = [vars(module)["forward"] for module in twin.modules() if "forward" in vars(module)]
    blocks = [entry for entry in entries if isinstance(entry, BlockEntry)]
    assert len(blocks) == 2
    assert all(id(entry.block) in inner and entry.tuner is twin.base_model for entry in blocks)


def test_a_saved_config_without_its_weights_is_an_error_that_says_how_to_load(folder, tmp_path):
    grouped("llama", folder).save_pretrained(tmp_path)
    model = get_peft_model(make_model("llama"), PeftConfig.from_pretrained(tmp_path))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"Experts have no weights.*PeftModel.from_pretrained\(base_model, "):
            model(**make_inputs("llama"))


def test_a_config_can_be_used_again(folder):
    config, inputs = grouped_config("llama", folder), make_inputs("llama")
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = get_peft_model(make_model("llama"), config)
        assert model.peft_config["default"] is config  # as in peft, whose classes for tasks go on to change it
        found.append(logits(model.eval(), inputs))
    assert torch.equal(*found)
    torch.manual_seed(0)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert torch.equal(logits(model, inputs), found[0])


def test_a_config_that_cannot_be_read_again_still_belongs_to_its_adapter(tmp_path):
    model = grouped("llama", tmp_path)
    config = model.peft_config["default"]
    before = copy.deepcopy(config)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match="Expert f/a"):
        get_peft_model(make_model("llama"), config)
    assert config == before


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_heads_that_peft_adds_for_a_task_are_saved(task_type, tmp_path):
    config = GroupedMoeConfig(task_type=task_type, groups={"a": ["x", "y"]}, train_experts=True)
    model = get_peft_model(make_model("bert"), config)
    model.base_model.model.classifier.modules_to_save["default"].weight.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path)
    assert (loaded.base_model.model.classifier.modules_to_save["default"].weight == 0.5).all()


def test_a_layer_outside_of_blocks_has_a_router_of_its_own(tmp_path):
    layers = {"a": ["lm_head", "v_proj"], "b": ["lm_head"]}
    experts = {name: make_lora(tmp_path / name, seed=i, target_modules=layers[name]) for i, name in enumerate("ab")}
    config = GroupedMoeConfig(task_type="CAUSAL_LM", groups={"f": experts}, init_lora_weights=False)
    model, inputs = get_peft_model(make_model("llama"), config).eval(), make_inputs("llama")
    assert set(routers(model)) == {"model.layers.0", "model.layers.1", "lm_head"}
    for name, path in experts.items():
        with model.routing({"f": {name: 1.0}}):
            lora = PeftModel.from_pretrained(make_model("llama"), path).eval()
            close(logits(model, inputs), logits(lora, inputs))
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    e = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    with torch.no_grad():
        said = (e @ routers(model)["lm_head"].gate.weight.T).softmax(-1)
    close(model.explain(inputs).within["lm_head"], said)


# -- trainers and processes -------------------------------------------------------------------------------------------


def rows(arch="llama", batch=12):
    return Dataset.from_dict({key: value.tolist() for key, value in answered(arch, batch=batch).items()})


def arguments(directory, **more):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(directory), **{**settings, **more})


@pytest.mark.parametrize("train_experts", [False, True])
@pytest.mark.parametrize("router_input", INPUTS)
def test_the_stock_trainer_trains_saves_and_resumes_to_the_same_weights(router_input, train_experts, folder, tmp_path):
    fields = {"router_input": router_input, "learn_mix": True, "train_experts": train_experts}
    found = []
    for resumed in (False, True):
        model = in_training("llama", folder, **fields)
        before = everything(model)
        trainer = Trainer(model, arguments(tmp_path, save_steps=2, save_strategy="steps"), train_dataset=rows())
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        assert changed(model, before) == {name for name, p in model.named_parameters() if p.requires_grad}
        found.append(everything(model))
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        assert torch.equal(found[0][key], found[1][key]), key
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "checkpoint-4")
    assert not changed(loaded, found[0])


@pytest.mark.parametrize("router_input", INPUTS)
def test_the_best_checkpoint_is_loaded_at_the_end(router_input, folder, tmp_path):
    model = in_training("llama", folder, router_input=router_input)
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    more = {"load_best_model_at_end": True, "learning_rate": 3.0, "max_steps": 3}
    trainer = Trainer(model, arguments(tmp_path, **settings, **more), train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    best = PeftModel.from_pretrained(make_model("llama"), trainer.state.best_model_checkpoint)
    assert not changed(model, everything(best))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("router_input", INPUTS)
def test_trainer_with_accumulation_and_checkpointing_is_trainer_without(router_input, use_reentrant, folder, tmp_path):
    trained = []
    for setting in (
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, **checkpointing(use_reentrant)},
    ):
        model = in_training("llama", folder, router_input=router_input)
        Trainer(model, arguments(tmp_path, optim="sgd", max_steps=2, **setting), train_dataset=rows()).train()
        trained.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, rtol=1e-4, atol=1e-6)


WORLD = 2


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ddp_losses(model, seed):
    """Two forwards before one backward, and one without the adapter between, as preference training has it."""
    adapted = getattr(model, "module", model)
    first = model(**answered("llama", seed=seed)).loss
    with torch.no_grad(), adapted.disable_adapter():
        reference = model(**answered("llama", seed=seed)).loss
    return first - 3 * model(**answered("llama", seed=seed + 10)).loss + reference


def run_rank(rank, port, folder, experts):
    """A process of the two: what it finds is saved by rank 0."""
    import os

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo")
    found = {}
    for router_input in INPUTS:
        model = in_training("llama", experts, router_input=router_input, learn_mix=True)
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(**answered("llama", seed=rank)).loss.backward()
        found[router_input, "one"] = adapter_gradients(model)
        model.zero_grad()
        wrapped = nn.parallel.DistributedDataParallel(model, static_graph=True)
        try:
            ddp_losses(wrapped, rank).backward()
            found[router_input, "two"] = adapter_gradients(model)
        except RuntimeError as error:
            found[router_input, "two"] = str(error)
    torch.distributed.barrier()
    if rank == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, folder):
    """Started once for all tests, since importing everything takes most of their time."""
    make_experts("llama", folder)
    ranks = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (free_port(), ranks, folder), nprocs=WORLD)
    return torch.load(ranks / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("forwards", ["one", "two"])
@pytest.mark.parametrize("router_input", INPUTS)
def test_under_ddp_the_gradient_is_the_mean_of_the_ranks_own(two_processes, router_input, forwards, folder):
    own = []
    for rank in range(WORLD):
        model = in_training("llama", folder, router_input=router_input, learn_mix=True)
        if forwards == "one":
            model(**answered("llama", seed=rank)).loss.backward()
        else:
            ddp_losses(model, rank).backward()
        own.append(adapter_gradients(model))
    found = two_processes[router_input, forwards]
    assert not isinstance(found, str), found
    same_gradients(found, {key: (own[0][key] + own[1][key]) / 2 for key in own[0]})


# -- quantised base models, and the end -------------------------------------------------------------------------------


@pytest.mark.parametrize("router_input", INPUTS)
def test_a_quantised_base_trains_generates_and_saves(router_input, tmp_path):
    # bitsandbytes' 4-bit blocks need layers of 64 and more
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load(**more):
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **more)

    experts = {}
    for i, name in enumerate("ab"):
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=2 + i, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
        experts[name] = str(tmp_path / name)
        get_peft_model(load(), lora).save_pretrained(experts[name])
    config = GroupedMoeConfig(
        task_type="CAUSAL_LM", groups={"f": experts}, general_expert=experts["b"], router_input=router_input
    )
    model, inputs = get_peft_model(load(quantization_config=bits), config), answered("llama")
    assert all(layer.quantization_backend is not None for layer in routed_layers(model))
    model.train()(**inputs).loss.backward()
    gradients = adapter_gradients(model)
    assert gradients.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(grad.abs().sum() > 0 for grad in gradients.values())
    model.eval()
    with model.routing({"f": {"a": 1.0}}, mix=1):
        fixed = logits(model, inputs)
    lora = PeftModel.from_pretrained(load(quantization_config=bits), experts["a"]).eval()
    torch.testing.assert_close(fixed, logits(lora, inputs), rtol=1e-3, atol=1e-4)
    expected = logits(model, inputs)
    assert model.generate(**left_padded(), **GREEDY).shape == (4, 10)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(quantization_config=bits), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, inputs), expected)


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("arch", BUILDERS)
def test_disabling_and_unloading_give_back_the_base_model(arch, router_input, folder):
    base, inputs = make_model(arch), make_inputs(arch)
    before, expected = {key: set(vars(module)) for key, module in base.named_modules()}, logits(base, inputs)
    torch.manual_seed(0)
    model = get_peft_model(base, grouped_config(arch, folder, router_input=router_input)).eval()
    assert not torch.allclose(logits(model, inputs), expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
        assert not any(p.requires_grad for p in model.parameters())
    assert any(p.requires_grad for p in model.parameters())
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, inputs), expected)
    assert not routed_layers(unloaded)
    assert not [key for key, module in unloaded.named_modules() if "forward" in vars(module)]
    assert {key: set(vars(module)) for key, module in unloaded.named_modules()} == before


def test_a_second_adapter_of_a_loaded_one_has_its_experts(tmp_path):
    """As TRL's preference trainers make one for reference: from the config, with the parameters copied."""
    grouped("llama", tmp_path / "sources", seed=1).save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "sources")
    model, inputs = PeftModel.from_pretrained(make_model("llama"), tmp_path / "adapter").eval(), make_inputs("llama")
    expected = logits(model, inputs)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter)
    model.set_adapter("ref")
    assert torch.equal(logits(model, inputs), expected)
