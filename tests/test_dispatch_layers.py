"""Layers whose tokens are dispatched to their experts, against plain PyTorch: the same in every type and place.

Banks and inputs are of a size that dispatch pays for, by the rule.
"""

import contextlib

import pytest
import torch
from helpers import plain, routed_layers
from layer_helpers import IN, TYPES, assert_as_plain, compare, count_calls, net, result
from torch.utils.checkpoint import checkpoint

from peft_moe import MoLoraConfig, dispatch, kernels
from peft_moe.routing import TokenRouter

pytestmark = pytest.mark.filterwarnings("ignore:top_k=1:UserWarning")
BANKS = {
    "k1": {"num_experts": 8, "r": 16, "top_k": 1},
    "k2": {"num_experts": 8, "r": 32, "top_k": 2},
    "many": {"num_experts": 32, "r": 8, "top_k": 2},
    "rslora": {"num_experts": 8, "r": 16, "top_k": 1, "use_rslora": True, "lora_alpha": 7},
    "alphas": {"num_experts": 8, "r": 16, "top_k": 1, "alpha_pattern": {"lin": 5}},
    "no bias": {"num_experts": 8, "r": 16, "top_k": 1, "router_bias": False},
    "jitter": {"num_experts": 8, "r": 16, "top_k": 1, "router_jitter": 0.5},
    "balanced": {"num_experts": 8, "r": 16, "top_k": 1, "balance_loss": {"switch": 0.3, "z": 0.1}},
}
LARGE = {"num_experts": 8, "r": 128, "top_k": 2}  # for bfloat16
X = (4, 64, IN)


@pytest.fixture
def dispatched(monkeypatch):
    """A list with an entry for each addition of dispatched tokens."""
    return count_calls(monkeypatch, dispatch, "add_experts")


def inputs(*shape, dtype=torch.float32):
    return torch.randn(shape or X, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("x_frozen", [False, True])
@pytest.mark.parametrize("lead", [(256,), (4, 64), (2, 4, 33)])
@pytest.mark.parametrize("bank", BANKS)
def test_a_layer_is_as_in_plain_pytorch(bank, lead, x_frozen, dispatched):
    assert_as_plain(net("molora", **BANKS[bank]), inputs(*lead, IN), x_frozen=x_frozen)
    assert dispatched == [True]


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_base_layer_of_either_class_and_its_bias(conv, bias, dispatched):
    ours = assert_as_plain(net("molora", conv=conv, bias=bias, **BANKS["k2"]), inputs())
    assert dispatched == [True]
    assert any("base_layer.bias" in name for name in ours) == (bias == "all")


OF_TYPES = ["float32", "bfloat16", "a float32 adapter on bfloat16", "autocast", "autocast of a bfloat16 base"]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("types", OF_TYPES)
def test_each_type_has_the_experts_of_plain_pytorch(types, grad, dispatched):
    dtype, adapter_dtype, low, tolerance = TYPES[types]
    model = net("molora", dtype=dtype, adapter_dtype=adapter_dtype, **LARGE)
    x = inputs(4, 256, IN, dtype=dtype)
    with contextlib.nullcontext() if low is None else torch.autocast("cpu", dtype=low):
        if grad:
            ours = assert_as_plain(model, x, **tolerance)
            assert all(value.abs().max() > 0 for name, value in ours.items() if "gate" in name)
        else:
            with torch.no_grad():
                ours = model(x)
                with plain():
                    torch.testing.assert_close(ours, model(x), **tolerance)
    assert dispatched == [grad]


def test_without_a_gradient_the_second_call_is_as_the_first(dispatched):
    model = net("molora", **BANKS["k2"]).eval()
    with torch.no_grad():
        first, second = model(inputs()), model(inputs())
        few = model(inputs()[:, :2])  # by the shortcut
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(few, first[:, :2])
    assert dispatched == [False, False]


def test_two_active_adapters(dispatched):
    model = net("molora", **BANKS["k1"])
    config = MoLoraConfig(target_modules=["lin"], lora_dropout=0.0, init_lora_weights=False, **BANKS["k2"])
    model.add_adapter("two", config)
    model.base_model.set_adapter(["default", "two"])
    ours = assert_as_plain(model, inputs())
    assert dispatched == [True, True]
    assert {name.split(".")[-3] for name in ours if "lora_A" in name} == {"default", "two"}


def test_rows_of_different_adapters(dispatched):
    model = net("molora", **BANKS["k1"]).eval()
    config = MoLoraConfig(target_modules=["lin"], lora_dropout=0.0, init_lora_weights=False, **BANKS["k2"])
    model.add_adapter("two", config)
    x, names = inputs(8, 64, IN), ["default", "two"] * 4
    with torch.no_grad():
        ours = model(x, adapter_names=names)
        with plain():
            expected = model(x, adapter_names=names)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert dispatched == [False, False]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bank", ["k2", "jitter"])
def test_checkpointing(bank, reentrant, dispatched):
    model = net("molora", **BANKS[bank])
    lin, expected = model.base_model.model.lin, result(model, inputs())
    model.base_model.model.forward = lambda x: checkpoint(lin, x, use_reentrant=reentrant)
    compare(result(model, inputs()), expected, rtol=1e-6, atol=1e-6)
    assert len(dispatched) == 3


def test_a_hook_on_the_base_layer_keeps_what_it_captured(dispatched):
    model, captured = net("molora", **BANKS["k1"]), []
    base = routed_layers(model)[0].base_layer
    base.register_forward_hook(lambda module, given, out: captured.append((out, out.detach().clone())))
    assert_as_plain(model, inputs())
    assert dispatched == [True]
    assert len(captured) == 2
    assert all(torch.equal(out, before) for out, before in captured)


class Even(TokenRouter):
    """Gives every token all experts."""

    def forward(self, x, view, product=None):
        return torch.full((*x.shape[:-1], self.gate.num_experts), 1 / self.gate.num_experts)


def hook(router):
    router.register_forward_hook(lambda module, given, weights: torch.full_like(weights, 1 / weights.shape[-1]))


def replace_forward(router):
    router.forward = lambda x, view, product=None: Even.forward(router, x, view)


def change_class(router):
    router.__class__ = Even


@pytest.mark.parametrize("change", [hook, replace_forward, change_class], ids=lambda change: change.__name__)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [3, 256])
@pytest.mark.parametrize("warm", [False, True])
def test_a_router_that_gives_tokens_other_experts_than_its_own_k_is_not_cut_to_k(
    change, grad, tokens, warm, dispatched
):
    model, x = net("molora", **BANKS["k1"]).train(grad), inputs(tokens, IN)
    if warm:  # with a shortcut, where there is no gradient
        with torch.set_grad_enabled(grad):
            model(x)
    dispatched.clear()
    change(routed_layers(model)[0].router_of("default"))
    bank = routed_layers(model)[0].bank("default")
    with torch.set_grad_enabled(grad):
        ours = model(x)
        with plain():
            torch.testing.assert_close(ours, model(x), rtol=1e-5, atol=1e-5)
    assert not dispatched
    factor = bank.factors[0] / 8  # and these are all of them
    by_hand = routed_layers(model)[0].base_layer(x) + factor * (x @ bank.lora_A.weight.T @ bank.lora_B.weight.T)
    torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["dropout", "experts of several ranks", "too few tokens", "plain"])
def test_where_tokens_are_not_dispatched(given, dispatched):
    fields, x = dict(BANKS["k1"]), inputs()
    if given == "dropout":
        fields["lora_dropout"] = 0.4
    if given == "too few tokens":
        x = inputs(255, IN)
    of_several_ranks = {"num_experts": 8, "expert_ranks": [8, 16]}
    model = net("medmoe", **of_several_ranks) if "ranks" in given else net("molora", **fields)
    with plain() if given == "plain" else contextlib.nullcontext():
        result(model, x)
    assert not dispatched


def test_frozen_experts_and_a_trained_router(dispatched):
    model = net("molora", **BANKS["k2"])
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.requires_grad_(False)
    ours = assert_as_plain(model, inputs())
    assert dispatched == [True]
    assert {name.rsplit(".", 1)[-1] for name in ours} == {"output", "x", "weight", "bias"}  # of the gate


def test_a_second_derivative_says_what_to_do():
    model = net("molora", **BANKS["k2"])
    x = inputs().requires_grad_()
    (gx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"set {kernels.SWITCH}=plain"):
        torch.autograd.grad(gx.square().sum(), x)
    with plain():
        (gx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        assert torch.autograd.grad(gx.square().sum(), x)[0].abs().max() > 0


def test_tokens_are_dispatched_again_when_nobody_looks_any_longer(dispatched):
    model, seen = net("molora", **BANKS["k2"]).eval(), []
    router = routed_layers(model)[0].router_of("default")
    with torch.no_grad():
        expected = model(inputs())
        hook = router.register_forward_hook(lambda module, given, weights: seen.append(weights))
        torch.testing.assert_close(model(inputs()), expected, rtol=1e-5, atol=1e-5)
        model(inputs()[:, :2])
        hook.remove()
        torch.testing.assert_close(model(inputs()), expected)
    assert len(seen) == 2
    assert dispatched == [False, False]
