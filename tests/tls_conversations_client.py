"""Rows of conversations with a domain that demands certificates of its clients, which these rightly or wrongly show.

They stand in a table of their own, as they need a server that knows `CLIENTS`, the authority of the clients.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests import tls_wire as wire
from tests.tls_conversations import Row
from tests.tls_harness import Pair, issue
from tests.tls_wire import HANDSHAKE, HELLO12, SNI, UNEXPECTED, Client, hello13, message, server_name, vector

NAME = "clients.test"
CERTIFICATE_REQUEST, CERTIFICATE_VERIFY = 13, 15
BAD_CERTIFICATE, UNKNOWN_CA, REQUIRED = 42, 48, 116
ECDSA_SHA256 = b"\x04\x03"
NAMED = (SNI, server_name(NAME.encode()))
REQUEST = b"GET / HTTP/1.1\r\nHost: " + NAME.encode() + b"\r\n\r\n"

ROWS: list[Row] = []


@functools.cache
def clients() -> Pair:
    """The authority that the domain trusts."""
    return issue("Clients", authority=True)


@functools.cache
def user() -> Pair:
    """Who may come in."""
    return issue("a new user", issuer=clients(), client=True)


@functools.cache
def stranger() -> Pair:
    """Who says to be the same, by an authority of the same name."""
    return issue("a new user", issuer=issue("Clients", authority=True), client=True)


def row(name: str, *alerts: int | None) -> Callable[[Callable[[Client], None]], Callable[[Client], None]]:
    """Puts a conversation into the table."""

    def enter(talk: Callable[[Client], None]) -> Callable[[Client], None]:
        ROWS.append(Row(name, talk, frozenset(alerts)))
        return talk

    return enter


def say(client: Client, found: bytes) -> None:
    """Send a message of the handshake."""
    client.transcript += found
    client.send(HANDSHAKE, found)


def certificate13(pair: Pair | None) -> bytes:
    """A Certificate of TLS 1.3 (RFC 8446 4.4.2)."""
    entries = b"" if pair is None else b"".join(vector(one, 3) + b"\0\0" for one in pair.chain)
    return message(wire.CERTIFICATE, b"\0" + vector(entries, 3))


def certificate12(pair: Pair | None) -> bytes:
    """A Certificate of TLS 1.2 (RFC 5246 7.4.2)."""
    entries = b"" if pair is None else b"".join(vector(one, 3) for one in pair.chain)
    return message(wire.CERTIFICATE, vector(entries, 3))


def verify13(client: Client, pair: Pair, *, context: bytes = b"TLS 1.3, client CertificateVerify") -> bytes:
    """A CertificateVerify of TLS 1.3 (RFC 8446 4.4.3)."""
    signature = pair.key.sign(b" " * 64 + context + b"\0" + client.digest(), ec.ECDSA(hashes.SHA256()))
    return message(CERTIFICATE_VERIFY, ECDSA_SHA256 + vector(signature, 2))


def begin13(client: Client) -> None:
    """A handshake up to our turn."""
    client.shake13(hello13(client.key).but(NAMED))


def begin12(client: Client) -> None:
    """The same in TLS 1.2."""
    client.shake12(HELLO12.but(NAMED))


@row("1.3: who may is served")
def served13(client: Client) -> None:
    begin13(client)
    say(client, certificate13(user()))
    say(client, verify13(client, user()))
    client.finish13()
    client.ask(REQUEST)


@row("1.2: who may is served")
def served12(client: Client) -> None:
    begin12(client)
    say(client, certificate12(user()))
    client.exchange12()
    signature = user().key.sign(client.transcript, ec.ECDSA(hashes.SHA256()))
    say(client, message(CERTIFICATE_VERIFY, ECDSA_SHA256 + vector(signature, 2)))
    client.change12()
    client.ask(REQUEST)


@row("1.3: no certificate", REQUIRED)
def none13(client: Client) -> None:
    begin13(client)
    say(client, certificate13(None))
    client.finish13()


@row("1.3: nothing said of a certificate", UNEXPECTED)
def silent13(client: Client) -> None:
    begin13(client)
    client.finish13()


@row("1.2: no certificate", wire.HANDSHAKE_FAILURE)
def none12(client: Client) -> None:
    begin12(client)
    say(client, certificate12(None))


@row("1.2: nothing said of a certificate", UNEXPECTED)
def silent12(client: Client) -> None:
    begin12(client)
    client.exchange12()


@row("1.3: a certificate and no proof of its key", UNEXPECTED)
def unproven13(client: Client) -> None:
    begin13(client)
    say(client, certificate13(user()))
    client.finish13()


@row("1.2: a certificate and no proof of its key", UNEXPECTED)
def unproven12(client: Client) -> None:
    begin12(client)
    say(client, certificate12(user()))
    client.exchange12()
    client.send(wire.CCS, b"\1")
    client.writing = client.own
    client.send(HANDSHAKE, client.finished12())


@row("1.3: the certificate of one, the key of another", wire.DECRYPT)
def stolen13(client: Client) -> None:
    begin13(client)
    say(client, certificate13(user()))
    say(client, verify13(client, stranger()))


@row("1.2: the certificate of one, the key of another", wire.DECRYPT)
def stolen12(client: Client) -> None:
    begin12(client)
    say(client, certificate12(user()))
    client.exchange12()
    signature = stranger().key.sign(client.transcript, ec.ECDSA(hashes.SHA256()))
    say(client, message(CERTIFICATE_VERIFY, ECDSA_SHA256 + vector(signature, 2)))


@row("1.3: a proof that a server would give", wire.DECRYPT)
def as_a_server(client: Client) -> None:
    begin13(client)
    say(client, certificate13(user()))
    say(client, verify13(client, user(), context=b"TLS 1.3, server CertificateVerify"))


@row("1.3: a proof of another connection", wire.DECRYPT)
def replayed(client: Client) -> None:
    with Client(client.sock.getpeername()[1]) as other:
        begin13(other)
        say(other, certificate13(user()))
        proof = verify13(other, user())
    begin13(client)
    say(client, certificate13(user()))
    say(client, proof)


@row("1.3: a proof by SHA-1", wire.ILLEGAL, wire.DECRYPT, wire.HANDSHAKE_FAILURE)
def weak(client: Client) -> None:
    begin13(client)
    say(client, certificate13(user()))
    signature = user().key.sign(client.digest(), ec.ECDSA(hashes.SHA1()))
    say(client, message(CERTIFICATE_VERIFY, b"\x02\x03" + vector(signature, 2)))


@row("1.3: an authority of the same name", UNKNOWN_CA, wire.DECRYPT, BAD_CERTIFICATE)
def namesake(client: Client) -> None:
    begin13(client)
    say(client, certificate13(stranger()))


@row("1.2: an authority of the same name", UNKNOWN_CA, wire.DECRYPT, BAD_CERTIFICATE)
def namesake12(client: Client) -> None:
    begin12(client)
    say(client, certificate12(stranger()))


@row("1.3: garbage for a certificate", BAD_CERTIFICATE, wire.DECODE, wire.ILLEGAL)
def garbage(client: Client) -> None:
    begin13(client)
    say(client, message(wire.CERTIFICATE, b"\0" + vector(vector(os.urandom(400), 3) + b"\0\0", 3)))


@row("1.3: a certificate that ends early", wire.DECODE)
def short(client: Client) -> None:
    begin13(client)
    say(client, message(wire.CERTIFICATE, certificate13(user())[4:-40]))


@row("1.3: an answer to another request", wire.DECODE, wire.ILLEGAL)
def strange_context(client: Client) -> None:
    begin13(client)
    say(client, message(wire.CERTIFICATE, vector(b"context", 1) + certificate13(user())[5:]))


@row("1.3: another domain's session lets nobody in", REQUIRED)
def foreign_session(client: Client) -> None:
    with Client(client.sock.getpeername()[1]) as first:
        first.shake13(hello13(first.key))
        first.finish13()
        first.ask()
        session = first.session()
    client.shake13(client.offer(hello13(client.key).but(NAMED), session))
    assert not client.resumed
    say(client, certificate13(None))
    client.finish13()
