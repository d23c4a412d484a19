"""Task ids in every form that users give them, to one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set, Sized
from typing import Any, TypeAlias, cast

import torch
from torch.nn.utils.rnn import pad_sequence

Task: TypeAlias = "int | str"
TaskIds: TypeAlias = "Task | Sequence[Task | Sequence[Task]] | torch.Tensor"


def list_tasks(names: Sequence[str]) -> str:
    """The tasks as an error message shows them: `'icd' (0), 'rad' (1)`, shortened when there are many."""
    shown = [f"{name!r} ({i})" for i, name in enumerate(names[:20])]
    return ", ".join(shown) + (f", … ({len(names)} in all)" if len(names) > 20 else "")


def task_index(task: Task, names: Sequence[str]) -> int:
    """The position of a task, given by name or position.

    Raises:
        ValueError: no such task; the message lists those there are.
        TypeError: neither a name nor a position.
    """
    if isinstance(task, str):
        if task in names:
            return names.index(task)
    elif isinstance(task, int) and not isinstance(task, bool):
        if 0 <= task < len(names):
            return task
    elif hasattr(task, "item") and getattr(task, "ndim", 0) == 0:  # a numpy integer or a tensor of one number
        return task_index(task.item(), names)
    else:
        raise TypeError(f"{task!r} is no task id; give a name or a position, or a list with one of them per row.")
    raise ValueError(f"Unknown task {task!r}; this adapter knows {list_tasks(names)}.")


def encode_tasks(tasks: TaskIds, names: Sequence[str]) -> torch.Tensor:
    """Task ids as a LongTensor (n,), or (n, k) padded with -1 where rows have several tasks.

    Args:
        tasks: one task for all rows; or one per row; or a list of tasks per row; or a tensor: integers () or (n,),
            integers (n, k) padded with -1, or bool (n, T), true for the tasks of the row.
        names: the tasks that the adapter knows.

    Raises:
        ValueError: an unknown task, a row without one, an empty list.
        TypeError: not a task id, or a collection whose order says nothing of the rows.
    """
    if isinstance(tasks, torch.Tensor):
        return _check_tensor(tasks, names)
    if isinstance(tasks, Set):
        raise TypeError(
            f"task_ids={tasks!r} is a {type(tasks).__name__}, whose order is not that of rows; give a list."
        )
    several = _several(tasks)
    if several is None:
        return torch.tensor([task_index(cast(Task, tasks), names)])
    entries = [_several(row) for row in several]
    rows = [
        [task_index(t, names) for t in ([row] if e is None else e)] for row, e in zip(several, entries, strict=True)
    ]
    if not rows or not all(rows):
        raise ValueError(f"task_ids={tasks!r} leaves a row without a task; give at least one of {list_tasks(names)}.")
    if all(len(row) == 1 for row in rows):
        return torch.tensor([row[0] for row in rows])
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)


def tasks_of_rows(tasks: TaskIds, rows: Sequence[int], n: int) -> TaskIds | None:
    """The task ids of some of a call's n rows; None if these have none. One for all rows is one for these, too.

    Args:
        tasks: as for `encode_tasks`; in a list, rows without a task, such as those of adapters that know none, have
            None.
        rows: which.
        n: rows of the call.

    Raises:
        ValueError: another number of entries than rows, or a task for some of these rows only.
    """
    several = tasks if isinstance(tasks, torch.Tensor) and tasks.dim() > 0 else _several(tasks)
    if several is None or len(several) == 1:
        return tasks
    if len(several) != n:
        raise ValueError(
            f"task_ids has {len(several)} entries and the batch has {n} rows; give one task per row, or one for all."
        )
    if isinstance(several, torch.Tensor):
        return several.index_select(0, torch.tensor(rows, device=several.device))
    found = [several[i] for i in rows]
    if all(task is None for task in found):
        return None
    if any(task is None for task in found):
        raise ValueError(f"task_ids={tasks!r} has a task for some of an adapter's rows {list(rows)}; give all or none.")
    return found


def encode_choice(task: Task | Sequence[Task], names: Sequence[str]) -> torch.Tensor:
    """One task, or several that every row has, as ids (1,) or (1, k).

    Args:
        task: a task; or a list, tuple, set, array or tensor of them.
        names: the tasks that the adapter knows.

    Raises:
        ValueError, TypeError: as for `encode_tasks`.
    """
    several = task.tolist() if isinstance(task, torch.Tensor) and task.dim() > 0 else _several(task)
    return encode_tasks(cast(TaskIds, task if several is None else [several]), names)


def _several(value: Any) -> list[Any] | None:
    """The entries of a list, tuple, set or array; None if the value is a single task, or none at all.

    An iterator is none: who reads it first would leave nothing to the others.
    """
    single = isinstance(value, (str, bytes, Mapping)) or not (isinstance(value, Sized) and hasattr(value, "__iter__"))
    return None if single or getattr(value, "ndim", 1) == 0 else list(value)


def _check_tensor(tasks: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """A tensor of ids in canonical form; values are only looked at where that costs no wait for a device."""
    if tasks.dim() > 2 or tasks.is_floating_point() or tasks.is_complex() or tasks.numel() == 0:
        raise ValueError(
            f"task_ids of shape {tuple(tasks.shape)} and {tasks.dtype}; give integers () or (batch,), integers "
            f"(batch, k) padded with -1, or bool (batch, {len(names)})."
        )
    if tasks.dtype == torch.bool:
        tasks = _multi_hot_to_ids(tasks, names)
    tasks = tasks.long().reshape(-1, *tasks.shape[1:])
    given = tasks if tasks.dim() == 1 else tasks.amax(1)  # one id that has to be there, per row
    good = (given >= 0).all() & (tasks < len(names)).all() & (tasks >= -1).all()
    message = f"is out of range, or leaves a row without a task; this adapter knows {list_tasks(names)}."
    if tasks.device.type == "cpu" and not torch.compiler.is_compiling():
        if not good:
            raise ValueError(f"task_ids={tasks.tolist()} {message}")
    else:
        torch._assert_async(good, f"task_ids {message}")  # neither waits for the device nor breaks a graph
    return tasks


def _multi_hot_to_ids(given: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """bool (n, T) to ids (n, T) with -1 for the tasks that a row does not have."""
    if given.dim() != 2 or given.shape[1] != len(names):
        raise ValueError(f"bool task_ids of shape {tuple(given.shape)}; a multi-hot needs (batch, {len(names)}).")
    return torch.where(given, torch.arange(len(names), device=given.device), -1)
