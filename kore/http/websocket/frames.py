"""The WebSocket codec: a client's bytes become messages, messages become frames (RFC 6455 sections 5 to 8).

It knows no socket and no clock, and any cut of the same bytes gives the same events. The payload of a frame is used as
it arrives, piece by piece: an invalid byte is found when it comes and not at the end of the message, nothing is held
twice, and no frame is large enough to keep the loop from its other connections when it is complete.

Limits are told to the parser and hold before anything is stored: a frame is refused for its header (1009), a
compressed one as soon as it has grown too large.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kore.http.websocket.deflate import Inflater

# Opcodes, RFC 6455 5.2.
CONTINUATION: Final = 0
TEXT: Final = 1
BINARY: Final = 2
CLOSE: Final = 8
PING: Final = 9
PONG: Final = 10

# Status codes, RFC 6455 7.4.1 and IANA's registry.
NORMAL: Final = 1000
GOING_AWAY: Final = 1001
PROTOCOL_ERROR: Final = 1002
NO_CODE: Final = 1005  # never sent: the Close had none
ABNORMAL: Final = 1006  # never sent: there was no Close
INVALID_DATA: Final = 1007
TOO_BIG: Final = 1009
INTERNAL_ERROR: Final = 1011
TRY_AGAIN_LATER: Final = 1013

FIN: Final = 0x80
RSV1: Final = 0x40
MASKED: Final = 0x80
CONTROL_BYTES_MAX: Final = 125  # RFC 6455 5.5
REASON_BYTES_MAX: Final = 123  # the same less the status code

NUMBER_BYTES_MAX: Final = 256
"""Payloads up to this size are unmasked as one number."""

UNMASK_BLOCK: Final = 65536
"""Bytes unmasked at a time: what is made for them stays in the processor's cache."""

JOIN_BYTES_MAX: Final = 16384
"""Payloads up to this size are joined to their header; larger ones are sent from where they lie."""

_REGISTERED = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014})

_RUN = b"\1\0\0\0" * (NUMBER_BYTES_MAX // 4)
MASK_TIMES: Final = tuple(int.from_bytes(_RUN[: (size + 3) & ~3], "little") for size in range(NUMBER_BYTES_MAX + 1))
"""A mask, taken for a little-endian number, times this is the mask repeated over at least that many bytes."""

_BYTES = int.from_bytes(range(256), "little")
_ONES = int.from_bytes(b"\1" * 256, "little")
_XOR = tuple((_BYTES ^ _ONES * byte).to_bytes(256, "little") for byte in range(256))  # tables for bytes.translate

HEADS: Final[dict[int, tuple[bytes, ...]]] = {
    op: tuple(bytes((FIN | op, size)) for size in range(126)) for op in (TEXT, BINARY, CLOSE, PING, PONG)
}
"""The headers of short frames by opcode and size."""

Event = tuple[int, "str | bytes"]
"""An opcode and its payload: whole messages (TEXT with str, BINARY with bytes) and control frames (bytes)."""


class WebSocketError(Exception):
    """The client broke the protocol: `code` is what to close with (RFC 6455 7.4.1), `reason` says why."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


# --- out ---------------------------------------------------------------------------------------------------


def header(op: int, size: int, rsv1: int = 0) -> bytes:
    """The header of an unmasked, final frame, with the shortest form of its length (RFC 6455 5.2)."""
    first = FIN | rsv1 | op
    if size < 126:
        return bytes((first, size))
    if size < 65536:
        return bytes((first, 126)) + size.to_bytes(2, "big")
    return bytes((first, 127)) + size.to_bytes(8, "big")


def pieces(op: int, payload: bytes, rsv1: int = 0) -> tuple[bytes, bytes]:
    """A message as one frame: in one piece, or a large payload by itself after its header."""
    head = header(op, len(payload), rsv1)
    return (head, payload) if len(payload) > JOIN_BYTES_MAX else (head + payload, b"")


def check_op(op: object) -> None:
    """Raise TypeError unless `op` is TEXT or BINARY (kore-api.md 11.4)."""
    if op not in (TEXT, BINARY):
        raise TypeError(f"op must be WEBSOCKET_OP_TEXT (1) or WEBSOCKET_OP_BINARY (2), not {op!r}")


def checked(op: object, data: object) -> bytes:
    """The payload of a message. TypeError for what is no data; ValueError for text that is no UTF-8."""
    check_op(op)
    if isinstance(data, str):
        return data.encode()
    try:
        payload = data if type(data) is bytes else bytes(memoryview(data))  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"websocket data must be a str or bytes-like, not {type(data).__name__}") from None
    if op == TEXT and not payload.isascii():
        # RFC 6455 8.1: what is no UTF-8 would have every client close the connection.
        payload.decode()
    return payload


def close_frame(code: int | None, reason: str = "") -> bytes:
    """A Close frame; without a code it is empty. A long reason is cut between characters."""
    if code is None:
        return HEADS[CLOSE][0]
    text = reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore").encode()
    return HEADS[CLOSE][2 + len(text)] + code.to_bytes(2, "big") + text


# --- in ----------------------------------------------------------------------------------------------------


def unmask(payload: bytes, mask: bytes) -> bytes:
    """Undo the mask (RFC 6455 5.3). Short payloads as one number; of others every fourth byte through one table.

    125 bytes take 0.4 us, 64 KiB 55 us; as numbers 64 KiB would take 90 us, and 125 bytes through tables 0.6.
    """
    size = len(payload)
    if size <= NUMBER_BYTES_MAX:
        number = int.from_bytes(payload, "little") ^ int.from_bytes(mask, "little") * MASK_TIMES[size]
        return number.to_bytes((size + 3) & ~3, "little")[:size]
    if size <= UNMASK_BLOCK:
        return _translated(payload, mask)
    blocks = range(0, size, UNMASK_BLOCK)
    return b"".join([_translated(payload[start : start + UNMASK_BLOCK], mask) for start in blocks])


def _translated(payload: bytes, mask: bytes) -> bytes:
    plain = bytearray(payload)
    for place in (0, 1, 2, 3):
        plain[place::4] = plain[place::4].translate(_XOR[mask[place]])
    return bytes(plain)


def valid_close_code(code: int) -> bool:
    """Whether a Close frame may carry `code` (RFC 6455 7.4)."""
    return code in _REGISTERED or 3000 <= code <= 4999


class MessageParser:
    """Makes messages of a client's bytes: `feed` what arrived, then `next` until it gives None.

    `frame_max` and `message_max` are bytes. `inflater` makes the decompressor of one message; None when compression was
    not negotiated. After an error the parser is of no more use.
    """

    __slots__ = (
        "_at", "_compressed", "_data", "_decoder", "_final", "_in_message", "_inflater", "_left", "_mask", "_message",
        "_more", "_more_bytes", "_new_inflater", "_op", "frame_max", "message_max",
    )

    def __init__(self, frame_max: int, message_max: int, inflater: Callable[[], Inflater] | None = None) -> None:
        self.frame_max = frame_max
        self.message_max = message_max
        self._new_inflater = inflater
        self._data = b""
        self._at = 0
        self._more: list[bytes] = []  # fed and not yet joined to `_data`
        self._more_bytes = 0
        self._left = 0  # bytes of the current frame's payload still to come
        self._final = False  # it is the last of its message
        self._mask = b""  # turned so that it begins with the byte for the next of the payload
        self._in_message = False
        self._op = 0
        self._compressed = False
        self._message = bytearray()
        self._decoder: codecs.IncrementalDecoder | None = None
        self._inflater: Inflater | None = None

    @property
    def buffered(self) -> int:
        """Bytes fed that no event and no message has taken."""
        return len(self._data) - self._at + self._more_bytes

    @property
    def idle(self) -> bool:
        """Between two messages with nothing buffered."""
        return not (self._in_message or self._left or self._more) and self._at >= len(self._data)

    def feed(self, data: bytes) -> None:
        """Add what arrived. Nothing is looked at before `next`."""
        self._more.append(data)
        self._more_bytes += len(data)

    def next(self) -> Event | None:
        """The next event, None when it needs more bytes. Raises `WebSocketError`."""
        if self._more:
            rest = self._data[self._at :] if self._at < len(self._data) else b""
            self._data = self._more[0] if not rest and len(self._more) == 1 else b"".join((rest, *self._more))
            self._at = 0
            self._more.clear()
            self._more_bytes = 0
        while True:
            if not self._left:
                event = self._next_frame()
                if event is not None:
                    return event
                if not self._left:
                    return None
            self._take()
            if self._left:
                return None
            if self._final:
                return self._end_message()

    def _next_frame(self) -> Event | None:
        """Read headers: up to a payload that is to be taken (`_left`), a whole event, or the end of the bytes."""
        while True:
            data, at = self._data, self._at
            held = len(data) - at
            if held < 2:
                return None
            first, size = data[at], data[at + 1] & 0x7F
            op = first & 0x0F
            self._check_start(first, op, data[at + 1])
            start = at + 6
            if size > 125:
                start += 2 if size == 126 else 8
                if held < start - at - 4:
                    return None
                size = self._long_size(size, data[at + 2 : start - 4])
            if op < CLOSE:
                self._check_size(op, size, first & RSV1)
            if held < start - at:
                return None
            mask = data[start - 4 : start]
            if op >= CLOSE:
                if held < start - at + size:
                    return None
                self._at = start + size
                return op, _checked_control(op, unmask(data[start : self._at], mask))
            if first == FIN | op and op and held >= start - at + size:
                # A whole message in one frame, not compressed, all of it here.
                self._at = start + size
                return op, _as_told(op, unmask(data[start : self._at], mask))
            self._at = start
            self._mask = mask
            self._left = size
            self._final = bool(first & FIN)
            if op:
                self._begin_message(op, bool(first & RSV1))
            if size:
                return None
            if self._final:
                return self._end_message()

    def _check_start(self, first: int, op: int, second: int) -> None:
        """Refuse what the first two bytes of a frame must not say (RFC 6455 5.1, 5.2, 5.4, 5.5)."""
        if first & 0x30 or (first & RSV1 and (self._new_inflater is None or op not in (TEXT, BINARY))):
            raise WebSocketError(PROTOCOL_ERROR, "reserved bits set")
        if 2 < op < CLOSE or op > PONG:
            raise WebSocketError(PROTOCOL_ERROR, f"reserved opcode {op}")
        if not second & MASKED:
            raise WebSocketError(PROTOCOL_ERROR, "frame not masked")
        if op >= CLOSE:
            if not first & FIN:
                raise WebSocketError(PROTOCOL_ERROR, "fragmented control frame")
            if second & 0x7F > CONTROL_BYTES_MAX:
                raise WebSocketError(PROTOCOL_ERROR, "control frame too long")
        elif op:
            if self._in_message:
                raise WebSocketError(PROTOCOL_ERROR, "new message within a fragmented one")
        elif not self._in_message:
            raise WebSocketError(PROTOCOL_ERROR, "continuation of nothing")

    def _long_size(self, kind: int, field: bytes) -> int:
        size = int.from_bytes(field, "big")
        # RFC 6455 5.2: the minimal number of bytes must be used, and the most significant bit must be 0.
        if size < (126 if kind == 126 else 65536) or size >> 63:
            raise WebSocketError(PROTOCOL_ERROR, "length not in its shortest form")
        return size

    def _check_size(self, op: int, size: int, rsv1: int) -> None:
        if size > self.frame_max:
            raise WebSocketError(TOO_BIG, f"frame of more than {self.frame_max} bytes")
        compressed = self._compressed if not op else rsv1
        # How much a compressed frame comes to shows when it is inflated.
        if not compressed and size + (0 if op else len(self._message)) > self.message_max:
            raise WebSocketError(TOO_BIG, f"message of more than {self.message_max} bytes")

    def _begin_message(self, op: int, compressed: bool) -> None:
        self._op = op
        self._in_message = True
        self._compressed = compressed
        if compressed and self._new_inflater is not None:
            self._inflater = self._new_inflater()
        if op == TEXT:
            self._decoder = codecs.getincrementaldecoder("utf-8")()

    def _take(self) -> None:
        """Take what is here of the frame's payload."""
        data, at = self._data, self._at
        piece = data[at : at + self._left] if at or self._left < len(data) else data
        size = len(piece)
        if not size:
            return
        self._at = at + size
        self._left -= size
        mask = self._mask
        piece = unmask(piece, mask)
        if size & 3:
            turn = size & 3
            self._mask = mask[turn:] + mask[:turn]
        if self._inflater is not None:
            piece = self._inflater.inflate(piece, self.message_max - len(self._message))
        self._add(piece)

    def _add(self, piece: bytes, final: bool = False) -> None:
        if self._decoder is not None:
            try:
                self._decoder.decode(piece, final)
            except UnicodeDecodeError:
                raise WebSocketError(INVALID_DATA, "text is not UTF-8") from None
            if b"\xed\xa0" <= self._decoder.getstate()[0] < b"\xee":
                # The start of a surrogate: the decoder waits for its third byte to say so.
                raise WebSocketError(INVALID_DATA, "text is not UTF-8")
        self._message += piece

    def _end_message(self) -> Event:
        inflater, message = self._inflater, self._message
        last = inflater.end(self.message_max - len(message)) if inflater is not None else b""
        self._add(last, True)
        self._message = bytearray()
        self._inflater = self._decoder = None
        self._in_message = self._compressed = self._final = False
        return self._op, message.decode() if self._op == TEXT else bytes(message)


def _as_told(op: int, payload: bytes) -> str | bytes:
    if op == BINARY:
        return payload
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise WebSocketError(INVALID_DATA, "text is not UTF-8") from None


def _checked_control(op: int, payload: bytes) -> bytes:
    """The payload of a control frame; that of a Close frame is checked (RFC 6455 5.5.1, 7.4)."""
    if op == CLOSE and payload:
        if len(payload) == 1 or not valid_close_code(int.from_bytes(payload[:2], "big")):
            raise WebSocketError(PROTOCOL_ERROR, "invalid status code")
        _as_told(TEXT, payload[2:])
    return payload
