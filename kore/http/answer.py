"""What a response becomes on the wire: a body of known length, chunks as they are produced, or no body at all.

The most common response never comes here (`Request.response` sends it itself); this is everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from kore.http.produced import AsyncBody, Pump
from kore.http.request import ANSWERED, ENDED, OPEN, Request
from kore.http.response import CHUNKED, JOIN_BYTES_MAX, has_no_body, pretty_page

if TYPE_CHECKING:
    from kore.http.connection import HttpConnection


def respond(connection: HttpConnection, request: Request, status: Any, body: Any) -> bool:
    """Answer `request`; see `Request.response`. Raises ValueError, TypeError, RuntimeError for what cannot be sent."""
    if not isinstance(status, int) or not 100 <= status <= 999:
        raise ValueError(f"response status {status!r}: it must be a number from 100 to 999 (RFC 9110 15)")
    if request._state != OPEN:
        raise RuntimeError(f"{request!r} has been answered already")
    head = request._prepared.head
    if status < 200 and status != 101:
        # RFC 9110 15.2: interim responses are not for HTTP/1.0.
        if head.minor and not connection.gone:
            connection.write(connection.service.responses.interim(status, request._response_headers or ()))
        return True
    payload = _payload(connection, request, status, body)
    if connection.gone:
        request._state = ENDED
        if isinstance(payload, bytes):
            return True
        payload.discard()
        return False
    for name, value in request._response_headers or ():
        if name.lower() == "connection" and "close" in value.lower():
            connection.close_after = True
    if not request._prepared.keep_alive or connection.server.draining:
        connection.close_after = True
    if connection.receiving:
        streams = connection.body is not None and connection.body.streams
        if streams or not (request._prepared.drains and isinstance(payload, bytes)):
            connection.close_after = True  # its body is not read to the end
    if not isinstance(payload, bytes):
        _send_items(connection, request, status, payload)
    else:
        _send(connection, request, status, payload)
        if request._prepared.log is not None:
            unsent = request._prepared.is_head or has_no_body(status)
            connection.log_access(request, status, 0 if unsent else len(payload))
        if connection.task is not None and connection.request is request:
            connection.server.loop.call_soon(connection.release, request)
    return True


def _payload(connection: HttpConnection, request: Request, status: int, body: Any) -> bytes | Pump | AsyncBody:
    """The body as bytes, or what sends the iterable it is."""
    if body is None:
        if status < 400 or not connection.server.settings.http_pretty_error:
            return b""
        request.response_header("content-type", "text/html; charset=utf-8")
        return pretty_page(status)
    if isinstance(body, bytes):
        return body
    if isinstance(body, str):
        return body.encode("utf-8", "surrogateescape")
    try:
        return bytes(memoryview(body))
    except TypeError:
        if not hasattr(body, "__aiter__") or hasattr(body, "__iter__"):
            return Pump(connection, request, status, body)  # TypeError again when it is not iterable
    return AsyncBody(connection, request, status, body)


def _send(connection: HttpConnection, request: Request, status: int, payload: bytes) -> None:
    """A body whose length is known."""
    prepared = request._prepared
    heads = connection.service.responses
    fields = request._response_headers
    bodyless = has_no_body(status)
    if not fields and prepared.head.minor and not bodyless:
        head = heads.plain_head(status, len(payload), not connection.close_after)
    else:
        length = None if bodyless else len(payload)
        head = heads.build(status, prepared.head.minor, not connection.close_after, fields or (), length)
    request._state = ANSWERED
    if bodyless or prepared.is_head:
        connection.write(head)
    elif len(payload) > JOIN_BYTES_MAX:
        connection.write(head)
        connection.write(payload)
        connection.hold()
    else:
        connection.write(head + payload)


def _send_items(connection: HttpConnection, request: Request, status: int, items: Pump | AsyncBody) -> None:
    """A body of unknown length: chunks, or for HTTP/1.0 everything until the connection closes (RFC 9112 6.3)."""
    prepared = request._prepared
    minor = prepared.head.minor
    bodyless = has_no_body(status) or prepared.is_head
    if not bodyless:
        items.begin()  # before the head: what it raises is the handler's
        if request._state != OPEN:
            items.close()
            raise RuntimeError(f"{request!r} was answered by the body of its response")
    if not minor:
        connection.close_after = True
    length = CHUNKED if minor and not has_no_body(status) else None
    fields = request._response_headers or ()
    connection.write(connection.service.responses.build(status, minor, not connection.close_after, fields, length))
    if bodyless:
        items.discard()
        request._state = ANSWERED
        connection.log_access(request, status, 0)
        return
    items.started()


class Sender(Protocol):
    """What sends the body of a response in more than one turn; the connection's `pump`."""

    status: int
    """Of the response, for the access log."""
    body_bytes: int
    """Bytes of the body so far."""

    def later(self) -> None:
        """Go on in the next turn: the client has taken what there was."""

    def close(self) -> None:
        """The client is gone."""
