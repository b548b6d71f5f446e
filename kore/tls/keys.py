"""The pairs of all domains in the key manager: read, validated whole, swapped while they serve, and signed with.

Each pair is a source of its own: one that is found wrong leaves the one before it in use, and the others alone, and the
log says why and when it is looked at again. Signing runs on many threads, so what they look up is replaced at once and
never changed; a key that was replaced signs on for a minute, for handshakes that had begun with its certificate.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from kore.tls import certificates
from kore.tls.certificates import CertificateError, Pair
from kore.tls.encoding import check
from kore.tls.messages import ANY_KEY, KEY_ID_BYTES, Ask, MalformedError, Said, Told
from kore.tls.private import OperationError, PrivateKey

LOG_ERR, LOG_NOTICE = 3, 5

RETIRED_SECONDS: Final = 60.0
"""How long a key signs that was replaced: longer than any handshake may take."""

AGAIN: Final = "it is looked at again when a file of it changes, and on SIGUSR1"

Log = Callable[[int, str], None]
Stamp = tuple[int, int, int, int]


class NoKeyError(Exception):
    """There is no such key, or none any more: an honest worker may ask for that."""


@dataclass(frozen=True, slots=True)
class DomainFiles:
    """Where the secrets of one domain are, as the key manager sees them."""

    domain: int
    """Its index in the plan."""
    name: str
    pairs: tuple[tuple[str, str], ...] = ()
    """Files of a certificate with its chain, and of its key."""
    crl: str | None = None
    acme: bool = False
    """Whether somebody else gets its certificates, and says so with KeyStore.use."""
    local: tuple[str, ...] = ()
    """What its certificate from the local authority is for, which is given to KeyStore.use; (): it has others."""

    def paths(self) -> Iterator[str]:
        """All of them."""
        for pair in self.pairs:
            yield from pair
        if self.crl is not None:
            yield self.crl


@dataclass(frozen=True, slots=True)
class Held:
    """A pair that is in use."""

    pair: Pair
    private: PrivateKey
    id: bytes
    bits: int

    @property
    def current(self) -> bool:
        """Whether clients take it today."""
        now = datetime.datetime.now(datetime.UTC)
        return self.pair.not_before <= now <= self.pair.not_after


def held(pair: Pair) -> Held:
    """A pair with its key given to OpenSSL. Raises OperationError."""
    public = pair.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    bits = pair.key.key_size
    der = pair.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return Held(pair, PrivateKey(pair.kind, der, bits), hashlib.sha256(public).digest()[:KEY_ID_BYTES], bits)


def read_file(path: str, bytes_max: int) -> bytes:
    """The content of a regular file. Raises OSError; CertificateError for what is none, or has more bytes."""
    # Without O_NONBLOCK, whoever puts a pipe in the file's place would stop the key manager.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CertificateError(f"{path}: is no regular file")
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise CertificateError(f"{path}: has more than {bytes_max} bytes")
    return data


def stamp(path: str) -> Stamp | None:
    """What changes with a file: with its content, its place, its rights. None: it can't be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns, found.st_size


@dataclass(slots=True)
class _Source:
    """Files that are loaded together, and what they were when they were."""

    what: str
    """For the log."""
    paths: tuple[str, ...]
    load: Callable[[], None]
    """Raises OSError, CertificateError, OperationError."""
    keeps: Callable[[], str]
    """What stays in use when that fails, in words."""
    seen: tuple[Stamp | None, ...] = ()
    settling: tuple[Stamp | None, ...] | None = None

    def look(self) -> bool:
        """Whether the files changed and have then stayed as they are since the last look.

        Who replaces a pair replaces one file after the other; between them nothing is right.
        """
        now = tuple(map(stamp, self.paths))
        if now == self.seen:
            self.settling = None
            return False
        settled, self.settling = now == self.settling, now
        return settled


@dataclass(slots=True)
class _Domain:
    files: DomainFiles
    held: tuple[Held | None, ...]
    """By pair."""
    crls: tuple[bytes, ...] = ()
    challenge: tuple[bytes, ...] = ()
    retired: tuple[tuple[float, Held], ...] = ()
    remarks: frozenset[str] = frozenset()
    sources: list[_Source] = field(default_factory=list)

    def find(self, ask: Ask) -> Held | None:
        if ask.key == ANY_KEY:
            return next((one for one in self.held if one is not None and one.pair.kind == ask.kind), None)
        for one in self.held:
            if one is not None and one.id == ask.key:
                return one
        now = time.monotonic()
        return next((one for until, one in self.retired if until > now and one.id == ask.key), None)

    def retire(self, old: Held | None) -> None:
        if old is not None:
            now = time.monotonic()
            kept = tuple(one for one in self.retired if one[0] > now)
            self.retired = (*kept, (now + RETIRED_SECONDS, old))


class KeyStore:
    """All pairs. `sign` may be called on any thread, all else on one."""

    def __init__(self, files: Sequence[DomainFiles], log: Log, changed: Callable[[Told], None]) -> None:
        """`changed` hears what workers are to be told when it changes."""
        self._log = log
        self._changed = changed
        self._domains = {one.domain: _Domain(one, (None,) * max(1, len(one.pairs))) for one in files}
        for domain in self._domains.values():
            domain.sources = list(self._sources(domain))

    # Signing.

    def sign(self, ask: Ask) -> bytes:
        """The signature a worker asks for. Raises MalformedError: no honest worker asks for that. NoKeyError."""
        domain = self._domains.get(ask.domain)
        if domain is None:
            raise MalformedError(f"domain {ask.domain}, which has no keys")
        found = domain.find(ask)
        if found is None:
            # What can be told without a key is told all the same.
            check(ask.kind, ask.padding, ask.block, 8 * len(ask.block))
            raise NoKeyError(f"no {ask.kind} key of {domain.files.name} is what was asked for")
        if found.pair.kind != ask.kind:
            raise MalformedError(f"a key of kind {found.pair.kind} as {ask.kind}")
        check(ask.kind, ask.padding, ask.block, found.bits)
        try:
            return found.private.sign(ask.padding, ask.block)
        except OperationError as error:
            raise NoKeyError(str(error)) from error

    # What workers are told.

    def told(self) -> list[Told]:
        """All there is to tell a worker that knows nothing."""
        found = []
        for domain in self._domains.values():
            found += [self._chains(domain)] if any(domain.held) else []
            found += [self._revoked(domain)] if domain.crls else []
            found += [self._challenge(domain)] if domain.challenge else []
        return found

    def _chains(self, domain: _Domain) -> Told:
        chains = tuple(one.pair.chain for one in domain.held if one is not None)
        return Told(Said.CERTIFICATES, domain.files.domain, chains)

    def _revoked(self, domain: _Domain) -> Told:
        return Told(Said.REVOKED, domain.files.domain, (domain.crls,))

    def _challenge(self, domain: _Domain) -> Told:
        return Told(Said.CHALLENGE, domain.files.domain, (domain.challenge,))

    # Loading.

    def load(self) -> int:
        """Load everything anew; how many domains have a pair."""
        for domain in self._domains.values():
            for source in domain.sources:
                self._load(source)
            self._remark(domain)
        return sum(any(domain.held) for domain in self._domains.values())

    def look(self) -> None:
        """Load what has changed."""
        for domain in self._domains.values():
            for source in domain.sources:
                if source.look():
                    self._load(source)
                    self._remark(domain)

    def remark(self) -> None:
        """Tell the log what has become true of certificates by the time alone."""
        for domain in self._domains.values():
            self._remark(domain)

    def use(self, number: int, pair: Pair) -> None:
        """Serve `pair` for a domain until its files have one. Raises OperationError."""
        self._swap(self._domains[number], 0, held(pair))

    def challenge(self, number: int, chain: Sequence[bytes]) -> None:
        """Show `chain`, of the domain's own key, to who asks for acme-tls/1; an empty one: nothing any more."""
        domain = self._domains[number]
        domain.challenge = tuple(chain)
        self._changed(self._challenge(domain))

    def _load(self, source: _Source) -> None:
        source.seen, source.settling = tuple(map(stamp, source.paths)), None
        try:
            source.load()
        except (OSError, CertificateError, OperationError) as error:
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            if isinstance(error, PermissionError):
                reason += f" for user id {os.geteuid()}, which the key manager has (keymgr_runas)"
            self._log(LOG_ERR, f"{source.what}: {reason}; {source.keeps()}; {AGAIN}")

    def _sources(self, domain: _Domain) -> Iterator[_Source]:
        files = domain.files

        def pair(place: int) -> _Source:
            def keeps() -> str:
                old = domain.held[place]
                return "there is no certificate to serve" if old is None else f"the pair before stays ({_until(old)})"

            what = f"domain {files.name}"
            return _Source(what, files.pairs[place], lambda: self._load_pair(domain, place), keeps)

        yield from (pair(place) for place in range(len(files.pairs)))
        if files.crl is not None:
            yield _Source(
                f"crl of domain {files.name}", (files.crl,), lambda: self._load_crls(domain, str(files.crl)),
                lambda: "the list before stays" if domain.crls else "none is used",
            )

    def _load_pair(self, domain: _Domain, place: int) -> None:
        cert, key = domain.files.pairs[place]
        most = certificates.PEM_BYTES_MAX
        pair = certificates.load_pair(read_file(cert, most), read_file(key, most), cert_name=cert, key_name=key)
        new, old = held(pair), domain.held[place]
        for other, theirs in enumerate(domain.held):
            if other != place and theirs is not None and theirs.pair.kind == pair.kind:
                raise CertificateError(f"{cert}: this domain has a pair of kind {pair.kind} already; give one of each")
        if old is not None and old.current and not new.current:
            raise CertificateError(f"{cert}: is not valid now ({_from(new)}, {_until(new)})")
        if old is not None and old.pair.chain == pair.chain:
            return
        self._swap(domain, place, new)
        if old is not None:
            self._log(LOG_NOTICE, f"domain {domain.files.name}: a new {pair.kind} pair is in use, {_until(new)}")

    def _swap(self, domain: _Domain, place: int, new: Held) -> None:
        # The old one first: between the two a thread finds both, never neither.
        domain.retire(domain.held[place])
        domain.held = (*domain.held[:place], new, *domain.held[place + 1 :])
        self._changed(self._chains(domain))

    def _load_crls(self, domain: _Domain, path: str) -> None:
        pem = read_file(path, certificates.REVOCATIONS_BYTES_MAX)
        crls = tuple(certificates.load_revocations(pem, path))
        if crls != domain.crls:
            domain.crls = crls
            self._changed(self._revoked(domain))

    def _remark(self, domain: _Domain) -> None:
        found = frozenset(
            text for one in domain.held if one is not None for text in one.pair.remarks(domain.files.name)
        )
        for text in sorted(found - domain.remarks):
            self._log(LOG_NOTICE, f"domain {domain.files.name}: its certificate {text}")
        domain.remarks = found


def _from(one: Held) -> str:
    return f"from {one.pair.not_before:%Y-%m-%d %H:%M} UTC"


def _until(one: Held) -> str:
    return f"until {one.pair.not_after:%Y-%m-%d %H:%M} UTC"
