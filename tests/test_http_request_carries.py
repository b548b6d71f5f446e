"""What requests carry, asked of a real server: arguments, cookies, forms, files, bodies, and use after the end."""

from __future__ import annotations

import hashlib

import pytest

from tests.http_server_harness import ENGINES, chunked, request, serving
from tests.support import wait_until

FORM = "Content-Type: application/x-www-form-urlencoded"
MULTIPART = "Content-Type: multipart/form-data; boundary=B"

TEXT = """
import asyncio
import json

kept = []

def shown(req, *names):
    req.response(200, json.dumps([req.argument(name) for name in names]).encode())

async def slowly(req, value):
    await asyncio.sleep(0.01)
    return value == "good"

def raising(req, value):
    raise ValueError(value)

def leaving(req, value):
    raise SystemExit(1)

@kore.route("/get", domain=home, methods=["GET"], GET={"a": "^[0-9]+$", "b": ""})
def get(req):
    assert req.populate_get() is True
    shown(req, "a", "b")

@kore.route("/form", domain=home, post={"a": "^[0-9]+$"}, put={"a": "x"}, qs={"q": "."})
def form(req):
    assert (req.populate_get(), req.populate_post()) == (True, True)
    shown(req, "a", "q")

@kore.route("/waits", domain=home, get={"a": slowly, "b": "."}, post={"a": slowly})
def slow(req):
    if req.method == kore.HTTP_METHOD_GET:
        req.populate_get()
    elif "multipart" in req.request_header("content-type"):
        req.populate_multi()
    else:
        req.populate_post()
    shown(req, "a", "b")

@kore.route("/waits-async", domain=home, get={"a": slowly})
async def slow_async(req):
    await asyncio.sleep(0)
    req.populate_get()
    shown(req, "a")

@kore.route("/leave", domain=home, get={"a": lambda req, value: asyncio.sleep(0)})
def undeclared(req):
    req.populate_get()
    shown(req, "a")

@kore.route("/rules", domain=home, get={"a": raising, "b": leaving, "c": lambda req, value: 1, "d": "."})
def rules(req):
    req.populate_get()
    shown(req, "a", "b", "c", "d")

@kore.route("/cookies", domain=home)
def cookies(req):
    before = req.cookie("a")
    req.populate_cookies()
    req.response(200, json.dumps([before, req.cookie("a"), req.cookie("b")]).encode())

@kore.route("/upload", domain=home, post={"text": "."})
def upload(req):
    req.populate_multipart()
    file = req.file_lookup("f")
    assert file is None or isinstance(file, kore.pyhttp_file)
    about = [file.name, file.filename, file.content_type, file.length, file.read(5)[1].decode()] if file else None
    req.response(200, json.dumps([req.argument("text"), about]).encode())

@kore.route("/caught", domain=home, post={})
def caught(req):
    try:
        req.populate_multi()
    except ValueError as error:
        req.response(422, str(error).encode())

@kore.route("/body", domain=home, post={"a": "."})
def body(req):
    pieces = b""
    while (got := req.body_read(1000))[0]:
        pieces += got[1]
    assert pieces == req.body
    assert req.body_path is None
    req.populate_post()
    digest = req.body_digest
    req.response(200, digest + req.body)
    kore.log(kore.LOG_INFO, f"after the answer: {pieces == req.body and digest == req.body_digest}")

@kore.route("/agent", domain=home)
def agent(req):
    wrong = []
    for name in ("agent", "path", "host", "method", "body", "body_path", "body_digest", "connection", "protocol"):
        try:
            setattr(req, name, "x")
            wrong.append(name)
        except AttributeError:
            pass
    req.response(200, f"{req.agent} {wrong}".encode())

@kore.route("/keep", domain=home)
def keep(req):
    kept.append((req, req.connection))
    req.populate_get()
    req.response(200, b"kept")

@kore.route("/use", domain=home)
def use(req):
    old, connection = kept.pop()
    found = []
    for function in (
        lambda: old.response(200, b"late"), lambda: old.response(200, ["late"]),
        lambda: old.websocket_handshake(print, print, print),
    ):
        try:
            function()
            found.append("nothing")
        except Exception as error:
            found.append(type(error).__name__)
    old.populate_get(), old.populate_post(), old.populate_multi(), old.populate_cookies(), old.response_header("a", "b")
    same = [old.path, old.argument("a"), old.cookie("a"), old.body, old.connection is None, connection.fd]
    connection.disconnect()
    req.response(200, json.dumps([found, same[:-3]]).encode())
"""


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("carries"), request.param, TEXT) as made:
        yield made


def post(path: str, field: str, body: bytes, method: str = "POST") -> bytes:
    return request(path, field, method=method, body=body)


def test_arguments_of_the_query_reach_the_handler(server):
    with server.client() as client:
        assert client.ask(request("/get?a=12&b=x%20y=z&c=1")).body == b'["12", "x y=z"]'
        assert client.ask(request("/get?a=x&b=")).body == b'[null, ""]'
        assert client.ask(request("/get")).body == b"[null, null]"
        assert client.ask(request("/get?a=7", method="HEAD"), "HEAD").status == 200
    server.unharmed()


def test_forms_of_several_methods(server):
    with server.client() as client:
        assert client.ask(post("/form?q=1", FORM, b"a=12")).body == b'["12", "1"]'
        assert client.ask(post("/form", FORM, b"a=12x", "PUT")).body == b'["12x", null]'
        assert client.ask(post("/form", "Content-Type: application/json", b"a=12")).body == b"[null, null]"
        assert client.ask(chunked("/form", b"a=", b"12", b"&b=1")).body == b'["12", null]'


def test_rules_that_wait_are_awaited(server):
    """Row 21: an async validator that waits was taken for one that accepts."""
    with server.client() as client:
        for _ in range(2):
            assert client.ask(request("/waits?a=bad&b=1")).body == b'[null, "1"]'
            assert client.ask(request("/waits?a=bad&a=good")).body == b'["good", null]'
        assert client.ask(post("/waits", FORM, b"a=good")).body == b'["good", null]'
        assert client.ask(post("/waits", FORM, b"a=bad")).body == b"[null, null]"
        field = b"--B\r\nContent-Disposition: form-data; name=a\r\n\r\n%b\r\n--B--\r\n"
        assert client.ask(post("/waits", MULTIPART, field % b"good")).body == b'["good", null]'
        assert client.ask(post("/waits", MULTIPART, field % b"bad")).body == b"[null, null]"
        assert client.ask(request("/waits-async?a=good")).body == b'["good"]'
        assert client.ask(request("/waits-async?a=bad")).body == b"[null]"
        assert client.send(request("/waits?a=good") + request("/get?a=1")).read().body == b'["good", null]'
        assert client.read().body == b'["1", null]'


def test_a_client_that_leaves_while_a_rule_waits_harms_nobody(server):
    for _ in range(3):
        with server.client() as client:
            client.send(request("/waits?a=bad&a=worse&a=good"))
            client.reset()
    server.unharmed()


@pytest.mark.parametrize("value", ["x", "%00", "%ff%fe", "%", "%f", "%C3%28"])
def test_no_value_and_no_rule_ends_the_worker(server, value):
    """Row 4: an exception in a validator, or a value that is no UTF-8, ended the worker."""
    found = server.ask(request(f"/rules?a={value}&b={value}&c={value}&d=1"))
    assert (found.status, found.body) == (200, b'[null, null, null, "1"]')
    server.unharmed()


def test_what_a_failing_rule_raises_is_logged(server):
    server.ask(request("/rules?a=seen&b=1&c=1"))
    server.program.wait_for(r"python_runtime_validator: uncaught exception: ValueError\('seen'\)")
    server.program.wait_for(r"python_runtime_validator: uncaught exception: SystemExit\(1\)")
    server.program.wait_for(r"the rule of parameter 'c': it returned int, not True or False")


def test_a_coroutine_nobody_declared_accepts_nothing(server):
    assert server.ask(request("/leave?a=1")).body == b"[null]"
    server.unharmed()


def test_cookies(server):
    with server.client() as client:
        assert client.ask(request("/cookies", "Cookie: aa=0; a=1=2", "Cookie: b=")).body == b'[null, "1=2", ""]'
        assert client.ask(request("/cookies")).body == b"[null, null, null]"


def multipart(content: bytes) -> bytes:
    return (
        b"--B\r\nContent-Disposition: form-data; name=\"text\"\r\n\r\nhi\r\n"
        b"--B\r\nContent-Disposition: form-data; name=\"f\"; filename=\"C: x.txt\"\r\nContent-Type: text/plain\r\n\r\n"
        + content + b"\r\n--B--\r\n"
    )


def test_an_upload(server):
    with server.client() as client:
        for size in (5, 100_000):
            data = multipart(b"start" + b"\r" * (size - 5))
            expected = f'["hi", ["f", "C: x.txt", "text/plain", {size}, "start"]]'.encode()
            assert client.ask(post("/upload", MULTIPART, data)).body == expected
            assert client.ask(chunked("/upload", data)).body == b"[null, null]"  # it does not say what it is
        assert client.ask(post("/upload", MULTIPART, b"--B--")).body == b"[null, null]"


@pytest.mark.parametrize(("field", "body", "status"), [
    (MULTIPART, b"--B\r\n", 400), (MULTIPART, b"nonsense", 400), ("Content-Type: multipart/form-data", b"--B--", 400),
    (MULTIPART, multipart(b"")[:-4], 400), (MULTIPART, b"--B\r\n\r\n\r\n" * 1001 + b"--B--", 413),
])
def test_a_malformed_form_is_the_clients_fault(server, field, body, status):
    """Left uncaught it is a 400 or 413 and no uncaught exception; an application may answer otherwise."""
    with server.client() as client:
        assert client.ask(post("/upload", field, body)).status == status
        caught = client.ask(post("/caught", field, body))
        assert caught.status == 422
        assert caught.body
        client.alive()
    assert "BodyError" not in server.program.out


def test_the_body_survives_everything(server):
    """Rows 10 and 11: after response() it read other memory, and populate_post() damaged it."""
    with server.client() as client:
        for body in (b"a=1&b=2", bytes(range(256)) * 50):
            assert client.ask(post("/body", FORM, body)).body == hashlib.sha256(body).digest() + body
        assert client.ask(request("/body")).body == bytes(32)  # of old what was left from a request before
    server.program.wait_for("after the answer: True", count=3)
    assert "after the answer: False" not in server.program.out


def test_the_agent_is_the_agent_and_getters_are_read_only(server):
    """Row 26: it was the path."""
    assert server.ask(request("/agent", "User-Agent: me/1.0")).body == b"me/1.0 []"
    assert server.ask(request("/agent")).body == b"None []"


@pytest.mark.parametrize("gone", [True, False])
def test_a_request_used_after_its_end(server, gone):
    """Row 23: it was a use after free. Answers are refused, the rest stays what it was or does nothing."""
    client = server.client()
    assert client.ask(request("/keep?a=1")).body == b"kept"
    fds = server.fds()
    if gone:
        client.reset()
        server.settle(fds - 1)
    with server.client() as other:
        found = other.ask(request("/use")).body
        assert found == b'[["RuntimeError", "RuntimeError", "RuntimeError"], ["/keep", null, null]]'
    if not gone:
        client.ended()  # connection.disconnect() still means that connection
        client.sock.close()
    server.unharmed()


def test_a_thousand_arguments_are_too_many(server):
    body = b"&".join([b"a=1"] * 1000)
    assert server.ask(post("/form", FORM, body)).body == b'["1", null]'
    assert server.ask(post("/form", FORM, body + b"&a=1")).body == b"[null, null]"
    wait_until(lambda: "more than 1000 arguments; none of them is taken" in server.program.out, "a line about it")
