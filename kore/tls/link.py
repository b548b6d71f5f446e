"""The worker's side of the key manager: signatures that are waited for, briefly, and what it tells, in its order.

The library that shakes hands can't be left in the middle of a signature, so the worker waits for it, at most
SIGN_SECONDS_MAX. A manager that takes longer is not asked again until it has answered: it costs a worker that time
once, and not once for each client. What it tells meanwhile is kept and handed over in the next turn of the loop.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from socket import MSG_DONTWAIT
from typing import Final, Protocol

from kore.tls.messages import (
    ANY_KEY,
    MESSAGE_BYTES_MAX,
    Ask,
    Assembly,
    MalformedError,
    Said,
    Told,
    confirmed,
    read_answer,
)

SIGN_SECONDS_MAX: Final = 0.25
"""For a signature: the largest RSA key needs a tenth of it."""

MESSAGES_PER_TURN: Final = 64
"""Messages read before the clients get their turn."""

TIMEVAL: Final = struct.Struct("@ll")  # socket(7): what SO_RCVTIMEO takes

KEPT_MAX: Final = 4096
"""Things told that wait for the next turn: a few for each domain."""


class KeysUnavailable(Exception):  # noqa: N818 (it is the name of a state and passes; nobody's error)
    """Nobody signs just now: the key manager is being started again, or does not answer."""


class KeyRefusedError(Exception):
    """The key manager has no such key, or none any more; asking again is in vain."""


class Listener(Protocol):
    """What is told; domains are their indices in the plan."""

    def certificates(self, domain: int, chains: list[list[bytes]]) -> None:
        """The chains a domain serves, DER, leaf first, one for each kind of key."""

    def tickets(self, keys: list[bytes]) -> None:
        """Masters of session tickets, newest first; that one makes new ones."""

    def revoked(self, domain: int, crls: list[bytes]) -> None:
        """The revocation lists of a domain, DER."""

    def challenge(self, domain: int, chain: list[bytes] | None) -> None:
        """What a client is shown that asks for acme-tls/1; None: nothing any more."""

    def complete(self) -> None:
        """All there is has been told; again after each start of the key manager."""


class KeyLink:
    """One worker's link. It outlives key managers: `connect` is called for each, `close` at the end."""

    def __init__(self) -> None:
        self.soon: Callable[[Callable[[], None]], object] = lambda _: None
        """Calls something in the next turn of the loop; set when there is one."""
        self.available = False
        """Whether `sign` may be called now."""
        self.on_available: list[Callable[[], None]] = []
        """Called, in a turn of the loop, when that becomes true."""
        self.listener: Listener | None = None
        self._socket: socket.socket | None = None
        self._assembly = Assembly()
        self._ids = itertools.count(1)
        self._kept: deque[Told] = deque()
        self._scheduled = False
        self._woke = False
        self._complete = False
        """Whether this key manager has said all there is."""

    def fileno(self) -> int:
        """The descriptor to watch for `receive`; -1 without a key manager."""
        return -1 if self._socket is None else self._socket.fileno()

    def connect(self, sock: socket.socket) -> None:
        """A key manager is there. It is asked when it has said all: another than before may have other keys."""
        self.disconnect()
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEVAL.pack(0, int(SIGN_SECONDS_MAX * 1e6)))
        self._socket = sock

    def disconnect(self) -> None:
        """It is gone. What it told stays."""
        self.available = self._complete = False
        self._assembly = Assembly()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def sign(self, domain: int, kind: str, padding: int, block: bytes, key: bytes = ANY_KEY) -> bytes:
        """The signature of `block` by the key of a domain; it blocks for at most SIGN_SECONDS_MAX.

        `kind` is "rsa" or "ec". `padding` is OpenSSL's: 1 for a DigestInfo, 3 for a whole EMSA-PSS encoding, 0 for EC,
        whose signature is an ECDSA-Sig-Value in DER. `key` is the start of the SHA-256 of the public key whose
        certificate is shown. Raises KeysUnavailable, KeyRefusedError.
        """
        sock = self._socket
        if sock is None or not self.available:
            raise KeysUnavailable("the key manager is not there")
        number = next(self._ids) % 0xFFFFFFFF + 1
        deadline = 0.0
        try:
            sock.send(Ask(number, domain, kind, padding, key, block).message(), MSG_DONTWAIT)
            # The wait for a message is bounded by SO_RCVTIMEO; this one, for that of them which is the answer, as well.
            while (answer := self._read(sock, number, 0)) is None:
                deadline = deadline or time.monotonic() + SIGN_SECONDS_MAX
                if time.monotonic() >= deadline:
                    raise BlockingIOError
            return answer
        except BlockingIOError:
            self.available = False
            raise KeysUnavailable(f"the key manager did not answer within {SIGN_SECONDS_MAX} s") from None
        except (OSError, EOFError, MalformedError) as error:
            # Its end is read by receive() as well, which disconnects; not here, in the middle of a handshake.
            self.available = False
            raise KeysUnavailable(f"the key manager is gone: {error}") from None

    def receive(self) -> bool:
        """Take what has come; False when there is no key manager any more. Called when `fileno` is readable."""
        if self._socket is None:
            return False
        try:
            for _ in range(MESSAGES_PER_TURN):
                self._read(self._socket, 0, MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except (OSError, EOFError, MalformedError):
            self.disconnect()
            self._hand_over()
            return False
        self._hand_over()
        return True

    def close(self) -> None:
        """No loop runs any more."""
        self.listener = None
        self.on_available.clear()
        self._kept.clear()
        self.disconnect()

    def _read(self, sock: socket.socket, number: int, flags: int) -> bytes | None:
        """Take one message; the signature if it answers `number`.

        Raises BlockingIOError, OSError, EOFError, MalformedError, KeyRefusedError.
        """
        message = sock.recv(MESSAGE_BYTES_MAX, flags)
        if not message:
            raise EOFError("end of the channel")
        answer = read_answer(message)
        if answer is None:
            told = self._assembly.add(message)
            if told is not None:
                if len(self._kept) >= KEPT_MAX:
                    raise MalformedError("more than the loop takes")
                self._kept.append(told)
                self._schedule()
                self._complete = self._complete or told.said is Said.COMPLETE
        if self._complete and not self.available:
            self.available = self._woke = True
            self._schedule()
        if answer is not None and answer[0] == number:
            if message[0] == Said.REFUSED:
                raise KeyRefusedError(answer[1].decode("utf-8", "replace"))
            return answer[1]
        return None  # a late answer is nobody's

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.soon(self._hand_over)

    def _hand_over(self) -> None:
        """In a turn of the loop: pass on what was told, then say that signatures can be had again."""
        self._scheduled = False
        while self._kept and self.listener is not None:
            self._pass_on(self.listener, self._kept.popleft())
        if self._woke:
            self._woke = False
            for call in list(self.on_available):
                call()

    def _pass_on(self, listener: Listener, told: Told) -> None:
        lists = [list(chain) for chain in told.chains]
        first = lists[0] if lists else []
        match told.said:
            case Said.CERTIFICATES:
                listener.certificates(told.domain, lists)
            case Said.TICKETS:
                listener.tickets(first)
            case Said.REVOKED:
                listener.revoked(told.domain, first)
            case Said.CHALLENGE:
                listener.challenge(told.domain, first or None)
                if self._socket is not None:
                    with contextlib.suppress(OSError):  # the manager waits for so long, and no longer
                        self._socket.send(confirmed(told.domain, first), MSG_DONTWAIT)
            case Said.COMPLETE:
                listener.complete()
