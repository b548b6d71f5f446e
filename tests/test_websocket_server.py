"""WebSockets on a real server, on both engines: handshakes, messages, and every way they can end."""

from __future__ import annotations

import itertools
import re
import time

import pytest

from tests.http_server_harness import ENGINES, GET, serving, since
from tests.support import wait_until
from tests.test_websocket_frames import BAD, GOOD
from tests.websocket_app import TEXT as APP
from tests.websocket_harness import (
    BINARY,
    CLOSE,
    DEFLATE,
    PING,
    PONG,
    TEXT,
    Frame,
    WsClient,
    close,
    deflated,
    frame,
    inflated,
    opening,
)

LIMITS = "kore.config.websocket_maxframe = 70000\nkore.config.websocket_max_message = 100000\n"
LIMITS += "kore.config.worker_max_connections = 1000\n"


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    """One server for the tests of this module, on each engine; it must be the same one at the end."""
    with serving(tmp_path_factory.mktemp("ws"), request.param, APP, LIMITS) as found:
        yield found
        found.unharmed()


def logged(server, pattern: str, count: int = 1) -> None:
    """Wait until the log has `count` lines with `pattern`, and see that it has no more."""
    found = re.compile(pattern).findall
    wait_until(lambda: len(found(server.program.out)) >= count, f"{count} times {pattern!r}")
    assert len(found(server.program.out)) == count, found(server.program.out)


def mark(client: WsClient) -> str:
    """The number the application gave to `client`; they are counted."""
    return client.message("who").text()


# --- the handshake -----------------------------------------------------------------------------------------

REFUSED = {
    "no upgrade": opening(without="upgrade"),
    "no connection": opening(without="connection"),
    "no key": opening(without="sec-websocket-key"),
    "no version": opening(without="sec-websocket-version"),
    "version 8": opening("/ws", "Sec-WebSocket-Version: 8", without="sec-websocket-version"),
    "versions 13 and 8": opening("/ws", "Sec-WebSocket-Version: 8"),
    "version list": opening("/ws", "Sec-WebSocket-Version: 13, 8", without="sec-websocket-version"),
    "short key": opening("/ws", "Sec-WebSocket-Key: dGhlIHNhbXBsZQ==", without="sec-websocket-key"),
    "key no base64": opening("/ws", "Sec-WebSocket-Key: ????IHNhbXBsZSBub25jZQ==", without="sec-websocket-key"),
    "two keys": opening("/ws", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
    "upgrade to something else": opening("/ws", "Upgrade: websockets", without="upgrade"),
    "connection without upgrade": opening("/ws", "Connection: keep-alive", without="connection"),
    "post": opening(method="POST"),
    "extensions that are none": opening("/ws", "Sec-WebSocket-Extensions: ;"),
    "plain get": b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_handshake_gets_400_and_no_callback(server, name: str) -> None:
    """The failed handshake (kore-api.md 19 row 28): no onconnect, and the connection goes on as HTTP."""
    with WsClient(server.address) as client:
        before = int(mark(client))
    with WsClient(server.address, open_it=False) as client:
        assert client.send(REFUSED[name]).head() == 400
        if "version" in name:
            assert client.fields["sec-websocket-version"] == "13"
        assert client.send(GET).head() == 200
        assert client.send(opening()).head() == 101
        assert int(mark(client)) == before + 1


def test_http_1_0_is_refused(server) -> None:
    """RFC 6455 4.1: HTTP/1.1 or higher."""
    with WsClient(server.address, open_it=False) as client:
        assert client.send(opening(version="1.0")).head() == 400


def test_header_tokens_in_any_case_and_any_list(server) -> None:
    """Firefox sends two tokens, proxies other cases and several fields."""
    fields = ("Upgrade: h2c, WebSocket", "Connection: Keep-Alive", "Connection: x,UPGRADE")
    text = opening("/ws", *fields, without="connection").replace(b"Upgrade: websocket\r\n", b"")
    with WsClient(server.address, open_it=False) as client:
        assert client.send(text).head() == 101
        assert client.message("a").text() == "a"


def test_fields_of_the_application_are_in_the_answer(server) -> None:
    """A subprotocol is chosen with response_header."""
    with WsClient(server.address, "/protocol", "Sec-WebSocket-Protocol: chat, x") as client:
        assert client.fields["sec-websocket-protocol"] == "chat"
        assert client.message("a").text() == "a"


@pytest.mark.parametrize("path", ["/ws", "/late", "/goes-on"])
def test_frames_that_came_with_the_handshake_are_not_lost(server, path: str) -> None:
    """In the same segment as the head, behind a pipelined request, and when the head came in two pieces."""
    early = frame(TEXT, b"one") + frame(BINARY, b"two") + frame(TEXT, b"three")
    expected = [Frame(TEXT, b"one"), Frame(BINARY, b"two"), Frame(TEXT, b"three")]
    with WsClient(server.address, path, behind=early) as client:
        assert [client.read() for _ in range(3)] == expected
        assert client.message("a").text() == "a"
    with WsClient(server.address, open_it=False) as client:
        client.send(GET + opening(path) + early)
        assert client.head() == 200
        assert client.head() == 101
        assert [client.read() for _ in range(3)] == expected
    for cut in (10, len(opening(path)) - 2, len(opening(path)), len(opening(path)) + 7):
        with WsClient(server.address, open_it=False) as client:
            whole = opening(path) + early
            client.send(whole[:cut])
            time.sleep(0.02)  # so that it arrives in two pieces; the test holds if it does not
            client.send(whole[cut:])
            assert client.head() == 101
            assert [client.read() for _ in range(3)] == expected
            client.send(close(1000))
            assert client.read().code == 1000


def test_names_are_resolved(server) -> None:
    """Names as in the reference (kore-api.md 20 row 35, 19 row 3): functions and methods of objects."""
    with WsClient(server.address, "/names") as client:
        assert client.message("a").text() == "here a"
    for path in ("/no-such-name", "/no-callback"):
        with WsClient(server.address, open_it=False) as client:
            assert client.send(opening(path)).head() == 500
    logged(server, "RuntimeError.*'nobody'")


def test_callbacks_may_be_none(server) -> None:
    """Nobody hears; the rest works."""
    with WsClient(server.address, "/none") as client:
        client.message("a").send(frame(PING, b"p"))
        assert client.read() == Frame(PONG, b"p")
        client.send(close(1000)).read()


def test_a_request_is_answered_once(server) -> None:
    """Neither another handshake nor a response follows; an exception after it is logged and changes nothing."""
    with WsClient(server.address, "/twice") as client:
        assert client.message("a").text() == "a"
    logged(server, "twice refused", 2)
    with WsClient(server.address, "/raises") as client:
        assert client.message("a").text() == "a"


def test_a_plain_connection_is_no_websocket(server) -> None:
    """TypeError (kore-api.md 11.4)."""
    with WsClient(server.address, open_it=False) as client:
        assert client.send(b"GET /not-a-websocket HTTP/1.1\r\nHost: x\r\n\r\n").head() == 200


# --- messages ----------------------------------------------------------------------------------------------

SIZES = (0, 1, 2, 3, 4, 5, 124, 125, 126, 127, 128, 1023, 1024, 4090, 4096, 16384, 65535, 65536, 70000)


@pytest.mark.parametrize("deflate", [False, True])
def test_echo_of_every_size(server, deflate: bool) -> None:
    """Text and binary of the sizes where something changes."""
    with WsClient(server.address, "/ws", *([f"Sec-WebSocket-Extensions: {DEFLATE}"] if deflate else [])) as client:
        for size in SIZES:
            data = (b"abcdefghij" * (size // 10 + 1))[:size]
            for op in (TEXT, BINARY):
                client.send(frame(op, deflated(data) if deflate else data, rsv=4 if deflate else 0))
                found = client.read()
                assert found.op == op
                assert found.rsv1 == (deflate and size >= 1024)
                assert (inflated(found.payload) if found.rsv1 else found.payload) == data


def test_small_messages_cut_anywhere(server) -> None:
    """One whole frame goes one way, its pieces another: both give the same."""
    whole = frame(TEXT, "κόσμε".encode())
    with WsClient(server.address) as client:
        for cut in range(1, len(whole)):
            client.send(whole[:cut])
            client.send(whole[cut:])
            assert client.text() == "κόσμε"
            assert client.send(whole).text() == "κόσμε"
        for byte in whole:
            client.send(bytes((byte,)))
        assert client.text() == "κόσμε"


def test_many_messages_at_once_come_back_in_order(server) -> None:
    """More than a turn delivers, in one write."""
    count = 5000
    with WsClient(server.address) as client:
        client.send(b"".join(frame(TEXT, b"%d" % number) for number in range(count)))
        assert [client.text() for _ in range(count)] == [str(number) for number in range(count)]


@pytest.mark.parametrize("name", GOOD)
def test_what_is_allowed(server, name: str) -> None:
    """The cases of the parser's table, through the server (the Autobahn suite's 1 to 7 and 12)."""
    data, events = GOOD[name]
    with WsClient(server.address, "/ws", f"Sec-WebSocket-Extensions: {DEFLATE}") as client:
        client.send(data)
        for op, payload in events:
            if op == PONG:
                continue
            found = client.read()
            if op == PING:
                assert found == Frame(PONG, payload)
            elif op == CLOSE:
                assert found == Frame(CLOSE, payload[:2])
                assert client.rest() == b""
            elif op == TEXT:
                assert found == Frame(TEXT, payload.encode())
            else:
                assert found == Frame(BINARY, payload)


@pytest.mark.parametrize("name", BAD)
def test_what_is_forbidden(server, name: str) -> None:
    """The same for what is refused (kore-api.md 19 row 2): the code, then the end, and the worker lives."""
    data, code, events = BAD[name]
    with WsClient(server.address, "/ws", f"Sec-WebSocket-Extensions: {DEFLATE}") as client:
        client.send(data)
        for _, payload in events:
            assert client.text() == payload
        client.closed(code)


def test_invalid_text_closes_at_once(server) -> None:
    """In the middle of a frame that never ends."""
    with WsClient(server.address) as client:
        client.send(frame(TEXT, b"ok", fin=False) + frame(0, b"a\xff", size=5000))
        client.closed(1007)


def test_kinds_of_data(server) -> None:
    """Bytes, bytearray, memoryview and str for both kinds; the rest is refused with TypeError."""
    with WsClient(server.address, "/command") as client:
        client.message("kinds")
        assert [client.read() for _ in range(8)] == [Frame(TEXT, b"a"), Frame(BINARY, b"a")] * 4
        client.message("bad")
        assert [client.text() for _ in range(8)] == ["refused"] * 7 + ["not text"]


def test_many_messages_in_one_turn_to_a_client_that_reads(server) -> None:
    """What a callback sends is not counted against a client that had no time to take it."""
    with WsClient(server.address, "/command") as client:
        client.message("send 400 65536")
        for _ in range(400):
            assert len(client.read().payload) == 65536
        assert client.message("a").text() == "a"


# --- the end -----------------------------------------------------------------------------------------------


def test_a_clients_close_is_answered_with_its_code(server) -> None:
    """RFC 6455 5.5.1; then the server closes the connection, and the application hears of it once."""
    for code in (1000, 1001, 3000, None):
        with WsClient(server.address) as client:
            number = mark(client)
            assert client.send(close(code)).read() == Frame(CLOSE, b"" if code is None else code.to_bytes(2, "big"))
            assert client.rest() == b""
        logged(server, rf"shut {number} 127\.0\.0\.1\]")
        logged(server, rf"later {number} -1 True True\]")


def test_nothing_is_taken_after_a_close(server) -> None:
    """RFC 6455 5.5.1: no more data frames follow a Close."""
    with WsClient(server.address) as client:
        client.send(frame(TEXT, b"a") + close(1000) + frame(TEXT, b"b") + frame(PING))
        assert client.text() == "a"
        assert client.read().code == 1000
        assert client.rest() == b""


def test_disconnect_is_a_close_that_waits_for_its_answer(server) -> None:
    """With 1000; what is sent after it goes nowhere; `kept` too."""
    for word in ("disconnect", "kept"):
        with WsClient(server.address, "/command") as client:
            number = mark(client)
            client.message(word)
            client.message("late").send(frame(PING))
            client.closed(1000)
        logged(server, rf"shut {number} ")
    logged(server, "log=.kept True")


def test_both_close_at_once(server) -> None:
    """Two Closes that cross are each other's answer."""
    with WsClient(server.address, "/command") as client:
        number = mark(client)
        client.send(frame(TEXT, b"disconnect") + close(1001))
        assert client.read().op == CLOSE
        assert client.rest() == b""
    logged(server, rf"shut {number} ")


ENDS = ["fin", "rst", "fin in a frame", "rst in a frame", "fin in a message", "fin after text"]


@pytest.mark.parametrize("how", ENDS)
def test_an_end_without_a_close_is_told_once(server, how: str) -> None:
    """Whatever was on its way. A half-closed client still gets our Close."""
    with WsClient(server.address) as client:
        number = mark(client)
        if "in a frame" in how:
            client.send(frame(TEXT, b"hello")[:-2])
        elif "in a message" in how:
            client.send(frame(TEXT, b"hello", fin=False))
        elif "after text" in how:
            client.message("last")
        if how.startswith("rst"):
            client.reset()
        else:
            client.half_close()
            if "after text" in how:
                assert client.text() == "last"
            assert client.read() == Frame(CLOSE, b"")
            assert client.rest() == b""
        logged(server, rf"shut {number} ")
        logged(server, rf"later {number} ")


def test_a_client_that_never_answers_our_close(server) -> None:
    """It is given some seconds."""
    with WsClient(server.address, "/command") as client:
        number = mark(client)
        begin = time.monotonic()
        client.message("disconnect")
        assert client.read().code == 1000
        logged(server, rf"shut {number} ")
        with pytest.raises(ConnectionResetError):
            client.rest()
        assert 3 < since(begin) < 12


@pytest.mark.parametrize(("path", "message"), [
    ("/command", "raise"), ("/command", "exit"), ("/command", "both"), ("/raise-connect", ""), ("/async", "fail"),
])  # fmt: skip
def test_an_exception_of_a_callback_closes_with_1011(server, path: str, message: str) -> None:
    """It is logged and ends this connection, not the worker (kore-api.md 19 rows 2 and 3)."""
    with WsClient(server.address, path) as client:
        if message:
            client.message(message)
        while (found := client.read()).op == TEXT:
            pass
        assert found.code == 1011
        client.send(close(1011))
        assert client.rest() == b""


def test_an_exception_of_ondisconnect_is_logged(server) -> None:
    """And nothing else."""
    before = server.program.out.count("python_runtime_connect: uncaught exception: ValueError('callback')")
    with WsClient(server.address, "/raise-disconnect") as client:
        client.send(close(1000))
        assert client.read().code == 1000
        assert client.rest() == b""
    logged(server, "python_runtime_connect: uncaught exception: ValueError\\('callback'\\)", before + 1)


def test_disconnect_within_onconnect(server) -> None:
    """The handshake is answered before."""
    with WsClient(server.address, "/disconnect-at-once") as client:
        client.closed(1000)


# --- callbacks that wait -----------------------------------------------------------------------------------


def test_async_callbacks_run_in_order(server) -> None:
    """A message waits for onconnect and for the message before it; pings do not."""
    with WsClient(server.address, "/async") as client:
        client.send(b"".join(frame(TEXT, b"%d" % number) for number in range(300)) + close(1000))
        found = [client.read() for _ in range(3)]
        assert found[0] == Frame(TEXT, b"connecting")
        texts = [item.payload.decode() for item in found[1:] if item.op == TEXT]
        while (item := client.read()).op == TEXT:
            texts.append(item.payload.decode())
        assert texts == ["connected", *map(str, range(300))][: len(texts)]
        assert item.op == CLOSE
    logged(server, r"async told 300\]")
    with WsClient(server.address, "/async") as client:
        client.message("wait").send(frame(PING, b"p"))
        assert [client.read() for _ in range(4)] == [
            Frame(TEXT, b"connecting"), Frame(PONG, b"p"), Frame(TEXT, b"connected"), Frame(TEXT, b"wait")]


def test_a_broken_connection_kills_the_callback(server) -> None:
    """As with handlers: GeneratorExit at its await, then ondisconnect."""
    with WsClient(server.address, "/async") as client:
        assert [client.text(), client.text()] == ["connecting", "connected"]
        before = server.program.out.count("long is over")
        client.message("long").send(frame(PING))
        assert client.read().op == PONG
        client.reset()
        logged(server, "long is over", before + 1)
        wait_until(lambda: "async told 0]" in server.program.out, "async ondisconnect")
        assert "did long" not in server.program.out


def test_input_waits_within_bounds(server) -> None:
    """While a callback waits, a flood of messages fills no memory: the client is not read."""
    with WsClient(server.address, "/async") as client:
        before = server.rss_kib()
        client.sock.settimeout(0.5)
        message = frame(TEXT, b"w" * 60000, mask=b"\0\0\0\0")
        sent = 0
        with pytest.raises(TimeoutError):
            for _ in range(2000):
                sent += client.sock.send(message)
        assert sent < 30 << 20
        assert server.rss_kib() - before < 20000
        client.reset()


# --- slow and silent clients -------------------------------------------------------------------------------


def test_a_slow_reader_is_dropped_with_1013(server) -> None:
    """Its output is bounded; when it reads after all, what had begun to leave ends with Close 1013."""
    before = server.rss_kib()
    with WsClient(server.address, "/pour", receive_bytes=4096) as client:
        wait_until(lambda: "slow one told" in server.program.out, "the end of the slow reader")
        assert server.rss_kib() - before < 20000
        found = client.read()
        while found.op == BINARY:
            found = client.read()
        assert found.code == 1013
        client.send(close(1013))
        assert client.rest() == b""
    wait_until(lambda: "poured" in server.program.out, "the end of the task")


def test_an_echo_that_is_not_read_is_not_fed(server) -> None:
    """A client that sends and does not read is not read either: back-pressure, and no loss."""
    payload = bytes(60000)
    message = frame(BINARY, payload, mask=b"\0\0\0\0")
    with WsClient(server.address, receive_bytes=65536) as client:
        client.sock.settimeout(1)
        sent = 0
        view = memoryview(message * 1000)
        with pytest.raises(TimeoutError):
            while sent < len(view):
                sent += client.sock.send(view[sent : sent + 65536])
        assert sent < 40 << 20
        client.sock.settimeout(20)
        for _ in range(sent // len(message)):
            assert client.read() == Frame(BINARY, payload)


@pytest.mark.parametrize("engine", ENGINES)
def test_silent_clients_are_asked_and_then_dropped(tmp_path, engine: str) -> None:
    """A ping at half of websocket_timeout; one that answers stays, one that does not is closed."""
    options = "kore.config.websocket_timeout = 2"
    with serving(tmp_path, engine, APP, options) as server, WsClient(server.address) as live, WsClient(
            server.address) as dead:
        begin = time.monotonic()
        assert live.read() == Frame(PING, b"")
        assert 0.5 <= since(begin) <= 2.5
        live.send(frame(PONG))
        assert dead.read() == Frame(PING, b"")
        assert dead.read().code == 1011
        assert 1.5 <= since(begin) <= 4.5
        logged(server, r"log=\[shut ")
        assert live.read() == Frame(PING, b"")
        live.send(frame(PONG))
        assert live.message("a").text() == "a"


# --- broadcasts --------------------------------------------------------------------------------------------


def test_broadcast_to_200_clients(server) -> None:
    """Everybody gets it once, the source never; small and large, text and binary, compressed or not."""
    plain = [WsClient(server.address, "/spread") for _ in range(100)]
    packed = [WsClient(server.address, "/spread", f"Sec-WebSocket-Extensions: {DEFLATE}") for _ in range(95)]
    narrow = [
        WsClient(server.address, "/all", "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=10")
        for _ in range(5)
    ]
    clients = [*plain, *packed, *narrow]
    texts = ["hi", "a long one " * 500, "é" * 3000]
    for text, source in itertools.product(texts, (plain[0], packed[0])):
        source.message(text)
        for client in clients:
            if client is not source:
                assert client.text() == text
    narrow[0].message("to all")
    for client in clients:
        assert client.text() == "to all"
        client.send(frame(PING))
        assert client.read().op == PONG, "nothing came twice"
    for client in clients:
        client.sock.close()


# --- the server's end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopping_server_closes_with_1001(tmp_path, engine: str) -> None:
    """Going away; the application hears of it before the worker ends."""
    with serving(tmp_path, engine, APP) as server, WsClient(server.address) as client:
        assert client.message("a").text() == "a"
        server.program.process.terminate()
        client.closed(1001)
        server.program.process.wait(10)
        logged(server, r"log=\[shut 0 ")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_connection_leaves_nothing_behind(tmp_path, engine: str) -> None:
    """Descriptors and memory are as before after a hundred connections, however they ended."""
    with serving(tmp_path, engine, APP) as server:
        fds = server.fds()
        for how in range(120):
            with WsClient(server.address, ["/ws", "/async", "/late"][how % 3]) as client:
                client.send(frame(TEXT, b"a"))
                if how % 4 == 0:
                    client.send(close(1000))
                    client.rest()
                elif how % 4 == 1:
                    client.reset()
        server.settle(fds)
        server.unharmed()


def test_the_clock_is_the_servers() -> None:
    """Deadlines here are counted in its ticks."""
    from kore.http import server
    from kore.http.websocket import connection

    assert server.TICK_S == connection.TICK_S
