"""The papers' equations as naive loops, in float64, with gradients; and stock LoRA where there is one expert."""

import pytest
import torch
from helpers import config_for, routed, routed_layers
from peft import LoraConfig, get_peft_model
from tiny_models import TASK_TYPES, make_inputs, make_model
from torch import nn


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
