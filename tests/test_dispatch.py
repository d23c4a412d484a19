"""Experts computed for the tokens that chose them, against a loop over tokens and experts."""

from itertools import product

import pytest
import torch

from peft_moe.dispatch import add_experts, add_experts_reference, pays

NAMES = ("out", "x", "a", "b", "weights")


def make(*, tokens=(23,), n=12, m=20, num_experts=5, k=2, r=3, dtype=torch.float64, experts=None, seed=0):
    """Arguments by name, those with a gradient first."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if experts is None:
        experts = torch.rand(*tokens, num_experts, generator=generator).topk(k).indices
    return {
        "out": draw(*tokens, m),
        "x": draw(*tokens, n),
        "a": draw(num_experts * r, n),
        "b": draw(m, num_experts * r),
        "weights": draw(*tokens, experts.shape[-1], dtype=weights_dtype),
        "experts": experts,
        "r": r,
    }


def by_loops(*, out, x, a, b, weights, experts, r):
    """One token, one expert at a time."""
    rows = []
    for row, token, w, e in zip(out, x, weights, experts, strict=True):
        for weight, expert in zip(w, e.tolist(), strict=True):
            ranks = slice(expert * r, (expert + 1) * r)
            row = row + weight * (b[:, ranks] @ (a[ranks] @ token))
        rows.append(row)
    return torch.stack(rows)


def results(add, arguments, needed=NAMES):
    """The output and the gradients of what is needed."""
    output = add(**arguments)
    g = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output.dtype)
    return output, *torch.autograd.grad(output, [arguments[name] for name in needed], g)


def dispatched(**arguments):
    return add_experts(**arguments, writable=False)


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


TOKENS_EXPERTS = [
    {},
    {"k": 1},
    {"k": 5},  # all experts
    {"num_experts": 1, "k": 1, "r": 4},
    {"tokens": (1,)},
    {"tokens": (200,), "num_experts": 32, "r": 1},  # several groups of experts
    {"experts": torch.tensor([[3]]).expand(40, 1)},  # no token chose the others
    {"experts": torch.tensor([[3, 0]]).expand(300, 2)},  # loads far apart
    {"experts": torch.tensor([[4, 4], [1, 1], [0, 2]])},  # an expert twice
]


@pytest.mark.parametrize("case", TOKENS_EXPERTS, ids=str)
def test_it_adds_what_a_loop_over_tokens_and_experts_adds_and_so_do_the_gradients(case):
    if "experts" in case:
        case = {"tokens": (len(case["experts"]),)} | case
    arguments = make(**case)
    for name, actual, expected in zip(
        ("output", *NAMES), results(dispatched, arguments), results(by_loops, arguments), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_reference_adds_what_a_loop_adds(k):
    arguments = make(k=k)
    for actual, expected in zip(results(add_experts_reference, arguments), results(by_loops, arguments), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_gradcheck(k):
    arguments = make(tokens=(2, 4), n=5, m=6, num_experts=3, k=k, r=2)
    rest = {"experts": arguments["experts"], "r": arguments["r"], "writable": False}
    inputs = [arguments[name] for name in NAMES]
    assert torch.autograd.gradcheck(lambda out, x, a, b, w: add_experts(out, x, a, b, weights=w, **rest), inputs)


@pytest.mark.parametrize(
    ("dtype", "of_bank", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.bfloat16, 1e-2),  # 2⁻⁸ is one rounding; there are several
        (torch.bfloat16, torch.float32, 1e-2),  # peft's default on a bfloat16 base
    ],
)
@pytest.mark.parametrize("k", [1, 2, 8])
def test_lower_precision_is_near_float64(dtype, of_bank, tolerance, k):
    arguments = make(tokens=(2, 150), n=64, m=96, num_experts=8, k=k, r=16, dtype=dtype)
    for name in ("a", "b"):
        arguments[name] = arguments[name].detach().to(of_bank).requires_grad_()
    exact = {
        name: value.detach().double().requires_grad_() if name in NAMES else value for name, value in arguments.items()
    }
    for name, actual, expected in zip(
        ("output", *NAMES), results(dispatched, arguments), results(add_experts_reference, exact), strict=True
    ):
        assert actual.dtype == arguments["out" if name == "output" else name].dtype
        assert error(actual.double(), expected) < tolerance, name


@pytest.mark.parametrize("needed", [names for names in product([False, True], repeat=5) if any(names)])
def test_only_the_gradients_that_are_needed_are_computed(needed):
    arguments = make(tokens=(40,))
    full = dict(zip(NAMES, results(dispatched, arguments)[1:], strict=True))
    names = [name for name, yes in zip(NAMES, needed, strict=True) if yes]
    arguments |= {name: arguments[name].detach() for name in NAMES if name not in names}
    for name, gradient in zip(names, results(dispatched, arguments, names)[1:], strict=True):
        torch.testing.assert_close(gradient, full[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_nothing_of_the_outputs_size_is_kept_and_no_x_for_frozen_experts(frozen):
    arguments = make(tokens=(300,), n=40, m=50, num_experts=4, r=2)
    if frozen:
        arguments |= {name: arguments[name].detach() for name in ("a", "b")}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dispatched(**arguments)
    assert max(tensor.numel() for tensor in kept if tensor is not arguments["x"]) < 300 * 40
    assert frozen == all(tensor is not arguments["x"] for tensor in kept)


def test_no_copy_of_x_is_kept_under_autocast():
    arguments, kept = make(tokens=(300,), n=40, m=50, num_experts=4, r=2, dtype=torch.float32), []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        dispatched(**arguments)
    assert [tensor is arguments["x"] for tensor in kept if tensor.numel() == 300 * 40] == [True]


def test_it_writes_into_out_where_it_may_and_only_there():
    arguments = make()
    expected = add_experts_reference(**arguments)
    out = arguments["out"].detach().clone()
    assert add_experts(**arguments | {"out": out}, writable=False) is not out
    torch.testing.assert_close(out, arguments["out"], rtol=0, atol=0)
    result = add_experts(**arguments | {"out": out}, writable=True)
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(result, expected)


def test_gradients_flow_through_what_it_wrote_into():
    arguments = make()
    factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    gradients = []
    for add in (lambda **given: add_experts(**given, writable=True), add_experts_reference):
        output = add(**arguments | {"out": arguments["out"] + factor})
        gradients.append(torch.autograd.grad(output.square().sum(), [factor, arguments["out"], arguments["x"]]))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("name", ["out", "x", "a", "b", "weights", "experts"])
def test_any_strides(name, writable):
    arguments = {key: v.detach() if isinstance(v, torch.Tensor) else v for key, v in make(tokens=(3, 8)).items()}
    expected = add_experts_reference(**arguments)
    value = arguments[name]
    wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])
    wide[..., ::2] = value
    arguments[name] = wide[..., ::2]
    assert not arguments[name].is_contiguous()
    torch.testing.assert_close(add_experts(**arguments, writable=writable), expected)


def test_a_gradient_that_is_one_number_expanded():
    arguments = make()
    gradients = [
        torch.autograd.grad(add(**arguments).sum(), [arguments[name] for name in NAMES])
        for add in (dispatched, add_experts_reference)
    ]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("tokens", [(0,), (2, 0)])
def test_no_tokens(tokens):
    arguments = make(tokens=tokens)
    output, *gradients = results(dispatched, arguments)
    assert output.shape == arguments["out"].shape
    for name, gradient in zip(NAMES, gradients, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(arguments[name]))


def test_under_autocast_products_are_in_its_type():
    arguments = make(tokens=(40,), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = arguments["out"].bfloat16()
        output = add_experts(**arguments | {"out": out}, writable=False)
        expected = add_experts_reference(**arguments | {"out": out})
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=1e-1)
    for gradient in torch.autograd.grad(output.float().sum(), [arguments[name] for name in NAMES]):
        assert gradient.dtype == torch.float32


@pytest.mark.parametrize("frozen", [(), ("a", "b"), ("x",), ("weights",)])
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["linear", "square"])
def test_a_second_derivative_by_anything_is_a_clear_error_and_never_a_part_of_it(loss, frozen):
    arguments = make()
    arguments |= {name: arguments[name].detach() for name in frozen}
    inputs = {name: arguments[name] for name in NAMES if name not in frozen}
    # beside the experts there is a way that does have a second derivative, as a layer's base has
    output = dispatched(**arguments) + (arguments["x"].square().sum() if "x" in inputs else 0)
    gradients = torch.autograd.grad(loss(output), list(inputs.values()), create_graph=True)
    total = sum(g.square().sum() for g, name in zip(gradients, inputs, strict=True) if name != "out")
    with pytest.raises(NotImplementedError, match="set PEFT_MOE_KERNELS=plain in the environment"):
        total.backward(retain_graph=True)
    for name, source in inputs.items():
        if loss is torch.sum and (name == "out" or (name == "x" and "a" in frozen)):
            continue  # gradients do not depend on the one; the other is not kept
        with pytest.raises(NotImplementedError, match="set PEFT_MOE_KERNELS=plain in the environment"):
            torch.autograd.grad(total, source, retain_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 4}, r"a \(15, 12\) and b \(20, 15\) are no experts of rank r=4"),
        ({"r": 0}, "are no experts of rank r=0"),
        ({"b": torch.zeros(20, 12)}, r"b \(20, 12\)"),
        ({"experts": torch.full((23, 2), 5)}, "experts has 5, but the bank's experts are 0 to 4"),
    ],
)
def test_what_is_not_a_bank_or_not_in_it_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        add_experts(**make() | change, writable=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"k": 8}, False),  # all experts: nothing is spared
        ({"r": 2}, False),
        ({"tokens": 8}, False),  # decoding
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.bfloat16, "tokens": 256}, False),
        ({"k": 2, "r": 16}, False),
        ({"dtype": torch.bfloat16, "k": 2}, False),  # moving rows costs as much as it spares
        ({"dtype": torch.float64}, False),  # not measured
        ({"device": torch.device("meta")}, False),
    ],
    ids=str,
)
def test_where_it_pays(change, expected):
    case = {"tokens": 1024, "num_experts": 8, "k": 1, "r": 64, "dtype": torch.float32, "device": torch.device("cpu")}
    assert pays(**case | change) is expected
