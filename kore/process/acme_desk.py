"""The key manager's desk for ACME: joins kore.tls.acme_store with the ACME process, the workers and the keys in use.

All of it runs in the key manager's first thread.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from kore.process.log import LOG_NOTICE
from kore.tls.acme_link import MESSAGE_BYTES_MAX, WireError
from kore.tls.acme_store import AcmeSettings, AcmeStore
from kore.tls.certificates import Pair
from kore.tls.keys import DomainFiles, KeyStore

QUESTIONS_PER_TURN: Final = 16
"""Before workers get their turn; an honest asker waits for each answer."""

QUESTIONS_PER_SECOND_MAX: Final = 2000
"""An honest asker has a few for each domain at its start, and then some for each request to the authority."""


class AcmeDesk:
    """The desk. The key manager calls load(), join() for the ACME process, hear() when that has asked something."""

    def __init__(
        self, settings: AcmeSettings, files: Iterable[DomainFiles], keys: KeyStore, log: Callable[[int, str], None],
        challenge: Callable[[int, Sequence[bytes], Callable[[list[str]], object]], object],
    ) -> None:
        """`challenge(number, chain, done)` is the key manager's."""
        self._numbers: dict[str, list[int]] = {}
        for one in files:
            if one.acme:
                self._numbers.setdefault(one.name, []).append(one.domain)
        self._keys = keys
        self._serve_challenge = challenge
        self._served: dict[str, tuple[bytes, ...]] = {}
        self._sock: socket.socket | None = None
        self._asked = (0.0, 0)
        self._store = AcmeStore(
            settings, self._numbers, log=lambda text: log(LOG_NOTICE, text), publish=self._publish,
            challenge=self._challenge)

    def load(self) -> None:
        """Read what there is, at the start and when the parent asks for it. Raises OSError."""
        self._store.load()
        for name in self._numbers:
            self._publish(name)

    def _publish(self, name: str) -> None:
        pair = self._store.pair(name)
        if self._served.get(name) != pair.chain:
            self._served[name] = pair.chain
            for number in self._numbers[name]:
                self._keys.use(number, pair)

    def _challenge(self, name: str, pair: Pair | None, done: Callable[[list[str]], None]) -> None:
        """Have the workers answer a challenge, on all servers that have the domain; `done` when all of them do."""
        late: set[str] = set()
        waited = set(self._numbers[name])

        def one_done(number: int, missing: list[str]) -> None:
            waited.discard(number)
            late.update(missing)
            if not waited:
                done(sorted(late))

        for number in self._numbers[name]:
            self._serve_challenge(number, () if pair is None else pair.chain, partial(one_done, number))

    # The ACME process.

    def join(self, sock: socket.socket) -> None:
        """It is there, or there again; what its predecessor had begun is over."""
        self.leave()
        sock.setblocking(False)
        self._sock = sock

    def leave(self) -> None:
        """It is gone."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._store.forget()

    def hear(self) -> bool:
        """Answer what it asks; False when it is gone. Raises WireError: it is not what was started any more."""
        sock = self._sock
        if sock is None:
            return False
        for _ in range(QUESTIONS_PER_TURN):
            try:
                message = sock.recv(MESSAGE_BYTES_MAX + 1)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not message:
                return False
            self._count()
            self._store.handle(message, lambda answer: self._reply(sock, answer))
        return True

    def _count(self) -> None:
        """Raises WireError when it asks for more in a second than an honest one does."""
        second, count = self._asked
        now = time.monotonic()
        self._asked = (second, count + 1) if now < second + 1 else (now, 1)
        if self._asked[1] > QUESTIONS_PER_SECOND_MAX:
            raise WireError(f"more than {QUESTIONS_PER_SECOND_MAX} questions in a second")

    def _reply(self, sock: socket.socket, answer: bytes) -> None:
        if sock is self._sock:
            try:
                sock.send(answer)
            except OSError:
                pass  # it is gone, or does not read: its next question tells
