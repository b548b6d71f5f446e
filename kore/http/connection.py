"""One client's connection: requests to handlers, responses out, in order, one request at a time.

The straight line of a request is `received` -> `handle` -> the application's handler -> `Request.response` -> `write`:
no task, no future and no queue lies on it. How bytes become requests is `Input`'s part (input.py); here is what becomes
of a request, of its response, and of the connection in the end.

Deadlines are ticks of the server's clock in `expires`, looked at by the server's wheel: a request only stores a number.
"""

from __future__ import annotations

from types import CoroutineType
from typing import TYPE_CHECKING, Any

from kore.errors import BodyError, ProtocolError
from kore.http.accesslog import Entry, address
from kore.http.answer import respond
from kore.http.head import fields
from kore.http.input import NEVER, Input
from kore.http.output import RATE_MIN, reset_on_close, unsent
from kore.http.peer import Peer
from kore.http.request import ANSWERED, ENDED, OPEN, STREAMING, Request
from kore.http.response import pretty_page
from kore.reactor.trace import report_exception

if TYPE_CHECKING:
    from kore.http.secure import Asked
    from kore.http.server import Service
    from kore.tls.stream import TlsStream

TRAILING_MAX = 16
"""Handlers of one connection that still run after they answered; with more, the next request waits."""

FIRST_REQUEST_S = 0.5
"""What a new connection is given for its request once the server stops: it may be on its way."""

LINGER_S = 2.0
"""How long input is read and thrown away after a refusal, so that no RST destroys it (RFC 9112 9.6)."""

LOG_NOTICE = 5


def nothing() -> None:
    """What a stream that is not encrypted knows of its client's certificate."""


class HttpConnection(Input):
    """The owner of one stream. Made by `Service.accepted`; ends with `lost`."""

    __slots__ = ("began", "bucket", "client", "endpoints", "peer_object", "trailing", "user")

    def __init__(self, service: Service | Asked, fd: int, stream: TlsStream | None = None) -> None:
        self.service = service
        self.recognise = service.recognise
        self.server = service.server
        self.ready = True
        self.block = b""
        self.prepared = None
        self.parser = None
        self.parse_due = False
        self.burst = 0
        self.request = None
        self.receiving = False
        self.heading = False
        self.body = None
        self.body_mark = 0
        self.early = False
        self.pulling = False
        self.storing = False
        self.task = None
        self.pump = None
        self.close_after = False
        self.half_closed = False
        self.lingering = False
        self.gone = False
        self.stuck_at = None
        self.trailing = 0  # handlers that have answered but still run
        self.peer_object: Peer | None = None
        self.began = 0.0  # when the request at hand came, where somebody wants to know
        self.client: str | None = None  # the client's address, once a log has asked for it
        self.user: str | None = None  # the name in its certificate, with it
        self.endpoints: tuple[Any, Any] | None = None  # the server's and the client's, once a mount has asked for them
        self.bucket = NEVER
        if stream is None:
            self.stream = self.server.driver.stream(fd, self)
        else:
            self.stream = stream
            stream.use(self)
        self.write = self.stream.write
        self.expires = self.server.now + self.server.header_ticks
        self.server.schedule(self, self.server.now + self.server.check_ticks)

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
        if not self.pulling:
            self.expires = NEVER
        if request._exchange is not None:
            request._exchange.suspended(task)
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
            self.over(request)
            if self.request is not None:
                self.release(self.request)
        if self.server.draining:
            self.server.check_drained()

    def failed(self, request: Request, error: BaseException, label: str) -> None:
        """The application raised: 500, unless it has answered (kore-api.md section 4)."""
        if isinstance(error, BodyError):
            # The client's fault: it is not told as one of the application's.
            self.server.log(LOG_NOTICE, f"{request!r}: {error}")
            self.answer_for(request, error.status)
            return
        if not isinstance(error, GeneratorExit):
            report_exception(label, error)
        self.answer_for(request)

    def answer_for(self, request: Request, status: int = 500) -> None:
        """Nobody answered. The fields meant for another response are not for this one."""
        if request._state == OPEN and not self.gone:
            request._response_headers = None
            self.respond(request, status, None)

    def begun(self, request: Request) -> None:
        """A request came whose time or whose end somebody wants to know."""
        self.began = self.server.loop.time()
        if request._prepared.on_free is not None:
            self.request = request  # it is not over before `_settle` has seen it
            self.server.watched.add(request)

    def over(self, request: Request) -> None:
        """`request` is over, whatever way. May be told more than once."""
        if self.server.watched:
            self.server.over(request)

    def _settle(self, request: Request) -> None:
        """The handler is through with `request`: answer for it if it did not, then go on."""
        if self.gone:
            request._state = ENDED
            self.over(request)
            return
        if request._state == OPEN:
            self.server.log_error(f"{request!r}: the handler ended without a response")
            self.answer_for(request)
        if request._state == STREAMING:
            self.ready = False
            self.request = request
            self.expires = NEVER
        else:
            self.over(request)
            self._next()

    def release(self, request: Request) -> None:
        """`request` is answered while its handler still runs: let the next one come."""
        if self.request is not request or self.task is None or self.gone or request._state != ANSWERED:
            return
        if self.receiving:
            return  # it is the gate's, and its body is still to come
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
        pump, self.pump = self.pump, None
        request._state = ANSWERED
        if pump is not None:
            self.log_access(request, pump.status, pump.body_bytes)
        if request._exchange is not None:
            request._exchange.wake()  # an application that waits for its client to take or leave this
        if self.task is None:
            self.over(request)
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
            if self.task is not None:
                if self.pulling:
                    self._continue()
                return
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
        request, self.request, self.receiving = self.request, None, False
        body, self.body = self.body, None
        pump, self.pump = self.pump, None
        if self.task is not None:
            self.task = None  # the body streams to it, and it hears of this
            self.trailing += 1
        if request is not None:
            answered = request._state in (ANSWERED, STREAMING)
            request._state = ENDED
            if pump is not None:
                pump.close()
                self.log_access(request, pump.status, pump.body_bytes)
            self.over(request)
        else:
            answered = False
        if body is not None:
            body.discard()
        if answered:
            self.finish()
            return
        fields: tuple[tuple[str, str], ...] = ()
        page = b""
        if self.server.settings.http_pretty_error and not (head is not None and head.method_name == "HEAD"):
            page = pretty_page(error.status)
            fields = (("content-type", "text/html; charset=utf-8"),)
        minor = head.minor if head is not None else 1
        self.write(self.service.responses.build(error.status, minor, False, fields, len(page)) + page)
        self.log_access(request, error.status, len(page))
        self.finish()

    def log_access(self, request: Request | None, status: int, body_bytes: int) -> None:
        """Enter a response into its domain's access log, if that has one, once its last byte has been handed over.

        `request` is None for what was refused before there was one.
        """
        if request is None:
            self._log_refusal(status, body_bytes)
            return
        prepared = request._prepared
        if prepared.log is not None:
            route = None if prepared.route is None else prepared.route.path
            duration = self.server.loop.time() - self.began
            field = request.request_header
            entry = Entry(
                self.client_address(), prepared.head, status, body_bytes, duration, route, field, self.user)
            prepared.log.add(entry)

    def _log_refusal(self, status: int, body_bytes: int) -> None:
        head = None if self.parser is None else self.parser.head
        log = self.service.log_of(head)
        if log is not None:
            block = self.parser.block if self.parser is not None and head is not None else b""
            field = dict(reversed(fields(block))).get
            log.add(Entry(self.client_address(), head, status, body_bytes, None, None, field, self.user))

    def client_address(self) -> str:
        """The client's IP address, "-" for a UNIX socket. Looked up once, while there is a connection to ask."""
        if self.client is None:
            self.client = "-" if self.gone else address(self.stream.fd)
            shown = getattr(self.stream, "certificate_names", nothing)()
            self.user = shown["subject"].get("CN") if shown else None
        return self.client

    def finish(self) -> None:
        """Close once the output has left; read on for a moment first, so that it is not destroyed by an RST.

        Not over TLS when the client has said that it sends no more: should it all the same, it knows by close_notify
        that it has everything, while in plain text what ends by an RST may have been cut off.
        """
        self.ready = False
        self.lingering = True
        parser, self.parser = self.parser, None
        last = self.stream.announces_end and self.prepared is not None and self.prepared.last
        if self.half_closed or (last and (parser is None or not parser.buffered)):
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
            if now - since >= self.server.write_ticks:
                untaken = self._untaken()
                # Not any progress: a byte now and then would keep the connection, and its response, for weeks.
                if before - untaken < RATE_MIN * self.server.settings.http_write_timeout:
                    reset_on_close(self.stream.fd)
                    self.stream.abort()
                    return
                self.stuck_at = (untaken, now)
            self.server.schedule(self, now + min(self.server.write_ticks, self.server.check_ticks))
        elif self.expires > now:
            self.server.schedule(self, min(self.expires, now + self.server.check_ticks))
        elif self.lingering:
            self.stream.abort()
        elif self.storing:
            self.disk_stalled()
        elif self.request is not None:
            if self.slow():
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
        body, self.body = self.body, None
        request = self.request
        if body is not None:
            body.discard()
        if pump is not None:
            pump.close()
            if request is not None:
                self.log_access(request, pump.status, pump.body_bytes)
        if request is not None and (task is None or request._state != ANSWERED):
            self.over(request)
            exchange = request._exchange
            if exchange is not None and exchange.running:
                self.trailing += task is not None
                exchange.left()
            elif task is not None:
                task.kill()
            if request._state == OPEN:
                request._state = ENDED
        self.request = self.parser = None
        del self.write  # a bound method of the stream, which knows us
        self.server.closed(self)
