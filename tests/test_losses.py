"""Balance losses against loops over tokens and experts, their extremes, and what does not count in them."""

import math
from functools import partial

import pytest
import torch

from peft_moe.losses import BALANCE_LOSSES, Routed, cv2, localized, switch, variance, z
from peft_moe.routing import softmax, top_k

DELTA = 0.3
LOSSES = {**BALANCE_LOSSES, "localized": partial(localized, delta=DELTA)}
N, S, E = 3, 5, 4


# The formulas, token by token and expert by expert; `tokens` are the (row, position) pairs that count.


def switch_loop(scores, weights, tokens, matches, num_base):
    """E · Σ_i f_i P_i, f_i the share of (token, chosen expert) pairs: arXiv 2101.03961, eq. 4 to 6."""
    pairs = [sum(float(weights[t][i] > 0) for t in tokens) for i in range(E)]
    total = 0
    for i in range(E):
        p_i = sum(scores[t][i].exp() / sum(scores[t][j].exp() for j in range(E)) for t in tokens) / len(tokens)
        total = total + pairs[i] / sum(pairs) * p_i
    return E * total


def shares_loop(weights, tokens, num_base):
    got = [sum(weights[t][i] for t in tokens) for i in range(num_base, E)]
    return [g / sum(got) for g in got]


def variance_loop(scores, weights, tokens, matches, num_base):
    """Var_i of the special experts' shares of what they get: arXiv 2601.07935, eq. 5."""
    u = shares_loop(weights, tokens, num_base)
    return sum((value - sum(u) / len(u)) ** 2 for value in u) / len(u)


def cv2_loop(scores, weights, tokens, matches, num_base):
    """Var / mean²: arXiv 1701.06538, eq. 7."""
    u = shares_loop(weights, tokens, num_base)
    return variance_loop(scores, weights, tokens, matches, num_base) / (sum(u) / len(u)) ** 2


def localized_loop(scores, weights, tokens, matches, num_base):
    """Var / mean² over (row, expert) of I ∘ Q, I smaller where they match: arXiv 2312.09979, signs turned round."""
    values = []
    for n in range(len(weights)):
        mine = [t for t in tokens if t[0] == n]
        for i in range(E if mine else 0):
            factor = 1 - DELTA if matches[n][i] else 1 + DELTA
            values.append(factor * sum(weights[t][i] for t in mine) / len(mine))
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def z_loop(scores, weights, tokens, matches, num_base):
    """mean_t (log Σ_i exp s_ti)²: arXiv 2202.08906, eq. 5."""
    return sum(sum(scores[t][i].exp() for i in range(E)).log() ** 2 for t in tokens) / len(tokens)


LOOPS = {
    "switch": switch_loop,
    "variance": variance_loop,
    "cv2": cv2_loop,
    "localized": localized_loop,
    "z": z_loop,
}
MASKS = {
    "no mask": None,
    "padding right and left": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]],
    "a row of padding alone": [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]],
}
SELECTS = {"all": softmax, "2 of 4": partial(top_k, k=2)}


def make_routed(*, select=softmax, mask=None, num_base=0, dtype=torch.double, seed=0):
    """A random routing; the scores are a leaf that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    scores = (2 * torch.randn(N, S, E, generator=generator, dtype=dtype)).requires_grad_()
    matches = torch.tensor([[True, True, False, False], [False, False, True, True], [True, False, False, True]])
    mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    return Routed(scores, select(scores), mask, matches, num_base)


def weights_to_routed(weights, **fields):
    """A routing with given weights (..., E), whose scores are their logarithms."""
    weights = torch.as_tensor(weights, dtype=torch.double).reshape(1, -1, len(weights[0]))
    return Routed(weights.clamp_min(1e-30).log(), weights, **fields)


@pytest.mark.parametrize("num_base", [0, 1])
@pytest.mark.parametrize("select", SELECTS.values(), ids=SELECTS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula_in_value_and_gradient(name, mask, select, num_base):
    routed = make_routed(select=select, mask=mask, num_base=num_base)
    keep = torch.ones(N, S) if mask is None else torch.tensor(mask)
    tokens = [(n, s) for n in range(N) for s in range(S) if keep[n, s]]
    loss = LOSSES[name](routed)
    expected = LOOPS[name](routed.scores, routed.weights, tokens, routed.matches, num_base)
    # counts and shares of tokens are float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    (ours,) = torch.autograd.grad(loss, routed.scores, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, routed.scores)
    # switch is 1 whatever the scores are where all experts are chosen; elsewhere there is something to compare
    assert (theirs.abs().max() > 1e-4) == (name != "switch" or select is not softmax)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_the_table_of_losses_is_complete():
    assert LOOPS.keys() == BALANCE_LOSSES.keys()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("before", [None, MASKS["padding right and left"]], ids=["no mask", "mask"])
@pytest.mark.parametrize("name", LOSSES)
def test_appended_padding_changes_neither_the_loss_nor_its_gradient(name, before, side):
    routed = make_routed(mask=before)
    garbage = torch.full((N, 3, E), 50.0, dtype=torch.double) * torch.tensor([1, -1, 0, 2])
    real = torch.ones(N, S, dtype=torch.bool) if routed.mask is None else routed.mask

    def appended(values, more):
        return torch.cat([more, values] if side == "left" else [values, more], dim=1)

    padded = routed._replace(
        scores=appended(routed.scores, garbage),
        weights=appended(routed.weights, garbage.abs()),
        mask=appended(real, torch.zeros(N, 3, dtype=torch.bool)),
    )
    loss, with_padding = LOSSES[name](routed), LOSSES[name](padded)
    torch.testing.assert_close(with_padding, loss, rtol=1e-6, atol=1e-9)
    (ours,) = torch.autograd.grad(with_padding, routed.scores, retain_graph=True)
    (theirs,) = torch.autograd.grad(loss, routed.scores)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_that_keeps_all_is_no_mask(name):
    routed = make_routed()
    loss = LOSSES[name](routed._replace(mask=torch.ones(N, S, dtype=torch.bool)))
    torch.testing.assert_close(loss, LOSSES[name](routed), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_of_padding_does_not_matter(name):
    routed = make_routed(mask=MASKS["a row of padding alone"])
    others = [0, 2]
    without = routed._replace(
        scores=routed.scores[others], weights=routed.weights[others], mask=routed.mask[others],
        matches=routed.matches[others],
    )  # fmt: skip
    torch.testing.assert_close(LOSSES[name](routed), LOSSES[name](without), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_padding_alone_is_a_number_with_a_finite_gradient(name):
    routed = make_routed(mask=[[0] * S] * N)
    loss = LOSSES[name](routed)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, routed.scores)[0].isfinite().all()


EVEN = {  # routings that give every expert as much as every other
    "each token all alike": [[1 / 4] * 4] * 4,
    "each token one expert": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    "each token two experts": [[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5]],
}


@pytest.mark.parametrize("weights", EVEN.values(), ids=EVEN)
def test_an_even_spread_is_1_for_switch_and_0_for_variance_and_cv2(weights):
    routed = weights_to_routed(weights)
    assert switch(routed).item() == pytest.approx(1, rel=1e-6)
    assert variance(routed).item() == pytest.approx(0, abs=1e-12)
    assert cv2(routed).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (8, 2), (8, 7)])
def test_a_collapse_onto_k_experts_is_the_largest_value(experts, k):
    """Switch is E / K; K shares of 1/K and zeros have cv² = E/K - 1, and that over E² for a variance."""
    collapsed = [[1 / k] * k + [0.0] * (experts - k)] * 6
    routed = weights_to_routed(collapsed)
    assert switch(routed).item() == pytest.approx(experts / k, rel=1e-6)
    assert cv2(routed).item() == pytest.approx(experts / k - 1, rel=1e-6)  # E - 1 for one expert
    assert variance(routed).item() == pytest.approx((experts / k - 1) / experts**2, rel=1e-6)


def test_z_is_smallest_where_the_scores_cancel():
    """log Σ_i exp(-log E) = 0, and (log E)² for scores of zero."""
    scores = torch.zeros(1, 2, E, dtype=torch.double)
    assert z(Routed(scores, softmax(scores))).item() == pytest.approx(math.log(E) ** 2)
    assert z(Routed(scores - math.log(E), softmax(scores))).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("delta", [0.1, 0.5])
def test_the_least_localized_loss_gives_matching_experts_more(delta):
    """At the minimum I ∘ Q is constant, so that the ratio is (1 + δ) / (1 - δ)."""
    matches = torch.tensor([[True, True, False, False], [False, False, True, True]])
    scores = torch.zeros(2, 3, E, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss = localized(Routed(scores, softmax(scores), matches=matches), delta=delta)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-8
    q = softmax(scores).detach().mean(1)
    matching, other = q[matches], q[~matches]
    assert matching.min() > other.max()
    torch.testing.assert_close(
        matching / other, torch.full_like(matching, (1 + delta) / (1 - delta)), rtol=1e-3, atol=0
    )


def test_localized_without_difference_between_groups_is_cv2_of_the_rows():
    """δ = 0 and one row: LoRAMoE without labels."""
    routed = make_routed()
    row = routed._replace(scores=routed.scores[:1], weights=routed.weights[:1], matches=routed.matches[:1])
    torch.testing.assert_close(localized(row, delta=0), cv2(row))


def test_localized_without_labels_is_refused():
    with pytest.raises(ValueError, match="compares experts with the rows' groups, and no task_ids were given"):
        localized(make_routed()._replace(matches=None), delta=0.1)


def test_a_long_row_is_no_imbalance():
    """Q is a mean over a row's tokens: a row with 5 tokens and one with 1 that are routed alike are balanced."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    weights = torch.full((2, 5, E), 1 / E, dtype=torch.double)
    routed = Routed(weights.log(), weights, mask, torch.zeros(2, E, dtype=torch.bool))
    assert localized(routed, delta=0.1).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["variance", "cv2"])
def test_how_much_base_experts_get_is_no_matter_of_balance(name):
    little = [[0.1, 0.3, 0.3, 0.3]] * 3
    much = [[0.97, 0.01, 0.01, 0.01]] * 3
    for weights in (little, much):
        assert BALANCE_LOSSES[name](weights_to_routed(weights, num_base=1)).item() == pytest.approx(0, abs=1e-12)
        assert BALANCE_LOSSES[name](weights_to_routed(weights)).item() > 1e-3
    uneven = [weights_to_routed([[b, (1 - b) * 0.6, (1 - b) * 0.4]] * 3, num_base=1) for b in (0.1, 0.9)]
    torch.testing.assert_close(BALANCE_LOSSES[name](uneven[0]), BALANCE_LOSSES[name](uneven[1]))


def test_special_experts_that_get_nothing_have_a_finite_loss():
    routed = weights_to_routed([[1.0, 0.0, 0.0]] * 2, num_base=1)
    assert variance(routed).item() == cv2(routed).item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_same_float32_number_under_autocast(name):
    routed = make_routed(dtype=torch.float32, select=partial(top_k, k=2), mask=MASKS["padding right and left"])
    exact = LOSSES[name](routed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = LOSSES[name](routed)
    assert loss.dtype == torch.float32
    assert loss.dim() == 0
    assert torch.equal(loss, exact)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_depend_on_the_order_of_tokens_in_rows(name):
    routed = make_routed()
    order = [3, 0, 4, 1, 2]
    shuffled = routed._replace(scores=routed.scores[:, order], weights=routed.weights[:, order])
    torch.testing.assert_close(LOSSES[name](shuffled), LOSSES[name](routed), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("groups", [[[0], [1, 2, 3]], [[0, 1, 2], [3, 4, 5], [6, 7]]])
def test_the_localized_loss_can_reach_zero_for_groups_of_any_size(groups):
    """Where each row gives its own experts (1 + δ) / (1 - δ) times as much as the others."""
    experts = sum(map(len, groups))
    matches = torch.zeros(len(groups), experts, dtype=torch.bool)
    for row, own in enumerate(groups):
        matches[row, own] = True
    weights = torch.where(matches, 1 / 0.7, 1 / 1.3)
    weights = (weights / weights.sum(-1, keepdim=True)).unsqueeze(1)
    assert localized(Routed(weights.log(), weights, matches=matches), delta=0.3) < 1e-12
    assert localized(Routed(weights.log(), weights.flip(-1), matches=matches), delta=0.3) > 1e-3


def test_base_experts_without_a_column_in_the_labels_take_no_part_in_the_localized_loss():
    weights = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    matches = torch.tensor([[True, True, False, False], [False, False, True, True]])
    without = weights[..., 1:]
    q = without.sum(1) / without.sum((1, 2)).unsqueeze(1)  # shares of the special experts
    expected = localized(Routed(weights, q.unsqueeze(1), matches=matches), delta=0.2)
    torch.testing.assert_close(localized(Routed(weights, weights, matches=matches, num_base=1), delta=0.2), expected)
