"""What hostile clients make of several features at once: gates and pipelines, bodies and handshakes, files and logs."""

from __future__ import annotations

import gzip
import re
import socket
import time
from pathlib import Path

import pytest

from tests.files_harness import content, write
from tests.http_server_harness import ENGINES, GET, chunked, request, serving, since
from tests.support import SECONDS, wait_until
from tests.websocket_harness import BINARY, TEXT, WsClient, frame, opening

APP = '''
import asyncio

home.accesslog = "access.log"
quiet = kore.domain("quiet.example", attach="plain")

seen = []

def verify(req, value):
    return value == "good"

async def verify_late(req, value):
    await asyncio.sleep(0.02)
    return value == "good"

def on_headers(req, *captures):
    seen.append("headers " + req.path)
    if req.request_header("x-veto"):
        req.response(402, b"veto")
        return False

async def on_headers_late(req, *captures):
    await asyncio.sleep(0.02)
    return on_headers(req, *captures)

def free(req):
    seen.append("free " + req.path)

def handler(req, *captures):
    seen.append("handler " + req.path)
    req.response(200, req.path.encode() + b" " + req.body)

async def handler_late(req, *captures):
    await asyncio.sleep(0.02)
    handler(req)

def auth(verify, **more):
    return {"type": "header", "value": "x-token", "verify": verify, **more}

def ws(req, *captures):
    req.websocket_handshake(None, lambda c, op, data: c.websocket_send(op, data), None)

async def ws_late(req, *captures):
    await asyncio.sleep(0.02)
    ws(req)
    await asyncio.sleep(0.02)

def interim(req):
    req.response_header("Content-Length", "5")
    req.response_header("Transfer-Encoding", "chunked")
    req.response_header("connection", "keep-alive")
    req.response_header("link", "</x>")
    req.response(103, None)
    req.response(200, b"final")

def form(req):
    req.populate_multi()
    found = req.file_lookup("f")
    data = b""
    while (piece := found.read(1024))[0]:
        data += piece[1]
    req.response(200, f"{req.argument('a')} {found.length} {req.body_path is not None} ".encode() + data[-20:])

def stream(req):
    req.response(200, (b"x" * 1000 for _ in range(300)))

def answer_and_stay(req):
    kore.task_create(asyncio.sleep(0))
    req.response(200, b"first")

for domain in (home, quiet):
    domain.route("^/gate/", handler, auth=auth(verify), hooks={"on_headers": on_headers, "on_free": free})
    domain.route("^/late/", handler_late, auth=auth(verify_late), hooks={
        "on_headers": on_headers_late, "on_free": free})
    domain.route("^/ws/", ws, auth=auth(verify_late))
    domain.route("/ws", ws)
    domain.route("/ws-late", ws_late)
    domain.route("/interim", interim)
    domain.route("/form", form, post={"a": "."})
    domain.route("/stream", stream)
    domain.route("/login", handler, auth=auth(verify, redirect="/log in/\u00e9?a=b&c=%20#d"))
    domain.redirect("^/old/(.*)$", 302, "/new/$1?$qs")
    domain.filemaps({"/files/": "www", "/closed/": ("www", auth(verify)), "/slow/": ("www", auth(verify_late))})

@kore.route("/seen", domain=home)
def show(req):
    text = ",".join(seen)
    seen.clear()
    req.response(200, text.encode())

quiet.route("/", index, methods=["get"])
'''

OPTIONS = """
kore.config.http_body_disk_offload = 1000
kore.config.http_body_max = 3000000
"""

DOMAINS = {"logged": b"Host: x", "quiet": b"Host: quiet.example"}
LARGE = content(700_001)
PAGE = b"<p>" + b"page " * 2000


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("combinations")
    write(base / "www" / "a.txt", b"hello a")
    write(base / "www" / "large.bin", LARGE)
    write(base / "www" / "page.html", PAGE, age_s=200)
    write(base / "www" / "page.html.gz", gzip.compress(PAGE, mtime=0))
    with serving(base, request.param, APP, OPTIONS) as made:
        yield made


@pytest.fixture(params=DOMAINS)
def to(request):
    """Sends requests to the domain with an access log, and to the one without: they are answered on different ways."""
    return lambda data: data.replace(b"Host: x", DOMAINS[request.param])


def log_lines(server, count: int) -> list[str]:
    path = Path(server.program.directory, "access.log")
    wait_until(lambda: path.read_bytes().count(b"\n") >= count, f"{count} lines of the access log")
    return path.read_text().splitlines()


def requests_in_log(server, mark: str, count: int) -> list[tuple[str, str]]:
    """The request lines and statuses that were logged with `mark` in them or right behind, once there are `count`."""
    def found() -> list[tuple[str, str]]:
        lines = Path(server.program.directory, "access.log").read_text().splitlines()
        at = next((number for number, line in enumerate(lines) if mark in line), len(lines))
        return [(m[1], m[2]) for m in (re.search(r'"(.*?)" (\d+) ', line) for line in lines[at:]) if m]
    wait_until(lambda: len(found()) >= count, f"{count} lines from {mark} on")
    return found()


# --- gates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/gate/a", "/late/a"])
@pytest.mark.parametrize("cut", [None, 1, 7])
def test_who_is_let_in_and_who_is_not_in_one_pipeline(server, to, path, cut):
    """Gate, body and the next request, in one write and in pieces: each body belongs to its own request."""
    good, bad = "x-token: good", "x-token: bad"
    smuggled = to(request("/gate/smuggled", good))
    data = b"".join(map(to, (
        request(path, good, method="POST", body=b"one"),
        request(path, bad, method="POST", body=smuggled),
        request(path, good, method="PUT", body=smuggled),
        request(path, bad),
        chunked(path, b"two").replace(b"chunked", b"chunked\r\nX-Token: good", 1),
        request(path, good, "x-veto: yes", method="POST", body=smuggled),
        request(path, good),
    )))
    with server.client() as client:
        for start in range(0, len(data), cut or len(data)):
            client.send(data[start : start + (cut or len(data))])
        found = [client.read() for _ in range(7)]
        name = path.encode()
        assert [(one.status, one.body) for one in found] == [
            (200, name + b" one"), (403, b""), (200, name + b" " + smuggled), (403, b""), (200, name + b" two"),
            (402, b"veto"), (200, name + b" "),
        ]
        client.alive()


@pytest.mark.parametrize("path", ["/gate/e", "/late/e"])
def test_a_veto_for_a_client_that_expects_to_be_asked(server, to, path):
    """RFC 9110 10.1.1: no 100, the answer, and the end: whether a body follows cannot be known any more."""
    for field, status in (("x-veto: yes", 402), ("x-token: bad", 403)):
        data = to(request(path, field, "Expect: 100-continue", "Content-Length: 5", method="POST"))
        with server.client() as client:
            found = client.ask(data)
            assert (found.status, found.fields["connection"]) == (status, "close")
            client.send(GET)
            client.ended()
    with server.client() as client:
        data = to(request(path, "x-token: good", "Expect: 100-continue", "Content-Length: 5", method="POST"))
        assert client.ask(data).status == 100
        assert client.ask(b"hello").body.endswith(b" hello")
        client.alive()


@pytest.mark.parametrize("path", ["/gate/h", "/late/h"])
@pytest.mark.parametrize("token", ["good", "bad"])
def test_a_fin_while_the_gate_is_asked(server, to, path, token):
    """A whole request is answered; half of one is not handled, and both connections end."""
    whole = to(request(path, f"x-token: {token}", method="POST", body=b"body"))
    with server.client() as client:
        found = client.send(whole).half_close().read()
        assert found.status == (200 if token == "good" else 403)
        client.ended()
    server.ask(request("/seen"))
    with server.client() as client:
        client.send(whole[:-2]).half_close()
        rest = client.rest()
        assert rest == b"" if token == "good" else rest.startswith(b"HTTP/1.1 403 ")
    steps = server.ask(request("/seen")).body.decode().split(",")
    assert [step for step in steps if step] == [f"headers {path}", f"free {path}"]
    server.unharmed()


def test_two_connections_and_two_async_hooks_each(server, to):
    """They wait side by side, and each connection answers in order."""
    with server.client() as one, server.client() as two:
        begin = time.monotonic()
        data = [to(request(f"/late/{number}", "x-token: good", method="POST", body=b"x")) for number in range(5)]
        one.send(b"".join(data))
        two.send(b"".join(reversed(data)))
        assert [one.read().body for _ in data] == [b"/late/%d x" % number for number in range(5)]
        assert [two.read().body for _ in data] == [b"/late/%d x" % number for number in reversed(range(5))]
        assert since(begin) < 5
        one.alive()
        two.alive()


def test_a_broken_body_behind_a_gate_that_let_it_in(server, to):
    """One refusal, on_free once, and what follows is never served."""
    server.ask(request("/seen"))
    with server.client() as client:
        head = to(request("/late/broken", "x-token: good", "Transfer-Encoding: chunked", method="POST"))
        client.send(head + b"3\r\nabc\r\nzz\r\n" + GET)
        assert client.read().status == 400
        client.ended()
    assert server.ask(request("/seen")).body == b"headers /late/broken,free /late/broken"


def test_data_behind_a_413_is_never_a_request(server, to):
    for fields in (["Content-Length: 3000001"], ["Content-Length: 3000001", "Expect: 100-continue"]):
        with server.client() as client:
            client.send(to(request("/gate/x", "x-token: good", *fields, method="POST")) + to(GET) * 50)
            assert client.read().status == 413
            client.ended()
    with server.client() as client:
        client.send(to(request("/gate/x", "x-token: good", "Transfer-Encoding: chunked", method="POST")))
        client.send(b"%x\r\n" % 3000001 + to(GET) * 50)
        assert client.read().status == 413
        client.ended()


# --- redirects -------------------------------------------------------------------------------------------------


def test_a_redirect_with_a_chunked_body_and_a_request_inside(server, to):
    inside = to(request("/gate/smuggled", "x-token: good"))
    with server.client() as client:
        found = client.ask(to(chunked("/old/x", inside, inside)))
        assert (found.status, found.fields["location"], found.fields["connection"]) == (302, "/new/x?", "close")
        client.ended()
    with server.client() as client:
        client.send(to(request("/old/x?q=%0d%0aSet-Cookie:a", method="POST", body=inside) + GET))
        found = client.read()
        assert found.fields["location"] == "/new/x?q=%0d%0aSet-Cookie:a"
        assert client.read().body == b"hello"
        client.alive()


def test_where_authentication_sends_a_client_is_a_uri(server, to):
    """RFC 9110 10.2.2: as for redirects, what an application wrote is escaped where it has to be."""
    with server.client() as client:
        found = client.ask(to(request("/login")))
        assert (found.status, found.fields["location"]) == (302, "/log%20in/%C3%A9?a=b&c=%20#d")
        client.alive()


# --- handshakes ------------------------------------------------------------------------------------------------


def test_a_handshake_with_a_body_is_none(server, to):
    """RFC 6455 4.1 knows none, and what were its bytes: frames, or the body? The body; then HTTP goes on."""
    inside = frame(TEXT, b"frame")
    for path in ("/ws", "/ws-late", "/ws/x"):
        head = to(opening(path, "X-Token: good", f"Content-Length: {len(inside)}"))
        with WsClient(server.address, open_it=False) as client:
            client.send(head + inside + GET)
            assert client.head() == 400
            assert client.head() == 200
    with WsClient(server.address, open_it=False) as client:
        client.send(to(opening("/ws", "Transfer-Encoding: chunked")) + b"1\r\na\r\n0\r\n\r\n" + GET)
        assert client.head() == 400
        assert client.head() == 200


@pytest.mark.parametrize("fields", [(), ("Connection: close",), ("Content-Length: 0",), ("Expect: 100-continue",)])
@pytest.mark.parametrize("path", ["/ws", "/ws-late", "/ws/behind-a-gate"])
def test_a_handshake_behind_other_requests_and_with_odd_fields(server, to, path, fields):
    """One line `connection` in the answer; the connection stays a WebSocket beyond its handler's end."""
    with WsClient(server.address, open_it=False) as client:
        client.send(to(request("/gate/b", "x-token: good", method="POST", body=b"b") + GET))
        client.send(to(opening(path, "X-Token: good", *fields)) + frame(TEXT, b"early") + frame(BINARY, b"more"))
        assert client.head() == 200
        assert client.head() == 200
        assert client.head() == 101
        assert client.fields["connection"].lower() == "upgrade"
        assert client.read().payload == b"early"
        assert client.read().payload == b"more"
        time.sleep(0.05)  # until the handler has ended: nothing of it may end this
        assert client.message("later").text() == "later"


def test_a_handshake_that_its_gate_refuses(server, to):
    with WsClient(server.address, open_it=False) as client:
        client.send(to(opening("/ws/x", "X-Token: bad")) + to(GET))
        assert client.head() == 403
        assert client.head() == 200


def test_a_request_instead_of_frames(server, to):
    """What comes behind the handshake are frames and never requests: "G" has a reserved bit and no mask."""
    with WsClient(server.address, open_it=False) as client:
        client.send(to(opening("/ws")) + GET)
        assert client.head() == 101
        client.closed(1002)
    server.unharmed()


# --- responses -------------------------------------------------------------------------------------------------


def test_interim_responses_have_no_framing_fields(server, to):
    """RFC 9110 8.6, RFC 9112 6.1: neither content-length nor transfer-encoding with 1xx, whatever was set."""
    with server.client() as client:
        found = client.ask(to(request("/interim")))
        assert (found.status, found.fields) == (103, {"link": "</x>"})
        found = client.read()
        assert (found.status, found.body, found.fields["content-length"]) == (200, b"final", "5")
        client.alive()


def test_refusals_behind_a_request_are_not_about_that_request(server):
    """What is refused before a request line is no request: neither its method nor its path is known."""
    for number, (data, status) in enumerate([
        (b"\r\n\r\n\r\n" + GET, 400), (b"\rX", 400), (b"\r\n\r\n\r\n\r\n", 400),
    ]):
        mark = f"/gate/refusal{number}"
        with server.client() as client:
            client.send(request(mark, "x-token: good", method="POST", body=b"x") + data)
            assert client.read().status == 200
            assert client.read().status == status
            client.ended()
        assert requests_in_log(server, mark, 2)[:2] == [(f"POST {mark} HTTP/1.1", "200"), ("-", str(status))]


def test_the_refusal_behind_a_head_request_is_whole(tmp_path):
    """A HEAD that was answered does not take the page from the 400 behind it."""
    with serving(tmp_path, "epoll", options="kore.config.http_pretty_error = True") as server:
        with server.client() as client:
            client.send(request("/", "Content-Length: 1", method="HEAD") + b"x" + b"\rX")
            assert client.read("HEAD").status == 200
            found = client.read()
            assert (found.status, found.body[-26:]) == (400, b"400 Bad Request</h1></body></html>"[-26:])
            client.ended()


def test_control_bytes_never_reach_the_log(server):
    """They are refused by the parser, and what is legal is escaped: one line each, printable ASCII alone."""
    before = len(log_lines(server, 0))
    asked = [
        b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: a\x1b[31mb\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nReferer: a\x7fb\r\n\r\n",
        b"GET /%0a%1b HTTP/1.1\r\nHost: x\r\nReferer: \"\\\" - \t\xc2\x85\xe2\x80\xa8\xff\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\x01\r\n\r\n",
    ]
    for data in asked:
        server.ask(data)
    lines = log_lines(server, before + len(asked))[before:]
    assert len(lines) == len(asked)
    for line in lines:
        assert re.fullmatch(r'127\.0\.0\.1 - - \[[^]]*\] "[ !#-~]*" \d{3} \d+ "[ !#-~]*" "[ !#-~]*"', line), line


def test_a_stream_between_other_requests(server, to):
    """And a client that sends its FIN in the middle of it."""
    with server.client() as client:
        client.send(to(GET + request("/stream") + request("/gate/x", "x-token: good", method="POST", body=b"b")))
        client.half_close()
        assert client.read().body == b"hello"
        assert client.read().body == b"x" * 300_000
        assert client.read().body == b"/gate/x b"
        client.ended()


# --- forms on disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-9, -4, -3, -2, -1, 0, 1, 2, 5, 9])
def test_a_form_on_disk_with_its_delimiter_at_the_end_of_a_piece(server, to, shift):
    """The body is written in pieces of 64 KiB and read in pieces of 256 KiB: neither may cut a delimiter in two."""
    head = b'--BOUND\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n'
    tail = b'\r\n--BOUND\r\nContent-Disposition: form-data; name="a"\r\n\r\nfield\r\n--BOUND--\r\n'
    for piece in (65536, 262144):
        size = piece - len(head) + shift
        payload = content(size - 6) + b"\r\n--BO"
        data = request("/form", "Content-Type: multipart/form-data; boundary=BOUND", method="POST",
                       body=head + payload + tail)
        with server.client() as client:
            found = client.ask(to(data))
            assert found.body == b"field %d True " % size + payload[-20:]
            client.alive()
    wait_until(lambda: not list(Path(server.program.directory, "tmp_files").iterdir()), "the files are removed")


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["/closed/", "/slow/"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_closed_files(server, to, prefix, method):
    """Authentication of a file map, with HEAD, conditions, ranges, bodies, and every spelling of the path."""
    good, bad = "x-token: good", "x-token: bad"
    with server.client() as client:
        for name in ("a.txt", "./a.txt", "/a.txt", "%61.txt", "b/../a.txt", "none", "large.bin", "%00", "%zz"):
            for fields in ((), (bad,), (bad, "Range: bytes=0-1"), (bad, "If-None-Match: *"), (bad, "Cookie: x")):
                found = client.ask(to(request(prefix + name, *fields, method=method)), method)
                assert (found.status, found.body) == (403, b""), (name, fields)
                assert "etag" not in found.fields
        found = client.ask(to(request(prefix + "a.txt", good, method=method)), method)
        assert (found.status, found.fields["content-length"]) == (200, "7")
        assert found.body == (b"hello a" if method == "GET" else b"")
        found = client.ask(to(request(prefix + "a.txt", bad, method=method)), method)
        assert found.status == 403, "what was kept for who may see it"
        found = client.ask(to(request(prefix + "large.bin", good, method=method, body=b"a body")), method)
        assert found.body == (LARGE if method == "GET" else b"")
        found = client.ask(to(request(prefix + "large.bin", bad, method=method, body=to(GET))), method)
        assert found.status == 403
        found = client.ask(to(request(prefix + "a.txt", bad, method="DELETE")))
        assert (found.status, found.fields["allow"]) == (405, "GET, HEAD")
        client.alive()


def test_ranges_of_a_compressed_file(server, to):
    """RFC 9110 14.1.2, 8.4: of what is sent, that is of the compressed bytes; the tag says which those are."""
    packed = gzip.compress(PAGE, mtime=0)
    accept = "Accept-Encoding: gzip"
    with server.client() as client:
        for _ in range(2):
            whole = client.ask(to(request("/files/page.html", accept)))
            assert (whole.fields["content-encoding"], whole.body) == ("gzip", packed)
            plain = client.ask(to(request("/files/page.html")))
            assert "content-encoding" not in plain.fields
            assert plain.body == PAGE
            assert plain.fields["vary"].lower() == whole.fields["vary"].lower() == "accept-encoding"
            assert plain.fields["etag"] != whole.fields["etag"]
        part = client.ask(to(request("/files/page.html", accept, "Range: bytes=5-20")))
        assert (part.status, part.body, part.fields["content-encoding"]) == (206, packed[5:21], "gzip")
        assert part.fields["content-range"] == f"bytes 5-20/{len(packed)}"
        mixed = client.ask(to(request("/files/page.html", "Range: bytes=5-20", f"If-Range: {whole.fields['etag']}")))
        assert (mixed.status, mixed.body) == (200, PAGE), "never pieces of two forms"
        kept = client.ask(to(request("/files/page.html", accept, f"If-None-Match: {whole.fields['etag']}")))
        assert kept.status == 304
        other = client.ask(to(request("/files/page.html", accept, f"If-None-Match: {plain.fields['etag']}")))
        assert other.status == 200
        client.alive()


def test_large_files_in_a_pipeline_with_a_fin_behind(server, to):
    with server.client() as client:
        data = request("/files/large.bin") + GET + request("/files/large.bin", "Range: bytes=1-600000")
        data += request("/files/large.bin", method="HEAD") + request("/closed/a.txt", "x-token: good")
        client.send(to(data)).half_close()
        assert client.read().body == LARGE
        assert client.read().body == b"hello"
        assert client.read().body == LARGE[1:600001]
        assert client.read("HEAD").fields["content-length"] == str(len(LARGE))
        assert client.read().body == b"hello a"
        client.ended()


def test_a_file_to_a_client_that_says_close_while_it_uploads(server, to):
    with server.client() as client:
        client.send(to(request("/slow/large.bin", "x-token: good", "Connection: close", body=bytes(200_000))))
        found = client.read()
        assert (found.status, found.fields["connection"], found.body) == (200, "close", LARGE)
        client.ended()


def test_the_worker_is_the_one_it_was(server):
    fds = server.fds()
    sock = socket.create_connection(server.address, SECONDS)
    sock.sendall(b"\xff" * 100)
    assert sock.recv(100).startswith(b"HTTP/1.1 400 ")
    sock.close()
    server.settle(fds)
    server.unharmed()
