"""The channel between the parent and one worker: small messages, bounded, never waited for.

A SOCK_SEQPACKET pair keeps the borders of messages, so there is no framing to get wrong, and the kernel's
buffer is the bound: a message it does not take now is refused to the sender, who counts or keeps it. Who speaks is
known from the socket, never from the message. FreeBSD 15 keeps only the borders that are marked (MSG_EOR), as POSIX
has it; on Linux the mark means nothing. The end of the channel means that the other side is gone.

Each worker has two: one for what the processes say to each other (log lines, ready, stop), and one for what workers
say to workers, so that a flood of either never takes the room of the other.
"""

from __future__ import annotations

import array
import contextlib
import enum
import errno
import os
import select
import socket
import sys
from collections.abc import Sequence

from kore.readiness.syscalls import MSG_CMSG_CLOEXEC

MESSAGE_BYTES_MAX = 65536
"""The longest message; a log line of the longest text, each character at its widest escape, fits."""

BUFFER_BYTES = 1 << 20
"""Buffer asked for (Linux caps it by net.core.wmem_max, BSDs refuse too much): some hundred log lines in a burst."""

BUFFERS = (socket.SO_SNDBUF, socket.SO_RCVBUF)
"""Messages wait in the sender's buffer on Linux, in the receiver's on the BSDs."""

LISTENER_SECONDS_MAX = 5.0
"""For the parent to make room for a listener."""

FDS_SPACE = socket.CMSG_LEN(array.array("i").itemsize)
"""Room for the one descriptor a message may carry; what else is sent along, the kernel closes (unix(7))."""

_SO_PASSRIGHTS = 83  # asm-generic/socket.h, Linux 6.16

NO_ROOM = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS, errno.EINTR})
"""Errors of a send that pass: no room in the buffer, no memory, too many descriptors on their way (unix(7))."""


class Kind(enum.IntEnum):
    """What a message means. The first group goes to the parent, the second to a worker, the third both ways."""

    READY = 1  # the worker serves; no body
    LOG = 2  # priority (one byte), UTF-8 text
    DROPPED = 3  # log lines this worker could not send: decimal text
    SHUTDOWN = 4  # stop the server, exit code 0; no body
    FATALX = 5  # stop the server, exit code 1; no body
    LISTENER = 6  # the listener of this worker's filter comes along; no body; once, before it is ready
    SITE = 7  # from the tracer: a call site, as kore.process.sites writes it
    ABUSE = 8  # from the key manager: a worker's id and pid in decimal, and what it asked for that no honest one does

    STOP = 16  # drain and end; the signal's number (one byte)
    ABORT = 17  # end now; no body
    REOPEN = 18  # put the descriptor sent along in the place of the one with this decimal number
    STACKS = 19  # to the tracer: the reading end of the pipe for a worker's stacks; then its LISTENER, same body
    JOIN = 20  # to the key manager: its end of a pair comes along; id (0: no worker) and pid of who has the other
    KEYS = 21  # to who has the other end: it comes along; no body

    OBJECT = 32  # a piece of a pickled object for koreapp.onmsg; kore.process.pieces
    BROADCAST = 33  # a piece of a WebSocket message for the clients of a worker: its opcode, then the data


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
            self.sock.send(bytes((kind,)) + body, socket.MSG_EOR)
        except OSError:
            return False
        return True

    def send_fd(self, kind: Kind, body: bytes, fd: int) -> bool:
        """The same with a descriptor along, of which the peer gets one of its own."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (fd,)))
        try:
            self.sock.sendmsg((bytes((kind,)) + body,), (rights,), socket.MSG_EOR)
        except OSError:
            return False
        return True

    def send_message(self, message: bytes) -> bool:
        """Send a message with its kind in front; False when there is no room now. Raises OSError: the peer is gone."""
        try:
            self.sock.send(message, socket.MSG_EOR)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return False
        return True

    def send_last(self, kind: Kind, body: bytes = b"", *, timeout: float = 0.5) -> bool:
        """Send and wait up to `timeout` seconds for room: for the last words of a process that ends."""
        if self.send(kind, body):
            return True
        self.wait_for_room(timeout)
        return self.send(kind, body)

    def send_listener(self, fd: int) -> bool:
        """Hand the listener of a filter to the parent, and wait for room if need be: much may have been logged before.

        False when the parent cannot be had to take it: it does nothing that takes LISTENER_SECONDS_MAX.
        """
        if self.send_fd(Kind.LISTENER, b"", fd):
            return True
        self.wait_for_room(LISTENER_SECONDS_MAX)
        return self.send_fd(Kind.LISTENER, b"", fd)

    def wait_for_room(self, timeout: float) -> None:
        """Wait up to `timeout` seconds until the buffer has room, or the peer is gone."""
        poller = select.poll()
        poller.register(self.sock.fileno(), select.POLLOUT)
        poller.poll(timeout * 1000)

    def refuse_descriptors(self) -> None:
        """Have the kernel refuse descriptors to the peer (EPERM, SO_PASSRIGHTS), where it can: Linux 6.16.

        Else the last copy of what the peer sends may be closed here, and closing may take as long as the peer likes: a
        TCP socket with SO_LINGER and bytes that nobody reads.
        """
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)

    def receive(self) -> tuple[Kind, bytes] | None:
        """The next message, or None when there is none now; descriptors sent along are closed by the kernel.

        Raises EOFError when the peer is gone and everything it sent has been read; ChannelError.
        """
        message = self.receive_message()
        return None if message is None else (kind_of(message), message[1:])

    def receive_fd(self) -> tuple[Kind, bytes, int | None] | None:
        """The next message and the descriptor that came along, which is the caller's to close. Raises as receive()."""
        received = self._receive(FDS_SPACE)
        if received is None:
            return None
        message, ancillary = received
        fds = _fds_of(ancillary)
        try:
            return kind_of(message), message[1:], fds[0] if fds else None
        except ChannelError:
            _close(fds)
            raise

    def receive_message(self) -> bytes | None:
        """The next message with its kind in front, which may be any byte. Raises as receive()."""
        received = self._receive(0)
        return None if received is None else received[0]

    def _receive(self, space: int) -> tuple[bytes, list[tuple[int, int, bytes]]] | None:
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(MESSAGE_BYTES_MAX, space, MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return None
        except ConnectionError:
            raise EOFError from None
        if not data:
            _close(_fds_of(ancillary))  # an empty message may have one too
            raise EOFError
        if flags & socket.MSG_TRUNC:
            _close(_fds_of(ancillary))
            raise ChannelError(f"a message of more than {MESSAGE_BYTES_MAX} bytes")
        return data, ancillary

    def piece_bytes(self) -> int:
        """The longest message worth sending: four of them fit the buffer, however small the kernel made it."""
        return min(MESSAGE_BYTES_MAX, self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 4)

    def end(self) -> None:
        """Send no more: the other side reads the end of the channel, and may still speak."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end; the other side reads the end of the channel."""
        self.sock.close()


def _fds_of(ancillary: list[tuple[int, int, bytes]]) -> array.array[int]:
    """The descriptors that came along, which are this process's to close."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds


def _close(fds: array.array[int]) -> None:
    for fd in fds:
        os.close(fd)


def kind_of(message: Sequence[int]) -> Kind:
    """The kind of a message, its first byte. Raises ChannelError for one that there is not."""
    try:
        return Kind(message[0])
    except ValueError:
        raise ChannelError(f"a message of unknown kind {message[0]}") from None


def channel_pair() -> tuple[Channel, Channel]:
    """The parent's end and the worker's. Both are close-on-exec. Raises OSError."""
    parent, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (parent, child):
        for option in BUFFERS:
            enlarge(sock, option)
    return Channel(parent), Channel(child)


def enlarge(sock: socket.socket, option: int) -> None:
    """Give `sock` the largest buffer up to BUFFER_BYTES that the system allows; never a smaller one than it has."""
    size, least = BUFFER_BYTES, sock.getsockopt(socket.SOL_SOCKET, option)
    while size > least:
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, size)
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # setsockopt(2) of the BSDs: above kern.ipc.maxsockbuf
                raise
            size //= 2
        else:
            return
