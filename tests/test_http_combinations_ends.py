"""Ends in odd places: clients that leave, handlers that answer, disconnect or shake hands where nobody expects it."""

from __future__ import annotations

import contextlib
import random
import signal
import time

import pytest

from tests.files_harness import content, write
from tests.http_server_harness import ENGINES, GET, chunked, request, serving
from tests.websocket_harness import TEXT, WsClient, close, frame, opening

APP = '''
import asyncio
import contextlib

home.accesslog = "access.log"

async def wait(*args):
    await asyncio.sleep(0.03)
    return True

async def never(*args):
    kore.log(kore.LOG_INFO, "never begins")
    await asyncio.sleep(3600)

def handler(req, *captures):
    req.response(200, b"done " + req.body[:10])

def chunk_answers(req, data):
    req.response(200, (b"piece" for _ in range(1000)))
    return True

def disconnects(req, *args):
    req.connection.disconnect()
    return True

def shake(req, *args):
    req.websocket_handshake(None, lambda c, op, data: c.websocket_send(op, data), None)
    return False

async def shake_late(req, *args):
    await asyncio.sleep(0.03)
    return shake(req)

def free_answers(req):
    for attempt in (lambda: req.response(200, b"too late"), lambda: req.connection.disconnect()):
        try:
            attempt()
        except (RuntimeError, AttributeError) as error:
            kore.log(kore.LOG_INFO, f"free: {type(error).__name__}")

def free(req):
    with contextlib.suppress(RuntimeError):
        req.response(200, b"too late")

AUTH = {"type": "header", "value": "x-token", "verify": wait}
NEVER = {"type": "header", "value": "x-token", "verify": never}
home.route("/never-verified", handler, auth=NEVER)
home.route("/never-begun", handler, hooks={"on_headers": never})
home.route("/never-taken", handler, hooks={"on_body_chunk": never})
home.route("/never-ruled", handler, qs={"a": never}, post={"a": never})
home.route("/never-handled", never)
home.route("/answers-in-pieces", handler, hooks={"on_body_chunk": chunk_answers})
home.route("/disconnect-headers", handler, hooks={"on_headers": disconnects})
home.route("/disconnect-verify", handler, auth={"type": "header", "value": "x-token", "verify": disconnects})
home.route("/disconnect-chunk", handler, hooks={"on_body_chunk": disconnects})
home.route("/shake-headers", handler, hooks={"on_headers": shake})
home.route("/shake-headers-late", handler, hooks={"on_headers": shake_late})
home.route("/shake-late", shake_late)
home.route("/shake-free", shake, hooks={"on_free": free})
home.route("/free-answers", handler, hooks={"on_free": free_answers})
home.route("/gated", handler, auth=AUTH, hooks={"on_headers": wait, "on_free": free})
home.route("/gated-ws", shake, auth=AUTH)
home.filemaps({"/files/": ("www", AUTH)})

@kore.route("/big", domain=home)
def big(req):
    req.response(200, b"x" * 3_000_000)

@kore.route("/stream", domain=home)
def stream(req):
    req.response(200, (b"y" * 5000 for _ in range(200)))
'''

OPTIONS = "kore.config.http_request_limit = 6\nkore.config.http_body_disk_offload = 100000"
LARGE = content(900_001)


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("ends")
    write(base / "www" / "large.bin", LARGE)
    with serving(base, request.param, APP, OPTIONS) as made:
        yield made


NEVERS = {
    "verified": request("/never-verified", "x-token: x"),
    "verified, body": request("/never-verified", "x-token: x", method="POST", body=b"body"),
    "begun": request("/never-begun"),
    "begun, body": request("/never-begun", method="POST", body=b"body"),
    "taken": request("/never-taken", method="POST", body=b"body"),
    "taken, part": request("/never-taken", "Content-Length: 100", method="POST") + b"body",
    "ruled": request("/never-ruled?a=1"),
    "ruled, body": request(
        "/never-ruled", "Content-Type: application/x-www-form-urlencoded", method="POST", body=b"a=1"),
    "handled": request("/never-handled"),
}


@pytest.mark.parametrize("name", NEVERS)
@pytest.mark.parametrize("how", ["reset", "half-close"])
def test_whoever_leaves_in_the_middle_of_waiting_gives_its_place_back(server, name, how):
    """`http_request_limit` clients may wait; had their leaving not been counted, everybody would get 503 afterwards."""
    fds = server.fds()
    for _ in range(3):
        begun = server.program.out.count("never begins")
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(server.client()) for _ in range(6)]
            for client in clients:
                client.send(NEVERS[name] + GET)
            server.program.wait_for("never begins", count=begun + 6)
            if name != "taken, part":
                with server.client() as seventh:
                    assert seventh.ask(NEVERS[name]).status == 503
            for client in clients:
                if how == "reset":
                    client.reset()
                else:
                    client.half_close()
        server.settle(fds)
    with server.client() as client:
        assert client.ask(request("/gated", "x-token: x", method="POST", body=b"body")).body == b"done body"
        client.alive()
    server.unharmed()


def test_a_stream_that_answers_a_body_that_still_comes(server):
    """The stream is sent whole, the rest of the body is nobody's, and the connection ends."""
    for data in (
        request("/answers-in-pieces", method="POST", body=b"x" * 50_000) + GET,
        request("/answers-in-pieces", "Content-Length: 1000000", method="POST") + b"begin",
        chunked("/answers-in-pieces", b"x" * 10, b"y" * 10) + GET,
    ):
        with server.client() as client:
            found = client.ask(data)
            assert (found.body, found.fields["connection"]) == (b"piece" * 1000, "close")
            client.ended()
    server.unharmed()


@pytest.mark.parametrize("path", ["/disconnect-headers", "/disconnect-verify", "/disconnect-chunk"])
def test_disconnecting_from_a_hook_lets_the_answer_leave_and_nothing_more(server, path):
    for method, body in (("GET", b""), ("POST", b"body"), ("POST", b"b" * 90_000)):
        if path.endswith("chunk") and not body:
            continue
        with server.client() as client:
            client.send(request(path, "x-token: x", method=method, body=body) + GET)
            if path.endswith("chunk"):
                assert client.read().status == 500  # the handler asks for a body that went to the hook
            else:
                assert client.read().body == b"done " + body[:10]
            client.ended()
    server.unharmed()


@pytest.mark.parametrize("path", ["/shake-headers", "/shake-headers-late", "/shake-late", "/shake-free", "/gated-ws"])
def test_handshakes_in_odd_places(server, path):
    """In a hook, in a late one, behind a large response that is still on its way, and with a FIN behind."""
    data = opening(path, "x-token: x")
    with WsClient(server.address, open_it=False) as client:
        client.send(GET + data + frame(TEXT, b"early"))
        assert client.head() == 200
        assert client.head() == 101
        assert client.text() == "early"
        time.sleep(0.1)
        assert client.message("later").text() == "later"
        client.send(close(1000))
        assert client.read().code == 1000
        assert client.rest() == b""
    with WsClient(server.address, open_it=False, receive_bytes=4096) as client:
        client.send(request("/big") + data + frame(TEXT, b"behind"))
        time.sleep(0.2)  # until nothing more fits; the test holds if that takes longer
        assert client.head() == 200
        assert client.head() == 101
        assert client.text() == "behind"
        assert client.message("more").text() == "more"
    with WsClient(server.address, open_it=False) as client:
        client.send(data + frame(TEXT, b"last")).half_close()
        assert client.head() == 101
        assert client.text() == "last"
        assert client.read().code is None
        assert client.rest() == b""
    server.unharmed()


def test_answers_from_on_free_are_too_late(server):
    """Whatever the request has come to: answered, refused, or its client gone; disconnecting is not too late."""
    with server.client() as client:
        client.send(request("/free-answers", method="POST", body=b"x") + GET)
        assert client.read().body == b"done x"
        client.ended()  # it has disconnected
    server.program.wait_for("free: RuntimeError")
    for data in (
        request("/free-answers", "Transfer-Encoding: chunked", method="POST") + b"zz\r\n",
        request("/gated", "x-token: x", "Transfer-Encoding: chunked", method="POST") + b"zz\r\n",
        request("/gated", method="POST", body=b"x"),
    ):
        with server.client() as client:
            found = client.send(data).half_close().read()
            assert found.status in (400, 403)
            client.ended()
    with server.client() as client:
        client.send(request("/gated", "x-token: x", "Content-Length: 10", method="POST") + b"x").reset()
    server.unharmed()


def test_a_stop_in_the_middle_of_everything(tmp_path):
    """Uploads, gates, streams, files and WebSockets that are under way are ended whole, then the worker is gone."""
    for engine in ENGINES:
        base = tmp_path / engine
        base.mkdir()
        write(base / "www" / "large.bin", LARGE)
        with serving(base, engine, APP, OPTIONS) as server, contextlib.ExitStack() as stack:
            gate, upload, streamed, file = (stack.enter_context(server.client()) for _ in range(4))
            ws = stack.enter_context(WsClient(server.address, "/shake-late"))
            gate.send(request("/gated", "x-token: x", method="POST", body=b"body"))
            upload.send(request("/gated", "x-token: x", "Content-Length: 200000", method="POST") + b"part")
            streamed.send(request("/stream"))
            file.send(request("/files/large.bin", "x-token: x"))
            assert ws.message("a").text() == "a"
            server.program.signal(signal.SIGTERM)
            server.program.wait_for("SIGTERM: stopping")
            ws.closed(1001)
            assert gate.read().body == b"done body"
            assert streamed.read().body == b"y" * 1_000_000
            assert file.read().body == LARGE
            upload.send(b"z" * (200000 - 4))
            found = upload.read()
            assert (found.body, found.fields["connection"]) == (b"done partzzzzzz", "close")
            for client in (gate, streamed, file, upload):
                client.half_close().ended()
            assert server.program.wait() == 0
            assert not list((base / "tmp_files").iterdir())


def test_random_sequences_cut_anywhere(server):
    """What is sent in any pieces is answered as if it had come in one, and always framed rightly."""
    source = random.Random(19)
    body = bytes(range(256)) * 3
    parts = [
        (GET, b"hello"), (request("/gated", "x-token: x"), b"done "),
        (request("/gated", "x-token: x", method="POST", body=body), b"done " + body[:10]),
        (chunked("/gated", body, body).replace(b"chunked", b"chunked\r\nx-token: x", 1), b"done " + body[:10]),
        (request("/gated", method="POST", body=body), b""), (request("/gated"), b""), (request("/nowhere"), b""),
        (request("/files/large.bin", "x-token: x", "Range: bytes=5-9"), LARGE[5:10]),
        (request("/files/large.bin"), b""), (request("/stream"), b"y" * 1_000_000),
        (request("/files/large.bin", "x-token: x", method="PUT", body=b""), b""),
        (request("/files/large.bin", "x-token: x", body=body), LARGE),
    ]  # fmt: skip
    for _ in range(25):
        chosen = [source.choice(parts) for _ in range(source.randint(2, 9))]
        data = b"".join(one for one, _ in chosen)
        with server.client() as client:
            at = 0
            while at < len(data):
                size = source.choice((1, 2, 3, 17, 100, 500, 5000))
                client.send(data[at : at + size])
                at += size
                if source.random() < 0.05:
                    time.sleep(0.002)  # now and then in a turn of its own
            half = source.random() < 0.3
            if half:
                client.half_close()
            for one, wanted in chosen:
                assert client.read().body == wanted, one
            if half:
                client.ended()
            else:
                client.alive()
    server.unharmed()
