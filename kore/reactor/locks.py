"""``kore.lock``: mutual exclusion between the coroutines of one process, owned by a coroutine.

A release wakes the first in line but does not hand the lock over: who asks first gets it, and a woken coroutine that
finds it taken goes back to the head of the line. A coroutine that ends while it owns a lock gives it up, and the log
says so, since the data the lock protects may be half changed.
"""

from __future__ import annotations

import weakref
from asyncio import Future, events
from collections import deque
from collections.abc import Generator
from typing import Any

from kore.reactor import trace
from kore.reactor.names import made, public
from kore.reactor.tasks import Task, current_task

# The acquire() that an asyncio task has made and not awaited yet; kore's own tasks have a field for it.
_acquiring: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def _unused(task: Any) -> LockOp | None:
    """The acquire awaitable that `task` made and has not awaited."""
    ref = task._acquiring if isinstance(task, Task) else _acquiring.get(task)
    op: LockOp | None = None if ref is None else ref()
    return op if op is not None and op._lock is not None else None


def _note_unused(task: Any, op: LockOp) -> None:
    if isinstance(task, Task):
        task._acquiring = weakref.ref(op)
    else:
        _acquiring[task] = weakref.ref(op)


@public("lockop")
class LockOp:
    """What ``lock.acquire()`` gives: await it once to own the lock."""

    # _maker keeps the task that made it from being recycled while this can still be found through it.
    __slots__ = ("__weakref__", "_lock", "_maker")
    _lock: PyLock | None
    _maker: Any

    def __await__(self) -> Generator[Any, None, None]:
        lock = self._lock
        if lock is None:
            raise RuntimeError("cannot await an acquire() twice")
        task = current_task("acquire()")
        self._lock = None
        self._maker = None
        if lock._owner is task:
            raise RuntimeError("the lock is owned by this coroutine already")
        woken = False
        while lock._owner is not None:
            future: Future[Any] = events.get_running_loop().create_future()
            if woken:
                lock._waiters.appendleft(future)
            else:
                lock._waiters.append(future)
            try:
                yield from future
            except BaseException:
                if future.done() and not future.cancelled():
                    lock._wake_one()  # it was woken for a lock it will not take
                else:
                    lock._leave(future)
                raise
            woken = True
        lock._take(task)


@public("lock")
class PyLock:
    """What ``kore.lock`` gives (reference: kore.lock). Also ``async with lock:``, whose value is None."""

    __slots__ = ("__weakref__", "_owner", "_waiters")
    _owner: Any
    _waiters: deque[Future[Any]]

    def acquire(self) -> LockOp:
        """An awaitable that waits for the lock.

        Raises RuntimeError outside of coroutines, when the caller owns the lock, and while the caller has made another
        acquire awaitable (of any lock) that it did not await yet.
        """
        task = current_task("acquire()")
        if self._owner is task:
            raise RuntimeError("the lock is owned by this coroutine already")
        if _unused(task) is not None:
            raise RuntimeError("this coroutine has an acquire() that it did not await")
        op = made(LockOp)
        op._lock = self
        op._maker = task
        _note_unused(task, op)
        return op

    def trylock(self) -> bool:
        """Own the lock if it is free; whether that was so. False for its owner. RuntimeError outside of coroutines."""
        task = current_task("trylock()")
        if self._owner is not None:
            return False
        self._take(task)
        return True

    def release(self) -> None:
        """Give the lock up and wake the first in line. Raises RuntimeError for anyone but the owner."""
        owner = self._owner
        if owner is None:
            raise RuntimeError("the lock is not owned")
        if owner is not current_task("release()"):
            raise RuntimeError("the lock is owned by another coroutine")
        if isinstance(owner, Task):
            if owner._locks is not None:
                owner._locks.discard(self)
        else:
            owner.remove_done_callback(self._owner_ended)
        self._owner = None
        self._wake_one()

    def __aenter__(self) -> LockOp:
        return self.acquire()

    async def __aexit__(self, *exc_info: object) -> None:
        self.release()

    def _take(self, task: Any) -> None:
        self._owner = task
        if not isinstance(task, Task):
            task.add_done_callback(self._owner_ended)
        elif task._locks is None:
            task._locks = {self}
        else:
            task._locks.add(self)

    def _wake_one(self) -> None:
        waiters = self._waiters
        while waiters and self._owner is None:
            future = waiters.popleft()
            if not future.done():
                future.set_result(None)
                return

    def _leave(self, future: Future[Any]) -> None:
        try:
            self._waiters.remove(future)
        except ValueError:  # a release found it cancelled and dropped it
            return

    def _owner_ended(self, task: Any) -> None:
        """Called at the end of the coroutine that still owns this lock."""
        if self._owner is task:
            self._owner = None
            trace.log(trace.LOG_ERR, f"coroutine {task.get_name()} ended without releasing its lock; released")
            self._wake_one()


def lock() -> PyLock:
    """A new lock that nobody owns (reference: kore.lock)."""
    made_lock = made(PyLock)
    made_lock._owner = None
    made_lock._waiters = deque()
    return made_lock
