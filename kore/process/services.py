"""Children of the parent that serve no clients: the key manager, the tracer and what else is a row of the table.

A row says what is different about a process; its life is the same for all. It is forked before what needs it, says
ready, is heard, is started again when it dies, later each time, and ends when the parent closes its side of the
channel, after whatever needed it.
"""

from __future__ import annotations

import os
import selectors
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from kore.process import prctl, role, title
from kore.process.channel import Channel, ChannelError, Kind, channel_pair
from kore.process.forking import Blocked, fork
from kore.process.log import LOG_ERR, LOG_INFO, LOG_NOTICE, Log
from kore.process.report import Death
from kore.process.seat import Life
from kore.process.supervision import Supervision
from kore.reactor.origin import place_of

STOP_SECONDS = 2.0
"""For a service to end when it is told to: it only has to finish what it does just now."""

MESSAGES_PER_TURN = 256

RETRY_SECONDS = 0.25
"""How soon a service that could not be forked, or a pair that could not be sent, is tried again."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a service is given at its fork."""

    channel: Channel
    parent: int
    """The parent's pid."""
    restarts: int
    """How many there were before it."""


def nothing(*_arguments: object) -> None:
    """What is done where a row has nothing of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is different about one service."""

    name: str
    """That of its label and title, "keymgr"."""
    what: str
    """For sentences in the log, "the key manager"."""
    run: Callable[[Place], int]
    """Called in the fresh process; what it returns is the exit code."""
    serves: frozenset[str] = frozenset()
    """Who gets a pair with it: "worker", and names of other services."""
    signals: frozenset[int] = frozenset()
    """Which signals are passed on to it."""
    says_ready: bool = True
    """Whether what comes after it waits for that, and the start fails without it."""
    filtered: bool = False
    """Whether it puts a filter on, and sends its listener."""
    deaths_max: int | None = None
    """After that many deaths, none after a healthy life, there is no other; None: there always is."""
    without: str = ""
    """What the log adds to a death: what is not there until its successor is."""
    begun: Callable[[bool], object] = nothing
    """A process is there; whether it is a successor."""
    hear: Callable[[Kind, bytes], bool] = lambda _kind, _body: False
    """Takes what not every child says; False: nor does this one."""
    given_up: Callable[[str], object] = nothing
    """There will be no other, and why."""

    @property
    def label(self) -> str:
        """How the log and the process list call it."""
        return f"[{self.name}]"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all services share of the parent."""

    selector: selectors.BaseSelector
    log: Log
    title: str
    """The first word of titles."""
    after: Callable[[float, Callable[[], None]], None]
    settle: Callable[[], None]
    """In the child: gives up what is the parent's."""
    ready: Callable[[Service], None]
    starting: Callable[[], bool]
    failed: Callable[[], None]
    """One died meanwhile that the start needs."""
    serving: Callable[[], bool]
    """Whether there is to be a successor."""
    fatal: Callable[[str], None]
    """It asks for the end of the server."""


@dataclass(slots=True, kw_only=True)
class Service(Life):
    """One row, and the process that does it now."""

    row: Row
    around: Surroundings
    ended: bool = False
    """Whether it is told to end, or given up: there is no successor."""
    supervision: Supervision = field(init=False)

    def __post_init__(self) -> None:
        self.supervision = Supervision(self.around.selector, self.around.log, lambda _: self.row.what)

    # In the parent.

    def fork(self) -> None:
        """Put a new process in its place; when there is none to be had, that counts as a death."""
        try:
            mine, theirs = channel_pair()
        except OSError as error:
            self._none(f"{self.row.what} could not be started: no channel: {error.strerror}")
            return
        if not self.row.filtered:
            mine.refuse_descriptors()
        place = Place(theirs, os.getpid(), self.restarts)
        try:
            pid = fork(lambda blocked: self._become(place, mine, blocked))
        except OSError as error:
            mine.close()
            theirs.close()
            self._none(f"{self.row.what} could not be started: no process: {error.strerror}")
            return
        theirs.close()
        self.begin(pid, mine)
        self.around.selector.register(mine, selectors.EVENT_READ, self.hear)
        self.row.begun(self.restarts > 0)
        if not self.row.says_ready:
            self.ready = True
            self.around.ready(self)

    def reap(self) -> None:
        """Look whether it has died, and see to its successor."""
        if not self.pid:
            return
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return
        was_ready = self.ready
        call = self._left()
        death = Death(status, call)
        uptime = self.end()
        if self.ended:
            return
        text = f"{self.row.what} (pid {pid}) {death}"
        if was_ready:
            self._none(text, uptime)
        else:
            self._none(f"{text} before it was ready")

    def _none(self, text: str, uptime: float = 0.0) -> None:
        """There is no process: see to another, if there is to be one."""
        delay = self.next_delay(uptime)
        if self.row.deaths_max is not None and self.failures >= self.row.deaths_max:
            self.ended = True
            self.row.given_up(text)
            return
        if not self.around.serving():
            self.around.log.parent(LOG_ERR, text)
            return
        if self.row.says_ready and self.around.starting():
            self.around.log.parent(LOG_ERR, text)
            self.around.failed()
            return
        when = f" in {delay:.1f} s" if delay else ""
        self.around.log.parent(LOG_ERR, f"{text}; another takes its place{when}{self.row.without}")
        if delay:
            self.around.after(delay, self._again)
        else:
            self._again()

    def _again(self) -> None:
        if not self.pid and not self.ended:
            self.restarts += 1
            self.fork()

    def stop(self) -> None:
        """Have it end, and see that it does."""
        if self.ended:
            return
        self.ended = True
        if self.channel is not None and self.pid:
            pid = self.pid
            self.channel.end()
            self.around.after(STOP_SECONDS, lambda: self._stuck(pid))

    def _stuck(self, pid: int) -> None:
        if self.pid == pid:
            self.around.log.parent(LOG_ERR, f"{self.row.what} (pid {pid}) did not end in time and is killed")
            os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """End it now, whatever it does; nothing of it is left."""
        self.ended = True
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._left()
            self.end()

    def distrust(self, error: ChannelError) -> None:
        """Kill what is not what was forked any more: nothing it says can be trusted."""
        if self.pid:
            self.around.log.parent(LOG_ERR, f"{self.row.what} (pid {self.pid}) is killed: it sent {error}")
            os.kill(self.pid, signal.SIGKILL)

    def release(self) -> None:
        """Close all descriptors without a word, in a child or at the end; the selector is closed already."""
        self.supervision.close()
        self.close()

    def _left(self) -> str | None:
        """The process is dead: hear what it left behind. The name of the call that it was killed for, if it was."""
        self.pid = 0  # nonsense is no reason any more to kill whoever has that number now
        if self.channel is not None:
            while self.hear():  # its end of the channel is closed, so there is an end to this
                pass
            self._unwatch()
        return self.supervision.leave(0)

    def _unwatch(self) -> None:
        if self.channel is not None and self.channel.fileno() in self.around.selector.get_map():
            self.around.selector.unregister(self.channel)

    def hear(self) -> bool:
        """Read what it sent; False when there will be no more, or nothing more is there of a dead one."""
        assert self.channel is not None
        try:
            for _ in range(MESSAGES_PER_TURN):
                message = self.channel.receive_fd()
                if message is None:
                    return False
                self._message(*message)
        except EOFError:
            self._unwatch()
            return False
        except ChannelError as error:
            self._unwatch()
            self.distrust(error)
            return False
        return True

    def _message(self, kind: Kind, body: bytes, fd: int | None) -> None:
        if kind is Kind.LISTENER and self.row.filtered:
            self.supervision.join(0, self.pid, fd)
            if self.channel is not None:
                self.channel.refuse_descriptors()
            return
        if fd is not None:
            os.close(fd)
            raise ChannelError(f"a descriptor with a {kind.name}")
        log, label = self.around.log, self.row.label
        match kind:
            case Kind.LOG:
                priority, text = role.log_of_body(body)
                log.write(priority, label, text)
            case Kind.DROPPED:
                count = body.decode("ascii", "backslashreplace")
                log.write(LOG_NOTICE, label, f"{count} log lines were dropped: the parent was slow")
            case Kind.READY if self.row.says_ready and not self.ready:
                self.ready = True
                if self.restarts:
                    log.parent(LOG_INFO, f"{self.row.what} is there again, pid {self.pid}")
                self.around.ready(self)
            case Kind.FATALX:
                self.around.fatal(self.row.what)
            case _:
                if not self.row.hear(kind, body):
                    raise ChannelError(f"a {kind.name}, which {self.row.what} does not send")

    # In the child.

    def _become(self, place: Place, parents: Channel, blocked: Blocked) -> NoReturn:
        code = 1
        try:
            parents.close()
            self.around.settle()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            prctl.set_parent_death_signal(signal.SIGKILL)
            title.set_title(self.around.title, self.row.label)
            role.take(role.ChildRole(self.row.label, place.channel))
            if os.getppid() == place.parent:
                code = self.row.run(place)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException as error:  # noqa: BLE001 (the stack above belongs to the parent: nothing may unwind into it)
            text = f"{self.row.what} ends by {error!r}{place_of(error)}"
            place.channel.send_last(Kind.LOG, role.log_body(LOG_ERR, text))
        finally:
            os._exit(code)  # no exit function of the application's, and nothing of the parent's stack


def introduce(server: Life, client: Life, worker: int, retry: Callable[[float, Callable[[], None]], None]) -> None:
    """Give a service and who it serves (a worker, or 0 for another service) a pair of sockets of their own.

    Where a channel is full it is tried again with `retry`, as long as both are who they were.
    """
    pids = server.pid, client.pid

    def go() -> None:
        if (server.pid, client.pid) != pids or server.channel is None or client.channel is None:
            return
        try:
            ours, theirs = channel_pair()
        except OSError:
            retry(RETRY_SECONDS, go)
            return
        for channel in (ours, theirs):
            channel.refuse_descriptors()
        sent = server.channel.send_fd(Kind.JOIN, b"%d %d" % (worker, client.pid), ours.fileno())
        # A second JOIN of the same process takes the place of the first.
        sent = sent and client.channel.send_fd(Kind.KEYS, b"", theirs.fileno())
        ours.close()
        theirs.close()
        if not sent:
            retry(RETRY_SECONDS, go)

    go()
