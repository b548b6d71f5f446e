"""Sends a response whose body lies in a file, in steps that copy no byte to Python: the next one begins when the client
has taken the last.

What the kernel has in its page cache is handed to the socket by sendfile(2), which then waits for nobody. What it would
have to read from a disk goes by splice(2) through a pipe, by the engine, so that no other client waits for that disk:
the pipe is filled from the file and emptied into the socket, in turn. CPU time for 1 MiB, measured: 100 us by sendfile,
200 us by splice.

Where neither can be had (the system or a file system has none, all pipes are in use, the connection is encrypted) the
same pieces are read and written instead.

Cancelled operations belong to the kernel until they have ended, and so do their fds: the sender has an fd of its own
for the socket (dup(2)) and closes all its fds only then. A number that was closed and given to another connection
would otherwise receive this one's bytes.
"""

from __future__ import annotations

import errno
import fcntl
import os
from select import POLLOUT
from typing import TYPE_CHECKING, Any, Final

from kore.http.request import ANSWERED, ENDED, OPEN, STREAMING, Request

if TYPE_CHECKING:
    from kore.http.connection import HttpConnection

PIPE_BYTES: Final = 1 << 18
"""The size asked for a pipe. pipe(7): one user's unprivileged pipes may have 64 MiB together, that is 256 of these."""

PIPES_MAX: Final = 64
"""Transfers through pipes at a time in one worker: each costs two fds more than others. More are read and written."""

PIPES_KEPT_MAX: Final = 8
"""Idle pipes kept for the next transfer."""

SENDFILE_BYTES: Final = 1 << 19
"""Bytes of one sendfile: 50 us, after which the other connections have their turn."""

PIECE_BYTES: Final = 131072
"""Bytes of one read where splice can't be had."""

NO_SPLICE: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.ENXIO})
"""What splice(2) says when one of the two ends does not support it, or a sandbox forbids it."""

AGAIN: Final = frozenset({errno.EINTR, errno.EAGAIN})

Segment = bytes | tuple[int, int]
"""Bytes to send, or an offset in the file and a length."""


class Pipe:
    """A pipe that does not block."""

    __slots__ = ("read_fd", "size", "write_fd")

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.size = fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            self.size = fcntl.fcntl(self.write_fd, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        """Close both ends."""
        os.close(self.read_fd)
        os.close(self.write_fd)


class Pipes:
    """The pipes of a worker."""

    def __init__(self, most: int = PIPES_MAX) -> None:
        self.most = most
        self.in_use = 0
        self._idle: list[Pipe] = []

    def take(self) -> Pipe | None:
        """An empty pipe; None when there are as many as may be, no fds for one, or no splice(2)."""
        if self.in_use >= self.most or not hasattr(os, "splice"):
            return None
        try:
            pipe = self._idle.pop() if self._idle else Pipe()
        except OSError:
            return None
        self.in_use += 1
        return pipe

    def give_back(self, pipe: Pipe, *, empty: bool) -> None:
        """A pipe that is not used any more; one that is not empty is not used again."""
        self.in_use -= 1
        if empty and len(self._idle) < PIPES_KEPT_MAX:
            self._idle.append(pipe)
        else:
            pipe.close()

    def close(self) -> None:
        """Close the idle ones. Called when the file maps are closed."""
        while self._idle:
            self._idle.pop().close()


def send(
    request: Request, status: int, fields: tuple[tuple[str, str], ...], segments: list[Segment], fd: int, pipes: Pipes,
) -> None:
    """Answer with `segments` of the file `fd`, which is closed here at the end; a HEAD, or -1, with the head alone.

    Raises RuntimeError when the request has been answered already.
    """
    connection = request._connection
    if request._state != OPEN:
        _close(fd)
        raise RuntimeError(f"{request!r} has been answered already")
    if connection.gone:
        _close(fd)
        request._state = ENDED
        return
    prepared, server = request._prepared, connection.server
    if not prepared.keep_alive or server.draining or connection.receiving:
        connection.close_after = True
    for name, value in fields:
        if name.lower() == "connection" and "close" in value.lower():
            connection.close_after = True
    length = sum(len(segment) if isinstance(segment, bytes) else segment[1] for segment in segments)
    head = connection.service.responses.build(status, prepared.head.minor, not connection.close_after, fields, length)
    if prepared.is_head or not length:
        _close(fd)
        request._state = ANSWERED
        connection.write(head)
        connection.log_access(request, status, 0)
        if connection.task is not None and connection.request is request:
            server.loop.call_soon(connection.release, request)
        return
    request._state = STREAMING
    connection.request = request
    connection.ready = False
    connection.client_address()  # for the log: it cannot be asked for once the client is gone
    connection.write(head)
    sender = FileSender(connection, request, status, segments, fd, pipes)
    connection.pump = sender
    sender.later()


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


class FileSender:
    """One response on its way. The connection knows it as its pump: `later` and `close` are for it to call.

    It has at most one operation in flight, and each ends with a step or with the end of everything. Heads of parts are
    written as any output is; the bytes of the file wait until that has left.
    """

    def __init__(
        self, connection: HttpConnection, request: Request, status: int, segments: list[Segment], fd: int, pipes: Pipes,
    ) -> None:
        self.connection = connection
        self.request = request
        self.status = status
        self.body_bytes = 0  # sent
        self.driver = connection.server.driver
        self.segments = segments
        self.index = 0  # of the segment whose turn it is
        self.fd = fd
        self.socket_fd = -1
        self.in_order = False  # all output before ours has left
        # Read and write: the bytes are not to leave as they are, or there is no other way (OpenBSD, NetBSD).
        self.reading = connection.service.protocol != "http" or not hasattr(os, "sendfile")
        self.pipes = pipes
        self.pipe: Pipe | None = None
        self.piped = 0  # bytes in it
        self.operation: Any = None  # in flight
        self.over = False
        if not self.reading:
            try:
                self.socket_fd = os.dup(connection.stream.fd)
            except OSError:
                self.reading = True

    # --- for the connection --------------------------------------------------------------------------------

    def later(self) -> None:
        """The client has taken what output there was: go on in the next turn."""
        self.connection.server.loop.call_soon(self.step)

    def close(self) -> None:
        """The client is gone."""
        self.over = True
        if self.operation is not None:
            self.operation.cancel()
        else:
            self._release()

    # --- one step ------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Begin what is next; nothing while an operation is in flight, or output of before.

        Our fd of the socket outlives the stream: between the stream's end and lost(), which closes us, nothing is done.
        """
        if self.over or self.operation is not None or self.connection.stream.gone:
            return
        if not (self.in_order or self._output_has_left()):
            return
        if self.piped:
            self._empty()
        elif self.index == len(self.segments):
            self._done()
        else:
            segment = self.segments[self.index]
            if isinstance(segment, bytes):
                self._write(segment)
                self.later()
            elif self.reading:
                self._read(segment)
            elif not self._send(segment):
                self._fill(segment)

    def _output_has_left(self) -> bool:
        """Whether the socket is ours. Otherwise we are called again.

        Steps that begin with this are those of `later`: what has not been taken may be told late in a turn.
        """
        stream = self.connection.stream
        if stream.stuck:
            return False  # drained() follows, which calls later()
        if stream.out is not None:
            self.later()  # it leaves at the end of this turn
            return False
        self.in_order = True
        return True

    def _write(self, data: bytes) -> None:
        """Send as any output is sent."""
        self.connection.write(data)
        self.in_order = False
        self._sent(len(data))

    def _sent(self, size: int) -> None:
        """`size` bytes of the segment whose turn it is have gone to the client."""
        self.body_bytes += size
        self._advance(size)

    def _advance(self, size: int) -> None:
        """`size` bytes of the segment whose turn it is need no more be thought of."""
        segment = self.segments[self.index]
        rest: Segment = segment[size:] if isinstance(segment, bytes) else (segment[0] + size, segment[1] - size)
        if rest if isinstance(rest, bytes) else rest[1]:
            self.segments[self.index] = rest
        else:
            self.index += 1

    # --- from the page cache -------------------------------------------------------------------------------

    def _send(self, segment: tuple[int, int]) -> bool:
        """Hand the next bytes of the file to the socket; False where that would wait for a disk, or can't be."""
        offset, size = segment[0], min(segment[1], SENDFILE_BYTES)
        if not self._in_memory(offset, size):
            return False
        try:
            sent = os.sendfile(self.socket_fd, self.fd, offset, size)
        except BlockingIOError:
            self._wait_for_room()
            return True
        except OSError as error:
            if error.errno in NO_SPLICE:
                return False
            self.connection.stream.abort()  # EPIPE, ECONNRESET: lost() follows, which closes us
            return True
        if not sent:
            self._broken_off(0)
            return True
        self._sent(sent)
        if sent < size:
            self._wait_for_room()
        elif self.index == len(self.segments):
            self._done()
        else:
            self.later()
        return True

    def _in_memory(self, offset: int, size: int) -> bool:
        """Whether the kernel has the first and the last of these bytes at hand: what it reads ahead lies between.

        An engine that has no other way than to wait for the disk need not ask.
        """
        if self.driver.name != "uring":
            return True
        try:
            for position in (offset, offset + size - 1):
                os.preadv(self.fd, [bytearray(1)], position, os.RWF_NOWAIT)
        except OSError:  # EAGAIN: on the disk; EOPNOTSUPP: a file system that does not say
            return False
        return True

    def _wait_for_room(self) -> None:
        """The socket takes no more: wait until it does. The client's time for it runs from now."""
        self.connection._watch_output()
        self.operation = self.driver.poll(self.socket_fd, POLLOUT, self._has_room)

    def _has_room(self, result: int) -> None:
        """There is room, or the client is gone, which the next step meets."""
        if self._landed():
            self.connection.stuck_at = None
            if result < 0:
                self._broken_off(result)
            else:
                self.step()

    def _landed(self) -> bool:
        """The operation has ended; whether it goes on."""
        self.operation = None
        if self.over:
            self._release()
        return not self.over

    # --- through a pipe ------------------------------------------------------------------------------------

    def _fill(self, segment: tuple[int, int]) -> None:
        """Have the next bytes of the file put into the pipe."""
        if self.pipe is None:
            self.pipe = self.pipes.take()
        if self.pipe is None:
            self.reading = True
            self._read(segment)
        else:
            size = min(segment[1], self.pipe.size)
            self.operation = self.driver.splice(self.fd, segment[0], self.pipe.write_fd, size, self._filled)

    def _filled(self, result: int) -> None:
        """The file has given `result` bytes."""
        if not self._landed():
            return
        if result > 0:
            self.piped = result
            self._advance(result)
            self.step()
        elif -result in AGAIN:
            self.later()
        elif -result in NO_SPLICE:
            self._without_pipe()
        else:
            self._broken_off(result)

    def _empty(self) -> None:
        """Have the socket take what is in the pipe."""
        assert self.pipe is not None
        self.connection._watch_output()
        self.operation = self.driver.splice(self.pipe.read_fd, -1, self.socket_fd, self.piped, self._emptied)

    def _emptied(self, result: int) -> None:
        """The socket has taken `result` bytes."""
        if not self._landed():
            return
        self.connection.stuck_at = None
        if result > 0:
            self.piped -= result
            self.body_bytes += result
            self.step()
        elif -result in AGAIN:
            self.later()
        elif -result in NO_SPLICE:
            self._without_pipe()
        else:
            self.connection.stream.abort()

    def _without_pipe(self) -> None:
        """These two can't be spliced: take back what is in the pipe, and read from now on."""
        assert self.pipe is not None
        while self.piped:
            piece = os.read(self.pipe.read_fd, self.piped)
            self.piped -= len(piece)
            self.segments.insert(self.index, piece)
            self._write(piece)
        self._no_pipe()
        self.reading = True
        self.later()

    def _no_pipe(self) -> None:
        if self.pipe is not None:
            # Used again only after a transfer that was completed: a cancelled operation may have moved bytes all the
            # same, and the next client would get them.
            self.pipes.give_back(self.pipe, empty=self.index == len(self.segments) and not self.piped)
            self.pipe = None

    # --- without ---------------------------------------------------------------------------------------------

    def _read(self, segment: tuple[int, int]) -> None:
        """Read the next bytes; no more while the client has not taken those before."""
        self.operation = self.driver.read(self.fd, min(segment[1], PIECE_BYTES), segment[0], self._has_read)

    def _has_read(self, result: bytes | int) -> None:
        """A piece of the file, or why there is none."""
        if not self._landed():
            return
        if isinstance(result, bytes) and result:
            self._write(result)
            self.later()
        elif isinstance(result, int) and -result in AGAIN:
            self.later()
        else:
            self._broken_off(result if isinstance(result, int) else 0)

    # --- the end -------------------------------------------------------------------------------------------

    def _done(self) -> None:
        """All of it has been handed over."""
        self.over = True
        self._release()
        self.connection.streamed(self.request)

    def _broken_off(self, result: int) -> None:
        """The file ends before what was announced, or can't be read: the client must see that it is not whole.

        The connection is closed without the missing bytes (RFC 9112 8).
        """
        why = os.strerror(-result) if result else "it was truncated"
        self.connection.server.log_error(f"{self.request!r}: the file could not be sent whole: {why}")
        self.connection.close_after = True
        self._done()

    def _release(self) -> None:
        """Give back all fds."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self._no_pipe()
        if self.socket_fd >= 0:
            os.close(self.socket_fd)
            self.socket_fd = -1
