"""Token gates, what is made of their scores, which tokens count, and what routers say they did."""

import contextlib
import math
from functools import partial

import pytest
import torch
from helpers import plain, routed_layers
from peft import get_peft_model
from tiny_models import TASK_TYPES, make_inputs, make_model
from torch import nn
from transformers import Trainer

from peft_moe import MedMoeLoraConfig, MoLoraConfig
from peft_moe.losses import Routed, localized, variance
from peft_moe.routing import (
    BalanceTerm,
    Batch,
    GroupedGate,
    Ledger,
    OutsideScale,
    RoutingStatistics,
    TokenGate,
    TokenRouter,
    View,
    keep_mask,
    softmax,
    top_k,
    top_p,
)

GATES = {
    "MING-MOE": {"bias": True},
    "no bias": {"bias": False},
    "learnt temperature": {"temperature": 0.7},
    "fixed temperature": {"temperature": 0.7, "learn_temperature": False},
}
TRAINED = {
    "MING-MOE": {"weight", "bias"},
    "no bias": {"weight"},
    "learnt temperature": {"weight", "temperature_bias"},
    "fixed temperature": {"weight"},
}


def make_gate(*, in_features=6, num_experts=4, seed=0, **fields):
    torch.manual_seed(seed)
    return TokenGate(in_features=in_features, num_experts=num_experts, **fields)


def make_x(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# the gate


@pytest.mark.parametrize("name", GATES)
def test_scores_are_those_of_the_equation_in_value_and_gradient(name):
    """(W_g x + b) / τ, number by number: MING-MOE, and Med-MoE-LoRA's eq. 3."""
    gate = make_gate(**GATES[name]).double()
    assert {parameter for parameter, _ in gate.named_parameters()} == TRAINED[name]
    x = make_x(2, 3, 6, dtype=torch.double).requires_grad_()
    tau = 1.0 if gate.temperature is None else gate.temperature
    rows = []
    for token in x.reshape(-1, 6):
        for i in range(4):
            score = sum(gate.weight[i, d] * token[d] for d in range(6))
            rows.append((score + (gate.bias[i] if gate.bias is not None else 0)) / tau)
    expected, ours = torch.stack([r.reshape(()) for r in rows]).view(2, 3, 4), gate(x)
    torch.testing.assert_close(ours, expected)
    inputs, upstream = [x, *gate.parameters()], make_x(2, 3, 4, seed=2, dtype=torch.double)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fields", GATES.values(), ids=GATES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_scores_are_the_same_float32_bits_in_every_mode(fields, weights, given):
    """In training and evaluation, under autocast or not: those of the same numbers widened to float32."""
    gate, x = make_gate(in_features=64, **fields).to(weights), make_x(5, 7, 64, dtype=given)
    wide = make_gate(in_features=64, **fields).to(weights).float()(x.float())
    for training in (True, False):
        assert torch.equal(gate.train(training)(x), wide)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(gate(x), wide)
    assert wide.dtype == torch.float32
    # else half precision would have given the same
    assert not torch.equal(nn.functional.linear(x.bfloat16(), gate.weight.bfloat16()).float(), wide)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 300, 6)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_grouped_gate_reads_half_precision_as_plain_pytorch_does_and_keeps_it_as_it_is(dtype, shape, frozen):
    torch.manual_seed(0)
    gate = GroupedGate(in_features=6, num_groups=2, num_experts=3)
    gate.reset_parameters(even=False)
    gate.to(dtype).requires_grad_(not frozen)
    kept, found = [], []
    for mode in (contextlib.nullcontext, plain):
        e, kept[:] = make_x(*shape, dtype=dtype).requires_grad_(), []
        with mode(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            groups, experts, _ = gate(e)
        assert groups.dtype == experts.dtype == torch.float32
        assert any(t.shape[-1] == 6 and t.numel() == e.numel() and t.dtype == torch.float32 for t in kept) == (
            mode is plain and not frozen
        )
        gate.zero_grad()
        (groups.sum() + experts.square().sum()).backward()
        found.append([groups, experts, e.grad, None if frozen else gate.weight.grad])
    for ours, expected in zip(*found, strict=True):
        if expected is not None:
            torch.testing.assert_close(ours, expected)


def test_a_gate_starts_as_a_linear_layer_does():
    """W_g and b within ±1/√in of torch's own (MING-MOE's code has nn.Linear), and not zero."""
    gate = make_gate(in_features=400, num_experts=50, bias=True)
    for values in (gate.weight, gate.bias):
        assert values.abs().max() <= 1 / 20
        assert values.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.2)


@pytest.mark.parametrize("start", [0.1, 0.5, 1.0, 2.0, 30.0, 1000.0])
@pytest.mark.parametrize("learn", [True, False])
def test_the_temperature_starts_as_given(start, learn):
    gate = make_gate(temperature=start, learn_temperature=learn)
    assert torch.as_tensor(gate.temperature).item() == pytest.approx(start, rel=1e-6)
    assert (gate.temperature_bias is not None) == learn
    x = make_x(3, 6)
    torch.testing.assert_close(gate(x), make_gate()(x) / start, rtol=1e-5, atol=1e-6)


def test_a_temperature_that_is_learnt_moves_down_to_0_05_and_no_further():
    gate = make_gate(temperature=1.0)
    optimizer = torch.optim.SGD([gate.temperature_bias], lr=1.0)
    seen = [1.0]
    for _ in range(200):
        optimizer.zero_grad()
        gate.temperature.sum().backward()  # as a loss would that always wants it colder
        optimizer.step()
        seen.append(gate.temperature.item())
    assert seen == sorted(seen, reverse=True)
    assert 0.05 <= seen[-1] < 0.06
    for dtype in (torch.float32, torch.bfloat16):
        gate.temperature_bias.data = torch.tensor([-1e4], dtype=dtype)
        assert gate.temperature.item() == pytest.approx(0.05, rel=1e-6)


def test_trainer_gives_no_weight_decay_to_temperature_and_bias():
    medmoe = MedMoeLoraConfig(target_modules=["q_proj"], expert_ranks=4)
    molora = MoLoraConfig(target_modules=["q_proj"], r=4)
    for config, left_out in ((medmoe, "temperature_bias"), (molora, "bias")):
        model = get_peft_model(make_model("llama"), config)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        decayed = trained & set(Trainer.get_decay_parameter_names(None, model))
        assert {name.rsplit(".", 1)[1] for name in trained - decayed} == {left_out}
        assert len(trained - decayed) == 2  # layers
        assert any(name.endswith("gate.weight") for name in decayed)


def test_jitter_moves_what_the_gate_reads_in_training_only():
    gate = make_gate(in_features=4, jitter=0.1)
    gate.weight.data = torch.eye(4)
    x = torch.full((500, 4), 3.0)
    moved = gate.train()(x) / x
    assert moved.min() >= 0.9
    assert moved.max() <= 1.1
    assert moved.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.1)  # of a uniform distribution of width 0.2
    assert not torch.equal(gate(x), gate(x))
    assert torch.equal(gate.eval()(x), x)
    assert torch.equal(x, torch.full((500, 4), 3.0))


# from scores to weights


def cut_and_renormalised(scores, chosen):
    """The softmax over all scores, cut to `chosen` (..., E) and renormalised."""
    probabilities = scores.exp() / scores.exp().sum(-1, keepdim=True) * chosen
    return probabilities / probabilities.sum(-1, keepdim=True)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_k_is_the_softmax_cut_and_renormalised_in_value_and_gradient(k):
    scores = make_x(4, 3, 6, dtype=torch.double).requires_grad_()
    chosen = torch.zeros_like(scores)
    for n in range(4):
        for s in range(3):
            for i in sorted(range(6), key=lambda i, n=n, s=s: -scores[n, s, i].item())[:k]:
                chosen[n, s, i] = 1
    ours, expected = top_k(scores, k=k), cut_and_renormalised(scores, chosen)
    torch.testing.assert_close(ours, expected)
    assert ((ours > 0).sum(-1) == k).all()
    upstream = make_x(4, 3, 6, seed=2, dtype=torch.double)
    (a,), (b,) = torch.autograd.grad(ours, scores, upstream), torch.autograd.grad(expected, scores, upstream)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("k", [4, 5, 100])
def test_top_k_of_all_experts_is_the_dense_softmax(k):
    scores = make_x(5, 4)
    assert torch.equal(top_k(scores, k=k), softmax(scores))
    assert torch.equal(softmax(scores), scores.softmax(-1))


def test_the_one_expert_of_top_1_has_weight_1_and_its_score_no_gradient():
    scores = make_x(5, 4).requires_grad_()
    weights = top_k(scores, k=1)
    assert torch.equal(weights, nn.functional.one_hot(scores.argmax(-1), 4).float())
    assert torch.autograd.grad(weights, scores, make_x(5, 4, seed=2))[0].abs().max() == 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_of_equal_scores_exactly_k_are_chosen(k):
    weights = top_k(torch.zeros(3, 8), k=k)
    assert ((weights > 0).sum(-1) == k).all()
    torch.testing.assert_close(weights.max(-1).values, torch.full((3,), 1 / k))


def test_a_cold_gate_is_an_argmax_and_a_hot_one_even():
    """τ → 0 and τ → ∞."""
    scores = torch.tensor([[0.3, 0.1, 0.9, -2.0], [-1.0, 0.5, 0.4, 0.2]])
    cold, hot = scores / 1e-3, scores / 1e6
    best = nn.functional.one_hot(scores.argmax(-1), 4).float()
    for select in (softmax, partial(top_k, k=2), partial(top_p, p=0.9)):
        torch.testing.assert_close(select(cold), best)
    torch.testing.assert_close(softmax(hot), torch.full((2, 4), 1 / 4))
    torch.testing.assert_close(top_k(hot, k=2).sort(-1).values[:, 2:], torch.full((2, 2), 1 / 2))
    torch.testing.assert_close(top_p(hot, p=1.0), torch.full((2, 4), 1 / 4))


def test_a_gate_hands_on_its_temperature():
    x = make_x(50, 6)
    best = nn.functional.one_hot(make_gate()(x).argmax(-1), 4).float()
    hot = softmax(make_gate(temperature=1e6, learn_temperature=False)(x))
    torch.testing.assert_close(hot, torch.full((50, 4), 1 / 4))
    cold = make_gate(temperature=1e-6, learn_temperature=False)
    torch.testing.assert_close(softmax(cold(x)), best)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.6, 0.9, 1.0])
def test_top_p_is_the_fewest_experts_that_reach_p_in_value_and_gradient(p):
    scores = make_x(4, 3, 6, dtype=torch.double).requires_grad_()
    chosen = torch.zeros_like(scores)
    for n in range(4):
        for s in range(3):
            exponentials = scores[n, s].exp().tolist()
            reached = 0.0
            for i in sorted(range(6), key=lambda i, e=exponentials: -e[i]):
                if reached < p:
                    chosen[n, s, i] = 1
                reached += exponentials[i] / sum(exponentials)
    counts = chosen.sum(-1)
    assert {0.01: counts.max() == 1, 1.0: counts.min() == 6}.get(p, counts.min() < counts.max())
    ours, expected = top_p(scores, p=p), cut_and_renormalised(scores, chosen)
    torch.testing.assert_close(ours, expected)
    upstream = make_x(4, 3, 6, seed=2, dtype=torch.double)
    (a,), (b,) = torch.autograd.grad(ours, scores, upstream), torch.autograd.grad(expected, scores, upstream)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("p", "experts"), [(0.2, 1), (0.25, 1), (0.3, 2), (0.5, 2), (0.51, 3), (1.0, 4)])
def test_top_p_of_equal_scores_takes_as_many_as_it_needs(p, experts):
    weights = top_p(torch.zeros(3, 4), p=p)
    assert ((weights > 0).sum(-1) == experts).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))


# the router


def make_router(*, gate=None, select=softmax, **fields):
    return TokenRouter(gate=make_gate(**(gate or {})), select=select, **fields)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (2, 3, 4, 6)])
def test_a_router_is_its_select_of_its_gate(shape):
    router, x = make_router(select=partial(top_k, k=2)), make_x(*shape)
    assert torch.equal(router(x, View()), top_k(router.gate(x), k=2))


def test_shared_experts_come_first_and_have_weight_1():
    weights = make_router(num_shared=2)(make_x(2, 3, 6), View())
    assert weights.shape == (2, 3, 6)
    assert torch.equal(weights[..., :2], torch.ones(2, 3, 2))
    assert torch.equal(weights[..., 2:], make_router()(make_x(2, 3, 6), View()))


def test_what_empty_base_experts_get_is_taken_from_the_others():
    router, plain, x = make_router(num_base=1, base_is_empty=True), make_router(), make_x(2, 3, 6)
    weights = router(x, View())
    assert torch.equal(weights, plain(x, View())[..., 1:])
    torch.testing.assert_close(weights.sum(-1), 1 - plain(x, View())[..., 0])
    kept = make_router(num_base=1)  # a trained base expert has matrices, and so a weight
    assert torch.equal(kept(x, View()), plain(x, View()))
    both = make_router(num_base=1, base_is_empty=True, num_shared=1)(x, View())
    assert torch.equal(both, torch.cat([torch.ones(2, 3, 1), weights], dim=-1))


def test_another_select_for_inference_is_for_inference_only():
    router, x = make_router(inference_select=partial(top_k, k=1)), make_x(5, 6)
    assert torch.equal(router.train()(x, View()), softmax(router.gate(x)))
    assert torch.equal(router.eval()(x, View()), top_k(router.gate(x), k=1))


def test_weights_are_the_same_bits_in_training_and_evaluation_in_half_precision():
    """The base, the adapter and the input in bfloat16: the experts that are chosen do not depend on the mode."""
    config = MoLoraConfig(target_modules=["0"], r=2, num_experts=8, lora_dropout=0.0, init_lora_weights=False)
    for adapter_dtype in (True, False):
        base = nn.Sequential(nn.Linear(64, 32)).bfloat16()
        model = get_peft_model(base, config, autocast_adapter_dtype=adapter_dtype)
        (layer,) = routed_layers(model)
        if not adapter_dtype:
            layer.moelora_router.bfloat16()
        x = make_x(400, 64, dtype=torch.bfloat16)
        router = layer.router_of("default")
        assert torch.equal(router.train()(x, View()), router.eval()(x, View()))
        assert torch.equal(model.train()(x), model.eval()(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(router.train()(x, View()), router.eval()(x, View()))


def test_a_balance_loss_is_charged_in_training_and_leaves_the_weights_alone():
    router, x = make_router(balance=[BalanceTerm("variance", variance, 0.5)]), make_x(2, 3, 6)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ledger = Ledger(OutsideScale())
    view = View(batch=Batch(2, tokens=3, mask=mask), ledger=ledger)
    weights = router.train()(x, view)
    assert torch.equal(weights, softmax(router.gate(x)))
    expected = variance(Routed(router.gate(x), weights, mask))
    (charged,) = ledger.charged["default.variance"]
    torch.testing.assert_close(charged, 0.5 * expected)
    router.eval()(x, view)
    assert len(ledger.charged["default.variance"]) == 1


def test_labels_reach_the_localized_loss_by_the_task_of_each_row():
    matches = torch.tensor([[True, True, False, False], [False, False, True, True], [False, True, False, False]])
    router = make_router(
        matches=matches, balance=[BalanceTerm("localized", partial(localized, delta=0.3), 1.0)]
    ).train()
    x = make_x(4, 3, 6)
    of_rows = {
        "one each": (torch.tensor([0, 1, 2, 0]), matches[[0, 1, 2, 0]]),
        "one for all": (torch.tensor([1]), matches[[1, 1, 1, 1]]),
        "several": (torch.tensor([[0, 1], [2, -1], [2, 1], [0, -1]]), torch.tensor(
            [[1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)),
        "rows repeated as beams are": (torch.tensor([0, 1]), matches[[0, 0, 1, 1]]),
    }  # fmt: skip
    for ids, expected in of_rows.values():
        ledger = Ledger(OutsideScale())
        weights = router(x, View(ids=ids, ledger=ledger))
        loss = localized(Routed(router.gate(x), weights, None, expected), delta=0.3)
        torch.testing.assert_close(ledger.charged["default.localized"][0], loss.detach())
    with pytest.raises(ValueError, match="no task_ids were given"):
        router(x, View(ledger=Ledger(OutsideScale())))
    router.record([])
    router.eval()(x, View())  # statistics can do without
    assert router.statistics[False].read()["balance"] == {}


# which tokens count

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # left padding


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_a_mask_over_tokens_is_taken_in_every_type(dtype):
    kept = keep_mask(MASK.to(dtype))
    assert kept.dtype == torch.bool
    assert torch.equal(kept, MASK.bool())


def test_a_mask_over_queries_and_keys_counts_the_tokens_that_some_query_sees():
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    seen = causal & MASK.bool().view(2, 1, 1, 5)  # (n, 1, q, s), true where a query sees a key
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, added, added.bfloat16(), added.masked_fill(~seen, -math.inf)):
        assert torch.equal(keep_mask(mask), MASK.bool())
        assert keep_mask(mask[:, :, -2:]) is None  # with a cache, whose slots may not be in use
        assert torch.equal(keep_mask({"full_attention": mask}), MASK.bool())
    assert torch.equal(keep_mask(seen.long()), MASK.bool())
    assert torch.equal(keep_mask(seen[:, 0]), MASK.bool())


@pytest.mark.parametrize("mask", [None, "auto", {}, MASK[0], MASK.unsqueeze(1)])
def test_what_is_no_mask_over_tokens_is_none(mask):
    assert keep_mask(mask) is None


def keep_of(*rows):
    return torch.tensor(rows, dtype=torch.bool)


FITS = {  # batch, shape of a layer's input, leading axes as (n, s), the tokens that count
    "tokens": (Batch(2, tokens=5, mask=MASK.bool()), (2, 5, 7), (2, 5), MASK.bool()),
    "flattened": (Batch(2, tokens=5, mask=MASK.bool()), (10, 7), (2, 5), MASK.bool()),
    "a decoding step": (Batch(2, tokens=1, mask=MASK.bool()), (2, 1, 7), (2, 1), keep_of([1], [1])),
    "several new tokens": (Batch(2, tokens=4, mask=MASK.bool()), (2, 4, 7), (2, 4), MASK[:, 1:].bool()),
    "several new tokens, flattened": (Batch(2, tokens=4, mask=MASK.bool()), (8, 7), (2, 4), MASK[:, 1:].bool()),
    "rows repeated": (Batch(2, tokens=5, mask=MASK.bool()), (4, 5, 7), (4, 5), MASK[[0, 0, 1, 1]].bool()),
    "a mask for all rows": (Batch(2, tokens=5, mask=MASK[:1].bool()), (2, 5, 7), (2, 5), MASK[[0, 0]].bool()),
    "no mask": (Batch(2, tokens=5), (2, 5, 7), (2, 5), None),
    "patches of images": (Batch(2, images=True), (2, 3, 4, 7), (2, 12), None),
    "patches beside text": (Batch(2, tokens=5, mask=MASK.bool()), (2, 9, 7), (2, 9), None),
    "fewer patches than text": (Batch(2, tokens=5, mask=MASK.bool()), (2, 3, 7), (2, 3), None),
    "one vector per row": (Batch(2, tokens=5, mask=MASK.bool()), (2, 7), (2, 1), None),
    "patches of all images": (Batch(2, tokens=5, mask=MASK.bool()), (3, 5, 7), (3, 5), None),
}


@pytest.mark.parametrize(("batch", "shape", "leading", "mask"), FITS.values(), ids=FITS)
def test_a_mask_counts_where_it_fits_what_a_layer_sees(batch, shape, leading, mask):
    found, kept = batch.tokens_of(torch.zeros(shape), in_decoder=False)
    assert tuple(found) == leading
    assert kept is mask if mask is None else torch.equal(kept, mask)


def test_a_decoder_has_a_mask_of_its_own():
    decoder = keep_of([1, 1, 0], [1, 1, 1])
    batch = Batch(2, tokens=5, mask=MASK.bool(), decoder_mask=decoder)
    assert torch.equal(batch.tokens_of(torch.zeros(2, 3, 7), in_decoder=True)[1], decoder)
    assert torch.equal(batch.tokens_of(torch.zeros(2, 5, 7), in_decoder=False)[1], MASK.bool())
    assert batch.tokens_of(torch.zeros(2, 1, 7), in_decoder=True)[1] is None  # a step with a cache: no padding
    without = Batch(2, tokens=5, mask=MASK.bool())
    assert without.tokens_of(torch.zeros(2, 5, 7), in_decoder=True)[1] is None  # never the encoder's


TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "opt": ["q_proj", "fc1", "fc2"],
    "bert": ["query", "output.dense"],
    "t5": ["q", "k", "v", "wi", "wo"],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_real_models_count_the_tokens_that_are_no_padding(name, training):
    config = MoLoraConfig(task_type=TASK_TYPES[name], target_modules=TARGETS[name], r=2, num_experts=4)
    model = get_peft_model(make_model(name), config).train(training)
    model.record_routing()
    inputs = make_inputs(name, batch=2, seq=5)
    inputs["attention_mask"] = MASK
    if name == "t5":
        inputs["labels"] = inputs["labels"].masked_fill(torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]) == 1, -100)
    with torch.no_grad():
        model(**inputs)
    found = model.routing_statistics(training=training)
    assert len(found) == len(routed_layers(model))
    for key, statistics in found.items():
        # what the decoder attends to in the encoder's output are the encoder's tokens
        in_decoder = key.startswith("decoder") and not key.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert statistics["tokens"] == (6 if in_decoder else 8), key


# statistics


def naive_statistics(routed, tokens):
    """What `RoutingStatistics.read` says of one call, token by token."""
    e, count = routed.weights.shape[-1], len(tokens)
    load, top1, chosen, before, after = [0.0] * e, [0.0] * e, [0.0] * e, 0.0, 0.0
    for t in tokens:
        weights, p = routed.weights[t].tolist(), routed.scores[t].softmax(-1).tolist()
        for i in range(e):
            load[i] += weights[i]
            chosen[i] += weights[i] > 0
            before -= p[i] * math.log(p[i])
            after -= weights[i] * math.log(weights[i]) if weights[i] else 0
        top1[max(range(e), key=lambda i, w=weights: w[i])] += 1
    share = [value / sum(load) for value in load]
    return {
        "tokens": count,
        "load": share,
        "top1": [value / count for value in top1],
        "chosen": [value / count for value in chosen],
        "entropy_before": before / count,
        "entropy_after": after / count,
        "effective_experts": math.exp(-sum(s * math.log(s) for s in share if s)),
        "chosen_per_token": sum(chosen) / count,
    }


STATISTICS_MASK = keep_of([1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1])


def make_routed(*, seed=1, mask=STATISTICS_MASK, k=2, shape=(3, 5, 4)):
    scores = make_x(*shape, seed=seed)
    return Routed(scores, top_k(scores, k=k), mask)


def tokens_in(mask, rows=(0, 1, 2)):
    return [(n, s) for n in rows for s in range(mask.shape[1]) if mask[n, s]]


@pytest.mark.parametrize("mask", [None, STATISTICS_MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_statistics_are_what_counting_by_hand_gives(mask, k):
    routed = make_routed(mask=mask, k=k)
    statistics = RoutingStatistics(4)
    statistics.add(routed, {}, None)
    read = statistics.read()
    expected = naive_statistics(routed, tokens_in(torch.ones(3, 5) if mask is None else mask))
    for name, value in expected.items():
        assert read[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert read["chosen_per_token"] == k
    assert read["balance"] == read["tasks"] == {}


def test_the_same_call_twice_is_twice_the_tokens_and_the_same_shares():
    once, twice = RoutingStatistics(4, ["variance"], ["a", "b"]), RoutingStatistics(4, ["variance"], ["a", "b"])
    terms, ids = {"variance": torch.tensor(0.25)}, torch.tensor([0, 1, 1])
    once.add(make_routed(), terms, ids)
    for _ in range(2):
        twice.add(make_routed(), terms, ids)
    once, twice = once.read(), twice.read()
    assert once["tokens"] == 10
    assert twice["tokens"] == 20
    assert [twice["tasks"][name]["tokens"] for name in ("a", "b")] == [10, 10]  # 5 each, twice
    for name in once.keys() - {"tokens", "tasks"}:
        assert twice[name] == pytest.approx(once[name]), name


def test_two_calls_count_by_their_tokens_and_balance_by_calls():
    first, second = make_routed(), make_routed(seed=5, mask=None)
    statistics = RoutingStatistics(4, ["variance", "z"])
    statistics.add(first, {"variance": torch.tensor(1.0), "z": torch.tensor(3.0)}, None)
    statistics.add(second, {"variance": torch.tensor(2.0), "z": torch.tensor(5.0)}, None)
    read = statistics.read()
    by_call = [
        naive_statistics(first, tokens_in(STATISTICS_MASK)),
        naive_statistics(second, tokens_in(torch.ones(3, 5))),
    ]
    assert read["tokens"] == 10 + 15
    for name in ("load", "top1", "chosen"):
        expected = [(10 * a + 15 * b) / 25 for a, b in zip(by_call[0][name], by_call[1][name], strict=True)]
        assert read[name] == pytest.approx(expected, rel=1e-5)
    assert read["balance"] == {"variance": 1.5, "z": 4.0}


def test_statistics_per_task_are_of_the_rows_of_that_task():
    routed, tasks = make_routed(), ["a", "b", "c"]
    statistics = RoutingStatistics(4, tasks=tasks)
    statistics.add(routed, {}, torch.tensor([2, 0, 2]))
    read = statistics.read()["tasks"]
    assert read.keys() == {"a", "c"}  # no rows of b
    for name, rows in (("a", [1]), ("c", [0, 2])):
        expected = naive_statistics(routed, tokens_in(STATISTICS_MASK, rows))
        assert read[name]["tokens"] == expected["tokens"]
        assert read[name]["load"] == pytest.approx(expected["load"], rel=1e-5)


def test_a_row_of_several_tasks_counts_for_each_and_an_id_for_all_rows_for_all():
    statistics = RoutingStatistics(4, tasks=["a", "b", "c"])
    statistics.add(make_routed(), {}, torch.tensor([[0, 2], [1, -1], [2, -1]]))
    assert {name: task["tokens"] for name, task in statistics.read()["tasks"].items()} == {"a": 5, "b": 2, "c": 8}
    statistics = RoutingStatistics(4, tasks=["a", "b"])
    statistics.add(make_routed(), {}, torch.tensor([1]))
    assert {name: task["tokens"] for name, task in statistics.read()["tasks"].items()} == {"b": 10}
    statistics.add(make_routed(), {}, None)  # rows without labels are in no task
    assert statistics.read()["tokens"] == 20
    assert {name: task["tokens"] for name, task in statistics.read()["tasks"].items()} == {"b": 10}


def test_an_expert_with_less_than_a_hundredth_of_an_even_share_is_dead():
    """4 experts: 1/400 of the weight is the limit."""

    def dead(shares, num_base=0):
        weights = torch.tensor([[shares]])
        statistics = RoutingStatistics(4)
        statistics.add(Routed(weights.clamp_min(1e-9).log(), weights), {}, None)
        return statistics.read(num_base)["dead"]

    assert dead([0.25, 0.25, 0.25, 0.25]) == []
    assert dead([0.5, 0.4974, 0.0026, 0.0]) == [3]
    assert dead([0.5, 0.4976, 0.0024, 0.0]) == [2, 3]
    assert dead([0.0, 0.0, 0.5, 0.5]) == [0, 1]
    assert dead([0.0, 0.0, 0.5, 0.5], num_base=1) == [1]  # a base expert may well get nothing


@pytest.mark.parametrize(("shares", "experts"), [([0.25] * 4, 4), ([0.5, 0.5, 0, 0], 2), ([1.0, 0, 0, 0], 1)])
def test_effective_experts_are_as_many_as_share_the_weight_evenly(shares, experts):
    weights = torch.tensor([[shares]])
    statistics = RoutingStatistics(4)
    statistics.add(Routed(weights.clamp_min(1e-9).log(), weights), {}, None)
    assert statistics.read()["effective_experts"] == pytest.approx(experts, rel=1e-6)


def test_nothing_is_read_before_anything_was_routed():
    statistics = RoutingStatistics(4)
    assert statistics.read() == {}
    statistics.add(make_routed(mask=torch.zeros(3, 5, dtype=torch.bool)), {}, None)
    assert statistics.read() == {}


def test_statistics_under_autocast_are_the_same_numbers():
    """Products of sums would be rounded to 8 bits there, and long rows be miscounted."""
    routed = make_routed(shape=(2, 301, 4), mask=None)
    exact, rounded = RoutingStatistics(4), RoutingStatistics(4)
    exact.add(routed, {}, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded.add(routed, {}, None)
    assert rounded.read() == exact.read()
    assert rounded.read()["chosen_per_token"] == 2


def test_a_router_records_training_and_evaluation_apart():
    router, x = make_router(select=partial(top_k, k=2), num_shared=1), make_x(2, 5, 6)
    router.record(["a"])
    view = View(batch=Batch(2, tokens=5, mask=MASK.bool()), ids=torch.tensor([0]))
    router.train()(x, view)
    router.eval()(x[:1], View())
    training, evaluation = router.statistics[True].read(), router.statistics[False].read()
    assert (training["tokens"], evaluation["tokens"]) == (8, 5)
    assert (training["tasks"]["a"]["tokens"], evaluation["tasks"]) == (8, {})
    assert len(training["load"]) == 4  # shared experts are not routed
    router.train()(x, View(counted=False))  # a recomputation for backward
    assert router.statistics[True].read()["tokens"] == 8


def test_recording_an_input_without_tokens_is_no_error():
    router = make_router()
    router.record([])
    assert router(torch.zeros(0, 6), View()).shape == (0, 4)
    assert router.statistics[True].read() == {}
