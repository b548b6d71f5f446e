"""Authentication: who is let in, what the others are told, and that it is asked before a body is read."""

from __future__ import annotations

import socket

import pytest

from tests.http_server_harness import ENGINES, GET, chunked, request, serving

TEXT = """
import asyncio

def note(req, word):
    kore.log(kore.LOG_INFO, f"{word} {req.path}")

def check(req, value):
    note(req, "verify")
    if value == "raise":
        raise ValueError("verify")
    if value == "exit":
        raise SystemExit(3)
    if value == "answer":
        req.response(418, b"own")
    return {"good": True, "truthy": 1, "none": None, "text": "yes"}.get(value, False)

async def check_quickly(req, value):
    return check(req, value)

async def check_slowly(req, value):
    await asyncio.sleep(0.02)
    return check(req, value)

async def check_for_ever(req, value):
    kore.log(kore.LOG_INFO, "verify waits")
    try:
        await kore.suspend(3600000)
    finally:
        kore.log(kore.LOG_INFO, "verify closed")

def handler(req, *captures):
    note(req, "handler")
    req.response(200, f"in {len(req.body)}".encode())

async def waiting(req, *captures):
    await asyncio.sleep(0)
    handler(req)

WAYS = {"plain": check, "quick": check_quickly, "late": check_slowly, "ever": check_for_ever}
for name, verify in WAYS.items():
    home.route(f"/{name}", handler, auth={"type": "header", "value": "X-Token", "verify": verify})
    home.route(f"^/{name}/async(.*)$", waiting, auth={"type": "header", "value": "x-token", "verify": verify})
    home.route(f"/{name}/cookie", handler, auth={
        "type": "cookie", "value": "sess", "verify": verify, "redirect": "/login?a=b"})

@kore.prerequest
def note_prerequest(req):
    note(req, "prerequest")
"""

WAYS = ["/plain", "/quick", "/late", "/plain/async1", "/quick/async1", "/late/async1"]


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    options = "kore.config.http_body_max = 4000000"
    with serving(tmp_path_factory.mktemp("auth"), request.param, TEXT, options) as made:
        yield made


@pytest.mark.parametrize("path", WAYS)
def test_exactly_true_passes_and_nothing_else(server, path):
    with server.client() as client:
        for _ in range(3):
            assert client.ask(request(path, "x-token: good")).body == b"in 0"
            for value in ("bad", "truthy", "none", "text", ""):
                found = client.ask(request(path, f"X-Token: {value}"))
                assert (found.status, found.body, found.fields["connection"]) == (403, b"", "keep-alive")
            assert client.ask(request(path)).status == 403, "without the header"
        client.alive()


@pytest.mark.parametrize("way", ["plain", "quick", "late"])
def test_the_name_of_a_cookie_is_exact(server, way):
    """kore-api.md 8.5: the C platform took any cookie whose text began alike, and was confused by a shorter one."""
    path = f"/{way}/cookie"
    with server.client() as client:
        for cookies in ("sess=good", "a=b; sess=good", "s=bad; ses=bad; sessX=bad; sess=good; b=c"):
            assert client.ask(request(path, f"Cookie: {cookies}")).body == b"in 0", cookies
        assert client.ask(request(path, "Cookie: a=b", "Cookie: sess=good")).body == b"in 0"
        for cookies in ("sess=bad", "sessX=good", "ses=good", "Sess=good", "sess", "x=sess=good", "a=b"):
            found = client.ask(request(path, f"Cookie: {cookies}"))
            assert (found.status, found.fields["location"]) == (302, "/login?a=b"), cookies
        client.alive()


def test_without_what_is_to_be_verified_nobody_is_asked(tmp_path):
    with serving(tmp_path, "epoll", TEXT) as server:
        assert server.ask(request("/plain")).status == 403
        assert server.ask(request("/plain", "Cookie: x-token=good")).status == 403
        assert server.ask(request("/plain", "x-token: good")).status == 200
        server.program.wait_for("handler /plain")
        assert server.program.out.count("verify /plain") == 1
        assert server.program.out.count("prerequest /plain") == 1, "only for who is let in"


def test_an_exception_lets_nobody_in_and_is_told_once(tmp_path):
    """kore-api.md section 4: in a plain function it is a refusal, in a coroutine the request's one 500."""
    with serving(tmp_path, "epoll", TEXT) as server, server.client() as client:
        for value in ("raise", "exit"):
            assert client.ask(request("/plain", f"x-token: {value}")).status == 403
        for path in ("/quick", "/late"):
            for body in (b"", b"body"):
                found = client.ask(request(path, "x-token: raise", method="POST", body=body))
                assert found.status == 500
        client.alive()
        server.program.wait_for("coroutine: uncaught exception: ValueError", count=4)
        text = server.program.out
        assert text.count("python_runtime_validator: uncaught exception: ValueError('verify')") == 1
        assert text.count("python_runtime_validator: uncaught exception: SystemExit(3)") == 1
        assert "handler" not in text
        server.unharmed()


def test_a_result_that_is_neither_true_nor_false_is_told(tmp_path):
    with serving(tmp_path, "epoll", TEXT) as server:
        assert server.ask(request("/plain", "x-token: truthy")).status == 403
        server.program.wait_for("verify returned int, which is neither True nor False")


@pytest.mark.parametrize("path", WAYS)
def test_a_verify_that_answers_itself_has_answered(server, path):
    with server.client() as client:
        for body in (b"", b"body"):
            found = client.ask(request(path, "x-token: answer", method="POST", body=body))
            assert (found.status, found.body) == (418, b"own")
        client.alive()


@pytest.mark.parametrize("path", WAYS)
def test_a_body_is_received_once_its_sender_is_let_in(server, path):
    body = bytes(300000)
    with server.client() as client:
        assert client.ask(request(path, "x-token: good", method="POST", body=body)).body == b"in 300000"
        coded = chunked(path, body[:1000], body[:70000]).replace(b"\r\n\r\n", b"\r\nx-token: good\r\n\r\n", 1)
        assert client.ask(coded).body == b"in 71000"
        for byte in request(path, "x-token: good", method="PUT", body=b"ab"):
            client.send(bytes([byte]))
        assert client.read().body == b"in 2"
        client.send(request(path, "x-token: good", method="POST", body=b"one") + GET)
        assert (client.read().body, client.read().body) == (b"in 3", b"hello")


@pytest.mark.parametrize("path", WAYS)
def test_who_is_not_let_in_uploads_nothing(server, path):
    """http.md 19.3: the answer comes before the body, and the connection is closed rather than read to the end."""
    for fields in (["Content-Length: 3000000"], ["Transfer-Encoding: chunked"],
                   ["Content-Length: 10", "Expect: 100-continue"]):  # fmt: skip
        with server.client() as client:
            found = client.ask(request(path, *fields, method="POST"))
            assert (found.status, found.fields["connection"]) == (403, "close")
            client.half_close().ended()


@pytest.mark.parametrize("path", WAYS)
def test_a_short_body_of_who_is_not_let_in_is_dropped(server, path):
    smuggled = request("/plain", "x-token: good")
    with server.client() as client:
        for _ in range(3):
            found = client.ask(request(path, method="POST", body=smuggled))
            assert (found.status, found.fields["connection"]) == (403, "keep-alive")
        client.send(request(path, "Content-Length: 4", method="POST"))
        assert client.read().status == 403
        client.send(b"ab").send(b"cd" + GET)
        assert client.read().body == b"hello"


@pytest.mark.parametrize("path", WAYS)
def test_100_continue_is_said_to_who_is_let_in(server, path):
    head = request(path, "x-token: good", "Content-Length: 5", "Expect: 100-continue", method="POST")
    with server.client() as client:
        assert client.ask(head).status == 100
        assert client.ask(b"hello").body == b"in 5"
        client.alive()


def test_a_verify_that_waits_is_closed_when_the_client_leaves(server):
    before = server.program.out.count("verify closed")
    for number, data in enumerate((
        request("/ever", "x-token: x"),
        request("/ever", "x-token: x", method="POST", body=b"x" * 100),
        request("/ever", "x-token: x", "Content-Length: 100000", method="POST"),
    ), 1):  # fmt: skip
        with server.client() as client:
            client.send(data)
            server.program.wait_for("verify waits", count=before + number)
            client.reset()
        server.program.wait_for("verify closed", count=before + number)
    before += 3
    with server.client() as client:  # it may only have ended its side; so it is asked, and answers with RST
        client.send(request("/ever", "x-token: x", method="POST", body=b"x" * 100))
        server.program.wait_for("verify waits", count=before + 1)
        client.half_close().sock.close()
    server.program.wait_for("verify closed", count=before + 1)
    server.unharmed()


def test_a_half_closed_client_is_answered(server):
    for path in WAYS:
        with server.client() as client:
            client.send(request(path, "x-token: good", method="POST", body=b"x" * 100)).half_close()
            assert client.read().body == b"in 100"
            client.ended()


def test_what_is_sent_while_a_verify_waits_is_held_back_within_bounds(server):
    """The client sends a body that may not be read yet: the kernel keeps it, and not the worker."""
    before = server.program.out.count("verify waits")
    with server.client() as client:
        client.sock.settimeout(1)
        head = request("/ever", "x-token: x", "Content-Length: 4000000", method="POST")
        client.send(head)
        server.program.wait_for("verify waits", count=before + 1)
        rss = server.rss_kib()
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 64_000_000:
                sent += client.sock.send(bytes(1 << 20))
        assert server.rss_kib() - rss < 2048
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.unharmed()


@pytest.mark.parametrize("engine", ENGINES)
def test_requests_that_wait_at_the_gate_count(tmp_path, engine):
    with serving(tmp_path, engine, TEXT, "kore.config.http_request_limit = 1") as server:
        with server.client() as first, server.client() as second:
            first.send(request("/ever", "x-token: x", method="POST", body=b"x"))
            server.program.wait_for("verify waits")
            for body in (b"x", b""):
                assert second.ask(request("/late", "x-token: good", method="POST", body=body)).status == 503
            second.alive()
        server.program.wait_for("verify closed")
        assert server.ask(request("/late", "x-token: good", method="POST", body=b"x")).body == b"in 1"
        server.program.signal(15)
        assert server.program.wait() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_file_maps_have_their_gate_too(tmp_path, engine):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.txt").write_text("secret")
    text = TEXT + 'home.filemaps({"/files/": ("secret", {"type": "header", "value": "x-token", "verify": check})})\n'
    with serving(tmp_path, engine, text) as server, server.client() as client:
        for _ in range(3):
            assert client.ask(request("/files/a.txt", "x-token: good")).body == b"secret"
            assert client.ask(request("/files/a.txt")).status == 403
            assert client.ask(request("/files/../files/a.txt", "x-token: bad")).status == 403
            assert client.ask(request("/files/none", "x-token: bad")).status == 403
        client.alive()


@pytest.mark.parametrize("engine", ENGINES)
def test_who_was_not_let_in_and_sends_no_more_of_its_body_is_left(tmp_path, engine):
    """It has had its answer: the deadline of its body ends the connection without another."""
    with serving(tmp_path, engine, TEXT, "kore.config.http_body_timeout = 1") as server, server.client() as client:
        client.send(request("/plain", "Content-Length: 10", method="POST") + b"ab")
        assert client.read().status == 403
        client.ended()
        server.unharmed()
