"""Connections and servers of the loop's asyncio face: who makes transports, and what accepts for a server.

`asyncio.BaseEventLoop` resolves names, tries addresses, binds listeners and waits for connections; it calls the
underscored methods here, which asyncio's own selector and proactor loops have under the same names.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import sys
from asyncio import base_events, sslproto
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from kore.driver import Driver, Operation
from kore.reactor.base import Base
from kore.reactor.datagrams import DatagramTransport
from kore.reactor.sockets import send_file
from kore.reactor.transports import StreamTransport

# Errors of accept(2) after which the listener is fine but the process is short of something: wait so many seconds.
_ACCEPT_SHORT = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_ACCEPT_RETRY_SECONDS = 1.0

# Errors that mean the listener is no more; after any other (ECONNABORTED, EPROTO ...: the connection's, see accept(2))
# accepting goes on.
_ACCEPT_OVER = frozenset((errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP, errno.ECANCELED))

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


class _Listener:
    """One listening socket of an asyncio.Server, accepting until stopped."""

    def __init__(self, loop: Any, sock: socket.socket, connected: Callable[[socket.socket], None]) -> None:
        self.loop = loop
        self.sock = sock
        self.connected = connected
        self.context = copy_context()
        self.stopped = False
        self.retry: asyncio.TimerHandle | None = None
        self.operation: Operation | None = None
        self.accept()

    def accept(self) -> None:
        self.retry = None
        self.operation = self.loop._driver.accept(self.sock.fileno(), self.accepted)

    def accepted(self, result: int) -> None:
        if result >= 0:
            sock = socket.socket(self.sock.family, self.sock.type, self.sock.proto, fileno=result)
            sock.setblocking(False)
            self.context.copy().run(self.connected, sock)  # what one connection sets is not for the next
            return
        self.operation = None
        if self.stopped or -result in _ACCEPT_OVER:
            return
        if -result in _ACCEPT_SHORT:
            exc = OSError(-result, os.strerror(-result))
            self.loop.call_exception_handler({"message": "accept() is out of resource", "exception": exc})
            self.retry = self.loop.call_later(_ACCEPT_RETRY_SECONDS, self.accept)
        else:
            self.accept()

    def stop(self) -> None:
        self.stopped = True
        if self.retry is not None:
            self.retry.cancel()
        if self.operation is not None:
            self.operation.forget()


class Connections(Base):
    """The part of `Loop` that makes transports."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._listeners: dict[int, _Listener] = {}
        self._unix_files: dict[socket.socket, tuple[str | bytes, int]] = {}

    def _close_connections(self) -> None:
        """Called by close(): the driver is about to close the streams' fds."""
        for listener in self._listeners.values():
            listener.stop()
        self._listeners.clear()
        for transport in self._transports.values():
            transport._sock.detach()
        self._transports.clear()

    def _make_socket_transport(
        self,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[Any] | None = None,
        *,
        extra: Any = None,
        server: Any = None,
    ) -> StreamTransport:
        transport = StreamTransport(self, sock, protocol, server=server)  # type: ignore[arg-type]
        if extra:
            transport._extra.update(extra)
        # A turn may come before connection_made() is called; nothing is to arrive in it.
        transport._stream.pause()
        self.call_soon(transport.start, waiter, context=transport.context)
        return transport

    def _make_datagram_transport(
        self,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        address: Any = None,
        waiter: asyncio.Future[Any] | None = None,
        extra: Any = None,
    ) -> DatagramTransport:
        return DatagramTransport(self, sock, protocol, address, waiter, extra)  # type: ignore[arg-type]

    async def _sendfile_native(self, transport: StreamTransport, file: Any, offset: int, count: int | None) -> int:
        # Called by asyncio's sendfile(), which falls back to read and write when this raises SendfileNotAvailableError.
        self._check_sendfile_params(transport._sock, file, offset, count)
        resume = transport.is_reading()
        transport.pause_reading()
        try:
            await transport.hold_writes()
            return await send_file(transport._fd, file, offset, count, transport.writable)
        finally:
            transport.allow_writes()
            if resume:
                transport.resume_reading()

    def _make_ssl_transport(
        self,
        rawsock: socket.socket,
        protocol: asyncio.BaseProtocol,
        sslcontext: Any,
        waiter: asyncio.Future[Any] | None = None,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        extra: Any = None,
        server: Any = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        call_connection_made: bool = True,
    ) -> Any:
        tls: Any = sslproto.SSLProtocol(
            self,
            protocol,
            sslcontext,
            waiter,  # type: ignore[arg-type]
            server_side,
            server_hostname,
            call_connection_made,
            ssl_handshake_timeout,  # type: ignore[arg-type]
            ssl_shutdown_timeout,
        )
        transport = self._make_socket_transport(rawsock, tls, extra=extra, server=server)
        self.call_soon(_abort_if_closed, tls, transport)
        return tls._app_transport

    def _start_serving(
        self,
        protocol_factory: ProtocolFactory,
        sock: socket.socket,
        sslcontext: Any = None,
        server: Any = None,
        backlog: int = 100,  # noqa: ARG002 - the driver accepts what there is
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        **_later: Any,
    ) -> None:
        def connected(conn: socket.socket) -> None:
            try:
                protocol = protocol_factory()
                if sslcontext is None:
                    transport = StreamTransport(self, conn, protocol, server=server)  # type: ignore[arg-type]
                    transport.context.run(transport.start)
                else:
                    self._make_ssl_transport(
                        conn,
                        protocol,
                        sslcontext,
                        server_side=True,
                        server=server,
                        ssl_handshake_timeout=ssl_handshake_timeout,
                        ssl_shutdown_timeout=ssl_shutdown_timeout,
                    )
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as exc:  # noqa: BLE001 - one connection's failure is not the listener's
                conn.close()
                self.call_exception_handler(
                    {"message": "Error on transport creation for incoming connection", "exception": exc}
                )

        self._listeners[sock.fileno()] = _Listener(self, sock, connected)

    def _stop_serving(self, sock: socket.socket) -> None:
        listener = self._listeners.pop(sock.fileno(), None)
        if listener is not None:
            listener.stop()
            self._driver.submit()  # from here on connections are refused
        path, inode = self._unix_files.pop(sock, ("", 0))
        sock.close()
        if path:
            try:
                if os.stat(path).st_ino == inode:  # nobody has put another in its place
                    os.unlink(path)
            except FileNotFoundError:
                pass

    async def create_unix_connection(
        self,
        protocol_factory: ProtocolFactory,
        path: Any = None,
        *,
        ssl: Any = None,
        sock: socket.socket | None = None,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[Any, Any]:
        """Connect to the UNIX socket `path`, or take over `sock`. As asyncio documents it."""
        if ssl and server_hostname is None:
            raise ValueError("you have to pass server_hostname when using ssl")
        if not ssl and server_hostname is not None:
            raise ValueError("server_hostname is only meaningful with ssl")
        _check_timeouts(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        if path is not None:
            if sock is not None:
                raise ValueError("path and sock can not be specified at the same time")
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                await self.sock_connect(sock, os.fspath(path))
            except BaseException:
                sock.close()
                raise
        else:
            sock = _unix_stream(sock)
        return await self._create_connection_transport(
            sock,
            protocol_factory,
            ssl,
            server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )

    async def create_unix_server(
        self,
        protocol_factory: ProtocolFactory,
        path: Any = None,
        *,
        sock: socket.socket | None = None,
        backlog: int = 100,
        ssl: Any = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        start_serving: bool = True,
        cleanup_socket: bool = sys.version_info >= (3, 13),
    ) -> base_events.Server:
        """Serve on the UNIX socket `path` (a stale one is removed first), or on `sock`. As asyncio documents it.

        With `cleanup_socket` the socket's file is removed when the server closes, which asyncio does from 3.13 on.
        """
        if isinstance(ssl, bool):
            raise TypeError("ssl argument must be an SSLContext or None")
        _check_timeouts(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        if path is not None:
            if sock is not None:
                raise ValueError("path and sock can not be specified at the same time")
            sock = _bind_unix(os.fspath(path))
        elif sock is None:
            raise ValueError("path was not specified, and no sock specified")
        else:
            sock = _unix_stream(sock)
        sock.setblocking(False)
        name = sock.getsockname()
        if cleanup_socket and name and name[:1] not in ("\0", b"\0"):
            self._unix_files[sock] = (name, os.stat(name).st_ino)
        server = base_events.Server(
            self, [sock], protocol_factory, ssl, backlog, ssl_handshake_timeout, ssl_shutdown_timeout
        )
        if start_serving:
            await server.start_serving()
        return server


def _abort_if_closed(tls: Any, transport: StreamTransport) -> None:
    """For who was killed before TLS began: asyncio takes no notice of a close() then, and would wait for the peer."""
    if tls._app_transport is not None and tls._app_transport._closed:
        transport.abort()


def _check_timeouts(ssl: Any, handshake: float | None, shutdown: float | None) -> None:
    for name, value in (("ssl_handshake_timeout", handshake), ("ssl_shutdown_timeout", shutdown)):
        if value is not None and not ssl:
            raise ValueError(f"{name} is only meaningful with ssl")


def _unix_stream(sock: socket.socket | None) -> socket.socket:
    if sock is None:
        raise ValueError("no path and sock were specified")
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"A UNIX Domain Stream Socket was expected, got {sock!r}")
    sock.setblocking(False)
    return sock


def _bind_unix(path: str | bytes) -> socket.socket:
    """A socket bound to `path`; a socket file left over there is removed. A leading NUL is an abstract name."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path[:1] not in (b"\0", "\0"):
            try:
                if stat.S_ISSOCK(os.stat(path).st_mode):
                    os.remove(path)
            except FileNotFoundError:
                pass
        sock.bind(path)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise OSError(errno.EADDRINUSE, f"Address {path!r} is already in use") from None
        raise
    return sock
