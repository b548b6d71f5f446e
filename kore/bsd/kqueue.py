"""kqueue(2): the poller of the BSDs and macOS, the ends of child processes, and a wake-up without a system's pipe.

Filters and not masks: an fd has a note for reading and one for writing, reported apart and put together again here, so
that the driver hears of an fd once a batch as it does from epoll. Level-triggered, for the reasons there.

Hang-ups have no filter. Where only they are asked for there is a *quiet* note: EVFILT_READ (EVFILT_WRITE for an fd that
is only written to) with EV_CLEAR, which speaks when something has happened and is passed on only when it says EV_EOF.
What EV_EOF means is poll(2)'s word: a peer's FIN is the end of input and no hang-up, both directions closed are one. An
error is told by fflags. A pipe whose reader has left before anybody asked can have no note; it is told as hung up in
each turn, without waiting, until nobody asks any more.

Not used: EVFILT_TIMER, since the driver's heap knows the next timeout and kevent(2) takes it in nanoseconds; and
EVFILT_SIGNAL, since Python's own handler has to run all the same, and its wake-up writes to an fd.

A kqueue is not inherited by fork, and notes go with their fd whoever has a copy of it. There is no EPOLLEXCLUSIVE: a
connection wakes every idle worker, and the first to accept has it.
"""

# The names of kqueue are there on the systems that have it, and unknown to a type checker elsewhere.
# mypy: disable-error-code="attr-defined"

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import stat
import sys
from collections.abc import Callable
from select import (
    KQ_EV_ADD,
    KQ_EV_CLEAR,
    KQ_EV_DELETE,
    KQ_EV_EOF,
    KQ_EV_ONESHOT,
    KQ_FILTER_PROC,
    KQ_FILTER_READ,
    KQ_FILTER_WRITE,
    KQ_NOTE_EXIT,
    POLLHUP,
    POLLIN,
    POLLOUT,
    kevent,
    kqueue,
)
from socket import AF_UNIX, SO_TYPE, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET, socket
from typing import Any

from kore.driver import Child, Result
from kore.errors import EngineError
from kore.readiness.driver import ReadinessDriver
from kore.readiness.operation import Trying, Waiting
from kore.readiness.watch import GONE, NOT_REGISTERED

POLLRDHUP: int = getattr(select, "POLLRDHUP", 0)
"""The end of input asked for apart from input: Linux's word, which newer FreeBSDs know too."""

BITS = {KQ_FILTER_READ: POLLIN, KQ_FILTER_WRITE: POLLOUT}

QUIET = 1
"""udata of a note that is there for hang-ups alone."""

USER_FILTERS = {"darwin": -10, "dragonfly": -9, "freebsd": -11, "netbsd": 8, "openbsd": -10}
"""EVFILT_USER in each system's sys/event.h, by the beginning of sys.platform; Python has no name for it."""

NOTE_TRIGGER = 0x01000000

NO_NOTE = frozenset({errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP, errno.EPERM, errno.ENXIO})
"""What adding a note says of an fd that has no such event: a device like /dev/null."""

ENDING_SECONDS = 0.001
"""Until a process is looked at again that has no note any more (ESRCH) and may not be ready for waitpid(2) yet."""


class KqueuePoller:
    """See kore.readiness.watch.Poller."""

    listener_flags = 0

    def __init__(self) -> None:
        try:
            self.kqueue = kqueue()
        except OSError as error:
            hint = "too many open files, or out of memory"
            raise EngineError("kqueue", error.errno or 0, error.strerror or "", hint) from error
        self.control: Callable[..., list[Any]] = self.kqueue.control
        self.unread: set[int] = set()
        """Writing ends of pipes that nobody reads any more, which somebody watches."""
        self.on_exit: Callable[[int], None] = lambda _: None
        """Called with the pid of a process that was watched and has ended."""
        self.user_filter = self._user_filter()

    def poll(self, timeout: float | None, most: int) -> list[tuple[int, int]]:
        """See kore.readiness.watch.Poller."""
        ready: dict[int, int] = {}
        if self.unread:
            self.look_at_unread(ready)
        for event in self.control(None, most, 0 if ready else timeout):
            fd, bits = event.ident, BITS.get(event.filter)
            if bits is None:
                if event.filter == KQ_FILTER_PROC:
                    self.on_exit(fd)
                continue
            if event.flags & KQ_EV_EOF:
                bits = at_end(event)
            elif event.udata == QUIET:
                continue
            ready[fd] = ready[fd] | bits if fd in ready else bits
        return list(ready.items())

    def change(self, fd: int, old: int, new: int) -> None:
        """See kore.readiness.watch.Poller."""
        if new == old or old == NOT_REGISTERED:
            # A note on a file speaks while the position is not at the end; to poll(2) files are always ready.
            kind = os.fstat(fd).st_mode
            if stat.S_ISREG(kind) or stat.S_ISDIR(kind):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        self.unread.discard(fd)
        before = {} if new == old else notes(fd, old)
        after = notes(fd, new)
        for kind, flags in before.items():
            # Adding again does not change EV_CLEAR, so a note that is to be quiet, or no longer, is another one.
            if after.get(kind) != flags:
                self.delete(fd, kind)
        for kind, flags in after.items():
            if before.get(kind) != flags:
                self.add(fd, kind, flags)

    def add(self, fd: int, kind: int, flags: int) -> None:
        """Add a note. PermissionError: the fd has no such event."""
        try:
            self.control([kevent(fd, kind, KQ_EV_ADD | flags, udata=QUIET if flags & KQ_EV_CLEAR else 0)], 0, 0)
        except OSError as error:
            if kind == KQ_FILTER_WRITE and (error.errno == errno.EPIPE or (error.errno == errno.EBADF and is_pipe(fd))):
                self.unread.add(fd)
                return
            if error.errno not in NO_NOTE:
                raise
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from error

    def delete(self, fd: int, kind: int) -> None:
        """Delete a note, if it is still there: it goes when its fd is closed."""
        try:
            self.control([kevent(fd, kind, KQ_EV_DELETE)], 0, 0)
        except FileNotFoundError:
            pass

    def look_at_unread(self, ready: dict[int, int]) -> None:
        """Put what has hung up without a note into `ready`, and forget what was closed meanwhile."""
        for fd in tuple(self.unread):
            if bits := hung_up(fd):
                ready[fd] = bits
            else:
                self.unread.discard(fd)

    def rotate(self, fd: int, mask: int) -> None:
        """Nothing: there is no queue of waiting processes here, all are woken."""

    def watch_exit(self, pid: int) -> None:
        """Call `on_exit` once the process has ended. ProcessLookupError: there is none, or it is ending already."""
        self.control([kevent(pid, KQ_FILTER_PROC, KQ_EV_ADD | KQ_EV_ONESHOT, KQ_NOTE_EXIT)], 0, 0)

    def _user_filter(self) -> int | None:
        """The number of EVFILT_USER, its note added; None where there is no such filter (OpenBSD before 7.7)."""
        system = sys.platform
        number = next((number for name, number in USER_FILTERS.items() if system.startswith(name)), -11)
        try:
            self.control([kevent(0, number, KQ_EV_ADD | KQ_EV_CLEAR)], 0, 0)
        except (OSError, OverflowError):
            return None
        return number

    def trigger(self) -> bool:
        """End a wait, or the next; False where there is no EVFILT_USER. OSError, ValueError when it is closed."""
        if self.user_filter is None:
            return False
        self.control([kevent(0, self.user_filter, 0, NOTE_TRIGGER)], 0, 0)
        return True

    def close(self) -> None:
        """See kore.readiness.watch.Poller."""
        self.kqueue.close()


def notes(fd: int, mask: int) -> dict[int, int]:
    """The notes for poll(2) bits: filter and flags. Urgent data (POLLPRI) has none that Python knows."""
    if mask == NOT_REGISTERED:
        return {}
    found = {}
    if mask & POLLIN:
        found[KQ_FILTER_READ] = 0
    elif mask & POLLRDHUP or not mask & POLLOUT:
        found[KQ_FILTER_WRITE if only_written(fd) else KQ_FILTER_READ] = KQ_EV_CLEAR
    if mask & POLLOUT:
        found[KQ_FILTER_WRITE] = 0
    return found


def only_written(fd: int) -> bool:
    """Whether an fd is the writing end of a pipe or the like, whose reader's end is no event for EVFILT_READ."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    except OSError:
        return False  # closed: kevent(2) says so as well


def unconnected(fd: int) -> bool:
    """Whether this is a stream socket that is not connected: the BSDs call that not ready, Linux ready to fail."""
    try:
        borrowed = socket(AF_UNIX, SOCK_STREAM, 0, fd)
    except OSError:
        return False  # no socket, or closed
    try:
        if borrowed.getsockopt(SOL_SOCKET, SO_TYPE) != SOCK_DGRAM:
            borrowed.getpeername()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    finally:
        borrowed.detach()
    return False


def at_end(event: Any) -> int:
    """The poll(2) bits of an event with EV_EOF."""
    bits = POLLRDHUP if event.filter == KQ_FILTER_READ else 0
    if event.udata != QUIET:
        bits |= BITS[event.filter]
    return bits | (GONE if event.fflags else hung_up(event.ident))


def hung_up(fd: int) -> int:
    """POLLERR and POLLHUP as poll(2) tells them. NetBSD's does not of sockets: one without a peer any more is."""
    poller = select.poll()
    poller.register(fd, 0)
    if told := poller.poll(0):
        return told[0][1] & GONE
    return POLLHUP if unconnected(fd) else 0


def is_pipe(fd: int) -> bool:
    """Whether this is a pipe, and open."""
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False


class Receiving(Trying):
    """A call that receives. What is not connected would never be ready; there the call says at once what is wrong."""

    __slots__ = ()

    def begin(self) -> None:
        """Wait for input, or try."""
        if unconnected(self.fd):
            super().begin()
        else:
            Waiting.begin(self)


class KqueueDriver(ReadinessDriver):
    """The driver contract on kqueue. EngineError: there is none to be had."""

    name = "kqueue"
    receiving = Receiving

    def __init__(self) -> None:
        self.kqueue = KqueuePoller()
        self.kqueue.on_exit = self._exited
        self.children: dict[int, list[Result]] = {}
        super().__init__(self.kqueue)

    def wake(self) -> None:
        """See kore.driver.Driver. By EVFILT_USER; `wake_fd` is for those who need an fd to write to."""
        try:
            if self.kqueue.trigger():
                return
        except (OSError, ValueError):
            return  # closed: there is nobody to wake
        super().wake()

    def child(self, pid: int, callback: Result) -> Child:
        """See kore.driver.Driver. There is no pidfd: EVFILT_PROC tells."""
        return ProcessNote(self, pid, callback)

    def _exited(self, pid: int) -> None:
        for callback in self.children.pop(pid, ()):
            self.due.append((callback, 0))

    def close(self) -> None:
        """See kore.driver.Driver."""
        self.children.clear()
        super().close()


class ProcessNote:
    """See kore.driver.Child."""

    __slots__ = ("driver", "pid")

    def __init__(self, driver: KqueueDriver, pid: int, callback: Result) -> None:
        self.driver = driver
        self.pid = pid
        self.wait(callback)

    def wait(self, callback: Result) -> None:
        """See kore.driver.Child."""
        driver = self.driver
        try:
            driver.kqueue.watch_exit(self.pid)
        except ProcessLookupError:
            # FreeBSD reports the dead; OpenBSD and macOS say this of those that are, or are about to be.
            driver.timeout(ENDING_SECONDS, callback)
        else:
            driver.children.setdefault(self.pid, []).append(callback)

    def kill(self) -> None:
        """See kore.driver.Child. Between the look and the signal nobody reaps it but another thread of ours."""
        if hasattr(os, "waitid"):
            try:
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError as error:
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
        os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Nothing was opened."""
