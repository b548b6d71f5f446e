"""Requests like one before are parsed in part only, from where they differ or not at all: nobody may notice."""

from __future__ import annotations

import pytest

from kore.http.head import ORDINARY, ORDINARY_END, common_lines
from tests.http_server_harness import ENGINES, request, serving

APP = """
@kore.route("/echo", domain=home, methods=["get", "post"])
def echo(req):
    req.response(200, f"{sorted(req.headers().items())} {bytes(req.body)!r}".encode())
"""

SAME = ("User-Agent: one", "Accept: */*")

ENDINGS = [
    b"X-Last: 1\r\n\r\n",
    b"\r\n",
    b"Connection: close\r\n\r\n",
    b"Content-Length: 5\r\n\r\nhello",
    b"content-length: 5\r\n\r\nhello",
    b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Host: other\r\n\r\n",
    b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
    b"Expect: nothing\r\n\r\n",
    b" folded\r\n\r\n",
    b"\tfolded\r\n\r\n",
    b"no colon\r\n\r\n",
    b"space : before\r\n\r\n",
    b"X: nul\0\r\n\r\n",
    b"X: bare\nY: lf\r\n\r\n",
    b"X: bare\rY: cr\r\n\r\n",
    b": no name\r\n\r\n",
    b"X: y\r\n" * 49 + b"\r\n",
    b"X: y\r\n" * 97 + b"\r\n",
    b"X: y\r\n" * 98 + b"\r\n",
    b"X: " + b"y" * 5000 + b"\r\n\r\n",
    b"X: 1\r\n\r\nGET /echo HTTP/1.1\r\nHost: x\r\n\r\n",
    b"X: 1\r\n\r\nGET /echo HTTP/1.1\r\nHost: x\r\nUser-Agent: one\r\nHost: y\r\n\r\n",
]


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("starts"), request.param, APP) as made:
        yield made


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: repr(ending[:40]))
def test_what_follows_known_lines_means_what_it_means_alone(server, ending):
    known = request("/echo", *SAME)[:-2]
    assert known.endswith(b"*/*\r\n")
    with server.client() as cold:
        cold.send(known.replace(b"/echo", b"/echo?" + str(id(ending)).encode()) + ending).half_close()
        expected = cold.rest()
    with server.client() as warm:
        for number in range(3):
            assert f"'x-warm', '{number}'" in warm.ask(known + b"X-Warm: %d\r\n\r\n" % number).body.decode()
        warm.send(known + ending).half_close()
        found = warm.rest()
    assert dateless(found) == dateless(expected)
    server.unharmed()


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: repr(ending[:40]))
@pytest.mark.parametrize("framing", [
    "Connection: close", "Content-Length: 0", "Connection: close, upgrade\r\nUpgrade: other",
])  # fmt: skip
def test_the_first_request_of_a_connection_means_what_it_means_alone(server, framing, ending):
    """Whatever connections before began with, the very same included."""
    known = request("/echo", framing, "Accept: */*")[:-2]
    with server.client() as cold:
        cold.send(known.replace(b"/echo", b"/echo?%d%d" % (id(framing), id(ending))) + ending).half_close()
        expected = cold.rest()
    for number in range(3):
        with server.client() as warm:
            assert f"'x-warm', '{number}'" in warm.ask(known + b"X-Warm: %d\r\n\r\n" % number).body.decode()
            if "close" in framing:
                warm.ended()
    for _ in range(3):
        with server.client() as warm:
            warm.send(known + ending).half_close()
            found = warm.rest()
        assert dateless(found) == dateless(expected)
    server.unharmed()


def dateless(data: bytes) -> list[bytes]:
    return [line for line in data.split(b"\r\n") if not line.startswith(b"date:")]


def test_a_start_is_whole_lines_and_leaves_room_for_the_rest():
    assert common_lines(b"a\r\nb: 1\r\nc: 2\r\n", b"a\r\nb: 1\r\nc: 3\r\n\r\n") == b"a\r\nb: 1\r\n"
    assert common_lines(b"a\r\nb: 1\r\n", b"a\r\nb: 1\r\n\r\n") == b"a\r\nb: 1\r\n"
    assert common_lines(b"a\r\nb: 1\r\n", b"a\r\nb: 12\r\n\r\n") == b"a\r\n"
    many = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 98
    assert common_lines(many, many + b"\r\n").count(b"\r\n") == 51
    start = common_lines(many, many + b"\r\n")
    for count in range(60):
        whole = start + b"a: b\r\n" * count + b"\r\n"
        if ORDINARY_END.fullmatch(whole, len(start)):
            assert ORDINARY.fullmatch(whole), count
