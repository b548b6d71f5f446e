"""The connection as an application sees it: `kore.connection`, one stable object for each client."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kore.driver import Stream
    from kore.http.connection import HttpConnection
    from kore.http.websocket.connection import WebSocketConnection
    from kore.tls.stream import TlsStream


class Peer:
    """A client's connection (kore-api.md section 11.1). Hashable; attributes of the application's own may be set."""

    def __init__(self, connection: HttpConnection, fd: int) -> None:
        self._connection: HttpConnection | WebSocketConnection | None = connection
        self._stream: Stream | TlsStream | None = connection.stream
        self._fd = fd
        self._websocket = False
        self._address: str | None = None

    @property
    def fd(self) -> int:
        """The socket's file descriptor; -1 once the client is gone."""
        return self._fd

    @property
    def addr(self) -> str:
        """The client's IP address. Raises RuntimeError for a UNIX socket, or when the client is gone."""
        if self._address is not None:
            return self._address
        if self._fd < 0:
            raise RuntimeError("the connection is closed: its address is no longer known")
        with socket.socket(fileno=os.dup(self._fd)) as sock:
            if sock.family == socket.AF_UNIX:
                raise RuntimeError("a UNIX socket has no IP address")
            return str(sock.getpeername()[0])

    @property
    def x509(self) -> bytes | None:
        """The client's certificate in DER; None without one, which only a domain with `client_verify` asks for."""
        stream = self._secure()
        return None if stream is None else stream.certificate()

    @property
    def x509dict(self) -> dict[str, dict[str, str]] | None:
        """The names in it: "subject" and "issuer", each by short names of attributes, "CN", "O"; None without one.

        Of attributes that are there more than once the last counts.
        """
        stream = self._secure()
        return None if stream is None else stream.certificate_names()

    def _secure(self) -> TlsStream | None:
        """The stream, where it is encrypted."""
        stream = self._stream
        return stream if stream is not None and hasattr(stream, "certificate") else None  # type: ignore[return-value]

    def disconnect(self) -> bool:
        """Close the connection once what was answered, and is still answered by the running handler, has left."""
        if self._connection is not None:
            self._connection.disconnect()
        return True

    def websocket_send(self, op: int, data: str | bytes | bytearray | memoryview, /) -> bool:
        """Send one message; a str as UTF-8. Returns True, also when the client is gone and it goes nowhere.

        `op` is WEBSOCKET_OP_TEXT or WEBSOCKET_OP_BINARY. It is sent at the end of this turn of the loop. A client that
        does not take its output is closed with 1013 when a mebibyte has piled up. Raises TypeError when this is no
        WebSocket, for another `op` and for data of another type; ValueError for text that is no UTF-8.
        """
        # While the WebSocket is open its own `send` stands in the place of this one.
        if not self._websocket:
            raise TypeError("websocket_send: this connection is no websocket")
        from kore.http.websocket.frames import checked  # only where there are websockets

        checked(op, data)
        return True

    def upgraded(self, connection: WebSocketConnection, send: Callable[..., bool]) -> None:
        """Told by the handshake: from now on this is a WebSocket."""
        try:
            self._address = self.addr  # for ondisconnect, when the socket may have gone
        except (OSError, RuntimeError):
            pass  # a UNIX socket has none
        self._connection = connection
        self._websocket = True
        vars(self)["websocket_send"] = send

    def lost(self) -> None:
        """Told by the connection: the client is gone."""
        self._connection = None
        self._fd = -1


Peer.__name__ = Peer.__qualname__ = "connection"
Peer.__module__ = "kore"
