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
        y = y + weights[..., i : i + 1] * bank.scaling * (x @ a.T @ b.T)
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
