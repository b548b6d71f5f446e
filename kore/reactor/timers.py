"""``kore.timer``: call a function after some milliseconds, once or again and again.

The callback runs in no coroutine. A repeating timer is set again from the time of the turn it fired in, so it fires at
most once a turn and never tries to catch up; a delay of 0 means once every turn.
"""

from __future__ import annotations

import asyncio
import time as _time
import types
from typing import Any

from kore.reactor import tasks, trace
from kore.reactor.names import made, public

TIMER_ONESHOT = 1

_NOTHING = object()

# A later expiry is never: no machine runs that long, and the sum with the clock stays a number of sensible size.
_DELAY_MS_MAX = 2**53


@public("timer")
class PyTimer:
    """What ``kore.timer`` gives. It stays alive by itself until it has fired or is closed."""

    __slots__ = ("_data", "_delay", "_handle", "_loop", "_method", "_repeat")
    _loop: Any
    _method: Any
    _delay: float
    _repeat: bool
    _data: object
    _handle: asyncio.TimerHandle | None

    def close(self) -> bool:
        """No more calls, also from inside the callback. Any number of times; always True."""
        handle = self._handle
        self._handle = None
        self._repeat = False
        if handle is not None:
            handle.cancel()
        return True

    def _fire(self) -> None:
        loop = self._loop
        self._handle = loop.call_at(loop.turn_time + self._delay, self._fire) if self._repeat else None
        try:
            result = self._method() if self._data is _NOTHING else self._method(self._data)
        except BaseException as exc:  # noqa: BLE001 - a timer never ends the worker
            trace.report_exception("pytimer_run", exc)
        else:
            if type(result) is types.CoroutineType:
                loop.start(result)


def timer(method: Any, delay: int, flags: int, /, *, data: object = _NOTHING) -> PyTimer:
    """Call `method` after `delay` milliseconds, again and again, or once with TIMER_ONESHOT in `flags`.

    `data`, when given, is its only argument. A coroutine that `method` returns is run as a task. Raises TypeError for
    wrong types, ValueError for a negative delay, RuntimeError for other flags and in the parent, before there is a
    loop to run on (reference: kore.timer).
    """
    if not callable(method):
        raise TypeError(f"timer() wants a callable, not {type(method).__name__}")
    for name, value in (("delay", delay), ("flags", flags)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if delay < 0:
        raise ValueError(f"delay must not be negative, not {delay}")
    if flags & ~TIMER_ONESHOT:
        raise RuntimeError(f"flags must be 0 or TIMER_ONESHOT, not {flags}")
    loop: Any = tasks.running_loop()
    if loop is None or not hasattr(loop, "turn_time"):
        raise RuntimeError("timer() needs kore's event loop: call it in a worker (workerstart), not in the parent")
    op = made(PyTimer)
    op._loop = loop
    op._method = method
    op._delay = min(delay, _DELAY_MS_MAX) / 1000
    op._repeat = not flags & TIMER_ONESHOT
    op._data = data
    op._handle = loop.call_at(loop.time() + op._delay, op._fire)
    return op


def time() -> int:
    """Milliseconds of the monotonic clock (reference: kore.time)."""
    return _time.monotonic_ns() // 1_000_000
