"""The reference's examples on sockets and processes, as they stand there: ports, paths and all.

Those that are handlers run in a server. The others are pieces of a coroutine, which `piece` puts into one; `printf`,
which some of them call, is given to them. Where a comment stands for the reader's code, a line of ours follows it,
marked so. Behind them are applications as the reference's platform ships them, told in kore-api.md 23.
"""

from __future__ import annotations

import json
import os
import socket
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kore
from tests.engines import ENGINES
from tests.http_server_harness import Client, request
from tests.reactor_harness import run
from tests.support import READY, SECONDS, Starter, free_port, http_get, only_one, skip_unless, starter

PAGE = """\
import kore
import socket

async def page(req):
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM |
        socket.SOCK_NONBLOCK)

    # Wrap the socket in a Kore object.
    ksock = kore.socket_wrap(sock)

    # Connect and send some data.
    await ksock.connect("127.0.0.1", 3332)
    await ksock.send("hello world")

    # Read a response.
    response = await ksock.recv(1024)

    ksock.close()
    sock.close()
    req.response(200, response)  # ours
"""

RECV = """\
data = await sock.recv(1024)
if data is None:
    printf("eof!")
else:
    print("received %s" % data)

# Use optional timeout argument
try:
    data = await sock.recv(1024, 1000)
except TimeoutError as e:
    print("timed out reading (%s)" % e)
"""

RECVFROM = """\
ip, port, data = await sock.recvfrom(1024)
if data is None:
    printf("eof!")
else:
    await sock.sendto(ip, port, data)
"""

RECVMSG = """\
data, ancdata = await sock.recvmsg(1024)
if data is None:
    printf("eof!")
else:
    for cmsg_level, cmsg_type, cmsg_data in ancdata:
        # handle
        print(cmsg_level, cmsg_type, len(cmsg_data))  # ours
"""

SEND = """\
# Will return when all bytes are sent.
await sock.send("Hello world")
"""

SENDTO_INET = """\
# AF_INET, will return when all bytes are sent.
await sock.sendto("127.0.0.1", "3311", "Hello world")
"""

SENDTO_UNIX = """\
# AF_UNIX, will return when all bytes are sent.
await sock.sendto("/tmp/service.sock", "Hello world")
"""

ACCEPT = """\
conn = await sock.accept()
await conn.send("welcome")
conn.close()
"""

CONNECT_INET = """\
# AF_INET socket.
await sock.connect("127.0.0.1", 8888)
data = await sock.recv(1024)
sock.close()
"""

CONNECT_UNIX = """\
# AF_UNIX socket.
await sock.connect("/var/run/socket.sock")
data = await sock.recv(1024)
sock.close()
"""

PROC = """\
async def request(req):
    proc = kore.proc("ls -l /tmp")

    try:
        stdout = await proc.recv(8192)
        retcode = proc.reap()
        req.response(200, stdout)
    except TimeoutError:
        proc.kill()
        print("process timed out")
        req.response(500, b'')
"""

PROC_RECV = """\
data = await proc.recv(1024)
"""

PROC_SEND = """\
await proc.send(data)
"""

AROUND = """\
import kore

kore.config.workers = 1
kore.config.deployment = "dev"
kore.config.sandbox_connect = 3332
kore.server("default", ip="127.0.0.1", port="{port}", tls=False)
dom = kore.domain("*", attach="default")

# The example.

{example}

# What it leaves to the application.

dom.route("/", {handler}, methods=["get"])
"""


def piece(text: str) -> Callable[..., Any]:
    """A coroutine function around a piece of one; it takes `sock` or `proc`, prints to `said`, and gives `data`."""
    body = textwrap.indent(text, "    ")
    head = "async def example(sock=None, proc=None, data=None, print=None):\n    printf = print\n"
    source = f"{head}{body}\n    return data\n"
    namespace: dict[str, Any] = {"kore": kore}
    exec(source, namespace)
    example: Callable[..., Any] = namespace["example"]
    return example


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Set up first and torn down last: the reference's ports and paths are ours until the server has gone."""
    with only_one("reference"):
        yield


@pytest.fixture(params=ENGINES)
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    skip_unless(request.param)
    return {"KORE_IO": request.param}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    with starter(tmp_path) as programs:
        yield programs


def bound(family: int, kind: int, address: Any) -> socket.socket:
    """A socket on an address of the reference's; a skip, naming it, where that cannot be had."""
    sock = socket.socket(family, kind)
    if family == socket.AF_INET:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        pytest.skip(f"{address!r}, which is the reference's, cannot be had: {error.strerror}")
    sock.settimeout(SECONDS)
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def answering(listener: socket.socket, answer: bytes, heard: list[bytes]) -> threading.Thread:
    """A peer that takes one connection and answers, after it has heard something if `heard` is there for it."""

    def serve() -> None:
        conn, _ = listener.accept()
        with conn:
            conn.settimeout(SECONDS)
            if answer != b"at once":
                heard.append(conn.recv(1024))
            conn.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_a_page_that_talks_to_a_server(start: Starter, environment: dict[str, str]) -> None:
    port = free_port()
    heard: list[bytes] = []
    with bound(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 3332)) as listener:
        start.app(AROUND.format(example=PAGE, handler="page", port=port), environment=environment)
        thread = answering(listener, b"from there", heard)
        assert http_get(("127.0.0.1", port)).endswith(b"\r\n\r\nfrom there")
        thread.join(SECONDS)
    assert heard == [b"hello world"]


def test_recv(loop) -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        far.send(b"some")
        said: list[str] = []
        ksock = kore.socket_wrap(near)
        await piece(RECV)(sock=ksock, print=said.append)
        assert said[0] == "received b'some'"
        assert said[1].startswith("timed out reading")
        far.close()
        said.clear()
        assert await piece(RECV)(sock=ksock, print=said.append) is None
        assert said == ["eof!"]
        ksock.close()
        near.close()

    run(loop, main())


def test_recvfrom(loop) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here, socket.socket(
            socket.AF_INET, socket.SOCK_DGRAM
        ) as there:
            here.bind(("127.0.0.1", 0))
            there.bind(("127.0.0.1", 0))
            there.sendto(b"ping", here.getsockname())
            ksock = kore.socket_wrap(here)
            await piece(RECVFROM)(sock=ksock)
            there.settimeout(SECONDS)
            assert there.recv(100) == b"ping"
            ksock.close()
        said: list[str] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            listener.accept()[0].close()
        ksock = kore.socket_wrap(near)
        await piece(RECVFROM)(sock=ksock, print=said.append)
        assert said == ["eof!"]
        ksock.close()
        near.close()

    run(loop, main())


def test_recvmsg(loop) -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        far.send(b"x")
        said: list[Any] = []
        ksock = kore.socket_wrap(near)
        await piece(RECVMSG)(sock=ksock, print=lambda *words: said.append(words))
        assert said == [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, 12)]
        far.close()
        said.clear()
        await piece(RECVMSG)(sock=ksock, print=said.append)
        assert said == ["eof!"]
        ksock.close()
        near.close()

    run(loop, main())


def test_send_and_accept(loop) -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        ksock = kore.socket_wrap(near)
        await piece(SEND)(sock=ksock)
        assert far.recv(100) == b"Hello world"
        ksock.close()
        near.close()
        far.close()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ksock = kore.socket_wrap(listener)
            with socket.create_connection(listener.getsockname(), timeout=SECONDS) as client:
                await piece(ACCEPT)(sock=ksock)
                assert client.recv(100) == b"welcome"
                assert client.recv(100) == b""
            ksock.close()

    run(loop, main())


@pytest.mark.parametrize(("text", "family", "address"), [
    (SENDTO_INET, socket.AF_INET, ("127.0.0.1", 3311)), (SENDTO_UNIX, socket.AF_UNIX, "/tmp/service.sock"),
])
def test_sendto(loop, text, family, address) -> None:
    async def main() -> None:
        with socket.socket(family, socket.SOCK_DGRAM) as here:
            ksock = kore.socket_wrap(here)
            await piece(text)(sock=ksock)
            ksock.close()

    with bound(family, socket.SOCK_DGRAM, address) as there:
        try:
            run(loop, main())
            assert there.recv(100) == b"Hello world"
        finally:
            if family == socket.AF_UNIX:
                os.unlink(address)


@pytest.mark.parametrize(("text", "family", "address"), [
    (CONNECT_INET, socket.AF_INET, ("127.0.0.1", 8888)), (CONNECT_UNIX, socket.AF_UNIX, "/var/run/socket.sock"),
])
def test_connect(loop, text, family, address) -> None:
    async def main() -> bytes:
        with socket.socket(family) as sock:
            data: bytes = await piece(text)(sock=kore.socket_wrap(sock))
            return data

    with bound(family, socket.SOCK_STREAM, address) as listener:
        try:
            thread = answering(listener, b"at once", [])
            assert run(loop, main()) == b"at once"
            thread.join(SECONDS)
        finally:
            if family == socket.AF_UNIX:
                os.unlink(address)


def test_the_process_example(start: Starter, environment: dict[str, str]) -> None:
    """``ls`` without a path, and a ``reap`` that is not awaited."""
    port = free_port()
    program = start.app(AROUND.format(example=PROC, handler="request", port=port), environment=environment)
    found = http_get(("127.0.0.1", port))
    assert found.startswith(b"HTTP/1.1 200 ")
    assert b"\r\n\r\ntotal " in found
    assert "uncaught" not in program.out


def test_process_pieces(loop) -> None:
    async def main() -> None:
        proc = kore.proc("cat")
        await piece(PROC_SEND)(proc=proc, data=b"through")
        assert await piece(PROC_RECV)(proc=proc) == b"through"
        proc.close_stdin()
        assert await piece(PROC_RECV)(proc=proc) is None
        assert await proc.reap() == 0

    run(loop, main())


ECHO = """\
import kore
import socket

class EchoServer:
    def __init__(self):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", {port}))
        sock.listen()
        self.conn = kore.socket_wrap(sock)

    async def run(self):
        while True:
            try:
                client = await self.conn.accept()
                kore.task_create(self.handle_client(client))
            except Exception as e:
                kore.fatal("exception %s" % e)

    async def handle_client(self, client):
        while True:
            try:
                data = await client.recv(1024, 100)
                if data is None:
                    break
                await client.send(data)
            except TimeoutError as e:
                print("timed out reading (%s)" % e)
            except Exception as e:
                print("client got exception %s" % e)
        client.close()

kore.config.deployment = "dev"
kore.config.workers = 2
server = EchoServer()
kore.task_create(server.run())
"""


def test_the_echo_application(start: Starter, environment: dict[str, str]) -> None:
    """A listener wrapped in the parent, accepted from in every worker, and no HTTP server at all."""
    port = free_port()
    (start.directory / "app.py").write_text(ECHO.format(port=port))
    program = start.kore("app.py", environment=environment)
    program.wait_for(READY)
    clients = [socket.create_connection(("127.0.0.1", port), timeout=SECONDS) for _ in range(20)]
    for turn in range(3):
        for number, client in enumerate(clients):
            client.sendall(b"%d-%d" % (turn, number))
        for number, client in enumerate(clients):
            assert client.recv(100) == b"%d-%d" % (turn, number)
    program.wait_for("timed out reading")
    for client in clients:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(10) == b""
        client.close()
    assert "exception" not in program.out


ASYNC = """\
import json
import kore
import socket

kore.config.deployment = "dev"
kore.config.workers = 1
kore.config.sandbox_connect = {port}
kore.server(ip="127.0.0.1", port="{port}", tls=False)
kore.domain("*")

@kore.route("/proc", methods=["get"])
async def async_proc(req):
    proc = kore.proc("/bin/ls -lR /etc/ssl")
    stdout = ""
    while True:
        try:
            chunk = await proc.recv(1024, 1000)
            if chunk is None:
                break
            stdout += chunk.decode()
        except TimeoutError:
            print("timed out, retrying")
    ret = await proc.reap()
    req.response(200, json.dumps({{"retcode": ret, "stdout": stdout}}).encode())

@kore.route("/socket-test", methods=["get"])
async def socket_test(req):
    await kore.suspend(500)
    req.response(200, b"response text")

@kore.route("/socket", methods=["get"])
async def async_socket(req):
    sock = socket.socket()
    sock.setblocking(False)
    conn = kore.socket_wrap(sock)
    await conn.connect("127.0.0.1", {port})
    await conn.send("GET /socket-test HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    data = await conn.recv(8192)
    conn.close()
    req.response(200, data)
"""


def test_the_asynchronous_application(start: Starter, environment: dict[str, str]) -> None:
    """A process whose output is read in pieces with a timeout; a handler that talks to its own server."""
    port = free_port()
    start.app(ASYNC.format(port=port), environment=environment)
    with Client(("127.0.0.1", port)) as client:
        found = json.loads(client.ask(request("/proc")).body)
        assert found["retcode"] == 0
        assert found["stdout"].startswith("/etc/ssl:\ntotal ")
        inner = client.ask(request("/socket")).body
        assert inner.startswith(b"HTTP/1.1 200 OK\r\n")
        assert inner.endswith(b"\r\n\r\nresponse text")
