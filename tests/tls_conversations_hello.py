"""Rows of the table of conversations that end at the first message: malformed, or asking for what there is not."""

from __future__ import annotations

from collections.abc import Callable

from tests import tls_wire as wire
from tests.tls_conversations import (
    MALFORMED,
    REFUSED,
    but12,
    but13,
    established13,
    row,
    rows,
    with12,
    with13,
    without13,
)
from tests.tls_wire import (
    ALERT,
    ALPN,
    CCS,
    DATA,
    DECODE,
    EARLY,
    EMS,
    GROUPS,
    HANDSHAKE,
    HELLO12,
    ILLEGAL,
    SHARES,
    SIGNATURES,
    SNI,
    UNEXPECTED,
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

SSL2 = bytes.fromhex("802e0100020015000000100100800200800300800600400400800700c0050080") + bytes(16)
NULL_NAME = vector(b"\0" + vector(b"local\0host", 2), 2)


def sni(data: bytes) -> Callable[[Client], None]:
    """A ClientHello of TLS 1.3 with this for a server name."""
    return with13((SNI, data))


rows({
    "TLS 1.1 is refused": (but12(version=0x0302), (wire.VERSION,)),
    "TLS 1.0 is refused": (but12(version=0x0301), (wire.VERSION,)),
    "SSL 3 is refused": (but12(version=0x0300), (wire.VERSION, wire.HANDSHAKE_FAILURE)),
    "TLS 1.1 is refused, as a list": (
        with13((VERSIONS, b"\x04\x03\x02\x03\x01")), (wire.VERSION,)),
    "SSL 2 is refused": (
        lambda client: client.raw(SSL2), (wire.VERSION, UNEXPECTED, wire.HANDSHAKE_FAILURE, DECODE, None)),
    "1.2: no suite of ours": (but12(suites=(0x002F, 0xC013, 0x009C)), REFUSED),
    "1.2: RSA key exchange is refused": (
        but12(suites=(0x009C, 0x009D)), REFUSED),
    "1.2: no signature of a certificate but anonymous": (
        but12(suites=(0x00A6, 0xC018)), REFUSED),
    "1.2: no suite at all": (but12(suites=()), MALFORMED),
    "1.2: no group of ours": (with12((GROUPS, numbers(0x0019, 0x001E))), REFUSED),
    "1.2: SHA-1 signatures only": (
        with12((SIGNATURES, numbers(0x0201, 0x0203))), REFUSED),
    "1.2: no signature schemes mean SHA-1": (lambda client: client.hello(HELLO12.without(SIGNATURES)), REFUSED),
    "1.2: compression only": (but12(compressions=b"\1"), MALFORMED),
    "1.2: no compression at all": (but12(compressions=b""), MALFORMED),
    "1.2: fallback": (but12(suites=(*HELLO12.suites, 0x5600)), (wire.FALLBACK,)),
    "1.2: renegotiation info of a connection that is new": (
        with12((0xFF01, vector(b"x" * 12, 1))), REFUSED),
    "1.2: a session id of 33 bytes": (but12(session=b"i" * 33), MALFORMED),
    "1.2: bytes behind the extensions": (but12(tail=b"\0"), (DECODE,)),
    "1.2: an extension twice": (
        but12(extensions=(*HELLO12.extensions, (EMS, b""))), MALFORMED),
    "1.2: extended master secret with content": (with12((EMS, b"x")), MALFORMED),
    "1.3: no suite of ours": (but13(suites=(0x1304, 0x1305)), REFUSED),
    "1.3: no group of ours": (
        with13((GROUPS, numbers(0x001E)), (SHARES, vector(b"", 2))),
        REFUSED),
    "1.3: no groups": (without13(GROUPS), (wire.MISSING,)),
    "1.3: no shares": (without13(SHARES), (wire.MISSING,)),
    "1.3: no signature schemes": (without13(SIGNATURES), (wire.MISSING,)),
    "1.3: signatures of TLS 1.2 only": (
        with13((SIGNATURES, numbers(0x0401, 0x0201))), REFUSED),
    "1.3: an X25519 share of zeros": (
        with13((SHARES, vector(share(X25519, bytes(32)), 2))),
        (ILLEGAL, wire.HANDSHAKE_FAILURE, wire.INTERNAL)),
    "1.3: an X25519 share of 31 bytes": (
        with13((SHARES, vector(share(X25519, b"k" * 31), 2))), MALFORMED),
    "1.3: a point that is not on the curve": (
        with13(
            (SHARES, vector(share(wire.P256, b"\4" + b"\1" * 64), 2)), (GROUPS, numbers(wire.P256))), MALFORMED),
    "1.3: a share of a group that is not offered": (
        with13((GROUPS, numbers(wire.P256))), (ILLEGAL,)),
    "1.3: shares that end early": (
        with13((SHARES, vector(b"\0\x1d\0\x20k", 2))), (DECODE,)),
    "1.3: compression": (
        but13(compressions=b"\1\0"), (ILLEGAL,)),
    "1.3: an empty list of versions": (with13((VERSIONS, b"\0")), (DECODE, wire.VERSION)),
    "1.3: half a version": (with13((VERSIONS, b"\3\3\4\3")), (DECODE, wire.VERSION)),
    "1.3: early data without a session": (
        with13((EARLY, b"x")), MALFORMED),
    "1.3: a wrong protocol": (
        with13((ALPN, vector(vector(b"h2", 1), 2))), (wire.NO_PROTOCOL,)),
    "1.3: ALPN of nothing": (with13((ALPN, b"\0\0")), MALFORMED),
    "1.3: ALPN with an empty name": (with13((ALPN, b"\0\1\0")), MALFORMED),
    "1.3: ALPN that ends early": (with13((ALPN, b"\0\x0a\x08http")), MALFORMED),
    "1.3: a challenge where there is none": (
        with13((ALPN, vector(vector(b"acme-tls/1", 1), 2))), (wire.NO_PROTOCOL,)),
    "server name: an empty extension": (sni(b""), MALFORMED),
    "server name: an empty list": (sni(b"\0\0"), MALFORMED),
    "server name: a name that ends early": (sni(b"\0\x0a\0\0\x09local"), MALFORMED),
    "server name: bytes behind the list": (sni(server_name(b"localhost") + b"x"), MALFORMED),
    "server name: a zero in the name": (sni(NULL_NAME), (DECODE, ILLEGAL, wire.UNRECOGNIZED_NAME)),
    "server name: 256 bytes": (sni(server_name(b"n" * 256)), (DECODE, ILLEGAL, wire.UNRECOGNIZED_NAME)),
})


def truncated(length: int) -> Callable[[Client], None]:
    """A ClientHello that says it is as short as its first bytes."""

    def talk(client: Client) -> None:
        packed = hello13(client.key).pack()
        client.send(HANDSHAKE, message(wire.CLIENT_HELLO, packed[4:length]))

    return talk


rows({f"a hello cut to {length} bytes, and honest about it": (truncated(length), (DECODE, ILLEGAL, wire.VERSION))
      for length in (4, 5, 6, 20, 37, 38, 39, 60, 71, 80, 100, 150)})


@row("an empty record ahead of the hello")
def empty_record(client: Client) -> None:
    client.send(HANDSHAKE, b"", 0x0301)
    established13(client)


@row("a record of an unknown kind", UNEXPECTED, DECODE, None)
def unknown_kind(client: Client) -> None:
    client.send(99, b"x" * 10, 0x0301)


@row("data before the handshake", UNEXPECTED, None)
def data_first(client: Client) -> None:
    client.send(DATA, wire.REQUEST, 0x0303)


@row("a heartbeat before the handshake", UNEXPECTED, None)
def heartbeat(client: Client) -> None:
    client.send(wire.HEARTBEAT, b"\1\x40\0")


@row("a change of ciphers before the handshake", UNEXPECTED, None)
def change_first(client: Client) -> None:
    client.send(CCS, b"\1")


@row("an alert before the handshake", None, UNEXPECTED)
def alert_first(client: Client) -> None:
    client.send(ALERT, bytes((2, wire.HANDSHAKE_FAILURE)))


@row("a finished before the handshake", UNEXPECTED)
def finished_first(client: Client) -> None:
    client.send(HANDSHAKE, message(wire.FINISHED, bytes(48)))


@row("a record that is too long", wire.OVERFLOW, DECODE, None)
def too_long(client: Client) -> None:
    client.raw(b"\x16\x03\x01\xff\xff" + bytes(65535))


@row("a hello of 16 MiB", ILLEGAL, DECODE, wire.OVERFLOW, wire.HANDSHAKE_FAILURE)
def too_large(client: Client) -> None:
    head = bytes((wire.CLIENT_HELLO, 0xFF, 0xFF, 0xFF)) + bytes(16380)
    for _ in range(64):
        client.send(HANDSHAKE, head, 0x0301)


@row("1.3: more than the hello in its record", UNEXPECTED)
def more_than_hello(client: Client) -> None:
    client.send(HANDSHAKE, hello13(client.key).pack() + message(wire.FINISHED, bytes(48)), 0x0301)


@row("two hellos", UNEXPECTED)
def two_hellos(client: Client) -> None:
    client.shake12(HELLO12)
    client.send(HANDSHAKE, HELLO12.pack())
