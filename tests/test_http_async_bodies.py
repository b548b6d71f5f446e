"""Bodies that an async generator produces: framed as any, asked for no faster than they are taken, and closed."""

from __future__ import annotations

import time

import pytest

from tests.http_server_harness import ENGINES, GET, Client, request, serving, since
from tests.support import wait_until

TEXT = '''
import asyncio
import kore.http.input

kore.http.input.SILENT_S = 0.3
home.accesslog = "home.log"
gates = {}
produced = {}

def say(text):
    kore.log(kore.LOG_INFO, text)

async def items(*values):
    for value in values:
        yield value

async def slow(*values):
    for value in values:
        await kore.suspend(5)
        yield value

async def breaks(*values, wait=False):
    if wait:
        await asyncio.sleep(0)
    for value in values:
        yield value
    raise ValueError("generator")

class Iterable:
    """Neither a generator nor one that can be closed."""

    def __init__(self):
        self.left = 3

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        await asyncio.sleep(0)
        return f"{self.left},"

class Both(Iterable):
    def __iter__(self):
        return iter(["sync"])

class Method:
    async def __aiter__(self):
        yield b"by "
        yield b"method"

async def many(count, size):
    for number in range(count):
        if number % 100 == 0:
            await asyncio.sleep(0)
        yield bytes([number % 256]) * size

BODIES = {
    "bytes": lambda: items(b"one", b"two"),
    "mixed": lambda: items("t\\u00f6", bytearray(b"b"), "", b"", memoryview(b"xcx")[1:-1]),
    "nothing": lambda: items(),
    "emptied": lambda: items("", b""),
    "slow": lambda: slow("a", "b", "c"),
    "slow-nothing": lambda: slow("", ""),
    "iterable": Iterable,
    "both": Both,
    "method": Method,
    "many": lambda: many(1000, 10),
    "large": lambda: many(20, 300_000),
    "one-large": lambda: items(b"L" * 2_000_000),
    "raises-first": lambda: breaks(),
    "bad-first": lambda: items(5),
    "raises-late": lambda: breaks(wait=True),
    "raises-later": lambda: breaks("a"),
    "bad-later": lambda: items("a", 5),
    "exits": lambda: exits(),
    "cancels": lambda: cancels(),
}

async def exits():
    yield b"a"
    raise SystemExit(3)

async def cancels():
    yield b"a"
    asyncio.current_task().cancel()
    await asyncio.sleep(1)

@kore.route("^/body/(.*)$", domain=home, methods=["get"])
def body(req, kind):
    assert req.response(200, BODIES[kind]()) is True

@kore.route("^/async/(.*)$", domain=home, methods=["get"])
async def async_body(req, kind):
    if req.query == "waits":
        await kore.suspend(5)
    req.response(200, BODIES[kind]())
    if req.query == "on":
        await kore.suspend(20)

async def watched(name):
    gates[name] = kore.queue()
    say(f"{name} begins")
    try:
        while (item := await gates[name].pop()) is not None:
            yield item
    except GeneratorExit:
        say(f"{name} GeneratorExit")
        raise
    finally:
        await asyncio.sleep(0)
        say(f"{name} closed")

@kore.route("^/watched/(.*)$", domain=home, methods=["get"], hooks={"on_free": lambda req: say(f"free {req.path}")})
def watch(req, name):
    req.response_header("content-type", "text/event-stream")
    req.response(200, watched(name))

@kore.route("^/push/(.*)$", domain=home, methods=["get"])
def push(req, name):
    gates[name].push(req.query)
    req.response(200, b"pushed")

held = []

async def endless(name, size):
    produced[name] = 0
    try:
        while True:
            produced[name] += size
            yield b"x" * size
    finally:
        say(f"endless {name} closed")

@kore.route("^/endless/(.*)/(.*)$", domain=home, methods=["get"])
def never_ends(req, name, size):
    held[:] = [endless(name, int(size))]  # so that nothing but aclose() can close it
    req.response(200, held[0])

@kore.route("^/produced/(.*)$", domain=home, methods=["get"])
def how_much(req, name):
    req.response(200, str(produced[name]))

async def answers(req):
    try:
        req.response(200, b"inside")
    except RuntimeError:
        say("refused inside")
    yield b"outside"

@kore.route("/answers-itself", domain=home, methods=["get"])
def answers_itself(req):
    try:
        req.response(200, answers(req))
    except RuntimeError as error:
        say(f"outside: {error}")

def sync_answers(req):
    req.response(200, b"inside")
    yield b"outside"

@kore.route("/sync-answers-itself", domain=home, methods=["get"])
def sync_answers_itself(req):
    try:
        req.response(200, sync_answers(req))
    except RuntimeError as error:
        say(f"outside: {error}")

@kore.route("/twice", domain=home, methods=["get"])
def twice(req):
    req.response(200, slow("first"))
    try:
        req.response(200, items("second"))
    except RuntimeError as error:
        say(f"twice: {error}")
'''

MANY = b"".join(bytes([number % 256]) * 10 for number in range(1000))
WHOLE = {
    "bytes": b"onetwo", "mixed": "töbc".encode(), "nothing": b"", "emptied": b"", "slow": b"abc", "slow-nothing": b"",
    "iterable": b"2,1,0,", "both": b"sync", "method": b"by method", "many": MANY,
    "large": b"".join(bytes([number]) * 300_000 for number in range(20)), "one-large": b"L" * 2_000_000,
}  # fmt: skip
CUT = {"raises-late": b"", "raises-later": b"a", "bad-later": b"a", "exits": b"a", "cancels": b"a"}
WAYS = ["/body/", "/async/", "/async/{}?waits", "/async/{}?on"]


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("bodies"), request.param, TEXT, "kore.config.http_write_timeout = 1") as made:
        yield made


@pytest.fixture(scope="module")
def names():
    """Names that no test has used."""
    return (f"n{number}" for number in range(1000))


def path_of(way: str, kind: str) -> str:
    return way.format(kind) if "{}" in way else way + kind


def open_stream(server, name: str) -> Client:
    """A client of ``/watched``, with the head read."""
    client = server.client()
    client.send(request(f"/watched/{name}"))
    server.program.wait_for(f"{name} begins")
    while b"\r\n\r\n" not in client.data:
        assert client._more()
    head, _, client.data = client.data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert head.endswith(b"transfer-encoding: chunked")
    return client


def chunk_of(client: Client) -> bytes:
    data = client._exactly(int(client._line(), 16))
    assert client._exactly(2) == b"\r\n"
    return data


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_produced_is_what_arrives(server, way, kind):
    """In chunks, and the connection stays; HEAD has the same head and asks for nothing."""
    with server.client() as client:
        found = client.ask(request(path_of(way, kind)))
        assert (found.status, found.body) == (200, WHOLE[kind])
        assert found.fields["transfer-encoding"] == "chunked"
        head = client.ask(request(path_of(way, kind), method="HEAD"), "HEAD")
        assert {**head.fields, "date": ""} == {**found.fields, "date": ""}
        client.send(request(path_of(way, kind)) + GET)
        assert [client.read().body, client.read().body] == [WHOLE[kind], b"hello"]


@pytest.mark.parametrize("kind", WHOLE)
def test_http_1_0_has_it_up_to_the_end_of_the_connection(server, kind):
    with server.client() as client:
        found = client.ask(request(f"/body/{kind}", "Connection: keep-alive", version="1.0"))
        assert (found.body, found.fields["connection"]) == (WHOLE[kind], "close")
        assert "transfer-encoding" not in found.fields


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["raises-first", "bad-first"])
def test_what_fails_at_once_is_a_500(server, way, kind):
    with server.client() as client:
        assert client.ask(request(path_of(way, kind))).status == 500
        client.alive()


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("kind", CUT)
def test_what_fails_later_ends_the_connection_without_the_last_chunk(server, kind, version):
    """RFC 9112 8: the client can tell that it is not whole; in HTTP/1.0 nothing can tell."""
    before = server.program.out.count("pyhttp_iterobj_next: uncaught")
    with server.client() as client:
        rest = client.send(request(f"/body/{kind}", version=version) + GET).rest()
    head, _, body = rest.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/{version} 200 ".encode())
    assert body == (CUT[kind] if version == "1.0" or not CUT[kind] else b"1\r\na\r\n")
    server.program.wait_for("pyhttp_iterobj_next: uncaught", count=before + 1)
    server.unharmed()


def test_each_item_leaves_when_it_is_produced_and_the_head_before_the_first(server, names):
    """The handler has ended by then; the log and on_free hear of the request when its body is over."""
    name = next(names)
    with open_stream(server, name) as client:
        for item in ("one", "two", "three"):
            server.ask(request(f"/push/{name}?{item}"))
            assert chunk_of(client) == item.encode()
        assert f"free /watched/{name}" not in server.program.out
        server.ask(request(f"/push/{name}"))  # None: the end
        assert client._exactly(5) == b"0\r\n\r\n"
        server.program.wait_for(f"free /watched/{name}")
        client.alive()
    assert f"{name} GeneratorExit" not in server.program.out
    log = server.program.directory / "home.log"
    wait_until(lambda: f'"GET /watched/{name} HTTP/1.1" 200 11 ' in log.read_text(), "its line")


@pytest.mark.parametrize("how", ["reset", "write", "fin"])
def test_a_client_that_leaves_closes_the_generator(server, names, how):
    """At its await, once the server knows: by RST, by RST in answer to the next item, or by FIN and silence."""
    name = next(names)
    fds = server.fds()
    client = open_stream(server, name)
    server.ask(request(f"/push/{name}?a"))
    assert chunk_of(client) == b"a"
    if how == "reset":
        client.reset()
    else:
        client.sock.close()
    if how == "write":
        server.ask(request(f"/push/{name}?b"))
        server.ask(request(f"/push/{name}?c"))
    server.program.wait_for(f"{name} GeneratorExit")
    server.program.wait_for(f"{name} closed")  # its clean-up may wait
    server.program.wait_for(f"free /watched/{name}")
    server.settle(fds)
    server.unharmed()


def test_a_client_that_only_sent_its_fin_gets_all_of_it(server, names):
    name = next(names)
    with open_stream(server, name) as client:
        client.half_close()
        begin = time.monotonic()
        while since(begin) < 1.5:  # some times what silence would have to last
            server.ask(request(f"/push/{name}?item"))
            assert chunk_of(client) == b"item"
        server.ask(request(f"/push/{name}"))
        assert client._exactly(5) == b"0\r\n\r\n"
        client.ended()


@pytest.mark.parametrize("size", [7, 60_000, 3_000_000])
def test_no_more_is_produced_than_the_client_takes(server, names, size):
    """What it does not read fills the kernel's buffers and no more; others are served meanwhile."""
    name = next(names)
    with server.client(receive_bytes=20_000) as client:
        client.send(request(f"/endless/{name}/{size}"))
        assert client.sock.recv(100)
        seen = [0]

        def stands() -> bool:
            seen.append(int(server.ask(request(f"/produced/{name}")).body))
            return seen[-1] == seen[-2]

        rss = server.rss_kib()
        wait_until(stands, "it is not asked for more")
        assert seen[-1] < 12_000_000
        assert server.rss_kib() - rss < 20_000
        server.program.wait_for(f"endless {name} closed")  # http_write_timeout: it is reset
        with pytest.raises(ConnectionResetError):
            client.rest()
    server.unharmed()


def test_a_generator_that_never_waits_leaves_the_others_their_turns(server, names):
    name = next(names)
    with server.client() as client, server.client() as other:
        client.send(request(f"/endless/{name}/100"))
        taken = 0
        for _ in range(200):
            taken += len(client.sock.recv(1 << 16))
            other.alive()
        assert taken > 200
        client.reset()
        server.program.wait_for(f"endless {name} closed")


@pytest.mark.parametrize("path", ["/answers-itself", "/sync-answers-itself"])
def test_a_body_that_answers_its_own_request_gives_one_response(server, path):
    """http.md 19.1 row 14, in the one place where it could still be done: the first step of a body."""
    count = server.program.out.count("outside: ")
    with server.client() as client:
        assert client.ask(request(path)).body == b"inside"
        client.alive()
    server.program.wait_for("outside: .*answered by the body", count=count + 1)


def test_the_first_answer_counts(server):
    with server.client() as client:
        assert client.ask(request("/twice")).body == b"first"
        client.alive()
    server.program.wait_for("twice: .* has been answered already")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_closes_the_generators_that_are_left(tmp_path, engine):
    with serving(tmp_path, engine, TEXT) as server:
        with open_stream(server, "left") as client:
            server.program.signal(15)
            server.program.wait_for("left GeneratorExit")
            assert client.rest() == b""
        assert server.program.wait() == 0
