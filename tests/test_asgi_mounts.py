"""Where applications are mounted, and what of kore stands before them: routes, files, redirects, auth, hooks, logs."""

from __future__ import annotations

import json
import sys
import types

import pytest

import kore
from kore.application.declared import application
from kore.application.plan import freeze
from kore.errors import ConfigurationError
from tests.application_harness import ask, declare_domain, handler, serve
from tests.asgi_harness import mounting
from tests.http_server_harness import ENGINES, chunked, request
from tests.support import wait_until
from tests.websocket_harness import opening


@pytest.fixture(autouse=True)
def fresh():
    application.reset()
    yield
    application.reset()


async def one(scope, receive, send):
    pass


async def two(scope, receive, send):
    pass


def found(plan, method, target, **keywords):
    """What answers: the path of a mount or route, or the status."""
    resolution = ask(plan, method, target, **keywords)
    return resolution.status if resolution.route is None else resolution.route.path


def test_the_longest_prefix_of_whole_segments_wins():
    home = declare_domain()
    kore.asgi(one)
    kore.asgi(two, path="/api/")
    kore.asgi(one, path="/api/v2", domain=home)
    plan = freeze()
    for target, path in (
        ("/", ""), ("/x", ""), ("/apix", ""), ("/api", "/api"), ("/api/", "/api"), ("/api/v2x", "/api"),
        ("/api/v2", "/api/v2"), ("/api/v2/x", "/api/v2"), ("/api?x", "/api"), ("/%61pi/x", "/api"),
        ("/api%2Fv2", "/api/v2"),
        ("/\xe9".encode().decode("latin-1"), ""), ("/%ff", ""),
    ):
        for method in ("GET", "POST", "PATCH"):
            assert found(plan, method, target) == path, target
    assert [mount.prefix for mount in plan.mounts] == ["", "/api", "/api/v2"]


def test_routes_and_files_come_before_mounts(tmp_path):
    """In whatever order they were declared; a method they do not have goes to the mount."""
    home = declare_domain()
    kore.asgi(one)
    home.route("/route", handler, methods=["get"])
    home.route("^/pattern/[0-9]+$", handler)
    (tmp_path / "x.txt").write_text("x")
    home.filemaps({"/files/": str(tmp_path)})
    home.redirect("^/old$", 301, "/new")
    plan = freeze()
    assert found(plan, "GET", "/route") == "/route"
    assert found(plan, "POST", "/route") == ""
    assert found(plan, "GET", "/pattern/1") == "^/pattern/[0-9]+$"
    assert found(plan, "GET", "/files/x.txt") == "/files/"
    assert found(plan, "POST", "/files/x.txt") == ""
    assert found(plan, "GET", "/old") == 301
    assert "PATCH" in ask(plan, "OPTIONS", "*").allow


def test_domains():
    """Of several domains one has to be named, before or after it is declared."""
    serve("default")
    kore.asgi(two, domain="b.example", path="/x")
    declare_domain("a.example")
    declare_domain("b.example")
    kore.asgi(one, domain="a.example")
    plan = freeze()
    assert found(plan, "GET", "/x", host="a.example") == ""
    assert found(plan, "GET", "/x", host="b.example") == "/x"
    assert found(plan, "GET", "/", host="b.example") == 404
    application.reset()
    declare_domain("a.example")
    declare_domain("b.example")
    kore.asgi(one)
    with pytest.raises(ConfigurationError, match=r"asgi .*:one: belongs to the only domain, but there are 2"):
        freeze()


def test_an_application_by_name(monkeypatch):
    module = types.ModuleType("some_application")
    module.inner = types.SimpleNamespace(app=one)
    monkeypatch.setitem(sys.modules, "some_application", module)
    declare_domain()
    kore.asgi("some_application:inner.app")
    assert freeze().mounts[0].given is one


@pytest.mark.parametrize(("arguments", "keywords", "error", "text"), [
    ((5,), {}, TypeError, "called with scope, receive and send"),
    ((type("App", (), {}),), {}, TypeError, "a class, not an instance"),
    (("json",), {}, ConfigurationError, "package.module:name"),
    (("json:nothing",), {}, ConfigurationError, "no 'nothing'"),
    (("no_such_module:app",), {}, ModuleNotFoundError, "no_such_module"),
    ((one,), {"path": "api"}, ConfigurationError, "path 'api'"),
    ((one,), {"path": "/a%20b"}, ConfigurationError, "decoded"),
    ((one,), {"path": 5}, TypeError, "path"),
    ((one,), {"domain": 5}, TypeError, "domain"),
    ((one,), {"auth": {"type": "nothing"}}, ConfigurationError, "auth: type"),
    ((one,), {"hooks": {"on_body_chunk": one}}, ConfigurationError, "on_body_chunk"),
    ((one,), {"hooks": {"on_nothing": one}}, ConfigurationError, "on_nothing"),
])
def test_what_cannot_be_mounted(arguments, keywords, error, text):
    declare_domain()
    with pytest.raises(error, match=text):
        kore.asgi(*arguments, **keywords)


def test_one_place_for_one_application():
    declare_domain()
    kore.asgi(one, path="/a")
    kore.asgi(two, path="/a/")
    with pytest.raises(ConfigurationError, match="'/a' of '.*' is taken"):
        freeze()


def test_not_after_the_start():
    declare_domain()
    freeze()
    with pytest.raises(RuntimeError, match="before the server starts"):
        kore.asgi(one)


APP = '''
home.accesslog = "access.log"
home.accesslog_format = "json"

async def app(scope, receive, send):
    if scope["type"] != "http":
        raise ValueError("only http")
    if scope["path"].endswith("/wait"):
        said("wait begins")
        await receive()
        assert (await receive())["type"] == "http.disconnect"
        return
    size = 0
    more = True
    while more:
        message = await receive()
        size += len(message["body"])
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"1")]})
    stream = scope["path"].endswith("/stream")
    if stream:
        await send({"type": "http.response.body", "body": b"str", "more_body": True})
        await asyncio.sleep(0.01)
    body = f"{scope['root_path']} {scope['path']} {size}".encode()
    await send({"type": "http.response.body", "body": body})

def verify(req, value):
    return value == "sesame"

async def verify_later(req, value):
    await kore.suspend(10)
    return value == "sesame"

def on_headers(req):
    if req.request_header("x-stop"):
        req.response(418, b"stopped")
        return False
    return True

def on_free(req):
    said(f"free {req.path}")

@kore.prerequest
def everywhere(req):
    req.response_header("x-pre", "yes")
    if req.request_header("x-refuse"):
        req.response(451, b"refused")
        return False

@kore.prerequest
async def everywhere_later(req):
    if req.request_header("x-later"):
        await kore.suspend(10)

kore.asgi(app)
kore.asgi(app, path="/a b/c", hooks={"on_headers": on_headers, "on_free": on_free})
kore.asgi(app, path="/secret", auth={"type": "header", "value": "x-key", "verify": verify})
kore.asgi(app, path="/later", auth={"type": "header", "value": "x-key", "verify": verify_later})
'''


@pytest.mark.parametrize("engine", ENGINES)
def test_what_kore_does_for_a_mount(tmp_path, engine):
    """Prefix, prerequests, authentication, hooks, with and without a body; and the access log has all of it."""
    with mounting(tmp_path, engine, APP) as server, server.client() as client:
        answer = client.ask(request("/a%20b/c/d"))
        assert answer.body == b"/a b/c /a b/c/d 0"
        assert (answer.fields["x-app"], answer.fields["x-pre"]) == ("1", "yes")
        server.program.wait_for("free /a%20b/c/d")
        for path in ("/secret/x", "/%73ecret/x", "/later"):
            assert client.ask(request(path)).status == 403
            assert client.ask(request(path, "X-Key: sesame")).body.endswith(b" 0")
            assert client.ask(request(path, "X-Key: sesame", method="POST", body=b"12345")).body.endswith(b" 5")
            assert client.ask(request(path, method="POST", body=b"12345")).status == 403
            assert client.ask(opening(path)).status == 403
        for fields, status in ((["X-Stop: 1"], 418), (["X-Refuse: 1"], 451), (["X-Later: 1"], 200)):
            assert client.ask(request("/a%20b/c", *fields)).status == status
            assert client.ask(request("/a%20b/c", *fields, method="POST", body=b"1" * 100)).status == status
        body = b"x" * 300000
        with server.client() as other:
            assert other.ask(request("/a%20b/c", "X-Later: 1", method="POST", body=body)).body.endswith(b" 300000")
        with server.client() as other:
            assert other.ask(chunked("/stream", body, body)).body == b"str /stream 600000"
        with server.client() as other:
            other.send(request("/a%20b/c/wait"))
            server.program.wait_for("wait begins")
            other.reset()
        server.program.wait_for("free /a%20b/c/wait")
        log = tmp_path / "access.log"
        wait_until(lambda: log.read_bytes().count(b"\n") == 24, "every response is in the access log")
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        last = entries[-1]
        assert (last["path"], last["status"], last["bytes"], last["route"]) == ("/stream", 200, 18, "")
        assert entries[0]["route"] == "/a b/c"
        server_out = server.program.out
        assert "uncaught" not in server_out
        assert server_out.count("free ") == 9
