"""One worker's TLS contexts: for each domain its certificates, its tickets' key, and what it asks of its clients.

A context belongs to one domain whole. So nothing that is proven to one domain counts at another: ticket keys differ by
domain, and by what the domain demands of its clients; a session is resumed nowhere else, and none outlives a new list
of revoked certificates. All workers derive the same keys from the same masters, so a session is resumed at any of them.

Certificates, masters and lists come from the key manager, at start and whenever they change. What is replaced lives on
in the connections that have it.
"""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from kore.tls.choices import cipher_list
from kore.tls.clients import clients
from kore.tls.heap import keep_heap
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
    library,
)
from kore.tls.offload import Keys, offload
from kore.tls.stream import Wire

GROUPS: Final = (b"X25519MLKEM768:X25519:P-256:P-384", b"X25519:P-256:P-384")
"""The first that the library knows: OpenSSL has the hybrid from 3.5 on."""

SUITES: Final = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
"""Of TLS 1.3. AES-128 first: SHA-256 makes a handshake 20 us cheaper (of 210), and large responses leave a quarter less
to encrypt; nobody breaks either. A client that puts ChaCha20 first gets that, see below.
"""

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

LOG_ERR = 3
LOG_NOTICE = 5


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """The options of the whole server, which have been tried at start; of `tls_dhparam` the text of the file (PEM).

    A context that is made in the root of the workers could not open it by the name that it had outside.
    """

    version: str = "both"
    cipher: str | None = None
    dhparam: bytes | None = None


@dataclass(frozen=True, slots=True)
class TlsDomain:
    """What a domain asks of its clients."""

    name: str
    authorities: tuple[bytes, ...] = ()
    """The authorities, DER, that its clients must have certificates of; (): they need none."""
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

    Made before the sandbox closes. Raises TlsError where Python's OpenSSL cannot be used. `log` takes a priority and a
    line.
    """

    def __init__(
        self, settings: TlsSettings, domains: Sequence[TlsDomain], keys: Keys, log: Callable[[int, str], object]
    ) -> None:
        self.settings = settings
        self.domains = tuple(domains)
        self.keys = keys
        self.log = log
        self.offload = offload()
        self.clients = clients()
        self.wire = Wire()
        keep_heap()
        self.ready = False
        """Whether everything there is has come."""
        self.on_ready: list[Callable[[], object]] = []
        self.on_revoked: list[Callable[[int], object]] = []
        """Called with a domain whose lists of revoked certificates are new; see `listed`."""
        self._live = [_Live() for _ in self.domains]
        self._masters: list[bytes] = []
        self._told: set[tuple[int, str]] = set()

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
        return bool(self.domains[domain].authorities)

    def listed(self, domain: int, certificates: Iterable[bytes]) -> set[bytes]:
        """Those of the certificates, in DER, that stand on a list of revoked ones of `domain`."""
        return self.clients.listed(self._live[domain].crls, certificates)

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
        if domain.authorities:
            crls = live.crls if domain.crl else None
            tell = partial(self._tell, number)
            self.clients.demand(context, domain.authorities, domain.verify_depth, crls, tell)
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

    def _tell(self, number: int, what: str) -> None:
        """Log what was tolerated, once for each set of lists."""
        if (number, what) not in self._told:
            self._told.add((number, what))
            self.log(LOG_NOTICE, f"domain {self.domains[number].name}: {what}; clients are let in all the same")

    # --- tickets -------------------------------------------------------------------------------------------

    def _ticket_name(self, domain: int, master: bytes | None) -> bytes:
        return b"" if master is None else self._ticket_keys(domain, master)[:TICKET_NAME_BYTES]

    def _ticket_keys(self, number: int, master: bytes) -> bytes:
        """A name of 16 bytes, then 32 for HMAC and 32 for AES, as OpenSSL has them (HKDF-Expand, RFC 5869 2.3)."""
        domain = self.domains[number]
        demanded = repr((domain.name, domain.authorities, domain.verify_depth, domain.crl, self._live[number].crls))
        info = b"kore session tickets %d " % number + hashlib.sha256(demanded.encode()).digest()
        found = block = b""
        for count in range(1, 4):
            block = hmac.digest(master, block + info + bytes((count,)), "sha256")
            found += block
        return found[:80]


def base(settings: TlsSettings) -> ssl.SSLContext:
    """A context with the options of the server. Raises ConfigurationError, ssl.SSLError for what it does not take."""
    lib = library()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.maximum_version = VERSIONS[settings.version]
    context.options |= (
        ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE | OP_PRIORITIZE_CHACHA
    )
    context.num_tickets = TICKETS
    context.set_ciphers(cipher_list(settings.cipher))
    lib.handle.SSL_CTX_set_ciphersuites(lib.context_of(context), SUITES)
    lib.control(context, SSL_CTRL_SET_SIGALGS_LIST, 0, SIGNATURES)
    lib.control(context, SSL_CTRL_SET_CLIENT_SIGALGS_LIST, 0, CLIENT_SIGNATURES)
    for groups in GROUPS:
        if lib.control(context, SSL_CTRL_SET_GROUPS_LIST, 0, groups) == 1:
            break
        lib.handle.ERR_clear_error()
    if settings.dhparam:
        lib.use_dh_parameters(context, settings.dhparam)
    return context


