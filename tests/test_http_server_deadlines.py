"""Deadlines of a connection, each by its own clock, on a worker that has nothing else to do.

Every scenario runs beside the others against one server; the tests then look at what each of them saw, and when.
"""

from __future__ import annotations

import select
import threading
import time
from typing import NamedTuple

import pytest

from tests.http_server_harness import ENGINES, GET, Client, request, serving, since

HEADER_S, BODY_S, KEEPALIVE_S, WRITE_S = 2, 3, 1, 1
LATE_S = 1.3
"""Deadlines are looked at every half second and given one of these more than promised; the rest is this machine's."""

TEXT = """
BIG = bytes(20_000_000)

@kore.route("/body", domain=home, methods=["post"])
def body(req):
    req.response(200, str(len(req.body)).encode())

@kore.route("/big", domain=home, methods=["get"])
def big(req):
    req.response(200, BIG)

@kore.route("/stream", domain=home, methods=["get"])
def stream(req):
    req.response(200, (bytes(10000) for _ in range(2000)))

@kore.route("/wait", domain=home, methods=["get"])
async def wait(req):
    await kore.suspend(3600)
    req.response(200, b"waited")
"""


class Seen(NamedTuple):
    """What a client saw: the statuses, and when the connection ended, in seconds from the last thing it did."""

    statuses: list[int]
    ended_s: float
    error: str = ""


def trickle(client: Client, data: bytes, every_s: float) -> None:
    """Send byte by byte until the server has something to say."""
    for byte in data:
        readable, _, _ = select.select([client.sock], [], [], every_s)
        if readable:
            return
        client.send(bytes([byte]))


def read_all(client: Client, begin: float) -> Seen:
    statuses = []
    try:
        while True:
            if not client.data and not client._more():
                return Seen(statuses, since(begin))
            statuses.append(client.read().status)
    except ConnectionResetError:
        return Seen(statuses, since(begin), "reset")


def silent(client):
    return read_all(client, time.monotonic())


def half_a_head(client):
    begin = time.monotonic()
    client.send(GET[:9])
    return read_all(client, begin)


def a_head_byte_by_byte(client):
    begin = time.monotonic()
    trickle(client, b"GET /" + b"a" * 900, 0.1)
    return read_all(client, begin)


def half_a_body(client):
    begin = time.monotonic()
    client.send(request("/body", method="POST", body=b"xx")[:-1])
    return read_all(client, begin)


def half_a_chunk(client):
    begin = time.monotonic()
    client.send(request("/body", "Transfer-Encoding: chunked", method="POST") + b"5\r\nxx")
    return read_all(client, begin)


def a_body_byte_by_byte(client):
    begin = time.monotonic()
    data = request("/body", method="POST", body=b"x" * 1000)
    client.send(data[:-1000])
    trickle(client, data[-1000:], 0.02)
    return read_all(client, begin)


def a_body_in_time(client):
    client.send(request("/body", method="POST", body=b"xx")[:-1])
    time.sleep(HEADER_S + 0.3)  # longer than a head may take
    assert client.ask(b"x").body == b"2"
    return read_all(client, time.monotonic())


def idle(client):
    assert client.ask(GET).fields["keep-alive"] == f"timeout={KEEPALIVE_S}"  # what is announced is what is done
    return read_all(client, time.monotonic())


def idle_and_then_half_a_head(client):
    client.ask(GET)
    time.sleep(KEEPALIVE_S / 2)
    begin = time.monotonic()
    client.send(GET[:9])
    return read_all(client, begin)


def busy_for_a_while(client):
    for _ in range(4):  # longer than an idle connection lives
        client.ask(GET)
        time.sleep(0.4)
    client.ask(GET)
    return read_all(client, time.monotonic())


def does_not_read(client):
    return wait_for_hang_up(client, "/big")


def does_not_read_a_stream(client):
    return wait_for_hang_up(client, "/stream")


def wait_for_hang_up(client, path):
    begin = time.monotonic()
    client.send(request(path))
    poll = select.poll()
    poll.register(client.sock, 0)  # POLLERR and POLLHUP only
    events = poll.poll(15000)
    return Seen([], since(begin), "reset" if events else "nothing")


def reads_slowly(client):
    begin = time.monotonic()
    client.send(request("/big"))
    while since(begin) < 3.5 * WRITE_S:
        client.data += client.sock.recv(16384)
        time.sleep(0.2)
    found = client.read()
    assert len(found.body) == 20_000_000
    return Seen([found.status], since(begin))


def waits_for_a_handler(client):
    begin = time.monotonic()
    found = client.ask(request("/wait"))
    assert found.body == b"waited"
    return Seen([found.status], since(begin))


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        silent, half_a_head, a_head_byte_by_byte, half_a_body, half_a_chunk, a_body_byte_by_byte, a_body_in_time, idle,
        idle_and_then_half_a_head, busy_for_a_while, does_not_read, does_not_read_a_stream, reads_slowly,
        waits_for_a_handler,
    )
}


@pytest.fixture(scope="module", params=ENGINES)
def seen(request, tmp_path_factory):
    """What each scenario saw."""
    options = "\n".join(
        f"kore.config.http_{name} = {value}"
        for name, value in (
            ("header_timeout", HEADER_S), ("body_timeout", BODY_S), ("keepalive_time", KEEPALIVE_S),
            ("write_timeout", WRITE_S),
        )
    )
    found: dict[str, Seen | BaseException] = {}

    with serving(tmp_path_factory.mktemp("deadlines"), request.param, TEXT, options) as server:
        fds = server.fds()

        def run(name) -> None:
            try:
                with server.client(receive_bytes=4096 if "read" in name else 0) as client:
                    found[name] = SCENARIOS[name](client)
            except BaseException as error:
                found[name] = error

        threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in SCENARIOS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        server.settle(fds)
        server.unharmed()
        yield found


@pytest.mark.parametrize(("scenario", "statuses", "seconds"), [
    ("silent", [], HEADER_S),
    ("half_a_head", [408], HEADER_S),
    ("a_head_byte_by_byte", [408], HEADER_S),
    ("half_a_body", [408], BODY_S),
    ("half_a_chunk", [408], BODY_S),
    ("a_body_byte_by_byte", [408], BODY_S),
    ("a_body_in_time", [], KEEPALIVE_S),
    ("idle", [], KEEPALIVE_S),
    ("idle_and_then_half_a_head", [408], HEADER_S),
    ("busy_for_a_while", [], KEEPALIVE_S),
])
def test_what_takes_too_long_is_ended_in_time(seen, scenario, statuses, seconds):
    found = seen[scenario]
    assert isinstance(found, Seen), found
    assert (found.statuses, found.error) == (statuses, "")
    assert seconds <= found.ended_s < seconds + LATE_S


@pytest.mark.parametrize("scenario", ["does_not_read", "does_not_read_a_stream"])
def test_a_client_that_takes_nothing_of_its_response_is_reset(seen, scenario):
    found = seen[scenario]
    assert isinstance(found, Seen), found
    assert found.error == "reset"
    assert WRITE_S <= found.ended_s < WRITE_S + 2 * LATE_S  # the kernel fills its buffers first


@pytest.mark.parametrize("scenario", ["reads_slowly", "waits_for_a_handler"])
def test_what_only_takes_long_is_left_alone(seen, scenario):
    found = seen[scenario]
    assert isinstance(found, Seen), found
    assert found.statuses == [200]


@pytest.mark.parametrize("engine", ENGINES)
def test_without_keep_alive_every_response_is_the_last(tmp_path, engine):
    with serving(tmp_path, engine, TEXT, "kore.config.http_keepalive_time = 0") as server:
        for data in (GET, request("/body", method="POST", body=b"x"), request("/nothing")):
            with server.client() as client:
                found = client.ask(data)
                assert found.fields["connection"] == "close"
                assert "keep-alive" not in found.fields
                client.ended()
