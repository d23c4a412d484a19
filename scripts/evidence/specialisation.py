"""Whether gates differ between tasks and experts specialise, from mean weights: a few numbers for each layer.

If an expert were drawn with the weights of a task drawn evenly, how much would it tell about the task? That is the
mutual information of expert and task, I(E;T) = mean over tasks of KL(weights of the task | mean weights), which is also
the Jensen-Shannon divergence of all tasks at once. In bits, of which min(log2 T, log2 E) is the ceiling: a fixed one,
as the entropy of the experts themselves is 0 where all tokens go to one.

Weights that are sums over tokens hide what differs within a task, and a token gate may tell tasks apart by their inputs
alone. `within` therefore repeats the measure inside each group of tasks that share their inputs. Means over a sample
make it too large, by up to `bias_bound`. A gate that reads nothing but the task id is measured without error.

Shapes: L layers · T tasks · E experts · N rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import rel_entr

Array = npt.NDArray[np.float64]


def specialisation(routing: Mapping[str, Any], groups: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Every measure of a run's routing.

    Args:
        routing: `tasks`, `experts` and `layers`, mean weights (L, T, E).
        groups: the group of each task; tasks of a group have the same inputs.

    Returns:
        By layer `mutual_information` in bits and `diversity`, the largest difference of an expert's weight between
        tasks; and `within`, the mutual information by layer inside each group of more than one task.

    Raises:
        ValueError: weights of another shape, negative ones, or a task without any.
    """
    weights = normalised(routing["layers"])
    if weights.shape[1:] != (len(routing["tasks"]), routing["experts"]):
        raise ValueError(
            f"layers has shape {weights.shape} for {len(routing['tasks'])} tasks and {routing['experts']} experts; "
            "give (layers, tasks, experts)."
        )
    return {
        "mutual_information": mutual_information(weights).tolist(),
        "diversity": diversity(weights).tolist(),
        "within": {
            group: mutual_information(weights[:, rows]).tolist()
            for group, rows in _rows_of_groups(routing["tasks"], groups or {}).items()
        },
    }


def mutual_information(weights: Array) -> Array:
    """I(E;T) in bits for tasks of equal probability: weights (..., T, E) to (...)."""
    weights = normalised(weights)
    return np.asarray(rel_entr(weights, weights.mean(-2, keepdims=True)).sum(-1).mean(-1) / np.log(2))


def ceiling(tasks: int, experts: int) -> float:
    """The largest mutual information in bits; for one task or expert, where it is 0, one bit to divide by."""
    return float(np.log2(min(tasks, experts))) or 1.0


def diversity(weights: Array) -> Array:
    """The largest, over experts, of maximum minus minimum over tasks: weights (..., T, E) to (...)."""
    weights = normalised(weights)
    return np.asarray(np.ptp(weights, axis=-2).max(-1))


def bias_bound(tasks: int, experts: int, rows: int) -> float:
    """(T - 1)(E - 1) / (2 N ln 2) bits: the bias of counts (Miller 1955), were each row one draw of one expert.

    Rows average over their tokens and soft weights vary less than a draw, so that the true bias is smaller.
    """
    return (tasks - 1) * (experts - 1) / (2 * rows * float(np.log(2)))


def normalised(weights: npt.ArrayLike) -> Array:
    """Weights (..., T, E) that add up to 1 for each task.

    Raises:
        ValueError: negative ones, or a task without any.
    """
    weights = np.asarray(weights, dtype=float)
    if weights.ndim < 2 or not np.all(weights >= 0) or not np.all(weights.sum(-1) > 0):
        raise ValueError(
            f"Weights of shape {weights.shape} have negative values or tasks without any; give (..., tasks, experts), "
            "each task with at least one expert."
        )
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _rows_of_groups(tasks: Sequence[str], groups: Mapping[str, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        if task in groups:
            found.setdefault(groups[task], []).append(row)
    return {group: rows for group, rows in found.items() if len(rows) > 1}
