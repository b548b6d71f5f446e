"""The examples that keep their clients up to date, chat and events, do what their first lines say."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

import pytest

from tests.http_server_harness import ENGINES, Client, request
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


def events(address: tuple[str, int], *fields: str) -> Iterator[tuple[int, str]]:
    """Number and text of each event of one response, as they come; closing it leaves."""
    with Client(address) as client:
        client.send(request("/events", *fields))
        while b"\r\n\r\n" not in client.data:
            assert client._more()
        head, _, client.data = client.data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"\r\ncontent-type: text/event-stream\r\n" in head
        text = ""
        while True:
            *whole, text = text.split("\n\n")
            for event in whole:
                if not event.startswith("retry: "):
                    number, _, data = event.removeprefix("id: ").partition("\n")
                    yield int(number), data.removeprefix("data: ")
            text += client._exactly(int(client._line(), 16)).decode()
            assert client._exactly(2) == b"\r\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_events(tmp_path, engine: str) -> None:
    """One response goes on; who comes back gets at once what it missed, and all get what happens next."""
    with example("events.py", tmp_path, engine) as client:
        address = client.sock.getpeername()
        assert b"EventSource" in client.ask(request("/")).body
        with contextlib.closing(events(address)) as stream:
            found = [next(stream) for _ in range(3)]
            first = found[0][0]
            assert found == [(number, f"{number} s") for number in range(first, first + 3)]
            with contextlib.closing(events(address, f"Last-Event-ID: {first}")) as other:
                missed = [next(other), next(other)]
                assert missed == found[1:]
                assert next(other) == next(stream) == (first + 3, f"{first + 3} s")
        with contextlib.closing(events(address, "Last-Event-ID: 0")) as stream:
            assert [next(stream)[0] for _ in range(first + 3)] == list(range(1, first + 4))
        for strange in ("-1", "x", "", "9" * 50):
            with contextlib.closing(events(address, f"Last-Event-ID: {strange}")) as stream:
                assert next(stream)[0] > first + 3
