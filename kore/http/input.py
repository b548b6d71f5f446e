"""The input half of a connection: bytes become requests, and are held back while they may not.

The straight line is `received` -> `handle`, taken when the connection waits for a request (`ready`) and whole requests
without a body arrive; a head that repeats the one before it byte for byte is not parsed again. Everything else (bodies,
heads in pieces, refusals) goes through the sans-io `RequestParser`, which obeys the same grammar. A request with a body
may have to pass a gate first; then its body goes to a `Receiver`, and the handler is called at its end. One whose body
streams is called as soon as what has come of it has been taken, and pulls the rest: what it does not want is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import ETIMEDOUT
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from kore.driver import Stream
from kore.errors import ProtocolError
from kore.http.body import BEHIND, Dropped, Kept, Passed, Receiver, Stored
from kore.http.gate import Waiting
from kore.http.head import ORDINARY, ORDINARY_END, Head
from kore.http.output import RATE_MIN
from kore.http.parser import END, RequestParser
from kore.http.request import ANSWERED, OPEN, Request
from kore.http.response import CONTINUE
from kore.reactor.trace import report_exception

if TYPE_CHECKING:
    from kore.http.answer import Sender
    from kore.http.secure import Asked
    from kore.http.server import HttpServer, Prepared, Service
    from kore.tls.stream import TlsStream

BURST_MAX = 64
"""Pipelined requests served in one turn of the loop: more wait for the next, so that others get theirs."""

HELD_BYTES_MAX = 65536
"""Input kept while it cannot be used; above it the connection is not read until all of it is."""

PROBE_S = 0.5
"""How long a client that sent its FIN is believed to wait for its response, before it is asked (see `probe`)."""

SILENT_S = 30.0
"""How long such a client is believed to wait for more of a body that nothing is sent of: most have left for good."""

NEVER = 1 << 62

ordinary_end = ORDINARY_END.fullmatch


class Input:
    """What `HttpConnection` is for those bytes that come in; made and ended as that."""

    __slots__ = (
        "block", "body", "body_mark", "burst", "close_after", "early", "expires", "gone", "half_closed", "heading",
        "lingering", "parse_due", "parser", "prepared", "pulling", "pump", "ready",
        "receiving", "recognise", "request", "server", "service", "storing",
        "stream", "stuck_at", "task", "write",
    )  # fmt: skip

    service: Service | Asked
    server: HttpServer
    recognise: Callable[[bytes], Head | None]
    stream: Stream | TlsStream
    write: Callable[[bytes], None]
    ready: bool  # a request may come, nothing is held back
    block: bytes  # the head of the request before
    prepared: Prepared | None  # what it led to; None until the first
    parser: RequestParser | None
    parse_due: bool  # the loop will call us to go on
    burst: int  # requests `_parse` may still take in this turn; 0 outside of it
    request: Request | None  # being received, handled or answered
    receiving: bool  # its body is still coming
    heading: bool  # part of a head is there
    body: Receiver | None  # takes what has come of it
    body_mark: int  # bytes of it when its deadline was set
    early: bool  # it streams, and its handler has not been called yet
    storing: bool  # the disk is behind with the body: no more of it is taken, or all of it has come
    pulling: bool  # it streams, and its handler waits for more
    task: Any  # the coroutine of the application that the request waits for, when that is suspended
    pump: Sender | None  # what produces a streamed body
    close_after: bool
    half_closed: bool  # the client sent its FIN
    lingering: bool
    gone: bool
    stuck_at: tuple[int, int] | None  # untaken output when the write deadline was set, and when
    expires: int

    if TYPE_CHECKING:  # what the other half does

        def handle(self, request: Request) -> None: ...
        def respond(self, request: Request, status: Any, body: Any) -> bool: ...
        def failed(self, request: Request, error: BaseException, label: str) -> None: ...
        def over(self, request: Request) -> None: ...
        def begun(self, request: Request) -> None: ...
        def answer_for(self, request: Request, status: int = 500) -> None: ...
        def refuse(self, error: ProtocolError) -> None: ...
        def finish(self) -> None: ...
        def _settle(self, request: Request) -> None: ...
        def _next(self) -> None: ...
        def _go_on(self) -> None: ...
        def _deadline(self, ticks: int) -> None: ...

    def received(self, data: bytes) -> None:
        """Bytes of the client, ``b""`` at its FIN."""
        try:
            if self.ready:
                if data == self.block:
                    if data:
                        # The hot path: the same head again, whole. Comparing costs 30 ns, recognising 400.
                        self.handle(Request(self, self.prepared, data))  # type: ignore[arg-type]
                        return
                elif data:
                    prepared = self.prepared
                    if prepared is not None and data.startswith(start := prepared.start) and (
                        len(data) <= self.service.heads.header_bytes_max and ordinary_end(data, len(start))
                    ):
                        # Again, but for the last fields: those that differ mostly come last.
                        self.block = data
                        self.handle(Request(self, prepared, data))  # type: ignore[arg-type]
                        return
                    head = self.recognise(data)
                    if head is not None and head.resolution is not None:
                        self.block = data
                        self.prepared = prepared = head.resolution
                        prepared.learn_start(data)
                        self.handle(Request(self, prepared, data))  # type: ignore[arg-type]
                    elif prepared is None and (prepared := self.service.only.find(data)) is not None:
                        self.close_after = True
                        self.prepared = prepared
                        self.handle(Request(self, prepared, data))  # type: ignore[arg-type]
                    else:
                        self._requests(data)
                    return
            self._input(data)
        except Exception as error:  # noqa: BLE001 - a defect of ours costs this connection, not the worker
            self._broken(error)

    def _broken(self, error: Exception) -> None:
        report_exception("HttpConnection", error)
        self.stream.abort()

    def _requests(self, data: bytes) -> None:
        """Whole requests without a body, one or pipelined; the rest, and everything unusual, goes to the parser."""
        heads = self.service.heads
        known, size_max = heads.known, heads.header_bytes_max
        block, length, position, end = self.block, len(self.block), 0, len(data)
        burst = 0
        while position < end and self.ready and burst < BURST_MAX:
            if length and data.startswith(block, position):
                position += length
            else:
                match = ORDINARY.match(data, position)
                head = known.get(match[1]) if match is not None else None
                if match is None or head is None or match.end() - position > size_max:
                    break
                self.block = block = data[position : match.end()]
                length = len(block)
                position += length
                self.prepared = self.service.prepared(head)
            burst += 1
            self.handle(Request(self, self.prepared, block))  # type: ignore[arg-type]
        if position < end and not self.gone and not self.lingering:
            self._feed(data[position:])
            if not self.ready:
                self._hold_back()
            elif burst == BURST_MAX:
                self._parse_later()
            else:
                self._parse()

    def _feed(self, data: bytes) -> None:
        parser = self.parser
        if parser is None:
            parser = self.parser = RequestParser(self.service.heads, self.server.settings.http_body_max)
        parser.feed(data)

    def _input(self, data: bytes) -> None:
        """Bytes at any other time."""
        if not data:
            self._ended()
        elif not self.lingering:
            self._feed(data)
            if self.parse_due or not self._may_parse():
                self._hold_back()
            else:
                self._parse()

    def _hold_back(self) -> None:
        """Input waits: not without bound. It is read again when all that waits has been used (`_needs_more`)."""
        if self.parser is not None and self.parser.buffered > HELD_BYTES_MAX and self.stream.reading:
            self.stream.pause()

    def _may_parse(self) -> bool:
        """Whether another event may be taken: no request is being handled, and the client takes its output."""
        if self.gone or self.lingering or self.stuck_at is not None:
            return False
        if self.request is None:
            return True
        return self.receiving and not self.storing and (self.task is None or self.pulling)

    def _parse(self) -> None:
        """Take events from the parser until it needs more, a handler has the request, or the turn is over."""
        parser = self.parser
        if parser is None:
            if self.request is None:
                self._go_on()
            return
        self.burst = BURST_MAX
        try:
            while self.burst and self._may_parse():
                event = parser.next()
                if event is None:
                    self._needs_more(parser)
                    return
                if event is END:
                    self.burst -= 1
                    self._complete()
                elif isinstance(event, Head):
                    self._begin(event, parser)
                else:
                    assert isinstance(event, bytes)
                    self._piece(event)
            if not self.burst and self._may_parse():
                self._parse_later()
        except ProtocolError as error:
            self.refuse(error)
        finally:
            self.burst = 0

    def _parse_later(self) -> None:
        """Go on in the next turn: the other connections want theirs, and the output has to leave."""
        self.ready = False
        if not self.parse_due:
            self.parse_due = True
            self.server.loop.call_soon(self._parse_now)

    def _parse_now(self) -> None:
        self.parse_due = False
        if not (self.gone or self.lingering):
            try:
                self._parse()
            except Exception as error:  # noqa: BLE001 - as in `received`
                self._broken(error)

    def hold(self) -> None:
        """A large response is on its way: take no further request before it is known whether the client takes it."""
        self.burst = 0
        self._parse_later()

    def _begin(self, head: Head, parser: RequestParser) -> None:
        """A head came: its body, if any, is still to come."""
        self.prepared = prepared = self.service.prepared(head)
        self.ready = self.heading = False
        request = self.request = Request(self, prepared, parser.block)  # type: ignore[arg-type]
        self.receiving = True
        self.block = b""  # what the parser took may have been anything; the next head is parsed
        if not head.body_length:
            if prepared.last:
                self.close_after = True
                self.service.only.keep(parser.block, prepared)
            return
        if prepared.watched:
            self.begun(request)
        if prepared.route is None and not prepared.drains:
            # Refused for its head: its body is neither wanted nor waited for.
            self.receiving = False
            self.close_after = True
            self.handle(request)
        elif prepared.gate is None:
            self._receive(request)
        else:
            passed = prepared.gate(request, *prepared.captures)
            if type(passed) is CoroutineType:
                Waiting(self, request, self._passed).begin(passed)
            else:
                self._passed(request, passed)

    def _passed(self, request: Request, passed: object) -> None:
        """What the gate said."""
        if passed and request._state == OPEN:
            self._receive(request)
            self._continue()
        else:
            self._end_early(request)

    def _receive(self, request: Request) -> None:
        """Let the body come."""
        prepared = request._prepared
        if prepared.route is None:
            self.body = Dropped()
        elif prepared.on_body_chunk is not None:
            self.body = Passed(request, prepared.on_body_chunk)
        elif prepared.receiver is not None:
            self.body = prepared.receiver(request)
            self.early = True
        elif 0 < prepared.head.body_length <= self.server.kept_bytes_max:
            self.body = Kept()
        else:
            self.body = Stored(self.server.store, request, self._stored)
        self.body_mark = 0
        self._deadline(self.server.body_ticks)
        parser = self.parser
        if prepared.head.expect_continue and parser is not None and not parser.buffered and not self.early:
            self.write(CONTINUE)

    def pull(self) -> None:
        """The handler that the body streams to waits for more of it."""
        request, body = self.request, self.body
        if self.pulling or request is None or body is None:
            return
        if not body.count and request._prepared.head.expect_continue and request._state == OPEN:
            self.write(CONTINUE)
        self.pulling = True
        self.body_mark = body.count
        self._deadline(self.server.body_ticks)
        if not self.burst and not self.parse_due:
            self._parse()

    def pulled(self) -> None:
        """It has got some: no more is read, and no time runs, until it wants the next."""
        self.pulling = False
        self.expires = NEVER

    def _piece(self, piece: bytes) -> None:
        """Some of the body came."""
        request, body = self.request, self.body
        assert request is not None
        assert body is not None
        try:
            wanted = body.write(piece)
        except BaseException as error:  # noqa: BLE001 - it is the application's function
            self._chunk_failed(request, error)
        else:
            if type(wanted) is CoroutineType:
                Waiting(self, request, self._chunk_taken).begin(wanted)
            elif wanted is BEHIND:
                self._wait_for_disk()
            elif (wanted is not True or request._state != OPEN) and type(body) is not Dropped and not body.streams:
                self._chunk_refused(request, wanted)

    def _chunk_taken(self, request: Request, wanted: object) -> None:
        """An ``async`` on_body_chunk has ended."""
        if wanted is True and request._state == OPEN:
            self._deadline(self.server.body_ticks)
            self._continue()
        else:
            self._chunk_refused(request, wanted)

    def _chunk_refused(self, request: Request, wanted: object) -> None:
        if request._state == OPEN:
            self.server.log_error(f"{request!r}: on_body_chunk returned {wanted!r}, not True")
            self.close_after = True
        self._end_early(request)

    def _chunk_failed(self, request: Request, error: BaseException) -> None:
        self.close_after = True
        self.failed(request, error, "python_runtime_http_body_chunk")
        self._end_early(request)

    def _wait_for_disk(self) -> None:
        """The client waits with its sending until the disk has taken what there is: so long as it may take itself."""
        self.storing = True
        self._deadline(self.server.body_ticks)

    def _stored(self, error: OSError | None) -> None:
        """The disk has taken it, or has failed."""
        request, body = self.request, self.body
        self.storing = False
        try:
            assert request is not None
            assert body is not None
            if error is not None:
                self._unstorable(request, error)
            elif self.receiving:
                self.body_mark = body.count
                self._deadline(self.server.body_ticks)
                self._continue()
            else:
                self._whole(request, body)
        except Exception as problem:  # noqa: BLE001 - as in `received`
            self._broken(problem)

    def disk_stalled(self) -> None:
        """The disk had its time."""
        assert self.request is not None
        seconds = self.server.settings.http_body_timeout
        self._unstorable(self.request, OSError(ETIMEDOUT, f"the disk took nothing for {seconds} s"))

    def _unstorable(self, request: Request, error: OSError) -> None:
        """The disk is full, or broken."""
        self.server.body_failed(error)
        self.close_after = True
        self.answer_for(request)
        self._end_early(request)

    def _end_early(self, request: Request) -> None:
        """The request is over before its body has come: answer for who did not, then drop the body or close."""
        body, self.body = self.body, None
        self.storing = False
        if body is not None:
            body.discard()
        if self.gone:
            return
        if request._state == OPEN:
            self.server.log_error(f"{request!r}: it was ended without a response")
            self.answer_for(request)
        if request._state == ANSWERED and not self.close_after:
            # A short body on its way: cheaper to read than to have the client connect again.
            self.body = Dropped()
            self.body_mark = 0
            self._deadline(self.server.body_ticks)
            self._continue()
        else:
            self.receiving = False
            self._settle(request)

    def _continue(self) -> None:
        """What waits, or what comes, may be used again."""
        if not self.burst:  # otherwise `_parse` is at it
            self._parse_later()

    def _complete(self) -> None:
        """The whole request is there."""
        request, body = self.request, self.body
        assert request is not None
        self.receiving = False
        self.body = None
        if body is not None and body.streams:
            body.end()
            self.pulled()
            if not self.early:
                return  # its handler runs
            self.early = False
        elif body is not None:
            if request._state != OPEN:
                self._settle(request)
            else:
                self._whole(request, body)
            return
        self.handle(request)

    def _whole(self, request: Request, body: Receiver) -> None:
        """All of the body has come: handle the request, once all of it is stored."""
        whole = body.end()
        if whole is BEHIND:
            self.body = body
            self._wait_for_disk()
            return
        self.body = None
        request._body = whole
        if type(body) is Stored:
            request._form = body.form
        if type(whole) is not bytes:
            self.server.watched.add(request)
        self.handle(request)

    def slow(self) -> bool:
        """Whether the body has come too slowly since its deadline was set; if not, it has a new one."""
        body = self.body
        if body is None or body.count - self.body_mark < RATE_MIN * self.server.settings.http_body_timeout:
            return True
        self.body_mark = body.count
        self._deadline(self.server.body_ticks)
        return False

    def _needs_more(self, parser: RequestParser) -> None:
        """The parser wants more: know what for, and until when."""
        if self.half_closed:
            self.stream.close()  # what it sent is not a whole request, and never will be
            return
        if not self.stream.reading:
            self.stream.resume()
        if self.request is not None:
            if self.early:
                self.early = False
                self.expires = NEVER
                self.handle(self.request)
            return  # a body, with its own deadline since its head
        if parser.idle:
            self.heading = False
            if self.close_after:
                self.finish()
            elif not parser.empty_lines:  # otherwise it goes on counting them
                self.parser = None
                self.ready = True
        elif not self.heading:
            self.heading = True
            self.ready = False
            self._deadline(self.server.header_ticks)

    def _ended(self) -> None:
        """The client's FIN. What it asked for before is still answered."""
        self.half_closed = True
        if self.lingering or (self.parser is None and self.request is None):
            self.stream.close()
        elif self.request is not None and not (self.receiving and (self.task is None or self.pulling)):
            if self.request._state == ANSWERED and (self.parser is None or self.parser.idle):
                self.stream.close()  # its handler goes on, for nobody
            else:
                self._probe_later(self.request)
        elif not self.parse_due and self.stuck_at is None:
            self._parse()

    def _probe_later(self, request: Request) -> None:
        self.server.loop.call_later(PROBE_S, self.probe, request)

    def probe(self, request: Request, sent: int = -1) -> None:
        """A client that sent its FIN still waits for its response, or is gone: TCP tells only when written to.

        So an interim response is sent, which every HTTP/1.1 client must accept (RFC 9110 15.2): one that is gone
        answers with RST, and its handler is closed. Once the response has begun nothing may come between, and what is
        sent of it does the same; if that is nothing for SILENT_S (`sent` is what it was before), the client has left.
        """
        if self.request is not request or self.gone:
            return
        pump = self.pump
        if pump is None:
            if request._prepared.head.minor:
                self.write(CONTINUE)
        elif pump.body_bytes != sent or self.stuck_at is not None:
            self.server.loop.call_later(SILENT_S, self.probe, request, pump.body_bytes)
        else:
            self.stream.abort()

    def wait_for(self, request: Request, task: Any) -> None:
        """A coroutine that the reading of `request` waits for was suspended."""
        self.task = task
        self.expires = NEVER
        if request._response_headers is None:
            request._response_headers = []  # off the short way, as for handlers
        if self.half_closed:
            self._probe_later(request)
