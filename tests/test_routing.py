"""Task ids in every form, gates, and how weights meet the rows of an input."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from peft_moe.routing import Batch, TaskGate, TaskRouter, View, encode_tasks, softmax, task_index

NAMES = ["icd", "rad", "def"]
SAME = [  # what users write, and the ids it stands for
    ("rad", [1]),
    (1, [1]),
    (np.int64(1), [1]),
    (torch.tensor(1), [1]),
    (["rad", "def"], [1, 2]),
    ([1, "def"], [1, 2]),
    (("icd", 0), [0, 0]),
    (np.array([1, 2]), [1, 2]),
    (torch.tensor([1, 2], dtype=torch.int32), [1, 2]),
    ([["icd", "def"], ["rad"]], [[0, 2], [1, -1]]),
    ([["icd", "def"], "rad"], [[0, 2], [1, -1]]),
    (np.array([[0, 2]]), [[0, 2]]),
    ([["icd"], ["rad"]], [0, 1]),
    (torch.tensor([[0, 2], [1, -1]]), [[0, 2], [1, -1]]),
    (torch.tensor([[True, False, True]]), [[0, -1, 2]]),
]
REFUSED = [
    ("mri", ValueError, r"Unknown task 'mri'; this adapter knows 'icd' \(0\), 'rad' \(1\), 'def' \(2\)"),
    (3, ValueError, "Unknown task 3"),
    (-1, ValueError, "Unknown task -1"),
    (True, TypeError, "True is no task id"),
    (1.5, TypeError, r"1\.5 is no task id"),
    ([], ValueError, "leaves a row without a task"),
    ([[], ["icd"]], ValueError, "leaves a row without a task"),
    (["icd", None], TypeError, "None is no task id"),
    (torch.tensor([0, 3]), ValueError, "out of range"),
    (torch.tensor([-1]), ValueError, "out of range"),
    (torch.tensor([[-1, -1]]), ValueError, "out of range"),
    (torch.tensor([[0, -2]]), ValueError, "out of range"),
    (torch.tensor([0.0]), ValueError, "float32; give integers"),
    (torch.zeros(1, 1, 1, dtype=torch.long), ValueError, r"shape \(1, 1, 1\)"),
    (torch.zeros(0, dtype=torch.long), ValueError, r"shape \(0,\)"),
    (torch.ones(1, 2, dtype=torch.bool), ValueError, r"a multi-hot needs \(batch, 3\)"),
    (torch.zeros(1, 3, dtype=torch.bool), ValueError, "out of range"),
]


@pytest.mark.parametrize(("given", "ids"), SAME, ids=lambda v: str(v)[:30])
def test_task_ids_in_every_form_are_the_same_ids(given, ids):
    assert encode_tasks(given, NAMES).tolist() == ids


@pytest.mark.parametrize(("given", "error", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_what_is_no_task_id_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        encode_tasks(given, NAMES)


def test_many_tasks_are_listed_in_short():
    with pytest.raises(ValueError, match=r"'t19' \(19\), … \(40 in all\)"):
        task_index("x", [f"t{i}" for i in range(40)])


def make_router(num_experts=4):
    torch.manual_seed(0)
    return TaskRouter(gate=TaskGate(num_tasks=3, num_experts=num_experts, embedding_dim=5), select=softmax).double()


def test_the_gate_is_the_softmax_of_the_projected_embedding():
    router = make_router()
    for task in range(3):
        e, w = router.gate.embedding.weight[task], router.gate.proj.weight
        scores = torch.stack([sum(w[i, d] * e[d] for d in range(5)) for i in range(4)])
        expected = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(router.of_tasks(torch.tensor([task]))[0], expected)


def test_several_tasks_are_the_mean_of_their_embeddings():
    gate = make_router().gate
    e, w = gate.embedding.weight, gate.proj.weight
    torch.testing.assert_close(
        gate(torch.tensor([[0, 2, -1], [1, -1, -1]])), torch.stack([(e[0] + e[2]) / 2, e[1]]) @ w.T
    )


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((3, 7), [0, 1, 2]),
        ((3, 5, 7), [0, 1, 2]),
        ((6, 5, 7), [0, 0, 1, 1, 2, 2]),
        ((12, 7), [0] * 4 + [1] * 4 + [2] * 4),
    ],
)
def test_weights_follow_the_rows_of_the_batch(shape, rows):
    router = make_router()
    weights = router(torch.zeros(shape), View(ids=torch.tensor([0, 1, 2])))
    assert weights.shape == (len(rows), *(1,) * (len(shape) - 2), 4)
    torch.testing.assert_close(weights.flatten(0, -2), router.of_tasks(torch.tensor(rows)))


def test_one_task_is_for_all_rows():
    assert make_router()(torch.zeros(6, 5, 7), View(ids=torch.tensor([2]))).shape == (1, 1, 4)


def test_rows_that_do_not_fit_are_refused():
    router, ids = make_router(), torch.tensor([0, 1, 2])
    refused = [
        ((7, 5), None),  # no multiple
        ((6, 2, 5), Batch(rows=3, tokens=4)),  # not the rows of this batch: images of the rows, say
        ((6, 5), Batch(rows=3, tokens=4)),  # nor its tokens
    ]
    for shape, batch in refused:
        with pytest.raises(ValueError, match="for 3 rows of task_ids, and cannot tell"):
            router(torch.zeros(shape), View(ids=ids, batch=batch))
    for shape, batch in [
        ((6, 2, 5), Batch(rows=6)),
        ((12, 5), Batch(rows=3, tokens=4)),
        ((12, 9, 5), Batch(3, images=True)),
    ]:
        assert router(torch.zeros(shape), View(ids=ids, batch=batch)).shape[0] == shape[0]


def test_a_shared_gate_may_be_on_another_device_than_a_layer_and_the_ids():
    mode = FakeTensorMode()

    def fake(*shape, device, dtype=torch.float):
        return FakeTensor(mode, torch.empty(shape, device="meta", dtype=dtype), torch.device(device))

    router = TaskRouter(gate=TaskGate(num_tasks=3, num_experts=4, embedding_dim=5), select=softmax)
    router.gate.embedding.weight = torch.nn.Parameter(fake(3, 5, device="cuda:0"))
    router.gate.proj.weight = torch.nn.Parameter(fake(4, 5, device="cuda:0"))
    with mode, torch.no_grad():
        weights = router(fake(2, 6, 7, device="cuda:1"), View(ids=fake(2, device="cpu", dtype=torch.long)))
    assert weights.device == torch.device("cuda:1")


def test_weights_are_in_fp32_under_autocast_and_in_a_half_precision_gate():
    router = make_router().float()
    exact = router.of_tasks(torch.tensor([0, 1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router.of_tasks(torch.tensor([0, 1])), exact)
    assert router.bfloat16().of_tasks(torch.tensor([0, 1])).dtype == torch.float32
