"""Cosines of experts are those of their updates as whole matrices."""

import pytest
import torch

from peft_moe.report.similarity import similarity


@pytest.mark.parametrize("ranks", [[2, 2, 2], [1, 4, 2], [3], [2, 0, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cosines_are_those_of_the_whole_updates(ranks, dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(sum(ranks), 7, generator=generator).to(dtype)
    b = torch.randn(5, sum(ranks), generator=generator).to(dtype)
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    whole = [(b[:, s : s + r].double() @ a[s : s + r].double()).flatten() for s, r in zip(starts, ranks, strict=True)]
    expected = torch.stack(
        [torch.stack([torch.nn.functional.cosine_similarity(x, y, dim=0) for y in whole]) for x in whole]
    )
    torch.testing.assert_close(similarity(a, b, ranks), expected, rtol=1e-9, atol=1e-12)


def test_copies_have_1_and_what_changes_nothing_0():
    a, b = torch.randn(2, 4), torch.randn(3, 2)
    found = similarity(torch.cat([a, 2 * a, a, -a]), torch.cat([b, b, torch.zeros_like(b), b], dim=1), [2, 2, 2, 2])
    expected = torch.tensor([[1, 1, 0, -1], [1, 1, 0, -1], [0, 0, 0, 0], [-1, -1, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_ranks_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"add up to 5"):
        similarity(torch.zeros(4, 3), torch.zeros(2, 4), [2, 3])
