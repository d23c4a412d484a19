"""Mutual information and diversity of gates against closed forms and against each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon
from specialisation import bias_bound, ceiling, diversity, mutual_information, specialisation

WEIGHTS = arrays(float, (2, 3, 4), elements=st.floats(0.01, 1))
ONE_EXPERT_EACH = np.eye(4)
ALL_ALIKE = np.full((4, 8), 1 / 8)


def test_an_expert_for_each_task_tells_the_task_and_equal_gates_tell_nothing():
    assert mutual_information(ONE_EXPERT_EACH) == pytest.approx(2)
    assert mutual_information(ALL_ALIKE) == pytest.approx(0)
    assert mutual_information(np.array([[1, 0], [1, 0], [0, 1], [0, 1.0]])) == pytest.approx(ceiling(4, 2)) == 1
    assert (diversity(ONE_EXPERT_EACH), diversity(ALL_ALIKE)) == (1, 0)
    # ½·1·log2(1 / ¾) + ½·(½·log2(½ / ¾) + ½·log2(½ / ¼)), worked out by hand
    assert mutual_information(np.array([[1, 0], [0.5, 0.5]])) == pytest.approx(0.311278, abs=1e-6)


@settings(deadline=None)
@given(WEIGHTS, st.permutations(range(4)))
def test_information_is_bounded_ignores_names_and_of_two_tasks_is_their_divergence(weights, order):
    information = mutual_information(weights)
    assert np.all((information > -1e-12) & (information <= ceiling(3, 4) + 1e-12))
    assert mutual_information(weights[..., order]) == pytest.approx(information)
    distance = jensenshannon(weights[:, 0], weights[:, 2], base=2, axis=-1)
    assert mutual_information(weights[:, [0, 2]]) == pytest.approx(np.nan_to_num(distance) ** 2, abs=1e-9)


def test_a_run_is_measured_by_layer_and_inside_groups_of_tasks():
    layers = [ONE_EXPERT_EACH.tolist(), np.repeat(np.eye(4)[:2], 2, axis=0).tolist()]
    routing = {"tasks": ["a", "b", "c", "d"], "experts": 4, "layers": layers}
    found = specialisation(routing, {"a": "ab", "b": "ab", "c": "cd", "d": "cd"})
    assert found["mutual_information"] == pytest.approx([2, 1])
    assert found["diversity"] == [1, 1]
    # in the second layer, only the groups differ
    assert found["within"] == {"ab": pytest.approx([1, 0]), "cd": pytest.approx([1, 0])}
    assert specialisation(routing, {"a": "alone"})["within"] == {}


def test_rows_that_ignore_the_task_look_informative_by_the_bound_and_by_less_if_weights_are_soft():
    rng = np.random.default_rng(0)
    drawn = np.eye(8)[rng.integers(0, 8, (8, 40, 500))]  # tasks, rows of each, gates: an expert whatever the task
    for weights, share in ((drawn, 1.0), ((drawn + 1) / 9, 0.0)):
        found = mutual_information(weights.mean(1).swapaxes(0, 1)).mean() / bias_bound(8, 8, 320)
        assert found == pytest.approx(share, abs=0.25)


@pytest.mark.parametrize("weights", [[[0.0, 0.0], [0.5, 0.5]], [[-0.1, 1.1], [0.5, 0.5]], [[np.nan, 1], [1, 0]], [1.0]])
def test_what_is_no_weight_is_refused(weights):
    with pytest.raises(ValueError, match="negative values or tasks without any; give"):
        mutual_information(np.array(weights))


def test_layers_that_do_not_fit_the_tasks_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 4, 8\) for 2 tasks and 8 experts"):
        specialisation({"tasks": ["a", "b"], "experts": 8, "layers": [ALL_ALIKE.tolist()]})
