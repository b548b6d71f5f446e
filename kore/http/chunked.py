"""The chunked transfer coding: bytes in, pieces of the body out (RFC 9112 7.1).

As strict as the head, for the same reason: a bare LF, white space after a size or a sloppy extension ends a chunk
for one server and not for the next. Extensions and trailers are checked, bounded and dropped: nothing uses them, and
a trailer merged into the head after it was judged would be a way around the judgement (RFC 9110 6.5.1).
"""

from __future__ import annotations

import re
from typing import Final

from kore.errors import ProtocolError
from kore.http.head import check_fields, refuse_illegal

CHUNK_LINE_BYTES_MAX: Final = 256  # 16 digits of size and room for a signature, the one extension seen in the wild

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSION = rb"[ \t]*+;[ \t]*+" + _TOKEN + rb"(?:[ \t]*+=[ \t]*+(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?"
_size_line = re.compile(rb"([0-9A-Fa-f]{1,16}+)((?:" + _EXTENSION + rb")*)\r\n").match
_size_line_start = re.compile(rb"(?:[0-9A-Fa-f]{1,16}+(?:[ \t;][\t -~\x80-\xff]*+)?\r?)?").fullmatch

_SIZE, _DATA, _DATA_END, _TRAILERS, _DONE = range(5)


class ChunkedBody:
    """Decodes one chunked body. The caller keeps the bytes and says where the undecoded ones begin.

    `body_bytes_max` bounds the sum of the chunks; `overhead_bytes_max` all extensions together, and the trailers.
    """

    __slots__ = ("body_bytes_max", "overhead_bytes_max", "_state", "_left", "_total", "_overhead", "_searched")

    def __init__(self, body_bytes_max: int, overhead_bytes_max: int) -> None:
        self.body_bytes_max = body_bytes_max
        self.overhead_bytes_max = overhead_bytes_max
        self._state = _SIZE
        self._left = 0
        self._total = 0
        self._overhead = 0
        self._searched = 0

    @property
    def done(self) -> bool:
        """Whether the body and its trailers are over."""
        return self._state == _DONE

    def decode(self, data: bytes | bytearray, at: int) -> tuple[bytes, int]:
        """The next piece of the body in ``data[at:]`` and where to go on. ``b""``: more bytes are needed, or `done`.

        Raises `ProtocolError`: 400 for bad framing, 413 and 431 for what is over a limit.
        """
        while True:
            if self._state == _DATA:
                piece = bytes(data[at : at + self._left])
                self._left -= len(piece)
                if not self._left:
                    self._state = _DATA_END
                return piece, at + len(piece)
            if self._state == _SIZE:
                end = self._size(data, at)
            elif self._state == _DATA_END:
                end = self._data_end(data, at)
            else:
                end = self._trailers(data, at)
            if end == at or self._state == _DONE:
                return b"", end
            at = end

    def _size(self, data: bytes | bytearray, at: int) -> int:
        stop = min(len(data), at + CHUNK_LINE_BYTES_MAX)
        match = _size_line(data, at, stop)
        if match is None:
            # One reason for all that is wrong with it, so that it does not depend on how the bytes were cut.
            if stop - at == CHUNK_LINE_BYTES_MAX or not _size_line_start(data, at, stop):
                raise ProtocolError(400, "malformed chunk size line")
            return at
        self._overhead += len(match[2])
        if self._overhead > self.overhead_bytes_max:
            # A byte of body in each chunk and the rest extensions: work without end below every body limit.
            raise ProtocolError(400, f"more than {self.overhead_bytes_max} bytes of chunk extensions")
        self._left = int(match[1], 16)
        self._total += self._left
        if self._total > self.body_bytes_max:
            raise ProtocolError(413, f"chunked body larger than {self.body_bytes_max} bytes")
        self._state = _DATA if self._left else _TRAILERS
        return match.end()

    def _data_end(self, data: bytes | bytearray, at: int) -> int:
        end = bytes(data[at : at + 2])
        if end == b"\r\n":
            self._state = _SIZE
            return at + 2
        if end not in (b"", b"\r"):
            raise ProtocolError(400, "chunk longer than its size")
        return at

    def _trailers(self, data: bytes | bytearray, at: int) -> int:
        if data[at : at + 2] == b"\r\n":
            self._state = _DONE
            return at + 2
        found = data.find(b"\r\n\r\n", at + self._searched)
        end = len(data) if found < 0 else found + 4
        refuse_illegal(data, at + self._searched, min(end, at + self.overhead_bytes_max))
        if end - at > self.overhead_bytes_max or (found < 0 and end - at == self.overhead_bytes_max):
            raise ProtocolError(431, f"trailers longer than {self.overhead_bytes_max} bytes")
        if found < 0:
            self._searched = max(0, end - at - 3)
            return at
        check_fields(bytes(data[at:end]))
        self._state = _DONE
        return end
