"""One HTTP request and its response, as ASGI's messages (ASGI, "HTTP & WebSocket" 2.3).

The straight line is `call` -> the application -> `send` -> `write`: a request without a body and a response in one
piece need no task and no queue, and a response like one of this second is one look-up and one concatenation.

A body is read while the application receives it and no faster; what is sent piece by piece waits until the client has
taken it. The exchange is the connection's `Receiver` for the one and its `Sender` for the other.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any, Final

from kore.http.asgi.exchange import TURN_BYTES, ClientGoneError, Exchange, Message, Turn, header_pairs
from kore.http.request import ANSWERED, ENDED, OPEN, STREAMING
from kore.http.response import CHUNKED, JOIN_BYTES_MAX, LAST_CHUNK, check_header, chunk, has_no_body
from kore.http.send_file import send as send_file

if TYPE_CHECKING:
    from kore.http.asgi.mount import Mount
    from kore.http.request import Request

PIECES_MAX: Final = 1024
"""Pieces of a body kept apart before they are joined: a client may send a byte in each."""

EXTENSIONS: Final[dict[str, dict[str, Any]]] = {"http.response.pathsend": {}, "http.response.early_hint": {}}


class HttpExchange(Exchange):
    """Made for each request: by the connection when a body comes, otherwise by the mount."""

    streams = True
    count = 0  # bytes of the request's body so far
    whole = False  # all of it has come
    told = False  # and the application knows
    status = 0
    body_bytes = 0  # of the response so far
    stated: int | None = None  # the response's content-length by the application
    chunked = False
    silent = False  # the response has no body, whatever the application sends
    start: Message | None = None

    def __init__(self, mount: Mount, request: Request) -> None:
        super().__init__(mount, request)
        self.pieces: list[bytes] = []

    async def run(self, scope: Message) -> None:
        """Run the application for this request."""
        try:
            await self.call(scope, self.receive, self.send)
        except BaseException:
            self._broken_off()
            raise
        if self.connection.pump is self:
            self.connection.server.log_error(f"{self.request!r}: the application ended before its response was whole")
            self._broken_off()

    # --- the request's body: what the connection calls ---------------------------------------------------------

    def write(self, piece: bytes) -> bool:
        """A piece of the body has come."""
        self.count += len(piece)
        self.pieces.append(piece)
        if len(self.pieces) >= PIECES_MAX:
            self.pieces[:] = [b"".join(self.pieces)]
        connection = self.connection
        if connection.pulling and self.count != self.request._prepared.head.body_length:
            connection.pulled()  # after the last piece its end is taken as well
        self.wake()
        return True

    def end(self) -> None:
        """All of it has come."""
        self.whole = True
        self.wake()

    def discard(self) -> None:
        """No more of it comes."""
        if not self.whole:
            self.left()

    # --- the response: what the connection calls ---------------------------------------------------------------

    def later(self) -> None:
        """The client has taken what there was."""
        self.wake()
        if self.connection.pulling:
            self.connection._continue()

    def close(self) -> None:
        """The client has left in the middle of the response."""
        self.left()

    # --- what the application calls ----------------------------------------------------------------------------

    async def receive(self) -> Message:
        """The next message to the application."""
        while True:
            if self.pieces:
                body = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
                self.pieces.clear()
                self.told = self.whole
                return {"type": "http.request", "body": body, "more_body": not self.whole}
            if self.whole and not self.told:
                self.told = True
                return {"type": "http.request", "body": b"", "more_body": False}
            if self.gone or self.request._state in (ANSWERED, ENDED):
                return {"type": "http.disconnect"}
            await self.changed(None if self.whole else self.connection.pull)

    async def send(self, message: Message) -> None:
        """Take a message of the application. Raises ClientGoneError; RuntimeError for what is out of order."""
        kind = message["type"]
        if self.gone:
            raise ClientGoneError("the client has left")
        state = self.request._state
        if kind == "http.response.body":
            body = message.get("body", b"")
            if type(body) is not bytes:
                body = bytes(memoryview(body))  # of a number, bytes() would make so many zeros
            more = message.get("more_body", False)
            if self.start is None:
                raise RuntimeError("http.response.body came before http.response.start")
            if state == OPEN:
                if not more:
                    self._whole_response(body)
                    return
                self._begin(self.start)
            elif state != STREAMING or self.connection.pump is not self:
                raise RuntimeError("http.response.body came after the end of the response")
            self._piece(body, more=more)
            if more and (self.unflushed >= TURN_BYTES or self.connection.stuck_at is not None):
                await self._taken()
        elif kind == "http.response.start":
            if self.start is not None or state != OPEN:
                raise RuntimeError("http.response.start came twice")
            status = message["status"]
            if type(status) is not int or not 200 <= status <= 999:
                raise ValueError(f"http.response.start: status {status!r}; allowed are 200 to 999")
            self.start = message
        elif kind == "http.response.pathsend":
            self._send_path(message["path"])
        elif kind == "http.response.early_hint":
            self._hint(message.get("links", ()))
        else:
            raise ValueError(f"{kind!r} is no message of an HTTP response")

    async def _taken(self) -> None:
        """Wait until the client has taken what was sent, as far as it is more than the kernel's buffers hold."""
        self.unflushed = 0
        await Turn()
        while self.connection.stuck_at is not None and not self.gone:
            await self.changed()

    # --- the response --------------------------------------------------------------------------------------

    def _whole_response(self, body: bytes) -> None:
        """A response in one piece. The hot path: its head is known from an earlier one of this second."""
        request, connection, start = self.request, self.connection, self.start
        assert start is not None
        heads = connection.service.responses
        headers = start.get("headers", ())
        if type(headers) is not list:
            headers = list(headers)
        key = None
        if (
            request._prepared.heads is heads.plain
            and connection.task is None
            and not connection.close_after
            and not connection.receiving
            and not request._response_headers
            and len(body) <= JOIN_BYTES_MAX
        ):
            key = (start["status"], len(body), *headers)
            try:
                head = heads.others.get(key)
            except TypeError:
                key = head = None  # pairs that are lists cannot be looked up
            if head is not None:
                request._state = ANSWERED
                connection.write(head + body)
                if self.waiters:
                    self.wake()
                return
        status = start["status"]
        fields, close = self._fields(headers)
        bodyless = has_no_body(status)
        is_head = request._prepared.is_head
        length: int | None = len(body)
        if is_head:
            length = self.stated if self.stated is not None else length or None
        elif self.stated is not None and self.stated != length and not bodyless:
            raise RuntimeError(f"{request!r}: content-length says {self.stated}, the body has {length} bytes")
        head = self._head(status, fields, None if bodyless else length, close=close)
        if key is not None and not connection.close_after:
            heads.keep(key, head)
        if bodyless or is_head:
            connection.write(head)
        elif len(body) > JOIN_BYTES_MAX:
            connection.write(head)
            connection.write(body)
            connection.hold()
        else:
            connection.write(head + body)
        self._answered(status, 0 if bodyless or is_head else len(body))

    def _begin(self, start: Message) -> None:
        """The head of a response that comes in pieces."""
        request, connection = self.request, self.connection
        prepared = request._prepared
        status = start["status"]
        fields, close = self._fields(start.get("headers", ()))
        bodyless = has_no_body(status)
        self.silent = bodyless or prepared.is_head
        length: int | str | None = self.stated
        if bodyless:
            length = None
        elif length is None:
            length = CHUNKED if prepared.head.minor else None
            close = close or not prepared.head.minor  # RFC 9112 6.3: then only closing ends it
        self.chunked = length is CHUNKED
        self.status = status
        if prepared.log is not None:
            connection.client_address()  # it cannot be asked for once the client is gone
        connection.write(self._head(status, fields, length, close=close))
        request._state = STREAMING
        connection.request = request
        connection.ready = False
        connection.pump = self

    def _piece(self, body: bytes, *, more: bool) -> None:
        """Send a piece of the body, perhaps the last."""
        connection = self.connection
        size = len(body)
        if self.silent:
            self.unflushed += size
        elif size:
            if self.stated is not None and self.body_bytes + size > self.stated:
                raise RuntimeError(f"{self.request!r}: the body is longer than content-length: {self.stated} says")
            self.body_bytes += size
            self.unflushed += size
            connection.write(chunk(body) if self.chunked else body)
        if more:
            return
        if not self.silent:
            if self.chunked:
                connection.write(LAST_CHUNK)
            elif self.stated is not None and self.body_bytes < self.stated:
                raise RuntimeError(f"{self.request!r}: content-length says {self.stated}, sent are {self.body_bytes}")
        self._answered(self.status, self.body_bytes)

    def _fields(self, headers: Any) -> tuple[list[tuple[str, str]], bool]:
        """The application's fields, checked, and whether they ask for the connection to be closed."""
        fields = header_pairs(headers)
        close = False
        for name, value in fields:
            check_header(name, value)
            lower = name.lower()
            if lower == "content-length":
                if not (value.isascii() and value.isdigit()) or self.stated not in (None, int(value)):
                    raise ValueError(f"{self.request!r}: content-length {value!r}: it is one decimal number")
                self.stated = int(value)
            elif lower == "connection":
                close = close or "close" in value.lower()
        return fields, close

    def _head(self, status: int, fields: list[tuple[str, str]], length: int | str | None, *, close: bool) -> bytes:
        """The response's head; what it says of the connection is what will be done with it."""
        request, connection = self.request, self.connection
        server, prepared = connection.server, request._prepared
        # A body that is not there yet may never be read to its end.
        if close or connection.receiving or server.draining or not prepared.keep_alive:
            connection.close_after = True
        for name, value in request._response_headers or ():  # a prerequest's
            fields.append((name, value))
        heads = connection.service.responses
        return heads.build(status, prepared.head.minor, not connection.close_after, fields, length)

    def _answered(self, status: int, body_bytes: int) -> None:
        """The response is complete: what the application still does, it does for itself."""
        request, connection = self.request, self.connection
        request._state = ANSWERED
        if connection.pump is self:
            connection.pump = None
        if connection.receiving and connection.request is request:
            connection.receiving = connection.early = connection.pulling = False
            connection.body = None
        connection.log_access(request, status, body_bytes)
        if connection.task is not None and connection.request is request:
            connection.server.loop.call_soon(connection.release, request)
        self.wake()

    def _broken_off(self) -> None:
        """The application has ended in the middle of its response: the client must see that (RFC 9112 8)."""
        if self.connection.pump is self:
            self.connection.close_after = True
            self._answered(self.status, self.body_bytes)

    # --- extensions ----------------------------------------------------------------------------------------

    def _send_path(self, path: str) -> None:
        """The body is a file; it goes as kore's own files do. Raises OSError for one that is not to be had."""
        if self.start is None or self.request._state != OPEN:
            raise RuntimeError("http.response.pathsend came where no body belongs")
        fields, _ = self._fields(self.start.get("headers", ()))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise OSError(f"http.response.pathsend: {path!r} is not a regular file")
        status = self.start["status"]
        if has_no_body(status):
            os.close(fd)
            self._whole_response(b"")
            return
        send_file(self.request, status, tuple(fields), [(0, found.st_size)], fd, self.mount.pipes)
        self.wake()  # it may have been answered already: by its head alone

    def _hint(self, links: Any) -> None:
        """103 (Early Hints), RFC 8297."""
        connection = self.connection
        if self.request._state != OPEN:
            raise RuntimeError("http.response.early_hint came after the response")
        if self.request._prepared.head.minor:
            fields = header_pairs((b"link", link) for link in links)
            for name, value in fields:
                check_header(name, value)
            connection.write(connection.service.responses.interim(103, fields))
