"""The reference's examples on routes, files, requests and WebSockets, served as they stand there: port 8888 and all.

Whole applications run as they are. The others are functions, which `around` puts into an application. Nothing in them
is changed but what runs in no Python: two have a `try` without its colon, a misprint; and where a comment stands for
the reader's code, a line of ours follows it, marked so. The handshake names a function "onmsg" that is called
"onmessage" beside it: one test gives it that name as well, and one leaves it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import ENGINES
from tests.http_server_harness import Client, Response, request
from tests.support import READY, Starter, alive, http_get, only_one, pids_of, skip_unless, starter, wait_until
from tests.websocket_harness import BINARY, TEXT, Frame, WsClient, close, opening

FIRST = """\
import kore

class MyApp:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"

        kore.server("notls", ip="127.0.0.1", port="8888", tls=False)

        domain = kore.domain("*", attach="notls")
        domain.route("/", self.index, methods=["get"])
        domain.route("^/(0-9)$", self.index_with_args, methods=["get"])

    def index(self, req):
        req.response(200, b'hello')

    def index_with_args(self, req, specified_id):
        req.response(200, specified_id)

koreapp = MyApp()
"""

ROUTES = """\
import kore
import json

class RouteExample:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"

        kore.server("default", ip="127.0.0.1", port="8888", tls=False)

        dom = kore.domain("*", attach="default")

        # Simple GET route.
        dom.route("/", self.index, methods=["get"])

        # Example post route with some arguments (which are validated
        # automatically and removed if verification fails).
        dom.route("/update", self.update, methods=["post"],
            post={
                "number" : "^[0-9]{4}$",
                "user" : "^[a-z]{4,12}$"
            }
        )

        # Authenticate via header or cookie.
        dom.route("/secret", self.secret, methods=["get"],
            auth={
                "type" : "header",      # header or cookie
                "value" : "x-header",   # header or cookie name
                "redirect" : "/",       # redirect location upon failure,
                                        # if not set, 403 is returned.
                "verify" : self.verify  # The callback to verify
            }
        )

    def verify(self, req, data):
        kore.log(kore.LOG_INFO, "verify called with %s" % data)
        return True

    def index(self, req):
        req.response(200, b'this is the index')

    def secret(self, req):
        req.response(200, b'this is the secret')

    def update(self, req):
        req.populate_post()

        payload = {}
        nr = req.argument("number")
        user = req.argument("user")

        if nr:
            payload.update({"number": nr})

        if user:
            payload.update({"user": user})

        req.response(200, json.dumps(payload).encode())

koreapp = RouteExample()
"""

FILEMAP = """\
import kore

class FileMap:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"

        kore.server("default", ip="127.0.0.1", port="8888", tls=False)

        dom = kore.domain("*", attach="default")

        dom.filemaps({ "/": "webroot"})

koreapp = FileMap()
"""

COOKIE = """\
def handler(req):
    cookie = req.cookie("my_session")
    if cookie != None:
        # use cookie value to do things.
        return req.response(200, cookie.encode())  # ours
"""

RESPONSE = """\
def handler(req):
    req.response(200, b'ok')
"""

ARGUMENT = """\
def handler(req):
    id = req.argument("id")
    if id != None:
        # got an id from somewhere
        req.response(200, id.encode())  # ours
"""

BODY_READ = """\
def handler(req):
    if req.method == kore.HTTP_METHOD_POST:
        try:
            length, body = req.body_read(1024)
            # do stuff with the body.
            taken(req, length, body)  # ours
        except:
            kore.log(kore.LOG_INFO, "some error occurred")
            req.response(500, b'')
"""

FILE_LOOKUP = """\
def handler(req):
    if req.method == kore.HTTP_METHOD_POST:
        req.populate_multi()
        try:
            file = req.file_lookup("myfile")
            length, data = file.read(1024)
            # do stuff with the data .
            taken(req, length, data)  # ours
        except:
            kore.log(kore.LOG_INFO, "some error occurred")
            req.response(500, b'')
"""

REQUEST_HEADER = """\
def myhandler(req):
    xrequest = req.request_header("x-request")
    if xrequest != None:
        req.response_header("x-response", xrequest)

    req.response(200, b'hello world')
"""

BROADCAST = """\
def onmessage(c, op, data):
    kore.websocket_broadcast(c, op, data, kore.WEBSOCKET_BROADCAST_GLOBAL)
"""

HANDSHAKE = """\
def onconnect(c):
    kore.log(kore.LOG_INFO, "%s: connected" % c)

def onmessage(c, op, data):
    # data from c arrived
    # op is the websocket op, WEBSOCKET_OP_TEXT, WEBSOCKET_OP_BINARY
    # data is the data that arrived
    c.websocket_send(op, data)  # ours

def ondisconnect(c):
    kore.log(kore.LOG_INFO, "%s: disconnected" % c)

def ws_connect(req):
    req.websocket_handshake("onconnect", "onmsg", "ondisconnect")
"""

AROUND = """\
import os
import kore

kore.config.workers = {workers}
kore.config.deployment = "dev"
kore.server("default", ip="127.0.0.1", port="8888", tls=False)
dom = kore.domain("*", attach="default")

def taken(req, length, data):
    if length != len(data) or data == b"raise":
        raise ValueError(data)
    req.response(200, b"taken " + data)

# The example.

{example}

# What it leaves to the application.

{more}
"""

ADDRESS = ("127.0.0.1", 8888)


def around(example: str, more: str, workers: int = 1) -> str:
    return AROUND.format(example=example, more=more, workers=workers)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Set up first and torn down last: the port is ours until the server has gone."""
    with only_one("reference"):
        yield


@pytest.fixture(params=ENGINES)
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    skip_unless(request.param)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(ADDRESS)
        except OSError as error:
            pytest.skip(f"port 8888, which the reference's examples listen on: {error.strerror}")
    return {"KORE_IO": request.param}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    with starter(tmp_path) as programs:
        yield programs


def body(path: str) -> bytes:
    head, _, rest = http_get(ADDRESS, path).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    return rest


def test_the_first_application(start: Starter, environment: dict[str, str]) -> None:
    start.app(FIRST, environment=environment)
    assert body("/") == b"hello"
    assert body("/0-9") == b"0-9"  # the pattern as the reference has it is no character class
    assert http_get(ADDRESS, "/7").startswith(b"HTTP/1.1 404 ")


def test_the_first_application_from_another_directory(
    start: Starter, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "app.py").write_text(FIRST)
    start.kore(str(elsewhere / "app.py"), environment=environment).wait_for(READY)
    assert body("/") == b"hello"


def test_the_first_application_as_a_package(start: Starter, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "__init__.py").write_text(FIRST)
    start.kore("site", environment=environment).wait_for(READY)
    assert body("/") == b"hello"


def test_the_route_example(start: Starter, environment: dict[str, str]) -> None:
    program = start.app(ROUTES, environment=environment)
    assert body("/") == b"this is the index"
    assert b"\r\nallow: POST\r\n" in http_get(ADDRESS, "/update")
    with Client(ADDRESS) as client:
        found = client.ask(request("/secret"))
        assert (found.status, found.fields["location"]) == (302, "/")
        assert client.ask(request("/secret", "X-Header: secret")).body == b"this is the secret"
        program.wait_for("verify called with secret")
        form = "Content-Type: application/x-www-form-urlencoded"
        for sent, taken in (
            (b"number=1234&user=alice", b'{"number": "1234", "user": "alice"}'),
            (b"number=12345&user=alice&more=1", b'{"user": "alice"}'),
            (b"user=Alice", b"{}"),
        ):
            assert client.ask(request("/update", form, method="POST", body=sent)).body == taken


def test_the_filemap_example(start: Starter, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "webroot" / "deep").mkdir(parents=True)
    (tmp_path / "webroot" / "index.html").write_text("<p>welcome</p>")
    (tmp_path / "webroot" / "deep" / "style.css").write_text("p { color: red }")
    start.app(FILEMAP, environment=environment)
    with Client(ADDRESS) as client:
        index = client.ask(request("/"))
        assert (index.status, index.body) == (200, b"<p>welcome</p>")
        assert index.fields["content-type"].startswith("text/html")
        style = client.ask(request("/deep/style.css"))
        assert (style.body, style.fields["content-type"].partition(";")[0]) == (b"p { color: red }", "text/css")
        assert client.ask(request("/deep/style.css", method="HEAD"), "HEAD").fields["content-length"] == "16"
        seen = f"If-Modified-Since: {style.fields['last-modified']}"
        assert client.ask(request("/deep/style.css", seen)).status == 304
        assert client.ask(request("/nothing")).status == 404
    for outside in ("/../app.py", "/%2e%2e/app.py", "/deep/../../app.py"):
        with Client(ADDRESS) as client:
            assert b"koreapp" not in client.send(request(outside, "Connection: close")).rest()


def test_the_cookie_example(start: Starter, environment: dict[str, str]) -> None:
    """The page says nothing of `populate_cookies` there; whoever calls it before the handler does."""
    more = """
kore.prerequest(lambda req: req.populate_cookies())
dom.route("/", handler, methods=["get"])
"""
    start.app(around(COOKIE, more), environment=environment)
    with Client(ADDRESS) as client:
        assert client.ask(request("/", "Cookie: a=b; my_session=abc=d; c=e")).body == b"abc=d"
    with Client(ADDRESS) as client:
        # Exactly this name; and as nothing of ours answers then, the server does.
        assert client.ask(request("/", "Cookie: my_sessions=abc; xmy_session=abc")).status == 500


def test_the_response_example(start: Starter, environment: dict[str, str]) -> None:
    start.app(around(RESPONSE, 'dom.route("/", handler)'), environment=environment)
    with Client(ADDRESS) as client:
        for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"):
            found = client.ask(request("/", "Content-Length: 0", method=method), method)
            assert (found.status, found.fields["content-length"]) == (200, "2")
            assert found.body == (b"" if method == "HEAD" else b"ok")


def test_the_argument_example(start: Starter, environment: dict[str, str]) -> None:
    """Of a query and of a form, each validated by the route; `id` is None when the route does not take it."""
    more = """
kore.prerequest(lambda req: req.populate_get() and req.populate_post())
dom.route("/", handler, methods=["get", "post"], get={"id": "^[0-9]+$"}, post={"id": "^[a-z]+$"})
"""
    start.app(around(ARGUMENT, more), environment=environment)
    form = "Content-Type: application/x-www-form-urlencoded"
    with Client(ADDRESS) as client:
        assert client.ask(request("/?id=12&id=13")).body == b"12"
        assert client.ask(request("/?a=b", form, method="POST", body=b"id=%61bc")).body == b"abc"
    for asked in (request("/?id=abc"), request("/?Id=12"), request("/", form, method="POST", body=b"id=12")):
        with Client(ADDRESS) as client:
            assert client.ask(asked).status == 500


def taken(found: Response, data: bytes) -> None:
    assert (found.status, found.body) == (200, b"taken " + data)


def test_the_body_read_example(start: Starter, environment: dict[str, str]) -> None:
    program = start.app(around(BODY_READ, 'dom.route("/", handler, methods=["post"])'), environment=environment)
    with Client(ADDRESS) as client:
        for body_sent in (b"", b"x", b"y" * 1024, b"z" * 5000):
            taken(client.ask(request("/", "Content-Length: 0" if not body_sent else "X: y", method="POST",
                                     body=body_sent)), body_sent[:1024])
        assert client.ask(request("/", method="POST", body=b"raise")).status == 500
        program.wait_for("some error occurred")
    assert alive(pids_of(program)[0])


def test_the_file_lookup_example(start: Starter, environment: dict[str, str]) -> None:
    program = start.app(around(FILE_LOOKUP, 'dom.route("/", handler, methods=["post"])'), environment=environment)
    form = "Content-Type: multipart/form-data; boundary=b"

    def part(name: str, data: bytes) -> bytes:
        line = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="a.txt"\r\n\r\n'
        return line.encode() + data + b"\r\n--b--\r\n"

    with Client(ADDRESS) as client:
        for data in (b"x", b"\r\n-b\0" * 50, b"y" * 5000):
            taken(client.ask(request("/", form, method="POST", body=part("myfile", data))), data[:1024])
        assert client.ask(request("/", form, method="POST", body=part("yourfile", b"x"))).status == 500
        program.wait_for("some error occurred")  # None has no read()
    assert alive(pids_of(program)[0])


def test_the_header_example(start: Starter, environment: dict[str, str]) -> None:
    """It stands twice, with request_header and with response_header."""
    start.app(around(REQUEST_HEADER, 'dom.route("/", myhandler, methods=["get"])'), environment=environment)
    with Client(ADDRESS) as client:
        with_it = client.ask(request("/", "X-REQUEST: some value"))
        assert (with_it.body, with_it.fields["x-response"]) == (b"hello world", "some value")
        without = client.ask(request("/"))
        assert (without.status, without.body) == (200, b"hello world")
        assert "x-response" not in without.fields


def test_the_handshake_example(start: Starter, environment: dict[str, str]) -> None:
    more = """
onmsg = onmessage  # the name that the example gives
dom.route("/", ws_connect, methods=["get"])
"""
    program = start.app(around(HANDSHAKE, more), environment=environment)
    with WsClient(ADDRESS, "/") as client:
        program.wait_for(r"log=\[.+: connected\]")
        assert client.message("text \u20ac").read() == Frame(TEXT, "text \u20ac".encode())
        assert client.message(b"\0\xff").read() == Frame(BINARY, b"\0\xff")
        client.send(close(1000)).closed(1000)
    program.wait_for(r"log=\[.+: disconnected\]")


def test_the_handshake_example_with_the_name_as_it_stands(start: Starter, environment: dict[str, str]) -> None:
    """There is no function "onmsg": the request fails, what is missing stands in the log, and nothing else fails."""
    program = start.app(around(HANDSHAKE, 'dom.route("/", ws_connect, methods=["get"])'), environment=environment)
    with WsClient(ADDRESS, "/", open_it=False) as client:
        client.send(opening("/"))
        assert client.head() == 500
    program.wait_for("onmsg")
    assert alive(pids_of(program)[0])


def test_the_broadcast_example(start: Starter, environment: dict[str, str]) -> None:
    """Two workers: text as text, bytes as bytes, once to everybody else on both, and never back."""
    more = """
def onconnect(c):
    c.websocket_send(kore.WEBSOCKET_OP_TEXT, str(os.getpid()))

dom.route("/", lambda req: req.websocket_handshake("onconnect", "onmessage", None), methods=["get"])
"""
    program = start.app(around(BROADCAST, more, workers=2), environment=environment)
    clients: list[WsClient] = []
    pids: set[int] = set()

    def complete() -> bool:
        clients.append(WsClient(ADDRESS, "/"))
        pids.add(int(clients[-1].text()))
        return len(clients) >= 4 and pids == set(pids_of(program))

    try:
        wait_until(complete, "clients on both workers")
        for source in clients:
            source.message("hello").message(b"\0bytes")
            for other in clients:
                if other is not source:
                    assert other.read() == Frame(TEXT, b"hello")
                    assert other.read() == Frame(BINARY, b"\0bytes")
        for client in clients:  # nothing more had come
            client.send(close(1000)).closed(1000)
    finally:
        for client in clients:
            client.sock.close()
