"""Which forward layers run again for, in backward.

Gradient checkpointing may be called by code that cannot be told of calls: of a model, a trainer, a user. But autograd
numbers the nodes of its graphs as a forward makes them, thread by thread, and says in backward which node it is at. So
it is enough to note from which number on a call or, outside of calls, a choice held.
"""

from __future__ import annotations

import sys
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from operator import attrgetter
from types import FrameType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch.autograd.function import BackwardCFunction

from .call import Call, Choice

T = TypeVar("T")
MOST = 1024  # spans that are kept of one thread
THREADS = 64  # that are kept
KEPT = "peft_moe"  # in the metadata of a node, calls that are kept as long as it is
_START = attrgetter("start")
REMEDY = (
    "Call backward before other forwards, keep what a forward returns until then, or leave checkpointing to "
    "transformers, model.gradient_checkpointing_enable(), or to torch's CheckpointWrapper, which can be told."
)


def backward_under_way() -> int:
    """The number of the backward that this thread is in; -1 outside of one, and in what is compiled."""
    # Private, but what torch's own checkpointing asks to tell a recomputation from a forward.
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


@dataclass
class Span:
    """What held in a thread from a node on, until the next span.

    Args:
        start: number of the node.
        held: a call, for as long as something else keeps it; or a choice, outside of calls.
        ran: outside of calls, layers did run.
    """

    start: int
    held: weakref.ref[Call] | Choice
    ran: bool = False

    @property
    def state(self) -> Call | Choice | None:
        """The call or choice; None for a call that is gone."""
        return self.held if isinstance(self.held, Choice) else self.held()


class History:
    """What held while nodes were made, by thread."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._lines: dict[object, list[Span]] = {}

    def note(self, state: Call | Choice, before: Choice) -> None:
        """A call begins, or another choice, in this thread.

        Args:
            state: what holds from now on.
            before: what held in a thread that has not been heard of.
        """
        number, line = torch._C._autograd._get_sequence_nr(), self._line(before)
        while line and line[-1].start == number:  # no node was made in it
            line.pop()
        if not line or line[-1].state is not state:
            line.append(Span(number, state if isinstance(state, Choice) else weakref.ref(state)))
        if len(line) > MOST:
            del line[: MOST // 2]

    def note_run(self, choice: Choice) -> None:
        """A layer runs outside of a call, in this thread."""
        line = self._line(choice)
        if not line or line[-1].state is not choice:
            self.note(choice, choice)
        line[-1].ran = True

    def _line(self, before: Choice) -> list[Span]:
        own = getattr(self._own, "key", None)
        if own is None:
            own = self._own.key = object()
            self._lines[own] = [Span(0, before)]
            if len(self._lines) > THREADS:
                self._forget_threads(own)
        return self._lines.setdefault(own, [])

    def _forget_threads(self, own: object) -> None:
        """Empty what was noted in threads of which no call is kept."""
        for key, line in list(self._lines.items()):
            if key is not own and not any(isinstance(span.state, Call) for span in line):
                del self._lines[key]

    def of_layer(self, choice: Choice) -> Call | Choice:
        """What held when the forward was run that a layer runs again for.

        Args:
            choice: what is chosen now, which holds if nothing was ever noted.

        Raises:
            RuntimeError: it cannot be told.
        """
        node = _node()
        if node is None or not self._lines:
            return choice
        found = self._at(node.number)
        if found is None:
            raise RuntimeError(
                "A layer runs again in backward, and what its forward was told is no longer known, since nothing that "
                f"it returned is kept, or hundreds of others came after it. {REMEDY}"
            )
        # a layer that has run outside of calls was noted, unless it took a shortcut
        certain = [state for state, ran in found if ran or isinstance(state, Call)]
        states = _different(certain or ([] if node.nested else [state for state, _ in found]))
        if len(states) != 1:
            raise RuntimeError(
                "A layer runs again in backward, in a checkpoint inside of a checkpoint or beside other threads, and "
                f"cannot tell for which forward, so that gradients might be wrong. {REMEDY}"
            )
        return states[0]

    def of_call(self, choice: Choice) -> Choice:
        """What was chosen when the forward was run that a whole call is made again for; arguments as above."""
        node = _node()
        if node is None or not self._lines:
            return choice
        states = [state for state, _ in self._at(node.number) or ()]
        choices = _different([state.choice if isinstance(state, Call) else state for state in states])
        if len(choices) != 1:
            raise RuntimeError(
                "The model is called again in backward, and what was chosen when it was first called is no longer "
                f"known. {REMEDY}"
            )
        return choices[0]

    def _at(self, number: int) -> list[tuple[Call | Choice, bool]] | None:
        """By thread, what held when it made the node of a number, and whether layers ran; None if that is gone."""
        found, gone = [], False
        for line in list(self._lines.values()):
            i = bisect_right(line, number, key=_START) - 1
            state = line[i].state if i >= 0 else None
            if state is not None:
                found.append((state, line[i].ran))
            elif line:
                gone = True
        return None if gone and not any(isinstance(state, Call) for state, _ in found) else found


def keep_with(outputs: Any, call: Call) -> None:
    """Keep a call as long as a graph that its forward returned."""
    for tensor in _tensors(outputs):
        if tensor.grad_fn is not None:
            metadata = cast(dict[Any, Any], tensor.grad_fn.metadata)  # a dict, where torch's types say a method
            metadata.setdefault(KEPT, []).append(call)


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for part in outputs.values():
            yield from _tensors(part)
    elif isinstance(outputs, (list, tuple)):
        for part in outputs:
            yield from _tensors(part)
    elif is_dataclass(outputs):
        yield from _tensors(vars(outputs))


class _Node(NamedTuple):
    """The node of a forward that a backward is at.

    Args:
        number: of the node.
        nested: another backward runs inside of it, as reentrant checkpointing has it.
    """

    number: int
    nested: bool


def _node() -> _Node | None:
    """The node of a forward that this thread's backward is at; in a backward inside a backward, that of the outer one.

    The inner one's nodes were made in backward, by what ran again.
    """
    # Private, so asked for here: a torch without it can do all but this.
    from torch.autograd.graph import _engine_run_backward

    begins, is_at = _engine_run_backward.__code__, BackwardCFunction.apply.__code__
    node: Any = torch._C._current_autograd_node()
    inside, nested, frame = False, False, cast("FrameType | None", sys._getframe())
    while frame is not None:
        if frame.f_code is begins:
            inside = True
        elif inside and frame.f_code is is_at:  # a node that is written in Python
            node, nested = frame.f_locals["self"], True
        frame = frame.f_back
    return None if node is None else _Node(node._sequence_nr(), nested)


def _different(states: Sequence[T]) -> list[T]:
    """Each object once."""
    return list({id(state): state for state in states}.values())
