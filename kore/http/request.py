"""The request as an application sees it: `kore.http_request`.

One object for each request, shared by everything that handles it; attributes of the application's own may be set
on it. What most handlers never ask for (header fields, arguments, forms, cookies) is made when asked for, and the
modules that make it are loaded then.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from kore.http.head import fields
from kore.http.response import check_header
from kore.http.upload import UploadedFile, body_length, body_piece, check_length

if TYPE_CHECKING:
    from kore.http.asgi.exchange import Exchange
    from kore.http.connection import HttpConnection
    from kore.http.multipart import ComingForm, Part
    from kore.http.peer import Peer
    from kore.http.server import Prepared
    from kore.http.upload import Body

DIGEST_OF_NOTHING = bytes(32)
"""The body_digest of a request without a body."""

Found = TypeVar("Found", str, UploadedFile)

# Where a request stands.
OPEN = 0
ANSWERED = 1
STREAMING = 2
ENDED = 3


class Request:
    """An HTTP request (reference: "HTTP"; kore-api.md section 9). Made by the server, one for each request."""

    # Class attributes are the defaults: an instance stores only what differs, which halves the cost of making one.
    _state = OPEN
    _body: Body = b""
    _position = 0
    _fields: list[tuple[str, str]] | None = None
    _response_headers: list[tuple[str, str]] | None = None
    _arguments: dict[str, str] | None = None
    _files: dict[str, UploadedFile] | None = None
    _cookies: dict[str, str] | None = None
    _parts: list[Part] | None = None  # of a multipart body, once it was looked at
    _form: ComingForm | None = None  # a large one, which was read while it came
    _verdicts: dict[tuple[int, str], bool] | None = None  # of rules that were awaited, by rule and value
    _exchange: Exchange | None = None  # what carries it to an application that is mounted

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
        """The whole body; ``b""`` without one. Leaves body_read() at its end.

        Raises RuntimeError when the route's on_body_chunk took it. One that is on disk is read into memory.
        """
        body = self._body
        self._position = length = body_length(body)
        return body if isinstance(body, bytes) else body.read(0, length)

    @property
    def body_path(self) -> str | None:
        """The file the body is in when it was too large for memory (http_body_disk_offload), else None."""
        return None if isinstance(self._body, bytes) else self._body.path

    @property
    def body_digest(self) -> bytes:
        """The SHA-256 of the body, 32 bytes; all of them zero when there is no body."""
        body = self._body
        if not body_length(body):
            return DIGEST_OF_NOTHING
        if not isinstance(body, bytes):
            return body.digest()
        from hashlib import sha256

        return sha256(body).digest()

    def body_read(self, length: int, /) -> tuple[int, bytes]:
        """The next at most `length` bytes of the body and how many they are; ``(0, b"")`` at its end.

        Raises RuntimeError for more than 1024 bytes at once (the reference's bound) and when the route's on_body_chunk
        took the body; ValueError for a negative length.
        """
        check_length("body_read", length)
        data = body_piece(self._body, self._position, length)
        self._position += len(data)
        return len(data), data

    # --- what it carries -----------------------------------------------------------------------------------
    # An argument is taken when the route has a rule for its name, and its value passes; all others are dropped
    # without a word. Of several of one name the first that passes counts, also over several calls.

    def populate_get(self) -> bool:
        """Take the arguments of the query string, by the rules of ``get`` (for GET and HEAD) and ``qs``.

        Values are text: invalid UTF-8 and control characters drop an argument. With more than 1000 arguments none is
        taken, which is logged. Returns True.
        """
        from kore.http.parameters import populate_get

        populate_get(self)
        return True

    def populate_post(self) -> bool:
        """Take the arguments of an ``application/x-www-form-urlencoded`` body, by the rules of the request's method.

        A body of another type is left alone. As for populate_get(), except that line ends and tabs are allowed;
        nothing is taken of more than 8 MiB. The body stays as it is. Returns True.
        """
        from kore.http.parameters import populate_post

        populate_post(self)
        return True

    def populate_multi(self) -> bool:
        """Take the fields of a ``multipart/form-data`` body, by the rules of the request's method, and its files.

        A body of another type is left alone. Raises `kore.errors.BodyError`, a ValueError, for a malformed or cut-off
        body and one with too many parts (1000) or too large fields (8 MiB in all): left uncaught, it is the client's
        fault and answered with 400 or 413. Returns True.
        """
        from kore.http.parameters import populate_multi

        populate_multi(self)
        return True

    populate_multipart = populate_multi
    """The same: the reference has both names."""

    def populate_cookies(self) -> bool:
        """Take the cookies of all Cookie fields; none, which is logged, of more than 180. Returns True."""
        from kore.http.cookies import cookies_of

        if self._cookies is None:
            self._cookies = cookies_of(self)
        return True

    def argument(self, name: str, /) -> str | None:
        """The argument of exactly that name; None when no populate function took one."""
        return _found(self._arguments, name)

    def cookie(self, name: str, /) -> str | None:
        """The cookie of exactly that name, not decoded; None without one and before populate_cookies()."""
        return _found(self._cookies, name)

    def file_lookup(self, name: str, /) -> UploadedFile | None:
        """The file (`kore.http_file`) of the form's field `name`; None without one and before populate_multi().

        One that is empty and has no name is none: that is how browsers send an input in which nothing was chosen.
        """
        return _found(self._files, name)

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
        self, status: int,
        body: bytes | bytearray | memoryview | str | Iterable[str | bytes] | AsyncIterable[str | bytes] | None, /,
    ) -> bool:  # fmt: skip
        """Answer the request.

        `body` is bytes, a str (sent as UTF-8), None for no body, or an iterable of either, which is sent in chunks
        as it is produced and the client takes it (RFC 9112 7.1; to HTTP/1.0 without, up to the end of the connection).

        An asynchronous iterable, such as an async generator, may wait between its items, also after the handler has
        ended: events, the output of a command, rows of a query. Each item leaves at the end of the loop's turn; no
        more are asked for before the client has taken some 64 KiB. When the client leaves, or takes nothing for
        ``http_write_timeout`` seconds, it is closed: GeneratorExit at its await or yield. One that has sent its FIN is
        taken to have left once nothing was sent for thirty seconds.

        What an iterable raises before its first item, and before it waits for anything, is raised here; later it is
        logged, and the connection ends without the last chunk, so that the client can tell.

        The first answer counts: a second one raises RuntimeError. Statuses from 100 to 199 are interim and may come
        before. Returns True; False when an iterable was given and the client is gone.
        """
        if self._state == OPEN and type(body) is bytes and self._response_headers is None:
            # The hot path: status and length are known from an earlier response of this second.
            head = self._prepared.heads.get((status, len(body)))
            if head is not None:
                self._state = ANSWERED
                self._connection.write(head + body)
                return True
        return self._connection.respond(self, status, body)

    def websocket_handshake(self, onconnect: Any, onmsg: Any, ondisconnect: Any, /) -> bool:
        """Make a WebSocket of the connection (RFC 6455 4.2); the functions are called for what happens on it.

        Each is a callable or the name of one: ``onconnect(connection)``, ``onmsg(connection, op, data)``,
        ``ondisconnect(connection)``; None for none. What is no handshake is answered with an error. Raises
        RuntimeError when the request has been answered. Returns True.
        """
        from kore.http.websocket.handshake import handshake

        if self._state != OPEN:
            raise RuntimeError(f"{self!r} has been answered already")
        handshake(self, onconnect, onmsg, ondisconnect)
        return True

    def _failed(self, error: BaseException, label: str) -> None:
        self._connection.failed(self, error, label)

    def _handler_ended(self, error: BaseException | None) -> None:
        self._connection.handler_ended(self, error)


def _found(kept: dict[str, Found] | None, name: str) -> Found | None:
    """What was kept under `name`. TypeError for a name that is no str."""
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, not {type(name).__name__}")
    return None if kept is None else kept.get(name)


Request.__name__ = Request.__qualname__ = "http_request"
Request.__module__ = "kore"
