"""What a worker and the key manager say to each other: messages of a SOCK_SEQPACKET pair, each bounded and whole.

A worker can ask for one thing, a signature, and is told what it shows to clients: certificates, lists of revoked ones,
masters of session tickets, challenges. What is told may be longer than a message; then it comes in pieces, in order
and with nothing in between but signatures.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

MESSAGE_BYTES_MAX: Final = 65536
"""The longest message."""

PIECE_BYTES_MAX: Final = 32768
"""Of what is told, in one message: several fit the buffer of the socket, so that it is refilled while it empties."""

TOLD_BYTES_MAX: Final = 32 << 20
"""The longest thing that is told, put together: large lists of revoked certificates have some megabytes."""

TICKET_BYTES: Final = 32
"""A master of session tickets."""

KEY_ID_BYTES: Final = 8
"""The start of the SHA-256 of a public key (SubjectPublicKeyInfo, DER): names one of two keys during a reload."""

ANY_KEY: Final = bytes(KEY_ID_BYTES)
"""The key that is in use, whichever it is."""

_ASK = struct.Struct(f"!BIHBB{KEY_ID_BYTES}s")
_CONFIRMED = struct.Struct(f"!BH{KEY_ID_BYTES}s")
_ANSWER = struct.Struct("!BI")
_PIECE = struct.Struct("!BB")
_DOMAIN = struct.Struct("!H")
_COUNT = struct.Struct("!H")
_LENGTH = struct.Struct("!I")

BLOCK_BYTES_MAX: Final = 1024
"""What is signed at once: the modulus of the largest RSA key, 8192 bits."""


class Said(enum.IntEnum):
    """The first byte. The first two go to the key manager, all others to a worker."""

    ASK = 1  # sign: id, domain, kind of key, padding, id of the key, block
    CONFIRMED = 2  # the challenge of a domain is in place: domain, challenge_id

    SIGNED = 16  # the signature for an id
    REFUSED = 17  # why there is none, in words
    CERTIFICATES = 18  # of a domain: chains, each a list of DER, leaf first
    REVOKED = 19  # of a domain: certificate revocation lists, DER
    CHALLENGE = 20  # of a domain: the chain for acme-tls/1; an empty one ends it
    TICKETS = 21  # masters of session tickets, newest first
    COMPLETE = 22  # all there is has been told once


TOLD: Final = frozenset({Said.CERTIFICATES, Said.REVOKED, Said.CHALLENGE, Said.TICKETS, Said.COMPLETE})

KINDS: Final = {"rsa": 1, "ec": 2}
"""Kinds of key by name, and their numbers here."""

_KIND_NAMES: Final = {number: name for name, number in KINDS.items()}


class MalformedError(Exception):
    """What came is nothing that an honest peer sends."""


class Ask(NamedTuple):
    """A worker wants the block signed."""

    id: int
    domain: int
    """The index in the plan."""
    kind: str
    padding: int
    """Of RSA, in OpenSSL's numbers: 1 PKCS #1 v1.5, which is still to be added, 3 none. 0 for EC."""
    key: bytes
    """The id of the key, or ANY_KEY."""
    block: bytes

    def message(self) -> bytes:
        """As it is sent."""
        return _ASK.pack(Said.ASK, self.id, self.domain, KINDS[self.kind], self.padding, self.key) + self.block


def read_ask(message: bytes) -> Ask:
    """What a worker sent. Raises MalformedError."""
    if len(message) <= _ASK.size or len(message) - _ASK.size > BLOCK_BYTES_MAX:
        raise MalformedError(f"a message of {len(message)} bytes")
    said, number, domain, kind, padding, key = _ASK.unpack_from(message)
    if said != Said.ASK:
        raise MalformedError(f"a message of kind {said}")
    if kind not in _KIND_NAMES:
        raise MalformedError(f"a kind of key {kind}")
    return Ask(number, domain, _KIND_NAMES[kind], padding, key, message[_ASK.size :])


def challenge_id(chain: Sequence[bytes]) -> bytes:
    """What a worker confirms a challenge by."""
    return hashlib.sha256(b"".join(chain)).digest()[:KEY_ID_BYTES]


def confirmed(domain: int, chain: Sequence[bytes]) -> bytes:
    """A worker has the challenge of a domain in place; an empty chain: it is gone."""
    return _CONFIRMED.pack(Said.CONFIRMED, domain, challenge_id(chain))


def read_confirmed(message: bytes) -> tuple[int, bytes] | None:
    """The domain and the challenge_id; None for what confirms nothing. Raises MalformedError."""
    if message[0] != Said.CONFIRMED:
        return None
    if len(message) != _CONFIRMED.size:
        raise MalformedError(f"a confirmation of {len(message)} bytes")
    _, domain, number = _CONFIRMED.unpack(message)
    return domain, number


def signed(number: int, signature: bytes) -> bytes:
    """The answer to Ask `number`."""
    return _ANSWER.pack(Said.SIGNED, number) + signature


def refused(number: int, reason: str) -> bytes:
    """The answer when there is no such key."""
    return _ANSWER.pack(Said.REFUSED, number) + reason.encode("utf-8", "replace")[:1024]


def read_answer(message: bytes) -> tuple[int, bytes] | None:
    """The id and what follows it of SIGNED and REFUSED; None for what answers nothing. Raises MalformedError."""
    if message[0] not in (Said.SIGNED, Said.REFUSED):
        return None
    if len(message) < _ANSWER.size:
        raise MalformedError("an answer without an id")
    return _ANSWER.unpack_from(message)[1], message[_ANSWER.size :]


@dataclass(frozen=True, slots=True)
class Told:
    """One thing a worker is told. `domain` and `chains` as the kind has them; a single list is chains of one."""

    said: Said
    domain: int = 0
    chains: tuple[tuple[bytes, ...], ...] = ()

    def pieces(self) -> Iterator[bytes]:
        """The messages it is sent as."""
        body = _DOMAIN.pack(self.domain) + _pack(self.chains)
        for start in range(0, len(body), PIECE_BYTES_MAX):
            more = start + PIECE_BYTES_MAX < len(body)
            yield _PIECE.pack(self.said, more) + body[start : start + PIECE_BYTES_MAX]


class Assembly:
    """Pieces of one sender, put together."""

    __slots__ = ("_body", "_said")

    def __init__(self) -> None:
        self._said: int | None = None
        self._body = bytearray()

    def add(self, message: bytes) -> Told | None:
        """Take the next message; what is told when it is whole. Raises MalformedError."""
        if len(message) < _PIECE.size:
            raise MalformedError(f"a message of {len(message)} bytes")
        said, more = _PIECE.unpack_from(message)
        if said not in TOLD or (self._said is not None and said != self._said):
            raise MalformedError(f"a piece of kind {said}")
        self._body += message[_PIECE.size :]
        if len(self._body) > TOLD_BYTES_MAX:
            raise MalformedError(f"more than {TOLD_BYTES_MAX} bytes")
        if more:
            self._said = said
            return None
        body, self._body, self._said = bytes(self._body), bytearray(), None
        try:
            return Told(Said(said), _DOMAIN.unpack_from(body)[0], _unpack(body, _DOMAIN.size))
        except struct.error:
            raise MalformedError("cut short") from None


def _pack(chains: Sequence[Sequence[bytes]]) -> bytes:
    parts = [_COUNT.pack(len(chains))]
    for chain in chains:
        parts.append(_COUNT.pack(len(chain)))
        for item in chain:
            parts += (_LENGTH.pack(len(item)), item)
    return b"".join(parts)


def _unpack(body: bytes, place: int) -> tuple[tuple[bytes, ...], ...]:
    """Raises struct.error, MalformedError."""

    def count() -> int:
        nonlocal place
        (found,) = _COUNT.unpack_from(body, place)
        place += _COUNT.size
        return int(found)

    def item() -> bytes:
        nonlocal place
        (length,) = _LENGTH.unpack_from(body, place)
        place += _LENGTH.size + length
        if place > len(body):
            raise MalformedError("cut short")
        return body[place - length : place]

    chains = tuple(tuple(item() for _ in range(count())) for _ in range(count()))
    if place != len(body):
        raise MalformedError(f"{len(body) - place} bytes too many")
    return chains
