"""What others wrote for asyncio talks to the network in handlers: httpx, aiohttp, anyio; plainly and over TLS."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.asgi_harness import mounting
from tests.http_server_harness import ENGINES, request
from tests.support import SANDBOXED, wait_until

COMMON = '''
import json

@kore.route("/hello", domain=home)
def hello(req):
    req.response_header("set-cookie", "a=b")
    req.response(200, (req.agent or "").encode())

@kore.route("/body", domain=home, methods=["post"])
def body(req):
    req.response(200, str(len(req.body)).encode())

@kore.route("/large", domain=home)
def large(req):
    req.response(200, (b"x" * 10000 for _ in range(100)))

@kore.route("/never", domain=home)
async def never(req):
    said("never begins")
    await kore.suspend(3600000)

@kore.route("/redirect", domain=home)
def redirect(req):
    req.response_header("location", "/hello")
    req.response(302, None)

@kore.route("/echo", domain=home)
def echo(req):
    req.websocket_handshake(None, lambda connection, op, data: connection.websocket_send(op, data), None)

def base(req):
    return "http://" + req.host
'''

HTTPX = COMMON + '''
import httpx, ssl, sniffio

class Shared:
    client = None

def opened():
    if Shared.client is None:
        Shared.client = httpx.AsyncClient(timeout=20, limits=httpx.Limits(max_connections=20))
    return Shared.client

@kore.route("/own", domain=home)
async def own(req):
    client = opened()
    found = [sniffio.current_async_library()]
    answer = await client.get(base(req) + "/redirect", headers={"user-agent": "me"}, follow_redirects=True)
    found += [answer.status_code, answer.text, answer.cookies["a"]]
    async def pieces():
        for _ in range(50):
            yield b"x" * 10000
    found.append((await client.post(base(req) + "/body", content=pieces())).text)
    found.append((await client.post(base(req) + "/body", files={"file": b"x" * 100000})).status_code)
    async with client.stream("GET", base(req) + "/large") as answer:
        found.append(sum([len(piece) async for piece in answer.aiter_bytes()]))
    answers = await asyncio.gather(*(client.get(base(req) + "/hello") for _ in range(50)))
    found.append(sum(answer.status_code for answer in answers))
    try:
        await client.get(base(req) + "/never", timeout=0.1)
    except httpx.ReadTimeout:
        found.append("timeout")
    try:
        await client.get("http://127.0.0.1:1/")
    except httpx.ConnectError:
        found.append("refused")
    req.response(200, json.dumps(found))

@kore.route("/tls", domain=home)
async def tls(req):
    context = ssl.create_default_context(cafile=CA)
    found = []
    async with httpx.AsyncClient(verify=context, timeout=20) as client:
        for _ in range(3):
            answer = await client.get(f"https://localhost:{TLS_PORT}/large")
            found.append(len(answer.content))
    async with httpx.AsyncClient(timeout=20) as client:
        try:
            await client.get(f"https://localhost:{TLS_PORT}/large")
        except httpx.ConnectError as error:
            found.append("CERTIFICATE_VERIFY_FAILED" in str(error))
    req.response(200, json.dumps(found))

@kore.route("/waits", domain=home)
async def waits(req):
    said("waits begins")
    try:
        await opened().get(base(req) + "/never", timeout=None)
    finally:
        said("waits ends")

@kore.route("/reads", domain=home)
async def reads(req):
    async with opened().stream("GET", base(req) + "/large") as answer:
        async for piece in answer.aiter_bytes():
            said("reads begins")
            try:
                await kore.suspend(3600000)
            finally:
                said("reads ends")

@kore.route("/close", domain=home)
async def close(req):
    client, Shared.client = opened(), None
    await client.aclose()
    req.response(200, b"")
'''


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "1000000")
        self.end_headers()
        self.wfile.write(b"x" * 1000000)

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ssl.SSLError, ConnectionError):
            pass


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """A server that speaks TLS: its port, and the file of the authority it is known by."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # In the thread of each connection: a client that does not trust us would otherwise end the accepting one.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_address[1], str(path)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def local(path: str, server) -> bytes:
    """A request whose Host is where the server is, for handlers that ask the server itself."""
    return request(path).replace(b"Host: x", b"Host: 127.0.0.1:%d" % server.address[1])


def leave(server, path: str, begins: str, ends: str, times: int) -> None:
    """Ask for `path` and leave in the middle, so many times."""
    before = server.program.out.count(f"[{begins}")
    for number in range(before + 1, before + times + 1):
        with server.client() as other:
            other.send(local(path, server))
            server.program.wait_for(rf"\[{begins}", count=number)
            other.reset()
        server.program.wait_for(rf"\[{ends}", count=number)


@pytest.mark.parametrize("engine", ENGINES)
def test_httpx(tmp_path, engine, tls_server):
    """Redirects, uploads and downloads in pieces, many at once, time limits, TLS; nothing is left of who leaves."""
    port, authority = tls_server
    (tmp_path / "app").mkdir()
    text = f"TLS_PORT, CA = {port}, {authority!r}\n{HTTPX}"
    options = f"kore.config.sandbox_connect = 'any'\nkore.config.sandbox_read = {authority!r}"
    with mounting(tmp_path / "app", engine, text, options) as server, server.client() as client:
        for _ in range(2):
            assert json.loads(client.ask(local("/own", server)).body) == [
                "asyncio", 200, "me", "b", "500000", 200, 1000000, 50 * 200, "timeout", "refused"]
        assert json.loads(client.ask(request("/tls")).body) == [1000000] * 3 + [True]
        assert client.ask(request("/close")).status == 200
        fds = server.fds()
        for path, word in (("/waits", "waits"), ("/reads", "reads")):
            leave(server, path, f"{word} begins", f"{word} ends", 10)
        assert client.ask(request("/close")).status == 200
        server.settle(fds)
        assert "uncaught" not in server.program.out


AIOHTTP = COMMON + '''
import aiohttp, ssl

class Shared:
    session = None

def opened():
    if Shared.session is None:
        Shared.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20))
    return Shared.session

@kore.route("/own", domain=home)
async def own(req):
    session = opened()
    found = []
    async with session.get(base(req) + "/redirect", headers={"user-agent": "me"}) as answer:
        found += [answer.status, await answer.text()]
    async def pieces():
        for _ in range(50):
            yield b"x" * 10000
    async with session.post(base(req) + "/body", data=pieces()) as answer:
        found.append(await answer.text())
    async with session.get(base(req) + "/large") as answer:
        found.append(sum([len(piece) async for piece in answer.content.iter_any()]))
    async def get():
        async with session.get(base(req) + "/hello") as answer:
            return answer.status
    found.append(sum(await asyncio.gather(*(get() for _ in range(50)))))
    try:
        await session.get(base(req) + "/never", timeout=aiohttp.ClientTimeout(0.1))
    except TimeoutError:
        found.append("timeout")
    try:
        await session.get("http://127.0.0.1:1/")
    except aiohttp.ClientConnectorError:
        found.append("refused")
    async with session.ws_connect(base(req) + "/echo") as ws:
        for size in (1, 100, 10000):
            await ws.send_str("x" * size)
            assert await ws.receive_str() == "x" * size
            await ws.send_bytes(bytes(size))
            assert await ws.receive_bytes() == bytes(size)
        await ws.ping()
        await ws.close(code=4000)
        found.append(ws.close_code)
    req.response(200, json.dumps(found))

@kore.route("/tls", domain=home)
async def tls(req):
    context = ssl.create_default_context(cafile=CA)
    found = []
    for _ in range(3):
        async with opened().get(f"https://localhost:{TLS_PORT}/large", ssl=context) as answer:
            found.append(len(await answer.read()))
    try:
        await opened().get(f"https://localhost:{TLS_PORT}/large")
    except aiohttp.ClientConnectorCertificateError:
        found.append(True)
    req.response(200, json.dumps(found))

@kore.route("/waits", domain=home)
async def waits(req):
    said("waits begins")
    try:
        async with opened().get(base(req) + "/never", timeout=aiohttp.ClientTimeout()):
            pass
    finally:
        said("waits ends")

@kore.route("/hears", domain=home)
async def hears(req):
    async with opened().ws_connect(base(req) + "/echo") as ws:
        said("hears begins")
        try:
            await ws.receive()
        finally:
            said("hears ends")

@kore.route("/close", domain=home)
async def close(req):
    session, Shared.session = opened(), None
    await session.close()
    req.response(200, b"")
'''


@pytest.mark.parametrize("engine", ENGINES)
def test_aiohttp(tmp_path, engine, tls_server):
    """The same of aiohttp's client, and its WebSockets."""
    port, authority = tls_server
    (tmp_path / "app").mkdir()
    text = f"TLS_PORT, CA = {port}, {authority!r}\n{AIOHTTP}"
    options = f"kore.config.sandbox_connect = 'any'\nkore.config.sandbox_read = {authority!r}"
    with mounting(tmp_path / "app", engine, text, options) as server, server.client() as client:
        for _ in range(2):
            assert json.loads(client.ask(local("/own", server)).body) == [
                200, "me", "500000", 1000000, 50 * 200, "timeout", "refused", 4000]
        assert json.loads(client.ask(request("/tls")).body) == [1000000] * 3 + [True]
        assert client.ask(request("/close")).status == 200
        fds = server.fds()
        for path, word in (("/waits", "waits"), ("/hears", "hears")):
            leave(server, path, f"{word} begins", f"{word} ends", 10)
        assert client.ask(request("/close")).status == 200
        server.settle(fds)
        assert "uncaught" not in server.program.out


ANYIO = COMMON + '''
import anyio, sniffio
from anyio.streams.stapled import StapledByteStream

@kore.route("/structures", domain=home)
async def structures(req):
    found = [sniffio.current_async_library(), anyio.get_current_task().id > 0]
    order = []
    async def child(number):
        await anyio.sleep(0.1 * number)
        order.append(number)
    async with anyio.create_task_group() as group:
        for number in (3, 1, 2):
            group.start_soon(child, number)
    found.append(order)
    with anyio.move_on_after(0.01) as scope:
        await anyio.sleep_forever()
    found.append(scope.cancelled_caught)
    try:
        with anyio.fail_after(0.01):
            await anyio.sleep_forever()
    except TimeoutError:
        found.append("timeout")
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            raise LookupError("x")
    except* LookupError as errors:
        found.append(len(errors.exceptions))
    send, receive = anyio.create_memory_object_stream(2)
    async def produce():
        async with send:
            for number in range(100):
                await send.send(number)
    async with anyio.create_task_group() as group:
        group.start_soon(produce)
        async with receive:
            found.append(sum([item async for item in receive]))
    limiter, event, lock = anyio.CapacityLimiter(2), anyio.Event(), anyio.Lock()
    async with limiter, lock:
        event.set()
    await event.wait()
    req.response(200, json.dumps(found))

@kore.route("/threads", domain=home)
async def threads(req):
    import threading
    def work(number):
        return anyio.from_thread.run(twice, number), threading.current_thread() is not threading.main_thread()
    async def twice(number):
        await anyio.sleep(0)
        return number * 2
    found = await anyio.to_thread.run_sync(work, 21)
    path = anyio.Path("written.txt")
    await path.write_text("x" * 100000)
    async with await anyio.open_file(path) as file:
        size = len(await file.read())
    await path.unlink()
    found += (size, await path.exists())
    result = await anyio.run_process(["/bin/sh", "-c", "cat; echo more"], input=b"some\\n")
    found += (result.stdout.decode(),)
    req.response(200, json.dumps(found))

@kore.route("/sockets", domain=home)
async def sockets(req):
    async def serve(stream):
        async with stream:
            while True:
                try:
                    await stream.send((await stream.receive()).upper())
                except anyio.EndOfStream:
                    return
    found = []
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(b"tcp")
            found.append((await stream.receive()).decode())
        group.cancel_scope.cancel()
    async with await anyio.create_udp_socket(local_host="127.0.0.1") as one:
        port = one.extra(anyio.abc.SocketAttribute.local_port)
        async with await anyio.create_connected_udp_socket("127.0.0.1", port) as other:
            await other.send(b"udp")
            found.append((await one.receive())[0].decode())
    async with await anyio.create_unix_listener("unix.sock") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        async with await anyio.connect_unix("unix.sock") as stream:
            await stream.send(b"unix")
            found.append((await stream.receive()).decode())
        group.cancel_scope.cancel()
    req.response(200, json.dumps(found))

@kore.route("/waits", domain=home)
async def waits(req):
    async def child():
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.001)
            said("child ends")
    async with anyio.create_task_group() as group:
        group.start_soon(child)
        said("waits begins")
        try:
            with anyio.fail_after(3600):
                await anyio.sleep_forever()
        finally:
            said("waits ends")

@kore.route("/listens", domain=home)
async def listens(req):
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        said("listens begins")
        try:
            await listener.serve(None)
        finally:
            said("listens ends")

@kore.route("/works", domain=home)
async def works(req):
    import time
    said("works begins")
    try:
        await anyio.to_thread.run_sync(time.sleep, 0.2, abandon_on_cancel=True)
    finally:
        said("works ends")

@kore.route("/tasks", domain=home)
async def tasks(req):
    req.response(200, str(len([task for task in asyncio.all_tasks() if not task.done()])))
'''


@pytest.mark.parametrize("engine", ENGINES)
def test_anyio(tmp_path, engine):
    """Task groups, scopes, streams, threads, files, processes, sockets; and clients that leave in each of them."""
    with mounting(tmp_path, engine, ANYIO, "kore.config.sandbox_write = '.'") as server, server.client() as client:
        for _ in range(2):
            assert json.loads(client.ask(request("/structures")).body) == [
                "asyncio", True, [1, 2, 3], True, "timeout", 1, sum(range(100))]
            assert json.loads(client.ask(request("/threads")).body) == [42, True, 100000, False, "some\nmore\n"]
            if not SANDBOXED:  # where a worker listens nowhere
                assert json.loads(client.ask(request("/sockets")).body) == ["TCP", "udp", "UNIX"]
        leave(server, "/works", "works begins", "works ends", 1)
        fds = server.fds()
        running = int(client.ask(request("/tasks")).body)
        for word in ("waits", "works") if SANDBOXED else ("waits", "listens", "works"):
            leave(server, f"/{word}", f"{word} begins", f"{word} ends", 10)
        server.program.wait_for("child ends", count=10)
        wait_until(lambda: int(client.ask(request("/tasks")).body) <= running, "no task is left")
        server.settle(fds)
        for _ in range(2):
            assert json.loads(client.ask(request("/structures")).body)[0] == "asyncio"
        assert "uncaught" not in server.program.out
