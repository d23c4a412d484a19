"""AT-MoE: its equation, what is trained, and what adapters do: decoding, checkpointing, saving, trainers."""


import pytest
import torch
from grouped_helpers import EXPERTS, answered, grouped, make_experts
from helpers import adapter_gradients, logits, routed_layers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny_models import BUILDERS, PAD, make_inputs, make_model
from torch import nn

from peft_moe import GroupedMoeConfig

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
    model, without = grouped(arch, folder, mix=1), grouped(arch, folder, general_expert=None)
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
    model = grouped("llama", folder, router_input=router_input, train_experts=True)
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
    with model.disable_adapter():  # or the comparison would say nothing about the adapter
        assert not torch.equal(model.generate(**inputs, **GREEDY, **variant), together)


def test_an_encoder_decoder_generates_what_full_forwards_say(folder):
    model, inputs = grouped("t5", folder), left_padded()
    ids = torch.full((4, 1), PAD)
    for _ in range(5):
        ids = torch.cat([ids, logits(model, inputs, decoder_input_ids=ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(**inputs, **GREEDY), ids)
