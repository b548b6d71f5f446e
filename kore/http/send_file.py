"""Sends a response whose body lies in a file: file, pipe and socket are joined by splice(2), no byte comes to Python.

A pipe of a few hundred KiB is filled from the file and emptied into the socket, in turn, by the engine. The response
head and the heads of parts go through the same pipe, so nothing has to wait until something else has left. The next
step begins when the client has taken the last one: a transfer holds no more than its pipe.

Where splice can't be had (the system or a file system has none, all pipes are in use, the connection is encrypted) the
same pieces are read and written instead.

Cancelled operations belong to the kernel until they have ended, and so do their fds: the sender has an fd of its own
for the socket (dup(2)) and closes all its fds only then. A number that was closed and given to another connection
would otherwise receive this one's bytes.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any, Final

from kore.http.request import ANSWERED, ENDED, OPEN, STREAMING, Request

if TYPE_CHECKING:
    from kore.http.connection import HttpConnection

PIPE_BYTES: Final = 1 << 18
"""The size asked for a pipe. pipe(7): one user's unprivileged pipes may have 64 MiB together, that is 256 of these."""

PIPE_BYTES_MIN: Final = 1 << 16
"""A pipe the kernel made smaller, because its user has too many, is not used: heads would leave no room in it."""

PIPES_MAX: Final = 64
"""Transfers through pipes at a time in one worker: each costs four fds. More are read and written."""

PIPES_KEPT_MAX: Final = 8
"""Idle pipes kept for the next transfer."""

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
        if pipe.size < PIPE_BYTES_MIN:
            pipe.close()
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
    head = server.heads.build(status, prepared.head.minor, not connection.close_after, fields, length)
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
    sender = FileSender(connection, request, status, [head, *segments], fd, pipes)
    connection.pump = sender
    sender.step()


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


class FileSender:
    """One response on its way. The connection knows it as its pump: `later` and `close` are for it to call.

    It has at most one operation in flight, and each ends with a step or with the end of everything.
    """

    def __init__(
        self, connection: HttpConnection, request: Request, status: int, segments: list[Segment], fd: int, pipes: Pipes,
    ) -> None:
        self.connection = connection
        self.request = request
        self.status = status
        self.driver = connection.server.driver
        self.segments = segments
        self.index = 0  # of the segment whose turn it is
        self.fd = fd
        self.head_left = len(segments[0])  # bytes of the response head that are still to be sent
        self.body_bytes = 0  # sent
        self.piped = 0  # bytes in the pipe
        self.in_order = False  # all output before ours has left
        self.operation: Any = None
        self.busy = False  # an operation is in flight
        self.over = False
        self.pipes = pipes
        self.pipe = pipes.take() if connection.service.protocol == "http" else None
        self.socket_fd = -1
        if self.pipe is not None:
            try:
                self.socket_fd = os.dup(connection.stream.fd)
            except OSError:
                self._no_pipe()

    # --- for the connection --------------------------------------------------------------------------------

    def later(self) -> None:
        """The client has taken what output there was: go on in the next turn."""
        self.connection.server.loop.call_soon(self.step)

    def close(self) -> None:
        """The client is gone."""
        self.over = True
        if self.busy and self.operation is not None:
            self.operation.cancel()
        if not self.busy:
            self._release()

    # --- one step ------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Begin what is next; nothing while an operation is in flight, or output of before.

        Our fd of the socket outlives the stream: between the stream's end and lost(), which closes us, nothing is done.
        """
        if self.over or self.busy or self.connection.stream.gone:
            return
        if self.pipe is None:
            self._read_step()
        elif self.piped:
            if self.in_order or self._output_has_left():
                self.in_order = True
                self._empty(self.pipe)
        elif self.index < len(self.segments):
            self._fill(self.pipe)
        else:
            self._done()

    def _output_has_left(self) -> bool:
        """Whether the socket is ours. Otherwise we are called again."""
        stream = self.connection.stream
        if stream.stuck:
            return False  # drained() follows, which calls later()
        if stream.out is not None:
            self.later()  # it leaves at the end of this turn
            return False
        return True

    def _fill(self, pipe: Pipe) -> None:
        """Put the next bytes into the empty pipe: heads by writing, then as much of the file as there is room for."""
        while self.index < len(self.segments) and self.piped < pipe.size // 2:
            segment = self.segments[self.index]
            if isinstance(segment, bytes):
                written = os.write(pipe.write_fd, segment[: pipe.size // 2])
                self.piped += written
                self._advance(segment, written)
                continue
            offset, length = segment
            self.busy = True
            self.operation = self.driver.splice(
                self.fd, offset, pipe.write_fd, min(length, pipe.size - self.piped), self._filled)
            return
        self.later()

    def _advance(self, segment: Segment, size: int) -> None:
        """`size` bytes of the segment whose turn it is are on their way."""
        if isinstance(segment, bytes):
            rest: Segment = segment[size:]
            left = len(segment) - size
        else:
            rest = (segment[0] + size, segment[1] - size)
            left = rest[1]
        if left:
            self.segments[self.index] = rest
        else:
            self.index += 1

    def _filled(self, result: int) -> None:
        """The file has given `result` bytes."""
        self._landed()
        if self.over:
            self._release()
        elif result > 0:
            self.piped += result
            self._advance(self.segments[self.index], result)
            if self.in_order:
                self.step()
            else:
                self.later()  # whether earlier output was taken whole may be told later in this turn
        elif -result in AGAIN:
            self.later()
        elif -result in NO_SPLICE:
            self._without_pipe()
        else:
            self._broken_off(result)

    def _empty(self, pipe: Pipe) -> None:
        """Have the socket take what is in the pipe. The client's time for it runs from now."""
        self.connection._watch_output()
        self.busy = True
        self.operation = self.driver.splice(pipe.read_fd, -1, self.socket_fd, self.piped, self._emptied)

    def _emptied(self, result: int) -> None:
        """The socket has taken `result` bytes."""
        self._landed()
        if self.over:
            self._release()
            return
        self.connection.stuck_at = None
        if result > 0:
            self.piped -= result
            self._count(result)
            self.step()
        elif -result in AGAIN:
            self.later()
        elif -result in NO_SPLICE:
            self._without_pipe()
        else:
            self.connection.stream.abort()  # EPIPE, ECONNRESET: lost() follows, which closes us

    def _count(self, sent: int) -> None:
        head = min(sent, self.head_left)
        self.head_left -= head
        self.body_bytes += sent - head

    def _landed(self) -> None:
        self.busy = False
        self.operation = None

    # --- without a pipe ------------------------------------------------------------------------------------

    def _without_pipe(self) -> None:
        """These two can't be spliced: take back what is in the pipe, and read from now on."""
        assert self.pipe is not None
        pieces: list[Segment] = []
        while self.piped:
            piece = os.read(self.pipe.read_fd, self.piped)
            self.piped -= len(piece)
            pieces.append(piece)
        self.segments[self.index : self.index] = pieces
        self._no_pipe()
        self.later()

    def _no_pipe(self) -> None:
        if self.pipe is not None:
            # Used again only after a transfer that was completed: a cancelled operation may have moved bytes all the
            # same, and the next client would get them.
            self.pipes.give_back(self.pipe, empty=self.index == len(self.segments) and not self.piped)
            self.pipe = None
        if self.socket_fd >= 0:
            os.close(self.socket_fd)
            self.socket_fd = -1

    def _read_step(self) -> None:
        """Write heads, read a piece; no more while the client has not taken the one before."""
        if not self._output_has_left():
            return
        while self.index < len(self.segments):
            segment = self.segments[self.index]
            if isinstance(segment, bytes):
                self._write(segment)
                continue
            self.busy = True
            self.operation = self.driver.read(self.fd, min(segment[1], PIECE_BYTES), segment[0], self._read)
            return
        self._done()

    def _read(self, result: bytes | int) -> None:
        """A piece of the file, or why there is none."""
        self._landed()
        if self.over:
            self._release()
        elif isinstance(result, bytes) and result:
            self._write(result)
            self.later()
        elif isinstance(result, int) and -result in AGAIN:
            self.later()
        else:
            self._broken_off(result if isinstance(result, int) else 0)

    def _write(self, data: bytes) -> None:
        self.connection.write(data)
        self._count(len(data))
        self._advance(self.segments[self.index], len(data))

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
