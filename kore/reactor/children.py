"""A child process as the loop knows it: how to wait for news of it, its status, killing it.

One of our own is waited for as the engine can (pidfd or kqueue), this child alone: no SIGCHLD, so nobody's status is
stolen, and no signal is ever sent to a process that has only got the number. In the sandbox children are the spawner's,
and what is polled is the channel on which it tells of them (`kore.sandbox.spawner.Program`, which acts like a Child).
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from kore import driver as contract
from kore.driver import Result

STATUS_LOST = -1
"""The status of a child that somebody else has waited for."""


class Child(Protocol):
    """A process that was started."""

    pid: int
    status: int | None

    def wait(self, driver: Any, callback: Result) -> None:
        """Have `driver` call back once, with 0 or more when there may be news, with a negated errno when there is no
        hearing of it. Raises OSError when the system knows no such child.
        """

    def look(self) -> int | None:
        """Reap it if it has ended: the status of waitpid(2), or STATUS_LOST."""

    def kill(self) -> None:
        """SIGKILL; nothing happens when it has ended. Raises PermissionError when it is another user's by now."""

    def close(self) -> None:
        """Hear no more of it. Any number of times."""


class OwnChild:
    """A child of this process."""

    __slots__ = ("_watched", "pid", "status")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None
        self._watched: contract.Child | None = None

    def wait(self, driver: Any, callback: Result) -> None:
        """See Child."""
        if self._watched is None:
            self._watched = driver.child(self.pid, callback)
        else:
            self._watched.wait(callback)

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

    def kill(self) -> None:
        """See Child."""
        if self.status is None and self._watched is not None:
            try:
                self._watched.kill()
            except ProcessLookupError:
                pass  # somebody else has waited for it

    def close(self) -> None:
        """See Child."""
        if self._watched is not None:
            self._watched.close()
