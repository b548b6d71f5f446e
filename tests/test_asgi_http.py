"""HTTP through kore.asgi: scopes, bodies and responses that stream, limits, and what happens when one side leaves."""

from __future__ import annotations

import json

import pytest

from tests.asgi_harness import mounting
from tests.http_server_harness import ENGINES, Client, chunked, request
from tests.support import wait_until

APP = '''
import json

async def body_of(receive):
    body, pieces = b"", 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            said(f"disconnected after {len(body)}")
            return None
        pieces += 1
        body += message["body"]
        if not message["more_body"]:
            return body

async def answer(send, body, status=200, headers=()):
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})

async def app(scope, receive, send):
    if scope["type"] != "http":
        raise ValueError("only http")
    path = scope["path"].removeprefix(scope["root_path"])
    try:
        await globals()[path.strip("/").split("/")[0] or "index"](scope, receive, send)
    finally:
        if path.startswith(("/endless", "/flood", "/swallow", "/wait", "/slow")):
            said(f"{path} ended")

async def index(scope, receive, send):
    await answer(send, b"hello")

async def scope(scope, receive, send):
    def plain(value):
        return value.decode("latin-1") if isinstance(value, bytes) else str(value)
    scope["again"] = type(await receive()).__name__
    await answer(send, json.dumps(scope, default=plain).encode(), headers=[(b"content-type", b"application/json")])

async def echo(scope, receive, send):
    body = await body_of(receive)
    if body is not None:
        await answer(send, body)

async def stream_back(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    more = True
    while more:
        message = await receive()
        more = message["more_body"]
        await send({"type": "http.response.body", "body": message["body"].upper(), "more_body": more})

async def pieces(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": iter([(b"x-a", b"1"), [b"x-a", b"2"]])})
    for number in range(3):
        await send({"type": "http.response.body", "body": b"%d," % number, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body"})

async def stated(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
    for number in range(3):
        await send({"type": "http.response.body", "body": b"%d," % number, "more_body": number < 2})

async def large(scope, receive, send):
    await answer(send, b"x" * 1000000)

async def nothing(scope, receive, send):
    await answer(send, b"", 204)

async def unmodified(scope, receive, send):
    await answer(send, b"", 304, [(b"etag", b"x")])

async def sleeping(scope, receive, send):
    await asyncio.sleep(0.01)
    await answer(send, b"slept")

async def afterwards(scope, receive, send):
    await answer(send, b"first")
    message = await receive()
    message = await receive()
    said("afterwards: " + message["type"])
    await asyncio.sleep(0.01)
    said("afterwards ended")

async def flood(scope, receive, send):
    """Never suspends but in send."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    sent = 0
    try:
        while True:
            await send({"type": "http.response.body", "body": b"x" * 10000, "more_body": True})
            sent += 10000
            if sent % 10000000 == 0:
                said(f"sent {sent}")
    except OSError as error:
        said(f"flood stopped: {type(error).__name__}")
        raise

async def slow_reader(scope, receive, send):
    first = await receive()
    said(f"got {len(first['body'])}")
    await asyncio.sleep(1)
    body = await body_of(receive)
    await answer(send, str(len(first["body"]) + len(body)).encode())

async def endless(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begin", "more_body": True})
    await receive()
    said("endless: " + (await receive())["type"])

async def wait(scope, receive, send):
    await receive()
    said("wait begins")
    said("wait: " + (await receive())["type"])
    try:
        await answer(send, b"too late")
    except OSError:
        said("send raised")
        raise

async def fail(scope, receive, send):
    raise KeyError("before anything")

async def fail_later(scope, receive, send):
    await asyncio.sleep(0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise KeyError("after the start")

async def fail_in_body(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"part", "more_body": True})
    raise KeyError("in the body")

async def forget(scope, receive, send):
    pass

async def forget_rest(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
    await send({"type": "http.response.body", "body": b"part", "more_body": True})

async def ignore_body(scope, receive, send):
    await asyncio.sleep(0.01)
    await answer(send, b"ignored", 403)

async def bad(scope, receive, send):
    what = scope["path"].split("/")[-1]
    header = {
        "name": (b"x y", b"1"), "value": (b"x", b"1\\r\\nx-evil: 1"), "text": ("x", "1"),
        "length": (b"content-length", b"3"), "lengths": (b"content-length", b"x"),
    }.get(what)
    status = {"status": 99, "early": 103}.get(what, 200)
    await send({"type": "http.response.start", "status": status, "headers": [header] if header else []})
    if scope["path"].endswith("twice"):
        await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})
    await send({"type": "http.response.body", "body": b"x"})

async def close(scope, receive, send):
    fields = [(b"connection", b"close"), (b"date", b"today"), (b"transfer-encoding", b"chunked")]
    await answer(send, b"bye", headers=fields)

async def file(scope, receive, send):
    await send({"type": "http.response.early_hint", "links": [b"</x.css>; rel=preload"]})
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/x-python")]})
    await send({"type": "http.response.pathsend", "path": __file__})

async def file_and_wait(scope, receive, send):
    """Waits for the client while the file goes out, as Starlette's streams do; and then again."""
    await receive()
    waiting = asyncio.ensure_future(receive())
    await asyncio.sleep(0)
    await send({"type": "http.response.start", "status": int(scope["query_string"] or 200)})
    await send({"type": "http.response.pathsend", "path": __file__})
    first, second = await waiting, await receive()
    said(f"file_and_wait: {first['type']} {second['type']}")

async def what_is_no_body(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    for body in (5, "text", None, [1]):
        try:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        except TypeError as error:
            said(f"what_is_no_body: {error}")
    for body in (bytearray(b"one"), memoryview(b"two"), b""):
        await send({"type": "http.response.body", "body": body, "more_body": bool(body)})

kore.asgi(app)
'''


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with mounting(tmp_path_factory.mktemp("asgi"), request.param, APP) as found:
        yield found


def test_a_scope_says_what_was_asked(server):
    """Everything ASGI's HTTP scope has, with bytes as they came and text decoded."""
    with server.client() as client:
        found = client.ask(request("/scope/a%20b%2F%C3%A9?x=%20&y", "X-One: 1", "x-one:  two \t", "Empty:"))
        port = client.sock.getsockname()[1]
        again = json.loads(client.ask(request("/scope/a%20b%2F%C3%A9?x=%20&y", "Other: 3")).body)
    scope = json.loads(found.body)
    assert found.fields["content-type"] == "application/json"
    assert scope["type"] == "http"
    assert scope["asgi"]["version"] == "3.0"
    assert (scope["http_version"], scope["method"], scope["scheme"]) == ("1.1", "GET", "http")
    assert scope["path"] == "/scope/a b/é"
    assert scope["raw_path"] == "/scope/a%20b%2F%C3%A9"
    assert scope["query_string"] == "x=%20&y"
    assert scope["root_path"] == ""
    assert scope["headers"] == [["host", "x"], ["x-one", "1"], ["x-one", "two"], ["empty", ""]]
    assert scope["server"] == list(server.address)
    assert scope["client"] == ["127.0.0.1", port]
    assert scope["state"] == {}
    assert again["headers"] == [["host", "x"], ["other", "3"]]
    assert again["client"] == ["127.0.0.1", port]
    absolute = b"GET http://other:81/scope HTTP/1.1\r\nHost: x\r\n\r\n"
    assert json.loads(server.ask(absolute).body)["headers"] == [["host", "other:81"]]


def test_responses_have_the_right_frames(server):
    """In one piece, in several, with and without a body; on one connection."""
    with server.client() as client:
        for _ in range(3):
            assert client.ask(request("/")).body == b"hello"
        found = read_repeated(client.send(request("/pieces")))
        assert found == (200, b"0,1,2,", ["1", "2"])
        found = client.ask(request("/stated"))
        assert (found.fields["content-length"], found.body) == ("6", b"0,1,2,")
        assert client.ask(request("/large")).body == b"x" * 1000000
        assert client.ask(request("/nothing")).status == 204
        found = client.ask(request("/unmodified"))
        assert (found.status, found.fields["etag"]) == (304, "x")
        assert client.ask(request("/sleeping")).body == b"slept"
        found = client.ask(request("/", method="HEAD"), "HEAD")
        assert (found.status, found.fields["content-length"]) == (200, "5")
        found = client.ask(request("/stated", method="HEAD"), "HEAD")
        assert found.fields["content-length"] == "6"
        assert client.ask(request("/")).body == b"hello"
        found = client.ask(request("/close"))
        assert (found.fields["connection"], found.fields["date"], found.body) == ("close", "today", b"bye")
        client.ended()


def test_http_1_0(server):
    """A stream ends with the connection, a body in one piece has its length."""
    with server.client() as client:
        data = client.send(request("/pieces", version="1.0")).rest()
        assert data.endswith(b"\r\n\r\n0,1,2,")
        assert b"connection: close" in data
    with server.client() as client:
        found = client.ask(request("/", "Connection: keep-alive", version="1.0"))
        assert found.body == b"hello"
        assert client.ask(request("/", version="1.0")).body == b"hello"
        client.ended()


def test_many_at_once_in_order(server):
    """Pipelined requests of all kinds are answered in their order."""
    with server.client() as client:
        client.send(request("/") + request("/sleeping") + request("/echo", method="POST", body=b"one")
                    + request("/stated") + chunked("/echo", b"t", b"wo") + request("/"))
        assert [client.read().body for _ in range(6)] == [b"hello", b"slept", b"one", b"0,1,2,", b"two", b"hello"]


@pytest.mark.parametrize("size", [1, 1000, 70000, 900000])
def test_bodies_arrive_whole(server, size):
    """With a length and in chunks, in one go and byte by byte at the start."""
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    with server.client() as client:
        assert client.ask(request("/echo", method="POST", body=body)).body == body
        assert client.ask(chunked("/echo", body[:1], body[1:] or b"x")).body == (body if size > 1 else body + b"x")
        data = request("/echo", method="POST", body=body)
        for position in range(100):
            client.send(data[position : position + 1])
        assert client.ask(data[100:]).body == body
        client.send(request("/echo", "Expect: 100-continue", f"Content-Length: {size}", method="POST"))
        assert client.read().status == 100
        assert client.ask(body).body == body


def test_both_ways_at_once(server):
    """A response streams while its request's body still comes."""
    with server.client() as client:
        client.send(request("/stream_back", "Transfer-Encoding: chunked", method="POST"))
        client.send(b"3\r\nabc\r\n")
        while not client.data.endswith(b"3\r\nABC\r\n"):
            assert client._more()
        client.send(b"2\r\nde\r\n")
        while not client.data.endswith(b"2\r\nDE\r\n"):
            assert client._more()
        client.send(b"0\r\n\r\n")
        found = client.read()
        assert found.body == b"ABCDE"
        assert found.fields["connection"] == "close"


def test_a_body_nobody_receives_is_not_read(server):
    """The client is stopped while the application does not receive, and goes on when it does."""
    size = 900000
    with server.client() as client:
        client.send(request("/slow_reader", f"Content-Length: {size}", method="POST") + b"x" * 1000)
        server.program.wait_for(r"got 1000\b")
        before = server.rss_kib()
        client.send(b"x" * (size - 1000))
        found = client.read()
        assert found.body == str(size).encode()
        assert server.rss_kib() - before < 8192


def test_output_nobody_takes_is_not_made(server):
    """An application that never suspends but in send neither fills memory nor keeps the others waiting."""
    before = server.rss_kib()
    with server.client(receive_bytes=4096) as client:
        client.send(request("/flood"))
        client.sock.recv(1000)
        for _ in range(20):
            assert server.ask(request("/")).body == b"hello"
        assert server.rss_kib() - before < 16384
        assert "sent 20000000" not in server.program.out
    server.program.wait_for("flood stopped: ClientGoneError")
    server.program.wait_for("/flood ended")
    assert "ClientGone" not in server.program.out.replace("flood stopped: ClientGoneError", "")
    server.unharmed()


def test_a_client_that_leaves(server):
    """The application hears of it by a message and from send, waiting for a body or not; nothing is reported."""
    fds = server.fds()
    for path, sent in (("/wait", request("/wait")), ("/endless", request("/endless"))):
        with server.client() as client:
            client.send(sent)
            if path == "/endless":
                while b"begin" not in client.data:
                    client._more()
            else:
                server.program.wait_for("wait begins")
            client.reset()
        server.program.wait_for(f"{path[1:]}: http.disconnect")
        server.program.wait_for(f"{path} ended")
    server.program.wait_for("send raised")
    with server.client() as client:
        client.send(request("/echo", "Content-Length: 10000", method="POST") + b"x" * 100)
        client.half_close()
        client.ended()
    server.program.wait_for("disconnected after 100")
    with server.client() as client:
        client.send(request("/echo", "Content-Length: 300000", method="POST") + b"x" * 100000).reset()
    wait_until(lambda: server.program.out.count("disconnected after") >= 2, "the second upload ends")
    server.settle(fds)
    server.unharmed()
    assert "ClientGone" not in server.program.out.replace("flood stopped: ClientGoneError", "")


def test_work_after_the_response(server):
    """What an application does after its response does not hold up the connection."""
    with server.client() as client:
        assert client.ask(request("/afterwards")).body == b"first"
        assert client.ask(request("/")).body == b"hello"
        server.program.wait_for("afterwards: http.disconnect")
        server.program.wait_for("afterwards ended")


def test_errors_of_the_application(server):
    """500 where nothing was sent, a closed connection where something was; each reported once, with its lines."""
    for path, word in (("/fail", "before anything"), ("/fail_later", "after the start")):
        with server.client() as client:
            assert client.ask(request(path)).status == 500
            client.alive()
        server.program.wait_for(rf"uncaught exception: KeyError\('{word}'\)")
        assert server.program.out.count(f"uncaught exception: KeyError('{word}')") == 1
        assert f'raise KeyError("{word}")' in server.program.out
    with server.client() as client:
        data = client.send(request("/fail_in_body")).rest()
        assert data.endswith(b"4\r\npart\r\n"), "no last chunk"
    with server.client() as client:
        assert client.ask(request("/forget")).status == 500
        client.alive()
    with server.client() as client:
        assert client.send(request("/forget_rest")).rest().endswith(b"\r\n\r\npart")
    server.program.wait_for("ended before its response was whole")
    server.unharmed()


@pytest.mark.parametrize("what", ["name", "value", "text", "length", "lengths", "status", "early", "twice"])
def test_responses_that_cannot_be_sent(server, what):
    """What would break the message apart, or is out of order, is an error of the application."""
    with server.client() as client:
        found = client.ask(request(f"/bad/{what}"))
        assert found.status == 500
        assert "x-evil" not in found.head
        client.alive()


def test_one_body_too_many(server):
    with server.client() as client:
        assert client.ask(request("/bad/body")).body == b"x"
        client.alive()
    server.program.wait_for("http.response.body came after the end")


def test_a_body_that_is_not_wanted(server):
    """It is answered before the body has come: the connection is closed after the response."""
    with server.client() as client:
        client.send(request("/ignore_body", "Content-Length: 500000", method="POST") + b"x" * 1000)
        found = client.read()
        assert (found.status, found.body, found.fields["connection"]) == (403, b"ignored", "close")
        client.ended()
    with server.client() as client:
        found = client.ask(request("/ignore_body", method="POST", body=b"small"))
        assert found.body == b"ignored"


def test_kores_limits_hold(server):
    """http_body_max by length and by count, wrong chunks, large heads."""
    with server.client() as client:
        assert client.ask(request("/echo", "Content-Length: 2000000", method="POST")).status == 413
    with server.client() as client:
        client.send(request("/echo", "Transfer-Encoding: chunked", method="POST"))
        client.send(b"%x\r\n" % 600000 + b"x" * 600000 + b"\r\n%x\r\n" % 600000)
        assert client.read().status == 413
    server.program.wait_for(r"disconnected after [1-9]\d{5}\b")
    with server.client() as client:
        client.send(request("/echo", "Transfer-Encoding: chunked", method="POST") + b"1\r\nx\r\n")
        client.send(b"nonsense\r\n")
        assert client.read().status == 400
    with server.client() as client:
        client.send(request("/stream_back", "Transfer-Encoding: chunked", method="POST") + b"1\r\nx\r\n")
        while not client.data.endswith(b"1\r\nX\r\n"):
            assert client._more()
        client.send(b"nonsense\r\n")
        assert client.rest().count(b"HTTP/1.1") == 1, "no second response within the first"
    assert server.ask(request("/", "X: " + "x" * 5000)).status == 431
    server.unharmed()


def test_files_and_hints(server):
    """http.response.pathsend and http.response.early_hint."""
    with server.client() as client:
        found = client.ask(request("/file"))
        assert (found.status, found.fields["link"]) == (103, "</x.css>; rel=preload")
        found = client.read()
        assert found.body == (server.program.directory / "app.py").read_bytes()
        assert found.fields["content-type"] == "text/x-python"
        client.alive()
    hints = server.ask(request("/scope")).body
    assert set(json.loads(hints)["extensions"]) == {"http.response.pathsend", "http.response.early_hint"}


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_who_waits_for_the_client_hears_that_a_file_is_sent(server, method, status):
    """The response is over, so is the exchange; and a status without a body has none of a file either."""
    before = server.program.out.count("file_and_wait: http.disconnect http.disconnect")
    with server.client() as client:
        found = client.ask(request(f"/file_and_wait?{status}", method=method), method)
        assert found.status == status
        whole = (method, status) == ("GET", 200)
        assert found.body == ((server.program.directory / "app.py").read_bytes() if whole else b"")
        assert ("content-length" in found.fields) == (status == 200)
        wait_until(
            lambda: server.program.out.count("file_and_wait: http.disconnect http.disconnect") > before,
            "the application hears of the end",
        )
        client.alive()


def test_a_body_is_bytes(server):
    """A number is not so many zeros. What is like bytes is taken."""
    assert server.ask(request("/what_is_no_body", version="1.0")).body == b"onetwo"
    server.program.wait_for("what_is_no_body")
    wait_until(lambda: server.program.out.count("what_is_no_body: memoryview: a bytes-like object") == 4, "4 refusals")


def read_repeated(client: Client) -> tuple[int, bytes, list[str]]:
    """A chunked response whose x-a fields repeat."""
    while not client.data.endswith(b"0\r\n\r\n"):
        assert client._more()
    head, _, body = client.data.partition(b"\r\n\r\n")
    client.data = b""
    lines = head.decode().split("\r\n")
    assert "transfer-encoding: chunked" in lines
    parts = body.split(b"\r\n")
    data = b"".join(parts[1::2])
    return int(lines[0].split()[1]), data, [line[5:] for line in lines if line.startswith("x-a: ")]
