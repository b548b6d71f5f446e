"""Hooks of a route: what they are called with and when, that they can end a request, and that each end is told once."""

from __future__ import annotations

import hashlib

import pytest

from tests.http_server_harness import ENGINES, GET, chunked, request, serving
from tests.support import wait_until

TEXT = """
import asyncio

seen = []
freed = []

def note(req, word):
    seen.append(f"{word} {req.path}")

def veto(req):
    what = req.request_header("x-do") or ""
    if what == "false":
        return False
    if what == "answer":
        req.response(402, b"pay first")
    if what == "both":
        req.response(402, b"pay first")
        return False
    if what == "raise":
        raise ValueError("on_headers")
    return {"true": True, "none": None, "zero": 0, "text": "no"}.get(what)

def headers(req, *captures):
    note(req, "headers")
    req.captures = captures
    return veto(req)

async def headers_quick(req, *captures):
    return headers(req, *captures)

async def headers_late(req, *captures):
    await asyncio.sleep(0.02)
    return headers(req, *captures)

def verify(req, value):
    note(req, "verify")
    return value == "good"

def free(req):
    note(req, "free")
    req.times = getattr(req, "times", 0) + 1
    freed.append(req.times)
    kore.log(kore.LOG_INFO, f"free {req.path} {req.connection is not None}")

def handler(req, *captures):
    note(req, "handler")
    assert captures == getattr(req, "captures", captures)
    req.response(200, f"{captures} {len(req.body)}".encode())

async def waiting(req, *captures):
    await asyncio.sleep(0.01)
    handler(req, *captures)

AUTH = {"type": "header", "value": "x-token", "verify": verify}
for name, hook in (("plain", headers), ("quick", headers_quick), ("late", headers_late)):
    home.route(f"^/{name}/(.*)$", handler, hooks={"on_headers": hook, "on_free": free})
    home.route(f"^/async-{name}/(.*)$", waiting, hooks={"on_headers": hook})
    home.route(f"^/auth-{name}/(.*)$", handler, hooks={"on_headers": hook}, auth=AUTH)

@kore.prerequest
def before(req):
    note(req, "prerequest")

@kore.route("/seen", domain=home)
def show(req):
    text = ",".join(seen)
    seen.clear()
    req.response(200, text.encode())

def piece(req, data):
    what = req.request_header("x-do") or ""
    assert type(data) is bytes and data
    req.pieces = getattr(req, "pieces", 0) + 1
    req.got = getattr(req, "got", b"") + data
    if what == "raise":
        raise ValueError("on_body_chunk")
    if what == "oserror":
        raise OSError(5, "the application's own")
    if what == "answer":
        req.response(402, b"enough")
        return True
    if what == "answer-false":
        req.response(402, b"enough")
        return False
    return {"false": False, "none": None, "one": 1}.get(what, True)

async def piece_quick(req, data):
    return piece(req, data)

async def piece_late(req, data):
    await asyncio.sleep(0.001)
    return piece(req, data)

def pieces_seen(req):
    note(req, "handler")
    for use in (lambda: req.body, lambda: req.body_read(10)):
        try:
            use()
        except RuntimeError as error:
            assert "on_body_chunk" in str(error), error
        else:
            assert not hasattr(req, "got")
    req.response(200, getattr(req, "got", b"") + req.body_digest)

for name, hook in (("piece", piece), ("piece-quick", piece_quick), ("piece-late", piece_late)):
    home.route(f"/{name}", pieces_seen, hooks={"on_body_chunk": hook, "on_headers": headers, "on_free": free})

class Ways:
    def sync(req):
        req.response(200, b"sync")
    async def quick(req):
        req.response(200, b"quick")
    async def late(req):
        await asyncio.sleep(0.01)
        req.response(200, b"late")
    async def goes_on(req):
        req.response(200, b"goes_on")
        await asyncio.sleep(0.05)
    def raises(req):
        raise ValueError("handler")
    async def raises_late(req):
        await asyncio.sleep(0)
        raise ValueError("handler")
    def silent(req):
        pass
    def iterates(req):
        req.response(200, (b"x" * 1000 for _ in range(100)))
    async def iterates_late(req):
        await asyncio.sleep(0)
        req.response(200, (b"x" * 1000 for _ in range(100)))
    def large(req):
        req.response(200, bytes(1000000))
    def endless(req):
        req.response(200, (bytes(10000) for _ in iter(int, 1)))
    async def waits(req):
        kore.log(kore.LOG_INFO, "handler waits")
        try:
            await kore.suspend(3600000)
        finally:
            kore.log(kore.LOG_INFO, f"closed after free {freed[-1:]}")
    async def waits_answered(req):
        req.response(200, b"waits")
        kore.log(kore.LOG_INFO, "handler waits")
        await kore.suspend(300)
    def free_raises(req):
        req.response(200, b"free_raises")

for name, way in vars(Ways).items():
    if not name.startswith("__"):
        home.route(f"/{name}", way, hooks={"on_free": free})

def free_and_raise(req):
    free(req)
    raise ValueError("on_free")

async def free_async(req):
    await asyncio.sleep(0)
    free(req)

home.route("/free-raises", Ways.sync, hooks={"on_free": free_and_raise})
home.route("/free-async", Ways.sync, hooks={"on_free": free_async})

@kore.route("/freed", domain=home)
def show_freed(req):
    text = repr(freed)
    freed.clear()
    req.response(200, text.encode())
"""

WAYS = ["plain", "quick", "late", "async-plain", "async-quick", "async-late"]


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("hooks"), request.param, TEXT, "kore.config.http_body_max = 2000000") as made:
        yield made


def seen(server) -> list[str]:
    return server.ask(request("/seen")).body.decode().replace("prerequest /seen", "").strip(",").split(",")


# --- on_headers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", [b"", b"some", bytes(100_000)])
def test_on_headers_comes_first_and_then_the_rest(server, way, body):
    seen(server)
    path = f"/{way}/a"
    for value in ("", "true", "none", "zero", "text"):
        found = server.ask(request(path, f"x-do: {value}", method="POST", body=body))
        assert (found.status, found.body) == (200, f"('a',) {len(body)}".encode())
        steps = [step for step in seen(server) if not step.startswith("free")]
        assert steps == [f"headers {path}", f"prerequest {path}", f"handler {path}"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("what", "status"), [("false", 500), ("answer", 402), ("both", 402), ("raise", 500)])
def test_on_headers_can_end_the_request(server, way, what, status):
    """http.md 19.3: False, or an answer, is a veto; what is raised is one 500. The C platform called the handler."""
    seen(server)
    path = f"/{way}/veto"
    for data, connection in (
        (request(path, f"x-do: {what}"), "keep-alive"),
        (request(path, f"x-do: {what}", method="POST", body=b"short"), "keep-alive"),
        (request(path, f"x-do: {what}", "Content-Length: 1000000", method="POST"), "close"),
    ):
        with server.client() as client:
            found = client.ask(data)
            assert (found.status, found.fields["connection"]) == (status, connection)
            if connection == "keep-alive":
                client.alive()
            else:
                client.half_close().ended()
        steps = {step for step in seen(server) if path in step and not step.startswith("free")}
        assert steps == {f"headers {path}"}


def test_what_on_headers_raises_is_told(server):
    for way, label in (("plain", "python_runtime_http_request"), ("quick", "coroutine"), ("late", "coroutine")):
        assert server.ask(request(f"/{way}/x", "x-do: raise")).status == 500
        server.program.wait_for(rf"{label}: uncaught exception: ValueError\('on_headers'\)")


@pytest.mark.parametrize("way", ["plain", "quick", "late"])
def test_on_headers_comes_before_authentication(server, way):
    seen(server)
    path = f"/auth-{way}/x"
    for body in (b"", b"body"):
        assert server.ask(request(path, method="POST", body=body)).status == 403
        assert seen(server)[0] == f"headers {path}"
        assert server.ask(request(path, "x-do: answer", "x-token: good", method="POST", body=body)).status == 402
        assert seen(server)[0] == f"headers {path}"
        assert server.ask(request(path, "x-token: good", method="POST", body=body)).status == 200
        assert seen(server)[:4] == [f"{step} {path}" for step in ("headers", "verify", "prerequest", "handler")]


# --- on_body_chunk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/piece", "/piece-quick", "/piece-late"])
def test_on_body_chunk_has_the_body_and_nothing_is_stored(server, path):
    body = bytes(range(256)) * 2000
    digest = hashlib.sha256(body).digest()
    with server.client() as client:
        assert client.ask(request(path, method="POST", body=body)).body == body + digest
        pieces = [body[at : at + 30_000] for at in range(0, len(body), 30_000)]
        assert client.ask(chunked(path, *pieces)).body == body + digest
        for byte in request(path, method="POST", body=b"abc"):
            client.send(bytes([byte]))
        assert client.read().body == b"abc" + hashlib.sha256(b"abc").digest()
        assert client.ask(request(path)).body == bytes(32), "without a body it is not called"
        assert client.ask(chunked(path)).status == 200
        client.send(request(path, method="POST", body=b"x") + GET)
        assert (client.read().status, client.read().body) == (200, b"hello")


@pytest.mark.parametrize("path", ["/piece", "/piece-quick", "/piece-late"])
@pytest.mark.parametrize(("what", "status"), [
    ("false", 500), ("none", 500), ("one", 500), ("raise", 500), ("oserror", 500), ("answer", 402),
    ("answer-false", 402),
])
def test_on_body_chunk_ends_the_request_with_one_answer(server, path, what, status):
    """kore-api.md section 4: one 500 and the end of the connection, where the C platform sent two."""
    seen(server)
    head = request(path, f"x-do: {what}", "Content-Length: 1000000", method="POST")
    for piece in (b"first", bytes(100_000)):
        with server.client() as client:
            found = client.ask(head + piece)
            assert (found.status, found.fields["connection"]) == (status, "close")
            client.half_close().ended()
        assert f"handler {path}" not in seen(server)
    server.unharmed()


@pytest.mark.parametrize("path", ["/piece", "/piece-late"])
def test_uploads_to_on_body_chunk_do_not_pile_up(server, path):
    with server.client() as client:
        assert client.ask(request(path, "x-do: drop", method="POST", body=b"x")).status == 200
        rss = server.rss_kib()
        client.send(request(path, "Content-Length: 2000000", method="POST"))
        for _ in range(20):
            client.send(bytes(100_000))
        assert len(client.read().body) == 2_000_032
        assert server.rss_kib() - rss < 12_000, "the application itself keeps it"


# --- on_free ---------------------------------------------------------------------------------------------------


def forget(server) -> None:
    """Count from here."""
    server.ask(request("/freed"))


def freed(server, count: int) -> None:
    """Wait until `count` requests were told to be over, each of them once."""
    found: list[int] = []

    def told() -> bool:
        found.extend(eval(server.ask(request("/freed")).body))
        return len(found) >= count

    wait_until(told, f"{count} requests are over, not {found}")
    assert found == [1] * count


@pytest.mark.parametrize("path", [
    "/sync", "/quick", "/late", "/goes_on", "/raises", "/raises_late", "/silent", "/iterates", "/iterates_late",
    "/large", "/free-raises", "/free-async",
])
@pytest.mark.parametrize("body", [b"", b"body"])
def test_on_free_comes_once_for_an_answered_request(server, path, body):
    forget(server)
    with server.client() as client:
        for _ in range(3):
            client.ask(request(path, method="POST", body=body))
        client.send(request(path, method="POST", body=body) * 3)
        for _ in range(3):
            client.read()
        client.alive()
    freed(server, 6)
    server.unharmed()


@pytest.mark.parametrize("close", ["Connection: close", "X: y"])
def test_on_free_comes_once_when_the_connection_ends(server, close):
    forget(server)
    for path in ("/sync", "/late", "/iterates", "/large"):
        with server.client() as client:
            client.ask(request(path, close))
    freed(server, 4)


@pytest.mark.parametrize("body", [b"", b"body"])
def test_on_free_comes_once_for_a_request_that_is_ended_at_its_gate(server, body):
    forget(server)
    for way in ("plain", "quick", "late"):
        for what in ("false", "answer", "raise"):
            server.ask(request(f"/{way}/x", f"x-do: {what}", method="POST", body=body))
    freed(server, 9)


def test_on_free_comes_once_for_a_request_that_is_refused(server):
    forget(server)
    chunk = request("/sync", "Transfer-Encoding: chunked", method="POST")
    assert server.ask(chunk + b"zz\r\n").status == 400
    assert server.ask(chunk + b"ffffffff\r\n").status == 413
    assert server.ask(request("/piece", "x-do: false", method="POST", body=b"x")).status == 500
    freed(server, 3)


def test_on_free_comes_once_and_before_the_handler_is_closed_when_the_client_leaves(server):
    """kore-api.md 10.3: told that the connection is gone, then the coroutine is closed."""
    forget(server)
    with server.client() as client:
        client.send(request("/waits"))
        server.program.wait_for("handler waits")
        client.reset()
    server.program.wait_for(r"free /waits False")
    server.program.wait_for(r"closed after free \[1\]")
    freed(server, 1)


def test_on_free_comes_once_for_what_the_client_broke_off(server):
    forget(server)
    for data, answered in (
        (request("/sync", "Content-Length: 100", method="POST") + b"part", False),
        (request("/endless"), True),
        (request("/waits_answered"), True),
        (request("/late/x", "Content-Length: 100", method="POST"), False),
    ):
        with server.client(receive_bytes=4096) as client:
            client.send(data)
            if answered:
                client.sock.recv(1000)
            else:
                server.ask(GET)
            client.reset()
    freed(server, 4)
    server.unharmed()


def test_on_free_that_raises_is_told(server):
    server.ask(request("/free-raises"))
    server.program.wait_for(r"python_runtime_http_request_free: uncaught exception: ValueError\('on_free'\)")


@pytest.mark.parametrize("engine", ENGINES)
def test_on_free_comes_for_what_the_stop_cuts_off(tmp_path, engine):
    with serving(tmp_path, engine, TEXT) as server, server.client() as client:
        client.send(request("/waits"))
        server.program.wait_for("handler waits")
        for _ in range(2):
            server.program.signal(15)
        server.program.wait()
        assert len([line for line in server.program.out.splitlines() if "free /waits" in line]) == 1
