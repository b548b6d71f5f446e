"""An asyncio transport over a stream of the driver: bytes in are pushed to the protocol, bytes out leave once a turn.

Flow control is counted at the stream. A driver sends at the end of the turn and speaks up only when the kernel did not
take all at once, so a transport that has asked its protocol to pause looks again in the next turn by itself.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from asyncio import constants, sslproto, trsock
from collections.abc import Callable, Iterable
from contextvars import copy_context
from errno import ECONNRESET
from functools import partial
from select import POLLOUT
from typing import TYPE_CHECKING, Any, cast

from kore.reactor.base import FlowControl
from kore.reactor.waits import wake

if TYPE_CHECKING:
    from kore.reactor.loop import Loop

# asyncio.Server counts its connections; from 3.13 on it wants to know which (bpo/gh-113538).
_SERVER_KNOWS_CLIENTS = sys.version_info >= (3, 13)


class StreamTransport(FlowControl, asyncio.Transport):
    """A connected socket as asyncio sees it. Owns `sock`; the driver owns its fd."""

    _sendfile_compatible = constants._SendfileMode.TRY_NATIVE
    _start_tls_compatible = True

    def __init__(
        self, loop: Loop, sock: socket.socket, protocol: asyncio.BaseProtocol, *, server: Any = None
    ) -> None:
        super().__init__(None, loop)
        self._sock = sock
        self._server = server
        self._extra = {"socket": trsock.TransportSocket(sock)}
        for name, ask in (("sockname", sock.getsockname), ("peername", sock.getpeername)):
            try:
                self._extra[name] = ask()
            except OSError:  # the peer may be gone already
                self._extra[name] = None  # type: ignore[assignment]
        self._protocol: Any = protocol
        self.context = copy_context()  # the protocol is called in it, as the driver's callbacks run in none of ours
        self._backlog = 0
        self._paused = False  # reading, by the protocol
        self._stalled = False  # output waits for the peer
        self._eof_sent = False
        self._closing = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None  # of who sends a file past the stream
        self._data_received: Callable[[bytes], object] = _nobody
        if server is not None:
            server._attach(*((self,) if _SERVER_KNOWS_CLIENTS else ()))
        if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
            # As asyncio does: a turn's writes are one piece already, so waiting for more (Nagle) only adds latency.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._fd = fd = sock.fileno()
        self._stream = loop._driver.stream(fd, self)
        loop._transports[fd] = self

    def __repr__(self) -> str:
        state = "closed" if self._stream.gone else "closing" if self._closing else "open"
        return f"<kore StreamTransport fd={self._stream.fd} {state}>"

    def start(self, waiter: asyncio.Future[Any] | None = None) -> None:
        """Tell the protocol of its connection and begin to read; then wake `waiter`."""
        try:
            self._protocol.connection_made(self)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # noqa: BLE001 - a broken protocol ends its connection, not the loop
            self._fatal_error(exc, "Fatal error: protocol.connection_made() call failed.")
        else:
            self._choose_receiver()
        if waiter is not None:
            wake(waiter)
        if not self._stream.reading:
            # Who waits goes on first: what arrives finds the transport in its hands.
            self._loop.call_soon(self._begin_reading)

    def _begin_reading(self) -> None:
        if not self._paused:
            self._resume()

    # The driver's side.

    def received(self, data: bytes) -> None:
        """Bytes for the protocol, or its end of input."""
        try:
            if data:
                self._data_received(data)
            elif not self.context.run(self._protocol.eof_received):
                self.close()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # noqa: BLE001 - a broken protocol ends its connection, not the loop
            self._fatal_error(exc, "Fatal error: protocol.data_received() call failed.")

    def stalled(self) -> None:
        """The kernel takes no more for now; the protocol hears of it when the high-water mark is reached."""
        self._stalled = True

    def drained(self) -> None:
        """The kernel took what it would not take at once."""
        self._stalled = False
        if self._protocol_paused:
            self.context.run(self._look_again)

    def lost(self, error: int) -> None:
        """The stream is over; its fd is closed."""
        loop = self._loop
        if loop._transports.get(self._fd) is self:  # else the fd is that of the next one already
            del loop._transports[self._fd]
        self._closing = True
        self._sock.detach()  # the driver closed the fd, and its number may be another's by now
        exc = self._error
        if exc is None and error and not (error == ECONNRESET and self._stream.ended and not self._stalled):
            # A peer that left after its end of input has taken nothing from us: a reader may still be busy with what it
            # sent. On a unix socket every close looks like that.
            exc = OSError(error, os.strerror(error))
        server = self._server
        self._server = None
        self._data_received = _nobody
        self.context.run(self._tell, "connection_lost", exc)
        if self._waiter is not None:
            wake(self._waiter)
        if server is not None:
            server._detach(*((self,) if _SERVER_KNOWS_CLIENTS else ()))

    # The protocol's side.

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol in charge."""
        return cast("asyncio.BaseProtocol", self._protocol)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Give the connection to another protocol."""
        if self._protocol_paused and isinstance(protocol, sslproto.SSLProtocol):
            # start_tls(): it is the old protocol that was asked to pause. TLS takes a resume it did not wait for amiss.
            self._protocol_paused = False
            self._tell("resume_writing")
        self._protocol = protocol
        self._choose_receiver()

    def _choose_receiver(self) -> None:
        # The method is looked up once for a protocol, not for every piece of data.
        protocol = self._protocol
        reader = getattr(protocol, "_stream_reader", None) if type(protocol) is asyncio.StreamReaderProtocol else None
        receiver: Callable[[bytes], object]
        if reader is not None:
            # What its data_received does, which asks a weak reference for the reader each time: 0.1 us. No code of the
            # application is called by it, so no context is entered either.
            self._data_received = reader.feed_data
            return
        if _gives_buffers(protocol):
            receiver = self._into_buffer
        else:
            receiver = getattr(protocol, "data_received", self._nowhere)
        self._data_received = partial(self.context.run, receiver)  # type: ignore[call-arg]

    def _nowhere(self, _data: bytes) -> None:
        # Only now: a protocol that is never sent anything need not take it.
        raise TypeError(f"{self._protocol!r} has neither data_received() nor get_buffer(): it cannot take what came")

    def _into_buffer(self, data: bytes) -> None:
        """Copy `data` into the buffers a BufferedProtocol gives, in as many pieces as that takes."""
        view = memoryview(data)
        while view and not self._closing:
            protocol = self._protocol
            if not _gives_buffers(protocol):  # it handed over to a plain one in between
                protocol.data_received(bytes(view))
                return
            buffer = cast("Any", protocol.get_buffer(len(view)))
            size = min(len(buffer), len(view))
            if not size:
                raise RuntimeError("get_buffer() returned an empty buffer")
            buffer[:size] = view[:size]
            view = view[size:]
            protocol.buffer_updated(size)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``socket``, ``sockname``, ``peername``, as asyncio documents them."""
        return self._extra.get(name, default)

    def is_closing(self) -> bool:
        """Whether the transport is closed or about to be."""
        return self._closing

    def close(self) -> None:
        """Close once what was written has left; connection_lost(None) follows."""
        if not self._closing:
            if self._protocol_paused and isinstance(self._protocol, sslproto.SSLProtocol):
                # Paused, asyncio's TLS keeps its close_notify and closes without it.
                self.write(cast("Any", self._protocol)._outgoing.read())
            self._closing = True
            self._stream.close()

    def abort(self) -> None:
        """Close now; what was not sent is dropped."""
        self._force_close(None)

    def _force_close(self, exc: BaseException | None) -> None:
        # The name that asyncio.sslproto calls.
        self._closing = True
        if not self._stream.gone:
            self._error = exc
            self._stream.abort()

    def _fatal_error(self, exc: BaseException, message: str = "Fatal error on transport") -> None:
        if not isinstance(exc, OSError):
            context = {"message": message, "exception": exc, "transport": self, "protocol": self._protocol}
            self._loop.call_exception_handler(context)
        self._force_close(exc)

    def is_reading(self) -> bool:
        """Whether the protocol gets data."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """No more data for the protocol until resume_reading()."""
        if not self._paused and not self._closing:
            self._paused = True
            self._stream.pause()

    def resume_reading(self) -> None:
        """Go on after pause_reading()."""
        if self._paused and not self._closing:
            self._paused = False
            self._resume()

    def _resume(self) -> None:
        if not self._closing:
            self._stream.resume()
            # A driver hands over what it held in its next wait. That wait must not go on to block, since what it
            # handed over may have made callbacks ready.
            self._loop.call_soon(_nothing)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` with what else this turn writes. Raises TypeError, RuntimeError after write_eof()."""
        # Hot path: the first piece of a turn, which most writes are, is queued here as Stream.write would do it.
        stream = self._stream
        if type(data) is bytes and stream.out is None and not stream.shut and not stream.stuck:
            if data:
                stream.out = data
                stream.driver.dirty.append(stream)
                if len(data) > self._high_water and not self._protocol_paused:
                    self._maybe_pause_protocol()
            return
        self._write_more(data)

    def _write_more(self, data: bytes | bytearray | memoryview) -> None:
        if type(data) is not bytes:
            if not isinstance(data, bytes | bytearray | memoryview):
                raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
            data = bytes(data)  # the caller may change it before the turn ends
        if self._eof_sent:
            raise RuntimeError("Cannot call write() after write_eof()")
        if not data or self._closing:
            return
        stream = self._stream
        # An upper bound that is cheap to keep: what is really pending is a sum over all pieces once there are several.
        if type(stream.out) is list:
            self._backlog += len(data)
        else:
            self._backlog = stream.pending + len(data)
        stream.write(data)
        if self._backlog > self._high_water and not self._protocol_paused:
            self._backlog = stream.pending
            if self._backlog > self._high_water:
                self._maybe_pause_protocol()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send several pieces, in order."""
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        """True: a stream socket can be closed one way."""
        return True

    def write_eof(self) -> None:
        """Send a FIN after what was written; reading goes on."""
        if not self._eof_sent and not self._closing:
            self._eof_sent = True
            self._stream.finish()

    # Sending a file past the stream (`Connections._sendfile_native`).

    async def hold_writes(self) -> None:
        """Refuse writes until allow_writes(), and wait until what was written has left. Raises ConnectionError."""
        if "write" in vars(self):
            raise RuntimeError("a file is being sent already")
        vars(self)["write"] = _refuse
        while self._stream.pending:
            if self._stream.stuck:
                await self._wait_for(POLLOUT)
            else:
                await asyncio.sleep(0)  # it leaves with this turn
        self._check_connected()

    def allow_writes(self) -> None:
        """Undo hold_writes()."""
        vars(self).pop("write", None)

    async def writable(self) -> None:
        """Wait until the socket takes output. Raises ConnectionError when the connection ends first."""
        self._check_connected()
        await self._wait_for(POLLOUT)
        self._check_connected()

    def _check_connected(self) -> None:
        if self._stream.gone:
            raise ConnectionError("Connection is closed by peer") from self._error

    async def _wait_for(self, mask: int) -> None:
        """Until one of the poll(2) events in `mask` holds, or the stream is lost."""
        self._waiter = waiter = self._loop.create_future()
        # The poll keeps the socket open, on a ring: it must not outlive the stream, so lost() ends this wait.
        operation = self._loop._driver.poll(self._fd, mask, lambda _result: wake(waiter))
        try:
            await waiter
        finally:
            self._waiter = None
            operation.forget()

    # Flow control.

    def get_write_buffer_size(self) -> int:
        """Bytes the kernel has not taken yet."""
        return self._stream.pending

    def _maybe_pause_protocol(self) -> None:
        paused = self._protocol_paused
        super()._maybe_pause_protocol()
        if self._protocol_paused and not paused:
            self._loop.call_soon(self._look_again, context=self.context)

    def _look_again(self) -> None:
        """Resume the protocol when enough has left; the driver tells when it was stuck, otherwise ask each turn."""
        if self._stream.gone:
            return
        self._maybe_resume_protocol()
        if self._protocol_paused and not self._stream.stuck:
            self._loop.call_soon(self._look_again, context=self.context)

    def _tell(self, name: str, *arguments: object) -> None:
        """Call that method of the protocol; the exception handler hears of its exception."""
        protocol = self._protocol
        try:
            getattr(protocol, name)(*arguments)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # noqa: BLE001 - as asyncio: a protocol's failure is its own
            message = f"Fatal error: protocol.{name}() call failed."
            context = {"message": message, "exception": exc, "transport": self, "protocol": protocol}
            self._loop.call_exception_handler(context)


def _nothing() -> None:
    """A callback whose only use is that the loop has one."""


def _gives_buffers(protocol: Any) -> bool:
    """Whether it is a BufferedProtocol, by its class or by what it has."""
    if isinstance(protocol, asyncio.BufferedProtocol):
        return True
    return not hasattr(protocol, "data_received") and hasattr(protocol, "get_buffer")


def _refuse(_data: object) -> None:
    """What write() is while a file is sent: pieces would go out in the middle of it."""
    raise RuntimeError("unable to write; sendfile is in progress")


def _nobody(_data: bytes) -> None:
    """Takes data that arrives before the protocol is there or after it has gone: none does."""
