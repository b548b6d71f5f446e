"""The spare task: one task object that stands in for all the handlers that never wait.

A task costs more than most handlers do, and few handlers ever look at theirs. So `Loop.begin` runs first steps with a
task that is there already, whose coroutine, id and context are three places of a list. Whoever keeps the task, says
something to it or writes on it while it stands in for a coroutine makes it that coroutine's own: nothing of one client
reaches the next. The first two are seen by counting references; writing makes one more reference, to be seen likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from sys import getrefcount
from typing import Any

from kore.reactor.tasks import OnEnd, Task


class Spare(Task):
    """A task between coroutines, or in the first step of one. `become` makes it a task like others."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        self._keep()

    def _keep(self) -> None:
        object.__setattr__(self, "_kept", self)

    def add_done_callback(self, fn: Callable[[Any], object], /, *, context: Context | None = None) -> None:
        """Call `fn(task)` soon after the end, as asyncio futures do."""
        self._keep()
        super().add_done_callback(fn, context=context)

    @property
    def _coro(self) -> Any:
        return self._begun[0]

    @property
    def _id(self) -> int:  # type: ignore[override]
        number: int = self._begun[1]
        return number

    @property
    def _context(self) -> Context:  # type: ignore[override]
        context: Context = self._begun[2]
        return context

    def become(self, on_end: OnEnd) -> None:
        """Be the task of the coroutine begun with it, for good."""
        coro, number, context = self._begun
        object.__setattr__(self, "__class__", Task)
        object.__setattr__(self, "_kept", None)
        self._coro = coro  # type: ignore[misc]
        self._id = number  # type: ignore[misc]
        self._context = context  # type: ignore[misc]
        self._on_end = on_end


Pair = tuple[Spare, list[Any]]
"""The spare task and the list of its coroutine, id and context: what begin() writes to without touching the task."""


def new_pair(loop: Any) -> Pair:
    """A new spare task of `loop`."""
    task = Task(loop, None)
    begun: list[Any] = [None, -1, None]
    task._begun = begun
    task.__class__ = Spare
    assert isinstance(task, Spare)
    return task, begun


def _count_references() -> int:
    pair = (object(), [])  # type: ignore[var-annotated]
    task, _ = pair
    return getrefcount(task)


UNKEPT = _count_references()
"""What getrefcount() says of a task that only a pair and one local name refer to; versions of Python differ."""
