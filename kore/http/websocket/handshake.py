"""The opening handshake (RFC 6455 4.2): an HTTP request becomes a WebSocket, or is told why not.

It is called by a handler in the middle of its request. What may still happen to that request (the handler suspends,
ends, raises, or the bytes behind the head are handed on) must not touch the stream any more, which has a new owner
from here on; `_Rest` stands where the connection kept its parser and passes the client's early frames on.
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kore.http.head import fields
from kore.http.websocket.broadcast import members
from kore.http.websocket.connection import NEVER, WebSocketConnection, nothing
from kore.http.websocket.deflate import Agreement, negotiate

if TYPE_CHECKING:
    from kore.http.request import Request

GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3
VERSION: Final = "13"

_key = re.compile("[A-Za-z0-9+/]{22}==").fullmatch  # 16 bytes in base64


def handshake(request: Request, onconnect: Any, onmsg: Any, ondisconnect: Any) -> bool:
    """Answer `request` as the opening handshake of a WebSocket; see `Request.websocket_handshake`.

    The callbacks are callables, None, or the names of functions or methods in the application's module. When the
    request is no handshake the answer is 400 and none of them is ever called. Otherwise the answer is 101 and
    `onconnect` is called, before this returns. Fields added with `response_header` are part of the answer: that is how
    a subprotocol is chosen. Returns True. Raises RuntimeError for a name that cannot be resolved or
    a request that was answered already, TypeError for a callback of another type.
    """
    http: Any = request._connection
    callbacks = _resolved(request, onconnect), _resolved(request, onmsg), _resolved(request, ondisconnect)
    found = Fields(request)
    status, extra, agreement = found.judge(http.server)
    for name, value in extra:
        request.response_header(name, value)
    http.respond(request, status, None)
    if status == 101 and not http.gone:
        _take_over(http, callbacks, agreement).start()
    return True


class Fields:
    """What of a request matters for the handshake."""

    def __init__(self, request: Request) -> None:
        self.head = request._prepared.head
        self.values: dict[str, list[str]] = {}
        for name, value in fields(request._block):
            self.values.setdefault(name, []).append(value)

    def has_token(self, name: str, token: str) -> bool:
        """Whether the comma-separated lists of fields `name` contain `token`, in any case."""
        return any(part.strip(" \t").lower() == token for part in ",".join(self.values.get(name, ())).split(","))

    def judge(self, server: Any) -> tuple[int, list[tuple[str, str]], Agreement | None]:
        """The status to answer with, the fields that go with it, and what was agreed on compression."""
        head = self.head
        if server.draining:
            return 503, [], None
        if head.method_name != "GET" or not head.minor or head.body_length:
            return 400, [], None
        if not self.has_token("upgrade", "websocket") or not self.has_token("connection", "upgrade"):
            return 400, [], None
        if self.values.get("sec-websocket-version") != [VERSION]:
            return 400, [("sec-websocket-version", VERSION)], None  # RFC 6455 4.4: what it may try instead
        keys = self.values.get("sec-websocket-key", [])
        if len(keys) != 1 or not _key(keys[0]):
            return 400, [], None
        agreement = None
        offers = self.values.get("sec-websocket-extensions")
        if offers and server.settings.websocket_deflate:
            try:
                agreement = negotiate(",".join(offers))
            except ValueError:
                return 400, [], None
        answer = [("upgrade", "websocket"), ("connection", "upgrade"), ("sec-websocket-accept", accept(keys[0]))]
        if agreement is not None:
            answer.append(("sec-websocket-extensions", agreement.field))
        return 101, answer, agreement


def accept(key: str) -> str:
    """The answer to a Sec-WebSocket-Key (RFC 6455 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode() + GUID, usedforsecurity=False).digest()).decode()


def _resolved(request: Request, given: Any) -> Callable[..., Any]:
    """A callback as something to call."""
    if given is None:
        return nothing
    if callable(given):
        return given  # type: ignore[no-any-return]
    if not isinstance(given, str):
        raise TypeError(f"a websocket callback is a callable, a name or None, not {type(given).__name__}")
    resolve = request._connection.server.resolve_name
    found = None
    if resolve is not None:
        try:
            found = resolve(given)
        except (AttributeError, LookupError, RuntimeError):
            found = None  # perhaps it stands beside the handler
    if not callable(found):
        found = _beside_handler(request, given)
    if not callable(found):
        raise RuntimeError(f"websocket callback {given!r}: there is no function of that name in the application")
    return found  # type: ignore[no-any-return]


def _beside_handler(request: Request, name: str) -> Any:
    """What `name`, "function" or "object.method", is in the module of the request's handler."""
    handler = request._prepared.handler
    while hasattr(handler, "__wrapped__"):
        handler = handler.__wrapped__
    found: Any = sys.modules.get(getattr(handler, "__module__", None) or "")
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


class _Rest:
    """What an HttpConnection has for a parser once its stream is another's: bytes it still has go on to that one."""

    idle = False
    empty_lines = 0
    buffered = 0

    def __init__(self, feed: Callable[[bytes], None]) -> None:
        self.feed = feed

    def next(self) -> None:
        """There are no more requests."""


def _take_over(
    http: Any, callbacks: tuple[Callable[..., Any], ...], agreement: Agreement | None
) -> WebSocketConnection:
    """Give the stream of `http` to a WebSocketConnection, and leave nothing behind that could touch it."""
    onconnect, onmsg, ondisconnect = callbacks
    peer = http.peer()
    bits = None if agreement is None else agreement.window_bits
    connection = WebSocketConnection(http, peer, (onconnect, onmsg, ondisconnect), bits)
    parser = http.parser
    if parser is not None and parser.buffered:
        # Of a request without a body nothing is left in the parser: what it holds is the client's first frames.
        connection.parser.feed(bytes(memoryview(parser._data)[parser._at :]))
        parser._data, parser._at = b"", 0
    http.parser = _Rest(connection.parser.feed)
    connection.half_closed, http.half_closed = http.half_closed, False
    http.ready = http.close_after = http.heading = False
    server = http.server
    server.connections.add(connection)
    server.closed(http)
    http.bucket = -NEVER  # the wheel is never to come by again
    stream = http.stream
    stream.owner = connection
    if getattr(stream, "receiver", None) is not None:
        stream.receiver = connection.received  # it is paused and hands over later what came meanwhile
    else:
        stream.received = connection.received
    peer.upgraded(connection, connection.send)
    members(server).add(connection)
    connection.watch()
    server.loop.call_soon(connection.parse_now)
    return connection
