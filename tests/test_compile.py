"""Under torch.compile a model is one graph, compiled once for batches of any length, and gives what it gives eagerly.

What `scripts/bench/checks.py` counts and prints.
"""

import copy

import checks
import pytest
import torch
from helpers import logits
from kinds import KINDS, config_of
from peft import get_peft_model
from tiny_models import make_inputs, make_model

LENGTHS = range(5, 25)
TARGETS = ["gate_proj"]  # compiling takes seconds
METHODS = ["moelora", "molora", "medmoelora", "at_moe"]
OTHERS = ["moelora_one_task", "at_moe_prompt", "lora"]

# torch looks at it itself
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def compiled_and_eager(method, *, training, dynamic=True):
    """A model whose first batch has been compiled for, and an eager copy of it, which takes no part in that."""
    torch.compiler.reset()  # or what was compiled before counts as a recompile
    model = checks.adapted(method, checks.small_llama(layers=1), TARGETS, "fp32").train(training)
    eager = copy.deepcopy(model)
    return model, torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic), eager


def step(model, call, inputs):
    """Loss (training only), logits and gradients by name."""
    with torch.set_grad_enabled(model.training):
        outputs = call(**inputs)
    found = {"logits": outputs.logits.detach()}
    if model.training:
        outputs.loss.backward()
        found |= {"loss": outputs.loss.detach()}
        found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        assert len(found) > 2
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # sums are in another order than on kernels
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.long
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["training", "inference"])
@pytest.mark.parametrize(
    "method",
    ["molora", *(pytest.param(name, marks=pytest.mark.slow) for name in [*METHODS, *OTHERS] if name != "molora")],
)
def test_twenty_lengths_take_one_graph_and_give_what_eager_gives(method, training):
    model, compiled, eager = compiled_and_eager(method, training=training)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, tokens in enumerate(LENGTHS):
            inputs = checks.batch(method, rows=3, tokens=tokens, labels=training, seed=seed)
            same(step(model, compiled, inputs), step(eager, eager, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["training", "inference"])
@pytest.mark.parametrize("method", METHODS)
def test_by_default_the_second_length_compiles_again_and_no_other(method, training):
    """As for a model without an adapter: torch learns from it that lengths vary."""
    row = checks.count_recompiles(method, training=training, batches=20, dynamic=None)
    assert row["fullgraph"]
    assert (row["graphs"], row["recompiles"]) == (2, 1)
    assert "size mismatch at index 1" in row["why"]


def test_recompiles_are_noticed_and_named():
    """What the tests and tables above stand on."""
    torch.compiler.reset()
    add_one = torch.compile(lambda x, by: x + by, backend="aot_eager", fullgraph=True, dynamic=False)
    with checks.recompiles() as reasons:
        for tokens in (3, 4, 4):
            add_one(torch.ones(2, tokens), 1)
    assert len(reasons) == 1
    assert "size mismatch at index 1. expected 3, actual 4" in reasons[0]


def wrong_gradient():
    """A function of one input whose backward is not its derivative."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x * 2

        @staticmethod
        def backward(_ctx, g):
            return g * 3

    return Wrong.apply, [torch.ones(2, 2, dtype=torch.float64, requires_grad=True)]


def test_the_table_of_gradients_shows_a_wrong_one():
    function, inputs = wrong_gradient()
    count, worst = checks.numeric_deviation(function, inputs)
    assert count == 16
    assert worst == pytest.approx(1, abs=1e-6)
    assert not checks.passes(torch.autograd.gradcheck, function, inputs)


@pytest.mark.parametrize("case", checks.KERNEL_CASES.values(), ids=checks.KERNEL_CASES)
def test_gradients_of_the_kernels_are_derivatives_and_so_are_theirs(case):
    function, inputs = checks.kernels_case(**case)
    with checks.chunks_of(case.get("chunk", 256)):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("method", METHODS)
def test_kernels_give_what_plain_pytorch_gives_in_float32(method):
    found = checks.compare_types(method, checks.DTYPE_LABELS["fp32"])
    assert max(found["kernels_plain_logits"], found["kernels_plain_gradients"]) < 5e-6


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated", "ignore:LeafSpec")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_can_be_exported(kind, tmp_path):
    model = get_peft_model(make_model("llama"), config_of(kind, "llama", tmp_path)).eval()
    inputs = make_inputs("llama", labels=False) | {"use_cache": False}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(exported(**inputs).logits, logits(model, inputs), rtol=1e-5, atol=1e-6)
