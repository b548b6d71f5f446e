"""epoll(7), level-triggered: the poller of Linux, for where io_uring is forbidden or missing.

Level-triggered, because then nothing is lost when a callback raises in the middle of a batch, and a read need not go
on until EAGAIN.

Listeners are shared by all workers and watched with EPOLLEXCLUSIVE, so that a connection wakes one idle worker and not
all of them. Exclusive waiters are woken in the order of the listener's wait queue; the first in it would get every
connection that finds it idle. So after an accept the listener is taken out and put back: its place is then the last.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from select import EPOLLEXCLUSIVE, epoll

from kore.errors import EngineError
from kore.readiness.driver import ReadinessDriver
from kore.readiness.watch import NOT_REGISTERED


class EpollPoller:
    """See kore.readiness.watch.Poller. The bits of poll(2) and epoll(7) are the same on Linux."""

    listener_flags = EPOLLEXCLUSIVE

    def __init__(self) -> None:
        try:
            self.epoll = epoll()
        except OSError as error:
            hint = "too many open files, or out of memory"
            raise EngineError("epoll_create1", error.errno or 0, error.strerror or "", hint) from error
        self.poll: Callable[[float | None, int], list[tuple[int, int]]] = self.epoll.poll

    def change(self, fd: int, old: int, new: int) -> None:
        """See kore.readiness.watch.Poller."""
        if new == NOT_REGISTERED:
            self.epoll.unregister(fd)
        elif old == NOT_REGISTERED:
            self.register(fd, new)
        elif (old | new) & EPOLLEXCLUSIVE:
            # epoll_ctl(2): EPOLL_CTL_MOD refuses EPOLLEXCLUSIVE.
            self.rotate(fd, new)
        else:
            try:
                self.epoll.modify(fd, new)
            except FileNotFoundError:
                # The fd was closed and its number used again, behind our back.
                self.epoll.register(fd, new)

    def register(self, fd: int, mask: int) -> None:
        """Add, also where a copy of a closed fd kept an old registration alive."""
        try:
            self.epoll.register(fd, mask)
        except FileExistsError:
            self.epoll.unregister(fd)
            self.epoll.register(fd, mask)

    def rotate(self, fd: int, mask: int) -> None:
        """See kore.readiness.watch.Poller."""
        try:
            self.epoll.unregister(fd)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        self.epoll.register(fd, mask)

    def close(self) -> None:
        """See kore.readiness.watch.Poller."""
        self.epoll.close()


class EpollDriver(ReadinessDriver):
    """The driver contract on epoll. EngineError: there is none to be had."""

    name = "epoll"

    def __init__(self) -> None:
        super().__init__(EpollPoller())
