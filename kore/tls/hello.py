"""Reads a ClientHello before OpenSSL does: which server it wants, which protocols it speaks, which ticket it brings.

So the context that answers is chosen whole, with its certificate, its clients' authorities and its ticket keys, before
a TLS object exists: nothing has to be switched in the middle of a handshake, which is where such things go wrong.

Nothing is judged here but the framing that is needed to read on. What does not parse is `malformed`: OpenSSL gets it as
it came, says what is wrong in the right alert, and the connection counts as one that named no server.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

HELLO_BYTES_MAX: Final = 32768
"""Bytes read of a connection before its ClientHello is whole: browsers send about 2 KiB with post-quantum keys."""

RECORD_BYTES_MAX: Final = 16384  # RFC 8446 5.1
HANDSHAKE: Final = 22
CLIENT_HELLO: Final = 1
TICKET_NAME_BYTES: Final = 16  # how OpenSSL begins its tickets: with the name of their key

SERVER_NAME: Final = 0  # RFC 6066 3
ALPN: Final = 16  # RFC 7301 3.1
SESSION_TICKET: Final = 35  # RFC 5077 3.2
PRE_SHARED_KEY: Final = 41  # RFC 8446 4.2.11

_extension = struct.Struct("!HH").unpack_from
_host_name = re.compile(rb"[!-~]{1,255}").fullmatch


@dataclass(frozen=True, slots=True)
class Hello:
    """What of a ClientHello decides who answers it."""

    name: str | None = None
    """The server name (RFC 6066 3): lower case, without a dot at the end. None: it names none."""
    alpn: tuple[bytes, ...] = ()
    """The protocols offered, in the client's order; () when it does not say."""
    ticket: bytes = b""
    """The first bytes of the session ticket it brings, b"" without one."""
    malformed: bool = False


MALFORMED: Final = Hello(malformed=True)


class TooLongError(Exception):
    """The ClientHello is longer than anybody's."""


class HelloReader:
    """Takes the bytes of a connection as they come, cut anywhere; `raw` has all of them."""

    __slots__ = ("_at", "_message", "raw")

    def __init__(self) -> None:
        self.raw = bytearray()
        self._at = 0  # where the record begins that has not been read
        self._message = bytearray()  # the handshake message, as far as it has come

    @property
    def clear_text(self) -> bool:
        """Whether what came begins like a request in plain text: no record of TLS begins with a letter."""
        return bool(self.raw) and 0x41 <= self.raw[0] <= 0x5A

    def feed(self, data: bytes) -> Hello | None:
        """The ClientHello, once it is whole or cannot become one. Raises TooLongError."""
        raw = self.raw
        raw += data
        while len(raw) - self._at >= 5:
            at = self._at
            size = raw[at + 3] << 8 | raw[at + 4]
            if raw[at] != HANDSHAKE or raw[at + 1] != 3 or not 0 < size <= RECORD_BYTES_MAX:
                return MALFORMED
            if at + 5 + size > HELLO_BYTES_MAX:
                raise TooLongError
            if len(raw) - at - 5 < size:
                break
            self._message += raw[at + 5 : at + 5 + size]
            self._at = at + 5 + size
            found = self._hello()
            if found is not None:
                return found
        else:
            if len(raw) > self._at and raw[self._at] != HANDSHAKE:
                return MALFORMED
        return None

    def _hello(self) -> Hello | None:
        message = self._message
        if message[0] != CLIENT_HELLO:
            return MALFORMED
        if len(message) < 4:
            return None
        size = int.from_bytes(message[1:4], "big")
        if size > HELLO_BYTES_MAX:
            raise TooLongError
        if len(message) < 4 + size:
            return None
        try:
            return _parsed(bytes(message[4 : 4 + size]))
        except ValueError:
            return MALFORMED


class _Fields:
    """Vectors of TLS (RFC 8446 3.4), read one after the other. ValueError at the first that is not there whole."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise ValueError("it ends within a field")
        found = self.data[self.at : end]
        self.at = end
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """A vector whose length is told by a number of `size` bytes."""
        return self.take(self.number(size))

    @property
    def left(self) -> bool:
        return self.at < len(self.data)


def _parsed(body: bytes) -> Hello:
    """The ClientHello of RFC 8446 4.1.2 and RFC 5246 7.4.1.2. Raises ValueError.

    A browser sends some twenty extensions; only those that matter are looked into.
    """
    fields = _Fields(body)
    fields.take(2 + 32)  # the version and random bytes
    fields.vector(1)  # the session's id
    fields.vector(2)  # ciphers
    fields.vector(1)  # compression
    if not fields.left:
        return Hello()
    at, size = fields.at + 2, len(body)
    if fields.number(2) != size - at:
        raise ValueError("the extensions end before or after the message")
    found: dict[int, bytes] = {}
    while at < size:
        if at + 4 > size:
            raise ValueError("it ends within an extension")
        kind, length = _extension(body, at)
        at += 4 + length
        if at > size or kind in found:
            raise ValueError("an extension twice, or one that is cut off")
        found[kind] = body[at - length : at]
    name = found.get(SERVER_NAME)
    alpn = found.get(ALPN)
    shared = found.get(PRE_SHARED_KEY)
    if shared is None:
        ticket = found.get(SESSION_TICKET, b"")
    else:
        ticket = _Fields(_Fields(shared).vector(2)).vector(2)
    return Hello(
        None if name is None else _server_name(name), () if alpn is None else _protocols(alpn),
        ticket[:TICKET_NAME_BYTES])


def _whole(data: bytes, size: int) -> _Fields:
    """The one vector that `data` is to consist of."""
    fields = _Fields(data)
    found = _Fields(fields.vector(size))
    if fields.left or not found.left:
        raise ValueError("an empty list, or bytes behind it")
    return found


def _server_name(data: bytes) -> str:
    names = _whole(data, 2)
    kind, name = names.number(1), names.vector(2)
    if kind or names.left or not _host_name(name):
        raise ValueError("no host name")
    return name.decode("ascii").lower().removesuffix(".")


def _protocols(data: bytes) -> tuple[bytes, ...]:
    names = _whole(data, 2)
    found = []
    while names.left:
        found.append(names.vector(1))
        if not found[-1]:
            raise ValueError("an empty name of a protocol")
    return tuple(found)
