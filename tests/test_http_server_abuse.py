"""What strangers send: no byte of it kills the worker, makes it grow, or keeps the others waiting."""

from __future__ import annotations

import contextlib
import random
import resource
import select
import socket
import time

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http_server_harness import ENGINES, GET, request, serving, since
from tests.support import wait_until

CONNECTIONS = 2000
EXAMPLES = 40

TEXT = """
import asyncio
import gc

@kore.route("/echo", domain=home, methods=["get", "post", "put", "patch", "delete"])
def echo(req):
    req.response(200, req.body)

@kore.route("/later", domain=home, methods=["get", "post", "put", "patch", "delete"])
async def later(req):
    await asyncio.sleep(0)
    req.response_header("x-length", str(len(req.body)))
    req.response(200, (req.body[i : i + 100] for i in range(0, len(req.body), 100)))

@kore.route("/uncollected", domain=home, methods=["get"])
def uncollected(req):
    found = gc.collect()
    gc.disable()
    req.response(200, str(found).encode())

@kore.route("/big", domain=home, methods=["get"])
def big(req):
    req.response(200, os.urandom(16) * 100_000)

@kore.route("/big-lines", domain=home, methods=["get"])
def big_lines(req):
    req.response(200, (os.urandom(16) * 5_000 for _ in range(100)))
"""


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    options = f"kore.config.worker_max_connections = {CONNECTIONS + 500}\nkore.config.http_header_timeout = 60"
    with serving(tmp_path_factory.mktemp("abuse"), request.param, TEXT, options) as made:
        for _ in range(3):
            made.ask(GET)
        yield made


@pytest.fixture(autouse=True)
def unharmed(server):
    """After each test: the same worker, no descriptor more than before."""
    fds = server.fds()
    yield
    server.settle(fds)
    server.unharmed()


@pytest.fixture
def descriptors():
    """Room for thousands of connections, in this process; skips where there is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < CONNECTIONS + 500:
        pytest.skip(f"RLIMIT_NOFILE: the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CONNECTIONS + 500), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_thousands_of_connections_that_send_a_byte_and_wait(server, descriptors):
    resident, fds = server.rss_kib(), server.fds()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()).send(b"G") for _ in range(CONNECTIONS)]
        wait_until(lambda: server.fds() >= fds + CONNECTIONS, "all are accepted")
        begin = time.monotonic()
        server.ask(GET)
        assert since(begin) < 1
        assert (server.rss_kib() - resident) / CONNECTIONS < 6
        before = server.cpu_s()
        select.select([], [], [], 1)  # a second in which there is nothing to do
        assert server.cpu_s() - before < 0.25
        for byte in GET[1:]:
            for client in clients[:50]:
                client.send(bytes([byte]))
        for client in clients[:50]:
            assert client.read().body == b"hello"


def test_clients_that_never_read_cost_no_more_than_their_responses(server):
    """Thirty pipelines, each of a thousand requests for responses of 1.6 MB that nobody reads."""
    resident = server.rss_kib()
    with contextlib.ExitStack() as stack:
        for path in ("/big", "/big-lines") * 15:
            client = stack.enter_context(server.client(receive_bytes=4096))
            client.sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.sock.send(request(path) * 1000)
        for _ in range(50):
            server.ask(GET)
        assert server.rss_kib() - resident < 30 * 2 * 1600 + 20_000


@pytest.mark.parametrize("data", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # a TLS hello
    b"\x80\x2e\x01\x00\x02" + bytes(40),  # one of SSL 2
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(20),  # HTTP/2 with prior knowledge
    b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + GET,
    b"\0" * 100_000, b"\r\n" * 10_000, b"A" * 100_000, b"GET " * 10_000, b"\xff" * 9, b"GET /\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 50_000, b"GET / HTTP/1.1\r\nHost: " + b"x" * 100_000,
    request("/echo", "Transfer-Encoding: chunked", method="POST") + b"0" * 100_000,
    request("/echo", "Transfer-Encoding: chunked", method="POST") + b"1\r\na\r\n" * 1000 + b"1;" + b"a" * 100_000,
    request("/echo", "Transfer-Encoding: chunked", method="POST") + b"0\r\n" + b"a: b\r\n" * 20_000,
], ids=lambda data: repr(data[:40]))  # fmt: skip
def test_what_is_no_http_is_refused_and_closed(server, data):
    with server.client() as client:
        client.send(data)
        found = client.read()
        assert found.status in (400, 414, 431, 501, 505)
        client.half_close().ended()


def status_lines(data: bytes) -> list[bytes]:
    return [line for line in data.split(b"\r\n") if line.startswith(b"HTTP/1.")]


bounded = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)

FRAGMENTS = [
    GET, b"GET / HTTP/1.1\r\n", b"POST /echo HTTP/1.1\r\nHost: x\r\n", b"\r\n", b"\r", b"\n", b"Host: x\r\n", b" ",
    b"\0", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"hello",
    b"0\r\n\r\n", b"Expect: 100-continue\r\n", b"5\r\nhello\r\n", b"HTTP/1.0\r\n", request("/later"),
    request("/big-lines")[:-2], request("/later", method="POST", body=b"body"),
]  # fmt: skip
PIECES = st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(FRAGMENTS)), min_size=1, max_size=12)


@bounded
@given(pieces=PIECES, at_once=st.booleans())
def test_random_garbage_is_answered_with_http_or_closed(server, pieces, at_once):
    with server.client() as client:
        try:
            for data in [b"".join(pieces)] if at_once else pieces:
                client.send(data)
            client.half_close()
            answer = client.rest()
        except ConnectionError:
            return  # refused while it was still sending
        assert not answer or answer.startswith(b"HTTP/1.")
        for line in status_lines(answer):
            assert line.split(b" ")[1] in (
                b"100", b"200", b"400", b"404", b"405", b"413", b"414", b"417", b"431", b"501", b"505"
            ) or b"\n" in line


TOKEN = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(lambda name: f"x-{name}")
VALUE = st.text("abc 019;,=\"'()", max_size=30).map(str.strip)
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"]),
        st.sampled_from(["/echo", "/later"]),
        st.lists(st.tuples(TOKEN, VALUE), max_size=6),
        st.binary(max_size=3000),
        st.booleans(),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@bounded
@given(requests=REQUESTS, seed=st.integers(0, 1 << 30))
def test_h11_and_the_server_understand_each_other(server, requests, seed):
    chance = random.Random(seed)
    with server.client() as client:
        connection = h11.Connection(h11.CLIENT)
        for method, path, fields, body, in_chunks in requests:
            headers = [("Host", "x"), *fields]
            headers.append(("Transfer-Encoding", "chunked") if in_chunks else ("Content-Length", str(len(body))))
            data = connection.send(h11.Request(method=method, target=path, headers=headers))
            half = chance.randrange(len(body) + 1)
            for piece in (body[:half], body[half:]):
                data += connection.send(h11.Data(data=piece))
            data += connection.send(h11.EndOfMessage())
            cut = chance.randrange(len(data))
            client.send(data[:cut])
            client.send(data[cut:])
            answer = b""
            while type(event := connection.next_event()) is not h11.EndOfMessage:
                if event is h11.NEED_DATA:
                    connection.receive_data(client.sock.recv(chance.choice([50, 1000, 65536])))
                elif isinstance(event, h11.Response):
                    assert event.status_code == 200
                elif isinstance(event, h11.Data):
                    answer += event.data
            assert answer == (b"" if method == "HEAD" else body)
            connection.start_next_cycle()


def test_a_storm_of_connections_that_come_and_go(server):
    resident = server.rss_kib()
    chance = random.Random(5)
    for _ in range(1500):
        with server.client() as client:
            what = chance.randrange(6)
            if what == 0:
                client.reset()
            elif what == 1:
                client.send(GET).reset()
            elif what == 2:
                client.send(request("/big")).reset()
            elif what == 3:
                client.send(request("/later", method="POST", body=b"x" * 500)).half_close()
            elif what == 4:
                client.ask(GET)
    assert server.rss_kib() - resident < 10_000


def test_urgent_data_is_no_reason_to_die(server):
    with server.client() as client:
        client.sock.send(b"!", socket.MSG_OOB)
        client.alive()


def test_heads_that_never_come_again_leave_nothing_for_the_collector(server):
    uncollected = request("/uncollected")
    server.ask(uncollected)
    with server.client() as client:
        for number in range(3000):
            client.send(request(f"/{number}" + "x" * (number % 2 * 700)))
            if number % 100 == 99:
                for _ in range(100):
                    assert client.read().status == 404
    assert int(server.ask(uncollected).body) < 100
