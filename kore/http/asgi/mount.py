"""An ASGI application where it is mounted: requests become its scopes, and what carries them to it.

What a scope says of the request line, the server and the mount is the same for all requests that share a head, so it is
made once and kept with that (`Prepared.scope`); so are the header fields of the last request, as most clients repeat
theirs.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Coroutine
from types import CoroutineType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from kore.http.asgi.exchange import Exchange, Message
from kore.http.asgi.http import EXTENSIONS, HttpExchange
from kore.http.send_file import Pipes

if TYPE_CHECKING:
    from kore.http.connection import HttpConnection
    from kore.http.request import Request
    from kore.http.server import Prepared

VERSIONS = {"version": "3.0", "spec_version": "2.3"}
"""2.4 has a framework rely on `send` alone to hear of a client that has left: those that wait would not."""

_field_lines = re.compile(rb"\r\n([^:\r]++):[ \t]*+([^\r]*+)").findall


class Template:
    """What scopes of one head share, and the header fields of the last of them."""

    __slots__ = ("block", "headers", "scope")

    def __init__(self, scope: Message) -> None:
        self.scope = scope
        self.block = b""
        self.headers: list[tuple[bytes, bytes]] = []


class Mount:
    """An application below a prefix. Made by the parent; each worker uses its copy."""

    def __init__(self, app: Callable[..., Any], name: str, prefix: str) -> None:
        self.app = app if _is_coroutine_function(app) else _awaiting(app)
        self.given = app
        self.name = name
        self.prefix = prefix
        self.state: dict[str, Any] = {}  # what the application's lifespan has left for its requests
        self.suspended: set[Exchange] = set()  # whose application waits for something
        self.cancelled = False  # they have been, as the worker ends
        self.pipes = Pipes()

    def receiver(self, request: Request) -> HttpExchange:
        """What takes a request's body."""
        request._exchange = exchange = HttpExchange(self, request)
        return exchange

    def handle(self, request: Request, *_captures: str) -> Coroutine[Any, Any, None] | None:
        """Call the application for a request; the handler of the mount's route."""
        head = request._prepared.head
        if head.upgrade:
            from kore.http.asgi.websocket import websocket

            is_websocket, run = websocket(self, request)
            if is_websocket:
                return run
        exchange = request._exchange
        if exchange is None:
            request._exchange = exchange = HttpExchange(self, request)
            exchange.whole = True
        assert isinstance(exchange, HttpExchange)
        return exchange.run(self.scope(request))

    def scope(self, request: Request) -> Message:
        """The scope of an HTTP request (ASGI, "HTTP Connection Scope")."""
        prepared = request._prepared
        template = prepared.scope
        if template is None:
            template = prepared.scope = Template(self._template(prepared, request._connection.service.protocol))
        if request._block != template.block:
            template.block = request._block
            template.headers = _headers(request)
        connection = request._connection
        if connection.endpoints is None:
            connection.endpoints = _endpoints(connection)
        scope: Message = template.scope.copy()
        scope["headers"] = template.headers.copy()
        scope["server"], scope["client"] = connection.endpoints
        scope["state"] = self.state.copy()
        scope["extensions"] = EXTENSIONS.copy()
        return scope

    def _template(self, prepared: Prepared, protocol: str) -> Message:
        head = prepared.head
        path = head.path.encode("utf-8", "surrogateescape")
        return {
            "type": "http",
            "asgi": VERSIONS,
            "http_version": f"1.{head.minor}",
            "method": head.method_name,
            "scheme": protocol,
            "path": unquote(head.path),
            "raw_path": path,
            "query_string": (head.query or "").encode("utf-8", "surrogateescape"),
            "root_path": self.prefix,
        }

    def cancel(self) -> list[Any]:
        """The worker ends and waits no longer: cancel what still runs. Its tasks."""
        self.cancelled = True
        tasks = [exchange.task for exchange in self.suspended]
        for exchange in list(self.suspended):
            exchange.left()
            exchange.task.cancel()
        return tasks


def _headers(request: Request) -> list[tuple[bytes, bytes]]:
    """The header fields as they came: names in lower case, values without white space around."""
    found = [(name.lower(), value.rstrip(b" \t")) for name, value in _field_lines(request._block)]
    head = request._prepared.head
    if head.target[0] not in "/*":
        # RFC 9112 3.2.2: the authority of the target counts, whatever Host says.
        host = head.host.encode("utf-8", "surrogateescape")
        found = [(name, host if name == b"host" else value) for name, value in found]
    return found


def _endpoints(connection: HttpConnection) -> tuple[Any, Any]:
    """The server's and the client's (host, port); for a UNIX socket (path, None) and None."""
    sock = socket.socket(fileno=connection.stream.fd)
    try:
        if sock.family == socket.AF_UNIX:
            return (sock.getsockname(), None), None
        return sock.getsockname()[:2], sock.getpeername()[:2]
    except OSError:
        return None, None  # the client has left
    finally:
        sock.detach()


def _is_coroutine_function(app: Any) -> bool:
    from inspect import iscoroutinefunction

    return iscoroutinefunction(app) or iscoroutinefunction(getattr(app, "__call__", None))  # noqa: B004 - async or not


def _awaiting(app: Callable[..., Any]) -> Callable[..., Any]:
    """`app`, which returns something to await that need not be a coroutine."""

    async def call(scope: Message, receive: Any, send: Any) -> None:
        result = app(scope, receive, send)
        if type(result) is CoroutineType or hasattr(result, "__await__"):
            await result
        else:
            raise TypeError(f"{app!r} is no ASGI 3 application: called with scope, receive, send it returns {result!r}")

    return call
