"""The functions an application calls to speak to its processes: kore.log, worker, fatal, shutdown and their kin.

Arguments are positional as in the reference; what each returns is in the notes on the API, sections 7.2 to 7.12.
"""

from __future__ import annotations

import signal as signals
from typing import NoReturn

from kore.application.declared import application
from kore.process import role

UNTRAPPABLE = frozenset({signals.SIGKILL, signals.SIGSTOP})
"""signal(7): no process may catch them."""


def log(priority: int, text: str, /) -> bool:
    """Write `text` to the server's log and return True; `priority` is LOG_ERR, LOG_NOTICE or LOG_INFO.

    Control characters are escaped. A worker that logs faster than the log is written loses lines, which are counted.
    Raises TypeError when `priority` is no int or `text` no str. Source: reference, "log".
    """
    if not isinstance(priority, int):
        raise TypeError(f"log: priority must be an int, not {type(priority).__name__}")
    if not isinstance(text, str):
        raise TypeError(f"log: text must be a str, not {type(text).__name__}")
    role.role.log(priority, text)
    return True


def worker(*_ignored: object) -> int | None:
    """The id of this worker, 1 and up; None in the parent. Source: reference, "worker"."""
    return role.role.worker


def fatal(reason: object = "fatal", /, *_ignored: object) -> NoReturn:
    """Log `reason` and end this process with exit code 1; the parent replaces a worker, or stops by its policy.

    Never returns, whatever the argument. Source: reference, "fatal".
    """
    role.role.fatal(_reason(reason, "fatal"))


def fatalx(reason: object = "fatalx", /, *_ignored: object) -> NoReturn:
    """Log `reason` and stop the whole server with exit code 1. Never returns."""
    role.role.fatalx(_reason(reason, "fatalx"))


def shutdown() -> bool:
    """Ask the parent to stop the server as SIGQUIT does, exit code 0; returns True at once. In the parent: fatal."""
    return role.role.shutdown()


def setname(name: str, /) -> None:
    """Set the first word of the process titles; call it before the start. Raises TypeError, ValueError.

    Source: reference, "setname".
    """
    application.name(name)


def sigtrap(signum: int, /) -> None:
    """Trap a signal, so that the application's `signal` hook is called for it in a worker.

    Before the start it holds for all workers, and the parent passes the signal on to them; in a worker it holds
    for that worker. Raises TypeError, ValueError for a number that is no signal or cannot be trapped.
    """
    if not isinstance(signum, int):
        raise TypeError(f"sigtrap: a signal number is an int, not {type(signum).__name__}")
    if signum not in signals.valid_signals() or signum in UNTRAPPABLE:
        raise ValueError(f"sigtrap: signal {signum} cannot be trapped")
    role.role.trap(int(signum))


def _reason(reason: object, name: str) -> str:
    return reason if isinstance(reason, str) else f"{name} called without a reason ({reason!r})"
