"""Which process this is, and what logging, ending and asking mean in it.

``kore.log`` and ``kore.fatal`` may be called anywhere: while the application is loaded, in the parent, in a worker.
One module-level `role` answers for all of them; the parent sets it before it loads, a worker right after its fork.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from kore.application.declared import application
from kore.process.channel import Channel, Kind
from kore.process.log import LOG_ERR, Log, cut, standard_output

if TYPE_CHECKING:
    from kore.http.server import HttpServer
    from kore.process.post import Post
    from kore.process.worker_tls import WorkerTls


class Role:
    """The parent, or a program that only imported kore: it logs directly, and ends alone."""

    label = "[parent]"
    worker: int | None = None
    workers = 0  # how many there are; known to workers
    post: Post | None = None  # what a worker sends to workers with
    server: HttpServer | None = None
    tls: WorkerTls | None = None

    def __init__(self, log: Log | None = None) -> None:
        self._log = log

    @property
    def sink(self) -> Log:
        """The log; standard output until another is chosen."""
        if self._log is None:
            self._log = Log(standard_output())
        return self._log

    def log(self, priority: int, text: str) -> None:
        """Log one message as this process. Never raises, never waits for whoever reads the log."""
        self.sink.write(priority, self.label, cut(text))

    def fatal(self, reason: str) -> NoReturn:
        """Log `reason` and end this process with exit code 1."""
        self.log(LOG_ERR, reason)
        raise SystemExit(1)

    def fatalx(self, reason: str) -> NoReturn:
        """The same, and the whole server with it."""
        self.fatal(reason)

    def shutdown(self) -> bool:
        """Stop the server. In the parent, where no worker can be asked to finish yet, that is fatal."""
        self.fatal("shutdown called in the parent")

    def trap(self, number: int) -> None:
        """Have the workers' signal hook called for signal `number`: noted until they start."""
        application.trap(number)


class ChildRole(Role):
    """A child of the parent: what it says goes there, who knows from the channel whose words they are."""

    def __init__(self, label: str, channel: Channel) -> None:
        super().__init__()
        self.label = label
        self.channel = channel
        self.dropped = 0  # lines the channel would not take and the parent has not been told of
        self.on_dropped: Callable[[], None] = nothing  # called at the first of them: try again later

    def log(self, priority: int, text: str) -> None:
        if self.dropped:
            self.tell_dropped()
        if self.dropped:
            self.dropped += 1
        elif not self.channel.send(Kind.LOG, log_body(priority, text)):
            self.dropped = 1
            self.on_dropped()

    def tell_dropped(self) -> None:
        """Tell the parent how many lines were lost, if the channel takes that much."""
        if self.dropped and self.channel.send(Kind.DROPPED, b"%d" % self.dropped):
            self.dropped = 0

    def fatalx(self, reason: str) -> NoReturn:
        self.channel.send_last(Kind.LOG, log_body(LOG_ERR, reason))
        self.channel.send_last(Kind.FATALX)
        end(1)


class WorkerRole(ChildRole):
    """A worker."""

    def __init__(self, worker: int, channel: Channel) -> None:
        super().__init__(f"[wrk {worker}]", channel)
        self.worker = worker
        self.on_trap: Callable[[int], None] = lambda _: None

    def last_words(self) -> None:
        """Before the end: the count of what was lost and messages that wait, both with a moment for room."""
        if self.post is not None:
            self.post.close()
        if self.dropped and self.channel.send_last(Kind.DROPPED, b"%d" % self.dropped):
            self.dropped = 0

    def fatal(self, reason: str) -> NoReturn:
        """Log and end with exit code 1, at once: no handler above can turn this into a 500."""
        self.channel.send_last(Kind.LOG, log_body(LOG_ERR, reason))
        self.last_words()
        end(1)

    def shutdown(self) -> bool:
        self.channel.send_last(Kind.SHUTDOWN)
        return True

    def trap(self, number: int) -> None:
        """Trap it in this worker, from now on."""
        self.on_trap(number)


def nothing() -> None:
    """What is called where there is nobody to be told."""


def log_body(priority: int, text: str) -> bytes:
    """The body of a LOG message. Priorities beyond a byte do not exist in syslog(3) and are taken for the nearest."""
    return bytes((min(max(priority, 0), 255),)) + cut(text).encode("utf-8", "backslashreplace")


def log_of_body(body: bytes) -> tuple[int, str]:
    """Priority and text of a LOG message, whatever a broken worker put into it."""
    return body[0] if body else LOG_ERR, body[1:].decode("utf-8", "backslashreplace")


def end(code: int) -> NoReturn:
    """End a forked process with exit code `code`: exit functions and buffers, but nothing of the parent's stack."""
    try:
        # There is no public call for this; os._exit alone would skip what the application registered in the worker.
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                pass  # closed, or nobody reads it
        os._exit(code)


role: Role = Role()
"""This process's role. Read it as ``role.role`` of the module: it is replaced at the fork."""


def take(new: Role) -> None:
    """Make `new` the role of this process."""
    global role
    role = new
