"""The kernels against autograd's numerical derivative, and layers on them against plain PyTorch and stock LoRA."""

import contextlib
import itertools
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import plain, routed, routed_layers
from kinds import KINDS, config_of
from layer_helpers import ADAPTERS, COMMON, IN, OUT, TYPES, Net, assert_as_plain, compare, count_calls, net, result
from peft import LoraConfig, get_peft_model
from quantised_helpers import CONFIGS, quantised, save_base
from quantised_helpers import told as told_of_quantised
from tiny_models import make_inputs, make_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_moe import MoeLoraConfig, MoLoraConfig, kernels

T = 6
RANKS, FACTORS = (2, 1), (1.5, 7 / 3)
R, E = sum(RANKS), len(RANKS)
SPREAD = torch.block_diag(
    *(torch.full((1, rank), factor, dtype=torch.float64) for rank, factor in zip(RANKS, FACTORS, strict=True))
)


# project and add by themselves

SHAPES = {"x": (T, IN), "a": (R, IN), "weight": (OUT, IN), "bias": (OUT,), "gate": (E, IN), "b": (OUT, R)}


def tensors(rows, needed, *, tokens=T, dtype=torch.float64):
    """Tensors by name, with a gradient where one is needed; `weights` (rows, E)."""
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES | {"weights": (rows, E), "x": (tokens, IN)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(name in needed)
        for name, shape in shapes.items()
    }


def dropped(p=0.4, tokens=T):
    kept = torch.rand(tokens, IN, generator=torch.Generator().manual_seed(1)) > p
    return kernels.Dropout(kept, 1 / (1 - p))


def on_kernels(rows, dropout, factor, *, x, a, weight, bias, gate, b, weights):
    gate, each = gate if rows == "a gate" else None, None
    if rows == "one row, into A":
        each, weights = kernels.each_rank(weights, SPREAD.to(x.dtype), a.dtype), None
    out, z, scores = kernels.project(x, a, base=(weight, bias), gate=gate, dropout=dropout, each=each)
    weights = weights if gate is None else scores.softmax(-1)
    return kernels.add(out, z, b, weights=weights, spread=SPREAD.to(x.dtype), factor=factor)


def by_hand(rows, dropout, factor, *, x, a, weight, bias, gate, b, weights):
    """A loop over tokens and experts."""
    by_gate, made = rows == "a gate", []
    per_row = len(x) // (len(x) if by_gate else len(weights))
    for t, token in enumerate(x):
        of_token = (gate @ token).softmax(-1) if by_gate else weights[t // per_row]
        seen = token if dropout is None else token * dropout.kept[t] * dropout.scale
        y, start = weight @ token + bias, 0
        for e, rank in enumerate(RANKS):
            at = slice(start, start + rank)
            y, start = y + factor * FACTORS[e] * of_token[e] * (b[:, at] @ (a[at] @ seen)), start + rank
        made.append(y)
    return torch.stack(made)


NEEDED = {
    "all": ("x", "a", "weight", "bias", "gate", "b", "weights"),
    "an adapter": ("x", "a", "gate", "b", "weights"),
    "x frozen": ("a", "gate", "b", "weights"),
    "a frozen": ("x", "gate", "b", "weights"),
    "b frozen": ("x", "a", "gate", "weights"),
    "a and b frozen": ("x", "gate", "weights"),
    "the gate frozen": ("x", "a", "b"),
    "the gate alone": ("gate", "weights"),
    "x alone": ("x",),
    "a alone": ("a",),
    "b alone": ("b",),
    "the base layer alone": ("weight", "bias"),
    "the bias": ("x", "a", "b", "bias"),
}
ROWS = {"one row of weights": 1, "one row, into A": 1, "three rows": 3, "one for each token": T, "a gate": None}
WAYS = list(itertools.product(ROWS, [False, True], [1.0, 0.7]))


def args_of(rows, drop, factor, tokens=T):
    return rows, dropped(tokens=tokens) if drop else None, factor


@pytest.mark.parametrize(("rows", "drop", "factor"), WAYS)
@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("tokens", [1, T])
def test_value_and_gradients_are_those_of_a_loop(rows, drop, factor, needed, tokens):
    if tokens == 1 and ROWS[rows] not in (1, None):
        rows = "one row of weights"
    found = []
    for way in (on_kernels, by_hand):
        given = tensors(ROWS[rows] or 1, NEEDED[needed], tokens=tokens)
        y = way(*args_of(rows, drop, factor, tokens), **given)
        leaves = [given[name] for name in NEEDED[needed]]
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        gradients = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
        found.append((y, *gradients))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "drop"), list(itertools.product(ROWS, [False, True])))
@pytest.mark.parametrize("needed", ["all", "x frozen", "a and b frozen", "the gate alone", "the bias"])
def test_gradcheck_and_gradgradcheck(rows, drop, needed):
    given = tensors(ROWS[rows] or 1, NEEDED[needed])
    used = [n for n in NEEDED[needed] if n != ("weights" if ROWS[rows] is None else "gate")]

    def call(*leaves):
        return on_kernels(*args_of(rows, drop, 0.7), **given | dict(zip(used, leaves, strict=True)))

    leaves = [given[name] for name in used]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_out_is_written_to_if_it_may_be(writable, grad):
    given = tensors(1, ("a", "b"))
    with torch.set_grad_enabled(grad):
        out, z, _ = kernels.project(given["x"], given["a"], base=(given["weight"], None))
        before = out.detach().clone()
        y = kernels.add(out, z, given["b"], weights=given["weights"], spread=SPREAD, writable=writable)
    assert (y.data_ptr() == out.data_ptr()) == writable
    assert torch.equal(out, before) != writable
    assert not torch.equal(y, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (64, 33), (300, 128)])
def test_dropout_keeps_what_torch_keeps(dtype, shape):
    x = torch.randn(shape).to(dtype)
    torch.manual_seed(3)
    expected = nn.functional.dropout(x, 0.3)
    torch.manual_seed(3)
    torch.testing.assert_close(kernels.draw_dropout(x, 0.3)(x), expected)
    assert torch.initial_seed() == 3
    after = torch.rand(1)
    torch.manual_seed(3)
    nn.functional.dropout(x, 0.3)
    assert torch.equal(after, torch.rand(1))


# layers


FEW = ["moelora", "moelora-one", "molora", "medmoe"]


@pytest.fixture
def used(monkeypatch):
    """A list with an entry for each addition on the kernels."""
    return count_calls(monkeypatch, kernels, "add")


TOLD = {
    "default": {},
    "one": {"task_ids": "icd"},
    "rows": {"task_ids": ["icd", "rad", "def"]},
    "several": {"task_ids": [["icd", "rad"], ["def"], ["rad", "def", "icd"]]},
}
LEADS = [(3,), (3, 4), (3, 2, 4), (3, 40)]


@pytest.mark.filterwarnings("ignore:Training without task_ids:UserWarning")
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("adapter", ["moelora", "moelora-layer"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_layer_by_task_is_as_in_plain_pytorch(adapter, told, lead, dropout, used):
    model = net(adapter, lora_dropout=dropout)
    found = assert_as_plain(model, torch.randn(*lead, IN), told=TOLD[told])
    assert used == [True]
    assert all(value is not None for value in found.values())


@pytest.mark.filterwarnings("ignore:top_k=1:UserWarning")
@pytest.mark.parametrize("lead", [(4,), (3, 1), (3, 40), (3, 2, 4), (3, 100)])
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if not name.startswith("moelora")])
@pytest.mark.parametrize("x_frozen", [False, True])
def test_a_layer_by_token_is_as_in_plain_pytorch(adapter, lead, x_frozen, used):
    assert_as_plain(net(adapter), torch.randn(*lead, IN), x_frozen=x_frozen)
    assert used == [True]


EMPTY = [(0, IN), (0, 4, IN), (3, 0, IN)]


@pytest.mark.parametrize(
    ("adapter", "shape"),
    list(itertools.product(FEW, [(IN,), *EMPTY])),
)
@pytest.mark.parametrize("grad", [True, False])
def test_single_tokens_and_empty_batches(adapter, shape, grad, used):
    layer = routed_layers(net(adapter).eval())[0]
    x = torch.randn(shape, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        with plain():
            expected = layer(x)
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected)
        if grad:  # without one it is the shortcut, which has other tests
            assert used
            layer(x).sum().backward()
            assert x.grad.shape == x.shape


VIEWS = {
    "transposed": lambda: torch.randn(4, 3, IN).transpose(0, 1),
    "strided": lambda: torch.randn(3, 8, 2 * IN)[:, ::2, ::2],
    "expanded": lambda: torch.randn(1, 4, IN).expand(3, 4, IN),
    "columns first": lambda: torch.randn(IN, 3, 4).permute(1, 2, 0),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("adapter", FEW)
def test_inputs_that_are_not_contiguous(adapter, view, used):
    told = {"task_ids": ["icd", "rad", "def"]} if adapter == "moelora" else {}
    model, x = net(adapter), VIEWS[view]().requires_grad_()
    found = []
    for mode in (contextlib.nullcontext, plain):
        with mode():
            y = model(x, **told)
            found.append((y, *torch.autograd.grad(y.square().sum(), [x, *parameters_of(model)], allow_unused=True)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert used


def test_dropout_of_an_input_that_is_not_contiguous_is_that_of_plain_pytorch():
    layer = routed_layers(net("molora-dropout"))[0]
    x, found = VIEWS["transposed"](), []
    for mode in (contextlib.nullcontext, plain):
        torch.manual_seed(0)
        with mode():
            found.append(layer(x))
    torch.testing.assert_close(*found)


def parameters_of(model):
    return [p for p in model.parameters() if p.requires_grad]


OF_TYPES = [
    "moelora",
    "moelora-one",
    "molora-dense",
    "molora-shared",
    "medmoe",
    "medmoe-temperature",
    "medmoe-anchored",
]


@pytest.mark.parametrize(
    ("adapter", "types"),
    list(itertools.product(OF_TYPES, TYPES)),
)
@pytest.mark.parametrize("tokens", [2, 100])
def test_a_layer_in_each_type(adapter, types, tokens, used):
    dtype, adapter_dtype, low, tolerance = TYPES[types]
    model = net(adapter, dtype=dtype, adapter_dtype=adapter_dtype)
    told = {"task_ids": ["icd", "rad", "def"]} if adapter == "moelora" else {}
    x = torch.randn(3, tokens, IN, dtype=dtype)
    autocast = contextlib.nullcontext() if low is None else torch.autocast("cpu", dtype=low)
    with autocast:
        assert_as_plain(model, x, told=told, **tolerance)
    assert used == [True]


# stock LoRA


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [MoeLoraConfig, MoLoraConfig])
def test_a_bank_of_one_is_stock_lora(config, dropout, rslora, dtype):
    fields = {"r": 4, "lora_alpha": 7, "lora_dropout": dropout, "use_rslora": rslora, "target_modules": ["lin"]}
    models = []
    for kind, more in ((LoraConfig, {}), (config, {"num_experts": 1})):
        torch.manual_seed(0)
        models.append(get_peft_model(Net().to(dtype), kind(**fields | more, init_lora_weights=False)).train())
    stock, ours = models
    own, other = routed_layers(ours)[0].bank("default"), stock.base_model.model.lin
    with torch.no_grad():
        other.lora_A["default"].weight.copy_(own.lora_A.weight)
        other.lora_B["default"].weight.copy_(own.lora_B.weight)
    x, found = torch.randn(3, 4, IN, dtype=dtype), []
    for model, bank in ((stock, (other.lora_A["default"], other.lora_B["default"])), (ours, (own.lora_A, own.lora_B))):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = model(leaf)
        y.square().sum().backward()
        found.append([y, leaf.grad, *(linear.weight.grad for linear in bank)])
    exact = dtype == torch.float32
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5 if exact else 3e-2, atol=1e-5 if exact else 3e-2 * b.abs().max().item()
        )


# what bases there are


@pytest.mark.parametrize("adapter", FEW)
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize(("conv", "with_bias"), [(False, True), (False, False), (True, True)])
def test_what_the_base_layer_trains(adapter, bias, train_weight, conv, with_bias, used):
    model = net(adapter, conv=conv, with_bias=with_bias, fan_in_fan_out=conv, bias=bias)
    model.base_model.model.lin.base_layer.weight.requires_grad_(train_weight)
    told = {"task_ids": "def"} if adapter == "moelora" else {}
    found = assert_as_plain(model, torch.randn(3, 4, IN), told=told)
    assert any("base_layer.weight" in name for name in found) == train_weight
    assert any("base_layer.bias" in name for name in found) == (bias == "all" and with_bias)
    assert used == [True]


@pytest.mark.parametrize("adapter", FEW)
def test_a_base_layer_that_is_registered_twice_and_a_layer_that_is_used_twice(adapter, used):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(IN, IN)
            self.other = nn.ModuleDict({"lin": self.lin})

        def forward(self, x):
            return self.other["lin"](torch.relu(self.lin(x)) + self.lin(x))

    config, own = ADAPTERS[adapter]
    torch.manual_seed(0)
    model = get_peft_model(Twice(), config(**COMMON | own)).train()
    assert_as_plain(model, torch.randn(3, 4, IN), told={"task_ids": "def"} if adapter == "moelora" else {})
    assert used


@pytest.mark.parametrize("adapter", FEW)
def test_two_active_adapters(adapter, used):
    model = net(adapter)
    torch.manual_seed(1)
    config, own = ADAPTERS[adapter]
    model.add_adapter("other", config(**COMMON | own | {"lora_alpha": 3}))
    model.base_model.set_adapter(["default", "other"])
    assert_as_plain(model.train(), torch.randn(3, 4, IN), told={"task_ids": "def"} if adapter == "moelora" else {})
    assert used == [True, True]


# whole models


MODELS = list(itertools.product(KINDS, ["llama", "gpt2", "opt", "bert", "t5", "vit"]))


def loss_and_gradients(model, inputs, told):
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**inputs, **told).loss
    loss.backward()
    return {"output": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("kind", "arch"), MODELS)
def test_training_a_model(kind, arch, tmp_path, used):
    torch.manual_seed(0)
    model = get_peft_model(make_model(arch), config_of(kind, arch, tmp_path)).eval()
    told = {"task_ids": ["icd", "def", "rad"]} if kind == "moelora" else {}
    inputs = make_inputs(arch)
    ours = loss_and_gradients(model, inputs, told)
    assert used
    with plain():
        compare(ours, loss_and_gradients(model, inputs, told), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "arch"), MODELS)
def test_training_a_model_under_autocast_is_as_near_float32_as_plain_pytorch(kind, arch, tmp_path, used):
    torch.manual_seed(0)
    # all experts, since a rounding might choose another one
    fields = {"top_k": 4} if kind == "molora" else {}
    model = get_peft_model(make_model(arch), config_of(kind, arch, tmp_path, **fields)).eval()
    told = {"task_ids": ["icd", "def", "rad"]} if kind == "moelora" else {}
    inputs = make_inputs(arch)
    exact, errors = loss_and_gradients(model, inputs, told), []
    for mode in (contextlib.nullcontext, plain):
        with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss_and_gradients(model, inputs, told)
        squares = [((found[n].float() - exact[n]).square().sum(), exact[n].square().sum()) for n in exact if n in found]
        error, size = (torch.stack(list(of_all)).sum().sqrt().item() for of_all in zip(*squares, strict=True))
        errors.append(error / size)
    assert 0 < errors[1] < 0.1
    assert errors[0] < 3 * errors[1]  # over seeds the ratio is around 1, and up to 2 where few numbers are compared
    assert used


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_quantised_base(kind, tmp_path, used):
    model, inputs, found = quantised(kind, save_base(tmp_path / "base"), "nf4"), make_inputs("llama"), []
    told = told_of_quantised(kind)
    for mode in (contextlib.nullcontext, plain):
        with mode():
            found.append(loss_and_gradients(model.train(), inputs, told))
    compare(*found, rtol=1e-4, atol=1e-5)
    assert used
    # afterwards, since bitsandbytes then packs its weights in a way that has no backward
    with torch.no_grad():
        outputs = [model.eval()(**inputs, **told).logits for _ in range(3)]
        with plain():
            expected = model(**inputs, **told).logits
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


# what is trained differently


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adapter", ["moelora", "molora-dropout", "molora-jitter-dropout", "medmoe-dropout"])
def test_checkpointing_a_layer(adapter, reentrant, used):
    model = net(adapter)
    told = {"task_ids": ["icd", "rad", "def"]} if adapter == "moelora" else {}
    lin = model.base_model.model.lin

    def run(x, through):
        model.base_model.model.forward = (lambda x: through(lin, x)) if through else lin
        try:
            return result(model, x, told=told)
        finally:
            del model.base_model.model.forward

    x = torch.randn(3, 4, IN)
    expected = run(x, None)
    ours = run(x, lambda lin, x: checkpoint(lin, x, use_reentrant=reentrant))
    compare(ours, expected, rtol=1e-6, atol=1e-6)
    assert len(used) == 3


def test_checkpointing_a_model(tmp_path, used):
    for kind in KINDS:
        torch.manual_seed(0)
        model = get_peft_model(make_model("llama"), config_of(kind, "llama", tmp_path))
        told = {"task_ids": ["icd", "def", "rad"]} if kind == "moelora" else {}
        inputs, found = make_inputs("llama"), []
        for reentrant in (None, False, True):
            if reentrant is not None:
                for module in model.modules():
                    if hasattr(module, "gradient_checkpointing"):
                        module.gradient_checkpointing = True
                        module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
                model.enable_input_require_grads()
            model.train()
            found.append(loss_and_gradients(model, inputs, told))
        with plain():
            found.append(loss_and_gradients(model, inputs, told))
        for other in found[1:]:
            compare(other, found[0], rtol=1e-4, atol=1e-6)  # a temperature's gradient nearly cancels


@pytest.mark.parametrize("adapter", FEW)
def test_a_second_derivative(adapter, used):
    layer = routed_layers(net(adapter).double().eval())[0]
    x, found = torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=True), []
    parameters = [layer.bank("default").lora_A.weight, layer.bank("default").lora_B.weight]
    for mode in (contextlib.nullcontext, plain):
        with mode():
            (gx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(gx.square().sum(), [x, *parameters]))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert used


# on first use of forward mode torch scripts functions of its own
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functional_call", "forward mode", "batched gradients"])
@pytest.mark.parametrize("adapter", ["moelora-one", "molora", "medmoe"])
def test_function_transforms(adapter, transform, request):
    layer = routed_layers(net(adapter).eval())[0]
    x, tangent = torch.randn(3, 4, IN), torch.randn(3, 4, IN)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def gradients(x):
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    def functional(x):
        return torch.func.functional_call(layer, dict(zip(names, [2 * p for p in parameters], strict=True)), (x,))

    def forward_mode(x):
        with torch.autograd.forward_ad.dual_level():
            y = layer(torch.autograd.forward_ad.make_dual(x, tangent))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    def batched(x):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        return torch.autograd.grad(y, leaf, torch.stack([y, 2 * y]).detach(), is_grads_batched=True)[0]

    call = {
        "vmap": torch.func.vmap(layer),
        "grad": gradients,
        "jvp": lambda x: torch.func.jvp(layer, (x,), (tangent,))[1],
        "functional_call": functional,
        "forward mode": forward_mode,
        "batched gradients": batched,
    }[transform]
    ours = call(x)
    with plain():
        expected = call(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", ["moelora", "moelora-one"])  # gates that read x leave autocast, unknown on meta
def test_a_device_without_autocast(adapter):
    layer = routed_layers(net(adapter).eval())[0].to("meta")
    assert layer(torch.empty(2, 3, IN, device="meta")).shape == (2, 3, OUT)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("adapter", ["moelora-one", "molora"])
def test_a_trace_is_for_inputs_of_any_size(adapter, grad, tmp_path):
    layer, x = routed_layers(net(adapter).eval())[0], torch.randn(3, 4, IN)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            layer(x)
        torch.jit.save(torch.jit.trace(layer, x, check_trace=False), tmp_path / "layer.pt")
        traced, other = torch.jit.load(tmp_path / "layer.pt"), torch.randn(5, 7, IN)
        torch.testing.assert_close(traced(other), layer(other))


def test_a_number_that_backward_needs_may_not_be_changed_unseen():
    layer = routed_layers(net("molora").eval())[0]
    for change in (layer.bank("default").lora_A.weight, layer.bank("default").lora_B.weight, "x"):
        x = torch.randn(3, 4, IN, requires_grad=True)
        seen = x * 1
        y = layer(seen)
        with torch.no_grad():
            (seen if isinstance(change, str) else change).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("adapter", FEW)
def test_a_graph_may_be_used_twice_and_its_tensors_kept_elsewhere(adapter):
    layer = routed_layers(net(adapter).eval())[0]
    x = torch.randn(3, 4, IN, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        total = layer(x).square().sum()
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# hooks


def part_of(layer, name):
    bank, router = layer.bank("default"), layer.router_of("default")
    return {
        "base layer": layer.base_layer, "bank": bank, "A": bank.lora_A, "B": bank.lora_B, "router": router,
        "gate": router.gate, "dropout": bank.dropout, "layer": layer,
    }[name]  # fmt: skip


HOOKS = ["forward", "before", "backward", "before backward", "instead"]


@pytest.mark.parametrize(
    ("name", "hook"),
    list(itertools.product(["layer", "base layer", "bank", "A", "B", "router", "gate", "dropout"], HOOKS)),
)
def test_hooks_see_calls(name, hook):
    model = net("molora-dropout")
    module, seen = part_of(routed_layers(model)[0], name), []
    if hook == "forward":
        module.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    elif hook == "before":
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    elif hook == "backward":
        module.register_full_backward_hook(lambda module, gi, go: seen.append(go[0].shape))
    elif hook == "before backward":
        module.register_full_backward_pre_hook(lambda module, go: seen.append(go[0].shape))
    else:
        old = module.forward
        module.forward = lambda *args: seen.append(args[0].shape) or old(*args)
    x = torch.randn(3, 4, IN)
    ours = result(model, x)
    count = len(seen)
    with plain():
        expected = result(model, x)
    compare(ours, expected, rtol=1e-5, atol=1e-6)
    assert count == len(seen) - count == 1


def test_a_replaced_forward_of_a_router_takes_what_routers_take():
    layer = routed_layers(net("molora"))[0]
    router = layer.router_of("default")
    even = torch.full((4,), 0.25)
    router.forward = lambda x, view: even.expand(*x.shape[:-1], -1)
    x = torch.randn(3, 4, IN)
    with plain():
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("adapter", ["moelora-one", "molora", "medmoe"])
@pytest.mark.parametrize("grad", [True, False])
def test_what_a_hook_on_the_base_layer_captured_stays_as_it_was(adapter, grad):
    layer, captured = routed_layers(net(adapter).eval())[0], []
    layer.base_layer.register_forward_hook(lambda module, args, output: captured.append(output))
    x = torch.randn(3, 4, IN)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            y = layer(x)
            expected = nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
            torch.testing.assert_close(captured.pop(), expected)
            assert not torch.allclose(y, expected)


def test_a_base_layer_of_another_class_keeps_what_it_returned():
    class Remembering(nn.Linear):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last.view_as(self.last)

    model = Net()
    model.lin = Remembering(IN, OUT)
    config, own = ADAPTERS["molora"]
    model = get_peft_model(model, config(**COMMON | own))
    layer, x = routed_layers(model)[0], torch.randn(3, 4, IN)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = layer(x)
            expected = nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
            torch.testing.assert_close(layer.base_layer.last, expected)
            assert not torch.allclose(y, expected)


# memory


WIDE_IN, WIDE_OUT, MANY = 48, 96, 200


class Wide(nn.Module):
    """A linear layer whose tokens are more than its features."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(WIDE_IN, WIDE_OUT)

    def forward(self, x):
        return self.lin(x)


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if "dropout" not in name])
@pytest.mark.filterwarnings("ignore:top_k=1:UserWarning")
@pytest.mark.parametrize("told", ["one", "rows"])
def test_what_is_kept_for_backward(adapter, told):
    config, own = ADAPTERS[adapter]
    model = get_peft_model(Wide(), config(**COMMON | own))
    layer, kept = routed_layers(model.train())[0], []
    x = torch.randn(4, MANY // 4, WIDE_IN, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in [x, *model.parameters(), *model.buffers()]}

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kwargs = {"task_ids": "icd" if told == "one" else ["icd", "rad", "def", "icd"]}
        y = model(x, **(kwargs if adapter.startswith("moelora") else {}))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    own = {at: size for at, size in storages.items() if at not in known}
    ranks, experts = layer.bank("default").lora_A.weight.shape[0], len(layer.bank("default").ranks) + 1
    assert kept
    assert sum(own.values()) <= 4 * 4 * MANY * (ranks + 2 * experts)
    if told == "one" and adapter.startswith("moelora"):  # A with a task's weights in it is made again
        assert all(t.shape != (ranks, WIDE_IN) for t in kept if t.untyped_storage().data_ptr() not in known)
    assert all(t.numel() != MANY * WIDE_OUT for t in kept)
    assert y.untyped_storage().data_ptr() not in storages


def test_a_dropout_keeps_a_byte_for_each_element():
    config, own = ADAPTERS["molora-dropout"]
    model, kept = get_peft_model(Wide(), config(**COMMON | own)).train(), []
    x = torch.randn(4, MANY // 4, WIDE_IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    of_x = [
        t for t in kept if t.numel() == x.numel() and t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    ]
    assert {t.dtype for t in of_x} == {torch.bool}


def test_other_devices_cast_more_tokens_at_once():
    def sizes(tokens, device):
        return [at.stop - at.start for at in kernels._chunks(torch.empty(tokens, 1, device=device))]

    assert sizes(1025, "cpu") == [512] * 3
    assert sizes(8192, "meta") == [8192]
    assert sizes(8193, "meta") == [8192] * 2
    assert sizes(0, "meta") == [8192]


# the output


IN_PLACE = {
    "+=": lambda y: y.add_(1.0),
    "relu_": lambda y: y.relu_(),
    "row": lambda y: y[0].mul_(2.0),
    "index": lambda y: y.__setitem__((0, 0), 0.0),
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("adapter", FEW)
@pytest.mark.parametrize("lead", [(3,), (3, 4)])
def test_an_output_may_be_changed_in_place(adapter, change, lead):
    layer = routed_layers(net(adapter).eval())[0]
    x, found = torch.randn(*lead, IN, requires_grad=True), []
    for mode in (contextlib.nullcontext, plain):
        with mode():
            y = layer(x)
            IN_PLACE[change](y)
            y.square().sum().backward()
            with torch.no_grad():
                for _ in range(3):
                    without = layer(x)
                    IN_PLACE[change](without)
            found.append((y.detach(), x.grad, without))
            x.grad = None
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", FEW)
@pytest.mark.parametrize("lead", [(3,), (3, 4)])
def test_an_output_made_without_a_gradient_may_be_changed_in_place_with_one(adapter, lead):
    layer = routed_layers(net(adapter).eval())[0]
    bias = torch.ones(OUT, requires_grad=True)
    with torch.no_grad():
        y = layer(torch.randn(*lead, IN))
    y += bias
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((OUT,), float(torch.Size(lead).numel())))


def test_gradients_may_be_changed_in_place_and_stand_alone():
    model = net("molora", router_bias=False)
    model(torch.randn(3, 40, IN)).sum().backward()
    layer = routed_layers(model)[0]
    before = layer.bank("default").lora_A.weight.grad.clone()
    layer.router_of("default").gate.weight.grad.mul_(0)
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(layer.bank("default").lora_A.weight.grad, before)


def test_a_gradient_is_no_view_of_a_larger_tensor():
    model = net("molora", router_bias=False)
    model(torch.randn(3, 40, IN)).sum().backward()
    for parameter in parameters_of(model):
        assert parameter.grad.untyped_storage().nbytes() == parameter.grad.numel() * 4


# constants


def test_factors_are_not_rounded_by_the_default_type():
    torch.set_default_dtype(torch.bfloat16)  # as scripts do that make a half-precision model
    try:
        torch.manual_seed(0)
        config, own = ADAPTERS["moelora"]
        model = get_peft_model(Net(), config(**COMMON | own))
    finally:
        torch.set_default_dtype(torch.float32)
    bank = routed_layers(model)[0].bank("default")
    assert bank.lora_A.weight.dtype == torch.float32
    torch.testing.assert_close(bank.spread.sum(), torch.tensor(7.0), rtol=1e-6, atol=0)  # alpha, over all 12 ranks


# the switch

READ = f"import runpy; print(runpy.run_path({kernels.__file__!r})['fused'])"  # alone, which is quick


@pytest.mark.parametrize(("value", "expected"), [(None, "True"), ("plain", "False")])
def test_the_switch(value, expected):
    assert switched(value).stdout.strip() == expected


@pytest.mark.parametrize("value", ["nonsense"])
def test_another_value_of_the_switch_is_an_error(value):
    done = switched(value)
    assert done.returncode
    assert f"PEFT_MOE_KERNELS={value!r}; set it to 'fused', the default, or to 'plain'" in done.stderr


def switched(value):
    environment = {name: v for name, v in os.environ.items() if name != kernels.SWITCH}
    environment |= {} if value is None else {kernels.SWITCH: value}
    return subprocess.run([sys.executable, "-c", READ], env=environment, capture_output=True, text=True)


def test_plain_pytorch_does_not_use_kernels(used):
    model = routed()
    with plain():
        model(**make_inputs("llama"), task_ids=["icd", "rad", "def"]).loss.backward()
        assert not used
    model(**make_inputs("llama"), task_ids=["icd", "rad", "def"]).loss.backward()
    assert len(used) == len(routed_layers(model))
