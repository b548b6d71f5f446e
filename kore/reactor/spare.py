"""The spare task: one task object that stands in for all the handlers that never wait.

A task costs more than most handlers do, and few handlers ever look at theirs. So from the first handler of a turn to
the end of the driver's callbacks one task is current, and the quick `Loop.begin`, made here, runs first steps in it. (A
protocol of asyncio's that is called back in a turn without handlers, or before them, has no current task, as asyncio
says; after them it sees one that has no coroutine. To leave and enter it for each handler would cost each 0.1 us.)
Whoever keeps the task, says something to it, asks its name or writes on it while it stands in for a coroutine makes it
that coroutine's own: nothing of one client reaches the next. Keeping is seen by counting references; the others make
one more, to be seen likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, copy_context
from sys import getrefcount
from typing import Any, NamedTuple

from kore.reactor.tasks import Coroutine, OnEnd, Task, enter_task, leave_task, next_id

ENDED = object()
"""What a first step gives that was the coroutine's last."""

_ABSENT = object()
"""Runs in the spare task while that cannot be current: outside of the driver's callbacks."""

_NOT_YET = object()
"""Runs in it in the driver's callbacks before the first handler of the turn."""


class FirstSteps(NamedTuple):
    """What a loop needs to run first steps quickly."""

    begin: Callable[[Coroutine], Task | None]
    """`Loop.begin`."""

    enter: Callable[[], None]
    """Called before the driver's callbacks run, when no task is current: the next handler may enter the spare one."""

    leave: Callable[[], None]
    """Called after them."""


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
        return self._begun()[0]

    @property
    def _context(self) -> Context:  # type: ignore[override]
        context: Context = self._begun()[1]
        return context

    def become(self, coro: Coroutine, context: Context, on_end: OnEnd | None) -> None:
        """Be the task of the coroutine begun with it, for good."""
        object.__setattr__(self, "__class__", Task)
        self._begun = self._kept = None
        self._coro = coro  # type: ignore[misc]
        self._context = context  # type: ignore[misc]
        self.on_end = on_end


def _count_references() -> int:
    spare = object()
    current = {None: spare}

    def count() -> int:
        return getrefcount(spare)

    counted = count()
    current.clear()
    return counted


UNKEPT = _count_references()
"""What getrefcount() says in `begin` of a task that nobody but asyncio refers to; versions of Python differ."""


def _new_spare(loop: Any, begun: Callable[[], tuple[Any, Context]]) -> Spare:
    task = Task(loop, None, task_id=next_id())
    task._begun = begun
    task.__class__ = Spare
    assert isinstance(task, Spare)
    return task


def first_steps(loop: Any) -> FirstSteps:
    """First steps for a loop whose tasks are not traced: no object is made for a handler but its context.

    Closures and not methods, since their cells are what they need most, and the spare is entered once a turn, not for
    each step: `begin` takes 0.2 us over the coroutine itself.
    """
    # Hot path, the 0.2 us above: five closures in one function, since they share its cells.
    running: Any = _ABSENT  # None: the spare is current, and free
    context = copy_context()

    def begun() -> tuple[Any, Context]:
        return None if running is _ABSENT or running is _NOT_YET else running, context

    spare = _new_spare(loop, begun)

    def plain(coro: Coroutine) -> Task | None:
        own: Task | None = type(loop).begin(loop, coro)
        return own

    def begin(coro: Coroutine) -> Task | None:
        nonlocal running, context
        if running is not None:
            if running is not _NOT_YET:
                return plain(coro)
            try:
                enter_task(loop, spare)
            except RuntimeError:  # the clean-up of a task that is being killed began this
                return plain(coro)
        running = coro
        context = copy_context()
        try:
            # next() with a default and not coro.send(): a coroutine that returns None then ends without a StopIteration
            # being made, raised and caught: 120 ns for such a coroutine where send() takes 270.
            waited = context.run(next, coro.__await__(), ENDED)
        except BaseException as error:
            running = None
            if getrefcount(spare) != UNKEPT:
                kept(coro, already_told)._end(None, error)
            raise
        running = None
        if waited is not ENDED:
            task = kept(coro, None)
            task._suspend_first(waited)
            return task
        if getrefcount(spare) != UNKEPT:
            kept(coro, already_told)._end(None, None)
        return None

    def kept(coro: Coroutine, on_end: OnEnd | None) -> Task:
        # The spare task is this coroutine's, for good: it waits, or somebody keeps it.
        nonlocal spare
        task = spare
        leave_task(loop, task)
        spare = _new_spare(loop, begun)
        enter_task(loop, spare)
        task.become(coro, context, on_end)
        return task

    def enter() -> None:
        nonlocal running
        running = _NOT_YET

    def leave() -> None:
        nonlocal running
        if running is not _NOT_YET:
            leave_task(loop, spare)
        running = _ABSENT

    return FirstSteps(begin, enter, leave)


def already_told(_error: BaseException | None) -> None:
    """The end of a first step: `begin` returns or raises it, and nobody else is to hear of it."""
