"""The parent's side of the workers' filters: a call that is deadly waits here, is written down, and ends who made it.

A worker's filter stops the thread that makes such a call and tells the parent, which has the only copy of the filter's
listener. The call is never made: the parent reads what it asks for, logs it, and kills. So a death has a name,
where the kernel's own way of killing leaves a number that says nothing.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kore.process.channel import ChannelError
from kore.process.log import LOG_ERR, Log
from kore.sandbox import notification
from kore.sandbox.decoding import call_text
from kore.sandbox.machine import name_of, this_machine
from kore.sandbox.notification import Notification


@dataclass(slots=True)
class _Watched:
    """The filter of one worker's process."""

    worker: int
    pid: int
    fd: int
    fatal: str | None = None
    """The name of the call it is killed for."""


class Supervision:
    """The listeners of all workers. The parent calls join() when one comes, and leave() after a death."""

    def __init__(
        self, selector: selectors.BaseSelector, log: Log, who: Callable[[int], str] = "worker {}".format
    ) -> None:
        """`who` names, for the log, the process with an id."""
        self._who = who
        self._selector = selector
        self._log = log
        self._watched: dict[int, _Watched] = {}

    def join(self, worker: int, pid: int, fd: int | None) -> None:
        """Take the listener `fd` of the process `pid`. Raises ChannelError for what is none, and for a second one."""
        if fd is None or worker in self._watched or not notification.is_listener(fd):
            if fd is not None:
                os.close(fd)
            raise ChannelError("a descriptor that is no listener, or a second one")
        watched = self._watched[worker] = _Watched(worker, pid, fd)
        self._selector.register(fd, selectors.EVENT_READ, lambda: self._hear(watched))

    def leave(self, worker: int) -> str | None:
        """Its process is dead: close the listener. The name of the call that it was killed for, if it was."""
        watched = self._watched.pop(worker, None)
        if watched is None:
            return None
        self._forget(watched)
        return watched.fatal

    def close(self) -> None:
        """Close all listeners without a word, in a child or at the end; the selector is closed already."""
        for watched in self._watched.values():
            if watched.fd >= 0:
                os.close(watched.fd)
        self._watched.clear()

    def _forget(self, watched: _Watched) -> None:
        if watched.fd >= 0:
            self._selector.unregister(watched.fd)
            os.close(watched.fd)
            watched.fd = -1

    def _hear(self, watched: _Watched) -> None:
        found = notification.receive(watched.fd)
        if found is not None:
            self._end(watched, found)
        elif notification.poll(watched.fd) & select.POLLHUP:
            # Nobody is under the filter any more, and the fd would wake us for ever.
            self._forget(watched)

    def _end(self, watched: _Watched, found: Notification) -> None:
        """Write down what the process wants, and kill it while its call still waits."""
        machine = this_machine()
        text = call_text(found.number, found.arguments, machine, partial(notification.read_memory, found.thread))
        pid = notification.process_of(found.thread)
        if pid in (None, watched.pid):
            # Nothing is reaped but by the parent, so the pid is still its worker's.
            watched.fatal = watched.fatal or name_of(found.number, machine)
            self._log.parent(
                LOG_ERR, f"{self._who(watched.worker)} (pid {watched.pid}) is killed: its sandbox forbids {text}"
            )
            os.kill(watched.pid, signal.SIGKILL)
        else:
            self._end_other(watched, found, pid, text)

    def _end_other(self, watched: _Watched, found: Notification, pid: int, text: str) -> None:
        """A process that the worker made, where its application has opened the sandbox for that."""
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return  # it is gone
        try:
            if notification.still_waits(watched.fd, found):  # so the pid is that of the process that waits
                self._log.parent(
                    LOG_ERR, f"process {pid} of {self._who(watched.worker)} is killed: its sandbox forbids {text}"
                )
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(fd)
