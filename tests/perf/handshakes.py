"""Shakes hands over TLS 1.3 as often as one core can: new connections, each with one request, from several processes.

Arguments: port, seconds, processes, `full` or `resumed`. Clients made of a TLS library spend more on a handshake than
a server does, and would measure themselves. This one does only what the protocol cannot do without: its ClientHello is
made once, key share and random included, and no signature is checked. So it is fit for nothing but load. What it does
check: each server spoke for the keys it claims (everything is decrypted), resumed when it was asked to and only then,
and answered the request; the connection ends when the server has closed it.

It speaks TLS_AES_256_GCM_SHA384 with X25519 and nothing else, so that all servers do the same work. `busy` is the share
of its core that it used: near 1, it was the generator that was measured.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import multiprocessing
import os
import re
import resource
import socket
import struct
import sys
import time
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HASH, HASH_BYTES, KEY_BYTES = "sha384", 48, 32
SUITE, GROUP = 0x1302, 0x001D  # TLS_AES_256_GCM_SHA384, x25519 (RFC 8446 B.4, 4.2.7)
SCHEMES = (0x0403, 0x0804)  # ecdsa_secp256r1_sha256, rsa_pss_rsae_sha256
CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, DATA = 20, 21, 22, 23
SERVER_HELLO, NEW_SESSION_TICKET, FINISHED = 2, 4, 20
SERVER_NAME, GROUPS, SIGNATURES, ALPN, PRE_SHARED_KEY, VERSIONS, PSK_MODES, KEY_SHARE = 0, 10, 13, 16, 41, 43, 45, 51

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
LENGTH = re.compile(rb"HTTP/1\.1 200 [^\0]*?\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
SECONDS_MAX = 10  # for each step of one connection
ZEROS = bytes(HASH_BYTES)


class Wrong(Exception):
    """The server did something else than what is measured."""


def vector(data: bytes, length_bytes: int) -> bytes:
    """Data behind its length."""
    return len(data).to_bytes(length_bytes, "big") + data


def label(name: bytes, context: bytes = b"", length: int = HASH_BYTES) -> bytes:
    """The input of HMAC for the first and only block of HKDF-Expand-Label (RFC 8446 7.1)."""
    return struct.pack(">H", length) + vector(b"tls13 " + name, 1) + vector(context, 1) + b"\x01"


NOTHING = hashlib.sha384(b"").digest()
DERIVED, KEY, IV, FINISHED_KEY = (
    label(b"derived", NOTHING), label(b"key", length=KEY_BYTES), label(b"iv", length=12), label(b"finished"))


@dataclass(frozen=True)
class Session:
    """What a ticket resumes."""

    ticket: bytes
    age_add: int
    key: bytes


def extension(number: int, data: bytes) -> bytes:
    """One extension."""
    return struct.pack(">H", number) + vector(data, 2)


class Traffic:
    """The keys of one direction and how many records have used them."""

    def __init__(self, secret: bytes) -> None:
        self.cipher = AESGCM(hmac.digest(secret, KEY, HASH)[:KEY_BYTES])
        self.iv = int.from_bytes(hmac.digest(secret, IV, HASH)[:12], "big")
        self.count = 0

    def nonce(self) -> bytes:
        """That of the next record."""
        value = (self.iv ^ self.count).to_bytes(12, "big")
        self.count += 1
        return value

    def seal(self, kind: int, data: bytes) -> bytes:
        """A record."""
        head = struct.pack(">BHH", DATA, 0x0303, len(data) + 17)
        return head + self.cipher.encrypt(self.nonce(), data + bytes((kind,)), head)

    def unseal(self, head: bytes, data: bytes) -> tuple[int, bytes]:
        """The kind and the content of a record (servers under measurement do not pad)."""
        plain = self.cipher.decrypt(self.nonce(), data, head)
        return plain[-1], plain[:-1]


class Client:
    """What all connections of a process share: the ClientHello, and what of the key schedule is the same for all."""

    def __init__(self, port: int, session: Session | None = None) -> None:
        self.address = ("127.0.0.1", port)
        self.session = session
        self.key = X25519PrivateKey.generate()
        early = hmac.digest(ZEROS, session.key if session else ZEROS, HASH)
        self.derived = hmac.digest(early, DERIVED, HASH)
        self.hello = self._hello(early)
        self.record = struct.pack(">BHH", HANDSHAKE, 0x0301, len(self.hello)) + self.hello

    def _hello(self, early: bytes) -> bytes:
        """The ClientHello, with the binder of a session at its end (RFC 8446 4.1.2, 4.2.11.2)."""
        name = vector(b"\x00" + vector(b"localhost", 2), 2)
        share = vector(struct.pack(">H", GROUP) + vector(self.key.public_key().public_bytes_raw(), 2), 2)
        extensions = b"".join((
            extension(SERVER_NAME, name), extension(GROUPS, vector(struct.pack(">H", GROUP), 2)),
            extension(SIGNATURES, vector(struct.pack(">2H", *SCHEMES), 2)),
            extension(ALPN, vector(vector(b"http/1.1", 1), 2)), extension(VERSIONS, b"\x02\x03\x04"),
            extension(PSK_MODES, b"\x01\x01"), extension(KEY_SHARE, share)))
        if self.session:
            # Its age is as it was when the ticket came; only early data would make a server look at it.
            identity = vector(self.session.ticket, 2) + struct.pack(">I", self.session.age_add)
            extensions += extension(PRE_SHARED_KEY, vector(identity, 2) + vector(vector(ZEROS, 1), 2))
        body = (b"\x03\x03" + os.urandom(32) + vector(os.urandom(32), 1) + vector(struct.pack(">H", SUITE), 2)
                + b"\x01\x00" + vector(extensions, 2))
        hello = b"\x01" + vector(body, 3)
        if self.session:
            truncated = hello[: -HASH_BYTES - 3]
            binder_key = hmac.digest(early, label(b"res binder", NOTHING), HASH)
            finished_key = hmac.digest(binder_key, FINISHED_KEY, HASH)
            binder = hmac.digest(finished_key, hashlib.sha384(truncated).digest(), HASH)
            hello = truncated + vector(vector(binder, 1), 2)
        return hello


class Connection:
    """One connection: `run` does everything, and gives the session that the server offered last."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.sock = socket.socket()
        self.sock.settimeout(SECONDS_MAX)
        self.data = b""

    def read_record(self) -> tuple[bytes, bytes] | None:
        """The next record's head and content, None when the server has closed the connection."""
        while len(self.data) < 5 or len(self.data) < 5 + (self.data[3] << 8 | self.data[4]):
            piece = self.sock.recv(16384)
            if not piece:
                if self.data:
                    raise Wrong("the connection ended within a record")
                return None
            self.data += piece
        end = 5 + (self.data[3] << 8 | self.data[4])
        head, content, self.data = self.data[:5], self.data[5:end], self.data[end:]
        return head, content

    def handshake_record(self) -> tuple[bytes, bytes]:
        """The next record that is not the ChangeCipherSpec of old middle boxes' sake."""
        while True:
            record = self.read_record()
            if record is None:
                raise Wrong("the server closed the connection in the handshake")
            if record[0][0] == ALERT:
                raise Wrong(f"alert {record[1].hex()} in the handshake")
            if record[0][0] != CHANGE_CIPHER_SPEC:
                return record

    def run(self, *, keep: bool = False) -> Session | None:
        """Shake hands, ask, read the answer to the end of the connection; with `keep` the session of a ticket."""
        with self.sock:
            self.sock.connect(self.client.address)
            self.sock.sendall(self.client.record)
            head, server_hello = self.handshake_record()
            if head[0] != HANDSHAKE or server_hello[0] != SERVER_HELLO:
                raise Wrong(f"no ServerHello but {server_hello[:8].hex()}")
            share, resumed = server_share(server_hello)
            if resumed != (self.client.session is not None):
                raise Wrong("resumed unasked" if resumed else "not resumed")
            shared = self.client.key.exchange(X25519PublicKey.from_public_bytes(share))
            secret = hmac.digest(self.client.derived, shared, HASH)
            transcript = hashlib.sha384(self.client.hello + server_hello)
            digest = transcript.digest()
            ours = hmac.digest(secret, label(b"c hs traffic", digest), HASH)
            self.server_flight(Traffic(hmac.digest(secret, label(b"s hs traffic", digest), HASH)), transcript)

            digest = transcript.digest()
            master = hmac.digest(hmac.digest(secret, DERIVED, HASH), ZEROS, HASH)
            finished = b"\x14\x00\x00\x30" + hmac.digest(hmac.digest(ours, FINISHED_KEY, HASH), digest, HASH)
            requests = Traffic(hmac.digest(master, label(b"c ap traffic", digest), HASH))
            self.sock.sendall(Traffic(ours).seal(HANDSHAKE, finished) + requests.seal(DATA, REQUEST))
            ticket = self.answer(Traffic(hmac.digest(master, label(b"s ap traffic", digest), HASH)))
            if not keep:
                return None
            if not ticket:
                raise Wrong("the server offers no session")
            transcript.update(finished)
            resumption = hmac.digest(master, label(b"res master", transcript.digest()), HASH)
            return session_of(ticket, resumption)

    def server_flight(self, traffic: Traffic, transcript: hashlib._Hash) -> None:
        """Everything up to the server's Finished, into the transcript."""
        flight = b""
        at = 0
        while True:
            kind, content = traffic.unseal(*self.handshake_record())
            if kind != HANDSHAKE:
                raise Wrong(f"a record of kind {kind} in the handshake: {content[:8].hex()}")
            flight += content
            while len(flight) >= at + 4:
                end = at + 4 + int.from_bytes(flight[at + 1 : at + 4], "big")
                if len(flight) < end:
                    break
                if flight[at] == FINISHED:
                    transcript.update(flight)
                    return
                at = end

    def answer(self, traffic: Traffic) -> bytes:
        """Read the response to the end; the last ticket that came with it, empty when none did."""
        answer = ticket = b""
        while (record := self.read_record()) is not None:
            kind, content = traffic.unseal(*record)
            if kind == DATA:
                answer += content
            elif kind == HANDSHAKE and content[0] == NEW_SESSION_TICKET:
                ticket = content
        found = LENGTH.match(answer)
        if found is None or len(answer) != answer.find(b"\r\n\r\n") + 4 + int(found[1]):
            raise Wrong(f"a wrong answer: {answer[:60]!r}")
        return ticket


def server_share(hello: bytes) -> tuple[bytes, bool]:
    """The server's X25519 key, and whether it resumed (RFC 8446 4.1.3)."""
    at = 4 + 2 + 32
    at += 1 + hello[at]
    if hello[at : at + 2] != struct.pack(">H", SUITE):
        raise Wrong(f"another cipher suite: {hello[at : at + 2].hex()}")
    at += 5
    share, resumed = b"", False
    while at < len(hello):
        number, length = struct.unpack_from(">HH", hello, at)
        if number == KEY_SHARE:
            share = hello[at + 8 : at + 4 + length]
        resumed = resumed or number == PRE_SHARED_KEY
        at += 4 + length
    if len(share) != 32:
        raise Wrong("no X25519 key in the ServerHello")
    return share, resumed


def session_of(message: bytes, resumption: bytes) -> Session:
    """The session of the first NewSessionTicket in a record (RFC 8446 4.6.1)."""
    (age_add,) = struct.unpack_from(">I", message, 8)
    at = 13 + message[12]
    nonce = message[13:at]
    length = int.from_bytes(message[at : at + 2], "big")
    key = hmac.digest(resumption, label(b"resumption", nonce), HASH)
    return Session(message[at + 2 : at + 2 + length], age_add, key)


def work(port: int, seconds: float, resume: bool) -> tuple[list[float], int, str, float]:
    """One process: the latency of each connection, errors, the first of them, and CPU time used."""
    client = Client(port)
    if resume:
        client = Client(port, Connection(client).run(keep=True))
    latencies: list[float] = []
    errors, first = 0, ""
    now = time.perf_counter()
    end = now + seconds
    while now < end:
        began = now
        try:
            Connection(client).run()
        except (Wrong, OSError) as error:
            errors, first = errors + 1, first or str(error)
            if errors > 100:
                break
        now = time.perf_counter()
        latencies.append(now - began)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return latencies, errors, first, used.ru_utime + used.ru_stime


def main() -> int:
    """All processes; one line on what came of them."""
    port, seconds, processes, mode = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    began = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        found = pool.starmap(work, [(port, seconds, mode == "resumed")] * processes, chunksize=1)
    took = time.perf_counter() - began
    latencies = sorted(latency for one in found for latency in one[0])
    errors = sum(one[1] for one in found)
    if errors:
        print(next(one[2] for one in found if one[2]), file=sys.stderr)
    if errors == len(latencies):
        return 1

    def percentile(share: float) -> float:
        return latencies[min(int(share * len(latencies)), len(latencies) - 1)] * 1e6

    print("RIG", json.dumps({
        "requests": len(latencies) - errors, "seconds": seconds, "errors": errors,
        "p50": percentile(0.5), "p90": percentile(0.9), "p99": percentile(0.99),
        "busy": sum(one[3] for one in found) / took,
    }))
    return 0


if __name__ == "__main__":
    sys.exit(main())
