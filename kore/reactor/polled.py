"""Transports over an fd that is polled and then read or written: what pipes and datagram sockets have in common."""

from __future__ import annotations

import asyncio
import select
import stat
import warnings
from abc import abstractmethod
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, cast

from kore.reactor.base import FlowControl
from kore.reactor.waits import wake

if TYPE_CHECKING:
    from kore.driver import Operation
    from kore.reactor.loop import Loop

READ_BYTES_MAX = 64 * 1024
"""Bytes of one read: what a pipe holds, and more than an IP datagram can. Larger blocks cost malloc(3) a mapping."""

READS_MAX = 16
"""Reads for one readiness: many enough to make up for the poll, few enough to let the others have their turn."""


class PolledTransport(asyncio.BaseTransport):
    """A transport that owns `file` (a socket or a pipe, made non-blocking) and hears from the driver when it is ready.

    Subclasses read in `_readable`.
    """

    _buffered = 0
    """Bytes not yet taken by the kernel."""

    _file: Any = None

    def __init__(self, loop: Loop, file: Any, protocol: asyncio.BaseProtocol, extra: Any) -> None:
        asyncio.BaseTransport.__init__(self, extra)
        self._loop = loop
        self._file = file
        self._fd: int = file.fileno()
        self._protocol: Any = protocol
        self._context = copy_context()  # the protocol is called in it
        self._closing = False
        self._lost = False
        self._reading: Operation | None = None

    def __repr__(self) -> str:
        state = "closed" if self._lost else "closing" if self._closing else "open"
        return f"<kore {type(self).__name__} fd={self._fd} {state}>"

    def start(self, waiter: asyncio.Future[Any] | None) -> None:
        """Tell the protocol of its connection and begin to read; then wake `waiter`."""
        try:
            self._protocol.connection_made(self)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # noqa: BLE001 - a broken protocol ends its connection, not the loop
            self._fatal_error(exc, "Fatal error: protocol.connection_made() call failed.")
        if waiter is not None:
            wake(waiter)
        # Who waits goes on first: what arrives finds the transport in its hands.
        self._loop.call_soon(self._read_on)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol in charge."""
        return cast("asyncio.BaseProtocol", self._protocol)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Give the connection to another protocol."""
        self._protocol = protocol

    def is_closing(self) -> bool:
        """Whether the transport is closed or about to be."""
        return self._closing

    def close(self) -> None:
        """Close once what was written has left; connection_lost(None) follows."""
        if not self._closing:
            self._closing = True
            self._stop_reading()
            if not self._buffered:
                self._lose(None)

    def abort(self) -> None:
        """Close now; what was not sent is dropped."""
        self._force_close(None)

    def _force_close(self, exc: BaseException | None) -> None:
        self._closing = True
        self._lose(exc)

    def _fatal_error(self, exc: BaseException, message: str) -> None:
        if not isinstance(exc, OSError):
            context = {"message": message, "exception": exc, "transport": self, "protocol": self._protocol}
            self._loop.call_exception_handler(context)
        self._force_close(exc)

    # Readiness.

    def _read_on(self) -> None:
        if not self._closing and self._reading is None:
            self._reading = self._loop._driver.poll_multishot(self._fd, select.POLLIN, self._ready_to_read)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.forget()
            self._reading = None

    def _ready_to_read(self, result: int) -> None:
        if result < 0:
            self._reading = None  # the fd was closed under our feet: nothing will come of it any more
        else:
            # As asyncio does: after what was ready before, and not in the middle of the driver's turn.
            self._loop.call_soon(self._read_now, context=self._context)

    def _read_now(self) -> None:
        if self._reading is not None:
            self._call(self._readable)

    def _call(self, method: Callable[[], None]) -> None:
        try:
            method()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # noqa: BLE001 - a broken protocol ends its connection, not the loop
            self._fatal_error(exc, "Fatal error: protocol callback failed.")

    @abstractmethod
    def _readable(self) -> None:
        """Read, and hand over what was read."""

    # The end.

    def _lose(self, exc: BaseException | None) -> None:
        """Wait for nothing any more; the protocol hears of its loss soon, and then the file is closed."""
        if self._lost:
            return
        self._lost = self._closing = True
        self._stop_reading()
        self._drop()
        self._loop.call_soon(self._tell_loss, exc, context=self._context)

    def _drop(self) -> None:
        """Forget what was not written."""

    def _tell_loss(self, exc: BaseException | None) -> None:
        protocol, self._protocol = self._protocol, None
        try:
            protocol.connection_lost(exc)
        finally:  # an exception goes to the loop's handler, as the callback's
            file, self._file = self._file, None
            file.close()

    def __del__(self) -> None:
        # Paused, or open when its loop was closed, and forgotten.
        if self._file is not None:
            warnings.warn(f"unclosed transport {self!r}", ResourceWarning, stacklevel=2, source=self)
            self._file.close()


class PolledWriter(PolledTransport, FlowControl):
    """One that keeps what the kernel does not take at once. Subclasses write in `_writable`."""

    def __init__(self, loop: Loop, file: Any, protocol: asyncio.BaseProtocol, extra: Any) -> None:
        FlowControl.__init__(self, extra, loop)
        PolledTransport.__init__(self, loop, file, protocol, extra)
        self._writing: Operation | None = None

    def get_write_buffer_size(self) -> int:
        """Bytes the kernel has not taken yet."""
        return self._buffered

    def _write_on(self) -> None:
        """Hear once of the next time that the kernel takes output."""
        self._writing = self._loop._driver.poll(self._fd, select.POLLOUT, self._ready_to_write)

    def _ready_to_write(self, _result: int) -> None:
        self._loop.call_soon(self._write_now, context=self._context)

    def _write_now(self) -> None:
        self._writing = None
        if not self._lost:
            self._call(self._writable)
        if self._lost:
            return
        if self._buffered:
            self._write_on()
        elif self._closing:
            self._lose(None)
        self._maybe_resume_protocol()

    @abstractmethod
    def _writable(self) -> None:
        """Give the kernel what it takes of what was kept."""

    def _drop(self) -> None:
        self._buffered = 0
        if self._writing is not None:
            self._writing.forget()
            self._writing = None


def kind_of(mode: int) -> str:
    """What an fd of this st_mode is: ``fifo``, ``socket``, ``device``, or ``file`` for what never makes anyone wait."""
    if stat.S_ISFIFO(mode):
        return "fifo"
    if stat.S_ISSOCK(mode):
        return "socket"
    return "device" if stat.S_ISCHR(mode) else "file"
