"""Waiting for time, and for other coroutines: ``kore.suspend`` and ``kore.gather``.

Both wait on an asyncio future and clean up when the wait ends in any other way, so they behave the same in kore's
tasks and in asyncio's, cancelled or killed.
"""

from __future__ import annotations

import threading
import types
from asyncio import Future, events
from collections import deque
from collections.abc import Generator
from functools import partial
from typing import Any

from kore.reactor import trace
from kore.reactor.names import made, public
from kore.reactor.tasks import Coroutine, Task, current_task


def wake(future: Future[Any]) -> None:
    """Let the coroutine that waits for `future` go on, soon; nothing when it is gone."""
    if not future.done():
        future.set_result(None)


@public("suspend")
class Suspend:
    """What ``kore.suspend`` gives: await it once to wait."""

    __slots__ = ("_finished", "_seconds")
    _seconds: float
    _finished: bool

    def __await__(self) -> Generator[Any, None, None]:
        if self._finished:
            return
        current_task("suspend()")
        if self._seconds <= 0:
            yield
            self._finished = True
            return
        loop = events.get_running_loop()
        future: Future[Any] = loop.create_future()
        handle = loop.call_later(self._seconds, wake, future)
        try:
            yield from future
        finally:
            handle.cancel()
        self._finished = True


def suspend(milliseconds: int) -> Suspend:
    """An awaitable that waits so many milliseconds from its first await; 0 or less: until a later turn.

    Raises TypeError for what is no int, RuntimeError outside of coroutines (reference: kore.suspend).
    """
    if not isinstance(milliseconds, int):
        raise TypeError(f"suspend() wants an int, not {type(milliseconds).__name__}")
    current_task("suspend()")
    op = made(Suspend)
    op._seconds = milliseconds / 1000
    op._finished = False
    return op


class _Children:
    """The coroutines of one gather: those that run, those that wait for their turn, and their results."""

    __slots__ = ("future", "loop", "results", "running", "waiting")

    def __init__(self, loop: Any, coroutines: tuple[Coroutine, ...], at_once: int) -> None:
        self.loop = loop
        self.results: list[Any] = [None] * len(coroutines)
        self.waiting = deque(enumerate(coroutines))
        self.running: dict[int, Task] = {}
        self.future: Future[Any] | None = None
        for _ in range(at_once):
            self.start_next()

    def start_next(self) -> None:
        if self.waiting:
            index, coro = self.waiting.popleft()
            self.running[index] = self.loop.start(coro, partial(self.ended, index))

    def ended(self, index: int, error: BaseException | None) -> None:
        task = self.running.pop(index)
        self.results[index] = task.result() if error is None else error
        self.start_next()
        if not self.running and self.future is not None:
            wake(self.future)

    def end(self) -> None:
        """Kill those that are left. The collector asks for it in whatever thread it runs."""
        if self.loop._thread_id in (None, threading.get_ident()):
            self.kill()
        else:
            self.loop.call_soon_threadsafe(self.kill)

    def kill(self) -> None:
        while self.waiting:
            self.waiting.popleft()[1].close()
        for task in list(self.running.values()):
            try:
                task.kill()
            except RuntimeError:  # it is the one that runs: it cannot be closed under its own feet
                task.cancel()


@public("pygather_op")
class Gather:
    """What ``kore.gather`` gives: await it for the list of results. Dropping it kills the children."""

    __slots__ = ("_children",)
    _children: _Children

    def __await__(self) -> Generator[Any, None, list[Any]]:
        current_task("gather()")
        children = self._children
        if children.future is not None:
            raise RuntimeError("cannot await a gather twice")
        children.future = events.get_running_loop().create_future()
        try:
            if children.running:
                yield from children.future
        finally:
            children.kill()
        return children.results

    def __del__(self) -> None:
        children: _Children | None = getattr(self, "_children", None)
        if children is not None and (children.running or children.waiting):
            try:
                children.end()
            except Exception as exc:  # noqa: BLE001 - a collector has no caller
                trace.report_exception("coroutine", exc)


def gather(*coroutines: Coroutine, concurrency: int | None = None) -> Gather:
    """Run `coroutines` as tasks, at most `concurrency` at a time (0, None: all), from now on.

    Awaited, it gives the list of their results in the order of the arguments; an exception is a result like others
    and is never raised. When one child ends the next one starts. Raises RuntimeError outside of coroutines, TypeError
    for what is no coroutine, ValueError for a negative `concurrency` (reference: kore.gather).
    """
    try:
        current_task("gather()")
        for coro in coroutines:
            if type(coro) is not types.CoroutineType:
                raise TypeError(f"gather() wants coroutines, not {type(coro).__name__}")
        if concurrency is not None and not isinstance(concurrency, int):
            raise TypeError(f"concurrency must be an int, not {type(concurrency).__name__}")
        if concurrency is not None and concurrency < 0:
            raise ValueError(f"concurrency must not be negative, not {concurrency}")
        loop: Any = events.get_running_loop()
        if not hasattr(loop, "start"):
            raise RuntimeError("gather() needs kore's event loop")
    except (RuntimeError, TypeError, ValueError):
        for coro in coroutines:
            if type(coro) is types.CoroutineType:
                coro.close()
        raise
    count = len(coroutines)
    op = made(Gather)
    op._children = _Children(loop, coroutines, min(concurrency, count) if concurrency else count)
    return op
