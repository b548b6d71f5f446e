"""The report of a death: what ended a worker, how long it had lived, and what it was doing.

A wait status of 139 explains nothing. The words here are for who reads the log at night.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Death:
    """How a process ended: `status` as waitpid(2) gave it; `call` is the one it was killed for by the parent."""

    status: int
    call: str | None = None

    @property
    def clean(self) -> bool:
        """Whether the process ended by itself with exit code 0."""
        return self.status == 0

    def __str__(self) -> str:
        if not os.WIFSIGNALED(self.status):
            return f"exited with code {os.waitstatus_to_exitcode(self.status)}"
        number = os.WTERMSIG(self.status)
        if self.call is not None and number == signal.SIGKILL:
            return f"was killed for a system call its sandbox forbids, {self.call}"
        text = f"was killed by {signal_name(number)}"
        if os.WCOREDUMP(self.status):
            text += " (core dumped)"
        if number == signal.SIGSYS:
            text += ", a system call its sandbox forbids"
        elif number == signal.SIGKILL:
            text += ", by hand or for want of memory"
        return text


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15; ``signal 64`` for what has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def duration(seconds: float) -> str:
    """``850 ms``, ``12.3 s``, ``2 h 5 min``: as precise as a reader needs it."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def death_report(worker: int, pid: int, death: Death, *, uptime: float, route: str | None, restarts: int) -> str:
    """One line for the log. `uptime` in seconds; `route` is what the board shows, None when nothing.

    A busy worker notes a route when it changes, so the note may be of a request that has been answered.
    """
    doing = f"while serving {route} or idle after it" if route else "while serving nothing"
    again = f"restarts before: {restarts}"
    return f"worker {worker} (pid {pid}) {death}, {doing}, after {duration(uptime)}, {again}"
