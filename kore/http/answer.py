"""What a response becomes on the wire: a body of known length, chunks as they are produced, or no body at all.

The most common response never comes here (`Request.response` sends it itself); this is everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from kore.http.request import ANSWERED, ENDED, OPEN, STREAMING, Request
from kore.http.response import CHUNKED, JOIN_BYTES_MAX, LAST_CHUNK, chunk, has_no_body, pretty_page
from kore.reactor.trace import report_exception

if TYPE_CHECKING:
    from kore.http.connection import HttpConnection

ITEMS_MAX = 64
"""Items of a streamed body produced in one turn of the loop: the other connections want theirs."""

STREAM_BYTES = 65536
"""Bytes of a streamed body produced in one turn; no more before the client has taken them."""


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
            connection.write(connection.server.heads.interim(status, request._response_headers or ()))
        return True
    payload = _payload(connection, request, status, body)
    if connection.gone:
        request._state = ENDED
        if isinstance(payload, Chunks):
            payload.close()
            return False
        return True
    for name, value in request._response_headers or ():
        if name.lower() == "connection" and "close" in value.lower():
            connection.close_after = True
    if not request._prepared.keep_alive or connection.server.draining:
        connection.close_after = True
    if connection.receiving:
        streams = connection.body is not None and connection.body.streams
        if streams or not (request._prepared.drains and isinstance(payload, bytes)):
            connection.close_after = True  # its body is not read to the end
    if isinstance(payload, Chunks):
        _send_chunks(connection, request, status, payload)
    else:
        _send(connection, request, status, payload)
        if request._prepared.log is not None:
            unsent = request._prepared.is_head or has_no_body(status)
            connection.log_access(request, status, 0 if unsent else len(payload))
        if connection.task is not None and connection.request is request:
            connection.server.loop.call_soon(connection.release, request)
    return True


def _payload(connection: HttpConnection, request: Request, status: int, body: Any) -> bytes | Chunks:
    """The body as bytes, or as the iterable it is."""
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
        return Chunks(body)  # TypeError again when it is not iterable


def _send(connection: HttpConnection, request: Request, status: int, payload: bytes) -> None:
    """A body whose length is known."""
    prepared = request._prepared
    heads = connection.server.heads
    fields = request._response_headers
    bodyless = has_no_body(status)
    if not fields and prepared.head.minor and not bodyless and not connection.close_after:
        head = heads.plain_head(status, len(payload))
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


def _send_chunks(connection: HttpConnection, request: Request, status: int, chunks: Chunks) -> None:
    """A body of unknown length: chunks, or for HTTP/1.0 everything until the connection closes (RFC 9112 6.3)."""
    prepared = request._prepared
    minor = prepared.head.minor
    bodyless = has_no_body(status) or prepared.is_head
    first = b"" if bodyless else next(chunks, b"")  # before the head: what it raises is the handler's
    if not minor:
        connection.close_after = True
    length = CHUNKED if minor and not has_no_body(status) else None
    fields = request._response_headers or ()
    connection.write(connection.server.heads.build(status, minor, not connection.close_after, fields, length))
    if bodyless:
        chunks.close()
        request._state = ANSWERED
        connection.log_access(request, status, 0)
        return
    request._state = STREAMING
    connection.request = request
    connection.ready = False
    connection.client_address()  # for the log: it cannot be asked for once the client is gone
    connection.pump = Pump(connection, request, status, chunks)
    connection.pump.write(first)
    connection.pump.later()


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


class Chunks(Iterator[bytes]):
    """The items of a streamed body as bytes, empty ones left out. TypeError for an item of another type."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._iterator = iter(items)

    def __next__(self) -> bytes:
        while True:
            item = next(self._iterator)
            item = item.encode("utf-8", "surrogateescape") if isinstance(item, str) else bytes(memoryview(item))
            if item:
                return item

    def close(self) -> None:
        """Close the application's generator: GeneratorExit at its yield."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            try:
                close()
            except BaseException as error:  # noqa: BLE001 - the application's generator
                report_exception("pyhttp_iterobj_next", error)


class Pump:
    """Sends a streamed body: as much as one turn may have, then more when the client has taken it."""

    def __init__(self, connection: HttpConnection, request: Request, status: int, chunks: Chunks) -> None:
        self.connection = connection
        self.request = request
        self.status = status
        self.body_bytes = 0
        self.chunks = chunks
        self.chunked = request._prepared.head.minor == 1

    def write(self, item: bytes) -> None:
        """Send one item."""
        if item:
            self.body_bytes += len(item)
            self.connection.write(chunk(item) if self.chunked else item)

    def later(self) -> None:
        """Go on in the next turn."""
        self.connection.server.loop.call_soon(self.run)

    def run(self) -> None:
        """Produce one turn's worth."""
        connection = self.connection
        if connection.pump is not self or connection.stuck_at is not None:
            return  # the client is gone, or does not take what there is: drained() has us go on
        size = 0
        for _ in range(ITEMS_MAX):
            try:
                item = next(self.chunks)
            except StopIteration:
                if self.chunked:
                    connection.write(LAST_CHUNK)
                connection.streamed(self.request)
                return
            except BaseException as error:  # noqa: BLE001 - the application's iterator
                report_exception("pyhttp_iterobj_next", error)
                # No last chunk: the client must see that the body is not whole (RFC 9112 8).
                connection.close_after = True
                connection.streamed(self.request)
                return
            if connection.pump is not self:
                return  # the iterator closed the connection
            self.write(item)
            size += len(item)
            if size >= STREAM_BYTES:
                break
        self.later()

    def close(self) -> None:
        """The client is gone."""
        self.chunks.close()
