"""A connection while it shakes hands: from accept() to the first byte of HTTP, with a deadline of its own.

It stands among the server's connections, so it counts and is ended like any, but costs no request's clock. First the
ClientHello is read (hello.py), then the context that answers is chosen, then OpenSSL has the word.

The key manager may be away: started again, or slow. Nothing has been sent to the client by then, as the first flight
leaves whole. So the handshake is parked, and begun anew with the same bytes when signatures can be had again. A client
notices nothing but some time.
"""

from __future__ import annotations

import ssl
from typing import Any, Final, Protocol

from kore.driver import Stream
from kore.tls.contexts import ALPN, CHALLENGE_ALPN, LOG_NOTICE, Contexts
from kore.tls.hello import Hello, HelloReader, TooLongError
from kore.tls.stream import TlsStream

HANDSHAKE_S: Final = 10.0
"""From accept() to the end of the handshake: three round trips to anywhere, and the start of a key manager."""

LINGER_S: Final = 2.0
"""How long input is read and thrown away after a refusal, so that no RST destroys it."""

DRAIN_S: Final = 1.0
"""What a handshake is given for its end once the server stops."""

KEPT_BYTES_MAX: Final = 32768
"""Input kept to begin anew with: what comes before our first flight."""

CHALLENGE_OFFER: Final = (CHALLENGE_ALPN.encode(),)
HTTP: Final = ALPN.encode()
NOTHING: Final = Hello()

NEVER: Final = 1 << 62


def ticks(seconds: float, tick_s: float = 0.5) -> int:
    """Ticks of the server's clock, at least one."""
    return int(seconds / tick_s) + 1


HANDSHAKE_TICKS: Final = ticks(HANDSHAKE_S)

# RFC 8446 6.2
HANDSHAKE_FAILURE: Final = 40
DECODE_ERROR: Final = 50
INTERNAL_ERROR: Final = 80
NO_APPLICATION_PROTOCOL: Final = 120


class Host(Protocol):
    """The listener, as far as a handshake needs it."""

    server: Any
    """Its `connections`, `now`, `schedule`, `closed`, `loop`, `driver`, as kore.http.server has them."""
    contexts: Contexts
    parked: set[Any]
    """Handshakes that wait for a signature; the host calls their `begin_anew` when there may be one."""

    def tell(self, domain: int, what: str) -> None:
        """Log why clients of `domain` cannot be served; not for each of them."""

    def asked(self, name: str | None) -> Any:
        """What stands for all who ask for `name`; its `domain` is the index of the domain that answers them."""

    def clear_text(self) -> bytes:
        """The answer to a request that is not encrypted."""

    def established(self, stream: TlsStream, asked: Any) -> None:
        """The handshake is done: `stream` is the listener's."""


def alert(description: int) -> bytes:
    """A fatal alert as a record, for before there is an encryption (RFC 8446 6)."""
    return bytes((21, 3, 3, 0, 2, 2, description))


class Handshake:
    """The owner of one stream until the handshake is done or has failed."""

    __slots__ = (
        "_answered", "_asked", "_deadline", "_hello", "_kept", "_lingering", "_reader", "_sent", "_tls", "bucket",
        "domain", "gone", "host", "prepared", "server", "stream",
    )  # fmt: skip

    def __init__(self, host: Host, fd: int) -> None:
        self.host = host
        self.server: Any = host.server
        self.prepared = None  # no request has come
        self.gone = False
        self.domain = -1
        self._reader: HelloReader | None = HelloReader()
        self._hello = NOTHING
        self._asked: Any = None  # by its name
        self._tls: Any = None  # OpenSSL's part, once it has begun
        self._kept: bytes | None = b""  # all input so far; None when there is no more beginning anew
        self._answered = 0  # bytes that this beginning has led to
        self._sent = 0  # bytes that the client has got
        self._lingering = False
        self.bucket = NEVER
        self.stream: Stream = self.server.driver.stream(fd, self)
        self._deadline = self.server.now + HANDSHAKE_TICKS
        self.server.schedule(self, self._deadline)

    # --- input ---------------------------------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        """Bytes of the client, b"" at its FIN."""
        if not data:
            self.stream.close()  # half of a handshake is none
        elif self._lingering:
            pass
        elif self._reader is not None:
            self._read_hello(self._reader, data)
        elif self._tls is None:
            # It does not wait for our flight, as it has to: it is parked.
            self._keep(data)
            if self._kept is None:
                self._refuse(alert(DECODE_ERROR))
        else:
            self._keep(data)
            self._step(data)

    def _keep(self, data: bytes) -> None:
        if self._kept is not None:
            self._kept = self._kept + data if len(self._kept) + len(data) <= KEPT_BYTES_MAX else None

    def _read_hello(self, reader: HelloReader, data: bytes) -> None:
        try:
            hello = reader.feed(data)
        except TooLongError:
            self._refuse(alert(DECODE_ERROR))
            return
        if reader.clear_text:
            self._refuse(self.host.clear_text())
        elif hello is not None:
            self._reader = None
            self._kept = bytes(reader.raw)
            self._hello = hello
            self._begin()

    def begin_anew(self) -> None:
        """Signatures can be had again; perhaps by another key, so the context is chosen again as well."""
        if not (self.gone or self._lingering):
            self._begin()

    def _begin(self) -> None:
        """Choose who answers, and shake hands from the first byte that came."""
        contexts, hello = self.host.contexts, self._hello
        self._asked = asked = self.host.asked(hello.name)
        self.domain = asked.domain
        if hello.alpn == CHALLENGE_OFFER:
            context = contexts.challenge_of(self.domain)
            if context is None:
                self._refuse(alert(NO_APPLICATION_PROTOCOL))
                return
        elif hello.alpn and HTTP not in hello.alpn:
            self._refuse(alert(NO_APPLICATION_PROTOCOL))  # RFC 7301 3.2
            return
        else:
            context = contexts.choose(self.domain, hello)
            if context is None:
                self.host.tell(self.domain, "there is no certificate for it yet")
                self._refuse(alert(INTERNAL_ERROR))
                return
        assert self._kept is not None
        # The object behind an SSLObject, which SSLContext.wrap_bio() makes it of: 3 us less.
        make: Any = context._wrap_bio  # type: ignore[attr-defined]
        self._tls = make(contexts.wire.incoming, contexts.wire.outgoing, server_side=True)
        self._answered = 0
        self._step(self._kept)

    # --- OpenSSL's part ------------------------------------------------------------------------------------

    def _step(self, data: bytes) -> None:
        """One step, and what it has us send."""
        contexts, tls = self.host.contexts, self._tls
        assert tls is not None
        wire = contexts.wire
        contexts.offload.failure = None
        wire.incoming.write(data)
        try:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send(wire.outgoing.read())
            except (ssl.SSLError, OSError):
                self._failed(wire.outgoing.read())
            else:
                self._send(wire.outgoing.read())
                self._done(tls)
        finally:
            if wire.incoming.pending:
                wire.incoming.read()  # the next one's is not to come behind it, whatever went wrong here

    def _send(self, data: bytes) -> None:
        """Send what the client has not got of an earlier beginning: a HelloRetryRequest has nothing random in it."""
        if not data:
            return
        again = self._sent - self._answered
        self._answered += len(data)
        if self._answered > self._sent:
            self._sent = self._answered
            self.stream.write(data[again:] if again > 0 else data)

    def _failed(self, data: bytes) -> None:
        """It failed: for want of a signature, which is waited for, or by the client's fault."""
        contexts = self.host.contexts
        failure = contexts.offload.failure
        if failure is not None and self._kept is not None and not contexts.keys.available:
            self._tls = None
            self.host.parked.add(self)
            return
        if failure is not None:
            self.host.tell(self.domain, f"a handshake failed for want of a signature: {failure}")
        self._refuse(data[max(self._sent - self._answered, 0) :])

    def _done(self, tls: Any) -> None:
        if tls.selected_alpn_protocol() == CHALLENGE_ALPN:
            # RFC 8737 3: it has seen the certificate, and there is nothing to talk about.
            name = self.host.contexts.domains[self.domain].name
            self.host.contexts.log(LOG_NOTICE, f"domain {name}: the challenge certificate was shown")
            try:
                tls.shutdown()
            except ssl.SSLError:
                pass  # close_notify is there to be sent; the client's has not come
            self._refuse(self.host.contexts.wire.outgoing.read())
            return
        self.gone = True
        stream, server = self.stream, self.server
        secure = TlsStream(stream, tls, self.host.contexts.wire, server.loop.call_soon, self.domain)
        self._tls = None
        self.host.established(secure, self._asked)
        server.closed(self)
        secure.decrypt()  # the first request may have come with the last bytes of the handshake

    # --- the end -------------------------------------------------------------------------------------------

    def _refuse(self, data: bytes) -> None:
        """Say why, and close once the client has heard it."""
        self._reader = self._tls = None
        self._kept = None
        self._lingering = True
        if data:
            self.stream.write(data)
        self.stream.finish()
        self._end_by(LINGER_S)

    def _end_by(self, seconds: float) -> None:
        self._deadline = min(self._deadline, self.server.now + ticks(seconds))
        if self._deadline < self.bucket:
            self.server.schedule(self, self._deadline)

    def check(self, now: int) -> None:
        """The wheel came by."""
        if self.gone:
            return
        self.bucket = NEVER
        if now < self._deadline:
            self.server.schedule(self, self._deadline)
        else:
            self.stream.abort()

    @property
    def idle(self) -> bool:
        """Nothing is asked for yet."""
        return not self._lingering

    def drain(self) -> None:
        """The server stops: what is on its way may still come, and one request behind it."""
        self._end_by(DRAIN_S)

    def stalled(self) -> None:
        """It does not take our flight: its deadline ends that too."""

    def drained(self) -> None:
        """It has taken it."""

    def lost(self, error: int) -> None:  # noqa: ARG002 -- the contract's; a handshake that ends is nobody's loss
        """The connection is over before it began."""
        self.gone = True
        self._reader = self._tls = None
        self._kept = None
        self.host.parked.discard(self)
        self.server.closed(self)
