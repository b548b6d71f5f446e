"""Sends a response that is kept in memory as a file of its own, head and body: one sendfile(2), and no byte is copied.

Writing 64 KiB to a socket copies them into its buffer, 6 us; from a file the socket takes the pages as they are. A
memfd (memfd_create(2)) is such a file: it stands on no disk, so sending it waits for nobody, and nobody changes it
while it is sent.

The send is made when a turn's completions have all been told: what is still untaken of earlier output is known then,
and nothing can be overtaken.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from kore.http.request import STREAMING, Request

if TYPE_CHECKING:
    from kore.http.connection import HttpConnection

MEMORY_BYTES_MIN: Final = 32768
"""Below this, copying costs less than the steps it takes to avoid it."""


class MemoryFile:
    """A response in a memfd. Raises OSError when there is no fd for it. Closed when nobody knows it any more."""

    __slots__ = ("fd", "size")

    def __init__(self, head: bytes, body: bytes) -> None:
        self.fd = -1
        self.size = len(head) + len(body)
        self.fd = os.memfd_create("response", os.MFD_CLOEXEC)
        if os.writev(self.fd, (head, body)) != self.size:
            raise OSError("a response could not be kept")

    def __del__(self) -> None:
        # A transfer that waits for its turn keeps the file open after the cache has replaced it.
        if self.fd >= 0:
            os.close(self.fd)


def memory_file(head: bytes, body: bytes) -> MemoryFile | None:
    """The response as such a file; None where it would gain nothing or can't be had."""
    if len(body) < MEMORY_BYTES_MIN or not (hasattr(os, "memfd_create") and hasattr(os, "sendfile")):
        return None
    try:
        return MemoryFile(head, body)
    except OSError:
        return None


def send_memory(request: Request, file: MemoryFile, head_bytes: int) -> None:
    """Answer `request`, which stands at the short way of responses, with `file`."""
    connection = request._connection
    request._state = STREAMING
    connection.request = request
    connection.ready = False
    connection.pump = MemorySender(connection, request, file, head_bytes)
    connection.server.loop.call_soon(connection.pump.step)


class MemorySender:
    """The connection's pump until the response has been handed over; it does so in one step."""

    __slots__ = ("body_bytes", "connection", "file", "request", "status")

    def __init__(self, connection: HttpConnection, request: Request, file: MemoryFile, head_bytes: int) -> None:
        self.connection = connection
        self.request = request
        self.file = file
        self.status = 200
        self.body_bytes = file.size - head_bytes

    def later(self) -> None:
        """Output of before has left: go on in the next turn."""
        self.connection.server.loop.call_soon(self.step)

    def close(self) -> None:
        """The client is gone: `step` sees that."""

    def step(self) -> None:
        """Hand it over; what the socket does not take at once is copied and sent as any output is."""
        connection, file = self.connection, self.file
        stream = connection.stream
        if connection.pump is not self or stream.gone or stream.stuck:
            return  # lost() or drained() follows, or came
        sent = 0
        if stream.out is None:
            try:
                sent = os.sendfile(stream.fd, file.fd, 0, file.size)
            except OSError:
                sent = 0  # a full socket, or a dead one, which the write will meet
        if sent < file.size:
            connection.write(os.pread(file.fd, file.size - sent, sent))
        connection.streamed(self.request)
