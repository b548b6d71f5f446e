"""A child process as the loop knows it: something to poll for news, its status, signals to it.

One of our own is seen through a pidfd, of this child alone: no SIGCHLD, so nobody's status is stolen, and no signal is
ever sent to a process that has only got the number. In the sandbox children are the spawner's, and what is polled is
the channel on which it tells of them (`kore.sandbox.spawner.Program`, which acts like a Child).
"""

from __future__ import annotations

import os
import signal
from typing import Protocol

STATUS_LOST = -1
"""The status of a child that somebody else has waited for."""


class Child(Protocol):
    """A process that was started, and the descriptor that has news of it."""

    pid: int
    status: int | None

    def fileno(self) -> int:
        """What is readable when there may be news."""

    def look(self) -> int | None:
        """Reap it if it has ended: the status of waitpid(2), or STATUS_LOST."""

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing happens when it has ended."""

    def close(self) -> None:
        """Hear no more of it. Any number of times."""


class OwnChild:
    """A child of this process. Owns its pidfd. Raises OSError as pidfd_open(2) does."""

    __slots__ = ("_pidfd", "pid", "status")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None
        self._pidfd = os.pidfd_open(pid)

    def fileno(self) -> int:
        """See Child."""
        return self._pidfd

    def look(self) -> int | None:
        """See Child."""
        if self.status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = self.pid, STATUS_LOST
            if pid:
                self.status = status
        return self.status

    def send_signal(self, number: int) -> None:
        """See Child."""
        if self.status is None and self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass  # somebody else has waited for it

    def close(self) -> None:
        """See Child."""
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            os.close(fd)
