"""permessage-deflate (RFC 7692): what is agreed on with a client, and messages compressed and inflated.

No context is taken over from one message to the next, in either direction: a server may ask for that whatever the
client offered (RFC 7692 7.1.1). So a connection holds no window of 32 KiB and no compressor of 256 KiB; one compressor,
fully flushed after each message, serves all connections of a worker that agreed on the same window, and a
broadcast is compressed once for all of them. What is lost is the likeness of one message to the one before,
which matters for small messages only, and those are not worth compressing anyhow.
"""

from __future__ import annotations

import re
import zlib
from typing import Any, Final, NamedTuple

from kore.http.websocket.frames import PROTOCOL_ERROR, TOO_BIG, WebSocketError

COMPRESS_BYTES_MIN: Final = 1024
"""Messages below this are sent as they are: they fit one segment of TCP either way, so compressing saves nothing."""

COMPRESS_LEVEL: Final = 1
"""zlib's fastest: it compresses text to a size some 20 % above level 6, in a third of the time."""

FINAL_BLOCKS_MAX: Final = 16
"""Final blocks within one message: each costs a new decompressor. One is what RFC 7692 7.2.3.5 has in mind."""

OFFERS_MAX: Final = 16
"""Offers looked at: browsers make one, the most elaborate clients two."""

_TAIL = b"\0\0\xff\xff"
_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_PARAMETER = rf"[ \t]*;[ \t]*({_NAME})(?:[ \t]*=[ \t]*(?:({_NAME})|\"({_NAME})\"))?"
_extension = re.compile(rf"[ \t]*({_NAME})((?:{_PARAMETER})*)[ \t]*(?:,|$)")
_parameters = re.compile(_PARAMETER).findall
_window_bits = re.compile("8|9|1[0-5]").fullmatch


class Agreement(NamedTuple):
    """What the handshake came to: the value of Sec-WebSocket-Extensions, and the bits of our window."""

    field: str
    window_bits: int


def negotiate(value: str) -> Agreement | None:
    """The first offer in a client's Sec-WebSocket-Extensions that can be met, None without one.

    Raises ValueError for what is no list of extensions (RFC 6455 9.1). Offers of other extensions, and offers with
    parameters that are unknown, repeated or out of range, are declined (RFC 7692 7.1).
    """
    agreed = None
    for name, parameters in _extensions(value):
        if agreed is None and name == "permessage-deflate":
            agreed = _agree(parameters)
    return agreed


def _extensions(value: str) -> list[tuple[str, list[tuple[str, str | None]]]]:
    found: list[tuple[str, list[tuple[str, str | None]]]] = []
    position = 0
    while position < len(value) and len(found) < OFFERS_MAX:
        match = _extension.match(value, position)
        if match is None:
            if value[position:].strip(" \t,") == "":
                break  # RFC 9110 5.6.1: empty elements of a list are ignored
            if value[position] in " \t,":
                position += 1
                continue
            raise ValueError(f"no list of extensions: {value!r}")
        parameters = [(name, token or quoted or None) for name, token, quoted in _parameters(match[2])]
        found.append((match[1], parameters))
        position = match.end()
    return found


def _agree(parameters: list[tuple[str, str | None]]) -> Agreement | None:
    bits = zlib.MAX_WBITS
    named = dict(parameters)
    if len(named) < len(parameters):
        return None
    for name, value in parameters:
        if name in ("server_no_context_takeover", "client_no_context_takeover"):
            if value is not None:
                return None
        elif name == "server_max_window_bits":
            # Raw deflate with a window of 256 bytes is what zlib cannot do.
            if value is None or not _window_bits(value) or value == "8":
                return None
            bits = int(value)
        elif name == "client_max_window_bits":
            if value is not None and not _window_bits(value):
                return None
        else:
            return None
    field = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
    if "server_max_window_bits" in named:
        field += f"; server_max_window_bits={bits}"
    return Agreement(field, bits)


_compressors: dict[int, Any] = {}  # by window bits: seven at most


def compress(data: bytes, window_bits: int) -> bytes | None:
    """`data` as the payload of a compressed message; None when that would not be shorter."""
    # Out of the table while it works: should it fail for want of memory, what it holds is nobody's business.
    compressor = _compressors.pop(window_bits, None)
    if compressor is None:
        compressor = zlib.compressobj(COMPRESS_LEVEL, zlib.DEFLATED, -window_bits)
    # A full flush forgets what came before (zlib.h), so the next message begins without a context.
    packed: bytes = compressor.compress(data) + compressor.flush(zlib.Z_FULL_FLUSH)
    _compressors[window_bits] = compressor
    return packed[: -len(_TAIL)] if len(packed) - len(_TAIL) < len(data) else None


class Inflater:
    """Inflates one message as it comes, and never more of it than there is room for."""

    __slots__ = ("_final_blocks", "_zlib")

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)
        self._final_blocks = 0

    def inflate(self, data: bytes, room: int) -> bytes:
        """The next piece. Raises WebSocketError: 1009 for more than `room` bytes, 1002 for what is no deflate."""
        out = self._inflate(data, room)
        while self._zlib.eof and self._zlib.unused_data:
            # RFC 7692 7.2.3.5: a final block may be followed by others.
            self._final_blocks += 1
            if self._final_blocks > FINAL_BLOCKS_MAX:
                raise WebSocketError(PROTOCOL_ERROR, "too many final blocks")
            data = self._zlib.unused_data
            self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)
            out += self._inflate(data, room - len(out))
        return out

    def _inflate(self, data: bytes, room: int) -> bytes:
        try:
            out = self._zlib.decompress(data, room + 1)
        except zlib.error:
            raise WebSocketError(PROTOCOL_ERROR, "compressed message cannot be inflated") from None
        if len(out) > room:
            raise WebSocketError(TOO_BIG, "message inflates to more than is allowed")
        return out

    def end(self, room: int) -> bytes:
        """The last piece: the sender cut off the end of the flush (RFC 7692 7.2.2)."""
        return self.inflate(_TAIL, room)
