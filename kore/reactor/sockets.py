"""Plain sockets and fds on the loop: ``sock_recv`` and its kin, ``add_reader``, ``add_writer``.

Each tries its system call first, since the answer is often there, and waits for readiness only when the kernel says
so. Readiness is asked for once at a time and again after each callback, which makes it level-triggered on any engine.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from kore.driver import Driver, Operation
from kore.reactor.base import Base
from kore.reactor.handles import Soon, soon

T = TypeVar("T")


class _Watch:
    """One direction of one fd that somebody wants to hear of."""

    __slots__ = ("driver", "fd", "handle", "loop", "mask", "operation")

    def __init__(self, loop: Any, fd: int, mask: int, handle: Soon) -> None:
        self.loop = loop
        self.driver: Driver = loop._driver
        self.fd = fd
        self.mask = mask
        self.handle = handle
        self.operation: Operation | None = None
        self.arm()

    def arm(self) -> None:
        if not self.handle.cancelled():
            self.operation = self.driver.poll(self.fd, self.mask, self.ready)

    def ready(self, result: int) -> None:
        self.operation = None
        if result >= 0 and not self.handle.cancelled():
            # Asked for again only after the callback has run: it is what takes the readiness away.
            self.loop._ready.append(self.handle)
            self.loop.call_soon(self.arm)

    def stop(self) -> None:
        self.handle.cancel()
        if self.operation is not None:
            self.operation.forget()
            self.operation = None


def _fd_of(fileobj: Any) -> int:
    fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
    if fd < 0:
        raise ValueError(f"Invalid file descriptor: {fd}")
    return int(fd)


class Sockets(Base):
    """The part of `Loop` for sockets that stay the caller's."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._readers: dict[int, _Watch] = {}
        self._writers: dict[int, _Watch] = {}

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """Call `callback(*args)` whenever `fd` is readable, until remove_reader()."""
        self._watch(self._readers, fd, select.POLLIN, callback, args)

    def remove_reader(self, fd: Any) -> bool:
        """Undo add_reader(); whether there was one."""
        return self._unwatch(self._readers, fd)

    def add_writer(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """Call `callback(*args)` whenever `fd` is writable, until remove_writer()."""
        self._watch(self._writers, fd, select.POLLOUT, callback, args)

    def remove_writer(self, fd: Any) -> bool:
        """Undo add_writer(); whether there was one."""
        return self._unwatch(self._writers, fd)

    def _watch(self, table: dict[int, _Watch], fileobj: Any, mask: int, callback: Any, args: tuple[Any, ...]) -> None:
        self._check_closed()
        fd = _fd_of(fileobj)
        self._unwatch(table, fd)
        table[fd] = _Watch(self, fd, mask, soon((callback, *args), None))

    def _unwatch(self, table: dict[int, _Watch], fileobj: Any) -> bool:
        if self.is_closed():
            return False
        watch = table.pop(_fd_of(fileobj), None)
        if watch is None:
            return False
        watch.stop()
        return True

    async def _until_ready(self, fd: int, mask: int) -> None:
        """Wait until one of the poll(2) events in `mask` holds for `fd`. Raises OSError."""
        future = self.create_future()

        def polled(result: int) -> None:
            if not future.done():
                if result < 0:
                    future.set_exception(OSError(-result, os.strerror(-result)))
                else:
                    future.set_result(None)

        operation = self._driver.poll(fd, mask, polled)
        try:
            await future
        finally:
            if not future.done() or future.cancelled():
                operation.forget()

    async def _retry(self, sock: socket.socket, mask: int, call: Callable[..., T], *args: Any) -> T:
        """`call(*args)` on the non-blocking `sock`, as often as it takes."""
        if self.get_debug() and sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")
        while True:
            try:
                return call(*args)
            except (BlockingIOError, InterruptedError):
                await self._until_ready(sock.fileno(), mask)

    async def sock_recv(self, sock: socket.socket, nbytes: int) -> bytes:
        """As socket.recv; ``b""`` at the end of input."""
        return await self._retry(sock, select.POLLIN, sock.recv, nbytes)

    async def sock_recv_into(self, sock: socket.socket, buf: Any) -> int:
        """As socket.recv_into."""
        return await self._retry(sock, select.POLLIN, sock.recv_into, buf)

    async def sock_recvfrom(self, sock: socket.socket, bufsize: int) -> tuple[bytes, Any]:
        """As socket.recvfrom."""
        return await self._retry(sock, select.POLLIN, sock.recvfrom, bufsize)

    async def sock_recvfrom_into(self, sock: socket.socket, buf: Any, nbytes: int = 0) -> tuple[int, Any]:
        """As socket.recvfrom_into."""
        return await self._retry(sock, select.POLLIN, sock.recvfrom_into, buf, nbytes or len(buf))

    async def sock_sendto(self, sock: socket.socket, data: Any, address: Any) -> int:
        """As socket.sendto."""
        return await self._retry(sock, select.POLLOUT, sock.sendto, data, address)

    async def sock_sendall(self, sock: socket.socket, data: Any) -> None:
        """As socket.sendall."""
        view = memoryview(data).cast("B")
        while view:
            sent = await self._retry(sock, select.POLLOUT, sock.send, view)
            view = view[sent:]

    async def sock_accept(self, sock: socket.socket) -> tuple[socket.socket, Any]:
        """As socket.accept; the new socket is non-blocking."""
        conn, address = await self._retry(sock, select.POLLIN, sock.accept)
        conn.setblocking(False)
        return conn, address

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """As socket.connect; host names are resolved first. Raises OSError."""
        if self.get_debug() and sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            resolved = await self._ensure_resolved(
                address, family=sock.family, type=sock.type, proto=sock.proto, loop=self
            )
            address = resolved[0][4]
        future = self.create_future()

        def connected(result: int) -> None:
            if not future.done():
                if result < 0:
                    future.set_exception(OSError(-result, f"Connect call failed {address}: {os.strerror(-result)}"))
                else:
                    future.set_result(None)

        operation = self._driver.connect(sock, address, connected)
        try:
            await future
        finally:
            if not future.done() or future.cancelled():
                operation.forget()


