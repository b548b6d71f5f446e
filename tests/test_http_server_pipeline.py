"""Pipelined requests: all are answered, in their order, whatever they are and however they come."""

from __future__ import annotations

import random
import threading
import time

import pytest

from tests.http_server_harness import ENGINES, GET, chunked, request, serving, since

TEXT = """
import asyncio

BIG = b"x" * 300_000

@kore.route("/echo", domain=home, methods=["post", "get", "put"])
def echo(req):
    req.response(200, (req.query or "").encode() + req.body)

@kore.route("/later", domain=home, methods=["post", "get"])
async def later(req):
    await kore.suspend(20)
    req.response(200, (req.query or "").encode() + req.body)

@kore.route("/turn", domain=home, methods=["get"])
async def turn(req):
    await asyncio.sleep(0)
    req.response(200, (req.query or "").encode())

@kore.route("/first-then-wait", domain=home, methods=["get"])
async def first_then_wait(req):
    req.response(200, (req.query or "").encode())
    await kore.suspend(50)

@kore.route("/wait-answer-wait", domain=home, methods=["get"])
async def wait_answer_wait(req):
    await asyncio.sleep(0)
    req.response(200, (req.query or "").encode())
    await kore.suspend(300)
    kore.log(kore.LOG_INFO, f"trailing handler ends {req.query}")

@kore.route("/lines", domain=home, methods=["get"])
def lines(req):
    req.response(200, (f"{req.query} {n}\\n" for n in range(5)))

@kore.route("/big", domain=home, methods=["get"])
def big(req):
    req.response(200, BIG)

made = 0

@kore.route("/fresh", domain=home, methods=["get"])
def fresh(req):
    global made
    made += 1
    req.response(200, os.urandom(1) * 5_000_000)

@kore.route("/made", domain=home, methods=["get"])
def how_many(req):
    req.response(200, str(made).encode())
"""


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("pipeline"), request.param, TEXT) as made:
        yield made


def send_beside(client, data: bytes) -> threading.Thread:
    """Send while the test reads: the server need not take in all before it is read from."""
    thread = threading.Thread(target=client.sock.sendall, args=(data,), daemon=True)
    thread.start()
    return thread


def mixed(count: int, seed: int) -> list[tuple[bytes, bytes, str]]:
    """Requests, what their bodies must be, and their methods."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        word = str(number).encode()
        path = chance.choice(["/echo", "/echo", "/echo", "/turn", "/lines", "/first-then-wait", "/echo", "/head"])
        if number % 200 == 100:
            path = "/later"
        body = bytes(chance.randrange(256) for _ in range(chance.choice([0, 1, 200])))
        target = f"{path}?{number}"
        if path in ("/echo", "/later") and body:
            data = request(target, method="POST", body=body)
            if chance.random() < 0.5:
                data = chunked(target, body)
            found.append((data, word + body, "POST"))
        elif path == "/lines":
            found.append((request(target), b"".join(b"%b %d\n" % (word, n) for n in range(5)), "GET"))
        elif path == "/head":
            found.append((request(f"/echo?{number}", method="HEAD"), b"", "HEAD"))
        else:
            found.append((request(target, f"X-Number: {number}"), word, "GET"))
    return found


@pytest.mark.parametrize("piece", [1 << 30, 4096, 997, 61])
def test_a_thousand_mixed_requests_are_answered_in_order(server, piece):
    requests = mixed(1000, piece)
    data = b"".join(request for request, _, _ in requests)
    with server.client() as client:

        def send() -> None:
            for start in range(0, len(data), piece):
                client.sock.sendall(data[start : start + piece])

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        for number, (_, body, method) in enumerate(requests):
            found = client.read(method)
            assert (found.status, found.body) == (200, body), number
        thread.join()
        client.alive()


def test_a_thousand_equal_requests_in_one_write(server):
    with server.client() as client:
        client.send(GET * 1000)
        for _ in range(1000):
            assert client.read().body == b"hello"
        client.alive()


def test_requests_of_changing_heads_in_one_write(server):
    with server.client() as client:
        client.send(b"".join(request("/", f"X-Number: {number}") for number in range(300)))
        for _ in range(300):
            assert client.read().body == b"hello"
        client.alive()


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 200, 1000])
def test_the_fin_behind_a_pipeline_cuts_nothing_off(server, count):
    with server.client() as client:
        client.send(GET * count).half_close()
        for _ in range(count):
            assert client.read().body == b"hello"
        client.ended()


@pytest.mark.parametrize("count", [65, 300])
def test_nor_does_it_when_handlers_wait(server, count):
    with server.client() as client:
        client.send(b"".join(request(f"/turn?{n}") for n in range(count))).half_close()
        for number in range(count):
            assert client.read().body == str(number).encode()
        client.ended()


def test_the_rest_of_a_request_that_never_ends_is_dropped_at_the_fin(server):
    for rest in (b"GET / HT", request("/echo", method="POST", body=b"whole")[:-1]):
        with server.client() as client:
            client.send(GET * 100 + rest).half_close()
            for _ in range(100):
                assert client.read().body == b"hello"
            client.ended()


def test_what_follows_a_request_that_says_close_is_not_answered(server):
    with server.client() as client:
        client.send(GET + request("/later?1", "Connection: close") + GET * 100)
        assert client.read().body == b"hello"
        assert client.read().body == b"1"
        client.ended()


def test_a_handler_that_answered_and_goes_on_does_not_keep_the_next_waiting(server):
    with server.client() as client:
        begin = time.monotonic()
        for number in range(10):
            assert client.ask(request(f"/wait-answer-wait?{number}")).body == str(number).encode()
        client.alive()
        assert since(begin) < 0.3
    server.program.wait_for("trailing handler ends 9")


def test_only_so_many_handlers_trail(server):
    with server.client() as client:
        begin = time.monotonic()
        client.send(request("/wait-answer-wait?0") * 40)
        times = []
        for _ in range(40):
            assert client.read().body == b"0"
            times.append(since(begin))
        assert times[16] < 0.3 <= times[17] <= times[33] < 0.6 <= times[34]
        client.alive()


def test_large_bodies_in_a_pipeline_arrive_whole(server):
    with server.client() as client:
        client.send(request("/big") * 40 + GET)
        for _ in range(40):
            assert client.read().body == b"x" * 300_000
        assert client.read().body == b"hello"
        client.alive()


def test_a_client_that_does_not_read_is_not_worked_for(server):
    """A pipeline of large responses: at most a few are made before the client takes one."""
    resident = server.rss_kib()
    with server.client(receive_bytes=4096) as client:
        thread = send_beside(client, request("/fresh") * 300)
        made = [0]
        while made[-1] == 0 or len(made) < 30:  # each look is a turn of the loop in which more might be made
            made.append(int(server.ask(request("/made")).body))
        assert made[-1] < 10
        assert server.rss_kib() - resident < 60_000
        client.reset()
        thread.join()


def test_input_that_cannot_be_used_yet_is_not_taken_without_bound(server):
    resident = server.rss_kib()
    with server.client() as client:
        client.send(request("/later?x"))
        client.sock.settimeout(0.4)
        total = 0
        slow = request("/later?" + "y" * 900) * 100
        with pytest.raises(TimeoutError):
            for _ in range(2000):
                total += client.sock.send(slow)
        assert server.rss_kib() - resident < 8_000, total
    server.unharmed()


def test_a_client_that_sends_on_without_reading_is_not_taken_without_bound(server):
    resident = server.rss_kib()
    with server.client(receive_bytes=4096) as client:
        client.send(request("/big") * 20)
        client.sock.settimeout(0.4)
        small = request("/echo?" + "y" * 900) * 100
        with pytest.raises(TimeoutError):
            for _ in range(2000):
                client.sock.send(small)
        assert server.rss_kib() - resident < 8_000
        client.sock.settimeout(20)
        for _ in range(20):
            assert len(client.read().body) == 300_000
    server.unharmed()


def test_a_body_that_comes_while_the_response_before_is_not_taken(server):
    body = b"b" * 900_000
    with server.client(receive_bytes=4096) as client:
        thread = send_beside(client, request("/big") * 30 + request("/echo", method="POST", body=body) + GET)
        for _ in range(30):
            assert len(client.read().body) == 300_000
        assert client.read().body == body
        assert client.read().body == b"hello"
        thread.join()
        client.alive()


def test_the_worker_is_the_one_it_was(server):
    server.unharmed()
