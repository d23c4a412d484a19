"""Cosines of experts' updates, beside those of the matrices themselves."""

import pytest
import torch

from peft_moe.bank import ExpertBank
from peft_moe.report.similarity import similarity

IN, OUT = 7, 5


def bank_of(ranks, *, scaling=0.5, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    bank = ExpertBank(in_features=IN, out_features=OUT, ranks=ranks, scaling=scaling)
    bank.reset_parameters(False)
    return bank.to(dtype)


def naive(banks):
    """Cosines of the updates as they are, scaled and one after the other for several banks."""
    updates = []
    for i in range(len(banks[0].ranks)):
        parts = []
        for bank in banks:
            a, b = bank.lora_A.weight.double(), bank.lora_B.weight.double()
            rows = list(torch.arange(sum(bank.ranks)).split(bank.ranks)[i])
            update = sum((torch.outer(b[:, row], a[row]) for row in rows), torch.zeros(OUT, IN, dtype=torch.float64))
            parts.append(bank.factors[i] * update.flatten())
        updates.append(torch.cat(parts))
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for i, first in enumerate(updates):
        for j, second in enumerate(updates):
            if first.norm() > 0 and second.norm() > 0:
                found[i, j] = first @ second / first.norm() / second.norm()
    return found


@pytest.mark.parametrize("ranks", [[2, 2, 2], [1, 4, 2], [3, 0, 2], [1], [6, 6, 6]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_similarity_is_the_cosine_of_the_updates(ranks, dtype):
    bank = bank_of(ranks, scaling=[0.5 + i for i in range(len(ranks))], dtype=dtype)
    torch.testing.assert_close(similarity([bank]), naive([bank]).detach(), rtol=1e-5, atol=1e-5)


def test_similarity_of_several_banks_is_that_of_their_updates_together():
    banks = [bank_of([2, 3], scaling=[1.0, 2.0]), bank_of([1, 2], scaling=[3.0, 0.5], seed=1)]
    torch.testing.assert_close(similarity(banks), naive(banks).detach(), rtol=1e-5, atol=1e-5)


def test_experts_that_add_nothing_are_like_none():
    bank = bank_of([2, 2, 2])
    with torch.no_grad():
        bank.lora_B.weight[:, 2:4] = 0
    found = similarity([bank])
    assert found[1].tolist() == found[:, 1].tolist() == [0, 0, 0]
    assert found[0, 0] == found[2, 2] == 1


def test_a_new_bank_has_no_similarity_and_no_nan():
    bank = bank_of([2, 2])
    bank.reset_parameters(True)
    found = similarity([bank])
    assert found.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("factor", [1.0, 3.0, 1e-20])
def test_copies_have_a_cosine_of_one_whatever_their_size(factor):
    bank = bank_of([2, 2])
    with torch.no_grad():
        bank.lora_A.weight[2:] = bank.lora_A.weight[:2]
        bank.lora_B.weight[:, 2:] = bank.lora_B.weight[:, :2]
        bank.lora_B.weight.mul_(factor)
    assert similarity([bank])[0, 1].item() == pytest.approx(1.0, abs=1e-6)


def test_an_update_can_be_written_in_other_matrices():
    bank = bank_of([2, 2])
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    with torch.no_grad():
        bank.lora_A.weight[2:] = turn @ bank.lora_A.weight[:2]
        bank.lora_B.weight[:, 2:] = bank.lora_B.weight[:, :2] @ turn.T
    assert similarity([bank])[0, 1].item() == pytest.approx(1.0, abs=1e-6)


def test_banks_of_other_experts_are_refused():
    with pytest.raises(ValueError, match="Banks of \\[2, 3\\] experts cannot be compared"):
        similarity([bank_of([1, 1]), bank_of([1, 1, 1])])
    with pytest.raises(ValueError, match="give at least one"):
        similarity([])


def test_weights_that_are_no_numbers_are_refused():
    bank = bank_of([1, 1])
    with torch.no_grad():
        bank.lora_A.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        similarity([bank])
