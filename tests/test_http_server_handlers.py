"""What handlers do, and what the client sees of it: one response, rightly framed, whatever happens in them."""

from __future__ import annotations

import pytest

from tests.http_server_harness import ENGINES, GET, chunked, request, serving

TEXT = '''
import array
import asyncio
import http
import io
import sys
import uuid

kept = []

def path(text, methods=("get",)):
    return kore.route(text, domain=home, methods=list(methods))

@path("/returns-a-value")
def returns_a_value(req):
    req.response(200, b"ok")
    return kore.RESULT_OK

@path("/async")
async def quick(req):
    req.response(200, b"async")
    return True

@path("/waits")
async def waits(req):
    await asyncio.sleep(0)
    req.response(200, b"waited")

WHERE = {"before": ("raise", "answer"), "after": ("answer", "raise")}

def step(req, what):
    if what == "answer":
        req.response_header("x-mine", "yes")
        req.response(200, b"answered")
    elif what == "set":
        req.response_header("content-encoding", "gzip")
    elif what == "exit":
        sys.exit(3)
    elif what == "raise":
        raise ValueError(req.query)
    elif what == "again":
        try:
            req.response(202, b"again")
        except RuntimeError as error:
            kore.log(kore.LOG_INFO, f"again: {error}")

@path("/sync-steps")
def sync_steps(req):
    for what in req.query.split(","):
        step(req, what)

@path("/async-steps")
async def async_steps(req):
    for what in req.query.split(","):
        if what == "wait":
            await kore.suspend(10)
        elif what == "future":
            await asyncio.wait_for(asyncio.sleep(0), 5)
        elif what == "cancel":
            asyncio.current_task().cancel()
            await asyncio.sleep(1)
        else:
            step(req, what)

class Surprise(BaseException):
    def __repr__(self):
        raise ValueError("not even that")

@path("/surprise")
def surprise(req):
    raise Surprise

def endless(req):
    try:
        while True:
            yield b"x" * 30000
    finally:
        kore.log(kore.LOG_INFO, "endless closed")

def breaks(items):
    yield from items
    raise ValueError("iterator")

BODIES = {
    "bytes": lambda req: b"bytes",
    "empty": lambda req: b"",
    "bytearray": lambda req: bytearray(b"bytearray"),
    "memoryview": lambda req: memoryview(b"xmemoryviewx")[1:-1],
    "array": lambda req: array.array("H", [0x6161]),
    "subclass": lambda req: type("Mine", (bytes,), {})(b"subclass"),
    "str": lambda req: "str \\u00e9",
    "none": lambda req: None,
    "list": lambda req: ["one", "", "tw\\u00f6"],
    "generator": lambda req: (b"%d," % n for n in range(1000)),
    "mixed": lambda req: iter([b"a", "b", bytearray(b"c"), memoryview(b"d"), b""]),
    "nothing": lambda req: iter(()),
    "emptied": lambda req: [b"", ""],
    "file": lambda req: io.BytesIO(b"line\\nline\\n"),
    "bad-first": lambda req: [5, b"a"],
    "bad-later": lambda req: [b"a", 5],
    "raises-first": lambda req: breaks([]),
    "raises-later": lambda req: breaks([b"a"]),
    "number": lambda req: 5,
    "large": lambda req: b"L" * 200_000,
    "large-str": lambda req: "L" * 200_000,
    "pieces": lambda req: (b"P" * 100_000 for _ in range(30)),
    "endless": endless,
}

@path("^/body/(.*)$")
def body(req, kind):
    kept[:] = [req.response(200, BODIES[kind](req))]

@path("^/async-body/(.*)$")
async def async_body(req, kind):
    if req.query:
        await kore.suspend(10)
    kept[:] = [req.response(200, BODIES[kind](req))]
    if req.query == "on":
        await kore.suspend(10)

@path("/huge")
def huge(req):
    req.response(200, HUGE)

HUGE = bytes(20 * 1024 * 1024)

@path("/fields")
def fields(req):
    req.response_header("Content-Type", "text/plain")
    req.response_header("X-Twice", "one")
    req.response_header("Set-Cookie", "a=1")
    assert req.response_header("x-twice", "two") is True
    req.response_header("Set-Cookie", "b=2")
    req.response_header("Content-Length", "1000")
    req.response_header("transfer-encoding", "chunked")
    req.response_header("Server", "mine")
    req.response_header("x-text", "tab\\t\\u00e9")
    req.response(200, b"fields")

@path("/says-close")
def says_close(req):
    req.response_header("connection", "close")
    req.response(200, b"bye")

@path("/bad-fields")
def bad_fields(req):
    errors = []
    for name, value in (("a b", "c"), ("", "c"), ("a", "b\\r\\nc: d"), ("a", "b\\0"), ("a:", "b"), (5, "b"), ("a", 5),
                        (b"a", "b"), ("a\\n", "b"), ("a", "b\\n"), ("\\u00e9", "b")):
        try:
            req.response_header(name, value)
        except Exception as error:
            errors.append(type(error).__name__)
    req.response(200, ",".join(errors))

@path("/asks", ["get", "post"])
def asks(req):
    errors = []
    for name in ("host", "path", "query", "method", "agent", "body", "connection", "protocol"):
        try:
            setattr(req, name, 1)
        except AttributeError:
            continue
        errors.append(name)
    req.mine = 5
    parts = [req.host, req.path, req.query, req.method, req.agent, req.protocol, req.headers(), req.mine, errors,
             req.request_header("X-TWICE"), req.request_header("host"), req.request_header("none"), type(req).__name__]
    req.response(200, repr(parts))

@path("/reads", ["post"])
def reads(req):
    parts = [req.body_read(3), req.body_read(1024)[0], req.body_read(0), req.body_read(5)]
    parts += [req.body[:3], len(req.body), req.body_read(5)]
    for length in (1025, -1, "x"):
        try:
            req.body_read(length)
        except Exception as error:
            parts.append(type(error).__name__)
    req.response(200, repr(parts))
    kore.log(kore.LOG_INFO, f"body after the response: {len(req.body)}")

@path("/peer")
async def peer(req):
    client = req.connection
    assert client is req.connection
    assert {client: 1}[req.connection] == 1
    assert client.x509 is None and client.x509dict is None
    client.count = getattr(client, "count", 0) + 1
    await asyncio.sleep(0)
    assert client is req.connection
    req.response(200, repr((client.addr, os.readlink(f"/proc/self/fd/{client.fd}")[:7], client.count)))

@path("^/disconnect/(.*)$")
async def disconnect(req, when):
    if when == "later":
        await asyncio.sleep(0)
    if when != "after":
        assert req.connection.disconnect() is True
    if when == "waits":
        await kore.suspend(50)
    req.response(200, b"flushed " + b"x" * 100_000)
    if when == "after":
        assert req.connection.disconnect() is True

@path("/disconnect-sync")
def disconnect_sync(req):
    req.connection.disconnect()
    req.response(200, b"flushed")

@path("/keep")
def keep(req):
    kept[:] = [req, req.connection]
    req.response(200, b"kept")

@path("/use-kept")
def use_kept(req):
    old, client = kept
    found = [old.path, old.request_header("x-old"), old.connection is client, client.fd == req.connection.fd]
    for use in (lambda: old.response(200, b"late"), lambda: client.addr):
        try:
            found.append(use())
        except RuntimeError:
            found.append("RuntimeError")
    found.append(client.disconnect() if client.fd < 0 else None)
    req.response(200, repr(found))

@path("^/signature/(.*)$")
def signature(req, how):
    try:
        if how == "keyword":
            req.response(status=200, body=b"x")
        elif how == "few":
            req.response(200)
        elif how == "text":
            req.response("200", b"x")
        elif how == "none":
            req.response(None, None)
        elif how == "enum":
            return req.response(http.HTTPStatus.IM_A_TEAPOT, b"enum")
    except Exception as error:
        return req.response(200, type(error).__name__)

@path("/task-kill")
async def is_killed(req):
    ident = kore.task_id()
    async def killer():
        kore.task_kill(ident)
    kore.task_create(killer())
    await kore.suspend(3600000)
'''


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("handlers"), request.param, TEXT) as made:
        yield made


@pytest.fixture
def client(server):
    with server.client() as made:
        yield made
        made.alive()  # whatever a handler did, the connection has to be in order


def get(client, path, *fields):
    return client.ask(request(path, *fields))


def test_results_of_handlers_do_not_matter(client):
    assert get(client, "/returns-a-value").body == b"ok"
    assert get(client, "/async").body == b"async"
    assert get(client, "/waits").body == b"waited"


@pytest.mark.parametrize(("steps", "status"), [
    ("raise", 500), ("set,raise", 500), ("answer,raise", 200), ("exit", 500), ("answer,exit", 200),
    ("answer,again", 200), ("answer,again,again,raise", 200),
])
def test_a_sync_handler_that_fails_gives_one_response(server, client, steps, status):
    found = get(client, f"/sync-steps?{steps}")
    assert (found.status, found.body) == (status, b"answered" if status == 200 else b"")
    assert "content-encoding" not in found.fields
    if "raise" in steps:
        server.program.wait_for(rf"python_runtime_http_request: uncaught exception: ValueError\('{steps}'\)")
    if "again" in steps:
        server.program.wait_for("again: .* has been answered already")


@pytest.mark.parametrize("wait", ["wait", "future"])
@pytest.mark.parametrize(("steps", "status"), [
    ("raise", 500), ("WAIT,raise", 500), ("set,WAIT,raise", 500), ("answer,WAIT,raise", 200),
    ("WAIT,answer,raise", 200), ("WAIT,answer,WAIT,raise", 200), ("WAIT,exit", 500), ("WAIT,answer,WAIT,again", 200),
    ("WAIT,cancel", 500), ("WAIT", 500),
])
def test_an_async_handler_that_fails_gives_one_response(server, client, steps, status, wait):
    steps = steps.replace("WAIT", wait)
    found = get(client, f"/async-steps?{steps}")
    assert (found.status, found.body) == (status, b"answered" if status == 200 else b"")
    assert "content-encoding" not in found.fields
    if "raise" in steps:
        server.program.wait_for(rf"coroutine: uncaught exception: ValueError\('{steps}'\)")
    if steps == wait:
        server.program.wait_for(r"async-steps.*: the handler ended without a response")


def test_no_response_is_a_500_and_a_line_of_the_log(server, client):
    assert get(client, "/sync-steps?none").status == 500
    server.program.wait_for(r"http_request GET /sync-steps\?none>: the handler ended without a response")


def test_an_exception_that_cannot_even_be_shown(server, client):
    assert get(client, "/surprise").status == 500
    server.program.wait_for("Surprise whose repr")


WHOLE = {
    "bytes": b"bytes", "empty": b"", "bytearray": b"bytearray", "memoryview": b"memoryview", "array": b"aa",
    "subclass": b"subclass", "str": "str é".encode(), "none": b"", "large": b"L" * 200_000, "large-str": b"L" * 200_000,
}
STREAMED = {
    "list": "onetwö".encode(), "generator": b"".join(b"%d," % n for n in range(1000)), "mixed": b"abcd", "nothing": b"",
    "emptied": b"", "file": b"line\nline\n", "pieces": b"P" * 3_000_000,
}
PATHS = ["/body/{}", "/async-body/{}", "/async-body/{}?wait", "/async-body/{}?on"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [*WHOLE, *STREAMED])
def test_bodies_of_every_kind(client, kind, path):
    found = get(client, path.format(kind))
    assert (found.status, found.body) == (200, (WHOLE | STREAMED)[kind])
    assert ("transfer-encoding" in found.fields) == (kind in STREAMED)
    head = client.ask(request(path.format(kind), method="HEAD"), "HEAD")
    assert {**head.fields, "date": ""} == {**found.fields, "date": ""}
    client.alive()


@pytest.mark.parametrize("kind", STREAMED)
def test_http_1_0_gets_no_chunks(server, kind):
    with server.client() as client:
        found = client.ask(request(f"/body/{kind}", "Connection: keep-alive", version="1.0"))
        assert (found.body, found.fields["connection"]) == (STREAMED[kind], "close")
        assert "transfer-encoding" not in found.fields


@pytest.mark.parametrize("kind", ["bad-first", "raises-first", "number"])
def test_a_body_that_fails_before_its_first_byte_is_a_500(client, kind):
    assert get(client, f"/body/{kind}").status == 500


@pytest.mark.parametrize("kind", ["bad-later", "raises-later"])
def test_a_body_that_fails_later_is_seen_not_to_be_whole(server, kind):
    with server.client() as client:
        client.send(request(f"/body/{kind}"))
        data = client.rest()
        assert data.endswith(b"\r\n\r\n1\r\na\r\n")  # and no last chunk
    server.program.wait_for("pyhttp_iterobj_next: uncaught exception")


def test_a_client_that_leaves_an_endless_body_closes_its_generator(server):
    seen = server.program.out.count("endless closed")
    for path in ("/body/endless", "/async-body/endless", "/async-body/endless?wait", "/async-body/endless?on"):
        with server.client() as client:
            client.send(request(path))
            client._exactly(1_000_000)
            client.reset()
        seen += 1
        server.program.wait_for("endless closed", count=seen)


def test_a_large_body_to_a_slow_reader_costs_no_copy(server):
    resident = server.rss_kib()
    with server.client(receive_bytes=4096) as client:
        for _ in range(2):
            assert client.ask(request("/huge")).body == bytes(20 * 1024 * 1024)
        client.send(request("/huge"))
        client._exactly(10_000)
        assert server.rss_kib() - resident < 30_000
    server.unharmed()


# --- fields ----------------------------------------------------------------------------------------------------


def test_fields_of_the_application(client):
    found = get(client, "/fields")
    assert found.body == b"fields"
    assert found.fields["content-length"] == "6"
    assert found.fields["server"] == "mine"
    assert found.head.index("Set-Cookie: a=1") < found.head.index("Set-Cookie: b=2")
    assert "Content-Type: text/plain\r\n" in found.head
    assert "x-twice: two" in found.head
    assert "X-Twice" not in found.head
    assert found.fields["x-text"] == "tab\té"
    assert "x-twice" not in get(client, "/async").fields


def test_the_order_of_a_head(client):
    names = [line.partition(":")[0].lower() for line in get(client, "/fields").head.split("\r\n")[1:]]
    assert names[:4] == ["server", "date", "connection", "keep-alive"]
    assert names[-1] == "content-length"


def test_connection_close_closes(server):
    with server.client() as client:
        found = client.send(request("/says-close") + GET).read()
        assert (found.fields["connection"], found.body) == ("close", b"bye")
        client.ended()


def test_fields_that_would_break_the_head_are_refused(client):
    assert get(client, "/bad-fields").body.split(b",") == (
        [b"ValueError"] * 5 + [b"TypeError"] * 3 + [b"ValueError"] * 3
    )


# --- the request -----------------------------------------------------------------------------------------------


def test_what_a_request_says_of_itself(client):
    found = client.ask(
        b"GET /asks?a=b%20c?d HTTP/1.1\r\nUser-Agent: me\r\nHost: X:80\r\nX-Twice:  one \r\nx-twice: two\r\n"
        b"Empty:\r\nLatin: \xe9\r\n\r\n"
    )
    headers = {
        "host": "X:80", "user-agent": "me", "x-twice": "two", "empty": "", "latin": "\udce9",
    }  # fmt: skip
    assert found.body.decode("utf-8") == repr(
        ["X:80", "/asks", "a=b%20c?d", 1, "me", "http", headers, 5, [], "one", "X:80", None, "http_request"]
    )
    assert get(client, "/asks").body.decode().startswith("['x', '/asks', None, 1, None, 'http', {'host': 'x'}")


def test_nothing_of_one_request_reaches_the_next(client):
    """Also when the same head comes again and is not looked at."""
    for _ in range(3):
        assert b"'me', 'http'" in get(client, "/asks", "User-Agent: me").body
        assert b"None, 'http'" in get(client, "/asks").body
        assert b"'you', 'http'" in get(client, "/asks", "User-Agent: you").body


def test_bodies_are_read_as_the_reference_has_it(server, client):
    body = b"abc" + b"x" * 1024 + b"defgh" + b"y"
    expected = repr([
        (3, b"abc"), 1024, (0, b""), (5, b"defgh"), b"abc", len(body), (0, b""), "RuntimeError", "ValueError",
        "TypeError",
    ]).encode()  # fmt: skip
    assert client.ask(request("/reads", method="POST", body=body)).body == expected
    assert client.ask(chunked("/reads", body[:10], body[10:])).body == expected
    server.program.wait_for(f"body after the response: {len(body)}", count=2)


def test_the_connection_is_one_stable_object(client):
    for count in (1, 2, 3):
        assert get(client, "/peer").body.decode() == repr(("127.0.0.1", "socket:", count))


@pytest.mark.parametrize("path", [
    "/disconnect/first", "/disconnect/later", "/disconnect/waits", "/disconnect/after", "/disconnect-sync",
])
def test_disconnecting_lets_the_answer_leave(server, path):
    with server.client() as client:
        found = client.send(request(path) + GET).read()
        assert found.body.startswith(b"flushed")
        assert found.fields["connection"] == ("keep-alive" if path.endswith("after") else "close")
        client.half_close().ended()


def test_a_request_kept_beyond_its_end(server):
    with server.client() as client:
        assert get(client, "/keep", "X-Old: yes").body == b"kept"
        assert get(client, "/use-kept").body.decode() == repr(
            ["/keep", "yes", True, True, "RuntimeError", "127.0.0.1", None]
        )
        assert get(client, "/keep").body == b"kept"
        fds = server.fds()
    server.settle(fds - 1)
    assert server.ask(request("/use-kept")).body.decode() == repr(
        ["/keep", None, False, False, "RuntimeError", "RuntimeError", True]
    )


@pytest.mark.parametrize(("how", "answer"), [
    ("keyword", b"TypeError"), ("few", b"TypeError"), ("text", b"ValueError"), ("none", b"ValueError"),
])
def test_the_arguments_of_a_response(client, how, answer):
    assert get(client, f"/signature/{how}").body == answer


def test_a_status_of_the_standard_library(client):
    found = get(client, "/signature/enum")
    assert (found.status, found.body) == (418, b"enum")


def test_a_killed_handler_is_answered_for(client):
    assert get(client, "/task-kill").status == 500


def test_the_worker_is_the_one_it_was(server):
    server.unharmed()
