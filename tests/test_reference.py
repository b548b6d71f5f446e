"""The applications of the reference, typed as they stand there: port 8888 and all."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server_harness import Client, request
from tests.support import READY, Starter, http_get, skip_unless, starter

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

ADDRESS = ("127.0.0.1", 8888)


@pytest.fixture(params=["uring", "epoll"])
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
