"""``kore.proc``: a child process, what it writes, and its end, which coroutines wait for.

Its end is heard of as kore.reactor.children says. Dropping the object kills the child; its reaping goes on by itself.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import weakref
from asyncio import Future, TimerHandle, events
from collections.abc import Generator
from functools import partial, total_ordering
from typing import Any

from kore.reactor import trace
from kore.reactor.children import STATUS_LOST, Child
from kore.reactor.lines import CLOSED, Descriptor, Line, failure
from kore.reactor.names import made, public
from kore.reactor.pending import Pending, SocketOp, Steps, bytes_of, kore_loop, length_of, milliseconds, until
from kore.reactor.spawning import spawn
from kore.reactor.waits import wake

PIPE_BYTES_MAX = 64 * 1024
"""Bytes read or written at once: what a pipe holds (pipe(7))."""

COMMAND_CHARACTERS_MAX = 128 * 1024
"""What execve(2) takes as one argument (MAX_ARG_STRLEN); splitting much more would hold up the loop for seconds."""


class _Child:
    """The process itself, apart from the object that the application holds: it is reaped also after that is gone."""

    __slots__ = ("__weakref__", "_child", "_driver", "deadline", "expired", "lines", "pid", "status", "waiters")

    def __init__(self, driver: Any, child: Child, lines: tuple[Line, ...]) -> None:
        self.pid = child.pid
        self.lines = lines
        self.status: int | None = None
        self.expired = False  # the timeout passed and nobody was told
        self.deadline: TimerHandle | None = None
        self.waiters: set[Future[Any]] = set()
        self._driver = driver
        self._child = child
        child.wait(driver, self._told)
        _running.add(self)

    def _told(self, result: int) -> None:
        if result < 0:
            self._ended(STATUS_LOST)
        elif not self.look():
            self._child.wait(self._driver, self._told)
            return
        self._child.close()

    def look(self) -> bool:
        """Reap it if it has ended; whether it has."""
        if self.status is None:
            status = self._child.look()
            if status is not None:
                self._ended(status)
        return self.status is not None

    def _ended(self, status: int) -> None:
        # The reference: the exit code, else the status as wait(2) has it (9 after SIGKILL).
        self.status = os.WEXITSTATUS(status) if status >= 0 and os.WIFEXITED(status) else status
        _running.discard(self)
        if self.deadline is not None:
            self.deadline.cancel()
        for waiter in self.waiters:
            wake(waiter)

    def expire(self) -> None:
        """The timeout has passed: whoever waits for something of this process and goes on first is told."""
        self.expired = True
        for line in self.lines:
            line.poke()
        for waiter in self.waiters:
            wake(waiter)

    def check(self) -> None:
        """Raise the TimeoutError that nobody has got yet."""
        if self.expired:
            self.expired = False
            raise TimeoutError(f"process {self.pid} has not ended within its timeout")

    def wait(self) -> Generator[Any, None, int]:
        """The status, once it has ended. Raises TimeoutError, RuntimeError when somebody else took the status."""
        while True:
            self.check()
            if self.look():
                return self.known()
            waiter: Future[Any] = events.get_running_loop().create_future()
            self.waiters.add(waiter)
            try:
                yield from waiter
            finally:
                self.waiters.discard(waiter)

    def known(self) -> int:
        """The status. Raises RuntimeError while there is none."""
        if self.status is None:
            raise RuntimeError(f"process {self.pid} has not ended: await proc.reap()")
        if self.status == STATUS_LOST:
            raise RuntimeError(f"the status of process {self.pid} is lost: somebody else has waited for it")
        return self.status

    def kill(self) -> None:
        """SIGKILL, unless it was reaped. Raises RuntimeError when it has taken other rights and may not be killed."""
        if self.status is None:
            try:
                self._child.kill()
            except OSError as error:
                raise failure(f"kill() of process {self.pid}", -(error.errno or 0)) from error

    def kill_for_nobody(self) -> None:
        """The same when there is nobody to raise an error for: the log has it."""
        try:
            self.kill()
        except RuntimeError as error:
            trace.log(trace.LOG_ERR, f"{error}; it runs on, stop it by hand")

    # The loop was closed before the process ended.
    def __del__(self) -> None:
        self._child.close()


_running: weakref.WeakSet[_Child] = weakref.WeakSet()


def kill_running() -> None:
    """Kill every child that has not ended: for a worker that ends, whose objects nobody drops any more."""
    for child in list(_running):
        child.kill_for_nobody()


def _value(number: int) -> Steps:
    """A wait that is over before it begins."""
    yield from ()
    return number


class ExitStatus(int):
    """What ``reap()`` gives when the process has ended: the number, which can be awaited all the same."""

    __slots__ = ()

    def __await__(self) -> Steps:
        return _value(int(self))


@total_ordering
class Reap:
    """What ``reap()`` gives before the end: awaited, the exit status. Once the process has ended it acts as that int.

    Used as a number before, it raises RuntimeError.
    """

    __slots__ = ("_child", "_proc")

    def __init__(self, proc: PyProc) -> None:
        self._proc = proc  # whose end would be that of the process
        self._child = proc._child

    def __await__(self) -> Steps:
        kore_loop("reap()")
        return (yield from self._child.wait())

    def __index__(self) -> int:
        self._child.look()
        return self._child.known()

    __int__ = __index__

    def __eq__(self, other: object) -> bool:
        return int(self) == other

    def __lt__(self, other: int) -> bool:
        return int(self) < other

    def __bool__(self) -> bool:
        return int(self) != 0

    def __hash__(self) -> int:
        return hash(int(self))

    def __str__(self) -> str:
        return str(int(self))

    def __format__(self, spec: str) -> str:
        return format(int(self), spec)

    def __repr__(self) -> str:
        return repr(self._child.status) if self._child.look() else f"<reap() of process {self._child.pid}: running>"


@public("proc")
class PyProc:
    """A child process (reference: kore.proc). Dropping it kills the process."""

    __slots__ = ("_child", "_receiving", "_sending", "_stdin", "_stdout")
    _child: _Child
    _stdin: Line
    _stdout: Line
    _receiving: Pending
    _sending: Pending

    @property
    def pid(self) -> int:
        """Its process id, also after its end."""
        return self._child.pid

    def recv(self, maxlen: int, timeout: int | None = None, /) -> SocketOp:
        """Read at most `maxlen` bytes of what it writes to stdout and stderr. Awaited: bytes, None at the end.

        TimeoutError when nothing comes within `timeout` milliseconds from now; nothing is lost then.
        """
        steps = partial(self._recv, length_of(maxlen), until("recv()", timeout))
        return self._receiving.make("recv()", steps)

    def send(self, data: bytes | str, /) -> SocketOp:
        """Write `data`, a str as UTF-8, to its stdin. Awaited: None, when all was taken.

        RuntimeError after close_stdin(), and awaited, when the process has closed its end.
        """
        if self._stdin.descriptor.closed:
            raise RuntimeError(f"send(): the standard input of process {self.pid} is closed")
        return self._sending.make("send()", partial(self._send, bytes_of(data)))

    def close_stdin(self) -> bool:
        """Close its standard input: it reads the end there. Always True."""
        self._stdin.descriptor.close()
        self._stdin.close()
        return True

    def kill(self) -> bool:
        """Send SIGKILL; nothing happens when it was reaped. Always True.

        RuntimeError when the process has become another user's (sudo, su), and this worker may not.
        """
        self._child.kill()
        return True

    def reap(self) -> ExitStatus | Reap:
        """The exit status, or after a signal the status as wait(2) has it (9: SIGKILL); any number of times.

        Await it for the end of the process; TimeoutError when the timeout of the process passes first. What it gives
        is an int as well, if the process has ended, or from then on.
        """
        child = self._child
        if child.look() and not child.expired and child.status != STATUS_LOST:
            return ExitStatus(child.known())
        return Reap(self)

    def __del__(self) -> None:
        if hasattr(self, "_child"):
            self._child.kill_for_nobody()
            for line in (self._stdin, self._stdout):
                line.descriptor.close()
                line.close()

    def _recv(self, maxlen: int, deadline: float | None) -> Steps:
        driver = kore_loop("recv()").driver
        line = self._stdout
        begin = partial(driver.read, line.descriptor.fd, min(maxlen, PIPE_BYTES_MAX), -1)
        data = yield from line.wait(begin, deadline, self._child.check)
        if data is CLOSED:
            return None
        if type(data) is int:
            raise failure(f"recv() from process {self.pid}", data)
        if not data:
            line.descriptor.close()
            return None
        if len(data) > maxlen:  # received for somebody who asked for more, and was killed
            line.put_back(data[maxlen:])
        return data[:maxlen]

    def _send(self, data: bytes) -> Steps:
        driver = kore_loop("send()").driver
        line = self._stdin
        at = 0
        while at < len(data):
            begin = partial(driver.write, line.descriptor.fd, data[at : at + PIPE_BYTES_MAX])
            result = yield from line.wait(begin, None, self._child.check)
            if result is CLOSED:
                return
            if result < 0:
                raise failure(f"send() to process {self.pid}", result)
            at += result


def proc(command: str, timeout: int | None = None, *, env: list[str] | None = None) -> PyProc:
    """Start a program: words as a shell would split them, PATH searched, no shell (reference: kore.proc).

    Its stdin is a pipe, stdout and stderr are another. When it has not ended after `timeout` milliseconds (None, 0, -1:
    no limit) there is a TimeoutError, once, for who waits for it then or next; it lives on until kill(). `env` is its
    whole environment as "NAME=value"; None: the worker's. Raises RuntimeError outside of coroutines, for an `env` that
    is no list, for a command of over 131072 characters and when the program cannot be started; ValueError for an empty
    command or an open quote.
    """
    loop = kore_loop("proc()")
    if not isinstance(command, str):
        raise TypeError(f"command must be a str, not {type(command).__name__}")
    if len(command) > COMMAND_CHARACTERS_MAX:
        raise RuntimeError(f"command must be at most {COMMAND_CHARACTERS_MAX} characters long, not {len(command)}")
    seconds = milliseconds("timeout", timeout)
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"command {command!r}: {error}") from None
    if not words or "\0" in command:
        raise ValueError(f"command must name a program and contain no NUL, not {command!r}")
    try:
        spawned = spawn(words, _environment(env))
    except OSError as error:
        raise RuntimeError(f"proc(): {words[0]!r} cannot be started: {error.strerror}") from error
    started = made(PyProc)
    started._stdin = Line(Descriptor(spawned.stdin, partial(os.close, spawned.stdin)), keeps=False)
    started._stdout = Line(Descriptor(spawned.stdout, partial(os.close, spawned.stdout)), keeps=True)
    started._receiving = Pending()
    started._sending = Pending()
    try:
        started._child = _Child(loop.driver, spawned.child, (started._stdin, started._stdout))
    except OSError as error:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored it is gone already
            os.kill(spawned.child.pid, signal.SIGKILL)  # nobody would see its end; it dies at once: no wait for long
            os.waitpid(spawned.child.pid, 0)
        raise RuntimeError(f"proc(): {words[0]!r} cannot be watched: {error.strerror}") from error
    if seconds:
        started._child.deadline = loop.call_later(seconds, started._child.expire)
    return started


def _environment(env: list[str] | None) -> dict[str, str] | None:
    if env is None:
        return None
    if not isinstance(env, list):
        raise RuntimeError(f"env must be a list of 'NAME=value', not {type(env).__name__}")
    environment = {}
    for entry in env:
        if not isinstance(entry, str):
            raise TypeError(f"env must hold str 'NAME=value', not {type(entry).__name__}")
        name, equals, value = entry.partition("=")
        if not name or not equals or "\0" in entry:
            raise ValueError(f"env must hold 'NAME=value' without a NUL, not {entry!r}")
        environment[name] = value
    return environment
