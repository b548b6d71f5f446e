"""The key manager's half of ACME: the account's key, the domains' keys, and what is done with them.

A key is made here, stays here, and is used for what kore.tls.acme_policy lets through. The asker may be captured, so
each question is judged by itself: a message that is none is WireError, after which it has to be killed; a wish that is
not granted is an answer with the reason.

A domain has one key for as long as nobody removes it: a renewal replaces one file, `fullchain.pem`, so there is no
moment at which a key and a certificate on disk do not match, and none at which a worker is given a signature by another
key than its certificate has. Until the first certificate is there a self-signed one of the same key serves.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import hmac
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from kore.tls import acme_files, certificates
from kore.tls.acme_link import Ask, Question, Tell, WireError, answer, question, standing
from kore.tls.acme_policy import JWS_ALGORITHM, Policy, PolicyError, encoded, same_origin
from kore.tls.certificates import CertificateError, Pair

SELF_SIGNED_LIFETIME: Final = datetime.timedelta(days=90)

NOTE_BYTES_MAX: Final = 8192
ADDRESS_BYTES_MAX: Final = 2048
BINDING_KEY_BYTES_MIN: Final = 16

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class AcmeSettings:
    """What the key manager must know of the authority."""

    provider: str
    """The address of its directory."""
    eab_kid: str | None = None
    """The name of the account that is bound to ours (RFC 8555, 7.3.4)."""
    eab_key: str | None = None
    """The file with the key for that, base64url, below the key manager's root."""


@dataclass(slots=True)
class _Domain:
    """What there is of one domain."""

    name: str
    key: ec.EllipticCurvePrivateKey
    pair: Pair
    """What is served."""
    issued: bool
    """It is from the authority."""
    requests: list[bytes] = field(default_factory=list)
    """The certificate request of the order that runs."""


class AcmeStore:
    """All of it. The key manager makes one when a domain has acme=True, and calls load() before its sandbox closes."""

    def __init__(
        self,
        settings: AcmeSettings,
        names: Iterable[str],
        *,
        log: Log,
        publish: Callable[[str], None],
        challenge: Callable[[str, Pair | None, Callable[[list[str]], None]], None],
    ) -> None:
        """Paths count from the current directory, which is the key manager's root.

        `publish(name)` serves pair(name) from now on: it is told after a new one is on disk. `challenge(name, pair,
        done)` has a pair (None: no more) answer the challenge in every worker, and calls `done` with the workers that
        have not confirmed that within CONFIRM_SECONDS_MAX, in words.
        """
        self._settings = settings
        self._names = tuple(dict.fromkeys(names))
        self._log = log
        self._publish = publish
        self._challenge = challenge
        self._domains: dict[str, _Domain] = {}
        self._challenges: set[str] = set()
        self._account_key: ec.EllipticCurvePrivateKey | None = None
        self._address = ""
        self._binding: bytes | None = None

    # What is there.

    def load(self) -> None:
        """Read the keys and certificates, and make what is missing. Raises OSError: the place cannot be written to.

        Called again it takes what somebody put there meanwhile; what is damaged is set aside, or served on.
        """
        acme_files.make_folder(acme_files.CERTIFICATES)
        for name in self._names:
            if certificates.usable_names([name]) != [name] or "*" in name or name.startswith("."):
                raise ValueError(f"{name!r} is no name that a certificate can be had for")
            self._domains[name] = self._load_domain(name, self._domains.get(name))
        self._account_key = self._key(acme_files.ACCOUNT_KEY)
        self._address = self._load_address()
        self._binding = self._load_binding()

    def pair(self, name: str) -> Pair:
        """What is served for `name`."""
        return self._domains[name].pair

    def _load_domain(self, name: str, before: _Domain | None) -> _Domain:
        where = acme_files.folder(name)
        acme_files.make_folder(where)
        key = self._key(os.path.join(where, acme_files.KEY))
        path = os.path.join(where, acme_files.CHAIN)
        try:
            chain = acme_files.read(path)
            if chain is not None:
                return _Domain(name, key, _checked(chain, key, name, path, fresh=False), issued=True)
        except (OSError, ValueError) as error:
            if before is not None and before.issued and _same(before.key, key):
                self._log(f"{error}; the certificate of before is served on")
                return before
            self._log(f"{error}; a self-signed certificate serves {name} until there is another")
        if before is not None and not before.issued and _same(before.key, key):
            return before
        return _Domain(name, key, certificates.self_signed([name], key, lifetime=SELF_SIGNED_LIFETIME), issued=False)

    def _key(self, path: str) -> ec.EllipticCurvePrivateKey:
        """The key in a file, made where there is none. Raises OSError."""
        try:
            found = acme_files.read(path)
            if found is not None:
                key = certificates.load_key(found, path)
                if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
                    raise CertificateError(f"{path}: ACME's keys are on P-256")
                return key
        except ValueError as error:
            self._log(f"{error}: kept as {acme_files.set_aside(path)}, and a new key is made")
        key = certificates.new_key()
        acme_files.write(path, certificates.key_pem(key))
        return key

    def _load_address(self) -> str:
        """The account's address, unless it is at another authority. Registering again finds an account that exists."""
        try:
            found = json.loads(acme_files.read(acme_files.ACCOUNT) or b"{}")
            wanted = (found.get("provider"), found.get("key")) == (self._settings.provider, self._thumbprint())
            return str(found["address"]) if wanted and self._is_address(found["address"]) else ""
        except (ValueError, AttributeError, RecursionError, OSError) as error:
            self._log(f"{acme_files.ACCOUNT}: {error}: the account is asked for again")
            return ""

    def _load_binding(self) -> bytes | None:
        path = self._settings.eab_key
        if path is None:
            return None
        try:
            text = (acme_files.read(path) or b"").strip()
            key = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
            if len(key) < BINDING_KEY_BYTES_MIN:
                raise ValueError("it is too short for a key")
        except (OSError, ValueError, binascii.Error) as error:
            self._log(f"{path}: no key for the external account (base64url is expected): {error}")
            return None
        return key

    # What the ACME process asks for.

    def handle(self, message: bytes, reply: Callable[[bytes], None]) -> None:
        """Answer a question, now or later, by `reply`. Raises WireError: the asker is not what was started."""
        asked = question(message)
        about_account = asked.ask in (Ask.ACCOUNT, Ask.SIGN, Ask.REGISTERED, Ask.BINDING)
        if about_account != (not asked.name) or (asked.name and asked.name not in self._domains):
            raise WireError(f"{asked.ask.name} for {asked.name!r}")
        if asked.ask is Ask.CHALLENGE:
            self._begin_challenge(asked, reply)
            return
        try:
            body = self._answers[asked.ask](self, asked)
        except (PolicyError, CertificateError) as error:
            reply(answer(asked.number, Tell.REFUSED, str(error).encode("utf-8", "backslashreplace")))
        except OSError as error:
            self._log(f"{asked.ask.name} for {asked.name or 'the account'}: {error}")
            reply(answer(asked.number, Tell.REFUSED, f"cannot be kept on disk: {error}".encode()))
        else:
            reply(answer(asked.number, Tell.DONE, body))

    def _account(self, _asked: Question) -> bytes:
        x, y = self._point()
        return x + y + self._address.encode()

    def _sign(self, asked: Question) -> bytes:
        assert self._account_key is not None
        policy = Policy(self._settings.provider, self._jwk(), self._names)
        try:
            policy.check(asked.body, [request for domain in self._domains.values() for request in domain.requests])
        except PolicyError as error:
            self._log(f"the ACME process asked for a signature that a renewal does not take: {error}")
            raise
        return self._account_key.sign(asked.body, ec.ECDSA(hashes.SHA256()))

    def _registered(self, asked: Question) -> bytes:
        address = asked.body.decode("ascii", "strict") if asked.body.isascii() else "?"
        if address and not self._is_address(address):
            raise PolicyError(f"{address[:200]!r} is not at the provider {self._settings.provider}")
        if address != self._address:
            kept = {"provider": self._settings.provider, "key": self._thumbprint(), "address": address}
            acme_files.write(acme_files.ACCOUNT, json.dumps(kept, indent=1).encode())
            self._address = address
        return b""

    def _is_address(self, address: Any) -> bool:
        return (
            isinstance(address, str)
            and len(address) <= ADDRESS_BYTES_MAX
            and address.isprintable()
            and same_origin(address, self._settings.provider)
        )

    def _bind(self, asked: Question) -> bytes:
        """RFC 8555, 7.3.4: the account's public key, signed with the key that the authority handed out."""
        if self._settings.eab_kid is None:
            return b""
        if self._binding is None:
            raise PolicyError(f"the key of the external account, {self._settings.eab_key}, could not be read")
        address = asked.body.decode("utf-8", "replace")
        if not self._is_address(address):
            raise PolicyError(f"{address[:200]!r} is not at the provider {self._settings.provider}")
        head = {"alg": "HS256", "kid": self._settings.eab_kid, "url": address}
        parts = [encoded(json.dumps(each).encode()) for each in (head, self._jwk())]
        mac = hmac.digest(self._binding, ".".join(parts).encode(), hashlib.sha256)
        return json.dumps({"protected": parts[0], "payload": parts[1], "signature": encoded(mac)}).encode()

    def _request(self, asked: Question) -> bytes:
        domain = self._domains[asked.name]
        made = certificates.request([domain.name.lower()], domain.key)  # RFC 8555, 7.1.4: as the order names it
        domain.requests = [made]
        return made

    def _begin_challenge(self, asked: Question, reply: Callable[[bytes], None]) -> None:
        domain = self._domains[asked.name]
        try:
            made = certificates.challenge(domain.name.lower(), domain.key, asked.body)
        except CertificateError as error:
            raise WireError(str(error)) from None
        self._challenges.add(domain.name)

        def done(late: list[str]) -> None:
            if late:
                # Whoever is that late is busy with something else than accepting connections.
                self._log(f"the challenge of {domain.name} goes on, although {', '.join(late)} did not confirm it")
            reply(answer(asked.number, Tell.DONE))

        self._challenge(domain.name, certificates.pair_of(x509.load_der_x509_certificate(made), (), domain.key), done)

    def _clear(self, asked: Question) -> bytes:
        self._domains[asked.name].requests = []
        self.forget(asked.name)
        return b""

    def forget(self, *names: str) -> None:
        """End challenges: of these names, or all, because the ACME process is gone."""
        for name in names or tuple(self._challenges):
            if name in self._challenges:
                self._challenges.discard(name)
                self._challenge(name, None, lambda _late: None)

    def _install(self, asked: Question) -> bytes:
        domain = self._domains[asked.name]
        path = os.path.join(acme_files.folder(domain.name), acme_files.CHAIN)
        pair = _checked(asked.body, domain.key, domain.name, "the chain", fresh=True)
        acme_files.write(path, certificates.chain_pem(pair.chain))
        domain.pair, domain.issued = pair, True
        self._log(f"a new certificate for {domain.name} is served, until {pair.not_after:%Y-%m-%d %H:%M} UTC")
        self._publish(domain.name)
        return b""

    def _standing(self, asked: Question) -> bytes:
        domain = self._domains[asked.name]
        noted = b""
        try:
            noted = acme_files.read(os.path.join(acme_files.folder(domain.name), acme_files.STANDING)) or b""
        except ValueError as error:
            self._log(str(error))
        if not domain.issued:
            return standing(0.0, 0.0, noted)
        return standing(domain.pair.not_before.timestamp(), domain.pair.not_after.timestamp(), noted)

    def _note(self, asked: Question) -> bytes:
        if len(asked.body) > NOTE_BYTES_MAX:
            raise PolicyError(f"a note of {len(asked.body)} bytes; allowed are {NOTE_BYTES_MAX}")
        acme_files.write(os.path.join(acme_files.folder(asked.name), acme_files.STANDING), asked.body)
        return b""

    def _leaf(self, asked: Question) -> bytes:
        domain = self._domains[asked.name]
        if not domain.issued:
            raise PolicyError(f"there is no certificate for {domain.name}")
        return domain.pair.chain[0]

    _answers: Final[dict[Ask, Callable[[AcmeStore, Question], bytes]]] = {
        Ask.ACCOUNT: _account, Ask.SIGN: _sign, Ask.REGISTERED: _registered, Ask.BINDING: _bind,
        Ask.REQUEST: _request, Ask.CLEAR: _clear, Ask.INSTALL: _install, Ask.STANDING: _standing, Ask.NOTE: _note,
        Ask.LEAF: _leaf,
    }  # fmt: skip

    # The account's public key.

    def _point(self) -> tuple[bytes, bytes]:
        assert self._account_key is not None
        numbers = self._account_key.public_key().public_numbers()
        return numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big")

    def _jwk(self) -> dict[str, str]:
        x, y = self._point()
        return {"crv": "P-256", "kty": "EC", "x": encoded(x), "y": encoded(y)}

    def _thumbprint(self) -> str:
        """RFC 7638."""
        text = json.dumps(self._jwk(), separators=(",", ":"), sort_keys=True)
        return encoded(hashlib.sha256(text.encode()).digest())


def rehearse() -> None:
    """Do once what takes a key, with one that nobody has: what it loads cannot be loaded in the sandbox."""
    key = certificates.load_key(certificates.key_pem(certificates.new_key()))
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    pair = certificates.self_signed(["localhost"], key, lifetime=SELF_SIGNED_LIFETIME)
    _checked(certificates.chain_pem(pair.chain), key, "localhost", "rehearsal", fresh=True)
    certificates.challenge("localhost", key, bytes(32))
    certificates.request(["localhost"], key)
    key.sign(b"", ec.ECDSA(hashes.SHA256()))


def _checked(chain: bytes, key: ec.EllipticCurvePrivateKey, name: str, path: str, *, fresh: bool) -> Pair:
    """The pair of a chain, PEM, and the domain's key, if it may be served. Raises CertificateError."""
    try:
        pair = certificates.load_pair(chain, certificates.key_pem(key), cert_name=path, key_name=f"the key of {name}")
    except CertificateError:
        raise
    except Exception as error:
        # Whatever a parser makes of what strangers wrote, it does not end the process that holds the keys.
        raise CertificateError(f"{path}: cannot be read: {error}") from error
    if not any(certificates.covers(pattern, name) for pattern in pair.names):
        raise CertificateError(f"{path}: it is for {', '.join(pair.names)[:200] or 'no name'}, not for {name}")
    now = datetime.datetime.now(datetime.UTC)
    if fresh and pair.not_after <= now:
        raise CertificateError(f"{path}: it expired on {pair.not_after:%Y-%m-%d %H:%M} UTC")
    if fresh and pair.not_before > now + certificates.SKEW:
        raise CertificateError(f"{path}: it begins on {pair.not_before:%Y-%m-%d %H:%M} UTC; is the clock right?")
    return pair


def _same(one: ec.EllipticCurvePrivateKey, other: ec.EllipticCurvePrivateKey) -> bool:
    return one.public_key() == other.public_key()


assert JWS_ALGORITHM == "ES256"  # what _sign makes
