"""Pipes, FIFOs and terminals as asyncio transports: ``connect_read_pipe`` and ``connect_write_pipe``.

Written bytes go to the kernel at once and are kept only when it takes no more. The writing end hears of a reader that
left, so that a full pipe to nobody does not stay full for ever.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from typing import TYPE_CHECKING, Any

from kore.reactor.polled import READ_BYTES_MAX, READS_MAX, PolledTransport, PolledWriter, kind_of

if TYPE_CHECKING:
    from kore.reactor.loop import Loop

_PEER_LEFT = {"fifo": 0, "socket": getattr(select, "POLLRDHUP", select.POLLIN)}
"""What to poll beside errors and hang-ups, which are reported unasked. A device does not tell of its reader."""


class ReadPipeTransport(PolledTransport, asyncio.ReadTransport):
    """The reading end of a pipe. Owns `pipe`."""

    def __init__(
        self, loop: Loop, pipe: Any, protocol: asyncio.BaseProtocol, waiter: asyncio.Future[Any] | None, extra: Any
    ) -> None:
        if kind_of(os.fstat(pipe.fileno()).st_mode) == "file":
            raise ValueError(f"Pipe transport is for pipes/sockets only, not for {pipe!r}.")
        os.set_blocking(pipe.fileno(), False)
        super().__init__(loop, pipe, protocol, {**(extra or {}), "pipe": pipe})
        self._paused = False
        loop.call_soon(self.start, waiter, context=self._context)

    def is_reading(self) -> bool:
        """Whether the protocol gets data."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """No more data for the protocol until resume_reading()."""
        if not self._paused and not self._closing:
            self._paused = True
            self._stop_reading()

    def resume_reading(self) -> None:
        """Go on after pause_reading()."""
        if self._paused and not self._closing:
            self._paused = False
            self._read_on()

    def _read_on(self) -> None:
        if not self._paused:
            super()._read_on()

    def _readable(self) -> None:
        for _ in range(READS_MAX):
            try:
                data = os.read(self._fd, READ_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError as exc:
                self._fatal_error(exc, "Fatal read error on pipe transport")
                return
            if not data:
                self._closing = True
                self._stop_reading()
                self._protocol.eof_received()
                self._lose(None)
                return
            self._protocol.data_received(data)
            if self._paused or self._closing or len(data) < READ_BYTES_MAX:
                return


class WritePipeTransport(PolledWriter, asyncio.WriteTransport):
    """The writing end of a pipe. Owns `pipe`."""

    def __init__(
        self, loop: Loop, pipe: Any, protocol: asyncio.BaseProtocol, waiter: asyncio.Future[Any] | None, extra: Any
    ) -> None:
        self._kind = kind_of(os.fstat(pipe.fileno()).st_mode)
        if self._kind == "file":
            raise ValueError(f"Pipe transport is only for pipes, sockets and character devices, not for {pipe!r}.")
        os.set_blocking(pipe.fileno(), False)
        super().__init__(loop, pipe, protocol, {**(extra or {}), "pipe": pipe})
        self._buffer = bytearray()
        loop.call_soon(self.start, waiter, context=self._context)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write `data`; what the pipe does not take at once follows when it does. Raises TypeError."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        view = memoryview(data).cast("B")
        if not view or self._closing:
            return
        if not self._buffered:
            view = view[self._push(view):]
            if not view or self._closing:
                return
            self._write_on()
        self._buffer += view
        self._buffered = len(self._buffer)
        self._maybe_pause_protocol()

    def can_write_eof(self) -> bool:
        """True: the end of a pipe is seen by its reader."""
        return True

    def write_eof(self) -> None:
        """Close once what was written has left: all that there is to a pipe's end."""
        self.close()

    def _push(self, view: memoryview | bytearray) -> int:
        """Give the kernel what it takes; how much that was."""
        try:
            return os.write(self._fd, view)
        except BlockingIOError:
            return 0
        except OSError as exc:  # EPIPE: the reader has gone
            self._force_close(exc)
            return 0

    def _writable(self) -> None:
        taken = self._push(self._buffer)
        del self._buffer[:taken]
        self._buffered = len(self._buffer)

    def _read_on(self) -> None:
        mask = _PEER_LEFT.get(self._kind)
        if mask is not None and not self._closing:
            self._reading = self._loop._driver.poll(self._fd, mask, self._ready_to_read)

    def _stop_reading(self) -> None:
        # A closing transport that still has output must hear of a reader that leaves.
        if not self._buffered or self._lost:
            super()._stop_reading()

    def _readable(self) -> None:
        self._force_close(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) if self._buffered else None)

    def _drop(self) -> None:
        super()._drop()
        self._buffer.clear()
