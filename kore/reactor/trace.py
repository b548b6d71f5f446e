"""Where exceptions nobody caught and coroutine traces go: the tracer of the application, or one line of the log.

Every floor reports through `report_exception`, so that a tracer set with ``kore.tracer`` sees all of them and the log
line looks the same wherever it came from. The log itself belongs to the process floor above; it hands its function
down with `set_log`, and until then lines go to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from kore.reactor.origin import place_of

LOG_ERR = 3
LOG_NOTICE = 5

Log = Callable[[int, str], None]
"""Takes a syslog priority and one line of text without a newline."""

Tracer = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def _to_stderr(_priority: int, text: str) -> None:
    print(text, file=sys.stderr)


_log: Log = _to_stderr
_tracer: Tracer | None = None
_explain: Callable[[BaseException], object] | None = None


def set_log(function: Log | None) -> None:
    """Send log lines of the reactor to `function`; None: to standard error again."""
    global _log
    _log = _to_stderr if function is None else function


def set_explain(function: Callable[[BaseException], object] | None) -> None:
    """Have `function`, which must not raise, see every exception that was reported, to say more of it; None: nobody."""
    global _explain
    _explain = function


def log(priority: int, text: str) -> None:
    """Write one line to the log in use."""
    _log(priority, text)


def tracer(*function: Tracer) -> bool:
    """Let `function(type, value, traceback)` hear of every uncaught exception instead of the log.

    It can be set once. Raises RuntimeError when it was set before or `function` is not callable; TypeError for a
    wrong number of arguments (reference: kore.tracer).
    """
    global _tracer
    if _tracer is not None:
        raise RuntimeError("a tracer is set already")
    if len(function) != 1:
        raise TypeError(f"tracer() takes exactly one argument ({len(function)} given)")
    if not callable(function[0]):
        raise RuntimeError(f"the tracer must be callable, not {type(function[0]).__name__}")
    _tracer = function[0]
    return True


def reset_tracer() -> None:
    """Forget the tracer; a process that loads another application starts afresh."""
    global _tracer
    _tracer = None


def report_exception(where: str, exc: BaseException) -> None:
    """Report `exc`, uncaught in `where` (a label of the reference: ``coroutine``, ``pytimer_run`` ...).

    A StopIteration is ignored, an exception inside the tracer is lost. Never raises.
    """
    if isinstance(exc, StopIteration):
        return
    _tell(where, exc)
    if _explain is not None:
        _explain(exc)


def _tell(where: str, exc: BaseException) -> None:
    if _tracer is not None:
        try:
            _tracer(type(exc), exc, exc.__traceback__)
        except BaseException:  # noqa: BLE001 - the tracer is the last resort: nobody is left to tell
            return
        return
    try:
        text = repr(exc)
    except BaseException:  # noqa: BLE001 - repr() is the application's code too
        text = f"<{type(exc).__name__} whose repr() fails>"
    _log(LOG_ERR, f"{where}: uncaught exception: {text}{place_of(exc)}")


class _Unraisable:
    """An object that dies raising, which is how Python itself reaches sys.unraisablehook."""

    __slots__ = ("exc",)

    def __init__(self, exc: BaseException) -> None:
        self.exc = exc

    def __del__(self) -> None:
        raise self.exc


def report_unraisable(exc: BaseException) -> None:
    """Give `exc` to sys.unraisablehook: there is no caller it could be raised in."""
    _Unraisable(exc)
