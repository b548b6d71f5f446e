"""Where the reference's page and its platform differ, both sides are taken: the rows of kore-api.md 20, by number.

Only those on routes, files, requests and WebSockets; each is a route of one application, asked by a real client.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import pytest

from tests.http_server_harness import ENGINES, Client, Server, request, serving
from tests.websocket_harness import BINARY, TEXT, Frame, WsClient

APP = '''
import json

home.route("/none", lambda req: req.response(200, b"none"), methods=["get"], auth=None, hooks=None)
home.filemaps({"/plain/": "files", "/tuple/": ("files", {
    "type": "header", "value": "x-key", "verify": lambda req, value: value == "right"})})

@kore.route("/qs", methods=["get"], qs={"n": "^[0-9]$"}, hooks={"on_headers": lambda req: setattr(req, "mark", "set")})
def qs(req):
    req.populate_get()
    req.response(200, f"{req.argument('n')}".encode())

@kore.route("/request", methods=["post"])
def what(req):
    req.attribute = "kept"
    req.response(200, json.dumps([
        req.agent, req.path, req.host, req.protocol, bytes(req.body).decode(), memoryview(req.body).nbytes,
        req.body_digest.hex(), req.headers()["x-mixed"], req.attribute, req.body_path,
        req.method == kore.HTTP_METHOD_POST,
    ]).encode())

@kore.route("/multi", methods=["post"])
def multi(req):
    req.populate_multi()
    file = req.file_lookup("f")
    req.response(200, f"{file.name} {file.filename} {file.read(9)}".encode())

@kore.route("/multipart", methods=["post"])
def multipart(req):
    req.populate_multipart()
    file = req.file_lookup("f")
    req.response(200, f"{file.name} {file.filename} {file.read(9)}".encode())

BODIES = {"bytes": b"ok", "none": None, "text": "ok", "view": memoryview(b"ok"), "array": bytearray(b"ok"),
          "texts": ["o", "k"], "pieces": [b"o", b"k"]}

def body(req, name):
    req.response(200, BODIES[name])

home.route("^/body/(.+)$", body, methods=["get"])

@kore.route("/true", methods=["get"])
def true(req):
    timer = kore.timer(lambda: None, 1000, kore.TIMER_ONESHOT)
    said = [kore.log(kore.LOG_INFO, "a line"), timer.close(), req.response_header("x-a", "b"), req.populate_get(),
            req.populate_cookies(), kore.queue().push(1), kore.worker()]
    said.append(req.response(200, json.dumps(said).encode()))

@kore.route("/connection", methods=["get"])
def connection(req):
    c = req.connection
    req.response(200, json.dumps([c.fd > 2, c.addr, c.x509, c.x509dict, callable(c.disconnect)]).encode())

def onmsg(c, op, data):
    kore.websocket_broadcast(None, kore.WEBSOCKET_OP_TEXT, data, kore.WEBSOCKET_BROADCAST_LOCAL)
    c.websocket_send(op, data)

@kore.route("/names", methods=["get"])
def names(req):
    req.websocket_handshake(None, "onmsg", None)

@kore.route("/callables", methods=["get"])
def callables(req):
    req.websocket_handshake(None, onmsg, None)
'''

FORM = (b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.txt"\r\n\r\ndata\r\n--b--\r\n')


@pytest.fixture(scope="module", params=ENGINES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server on each engine; the options are set as texts and numbers, as both sides do."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "files").mkdir()
    (folder / "files" / "a.txt").write_text("a file")
    with serving(folder, request.param, APP, 'kore.config.http_header_max = "2048"\n') as found:
        yield found
        found.unharmed()


def body(server: Server, data: bytes) -> bytes:
    found = server.ask(data)
    assert found.status == 200, found
    return found.body


def test_9_a_head_that_is_too_long_is_answered_and_the_connection_closed(server: Server) -> None:
    with Client(server.address) as client:
        assert client.ask(request("/", "X: " + "y" * 3000)).status == 431
        client.ended()


def test_10_auth_none_is_no_auth(server: Server) -> None:
    assert body(server, request("/none")) == b"none"


def test_12_and_13_qs_hooks_tuples_and_the_decorator(server: Server) -> None:
    assert body(server, request("/qs?n=5")) == b"5"
    assert body(server, request("/qs?n=55")) == b"None"
    assert body(server, request("/plain/a.txt")) == b"a file"
    assert body(server, request("/tuple/a.txt", "X-Key: right")) == b"a file"
    assert server.ask(request("/tuple/a.txt", "X-Key: wrong")).status == 403


def test_29_30_33_what_a_request_shows(server: Server) -> None:
    data = b"the body"
    asked = request("/request?a=b", "User-Agent: me/1", "X-Mixed: Value", method="POST", body=data)
    assert json.loads(body(server, asked)) == [
        "me/1", "/request", "x", "http", "the body", 8, hashlib.sha256(data).hexdigest(), "Value", "kept", None, True,
    ]


@pytest.mark.parametrize("name", ["multi", "multipart"])
def test_31_34_both_names_of_populate_multi_and_those_of_a_file(server: Server, name: str) -> None:
    asked = request(f"/{name}", "Content-Type: multipart/form-data; boundary=b", method="POST", body=FORM)
    assert body(server, asked) == b"f a.txt (4, b'data')"


@pytest.mark.parametrize("name", ["bytes", "none", "text", "view", "array", "texts", "pieces"])
def test_32_every_kind_of_body(server: Server, name: str) -> None:
    assert body(server, request(f"/body/{name}")) == (b"" if name == "none" else b"ok")


def test_35_36_45_callbacks_by_name_and_as_callables_and_text_to_all(server: Server) -> None:
    for path in ("/names", "/callables"):
        with WsClient(server.address, path) as client:
            assert client.message("both").read() == Frame(TEXT, b"both")
            assert client.read() == Frame(TEXT, b"both")
            client.message(b"both")
            assert [client.read(), client.read()] == [Frame(TEXT, b"both"), Frame(BINARY, b"both")]


def test_37_the_members_of_a_connection(server: Server) -> None:
    assert body(server, request("/connection")) == b'[true, "127.0.0.1", null, null, true]'


def test_39_41_what_returns_nothing_on_the_page_returns_true(server: Server) -> None:
    assert body(server, request("/true")) == b"[true, true, true, true, true, true, 1]"
