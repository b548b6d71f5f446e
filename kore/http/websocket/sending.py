"""The output half of a WebSocket: messages become frames, and pile up within bounds when the client does not take them.

The straight line is `send` -> `Stream.write`, a look-up and a concatenation for a small message. While the kernel does
not take a client's output, what is written is counted; what was written before is not, as the client had no time for
it. Above the bound, what has not begun to leave is dropped for a Close with 1013: a slow reader never costs more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kore.driver import Stream
from kore.http.websocket.deflate import COMPRESS_BYTES_MIN, compress
from kore.http.websocket.frames import HEADS, RSV1, TRY_AGAIN_LATER, check_op, checked, close_frame, pieces

OUTPUT_BYTES_MAX: Final = 1 << 20
"""Output that may pile up, beyond what was sent to begin with, while a client does not take it: seconds of any chat."""

FRAME_COST: Final = 64
"""What a frame that waits costs beyond its bytes: without it a million empty ones would count for nothing."""

# Where a connection stands.
OPEN: Final = 0
CLOSING: Final = 1
LINGERING: Final = 2


class Sending:
    """What `WebSocketConnection` is for those bytes that go out; made and ended as that."""

    __slots__ = ("added", "base", "congested", "extra", "state", "stream", "window_bits", "write")

    stream: Stream
    write: Callable[[bytes], Any]
    state: int
    window_bits: int | None
    """Of our compressor; None: no compression."""
    congested: bool
    """Since some output was not taken, until all of it is."""
    base: int
    """What was pending when that began."""
    extra: int
    """What was written since."""
    added: int
    """Bytes written since the client's time for taking was set."""

    if TYPE_CHECKING:  # what the other half does

        def _forget_queue(self) -> None: ...
        def _closing(self) -> None: ...

    def send(self, op: int, data: str | bytes | bytearray | memoryview, /) -> bool:
        """See `kore.http.peer.Peer.websocket_send`, whose place this takes while the connection is open."""
        kind = type(data)
        if kind is str:
            payload = data.encode()  # type: ignore[union-attr]
        elif kind is bytes and op == 2:
            payload = data
        else:
            payload = checked(op, data)
        size = len(payload)
        if size < 126 and (op == 1 or op == 2):
            # The hot path: a look-up and a concatenation.
            frame = HEADS[op][size] + payload
            stream = self.stream
            if stream.out is None and not stream.stuck:
                self.write(frame)
            else:
                self.transmit(frame)
        else:
            check_op(op)
            self._send_long(op, payload)
        return True

    def _send_long(self, op: int, payload: bytes) -> None:
        """Send a message that is not small, compressed if that pays."""
        if self.window_bits is not None and len(payload) >= COMPRESS_BYTES_MIN:
            packed = compress(payload, self.window_bits)
            if packed is not None:
                self.transmit(*pieces(op, packed, RSV1))
                return
        self.transmit(*pieces(op, payload))

    def transmit(self, frame: bytes, rest: bytes = b"") -> None:
        """Queue a frame, within bounds when the client does not take its output."""
        if self.state != OPEN:
            return
        if self.congested:
            if self.extra > OUTPUT_BYTES_MAX and not self._room():
                self._overrun()
                return
            size = len(frame) + len(rest)
            self.extra += size + FRAME_COST
            self.added += size
        self.write(frame)
        if rest:
            self.write(rest)

    def _room(self) -> bool:
        """Whether the client has taken enough meanwhile."""
        out = self.stream.out
        frames = len(out) if type(out) is list else 1
        self.extra = self.stream.pending + frames * FRAME_COST - self.base
        return self.extra <= OUTPUT_BYTES_MAX

    def _overrun(self) -> None:
        """The client is too slow: drop what has not begun to leave, so that a Close can follow what has."""
        self._forget_queue()
        frame = close_frame(TRY_AGAIN_LATER, "output is not taken")
        if self.stream.out is not None:
            self.stream.out = frame
        else:
            self.write(frame)
        self._closing()
