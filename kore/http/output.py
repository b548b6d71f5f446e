"""What the kernel still holds of a response, and how to have it forget that: for clients that do not read.

Bytes the kernel has taken are not bytes the client has taken: a send buffer grows to megabytes and reports room only
when a third of it is free, which a slow client takes minutes for. Only the kernel can say that it is moving at all.
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import termios

RATE_MIN = 1024
"""Bytes a second that a body must make, in or out, to be waited for beyond its time: less than any modem's line."""

_LINGER_NOT = struct.pack("ii", 1, 0)  # struct linger: on, for 0 seconds


def unsent(fd: int) -> int:
    """Bytes in the send queue of socket `fd` that the peer has not acknowledged (tcp(7), SIOCOUTQ); 0 when unknown.

    Unknown on the BSDs. There a socket takes more as soon as 2 KiB of its queue are free, so that what we still hold
    tells as much of a slow peer.
    """
    if fd < 0:
        return 0  # the stream has ended, and its owner is about to hear of it
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.TIOCOUTQ, count)
    except OSError:
        return 0
    return count[0]


def reset_on_close(fd: int) -> None:
    """Have close(2) of socket `fd` send an RST and drop the send queue (socket(7), SO_LINGER).

    Otherwise the kernel keeps what nobody reads, and tries to send it for minutes more.
    """
    sock = socket.socket(fileno=fd)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    except OSError:
        pass  # the connection is dead already
    finally:
        sock.detach()
