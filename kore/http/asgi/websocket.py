"""One WebSocket, as ASGI's messages (ASGI, "WebSocket"): accepted or refused by the application, then both ways.

The application is asked before the handshake is answered. Messages wait for it within bounds, then the client is not
read; what it sends waits for the client. How the connection ends, it hears by code and reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from kore.http.asgi.exchange import TURN_BYTES, ClientGoneError, Exchange, Message, Turn, header_pairs
from kore.http.asgi.http import HttpExchange
from kore.http.request import OPEN
from kore.http.websocket.frames import BINARY, INTERNAL_ERROR, NORMAL, TEXT
from kore.http.websocket.handshake import Fields, handshake

if TYPE_CHECKING:
    from kore.http.asgi.mount import Mount
    from kore.http.peer import Peer
    from kore.http.request import Request
    from kore.http.websocket.connection import WebSocketConnection

INBOX_MAX: Final = 16
"""Messages that wait for the application; behind them wait the connection's own, and then the client is not read."""

CODES = range(1000, 5000)
UNSENDABLE = frozenset({1004, 1005, 1006, 1015})
"""Codes that no Close may have (RFC 6455 7.4.1)."""

EXTENSIONS: Final[dict[str, dict[str, Any]]] = {"websocket.http.response": {}}


def websocket(mount: Mount, request: Request) -> tuple[bool, Coroutine[Any, Any, None] | None]:
    """Whether `request` wants a WebSocket, and the application's run for it; None when it is no proper handshake."""
    fields = Fields(request)
    if not fields.has_token("upgrade", "websocket"):
        return False, None
    status, extra, _ = fields.judge(request._connection.server)
    if status != 101:
        for name, value in extra:
            request.response_header(name, value)
        request.response(status, None)
        return True, None
    offered = ",".join(fields.values.get("sec-websocket-protocol", ())).split(",")
    scope = mount.scope(request)
    scope["type"] = "websocket"
    scope["scheme"] = "wss" if scope["scheme"] == "https" else "ws"
    scope["subprotocols"] = [text for text in map(str.strip, offered) if text]
    scope["extensions"] = EXTENSIONS.copy()
    del scope["method"]
    exchange = WebSocketExchange(mount, request)
    request._exchange = exchange
    return True, exchange.run(scope)


class WebSocketExchange(Exchange):
    """Made for each handshake."""

    announced = False  # the application knows that the client asks
    websocket: WebSocketConnection | None = None  # once it is accepted
    closed = False  # by the application
    over = False  # nothing more comes
    uncounted = False  # it is no running handler for the server: its connection is counted
    denial: HttpExchange | None = None  # the application answers with a response of its own
    code = 1006
    reason = ""

    def __init__(self, mount: Mount, request: Request) -> None:
        super().__init__(mount, request)
        self.inbox: deque[Message] = deque()

    async def run(self, scope: Message) -> None:
        """Run the application for this WebSocket."""
        code = INTERNAL_ERROR
        try:
            await self.call(scope, self.receive, self.send)
            code = NORMAL
        finally:
            if self.denial is not None:
                self.denial._broken_off()
            elif self.websocket is not None:
                self.websocket.close(code)
                self._count()

    # --- what the connections call ------------------------------------------------------------------------------

    def suspended(self, task: Any) -> None:
        """The application waits; of an accepted WebSocket it may do so as long as that is open."""
        super().suspended(task)
        if self.websocket is not None and not self.over:
            self._uncount()

    def left(self) -> None:
        """The client has left before it was accepted."""
        super().left()
        if self.denial is not None:
            self.denial.left()

    def _uncount(self) -> None:
        self.connection.server.active -= 1
        self.uncounted = True

    def _count(self) -> None:
        """Its connection is over while it still runs: from here on the server waits for it, or is told of its end."""
        if self.uncounted:
            self.uncounted = False
            self.connection.server.active += 1

    def _opened(self, peer: Peer) -> None:
        self.websocket = peer._connection  # type: ignore[assignment]
        assert self.websocket is not None
        self.websocket.taken = self.wake
        if self.task is not None:
            self._uncount()

    def _heard(self, _peer: Peer, op: int, data: str | bytes) -> Coroutine[Any, Any, None] | None:
        """A message has come. What is returned holds up those behind it."""
        key = "text" if op == TEXT else "bytes"
        self.inbox.append({"type": "websocket.receive", key: data})
        self.wake()
        return self._room() if len(self.inbox) >= INBOX_MAX else None

    async def _room(self) -> None:
        while len(self.inbox) >= INBOX_MAX and self.running:
            await self.changed()

    def _ended(self, _peer: Peer) -> None:
        """The connection has ended, and all that came before has been told."""
        assert self.websocket is not None
        self.code, self.reason = self.websocket.ending
        self.over = self.gone = True
        if self.running:
            self._count()
        self.wake()

    # --- what the application calls ----------------------------------------------------------------------------

    async def receive(self) -> Message:
        """The next message to the application."""
        if not self.announced:
            self.announced = True
            return {"type": "websocket.connect"}
        while True:
            if self.inbox:
                message = self.inbox.popleft()
                if len(self.inbox) == INBOX_MAX - 1:
                    self.wake()
                return message
            if self.over or self.gone or (self.websocket is None and self.request._state != OPEN):
                return {"type": "websocket.disconnect", "code": self.code, "reason": self.reason}
            await self.changed()

    async def send(self, message: Message) -> None:
        """Take a message of the application. Raises ClientGoneError; RuntimeError for what is out of order."""
        kind = message["type"]
        if self.gone:
            raise ClientGoneError("the client has left")
        if self.websocket is not None and not self.closed:
            if kind == "websocket.send":
                await self._message(message)
            elif kind == "websocket.close":
                self._close(message.get("code", NORMAL), message.get("reason") or "")
            else:
                raise RuntimeError(f"{kind!r} came after websocket.accept")
        elif self.denial is not None and kind.startswith("websocket.http.response."):
            await self.denial.send({**message, "type": kind.removeprefix("websocket.")})
        elif self.websocket is not None or self.denial is not None or self.request._state != OPEN:
            raise RuntimeError(f"{kind!r} came after the end")
        elif kind == "websocket.accept":
            self._accept(message)
        elif kind == "websocket.close":
            self.request.response(403, None)
        elif kind == "websocket.http.response.start":
            self.denial = HttpExchange(self.mount, self.request)
            self.denial.whole = True
            await self.denial.send({**message, "type": "http.response.start"})
        else:
            raise RuntimeError(f"{kind!r} came before websocket.accept")

    def _accept(self, message: Message) -> None:
        request = self.request
        for name, value in header_pairs(message.get("headers") or ()):
            request.response_header(name, value)
        subprotocol = message.get("subprotocol")
        if subprotocol is not None:
            request.response_header("sec-websocket-protocol", subprotocol)
        handshake(request, self._opened, self._heard, self._ended)
        if self.websocket is None:
            self.gone = True  # the server stops, or the client has left just now
            raise ClientGoneError("the WebSocket could not be opened any more")

    async def _message(self, message: Message) -> None:
        """Send a message, and wait until the client takes its output."""
        websocket = self.websocket
        assert websocket is not None
        data = message.get("bytes")
        if data is None:
            data = message["text"]
            websocket.send(TEXT, data)
        else:
            websocket.send(BINARY, data)
        self.unflushed += len(data)
        if self.unflushed >= TURN_BYTES or websocket.stuck_at is not None:
            self.unflushed = 0
            await Turn()
            while websocket.stuck_at is not None and not self.gone:
                await self.changed()

    def _close(self, code: int, reason: str) -> None:
        if type(code) is not int or code not in CODES or code in UNSENDABLE:
            raise ValueError(f"websocket.close: code {code!r}; allowed are 1000 to 4999 but for {sorted(UNSENDABLE)}")
        assert self.websocket is not None
        self.closed = True
        self.websocket.close(code, reason)
