"""Lines: an fd of ours and its directions, on which coroutines wait that may be killed at any moment.

A coroutine that is killed or times out cancels its operation, but a cancel may come too late: the bytes, or the
connection, were taken from the kernel already. So a result never belongs to the coroutine. It belongs to the line of
its direction, where whoever comes next finds it, and nothing that a peer sent is lost.

An fd is closed only when no operation is in flight on it: the entry of a ring names it by number until the kernel
looks, and a poller knows it by number too. Closed and opened anew in between, it would be a stranger's.
"""

from __future__ import annotations

import os
from asyncio import Future, TimerHandle, events
from collections.abc import Callable, Generator
from errno import ECANCELED, EINTR, errorcode
from typing import Any

from kore.driver import Operation, passed_fds
from kore.reactor.waits import wake

NOTHING: Any = object()
"""No result is there."""

CLOSED: Any = object()
"""What a wait gives on a line that was closed."""

Begin = Callable[[Callable[[Any], None]], Operation]
"""Starts the operation that a coroutine wants, with the callback for its result."""

_RETRIED = (-ECANCELED, -EINTR)
"""Results that say nothing: of an operation that was given up, or interrupted."""


class Descriptor:
    """An fd of ours; `release` closes it. It may be made before there is a loop, and closed without one."""

    __slots__ = ("__weakref__", "_release", "closed", "fd", "in_flight")

    def __init__(self, fd: int, release: Callable[[], None]) -> None:
        self.fd = fd
        self.closed = False
        self.in_flight = 0
        self._release: Callable[[], None] | None = release

    def close(self) -> None:
        """Close the fd, now or with the last completion of what is in flight. Any number of times."""
        self.closed = True
        if not self.in_flight:
            self._close_now()

    def ended(self) -> None:
        """One operation is over."""
        self.in_flight -= 1
        if self.closed and not self.in_flight:
            self._close_now()

    def _close_now(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()

    # The driver was closed with operations in flight: their completions never came.
    def __del__(self) -> None:
        self._close_now()


class Line:
    """One direction of a descriptor: at most one operation in flight, its result, and the coroutine that waits.

    What a receiving line (`keeps`) brings after its coroutine has gone is kept for the next; the outcome of a sending
    one is of no use to anybody else.
    """

    __slots__ = ("_expired", "_given_up", "_loop", "_operation", "_result", "_waiter", "descriptor", "keeps")

    def __init__(self, descriptor: Descriptor, *, keeps: bool) -> None:
        self.descriptor = descriptor
        self.keeps = keeps
        self._loop: Any = None  # the one that the operation in flight is for
        self._operation: Operation | None = None
        self._given_up = False  # an operation in flight has been cancelled; nobody holds on to it any more
        self._result: Any = NOTHING
        self._waiter: Future[Any] | None = None
        self._expired = False

    def wait(
        self, begin: Begin, until: float | None = None, check: Callable[[], None] | None = None,
    ) -> Generator[Any, None, Any]:
        """The result of an operation as `begin` starts it, or of one that nobody took. CLOSED when it was closed.

        Raises TimeoutError when there is none by `until` (seconds of the loop's clock), and what `check` raises, which
        is called first and whenever the coroutine goes on.
        """
        timer: TimerHandle | None = None
        loop = events.get_running_loop()
        self._expired = False
        if (self._operation is not None or self._given_up) and self._loop is not loop and self._loop.is_closed():
            self._done(-ECANCELED)  # went with its loop
        try:
            while True:
                if check is not None:
                    check()
                if self._result is not NOTHING:
                    break
                if self.descriptor.closed:
                    return CLOSED
                if self._expired:
                    raise TimeoutError
                if self._operation is None and not self._given_up:
                    self._loop = loop
                    self.descriptor.in_flight += 1
                    try:
                        self._operation = begin(self._done)
                    except BaseException:
                        self.descriptor.ended()
                        raise
                if until is not None and timer is None:
                    timer = loop.call_at(until, self._expire)
                self._waiter = loop.create_future()
                yield from self._waiter
        except BaseException:
            self._give_up()
            raise
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
        result, self._result = self._result, NOTHING
        return result

    def put_back(self, result: Any) -> None:
        """What of a result was not wanted, for who comes next."""
        self._result = result

    def poke(self) -> None:
        """Have the coroutine that waits, if one does, look again at what it checks."""
        if self._waiter is not None:
            wake(self._waiter)

    def _expire(self) -> None:
        self._expired = True
        self.poke()

    def close(self) -> None:
        """End what is in flight and let the coroutine that waits go on. Called after the descriptor's close()."""
        self._give_up()
        result, self._result = self._result, NOTHING
        _dispose(result)
        self.poke()

    def _give_up(self) -> None:
        operation, self._operation = self._operation, None
        if operation is not None:
            self._given_up = True
            operation.cancel()
        elif not (self._given_up or self.keeps):
            self._result = NOTHING

    def _done(self, result: Any) -> None:
        self._operation = None
        given_up, self._given_up = self._given_up, False
        if self.descriptor.closed:
            if self.keeps:
                _dispose(result)
        elif not (type(result) is int and result in _RETRIED) and (self.keeps or not given_up):
            self._result = result
        self.descriptor.ended()
        self.poke()


def _dispose(result: Any) -> None:
    """Close what fds came with a result that nobody will take: a connection, or those passed in a message."""
    if type(result) is int:
        if result >= 0:
            os.close(result)
    elif type(result) is tuple:
        for fd in passed_fds(result):
            os.close(fd)


def failure(what: str, result: int) -> RuntimeError:
    """The error that the reference has for whatever the kernel says, with what the kernel said as its cause."""
    error = OSError(-result, os.strerror(-result))
    text = RuntimeError(f"{what}: {error.strerror} ({errorcode.get(-result, -result)})")
    text.__cause__ = error
    return text
