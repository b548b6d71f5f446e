"""The channel between the parent and one worker: small messages, bounded, never waited for.

A SOCK_SEQPACKET pair keeps the borders of messages, so there is no framing to get wrong, and the kernel's
buffer is the bound: a message it does not take now is refused to the sender, who counts it. Who speaks is
known from the socket, never from the message. The end of the channel means that the other side is gone.
"""

from __future__ import annotations

import enum
import select
import socket

MESSAGE_BYTES_MAX = 65536
"""The longest message; a log line of the longest text, each character at its widest escape, fits."""

BUFFER_BYTES = 1 << 20
"""Send buffer asked for (the kernel's net.core.wmem_max caps it): some hundred log lines in a burst."""


class Kind(enum.IntEnum):
    """What a message means. The first group goes to the parent, the second to a worker."""

    READY = 1  # the worker serves; no body
    LOG = 2  # priority (one byte), UTF-8 text
    DROPPED = 3  # log lines this worker could not send: decimal text
    SHUTDOWN = 4  # stop the server, exit code 0; no body
    FATALX = 5  # stop the server, exit code 1; no body

    STOP = 16  # drain and end; the signal's number (one byte)
    ABORT = 17  # end now; no body


class ChannelError(Exception):
    """The peer sent what no peer of ours sends: an unknown kind, or more than MESSAGE_BYTES_MAX."""


class Channel:
    """One end. The process that holds it calls close(), or dies."""

    __slots__ = ("sock",)

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)

    def fileno(self) -> int:
        """The descriptor, for pollers."""
        return self.sock.fileno()

    def send(self, kind: Kind, body: bytes = b"") -> bool:
        """Send now or not at all; False when the peer is slow or gone."""
        try:
            self.sock.send(bytes((kind,)) + body)
        except OSError:
            return False
        return True

    def send_last(self, kind: Kind, body: bytes = b"", *, timeout: float = 0.5) -> bool:
        """Send and wait up to `timeout` seconds for room: for the last words of a process that ends."""
        if self.send(kind, body):
            return True
        poller = select.poll()
        poller.register(self.sock.fileno(), select.POLLOUT)
        poller.poll(timeout * 1000)
        return self.send(kind, body)

    def receive(self) -> tuple[Kind, bytes] | None:
        """The next message, or None when there is none now.

        Raises EOFError when the peer is gone and everything it sent has been read; ChannelError.
        """
        try:
            data, _, flags, _ = self.sock.recvmsg(MESSAGE_BYTES_MAX)
        except (BlockingIOError, InterruptedError):
            return None
        except ConnectionError:
            raise EOFError from None
        if not data:
            raise EOFError
        if flags & socket.MSG_TRUNC:
            raise ChannelError(f"a message of more than {MESSAGE_BYTES_MAX} bytes")
        try:
            return Kind(data[0]), data[1:]
        except ValueError:
            raise ChannelError(f"a message of unknown kind {data[0]}") from None

    def close(self) -> None:
        """Close this end; the other side reads the end of the channel."""
        self.sock.close()


def channel_pair() -> tuple[Channel, Channel]:
    """The parent's end and the worker's. Both are close-on-exec. Raises OSError."""
    parent, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (parent, child):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return Channel(parent), Channel(child)
