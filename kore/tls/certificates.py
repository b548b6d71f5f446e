"""Certificates and their private keys: loading a pair with every check that can be made, and making new ones.

Everything is validated whole before anything is served, because a pair that is found wrong by the first client is an
outage, and one that is found wrong here is a line in the log beside the pair of before. What can be used is what a
worker can sign with although it does not hold the key: RSA from 2048 bits on, P-256 and P-384.

No file is opened here: bytes come in and go out. Only a process that may hold private keys calls what takes or makes
one; the others have certificates, revocations and authorities to read.
"""

from __future__ import annotations

import datetime
import ipaddress
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, PublicKeyAlgorithmOID

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
"""A key that a pair can have."""

RSA_BITS_MIN = 2048
"""Less is not accepted by clients any more (NIST SP 800-131A)."""

RSA_BITS_MAX = 8192
"""A signature with more takes a tenth of a second, for which all handshakes would wait."""

CURVES = ("secp256r1", "secp384r1")
"""P-256 and P-384: what clients take (RFC 8446 9.1 demands the first)."""

PEM_BYTES_MAX = 256 * 1024
"""Of a file with certificates or a key: ten times the largest chain in use."""

REVOCATIONS_BYTES_MAX = 8 * 1024 * 1024
"""Of a file with revocations: the largest in use have some megabytes."""

CHAIN_MAX = 10
"""Certificates that are sent to each client; public ones have two or three."""

AUTHORITIES_MAX = 100
"""In a file of authorities: the names of all are sent to each client that is asked for a certificate."""

REVOCATIONS_MAX = 100
"""Lists in a file of revocations: one for each authority."""

SKEW = datetime.timedelta(hours=1)
"""How far before now a new certificate begins: clocks of clients differ."""

CHALLENGE_LIFETIME = datetime.timedelta(days=7)
"""Of a challenge certificate; what it proves is over in minutes, and who looks at it does not judge by it."""

EXPIRES_SOON = datetime.timedelta(days=7)

COMMON_NAME_MAX = 64
"""Characters of a common name, RFC 5280 appendix A.1."""

ACME_IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")
"""The extension that carries the answer to a challenge, RFC 8737 3."""

_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----(?:[^-]++|-(?!----))*-----END \1-----")
_DNS_LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_DNS_NAME = re.compile(rf"(?:\*\.)?{_DNS_LABEL}(?:\.{_DNS_LABEL})*", re.ASCII | re.IGNORECASE)

_Parsed = TypeVar("_Parsed")


class CertificateError(ValueError):
    """A certificate, a key or a pair can't be used; the message names the file, what is wrong, and what is allowed."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its chain, and the private key that belongs to it: checked, ready to be served."""

    chain: tuple[bytes, ...]
    """DER, the certificate itself first, then each that issued the one before."""
    key: PrivateKey
    kind: str
    """"rsa" or "ec"."""
    names: tuple[str, ...]
    """What the certificate is for: host names, patterns and addresses."""
    not_before: datetime.datetime
    """UTC."""
    not_after: datetime.datetime
    """UTC."""

    def remarks(self, name: str, now: datetime.datetime | None = None) -> list[str]:
        """What clients of the domain `name` will object to, though it can be served; a line each for the log."""
        now = now or datetime.datetime.now(datetime.UTC)
        found = []
        if now < self.not_before:
            found.append(f"is not valid before {_shown(self.not_before)}: see whether the clock is right")
        if now > self.not_after:
            found.append(f"expired on {_shown(self.not_after)}: clients refuse it")
        elif now > self.not_after - EXPIRES_SOON:
            found.append(f"expires on {_shown(self.not_after)}")
        if _DNS_NAME.fullmatch(name) and not any(covers(one, name) for one in self.names):
            found.append(f"is for {', '.join(self.names) or 'no name'}, not for {name}")
        return found


def load_pair(certificate: bytes, key: bytes, *, cert_name: str = "cert", key_name: str = "key") -> Pair:
    """The pair of a PEM file of certificates and a PEM file with a key (the same file may be both).

    The names are those of the files, for messages. Raises CertificateError.
    """
    chain = load_chain(certificate, cert_name)
    private = load_key(key, key_name)
    kind = kind_of(chain[0], cert_name)
    if _public_bytes(chain[0].public_key()) != _public_bytes(private.public_key()):
        for place, other in enumerate(chain[1:], 2):
            if _public_bytes(other.public_key()) == _public_bytes(private.public_key()):
                raise CertificateError(
                    f"{cert_name}: certificate {place} is the one that {key_name} belongs to; it must be the first")
        raise CertificateError(f"{key_name}: the key does not belong to the certificate in {cert_name}")
    leaf = chain[0]
    return Pair(
        tuple(one.public_bytes(Encoding.DER) for one in chain), private, kind, names_of(leaf),
        leaf.not_valid_before_utc, leaf.not_valid_after_utc)


def check_kinds(pairs: Sequence[Pair], where: str) -> None:
    """Raises CertificateError when two pairs of one domain have keys of one kind: which to serve would be a guess."""
    kinds = [pair.kind for pair in pairs]
    for kind in dict.fromkeys(kinds):
        if kinds.count(kind) > 1:
            raise CertificateError(f"{where}: has two certificates with keys of kind {kind}; allowed is one of each")


def load_chain(pem: bytes, name: str = "cert") -> list[x509.Certificate]:
    """The certificates of a PEM file, the first the server's own, each issued by the next. Raises CertificateError."""
    chain = _all(pem, name, b"CERTIFICATE", "certificate", x509.load_pem_x509_certificate, CHAIN_MAX)
    for place, (certificate, issuer) in enumerate(itertools.pairwise(chain), 1):
        # RFC 5246 7.4.2: each following certificate must directly certify the one preceding it.
        if not _issued(issuer, certificate):
            raise CertificateError(
                f"{name}: certificate {place + 1} ({_title(issuer)}) did not issue certificate {place} "
                f"({_title(certificate)}, issued by {certificate.issuer.rfc4514_string() or 'nobody'}); "
                "put the server's own first, then each that issued the one before")
    for place, certificate in enumerate(chain, 1):
        _check_signature(certificate, f"{name}: certificate {place} ({_title(certificate)})")
    return chain


def load_authorities(pem: bytes, name: str = "client_verify") -> list[bytes]:
    """The authorities of a PEM file, DER: what certificates of clients are judged by. Raises CertificateError."""
    found = _all(pem, name, b"CERTIFICATE", "certificate", x509.load_pem_x509_certificate, AUTHORITIES_MAX)
    for place, certificate in enumerate(found, 1):
        constraints = _extension(certificate, x509.BasicConstraints)
        # Without the extension it is of version 1, which says neither: OpenSSL takes those as authorities.
        if constraints is not None and not constraints.ca:
            raise CertificateError(
                f"{name}: certificate {place} ({_title(certificate)}) is no authority (CA:FALSE): "
                "give the certificate that issues those of clients")
    return [certificate.public_bytes(Encoding.DER) for certificate in found]


def load_revocations(pem: bytes, name: str = "crl") -> list[bytes]:
    """The revocation lists of a PEM file, DER. Raises CertificateError."""
    found = _all(
        pem, name, b"X509 CRL", "revocation list", x509.load_pem_x509_crl, REVOCATIONS_MAX, REVOCATIONS_BYTES_MAX)
    return [one.public_bytes(Encoding.DER) for one in found]


def load_key(pem: bytes, name: str = "key") -> PrivateKey:
    """The private key of a PEM file. Raises CertificateError: none or several, encrypted, of a kind nobody signs with.

    The message repeats nothing of what is in the file.
    """
    blocks = [(label, block) for label, block in _blocks(pem, name) if label.endswith(b"PRIVATE KEY")]
    if not blocks:
        raise CertificateError(f"{name}: holds no private key in PEM")
    if len(blocks) > 1:
        raise CertificateError(f"{name}: holds {len(blocks)} private keys; allowed is one")
    label, block = blocks[0]
    if label.startswith(b"ENCRYPTED") or b"Proc-Type: 4,ENCRYPTED" in block:
        raise CertificateError(
            f"{name}: the key is encrypted, and nobody is there to type a password when the server starts; "
            "take it off by: openssl pkey -in FILE -out FILE")
    try:
        key = load_pem_private_key(block, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError(f"{name}: the private key can't be read: it is damaged, or of an unknown kind") from None
    _kind(key.public_key(), f"{name}: ")
    assert isinstance(key, PrivateKey)
    return key


def kind_of(certificate: x509.Certificate, name: str = "cert") -> str:
    """"rsa" or "ec": what signs for this certificate. Raises CertificateError for other kinds and sizes."""
    if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        raise CertificateError(
            f"{name}: the certificate's key is restricted to RSA-PSS; allowed are plain RSA, P-256 and P-384")
    try:
        public = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"{name}: the certificate's key is of an unknown kind") from None
    return _kind(public, f"{name}: the certificate's key: ")


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The host names, patterns and addresses that a certificate is for."""
    alternative = _extension(certificate, x509.SubjectAlternativeName)
    if alternative is None:
        return ()  # RFC 9525 6.3: what a common name says is nothing that clients look at
    addresses = [str(address) for address in alternative.get_values_for_type(x509.IPAddress)]
    return (*alternative.get_values_for_type(x509.DNSName), *addresses)


def covers(pattern: str, name: str) -> bool:
    """Whether a certificate for `pattern` is one for `name`: a star stands for one label (RFC 9525 6.3)."""
    pattern, name = pattern.lower(), name.lower()
    if pattern == name:
        return True
    return pattern.startswith("*.") and name.partition(".")[2] == pattern[2:]


def new_key() -> ec.EllipticCurvePrivateKey:
    """A new private key, P-256: what every client takes and costs least to sign with."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """The key for a file (PKCS#8, not encrypted), which nobody but the key manager may be able to read."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def chain_pem(chain: Sequence[bytes]) -> bytes:
    """A chain, DER, as a PEM file. Raises CertificateError for what is no certificate."""
    found = []
    for der in chain:
        try:
            found.append(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM))
        except ValueError:
            raise CertificateError("the chain: one of it is no certificate") from None
    return b"".join(found)


def self_signed(names: Sequence[str], key: PrivateKey, *, lifetime: datetime.timedelta) -> Pair:
    """A certificate for `names` that only who made it trusts: what is served until there is a better one."""
    subject = _common_name(names)
    builder = _builder(subject, subject, key, lifetime).add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True)
    return pair_of(_for_servers(builder, names).sign(key, hashes.SHA256()), (), key)


def challenge(name: str, key: PrivateKey, digest: bytes) -> bytes:
    """The certificate, DER, that answers a tls-alpn-01 challenge for `name`; `digest` is SHA-256 of its key
    authorization. Source: RFC 8737 section 3.
    """
    if len(digest) != 32:
        raise CertificateError(f"the challenge for {name}: a digest has 32 bytes, not {len(digest)}")
    subject = _common_name([name])
    builder = (
        _builder(subject, subject, key, CHALLENGE_LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        # The digest as an OCTET STRING: its tag, its length, and itself.
        .add_extension(x509.UnrecognizedExtension(ACME_IDENTIFIER, b"\x04\x20" + digest), critical=True)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def request(names: Sequence[str], key: PrivateKey) -> bytes:
    """The request, DER, for a certificate for `names`: PKCS#10, RFC 2986, as RFC 8555 7.4 wants it."""
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))  # RFC 8555 allows it; names longer than a common name may be fit in
        .add_extension(x509.SubjectAlternativeName(_alternatives(names)), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def new_authority(title: str, key: PrivateKey, *, lifetime: datetime.timedelta) -> x509.Certificate:
    """An authority that issues certificates of servers, and no further authorities."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title[:COMMON_NAME_MAX])])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False)
    builder = (
        _builder(subject, subject, key, lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def issue(
    names: Sequence[str], key: PrivateKey, authority: x509.Certificate, authority_key: PrivateKey, *,
    lifetime: datetime.timedelta,
) -> Pair:
    """A certificate for `names` from an authority of one's own."""
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = (
        _builder(_common_name(names), authority.subject, key, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(issuer, critical=False)
    )
    certificate = _for_servers(builder, names).sign(authority_key, hashes.SHA256())
    return pair_of(certificate, (), key)


def pair_of(certificate: x509.Certificate, issuers: Sequence[x509.Certificate], key: PrivateKey) -> Pair:
    """The pair of a certificate that was just made for `key`."""
    chain = tuple(one.public_bytes(Encoding.DER) for one in (certificate, *issuers))
    return Pair(
        chain, key, kind_of(certificate), names_of(certificate),
        certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def usable_names(names: Sequence[str]) -> list[str]:
    """Those that a certificate can be for: addresses, host names, and patterns that are a star and a name."""
    return [name for name in dict.fromkeys(names) if _address(name) is not None or _DNS_NAME.fullmatch(name)]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + lifetime)
    )


def _for_servers(builder: x509.CertificateBuilder, names: Sequence[str]) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False)
    builder = (
        builder
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    alternatives = _alternatives(names)
    if not alternatives:
        return builder
    return builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)


def _alternatives(names: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for name in usable_names(names):
        address = _address(name)
        found.append(x509.DNSName(name) if address is None else x509.IPAddress(address))
    return found


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _common_name(names: Sequence[str]) -> x509.Name:
    """The first name that fits: only people look at it."""
    short = next((name for name in usable_names(names) if len(name) <= COMMON_NAME_MAX), "kore")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, short)])


def _blocks(pem: bytes, name: str, bytes_max: int = PEM_BYTES_MAX) -> Iterator[tuple[bytes, bytes]]:
    """The labels and texts of the PEM blocks of a file, RFC 7468; what stands between them is for people."""
    if len(pem) > bytes_max:
        raise CertificateError(f"{name}: has {len(pem)} bytes; allowed are {bytes_max}")
    for found in _BLOCK.finditer(pem):
        yield found[1], found[0] + b"\n"


def _all(
    pem: bytes, name: str, label: bytes, what: str, parse: Callable[[bytes], _Parsed], most: int,
    bytes_max: int = PEM_BYTES_MAX,
) -> list[_Parsed]:
    """Every block of a kind; at least one, and nothing of it damaged. Raises CertificateError."""
    blocks = [block for found, block in _blocks(pem, name, bytes_max) if found == label]
    if len(blocks) != pem.count(b"-----BEGIN " + label + b"-----"):
        raise CertificateError(f"{name}: a {what} in it is cut off")
    if not blocks:
        raise CertificateError(f"{name}: holds no {what} in PEM")
    if len(blocks) > most:
        raise CertificateError(f"{name}: holds {len(blocks)} {what}s; allowed are {most}")
    parsed = []
    for place, block in enumerate(blocks, 1):
        try:
            parsed.append(parse(block))
        except (ValueError, TypeError, UnsupportedAlgorithm) as problem:
            raise CertificateError(f"{name}: {what} {place} can't be read: {problem}") from None
    return parsed


def _kind(public: object, where: str) -> str:
    allowed = f"allowed are RSA of {RSA_BITS_MIN} to {RSA_BITS_MAX} bits, P-256 and P-384"
    if isinstance(public, rsa.RSAPublicKey):
        if not RSA_BITS_MIN <= public.key_size <= RSA_BITS_MAX:
            raise CertificateError(f"{where}RSA of {public.key_size} bits; {allowed}")
        return "rsa"
    if isinstance(public, ec.EllipticCurvePublicKey):
        if public.curve.name not in CURVES:
            raise CertificateError(f"{where}the curve {public.curve.name}; {allowed}")
        return "ec"
    if isinstance(public, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)):
        kind = type(public).__name__.removesuffix("PublicKey").removeprefix("_")
        raise CertificateError(
            f"{where}{kind}, which signs whole messages: the key manager could not tell what it signs; {allowed}")
    raise CertificateError(f"{where}of a kind that TLS does not sign with; {allowed}")


def _public_bytes(public: object) -> bytes:
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined, no-any-return]


def _issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except InvalidSignature:
        return False
    except (ValueError, TypeError):  # the names differ; or the key is none that signs
        return False
    except UnsupportedAlgorithm:
        return certificate.issuer == issuer.subject
    return True


def _check_signature(certificate: x509.Certificate, where: str) -> None:
    """OpenSSL does not serve what is signed by a broken hash, and says so in no words that help."""
    try:
        digest = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return
    if isinstance(digest, (hashes.MD5, hashes.SHA1)) and certificate.issuer != certificate.subject:
        raise CertificateError(f"{where} is signed with {digest.name}, which nobody accepts; get it issued anew")


_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def _title(certificate: x509.Certificate) -> str:
    """What people call it: a name it is for, else its subject."""
    names = names_of(certificate)
    return names[0] if names else certificate.subject.rfc4514_string() or "no subject"


def _shown(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
