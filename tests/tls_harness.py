"""What the tests of TLS share: certificates of an authority made for the run, and a process that holds their keys."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cryptography.x509.oid import NameOID

from kore.tls.offload import KEY_ID_BYTES
from tests.http_server_harness import Client, request
from tests.support import ROOT, SECONDS, skip_unless

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class Pair(NamedTuple):
    """A certificate and its key, in PEM; `chain` in DER, leaf first."""

    chain: tuple[bytes, ...]
    key: Any
    certificate: x509.Certificate

    @property
    def kind(self) -> str:
        return "rsa" if isinstance(self.key, rsa.RSAPrivateKey) else "ec"

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def save(self, path: Path) -> str:
        """Write both to files beside `path`, which is returned; see `load_pair`."""
        path.write_text("".join(map(ssl.DER_cert_to_PEM_cert, self.chain)))
        path.with_suffix(".key").write_bytes(self.key_pem)
        return str(path)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def load_pair(path: str) -> Pair:
    """What `Pair.save` wrote."""
    certificates = x509.load_pem_x509_certificates(Path(path).read_bytes())
    key = serialization.load_pem_private_key(Path(path).with_suffix(".key").read_bytes(), None)
    return Pair(tuple(one.public_bytes(serialization.Encoding.DER) for one in certificates), key, certificates[0])


def new_key(kind: str) -> Any:
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind[3:] or "2048"))
    return ec.generate_private_key({"p256": ec.SECP256R1(), "p384": ec.SECP384R1()}[kind])


def issue(
    *names: str, kind: str = "p256", issuer: Pair | None = None, authority: bool = False, depth: int | None = None,
    client: bool = False, subject: x509.Name | None = None, days: tuple[int, int] = (-1, 30),
) -> Pair:
    """A certificate for `names`, signed by `issuer` or by itself."""
    key = new_key(kind)
    subject = subject or x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder().subject_name(subject).public_key(key.public_key())
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0])).not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(authority, depth), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    signer = issuer.key if issuer else key
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    if not authority:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False)
        usage = x509.ExtendedKeyUsageOID.CLIENT_AUTH if client else x509.ExtendedKeyUsageOID.SERVER_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    else:
        builder = builder.add_extension(x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False), True)
    certificate = builder.sign(signer, hashes.SHA256())
    der = certificate.public_bytes(serialization.Encoding.DER)
    above = issuer.chain if issuer and issuer.certificate.issuer != issuer.certificate.subject else ()
    return Pair((der, *above), key, certificate)


@lru_cache(maxsize=1)
def authority() -> Pair:
    return issue("Test authority", authority=True)


@lru_cache(maxsize=64)
def server_pair(name: str, kind: str) -> Pair:
    return issue(name, kind=kind, issuer=authority())


def private_operation(key: Any, pad: int, block: bytes) -> bytes:
    """What a handshake asks of a private key: RSA_private_encrypt(3), or ECDSA of a digest."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        digest = {32: hashes.SHA256(), 48: hashes.SHA384(), 64: hashes.SHA512()}[len(block)]
        return key.sign(block, ec.ECDSA(utils.Prehashed(digest)))
    size = key.key_size // 8
    if pad == 1:
        block = b"\0\1" + b"\xff" * (size - 3 - len(block)) + b"\0" + block
    assert len(block) == size
    numbers = key.private_numbers()
    return pow(int.from_bytes(block), numbers.d, numbers.public_numbers.n).to_bytes(size)


class KeyProcess:
    """Private keys in a process of their own, by domain and kind, and the way to have it sign."""

    def __init__(self, pairs: dict[tuple[int, str], Pair]) -> None:
        self.pairs = pairs
        self.available = False
        self.on_available: list[Callable[[], None]] = []
        self.asked = 0
        self._start()

    def _start(self) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        self.process = multiprocessing.get_context("fork").Process(target=_hold, args=(theirs, self.sock, self.pairs))
        self.process.start()
        theirs.close()
        self.available = True

    def sign(self, domain: int, kind: str, pad: int, block: bytes, key: bytes) -> bytes:
        assert len(key) == KEY_ID_BYTES
        self.asked += 1
        try:
            self.sock.sendall(bytes((domain, len(kind), pad)) + kind.encode() + block)
            answer = self.sock.recv(4096)
        except OSError:
            answer = b""
        if not answer:
            self.available = False
            raise RuntimeError("the process that holds the keys is gone")
        return answer

    def close(self) -> None:
        self.sock.close()
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _hold(sock: socket.socket, other: socket.socket, pairs: dict[tuple[int, str], Pair]) -> None:
    other.close()
    while request := sock.recv(4096):
        domain, size, pad = request[:3]
        key = pairs[domain, request[3 : 3 + size].decode()].key
        sock.sendall(private_operation(key, pad, request[3 + size :]))


@contextlib.contextmanager
def key_process(pairs: dict[tuple[int, str], Pair]) -> Iterator[KeyProcess]:
    with KeyProcess(pairs) as process:
        yield process


class TlsServer:
    """tests.tls_app as a process: its address, its log, and orders to it."""

    def __init__(self, directory: Path, engine: str, domains: list[tuple[str, dict[str, Any]]], **config: Any) -> None:
        text = repr({"io": engine, "domains": domains, **config})
        directory.joinpath("config").write_text(text)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.tls_app", str(directory / "config")], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.wait_for("listening ").split()[1])

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()

    def wait_for(self, text: str, count: int = 1) -> str:
        """The `count`-th line that has `text` in it."""
        def found() -> list[str]:
            return [line for line in self.lines if text in line]

        with self._changed:
            if not self._changed.wait_for(lambda: len(found()) >= count, SECONDS):
                raise AssertionError(f"no {text!r} in {self.lines}")
            return found()[count - 1]

    def order(self, code: str) -> None:
        """Have it run a line of Python, in which it is `app`."""
        done = sum(line == "done" for line in self.lines)
        self.process.stdin.write(code + "\n")
        self.process.stdin.flush()
        self.wait_for("done", done + 1)

    def ask(self, expression: str) -> str:
        """What an expression is there."""
        self.order(f"print('value', {expression}, flush=True)")
        return [line for line in self.lines if line.startswith("value ")][-1][6:]

    def rss_kib(self) -> int:
        return int(Path(f"/proc/{self.pid}/status").read_text().partition("VmRSS:")[2].split()[0])

    def connect(
        self, name: str | None = "a.test", context: ssl.SSLContext | None = None,
        session: ssl.SSLSession | None = None,
    ) -> TlsClient:
        return TlsClient(self.port, name, context or client_context(), session)

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._reader.join(SECONDS)
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def client_context(
    version: str | None = None, client: Pair | None = None, directory: Path | None = None
) -> ssl.SSLContext:
    """A client that trusts the authority; with `client`, whose files go to `directory`, it has a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority().pem.decode())
    context.check_hostname = False
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # an end without close_notify is an error, see TlsClient
    if version is not None:
        context.minimum_version = context.maximum_version = VERSIONS[version]
    if client is not None:
        path = client.save(directory / "client.pem")
        context.load_cert_chain(path, str(Path(path).with_suffix(".key")))
    return context


class TlsClient(Client):
    """tests.http_server_harness.Client over TLS."""

    def __init__(self, port: int, name: str | None, context: ssl.SSLContext, session: ssl.SSLSession | None) -> None:
        super().__init__(("127.0.0.1", port))
        self.sock = context.wrap_socket(
            self.sock, server_hostname=name, session=session, suppress_ragged_eofs=False)


@contextlib.contextmanager
def tls_server(
    directory: Path, engine: str, *domains: tuple[str, dict[str, Any]], **config: Any
) -> Iterator[TlsServer]:
    """A server with these domains, one "a.test" with a P-256 key if there are none."""
    skip_unless(engine)
    if not domains:
        domains = (("a.test", {"pairs": [server_pair("a.test", "p256").save(directory / "a.pem")]}),)
    with TlsServer(directory, engine, list(domains), **config) as server:
        yield server


def get(path: str = "/", *fields: str, host: str = "a.test", **more) -> bytes:
    return request(path, *fields, **more).replace(b"Host: x", f"Host: {host}".encode())


def raw(server: TlsServer) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.settimeout(20)
    return sock


def everything(sock: socket.socket) -> bytes:
    found = b""
    try:
        while piece := sock.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


class Bare:
    """A client that has hold of its ciphertext."""

    def __init__(self, server: TlsServer, context: ssl.SSLContext, pieces: int = 65536) -> None:
        self.sock = socket.create_connection(("127.0.0.1", server.port))
        self.sock.settimeout(20)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="a.test")
        self._until(self.tls.do_handshake)
        self._send(pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def _until(self, function, *arguments):
        while True:
            try:
                return function(*arguments)
            except ssl.SSLWantReadError:
                self._send(65536)
                data = self.sock.recv(65536)
                assert data, "the connection ended"
                self.incoming.write(data)

    def _send(self, pieces: int) -> None:
        data = self.outgoing.read()
        for at in range(0, len(data), pieces):
            self.sock.sendall(data[at : at + pieces])

    def write(self, data: bytes, *, pieces: int = 65536, goodbye: bool = False) -> None:
        self.tls.write(data)
        if goodbye:
            with pytest.raises(ssl.SSLWantReadError):
                self.tls.unwrap()
        self._send(pieces)

    def read_until(self, end: bytes) -> bytes:
        found = b""
        while not found.endswith(end):
            found += self._until(self.tls.read, 65536)
        return found
