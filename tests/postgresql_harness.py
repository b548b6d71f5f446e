"""What the tests of PostgreSQL share: a real server, started once a session, and what stands between it and us."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Self

import pytest
from reactor_harness import open_loop

from kore.clients.postgresql import queries
from tests.engines import ENGINES
from tests.postgresql_server import DATABASE as DATABASE
from tests.postgresql_server import USER as USER
from tests.postgresql_server import PostgresServer, Unavailable


class Relay:
    """A listener that passes all on to a server, in small pieces if told so, until it `stalls`."""

    def __init__(self, port: int, *, piece: int = 65536) -> None:
        self._target = port
        self._piece = piece
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.stalls = threading.Event()
        """Once set nothing is passed on any more, in either direction, and nobody is told."""
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            server = socket.create_connection(("127.0.0.1", self._target))
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            for source, sink, piece in ((client, server, 65536), (server, client, self._piece)):
                thread = threading.Thread(target=self._pass, args=(source, sink, piece), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pass(self, source: socket.socket, sink: socket.socket, piece: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(piece):
                if not self.stalls.is_set():
                    sink.sendall(data)
            if not self.stalls.is_set():
                sink.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
        for sock in self._sockets:
            sock.close()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """The server that most tests share; they leave it as they found it."""
    try:
        server = PostgresServer()
    except Unavailable as reason:
        pytest.skip(str(reason))
    try:
        yield server.start().set_up()
    finally:
        server.remove()


@pytest.fixture
def own_postgresql(postgresql: PostgresServer) -> Iterator[PostgresServer]:
    """A server for one test alone, which may restart it; not started. Made of a copy."""
    postgresql.psql("CHECKPOINT")
    server = PostgresServer(postgresql)
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture(params=ENGINES)
def loop(request) -> Iterator:
    """A loop on each engine; afterwards its pools are closed, and no database is declared any more."""
    opened = open_loop(request.param)
    made, log = next(opened)
    made.log_lines = log
    try:
        yield made
    finally:
        if not made.is_closed():
            made.run_until_complete(made.shutdown_asyncgens())
        queries.databases.clear()
        for _ in opened:
            pass


def declare(conninfo: str, *, name: str = "db", conn_max: int = 2, queue_max: int = 1000) -> None:
    """``dbsetup`` with limits of the test's own."""
    queries.declare(name, conninfo, conn_max, lambda: queue_max)
