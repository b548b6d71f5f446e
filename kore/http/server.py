"""A worker's HTTP server: its listeners, its connections, and the clock their deadlines are read from.

Deadlines are kept in ticks of half a second. A connection stands in one bucket of the wheel; when that comes up, the
connection's own `expires` says whether it is due or where it goes next. So a busy connection costs the clock
one look in a keep-alive time, an idle one the same, and a request costs it nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from errno import ECANCELED
from functools import wraps
from types import CoroutineType
from typing import Any

from kore.http.accesslog import AccessLog, LogTarget
from kore.http.body import FORM_BYTES, BodyStore
from kore.http.connection import FIRST_REQUEST_S, LINGER_S, HttpConnection
from kore.http.disk import Disk
from kore.http.gate import Gate, gated
from kore.http.head import HEAD_KEY_BYTES_MAX, Head, HeadParser, common_lines
from kore.http.request import Request
from kore.http.response import Heads
from kore.http.routes import Resolution, Route, Router
from kore.http.settings import HttpSettings
from kore.reactor.trace import report_exception

NO_START = b"\0"
"""No request begins with it."""

TICK_S = 0.5
"""The resolution of deadlines."""

ACCEPT_RETRY_S = 0.1
"""The pause after accept() failed for want of fds or memory: trying at once again would only burn the processor."""

ACCEPT_TELL_S = 10
"""How often it is told that accept() fails: it may go on for hours, ten times a second."""

DRAIN_IDLE_S = 0.05
"""How long idle connections stay open once the server stops: requests that are on their way are answered."""

DRAIN_BYTES_MAX = 65536
"""The largest body that is read only to be dropped: with a larger one it is cheaper to connect again."""

ONLY_HEADS_MAX = 64
"""See OnlyHeads: kinds of clients, and not clients."""

BODY_TELL_S = 10
"""How often it is told that bodies cannot be stored: a full disk may stay full for hours."""

LOG_ERR = 3
LOG_NOTICE = 5


class Prepared:
    """What a head leads to: made once for all requests that share the head."""

    __slots__ = (
        "captures", "drains", "gate", "handler", "head", "heads", "is_head", "keep_alive", "last", "log",
        "on_body_chunk", "on_free", "receiver", "route", "scope", "start", "watched",
    )  # fmt: skip

    def __init__(self, head: Head, route: Route | None, handler: Callable[..., Any], captures: tuple[Any, ...]) -> None:
        self.head = head
        self.route = route
        self.handler = handler
        self.captures = captures
        self.keep_alive = head.keep_alive
        # Whether the client sends nothing after it (RFC 9112 9.6).
        self.last = not (head.keep_alive or head.body_length or head.upgrade)
        self.is_head = head.method_name == "HEAD"
        self.heads: dict[tuple[int, int], bytes] = {}  # response heads that may be used as they are
        self.log: AccessLog | None = None
        hooks = None if route is None else route.hooks
        self.on_body_chunk: Callable[..., Any] | None = None if hooks is None else hooks.on_body_chunk
        self.on_free: Callable[..., Any] | None = None if hooks is None else hooks.on_free
        self.watched = self.on_free is not None  # the connection must hear when a request comes
        self.receiver = None if route is None else route.receiver
        self.start = NO_START  # the lines that such requests begin with: only what follows is parsed
        self.scope: Any = None  # what an application that is mounted has prepared for such requests
        # With a body only: what is asked before it, and whether it is read though nobody wants it.
        self.gate: Gate | None = None
        self.drains = False


    def learn_start(self, block: bytes) -> None:
        """See to it that `block`, which is an ordinary head, begins with `start`."""
        if not block.startswith(self.start):
            self.start = common_lines(block[:-2] if self.start is NO_START else self.start, block)


class OnlyHeads(dict[bytes, Prepared]):
    """Whole heads of requests that were the last of their connections, and what each led to.

    Mostly they were the only ones: a client that connects for each request sends the same every time.
    """

    __slots__ = ()

    def find(self, data: bytes) -> Prepared | None:
        """What is remembered of `data`, which may be the beginning of an upload: long ones are not even looked up."""
        return self.get(data) if len(data) <= HEAD_KEY_BYTES_MAX else None

    def keep(self, block: bytes, prepared: Prepared) -> None:
        """Remember `block`, if it is short; when there are too many, instead of all others."""
        if len(block) <= HEAD_KEY_BYTES_MAX:
            if len(self) >= ONLY_HEADS_MAX:
                self.clear()
            self[block] = prepared


class Service:
    """One listening socket: which domains it serves, and under which protocol."""

    def __init__(self, server: HttpServer, sock: socket.socket, router: Router, name: str) -> None:
        self.server = server
        self.sock = sock
        self.router = router
        self.name = name
        self.protocol = "http"
        self.heads = HeadParser(server.settings.http_header_max)
        self.recognise = self.heads.recognise
        self.responses = server.heads
        self.only = OnlyHeads()
        self.operation: Any = None
        self.tell_at = 0  # when a failing accept() may be told again, in ticks

    def prepared(self, head: Head) -> Prepared:
        """What `head` leads to."""
        prepared: Prepared | None = head.resolution
        return prepared if prepared is not None else self.prepare(head)

    def prepare(self, head: Head) -> Prepared:
        """Find the route for `head`, and keep it with a head that is kept."""
        prepared = self.prepare_found(head, self.router.resolve(head))
        if head.kept:
            head.resolution = prepared
        return prepared

    def prepare_found(self, head: Head, found: Resolution) -> Prepared:
        """The same, for what was found."""
        server = self.server
        route = found.route
        if route is not None:
            prepared = Prepared(head, route, route.handler, found.captures)
        elif found.by_rule:
            prepared = Prepared(head, None, _answer_by_rule, (found.status, found.location))
        else:
            prepared = Prepared(head, None, _answer_without_route, (found.status, found.allow))
        gate = None if route is None else route.gate
        prepared.log = self.log_of(head)
        if prepared.log is not None:
            prepared.watched = True
        if head.body_length:
            prepared.gate = gate
            prepared.drains = 0 < head.body_length <= DRAIN_BYTES_MAX and not head.expect_continue
            if route is None:
                prepared.drains = prepared.drains and found.by_rule
        else:
            if gate is not None:
                prepared.handler = gated(gate, prepared.handler)
            if prepared.watched:
                prepared.handler = _watched(prepared.handler)
        if prepared.keep_alive and server.settings.http_keepalive_time == 0:
            prepared.keep_alive = False
        # The short way of a response asks nobody: not for those that somebody has to hear of, or that may come early.
        plain = prepared.log is None and prepared.gate is None and prepared.on_body_chunk is None
        if plain and head.minor and not prepared.is_head:
            if prepared.keep_alive:
                prepared.heads = self.responses.plain
            elif prepared.last:
                prepared.heads = self.responses.closing
        return prepared

    def log_of(self, head: Head | None) -> AccessLog | None:
        """The access log that a response to `head` goes to; None for a head that was not understood."""
        target = self.router.log_of(head)
        return None if target is None else self.server.access_log(target)

    def start(self) -> None:
        """Accept, if not already accepting."""
        if self.operation is None:
            self.operation = self.server.driver.accept(self.sock.fileno(), self.accepted)

    def stop(self) -> None:
        """Accept no more. A connection the kernel hands over all the same is still served."""
        operation, self.operation = self.operation, None
        if operation is not None:
            operation.cancel()

    def connect(self, fd: int) -> Any:
        """What owns a new connection."""
        return HttpConnection(self, fd)

    def accepted(self, result: int) -> None:
        """A connection, or why there is none."""
        server = self.server
        if result >= 0:
            connection = self.connect(result)
            server.connections.add(connection)
            if server.draining:
                connection.drain()
            elif len(server.connections) >= server.settings.worker_max_connections:
                server.pause()
        elif result != -ECANCELED:  # that is stop(), perhaps of an operation before this one
            self.operation = None
            server.accept_failed(self, -result)


def _watched(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler`, with the connection told that a request has begun."""

    @wraps(handler, (), ())
    def handle(request: Request, *captures: Any) -> Any:
        request._connection.begun(request)
        return handler(request, *captures)

    return handle


def _answer_by_rule(request: Request, status: int, location: str | None) -> None:
    """What a redirect says."""
    if location is not None:
        request.response_header("location", location)
    request.response(status, None)


def _answer_without_route(request: Request, status: int, allow: str) -> None:
    """404, 405, or the answer to ``OPTIONS *`` (RFC 9110 9.3.7, 15.5.6)."""
    if allow:
        request.response_header("allow", allow)
    request.response(status, None)


class HttpServer:
    """The HTTP side of one worker, on the worker's loop.

    `log(priority, text)` takes log lines. `board`, if given, is memory shared with the parent: its first word shows
    which route is served, as its index + 1, so that the parent can name it when this process dies.
    """

    def __init__(
        self, loop: Any, settings: HttpSettings, *, log: Callable[[int, str], object], board: memoryview | None = None
    ) -> None:
        self.loop = loop
        self.driver = loop.driver
        self.settings = settings
        self.log = log
        self.board = board
        self.serving: Route | None = None
        self.heads = Heads(settings)
        self.secure_heads: Heads | None = None  # where a service speaks TLS
        self.logs: dict[LogTarget, AccessLog] = {}
        self.store: BodyStore | None = None  # for bodies that are too large for memory
        if settings.http_body_disk_offload:
            self.store = BodyStore(settings.http_body_disk_path, settings.http_body_disk_offload, Disk(loop))
        self.kept_bytes_max = FORM_BYTES if self.store is None else min(FORM_BYTES, self.store.offload)
        """Bodies that are announced with no more are just kept."""
        self.watched: set[Request] = set()  # requests that something is to be done for when they are over
        self._body_tell_at = 0  # when a failing disk may be told of again, in ticks
        self.websockets: set[Any] = set()  # the open ones, for broadcasts
        self.resolve_name: Callable[[str], Any] | None = None
        """Finds what the application calls by name, a callback of a WebSocket; raises AttributeError. None: nothing."""
        self.services: list[Service] = []
        self.connections: set[Any] = set()  # HttpConnection, and what it was before or became
        self.active = 0  # suspended handlers
        self.request_limit = settings.http_request_limit
        self.draining = False
        self.paused = False
        self.stopped = False
        self._drained: Callable[[], object] | None = None
        self.wheel: dict[int, set[HttpConnection]] = {}
        self._lost = 0  # ticks that passed while the loop did not turn
        self.now = int(loop.time() / TICK_S)
        self.header_ticks = _ticks(settings.http_header_timeout)
        self.body_ticks = _ticks(settings.http_body_timeout)
        self.keepalive_ticks = _ticks(settings.http_keepalive_time)
        self.write_ticks = _ticks(settings.http_write_timeout)
        self.linger_ticks = _ticks(LINGER_S)
        self.first_request_ticks = _ticks(FIRST_REQUEST_S)
        # A request only stores when its connection expires. So that nobody is late, connections are looked at as often
        # as the soonest deadline a request may set.
        self.check_ticks = self.header_ticks
        if settings.http_keepalive_time:
            self.check_ticks = min(self.header_ticks, self.keepalive_ticks)
        self.keepalive_expires = self.now + self.keepalive_ticks
        # The engine's own number of accepts at a time is made for sharing; the option only lowers it.
        self.driver.accept_batch = min(
            self.driver.accept_batch, settings.worker_accept_threshold, settings.worker_max_connections
        )
        self._timer = loop.call_later(TICK_S, self._tick)

    def listen(self, sock: socket.socket, router: Router, name: str = "default") -> None:
        """Serve `router`'s domains on a listening socket; its owner closes it."""
        self.add(Service(self, sock, router, name))

    def add(self, service: Service) -> None:
        """Serve what a service listens to."""
        self.services.append(service)
        service.start()

    def heads_of(self, protocol: str) -> Heads:
        """What makes the heads of responses over "http" or "https"."""
        if protocol == "http":
            return self.heads
        if self.secure_heads is None:
            self.secure_heads = Heads(self.settings, self.settings.http_hsts_enable)
        return self.secure_heads

    # --- accepting -----------------------------------------------------------------------------------------

    def pause(self) -> None:
        """As many connections as allowed: clients wait in the listen queue, or go to another worker."""
        self.paused = True
        for service in self.services:
            service.stop()

    def accept_failed(self, service: Service, error: int) -> None:
        """No fd or memory for another connection: wait a moment."""
        if self.draining or self.stopped:
            return
        if self.now >= service.tell_at:
            service.tell_at = self.now + _ticks(ACCEPT_TELL_S)
            text = f"{_error_text(error)}; trying again every {ACCEPT_RETRY_S} s"
            self.log(LOG_ERR, f"server {service.name}: accept: {text}")
        self.loop.call_later(ACCEPT_RETRY_S, self._retry, service)

    def _retry(self, service: Service) -> None:
        if not (self.draining or self.paused or self.stopped):
            service.start()

    def closed(self, connection: HttpConnection) -> None:
        """A connection is over."""
        self.connections.discard(connection)
        # So that it is not kept until its time comes: with short connections they would be thousands.
        bucket = self.wheel.get(connection.bucket)
        if bucket is not None:
            bucket.discard(connection)
        if self.paused and not self.stopped and len(self.connections) < self.settings.worker_max_connections:
            self.paused = False
            for service in self.services:
                service.start()
        if self.draining:
            self.check_drained()

    # --- the clock -----------------------------------------------------------------------------------------

    def schedule(self, connection: HttpConnection, tick: int) -> None:
        """Look at `connection` when the clock comes to `tick`."""
        if connection.bucket in self.wheel:
            self.wheel[connection.bucket].discard(connection)
        if tick <= self.now:
            tick = self.now + 1
        connection.bucket = tick
        bucket = self.wheel.get(tick)
        if bucket is None:
            self.wheel[tick] = {connection}
        else:
            bucket.add(connection)

    def _tick(self) -> None:
        self._timer = self.loop.call_later(TICK_S, self._tick)
        before = self.now
        passed = int(self.loop.time() / TICK_S) - self._lost - before
        if passed > 1:
            # While a handler kept the loop, nobody was heard and nothing left: by that time nobody is late.
            self._lost += passed - 1
            passed = 1
        self.now = before + passed
        self.keepalive_expires = self.now + self.keepalive_ticks
        self.heads.tick()
        if self.secure_heads is not None:
            self.secure_heads.tick()
        for log in self.logs.values():
            log.flush()
        for tick in range(before + 1, self.now + 1):
            for connection in self.wheel.pop(tick, ()):
                connection.check(self.now)

    def show(self, route: Route | None) -> None:
        """Put the route on the board for the parent."""
        self.serving = route
        if self.board is not None:
            self.board[0] = 0 if route is None else route.index + 1

    def access_log(self, target: LogTarget) -> AccessLog:
        """This worker's end of an access log; flushed by the clock."""
        log = self.logs.get(target)
        if log is None:
            log = self.logs[target] = AccessLog(target, self.log)
        return log

    def over(self, request: Request) -> None:
        """`request` has ended, whatever way: call its on_free and remove its body, once."""
        if request not in self.watched:
            return
        self.watched.discard(request)
        on_free = request._prepared.on_free
        if on_free is not None:
            try:
                result = on_free(request)
            except BaseException as error:  # noqa: BLE001 - as for a handler, and there is no response left to fail
                report_exception("python_runtime_http_request_free", error)
            else:
                if type(result) is CoroutineType:
                    self.loop.start(result)
        if not isinstance(request._body, bytes):
            request._body.close()

    def body_failed(self, error: OSError) -> None:
        """A body could not be stored: tell it, not for each of them."""
        if self.now >= self._body_tell_at:
            self._body_tell_at = self.now + _ticks(BODY_TELL_S)
            text = f"http_body_disk_path {self.settings.http_body_disk_path!r}: a request body could not be stored"
            self.log(LOG_ERR, f"{text}: {error.strerror} (errno {error.errno})")

    def log_error(self, text: str) -> None:
        """Log what went wrong with a request."""
        self.log(LOG_ERR, text)

    # --- the end -------------------------------------------------------------------------------------------

    def stop_accepting(self) -> None:
        """Accept no more connections."""
        self.stopped = True
        for service in self.services:
            service.stop()

    def drain(self, done: Callable[[], object]) -> None:
        """Stop accepting, close idle connections, let requests be answered; `done()` after the last one."""
        self.stop_accepting()
        self.draining = True
        self.heads.stop_keeping()
        if self.secure_heads is not None:
            self.secure_heads.stop_keeping()
        self._drained = done
        for connection in self.connections:
            connection.drain()
        self.loop.call_later(DRAIN_IDLE_S, self._close_idle)
        self.loop.call_soon(self.check_drained)

    def check_drained(self) -> None:
        """Tell, once, that no connection is left and no handler runs any more."""
        if self._drained is not None and not self.connections and not self.active:
            drained, self._drained = self._drained, None
            drained()

    def _close_idle(self) -> None:
        """Close what has had an answer and asks for nothing more; new connections have their own deadline."""
        for connection in self.connections:
            if connection.idle and connection.prepared is not None:
                connection.stream.close()

    def abort(self) -> None:
        """Close everything now; suspended handlers are closed."""
        self.stop_accepting()
        self._timer.cancel()
        for connection in list(self.connections):
            connection.stream.abort()
        for request in list(self.watched):
            self.over(request)
        for log in self.logs.values():
            log.flush()
        if self.store is not None:
            self.store.close()


def _ticks(seconds: float) -> int:
    return int(seconds / TICK_S) + 1


def _error_text(error: int) -> str:
    return f"{os.strerror(error)} (errno {error})"
