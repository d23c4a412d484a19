"""What a forward was told about its rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .tasks import Task, TaskIds, encode_tasks, list_tasks

HOW = (
    "pass task_ids= to model(...) or model.generate(...), choose one task for all calls with model.set_task(...), or "
    "set default_task in the config. In a Trainer, task_ids is a column of the dataset; a collator or trainer that "
    "drops it needs peft_moe.training.TaskCollator and remove_unused_columns=False."
)


@dataclass(frozen=True)
class _Tasks:
    """The tasks that one adapter knows, and its default as ids (1,)."""

    names: Sequence[str]
    default: Task | None
    default_ids: torch.Tensor | None


@dataclass(frozen=True)
class _Call:
    """What one call was told, and its task ids by adapter: (n,) or (n, k); adapters without any are left out."""

    told: TaskIds | None = None
    ids: dict[str, torch.Tensor] = field(default_factory=dict)


class RoutingContext:
    """Carries task ids from a call to the layers; one per tuner, and every routed layer holds a reference to it.

    The ids of a call come from its `task_ids`, else from the chosen task (`set_task`), else from the adapter's default.
    """

    def __init__(self) -> None:
        self.merged: dict[str, torch.Tensor] = {}  # by adapter, the task ids (1,) or (1, k) in the base weights now
        self._tasks: dict[str, _Tasks] = {}
        self._chosen: Task | Sequence[Task] | None = None
        self._chosen_ids: dict[str, torch.Tensor] = {}
        self._call = _Call()
        self._depth = 0
        self._warned = False

    def know(self, adapter: str, names: Sequence[str], default: Task | None) -> None:
        """Take note of an adapter's tasks."""
        self._tasks[adapter] = _Tasks(names, default, None if default is None else encode_tasks(default, names))

    def forget(self, adapter: str) -> None:
        """Drop what is known of an adapter."""
        for kept in (self._tasks, self._chosen_ids, self.merged):
            kept.pop(adapter, None)

    def choose(self, task: Task | Sequence[Task] | None, adapters: Sequence[str]) -> None:
        """Take a task for all calls that bring none; several are tasks of every row; None takes the choice back.

        Raises:
            ValueError: one of the adapters does not know it.
        """
        # Encoded here and not per call: to torch.compile a tensor is an input, and a name would be a constant to
        # recompile for.
        ids = {a: self._encode(a, task) for a in adapters if a in self._tasks} if task is not None else {}
        self._chosen, self._chosen_ids = task, ids

    @contextmanager
    def chosen(self, task: Task | Sequence[Task], adapters: Sequence[str]) -> Iterator[None]:
        """The same for the span of a `with` block."""
        before = self._chosen, self._chosen_ids
        self.choose(task, adapters)
        try:
            yield
        finally:
            self._chosen, self._chosen_ids = before

    @contextmanager
    def call(
        self,
        task_ids: TaskIds | None,
        *,
        active: Sequence[str],
        batch_size: int | None = None,
        device: torch.device | None = None,
        training: bool = False,
    ) -> Iterator[None]:
        """The span of one call. A call inside it inherits its ids unless it brings its own.

        Raises:
            ValueError: unknown tasks, another number of ids than rows, ids of another task than the one merged.
        """
        outermost, before = self._depth == 0, self._call
        if outermost or task_ids is not None:
            self._call = self._resolve(task_ids, active, batch_size, device, training)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            # Kept after the outermost call: checkpointing runs layers again in backward, which must see the same ids.
            if not outermost:
                self._call = before

    @property
    def current(self) -> _Call | None:
        """The call that layers are being run for; in backward that is the last one; outside of both there is none."""
        # Private, but what torch's own checkpointing asks to tell a recomputation from a forward.
        return self._call if self._depth or torch._C._current_graph_task_id() != -1 else None

    @property
    def told(self) -> TaskIds | None:
        """The `task_ids` of the current call as they were given."""
        return self._call.told

    @contextmanager
    def replay(self, call: _Call) -> Iterator[None]:
        """Run layers for an earlier call again."""
        before, self._call = self._call, call
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._call = before

    def ids(self, adapter: str, device: torch.device) -> torch.Tensor:
        """Task ids (n,) or (n, k) of the current call for an adapter.

        Raises:
            ValueError: the call was given none; the message lists the tasks and says how to give one.
        """
        call = self.current or self._resolve(None, (adapter,))
        ids = call.ids.get(adapter)
        if ids is None:
            raise ValueError(
                f"No task was given, and adapter {adapter!r} knows {list_tasks(self._tasks[adapter].names)}: {HOW}"
            )
        return ids.to(device)

    def one_task(self, adapter: str) -> torch.Tensor:
        """The chosen task as ids (1,) or (1, k), for work that is done once for all rows, such as merging.

        Raises:
            ValueError: none was chosen.
        """
        ids = self._chosen_or_default(adapter)
        if ids is None:
            raise ValueError(
                "This is done for one task, and none was chosen; pass task= with one of "
                f"{list_tasks(self._tasks[adapter].names)}, or choose one with model.set_task(...)."
            )
        return ids

    def _encode(self, adapter: str, task: Task | Sequence[Task]) -> torch.Tensor:
        """A task, or several for the same rows, as ids (1,) or (1, k)."""
        several = isinstance(task, Sequence) and not isinstance(task, str)
        return encode_tasks([task] if several else task, self._tasks[adapter].names)

    def _chosen_or_default(self, adapter: str) -> torch.Tensor | None:
        if self._chosen is None:
            return self._tasks[adapter].default_ids
        chosen = self._chosen_ids.get(adapter)
        return self._encode(adapter, self._chosen) if chosen is None else chosen

    def _resolve(
        self,
        task_ids: TaskIds | None,
        active: Sequence[str],
        batch_size: int | None = None,
        device: torch.device | None = None,
        training: bool = False,
    ) -> _Call:
        found = {}
        for adapter, tasks in self._tasks.items():
            try:
                ids = self._chosen_or_default(adapter) if task_ids is None else encode_tasks(task_ids, tasks.names)
            except (ValueError, TypeError):
                if adapter in active:
                    raise
                continue  # the tasks of another adapter are not this one's concern
            if ids is None:
                continue  # a bank of one needs none; the layer that needs one says so
            if adapter in active:
                _check_rows(ids, batch_size)
                if task_ids is not None or self._chosen is not None:
                    self._check_merged(adapter, ids)
                else:
                    self._warn_of_default(tasks.default, training)
            found[adapter] = ids if device is None else ids.to(device)
        return _Call(task_ids, found)

    def _check_merged(self, adapter: str, ids: torch.Tensor) -> None:
        merged = self.merged.get(adapter)
        if merged is not None and not (
            ids.shape[1:] == merged.shape[1:] and bool((ids == merged.to(ids.device)).all())
        ):
            names = [self._tasks[adapter].names[i] for i in merged.flatten().tolist() if i >= 0]
            raise ValueError(
                f"Adapter {adapter!r} is merged into the base weights for {names}, and other tasks were asked for; "
                "call model.unmerge_adapter() first."
            )

    def _warn_of_default(self, default: Task | None, training: bool) -> None:
        if training and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warnings.warn(
                f"Training without task_ids: every row is routed as default_task={default!r}. If rows have tasks of "
                f"their own, they were lost on the way: {HOW} To train on one task, call model.set_task({default!r}).",
                UserWarning,
                stacklevel=2,
            )


def _check_rows(ids: torch.Tensor, batch_size: int | None) -> None:
    if batch_size is not None and ids.shape[0] not in (1, batch_size):
        raise ValueError(
            f"task_ids has {ids.shape[0]} entries and the batch has {batch_size} rows; "
            "give one task per row, or one for all."
        )
