"""What holds for all shapes, ranks, numbers of experts, schedules and types, tried on drawn ones.

The drawing is the same in every run. References are the papers' equations as loops over tokens and experts, stock LoRA,
or the same thing done in another way.
"""

import json
import math
import tempfile
from contextlib import contextmanager
from dataclasses import fields
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from grouped_helpers import grouped
from helpers import TARGETS, logits, routed_layers
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_models import make_inputs, make_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_moe import GroupedMoeConfig, MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig, fold, kernels
from peft_moe.bank import ExpertBank
from peft_moe.losses import BALANCE_LOSSES, Routed
from peft_moe.routing import TaskGate, encode_tasks, softmax, top_k, top_p
from peft_moe.routing.control import control_of
from peft_moe.routing.select import grouped as in_groups
from peft_moe.schedule import SHAPES, bands, check_schedule, experts_per_layer, power_law


def drawn(examples: int) -> settings:
    """So many examples, the same ones each time, however long they take on a busy machine."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=quiet,
        phases=[Phase.explicit, Phase.generate],  # making a failing example smaller takes minutes
    )


SIZE = st.integers(1, 6)
SEED = st.integers(0, 2**16)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["plain", "transposed", "strided", "expanded"])
NAMES = ["icd", "rad", "def", "mri"]


def make_x(lead, features, layout, seed, dtype=torch.float64) -> torch.Tensor:
    """Normal numbers (*lead, features), in memory in one of several ways."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "transposed" and len(lead) > 1:
        return normal(*lead[1:], lead[0], features).movedim(-2, 0)
    if layout == "strided":
        return normal(*lead, 2 * features)[..., ::2]
    if layout == "expanded" and lead:
        return normal(*lead[1:], features).expand(*lead, features)
    return normal(*lead, features)


def loop(x, base, bank, weigh) -> torch.Tensor:
    """`W0 x + Σ_i w_i · s_i · B_i A_i x`, token by token and expert by expert; `weigh(token, index)` gives the w_i."""
    w0 = base.weight.T if isinstance(base, Conv1D) else base.weight
    starts = [0, *accumulate(bank.ranks)]
    rows = []
    for index in np.ndindex(*x.shape[:-1]):
        token = x[index]
        y = w0 @ token + base.bias
        for i, weight in weigh(token, index).items():
            rank = slice(starts[i], starts[i + 1])
            y = y + weight * bank.factors[i] * (bank.lora_B.weight[:, rank] @ (bank.lora_A.weight[rank] @ token))
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1) if rows else x.new_zeros(*x.shape[:-1], w0.shape[0])


def assert_same(ours, expected, parameters) -> None:
    """In value and gradient."""
    torch.testing.assert_close(ours, expected)
    if not ours.numel():
        return
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(0))
    gradients = (torch.autograd.grad(y, parameters, upstream, materialize_grads=True) for y in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def one_layer(config, sizes, seed, *, conv=False, dtype=torch.float64):
    """A linear layer with an adapter: model, layer, bank and gate."""
    torch.manual_seed(seed)
    base = Conv1D(sizes[1], sizes[0]) if conv else nn.Linear(*sizes)
    model = get_peft_model(nn.Sequential(base).to(dtype), config, autocast_adapter_dtype=False)
    (layer,) = routed_layers(model)
    if dtype == torch.float64:
        model.double()
    router = layer.router_of("default")
    return model, layer.base_layer, layer.moelora_bank["default"], router and router.gate


COMMON = {"target_modules": ["0"], "lora_dropout": 0.0, "init_lora_weights": False}
LEADS = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple) | st.sampled_from([(0,), (0, 2), (2, 0)])


def softmax_of(scores: dict) -> dict:
    total = sum(score.exp() for score in scores.values())
    return {i: score.exp() / total for i, score in scores.items()}


# layers


@drawn(40)
@given(
    st.data(),
    SIZE,
    SIZE,
    st.just(()) | LEADS,
    LAYOUTS,
    st.integers(1, 9),
    st.integers(1, 3),
    SEED,
    st.booleans(),
    st.booleans(),
    st.sampled_from(["model", "layer"]),
)
def test_moelora_is_its_equation(data, n_in, n_out, lead, layout, experts, rank, seed, conv, rslora, scope):
    """ω_j = softmax(W_T e_j), e_j the mean over a row's tasks: arXiv 2310.18339, III."""
    r, alpha = rank * experts, data.draw(st.sampled_from([1, 8, 2.5]))
    config = MoeLoraConfig(
        **COMMON,
        r=r,
        num_experts=experts,
        lora_alpha=alpha,
        use_rslora=rslora,
        tasks=NAMES,
        gate_scope=scope,
        task_embedding_dim=data.draw(SIZE),
    )
    model, base, bank, gate = one_layer(config, (n_in, n_out), seed, conv=conv)
    assert bank.factors == (alpha / (r**0.5 if rslora else r),) * experts
    x = make_x(lead, n_in, "plain" if conv else layout, seed).requires_grad_()  # Conv1D itself takes no other
    several = st.lists(st.sampled_from(range(4)), min_size=1, max_size=3)
    one = not lead or not lead[0]  # of no rows, and of a single input without any
    rows = [data.draw(several)] if one else data.draw(st.lists(several, min_size=lead[0], max_size=lead[0]))
    names = [[NAMES[i] for i in row] for row in rows]

    def weigh(token, index):
        if experts == 1:
            return {0: 1.0}
        row = rows[index[0] if index else 0]
        e = sum(gate.embedding.weight[i] for i in row) / len(row)
        return softmax_of({i: (gate.proj.weight[i] * e).sum() for i in range(experts)})

    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    assert_same(model(x, task_ids=names), loop(x, base, bank, weigh), trained)


@drawn(40)
@given(
    st.data(),
    SIZE,
    SIZE,
    st.just(()) | LEADS,
    LAYOUTS,
    st.integers(1, 9),
    st.integers(1, 3),
    SEED,
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
)
def test_molora_is_its_equation(data, n_in, n_out, lead, layout, experts, rank, seed, conv, bias, shared):
    """The softmax over the K largest of W_g x + b, or the fewest that add up to p: arXiv 2404.09027, 2403.07652."""
    shared = shared if experts > 1 else 0
    k, p = data.draw(st.integers(2, 10)), data.draw(st.none() | st.floats(0.05, 1.0))
    config = MoLoraConfig(
        **COMMON,
        r=rank,
        num_experts=experts,
        num_shared_experts=shared,
        lora_alpha=3,
        router_bias=bias,
        top_k=k,
        top_p=p,
    )
    model, base, bank, gate = one_layer(config, (n_in, n_out), seed, conv=conv)
    x = make_x(lead, n_in, "plain" if conv else layout, seed).requires_grad_()

    def weigh(token, index):
        if experts == 1:
            return {0: 1.0}
        scores = {i: (gate.weight[i] * token).sum() + (gate.bias[i] if bias else 0) for i in range(experts)}
        order = sorted(scores, key=lambda i: -scores[i].item())
        if p is None:
            kept = order[:k]
        else:
            before = [0, *accumulate(softmax_of(scores)[i].item() for i in order)]
            kept = [i for i, sum_before in zip(order, before, strict=False) if sum_before < p]
            assume(all(abs(sum_before - p) > 1e-9 for sum_before in before))  # where rounding would decide
        chosen = softmax_of({i: scores[i] for i in kept})
        return dict.fromkeys(range(shared), 1.0) | {shared + i: weight for i, weight in chosen.items()}

    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    assert_same(model.train(data.draw(st.booleans()))(x), loop(x, base, bank, weigh), trained)


@drawn(40)
@given(
    st.data(),
    SIZE,
    SIZE,
    st.just(()) | LEADS,
    LAYOUTS,
    st.integers(1, 9),
    st.integers(0, 2),
    SEED,
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from(["frozen", "regularized"]),
)
def test_medmoelora_is_its_equation(data, n_in, n_out, lead, layout, experts, n_base, seed, ranks, mode):
    """softmax(W_g x / τ) over base and special experts, a frozen base expert being zero: arXiv 2601.07935."""
    n_base = max(1, n_base) if mode == "regularized" else n_base
    k, tau = data.draw(st.none() | st.integers(1, 9)), data.draw(st.floats(0.2, 3.0))
    config = MedMoeLoraConfig(
        **COMMON,
        expert_schedule=[experts],
        num_experts=experts,
        expert_ranks=ranks,
        num_base_experts=n_base,
        base_expert_mode=mode,
        temperature=tau,
        learn_temperature=data.draw(st.booleans()),
        inference_top_k=k,
        balance_loss="none",
    )
    model, base, bank, gate = one_layer(config, (n_in, n_out), seed)
    empty = n_base if mode == "frozen" else 0
    assert bank.ranks == (min(ranks),) * (n_base - empty) + tuple(ranks[i % len(ranks)] for i in range(experts))
    assert bank.factors == (2.0,) * len(bank.ranks)
    x = make_x(lead, n_in, layout, seed).requires_grad_()
    total = n_base + experts

    def weigh(token, index):
        if total == 1:
            return {0: 1.0}
        heat = gate.temperature if config.learn_temperature else tau
        scores = {i: (gate.weight[i] * token).sum() / heat for i in range(total)}
        kept = sorted(scores, key=lambda i: -scores[i].item())[:k]
        chosen = softmax_of({i: scores[i].reshape(()) for i in kept})
        return {i - empty: weight for i, weight in chosen.items() if i >= empty}

    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    assert_same(model.eval()(x), loop(x, base, bank, weigh), trained)


@drawn(30)
@given(DTYPES, LEADS, LAYOUTS, st.integers(1, 5), SEED, st.sampled_from(["MOELoRA", "MoLoRA", "Med-MoE-LoRA"]))
def test_in_every_type_the_layer_is_its_equation_as_far_as_the_type_goes(dtype, lead, layout, experts, seed, method):
    shared = {**COMMON, "num_experts": experts}
    config = {
        "MOELoRA": lambda: MoeLoraConfig(**shared, r=2 * experts, tasks=NAMES, default_task="rad"),
        "MoLoRA": lambda: MoLoraConfig(**shared, r=2, top_k=9),
        "Med-MoE-LoRA": lambda: MedMoeLoraConfig(
            **shared, expert_schedule="uniform", expert_ranks=[1, 3], balance_loss="none"
        ),
    }[method]()
    model, base, bank, gate = one_layer(config, (4, 3), seed, dtype=dtype)
    x = make_x(lead, 4, layout, seed, dtype)
    with torch.no_grad():
        y = model.eval()(x)
        model.double()
    scores = {
        "MOELoRA": lambda token: gate.proj.weight @ gate.embedding.weight[1],
        "MoLoRA": lambda token: gate.weight @ token + gate.bias,
        "Med-MoE-LoRA": lambda token: gate.weight @ token,
    }[method]
    empty = 1 if method == "Med-MoE-LoRA" else 0

    def weigh(token, index):
        weights = scores(token).softmax(0) if gate is not None else torch.ones(1)
        return dict(enumerate(weights[empty:]))

    expected = loop(x.double(), base, bank, weigh)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    worst = 16 * torch.finfo(dtype).eps * (1 + float(expected.detach().abs().max())) if expected.numel() else 0
    torch.testing.assert_close(y.double(), expected.detach(), rtol=0, atol=worst)


@drawn(40)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), SIZE, SIZE, LEADS, SEED, st.booleans())
def test_a_bank_of_any_ranks_is_the_loop_over_its_experts(ranks, n_in, n_out, lead, seed, one_factor):
    """Ranks of 0 too, which AT-MoE has where an expert does not adapt a module."""
    assume(any(ranks))
    factors = [1 + 0.5 * i for i in range(len(ranks))]
    torch.manual_seed(seed)
    bank = ExpertBank(
        in_features=n_in, out_features=n_out, ranks=ranks, scaling=0.75 if one_factor else factors
    ).double()
    bank.reset_parameters(False)
    base = nn.Linear(n_in, n_out).double()
    x = make_x(lead, n_in, "plain", seed).requires_grad_()
    weights = torch.rand(*lead, len(ranks), dtype=torch.float64, requires_grad=True)
    parameters = (x, weights, bank.lora_A.weight, bank.lora_B.weight)
    assert_same(
        base(x) + bank(x, weights), loop(x, base, bank, lambda _, index: dict(enumerate(weights[index]))), parameters
    )
    fixed = torch.rand(len(ranks), dtype=torch.float64)
    a, b = bank.folded(fixed)
    torch.testing.assert_close(x @ bank.delta_weight(fixed).T, bank(x, fixed))
    torch.testing.assert_close(x @ a.T @ b.T, bank(x, fixed))


def stock_twin(layer_config, sizes, seed, conv, dtype, alpha, rslora):
    model, base, bank, gate = one_layer(layer_config, sizes, seed, conv=conv, dtype=dtype)
    assert gate is None
    torch.manual_seed(seed)
    twin = nn.Sequential(Conv1D(sizes[1], sizes[0]) if conv else nn.Linear(*sizes)).to(dtype)
    twin[0].load_state_dict(base.state_dict())
    r = bank.ranks[0]
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"], fan_in_fan_out=conv)
    twin = get_peft_model(twin, config, autocast_adapter_dtype=False)
    lora = twin.base_model.model[0]
    lora.lora_A["default"].weight.data = bank.lora_A.weight.data.clone()
    lora.lora_B["default"].weight.data = bank.lora_B.weight.data.clone()
    return model, twin, lora


@drawn(40)
@given(
    st.sampled_from(["MOELoRA", "MoLoRA", "Med-MoE-LoRA"]),
    SIZE,
    SIZE,
    st.just(()) | LEADS,
    LAYOUTS,
    st.integers(0, 3),
    SEED,
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
)
def test_one_expert_is_stock_lora(method, n_in, n_out, lead, layout, log_r, seed, conv, dtype, rslora, exact):
    """In value, gradient, weight, merged, and number of parameters; to rounding with kernels, and in plain PyTorch to
    the bit where alpha / r is a power of two."""
    r = 2**log_r
    alpha = 2 * r if exact and not rslora else 5
    shared = {**COMMON, "num_experts": 1, "lora_alpha": alpha, "use_rslora": rslora}
    config = {
        "MOELoRA": lambda: MoeLoraConfig(**shared, r=r),
        "MoLoRA": lambda: MoLoraConfig(**shared, r=r),
        "Med-MoE-LoRA": lambda: MedMoeLoraConfig(
            **shared, expert_ranks=r, num_base_experts=0, expert_schedule="uniform", balance_loss="none"
        ),
    }[method]()
    ours, stock, lora = stock_twin(config, (n_in, n_out), seed, conv, dtype, alpha, rslora)
    (layer,) = routed_layers(ours)
    loose = {} if exact and not rslora else {"rtol": 16 * torch.finfo(dtype).eps, "atol": 32 * torch.finfo(dtype).eps}
    compare = (lambda a, b: torch.testing.assert_close(a, b, **loose)) if loose else assert_equal
    x = make_x(lead, n_in, "plain" if conv else layout, seed, dtype)
    with kernels_or_plain(fused=bool(loose)):
        compare_with_stock(compare, x, dtype, ours, stock, layer, lora)


@contextmanager
def kernels_or_plain(*, fused):
    before, kernels.fused = kernels.fused, fused
    try:
        yield
    finally:
        kernels.fused = before


def compare_with_stock(compare, x, dtype, ours, stock, layer, lora):
    compare(ours(x), stock(x))
    assert ours.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    compare(layer.get_delta_weight("default"), lora.get_delta_weight("default"))
    if x.numel():
        for model in (ours, stock):
            model(x).float().square().sum().backward()
        bank = layer.moelora_bank["default"]
        wide = {"rtol": 64 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps * (1 + grad_size(lora))}
        torch.testing.assert_close(bank.lora_A.weight.grad, lora.lora_A["default"].weight.grad, **wide)
        torch.testing.assert_close(bank.lora_B.weight.grad, lora.lora_B["default"].weight.grad, **wide)
    for model in (ours, stock):
        model.merge_adapter()
    compare(layer.base_layer.weight, lora.base_layer.weight)
    compare(ours(x), stock(x))


def assert_equal(a, b) -> None:
    assert torch.equal(a, b)


def grad_size(lora) -> float:
    return max(
        float(lora.lora_A["default"].weight.grad.abs().max()), float(lora.lora_B["default"].weight.grad.abs().max())
    )


# scores to weights, and tasks


SCORES = st.lists(st.floats(-20, 20), min_size=1, max_size=9).map(lambda s: torch.tensor(s, dtype=torch.float64))


@drawn(60)
@given(SCORES, st.integers(1, 10), st.floats(0.01, 1.0))
def test_selections_are_shares_of_the_largest_scores(scores, k, p):
    dense, few, some = softmax(scores), top_k(scores, k=k), top_p(scores, p=p)
    for weights in (dense, few, some):
        assert weights.sum().item() == pytest.approx(1)
        assert weights.min() >= 0
    assert (few > 0).sum() <= k
    assert dense[few == 0].max().item() <= dense[few > 0].min().item() if (few == 0).any() else k >= (few > 0).sum()
    chosen = dense[some > 0]
    assert chosen.sum().item() >= p - 1e-9
    assert chosen.sum().item() - chosen.min().item() < p + 1e-9  # the fewest
    for weights in (few, some):
        kept = weights > 0
        torch.testing.assert_close(weights[kept], dense[kept] / dense[kept].sum())


@st.composite
def controls(draw):
    """Groups of experts, and weights that fix a part of them."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    groups = {f"g{i}": [f"e{j}" for j in range(size)] for i, size in enumerate(sizes)}
    weights, own = {}, {}
    for group, experts in groups.items():
        some = draw(st.lists(st.sampled_from(experts), unique=True, max_size=len(experts) - 1))
        if some:
            weights[group] = {name: draw(st.floats(0, 1)) / len(some) for name in some}
    for group in draw(st.lists(st.sampled_from(list(groups)), unique=True, max_size=len(groups) - 1)):
        own[group] = draw(st.floats(0, 1)) / len(groups)
    return groups, weights, own


@drawn(60)
@given(controls(), SEED, st.booleans())
def test_group_weights_are_two_softmaxes_around_what_is_fixed(drawn_control, seed, flat):
    """W'_G and W'_D of AT-MoE (arXiv 2410.10896); what is fixed is as given, and the others share the rest."""
    groups, weights, own = drawn_control
    control = control_of(groups, weights, group_weights=own)
    sizes, names = [len(experts) for experts in groups.values()], list(groups)
    generator = torch.Generator().manual_seed(seed)
    g_scores, e_scores = torch.randn(len(groups), generator=generator), torch.randn(sum(sizes), generator=generator)
    of_group, within = in_groups(None if flat else g_scores, e_scores, sizes=sizes, control=control)
    assert of_group.sum().item() == pytest.approx(1, abs=1e-5)
    free = [i for i, name in enumerate(names) if name not in own]
    rest = 1 - sum(own.values())
    starts = [0, *accumulate(sizes)]
    for i, (group, experts) in enumerate(groups.items()):
        part, given = within[starts[i] : starts[i + 1]], weights.get(group, {})
        assert part.sum().item() == pytest.approx(1, abs=1e-5)
        others = [j for j, name in enumerate(experts) if name not in given]
        shares = e_scores[starts[i] : starts[i + 1]][others].softmax(0) * (1 - sum(given.values()))
        expected = {
            **{experts.index(n): w for n, w in given.items()},
            **dict(zip(others, shares.tolist(), strict=True)),
        }
        assert part.tolist() == pytest.approx([expected[j] for j in range(len(experts))], abs=1e-5)
        if group in own:
            assert of_group[i].item() == pytest.approx(own[group], abs=1e-5)
        elif not flat:
            expected_share = g_scores[free].softmax(0)[free.index(i)].item() * rest
            assert of_group[i].item() == pytest.approx(expected_share, abs=1e-5)


@drawn(60)
@given(st.lists(st.lists(st.sampled_from(range(4)), min_size=1, max_size=4, unique=True), min_size=1, max_size=5), SEED)
def test_tasks_in_every_form_are_scored_the_same(rows, seed):
    torch.manual_seed(seed)
    gate = TaskGate(num_tasks=4, num_experts=3, embedding_dim=5).double()
    hot = torch.zeros(len(rows), 4, dtype=torch.bool)
    for i, row in enumerate(rows):
        hot[i, row] = True
    longest = max(map(len, rows))
    padded = [row + [-1] * (longest - len(row)) for row in rows]
    forms = [
        rows,
        [[NAMES[i] for i in row] for row in rows],
        [np.array(row) for row in rows],
        tuple(map(tuple, rows)),
        hot,
        torch.tensor(padded),
    ]
    expected = torch.stack([gate.embedding.weight[row].mean(0) for row in rows]) @ gate.proj.weight.T
    for form in forms:
        torch.testing.assert_close(gate(encode_tasks(form, NAMES)), expected)


@drawn(40)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(2, 5), st.integers(0, 1), SEED, st.integers(0, 3), st.booleans()
)
def test_balance_losses_do_not_see_padding(n, s, experts, num_base, seed, padding, left):
    """The loss of rows with padding at either end is that of the same rows without it."""
    assume(experts - num_base > 1)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, s, experts, generator=generator)
    noise = torch.randn(n, padding, experts, generator=generator)
    real, filler = torch.ones(n, s, dtype=torch.bool), torch.zeros(n, padding, dtype=torch.bool)
    order = (lambda a, b: [b, a]) if left else (lambda a, b: [a, b])
    padded, mask = torch.cat(order(scores, noise), 1), torch.cat(order(real, filler), 1)
    matches = torch.rand(n, experts, generator=generator) > 0.5
    for name, loss in BALANCE_LOSSES.items():
        options = {"delta": 0.3} if name == "localized" else {}
        plain = loss(Routed(scores, top_k(scores, k=2), None, matches, num_base), **options)
        masked = loss(Routed(padded, top_k(padded, k=2), mask, matches, num_base), **options)
        torch.testing.assert_close(masked, plain, msg=lambda m, name=name: f"{name}: {m}")
        assert masked >= 0


# schedules


@drawn(100)
@given(st.integers(1, 96), st.integers(1, 8), st.integers(0, 24), st.sampled_from([1, 2, 3]))
def test_the_power_law_is_exact_rises_and_ends_at_its_largest(depth, smallest, span, gamma):
    counts = power_law(depth, smallest=smallest, largest=smallest + span, gamma=gamma)
    assert counts == [smallest + math.floor(span * Fraction(at, depth) ** gamma) for at in range(1, depth + 1)]
    assert counts == sorted(counts)
    assert (counts[-1], min(counts) >= smallest, len(counts)) == (smallest + span, True, depth)


@drawn(100)
@given(st.integers(1, 48), st.integers(1, 16), st.floats(0.1, 8))
def test_named_schedules_stay_in_their_bounds(depth, experts, gamma):
    by_name = {shape: experts_per_layer(shape, depth, experts) for shape in SHAPES}
    assert by_name["uniform"] == [experts] * depth
    assert by_name["descending"] == by_name["ascending"][::-1]
    assert max(by_name["ascending"]) == by_name["ascending"][-1] == experts
    assert all(min(2, experts) <= count <= experts for counts in by_name.values() for count in counts)
    law = {"type": "power", "min": 1, "max": experts, "gamma": gamma}
    check_schedule(law)
    counts = experts_per_layer(law, depth, 1)
    assert counts == sorted(counts)
    assert all(1 <= count <= experts for count in counts)


@drawn(60)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=5), st.randoms(use_true_random=False)
)
def test_bands_in_any_order_give_each_layer_its_number(parts, random):
    starts = [0, *accumulate(length for length, _ in parts)]
    given_bands = [[start, start + length, count] for start, (length, count) in zip(starts, parts, strict=False)]
    random.shuffle(given_bands)
    counts = [count for length, count in parts for _ in range(length)]
    assert bands(starts[-1], given_bands) == counts
    assert experts_per_layer({"type": "bands", "bands": given_bands}, starts[-1], 1) == counts
    assert experts_per_layer(counts, starts[-1], 1) == counts


# configs


RANK, COUNT = st.integers(1, 4), st.integers(1, 6)
KEYS = st.sampled_from(["q_proj", "v_proj", "gate_proj", "down_proj", r"layers\.0\..*", "layers.1.mlp.gate_proj"])
SHARED_FIELDS = {
    "task_type": st.sampled_from(["CAUSAL_LM", None]),
    "target_modules": st.sampled_from([TARGETS["llama"], r".*(q_proj|gate_proj|v_proj|down_proj)"]),
    "lora_alpha": st.sampled_from([1, 4, 2.5]),
    "use_rslora": st.booleans(),
    "init_lora_weights": st.just(False),
    "alpha_pattern": st.dictionaries(KEYS, st.sampled_from([3, 0.5]), max_size=2),
    "modules_to_save": st.none() | st.just(["lm_head"]),
}


@st.composite
def moelora_configs(draw):
    shared = {name: draw(strategy) for name, strategy in SHARED_FIELDS.items()}
    counts = st.sampled_from([1, 2, 3, 4, 6])
    return MoeLoraConfig(
        **shared,
        r=12,
        num_experts=draw(counts),
        num_experts_pattern=draw(st.dictionaries(KEYS, counts, max_size=2)),
        rank_pattern=draw(st.dictionaries(KEYS, st.sampled_from([12, 24]), max_size=2)),
        tasks=NAMES,
        gate_scope=draw(st.sampled_from(["model", "layer"])),
        task_embedding_dim=draw(SIZE),
        default_task=draw(st.none() | st.sampled_from([*NAMES, 0, 3])),
    )


@st.composite
def molora_configs(draw):
    shared = {name: draw(strategy) for name, strategy in SHARED_FIELDS.items()}
    count = draw(st.integers(2, 6))
    return MoLoraConfig(
        **shared,
        r=draw(RANK),
        num_experts=count,
        rank_pattern=draw(st.dictionaries(KEYS, RANK, max_size=2)),
        num_experts_pattern=draw(st.none() | st.dictionaries(KEYS, COUNT, max_size=2)),
        top_k=draw(st.integers(2, 4)),
        top_p=draw(st.none() | st.floats(0.1, 1)),
        router_bias=draw(st.booleans()),
        num_shared_experts=draw(st.integers(0, 2)),
        tasks=draw(st.sampled_from([None, 3, ["a", "b"]])),
        balance_loss=draw(st.sampled_from(["none", "cv2", {"z": 0.1, "variance": 0.5}])),
    )


@st.composite
def medmoe_configs(draw):
    shared = {name: draw(strategy) for name, strategy in SHARED_FIELDS.items()}
    schedule = st.sampled_from(
        [
            *SHAPES,
            [2, 3],
            (3, 1),
            {"type": "bands", "bands": [[0, 1, 2], [1, 2, 4]]},
            {"type": "power", "min": 1, "max": 5},
        ]
    )
    mode = draw(st.sampled_from(["frozen", "regularized"]))
    return MedMoeLoraConfig(
        **shared,
        num_experts=draw(COUNT),
        expert_schedule=draw(schedule),
        expert_ranks=draw(RANK | st.lists(RANK, min_size=1, max_size=3) | st.just((1, 2))),
        base_expert_mode=mode,
        num_base_experts=draw(st.integers(1 if mode != "frozen" else 0, 2)),
        temperature=draw(st.floats(0.1, 4)),
        learn_temperature=draw(st.booleans()),
        inference_top_k=draw(st.none() | COUNT),
        balance_loss=draw(st.sampled_from(["none", "variance", {"cv2": 0.1}])),
    )


@st.composite
def grouped_configs(draw):
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    groups = {f"g{9 - i}": {f"e{j}": f"loras/{i}{j}" for j in range(n)} for i, n in enumerate(sizes)}
    general = draw(st.none() | st.just({"source": "loras/p", "revision": "v1"}))
    return (
        GroupedMoeConfig(
            groups=groups,
            general_expert=general,
            mix=draw(st.floats(0, 1)) if general else None,
            router_input=draw(st.sampled_from(["token", "prompt"])),
            flat_routing=draw(st.booleans()),
            group_temperature=draw(st.floats(0.1, 3)),
            group_weights=draw(st.none() | st.just({"off": ("g9/e0",)})),
        )
        if sizes != [1]
        else GroupedMoeConfig(groups=groups)
    )


@drawn(80)
@given(moelora_configs() | molora_configs() | medmoe_configs() | grouped_configs())
def test_a_config_that_was_saved_is_the_same_config(config):
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        for loaded in (PeftConfig.from_pretrained(folder), type(config).from_pretrained(folder)):
            assert type(loaded) is type(config)
            assert loaded.to_dict() == config.to_dict()


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.floats(),
    st.text("ab(*", max_size=3),
    st.binary(max_size=2),
    st.lists(st.none() | st.integers(-2, 3) | st.text("a(", max_size=1) | st.floats(), max_size=3),
    st.dictionaries(
        st.text("a(", max_size=1) | st.integers(0, 2), st.none() | st.integers(-2, 3) | st.text("a", max_size=1)
    ),
    st.sets(st.integers(0, 2) | st.text("a", max_size=1), max_size=2),
    st.builds(object),
    st.just(10**400),
    st.sampled_from([torch.tensor(1), torch.tensor([1.0, 2.0]), np.int64(2), np.array([1, 2]), Path("x"), int, 1j]),
)
PLAIN = {
    MoeLoraConfig: {},
    MoLoraConfig: {},
    MedMoeLoraConfig: {},
    GroupedMoeConfig: {"groups": {"g": {"x": "a"}, "h": {"y": "b"}}, "general_expert": "c"},
}
NOT_OURS = {"peft_type", "auto_mapping"}  # which peft fills


@drawn(400)
@given(st.data(), st.sampled_from(list(PLAIN)), WRONG)
def test_whatever_a_field_is_given_is_taken_and_saved_or_refused_by_name(data, config, value):
    name = data.draw(st.sampled_from(sorted({field.name for field in fields(config)} - NOT_OURS)))
    assume(not (name == "top_k" and value == 1))  # is warned of
    try:
        made = config(**{**PLAIN[config], name: value})
    except ValueError as error:
        words = {name, name.replace("_", " "), "Expert " if name == "groups" else name}
        assert any(word in str(error) for word in words), f"{name}={value!r}: {error}"  # noqa: PT017
    else:
        written = {key: sorted(v) if isinstance(v, set) else v for key, v in made.to_dict().items()}
        assert config.from_peft_type(**json.loads(json.dumps(written, sort_keys=True))).to_dict() == made.to_dict()


# whole adapters


INPUTS = make_inputs("llama")
IDS = [2, 0, 3]


def make_adapter(config, *, name="default", seed=0, dtype=torch.float32) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(make_model("llama").to(dtype), config, adapter_name=name).eval()


def told(config) -> dict:
    return {"task_ids": IDS} if config.needs_tasks else {}


@pytest.mark.filterwarnings(
    "ignore:.* keys .* match nothing", "ignore:The following alpha_pattern", "ignore:The following rank_"
)
@drawn(20)
@given(
    moelora_configs() | molora_configs() | medmoe_configs(),
    SEED,
    st.text("abcxyz_", min_size=4, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_loaded_adapter_has_the_same_logits_to_the_bit(config, seed, name, dtype):
    model = make_adapter(config, name=name, seed=seed, dtype=dtype)
    expected = logits(model, INPUTS, **told(config))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        directory = Path(folder, name)
        loaded = PeftModel.from_pretrained(make_model("llama").to(dtype), directory).eval()
        assert torch.equal(logits(loaded, INPUTS, **told(config)), expected)
        again = PeftModel.from_pretrained(make_model("llama").to(dtype), directory, adapter_name="other").eval()
        assert torch.equal(logits(again, INPUTS, **told(config)), expected)


@pytest.mark.filterwarnings(
    "ignore:.* keys .* match nothing", "ignore:The following alpha_pattern", "ignore:The following rank_"
)
@drawn(15)
@given(moelora_configs(), SEED, st.lists(st.sampled_from(range(4)), min_size=1, max_size=3, unique=True))
def test_folded_merged_and_routed_are_the_same_and_unmerging_restores(config, seed, tasks):
    model = make_adapter(config, seed=seed)
    task = [NAMES[i] for i in tasks] if len(tasks) > 1 else tasks[0]
    routed_logits = logits(model, INPUTS, task_ids=[tasks] * 3)
    weights = [layer.get_base_weight().clone() for layer in routed_layers(model)]
    with tempfile.TemporaryDirectory() as folder:
        fold(model, Path(folder, "f"), task=task)
        stock = PeftModel.from_pretrained(make_model("llama"), Path(folder, "f")).eval()
    assert type(stock.active_peft_config) is LoraConfig
    torch.testing.assert_close(logits(stock, INPUTS), routed_logits, rtol=1e-4, atol=1e-4)
    model.merge_adapter(task=task)
    torch.testing.assert_close(logits(model, INPUTS), routed_logits, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    for layer, weight in zip(routed_layers(model), weights, strict=True):
        torch.testing.assert_close(layer.get_base_weight(), weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model, INPUTS, task_ids=[tasks] * 3), routed_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model.merge_and_unload(task=task), INPUTS), routed_logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loras")


@drawn(12)
@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.none() | st.floats(0, 1),
    st.sampled_from(["token", "prompt"]),
    st.booleans(),
    SEED,
)
def test_at_moe_with_fixed_weights_is_the_same_folded_merged_and_routed(
    loras, of_f, a, mix, router_input, general, seed
):
    changes = {} if general else {"general_expert": None}
    model = grouped("llama", loras, seed=seed, router_input=router_input, **changes)
    mix = mix if general else None
    control = {"weights": {"f": {"a": a, "b": 1 - a}, "s": {"c": 1.0}}, "group_weights": {"f": of_f, "s": 1 - of_f}}
    with model.routing(**control, mix=mix):
        expected = logits(model, INPUTS)
        with tempfile.TemporaryDirectory() as folder:
            fold(model, Path(folder, "f"))
            stock = PeftModel.from_pretrained(make_model("llama"), Path(folder, "f")).eval()
        torch.testing.assert_close(logits(stock, INPUTS), expected, rtol=1e-4, atol=1e-4)
        model.merge_adapter()
        torch.testing.assert_close(logits(model, INPUTS), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model, INPUTS), expected, rtol=1e-4, atol=1e-4)
