"""What a forward was told about its rows."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from .batch import Batch
from .call import HOW, Call, Choice, Tasks, View
from .control import Control
from .grouped import GroupedRouter
from .history import History, backward_under_way, keep_with
from .ledger import Ledger, OutsideScale
from .mixture import Part, parts_of
from .prompt import Prompt
from .tasks import Task, TaskIds, encode_choice, encode_tasks, list_tasks, tasks_of_rows

# Attribute of a cache of keys and values: the `Prompt` that it begins with.
IN_CACHE = "_peft_moe_prompt"


class RoutingContext:
    """Carries task ids from a call to the layers; one per tuner, and every routed layer holds a reference to it.

    The ids of a call come from its `task_ids`, else from the chosen task (`set_task`), else from the adapter's default.
    Calls from several threads take turns, and so do the `with` blocks in which they choose.

    Args:
        one_task_only: why rows of one call cannot have different tasks, where the base model does not allow it.
    """

    def __init__(self, one_task_only: str | None = None) -> None:
        self.one_task_only = one_task_only
        self.merged: dict[str, torch.Tensor] = {}  # by adapter, the task ids (1,) or (1, k) in the base weights now
        self.in_base: set[str] = set()  # adapters that are merged into the base weights
        # while merging is measured, by quantisation backend how much of what was added each layer lost
        self.requantised: dict[str, list[float]] | None = None
        self._tasks: dict[str, Tasks] = {}
        self._choice = Choice()
        self._call = Call()
        self._history = History()
        self._depth = 0
        self.used = False  # whether there was a call since the last adapter came
        self._warned = False
        self.outside = OutsideScale()
        self.last_ledger: Ledger | None = None
        # not looked up in peft_config, where transformers deletes entries and a tuner around ours puts its own
        self.by_prompt: set[str] = set()  # adapters that route by prompts
        self.deciders: tuple[GroupedRouter, ...] = ()  # of the blocks that are being run
        self.entered: tuple[object, ...] = ()  # entries of blocks that go on in what a checkpoint function runs
        self.names: tuple[str, ...] | None = None  # an adapter for each row of the calls to come, if rows differ in it
        self._turn = threading.RLock()
        # Of blocks that choose. Not that of calls: a thread that streams answers calls from within another's block.
        self._choosing = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_call": Call(), "_depth": 0, "last_ledger": None, "names": None, "deciders": (), "entered": ()}
        of_threads = ("_turn", "_choosing", "_history")
        return {name: value for name, value in vars(self).items() if name not in of_threads} | fresh

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _turn=threading.RLock(), _choosing=threading.RLock(), _history=History())

    @property
    def controls(self) -> dict[str, Control]:
        """By adapter, what a user has fixed."""
        return self._choice.controls

    def know(self, adapter: str, tasks: Tasks) -> None:
        """Take note of an adapter's tasks, if it knows any, also of other ones than before."""
        if not tasks.task_names:
            self._tasks.pop(adapter, None)
            return
        same = adapter in self._tasks and list(self._tasks[adapter].task_names) == list(tasks.task_names)
        self._tasks[adapter] = tasks
        chosen = self._choice
        if adapter in chosen.ids and chosen.task is not None and not same:
            self._choose(chosen.of_task(chosen.task, {**chosen.ids, adapter: self._encode(adapter, chosen.task)}))

    def check_choice(self, adapter: str, tasks: Tasks) -> None:
        """Raise a ValueError if an adapter would not know the chosen task with other tasks than it has."""
        chosen = self._choice.task
        if chosen is None or adapter not in self._choice.ids:
            return
        try:
            self._encoded(chosen, tasks.task_names)
        except ValueError as error:
            raise ValueError(f"The task chosen with set_task is {chosen!r}: {error} Choose another first.") from None

    def fix(self, adapter: str, control: Control | None) -> None:
        """Take note of the weights that a user has fixed; None for none."""
        self._choose(self._choice.with_control(adapter, control))

    def forget(self, adapter: str) -> None:
        """Drop what is known of an adapter."""
        self._choose(self._choice.without(adapter))
        self._tasks.pop(adapter, None)
        self.merged.pop(adapter, None)
        self.in_base.discard(adapter)
        self.by_prompt.discard(adapter)

    def choose(self, task: Task | Sequence[Task] | None, adapters: Sequence[str]) -> None:
        """Take a task for all calls that bring none; several are tasks of every row; None takes the choice back.

        Raises:
            ValueError: one of the adapters does not know it.
        """
        # Encoded here, not per call: to torch.compile a tensor is an input, and a name a constant to recompile for.
        with torch.inference_mode(False):  # a later call may be one of training
            ids = {a: self._encode(a, task) for a in adapters if a in self._tasks} if task is not None else {}
        self._choose(self._choice.of_task(task, ids))

    def _choose(self, choice: Choice) -> None:
        """Let another choice hold from now on."""
        self._hold(replace(choice, made_in=backward_under_way()))

    def _hold(self, choice: Choice) -> None:
        before, self._choice = self._choice, choice
        if not self._depth and self._is_noted:
            self._history.note(choice, before)

    @property
    def _is_noted(self) -> bool:
        """Whether a forward may be made now that layers run again for: not in backward."""
        return not torch.compiler.is_compiling() and backward_under_way() == -1

    @contextmanager
    def chosen(self, task: Task | Sequence[Task], adapters: Sequence[str]) -> Iterator[None]:
        """The same for the span of a `with` block; those of other threads wait."""
        with self._choosing:
            before = self._choice
            self.choose(task, adapters)
            try:
                yield
            finally:
                again = replace(self._choice, task=before.task, ids=before.ids, made_in=before.made_in)
                self._hold(before if self.controls is before.controls else again)

    @contextmanager
    def fixed(self, adapter: str) -> Iterator[None]:
        """Give an adapter the weights again, after a `with` block, that it had before; those of other threads wait."""
        with self._choosing:
            before = self._choice
            try:
                yield
            finally:
                again = self._choice.with_control(adapter, before.controls.get(adapter))
                self._hold(replace(again, made_in=before.made_in))

    @contextmanager
    def mixed(self, names: Sequence[str]) -> Iterator[None]:
        """Give the rows of the calls in a `with` block an adapter each; calls of other threads wait."""
        with self.turn():
            before, self.names = self.names, tuple(names)
            try:
                yield
            finally:
                self.names = before

    @contextmanager
    def call(
        self,
        task_ids: TaskIds | None,
        *,
        active: Sequence[str],
        batch: Batch | None = None,
        training: bool = False,
        counted: bool = True,
        prompt: Prompt | None = None,
        prompt_mask: torch.Tensor | None = None,
        in_forward: bool = False,
    ) -> Iterator[Ledger | None]:
        """The span of one call. A call inside it inherits its ids and prompts unless it brings its own.

        Yields:
            the ledger of balance losses, if this is the outermost call and one of training.

        Raises:
            ValueError: unknown tasks, another number of ids than rows, ids of another task than the one merged.
        """
        with nullcontext() if torch.compiler.is_compiling() else self._turn:
            outermost, before, self.used = self._depth == 0, self._call, True
            if not outermost and prompt is None:
                prompt, prompt_mask = before.prompt, before.prompt_mask
            if outermost or task_ids is not None:
                ledger = self._new_ledger(training) if outermost else before.ledger
                if not outermost:
                    parts = before.of_batch(batch).parts
                else:
                    parts = None if self.names is None else parts_of(self.names, batch)
                choice = self._present() if outermost else before.choice
                call = self._resolve(task_ids, active, choice, batch, training, parts)
                prompt = prompt or (Prompt() if outermost else None)
                self._call = replace(
                    call,
                    ledger=ledger,
                    counted=counted if outermost else before.counted,
                    prompt=prompt,
                    prompt_done=bool(prompt and prompt.done),
                    prompt_mask=prompt_mask,
                    in_forward=in_forward or (before.in_forward and not outermost),
                )
            elif batch is not None:  # such as a step of generate, which may have repeated the rows
                self._call = replace(
                    before.of_batch(batch),
                    prompt=prompt,
                    prompt_done=bool(prompt and prompt.done),
                    prompt_mask=prompt_mask,
                    in_forward=in_forward or before.in_forward,
                )
            self._depth += 1
            if noted := self._is_noted:
                self._history.note(self._call, self._choice)
                if not outermost and self._call is not before and torch.is_grad_enabled():
                    before.inner.append(self._call)
            try:
                yield self._call.ledger if outermost else None
            finally:
                self._depth -= 1
                # Kept after the outermost call, for layers that run again for it in backward.
                if not outermost or backward_under_way() != -1:
                    self._call = before
                if noted:
                    self._history.note(self._choice if outermost else before, self._choice)

    def _new_ledger(self, training: bool) -> Ledger | None:
        if not training:
            return None
        ledger = Ledger(self.outside)
        if backward_under_way() == -1:
            self.last_ledger = ledger
        return ledger

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep calls of other threads waiting."""
        with nullcontext() if torch.compiler.is_compiling() else self._turn:
            yield

    @property
    def open(self) -> bool:
        """Whether a call is under way."""
        return self._depth > 0

    @property
    def current(self) -> Call | None:
        """The call that layers are run for: the one under way; in backward, that of the forward they run again for."""
        if self._depth:
            return self._call
        state = self._state()
        return state if isinstance(state, Call) else None

    # what is compiled in forward would not see that it runs again; torch leaves its type out
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _state(self) -> Call | Choice:
        """What layers are run for outside of a call: what is chosen or, in backward, what held for their forward."""
        if self._made_now:
            return self._choice
        return self._history.of_layer(self._choice)

    def _present(self) -> Choice:
        """What is chosen for a call that begins; in backward, what was when it was made first."""
        return self._choice if self._made_now else self._history.of_call(self._choice)

    @property
    def _made_now(self) -> bool:
        """Whether nothing runs again, or the choice was made by what runs again."""
        backward = backward_under_way()
        return backward in (-1, self._choice.made_in)

    def keep_with(self, outputs: Any) -> None:
        """Keep the call under way as long as a graph among its outputs: layers may run again for it in backward."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            keep_with(outputs, self._call)

    @property
    def kept(self) -> dict[Any, torch.Tensor] | None:
        """What is kept for the span of the call under way, and of a generate; None outside of one."""
        return self._call.kept if self._depth else None

    @property
    def prompt(self) -> Prompt:
        """What routers make of the prompts of the current call."""
        return self._call.prompt or Prompt()

    @property
    def prompt_mask(self) -> torch.Tensor | None:
        """Which tokens of the current call are the prompt, if its caller has said so."""
        return self._call.prompt_mask

    def prompt_in(self, cache: Any) -> Prompt | None:
        """The prompts that a cache of keys and values began with; None if it is not known."""
        return getattr(cache, IN_CACHE, None)

    def prompt_was_read(self, batch: Batch | None, cache: Any) -> None:
        """A forward is over that may have read prompts; calls that go on with its cache have them too."""
        self.prompt.passed(0 if batch is None or batch.tokens is None else batch.tokens)
        if cache is not None and not isinstance(cache, tuple):  # as old models have
            self.prompt.names = self.names
            setattr(cache, IN_CACHE, self.prompt)  # with it, so that a copy of the cache has it too

    @property
    def in_forward(self) -> bool:
        """Whether a forward of the model is under way."""
        return self._depth > 0 and self._call.in_forward

    @property
    def told(self) -> TaskIds | None:
        """The `task_ids` of the current call as they were given."""
        return self._call.told

    @contextmanager
    def entering(self, entry: object) -> Iterator[None]:
        """A block is run by a checkpoint function, in which its entry is to let routers read."""
        before, self.entered = self.entered, (*self.entered, entry)
        try:
            yield
        finally:
            self.entered = before

    @contextmanager
    def decided(self, routers: Sequence[GroupedRouter], weights: Sequence[torch.Tensor | None]) -> Iterator[None]:
        """Run a part of blocks whose routers have decided already, perhaps again."""
        before, self.deciders = self.deciders, tuple(routers)
        try:
            with ExitStack() as stack:
                for router, decision in zip(routers, weights, strict=True):
                    stack.enter_context(router.decided(decision))
                yield
        finally:
            self.deciders = before

    @contextmanager
    def replay(self, call: Call) -> Iterator[None]:
        """Run layers for an earlier call again."""
        with self._turn:
            before, self._call = self._call, call
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                self._call = before

    def view(self, adapter: str) -> View:
        """What an adapter's routers see of the current call."""
        state = self._call if self._depth else self._state()
        call = state if isinstance(state, Call) else self._resolve(None, (adapter,), state)
        if torch.compiler.is_compiling():
            return self._view(call, adapter, again=False)
        again = torch._C._current_graph_task_id() != -1
        if call is not state and not again:
            self._history.note_run(self._choice)
        view = call.views.get((adapter, again))
        if view is None:
            view = call.views[adapter, again] = self._view(call, adapter, again=again)
        return view

    def _view(self, call: Call, adapter: str, *, again: bool) -> View:
        part = None if call.parts is None else call.parts.get(adapter)
        names = self._tasks[adapter].task_names if adapter in self._tasks else ()
        return View(
            adapter=adapter,
            names=names,
            ids=call.ids.get(adapter),
            batch=call.batch if part is None else part.batch,
            kept=call.kept,
            ledger=call.ledger,
            counted=call.counted and not again,
            control=call.choice.controls.get(adapter),
            prompt=call.prompt,
            prompt_done=call.prompt_done,
            again=again,
            part=part,
        )

    @property
    def is_mixed(self) -> bool:
        """Whether rows of the last call, which may be under way, belonged to different adapters."""
        return self._call.parts is not None

    @property
    def parts(self) -> dict[str, Part] | None:
        """By adapter, its rows in the current call, where rows belong to different ones; else None."""
        call = self.current
        return None if call is None else call.parts

    def one_task(self, adapter: str) -> torch.Tensor:
        """The chosen task as ids (1,) or (1, k), for work that is done once for all rows, such as merging.

        Raises:
            ValueError: none was chosen.
        """
        ids = self._chosen_or_default(adapter, self._choice)
        if ids is None:
            raise ValueError(
                "This is done for one task, and none was chosen; pass task= with one of "
                f"{list_tasks(self._tasks[adapter].task_names)}, or choose one with model.set_task(...)."
            )
        return ids

    def may_lack_task(self, adapters: Sequence[str], *, default_is_enough: bool) -> bool:
        """Whether a call that brings no tasks leaves one of these adapters without, or with its default only."""
        known = [self._tasks[adapter] for adapter in adapters if adapter in self._tasks]
        return self._choice.task is None and any(t.default_task is None or not default_is_enough for t in known)

    def _encode(self, adapter: str, task: Task | Sequence[Task]) -> torch.Tensor:
        return self._encoded(task, self._tasks[adapter].task_names)

    @staticmethod
    def _encoded(task: Task | Sequence[Task], names: Sequence[str]) -> torch.Tensor:
        """A task, or several for the same rows, as ids (1,) or (1, k)."""
        return encode_choice(task, names)

    def _chosen_or_default(self, adapter: str, choice: Choice) -> torch.Tensor | None:
        if choice.task is None:
            default = self._tasks[adapter].default_task
            return None if default is None else self._encode(adapter, default)
        chosen = choice.ids.get(adapter)
        return self._encode(adapter, choice.task) if chosen is None else chosen

    def _resolve(
        self,
        task_ids: TaskIds | None,
        active: Sequence[str],
        choice: Choice,
        batch: Batch | None = None,
        training: bool = False,
        parts: dict[str, Part] | None = None,
    ) -> Call:
        if task_ids is not None and active and not any(adapter in self._tasks for adapter in active):
            raise ValueError(
                f"task_ids={task_ids!r} were given, and adapter {active[0]!r} knows no tasks; name them in its config "
                "(tasks=[...], which AT-MoE has not), or leave task_ids out: its experts are chosen by the tokens."
            )
        found = {}
        for adapter, tasks in self._tasks.items():
            part = None if parts is None else parts.get(adapter)
            if parts is not None and part is None:
                continue
            try:
                own = task_ids if part is None or task_ids is None else _tasks_of(task_ids, part)
                ids = self._chosen_or_default(adapter, choice) if own is None else encode_tasks(own, tasks.task_names)
            except (ValueError, TypeError):
                if adapter in active:
                    raise
                continue  # the tasks of another adapter are not this one's concern
            if ids is None:
                continue  # a bank of one needs none; the layer that needs one says so
            if adapter in active:
                self._check_rows(ids, batch if part is None else part.batch)
                if task_ids is not None or choice.task is not None:
                    self._check_merged(adapter, ids)
                else:
                    self._warn_of_default(tasks.default_task, training)
            found[adapter] = ids if batch is None else ids.to(batch.device)
        return Call(task_ids, found, batch, choice=choice, parts=parts)

    def _check_rows(self, ids: torch.Tensor, batch: Batch | None) -> None:
        n = ids.shape[0]
        # compared one by one: torch.compile does not find a size that varies in a tuple
        if batch is not None and n != 1 and n != batch.rows:
            raise ValueError(
                f"task_ids has {ids.shape[0]} entries and the batch has {batch.rows} rows; "
                "give one task per row, or one for all."
            )
        if self.one_task_only and ids.shape[0] > 1:
            raise ValueError(f"task_ids has an entry per row, and {self.one_task_only}; give one task for the batch.")

    def _check_merged(self, adapter: str, ids: torch.Tensor) -> None:
        merged = self.merged.get(adapter)
        if merged is None:
            return
        if not _same_tasks(ids, merged.to(ids.device)):
            names = [self._tasks[adapter].task_names[i] for i in merged.flatten().tolist() if i >= 0]
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


def _same_tasks(ids: torch.Tensor, merged: torch.Tensor) -> bool:
    """Whether all rows have the tasks of `merged`, of shape (1,) or (1, k), each in the same proportion.

    Args:
        ids: (n,), or (n, k) padded with -1.
    """

    def shares(rows: torch.Tensor) -> torch.Tensor:
        """(n, T): how much of a row is of each task."""
        rows = rows.reshape(len(rows), -1)
        counts = torch.zeros(len(rows), size + 1, device=rows.device)
        counts.scatter_add_(1, rows + 1, torch.ones_like(rows, dtype=counts.dtype))  # the first column is padding
        return counts[:, 1:] / counts[:, 1:].sum(1, keepdim=True)

    size = int(torch.stack([ids.max(), merged.max()]).max()) + 1
    return torch.allclose(shares(ids), shares(merged).expand(len(ids), -1))


def _tasks_of(task_ids: TaskIds, part: Part) -> TaskIds | None:
    return tasks_of_rows(task_ids, range(part.n) if part.rows is None else part.rows, part.n)
