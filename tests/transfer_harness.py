"""What the tests of kore.curl and kore.httpclient share: real servers on loopback to transfer from and to.

nginx and pyftpdlib run as programs of their own. A `Peer` is a server of ours on a thread, in the clear, with TLS, or
on a unix socket: it keeps every request as it came over the wire, and answers as the test says, properly or not.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from driver_harness import ENGINES
from reactor_harness import open_loop, run

from kore.clients import transfers
from tests.support import SECONDS, Starter, free_port, wait_until

__all__ = [
    "ENGINES", "SECONDS", "Nginx", "Peer", "Request", "Wire", "answer", "easies", "endless",
    "ftp_server", "limited", "nginx",
    "open_transfers", "peer", "run",
    "socket_fds", "sockets", "stall", "wait_until",
]

NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
{user}
events {{ worker_connections 2048; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        listen unix:{folder}/nginx.sock;
        root {folder}/www;
        location = /missing {{ return 404 "not here"; }}
        location = /empty {{ return 200; }}
        location = /nothing {{ return 204; }}
        location = /moved {{ return 302 /hello.txt; }}
        location = /moved-to-file {{ return 302 file:///etc/hostname; }}
        location = /moved-to-ftp {{ return 302 ftp://127.0.0.1:1/x; }}
        location = /seen {{ return 200 "$request_method|$http_user_agent|$content_type|$content_length"; }}
        location /upload/ {{ dav_methods PUT DELETE; }}
        location /packed/ {{ gzip on; gzip_types *; gzip_min_length 1; alias {folder}/www/; }}
    }}
}}
"""


class Nginx(NamedTuple):
    """A running nginx."""

    url: str
    folder: Path
    socket: str


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[Nginx]:
    """A real nginx that serves `folder`/www; a skip where there is none."""
    program = shutil.which("nginx")
    if program is None:
        pytest.skip("no nginx: install nginx-light")
    (folder / "www" / "upload").mkdir(parents=True)
    (folder / "www" / "hello.txt").write_bytes(b"hello from nginx\n")
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, user=user))
    start = Starter(folder)
    try:
        started = start.command(program, "-c", f"{folder}/nginx.conf", "-p", str(folder))
        wait_until(lambda: _answers(port) or started.process.poll() is not None, "nginx listens")
        assert started.process.poll() is None, started.err
        yield Nginx(f"http://127.0.0.1:{port}", folder, f"{folder}/nginx.sock")
    finally:
        for each in start.programs:
            each.stop()


@contextlib.contextmanager
def ftp_server(folder: Path) -> Iterator[str]:
    """pyftpdlib serving `folder`, anonymously and writable; the url of its root."""
    pytest.importorskip("pyftpdlib")
    port = free_port()
    start = Starter(folder)
    try:
        options = ["-i", "127.0.0.1", "-p", str(port), "-d", str(folder), "-w"]
        started = start.command(sys.executable, "-W", "ignore", "-m", "pyftpdlib", *options)
        wait_until(lambda: _answers(port) or started.process.poll() is not None, "the FTP server listens")
        assert started.process.poll() is None, started.err
        yield f"ftp://127.0.0.1:{port}"
    finally:
        for each in start.programs:
            each.stop()


def _answers(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


class Request(NamedTuple):
    """One request as it came over the wire."""

    method: str
    target: str
    fields: dict[str, str]
    body: bytes
    connection: int
    """The how manyth connection of its server it came on."""


def answer(body: bytes = b"", status: str = "200 OK", *fields: str) -> bytes:
    """The bytes of a response of known length."""
    lines = [f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Wire:
    """The server's end of one connection, for answers that are more than bytes. It blocks, in a thread of its own."""

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self.sock = sock
        self.peer = peer
        self.data = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def until_left(self) -> None:
        """Wait until the client has closed its end, and note that it has."""
        with contextlib.suppress(ConnectionError):  # a client that had not read everything ends with a reset
            while self.sock.recv(65536):
                pass
        self.peer.left += 1

    def until(self, event: threading.Event) -> None:
        assert event.wait(SECONDS)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.data:
            piece = self.sock.recv(65536)
            if not piece:
                raise EOFError
            self.data += piece
        block, _, self.data = self.data.partition(mark)
        return block

    def _exactly(self, size: int) -> bytes:
        while len(self.data) < size:
            piece = self.sock.recv(65536)
            if not piece:
                raise EOFError
            self.data += piece
        block, self.data = self.data[:size], self.data[size:]
        return block

    def request(self, number: int) -> Request:
        line, *lines = self._until(b"\r\n\r\n").decode().split("\r\n")
        method, target, _ = line.split(" ")
        fields = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in lines)}
        if fields.get("expect") == "100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fields.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._until(b"\r\n"), 16):
                body += self._exactly(size)
                self._exactly(2)
            self._exactly(2)
        else:
            body = self._exactly(int(fields.get("content-length", "0")))
        return Request(method, target, fields, body, number)


Answer = Callable[[Request, Wire], "bytes | None"]


class Peer:
    """A server that keeps what it was sent; `reply` gives the answer, or None when it has dealt with it."""

    def __init__(self, listener: socket.socket, reply: Answer, context: ssl.SSLContext | None = None) -> None:
        self.reply = reply
        self.context = context
        self.requests: list[Request] = []
        self.connections = 0
        self.left = 0
        self.sent = 0
        self.certificates: list[object] = []
        self.listener = listener
        self.open: set[socket.socket] = set()
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    @property
    def url(self) -> str:
        scheme = "http" if self.context is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.connections += 1
                self.open.add(sock)
                thread = threading.Thread(target=self._serve, args=(sock, self.connections), daemon=True)
                self.threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):
            sock.settimeout(SECONDS)
            if self.context is not None:
                self.open.discard(sock)
                sock = self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                self.open.add(sock)
                sock.do_handshake()
                self.certificates.append(sock.getpeercert())
            wire = Wire(sock, self)
            while True:
                request = wire.request(number)
                self.requests.append(request)
                data = self.reply(request, wire)
                if data is None:
                    break
                wire.send(data)
        self.open.discard(sock)
        sock.close()

    def close(self) -> None:
        # A shutdown wakes the threads that block in accept and recv; a close would not. That of the plain socket, since
        # ssl's takes the TLS away from under their feet.
        for sock in (self.listener, *list(self.open)):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(SECONDS)
            assert not thread.is_alive()


def echo(request: Request, _wire: Wire) -> bytes:
    """The plain answer: method and target."""
    return answer(f"{request.method} {request.target}".encode())


def endless(_request: Request, wire: Wire) -> None:
    """A body that never ends: chunks of 64 KiB until the client is gone."""
    wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    while True:
        wire.peer.sent += len(chunk)
        wire.send(chunk)


def stall(_request: Request, wire: Wire) -> None:
    """The head and a little of the body, then nothing."""
    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
    wire.until_left()


@contextlib.contextmanager
def peer(
    reply: Answer = echo, context: ssl.SSLContext | None = None, address: str | None = None,
) -> Iterator[Peer]:
    """A Peer on a free port of 127.0.0.1, or on a unix socket."""
    if address is None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
    server = Peer(listener, reply, context)
    try:
        yield server
    finally:
        server.close()


def socket_fds(pid: int | str = "self") -> list[int]:
    """The fds of a process that are sockets."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                found.append(int(name))
    return found


def sockets(pid: int | str = "self") -> int:
    """How many sockets a process has open."""
    return len(socket_fds(pid))


def easies() -> int:
    """How many easy handles this process has."""
    pycurl = pytest.importorskip("pycurl")
    gc.collect()
    return sum(type(thing) is pycurl.Curl for thing in gc.get_objects())


def open_transfers(io: str) -> Iterator[object]:
    """For fixtures: a loop on engine `io`; afterwards none of the transfers' sockets, handles and threads is left."""
    def left() -> tuple[int, int, int]:
        return sockets(), easies(), threading.active_count()

    before = left()
    for loop, _log in open_loop(io):
        yield loop
    assert not transfers._of_loop
    wait_until(lambda: all(map(int.__le__, left(), before)), f"no more than {before} sockets, easy handles, threads")


@contextlib.contextmanager
def limited(**limits: int) -> Iterator[None]:
    """Other limits than the options'."""
    before = transfers.limits
    transfers.limits = transfers.DefaultLimits(**limits)
    try:
        yield
    finally:
        transfers.limits = before
