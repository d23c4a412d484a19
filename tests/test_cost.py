"""What the methods cost beside stock LoRA of the same total rank, counted and held against limits; nothing is timed."""

import counts
import layer
import pytest
import timing
import torch
from counting import count, peak_memory, saved_for_backward
from methods import Layers, adapt, stock_lora
from targets import target_of, verdict
from timing import interleave, summary

IN, OUT, TOKENS, R = 24, 64, 120, 4

# Matrices of the products below, and what these cost by hand: two operations for each multiplication.
A, B = torch.ones(12, 4), torch.ones(4, 8)
STACK = torch.ones(2, 4, 8)
ENDS = torch.tensor([3, 12], dtype=torch.int32)  # of two groups
PRODUCTS = {
    "mm": (lambda: A @ B, 2 * 12 * 4 * 8),
    "addmm in place": (lambda: torch.zeros(12, 8).addmm_(A, B), 2 * 12 * 4 * 8),
    "mm into a tensor": (lambda: torch.mm(A, B, out=torch.zeros(12, 8)), 2 * 12 * 4 * 8),
    "bmm": (lambda: A.expand(2, 12, 4).bmm(STACK), 2 * 2 * 12 * 4 * 8),
    "baddbmm in place": (lambda: torch.zeros(2, 12, 8).baddbmm_(A.expand(2, 12, 4), STACK), 2 * 2 * 12 * 4 * 8),
    "mv": (lambda: A @ B[:, 0], 2 * 12 * 4),
    "dot": (lambda: A[0] @ B[:, 0], 2 * 4),
    "linear": (lambda: torch.nn.functional.linear(A, B.T), 2 * 12 * 4 * 8),
    "linear with a bias": (lambda: torch.nn.functional.linear(A, B.T, B[0]), 2 * 12 * 4 * 8),
    "linear with leading axes": (lambda: torch.nn.functional.linear(A.expand(2, 12, 4), B.T), 2 * 2 * 12 * 4 * 8),
    "einsum": (lambda: torch.einsum("nk,ekm->nem", A, STACK), 2 * 2 * 12 * 4 * 8),
    "no product": (lambda: A * 2 + A.sum(), 0),
}
if hasattr(torch.nn.functional, "grouped_mm"):  # not in torch 2.6
    PRODUCTS |= {
        "groups of rows": (lambda: torch.nn.functional.grouped_mm(A, STACK, offs=ENDS), 2 * 12 * 4 * 8),
        "groups of columns": (lambda: torch.nn.functional.grouped_mm(A.T, A, offs=ENDS), 2 * 4 * 12 * 4),
    }


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_are_counted_as_by_hand(case):
    product, expected = PRODUCTS[case]
    assert count(product).flops == expected


def test_written_bytes_are_those_of_results_that_are_no_views():
    a, b = torch.ones(5, 4), torch.ones(4)
    one = 5 * 4 * 4  # bytes
    for step, written, allocated, operations in [
        (lambda: a + b, one, one, 1),
        (lambda: a.add_(b), one, 0, 1),
        (lambda: a.view(20)[2:].unsqueeze(0), 0, 0, 3),
        (lambda: a.topk(2, dim=-1), 5 * 2 * (4 + 8), 5 * 2 * (4 + 8), 1),
        (lambda: a.to(torch.bfloat16), one // 2, one // 2, 1),
    ]:
        costs = count(step)
        assert (costs.written, costs.allocated, costs.operations) == (written, allocated, operations)


def test_what_may_hold_products_unseen_is_refused():
    @torch.library.custom_op("peft_moe_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    with pytest.raises(NotImplementedError, match=r"peft_moe_tests\.twice.* nobody counts"):
        count(lambda: twice(A))


@pytest.fixture
def stock() -> torch.nn.Module:
    base = Layers(IN, OUT).requires_grad_(False)
    return adapt(base, stock_lora({"layers.0.proj": R}, layer.TARGETS), "fp32")


def test_a_stock_lora_costs_what_it_does_by_hand(stock):
    base = Layers(IN, OUT).requires_grad_(False)
    x = torch.randn(2, TOKENS // 2, IN)
    of_base, of_lora = (layer.training_step(model, x, "lora") for model in (base, stock))
    assert count(of_base).flops == 2 * 2 * TOKENS * IN * OUT  # forward, and the gradient of x
    assert count(of_lora).flops == 2 * 2 * TOKENS * IN * OUT + 3 * 2 * TOKENS * R * (IN + OUT)
    assert peak_memory(of_base) == 4 * TOKENS * (IN + OUT)  # output, gradient of x
    # in its forward: x A; the outputs of the base, of B, and of B scaled
    assert peak_memory(of_lora) == pytest.approx(4 * TOKENS * (R + 3 * OUT), abs=16)  # and the scaling
    x.requires_grad_()
    assert saved_for_backward(lambda: stock(x), [x, *stock.parameters()]) == {f"{TOKENS} × {R} float32": 4 * TOKENS * R}


def test_all_take_turns_and_ratios_are_those_within_a_round(monkeypatch):
    calls = []
    times = interleave({name: lambda n=name: calls.append(n) for name in ("total", "ours")}, rounds=3)
    assert {name: len(of_name) for name, of_name in times.items()} == {"total": 3, "ours": 3}
    assert calls.count("total") == calls.count("ours")
    monkeypatch.setattr(timing, "SHORTEST", 1e-9)
    for long, first in ((timing.LONG, 2), (0, 1)):
        calls.clear()
        monkeypatch.setattr(timing, "LONG", long)
        interleave({"ours": lambda: calls.append("ours")}, rounds=3)
        assert len(calls) == first + 3
    found = summary({"total": [1.0, 2.0, 4.0], "ours": [2.0, 2.0, 2.0]})
    assert found == {"ms": {"total": 2.0, "ours": 2.0}, "ratios": {"total": {"median": 1.0, "quartiles": [0.75, 1.5]}}}


def test_targets_are_those_of_the_issue():
    for subject, method, dtype, step, target in [
        ("layer", "molora_k1_r64", "fp32", "train", 0.6),
        ("layer", "molora_k1_r64", "bf16", "train", 0.72),
        ("layer", "molora_k1_r64", "bf16_fp32", "memory", 1.0),
        ("layer", "molora", "fp32", "prefill", None),
        ("model", "at_moe_prompt", "bf16_fp32", "decode_8", 1.08),
        ("model", "recording", "fp32", "train", None),
    ]:
        assert target_of(subject, method, dtype, step) == target
    assert verdict(1.034, 1.03) == "1.03, met"  # as printed
    assert verdict(1.036, 1.03) == "1.03, missed"
    assert verdict(1.5, None) == "–"


# Each step's largest ratios to the stock LoRA: products, bytes written, operations; in training of a layer also bytes
# kept for backward, and the peak beyond the frozen layer's. 3 % above what was counted with the versions of
# constraints.txt, and 10 % for operations; `python scripts/bench/counts.py --limits` prints new ones.
# The peak of large banks in bfloat16 was counted as 0.76 and as 1.03, by what the process had run before; on a
# CPU without instructions for bfloat16 as 1.16, and that of AT-MoE as 0.92.
# fmt: off
LIMITS = {
("layer", "fp32", "moelora"): {
    "train": (1.04, 0.53, 1.95, 1.05, 0.24),
    "prefill": (1.04, 0.79, 2.28),
    "decode": (1.04, 0.81, 2.05),
},
("layer", "fp32", "moelora_one_task"): {
    "train": (1.04, 0.53, 1.70, 1.04, 0.24),
    "prefill": (1.04, 0.79, 2.05),
    "decode": (1.04, 0.80, 2.05),
},
("layer", "fp32", "molora"): {
    "train": (1.04, 0.69, 1.56, 1.21, 0.53),
    "prefill": (1.04, 0.83, 1.18),
    "decode": (1.04, 0.83, 1.18),
},
("layer", "fp32", "molora_k1_r64"): {
    "train": (0.50, 2.63, 5.67, 0.22, 1.02),
    "prefill": (0.58, 2.34, 6.76),
    "decode": (1.04, 0.96, 1.18),
},
("layer", "fp32", "molora_k2_r64"): {
    "train": (0.58, 3.04, 5.67, 0.37, 1.24),
    "prefill": (0.65, 2.75, 6.76),
    "decode": (1.04, 0.96, 1.18),
},
("layer", "fp32", "molora_n32"): {
    "train": (0.46, 3.77, 8.78, 0.18, 1.08),
    "prefill": (0.55, 3.64, 9.91),
    "decode": (1.05, 0.97, 1.18),
},
("layer", "fp32", "medmoelora"): {
    "train": (1.04, 0.71, 2.74, 1.17, 0.57),
    "prefill": (1.04, 0.83, 1.26),
    "decode": (1.04, 0.83, 1.26),
},
("layer", "fp32", "at_moe"): {
    "train": (0.93, 0.86, 3.67, 1.35, 0.47),
    "prefill": (1.04, 0.84, 2.60),
    "decode": (1.04, 0.84, 2.60),
},
("layer", "bf16", "moelora"): {
    "train": (1.04, 0.53, 2.15, 1.06, 0.42),
    "prefill": (1.04, 0.79, 2.44),
    "decode": (1.04, 0.84, 2.21),
},
("layer", "bf16", "moelora_one_task"): {
    "train": (1.04, 0.53, 1.89, 1.04, 0.42),
    "prefill": (1.04, 0.79, 2.21),
    "decode": (1.04, 0.80, 2.21),
},
("layer", "bf16", "molora"): {
    "train": (1.04, 0.87, 1.92, 1.26, 0.58),
    "prefill": (1.04, 1.08, 2.21),
    "decode": (1.04, 1.45, 2.13),
},
("layer", "bf16", "molora_k1_r64"): {
    "train": (1.04, 1.24, 1.87, 1.08, 1.15),
    "prefill": (1.04, 1.31, 2.13),
    "decode": (1.04, 1.66, 2.13),
},
("layer", "bf16", "molora_k2_r64"): {
    "train": (1.04, 1.24, 1.87, 1.09, 1.15),
    "prefill": (1.04, 1.31, 2.13),
    "decode": (1.04, 1.66, 2.13),
},
("layer", "bf16", "molora_n32"): {
    "train": (1.06, 1.29, 1.87, 1.19, 1.25),
    "prefill": (1.05, 1.37, 2.13),
    "decode": (1.05, 2.77, 2.13),
},
("layer", "bf16", "medmoelora"): {
    "train": (1.04, 0.89, 3.11, 1.31, 0.59),
    "prefill": (1.04, 1.08, 2.21),
    "decode": (1.04, 1.50, 2.13),
},
("layer", "bf16", "at_moe"): {
    "train": (0.93, 1.58, 4.15, 2.02, 1.0),
    "prefill": (1.04, 1.10, 2.83),
    "decode": (1.04, 1.61, 2.83),
},
("model", "fp32", "moelora"): {
    "train": (1.04, 0.86, 1.52),
    "prefill": (1.04, 0.92, 1.19),
    "decode": (1.04, 0.99, 1.04),
    "generate": (1.04, 0.94, 0.91),
},
("model", "fp32", "moelora_one_task"): {
    "train": (1.04, 0.86, 1.35),
    "prefill": (1.04, 0.92, 1.04),
    "decode": (1.04, 0.98, 1.04),
    "generate": (1.04, 0.94, 0.89),
},
("model", "fp32", "molora"): {
    "train": (1.05, 0.96, 1.06),
    "prefill": (1.05, 0.95, 0.96),
    "decode": (1.05, 0.99, 0.95),
    "generate": (1.05, 0.96, 0.97),
},
("model", "fp32", "medmoelora"): {
    "train": (1.06, 0.97, 2.36),
    "prefill": (1.05, 0.97, 1.20),
    "decode": (1.05, 1.00, 1.21),
    "generate": (1.05, 0.98, 1.12),
},
("model", "fp32", "at_moe"): {
    "train": (0.83, 0.87, 1.10),
    "prefill": (1.05, 1.04, 1.11),
    "decode": (1.05, 1.04, 1.11),
    "generate": (1.05, 1.04, 1.11),
},
("model", "fp32", "at_moe_prompt"): {
    "train": (0.82, 0.81, 1.36),
    "prefill": (1.04, 0.97, 1.54),
    "decode": (1.03, 1.00, 0.86),
    "generate": (1.04, 0.99, 0.97),
},
}
# fmt: on


# products in bfloat16 take many times longer on CPUs without instructions for them
LARGE = ("molora_k1_r64", "molora_k2_r64", "molora_n32")
CASES = [
    pytest.param(*case, marks=pytest.mark.slow) if case[:2] == ("layer", "bf16") and case[2] in LARGE else case
    for case in LIMITS
]


@pytest.mark.long
@pytest.mark.parametrize(("subject", "dtype", "method"), CASES)
def test_a_step_costs_no_more_than_its_limit(subject, dtype, method):
    measure = counts.layer_costs if subject == "layer" else counts.model_costs
    over = {}
    for step, limits in LIMITS[subject, dtype, method].items():
        costs = measure(method, dtype, step)
        columns = counts.COLUMNS if step == "train" and subject == "layer" else counts.COLUMNS[:3]
        assert list(costs) == columns
        over |= {
            f"{step}, {name}": f"{costs[name]:.3f} > {limit}"
            for name, limit in zip(columns, limits, strict=True)
            if costs[name] > limit
        }
    assert not over


def test_every_case_has_its_limits():
    assert {(*case, step) for case, steps in LIMITS.items() for step in steps} == set(counts.cases())
