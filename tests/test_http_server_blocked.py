"""A handler that keeps the event loop for seconds: nobody's deadline runs meanwhile, and everybody gets an answer."""

from __future__ import annotations

import pytest

from tests.http_server_harness import ENGINES, GET, request, serving

TEXT = """
import time

kore.config.http_keepalive_time = 1
kore.config.http_header_timeout = 1

@kore.route("/block", domain=home, methods=["get"])
def block(req):
    time.sleep(4)  # more than any deadline here, and than input is read after the end of a connection
    req.response(200, b"done")
"""


@pytest.fixture(params=ENGINES)
def server(request, tmp_path):
    with serving(tmp_path, request.param, TEXT) as found:
        yield found


def test_who_waited_is_answered_and_not_late(server):
    """Who asked for it, with and without keep-alive; who asked meanwhile; who is in the middle of a request."""
    with server.client() as keeps, server.client() as closes, server.client() as asks, server.client() as begins:
        begins.send(GET[:-2])
        keeps.send(request("/block"))
        closes.send(request("/block", "Connection: close\r\n"))
        asks.send(GET)
        assert keeps.read().body == b"done"
        assert closes.read().body == b"done"
        assert asks.read().body == b"hello"
        keeps.send(GET)
        assert keeps.read().body == b"hello"
        begins.send(GET[-2:])
        assert begins.read().body == b"hello"
