"""``kore.socket``: a socket whose operations coroutines wait for, made by ``kore.socket_wrap`` or by ``accept``.

It works on a duplicate of the application's descriptor. So the two are closed each on its own, in any order, and
nothing of ours can meet a stranger that was given the number of a socket closed behind our back.
"""

from __future__ import annotations

import os
import socket
from asyncio import events
from collections.abc import Callable, Generator
from errno import EAGAIN, EINVAL, ENOTCONN
from functools import partial
from select import POLLOUT
from socket import AF_INET, AF_INET6, AF_UNIX, SOCK_SEQPACKET, SOCK_STREAM
from typing import Any

from kore.driver import Message, passed_fds
from kore.reactor.addresses import internet, shown, unix
from kore.reactor.lines import CLOSED, Begin, Descriptor, Line, failure
from kore.reactor.names import made, public
from kore.reactor.pending import Pending, SocketOp, Steps, bytes_of, length_of, until

RECEIVE_BYTES_MAX = 256 * 1024
"""Bytes of a stream taken by one receive, whatever was asked for: the buffer is there for as long as it waits."""

MESSAGE_BYTES_MAX = 1024 * 1024
"""The same for datagrams, which are cut off at the end of it. UDP has 64 KiB; unix sockets what wmem_max allows."""

SEND_BYTES_MAX = 256 * 1024
"""Bytes of a stream given to one send; the memory stays in use until the kernel has taken them."""

class MessageTuple(tuple[Any, ...]):  # noqa: SLOT001 (a tuple takes no slots; it has three attributes)
    """What ``recvmsg`` gives: ``(data, ancdata)``; it also says who sent it, and has the form of the C platform."""

    address: str | None
    """The sender's IP address or path; None when it has none."""
    port: int | None
    """The sender's port; None for unix sockets."""
    source_form: tuple[Any, ...]
    """``(ip, port, data, ancdata)`` or ``(path, data, ancdata)``, ancillary entries with the data's length in front."""


@public("socket")
class PySocket:
    """A socket that coroutines wait on (reference: kore.socket). Errors of the kernel are RuntimeErrors."""

    __slots__ = ("_connected", "_descriptor", "_in", "_out", "_receiving", "_sending", "_sock", "_stream")
    _sock: socket.socket
    _stream: bool
    _connected: bool  # of a kind that has a peer and an end: to receive nothing is the end, not an empty datagram
    _descriptor: Descriptor
    _in: Line
    _out: Line
    _receiving: Pending
    _sending: Pending

    def connect(self, host: str, port: int | str = 0, /) -> SocketOp:
        """Connect to a numeric address and port, or to a unix path (``@``: abstract). Awaited it gives None.

        Raises at once ValueError for what is no address, RuntimeError for a port out of range and a path too long.
        """
        family = self._open("connect()").family
        address = unix(host) if family == AF_UNIX else internet(family, host, port)
        where = host if family == AF_UNIX else f"{host} port {port}"
        return self._sending.make("connect()", partial(self._connect, address, where))

    def accept(self) -> SocketOp:
        """Accept a connection. Awaited it gives a new socket, None when this one is closed meanwhile."""
        self._open("accept()")
        return self._receiving.make("accept()", self._accept)

    def recv(self, maxlen: int, timeout: int | None = None, /) -> SocketOp:
        """Receive at most `maxlen` bytes. Awaited it gives bytes, None at the end of input.

        TimeoutError when nothing arrives within `timeout` milliseconds from now; nothing is lost then.
        """
        self._open("recv()")
        steps = partial(self._recv, length_of(maxlen), until("recv()", timeout))
        return self._receiving.make("recv()", steps)

    def recvfrom(self, maxlen: int, timeout: int | None = None, /) -> SocketOp:
        """The same with the sender. Awaited it gives (ip, port, data), of unix sockets (path or None, data).

        At the end of a stream all of them are None.
        """
        self._open("recvfrom()")
        steps = partial(self._recvfrom, length_of(maxlen), until("recvfrom()", timeout))
        return self._receiving.make("recvfrom()", steps)

    def recvmsg(self, maxlen: int, timeout: int | None = None, /) -> SocketOp:
        """The same with ancillary data. Awaited it gives a MessageTuple ``(data, [(level, type, data), ...])``.

        At the end of a stream the data is None. At most 1024 bytes of ancillary data are taken.
        """
        self._open("recvmsg()")
        steps = partial(self._recvmsg, length_of(maxlen), until("recvmsg()", timeout))
        return self._receiving.make("recvmsg()", steps)

    def send(self, data: bytes | str, /) -> SocketOp:
        """Send `data`, a str as UTF-8. Awaited it gives None when all of it has been taken by the kernel."""
        self._open("send()")
        return self._sending.make("send()", partial(self._send, "send()", bytes_of(data), None))

    def sendto(self, *destination_and_data: Any) -> SocketOp:
        """``sendto(ip, port, data)``, of unix sockets ``sendto(path, data)``. Awaited it gives None.

        Raises at once ValueError for what is no address, RuntimeError for a port out of range and a path too long.
        """
        family = self._open("sendto()").family
        wanted = ("path", "data") if family == AF_UNIX else ("ip", "port", "data")
        if len(destination_and_data) != len(wanted):
            raise TypeError(f"sendto() takes ({', '.join(wanted)}), {len(destination_and_data)} arguments given")
        *destination, data = destination_and_data
        if family == AF_UNIX:
            address: Any = unix(destination[0])
        else:
            address = internet(family, destination[0], destination[1], lowest_port=1)
        if self._sock.type == SOCK_SEQPACKET:
            address = None  # the kernel sends to the peer whatever it is told, and that peer's queue is waited for
        return self._sending.make("sendto()", partial(self._send, "sendto()", bytes_of(data), address))

    def close(self) -> bool:
        """Close it; what is pending gives None at once. The socket that was wrapped stays open. Always True."""
        self._descriptor.close()
        self._in.close()
        self._out.close()
        return True

    def __del__(self) -> None:
        if hasattr(self, "_out"):
            self.close()

    def _open(self, what: str) -> socket.socket:
        if self._descriptor.closed:
            raise RuntimeError(f"{what}: the socket is closed")
        return self._sock

    # The operations, once they are awaited.

    def _connect(self, address: Any, where: str) -> Steps:
        driver = events.get_running_loop().driver  # type: ignore[attr-defined]
        result = yield from self._out.wait(partial(_connecting, driver, self._sock, address))
        if result is CLOSED:
            return
        if result == -EAGAIN:
            raise failure(f"connect() to {where}: the listener's queue is full", result)
        if result < 0:
            raise failure(f"connect() to {where}", result)

    def _accept(self) -> Steps:
        driver = events.get_running_loop().driver  # type: ignore[attr-defined]
        result = yield from self._in.wait(partial(driver.accept_once, self._sock))
        if result is CLOSED:
            return None
        if type(result) is not int:  # data, brought by a recv() that was given up: this is no listener
            self._in.put_back(result)
            result = -EINVAL
        if result < 0:
            raise failure("accept()", result)
        kind, proto = self._sock.type, self._sock.proto
        return _made(socket.socket(self._sock.family, kind, proto, fileno=result))

    def _taken(self, what: str, begin: Begin, deadline: float | None) -> Steps:
        """The bytes or the message that a receive brought, or CLOSED."""
        result = yield from self._in.wait(begin, deadline)
        if type(result) is int:
            if result >= 0:  # a connection, brought by an accept() that was given up: this is a listener
                self._in.put_back(result)
                result = -ENOTCONN
            raise failure(what, result)
        return result

    def _recv(self, maxlen: int, deadline: float | None) -> Steps:
        if not self._stream:  # asks for the sender too: whoever comes next may want it, if this one is given up
            message = yield from self._message("recv()", maxlen, deadline)
            return None if message is None else _data_alone(message) or None
        driver = events.get_running_loop().driver  # type: ignore[attr-defined]
        begin = partial(driver.receive, self._sock.fileno(), min(maxlen, RECEIVE_BYTES_MAX))
        result = yield from self._taken("recv()", begin, deadline)
        if result is CLOSED:
            return None
        # Of a recvmsg() that was given up it may be a message.
        data = _data_alone(result) if type(result) is tuple else result
        return self._cut(data, maxlen) or None

    def _cut(self, data: bytes, maxlen: int) -> bytes:
        """The first `maxlen` of bytes that may have been received for somebody who asked for more."""
        if len(data) > maxlen:
            if self._stream:
                self._in.put_back(data[maxlen:])
            return data[:maxlen]
        return data

    def _message(self, what: str, maxlen: int, deadline: float | None) -> Generator[Any, None, Message | None]:
        driver = events.get_running_loop().driver  # type: ignore[attr-defined]
        length = min(maxlen, RECEIVE_BYTES_MAX if self._stream else MESSAGE_BYTES_MAX)
        result = yield from self._taken(what, partial(driver.recvmsg, self._sock, length), deadline)
        if result is CLOSED:
            return None
        if type(result) is bytes:  # of a stream, brought by a recv() that was given up
            result = (result, [], 0, None)
        data, ancillary, flags, address = result
        if not address and self._connected:
            try:
                address = self._sock.getpeername()
            except OSError:
                address = None  # it has gone
        return self._cut(data, maxlen), ancillary, flags, address

    def _recvfrom(self, maxlen: int, deadline: float | None) -> Steps:
        message = yield from self._message("recvfrom()", maxlen, deadline)
        if message is None:
            return None
        data = _data_alone(message)
        if not data and self._connected:
            return (None,) * len(shown(self._sock.family, None)) + (None,)
        return (*shown(self._sock.family, message[3]), data)

    def _recvmsg(self, maxlen: int, deadline: float | None) -> Steps:
        message = yield from self._message("recvmsg()", maxlen, deadline)
        if message is None:
            return None
        data: bytes | None = message[0]
        sender = shown(self._sock.family, message[3])
        if not data and self._connected:
            data = None
        result = MessageTuple((data, message[1]))
        result.address = sender[0]
        result.port = sender[1] if len(sender) > 1 else None
        result.source_form = (*sender, data, [(len(entry[2]), *entry) for entry in message[1]])
        return result

    def _send(self, what: str, data: bytes, address: Any) -> Steps:
        driver = events.get_running_loop().driver  # type: ignore[attr-defined]
        most = SEND_BYTES_MAX if self._stream else len(data)
        at = 0
        while at < len(data) or not (data or self._stream):
            piece = data[at : at + most]
            if address is None:
                begin = partial(driver.send, self._sock.fileno(), piece)
            else:
                begin = partial(driver.sendto, self._sock, piece, address)
            result = yield from self._out.wait(begin)
            if result is CLOSED:
                return
            if result == -EAGAIN and address is not None:
                yield from self._wait_for_queue(driver, address)
            elif result < 0:
                raise failure(what, result)
            else:
                at += result
                if not data:
                    return

    def _wait_for_queue(self, driver: Any, address: str) -> Steps:
        """Wait until a unix receiver's queue has room. Only a socket that is connected to it is told of that."""
        with socket.socket(AF_UNIX, self._sock.type) as connected:
            try:
                connected.connect(address)
            except OSError as error:
                raise failure("sendto()", -(error.errno or EAGAIN)) from error
            descriptor = Descriptor(connected.fileno(), socket.socket(fileno=connected.detach()).close)
        yield from self._out.wait(partial(_polling, driver, descriptor))


def _polling(driver: Any, descriptor: Descriptor, callback: Callable[[int], None]) -> Any:
    """Wait until `descriptor` can be written to; it is closed with that."""

    def polled(result: int) -> None:
        descriptor.close()
        callback(result)

    return driver.poll(descriptor.fd, POLLOUT, polled)


def _data_alone(message: Message) -> bytes:
    """The data of a message whose ancillary data nobody asked for: the fds in it go, as in the kernel."""
    for fd in passed_fds(message):
        os.close(fd)
    return message[0]


def _connecting(driver: Any, sock: socket.socket, address: Any, callback: Callable[[int], None]) -> Any:
    return driver.connect(sock, address, callback)


def _made(sock: socket.socket) -> PySocket:
    """A kore.socket that owns `sock`."""
    wrapped = made(PySocket)
    wrapped._sock = sock
    wrapped._stream = sock.type == SOCK_STREAM
    wrapped._connected = sock.type in (SOCK_STREAM, SOCK_SEQPACKET)
    wrapped._descriptor = Descriptor(sock.fileno(), sock.close)
    wrapped._in = Line(wrapped._descriptor, keeps=True)
    wrapped._out = Line(wrapped._descriptor, keeps=False)
    wrapped._receiving = Pending()
    wrapped._sending = Pending()
    return wrapped


def socket_wrap(sock: Any, /) -> PySocket:
    """A kore.socket on the connection, listener or datagram socket that `sock` has (reference: kore.socket_wrap).

    `sock` needs fileno(), family and proto, as Python's sockets have. It stays the caller's: it becomes non-blocking,
    and is closed on its own; the peer sees the end when both are closed. May be called in the parent, for the workers.
    Raises AttributeError for what is no socket, RuntimeError for a family other than AF_INET, AF_INET6 and AF_UNIX, and
    for a socket that is closed.
    """
    family, proto, fd = sock.family, sock.proto, sock.fileno()
    if family not in (AF_INET, AF_INET6, AF_UNIX):
        raise RuntimeError(f"socket_wrap() wants an AF_INET, AF_INET6 or AF_UNIX socket, not {family!r}")
    try:
        copied = os.dup(fd)
        try:
            copy = socket.socket(family, -1, proto, fileno=copied)
        except OSError:
            os.close(copied)
            raise
    except OSError as error:
        raise failure("socket_wrap()", -(error.errno or 0)) from error
    setter = getattr(sock, "setblocking", copy.setblocking)
    setter(False)
    copy.setblocking(False)
    return _made(copy)
