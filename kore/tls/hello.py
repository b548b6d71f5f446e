"""Reads a ClientHello before OpenSSL does: which server it wants, which protocols it speaks, which ticket it brings.

So the context that answers is chosen whole, with its certificate, its clients' authorities and its ticket keys, before
a TLS object exists: nothing has to be switched in the middle of a handshake, which is where such things go wrong.

Nothing is judged here but the framing that is needed to read on. What does not parse is `malformed`: OpenSSL gets it as
it came, says what is wrong in the right alert, and the connection counts as one that named no server.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from typing import Final, NamedTuple

HELLO_BYTES_MAX: Final = 32768
"""Bytes read of a connection before its ClientHello is whole: browsers send about 2 KiB with post-quantum keys."""

RECORD_BYTES_MAX: Final = 16384  # RFC 8446 5.1
KNOWN_MAX: Final = 256
"""Server names and lists of protocols that are remembered: clients ask for the same few. What is none never is."""

HANDSHAKE: Final = 22
CLIENT_HELLO: Final = 1
TICKET_NAME_BYTES: Final = 16  # how OpenSSL begins its tickets: with the name of their key

SERVER_NAME: Final = 0  # RFC 6066 3
ALPN: Final = 16  # RFC 7301 3.1
SESSION_TICKET: Final = 35  # RFC 5077 3.2
PRE_SHARED_KEY: Final = 41  # RFC 8446 4.2.11
_READ: Final = frozenset({SERVER_NAME, ALPN, SESSION_TICKET, PRE_SHARED_KEY})

_host_name = re.compile(rb"[!-~]{1,255}").fullmatch
_two_numbers = struct.Struct(">HH").unpack_from
_heads = struct.Struct(">BBxHBBH").unpack_from
"""Of a record its type, the major version and its size; of the message in it its type, and its size in two numbers."""


class Hello(NamedTuple):
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
        self.raw: bytes | bytearray = b""
        self._at = 0  # where the record begins that has not been read
        self._message: bytearray  # the handshake message, as far as it has come

    @property
    def clear_text(self) -> bool:
        """Whether what came begins like a request in plain text: no record of TLS begins with a letter."""
        return bool(self.raw) and 0x41 <= self.raw[0] <= 0x5A

    def feed(self, data: bytes) -> Hello | None:
        """The ClientHello, once it is whole or cannot become one. Raises TooLongError."""
        raw = self.raw
        if not raw:
            if len(data) > 9:
                # The hot path: one record that is the message.
                record, major, size, message, size_high, size_low = _heads(data)
                if (record == HANDSHAKE and major == 3 and size == len(data) - 5 <= RECORD_BYTES_MAX
                        and message == CLIENT_HELLO and not size_high and size_low == size - 4):
                    self.raw = data
                    return _parsed(data, 9)
            raw = self.raw = bytearray()
            self._message = bytearray()
        assert type(raw) is bytearray
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
        return _parsed(bytes(message[4 : 4 + size]), 0)


def _parsed(body: bytes, at: int) -> Hello:
    """The ClientHello of RFC 8446 4.1.2 and RFC 5246 7.4.1.2 from `at` on.

    Every connection pays for it: one loop over places in the bytes takes a third of what objects for fields took.
    """
    try:
        at += 2 + 32  # the version and random bytes
        at += 1 + body[at]  # the session's id
        at += 2 + (body[at] << 8 | body[at + 1])  # ciphers
        at += 1 + body[at]  # compression
        end = len(body)
        if at == end:
            return Hello()
        if at + 2 + (body[at] << 8 | body[at + 1]) != end:
            return MALFORMED
        at += 2
        name: str | None = None
        alpn: tuple[bytes, ...] = ()
        ticket = b""
        while at < end:
            kind, size = _two_numbers(body, at)
            at += 4 + size
            if kind in _READ:
                data = body[at - size : at]
                if kind == SERVER_NAME and name is None:
                    name = _server_name(data)
                elif kind == ALPN and not alpn:
                    alpn = _protocols(data)
                elif kind == SESSION_TICKET:
                    ticket = ticket or data[:TICKET_NAME_BYTES]
                elif kind == PRE_SHARED_KEY:
                    ticket = _identity(data)[:TICKET_NAME_BYTES]
                else:
                    return MALFORMED  # there twice
    except (IndexError, struct.error, ValueError):
        return MALFORMED
    return Hello(name, alpn, ticket) if at == end else MALFORMED


@lru_cache(maxsize=KNOWN_MAX)
def _server_name(data: bytes) -> str:
    """Of a list of names, whose only entry is that of a host."""
    length, kind, size = struct.unpack_from(">HBH", data)
    name = data[5:]
    if length != len(data) - 2 or kind or size != len(name) or not _host_name(name):
        raise ValueError("no host name")
    return name.decode("ascii").lower().removesuffix(".")


@lru_cache(maxsize=KNOWN_MAX)
def _protocols(data: bytes) -> tuple[bytes, ...]:
    at, end = 2, len(data)
    if end <= at or (data[0] << 8 | data[1]) != end - at:
        raise ValueError("an empty list, or bytes behind it")
    found = []
    while at < end:
        size = data[at]
        found.append(data[at + 1 : at + 1 + size])
        at += 1 + size
        if not size or at > end:
            raise ValueError("an empty name of a protocol, or one that is too long")
    return tuple(found)


def _identity(data: bytes) -> bytes:
    """The first of the identities of sessions."""
    all_of_them, size = _two_numbers(data)
    if all_of_them > len(data) - 2 or size > all_of_them - 2:
        raise ValueError("it ends within a session's identity")
    return data[4 : 4 + size]
