"""Datagram sockets as asyncio transports: ``create_datagram_endpoint``.

A datagram goes to the kernel at once, and waits in order only while the socket takes no more. One readiness is answered
by several receives, since datagrams are small and come in bursts.
"""

from __future__ import annotations

import asyncio
import socket
from asyncio import trsock
from collections import deque
from typing import TYPE_CHECKING, Any

from kore.reactor.polled import READ_BYTES_MAX, READS_MAX, PolledWriter

if TYPE_CHECKING:
    from kore.reactor.loop import Loop

# A UNIX datagram may be as large as the sender's buffer (unix(7), SO_SNDBUF); an IP one has 16 bits for its length.
_UNIX_BYTES_MAX = 256 * 1024

# What a datagram counts for in the buffer beside its bytes, so that empty ones are bounded too: asyncio's figure.
_HEADER_BYTES = 8


class DatagramTransport(PolledWriter, asyncio.DatagramTransport):
    """A datagram socket. Owns `sock`; `address` is the only peer it sends to, when there is one."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        address: Any,
        waiter: asyncio.Future[Any] | None,
        extra: Any,
    ) -> None:
        info = {**(extra or {}), "socket": trsock.TransportSocket(sock)}
        for name, ask in (("sockname", sock.getsockname), ("peername", sock.getpeername)):
            try:
                info[name] = ask()
            except OSError:  # not bound, not connected
                info[name] = None
        super().__init__(loop, sock, protocol, info)
        self._sock = sock
        self._address = address
        self._connected = info["peername"] is not None  # "" is the peer of a socketpair, which is as connected as any
        self._receive_bytes = _UNIX_BYTES_MAX if sock.family == socket.AF_UNIX else READ_BYTES_MAX
        self._buffer: deque[tuple[bytes, Any]] = deque()
        loop.call_soon(self.start, waiter, context=self._context)

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any = None) -> None:
        """Send one datagram, an empty one too. Raises TypeError, ValueError for another address than the peer's."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._address:
            if addr not in (None, self._address):
                raise ValueError(f"Invalid address: must be None or {self._address}")
            addr = self._address
        if self._closing:
            return
        if not self._buffer:
            if self._send(data, addr):
                return
            self._write_on()
        # The caller may change it before it leaves.
        self._buffer.append((bytes(data), addr))
        self._buffered += len(data) + _HEADER_BYTES
        self._maybe_pause_protocol()

    def _send(self, data: bytes | bytearray | memoryview, addr: Any) -> bool:
        """Whether the kernel took it, or refused it for good: then the protocol has heard why."""
        sock = self._sock
        try:
            if self._connected:
                sock.send(data)
            else:
                sock.sendto(data, addr)
        except BlockingIOError:
            return False
        except OSError as exc:
            self._protocol.error_received(exc)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # noqa: BLE001 - an address of the wrong type: asyncio ends the transport, too
            self._fatal_error(exc, "Fatal write error on datagram transport")
        return True

    def _writable(self) -> None:
        while self._buffer and not self._lost:
            data, addr = self._buffer[0]
            if not self._send(data, addr):
                return
            if self._buffer:  # error_received() may have aborted
                self._buffer.popleft()
                self._buffered -= len(data) + _HEADER_BYTES

    def _readable(self) -> None:
        receive, size = self._sock.recvfrom, self._receive_bytes
        for _ in range(READS_MAX):
            try:
                data, addr = receive(size)
            except BlockingIOError:
                return
            except OSError as exc:
                self._protocol.error_received(exc)
            else:
                self._protocol.datagram_received(data, addr)
            if self._closing:
                return

    def _drop(self) -> None:
        super()._drop()
        self._buffer.clear()
