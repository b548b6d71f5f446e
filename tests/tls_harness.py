"""What the tests of TLS share: certificates of an authority made for the run, and a process that holds their keys."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import struct
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cryptography.x509.oid import NameOID

SIZE = struct.Struct("=I")


class Pair(NamedTuple):
    """A certificate and its key, in PEM; `chain` in DER, leaf first."""

    chain: tuple[bytes, ...]
    key: Any
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


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
        self.asked = 0
        self._start()

    def _start(self) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        self.process = multiprocessing.get_context("fork").Process(target=_hold, args=(theirs, self.sock, self.pairs))
        self.process.start()
        theirs.close()
        self.available = True

    def sign(self, domain: int, kind: str, pad: int, block: bytes) -> bytes:
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
