"""WebSockets through kore.asgi: accepted, refused, both ways, and how each end is told."""

from __future__ import annotations

import pytest

from tests.asgi_harness import mounting
from tests.http_server_harness import ENGINES, GET
from tests.support import wait_until
from tests.websocket_harness import BINARY, TEXT, WsClient, close, opening

APP = '''
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise ValueError("no lifespan")
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"hello"})
        return
    assert (await receive())["type"] == "websocket.connect"
    await globals()[scope["path"].strip("/")](scope, receive, send)

async def heard(receive, who):
    message = await receive()
    if message["type"] == "websocket.disconnect":
        said(f"{who}: {message['code']} {message['reason']!r}")
        return None
    return message.get("bytes") or message.get("text")

async def echo(scope, receive, send):
    await send({"type": "websocket.accept"})
    while (data := await heard(receive, "echo")) is not None:
        await send({"type": "websocket.send", "text" if isinstance(data, str) else "bytes": data})

async def scope(scope, receive, send):
    wanted = scope["subprotocols"]
    await send({"type": "websocket.accept", "subprotocol": wanted[-1], "headers": [(b"x-a", b"1")]})
    await send({"type": "websocket.send", "text": repr((scope["scheme"], wanted, "method" in scope, scope["path"]))})

async def late(scope, receive, send):
    await asyncio.sleep(0.05)
    await send({"type": "websocket.accept"})
    await echo_once(receive, send)

async def echo_once(receive, send):
    await send({"type": "websocket.send", "text": await heard(receive, "once")})
    await send({"type": "websocket.close", "code": 3001, "reason": "enough"})
    await heard(receive, "closed by us")

async def refuse(scope, receive, send):
    await send({"type": "websocket.close"})

async def refuse_late(scope, receive, send):
    await asyncio.sleep(0.05)
    await send({"type": "websocket.close"})

async def deny(scope, receive, send):
    await send({"type": "websocket.http.response.start", "status": 402, "headers": [(b"x-why", b"money")]})
    await send({"type": "websocket.http.response.body", "body": b"pay", "more_body": True})
    await asyncio.sleep(0)
    await send({"type": "websocket.http.response.body", "body": b" first"})

async def fail(scope, receive, send):
    raise KeyError("before accept")

async def forget(scope, receive, send):
    pass

async def fail_open(scope, receive, send):
    await send({"type": "websocket.accept"})
    await heard(receive, "fail_open")
    raise KeyError("after accept")

async def raise_disconnect(scope, receive, send):
    class WebSocketDisconnect(Exception):
        pass
    await send({"type": "websocket.accept"})
    while await heard(receive, "raise_disconnect") is not None:
        pass
    raise WebSocketDisconnect(1000)

async def busy(scope, receive, send):
    """Takes a second before it receives, and counts."""
    await send({"type": "websocket.accept"})
    said("busy begins")
    await asyncio.sleep(1)
    count = 0
    while (data := await heard(receive, "busy")) is not None:
        count += len(data)
        if data == "end":
            await send({"type": "websocket.send", "text": str(count)})

async def flood(scope, receive, send):
    """Never suspends but in send."""
    await send({"type": "websocket.accept"})
    sent = 0
    try:
        while True:
            await send({"type": "websocket.send", "bytes": bytes(10000)})
            sent += 1
            if sent % 1000 == 0:
                said(f"sent {sent}")
    except OSError as error:
        said(f"flood stopped: {type(error).__name__}")
        raise

async def wait(scope, receive, send):
    said("wait begins")
    await heard(receive, "wait")
    try:
        await send({"type": "websocket.accept"})
    except OSError:
        said("wait: too late")
        raise

async def after(scope, receive, send):
    """Goes on after the end, and sends."""
    await send({"type": "websocket.accept"})
    while await heard(receive, "after") is not None:
        pass
    try:
        await send({"type": "websocket.send", "text": "x"})
    except OSError:
        said("after: send raised")

async def bad_close(scope, receive, send):
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.close", "code": 1005})

kore.asgi(app)
'''


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with mounting(tmp_path_factory.mktemp("asgi"), request.param, APP) as found:
        yield found


def test_messages_both_ways(server):
    """Text and bytes of many sizes come back as what they were, and the end is told with its code and reason."""
    with WsClient(server.address, "/echo") as client:
        for size in (1, 125, 126, 16000):
            assert client.message("é" * (size // 2 or 1)).text() == "é" * (size // 2 or 1)
            found = client.message(b"\0" * size).read()
            assert found == (BINARY, b"\0" * size, False)
        for number in range(200):
            client.message(str(number))
        assert [client.text() for _ in range(200)] == [str(number) for number in range(200)]
        client.send(close(4001, b"done"))
        assert client.read().code == 4001
    server.program.wait_for("echo: 4001 'done'")
    for sent, told in ((close(), "1005 ''"), (b"", "1006 ''")):
        with WsClient(server.address, "/echo") as client:
            client.send(sent).half_close().rest()
        server.program.wait_for(f"echo: {told}")


def test_a_scope_and_an_answer(server):
    """The subprotocols offered, the one chosen, fields of the application."""
    fields = "Sec-WebSocket-Protocol: a, b", "Sec-WebSocket-Protocol: c"
    with WsClient(server.address, "/scope", *fields) as client:
        assert client.fields["sec-websocket-protocol"] == "c"
        assert client.fields["x-a"] == "1"
        assert client.text() == repr(("ws", ["a", "b", "c"], False, "/scope"))
        client.closed(1000)


def test_accepted_later(server):
    """The application takes its time, meanwhile the client has sent already; the application closes."""
    with WsClient(server.address, "/late", behind=bytes.fromhex("818111fe800069")) as client:
        assert client.text() == "x"
        found = client.read()
        assert (found.code, found.payload[2:]) == (3001, b"enough")
        client.send(close(3001)).rest()
    server.program.wait_for("closed by us: 3001 'enough'")


@pytest.mark.parametrize(("path", "status"), [
    ("refuse", 403), ("refuse_late", 403), ("deny", 402), ("fail", 500), ("forget", 500),
])
def test_refused(server, path, status):
    """By close before accept, by a response of the application's own, by an error; the connection goes on."""
    with server.client() as client:
        for _ in range(2):
            found = client.ask(opening(f"/{path}"))
            assert found.status == status
            if path == "deny":
                assert (found.fields["x-why"], found.body) == ("money", b"pay first")
        client.alive()


def test_what_is_no_handshake(server):
    """It never comes to the application."""
    with server.client() as client:
        assert client.ask(opening("/echo", without="sec-websocket-version")).status == 400
        assert client.ask(opening("/echo", without="sec-websocket-key")).status == 400
        client.alive()


def test_an_error_after_accept(server):
    """1011, and one report; a disconnect that nobody caught is none."""
    with WsClient(server.address, "/fail_open") as client:
        client.message("x").closed(1011)
    server.program.wait_for("uncaught exception: KeyError\\('after accept'\\)")
    with WsClient(server.address, "/bad_close") as client:
        client.closed(1011)
    with WsClient(server.address, "/raise_disconnect") as client:
        client.send(close(1000)).rest()
    server.program.wait_for("raise_disconnect: 1000 ''")
    with WsClient(server.address, "/after") as client:
        client.send(close(1000)).rest()
    server.program.wait_for("after: send raised")
    assert "WebSocketDisconnect" not in server.program.out
    server.unharmed()


def test_messages_nobody_receives(server):
    """They wait within bounds: the client is not read meanwhile, and none is lost."""
    before = server.rss_kib()
    with WsClient(server.address, "/busy") as client:
        server.program.wait_for("busy begins")
        data = b"x" * 10000
        for _ in range(1000):
            client.message(data)
        client.message("end")
        found = client.read()
        assert (found.op, found.payload) == (TEXT, b"10000003")
        client.send(close(1000)).rest()
    assert server.rss_kib() - before < 16384


def test_output_nobody_takes(server):
    """It is not made: send waits, others are served, and the client is not dropped for it."""
    before = server.rss_kib()
    with WsClient(server.address, "/flood", receive_bytes=4096) as client:
        for _ in range(20):
            assert server.ask(GET).body == b"hello"
        assert server.rss_kib() - before < 16384
        for _ in range(500):
            assert len(client.read().payload) == 10000
    server.program.wait_for("flood stopped: ClientGoneError")
    assert "sent 20000" not in server.program.out


def test_a_client_that_leaves_before_it_is_accepted(server):
    fds = server.fds()
    with server.client() as client:
        client.send(opening("/wait"))
        server.program.wait_for("wait begins")
        client.reset()
    server.program.wait_for("wait: 1006 ''")
    server.program.wait_for("wait: too late")
    server.settle(fds)
    server.unharmed()
    assert server.program.out.count("ClientGoneError") == server.program.out.count("stopped: ClientGoneError")


def test_websockets_are_no_running_handlers(server):
    """Hundreds of them do not use up http_request_limit, and at the end of each the count is what it was."""
    assert server.ask(GET).body == b"hello"
    fds = server.fds()
    for _ in range(2):
        clients = [WsClient(server.address, "/echo") for _ in range(300)]
        assert server.ask(GET).body == b"hello"
        for client in clients:
            assert client.message("x").text() == "x"
        for client in clients:
            client.sock.close()
    server.settle(fds)
    wait_until(lambda: server.program.out.count("echo: 1006") >= 600, "all have heard")
    server.unharmed()
