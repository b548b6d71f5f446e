"""What the poller is asked about one fd: the sum of what everyone who waits on that fd wants to hear.

A poller knows an fd once, while a receive, a poll and a stream may wait on it at the same time. So each fd has one
entry, which adds up the poll(2) bits and tells the poller of a change. The bits are those of poll(2) everywhere;
a platform's poller translates.

Errors and hang-ups are reported whether asked for or not, and go on being reported. So an entry that waits for nothing
is taken out of the poller instead of being registered for nothing.
"""

from __future__ import annotations

import errno
from select import POLLERR, POLLHUP, POLLIN, POLLOUT
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kore.readiness.operation import Waiting

NOT_REGISTERED = -1
"""The mask of an fd the poller does not know. Zero is another thing: an fd watched for errors and hang-ups alone."""

GONE = POLLERR | POLLHUP
ALWAYS_READY = POLLIN | POLLOUT
"""What poll(2) says of files that never make anyone wait."""


class Poller(Protocol):
    """What a platform gives: how to be told of readiness, level-triggered."""

    listener_flags: int
    """Bits beside POLLIN with which a listening socket is watched."""

    def poll(self, timeout: float | None, most: int, /) -> list[tuple[int, int]]:
        """Wait (seconds; None: for ever) for at most so many pairs of fd and poll(2) bits. An fd may come twice."""

    def change(self, fd: int, old: int, new: int) -> None:
        """Ask about `new` where `old` was asked; either may be NOT_REGISTERED. EPERM: the fd is always ready.

        The same twice asks again, in case the fd was closed and its number used again behind our back.
        """

    def rotate(self, fd: int, mask: int) -> None:
        """After an accept: to the end of the queue of processes that wait on this listener."""

    def close(self) -> None:
        """Release the poller's fd."""


class Entry(Protocol):
    """One fd in the driver's table: a Watch, a stream, or the driver's own wake pipe."""

    fd: int
    mask: int
    """What the poller was asked, or NOT_REGISTERED."""
    plain: int
    """The event that the driver may answer with one read and `received`; no event if there is none such."""
    waiters: Sequence[Waiting]

    def wants(self) -> int:
        """What the poller should be asked."""

    def ready(self, events: int, /) -> None:
        """The poller reported `events`."""


class Watch:
    """An fd on which operations wait."""

    __slots__ = ("fd", "mask", "plain", "poller", "waiters")

    def __init__(self, poller: Poller, fd: int) -> None:
        self.poller = poller
        self.fd = fd
        self.mask = NOT_REGISTERED
        self.plain = -1
        self.waiters: Sequence[Waiting] = ()

    def wants(self) -> int:
        """The sum of what its operations want."""
        return wanted_by(self.waiters) if self.waiters else NOT_REGISTERED

    def ready(self, events: int) -> None:
        """Let those go on who waited for this; an error or a hang-up is for everyone."""
        let_go_on(self.waiters, events)
        arm(self.poller, self)


def wanted_by(waiters: Sequence[Waiting]) -> int:
    """The poll(2) bits that these operations wait for."""
    mask = 0
    for waiter in waiters:
        mask |= waiter.want
    return mask


def let_go_on(waiters: Sequence[Waiting], events: int) -> None:
    """Tell the operations that waited for one of `events`. One may be cancelled by the callback of another."""
    for waiter in tuple(waiters):
        if events & (waiter.want | GONE) and not waiter.over:
            waiter.ready(events & (waiter.want | GONE))


def arm(poller: Poller, entry: Entry) -> None:
    """Tell the poller what `entry` wants now, if that is not what it was told before."""
    wanted = entry.wants()
    if wanted != entry.mask:
        try:
            poller.change(entry.fd, entry.mask, wanted)
        except OSError as error:
            if wanted != NOT_REGISTERED:
                raise
            # Whoever owned the fd closed it first, and with that the poller forgot it.
            if error.errno not in (errno.ENOENT, errno.EBADF):
                raise
        entry.mask = wanted
