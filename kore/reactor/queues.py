"""``kore.queue``: an unbounded first-in first-out queue of objects between the coroutines of one process.

A push wakes the longest waiting coroutine but hands it nothing: the object stays in the queue until somebody takes it.
So a coroutine that finds an object takes it at once, even past others that were woken and did not run yet, and a woken
one that finds none goes back to the head of the line.
"""

from __future__ import annotations

from asyncio import Future, events
from collections import deque
from collections.abc import Generator
from typing import Any

from kore.reactor.names import made, public
from kore.reactor.tasks import current_task


@public("queueop")
class QueueOp:
    """What ``queue.pop()`` gives: await it once for the object."""

    __slots__ = ("_queue",)
    _queue: PyQueue | None

    def __await__(self) -> Generator[Any, None, object]:
        queue = self._queue
        if queue is None:
            raise RuntimeError("cannot await a pop() twice")
        current_task("pop()")
        self._queue = None
        objects = queue._objects
        waiters = queue._waiters
        robbed = False
        while not objects:
            future: Future[Any] = events.get_running_loop().create_future()
            if robbed:
                waiters.appendleft(future)
            else:
                waiters.append(future)
            try:
                yield from future
            except BaseException:
                if future.done() and not future.cancelled():
                    queue._wake_one()  # it was woken for an object it will not take
                else:
                    queue._leave(future)
                raise
            robbed = True
        return objects.popleft()


@public("queue")
class PyQueue:
    """What ``kore.queue`` gives (reference: kore.queue)."""

    __slots__ = ("_objects", "_waiters")
    _objects: deque[object]
    _waiters: deque[Future[Any]]

    def push(self, obj: object) -> bool:
        """Append `obj` and wake the coroutine that waits longest. Never blocks, may be called from anywhere; True."""
        self._objects.append(obj)
        if self._waiters:
            self._wake_one()
        return True

    def pop(self) -> QueueOp:
        """An awaitable that gives the oldest object, once there is one. RuntimeError outside of coroutines."""
        current_task("pop()")
        op = made(QueueOp)
        op._queue = self
        return op

    def popnow(self) -> object:
        """The oldest object, or None when there is none."""
        return self._objects.popleft() if self._objects else None

    def _wake_one(self) -> None:
        waiters = self._waiters
        while self._objects and waiters:
            future = waiters.popleft()
            if not future.done():
                future.set_result(None)
                return

    def _leave(self, future: Future[Any]) -> None:
        try:
            self._waiters.remove(future)
        except ValueError:  # a push found it cancelled and dropped it
            return


def queue(*ignored: object) -> PyQueue:  # noqa: ARG001 - the reference's platform takes and ignores positionals
    """A new, empty queue (reference: kore.queue)."""
    made_queue = made(PyQueue)
    made_queue._objects = deque()
    made_queue._waiters = deque()
    return made_queue
