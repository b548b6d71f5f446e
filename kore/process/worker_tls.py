"""A worker's TLS: the contexts of its domains, and the link to the key manager that fills them and signs for them.

All of it is made before the sandbox closes, since libssl is handed functions to call, for which executable memory is
needed; it begins to work when the loop runs and the parent has handed over a socket.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from kore import reactor
from kore.application.plan import Plan, PlannedDomain
from kore.application.servers import Listener
from kore.http import secure
from kore.http.server import HttpServer
from kore.tls.contexts import Contexts, TlsDomain, TlsSettings
from kore.tls.link import KeyLink


class WorkerTls:
    """Made once in a worker, before its sandbox closes. `open` is called in the loop, `close` after it."""

    def __init__(self, plan: Plan, log: Callable[[int, str], object]) -> None:
        """Raises TlsError."""
        self.plan = plan
        self.link = KeyLink()
        domains = [_described(domain) for domain in plan.domains]
        self.contexts = Contexts(_settings(plan), domains, self.link, log)
        self.link.listener = self.contexts
        self._loop: reactor.Loop | None = None
        self._fd = -1

    def open(self, loop: reactor.Loop, ready: Callable[[], object]) -> None:
        """The loop runs; `ready` is called once when everything there is has come."""
        self._loop = loop
        self.link.soon = loop.call_soon
        self.contexts.on_ready.append(ready)

    def listen(self, server: HttpServer, listener: Listener) -> None:
        """Serve the domains of a listener that speaks TLS."""
        indices = [index for index, domain in enumerate(self.plan.domains) if domain.server == listener.name]
        if indices:
            router = self.plan.routers[listener.name]
            secure.listen(server, listener.sock, router, listener.name, self.contexts, indices)

    def connect(self, fd: int) -> None:
        """A key manager is there; `fd` is this end of the pair with it."""
        assert self._loop is not None
        self._unwatch()
        self.link.connect(socket.socket(fileno=fd))
        self._fd = fd
        self._loop.add_reader(fd, self._receive)

    def _receive(self) -> None:
        if not self.link.receive():
            self._unwatch()

    def _unwatch(self) -> None:
        if self._fd >= 0 and self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._fd = -1

    def close(self) -> None:
        """No loop runs any more."""
        self.link.close()


def _settings(plan: Plan) -> TlsSettings:
    return TlsSettings(plan.settings.tls_version, plan.settings.tls_cipher, plan.dh_parameters or None)


def _described(domain: PlannedDomain) -> TlsDomain:
    tls = domain.tls
    if tls is None:
        return TlsDomain(domain.name)
    return TlsDomain(domain.name, tls.authorities, tls.verify_depth, tls.crl is not None)
