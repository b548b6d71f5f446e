"""What the ACME process and the key manager say to each other, byte by byte, and the asking end of it.

One question, one answer, told apart by a number, over a pair of sockets that keeps the borders of messages. The
ACME process speaks to strangers, so it is the one that may be captured: the table below is all it can ask, and what the
key manager makes of it (kore.tls.acme_store, acme_policy) is written for an asker that lies.
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

MESSAGE_BYTES_MAX: Final = 60 * 1024
"""Of a question or an answer; a chain of certificates (48 KiB) fits."""

ANSWER_SECONDS_MAX: Final = 10.0
"""For an answer: a signature takes a millisecond, writing a certificate to a busy disk a second."""

CHALLENGE_SECONDS_MAX: Final = 20.0
"""For that of CHALLENGE, which comes when all workers have the certificate, or 10 s have passed."""

_QUESTION: Final = struct.Struct("!BIB")
_ANSWER: Final = struct.Struct("!BI")
_TIMES: Final = struct.Struct("!dd")


class Ask(enum.IntEnum):
    """What the ACME process asks for. Each names a domain, or "" where it is about the account."""

    ACCOUNT = 1  # answer: x and y of the account's key, 32 bytes each; its address
    SIGN = 2  # a JWS signing input; answer: the signature, DER
    REGISTERED = 3  # the address of the account
    BINDING = 4  # the newAccount address; answer: the external account binding, JSON; empty: none is configured
    REQUEST = 5  # answer: a certificate request, DER
    CHALLENGE = 6  # the digest; the answer comes when the workers have the certificate
    CLEAR = 7  # the challenge is over
    INSTALL = 8  # a chain, PEM; the answer comes when it is on disk and on its way to the workers
    STANDING = 9  # answer: notBefore and notAfter of the certificate (0: none), then what NOTE wrote
    NOTE = 10  # what the schedule knows of the domain, to be kept on disk
    LEAF = 11  # answer: the certificate, DER


class Tell(enum.IntEnum):
    """What the key manager answers."""

    DONE = 1
    REFUSED = 2  # the reason, UTF-8


class WireError(ValueError):
    """A message that no process of ours sends."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question."""

    ask: Ask
    number: int
    name: str
    body: bytes

    def dump(self) -> bytes:
        """As it is sent."""
        name = self.name.encode("ascii")
        return _QUESTION.pack(self.ask, self.number, len(name)) + name + self.body


def question(message: bytes) -> Question:
    """Read a question. Raises WireError."""
    if not _QUESTION.size <= len(message) <= MESSAGE_BYTES_MAX:
        raise WireError(f"a question of {len(message)} bytes")
    kind, number, length = _QUESTION.unpack_from(message)
    rest = message[_QUESTION.size :]
    name = rest[:length]
    try:
        if len(name) != length:
            raise ValueError("a name that is cut off")
        return Question(Ask(kind), number, name.decode("ascii"), rest[length:])
    except ValueError as error:
        raise WireError(f"a question that is none: {error}") from None


def answer(number: int, tell: Tell, body: bytes = b"") -> bytes:
    """An answer, as it is sent."""
    return _ANSWER.pack(tell, number) + body


def read_answer(message: bytes) -> tuple[Tell, int, bytes]:
    """Kind, number and body of an answer. Raises WireError."""
    try:
        kind, number = _ANSWER.unpack_from(message)
        return Tell(kind), number, message[_ANSWER.size :]
    except (struct.error, ValueError) as error:
        raise WireError(f"an answer that is none: {error}") from None


def standing(not_before: float, not_after: float, noted: bytes) -> bytes:
    """The body of the answer to STANDING."""
    return _TIMES.pack(not_before, not_after) + noted


class KeysGoneError(Exception):
    """Who holds the keys does not answer: a matter of this server's, not of the authority's."""


class RefusedError(Exception):
    """Who holds the keys does not want to do that; the text says why."""


class Asker:
    """The asking end, which kore.tls.acme_client takes for its Keys. One question at a time."""

    def __init__(self, send: Callable[[bytes], None], receive: Callable[[float], bytes | None]) -> None:
        """`send` sends; `receive` returns the next message, None after so many seconds. Both raise KeysGoneError."""
        self._send = send
        self._receive = receive
        self._number = 0

    def ask(self, ask: Ask, name: str = "", body: bytes = b"", seconds: float = ANSWER_SECONDS_MAX) -> bytes:
        """Ask, and wait for the answer. Raises KeysGoneError, RefusedError."""
        self._number = (self._number + 1) & 0xFFFFFFFF
        self._send(Question(ask, self._number, name, body).dump())
        while True:
            message = self._receive(seconds)
            if message is None:
                raise KeysGoneError(f"the key manager did not answer within {seconds:g} s")
            tell, number, found = read_answer(message)
            if number != self._number:
                continue  # the late answer to a question that was given up
            if tell is Tell.REFUSED:
                raise RefusedError(found.decode("utf-8", "backslashreplace"))
            return found

    def account(self) -> tuple[int, int, str]:
        """See kore.tls.acme_client.Keys, for all of these."""
        found = self.ask(Ask.ACCOUNT)
        return int.from_bytes(found[:32], "big"), int.from_bytes(found[32:64], "big"), found[64:].decode()

    def sign(self, data: bytes) -> bytes:
        return self.ask(Ask.SIGN, body=data)

    def registered(self, address: str) -> None:
        self.ask(Ask.REGISTERED, body=address.encode())

    def binding(self, address: str) -> dict[str, Any] | None:
        found = self.ask(Ask.BINDING, body=address.encode())
        return dict(json.loads(found)) if found else None

    def request(self, name: str) -> bytes:
        return self.ask(Ask.REQUEST, name)

    def challenge(self, name: str, digest: bytes) -> None:
        self.ask(Ask.CHALLENGE, name, digest, CHALLENGE_SECONDS_MAX)

    def clear(self, name: str) -> None:
        self.ask(Ask.CLEAR, name)

    def install(self, name: str, chain: bytes) -> None:
        self.ask(Ask.INSTALL, name, chain)

    def standing(self, name: str) -> tuple[float, float, bytes]:
        """notBefore and notAfter of what is installed, seconds since 1970, 0 when nothing is; and what was noted."""
        found = self.ask(Ask.STANDING, name)
        not_before, not_after = _TIMES.unpack_from(found)
        return not_before, not_after, found[_TIMES.size :]

    def note(self, name: str, text: bytes) -> None:
        """Have what the schedule knows kept on disk."""
        self.ask(Ask.NOTE, name, text)

    def leaf(self, name: str) -> bytes:
        """The certificate that is installed, DER."""
        return self.ask(Ask.LEAF, name)
