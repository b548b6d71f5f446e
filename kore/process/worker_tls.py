"""A worker's TLS: the contexts of its domains, and the link to the key manager that fills them and signs for them.

All of it is made before the sandbox closes, since libssl is handed functions to call, for which executable memory is
needed; it begins to work when the loop runs and the parent has handed over a socket.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from kore import reactor
from kore.application.plan import Plan
from kore.tls.link import KeyLink


class Recorder:
    """What was told."""

    def __init__(self) -> None:
        self.ready = False
        self.on_ready: list[Callable[[], object]] = []
        self.chains: dict[int, list[list[bytes]]] = {}
        self.masters: list[bytes] = []
        self.crls: dict[int, list[bytes]] = {}
        self.challenges: dict[int, list[bytes] | None] = {}

    def certificates(self, domain: int, chains: list[list[bytes]]) -> None:
        """Kept."""
        self.chains[domain] = chains

    def tickets(self, keys: list[bytes]) -> None:
        """Kept."""
        self.masters = keys

    def revoked(self, domain: int, crls: list[bytes]) -> None:
        """Kept."""
        self.crls[domain] = crls

    def challenge(self, domain: int, chain: list[bytes] | None) -> None:
        """Kept."""
        self.challenges[domain] = chain

    def complete(self) -> None:
        """All is there."""
        self.ready = True
        for call in self.on_ready:
            call()


class WorkerTls:
    """Made once in a worker, before its sandbox closes. `open` is called in the loop, `close` after it."""

    def __init__(self, plan: Plan, log: Callable[[int, str], object]) -> None:
        """Raises TlsError, ConfigurationError."""
        self.link = KeyLink()
        self.contexts: Any = Recorder()
        self.link.listener = self.contexts
        self._loop: reactor.Loop | None = None
        self._fd = -1

    def open(self, loop: reactor.Loop, ready: Callable[[], object]) -> None:
        """The loop runs; `ready` is called once when everything there is has come."""
        self._loop = loop
        self.link.soon = loop.call_soon
        if self.contexts.ready:
            loop.call_soon(ready)
        else:
            self.contexts.on_ready.append(ready)

    def connect(self, fd: int) -> None:
        """A key manager is there; `fd` is this end of the pair with it."""
        assert self._loop is not None
        self._unwatch()
        self.link.connect(socket.socket(fileno=fd))
        self._fd = self.link.fileno()
        self._loop.add_reader(self._fd, self._receive)

    def _receive(self) -> None:
        if self.link.fileno() != self._fd or not self.link.receive():
            self._unwatch()

    def _unwatch(self) -> None:
        if self._fd >= 0 and self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._fd = -1

    def close(self) -> None:
        """No loop runs any more."""
        self.link.close()
