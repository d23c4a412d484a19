"""The stock LoRA that matches a method, against both of them as `get_peft_model` really makes them."""

import copy
import json
from itertools import product

import pytest
import torch
from grouped_helpers import grouped_config, make_experts, make_lora
from helpers import TARGETS, config_for, logits, routed_layers
from kinds import KINDS, config_of
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import SIZES, make_inputs, make_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moe import GroupedMoeConfig, MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig, from_loras, matched_lora_config
from peft_moe.matched import exact_pattern, fill, match_lora

ARCHITECTURES = ["llama", "gpt2", "opt", "bert", "t5", "vit"]


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapted(model: PeftModel) -> dict[str, tuple[int, float]]:
    """Rank and factor of a stock LoRA by layer."""
    found = {}
    for key, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            assert len(layer.lora_A["default"].weight) == layer.r["default"]
            found[key] = layer.r["default"], layer.scaling["default"]
    return found


def of_method(model: PeftModel) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Ranks and factors of experts by layer."""
    return {
        key: (layer.bank("default").ranks, layer.bank("default").factors)
        for key, layer in model.base_model.model.named_modules()
        if layer in routed_layers(model)
    }


def both(config, arch="llama", match="parameters"):
    """The method's model, the LoRA's, and the match."""
    base = make_model(arch)
    found = match_lora(config, base, match)
    return get_peft_model(make_model(arch), config), get_peft_model(base, found.config), found


# -- the numbers of what is really made


@pytest.mark.parametrize(("arch", "kind"), list(product(ARCHITECTURES, KINDS)))
def test_the_lora_has_as_many_parameters_as_the_method_or_a_few_less(arch, kind, tmp_path):
    method, lora, found = both(config_of(kind, arch, tmp_path), arch)
    experts = sum(sum(ranks) * sum(sizes) for ranks, sizes in zip_layers(method))
    frozen = experts if kind == "at_moe" else 0  # trained in stage 1
    short = trained(method) + frozen - trained(lora)
    per_rank = [layer.in_features + layer.out_features for layer in routed_layers(method)]
    assert 0 <= short < min(per_rank)
    assert (found.of_method - found.parameters, found.difference) == (short, -short)
    assert {key: rank for key, (rank, _) in adapted(lora).items()} == found.ranks
    assert adapted(lora).keys() == of_method(method).keys()
    # a rank of its own, and what its router would be as ranks
    assert all(sum(ranks) <= found.ranks[key] for key, (ranks, _) in of_method(method).items())


def zip_layers(method):
    layers = routed_layers(method)
    return [(layer.bank("default").ranks, (layer.in_features, layer.out_features)) for layer in layers]


@pytest.mark.parametrize(("arch", "kind", "match"), list(product(["llama", "gpt2"], KINDS, ["parameters", "active"])))
def test_the_lora_has_the_methods_factors_and_learns(arch, kind, match, tmp_path):
    method, lora, _ = both(config_of(kind, arch, tmp_path, init_lora_weights=True), arch, match)
    for key, (ranks, factors) in of_method(method).items():
        mean = sum(r * s for r, s in zip(ranks, factors, strict=True)) / sum(ranks)
        assert adapted(lora)[key][1] == pytest.approx(mean, rel=1e-9)
    inputs = make_inputs(arch)
    torch.testing.assert_close(logits(lora.eval(), inputs), logits(make_model(arch), inputs))  # a new one adds nothing
    lora(**inputs).loss.backward()
    assert any(p.grad.abs().sum() > 0 for name, p in lora.named_parameters() if "lora_B" in name)


def active_ranks(config, arch="llama"):
    lora = get_peft_model(make_model(arch), matched_lora_config(config, make_model(arch), "active"))
    return {rank for rank, _ in adapted(lora).values()}


LAYERS = {"task_type": "CAUSAL_LM", "target_modules": TARGETS["llama"]}


def test_of_moelora_all_ranks_are_at_work():
    assert active_ranks(config_for("llama", r=8, num_experts=4)) == {8}
    assert active_ranks(config_for("llama", r=8, num_experts=1)) == {8}


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({"top_k": 2}, 2 * 3),
        ({"top_k": 3}, 3 * 3),
        ({"top_k": 9}, 5 * 3),  # there are no more than 5
        ({"top_k": 2, "num_shared_experts": 2}, (2 + 2) * 3),
        ({"num_experts": 1}, 3),
    ],
)
def test_of_molora_the_chosen_and_the_shared_are_at_work(fields, rank):
    assert active_ranks(MoLoraConfig(**LAYERS, **{"r": 3, "num_experts": 5, **fields})) == {rank}


def test_of_the_molora_recipe_attention_has_the_rank_of_one_expert():
    config = MoLoraConfig(task_type="CAUSAL_LM", r=4, num_experts=8, top_k=2, target_modules="all-linear")
    lora = get_peft_model(make_model("llama"), matched_lora_config(config, make_model("llama"), "active"))
    assert {rank for key, (rank, _) in adapted(lora).items() if "self_attn" in key} == {4}
    assert {rank for key, (rank, _) in adapted(lora).items() if "mlp" in key} == {8}


@pytest.mark.parametrize(
    ("fields", "ranks"),
    [
        ({}, {2 + 4, 2 + 4 + 8 + 2 + 4}),  # 2 experts below, 5 above
        ({"inference_top_k": 2}, {4 + 2, 8 + 4}),
        ({"inference_top_k": 9}, {6, 20}),
        ({"base_expert_mode": "regularized"}, {2 + 6, 2 + 20}),
        ({"base_expert_mode": "regularized", "base_expert_rank": 16, "inference_top_k": 1}, {16}),
    ],
)
def test_of_medmoelora_it_depends_on_the_layer_and_on_what_inference_keeps(fields, ranks):
    config = MedMoeLoraConfig(**LAYERS, expert_schedule=[2, 5], expert_ranks=[2, 4, 8], **fields)
    assert active_ranks(config) == ranks


def test_of_at_moe_all_experts_and_the_general_one_are_at_work(tmp_path):
    # a has rank 2 everywhere, b 4 in the first two kinds of layers, c 3 in all but the first, and the general one 5
    lora = get_peft_model(
        make_model("llama"), matched_lora_config(grouped_config("llama", tmp_path), make_model("llama"), "active")
    )
    by_name = {key.rpartition(".")[2]: rank for key, (rank, _) in adapted(lora).items()}
    assert by_name == {"q_proj": 2 + 4 + 5, "v_proj": 2 + 4 + 3 + 5, "gate_proj": 2 + 3 + 5, "down_proj": 2 + 3 + 5}


# -- parameters of every kind of router

VARIANTS = {
    "one gate for all": lambda: config_for("llama"),
    "a gate per layer": lambda: config_for("llama", gate_scope="layer"),
    "a gate per number of experts": lambda: config_for("llama", num_experts_pattern={"q_proj": 2, "v_proj": 1}),
    "gates in some layers": lambda: config_for("llama", gate_scope="layer", num_experts_pattern={"q_proj": 1}),
    "a large gate": lambda: config_for("llama", tasks=500, task_embedding_dim=100),
    "ranks by pattern": lambda: config_for("llama", rank_pattern={"q_proj": 16}, alpha_pattern={"v_proj": 3}),
    "rslora": lambda: config_for("llama", use_rslora=True, rank_pattern={"q_proj": 16}),
    "some layers": lambda: config_for("llama", layers_to_transform=[1]),
    "without some": lambda: config_for("llama", exclude_modules=["v_proj"]),
    "a regex": lambda: config_for("llama", target_modules=r".*\.1\.self_attn\.(q|v)_proj"),
    "molora": lambda: MoLoraConfig(**LAYERS, r=2),
    "molora without a bias": lambda: MoLoraConfig(**LAYERS, r=2, router_bias=False),
    "molora with top_p": lambda: MoLoraConfig(**LAYERS, r=2, top_p=0.5),
    "molora with shared experts": lambda: MoLoraConfig(**LAYERS, r=2, num_shared_experts=2),
    "molora's recipe": lambda: MoLoraConfig(task_type="CAUSAL_LM", r=2),
    "all linear layers": lambda: MoLoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"),
    "ascending": lambda: MedMoeLoraConfig(**LAYERS, num_experts=8, expert_ranks=[1, 2, 3]),
    "descending": lambda: MedMoeLoraConfig(**LAYERS, num_experts=8, expert_schedule="descending", lora_alpha=5),
    "a fixed temperature": lambda: MedMoeLoraConfig(**LAYERS, expert_ranks=2, learn_temperature=False),
    "no base expert": lambda: MedMoeLoraConfig(**LAYERS, expert_ranks=2, num_base_experts=0, expert_schedule=[1, 4]),
    "a trained base expert": lambda: MedMoeLoraConfig(**LAYERS, expert_ranks=2, base_expert_mode="regularized"),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_counted_as_they_are_made(variant):
    method, lora, found = both(VARIANTS[variant]())
    assert trained(method) == found.of_method
    assert trained(lora) == found.parameters <= found.of_method
    assert found.of_method - found.parameters < 32 + 64  # one rank of the largest layers
    assert adapted(lora).keys() == of_method(method).keys()


AT_MOE = {
    "two levels": {},
    "flat": {"flat_routing": True},
    "static": {"within_group": "static"},
    "a learnt mix": {"learn_mix": True},
    "by prompt": {"router_input": "prompt"},
    "without a general one": {"general_expert": None},
}


@pytest.mark.parametrize(("variant", "arch"), list(product(AT_MOE, ["llama", "t5", "gpt2"])))
def test_of_at_moe_both_stages_count_whether_experts_are_frozen_or_not(variant, arch, tmp_path):
    frozen, training = (
        grouped_config(arch, tmp_path, train_experts=train, **AT_MOE[variant]) for train in (False, True)
    )
    method, lora, found = both(training, arch)
    assert trained(method) == found.of_method
    assert trained(lora) == found.parameters <= found.of_method
    assert match_lora(frozen, make_model(arch))[1:] == found[1:]
    stage_2 = trained(get_peft_model(make_model(arch), frozen))
    assert 0 < stage_2 < found.of_method


def test_new_experts_of_at_moe_count_too():
    config = GroupedMoeConfig(**LAYERS, groups={"f": ["a", "b"]}, r=3, train_experts=True)
    method, _, found = both(config)
    assert trained(method) == found.of_method
    assert all(rank >= 6 for rank in found.ranks.values())


def test_what_both_train_is_not_in_the_numbers_and_in_the_config():
    fields = {"modules_to_save": ["norm"], "bias": "all", "trainable_token_indices": [3, 4]}
    method, lora, found = both(config_for("llama", **fields))
    assert trained(method) - found.of_method == trained(lora) - found.parameters > 0
    assert lora.active_peft_config.modules_to_save == ["norm"]


def test_biases_are_trained_by_both():
    method, lora, found = both(config_for("gpt2", bias="lora_only"), "gpt2")
    beside = trained(method) - found.of_method
    assert beside == trained(lora) - found.parameters > 0


def test_the_head_that_peft_saves_whole_is_no_target():
    config = config_for("bert", target_modules=["dense", "classifier"])
    method, lora, found = both(config, "bert")
    assert trained(method) - found.of_method == trained(lora) - found.parameters > 0
    assert not any("classifier" in key for key in found.ranks)
    assert adapted(lora).keys() == of_method(method).keys()


# -- the closest sum


def test_the_total_is_the_closest_that_rounding_each_layer_allows():
    config = MoLoraConfig(**LAYERS, r=2, num_experts=3, num_experts_pattern={"q_proj": 5})
    found = match_lora(config, make_model("llama"))
    sizes = {"q_proj": 64, "v_proj": 48, "gate_proj": 96, "down_proj": 96}
    options = []
    for index in (0, 1):
        for name, size in sizes.items():
            experts = 5 if name == "q_proj" else 3
            features = 64 if name == "down_proj" else 32
            exact = experts * 2 + experts * (features + 1) / size
            key = f"model.layers.{index}.{'self_attn' if name in ('q_proj', 'v_proj') else 'mlp'}.{name}"
            assert found.ranks[key] in (int(exact), int(exact) + 1)
            options.append([int(exact) * size, (int(exact) + 1) * size])
    best = max(total for total in map(sum, product(*options)) if total <= found.of_method)
    assert found.parameters == best


@pytest.mark.parametrize("seed", range(20))
def test_filling_finds_the_largest_sum_that_there_is(seed):
    draw = torch.Generator().manual_seed(seed)
    sizes = (torch.randperm(30, generator=draw)[:3] + 1).tolist()
    numbers = torch.randint(1, 6, (3,), generator=draw).tolist()
    room = int(torch.randint(0, 120, (1,), generator=draw))
    taken = fill(dict(zip(sizes, numbers, strict=True)), room)
    sums = (sum(n * s for n, s in zip(ns, sizes, strict=True)) for ns in product(*(range(n + 1) for n in numbers)))
    assert sum(size * number for size, number in taken.items()) == max(total for total in sums if total <= room)
    assert all(0 <= taken[size] <= number for size, number in zip(sizes, numbers, strict=True))


# -- names


class Stack(nn.Module):
    """Names that are the ends of others, and regexes of others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])
        self.inner = nn.Module()
        self.inner.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])
        self.inner_layers = nn.ModuleDict({"0": nn.Linear(8, 8), "x-y": nn.Linear(8, 8)})
        self.q = nn.Linear(8, 8)
        self.inner.q = nn.Linear(8, 4)

    def forward(self, x):
        x = self.inner_layers["x-y"](self.inner_layers["0"](self.layers[0](self.q(x))))
        return self.layers[1](self.inner.layers[1](self.inner.layers[0](x))) + self.inner.q(x)


def test_a_name_that_is_the_end_of_another_gets_a_rank_of_its_own():
    ranks = {"^q": 2, "inner.q": 4, "^layers.0": 6, r"inner\.layers\.0": 8, r"inner\.layers\.1": 10, "x-y": 12}
    config = MoeLoraConfig(
        target_modules=["0", "1", "q", "x-y"], num_experts=2, r=14, tasks=2, rank_pattern=ranks, lora_dropout=0.0
    )
    found = match_lora(config, Stack(), "active")
    assert found.ranks == {
        "layers.0": 6, "layers.1": 14, "inner.layers.0": 8, "inner.layers.1": 10, "inner_layers.0": 14,
        "inner_layers.x-y": 12, "q": 2, "inner.q": 4,
    }  # fmt: skip
    lora = get_peft_model(Stack(), found.config)
    assert {key: rank for key, (rank, _) in adapted(lora).items()} == found.ranks
    lora(torch.randn(3, 8))


def test_experts_that_adapt_a_name_which_is_the_end_of_another_leave_the_other_alone(tmp_path):
    model = get_peft_model(Stack(), LoraConfig(target_modules=r"q|inner\.layers\.0", r=2, init_lora_weights=False))
    model.save_pretrained(str(tmp_path))
    config = GroupedMoeConfig(groups={"f": {"a": str(tmp_path)}})
    found = match_lora(config, Stack(), "active")
    assert found.ranks == {"q": 2, "inner.layers.0": 2}
    assert adapted(get_peft_model(Stack(), found.config)).keys() == found.ranks.keys()


def test_patterns_are_the_same_after_saving(tmp_path):
    config = MedMoeLoraConfig(**LAYERS, expert_schedule=[2, 5], expert_ranks=[2, 3, 5], rank_pattern={"q_proj": 7})
    base = make_model("llama")
    lora = get_peft_model(base, matched_lora_config(config, base))
    lora.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(make_model("llama"), str(tmp_path))
    assert loaded.peft_type == "LORA"
    assert adapted(again) == adapted(lora)


def test_a_pattern_has_one_key_for_the_layers_that_share_a_value():
    values = {f"model.layers.{i}.mlp.up_proj": 3 for i in range(3)} | {"model.layers.0.q": 4, "head": 3}
    assert exact_pattern(values) == {
        r"^model\.layers\.(?:0|1|2)\.mlp\.up_proj": 3, "^head": 3, r"^model\.layers\.0\.q": 4
    }  # fmt: skip


# -- models


def tied() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def test_tied_embeddings_make_no_difference():
    config = MoLoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    base = tied()
    found = match_lora(config, base)
    method, lora = get_peft_model(tied(), config), get_peft_model(base, found.config)
    assert trained(method) == found.of_method
    assert trained(lora) == found.parameters
    assert not any("lm_head" in key for key in found.ranks)


def test_a_linear_layer_that_blocks_share_counts_once():
    def shared():
        model = make_model("llama")
        model.model.layers[1].mlp.gate_proj = model.model.layers[0].mlp.gate_proj
        return model

    config, base = MoLoraConfig(**LAYERS, r=2), shared()
    found = match_lora(config, base)
    assert trained(get_peft_model(shared(), config)) == found.of_method
    assert trained(get_peft_model(base, found.config)) == found.parameters
    assert len(found.ranks) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_weights_gives_the_same(kind, tmp_path):
    config = config_of(kind, "llama", tmp_path)
    with torch.device("meta"):
        empty = make_model("llama")
    here, there = match_lora(config, make_model("llama")), match_lora(config, empty)
    assert here[1:] == there[1:]
    assert here.config.to_dict() == there.config.to_dict()
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_model_config_and_random_numbers_stay_as_they_were(kind, tmp_path):
    config, model = config_of(kind, "llama", tmp_path), make_model("llama")
    fields, weights = copy.deepcopy(config.to_dict()), copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    trainable = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    matched_lora_config(config, model)
    assert torch.equal(torch.get_rng_state(), random)
    assert config.to_dict() == fields
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert [p.requires_grad for p in model.parameters()] == trainable


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_has_the_adapter_gives_what_its_base_does(kind, tmp_path):
    config = config_of(kind, "llama", tmp_path)
    expected = match_lora(config, make_model("llama"))
    model = get_peft_model(make_model("llama"), copy.deepcopy(config))
    names = [name for name, _ in model.named_parameters()]
    for given in (config, model.active_peft_config):  # as it was written, and as it was settled for the model
        found = match_lora(given, model)
        assert found[1:] == expected[1:]
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_of_a_saved_adapter_will_do(kind, tmp_path):
    config = config_of(kind, "llama", tmp_path)
    expected = match_lora(config, make_model("llama"))
    get_peft_model(make_model("llama"), config).save_pretrained(str(tmp_path / "saved"))
    base = make_model("llama")
    found = match_lora(PeftConfig.from_pretrained(str(tmp_path / "saved")), base)
    assert found[1:] == expected[1:]
    assert trained(get_peft_model(base, found.config)) == found.parameters  # to be trained, not loaded


def test_experts_in_memory_will_do(tmp_path):
    folders = make_experts("llama", tmp_path)
    model = PeftModel.from_pretrained(make_model("llama"), folders["a"], adapter_name="a")
    model.load_adapter(folders["b"], adapter_name="b")
    method = from_loras(model, {"f": {"a": "a", "b": "b"}})
    expected = GroupedMoeConfig(groups={"f": {name: folders[name] for name in "ab"}})
    found = match_lora(method.active_peft_config, method)
    assert found.ranks == match_lora(expected, make_model("llama")).ranks


@pytest.mark.filterwarnings("ignore:The base model has experts of its own:UserWarning")
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "mixtral"])
def test_other_architectures(name):
    config = MoLoraConfig(
        task_type="CAUSAL_LM", r=2, num_experts=4, num_experts_pattern={}, target_modules="all-linear"
    )
    method, lora, found = both(config, name)
    assert (trained(method), trained(lora)) == (found.of_method, found.parameters)


# -- fields


def test_fields_that_mean_the_same_are_carried_over():
    config = config_for("llama", lora_dropout=0.3, use_rslora=True, layers_to_transform=[0], exclude_modules=["v_proj"])
    lora = matched_lora_config(config, make_model("llama"))
    assert type(lora) is LoraConfig
    assert (lora.task_type, lora.lora_dropout, lora.use_rslora) == ("CAUSAL_LM", 0.3, True)
    assert (lora.layers_to_transform, lora.exclude_modules) == ([0], {"v_proj"})
    assert lora.target_modules == set(TARGETS["llama"])
    assert not lora.inference_mode
    json.dumps(lora.to_dict(), default=sorted)


def test_lists_are_not_the_methods_own():
    config = config_for("bert", modules_to_save=["pooler"])
    base = make_model("bert")
    get_peft_model(base, matched_lora_config(config, base))  # peft adds heads to the list that it is given
    assert config.modules_to_save == ["pooler"]


@pytest.mark.parametrize(
    ("given", "expected"), [(True, True), ("normal", True), ("kaiming", True), ("gaussian", "gaussian"), (False, False)]
)
def test_the_start_is_stock_loras_own_unless_both_know_it(given, expected):
    assert matched_lora_config(config_for(init_lora_weights=given), make_model("llama")).init_lora_weights is expected


@pytest.mark.parametrize(("arch", "expected"), [("gpt2", True), ("llama", False)])
def test_weights_that_are_stored_the_other_way_are_known(arch, expected):
    assert matched_lora_config(config_for(arch), make_model(arch)).fan_in_fan_out is expected


def test_what_was_matched_is_said_in_words():
    found = match_lora(config_for("llama", r=8, num_experts=1), make_model("llama"))
    assert str(found) == (
        "a stock LoRA of rank 8 in 8 layers, 4,864 parameters, and the method has 4,864: just as many"
    )
    found = match_lora(MoLoraConfig(**LAYERS, r=2), make_model("llama"), "active")
    assert str(found).endswith(f"{-found.difference:,} fewer ({found.difference / found.of_method:+.3%})")


# -- errors


@pytest.mark.parametrize(
    ("config", "match", "message"),
    [
        (LoraConfig(r=4), "parameters", "A LoraConfig is the config of no method with experts; give one of"),
        ({"r": 4}, "parameters", "A dict is the config of no method"),
        (config_for(), "size", r"match='size' is not known; use one of \['parameters', 'active'\]"),
        (config_for(), None, "match=None is not known"),
        (config_for(target_modules=["qq_proj"]), "parameters", r"target_modules=\{'qq_proj'\}.*match no module"),
        (config_for(layers_to_transform=[9]), "active", "match no module of the LlamaForCausalLM; give endings"),
        (config_for(target_modules=["embed_tokens"]), "active", "'model.embed_tokens' is a Embedding"),
        (MoLoraConfig(**LAYERS, top_p=0.9), "active", r"top_p=0\.9 gives tokens different numbers of experts"),
        (MedMoeLoraConfig(**LAYERS, expert_schedule=[2]), "active", r"expert_schedule=\[2\] has 1 entries"),
        (config_for(num_experts_pattern={"q_proj": 3}), "active", "r=8 does not split over num_experts=3"),
    ],
)
def test_what_cannot_be_matched_is_said(config, match, message):
    model = make_model("llama")
    with pytest.raises(ValueError, match=message):
        matched_lora_config(config, model, match)


def test_an_expert_of_another_model_is_refused(tmp_path):
    other = make_lora(tmp_path / "opt", "opt", seed=1)
    with pytest.raises(ValueError, match="which the base model does not have"):
        matched_lora_config(GroupedMoeConfig(groups={"f": {"a": other}}), make_model("llama"))
