"""Rows of the table of conversations in which a client does what it may, however strange, and is served."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests import tls_wire as wire
from tests.tls_conversations import established12, established13, row, rows, served12, served13
from tests.tls_wire import (
    ALERT,
    ALPN,
    CLOSE_NOTIFY,
    DATA,
    EARLY,
    EMS,
    GROUPS,
    HANDSHAKE,
    HELLO12,
    PADDING,
    SHARES,
    SIGNATURES,
    SNI,
    TICKETS,
    VERSIONS,
    X25519,
    Client,
    hello13,
    message,
    numbers,
    server_name,
    share,
    vector,
)

GREASE = 0x1A1A  # RFC 8701

rows({f"1.2: suite {suite:04x}": (served12(replace(HELLO12, suites=(suite,))), ()) for suite in wire.SUITES12})
rows({f"1.3: suite {suite:04x}": (
    served13(lambda client, suite=suite: replace(hello13(client.key), suites=(suite,))), ())
    for suite in wire.SUITES13})
rows({
    "1.2: without extended master secret": (served12(HELLO12.without(EMS)), ()),
    "1.2: without tickets": (served12(HELLO12.without(TICKETS)), ()),
    "1.2: renegotiation info as a suite": (
        served12(replace(HELLO12.without(0xFF01), suites=(*HELLO12.suites, 0x00FF))), ()),
    "1.2: unknown suites, groups, schemes and extensions": (served12(replace(
        HELLO12, suites=(GREASE, 0x0000, *HELLO12.suites)).but(
            (GREASE, b"x"), (0xFAFA, b""), (GROUPS, numbers(GREASE, X25519, wire.P256)),
            (SIGNATURES, numbers(GREASE, *wire.SCHEMES)))), ()),
    "1.2: more compressions than none": (served12(replace(HELLO12, compressions=b"\x01\x40\0")), ()),
    "1.2: no server name": (served12(HELLO12.without(SNI)), ()),
    "1.2: no ALPN": (served12(HELLO12.without(ALPN)), ()),
    "1.2: a version of the future": (served12(replace(HELLO12, version=0x0304)), ()),
    "1.2: a session id of 32 bytes": (served12(replace(HELLO12, session=b"i" * 32)), ()),
    "1.3: no server name": (served13(lambda client: hello13(client.key).without(SNI)), ()),
    "1.3: a cookie that nobody gave": (
        served13(lambda client: hello13(client.key).but((wire.COOKIE, vector(b"cookie", 2)))), ()),
    "1.3: an empty server name": (served13(lambda client: hello13(client.key).but((SNI, server_name(b"")))), ()),
    "1.3: no session id": (served13(lambda client: hello13(client.key, b"")), ()),
    "1.3: unknown versions, suites, groups, shares, extensions": (served13(lambda client: replace(
        hello13(client.key), suites=(GREASE, 0x1302)).but(
            (GREASE, b""), (VERSIONS, b"\x06\x1a\x1a\x03\x04\x7f\x17"), (GROUPS, numbers(GREASE, X25519)),
            (SIGNATURES, numbers(GREASE, *wire.SCHEMES)),
            (SHARES, vector(share(GREASE, b"\0") + share(X25519, client.key.public_key().public_bytes_raw()), 2)))),
        ()),
    "1.3: 12 KiB of padding": (served13(lambda client: hello13(client.key).but((PADDING, bytes(12288)))), ()),
    "1.3: more protocols than ours": (served13(lambda client: hello13(client.key).but(
        (ALPN, vector(vector(b"h2", 1) + vector(b"http/1.1", 1), 2)))), ()),
})


@row("1.3: hello in two records, the padding at the border")
def two_records(client: Client) -> None:
    packed = hello13(client.key).but((PADDING, bytes(20000))).pack()
    client.transcript += packed
    client.send(HANDSHAKE, packed[:16384], 0x0301)
    client.send(HANDSHAKE, packed[16384:], 0x0301)
    client.server_hello()
    client.flight13()
    client.finish13()
    client.ask()


@row("1.3: hello in records of one byte")
def one_byte_records(client: Client) -> None:
    packed = hello13(client.key).pack()
    client.transcript += packed
    client.raw(b"".join(b"\x16\x03\x01\x00\x01" + packed[at : at + 1] for at in range(len(packed))))
    client.server_hello()
    client.flight13()
    client.finish13()
    client.ask()


@row("1.2: every record cut into bytes")
def dribbled(client: Client) -> None:
    raw = client.raw

    def bytewise(data: bytes) -> None:
        for at in range(len(data)):
            raw(data[at : at + 1])

    client.raw = bytewise
    established12(client)


@row("1.3: every record cut into bytes")
def dribbled13(client: Client) -> None:
    raw = client.raw

    def bytewise(data: bytes) -> None:
        for at in range(len(data)):
            raw(data[at : at + 1])

    client.raw = bytewise
    established13(client)


def curve(of: type[ec.EllipticCurve], group: int) -> Callable[[Client], None]:
    """A handshake with another group, at once and after the server asked for it."""

    def talk(client: Client) -> None:
        private = ec.generate_private_key(of())
        point = private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        hello = hello13(client.key).but((GROUPS, numbers(group)), (SHARES, vector(share(group, point), 2)))
        client.shake13(hello, private)
        client.finish13()
        client.ask()

    return talk


def retried(of: type[ec.EllipticCurve], group: int) -> Callable[[Client], None]:
    """The server asks for another share, and gets it (RFC 8446 4.1.4)."""

    def talk(client: Client) -> None:
        private = ec.generate_private_key(of())
        point = private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        hello = hello13(client.key).but((GROUPS, numbers(group)), (SHARES, vector(b"", 2)))
        client.hello(hello)
        assert client.server_hello(), "no HelloRetryRequest"
        assert client.answered[SHARES] == struct.pack(">H", group)
        second = hello.but((SHARES, vector(share(group, point), 2)))
        if wire.COOKIE in client.answered:
            second = second.but((wire.COOKIE, client.answered[wire.COOKIE]))
        client.hello(second)
        assert not client.server_hello()
        client.flight13(private)
        client.finish13()
        client.ask()

    return talk


rows({
    "1.3: P-256": (curve(ec.SECP256R1, wire.P256), ()),
    "1.3: P-384": (curve(ec.SECP384R1, wire.P384), ()),
    "1.3: P-256 on request": (retried(ec.SECP256R1, wire.P256), ()),
    "1.3: P-384 on request": (retried(ec.SECP384R1, wire.P384), ()),
})


@row("1.3: a change of ciphers of old times' sake")
def change_cipher_spec(client: Client) -> None:
    client.shake13(hello13(client.key))
    client.raw(b"\x14\x03\x03\x00\x01\x01")
    client.finish13()
    client.ask()


@row("1.3: early data that nobody asked for is passed over")
def early_data(client: Client) -> None:
    first = Client(client.sock.getpeername()[1])
    with first:
        established13(first)
        session = first.session()
    # Only together with a session may early data be said to come (RFC 8446 4.2.10).
    client.hello(client.offer(hello13(client.key).but((EARLY, b"")), session))
    client.raw(b"\x17\x03\x03\x04\x00" + b"e" * 1024)
    client.server_hello()
    client.flight13()
    assert client.resumed
    client.finish13()
    client.ask()


@row("1.3: padded records")
def padded(client: Client) -> None:
    established13(client)
    client.raw(client.writing.seal(DATA, wire.REQUEST, 16384 - len(wire.REQUEST)))
    client.answer()


def empty_records(client: Client) -> None:
    """A request whose halves lie among records without content."""
    for _ in range(8):
        client.send(DATA, b"")
    client.send(DATA, wire.REQUEST[:9])
    client.send(DATA, b"")
    client.send(DATA, wire.REQUEST[9:])
    client.answer()


@row("1.3: empty records between")
def empty13(client: Client) -> None:
    established13(client)
    empty_records(client)


@row("1.2: empty records between")
def empty12(client: Client) -> None:
    established12(client)
    empty_records(client)


@row("1.3: new keys of ours, and of theirs on request")
def key_update(client: Client) -> None:
    established13(client)
    for wanted in (0, 1, 0, 1):
        client.send(HANDSHAKE, message(wire.KEY_UPDATE, bytes((wanted,))))
        client.update_writing()
        client.ask()


@row("1.3: the request comes with the last bytes of the handshake")
def with_finished(client: Client) -> None:
    client.shake13(hello13(client.key))
    pieces: list[bytes] = []
    client.raw, raw = pieces.append, client.raw
    client.finish13()
    client.send(DATA, wire.REQUEST)
    raw(b"".join(pieces))
    client.answer()


def resumed12(client: Client) -> None:
    """The id of a session, which is none of ours, is no reason to fail."""
    served12(replace(HELLO12, session=b"unknown" * 4))(client)


rows({"1.2: an unknown session": (resumed12, ())})


@row("1.3: a session is resumed")
def resumed13(client: Client) -> None:
    with Client(client.sock.getpeername()[1]) as first:
        established13(first)
        session = first.session()
    client.shake13(client.offer(hello13(client.key), session))
    assert client.resumed
    client.finish13()
    client.ask()


@row("1.3: a ticket that is none")
def strange_ticket(client: Client) -> None:
    client.shake13(client.offer(hello13(client.key), (b"t" * 200, bytes(4), bytes(48))))
    assert not client.resumed
    client.finish13()
    client.ask()


@row("1.3: close_notify is answered and ends it", None)
def closing13(client: Client) -> None:
    established13(client)
    client.send(ALERT, bytes((1, CLOSE_NOTIFY)))


@row("1.2: close_notify is answered and ends it", None)
def closing12(client: Client) -> None:
    established12(client)
    client.send(ALERT, bytes((1, CLOSE_NOTIFY)))
