"""The handles a loop gives for callbacks: asyncio's, reduced to what running them needs.

A handle is made for every wake-up of every coroutine, so it stores two things: the context, and the whole call, the
callback and its arguments in the one tuple that the interpreter made when call_soon() was called. A cancelled handle
stays where it is and calls a function that does nothing.
"""

from __future__ import annotations

import sys
from asyncio import AbstractEventLoop, events, format_helpers
from contextvars import Context, copy_context
from typing import Any


def _nothing() -> None:
    """What a cancelled handle calls: nothing of the caller's is kept alive."""


_NOTHING = (_nothing,)

Call = tuple[Any, ...]
"""A callback and its arguments."""


# What asyncio's debug mode asks a handle for.
_callback: Any = property(lambda handle: handle._args[0])


class Soon(events.Handle):
    """A callback in the ready queue. Made bare: who makes one sets `_args` and `_context`."""

    # asyncio's fields that nothing is stored in: _args is the whole call, the rest is only for asyncio's debug mode.
    __slots__ = ()
    _context: Context
    _repr = None
    _source_traceback: Any = None
    _callback = _callback

    __init__ = object.__init__  # an __init__ in Python took 0.1 us of the 0.2 that call_soon() takes

    def __repr__(self) -> str:
        return "<Handle cancelled>" if self.cancelled() else f"<Handle {self._args[0]!r}>"

    def cancel(self) -> None:
        """Do not call back."""
        self._args = _NOTHING

    def cancelled(self) -> bool:
        """Whether cancel() was called."""
        return self._args is _NOTHING


class TracedSoon(Soon):
    """One of debug mode, which knows where it was asked for."""

    __slots__ = ("_source_traceback",)


def soon(call: Call, context: Context | None) -> Soon:
    """A handle for `call`, in `context` or a copy of the current one."""
    handle: Soon = Soon()
    handle._args = call
    handle._context = copy_context() if context is None else context
    return handle


def traced_soon(call: Call, context: Context | None) -> TracedSoon:
    """The same, with the stack of who called call_soon()."""
    handle: TracedSoon = TracedSoon()
    handle._args = call
    handle._context = copy_context() if context is None else context
    handle._source_traceback = format_helpers.extract_stack(sys._getframe(2))
    return handle


class Timer(events.TimerHandle):
    """A callback in the heap of timers, and in the ready queue once it is due."""

    __slots__ = ()
    _repr = None
    _source_traceback: Any = None
    _callback = _callback

    def __init__(self, when: float, call: Call, loop: AbstractEventLoop, context: Context) -> None:
        self._when = when
        self._args = call
        self._loop = loop
        self._context = context
        self._scheduled = True
        self._cancelled = False

    def __repr__(self) -> str:
        what = "cancelled" if self._cancelled else repr(self._args[0])
        return f"<TimerHandle when={self._when} {what}>"

    def cancel(self) -> None:
        """Do not call back."""
        if not self._cancelled:
            self._cancelled = True
            self._args = _NOTHING
            self._loop._timer_handle_cancelled(self)  # type: ignore[attr-defined]


class TracedTimer(Timer):
    """One of debug mode, which knows where it was asked for."""

    __slots__ = ("_source_traceback",)

    def __init__(self, when: float, call: Call, loop: AbstractEventLoop, context: Context) -> None:
        super().__init__(when, call, loop, context)
        frame = sys._getframe(2)
        if frame.f_code is type(loop).call_later.__code__ and frame.f_back is not None:
            frame = frame.f_back
        self._source_traceback = format_helpers.extract_stack(frame)
