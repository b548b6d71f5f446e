"""Clients that leave, by FIN and by RST, wholly and by half, over TCP and UNIX sockets: who is still worked for."""

from __future__ import annotations

import time

import pytest

from tests.http_server_harness import ENGINES, GET, Client, request, serving, since

TEXT = """
import asyncio

lock = kore.lock()

async def waiting(req, wait):
    mark = req.query
    kore.log(kore.LOG_INFO, f"begins {mark}")
    try:
        await wait
    except GeneratorExit:
        answer = req.response(200, b"nobody")
        kore.log(kore.LOG_INFO, f"closed {mark} {answer} {req.connection}")
        raise
    req.response(200, b"waited")
    kore.log(kore.LOG_INFO, f"answered {mark}")

@kore.route("/never", domain=home, methods=["post"])
async def never_returns(req):
    await waiting(req, kore.suspend(3600000))

@kore.route("/future", domain=home, methods=["get"])
async def future(req):
    await waiting(req, asyncio.get_running_loop().create_future())

@kore.route("/lock", domain=home, methods=["get"])
async def locks(req):
    async with lock:
        await waiting(req, kore.suspend(3600000))

@kore.route("^/wait/([0-9]+)$", domain=home, methods=["get"])
async def wait(req, ms):
    await waiting(req, kore.suspend(int(ms)))

@kore.route("/answered", domain=home, methods=["get"])
async def answered(req):
    await asyncio.sleep(0)
    req.response(200, b"answered")
    await kore.suspend(150)
    kore.log(kore.LOG_INFO, f"went on {req.query} {req.connection}")

@kore.route("/child", domain=home, methods=["get"])
async def child(req):
    async def work():
        await kore.suspend(100)
        try:
            req.response(200, b"too late")
        except RuntimeError as error:
            kore.log(kore.LOG_INFO, f"child {req.query}: {req.connection}")
    kore.task_create(work())
    await kore.suspend(3600000)

@kore.route("/big", domain=home, methods=["get"])
def big(req):
    req.response(200, bytes(3_000_000))

kore.server("unix", path="app.sock", tls=False)
local = kore.domain("*", attach="unix")
for path, handler in (
    ("/", index), ("^/wait/([0-9]+)$", wait), ("/future", future), ("/answered", answered), ("/big", big),
    ("/lock", locks), ("/child", child),
):
    local.route(path, handler, methods=["get"])
local.route("/never", never_returns, methods=["post"])

@kore.route("/addr", domain=local, methods=["get"])
def addr(req):
    try:
        req.response(200, req.connection.addr)
    except RuntimeError as error:
        req.response(200, f"RuntimeError {req.connection.fd >= 0}")
"""


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("clients"), request.param, TEXT) as made:
        yield made


@pytest.fixture(params=["tcp", "unix"])
def connect(server, request):
    """Make a client; afterwards the worker holds no more descriptors than before."""
    fds = server.fds()
    address = server.address if request.param == "tcp" else str(server.program.directory / "app.sock")
    yield lambda **keywords: Client(address, **keywords)
    server.settle(fds)


marks = iter(range(1_000_000))


def begun(server, client, path="/future", method="GET", body=b"") -> int:
    """Have a handler wait; its mark."""
    mark = next(marks)
    client.send(request(f"{path}?{mark}", method=method, body=body))
    server.program.wait_for(f"begins {mark}\\]")
    return mark


LEAVES = {
    "fin": lambda client: client.sock.close(),
    "rst": lambda client: client.reset(),
    "more-and-fin": lambda client: (client.send(GET * 10), client.sock.close()),
    "more-and-rst": lambda client: (client.send(GET * 10), client.reset()),
}


def test_a_client_that_leaves_closes_its_handler_soon(server, connect):
    marks_by_case = {}
    for how, leave in LEAVES.items():
        for path, method, body in (("/future", "GET", b""), ("/never", "POST", b"body" * 5000)):
            client = connect()
            marks_by_case[how, path] = begun(server, client, path, method, body)
            leave(client)
    begin = time.monotonic()
    for case, mark in marks_by_case.items():
        assert server.program.wait_for(f"closed {mark} True None"), case
        assert f"answered {mark}]" not in server.program.out
    assert since(begin) < 1.2


def test_what_the_handler_held_is_free_again(server, connect):
    first, second = connect(), connect()
    mark = begun(server, first, "/lock")
    other = next(marks)
    second.send(request(f"/lock?{other}"))
    first.reset()
    server.program.wait_for(f"closed {mark} ")
    server.program.wait_for(f"begins {other}\\]")
    second.reset()
    server.program.wait_for(f"closed {other} ")


def test_a_client_that_only_sent_its_fin_gets_its_response(server, connect):
    """Also when it has to wait: then an interim response asks whether it is still there, but not in HTTP/1.0."""
    clients = []
    for ms, version in ((0, "1.1"), (200, "1.1"), (1000, "1.1"), (1000, "1.0")):
        clients.append(connect())
        clients[-1].send(request(f"/wait/{ms}?{next(marks)}", version=version)).half_close()
    statuses = []
    for client in clients:
        with client:
            found = client.read()
            statuses.append(found.status)
            while found.status == 100:
                found = client.read()
            assert (found.status, found.body) == (200, b"waited")
            client.ended()
    assert statuses == [200, 200, 100, 200]


def test_a_fin_right_behind_the_request_or_a_moment_later(server, connect):
    for _ in range(20):
        with connect() as client:
            client.send(GET).half_close()
            assert client.read().body == b"hello"
            client.ended()
    with connect() as client:
        client.ask(GET)
        client.half_close().ended()


def test_a_large_response_to_a_half_closed_client(server, connect):
    with connect() as client:
        client.send(request("/big")).half_close()
        assert client.read().body == bytes(3_000_000)
        client.ended()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_large_response_to_a_client_that_wants_no_other(server, connect, version):
    """It is closed there and then, but not before the client has taken everything."""
    with connect() as client:
        client.send(request("/big", "Connection: close", version=version))
        assert client.read().body == bytes(3_000_000)
        client.ended()


def test_the_second_of_two_requests_is_closed_as_well(server, connect):
    """The client left while the first was handled; nothing tells when the second one's handler begins to wait."""
    client = connect()
    first, second = next(marks), next(marks)
    client.send(request(f"/wait/700?{first}") + request(f"/future?{second}"))
    server.program.wait_for(f"begins {first}\\]")
    client.half_close()
    server.program.wait_for(f"begins {second}\\]")
    client.sock.close()
    server.program.wait_for(f"closed {second} ")


def test_a_handler_that_answered_goes_on_when_its_client_leaves(server, connect):
    """The client has what it asked for; with HTTP/1.0, and with curl, every client leaves then."""
    for leave in (LEAVES["fin"], LEAVES["rst"]):
        mark = next(marks)
        client = connect()
        for _ in range(17):  # one more than may trail
            client.send(request(f"/answered?{mark}"))
            assert client.read().body == b"answered"
        leave(client)
        server.program.wait_for(f"went on {mark} None\\]", count=17)
    for version in ("1.0", "1.1"):
        mark = next(marks)
        with connect() as client:
            client.send(request(f"/answered?{mark}", "Connection: close", version=version))
            assert client.read().body == b"answered"
            client.ended()  # at once
            assert f"went on {mark}" not in server.program.out
        server.program.wait_for(f"went on {mark} None\\]")


def test_a_task_of_the_handler_goes_on_without_the_request(server, connect):
    client = connect()
    mark = next(marks)
    client.send(request(f"/child?{mark}"))
    client.reset()
    server.program.wait_for(rf"child {mark}: None\]")


@pytest.mark.parametrize("data", [
    b"", b"GET", GET[:-1], request("/never", method="POST", body=b"x" * 100000)[:-1],
    request("/never", "Transfer-Encoding: chunked", method="POST") + b"5\r\nab", b"\x16\x03\x01",
], ids=lambda data: repr(data[-20:]))
@pytest.mark.parametrize("how", ["fin", "rst"])
def test_clients_that_leave_in_the_middle_of_sending(server, connect, data, how):
    for _ in range(5):
        client = connect()
        client.send(data[:50])
        client.send(data[50:])
        LEAVES[how](client)


def test_clients_that_leave_in_the_middle_of_reading(server, connect):
    for how in ("fin", "rst"):
        client = connect(receive_bytes=4096)
        client.send(request("/big") * 3)
        client._exactly(10000)
        LEAVES[how](client)


def test_a_unix_client_has_no_address(server):
    with Client(str(server.program.directory / "app.sock")) as client:
        assert client.ask(request("/addr")).body == b"RuntimeError True"


def test_the_worker_is_the_one_it_was(server):
    server.unharmed()
