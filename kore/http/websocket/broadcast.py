"""Broadcasts within one worker: one message to all its WebSockets, but the one it came from.

The frame is built once. For clients with compression it is compressed once for each size of window, of which there are
seven at most and in practice one, as no connection takes a context over (see kore.http.websocket.deflate).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kore.http.websocket.deflate import COMPRESS_BYTES_MIN, compress
from kore.http.websocket.frames import RSV1, checked, pieces

if TYPE_CHECKING:
    from kore.http.peer import Peer
    from kore.http.websocket.connection import WebSocketConnection


def members(server: Any) -> set[WebSocketConnection]:
    """The open WebSockets of a worker's HttpServer."""
    found: set[WebSocketConnection] = server.websockets
    return found


def local(server: Any, src: Peer | None, op: int, data: str | bytes | bytearray | memoryview) -> None:
    """Send a message to all open WebSockets of this worker but that of `src`.

    Raises TypeError for an `op` other than TEXT and BINARY and for data of another type, ValueError for text that is
    no UTF-8. Source: reference, "websocket_broadcast"; kore-api.md 11.5.
    """
    payload = checked(op, data)
    plain = pieces(op, payload)
    packed: dict[int | None, tuple[bytes, bytes]] = {None: plain}
    # A copy: one that is too slow leaves the set when it is written to.
    for connection in tuple(members(server)):
        if connection.peer is src:
            continue
        bits = connection.window_bits if len(payload) >= COMPRESS_BYTES_MIN else None
        frame = packed.get(bits)
        if frame is None:
            assert bits is not None
            short = compress(payload, bits)
            frame = packed[bits] = plain if short is None else pieces(op, short, RSV1)
        connection.transmit(*frame)
