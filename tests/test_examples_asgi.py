"""The example about ASGI does what its first lines say."""

from __future__ import annotations

import json

import pytest

from tests.http_server_harness import ENGINES, request
from tests.test_examples_forms import example
from tests.websocket_harness import WsClient, close


@pytest.mark.parametrize("engine", ENGINES)
def test_asgi(tmp_path, engine):
    with example("asgi.py", tmp_path, engine) as client:
        assert client.ask(request("/ping")).body == b"pong\n"
        assert client.ask(request("/api/notes")).body == b"[]"
        kind = "Content-Type: application/json"
        assert client.ask(request("/api/notes", kind, method="POST", body=b'{"text": "buy milk"}')).status == 201
        assert client.ask(request("/api/notes", kind, method="POST", body=b'{"txt": 1}')).status == 422
        assert json.loads(client.ask(request("/api/notes")).body) == [{"text": "buy milk"}]
        assert b"swagger" in client.ask(request("/api/docs")).body
        assert client.ask(request("/notes")).status == 404
        with WsClient(client.sock.getpeername(), "/api/echo") as ws:
            assert ws.message("x").text() == "x"
            ws.send(close(1000)).rest()
        client.send(request("/api/seconds"))
        while b"0\n" not in client.data.partition(b"\r\n\r\n")[2]:
            assert client._more()
