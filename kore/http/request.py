"""The request as an application sees it: `kore.http_request`.

One object for each request, shared by everything that handles it; attributes of the application's own may be set
on it. What most handlers never ask for (header fields, the decoded body) is made when asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kore.http.head import fields
from kore.http.response import check_header

if TYPE_CHECKING:
    from kore.http.connection import HttpConnection
    from kore.http.peer import Peer
    from kore.http.server import Prepared

BODY_READ_MAX = 1024
"""Most bytes of one body_read(): the reference's bound."""

# Where a request stands.
OPEN = 0
ANSWERED = 1
STREAMING = 2
ENDED = 3


class Request:
    """An HTTP request (reference: "HTTP"; kore-api.md section 9). Made by the server, one for each request."""

    # Class attributes are the defaults: an instance stores only what differs, which halves the cost of making one.
    _state = OPEN
    _body: bytes = b""
    _position = 0
    _fields: list[tuple[str, str]] | None = None
    _response_headers: list[tuple[str, str]] | None = None

    def __init__(self, connection: HttpConnection, prepared: Prepared, block: bytes) -> None:
        self._connection = connection
        self._prepared = prepared
        self._block = block

    def __repr__(self) -> str:
        head = self._prepared.head
        return f"<kore.http_request {head.method_name} {head.target}>"

    # --- what was asked ------------------------------------------------------------------------------------

    @property
    def host(self) -> str:
        """The Host field as sent, port included; the target's authority where it has one; "" without either."""
        return self._prepared.head.host

    @property
    def path(self) -> str:
        """The path as sent, not decoded and without the query; bytes from 0x80 are UTF-8 with surrogateescape."""
        return self._prepared.head.path

    @property
    def query(self) -> str | None:
        """What follows the first "?" of the target, as sent; None without one."""
        return self._prepared.head.query

    @property
    def method(self) -> int:
        """One of the HTTP_METHOD_ constants."""
        return self._prepared.head.method

    @property
    def protocol(self) -> str:
        """"https" or "http", by the server the request came in on."""
        return self._connection.service.protocol

    @property
    def agent(self) -> str | None:
        """The User-Agent field, None without one."""
        return self.request_header("user-agent")

    @property
    def connection(self) -> Peer | None:
        """The client's connection (`kore.connection`), the same object each time; None once the client is gone."""
        if self._response_headers is None:
            self._response_headers = []  # off the short way: who sees the connection may close it
        return self._connection.peer()

    def headers(self) -> dict[str, str]:
        """All header fields: ``host`` first, names in lower case, of repeated fields the last."""
        found = {"host": self.host} if self.host else {}
        for name, value in self._all_fields():
            if name != "host":
                found[name] = value
        return found

    def request_header(self, name: str, /) -> str | None:
        """The first field of that name, whatever its case; None without one."""
        wanted = str.lower(name)  # TypeError for what is no str
        for found, value in self._all_fields():
            if found == wanted:
                return value
        return None

    def _all_fields(self) -> list[tuple[str, str]]:
        if self._fields is None:
            self._fields = fields(self._block)
        return self._fields

    # --- the body ------------------------------------------------------------------------------------------

    @property
    def body(self) -> bytes:
        """The whole body; ``b""`` without one. Leaves body_read() at its end."""
        self._position = len(self._body)
        return self._body

    def body_read(self, length: int, /) -> tuple[int, bytes]:
        """The next at most `length` bytes of the body and how many they are; ``(0, b"")`` at its end.

        Raises RuntimeError for more than 1024 bytes at once (the reference's bound), ValueError for a negative length.
        """
        if length > BODY_READ_MAX:
            raise RuntimeError(f"body_read({length}): at most {BODY_READ_MAX} bytes at once")
        if length < 0:
            raise ValueError(f"body_read({length}): the length must not be negative")
        data = self._body[self._position : self._position + length]
        self._position += len(data)
        return len(data), data

    # --- the answer ----------------------------------------------------------------------------------------

    def response_header(self, name: str, value: str, /) -> bool:
        """Add a field to the response; one of the same name is replaced, but ``set-cookie`` may be given repeatedly.

        Fields that follow from the framing (content-length, transfer-encoding, keep-alive) are kore's own and left
        out; ``connection: close`` closes the connection after the response. Raises ValueError for a name or value that
        HTTP forbids (RFC 9110 5.1, 5.5), TypeError when one is not a str. Returns True.
        """
        check_header(name, value)
        headers = self._response_headers
        if headers is None:
            self._response_headers = [(name, value)]
            return True
        lower = name.lower()
        if lower != "set-cookie":
            headers[:] = [field for field in headers if field[0].lower() != lower]
        headers.append((name, value))
        return True

    def response(
        self, status: int, body: bytes | bytearray | memoryview | str | Iterable[str | bytes] | None, /
    ) -> bool:
        """Answer the request.

        `body` is bytes, a str (sent as UTF-8), None for no body, or an iterable of either, which is sent in
        chunks as it is produced and the client takes it. The first answer counts: a second one raises RuntimeError.
        Statuses from 100 to 199 are interim and may come before. Returns True; False when an iterable was given and
        the client is gone.
        """
        if self._state == OPEN and type(body) is bytes and self._response_headers is None:
            # The hot path: status and length are known from an earlier response of this second.
            head = self._prepared.heads.get((status, len(body)))
            if head is not None:
                self._state = ANSWERED
                self._connection.write(head + body)
                return True
        return self._connection.respond(self, status, body)

    def _failed(self, error: BaseException, label: str) -> None:
        self._connection.failed(self, error, label)

    def _handler_ended(self, error: BaseException | None) -> None:
        self._connection.handler_ended(self, error)


Request.__name__ = Request.__qualname__ = "http_request"
Request.__module__ = "kore"
