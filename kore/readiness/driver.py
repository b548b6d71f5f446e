"""The driver contract over readiness: ask the poller who is ready, make the system call, call back.

A turn (`wait`) goes: flush the output of the last turn, close what was to be closed, begin the operations asked for,
wait, answer the events, fire the timeouts, deliver the results that are due. So nothing is flushed, closed or begun in
the middle of a batch of events: an event of the batch can not meet a stranger who was given the number of an
fd that an earlier callback closed. (A stream that failed is closed at once, but its event is behind it; and a fresh
stream that hears of input for its predecessor reads, finds nothing, and goes on.)
"""

from __future__ import annotations

import errno
import heapq
import os
from collections import deque
from collections.abc import Callable, Sequence
from select import POLLIN, POLLOUT
from socket import socket
from time import monotonic
from typing import Any

from kore.driver import CONTROL_BYTES, Child, DataResult, MessageResult, Result, Stream, StreamOwner
from kore.readiness.operation import (
    Accept,
    AcceptOnce,
    Connect,
    Instant,
    Operation,
    RepeatedPoll,
    SendTo,
    Splice,
    Timeout,
    Trying,
    Waiting,
)
from kore.readiness.pidfd import PidfdChild
from kore.readiness.stream import READ_BYTES_MAX, ReadinessStream
from kore.readiness.syscalls import MSG_CMSG_CLOEXEC
from kore.readiness.watch import NOT_REGISTERED, Entry, Poller, Watch, arm

EVENTS_MAX = 512
"""Events taken in one turn: many enough for one poll to serve every busy connection, few enough for a small buffer."""

WAIT_MAX = 86400.0
"""Seconds of one wait. Pollers count milliseconds in 32 bits; after a day of silence one empty turn does no harm."""

ACCEPT_BATCH = 16
"""Connections accepted for one event: more, and the first worker woken takes a whole burst from the others."""

WITHDRAWN_TIMEOUTS_MIN = 64
"""Cancelled timeouts that may stay in the heap before it is worth sweeping it."""


class ReadinessDriver:
    """See kore.driver.Driver. `poller` is the platform's; the driver owns it."""

    name = "readiness"
    receiving = Waiting
    """How receive() and recvmsg() wait: a platform whose poller is silent about what will fail has its own way."""

    def __init__(self, poller: Poller) -> None:
        self.poller = poller
        self.accept_batch = ACCEPT_BATCH
        self.dirty: list[Any] = []
        self.ending: list[Any] = []
        self.begun: deque[Operation] = deque()  # operations to begin in the next turn
        self.due: deque[tuple[Callable[[Any], None], Any]] = deque()  # results to deliver in this turn or the next
        self.table: dict[int, Entry] = {}  # who is concerned by an event on an fd
        self.timeouts: list[tuple[float, int, Timeout]] = []  # a heap: by time, then in the order of asking
        self.timeouts_made = 0
        self.timeouts_withdrawn = 0
        self.closed = False
        self.wake_read_fd, self.wake_fd = os.pipe()
        os.set_blocking(self.wake_read_fd, False)
        os.set_blocking(self.wake_fd, False)
        alarm = Alarm(self.wake_read_fd)
        self.table[alarm.fd] = alarm
        arm(poller, alarm)

    def wait(self, timeout: float | None) -> None:  # noqa: C901 -- the hot path
        """See kore.driver.Driver. In one piece: a request costs 0.24 us here, over its system calls and the poll's."""
        dirty = self.dirty
        if dirty:
            write = os.write
            for stream in dirty:
                out = stream.out
                # Stuck: what is held goes first. Left in `dirty` by an exception, this one has been flushed before.
                if out is None or stream.stuck:
                    continue
                stream.out = None
                if type(out) is list:
                    stream.flush(out, sum(map(len, out)))
                    continue
                try:
                    taken = write(stream.fd, out)
                except BlockingIOError:
                    taken = 0
                except OSError as error:
                    stream.release(error.errno or errno.EIO)
                    continue
                if taken != len(out):
                    stream.hold([out], len(out), taken)
            dirty.clear()
        if self.ending:
            self.end_streams()
        begun = self.begun
        while begun:
            operation = begun.popleft()
            if not operation.over:  # cancelled before it began
                operation.begin()

        if self.due:
            timeout = 0
        elif self.timeouts:
            timeout = self.until_next_timeout(timeout)
        elif timeout is not None and not 0 <= timeout <= WAIT_MAX:
            timeout = min(max(timeout, 0), WAIT_MAX)
        entry_of, read = self.table.get, os.read
        for fd, events in self.poller.poll(timeout, EVENTS_MAX):
            entry: Any = entry_of(fd)
            if entry is None:
                continue
            # os.read makes a bytes object of full size and shrinks it in place, which measured 0.1 to 0.2 us less than
            # a read into a buffer of our own and a copy out of it.
            if events == entry.plain and (received := entry.received) is not None:
                try:
                    data = read(fd, READ_BYTES_MAX)
                except BlockingIOError:
                    continue
                except OSError as error:
                    entry.release(error.errno or errno.EIO)
                    continue
                if not data:
                    entry.ended = True
                    entry.plain = 0
                received(data)
                if len(data) == READ_BYTES_MAX:
                    entry.read()
            else:
                entry.ready(events)
        if self.timeouts:
            self.fire_timeouts()
        if self.due:
            self.deliver()

    # --- the parts of a turn ---------------------------------------------------------------------------------

    def end_streams(self) -> None:
        """Close, or send the FIN of, those whose output has left; `ReadinessStream.write_held` does the others."""
        for stream in self.ending:
            if stream.fd < 0:
                continue
            if stream.gone or (stream.closing and not stream.stuck):
                stream.release(0)
            elif stream.finishing and not stream.stuck:
                stream.send_fin()
        self.ending.clear()

    def until_next_timeout(self, timeout: float | None) -> float:
        """How long to wait, at most `timeout`."""
        timeouts = self.timeouts
        while timeouts and timeouts[0][2].over:
            heapq.heappop(timeouts)
            self.timeouts_withdrawn -= 1
        wait = WAIT_MAX if timeout is None else min(timeout, WAIT_MAX)
        if timeouts and wait > 0:
            wait = min(wait, timeouts[0][0] - monotonic())
        elif timeout is None and not timeouts:
            return WAIT_MAX
        return max(wait, 0)

    def fire_timeouts(self) -> None:
        """Call back those whose time has come. What they ask for in turn is for the next turn at the earliest."""
        timeouts, now = self.timeouts, monotonic()
        while timeouts and (timeouts[0][0] <= now or timeouts[0][2].over):
            timeout = heapq.heappop(timeouts)[2]
            if timeout.over:
                self.timeouts_withdrawn -= 1
            else:
                timeout.fire()

    def deliver(self) -> None:
        """Deliver the results that are due now; those that come of it wait for the next turn, which does not wait."""
        due = self.due
        for _ in range(len(due)):
            if not due:
                return  # a callback closed the driver
            callback, result = due.popleft()
            callback(result)

    # --- for the operations and streams ----------------------------------------------------------------------

    def watch(self, operation: Waiting) -> None:
        """Let `operation` hear when its fd is ready. OSError as epoll_ctl(2) has it."""
        fd = operation.fd
        entry = self.table.get(fd)
        if entry is None:
            entry = self.table[fd] = Watch(self.poller, fd)
        entry.waiters = [*entry.waiters, operation]
        try:
            if entry.mask == entry.wants():
                # Nothing new to ask, but whoever had the fd before may have closed it, and the poller then forgot it.
                self.poller.change(fd, entry.mask, entry.mask)
            else:
                arm(self.poller, entry)
        except OSError:
            self.unwatch(operation)
            raise
        if isinstance(entry, ReadinessStream):
            entry.settle()

    def unwatch(self, operation: Waiting) -> None:
        """Let `operation` hear no more."""
        entry = self.table.get(operation.fd)
        if entry is None or operation not in entry.waiters:
            return
        entry.waiters = [waiter for waiter in entry.waiters if waiter is not operation]
        if isinstance(entry, ReadinessStream):
            entry.settle()
        elif not entry.waiters:
            del self.table[operation.fd]
        arm(self.poller, entry)

    def rotate(self, operation: Waiting) -> None:
        """An accept took a connection: let another process be the first to hear of the next."""
        entry = self.table.get(operation.fd)
        if entry is not None:
            self.poller.rotate(entry.fd, entry.mask)

    def timeout_withdrawn(self) -> None:
        """A timeout was cancelled. They leave the heap when their time comes, or when they are the most of it."""
        self.timeouts_withdrawn += 1
        if self.timeouts_withdrawn > max(len(self.timeouts) // 2, WITHDRAWN_TIMEOUTS_MIN):
            # In place: fire_timeouts() may be in the middle of it.
            self.timeouts[:] = [item for item in self.timeouts if not item[2].over]
            heapq.heapify(self.timeouts)
            self.timeouts_withdrawn = 0

    def close_stream(self, stream: ReadinessStream) -> None:
        """Close a stream's fd. Taken out of the poller first: a child about to exec may hold a copy of it still."""
        self.drop(stream)
        try:
            os.close(stream.fd)
        except OSError:
            pass  # close(2): the fd is released even when it reports what became of earlier output

    def drop(self, entry: Entry) -> None:
        """Take an entry out of the table and the poller."""
        if self.table.get(entry.fd) is entry:
            del self.table[entry.fd]
        if entry.mask != NOT_REGISTERED:
            try:
                self.poller.change(entry.fd, entry.mask, NOT_REGISTERED)
            except OSError:
                pass  # somebody else closed the fd, and the poller forgot it
            entry.mask = NOT_REGISTERED

    # --- the contract ------------------------------------------------------------------------------------------

    def submit(self) -> None:
        """See kore.driver.Driver. What is cancelled here has let go already, and what begins has nothing to gain."""

    def wake(self) -> None:
        """See kore.driver.Driver."""
        try:
            os.write(self.wake_fd, b"\0")
        except OSError:
            pass  # full: a wake-up is on its way already; closed: there is nobody to wake

    def close(self) -> None:
        """See kore.driver.Driver."""
        if self.closed:
            return
        self.closed = True
        for entry in list(self.table.values()):
            for waiter in entry.waiters:
                waiter.callback = None
                waiter.over = True
                if isinstance(waiter, Accept):
                    waiter.detach()
            if isinstance(entry, ReadinessStream):
                self.close_stream(entry)
                entry.clear()
        self.table.clear()
        for pending in (self.dirty, self.ending, self.begun, self.due, self.timeouts):
            pending.clear()
        wake_fd, self.wake_fd = self.wake_fd, -1
        os.close(wake_fd)
        os.close(self.wake_read_fd)
        self.poller.close()

    def stream(self, fd: int, owner: StreamOwner) -> Stream:
        """See kore.driver.Driver."""
        stream = ReadinessStream(self, fd, owner)
        before = self.table.get(fd)
        if before is not None:
            assert not isinstance(before, ReadinessStream), f"fd {fd} is a stream already"
            stream.mask, stream.waiters = before.mask, before.waiters
            stream.settle()
        arm(self.poller, stream)
        self.table[fd] = stream
        return stream

    def begin(self, operation: Operation) -> Operation:
        """Begin it in the next turn."""
        self.begun.append(operation)
        return operation

    def accept(self, fd: int, callback: Result) -> Operation:
        """See kore.driver.Driver. The listening socket becomes non-blocking."""
        return self.begin(Accept(self, callback, fd))

    def accept_once(self, sock: socket, callback: Result) -> Operation:
        """See kore.driver.Driver."""
        return self.begin(AcceptOnce(self, callback, sock))

    def connect(self, sock: socket, address: Any, callback: Result) -> Operation:
        """See kore.driver.Driver. The socket becomes non-blocking; a malformed address raises here and now."""
        if sock.gettimeout() != 0:
            sock.setblocking(False)
        operation = Connect(self, callback, sock)
        error = sock.connect_ex(address)
        # connect(2): interrupted, it goes on all the same. EAGAIN (a unix listener with a full queue) is no progress.
        if error in (errno.EINPROGRESS, errno.EINTR):
            return self.begin(operation)
        operation.conclude(-error)
        return operation

    def receive(self, fd: int, length: int, callback: DataResult) -> Operation:
        """See kore.driver.Driver."""
        return self.begin(self.receiving(self, callback, fd, POLLIN, lambda _: os.read(fd, length)))

    def recvmsg(self, sock: socket, length: int, callback: MessageResult) -> Operation:
        """See kore.driver.Driver."""
        return self.begin(self.receiving(
            self, callback, sock.fileno(), POLLIN, lambda _: sock.recvmsg(length, CONTROL_BYTES, MSG_CMSG_CLOEXEC)))

    def send(self, fd: int, data: bytes, callback: Result) -> Operation:
        """See kore.driver.Driver. The fd must be non-blocking."""
        return self.begin(Trying(self, callback, fd, POLLOUT, lambda _: os.write(fd, data)))

    def sendto(self, sock: socket, data: bytes, address: Any, callback: Result) -> Operation:
        """See kore.driver.Driver. The socket must be non-blocking."""
        return self.begin(SendTo(self, callback, sock, data, address))

    def poll(self, fd: int, mask: int, callback: Result) -> Operation:
        """See kore.driver.Driver."""
        return self.begin(Waiting(self, callback, fd, mask, lambda events: events))

    def poll_multishot(self, fd: int, mask: int, callback: Result) -> Operation:
        """See kore.driver.Driver."""
        return self.begin(RepeatedPoll(self, callback, fd, mask, lambda events: events))

    def timeout(self, seconds: float, callback: Result) -> Operation:
        """See kore.driver.Driver."""
        operation = Timeout(self, callback, monotonic() + seconds)
        self.timeouts_made += 1
        heapq.heappush(self.timeouts, (operation.when, self.timeouts_made, operation))
        return operation

    def read(self, fd: int, length: int, offset: int, callback: DataResult) -> Operation:
        """See kore.driver.Driver.

        A read at an offset is made inline: readiness has nothing to say of files, which are always ready, and what is
        in the page cache costs less to read than to hand to a thread. A cold disk makes everyone wait; the ring is for
        that.
        """
        if offset >= 0:
            return self.begin(Instant(self, callback, lambda: os.pread(fd, length, offset)))
        return self.receive(fd, length, callback)

    def write(self, fd: int, data: bytes, callback: Result) -> Operation:
        """See kore.driver.Driver."""
        return self.send(fd, data, callback)

    def child(self, pid: int, callback: Result) -> Child:
        """See kore.driver.Driver."""
        return PidfdChild(self, pid, callback)

    def splice(self, fd_in: int, offset_in: int, fd_out: int, length: int, callback: Result) -> Operation:
        """See kore.driver.Driver. -ENOSYS where the system has no splice(2)."""
        if not hasattr(os, "splice"):
            return self.begin(Instant(self, callback, lambda: -errno.ENOSYS))
        return self.begin(Splice(self, callback, fd_in, offset_in, fd_out, length))


class Alarm:
    """The reading end of the wake pipe, in the driver's table."""

    __slots__ = ("fd", "mask", "plain", "waiters")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.mask = NOT_REGISTERED
        self.plain = -1
        self.waiters: Sequence[Waiting] = ()

    def wants(self) -> int:
        """Always the same."""
        return POLLIN

    def ready(self, _events: int, /) -> None:
        """Being woken was all; how often does not matter."""
        os.read(self.fd, READ_BYTES_MAX)
