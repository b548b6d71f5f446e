"""Opening logs again on SIGHUP: after a rotation, lines belong into the new file and not into the one moved away.

An access log is written by the workers, on a descriptor they have had since before their fork; its number stands in
the FileIO that everybody holds. Workers may live in another root without any right to open a file, so the parent
opens it, puts the new file under the old number with dup2(2), and hands it over the channel (unix(7), SCM_RIGHTS) to
each worker, which does the same. A worker forked later has the new one from the parent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kore.process.channel import Kind
from kore.process.log import LOG_ERR, Log, open_log
from kore.process.seat import Seat

if TYPE_CHECKING:
    from kore.application.plan import PlannedDomain

RETRY_SECONDS = 0.25
"""How soon a worker whose channel is full is offered its descriptors again."""


@dataclass(frozen=True, slots=True)
class AccessLog:
    """The access log of a domain: the file, and its descriptor in every process."""

    domain: str
    path: str
    fd: int


def access_logs(domains: Iterable[PlannedDomain]) -> tuple[AccessLog, ...]:
    """The access logs there are. Called at the start, before anything is moved."""
    logs = []
    for domain in domains:
        if domain.accesslog is not None:
            fd = domain.accesslog.fileno()
            logs.append(AccessLog(domain.name, _absolute(os.fsdecode(domain.accesslog.name), fd), fd))
    return tuple(logs)


def _absolute(path: str, fd: int) -> str:
    """The absolute path of a file that was opened as `path`, perhaps from another directory than the current one."""
    absolute = os.path.abspath(path)
    try:
        if os.path.samestat(os.stat(absolute), os.fstat(fd)):
            return absolute
    except OSError:
        pass  # nothing is there from here
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return absolute


class Reopening:
    """The parent's part of it."""

    def __init__(
        self, logs: Collection[AccessLog], log: Log, after: Callable[[float, Callable[[], None]], None]
    ) -> None:
        self._logs = logs
        self._log = log
        self._after = after
        self._offering: set[int] = set()  # workers that are offered theirs again later

    def hangup(self, seats: Iterable[Seat]) -> None:
        """Open all logs again, here and in the workers. One that can't be opened keeps the old file and says so."""
        self._log.reopen()
        opened = {log.fd for log in self._logs if self._reopen(log)}
        for seat in seats:
            if seat.channel is not None:
                seat.reopened |= opened
                if seat.worker not in self._offering:
                    self._hand_over(seat)

    def _reopen(self, log: AccessLog) -> bool:
        try:
            fd = open_log(log.path)
        except OSError as error:
            what = f"access log {log.path} of domain {log.domain!r}"
            self._log.parent(LOG_ERR, f"{what} cannot be opened again, the old one stays: {error.strerror}")
            return False
        os.dup2(fd, log.fd, inheritable=False)
        os.close(fd)
        return True

    def _hand_over(self, seat: Seat) -> None:
        """Send the worker what it has not been sent; its successor has it from the fork, and nothing in its set."""
        self._offering.discard(seat.worker)
        while seat.reopened and seat.channel is not None:
            fd = min(seat.reopened)
            if not seat.channel.send_fd(Kind.REOPEN, b"%d" % fd, fd):
                self._offering.add(seat.worker)
                self._after(RETRY_SECONDS, lambda: self._hand_over(seat))
                return
            seat.reopened.discard(fd)


def replace(body: bytes, fd: int, known: Collection[int]) -> None:
    """In a worker: put the descriptor `fd` that came with a REOPEN under the number in its body, and close it.

    Nothing is replaced but a number in `known`. Raises OSError.
    """
    try:
        number = int(body)
        if number in known and number != fd:
            os.dup2(fd, number, inheritable=False)
    finally:
        os.close(fd)
