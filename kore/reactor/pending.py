"""What a coroutine holds between the call of an operation and its await, and the checks that are made at the call.

An operation begins when it is awaited; its time limit counts from the call. Each direction of a socket or process takes
one operation at a time, and a coroutine makes one at a time.
"""

from __future__ import annotations

import weakref
from asyncio import events
from collections.abc import Callable, Generator
from typing import Any

from kore.reactor.names import made, public
from kore.reactor.tasks import current_task

Steps = Generator[Any, None, Any]

# The operation that a coroutine has made and not awaited yet.
_unused: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


@public("socketop")
class SocketOp:
    """What the operations of a socket or process give: await it once for the result."""

    # _maker keeps the task that made it from being recycled while this can still be found through it.
    __slots__ = ("__weakref__", "_maker", "_pending", "_steps", "_what")
    _maker: Any
    _pending: bool
    _steps: Callable[[], Steps] | None
    _what: str

    def __await__(self) -> Steps:
        steps = self._steps
        if steps is None:
            raise RuntimeError(f"cannot await a {self._what} twice")
        kore_loop(self._what)
        self._steps = self._maker = None
        try:
            return (yield from steps())
        finally:
            self._pending = False


class Pending:
    """The operation of one direction that was made last: while it is pending there is no other."""

    __slots__ = ("_op",)

    def __init__(self) -> None:
        self._op: weakref.ref[SocketOp] | None = None

    def make(self, what: str, steps: Callable[[], Steps]) -> SocketOp:
        """An operation; `what` names it in errors.

        Raises RuntimeError while another is pending here, and when the coroutine has made one that it did not await.
        """
        task = current_task(what)
        before = None if self._op is None else self._op()
        if before is not None and before._pending:
            raise RuntimeError(f"{what}: a {before._what} is pending here already; await it first")
        ref = _unused.get(task)
        other = None if ref is None else ref()
        if other is not None and other._steps is not None:
            raise RuntimeError(f"{what}: this coroutine has a {other._what} that it did not await")
        op = made(SocketOp)
        op._maker = task
        op._pending = True
        op._steps = steps
        op._what = what
        self._op = _unused[task] = weakref.ref(op)
        return op


def length_of(maxlen: int) -> int:
    """How many bytes may be received. Raises TypeError, ValueError."""
    if not hasattr(maxlen, "__index__"):
        raise TypeError(f"maxlen must be an int, not {type(maxlen).__name__}")
    length: int = maxlen.__index__()
    if length < 1:
        raise ValueError(f"maxlen must be at least 1, not {length}")
    return length


def until(what: str, timeout: int | None) -> float | None:
    """The time of the loop's clock that is `timeout` milliseconds from now."""
    seconds = milliseconds("timeout", timeout)
    return None if seconds is None else kore_loop(what).time() + seconds


def bytes_of(data: Any) -> bytes:
    """Data for sending: any bytes-like object, which may change afterwards; a str as UTF-8. Raises TypeError."""
    if isinstance(data, str):
        return data.encode()
    try:
        return bytes(memoryview(data))
    except TypeError:
        raise TypeError(f"data must be bytes-like or a str, not {type(data).__name__}") from None


def kore_loop(what: str) -> Any:
    """The running loop, which must be kore's. Raises RuntimeError, naming `what`, outside of coroutines."""
    current_task(what)
    loop: Any = events.get_running_loop()
    if not hasattr(loop, "driver"):
        raise RuntimeError(f"{what} needs kore's event loop")
    return loop


def milliseconds(what: str, timeout: int | None) -> float | None:
    """A timeout as the reference gives it (milliseconds; None and -1: for ever), in seconds. Raises TypeError."""
    if timeout is None:
        return None
    if not isinstance(timeout, int):
        raise TypeError(f"{what} must be an int of milliseconds or None, not {type(timeout).__name__}")
    if timeout < -1:
        raise ValueError(f"{what} must not be negative, not {timeout}")
    return None if timeout == -1 else timeout / 1000
