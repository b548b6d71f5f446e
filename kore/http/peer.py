"""The connection as an application sees it: `kore.connection`, one stable object for each client."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kore.http.connection import HttpConnection


class Peer:
    """A client's connection (kore-api.md section 11.1). Hashable; attributes of the application's own may be set."""

    def __init__(self, connection: HttpConnection, fd: int) -> None:
        self._connection: HttpConnection | None = connection
        self._fd = fd

    @property
    def fd(self) -> int:
        """The socket's file descriptor; -1 once the client is gone."""
        return self._fd

    @property
    def addr(self) -> str:
        """The client's IP address. Raises RuntimeError for a UNIX socket, or when the client is gone."""
        if self._fd < 0:
            raise RuntimeError("the connection is closed: its address is no longer known")
        with socket.socket(fileno=os.dup(self._fd)) as sock:
            if sock.family == socket.AF_UNIX:
                raise RuntimeError("a UNIX socket has no IP address")
            return str(sock.getpeername()[0])

    @property
    def x509(self) -> None:
        """The client's certificate: None, as the connection is not encrypted."""
        return None

    @property
    def x509dict(self) -> None:
        """The client's certificate as a dict: None, as the connection is not encrypted."""
        return None

    def disconnect(self) -> bool:
        """Close the connection once what was answered, and is still answered by the running handler, has left."""
        if self._connection is not None:
            self._connection.disconnect()
        return True

    def lost(self) -> None:
        """Told by the connection: the client is gone."""
        self._connection = None
        self._fd = -1


Peer.__name__ = Peer.__qualname__ = "connection"
Peer.__module__ = "kore"
