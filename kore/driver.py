"""The contract between an engine (io_uring, epoll, kqueue) and everything above it.

An engine turns requests on file descriptors into completions. Nothing above this file knows which engine it
runs on, and nothing in an engine knows what the bytes mean. Two shapes of work are enough:

*Operations* are submitted, complete later and call back: ``callback(result)`` with a result of zero or more, or
a negated errno. They serve everything that is not a long conversation: accept, connect, poll, file reads, splice.

*Streams* are connected sockets that stay: input is pushed to an owner as it arrives, output is queued and leaves
once a turn, in one piece. That is the hot path of the server, so no object is made per message.

Callbacks run inside ``Driver.wait`` and never inside the call that caused them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from socket import SCM_RIGHTS, SOL_SOCKET, socket
from typing import Any, ClassVar, Protocol

Result = Callable[[int], None]
"""Called with a result >= 0, or with a negated errno."""

DataResult = Callable[["bytes | int"], None]
"""Called with the bytes, ``b""`` at the end of input, or with a negated errno."""

Message = tuple[bytes, "list[tuple[int, int, bytes]]", int, Any]
"""What `socket.recvmsg` gives: data, ancillary data, flags, and the sender's address as Python has it, or None."""

MessageResult = Callable[["Message | int"], None]
"""Called with a message or with a negated errno. Fds in its ancillary data are the receiver's to close."""

CONTROL_BYTES = 1024
"""Room for ancillary data of one message: SCM_MAX_FD (253) fds fit, and the reference has the same."""


def passed_fds(message: Message) -> list[int]:
    """The fds that came with a message (unix(7), SCM_RIGHTS)."""
    fds = array("i")
    for level, kind, data in message[1]:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


class Operation(Protocol):
    """One operation in flight. It belongs to the driver until its last completion, whoever lost interest."""

    def cancel(self) -> None:
        """Ask for an early end; the callback still gets its last call, ``-ECANCELED`` or the result that won."""

    def forget(self) -> None:
        """Cancel and never call back again. What arrives all the same (an accepted fd) is closed by the driver."""


class Child(Protocol):
    """A child process whose end is waited for. Reaping it is for whoever asked: the system only says when."""

    def wait(self, callback: Result) -> None:
        """Wait again: waitpid(2) said after the callback that it has not ended yet. Some systems tell early."""

    def kill(self) -> None:
        """SIGKILL, to this process and no other. ProcessLookupError: somebody has reaped it."""

    def close(self) -> None:
        """Release what was needed for it: after the last callback, or when the driver has been closed."""


class StreamOwner(Protocol):
    """Who hears from a stream."""

    def received(self, data: bytes) -> None:
        """Bytes arrived; ``b""`` once, at the end of input. The stream can still be written to then."""

    def stalled(self) -> None:
        """The kernel does not take all of the output: the peer is slow to read. drained() follows, or lost()."""

    def drained(self) -> None:
        """All output that the kernel would not take at once has been taken now."""

    def lost(self, error: int) -> None:
        """The stream is over and its fd closed: 0 after close() or abort(), else an errno. Called once, last."""


class Stream:
    """A connected stream socket: the half that is the same on every engine.

    The engine gives the underscored methods; everything it calls back goes to ``owner``. Output is kept in
    ``out`` until the driver flushes it at the end of the turn: nothing, one piece, or a list of pieces.
    """

    __slots__ = (
        "closing", "driver", "ended", "fd", "finishing", "gone", "out", "owner", "reading", "received", "shut", "stuck",
    )

    announces_end: ClassVar[bool] = False
    """Whether the peer is told that what it got is whole, before it hears of the FIN."""

    def __init__(self, driver: Any, fd: int, owner: StreamOwner) -> None:
        self.fd = fd
        self.driver = driver
        self.owner: StreamOwner | None = owner
        self.received: Callable[[bytes], None] | None = owner.received
        self.out: bytes | list[bytes] | None = None
        self.stuck = 0  # bytes handed to a send that has not completed: the kernel's buffer was full
        self.reading = True
        self.ended = False  # the peer sent its FIN
        self.shut = False  # nothing more may be written: after finish(), close() and abort()
        self.finishing = False  # a FIN of ours follows the last byte of output
        self.closing = False
        self.gone = False

    def write(self, data: bytes) -> None:
        """Queue `data`; it leaves at the end of this turn. After finish(), close() or a loss it is dropped."""
        if self.shut:
            return
        out = self.out
        if out is None:
            self.out = data
            if not self.stuck:
                self.driver.dirty.append(self)
        elif type(out) is list:
            out.append(data)
        else:
            self.out = [out, data]  # type: ignore[list-item]

    @property
    def pending(self) -> int:
        """Bytes written but not yet taken by the kernel."""
        out = self.out
        if out is None:
            return self.stuck
        return self.stuck + (sum(map(len, out)) if type(out) is list else len(out))

    def finish(self) -> None:
        """Send a FIN after what was written; reading goes on."""
        if not (self.finishing or self.closing):
            self.finishing = self.shut = True
            self.driver.ending.append(self)

    def close(self) -> None:
        """Close after what was written has left. No more `received`; `lost(0)` follows."""
        if not self.closing:
            self.closing = self.shut = True
            self.received = None
            self.driver.ending.append(self)

    def abort(self) -> None:
        """Close now and drop what was not sent. No more `received`; `lost(0)` follows."""
        if not self.gone:
            self.out = None
            self.closing = self.shut = True
            self.received = None
            self.gone = True
            self.driver.ending.append(self)

    def pause(self) -> None:
        """Stop reading. What the kernel had handed over already is kept and delivered on resume()."""
        raise NotImplementedError

    def resume(self) -> None:
        """Read again after pause()."""
        raise NotImplementedError


class Driver(Protocol):
    """What an engine does. One thread owns it; only `wake` may be called from elsewhere."""

    name: str
    wake_fd: int
    """A non-blocking fd for signal.set_wakeup_fd: a byte written to it ends a wait."""
    dirty: list[Any]
    ending: list[Any]

    def wait(self, timeout: float | None) -> None:
        """Submit what is queued, wait for completions (seconds; None: for ever; 0: only look) and call back."""

    def submit(self) -> None:
        """Begin and cancel now what would be with the next wait, so that what was cancelled lets go of its fd."""

    def wake(self) -> None:
        """End a wait from another thread or a signal handler. Never blocks, never raises."""

    def close(self) -> None:
        """Cancel everything, call nobody back, release the engine's fds. Streams' fds are closed."""

    def stream(self, fd: int, owner: StreamOwner) -> Stream:
        """Take over a connected, non-blocking stream socket and read from it at once."""

    def accept(self, fd: int, callback: Result) -> Operation:
        """Accept until cancelled: an fd (non-blocking, close-on-exec) each time. After an error it is over."""

    def accept_once(self, sock: socket, callback: Result) -> Operation:
        """Accept one connection: an fd (non-blocking, close-on-exec). The socket is non-blocking."""

    def connect(self, sock: socket, address: Any, callback: Result) -> Operation:
        """Connect to a numeric address as `socket.connect` takes it; 0 when done.

        -EAGAIN from a unix listener whose queue is full: nothing tells when it no longer is.
        """

    def receive(self, fd: int, length: int, callback: DataResult) -> Operation:
        """Receive once from a socket, at most `length` bytes, which are allocated while it waits."""

    def recvmsg(self, sock: socket, length: int, callback: MessageResult) -> Operation:
        """Receive one message of at most `length` bytes, with its sender and CONTROL_BYTES of ancillary data."""

    def send(self, fd: int, data: bytes, callback: Result) -> Operation:
        """Send once; the number of bytes taken."""

    def sendto(self, sock: socket, data: bytes, address: Any, callback: Result) -> Operation:
        """Send once to a numeric address as `socket.sendto` takes it; the number of bytes taken.

        -EAGAIN when the queue of a unix datagram socket is full: readiness of the sender says nothing of that.
        """

    def poll(self, fd: int, mask: int, callback: Result) -> Operation:
        """Wait once until one of the poll(2) events in `mask` holds; the events."""

    def poll_multishot(self, fd: int, mask: int, callback: Result) -> Operation:
        """The same until cancelled, level-triggered: at least one call a turn while an event holds."""

    def timeout(self, seconds: float, callback: Result) -> Operation:
        """Call back with 0 after `seconds`."""

    def read(self, fd: int, length: int, offset: int, callback: DataResult) -> Operation:
        """Read from a file at `offset` (-1: at its position)."""

    def write(self, fd: int, data: bytes, callback: Result) -> Operation:
        """Write once to a non-blocking pipe; the number of bytes taken."""

    def child(self, pid: int, callback: Result) -> Child:
        """Call back, with 0 or a negated errno, once child `pid` has ended. OSError where it is known to be none."""

    def splice(self, fd_in: int, offset_in: int, fd_out: int, length: int, callback: Result) -> Operation:
        """Move bytes between a pipe and another fd (offset -1: none); the number of bytes moved."""
