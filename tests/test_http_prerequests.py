"""Prerequests: in order, once a request, honoured when they say False, and one answer whatever happens in them."""

from __future__ import annotations

import pytest

from kore.http.prerequests import guarded
from tests.http_server_harness import ENGINES, request, serving

TEXT = """
import asyncio

def note(req, word):
    req.seen = getattr(req, "seen", "") + word

@kore.prerequest
def first(req):
    note(req, "1")
    if req.path == "/sync-veto":
        req.response(403, b"no")
        return False
    if req.path == "/silent-veto":
        return False
    if req.path == "/sync-raise":
        raise ValueError("first")
    if req.path == "/answer-raise":
        req.response(402, b"paid")
        raise ValueError("answered")
    return 0  # only False is False

@kore.prerequest
async def second(req):
    note(req, "2")
    if req.path.startswith("/wait"):
        await asyncio.sleep(0.01)
    if req.path == "/wait-veto":
        req.response(403, b"late no")
        return False
    if req.path == "/quick-veto":
        req.response(403, b"quick no")
        return False
    if req.path == "/wait-raise":
        raise ValueError("second")
    if req.path == "/leave":
        try:
            await kore.suspend(3600000)
        finally:
            kore.log(kore.LOG_INFO, "prerequest closed")

@kore.prerequest
def third(req):
    note(req, "3")
    if req.path == "/third-veto":
        req.response(403, b"third no")
        return False

@kore.route("^/(.*)$", domain=home, methods=["get"])
def handler(req, rest):
    req.response(200, f"{req.seen} {rest}".encode())

@kore.route("^/async/(.*)$", domain=home, methods=["post"])
async def asynchronous(req, rest):
    await asyncio.sleep(0)
    req.response(200, f"{req.seen} {rest} {len(req.body)}".encode())

@kore.route("^/raise$", domain=home, methods=["put"])
def raising(req):
    raise ValueError("handler")
"""


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("prerequests"), request.param, TEXT) as made:
        yield made


def test_they_run_in_order_once_and_the_handler_after_them(server):
    with server.client() as client:
        for path in ("x", "wait"):
            for _ in range(3):
                assert client.ask(request(f"/{path}")).body == f"123 {path}".encode()
        assert client.ask(request("/async/wait", method="POST", body=b"body")).body == b"123 wait 4"
        assert client.send(request("/wait") + request("/x")).read().body == b"123 wait"
        assert client.read().body == b"123 x"


@pytest.mark.parametrize(("path", "body"), [
    ("/sync-veto", b"no"), ("/wait-veto", b"late no"), ("/quick-veto", b"quick no"), ("/third-veto", b"third no"),
])
def test_false_stops_the_request_with_the_answer_it_gave(server, path, body):
    with server.client() as client:
        for _ in range(2):
            found = client.ask(request(path))
            assert (found.status, found.body) == (403, body)
        assert client.ask(request("/x")).body == b"123 x"


def test_false_without_an_answer_is_a_500(server):
    assert server.ask(request("/silent-veto")).status == 500


@pytest.mark.parametrize(("path", "status", "label", "error"), [
    ("/sync-raise", 500, "preprocess", "first"),
    ("/answer-raise", 402, "preprocess", "answered"),
    ("/wait-raise", 500, "coroutine", "second"),
])
def test_one_that_raises_ends_the_request_with_one_answer(server, path, status, label, error):
    with server.client() as client:
        assert client.ask(request(path)).status == status
        assert client.ask(request("/x")).body == b"123 x"
    server.program.wait_for(rf"{label}: uncaught exception: ValueError\('{error}'\)")


def test_the_handlers_own_error_is_one_500(server):
    with server.client() as client:
        assert client.ask(request("/raise", method="PUT")).status == 500
        assert client.ask(request("/x")).body == b"123 x"


def test_nobody_asks_them_about_paths_that_nobody_serves(server):
    found = server.ask(request("/sync-veto", method="DELETE"))
    assert found.status == 405


def test_one_that_waits_is_closed_when_the_client_leaves(server):
    with server.client() as client:
        client.send(request("/leave"))
        client.reset()
    server.program.wait_for("prerequest closed")
    assert server.ask(request("/x")).body == b"123 x"


def test_without_any_the_handler_is_untouched():
    assert guarded(print, []) is print
