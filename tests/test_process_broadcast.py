"""kore.websocket_broadcast over real workers: every client once, never the one it came from, also after restarts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct

import pytest

from tests.support import SECONDS, pids_of, starter, wait_until

APP = """
SCOPES = {"local": kore.WEBSOCKET_BROADCAST_LOCAL, "global": kore.WEBSOCKET_BROADCAST_GLOBAL}

def onconnect(c):
    c.websocket_send(kore.WEBSOCKET_OP_TEXT, str(os.getpid()))

def onmessage(c, op, data):
    scope, _, text = data.partition(" ")
    kore.websocket_broadcast(c if scope in SCOPES else None, op, text, SCOPES.get(scope, 2))
    c.websocket_send(kore.WEBSOCKET_OP_TEXT, "sent")

@kore.route("/chat", domain=home, methods=["get"])
def chat(req):
    req.websocket_handshake("onconnect", "onmessage", None)
"""


class Client:
    """A WebSocket client of a few lines; `pid` is that of its worker."""

    def __init__(self, address):
        self.sock = socket.create_connection(address, timeout=SECONDS)
        self.sock.sendall(
            b"GET /chat HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        self.file = self.sock.makefile("rb")
        assert self.file.readline().startswith(b"HTTP/1.1 101 ")
        while self.file.readline() != b"\r\n":
            pass
        self.pid = int(self.receive())

    def send(self, text):
        payload = text.encode()
        length = bytes((0x80 | len(payload),)) if len(payload) < 126 else struct.pack("!BQ", 0xFF, len(payload))
        self.sock.sendall(b"\x81" + length + bytes(4) + payload)

    def receive(self):
        head, length = self.file.read(2)
        assert head in (0x81, 0x82)
        if length == 126:
            (length,) = struct.unpack("!H", self.file.read(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self.file.read(8))
        return self.file.read(length).decode()

    def close(self):
        self.file.close()
        self.sock.close()


@pytest.fixture
def chat(tmp_path, engine):
    """A server of three workers, and clients as they are asked for, at least one on each worker."""
    with starter(tmp_path) as programs, contextlib.ExitStack() as stack:
        program = programs.serve(APP, workers=3, io=engine, options="kore.config.websocket_maxframe = 1 << 20")

        def connect():
            client = Client(program.address)
            stack.callback(client.close)
            return client

        yield program, connect


def on_all(program, connect, pids):
    """Clients, six at least and one at least on each worker."""
    clients = []

    def complete():
        clients.append(connect())
        return len(clients) >= 6 and {client.pid for client in clients} == set(pids)

    wait_until(complete, "a client on each worker")
    return clients


def check(clients, scope, text, expected):
    """Let the first client broadcast; `expected` get the text once, and then a farewell that all get."""
    first = clients[0]
    first.send(f"{scope} {text}")
    if scope not in ("local", "global"):
        assert first.receive() == text
    assert first.receive() == "sent"
    first.send("all over")
    for client in clients:
        got = [client.receive()]
        if client in expected:
            assert got == [text]
            got.append(client.receive())
        assert got[-1] == "over", "nothing twice, and nothing to whom it is not for"
    assert first.receive() == "sent"


def test_a_global_broadcast_reaches_every_client_once_and_never_its_source(chat):
    program, connect = chat
    clients = on_all(program, connect, pids_of(program))
    check(clients, "global", "hello", clients[1:])
    check(clients, "all", "hello to me too", clients[1:])
    check(clients, "global", "x" * 300_000, clients[1:])


def test_a_local_broadcast_stays_with_the_clients_of_its_worker(chat):
    program, connect = chat
    clients = on_all(program, connect, pids_of(program))
    check(clients, "local", "hello", [client for client in clients[1:] if client.pid == clients[0].pid])


def test_after_restarts_a_broadcast_still_comes_once(chat):
    program, connect = chat
    pids = pids_of(program)
    for count in (1, 2, 3):
        os.kill(pids[1], signal.SIGKILL)
        pids[1] = int(program.wait_for(r"worker 2 serves again, pid (\d+)", count=count)[1])
    clients = on_all(program, connect, pids)
    check(clients, "global", "hello", clients[1:])
    source = next(client for client in clients if client.pid == pids[1])
    others = [client for client in clients if client is not source]
    check([source, *others], "global", "from the new one", others)


def test_many_broadcasts_from_all_workers_arrive_once_and_in_order_of_each_source(chat):
    program, connect = chat
    clients = on_all(program, connect, pids_of(program))
    sources = clients[:3]
    for number in range(50):
        for index, source in enumerate(sources):
            source.send(f"global {index}:{number}")
    for client in clients:
        own = sources.index(client) if client in sources else None
        expected = 50 * len(sources)
        got = [client.receive() for _ in range(expected)]
        for index in range(len(sources)):
            wanted = ["sent"] * 50 if index == own else [f"{index}:{number}" for number in range(50)]
            found = [text for text in got if (text == "sent" if index == own else text.startswith(f"{index}:"))]
            assert found == wanted
