"""A TLS client that says whatever a test wants: every part of its messages can be another, at every step it can stop.

Handshakes of TLS 1.2 (ECDHE with X25519) and 1.3 are done down here on records, with no TLS library, so that what no
library would send can be sent, and what a server answers is seen as it is on the wire. For tests only: it verifies
the server's Finished and that its records decrypt, and no certificate.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import struct
from dataclasses import dataclass, field, replace
from typing import Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

SECONDS = 20.0
CCS, ALERT, HANDSHAKE, DATA, HEARTBEAT = 20, 21, 22, 23, 24
CLIENT_HELLO, SERVER_HELLO, TICKET, END_OF_EARLY_DATA, CERTIFICATE, FINISHED, KEY_UPDATE = 1, 2, 4, 5, 11, 20, 24
SERVER_KEY_EXCHANGE, SERVER_HELLO_DONE, CLIENT_KEY_EXCHANGE = 12, 14, 16
SNI, GROUPS, POINTS, SIGNATURES, ALPN, PADDING, EMS, TICKETS = 0, 10, 11, 13, 16, 21, 23, 35
PSK, EARLY, VERSIONS, COOKIE, MODES, SHARES, RENEGOTIATION = 41, 42, 43, 44, 45, 51, 0xFF01
X25519, P256, P384 = 0x001D, 0x0017, 0x0018
CLOSE_NOTIFY, UNEXPECTED, BAD_MAC, OVERFLOW, HANDSHAKE_FAILURE = 0, 10, 20, 22, 40
ILLEGAL, DECODE, DECRYPT, VERSION, INTERNAL, FALLBACK, NO_RENEGOTIATION = 47, 50, 51, 70, 80, 86, 100
MISSING, UNSUPPORTED, UNRECOGNIZED_NAME, NO_PROTOCOL = 109, 110, 112, 120

RETRY_RANDOM = hashlib.sha256(b"HelloRetryRequest").digest()
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
SUITES13 = {0x1301: ("sha256", AESGCM, 16), 0x1302: ("sha384", AESGCM, 32), 0x1303: ("sha256", ChaCha20Poly1305, 32)}
SUITES12 = {
    0xC02B: ("sha256", AESGCM, 16), 0xC02C: ("sha384", AESGCM, 32), 0xCCA9: ("sha256", ChaCha20Poly1305, 32),
    0xC02F: ("sha256", AESGCM, 16), 0xC030: ("sha384", AESGCM, 32), 0xCCA8: ("sha256", ChaCha20Poly1305, 32),
}
SCHEMES = (0x0403, 0x0503, 0x0804, 0x0805, 0x0806, 0x0401, 0x0501)


class Ended(Exception):
    """The server has closed the connection."""


class Alerted(Exception):
    """The server has sent an alert: `level`, `description`."""

    def __init__(self, level: int, description: int) -> None:
        super().__init__(f"alert {description} of level {level}")
        self.level, self.description = level, description


def vector(data: bytes, size: int) -> bytes:
    """Data behind its length of `size` bytes."""
    return len(data).to_bytes(size, "big") + data


def numbers(*values: int) -> bytes:
    """Numbers of 16 bits behind their length of 16."""
    return vector(struct.pack(f">{len(values)}H", *values), 2)


def message(kind: int, body: bytes) -> bytes:
    """A message of a handshake."""
    return bytes((kind,)) + vector(body, 3)


def server_name(name: bytes) -> bytes:
    """The body of the extension of that name (RFC 6066 3)."""
    return vector(b"\0" + vector(name, 2), 2)


def share(group: int, key: bytes) -> bytes:
    """One entry of key_share."""
    return struct.pack(">H", group) + vector(key, 2)


@dataclass(frozen=True)
class Hello:
    """A ClientHello."""

    extensions: tuple[tuple[int, bytes], ...]
    suites: tuple[int, ...]
    version: int = 0x0303
    random: bytes = field(default_factory=lambda: os.urandom(32))
    session: bytes = b""
    compressions: bytes = b"\0"
    tail: bytes = b""
    """What stands behind everything, inside the message."""

    def but(self, *extensions: tuple[int, bytes]) -> Self:
        """With these extensions in the place of those of their numbers, or at the end."""
        changed = dict(extensions)
        kept = tuple((number, changed.pop(number, data)) for number, data in self.extensions)
        return replace(self, extensions=kept + tuple(changed.items()))

    def without(self, *numbers_: int) -> Self:
        """Without these extensions."""
        return replace(self, extensions=tuple(one for one in self.extensions if one[0] not in numbers_))

    def pack(self) -> bytes:
        """The message."""
        extensions = b"".join(struct.pack(">H", number) + vector(data, 2) for number, data in self.extensions)
        return message(CLIENT_HELLO, (
            struct.pack(">H", self.version) + self.random + vector(self.session, 1) + numbers(*self.suites)
            + vector(self.compressions, 1) + (vector(extensions, 2) if self.extensions else b"") + self.tail))


COMMON = (
    (SNI, server_name(b"localhost")), (GROUPS, numbers(X25519, P256, P384)), (SIGNATURES, numbers(*SCHEMES)),
    (ALPN, vector(vector(b"http/1.1", 1), 2)))
HELLO12 = Hello(
    (*COMMON, (POINTS, b"\1\0"), (EMS, b""), (TICKETS, b""), (RENEGOTIATION, b"\0")), tuple(SUITES12),
    session=b"")


def hello13(key: X25519PrivateKey, session: bytes = b"s" * 32) -> Hello:
    """One that every server of TLS 1.3 understands."""
    return Hello(
        (*COMMON, (VERSIONS, b"\2\3\4"), (MODES, b"\1\1"),
         (SHARES, vector(share(X25519, key.public_key().public_bytes_raw()), 2))),
        (0x1302, 0x1301, 0x1303), session=session)


def read_hello(data: bytes) -> tuple[int, dict[int, bytes], bytes]:
    """Cipher suite, extensions and random of a ServerHello."""
    at = 4 + 2 + 32
    at += 1 + data[at]
    (suite,) = struct.unpack_from(">H", data, at)
    at += 5
    found = {}
    while at < len(data):
        number, length = struct.unpack_from(">HH", data, at)
        found[number] = data[at + 4 : at + 4 + length]
        at += 4 + length
    return suite, found, data[6:38]


class Keys:
    """One direction: how records are sealed and opened. `explicit`: TLS 1.2 with GCM sends half of the nonce."""

    def __init__(self, cipher: object, iv: bytes, *, new: bool, explicit: bool) -> None:
        self.cipher, self.iv, self.new, self.explicit = cipher, iv, new, explicit
        self.count = 0

    def _nonce(self) -> bytes:
        number = self.count.to_bytes(8, "big")
        if self.explicit:
            return self.iv + number
        return (int.from_bytes(self.iv, "big") ^ self.count).to_bytes(12, "big")

    def seal(self, kind: int, data: bytes, padding: int = 0) -> bytes:
        """A record."""
        nonce, number = self._nonce(), self.count.to_bytes(8, "big")
        self.count += 1
        if self.new:
            inner = data + bytes((kind,)) + bytes(padding)
            head = struct.pack(">BHH", DATA, 0x0303, len(inner) + 16)
            return head + self.cipher.encrypt(nonce, inner, head)
        sealed = self.cipher.encrypt(nonce, data, number + struct.pack(">BHH", kind, 0x0303, len(data)))
        if self.explicit:
            sealed = number + sealed
        return struct.pack(">BHH", kind, 0x0303, len(sealed)) + sealed

    def open(self, head: bytes, data: bytes) -> tuple[int, bytes]:
        """The kind and content of a record. Raises cryptography's InvalidTag."""
        nonce, number = self._nonce(), self.count.to_bytes(8, "big")
        self.count += 1
        if self.new:
            inner = self.cipher.decrypt(nonce, data, head).rstrip(b"\0")
            return inner[-1], inner[:-1]
        if self.explicit:
            nonce, data = self.iv + data[:8], data[8:]
        added = number + head[:3] + (len(data) - 16).to_bytes(2, "big")
        return head[0], self.cipher.decrypt(nonce, data, added)


class Client:
    """One connection."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data = b""
        self.messages = b""
        """Of the handshake, read and not yet taken."""
        self.reading: Keys | None = None
        self.writing: Keys | None = None
        self.transcript = b""
        self.key = X25519PrivateKey.generate()
        self.hash = "sha256"
        self.tickets: list[bytes] = []
        self.answered: dict[int, bytes] = {}
        """Extensions of the ServerHello."""
        self.secrets: dict[str, bytes] = {}
        self.psk = b""
        """Of the session that is offered."""
        self.resumed = False
        self.next_reading: Keys | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    # Records

    def send(self, kind: int, data: bytes, version: int = 0x0303) -> None:
        """One record, sealed when there are keys."""
        if self.writing:
            self.raw(self.writing.seal(kind, data))
        else:
            self.raw(struct.pack(">BHH", kind, version, len(data)) + data)

    def raw(self, data: bytes) -> None:
        """Bytes as they are; a server that has already closed is heard of when reading."""
        with contextlib.suppress(ConnectionError):
            self.sock.sendall(data)

    def _fill(self, count: int) -> None:
        while len(self.data) < count:
            try:
                piece = self.sock.recv(65536)
            except ConnectionError as error:
                raise Ended(f"reset: {error}") from None
            if not piece:
                raise Ended("closed")
            self.data += piece

    def receive(self) -> tuple[int, bytes]:
        """The next record that is not the change of ciphers of TLS 1.3. Raises Alerted, Ended."""
        while True:
            self._fill(5)
            length = int.from_bytes(self.data[3:5], "big")
            self._fill(5 + length)
            head, content, self.data = self.data[:5], self.data[5 : 5 + length], self.data[5 + length :]
            kind = head[0]
            if self.reading and not (self.reading.new and kind == CCS):
                kind, content = self.reading.open(head, content)
            if kind == ALERT:
                raise Alerted(content[0], content[1])
            if kind != CCS or not (self.reading and self.reading.new):
                return kind, content

    def next_message(self) -> bytes:
        """The next message of the handshake."""
        while len(self.messages) < 4 or len(self.messages) < 4 + int.from_bytes(self.messages[1:4], "big"):
            kind, content = self.receive()
            if kind == CCS and not self.messages:
                if self.next_reading:
                    self.reading, self.next_reading = self.next_reading, None
                continue
            assert kind == HANDSHAKE, f"a record of kind {kind} in the handshake: {content[:40]!r}"
            self.messages += content
        end = 4 + int.from_bytes(self.messages[1:4], "big")
        found, self.messages = self.messages[:end], self.messages[end:]
        return found

    def taken(self) -> bytes:
        """The next message, which goes into the transcript."""
        found = self.next_message()
        self.transcript += found
        return found

    def end(self) -> int | None:
        """Read until the server ends it: the description of its alert, None when it just closed.

        A close_notify ahead of the end is an end like one without.
        """
        try:
            while True:
                self.receive()
        except Alerted as alert:
            if alert.description == NO_RENEGOTIATION:
                return alert.description  # a warning, after which all goes on
            with contextlib.suppress(ConnectionError):
                while self.sock.recv(65536):
                    pass
            return None if alert.description == CLOSE_NOTIFY else alert.description
        except Ended:
            return None

    # Both

    def digest(self) -> bytes:
        """That of the transcript."""
        return hashlib.new(self.hash, self.transcript).digest()

    def hello(self, hello: Hello) -> None:
        """Send it in one record."""
        packed = hello.pack()
        self.transcript += packed
        self.send(HANDSHAKE, packed, 0x0301)

    def ask(self, request: bytes = REQUEST, expected: bytes = b"HTTP/1.1 200") -> bytes:
        """Send a request and read the answer, whose body is as long as it says."""
        self.send(DATA, request)
        return self.answer(expected)

    def answer(self, expected: bytes = b"HTTP/1.1 200") -> bytes:
        """Read an answer."""
        data = b""
        while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < _length(data):
            kind, content = self.receive()
            if kind == DATA:
                data += content
            elif kind == HANDSHAKE and content[0] == TICKET:
                self.tickets.append(content)
            elif kind == HANDSHAKE and content[0] == KEY_UPDATE:
                self.update_reading()
            else:
                raise AssertionError(f"a record of kind {kind}: {content[:40]!r}")
        assert data.startswith(expected), data[:100]
        return data.partition(b"\r\n\r\n")[2]

    # TLS 1.3 (RFC 8446)

    def expand(self, secret: bytes, name: bytes, context: bytes = b"", size: int | None = None) -> bytes:
        """HKDF-Expand-Label."""
        size = hashlib.new(self.hash).digest_size if size is None else size
        info = struct.pack(">H", size) + vector(b"tls13 " + name, 1) + vector(context, 1)
        return hmac.digest(secret, info + b"\1", self.hash)[:size]

    def traffic(self, secret: bytes) -> Keys:
        """The keys of a traffic secret."""
        _, cipher, size = SUITES13[self.suite]
        return Keys(cipher(self.expand(secret, b"key", size=size)), self.expand(secret, b"iv", size=12), new=True,
                    explicit=False)

    def server_hello(self) -> bool:
        """Read a ServerHello of TLS 1.3; whether it is a request for another ClientHello."""
        first = self.next_message()
        assert first[0] == SERVER_HELLO
        self.suite, self.answered, random = read_hello(first)
        self.hash = SUITES13[self.suite][0]
        if random == RETRY_RANDOM:
            self.transcript = message(254, self.digest()) + first
            return True
        self.transcript += first
        self.resumed = PSK in self.answered
        return False

    def shake13(self, hello: Hello, private: ec.EllipticCurvePrivateKey | None = None) -> None:
        """Everything up to and with the server's Finished; `private` is the key of a share that is not X25519."""
        self.hello(hello)
        assert not self.server_hello(), "the server wants another ClientHello"
        self.flight13(private)

    def flight13(self, private: ec.EllipticCurvePrivateKey | None = None) -> None:
        """What follows a ServerHello, up to the server's Finished, which is checked."""
        theirs = self.answered[SHARES][4:]
        if private is None:
            shared = self.key.exchange(X25519PublicKey.from_public_bytes(theirs))
        else:
            shared = private.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(private.curve, theirs))
        size = hashlib.new(self.hash).digest_size
        nothing = hashlib.new(self.hash).digest()
        early = hmac.digest(bytes(size), self.psk if self.resumed else bytes(size), self.hash)
        secret = hmac.digest(self.expand(early, b"derived", nothing), shared, self.hash)
        ours, theirs_secret = (self.expand(secret, name, self.digest()) for name in (b"c hs traffic", b"s hs traffic"))
        self.reading, self.writing = self.traffic(theirs_secret), self.traffic(ours)
        self.master = hmac.digest(self.expand(secret, b"derived", nothing), bytes(size), self.hash)
        self.ours = ours
        while True:
            before = self.digest()
            found = self.taken()
            if found[0] == FINISHED:
                expected = hmac.digest(self.expand(theirs_secret, b"finished"), before, self.hash)
                assert found[4:] == expected, "the server's Finished is wrong"
                break
        self.secrets = {
            "ours": self.expand(self.master, b"c ap traffic", self.digest()),
            "theirs": self.expand(self.master, b"s ap traffic", self.digest()),
        }
        self.reading = self.traffic(self.secrets["theirs"])  # it has changed keys behind its Finished

    def finished13(self) -> bytes:
        """Our Finished."""
        return message(FINISHED, hmac.digest(self.expand(self.ours, b"finished"), self.digest(), self.hash))

    def finish13(self) -> None:
        """Send it, and change to the keys of the application."""
        finished = self.finished13()
        self.send(HANDSHAKE, finished)
        self.transcript += finished
        self.writing = self.traffic(self.secrets["ours"])

    def update_reading(self) -> None:
        """After the server's KeyUpdate."""
        self.secrets["theirs"] = self.expand(self.secrets["theirs"], b"traffic upd")
        self.reading = self.traffic(self.secrets["theirs"])

    def update_writing(self) -> None:
        """After our KeyUpdate."""
        self.secrets["ours"] = self.expand(self.secrets["ours"], b"traffic upd")
        self.writing = self.traffic(self.secrets["ours"])

    def session(self) -> tuple[bytes, bytes, bytes]:
        """Of the last ticket that came: the ticket, its age_add, and the key it stands for."""
        ticket = self.tickets[-1]
        at = 13 + ticket[12]
        nonce = ticket[13:at]
        size = int.from_bytes(ticket[at : at + 2], "big")
        master = self.expand(self.master, b"res master", self.digest())
        return ticket[at + 2 : at + 2 + size], ticket[8:12], self.expand(master, b"resumption", nonce)

    def offer(self, hello: Hello, session: tuple[bytes, bytes, bytes], *, wrong: bool = False) -> Hello:
        """A ClientHello that offers a session, last of all its extensions, with its binder."""
        ticket, age, self.psk = session
        size = len(self.psk)
        self.hash = {32: "sha256", 48: "sha384"}[size]
        identities = vector(vector(ticket, 2) + age, 2)
        empty = hello.but((PSK, identities + vector(vector(bytes(size), 1), 2)))
        early = hmac.digest(bytes(size), self.psk, self.hash)
        key = self.expand(self.expand(early, b"res binder", hashlib.new(self.hash).digest()), b"finished")
        told = self.transcript + empty.pack()[: -size - 3]
        binder = hmac.digest(key, hashlib.new(self.hash, told).digest(), self.hash)
        if wrong:
            binder = bytes((binder[0] ^ 1,)) + binder[1:]
        return hello.but((PSK, identities + vector(vector(binder, 1), 2)))

    # TLS 1.2 (RFC 5246, RFC 8422, RFC 7627)

    def prf(self, secret: bytes, name: bytes, seed: bytes, size: int) -> bytes:
        """The pseudo-random function."""
        found, block = b"", name + seed
        while len(found) < size:
            block = hmac.digest(secret, block, self.hash)
            found += hmac.digest(secret, block + name + seed, self.hash)
        return found[:size]

    def shake12(self, hello: Hello) -> None:
        """Everything up to the server's ServerHelloDone."""
        self.random = hello.random
        self.hello(hello)
        first = self.taken()
        assert first[0] == SERVER_HELLO
        self.suite, self.answered, self.server_random = read_hello(first)
        self.hash = SUITES12[self.suite][0]
        while (found := self.taken())[0] != SERVER_HELLO_DONE:
            if found[0] == SERVER_KEY_EXCHANGE:
                assert found[4:7] == b"\3\0\x1d", "another group than X25519"
                self.theirs = found[8 : 8 + found[7]]

    def keys12(self) -> None:
        """Make the keys, of what has been said so far: to be called when our key is in the transcript."""
        secret = self.key.exchange(X25519PublicKey.from_public_bytes(self.theirs))
        if EMS in self.answered:
            self.master = self.prf(secret, b"extended master secret", self.digest(), 48)
        else:
            self.master = self.prf(secret, b"master secret", self.random + self.server_random, 48)
        _, cipher, size = SUITES12[self.suite]
        explicit = cipher is AESGCM
        iv = 4 if explicit else 12
        block = self.prf(self.master, b"key expansion", self.server_random + self.random, 2 * (size + iv))
        keys, ivs = block[: 2 * size], block[2 * size :]
        self.own, self.next_reading = (
            Keys(cipher(keys[at * size : (at + 1) * size]), ivs[at * iv : (at + 1) * iv], new=False, explicit=explicit)
            for at in (0, 1))

    def exchange12(self) -> None:
        """Send our key."""
        body = vector(self.key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw), 1)
        found = message(CLIENT_KEY_EXCHANGE, body)
        self.transcript += found
        self.send(HANDSHAKE, found)
        self.keys12()

    def finished12(self) -> bytes:
        """Our Finished."""
        return message(FINISHED, self.prf(self.master, b"client finished", self.digest(), 12))

    def finish12(self) -> None:
        """Send our key, change ciphers, end the handshake; the server's end is checked."""
        self.exchange12()
        self.change12()

    def change12(self) -> None:
        """Change ciphers and end the handshake; the server's end is checked."""
        self.send(CCS, b"\1")
        self.writing = self.own
        finished = self.finished12()
        self.transcript += finished
        self.send(HANDSHAKE, finished)
        while True:
            before = self.digest()
            found = self.taken()
            if found[0] == FINISHED:
                assert found[4:] == self.prf(self.master, b"server finished", before, 12)
                return
            assert found[0] == TICKET, f"a message of kind {found[0]}"


def _length(data: bytes) -> int:
    head = data.partition(b"\r\n\r\n")[0].lower()
    return int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or b"0")
