"""What one call was told about its rows, and what routers see of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch

from .batch import Batch
from .control import Control
from .ledger import Ledger
from .mixture import Part
from .prompt import Prompt
from .tasks import Task, TaskIds, list_tasks

HOW = (
    "pass task_ids= to model(...) or model.generate(...), choose one task for all calls with model.set_task(...), or "
    "set default_task in the config. In a Trainer, task_ids is a column of the dataset; a collator or trainer that "
    "drops it needs peft_moe.training.TaskCollator and remove_unused_columns=False. Packing mixes tasks and drops it: "
    "turn it off."
)


class Tasks(Protocol):
    """The tasks that one adapter knows: its config."""

    @property
    def task_names(self) -> list[str]: ...

    @property
    def default_task(self) -> Task | None: ...


@dataclass(eq=False)  # not frozen: torch.compile would take the name of a task for a constant
class Choice:
    """What is chosen for all calls and, outside of them, for layers; another choice is another object.

    Args:
        task: by the user, a name or an id, or several; None for none.
        ids: the same by adapter, (1,) or (1, k).
        controls: by adapter, what a user has fixed.
        made_in: the number of the backward that it was made in; -1 outside of one.
    """

    task: Task | Sequence[Task] | None = None
    ids: dict[str, torch.Tensor] = field(default_factory=dict)
    controls: dict[str, Control] = field(default_factory=dict)
    made_in: int = -1

    def of_task(self, task: Task | Sequence[Task] | None, ids: dict[str, torch.Tensor]) -> Choice:
        """The same with another task."""
        return replace(self, task=task, ids=ids)

    def with_control(self, adapter: str, control: Control | None) -> Choice:
        """The same with other weights fixed for an adapter; None for none."""
        others = {name: other for name, other in self.controls.items() if name != adapter}
        return replace(self, controls=others if control is None else {**others, adapter: control})

    def without(self, adapter: str) -> Choice:
        """The same for other adapters."""
        ids = {name: of_task for name, of_task in self.ids.items() if name != adapter}
        return replace(self.with_control(adapter, None), ids=ids)


@dataclass(frozen=True)
class Call:
    """What one call was told.

    Args:
        told: its `task_ids` as they were given.
        ids: the same by adapter, (n,) or (n, k), of its own rows; adapters without any are left out.
        batch: its input.
        kept: what routers have computed in it and need not compute again.
        ledger: where balance losses go; None unless it is a training call.
        counted: whether statistics have it: not what is generated.
        choice: what was chosen when it began.
        prompt: what routers make of the rows' prompts; None outside of a call.
        prompt_done: whether it has none of the prompt's tokens.
        prompt_mask: which tokens are the prompt, if the caller has said so.
        in_forward: a forward of the model is under way, and not only generate.
        parts: by adapter, its rows, where these belong to different ones; None where active adapters have them all.
        views: what adapters see of it, as far as it has been asked for; in forward, and in what runs again.
        inner: calls inside of it that have a graph, which are kept as long as it is.
    """

    told: TaskIds | None = None
    ids: dict[str, torch.Tensor] = field(default_factory=dict)
    batch: Batch | None = None
    kept: dict[Any, torch.Tensor] = field(default_factory=dict)
    ledger: Ledger | None = None
    counted: bool = True
    choice: Choice = field(default_factory=Choice)
    prompt: Prompt | None = None
    prompt_done: bool = False
    prompt_mask: torch.Tensor | None = None
    in_forward: bool = False
    parts: dict[str, Part] | None = None
    views: dict[tuple[str, bool], View] = field(default_factory=dict, init=False, repr=False, compare=False)
    inner: list[Call] = field(default_factory=list, init=False, repr=False, compare=False)

    def of_batch(self, batch: Batch | None) -> Call:
        """The same with another input, such as that of a step of generate, which may have repeated the rows."""
        parts = None if self.parts is None else {name: part.of_batch(batch) for name, part in self.parts.items()}
        return replace(self, batch=batch, parts=parts)


@dataclass(frozen=True)
class View:
    """What the routers of one adapter see of a call.

    Args:
        adapter: its name.
        names: the tasks that it knows.
        ids: (n,) or (n, k) padded with -1; None if the call has none.
        batch: the call's input, as far as it is the adapter's.
        kept: what routers have computed in the call and need not compute again.
        ledger: where balance losses go; None unless it is a training call.
        counted: whether statistics have it: not what is generated, nor what runs again for backward.
        control: what a user has fixed; None for nothing.
        prompt, prompt_done: as for the call.
        again: layers run again, for backward.
        part: the rows that are the adapter's; None for all.
    """

    adapter: str = "default"
    names: Sequence[str] = ()
    ids: torch.Tensor | None = None
    batch: Batch | None = None
    kept: dict[Any, torch.Tensor] | None = None
    ledger: Ledger | None = None
    counted: bool = True
    control: Control | None = None
    prompt: Prompt | None = None
    prompt_done: bool = False
    again: bool = False
    part: Part | None = None

    def positions_in(self, x: torch.Tensor) -> torch.Tensor | None:
        """Where a layer's input (m, ..., in) has the adapter's rows; None for all of it.

        Raises:
            ValueError: it cannot be told.
        """
        part, kept = self.part, self.kept
        if part is None or part.index is None:
            return None
        if kept is None or torch.compiler.is_compiling():
            return part.positions_in(x)
        at = (part.rows, x.shape[0], x.dim(), x.device)
        if at not in kept:
            kept[at] = cast(torch.Tensor, part.positions_in(x))
        return kept[at]

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of a layer's input that are the adapter's."""
        positions = self.positions_in(x)
        return x if positions is None else x.index_select(0, positions)

    def tasks(self) -> torch.Tensor:
        """The ids.

        Raises:
            ValueError: there are none; the message lists the tasks and says how to give one.
        """
        if self.ids is None:
            raise ValueError(f"No task was given, and adapter {self.adapter!r} knows {list_tasks(self.names)}: {HOW}")
        return self.ids
