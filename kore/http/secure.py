"""What a listener that speaks TLS adds to HTTP: which domain answers, and that a request belongs to who was asked for.

A client proves nothing to a domain it did not ask for. With a server name (SNI) every request must be for that name,
otherwise the answer is 421 (RFC 9110 15.5.20): its own domain may demand a certificate that this connection has not
shown. Without one, a request for a domain that demands certificates is 403 unless that domain is who answered.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from kore.http.connection import HttpConnection
from kore.http.head import Head
from kore.http.routes import Resolution, Router
from kore.http.server import LOG_ERR, HttpServer, OnlyHeads, Prepared, Service
from kore.tls.contexts import Contexts
from kore.tls.handshake import Handshake
from kore.tls.stream import TlsStream

if TYPE_CHECKING:
    from kore.http.accesslog import AccessLog

UNPARKED_MAX: Final = 16
"""Handshakes begun anew in one turn of the loop: some ten milliseconds of signatures."""

TELL_TICKS: Final = 20
"""How often it is told that clients of a domain cannot be served: ten seconds."""

ASKED_MAX: Final = 256
"""Names asked for that are remembered: a server has few, and clients may make some up."""

CLEAR_TEXT_PAGE: Final = b"This port speaks HTTPS: use https:// in place of http://.\n"


class SecureService(Service):
    """A listening socket with TLS. `indices` are those of the router's domains among the contexts.

    Nothing is accepted before the contexts are ready.
    """

    def __init__(
        self, server: HttpServer, sock: socket.socket, router: Router, name: str, contexts: Contexts,
        indices: Sequence[int],
    ) -> None:  # fmt: skip
        super().__init__(server, sock, router, name)
        self.protocol = "https"
        self.contexts = contexts
        self.parked: set[Any] = set()
        self.responses = server.heads_of("https")
        self.indices = dict(zip(router.domains, indices, strict=True))
        self.default = indices[0]
        self.demanding = frozenset(index for index in indices if contexts.demands(index))
        self._asked: dict[str | None, Asked] = {}
        self._tell_at: dict[int, int] = {}
        self._unparking = False
        contexts.on_ready.append(self._ready)
        contexts.on_revoked.append(self._revoked)
        contexts.keys.on_available.append(self._unpark)

    # --- accepting -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Accept, once there is something to show."""
        if self.contexts.ready:
            super().start()

    def _ready(self) -> None:
        server = self.server
        if not (server.paused or server.stopped):
            self.start()

    def connect(self, fd: int) -> Any:
        """What owns a new connection."""
        return Handshake(self, fd)

    # --- for handshakes ------------------------------------------------------------------------------------

    def asked(self, name: str | None) -> Asked:
        """This service as who asks for `name` sees it: its domain answers, the first there is when none has it."""
        asked = self._asked.get(name)
        if asked is None:
            if len(self._asked) >= ASKED_MAX:
                self._asked.clear()
            found = self.router.find(name) if name else None
            domain = self.default if found is None else self.indices[found]
            asked = self._asked[name] = Asked(self, domain, name)
        return asked

    def clear_text(self) -> bytes:
        """The answer to a request that is not encrypted."""
        fields = (("content-type", "text/plain; charset=utf-8"),)
        return self.server.heads.build(400, 1, False, fields, len(CLEAR_TEXT_PAGE)) + CLEAR_TEXT_PAGE

    def established(self, stream: TlsStream, asked: Asked) -> None:
        """From now on it is HTTP."""
        server = self.server
        connection = HttpConnection(asked, stream.fd, stream)
        server.connections.add(connection)
        if server.draining:
            connection.drain()

    def tell(self, domain: int, what: str) -> None:
        """Log why clients of `domain` cannot be served; not for each of them."""
        if self.server.now >= self._tell_at.get(domain, 0):
            self._tell_at[domain] = self.server.now + TELL_TICKS
            self.server.log(LOG_ERR, f"server {self.name}: domain {self.contexts.domains[domain].name}: {what}")

    def _unpark(self) -> None:
        """Signatures can be had: begin some of the handshakes anew that wait for them."""
        if not self._unparking and self.parked:
            self._unparking = True
            self.server.loop.call_soon(self._begin_anew)

    def _begin_anew(self) -> None:
        self._unparking = False
        for handshake in list(self.parked)[:UNPARKED_MAX]:
            if not self.contexts.keys.available:
                return
            self.parked.discard(handshake)
            handshake.begin_anew()
        self._unpark()

    def _revoked(self, domain: int) -> None:
        """Certificates of clients were revoked: end the connections that have shown one."""
        shown: dict[bytes, list[TlsStream]] = {}
        for connection in self.server.connections:
            stream = connection.stream
            if isinstance(stream, TlsStream) and stream.domain == domain:
                certificate = stream.certificate()
                if certificate is not None:
                    shown.setdefault(certificate, []).append(stream)
        for certificate in self.contexts.listed(domain, shown):
            for stream in shown[certificate]:
                stream.abort()


class Asked:
    """The service as connections see it that asked for the same name, or for none."""

    __slots__ = (
        "domain", "heads", "name", "only", "protocol", "recognise", "responses", "router", "server", "service",
        "wanted",
    )  # fmt: skip

    def __init__(self, service: SecureService, domain: int, wanted: str | None) -> None:
        self.service = service
        self.domain = domain
        self.wanted = wanted
        self.server = service.server
        self.router = service.router
        self.name = service.name
        self.protocol = service.protocol
        self.heads = service.heads
        self.responses = service.responses
        self.only = OnlyHeads()
        self.recognise = service.heads.recognise
        if wanted is not None or service.demanding:
            self.recognise = partial(_recognised, self, service.heads.recognise)

    def refusal(self, head: Head) -> int:
        """The status for a request that this connection may not make; 0 for one that it may."""
        wanted = self.wanted
        if wanted is not None:
            return 421 if head.hostname != wanted and head.hostname else 0
        if self.service.demanding:
            found = self.router.find(head.hostname)
            index = -1 if found is None else self.service.indices[found]
            if index in self.service.demanding and index != self.domain:
                return 403
        return 0

    def prepared(self, head: Head) -> Prepared:
        """See Service."""
        status = self.refusal(head)
        if not status:
            return self.service.prepared(head)
        return self.service.prepare_found(head, Resolution(None, (), status, "", None, True))

    def log_of(self, head: Head | None) -> AccessLog | None:
        """See Service."""
        return self.service.log_of(head)


def _recognised(asked: Asked, recognise: Any, data: bytes) -> Head | None:
    """A head that is known and that this connection may send; what may not goes the long way, and is refused there."""
    head: Head | None = recognise(data)
    return head if head is not None and not asked.refusal(head) else None


def listen(
    server: HttpServer, sock: socket.socket, router: Router, name: str, contexts: Contexts, indices: Sequence[int]
) -> None:
    """Serve `router`'s domains with TLS on a listening socket; its owner closes it."""
    server.add(SecureService(server, sock, router, name, contexts, indices))

