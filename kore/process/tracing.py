"""The parent's side of tracing: it forks the tracer, hands the workers' listeners on, and keeps what is found.

The parent has copies of the listeners, so that calls only wait when a tracer dies, until the next one has them; without
any copy the kernel fails them with ENOSYS. A tracer that dies again and again is the end of tracing, and that is said.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kore.process import prctl, title, tracer
from kore.process.channel import Channel, ChannelError, Kind, channel_pair
from kore.process.log import LOG_ERR, LOG_INFO, LOG_NOTICE, Log
from kore.process.report import Death
from kore.process.role import log_of_body
from kore.process.sites import FULL, RULES_MAX, SITES_MAX, Sites, site_of_body
from kore.process.tracer import LABEL, Brief
from kore.sandbox import notification

DEATHS_MAX = 5
"""Deaths of tracers that lived for less than HEALTHY_SECONDS, in a row; then tracing ends."""

HEALTHY_SECONDS = 10.0

FINISH_SECONDS_MAX = 2.0
"""For the tracer to end when no worker is left: it only has to send what it has found."""

MESSAGES_PER_TURN = 256


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
    """The tracer and what it needs. The parent calls start() before the first worker, finish() after the last."""

    def __init__(self, selector: selectors.BaseSelector, log: Log, brief: Brief, name: str) -> None:
        self.brief = brief
        self.sites = Sites()
        self.pid = 0
        """The tracer's; 0: there is none."""
        self._name = name
        self._selector = selector
        self._log = log
        self._channel: Channel | None = None
        self._started = 0.0
        self._deaths = 0
        self._ended = False
        self._told_full = False
        self._watched: dict[int, _Watched] = {}
        self._pipes: dict[int, list[int]] = {}
        """By worker: the reading end of the pipe for its stacks and, until it is forked, the writing end."""

    # The tracer's life.

    def start(self, settle: Callable[[], None]) -> None:
        """Fork a tracer. `settle` gives up what is the parent's, in the child; it is kept for those that follow."""
        self._settle = settle
        self._log.parent(
            LOG_NOTICE, "seccomp_tracing: the sandbox's filter forbids nothing; what it would forbid is told of"
        )
        self._fork(again=False)

    def _fork(self, *, again: bool) -> None:
        parent = os.getpid()
        try:
            mine, theirs = channel_pair()
        except OSError as error:
            self._end(f"no channel: {error.strerror}")
            return
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            mine.close()
            theirs.close()
            self._end(f"no process: {error.strerror}")
            return
        if pid == 0:
            code = 1
            try:
                mine.close()
                self._settle()
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                prctl.set_parent_death_signal(signal.SIGKILL)
                title.set_title(self._name, LABEL)
                if os.getppid() == parent:
                    code = tracer.run(self.brief, theirs)
            finally:
                os._exit(code)  # no exit function of the application's, and nothing of the parent's stack
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self.pid, self._channel, self._started = pid, mine, time.monotonic()
        self._selector.register(mine, selectors.EVENT_READ, self._hear)
        for worker, watched in self._watched.items():
            self._hand_over(worker, watched, again=again)

    def reap(self) -> None:
        """Look whether the tracer has died, and have another take its place."""
        if not self.pid:
            return
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return
        self._leave()
        self._deaths = 0 if time.monotonic() - self._started >= HEALTHY_SECONDS else self._deaths + 1
        text = f"the tracer (pid {pid}) {Death(status)}"
        if self._deaths >= DEATHS_MAX:
            self._end(text)
            return
        self._log.parent(LOG_ERR, f"{text}; another takes its place, and calls that it had not answered wait")
        self._fork(again=True)

    def _leave(self) -> None:
        """The tracer is dead: hear what it left behind."""
        self.pid = 0
        if self._channel is None:
            return
        while self._hear():  # its end of the channel is closed, so there is an end to this
            pass
        self._channel.close()
        self._channel = None

    def _end(self, reason: str) -> None:
        """Give up: whoever calls what the filter forbids gets ENOSYS from the kernel when the listeners are closed."""
        self._ended = True
        self._log.parent(
            LOG_ERR, f"tracing ends: {reason}; what the sandbox forbids fails with ENOSYS until the server is restarted"
        )
        for worker in list(self._watched):
            self.leave(worker)

    def finish(self) -> None:
        """No worker is left: hear the last words of the tracer and have it end."""
        if self._channel is not None and self.pid:
            self._channel.end()
            deadline = time.monotonic() + FINISH_SECONDS_MAX
            poller = select.poll()
            poller.register(self._channel.fileno(), select.POLLIN)
            while (left := deadline - time.monotonic()) > 0 and poller.poll(left * 1000) and self._hear():
                pass
        self.kill()

    def kill(self) -> None:
        """End the tracer now, whatever it does."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._leave()

    def close(self) -> None:
        """Close all descriptors without a word, in a child or at the end; the selector is closed already."""
        if self._channel is not None:
            self._channel.close()
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
        if self._ended:
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
        if self._channel is None:
            return  # the next tracer gets it
        body = b"%d %d %d" % (worker, watched.pid, again)
        sent = self._channel.send_fd(Kind.STACKS, body, self._pipes[worker][0])
        if not (sent and self._channel.send_fd(Kind.LISTENER, body, watched.listener)) and self.pid:
            # It does not read, or is dead: reap() starts another, which gets everything anew.
            os.kill(self.pid, signal.SIGKILL)

    # Words of the tracer.

    def _hear(self) -> bool:
        """Read what it sent; False when there will be no more."""
        assert self._channel is not None
        try:
            for _ in range(MESSAGES_PER_TURN):
                message = self._channel.receive()
                if message is None:
                    return True
                self._message(*message)
        except (EOFError, ChannelError) as error:
            if self._channel.fileno() in self._selector.get_map():
                self._selector.unregister(self._channel)
            if self.pid and isinstance(error, ChannelError):
                os.kill(self.pid, signal.SIGKILL)  # it is not what was forked any more
            return False
        return True

    def _message(self, kind: Kind, body: bytes) -> None:
        if kind is Kind.SITE:
            site = site_of_body(body)
            if self.sites.add(site):
                self._log.write(LOG_INFO, LABEL, str(site))
            elif self.sites.full and not self._told_full:
                self._told_full = True
                self._log.write(LOG_NOTICE, LABEL, FULL.format(SITES_MAX, RULES_MAX))
        elif kind is Kind.LOG:
            priority, text = log_of_body(body)
            self._log.write(priority, LABEL, text)
