"""The papers' equations as naive loops, in float64, with gradients; and stock LoRA where there is one expert."""

import pytest
import torch
from helpers import config_for, routed, routed_layers
from peft import LoraConfig, get_peft_model
from tiny_models import TASK_TYPES, make_inputs, make_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from peft_moe import MedMoeLoraConfig, MoLoraConfig
from peft_moe.losses import Routed


def moelora_equation(x, tasks, w0, bias, a, b, embedding, w_t, alpha, num_experts):
    """h_j = W0 x + (α / r) Σ_i ω_ji B_i A_i x, ω_j = softmax(W_T e_j): arXiv 2310.18339, III, row by row."""
    r = a.shape[0]
    per_expert = r // num_experts
    rows = []
    for x_row, task in zip(x, tasks, strict=True):
        e = embedding[task]
        scores = [sum(w_t[i, d] * e[d] for d in range(len(e))) for i in range(num_experts)]
        exponentials = [s.exp() for s in scores]
        h = x_row @ w0.T + bias
        for i in range(num_experts):
            a_i, b_i = a[i * per_expert : (i + 1) * per_expert], b[:, i * per_expert : (i + 1) * per_expert]
            h = h + (alpha / r) * exponentials[i] / sum(exponentials) * (x_row @ a_i.T @ b_i.T)
        rows.append(h)
    return torch.stack(rows)


@pytest.mark.parametrize("gate_scope", ["model", "layer"])
@pytest.mark.parametrize("batch_seq", [(3, 5), (3, 3), (3, 1)])  # batch = sequence is where a wrong axis goes unnoticed
def test_moelora_is_its_equation_in_value_and_gradient(gate_scope, batch_seq):
    torch.manual_seed(0)
    config = config_for(
        "llama", task_type=None, target_modules=["0"], r=6, num_experts=3, lora_alpha=9, gate_scope=gate_scope
    )
    model = get_peft_model(nn.Sequential(nn.Linear(7, 4)), config).double()
    (layer,) = routed_layers(model)
    bank, gate = layer.moelora_bank["default"], layer.router_of("default").gate
    x = torch.randn(*batch_seq, 7, dtype=torch.double, requires_grad=True)
    parameters = (x, bank.lora_A.weight, bank.lora_B.weight, gate.embedding.weight, gate.proj.weight)
    ours = model(x, task_ids=[2, 0, 1])
    equation = moelora_equation(
        x, [2, 0, 1], layer.base_layer.weight, layer.base_layer.bias, *parameters[1:], alpha=9, num_experts=3
    )
    torch.testing.assert_close(ours, equation)
    upstream = torch.randn_like(ours)
    gradients = zip(
        torch.autograd.grad(ours, parameters, upstream),
        torch.autograd.grad(equation, parameters, upstream),
        strict=True,
    )
    for a, b in gradients:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("alpha", [16, 6])
def test_one_expert_is_stock_lora_with_the_same_weights(name, alpha):
    """Bitwise when alpha / r is a power of two, which commutes with rounding; else 1e-6, as we scale before B."""
    config = config_for(name, num_experts=1, r=8, lora_alpha=alpha, lora_dropout=0.1)
    ours = get_peft_model(make_model(name), config).train()
    stock_config = LoraConfig(
        task_type=TASK_TYPES[name],
        r=8,
        lora_alpha=alpha,
        lora_dropout=0.1,
        target_modules=config.target_modules,
        fan_in_fan_out=name == "gpt2",
    )
    stock = get_peft_model(make_model(name), stock_config).train()
    for (path, layer), twin in zip(
        ((n, m) for n, m in ours.named_modules() if hasattr(m, "moelora_bank")),
        (m for m in stock.modules() if hasattr(m, "lora_embedding_A")),
        strict=True,
    ):
        assert layer.router_of("default") is None, path
        twin.lora_A.load_state_dict({"default.weight": layer.moelora_bank["default"].lora_A.weight})
        twin.lora_B.load_state_dict({"default.weight": layer.moelora_bank["default"].lora_B.weight})
    if name == "bert":
        stock.classifier.load_state_dict(ours.classifier.state_dict())
    inputs = make_inputs(name)
    outputs = []
    for model in (ours, stock):
        torch.manual_seed(1)  # the same dropout masks
        outputs.append(model(**inputs))
    difference = (outputs[0].logits - outputs[1].logits).abs().max()
    assert difference <= (0 if alpha == 16 else 1e-6 * max(1, outputs[1].logits.abs().max()))
    outputs[0].loss.backward()
    outputs[1].loss.backward()
    gradients = (
        [p.grad for n, p in ours.named_parameters() if "lora_A" in n],
        [p.grad for n, p in stock.named_parameters() if "lora_A" in n],
    )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_equal_experts_are_one_lora_whatever_the_gate_says():
    model = routed("llama", r=8, num_experts=4)
    for layer in routed_layers(model):
        bank = layer.moelora_bank["default"]
        bank.lora_A.weight.data = bank.lora_A.weight[:2].repeat(4, 1)
        bank.lora_B.weight.data = bank.lora_B.weight[:, :2].repeat(1, 4)
    inputs = make_inputs("llama")
    outputs = [model(**inputs, task_ids=task).logits for task in range(3)]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


def test_a_layer_has_as_many_parameters_as_a_lora_of_the_total_rank_and_there_is_one_gate():
    model = routed("llama", r=8, num_experts=4, task_embedding_dim=16)
    lora = get_peft_model(make_model("llama"), LoraConfig(r=8, target_modules=config_for("llama").target_modules))
    gate = 3 * 16 + 4 * 16  # |T|·d + N·d
    assert model.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0] + gate
    per_layer = routed("llama", r=8, num_experts=4, task_embedding_dim=16, gate_scope="layer")
    assert per_layer.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0] + 8 * gate


def test_dropping_experts_in_some_layers_leaves_one_gate_per_count():
    model = routed("llama", num_experts_pattern={"q_proj": 1, "v_proj": 2})
    assert set(model.base_model.moelora_router["default"]) == {"2", "4"}
    assert {
        n: (len(m.moelora_bank["default"].ranks))
        for n, m in model.named_modules()
        if hasattr(m, "moelora_bank") and "layers.0" in n
    } == {
        "base_model.model.model.layers.0.self_attn.q_proj": 1,
        "base_model.model.model.layers.0.self_attn.v_proj": 2,
        "base_model.model.model.layers.0.mlp.gate_proj": 4,
        "base_model.model.model.layers.0.mlp.down_proj": 4,
    }


# MING-MOE's MoLoRA and Med-MoE-LoRA: experts chosen by the tokens


def one_layer(config, *, sizes=(7, 4), seed=0):
    """A linear layer with an adapter, in float64: the model, its layer, bank and gate."""
    torch.manual_seed(seed)
    model = get_peft_model(nn.Sequential(nn.Linear(*sizes)), config).double()
    (layer,) = routed_layers(model)
    router = layer.router_of("default")
    return model, layer, layer.moelora_bank["default"], router and router.gate


def molora(**changes):
    fields = {"target_modules": ["0"], "r": 2, "num_experts": 5, "lora_alpha": 3, "lora_dropout": 0.0}
    return MoLoraConfig(**{**fields, "init_lora_weights": False, **changes})


def medmoe(**changes):
    fields = {"target_modules": ["0"], "expert_schedule": [5], "expert_ranks": [1, 2, 3], "lora_dropout": 0.0}
    return MedMoeLoraConfig(**{**fields, "balance_loss": "none", "init_lora_weights": False, **changes})


def same_in_value_and_gradient(ours, equation, parameters):
    torch.testing.assert_close(ours, equation)
    upstream = torch.randn_like(ours)
    ours = torch.autograd.grad(ours, parameters, upstream)
    for a, b in zip(ours, torch.autograd.grad(equation, parameters, upstream), strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


def over_tokens(x, token_equation):
    return torch.stack([token_equation(token) for token in x.reshape(-1, x.shape[-1])]).view(*x.shape[:-1], -1)


def molora_equation(x, w0, bias, a, b, w_g, b_g, *, scaling, r, k, num_shared=0):
    """y = W0 x + Σ_{i∈K} exp(l_i) / Σ_{j∈K} exp(l_j) · scaling · B_i A_i x, l = W_g x + b: arXiv 2404.09027.

    Shared experts come first, with weight 1.
    """

    def of_token(token):
        logits = [sum(w_g[i, d] * token[d] for d in range(len(token))) for i in range(len(w_g))]
        if b_g is not None:
            logits = [logit + b_g[i] for i, logit in enumerate(logits)]
        chosen = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:k]
        total = sum(logits[i].exp() for i in chosen)
        weights = dict.fromkeys(range(num_shared), 1.0) | {num_shared + i: logits[i].exp() / total for i in chosen}
        y = w0 @ token + bias
        for i, weight in weights.items():
            rows = slice(i * r, (i + 1) * r)
            y = y + weight * scaling * (b[:, rows] @ (a[rows] @ token))
        return y

    return over_tokens(x, of_token)


MOLORA = {  # changes of the config, and the factor on each expert
    "the paper": ({}, 3 / 2),
    "no bias": ({"router_bias": False}, 3 / 2),
    "three per token": ({"top_k": 3}, 3 / 2),
    "K = N": ({"top_k": 5}, 3 / 2),
    "K > N": ({"top_k": 9}, 3 / 2),
    "shared experts": ({"num_shared_experts": 2}, 3 / 2),
    "rslora": ({"use_rslora": True}, 3 / 2**0.5),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (3, 3), (3, 1), (6,)])
@pytest.mark.parametrize(("changes", "scaling"), MOLORA.values(), ids=MOLORA)
def test_molora_is_its_equation_in_value_and_gradient(changes, scaling, shape, training):
    config = molora(**changes)
    model, layer, bank, gate = one_layer(config)
    x = torch.randn(*shape, 7, dtype=torch.double, requires_grad=True)
    parameters = [x, bank.lora_A.weight, bank.lora_B.weight, gate.weight] + ([gate.bias] if config.router_bias else [])
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters[1:]}
    base = layer.base_layer
    equation = molora_equation(
        x, base.weight, base.bias, bank.lora_A.weight, bank.lora_B.weight, gate.weight, gate.bias,
        scaling=scaling, r=2, k=config.top_k, num_shared=config.num_shared_experts,
    )  # fmt: skip
    same_in_value_and_gradient(model.train(training)(x), equation, parameters)


def medmoe_equation(x, w0, bias, a, b, w_g, tau, *, ranks, scalings, num_empty, k=None):
    """h = W0 x + Σ_i g_i s_i B_i A_i x, g = softmax(W_g x / τ): arXiv 2601.07935, eq. 1, 3 and 4; s_i is alpha_i / r_i.

    The first `num_empty` experts have no matrices. With k, g is cut to its k largest and renormalised.
    """

    def of_token(token):
        scores = [sum(w_g[i, d] * token[d] for d in range(len(token))) / tau for i in range(len(w_g))]
        kept = sorted(range(len(scores)), key=lambda i: -scores[i].item())[:k]
        total = sum(scores[i].exp() for i in kept)
        h, start = w0 @ token + bias, 0
        for i, (r, scaling) in enumerate(zip(ranks, scalings, strict=True), start=num_empty):
            rows = slice(start, start + r)
            start += r
            if i in kept:
                h = h + scores[i].exp() / total * scaling * (b[:, rows] @ (a[rows] @ token))
        return h

    return over_tokens(x, of_token)


MEDMOE = {  # changes of the config, ranks, and the factor on each expert
    "the paper": ({}, (1, 2, 3, 1, 2), (2,) * 5),
    "no base expert": ({"num_base_experts": 0}, (1, 2, 3, 1, 2), (2,) * 5),
    "two base experts": ({"num_base_experts": 2}, (1, 2, 3, 1, 2), (2,) * 5),
    "a trained base expert": ({"base_expert_mode": "regularized"}, (1, 1, 2, 3, 1, 2), (2,) * 6),
    "of its own rank": (
        {"base_expert_mode": "regularized", "base_expert_rank": 4}, (4, 1, 2, 3, 1, 2), (2,) * 6),
    "one rank": ({"expert_ranks": 2}, (2,) * 5, (2,) * 5),
    "one alpha": ({"lora_alpha": 6}, (1, 2, 3, 1, 2), (6, 3, 2, 6, 3)),
    "rslora": ({"use_rslora": True}, (1, 2, 3, 1, 2), (2, 2 * 2**0.5, 2 * 3**0.5, 2, 2 * 2**0.5)),
    "a fixed temperature": ({"learn_temperature": False, "temperature": 0.5}, (1, 2, 3, 1, 2), (2,) * 5),
    "a hot start": ({"temperature": 3.0}, (1, 2, 3, 1, 2), (2,) * 5),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 5), (3, 3), (6,)])
@pytest.mark.parametrize(("changes", "ranks", "scalings"), MEDMOE.values(), ids=MEDMOE)
def test_medmoelora_is_its_equation_in_value_and_gradient(changes, ranks, scalings, shape):
    config = medmoe(**changes)
    model, layer, bank, gate = one_layer(config)
    x = torch.randn(*shape, 7, dtype=torch.double, requires_grad=True)
    parameters = [x, bank.lora_A.weight, bank.lora_B.weight, gate.weight]
    tau = torch.tensor(config.temperature, dtype=torch.double)
    if config.learn_temperature:
        parameters.append(gate.temperature_bias)
        tau = 0.05 + (1 + gate.temperature_bias.exp()).log()  # softplus
    assert tau.item() == pytest.approx(config.temperature, rel=1e-6)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters[1:]}
    num_empty = config.num_base_experts if config.base_expert_mode == "frozen" else 0
    assert len(gate.weight) == num_empty + len(ranks)
    base = layer.base_layer
    equation = medmoe_equation(
        x, base.weight, base.bias, bank.lora_A.weight, bank.lora_B.weight, gate.weight, tau,
        ranks=ranks, scalings=scalings, num_empty=num_empty,
    )  # fmt: skip
    # outside of training, since a plain module's output is no loss to add that of a trained base expert to
    same_in_value_and_gradient(model.eval()(x), equation, parameters)


def test_what_a_frozen_base_expert_gets_stays_with_the_base_model():
    """Scores that are all for the base expert: h = W0 x. Scores that are all against it: the others have all weight."""
    model, layer, _, gate = one_layer(medmoe())
    without, _, bank, other = one_layer(medmoe(num_base_experts=0))
    bank.load_state_dict(layer.moelora_bank["default"].state_dict())
    without.base_model.model[0].base_layer.load_state_dict(layer.base_layer.state_dict())
    other.weight.data = gate.weight.data[1:].clone()
    x = torch.rand(6, 7, dtype=torch.double) + 0.1  # positive, so that a large row of W_g is a large score
    damped = model(x) - layer.base_layer(x)
    share = (gate(x).softmax(-1))[:, 1:].sum(-1, keepdim=True)
    assert share.max() < 1
    torch.testing.assert_close(damped, share * (without(x) - layer.base_layer(x)))
    gate.weight.data[0] = 1e3
    assert torch.equal(model(x), layer.base_layer(x))
    gate.weight.data[0] = -1e3
    torch.testing.assert_close(model(x), without(x))


@pytest.mark.parametrize("k", [1, 2, 6, 9])
def test_top_k_of_medmoelora_is_for_inference_alone(k):
    model, layer, bank, gate = one_layer(medmoe(inference_top_k=k))
    x = torch.randn(3, 5, 7, dtype=torch.double)
    base, tau = layer.base_layer, gate.temperature

    def equation(k):
        tensors = (base.weight, base.bias, bank.lora_A.weight, bank.lora_B.weight, gate.weight, tau)
        return medmoe_equation(x, *tensors, ranks=(1, 2, 3, 1, 2), scalings=(2,) * 5, num_empty=1, k=k)

    torch.testing.assert_close(model.eval()(x), equation(k))
    torch.testing.assert_close(model.train()(x), equation(None))
    assert torch.allclose(equation(k), equation(None)) == (k >= 6)


@pytest.mark.parametrize("config", [molora, medmoe], ids=["MoLoRA", "Med-MoE-LoRA"])
def test_a_new_adapter_changes_nothing_whatever_its_router_says(config):
    model, layer, bank, _ = one_layer(config(init_lora_weights=True))
    x = torch.randn(3, 5, 7, dtype=torch.double)
    assert torch.equal(model(x), layer.base_layer(x))
    assert bank.lora_A.weight.abs().min() > 0


def test_one_expert_for_each_token_is_warned_of_and_its_router_has_no_gradient():
    with pytest.warns(UserWarning, match="top_k=1.*the task loss gives the router no gradient"):
        config = molora(top_k=1)
    model, layer, bank, gate = one_layer(config)
    x = torch.randn(3, 5, 7, dtype=torch.double, requires_grad=True)
    base = layer.base_layer
    tensors = (base.weight, base.bias, bank.lora_A.weight, bank.lora_B.weight, gate.weight, gate.bias)
    y, equation = model(x), molora_equation(x, *tensors, scaling=3 / 2, r=2, k=1)
    same_in_value_and_gradient(y, equation, [x, bank.lora_A.weight, bank.lora_B.weight])
    for gradient in torch.autograd.grad(model(x).square().sum(), (gate.weight, gate.bias)):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["MoLoRA", "Med-MoE-LoRA"])
def test_one_token_routed_expert_is_stock_lora_bit_by_bit(name, kind):
    """alpha / r is 2, a power of two, which commutes with rounding."""
    fields = {"task_type": TASK_TYPES[name], "target_modules": config_for(name).target_modules, "lora_dropout": 0.1}
    config = (
        MoLoraConfig(r=8, lora_alpha=16, num_experts=1, init_lora_weights=False, **fields)
        if kind == "MoLoRA"
        else MedMoeLoraConfig(
            expert_ranks=8, num_experts=1, num_base_experts=0, init_lora_weights=False, balance_loss="none", **fields
        )
    )
    ours = get_peft_model(make_model(name), config).train()
    stock_config = LoraConfig(r=8, lora_alpha=16, fan_in_fan_out=name == "gpt2", **fields)
    stock = get_peft_model(make_model(name), stock_config).train()
    twins = [m for m in stock.modules() if hasattr(m, "lora_embedding_A")]
    for layer, twin in zip(routed_layers(ours), twins, strict=True):
        assert layer.router_of("default") is None
        twin.lora_A.load_state_dict({"default.weight": layer.moelora_bank["default"].lora_A.weight})
        twin.lora_B.load_state_dict({"default.weight": layer.moelora_bank["default"].lora_B.weight})
    inputs, outputs = make_inputs(name), []
    for model in (ours, stock):
        torch.manual_seed(1)  # the same dropout masks
        outputs.append(model(**inputs))
        outputs[-1].loss.backward()
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for layer, twin in zip(routed_layers(ours), twins, strict=True):
        bank = layer.moelora_bank["default"]
        for mine, theirs in ((bank.lora_A, twin.lora_A["default"]), (bank.lora_B, twin.lora_B["default"])):
            assert mine.weight.grad.abs().max() > 0
            torch.testing.assert_close(mine.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-7)


EQUAL = {  # a config, and what its experts' weights add up to where all scores are equal
    "MoLoRA": (molora(r=2), 1),
    "MoLoRA, all": (molora(r=2, top_k=5), 1),
    "MoLoRA, shared": (molora(r=2, num_shared_experts=2), 3),
    "Med-MoE-LoRA": (medmoe(expert_ranks=2), 5 / 6),
    "Med-MoE-LoRA, no base expert": (medmoe(expert_ranks=2, num_base_experts=0), 1),
}


@pytest.mark.parametrize(("config", "total"), EQUAL.values(), ids=EQUAL)
def test_equal_experts_and_equal_scores_are_one_lora(config, total):
    model, layer, bank, gate = one_layer(config)
    experts = len(bank.ranks)
    a, b = bank.lora_A.weight.data[:2].clone(), bank.lora_B.weight.data[:, :2].clone()
    bank.lora_A.weight.data, bank.lora_B.weight.data = a.repeat(experts, 1), b.repeat(1, experts)
    torch.nn.init.zeros_(gate.weight)
    if gate.bias is not None:
        torch.nn.init.zeros_(gate.bias)
    x = torch.randn(3, 5, 7, dtype=torch.double)
    torch.testing.assert_close(model(x), layer.base_layer(x) + total * bank.factors[0] * (x @ a.T @ b.T))


def test_equal_experts_are_one_lora_whatever_a_token_router_says():
    model, layer, bank, _ = one_layer(molora())
    bank.lora_A.weight.data = bank.lora_A.weight.data[:2].repeat(5, 1)
    bank.lora_B.weight.data = bank.lora_B.weight.data[:, :2].repeat(1, 5)
    x = torch.randn(3, 5, 7, dtype=torch.double)
    a, b = bank.lora_A.weight[:2], bank.lora_B.weight[:, :2]
    torch.testing.assert_close(model(x), layer.base_layer(x) + 3 / 2 * (x @ a.T @ b.T))


def test_a_regularized_base_expert_has_the_squared_size_of_its_product_in_the_loss():
    """base_coefficient · mean over layers of ‖2 B_base A_base‖², as value and in the gradient of the base expert."""
    gradients, sizes = {}, []
    for coefficient in (0.0, 0.5):
        config = medmoe(
            task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], expert_schedule=[2, 3],
            base_expert_mode="regularized", base_expert_rank=3, base_coefficient=coefficient,
        )  # fmt: skip
        torch.manual_seed(0)
        model = get_peft_model(make_model("llama"), config).train()
        loss = model(**make_inputs("llama")).loss
        loss.backward()
        banks = [layer.moelora_bank["default"] for layer in routed_layers(model)]
        gradients[coefficient] = [(bank.lora_A.weight.grad, bank.lora_B.weight.grad) for bank in banks]
    assert len(banks) == 4
    added = []
    for bank in banks:
        a, b = (w.detach().double().requires_grad_() for w in (bank.lora_A.weight, bank.lora_B.weight))
        size = (2 * b[:, :3] @ a[:3]).square().sum()
        sizes.append(size.item())
        added.append(torch.autograd.grad(0.5 * size / 4, (a, b)))
    assert model.balance_loss.item() == pytest.approx(0.5 * sum(sizes) / 4, rel=1e-5)
    for without, with_loss, more in zip(gradients[0.0], gradients[0.5], added, strict=True):
        for g0, g1, expected in zip(without, with_loss, more, strict=True):
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(g1 - g0, expected.float(), rtol=1e-4, atol=1e-5)


def test_the_recipe_of_ming_moe_has_its_number_of_parameters():
    """77.7 million for Qwen1.5-1.8B (its recipe, counted by hand): one of its 24 equal layers, 24 times."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = Qwen2Config(vocab_size=8, num_hidden_layers=1, **sizes)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, MoLoraConfig(task_type="CAUSAL_LM"))
    assert round(24 * model.get_nb_trainable_parameters()[0] / 1e6, 1) == 77.7
    per_linear = {
        key.rsplit(".", 1)[1]: sum(p.numel() for p in layer.parameters() if p.requires_grad)
        for key, layer in model.named_modules()
        if hasattr(layer, "moelora_bank")
    }
    ffn = 8 * 16 * (2048 + 5504)
    assert per_linear == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 16 * (2048 + 2048)),
        **dict.fromkeys(("gate_proj", "up_proj"), ffn + 8 * 2048 + 8),
        "down_proj": ffn + 8 * 5504 + 8,  # its router reads the intermediate activation
    }


def test_deeper_layers_of_medmoelora_have_more_experts_of_ranks_in_turn():
    config = medmoe(
        task_type="CAUSAL_LM", target_modules=["up_proj"], expert_schedule="ascending", num_experts=4,
        expert_ranks=[1, 2, 3],
    )  # fmt: skip
    model = get_peft_model(make_model("llama"), config)
    # 2 + ⌊2 (l/2)²⌋ for l = 1, 2
    assert [layer.moelora_bank["default"].ranks for layer in routed_layers(model)] == [(1, 2), (1, 2, 3, 1)]
    assert [layer.router_of("default").gate.num_experts for layer in routed_layers(model)] == [3, 5]


GROUPS = {"tasks": ["chat", "icd", "rad"], "expert_groups": {"general": ["chat"], "medical": ["rad", "icd"]}}
MEANT_FOR = {  # config, and which experts are meant for the rows of each task
    "MoLoRA": (molora(num_experts=4, **GROUPS), [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]),
    "MoLoRA, uneven": (molora(num_experts=5, **GROUPS), [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]),
    "Med-MoE-LoRA": (medmoe(expert_schedule=[2], **GROUPS), [[1, 0], [0, 1], [0, 1]]),
    "general data": (
        medmoe(expert_schedule=[2], base_expert_mode="general", general_tasks=["chat"], tasks=GROUPS["tasks"]),
        [[1, 0, 0], [0, 1, 1], [0, 1, 1]],
    ),
}


@pytest.mark.parametrize(("config", "matches"), MEANT_FOR.values(), ids=MEANT_FOR)
def test_experts_are_meant_for_the_tasks_of_their_group(config, matches):
    _, layer, _, _ = one_layer(config)
    assert torch.equal(layer.router_of("default").matches, torch.tensor(matches, dtype=torch.bool))


def test_a_base_expert_for_general_data_is_pulled_to_its_rows():
    """The loss that mode "general" brings, minimised alone over what the router does with two rows."""
    config = medmoe(
        base_expert_mode="general", general_tasks=["chat"], tasks=["chat", "icd"], localized_delta=0.4,
        base_coefficient=1.0,
    )  # fmt: skip
    _, layer, _, _ = one_layer(config)
    router = layer.router_of("default").train()
    (term,) = router.balance
    assert (term.name, term.coefficient) == ("localized", 1.0)
    x = torch.eye(7, dtype=torch.double)[:2].unsqueeze(1)  # a token for each row, of which the router can tell any
    optimizer = torch.optim.Adam(router.gate.parameters(), lr=0.05)
    for _ in range(400):
        weights = router.gate(x).softmax(-1)
        loss = term.loss(Routed(router.gate(x), weights, None, router.matches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    general, medical = weights.detach()[:, 0]
    # (1 + δ) / (1 - δ) = 2.3 is exact for groups of equal size; one of six and five of six come near it
    assert (general[0] / general[1:]).min() > 1.5
    assert (medical[1:] / medical[0]).min() > 1.5
