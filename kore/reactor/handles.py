"""The handles a loop gives for callbacks: asyncio's, made in a third of the time.

`asyncio.Handle.__init__` asks the loop for its debug mode and keeps a traceback for it. These leave both out; the loop
makes asyncio's own handles while it is in debug mode, where the traceback is wanted.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, events
from collections.abc import Callable
from contextvars import Context
from typing import Any


def _nothing() -> None:
    """What a cancelled handle holds: nothing of the caller's is kept alive."""


class Soon(events.Handle):
    """A callback in the ready queue. Cancelled, it is a callback that does nothing."""

    __slots__ = ()
    _repr = None
    _source_traceback = None
    _cancelled = False  # not a field: nothing has to be stored for it, and the loop finds it on any handle

    # The base's is left out on purpose: see the file's head. No field that is not needed to run is stored.
    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context) -> None:
        self._callback = callback
        self._args = args
        self._context = context

    def __repr__(self) -> str:
        return "<Handle cancelled>" if self.cancelled() else f"<Handle {self._callback!r}>"

    def cancel(self) -> None:
        """Do not call back."""
        self._callback = _nothing
        self._args = ()

    def cancelled(self) -> bool:
        """Whether cancel() was called."""
        return self._callback is _nothing


class Timer(events.TimerHandle):
    """A callback in the heap of timers."""

    __slots__ = ()
    _repr = None
    _source_traceback = None

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: AbstractEventLoop,
        context: Context,
    ) -> None:
        self._when = when
        self._scheduled = True
        self._context = context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False

    def cancel(self) -> None:
        """Do not call back."""
        if not self._cancelled:
            self._cancelled = True
            self._callback = _nothing
            self._args = ()
            self._loop._timer_handle_cancelled(self)  # type: ignore[attr-defined]
