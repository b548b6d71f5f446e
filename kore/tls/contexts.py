"""One worker's TLS contexts: for each domain its certificates, its tickets' key, and what it asks of its clients.

A context belongs to one domain whole. So nothing that is proven to one domain counts at another: ticket keys differ by
domain, and by what the domain demands of its clients; a session is resumed nowhere else, and none outlives a new list
of revoked certificates. All workers derive the same keys from the same masters, so a session is resumed at any of them.

Certificates, masters and lists come from the key manager, at start and whenever they change. What is replaced lives on
in the connections that have it.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kore.errors import ConfigurationError
from kore.tls.hello import TICKET_NAME_BYTES, Hello
from kore.tls.libssl import (
    SSL_CTRL_MODE,
    SSL_CTRL_SET_CLIENT_SIGALGS_LIST,
    SSL_CTRL_SET_GROUPS_LIST,
    SSL_CTRL_SET_SESS_CACHE_MODE,
    SSL_CTRL_SET_SIGALGS_LIST,
    SSL_CTRL_SET_TLSEXT_TICKET_KEYS,
    SSL_MODE_RELEASE_BUFFERS,
    SSL_SESS_CACHE_OFF,
    VERIFY_CALLBACK,
    library,
)
from kore.tls.offload import Keys, offload
from kore.tls.stream import Wire

CIPHERS: Final = (
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
    "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305:"
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256"
)
"""Up to TLS 1.2: AEAD with forward secrecy. Those of TLS 1.3 all are."""

DHE_CIPHERS: Final = ":DHE-RSA-AES256-GCM-SHA384:DHE-RSA-CHACHA20-POLY1305:DHE-RSA-AES128-GCM-SHA256"
"""With parameters for them only."""

GROUPS: Final = (b"X25519MLKEM768:X25519:P-256:P-384", b"X25519:P-256:P-384")
"""The first that the library knows: OpenSSL has the hybrid from 3.5 on."""

SIGNATURES: Final = (
    b"ECDSA+SHA256:ECDSA+SHA384:ECDSA+SHA512:RSA-PSS+SHA256:RSA-PSS+SHA384:RSA-PSS+SHA512:"
    b"RSA+SHA256:RSA+SHA384:RSA+SHA512"
)
CLIENT_SIGNATURES: Final = SIGNATURES + b":ed25519"

ALPN: Final = "http/1.1"
CHALLENGE_ALPN: Final = "acme-tls/1"  # RFC 8737

VERSIONS: Final = {
    "both": (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3),
    "1.2": (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2),
    "1.3": (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_3),
}

OP_PRIORITIZE_CHACHA: Final = 0x200000  # ssl.h; a client that puts it first has no AES in hardware

TICKETS: Final = 1
"""Given at the end of a handshake of TLS 1.3: a client keeps its connections, and each resumption brings another."""

# x509_vfy.h
CRL_CHECK: Final = 0x4 | 0x8  # X509_V_FLAG_CRL_CHECK, CRL_CHECK_ALL: the whole chain
TOLERATED: Final = {
    3: "there is no list of revoked certificates for an authority",
    11: "a list of revoked certificates is not valid yet",
    12: "a list of revoked certificates has expired",
}
"""X509_V_ERR_UNABLE_TO_GET_CRL, CRL_NOT_YET_VALID, CRL_HAS_EXPIRED: told, and no reason to lock everybody out."""

LOG_ERR = 3
LOG_NOTICE = 5


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """The options of the whole server: `tls_version`, `tls_cipher`, and the text of the file `tls_dhparam` (PEM)."""

    version: str = "both"
    cipher: str | None = None
    dhparam: bytes | None = None


@dataclass(frozen=True, slots=True)
class TlsDomain:
    """What a domain asks of its clients."""

    name: str
    client_ca: str | None = None
    """The authorities, PEM, that its clients must have certificates of; None: they need none."""
    verify_depth: int = 1
    """Authorities between theirs and the client's certificate, at most."""
    crl: bool = False
    """Whether revoked certificates are listed."""


@dataclass(slots=True)
class _Live:
    """What a domain has at the moment."""

    chains: list[list[bytes]] = field(default_factory=list)
    crls: list[bytes] = field(default_factory=list)
    challenge: ssl.SSLContext | None = None
    contexts: dict[bytes, ssl.SSLContext] = field(default_factory=dict)
    """By the name of the key of the tickets it takes; the first also gives tickets."""


class Contexts:
    """The contexts of all domains, by their index; has the methods that the key manager's messages call.

    Raises TlsError where Python's OpenSSL cannot be used, ConfigurationError for options that it does not take. `log`
    takes a priority and a line.
    """

    def __init__(
        self, settings: TlsSettings, domains: Sequence[TlsDomain], keys: Keys, log: Callable[[int, str], object]
    ) -> None:
        self.settings = settings
        self.domains = tuple(domains)
        self.keys = keys
        self.log = log
        self.offload = offload()
        self.wire = Wire()
        self.ready = False
        """Whether everything there is has come."""
        self.on_ready: list[Callable[[], object]] = []
        self.on_revoked: list[Callable[[int], object]] = []
        """Called with a domain whose lists of revoked certificates are new; see `listed`."""
        self._live = [_Live() for _ in self.domains]
        self._masters: list[bytes] = []
        self._told: set[tuple[int, int]] = set()
        self._stores: dict[int, int] = {}  # which domain a store is of
        self._tolerate = VERIFY_CALLBACK(self._verified)  # made before the sandbox closes
        check(settings)

    # --- what the key manager says -------------------------------------------------------------------------

    def certificates(self, domain: int, chains: list[list[bytes]]) -> None:
        """The certificates of `domain`, DER, leaf first; one chain for each kind of key. The old ones stay if bad."""
        live = self._live[domain]
        before, live.chains = live.chains, chains
        if not self._renewed(domain):
            live.chains = before

    def tickets(self, keys: list[bytes]) -> None:
        """The masters, newest first: it makes tickets, all of them are known again."""
        self._masters = list(keys)
        for domain, live in enumerate(self._live):
            if live.chains:
                self._renewed(domain)

    def revoked(self, domain: int, crls: list[bytes]) -> None:
        """The lists of revoked certificates of the authorities of `domain`, DER."""
        live = self._live[domain]
        before, live.crls = live.crls, crls
        self._told = {told for told in self._told if told[0] != domain}
        if live.chains and not self._renewed(domain):
            live.crls = before
            return
        for function in self.on_revoked:
            function(domain)

    def challenge(self, domain: int, chain: list[bytes] | None) -> None:
        """The certificate that proves to an ACME server that `domain` is here (RFC 8737); None: no more."""
        live = self._live[domain]
        live.challenge = None
        if chain is not None:
            context = self._context()
            context.set_alpn_protocols([CHALLENGE_ALPN])
            try:
                self.offload.install(context, chain, self.keys, domain)
            except ValueError as error:
                self.log(LOG_ERR, f"domain {self.domains[domain].name}: the certificate for its challenge: {error}")
            else:
                live.challenge = context

    def complete(self) -> None:
        """Everything there is has come once."""
        if not self.ready:
            self.ready = True
            for function in self.on_ready:
                function()

    # --- for handshakes ------------------------------------------------------------------------------------

    def choose(self, domain: int, hello: Hello) -> ssl.SSLContext | None:
        """The context that answers `hello` for `domain`; None when it has no certificate yet."""
        live = self._live[domain]
        if not live.contexts:
            return None
        context = live.contexts.get(hello.ticket)
        if context is None and hello.ticket:
            context = self._older(domain, hello.ticket)
        return context if context is not None else next(iter(live.contexts.values()))

    def challenge_of(self, domain: int) -> ssl.SSLContext | None:
        """The context for a client that offers `CHALLENGE_ALPN` and nothing else."""
        return self._live[domain].challenge

    def demands(self, domain: int) -> bool:
        """Whether clients of `domain` need certificates."""
        return self.domains[domain].client_ca is not None

    def listed(self, domain: int, certificates: Iterable[bytes]) -> set[bytes]:
        """Those of the certificates, in DER, that stand on a list of revoked ones of `domain`."""
        lib = library()
        crls = [lib.crl(der) for der in self._live[domain].crls]
        found: set[bytes] = set()
        entry = ctypes.c_void_p()
        for der in certificates:
            at = lib.certificate(der)
            if any(lib.handle.X509_CRL_get0_by_cert(crl, ctypes.byref(entry), at) == 1 for crl in crls):
                found.add(der)
            lib.handle.X509_free(at)
        for crl in crls:
            lib.handle.X509_CRL_free(crl)
        return found

    # --- making them ---------------------------------------------------------------------------------------

    def _renewed(self, domain: int) -> bool:
        """Make the context of a domain anew; False, and the old one stays, when that fails."""
        master = self._masters[0] if self._masters else None
        try:
            made = self._of_domain(domain, master)
        except (ValueError, ssl.SSLError) as error:
            name = self.domains[domain].name
            self.log(LOG_ERR, f"domain {name}: what the key manager sent cannot be used, the last state stays: {error}")
            return False
        self._live[domain].contexts = {self._ticket_name(domain, master): made}
        return True

    def _older(self, domain: int, name: bytes) -> ssl.SSLContext | None:
        """The context for tickets of an older master, made when the first of them comes."""
        for master in self._masters[1:]:
            if hmac.compare_digest(self._ticket_name(domain, master), name):
                made = self._live[domain].contexts[name] = self._of_domain(domain, master)
                return made
        return None

    def _of_domain(self, number: int, master: bytes | None) -> ssl.SSLContext:
        domain, live = self.domains[number], self._live[number]
        context = self._context()
        context.set_alpn_protocols([ALPN])
        for chain in live.chains:
            self.offload.install(context, chain, self.keys, number)
        if domain.client_ca is not None:
            self._demand(context, number, domain.client_ca)
        if master is not None:
            library().control(context, SSL_CTRL_SET_TLSEXT_TICKET_KEYS, 80, self._ticket_keys(number, master))
        return context

    def _context(self) -> ssl.SSLContext:
        """A context with what all of them have."""
        context = base(self.settings)
        lib = library()
        lib.control(context, SSL_CTRL_SET_SESS_CACHE_MODE, SSL_SESS_CACHE_OFF)  # tickets hold the sessions
        lib.control(context, SSL_CTRL_MODE, SSL_MODE_RELEASE_BUFFERS)  # 34 KiB less for each idle connection
        return context

    def _demand(self, context: ssl.SSLContext, number: int, client_ca: str) -> None:
        """Let only clients in that have a certificate of one of these authorities."""
        lib, domain = library(), self.domains[number]
        at = lib.context_of(context)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=client_ca)
        for der in context.get_ca_certs(binary_form=True):
            authority = lib.certificate(der)
            lib.handle.SSL_CTX_add_client_CA(at, authority)
            lib.handle.X509_free(authority)
        parameters = lib.handle.SSL_CTX_get0_param(at)
        lib.handle.X509_VERIFY_PARAM_set_depth(parameters, domain.verify_depth)
        if not domain.crl:
            return
        store = lib.handle.SSL_CTX_get_cert_store(at)
        for der in self._live[number].crls:
            crl = lib.crl(der)
            taken = lib.handle.X509_STORE_add_crl(store, crl)
            lib.handle.X509_CRL_free(crl)
            if taken != 1:
                lib.handle.ERR_clear_error()
                raise ValueError("a list of revoked certificates is not taken")
        lib.handle.X509_VERIFY_PARAM_set_flags(parameters, CRL_CHECK)
        lib.handle.X509_STORE_set_verify_cb(store, self._tolerate)
        self._stores[store] = number

    def _verified(self, ok: int, verifying: int) -> int:
        """X509_STORE_set_verify_cb(3): what OpenSSL found about a client's certificate, and what becomes of it."""
        try:
            handle = library().handle
            error = handle.X509_STORE_CTX_get_error(verifying)
            if ok or error not in TOLERATED:
                return ok
            number = self._stores.get(handle.X509_STORE_CTX_get0_store(verifying), -1)
            if (number, error) not in self._told:
                self._told.add((number, error))
                name = self.domains[number].name if number >= 0 else "?"
                self.log(LOG_NOTICE, f"domain {name}: {TOLERATED[error]}; clients are let in all the same")
            handle.X509_STORE_CTX_set_error(verifying, 0)
        except BaseException as error:  # noqa: BLE001 - there is only C above us, and doubt means no
            self.offload.failure = error
            return 0
        return 1

    # --- tickets -------------------------------------------------------------------------------------------

    def _ticket_name(self, domain: int, master: bytes | None) -> bytes:
        return b"" if master is None else self._ticket_keys(domain, master)[:TICKET_NAME_BYTES]

    def _ticket_keys(self, number: int, master: bytes) -> bytes:
        """A name of 16 bytes, then 32 for HMAC and 32 for AES, as OpenSSL has them (HKDF-Expand, RFC 5869 2.3)."""
        domain = self.domains[number]
        demanded = repr((domain.name, domain.client_ca, domain.verify_depth, domain.crl, self._live[number].crls))
        info = b"kore session tickets %d " % number + hashlib.sha256(demanded.encode()).digest()
        found = block = b""
        for count in range(1, 4):
            block = hmac.digest(master, block + info + bytes((count,)), "sha256")
            found += block
        return found[:80]


def base(settings: TlsSettings) -> ssl.SSLContext:
    """A context with the options of the server. Raises ConfigurationError for those that OpenSSL does not take."""
    lib = library()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.maximum_version = VERSIONS[settings.version]
    context.options |= (
        ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE | OP_PRIORITIZE_CHACHA
    )
    context.num_tickets = TICKETS
    ciphers = settings.cipher or CIPHERS + (DHE_CIPHERS if settings.dhparam else "")
    try:
        context.set_ciphers(ciphers)
    except ssl.SSLError:
        raise ConfigurationError(f"tls_cipher: OpenSSL knows none of the ciphers in {ciphers!r}") from None
    lib.control(context, SSL_CTRL_SET_SIGALGS_LIST, 0, SIGNATURES)
    lib.control(context, SSL_CTRL_SET_CLIENT_SIGALGS_LIST, 0, CLIENT_SIGNATURES)
    for groups in GROUPS:
        if lib.control(context, SSL_CTRL_SET_GROUPS_LIST, 0, groups) == 1:
            break
        lib.handle.ERR_clear_error()
    if settings.dhparam:
        lib.use_dh_parameters(context, settings.dhparam)
    return context


def check(settings: TlsSettings) -> None:
    """Raise ConfigurationError for options that OpenSSL does not take, TlsError where there is none to ask."""
    base(settings)


