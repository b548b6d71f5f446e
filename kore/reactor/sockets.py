"""Plain sockets and fds on the loop: ``sock_recv`` and its kin, ``add_reader``, ``add_writer``.

Each tries its system call first, since the answer is often there, and waits for readiness only when the kernel says
so. Readiness is asked for once at a time and again after each callback, which makes it level-triggered on any engine.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import io
import os
import select
import socket
import sys
from asyncio import SendfileNotAvailableError
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from kore.driver import Driver, Operation
from kore.reactor.base import Base
from kore.reactor.handles import Soon, soon

# Errors of sendfile(2) that say that it cannot be done with these two, and not that the connection has ended.
_NO_SENDFILE = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSOCK, errno.EOVERFLOW, errno.ESPIPE))


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
    """The fd of an int or of what has a fileno(). Raises ValueError as selectors do."""
    try:
        fd = fileobj if isinstance(fileobj, int) else int(fileobj.fileno())
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"Invalid file object: {fileobj!r}") from None
    if fd < 0:
        raise ValueError(f"Invalid file descriptor: {fd}")
    return fd


def _check_ssl_socket(sock: socket.socket) -> None:
    ssl = sys.modules.get("ssl")
    if ssl is not None and isinstance(sock, ssl.SSLSocket):
        raise TypeError("Socket cannot be of type SSLSocket")


async def send_file(
    fd: int, file: Any, offset: int, count: int | None, writable: Callable[[], Awaitable[None]]
) -> int:
    """sendfile(2) of `file` from `offset`, `count` bytes or all, to the socket `fd`; how many bytes were sent.

    `writable` waits for the socket. The file's position is behind what was sent. Raises SendfileNotAvailableError
    when this is no file that can be sent so.
    """
    if not hasattr(os, "sendfile"):
        raise SendfileNotAvailableError("there is no sendfile(2) on this system")
    try:
        source = file.fileno()
        size = os.fstat(source).st_size
    except (AttributeError, io.UnsupportedOperation, OSError) as exc:
        raise SendfileNotAvailableError("not a regular file") from exc
    if not (count or size):
        return 0
    sent = 0
    try:
        while count is None or sent < count:
            try:
                taken = os.sendfile(fd, source, offset + sent, size if count is None else count - sent)
            except BlockingIOError:
                await writable()
            except OSError as exc:
                if not sent and exc.errno in _NO_SENDFILE:
                    raise SendfileNotAvailableError("os.sendfile call failed") from exc
                if exc.errno == errno.ENOTCONN:
                    raise ConnectionError(errno.ENOTCONN, "socket is not connected") from exc
                raise
            else:
                if not taken:
                    break
                sent += taken
                if count is None or sent < count:
                    # A fast reader must not keep the others waiting for the whole of a large file.
                    await writable()
    finally:
        if sent:
            os.lseek(source, offset + sent, os.SEEK_SET)
    return sent


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
        if self._debug:
            self._check_thread()
            self._check_callback(callback, "add_reader" if mask == select.POLLIN else "add_writer")
        fd = _fd_of(fileobj)
        fcntl.fcntl(fd, fcntl.F_GETFD)  # EBADF is raised here, not heard of later
        self._check_no_transport(fd)
        self._unwatch(table, fd)
        table[fd] = _Watch(self, fd, mask, soon((callback, *args), None))

    def _unwatch(self, table: dict[int, _Watch], fileobj: Any) -> bool:
        if self.is_closed():
            return False
        if isinstance(fileobj, socket.socket) and fileobj.fileno() < 0:
            return False  # it was closed first; an fd that nobody can name any more has no watch to end
        fd = _fd_of(fileobj)
        self._check_no_transport(fd)
        watch = table.pop(fd, None)
        if watch is None:
            return False
        watch.stop()
        return True

    def _check_no_transport(self, fd: int) -> None:
        """Two must not read from one connection. Raises RuntimeError when a transport has this fd."""
        transport = self._transports.get(fd)
        if transport is not None and not transport.is_closing():
            raise RuntimeError(f"File descriptor {fd!r} is used by transport {transport!r}")

    async def _until_ready(self, fd: int, mask: int) -> None:
        """Wait until one of the poll(2) events in `mask` holds for `fd`. Raises OSError."""
        self._check_no_transport(fd)
        future = self.create_future()
        await self._completion(future, self._driver.poll(fd, mask, partial(_conclude, future, "")))

    async def _completion(self, future: asyncio.Future[int], operation: Operation) -> int:
        """Wait for `operation`, which tells `future` of its end; forget it when this wait ends otherwise."""
        try:
            return await future
        finally:
            if future.cancelled() or not future.done():
                operation.forget()

    async def _retry(self, sock: socket.socket, mask: int, method: str, *args: Any) -> Any:
        """Call that method of the non-blocking `sock`, as often as it takes."""
        self._check_plain(sock)
        while True:
            try:
                return getattr(sock, method)(*args)
            except (BlockingIOError, InterruptedError):
                await self._until_ready(sock.fileno(), mask)

    def _check_plain(self, sock: socket.socket) -> None:
        _check_ssl_socket(sock)
        if self._debug and sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")

    async def sock_recv(self, sock: socket.socket, nbytes: int) -> bytes:
        """As socket.recv; ``b""`` at the end of input."""
        result: bytes = await self._retry(sock, select.POLLIN, "recv", nbytes)
        return result

    async def sock_recv_into(self, sock: socket.socket, buf: Any) -> int:
        """As socket.recv_into."""
        result: int = await self._retry(sock, select.POLLIN, "recv_into", buf)
        return result

    async def sock_recvfrom(self, sock: socket.socket, bufsize: int) -> tuple[bytes, Any]:
        """As socket.recvfrom."""
        result: tuple[bytes, Any] = await self._retry(sock, select.POLLIN, "recvfrom", bufsize)
        return result

    async def sock_recvfrom_into(self, sock: socket.socket, buf: Any, nbytes: int = 0) -> tuple[int, Any]:
        """As socket.recvfrom_into."""
        result: tuple[int, Any] = await self._retry(sock, select.POLLIN, "recvfrom_into", buf, nbytes or len(buf))
        return result

    async def sock_sendto(self, sock: socket.socket, data: Any, address: Any) -> int:
        """As socket.sendto."""
        result: int = await self._retry(sock, select.POLLOUT, "sendto", data, address)
        return result

    async def sock_sendall(self, sock: socket.socket, data: Any) -> None:
        """As socket.sendall."""
        self._check_plain(sock)
        view = memoryview(data).cast("B")
        while view:
            sent = await self._retry(sock, select.POLLOUT, "send", view)
            view = view[sent:]

    async def sock_accept(self, sock: socket.socket) -> tuple[socket.socket, Any]:
        """As socket.accept; the new socket is non-blocking."""
        conn, address = await self._retry(sock, select.POLLIN, "accept")
        conn.setblocking(False)
        return conn, address

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """As socket.connect; host names are resolved first. Raises OSError."""
        self._check_plain(sock)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            resolved = await self._ensure_resolved(
                address, family=sock.family, type=sock.type, proto=sock.proto, loop=self
            )
            address = resolved[0][4]
        try:
            sock.connect(address)
            return
        except (BlockingIOError, InterruptedError):
            pass
        if sock.family == socket.AF_UNIX:
            # EAGAIN of unix(7): the listener's queue is full. A ring waits for a place, other engines say so.
            future = self.create_future()
            told = partial(_conclude, future, f"Connect call failed {address!r}: ")
            await self._completion(future, self._driver.connect(sock, address, told))
            return
        await self._until_ready(sock.fileno(), select.POLLOUT)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, f"Connect call failed {address}: {os.strerror(error)}")

    async def _sock_sendfile_native(self, sock: socket.socket, file: Any, offset: int, count: int | None) -> int:
        # Called by asyncio's sock_sendfile(), which falls back to read and write on SendfileNotAvailableError.
        async def writable() -> None:
            await self._until_ready(sock.fileno(), select.POLLOUT)

        return await send_file(sock.fileno(), file, offset, count, writable)


def _conclude(future: asyncio.Future[int], where: str, result: int) -> None:
    """Tell `future` the result of an operation."""
    if future.done():
        return
    if result < 0:
        future.set_exception(OSError(-result, where + os.strerror(-result)))
    else:
        future.set_result(result)
