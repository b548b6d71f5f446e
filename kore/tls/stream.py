"""An encrypted stream with the face of a plain one: ciphertext from and to the engine, plaintext to and from its owner.

OpenSSL works on two memory BIOs, which all connections of a worker share (`Wire`): whatever is put into one is taken
out of the other before anybody else's turn, so an idle connection keeps no buffer at all. OpenSSL itself keeps what it
has of an unfinished record.

Input is decrypted as it arrives. What the owner writes meanwhile is collected and encrypted in one go at the end: the
responses to pipelined requests share a record. What it writes at other times is encrypted at once, so it leaves in the
same turn. Of a large body no more than `PIECE_BYTES` at a time lies about encrypted; the next piece is made when the
kernel has taken the last, and the owner is told `stalled` meanwhile, as of any stream that does not take all of it.

An end of input that was not announced (no close_notify, RFC 8446 6.1) is told like any other: nothing in HTTP ends
by an end of input, so whoever cuts it off can cut nothing short. `clean` tells the two apart.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, ClassVar, Final

from kore.driver import Stream, StreamOwner
from kore.tls.libssl import library

RECORD_BYTES: Final = 16384
"""Plaintext of one record, RFC 8446 5.1: what one call of OpenSSL reads or writes at most."""

PIECE_BYTES: Final = 262144
"""Plaintext encrypted at a time for one client: what is not taken of it is kept."""

CACHED_BYTES: Final = 65536
"""Plaintext whose ciphertext is made in one buffer, that the processor's cache still holds when it is copied."""

UNSENT_BYTES_MAX: Final = 65536
"""Output of TLS itself (refusals to renegotiate) that a client may leave lying: then it asks and never reads."""


class Wire:
    """The two ends of OpenSSL in one worker. Both are empty between any two calls of a stream's."""

    __slots__ = ("incoming", "outgoing")

    def __init__(self) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()


class TlsStream:
    """See kore.driver.Stream, whose contract this keeps, but that it is not known to an engine.

    Made when the handshake is done: `tls` is what is behind an SSLObject (0.1 us less for each call), over the BIOs of
    `wire`; `inner` the engine's stream, which it takes over; `domain` the index of that which answers.
    `later(function)` calls in the next turn of the loop.
    """

    __slots__ = (
        "_answers", "_due", "_held", "_outgoing", "_read", "_rest", "_rest_at", "_told", "_write",
        "_writes", "clean", "closing", "domain", "ended", "finishing", "inner", "inside", "later", "out", "owner",
        "reading", "received", "shut", "stuck", "tls", "wire",
    )  # fmt: skip

    announces_end: ClassVar[bool] = True  # by close_notify

    def __init__(
        self, inner: Stream, tls: Any, wire: Wire, later: Callable[[Callable[[], None]], object], domain: int
    ) -> None:
        self.inner = inner
        self.tls = tls
        self.domain = domain
        self.wire = wire
        self.later = later
        self._read = tls.read
        self._write = tls.write
        self._outgoing = wire.outgoing
        self._writes = inner.write
        self.owner: StreamOwner | None = None
        self.received: Callable[[bytes], None] | None = None
        self.out: bytes | list[bytes] | None = None  # plaintext of which nothing is encrypted yet
        self._rest: bytes | None = None  # plaintext of which some is, up to `_rest_at`
        self._rest_at = 0
        self._held: bytes | None = None  # ciphertext that came before a pause
        self._due = False  # `_go_on` will be called
        self._told = False  # the owner knows that output is stuck
        self._answers = 0  # bytes that OpenSSL itself has written since
        self.stuck = 0  # bytes: not zero while the client does not take its output, or there is more to encrypt
        self.inside = False  # the owner is being told of input
        self.reading = True
        self.ended = False  # there is no more input, and the owner knows
        self.clean = False  # the client said so itself
        self.shut = False
        self.finishing = False
        self.closing = False
        inner.owner = self  # type: ignore[assignment] # what it hears of input is set apart
        inner.received = self.input

    def use(self, owner: StreamOwner) -> None:
        """Hand everything to `owner` from now on."""
        self.owner = owner
        self.received = owner.received

    @property
    def fd(self) -> int:
        """The socket's; -1 once it is closed."""
        return self.inner.fd

    @property
    def gone(self) -> bool:
        """Whether it is over."""
        return self.inner.gone

    @property
    def pending(self) -> int:
        """Bytes written but not yet taken by the kernel."""
        out = self.out
        size = self.inner.pending
        if out is not None:
            size += sum(map(len, out)) if isinstance(out, list) else len(out)
        return size if self._rest is None else size + len(self._rest) - self._rest_at

    def certificate(self) -> bytes | None:
        """The client's certificate in DER, None when it has shown none."""
        found: bytes | None = self.tls.getpeercert(True)
        return found

    def certificate_names(self) -> dict[str, dict[str, str]] | None:
        """The names in the client's certificate: "subject" and "issuer", each by OpenSSL's short names.

        Of attributes that are there more than once the last counts. None without a certificate.
        """
        shown: Any = self.tls.getpeercert()
        if not shown:
            return None
        short = library().short_name
        return {
            whose: {short(name): value for attributes in shown.get(whose, ()) for name, value in attributes}
            for whose in ("issuer", "subject")
        }

    # --- input ---------------------------------------------------------------------------------------------

    def input(self, data: bytes) -> None:
        """Ciphertext, b"" at the end of input. The hot path: one record with one request."""
        if not data:
            self._end_of_input(clean=False)
            return
        if self.ended or self.finishing or self.received is None:
            return
        incoming = self.wire.incoming
        incoming.write(data)
        self.decrypt()

    def decrypt(self) -> None:
        """Read what is in the wire, tell the owner, then send what it wrote meanwhile."""
        incoming, outgoing = self.wire.incoming, self._outgoing
        self.inside = True
        try:
            while incoming.pending:
                try:
                    data = self._read(RECORD_BYTES)
                except ssl.SSLWantReadError:
                    if outgoing.pending:
                        self._answer()
                    break
                except ssl.SSLError:
                    self._broken()
                    break
                if outgoing.pending:
                    self._answer()  # before the owner, which may have others write
                if not data:
                    self._end_of_input(clean=True)
                    break
                received = self.received
                if received is None or self.finishing:
                    break
                received(data)
                if not self.reading:
                    if incoming.pending:
                        self._held = incoming.read()
                    break
        finally:
            if incoming.pending:
                incoming.read()  # the next one's is not to come behind it
            self.inside = False
        if self.out is not None:
            if not self.stuck:
                self._flush()
        elif self.shut:
            self._conclude()

    def _answer(self) -> None:
        """OpenSSL itself has something to say."""
        answer = self._outgoing.read()
        self._writes(answer)
        if self._told:
            self._answers += len(answer)
            if self._answers > UNSENT_BYTES_MAX:
                self.inner.abort()

    def _broken(self) -> None:
        """What came cannot be decrypted: say so and close (RFC 8446 6.2)."""
        if self._outgoing.pending:
            self._writes(self._outgoing.read())
        self.out = self._rest = None
        self.received = None
        self.closing = self.shut = True
        self.inner.close()

    def _end_of_input(self, *, clean: bool) -> None:
        if not self.ended:
            self.ended = True
            self.clean = clean
            if self.received is not None:
                self.received(b"")

    def pause(self) -> None:
        """See kore.driver.Stream."""
        if self.reading and not self.closing:
            self.reading = False
            self.inner.pause()

    def resume(self) -> None:
        """See kore.driver.Stream."""
        if not self.reading and not self.closing:
            self.reading = True
            if self._held is None:
                self.inner.resume()
            else:
                self.later(self._deliver_held)

    def _deliver_held(self) -> None:
        held = self._held
        if held is None or not self.reading or self.gone:
            return
        self._held = None
        self.input(held)
        self._listen()

    def _listen(self) -> None:
        """Read on, unless that was stopped meanwhile."""
        if self.reading and not (self.closing or self.gone):
            self.inner.resume()

    # --- output --------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """See kore.driver.Stream."""
        if self.shut:
            return
        out = self.out
        if out is None:
            self.out = data
            if not (self.inside or self.stuck or self._due):
                if len(data) > PIECE_BYTES:
                    self._go_on_later()  # it will be stuck, which must not be told from here
                else:
                    self._flush()
        elif isinstance(out, list):
            out.append(data)
        else:
            self.out = [out, data]

    def _flush(self) -> None:
        """Encrypt what was written, at most `PIECE_BYTES` of it. Nothing is stuck."""
        out = self.out
        if type(out) is bytes and len(out) <= RECORD_BYTES:
            # The hot path: one record.
            self.out = None
            self._write(out)
            self._writes(self._outgoing.read())
        else:
            self._encrypt()
        if self.shut:
            self._conclude()

    def _encrypt(self) -> None:
        """The same for what may be more, in pieces that the processor's cache holds."""
        left = PIECE_BYTES
        while left > 0:
            data, at = self._rest, self._rest_at
            if data is None:
                data, at = self._next(left), 0
                if data is None:
                    break
            end = min(at + min(left, CACHED_BYTES), len(data))
            left -= end - at
            view = memoryview(data)
            while at < end:
                at += self._write(view[at : min(at + RECORD_BYTES, end)])
            self._rest, self._rest_at = (None, 0) if at == len(data) else (data, at)
            self._writes(self._outgoing.read())
        if self._rest is not None or self.out is not None:
            self._go_on_later()
            self._stuck()

    def _next(self, most: int) -> bytes | None:
        """What was written first; small pieces joined as long as they make no more than `most`."""
        out = self.out
        if not isinstance(out, list):
            self.out = None
            return out
        size = count = 0
        for piece in out:
            size += len(piece)
            if size > most and count:
                break
            count += 1
        first = b"".join(out[:count]) if count > 1 else bytes(out[0])
        del out[:count]
        if not out:
            self.out = None
        return first

    def _stuck(self) -> None:
        """Not all of it has been handed over: the owner is to wait."""
        self.stuck = 1
        if not self._told and self.owner is not None:
            self._told = True
            self._answers = 0
            self.owner.stalled()

    def _go_on_later(self) -> None:
        if not self._due:
            self._due = True
            self.later(self._go_on)

    def _go_on(self) -> None:
        """Encrypt the next piece, once the last has left."""
        self._due = False
        inner = self.inner
        if inner.gone or inner.stuck:
            return  # drained() or lost() follows
        if inner.out is not None:
            self._go_on_later()  # it leaves at the end of this turn
            return
        self.stuck = 0
        if self.out is not None or self._rest is not None:
            self._flush()
        self._all_taken()

    def _all_taken(self) -> None:
        """Tell the owner, which waits for it, that all of its output has left."""
        if self._told and not self.stuck:
            self._told = False
            if self.owner is not None and not self.closing:
                self.owner.drained()

    def stalled(self) -> None:
        """The engine's stream does not take all of it."""
        self._stuck()

    def drained(self) -> None:
        """The kernel has taken what there was."""
        if self._due:
            return
        self._go_on()

    # --- the end -------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """See kore.driver.Stream: close_notify and a FIN after what was written. Input is thrown away from now on."""
        if not (self.finishing or self.closing):
            self.finishing = self.shut = True
            self._conclude()

    def close(self) -> None:
        """See kore.driver.Stream."""
        if not self.closing:
            self.closing = self.shut = True
            self.received = None
            self._conclude()

    def abort(self) -> None:
        """See kore.driver.Stream."""
        self.out = self._rest = self.received = None
        self.closing = self.shut = True
        self.inner.abort()

    def _conclude(self) -> None:
        """What was written has been encrypted: end the stream. Otherwise we are called again."""
        if self.inside or self._rest is not None or self.gone:
            return
        if self.inner.shut and not self.closing:
            return  # its FIN is on its way
        if self.out is not None:
            if not (self.stuck or self._due):
                self._flush()  # which calls us
            return
        if not self.inner.shut:
            self._say_goodbye()
        if self.closing:
            self.inner.close()
        else:
            self.inner.finish()

    def _say_goodbye(self) -> None:
        """Send close_notify. OpenSSL looks at once for the answer: not in what is another connection's."""
        incoming = self.wire.incoming
        others = incoming.read() if incoming.pending else b""
        try:
            self.tls.shutdown()
        except ssl.SSLError:
            pass  # the answer has not come: nobody waits for it
        if others:
            incoming.write(others)
        if self._outgoing.pending:
            self._writes(self._outgoing.read())

    def lost(self, error: int) -> None:
        """The engine's stream is over."""
        self.out = self._rest = self._held = self.received = None
        self.closing = self.shut = True
        owner, self.owner = self.owner, None
        if owner is not None:
            owner.lost(error)
