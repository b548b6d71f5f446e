"""The life of a request, whole: every station in its order, whatever its body and its end."""

from __future__ import annotations

import base64
import os
import re

import pytest

from tests.http_server_harness import ENGINES, request, serving
from tests.support import wait_until

TEXT = """
import asyncio

seen = []
home.accesslog = "a.log"

def station(word, result=None):
    def call(req, *_):
        seen.append(word)
        return result
    return call

def late(word, result=None):
    async def call(req, *_):
        await asyncio.sleep(0.001)
        seen.append(word)
        return result
    return call

def handle(req, *captures):
    req.populate_get()
    req.populate_post()
    seen.append(f"handler:{req.argument('a')}:{req.argument('b')}")
    req.response(200, ",".join(seen).encode())
    seen.clear()

async def handle_late(req, *captures):
    await asyncio.sleep(0.001)
    handle(req)

kore.prerequest(station("prerequest"))
kore.prerequest(late("prerequest2"))

for name, make, handler in (("/sync", station, handle), ("/late", late, handle_late)):
    home.route(name, handler, auth={"type": "header", "value": "x", "verify": make("verify", True)}, hooks={
        "on_headers": make("headers"), "on_free": lambda req: kore.log(kore.LOG_INFO, f"over {req.path}"),
    }, qs={"a": make("rule", True)}, post={"b": make("rule", True)})

@kore.route("/rule-raises", domain=home, qs={"a": late("rule")})
def rule_raises(req):
    req.populate_get()
    req.response(200, repr(req.argument("a")).encode())

@kore.route("/form", domain=home)
def form(req):
    req.populate_multi()
    req.response(200, b"form")

@kore.route("/form-late", domain=home)
async def form_late(req):
    await asyncio.sleep(0)
    form(req)

opened = []

def onconnect(connection):
    opened.append(connection)

@kore.route("^/ws/(.*)$", domain=home, methods=["get"],
            auth={"type": "header", "value": "x", "verify": station("verify", True)},
            hooks={"on_free": lambda req: kore.log(kore.LOG_INFO, "over ws")})
def websocket(req, how):
    req.websocket_handshake("onconnect" if how == "name" else onconnect, None, None)
"""


@pytest.fixture(scope="module", params=ENGINES)
def place(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("life")
    with serving(directory, request.param, TEXT) as made:
        yield made, directory


@pytest.mark.parametrize(("path", "rules"), [("/sync", 0), ("/late", 1)])
def test_every_station_comes_once_and_in_its_order(place, path, rules):
    server, _ = place
    form = ["Content-Type: application/x-www-form-urlencoded"]
    with server.client() as client:
        for _ in range(2):
            found = client.ask(request(f"{path}?a=1", "x: y")).body.decode().split(",")
            assert [step for step in found if step != "rule"] == [
                "headers", "verify", "prerequest", "prerequest2", "handler:1:None",
            ]
            data = request(f"{path}?a=1", "x: y", *form, method="POST", body=b"b=2")
            found = client.ask(data).body.decode().split(",")
            assert [step for step in found if step != "rule"] == [
                "headers", "verify", "prerequest", "prerequest2", "handler:1:2",
            ]
            assert found.count("rule") == 2
            if rules:
                assert found[2:4] == ["rule", "rule"], "rules that wait come before everything of the application"
    server.program.wait_for(f"over {path}", count=4)


def test_a_rule_that_is_not_true_drops_the_argument(place):
    assert place[0].ask(request("/rule-raises?a=1")).body == b"None"


@pytest.mark.parametrize("path", ["/form", "/form-late"])
def test_a_broken_form_is_the_clients_fault(place, path):
    server = place[0]
    with server.client() as client:
        data = request(path, "Content-Type: multipart/form-data; boundary=x", method="POST", body=b"--x\r\nbroken")
        for _ in range(2):
            assert client.ask(data).status == 400
        client.alive()
    assert "uncaught" not in server.program.out


@pytest.mark.parametrize("how", ["name", "callable"])
def test_a_websocket_is_logged_and_its_request_is_over(place, how):
    server, directory = place
    before = server.program.out.count("over ws")
    key = base64.b64encode(os.urandom(16)).decode()
    with server.client() as client:
        fields = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}"]
        client.send(request(f"/ws/{how}", "x: y", *fields))
        assert client.read().status == 101
        server.program.wait_for("over ws", count=before + 1)
        line = re.compile(rf'"GET /ws/{how} HTTP/1.1" 101 0 ')
        wait_until(lambda: line.search((directory / "a.log").read_text()), "the handshake's line")
    server.unharmed()


TRACED = """
@kore.route("/waits", domain=home)
async def waits(req):
    kore.corotrace(1)
    kore.coroname("waiting")
    await kore.suspend(600_000)
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_handler_whose_client_left_is_deleted_in_traces(tmp_path, engine):
    """``killed`` is the word for what task_kill() does (reference: kore.corotrace)."""
    with serving(tmp_path, engine, TRACED) as server:
        with server.client() as client:
            client.send(request("/waits"))
            server.program.wait_for(r"coro 'waiting' suspended <waits> @ \[app\.py:\d+\]")
        server.program.wait_for(r"coro 'waiting' deleted <waits> @ \[app\.py:\d+\]")
        assert "killed" not in server.program.out
