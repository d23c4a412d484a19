"""The bank against loops over its experts."""

import pytest
import torch
from torch import nn

from peft_moe.bank import ExpertBank

RANKS = [(2, 2, 2), (1, 4, 2), (3,)]


def make_bank(ranks, scaling=0.75):
    torch.manual_seed(0)
    bank = ExpertBank(in_features=5, out_features=6, ranks=ranks, scaling=scaling).double()
    bank.reset_parameters(False)
    return bank


def loop_over_experts(bank, x, weights):
    """Σ_i w_i · scaling · B_i A_i x, one expert after the other."""
    y = torch.zeros(*x.shape[:-1], bank.lora_B.out_features, dtype=x.dtype)
    start = 0
    for i, r in enumerate(bank.ranks):
        a, b = bank.lora_A.weight[start : start + r], bank.lora_B.weight[:, start : start + r]
        y = y + weights[..., i : i + 1] * bank.factors[i] * (x @ a.T @ b.T)
        start += r
    return y


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0,)])
def test_a_bank_is_the_weighted_sum_of_its_experts_in_value_and_gradient(ranks, shape):
    bank = make_bank(ranks)
    x = torch.randn(*shape, 5, dtype=torch.double, requires_grad=True)
    weights = torch.rand(*shape, len(ranks), dtype=torch.double, requires_grad=True)
    inputs = (x, weights, bank.lora_A.weight, bank.lora_B.weight)
    fast, slow = bank(x, weights), loop_over_experts(bank, x, weights)
    torch.testing.assert_close(fast, slow)
    upstream = torch.randn_like(slow)
    for a, b in zip(
        torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(slow, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ranks", RANKS)
def test_folded_and_delta_weight_are_the_bank_under_fixed_weights(ranks):
    bank = make_bank(ranks)
    x, weights = torch.randn(7, 5, dtype=torch.double), torch.rand(len(ranks), dtype=torch.double)
    a, b = bank.folded(weights)
    torch.testing.assert_close(bank(x, weights), x @ a.T @ b.T)
    torch.testing.assert_close(bank(x, weights), x @ bank.delta_weight(weights).T)


def test_a_bank_without_weights_is_a_lora():
    bank = make_bank((4,), scaling=1.5)
    x = torch.randn(7, 5, dtype=torch.double)
    torch.testing.assert_close(bank(x), 1.5 * bank.lora_B(bank.lora_A(x)))


@pytest.mark.parametrize("init", ["normal", "kaiming", "gaussian"])
def test_a_new_bank_adds_nothing(init):
    bank = ExpertBank(in_features=512, out_features=6, ranks=(4, 8), scaling=2.0)
    bank.reset_parameters(init)
    assert bank(torch.randn(3, 512), torch.rand(3, 2)).abs().max() == 0
    expected = {"normal": 0.01, "kaiming": (1 / 3 / 512) ** 0.5, "gaussian": 1 / 8}[init]
    assert bank.lora_A.weight[4:].std().item() == pytest.approx(expected, rel=0.1)


def test_dropout_is_one_mask_for_all_experts():
    bank = ExpertBank(in_features=64, out_features=3, ranks=(64, 64), scaling=1.0, dropout=0.5).train()
    nn.init.eye_(bank.lora_A.weight[:64])
    bank.lora_A.weight.data[64:] = torch.eye(64)
    h = bank.lora_A(bank.dropout(torch.ones(2, 64)))
    assert torch.equal(h[:, :64], h[:, 64:])
    assert 0 < (h == 0).float().mean() < 1


ANCHORED = [  # ranks, factors, how many experts are anchored
    ((2, 2, 2), 0.75, 1),
    ((2, 3, 1), (0.5, 2.0, 3.0), 2),
    ((3, 1, 4), (1.5, 0.5, 2.0), 3),
    ((3, 1, 4), 1.5, 1),
]


@pytest.mark.parametrize(("ranks", "scaling", "anchored"), ANCHORED)
def test_the_anchor_loss_is_the_squared_size_of_the_anchored_products_in_value_and_gradient(ranks, scaling, anchored):
    torch.manual_seed(0)
    sizes = {"in_features": 5, "out_features": 6, "ranks": ranks, "scaling": scaling}
    bank = ExpertBank(**sizes, num_anchored=anchored, anchor_coefficient=1.0)
    bank.reset_parameters(False)
    a, b = (w.detach().double().requires_grad_() for w in (bank.lora_A.weight, bank.lora_B.weight))
    factors = [scaling] * len(ranks) if isinstance(scaling, float) else scaling
    expected, start = 0, 0
    for i, r in enumerate(ranks[:anchored]):
        product = factors[i] * b[:, start : start + r] @ a[start : start + r]
        expected = expected + sum(value**2 for value in product.flatten())
        start += r
    loss = bank.anchor_loss()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    ours = torch.autograd.grad(loss, (bank.lora_A.weight, bank.lora_B.weight))
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-6)
        assert mine.count_nonzero() == theirs.count_nonzero() > 0
    assert ours[0][start:].abs().sum() == ours[1][:, start:].abs().sum() == 0  # the others are left alone


def test_the_anchor_loss_is_a_float32_number_under_autocast_and_in_half_precision():
    bank = ExpertBank(
        in_features=64, out_features=64, ranks=(4, 4), scaling=1.3, num_anchored=1, anchor_coefficient=1.0
    )
    torch.manual_seed(0)
    bank.reset_parameters(False)
    exact = bank.anchor_loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bank.anchor_loss(), exact)
    half = bank.bfloat16().anchor_loss()
    assert half.dtype == torch.float32
    assert torch.equal(half, bank.float().anchor_loss())


def test_the_anchor_loss_of_experts_that_add_nothing_is_zero():
    bank = ExpertBank(in_features=5, out_features=6, ranks=(2, 2), scaling=2.0, num_anchored=1, anchor_coefficient=1.0)
    bank.reset_parameters("normal")
    assert bank.anchor_loss() == 0


def test_experts_with_factors_of_their_own_are_weighed_by_them():
    torch.manual_seed(0)
    factors = (0.5, 2.0, 4.0)  # exact in float32
    bank = ExpertBank(in_features=5, out_features=6, ranks=(1, 4, 2), scaling=factors).double()
    bank.reset_parameters(False)
    x, weights = torch.randn(7, 5, dtype=torch.double), torch.rand(7, 3, dtype=torch.double)
    same = ExpertBank(in_features=5, out_features=6, ranks=(1, 4, 2), scaling=1.0).double()
    same.load_state_dict(bank.state_dict())
    expected = loop_over_experts(same, x, weights * torch.tensor(factors))
    torch.testing.assert_close(bank(x, weights), expected)
    assert bank.state_dict().keys() == {"lora_A.weight", "lora_B.weight"}  # factors come from the config


def test_a_bank_that_is_made_without_memory_keeps_what_is_not_saved():
    """As peft's low_cpu_mem_usage, torch.device("meta") and to_empty() do it."""
    real = make_bank((1, 4, 2), scaling=(2.0, 0.5, 1.0))
    with torch.device("meta"):
        empty = ExpertBank(in_features=5, out_features=6, ranks=(1, 4, 2), scaling=(2.0, 0.5, 1.0))
    emptied = ExpertBank(in_features=5, out_features=6, ranks=(1, 4, 2), scaling=(2.0, 0.5, 1.0)).to_empty(device="cpu")
    x, weights = torch.randn(3, 5, dtype=torch.double), torch.rand(3, 3, dtype=torch.double)
    for bank in (empty, emptied):
        bank.load_state_dict(real.state_dict(), assign=True)
        torch.testing.assert_close(bank(x, weights), real(x, weights), rtol=1e-6, atol=1e-7)  # factors in float32
