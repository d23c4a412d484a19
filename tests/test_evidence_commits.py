"""scripts/evidence/commits.py without its trainings: what is compared, and what it says of a difference."""

import pytest
from commits import apart, said

FIRST = {"losses": [2.0, 1.0], "scores": {"a": 0.5, "b": 0.25}}


def test_the_largest_differences_of_a_loss_and_of_a_score_count():
    assert apart(FIRST, FIRST) == (0, 0)
    other = {"losses": [2.02, 0.95], "scores": {"a": 0.5, "b": 0.5}}
    assert apart(other, FIRST) == pytest.approx((0.05, 0.25))


@pytest.mark.parametrize("other", [{"losses": [2.0]}, {"scores": {"a": 0.5}}, {"scores": {"a": 0.5, "c": 0.25}}])
def test_other_steps_or_tasks_are_refused(other):
    with pytest.raises(ValueError, match="Runs of other steps or tasks were found; compare commits that"):
        apart(FIRST | other, FIRST)


def test_commits_that_differ_are_named_with_their_method():
    first = {"lora-r16": FIRST, "molora": {"losses": [3.0], "scores": {"a": 1.0}}}
    alike = said({"1" * 40: first, "2" * 40: first})
    assert alike.endswith("\n\nAll are the same.")
    changed = first | {"molora": {"losses": [3.0], "scores": {"a": 0.5}}}
    text = said({"1" * 40: first, "2" * 40: changed})
    assert text.endswith(f"\n\nNot as at the first: molora at {'2' * 10}.")
    assert f"| molora | {'2' * 10} | 0.0e+00 | 0.5 |" in text
    slower = said({"1" * 40: first, "3" * 40: first | {"lora-r16": FIRST | {"losses": [2.0, 1.1]}}})
    assert slower.endswith(f"lora-r16 at {'3' * 10}.")
