"""The fork itself, for every child of the parent: no signal in between is noted for nobody."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from typing import NoReturn

Blocked = Iterable[int]
"""The signal mask to go back to, once a child has its own handlers."""


def fork(child: Callable[[Blocked], NoReturn]) -> int:
    """The pid of a new process, which does `child`; that never comes back to the parent's stack. Raises OSError."""
    # Blocked until the child has its own handlers: a signal in between would be noted for nobody.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            child(blocked)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pid
