"""The examples that keep their clients up to date, chat and events, do what their first lines say."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

from tests.http_server_harness import ENGINES, Client, request, since
from tests.test_examples_forms import example
from tests.websocket_harness import WsClient, close


def said(client: WsClient) -> dict[str, object]:
    found: dict[str, object] = json.loads(client.text())
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_chat(tmp_path, engine: str) -> None:
    """Clients of two workers read each other, each message once and never one's own."""
    with example("chat.py", tmp_path, engine) as http, contextlib.ExitStack() as opened:
        address = http.sock.getpeername()
        page = http.ask(request("/"))
        assert page.status == 200
        assert b"new WebSocket" in page.body
        clients: dict[object, WsClient] = {}
        deadline = time.monotonic() + 20
        while len(clients) < 2 and time.monotonic() < deadline:
            client = opened.enter_context(WsClient(address, "/chat", "Origin: http://x"))
            clients.setdefault(said(client)["worker"], client)
        assert set(clients) == {1, 2}, "both workers accept"
        # Those that were too many stay connected: the two hear only of the two, as the others say nothing.
        first, second = clients[1], clients[2]
        first.message(json.dumps({"name": "Ann", "text": "hi <b>"}))
        assert said(second) == {"text": "Ann is here"}
        assert said(second) == {"name": "Ann", "text": "hi <b>"}
        second.message(json.dumps({"name": "Bob", "text": "x" * 600}))
        assert said(first) == {"text": "Bob is here"}
        assert said(first) == {"name": "Bob", "text": "x" * 500}
        first.message(json.dumps({"name": "Eve", "text": "é"}))
        assert said(second) == {"text": "Ann is now Eve"}
        assert said(second) == {"name": "Eve", "text": "é"}
        first.send(close(1000))
        assert first.read().code == 1000
        assert said(second) == {"text": "Eve has left"}
        second.message("no json").closed(1011)
        with WsClient(address, open_it=False) as stranger:
            stranger.send(
                b"GET /chat HTTP/1.1\r\nHost: x\r\nOrigin: http://evil\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
            assert stranger.head() == 403


@pytest.mark.parametrize("engine", ENGINES)
def test_events(tmp_path, engine: str) -> None:
    """An event a second, none missed between two requests, and nothing sent before its time."""
    with example("events.py", tmp_path, engine) as client:
        assert b"EventSource" in client.ask(request("/")).body
        found = client.ask(request("/events"))
        assert found.fields["content-type"] == "text/event-stream"
        number = int(found.body.decode().partition("id: ")[2].partition("\n")[0])
        for _ in range(2):
            begin = time.monotonic()
            found = client.ask(request("/events", f"Last-Event-ID: {number}"))
            assert since(begin) < 5
            assert found.body.decode().startswith(f"retry: 0\n\nid: {number + 1}\ndata: {number + 1} s\n\n")
            number += found.body.count(b"id: ")
        found = client.ask(request("/events", "Last-Event-ID: 0"))
        assert found.body.count(b"id: ") >= number
        for strange in ("-1", "x", "", "9" * 50):
            with Client(client.sock.getpeername()) as other:
                assert other.ask(request("/events", f"Last-Event-ID: {strange}")).status == 200
