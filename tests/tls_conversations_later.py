"""Rows of the table of conversations that end in the middle of a handshake, or on a connection."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

from tests import tls_wire as wire
from tests.tls_conversations import MALFORMED, established, established12, established13, row, rows
from tests.tls_wire import (
    ALERT,
    CCS,
    CLOSE_NOTIFY,
    DATA,
    DECODE,
    GROUPS,
    HANDSHAKE,
    HELLO12,
    ILLEGAL,
    SHARES,
    UNEXPECTED,
    Client,
    Keys,
    hello13,
    message,
    numbers,
    vector,
)


@row("1.2: a change of ciphers before the key", UNEXPECTED)
def early_change(client: Client) -> None:
    client.shake12(HELLO12)
    client.send(CCS, b"\1")


@row("1.2: a finished in the clear", UNEXPECTED)
def clear_finished(client: Client) -> None:
    client.shake12(HELLO12)
    client.exchange12()
    client.send(HANDSHAKE, client.finished12())


@row("1.2: no key", UNEXPECTED)
def no_key(client: Client) -> None:
    client.shake12(HELLO12)
    client.send(HANDSHAKE, message(wire.FINISHED, bytes(12)))


@row("1.2: an unasked certificate", UNEXPECTED)
def unasked12(client: Client) -> None:
    client.shake12(HELLO12)
    client.send(HANDSHAKE, message(wire.CERTIFICATE, bytes(3)))


@row("1.2: a wrong finished", wire.DECRYPT)
def wrong_finished12(client: Client) -> None:
    client.shake12(HELLO12)
    client.exchange12()
    client.send(CCS, b"\1")
    client.writing = client.own
    finished = client.finished12()
    client.send(HANDSHAKE, finished[:-1] + bytes((finished[-1] ^ 1,)))


@row("1.2: a short finished", DECODE, wire.DECRYPT)
def short_finished12(client: Client) -> None:
    client.shake12(HELLO12)
    client.exchange12()
    client.send(CCS, b"\1")
    client.writing = client.own
    client.send(HANDSHAKE, message(wire.FINISHED, client.finished12()[4:15]))


@row("1.2: a change of ciphers to 2", ILLEGAL, UNEXPECTED, DECODE)
def strange_change(client: Client) -> None:
    client.shake12(HELLO12)
    client.exchange12()
    client.send(CCS, b"\2")


def key12(body: bytes) -> Callable[[Client], None]:
    """A conversation with this for a ClientKeyExchange."""

    def talk(client: Client) -> None:
        client.shake12(HELLO12)
        client.send(HANDSHAKE, message(wire.CLIENT_KEY_EXCHANGE, body))

    return talk


rows({
    "1.2: an empty key": (key12(b""), (DECODE, ILLEGAL, wire.HANDSHAKE_FAILURE)),
    "1.2: a key of no bytes": (key12(b"\0"), (DECODE, ILLEGAL, wire.HANDSHAKE_FAILURE)),
    "1.2: a key of 31 bytes": (key12(vector(b"k" * 31, 1)), (DECODE, ILLEGAL, wire.INTERNAL)),
    "1.2: a key and bytes behind it": (key12(vector(b"k" * 32, 1) + b"x"), MALFORMED),
    "1.2: a key of zeros": (key12(vector(bytes(32), 1)), (ILLEGAL, wire.HANDSHAKE_FAILURE, wire.INTERNAL)),
})


@row("1.3: a wrong finished", wire.DECRYPT)
def wrong_finished13(client: Client) -> None:
    client.shake13(hello13(client.key))
    finished = client.finished13()
    client.send(HANDSHAKE, finished[:-1] + bytes((finished[-1] ^ 1,)))


@row("1.3: a short finished", DECODE, wire.DECRYPT)
def short_finished13(client: Client) -> None:
    client.shake13(hello13(client.key))
    client.send(HANDSHAKE, message(wire.FINISHED, client.finished13()[4:-1]))


@row("1.3: a finished and more in its record", UNEXPECTED)
def finished_and_more(client: Client) -> None:
    client.shake13(hello13(client.key))
    client.send(HANDSHAKE, client.finished13() + message(wire.KEY_UPDATE, b"\0"))


@row("1.3: a finished in the clear", UNEXPECTED, wire.BAD_MAC)
def clear_finished13(client: Client) -> None:
    client.shake13(hello13(client.key))
    finished = client.finished13()
    client.writing = None
    client.send(HANDSHAKE, finished)


@row("1.3: data before the finished", UNEXPECTED)
def early13(client: Client) -> None:
    client.shake13(hello13(client.key))
    client.send(DATA, wire.REQUEST)


@row("1.3: an unasked certificate", UNEXPECTED)
def unasked13(client: Client) -> None:
    client.shake13(hello13(client.key))
    client.send(HANDSHAKE, message(wire.CERTIFICATE, bytes(4)))


@row("1.3: the end of early data that there was none of", UNEXPECTED)
def unasked_end(client: Client) -> None:
    client.shake13(hello13(client.key))
    client.send(HANDSHAKE, message(wire.END_OF_EARLY_DATA, b""))


@row("1.3: a strange change of ciphers", UNEXPECTED, ILLEGAL, DECODE)
def strange_change13(client: Client) -> None:
    client.shake13(hello13(client.key))
    client.raw(b"\x14\x03\x03\x00\x01\x02")


@row("1.3: a wrong binder", ILLEGAL, wire.DECRYPT)
def wrong_binder(client: Client) -> None:
    with Client(client.sock.getpeername()[1]) as first:
        established13(first)
        session = first.session()
    client.hello(client.offer(hello13(client.key), session, wrong=True))


@row("1.3: a session that is not the last extension", ILLEGAL)
def psk_not_last(client: Client) -> None:
    with Client(client.sock.getpeername()[1]) as first:
        established13(first)
        session = first.session()
    offered = client.offer(hello13(client.key), session)
    client.hello(replace(offered, extensions=(*offered.extensions[-1:], *offered.extensions[:-1])))


@row("1.3: a session without a mode", wire.MISSING, ILLEGAL)
def psk_without_mode(client: Client) -> None:
    with Client(client.sock.getpeername()[1]) as first:
        established13(first)
        session = first.session()
    client.hello(client.offer(hello13(client.key).without(wire.MODES), session))


@row("1.3: another hello after a request for one, without the share", ILLEGAL, wire.MISSING)
def stubborn(client: Client) -> None:
    hello = hello13(client.key).but((GROUPS, numbers(wire.P256)), (SHARES, vector(b"", 2)))
    client.hello(hello)
    assert client.server_hello(), "no HelloRetryRequest"
    client.hello(hello)


def flipped(client: Client) -> None:
    record = bytearray(client.writing.seal(DATA, wire.REQUEST))
    record[-1] ^= 1
    client.raw(bytes(record))


def replayed(client: Client) -> None:
    record = client.writing.seal(DATA, wire.REQUEST)
    client.raw(record)
    client.answer()
    client.raw(record)


def short_record(client: Client) -> None:
    client.raw(b"\x17\x03\x03\x00\x08" + bytes(8))


def long_record(client: Client) -> None:
    client.raw(b"\x17\x03\x03" + struct.pack(">H", 16384 + 2049) + bytes(16384 + 2049))


def long_content(client: Client) -> None:
    client.send(DATA, bytes(16385))


def clear_data(client: Client) -> None:
    keys: Keys | None = client.writing
    client.writing = None
    client.send(DATA, wire.REQUEST)
    client.writing = keys


def fatal(client: Client) -> None:
    client.send(ALERT, bytes((2, wire.HANDSHAKE_FAILURE)))


def short_alert(client: Client) -> None:
    client.send(ALERT, b"\2")


def empty_alert(client: Client) -> None:
    client.send(ALERT, b"")


def unknown_content(client: Client) -> None:
    client.send(99, b"x")


def heartbleed(client: Client) -> None:
    client.send(wire.HEARTBEAT, b"\1\x40\0")


for version, begin in (("1.2", established12), ("1.3", established13)):
    rows({
        f"{version}: a record with a bit flipped": (established(flipped, begin), (wire.BAD_MAC,)),
        f"{version}: a record twice": (established(replayed, begin), (wire.BAD_MAC,)),
        f"{version}: a record too short to be one": (
            established(short_record, begin), (wire.BAD_MAC, DECODE, wire.INTERNAL)),
        f"{version}: a record too long": (established(long_record, begin), (wire.OVERFLOW,)),
        f"{version}: a record with too much in it": (established(long_content, begin), (wire.OVERFLOW,)),
        f"{version}: data in the clear": (established(clear_data, begin), (wire.BAD_MAC, DECODE)),
        f"{version}: a fatal alert": (established(fatal, begin), (None,)),
        f"{version}: half an alert": (established(short_alert, begin), (DECODE, UNEXPECTED)),
        f"{version}: an empty alert": (established(empty_alert, begin), (DECODE, UNEXPECTED)),
        f"{version}: content of an unknown kind": (established(unknown_content, begin), (UNEXPECTED,)),
        f"{version}: a heartbeat": (established(heartbleed, begin), (UNEXPECTED,)),
    })


@row("1.2: renegotiation", wire.NO_RENEGOTIATION, wire.HANDSHAKE_FAILURE, UNEXPECTED)
def renegotiation(client: Client) -> None:
    established12(client)
    client.send(HANDSHAKE, HELLO12.but((0xFF01, vector(b"x" * 12, 1))).pack())


@row("1.3: a hello on a connection", UNEXPECTED)
def hello_again(client: Client) -> None:
    established13(client)
    client.send(HANDSHAKE, hello13(client.key).pack())


@row("1.3: content of no kind", UNEXPECTED)
def no_kind(client: Client) -> None:
    established13(client)
    client.raw(client.writing.seal(0, bytes(100)))


@row("1.3: an empty handshake record", UNEXPECTED)
def empty_handshake(client: Client) -> None:
    established13(client)
    client.send(HANDSHAKE, b"")


@row("1.3: new keys, and an answer neither wanted nor not", ILLEGAL)
def strange_update(client: Client) -> None:
    established13(client)
    client.send(HANDSHAKE, message(wire.KEY_UPDATE, b"\2"))


@row("1.3: new keys with more behind them", UNEXPECTED, DECODE)
def long_update(client: Client) -> None:
    established13(client)
    client.send(HANDSHAKE, message(wire.KEY_UPDATE, b"\0") + message(wire.KEY_UPDATE, b"\0"))


@row("1.3: a change of ciphers on a connection", UNEXPECTED)
def late_change(client: Client) -> None:
    established13(client)
    client.raw(b"\x14\x03\x03\x00\x01\x01")


@row("1.3: new keys without end", UNEXPECTED, wire.INTERNAL, None)
def update_flood(client: Client) -> None:
    established13(client)
    for _ in range(200):
        client.send(HANDSHAKE, message(wire.KEY_UPDATE, b"\0"))
        client.update_writing()
    client.send(ALERT, bytes((1, CLOSE_NOTIFY)))


@row("1.2: warnings without end", UNEXPECTED, None)
def warning_flood(client: Client) -> None:
    established12(client)
    for _ in range(50):
        client.send(ALERT, bytes((1, 90)))
    client.send(ALERT, bytes((1, CLOSE_NOTIFY)))
