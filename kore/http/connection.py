"""One client's connection: bytes in, requests to handlers, responses out, in order, one request at a time.

The straight line of a request is `received` -> `handle` -> the application's handler -> `Request.response` -> `write`:
no task, no future and no queue lies on it. It is taken when the connection waits for a request (`ready`) and whole
requests without a body arrive; a head that repeats the one before it byte for byte is not parsed again. Everything
else (bodies, heads in pieces, refusals) goes through the sans-io `RequestParser`, which obeys the same grammar.

Deadlines are ticks of the server's clock in `expires`, looked at by the server's wheel: a request only stores a number.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from kore.driver import Stream
from kore.errors import ProtocolError
from kore.http.answer import Pump, respond
from kore.http.head import ORDINARY, Head
from kore.http.output import reset_on_close, unsent
from kore.http.parser import END, RequestParser
from kore.http.peer import Peer
from kore.http.request import ANSWERED, ENDED, OPEN, STREAMING, Request
from kore.http.response import CONTINUE, pretty_page
from kore.reactor.trace import report_exception

if TYPE_CHECKING:
    from kore.http.server import HttpServer, Prepared, Service

BURST_MAX = 64
"""Pipelined requests served in one turn of the loop: more wait for the next, so that others get theirs."""

HELD_BYTES_MAX = 65536
"""Input kept while it cannot be used; above it the connection is not read until all of it is."""

TRAILING_MAX = 16
"""Handlers of one connection that still run after they answered; with more, the next request waits."""

PROBE_S = 0.5
"""How long a client that sent its FIN is believed to wait for its response, before it is asked (see `probe`)."""

FIRST_REQUEST_S = 0.5
"""What a new connection is given for its request once the server stops: it may be on its way."""

LINGER_S = 2.0
"""How long input is read and thrown away after a refusal, so that no RST destroys it (RFC 9112 9.6)."""

NEVER = 1 << 62


class HttpConnection:
    """The owner of one stream. Made by `Service.accepted`; ends with `lost`."""

    __slots__ = (
        "block", "body", "bucket", "burst", "close_after", "expires", "gone", "half_closed", "heading", "lingering",
        "parse_due", "parser", "peer_object", "prepared", "pump", "ready", "receiving", "recognise", "request",
        "server", "service", "stream", "stuck_at", "task", "trailing", "write",
    )

    def __init__(self, service: Service, fd: int) -> None:
        self.service = service
        self.recognise = service.heads.recognise
        self.server: HttpServer = service.server
        self.ready = True  # a request may come, nothing is held back
        self.block = b""  # the head of the request before
        self.prepared: Prepared | None = None  # what it led to; None until the first
        self.parser: RequestParser | None = None
        self.parse_due = False  # the loop will call us to go on
        self.burst = 0  # requests `_parse` may still take in this turn; 0 outside of it
        self.request: Request | None = None  # being received, handled or answered
        self.receiving = False  # its body is still coming
        self.heading = False  # part of a head is there
        self.body: bytearray | None = None  # what has come of it
        self.task: Any = None  # its handler, when that is suspended
        self.trailing = 0  # handlers that have answered but still run
        self.pump: Pump | None = None  # what produces a streamed body
        self.close_after = False
        self.half_closed = False  # the client sent its FIN
        self.lingering = False
        self.gone = False
        self.peer_object: Peer | None = None
        self.stuck_at: tuple[int, int] | None = None  # untaken output when the write deadline was set, and when
        self.bucket = NEVER
        self.stream: Stream = self.server.driver.stream(fd, self)
        self.write: Callable[[bytes], None] = self.stream.write
        self.expires = self.server.now + self.server.header_ticks
        self.server.schedule(self, self.server.now + self.server.check_ticks)

    # --- input ---------------------------------------------------------------------------------------------

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
                    head = self.recognise(data)
                    if head is not None and head.resolution is not None:
                        self.block = data
                        self.prepared = prepared = head.resolution
                        self.handle(Request(self, prepared, data))
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
                prepared = head.resolution
                self.prepared = prepared if prepared is not None else self.service.prepare(head)
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
        return self.request is None or self.receiving

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
                    request = self.request
                    assert request is not None
                    self.receiving = False
                    if self.body is not None:
                        request._body = bytes(self.body)
                        self.body = None
                    self.handle(request)
                elif isinstance(event, Head):
                    self._begin(event, parser)
                else:
                    assert isinstance(event, bytes)
                    assert self.body is not None
                    self.body += event
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
        self.prepared = prepared = head.resolution if head.resolution is not None else self.service.prepare(head)
        self.ready = self.heading = False
        request = self.request = Request(self, prepared, parser.block)
        self.receiving = True
        self.block = b""  # what the parser took may have been anything; the next head is parsed
        if not head.body_length:
            return
        if prepared.route is None:
            # Refused for its head: its body is neither wanted nor waited for.
            self.receiving = False
            self.close_after = True
            self.handle(request)
            return
        self.body = bytearray()
        self._deadline(self.server.body_ticks)
        if head.expect_continue and not parser.buffered:
            self.write(CONTINUE)

    def _needs_more(self, parser: RequestParser) -> None:
        """The parser wants more: know what for, and until when."""
        if self.half_closed:
            self.stream.close()  # what it sent is not a whole request, and never will be
            return
        if not self.stream.reading:
            self.stream.resume()
        if self.request is not None:
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
        elif self.request is not None and not self.receiving:
            if self.request._state == ANSWERED and (self.parser is None or self.parser.idle):
                self.stream.close()  # its handler goes on, for nobody
            else:
                self._probe_later(self.request)
        elif not self.parse_due and self.stuck_at is None:
            self._parse()

    def _probe_later(self, request: Request) -> None:
        self.server.loop.call_later(PROBE_S, self.probe, request)

    def probe(self, request: Request) -> None:
        """A client that sent its FIN still waits for its response, or is gone: TCP tells only when written to.

        So an interim response is sent, which every HTTP/1.1 client must accept (RFC 9110 15.2): one that is gone
        answers with RST, and its handler is closed.
        """
        if self.request is request and not self.gone and self.pump is None and request._prepared.head.minor:
            self.write(CONTINUE)

    # --- handling ------------------------------------------------------------------------------------------

    def handle(self, request: Request) -> None:
        """Call the handler, and run its coroutine's first step."""
        server = self.server
        prepared = request._prepared
        self.expires = server.keepalive_expires
        if server.serving is not prepared.route:
            server.show(prepared.route)
        result = None
        try:
            captures = prepared.captures
            # Unpacking nothing would make a list and a tuple, 0.1 us.
            result = prepared.handler(request, *captures) if captures else prepared.handler(request)
            if result is not None and type(result) is CoroutineType:
                if server.active >= server.request_limit:
                    result.close()
                    self.respond(request, 503, None)
                else:
                    task = server.loop.begin(result)
                    if task is not None:
                        task.on_end = request._handler_ended
                        self._suspended(request, task)
                        return
        except BaseException as error:  # noqa: BLE001 - a handler's sys.exit() is a failed request, not our end
            self.failed(request, error, "python_runtime_http_request" if result is None else "coroutine")
        if request._state == ANSWERED and not self.close_after and self.request is None:
            return
        self._settle(request)

    def _suspended(self, request: Request, task: Any) -> None:
        """The handler waits for something. If it has answered already, the connection does not wait with it."""
        self.server.active += 1
        self.ready = False
        self.request = request
        self.task = task
        self.expires = NEVER
        if request._response_headers is None:
            request._response_headers = []  # off the short way: its answer is to release the connection
        if request._state == ANSWERED:
            self.release(request)
        elif self.half_closed:
            self._probe_later(request)

    def handler_ended(self, request: Request, error: BaseException | None) -> None:
        """The coroutine of a suspended handler ended."""
        self.server.active -= 1
        if error is not None:
            self.failed(request, error, "coroutine")
        if self.request is request:
            self.task = None
            self._settle(request)
        else:
            self.trailing -= 1
            if self.request is not None:
                self.release(self.request)
        if self.server.draining:
            self.server.check_drained()

    def failed(self, request: Request, error: BaseException, label: str) -> None:
        """The application raised: 500, unless it has answered (kore-api.md section 4)."""
        if not isinstance(error, GeneratorExit):
            report_exception(label, error)
        self._answer_for(request)

    def _answer_for(self, request: Request) -> None:
        """Nobody answered: 500. The fields meant for another response are not for this one."""
        if request._state == OPEN and not self.gone:
            request._response_headers = None
            self.respond(request, 500, None)

    def _settle(self, request: Request) -> None:
        """The handler is through with `request`: answer for it if it did not, then go on."""
        if self.gone:
            request._state = ENDED
            return
        if request._state == OPEN:
            self.server.log_error(f"{request!r}: the handler ended without a response")
            self._answer_for(request)
        if request._state == STREAMING:
            self.ready = False
            self.request = request
            self.expires = NEVER
        else:
            self._next()

    def release(self, request: Request) -> None:
        """`request` is answered while its handler still runs: let the next one come."""
        if self.request is not request or self.task is None or self.gone or request._state != ANSWERED:
            return
        if self.trailing < TRAILING_MAX:
            self.trailing += 1
            self.task = None
            self._next()

    def _next(self) -> None:
        """The response is complete: close, or take the next request."""
        self.request = None
        if self.close_after:
            self.finish()
            return
        self.expires = self.server.keepalive_expires
        if not self.burst:  # otherwise `_parse` is at it
            self._go_on()

    def _go_on(self) -> None:
        """No request is at hand: take the next, held back already or still to come."""
        if self.parser is not None:
            # Not from here: a long pipeline of quick handlers would nest.
            self._parse_later()
        elif self.half_closed:
            self.stream.close()
        else:
            self.ready = self.stuck_at is None and not self.parse_due

    # --- output --------------------------------------------------------------------------------------------

    def respond(self, request: Request, status: Any, body: Any) -> bool:
        """Everything but the most common response; see `Request.response`."""
        return respond(self, request, status, body)

    def streamed(self, request: Request) -> None:
        """The body that was produced piece by piece is over."""
        self.pump = None
        request._state = ANSWERED
        if self.task is None:
            self._next()
        else:
            self.release(request)

    def stalled(self) -> None:
        """The client does not take its output: take no more requests from it, and give it a time."""
        if self.gone:
            return
        self.ready = False
        self._watch_output()

    def _watch_output(self) -> None:
        self.stuck_at = (self._untaken(), self.server.now)
        self._look_at(self.server.now + self.server.write_ticks)

    def _untaken(self) -> int:
        """Bytes of output that the client has not taken."""
        return self.stream.pending + unsent(self.stream.fd)

    def drained(self) -> None:
        """It has taken everything."""
        self.stuck_at = None
        if self.gone:
            return
        if self.lingering:
            self._deadline(self.server.linger_ticks)
        elif self.pump is not None:
            self.pump.later()
        elif self.request is None or self.receiving:
            # Its time did not run while it was not heard.
            if self.receiving:
                self._deadline(self.server.body_ticks)
            elif self.heading:
                self._deadline(self.server.header_ticks)
            else:
                self.expires = self.server.keepalive_expires
            self._go_on()

    def refuse(self, error: ProtocolError) -> None:
        """What the client sent cannot be trusted: say why with a status, and close (RFC 9112 2.2, 9.6)."""
        error.__traceback__ = None  # the parser keeps the error, whose frames keep the parser
        head = getattr(self.parser, "head", None)
        self.ready = False
        request, self.request, self.receiving, self.body = self.request, None, False, None
        if request is not None:
            request._state = ENDED
        fields: tuple[tuple[str, str], ...] = ()
        page = b""
        if self.server.settings.http_pretty_error and not (head is not None and head.method_name == "HEAD"):
            page = pretty_page(error.status)
            fields = (("content-type", "text/html; charset=utf-8"),)
        minor = head.minor if head is not None else 1
        self.write(self.server.heads.build(error.status, minor, False, fields, len(page)) + page)
        self.finish()

    def finish(self) -> None:
        """Close once the output has left; read on for a moment first, so that it is not destroyed by an RST."""
        self.ready = False
        self.lingering = True
        self.parser = None
        if self.half_closed:
            self.stream.close()
            return
        self.stream.finish()
        if not self.stream.reading:
            self.stream.resume()
        self._deadline(self.server.linger_ticks)

    # --- time and the end ----------------------------------------------------------------------------------

    def _deadline(self, ticks: int) -> None:
        self.expires = self.server.now + ticks
        self._look_at(self.expires)

    def _look_at(self, tick: int) -> None:
        """Have the wheel come by at `tick` at the latest."""
        if tick < self.bucket:
            self.server.schedule(self, tick)

    def check(self, now: int) -> None:
        """The wheel came by: act on what is due, and say when to look again."""
        if self.gone:
            return
        self.bucket = NEVER
        if self.stuck_at is not None:
            before, since = self.stuck_at
            untaken = self._untaken()
            if untaken != before:
                self.stuck_at = (untaken, now)
            elif now - since >= self.server.write_ticks:
                reset_on_close(self.stream.fd)
                self.stream.abort()
                return
            self.server.schedule(self, now + min(self.server.write_ticks, self.server.check_ticks))
        elif self.expires > now:
            self.server.schedule(self, min(self.expires, now + self.server.check_ticks))
        elif self.lingering:
            self.stream.abort()
        elif self.request is not None:
            self.refuse(ProtocolError(408, "no whole body in time"))
        elif self.parser is not None and not self.parser.idle:
            self.refuse(ProtocolError(408, "no whole head in time"))
        else:
            # RFC 9112 9.5: an idle connection is closed without a word; a 408 could be taken for an answer.
            self.stream.close()

    def peer(self) -> Peer | None:
        """What applications know as the connection."""
        if self.gone:
            return None
        if self.peer_object is None:
            self.peer_object = Peer(self, self.stream.fd)
        return self.peer_object

    def disconnect(self) -> None:
        """The application wants it closed: after what it still answers."""
        self.close_after = True
        self.ready = False
        if self.request is None:
            self.server.loop.call_soon(self._close_idle)

    def _close_idle(self) -> None:
        if self.request is None and not self.gone:
            self.finish()

    @property
    def idle(self) -> bool:
        """Nothing is asked for and nothing is owed."""
        if self.request is not None or self.lingering or self.parse_due or self.stuck_at is not None:
            return False
        return self.parser is None or self.parser.idle

    def drain(self) -> None:
        """The server stops: the request at hand, or one that comes before the connection is closed, is the last."""
        self.close_after = True
        if self.prepared is None and self.idle:
            self._deadline(self.server.first_request_ticks)

    def lost(self, error: int) -> None:  # noqa: ARG002 -- the contract's; why does not matter to handlers
        """The connection is over: a handler that has not answered is closed (GeneratorExit at its await).

        One that has goes on: the client has what it asked for, and closing is how many say so.
        """
        self.gone = True
        self.ready = False
        if self.peer_object is not None:
            self.peer_object.lost()
        pump, self.pump = self.pump, None
        task, self.task = self.task, None
        if pump is not None:
            pump.close()
        if task is not None and self.request is not None and self.request._state != ANSWERED:
            task.kill()
        self.request = self.parser = self.body = None
        del self.write  # a bound method of the stream, which knows us
        self.server.closed(self)
