"""The parent's side of tracing: it hands the workers' listeners on to the tracer, and keeps what is found.

The parent has copies of the listeners, so that calls only wait when a tracer dies, until the next one has them; without
any copy the kernel fails them with ENOSYS. A tracer that dies again and again is the end of tracing, and that is said.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass

from kore.process import tracer
from kore.process.channel import ChannelError, Kind
from kore.process.log import LOG_ERR, LOG_INFO, LOG_NOTICE, Log
from kore.process.services import Row, Service
from kore.process.sites import FULL, RULES_MAX, SITES_MAX, Sites, site_of_body
from kore.process.tracer import LABEL, Brief
from kore.sandbox import notification

DEATHS_MAX = 5
"""Deaths of tracers that did not live long, in a row; then tracing ends."""


@dataclass(slots=True)
class _Watched:
    """What the parent keeps of one worker's process."""

    pid: int
    listener: int


def free_signal(trapped: Iterable[int]) -> int:
    """The highest real-time signal that nobody has a handler for and the application does not trap."""
    taken = set(trapped)
    for number in range(signal.SIGRTMAX, signal.SIGRTMIN - 1, -1):
        if number not in taken and signal.getsignal(number) is signal.SIG_DFL:
            return number
    return int(signal.SIGRTMAX)


class Tracing:
    """What the tracer is given and what it finds. Its process is a service of the parent, before the first worker."""

    def __init__(self, log: Log, brief: Brief) -> None:
        self.brief = brief
        self.sites = Sites()
        self._log = log
        self._told_full = False
        self._watched: dict[int, _Watched] = {}
        self._pipes: dict[int, list[int]] = {}
        """By worker: the reading end of the pipe for its stacks and, until it is forked, the writing end."""
        self.service: Service | None = None
        """The tracer's process; the parent makes it from the row."""

    def row(self) -> Row:
        """What is different about a tracer's life."""
        return Row(
            name=LABEL.strip("[]"),
            what="the tracer",
            run=lambda place: tracer.run(self.brief, place.channel),
            says_ready=False,
            deaths_max=DEATHS_MAX,
            without=", and calls that it had not answered wait",
            begun=self._begun,
            hear=self._hear,
            given_up=self._end,
        )

    def _begun(self, again: bool) -> None:
        if not again:
            self._log.parent(
                LOG_NOTICE, "seccomp_tracing: the sandbox's filter forbids nothing; what it would forbid is told of"
            )
        for worker, watched in self._watched.items():
            self._hand_over(worker, watched, again=again)

    def _end(self, reason: str) -> None:
        """Give up: whoever calls what the filter forbids gets ENOSYS from the kernel when the listeners are closed."""
        self._log.parent(
            LOG_ERR, f"tracing ends: {reason}; what the sandbox forbids fails with ENOSYS until the server is restarted"
        )
        for worker in list(self._watched):
            self.leave(worker)

    def close(self) -> None:
        """Close all descriptors without a word, in a child or at the end."""
        for watched in self._watched.values():
            os.close(watched.listener)
        for pipe in self._pipes.values():
            os.close(pipe[0])
        self._watched.clear()
        self._pipes.clear()

    # Workers.

    def pipe(self, worker: int) -> int:
        """A pipe for the stacks of the process about to be forked: the writing end, for the child. Raises OSError.

        Neither end waits: a worker that nobody reads loses what it writes there and goes on.
        """
        self._drop_pipe(worker)
        self._pipes[worker] = list(os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        return self._pipes[worker][1]

    def forked(self, worker: int) -> None:
        """In the parent: the child has its end."""
        os.close(self._pipes[worker].pop())

    def _drop_pipe(self, worker: int) -> None:
        for fd in self._pipes.pop(worker, ()):
            os.close(fd)

    def join(self, worker: int, pid: int, fd: int | None) -> None:
        """Hand on the listener `fd` of the process `pid`. Raises ChannelError for what is none, and a second one."""
        if fd is None or worker in self._watched or not notification.is_listener(fd):
            if fd is not None:
                os.close(fd)
            raise ChannelError("a descriptor that is no listener, or a second one")
        if self.service is None or self.service.ended:
            os.close(fd)
            return
        watched = self._watched[worker] = _Watched(pid, fd)
        self._hand_over(worker, watched, again=False)

    def leave(self, worker: int) -> str | None:
        """Its process is dead, or tracing ends: close the copies. None: tracing kills nobody."""
        watched = self._watched.pop(worker, None)
        if watched is not None:
            os.close(watched.listener)
            self._drop_pipe(worker)
        return None

    def _hand_over(self, worker: int, watched: _Watched, *, again: bool) -> None:
        service = self.service
        if service is None or service.channel is None:
            return  # the next tracer gets it
        body = b"%d %d %d" % (worker, watched.pid, again)
        sent = service.channel.send_fd(Kind.STACKS, body, self._pipes[worker][0])
        if not (sent and service.channel.send_fd(Kind.LISTENER, body, watched.listener)) and service.pid:
            # It does not read, or is dead: another is started, which gets everything anew.
            os.kill(service.pid, signal.SIGKILL)

    def _hear(self, kind: Kind, body: bytes) -> bool:
        """A call site that the tracer found."""
        if kind is not Kind.SITE:
            return False
        site = site_of_body(body)
        if self.sites.add(site):
            self._log.write(LOG_INFO, LABEL, str(site))
        elif self.sites.full and not self._told_full:
            self._told_full = True
            self._log.write(LOG_NOTICE, LABEL, FULL.format(SITES_MAX, RULES_MAX))
        return True
