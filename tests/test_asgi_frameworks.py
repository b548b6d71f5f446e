"""Applications of Starlette, FastAPI and Django run on kore.asgi: what each is used for, through real sockets."""

from __future__ import annotations

import hashlib
import json
import signal

import pytest

from tests.asgi_harness import mounting
from tests.http_server_harness import ENGINES, chunked, request
from tests.support import wait_until
from tests.websocket_harness import WsClient, close

JSON = "Content-Type: application/json"

STARLETTE = '''
import contextlib
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocketDisconnect

@contextlib.asynccontextmanager
async def lifespan(app):
    said("starting")
    yield {"number": 42}
    said("stopped")

async def index(request):
    return PlainTextResponse(f"hello {request.url.path} {request.state.number} {request.client.host}")

async def body(request):
    size = 0
    async for piece in request.stream():
        size += len(piece)
    return JSONResponse({"size": size})

async def form(request):
    async with request.form() as form:
        data = await form["file"].read()
        return JSONResponse({"title": form["title"], "name": form["file"].filename, "size": len(data)})

async def stream(request):
    async def pieces():
        for number in range(100):
            yield f"{number}," * 100
            if number % 10 == 0:
                await asyncio.sleep(0)
    return StreamingResponse(pieces(), media_type="text/plain")

async def events(request):
    async def pieces():
        try:
            number = 0
            while True:
                yield f"data: {number}\\n\\n"
                number += 1
                await asyncio.sleep(0.01)
        finally:
            said("events ended")
    return StreamingResponse(pieces(), media_type="text/event-stream")

def threaded(request):
    import threading
    return PlainTextResponse(str(threading.current_thread() is not threading.main_thread()))

async def background(request):
    async def task():
        await asyncio.sleep(0.01)
        said("background done")
    return PlainTextResponse("accepted", status_code=202, background=BackgroundTask(task))

async def file(request):
    return FileResponse(__file__)

async def moved(request):
    return RedirectResponse("/app/")

async def fail(request):
    raise RuntimeError("a failure of the application")

async def ws(socket):
    await socket.accept(subprotocol="chat")
    try:
        async for text in socket.iter_text():
            await socket.send_json({"got": text})
    except WebSocketDisconnect:
        pass
    said("ws ended")

async def ws_deny(socket):
    await socket.send_denial_response(JSONResponse({"why": "no"}, status_code=401))

async def ws_leave(socket):
    await socket.accept()
    await socket.receive_text()

class Adds(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        response = await call_next(request)
        response.headers["x-middleware"] = "yes"
        return response

app = Starlette(lifespan=lifespan, middleware=[Middleware(GZipMiddleware, minimum_size=100000)], routes=[
    Route("/", index), Route("/body", body, methods=["POST"]), Route("/form", form, methods=["POST"]),
    Route("/stream", stream), Route("/events", events), Route("/threaded", threaded), Route("/background", background),
    Route("/file", file), Route("/moved", moved), Route("/fail", fail),
    WebSocketRoute("/ws", ws), WebSocketRoute("/ws_deny", ws_deny), WebSocketRoute("/ws_leave", ws_leave),
    Mount("/inner", Starlette(routes=[Route("/", index), Route("/stream", stream), Route("/events", events),
                                      Route("/body", body, methods=["POST"])],
                              middleware=[Middleware(Adds)])),
])
kore.asgi(app, path="/app")
'''


def form_of(title: str, content: bytes) -> tuple[str, bytes]:
    body = (
        f'--B\r\nContent-Disposition: form-data; name="title"\r\n\r\n{title}\r\n'
        '--B\r\nContent-Disposition: form-data; name="file"; filename="x.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode() + content + b"\r\n--B--\r\n"
    return "Content-Type: multipart/form-data; boundary=B", body


# Large uploads are temporary files of the frameworks; where nothing else may be written, in the current directory.
OPTIONS = "kore.config.http_body_max = 10000000\nkore.config.sandbox_write = '.'"


@pytest.mark.parametrize("engine", ENGINES)
def test_starlette(tmp_path, engine):
    with mounting(tmp_path, engine, STARLETTE, OPTIONS) as server:
        with server.client() as client:
            for path in ("/app/", "/app/inner/"):
                answer = client.ask(request(path))
                assert answer.body.decode() == f"hello {path} 42 127.0.0.1"
            assert answer.fields["x-middleware"] == "yes"
            for path in ("/app/body", "/app/inner/body"):
                for size in (0, 10, 5000000):
                    assert client.ask(request(path, method="POST", body=b"x" * size)).body == b'{"size":%d}' % size
                assert client.ask(chunked(path, b"x" * 10, b"x" * 100000)).body == b'{"size":100010}'
            kind, body = form_of("photo", b"\0" * 3000000)
            answer = client.ask(request("/app/form", kind, method="POST", body=body))
            assert json.loads(answer.body) == {"title": "photo", "name": "x.png", "size": 3000000}
            wanted = "".join(f"{number}," * 100 for number in range(100)).encode()
            for path in ("/app/stream", "/app/inner/stream"):
                assert client.ask(request(path)).body == wanted
            assert client.ask(request("/app/threaded")).body == b"True"
            assert client.ask(request("/app/background")).status == 202
            assert client.ask(request("/app/moved")).fields["location"] == "/app/"
            source = (tmp_path / "app.py").read_bytes()
            answer = client.ask(request("/app/file"))
            assert answer.body == source
            assert client.ask(request("/app/file", "Range: bytes=10-19")).body == source[10:20]
            assert client.ask(request("/app/file", method="HEAD"), "HEAD").fields["content-length"] == str(len(source))
            assert client.ask(request("/app/stream", method="HEAD"), "HEAD").status == 200
            assert client.ask(request("/app/nothing")).status == 404
            assert client.ask(request("/elsewhere")).status == 404
            assert client.ask(request("/app/", method="DELETE")).status == 405
            assert client.ask(request("/app/fail")).body == b"Internal Server Error"
            assert client.ask(request("/app/")).status == 200
        server.program.wait_for("background done")
        server.program.wait_for("uncaught")
        assert server.program.out.count("a failure of the application") >= 1
        assert server.program.out.count("uncaught") == 1
        fds = server.fds()
        for path in ("/app/events", "/app/inner/events"):
            with server.client() as client:
                client.send(request(path))
                while b"data: 3" not in client.data:
                    assert client._more()
        server.program.wait_for("events ended", count=2)
        with WsClient(server.address, "/app/ws", "Sec-WebSocket-Protocol: chat, x") as ws:
            assert ws.fields["sec-websocket-protocol"] == "chat"
            assert ws.message("one").text() == '{"got":"one"}'
            ws.send(close(1000)).rest()
        server.program.wait_for("ws ended")
        with WsClient(server.address, open_it=False) as ws:
            ws.send(b"GET /app/ws_deny HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
            assert ws.head() == 401
        with WsClient(server.address, "/app/ws_leave") as ws:
            ws.reset()
        with server.client() as client:
            client.send(request("/app/body", "Content-Length: 1000000", method="POST") + b"x" * 100000).reset()
        server.settle(fds)
        server.program.signal(signal.SIGTERM)
        assert server.program.wait() == 0
        assert "stopped" in server.program.out
        assert server.program.out.count("uncaught") == 1


FASTAPI = '''
from contextlib import asynccontextmanager
from fastapi import BackgroundTasks, Depends, FastAPI, File, Form, Header, HTTPException, Request, UploadFile, WebSocket
from pydantic import BaseModel

@asynccontextmanager
async def lifespan(app):
    yield {"database": "open"}

api = FastAPI(lifespan=lifespan)

class Item(BaseModel):
    name: str
    price: float

async def user(x_user: str = Header()):
    try:
        yield x_user
    finally:
        said(f"user {x_user} released")

@api.get("/")
async def index():
    return {"hello": "world"}

@api.get("/items/{number}")
def item(number: int, q: str | None = None):
    return {"number": number, "q": q}

@api.post("/items", status_code=201)
async def create(item: Item, tasks: BackgroundTasks, who: str = Depends(user)):
    tasks.add_task(said, f"{item.name} was created by {who}")
    return item

@api.post("/upload")
async def upload(file: UploadFile = File(), title: str = Form()):
    import hashlib
    return {"title": title, "digest": hashlib.sha256(await file.read()).hexdigest()}

@api.get("/state")
async def state(request: Request):
    return request.state.database

@api.get("/refused")
async def refused():
    raise HTTPException(418, "teapot")

@api.websocket("/ws/{room}")
async def ws(socket: WebSocket, room: str):
    await socket.accept()
    while True:
        await socket.send_bytes(room.encode() + await socket.receive_bytes())

kore.asgi(api)
'''


@pytest.mark.parametrize("engine", ENGINES)
def test_fastapi(tmp_path, engine):
    with mounting(tmp_path, engine, FASTAPI, OPTIONS) as server, server.client() as client:
        for _ in range(3):
            assert client.ask(request("/")).body == b'{"hello":"world"}'
        assert client.ask(request("/items/5?q=%C3%A9")).body == '{"number":5,"q":"é"}'.encode()
        assert client.ask(request("/items/x")).status == 422
        item = b'{"name": "pen", "price": 1.5}'
        answer = client.ask(request("/items", JSON, "X-User: ann", method="POST", body=item))
        assert (answer.status, answer.body) == (201, b'{"name":"pen","price":1.5}')
        assert client.ask(request("/items", JSON, method="POST", body=item)).status == 422
        assert client.ask(request("/items", JSON, "X-User: a", method="POST", body=b"{")).status == 422
        server.program.wait_for("pen was created by ann")
        server.program.wait_for("user ann released")
        content = bytes(range(256)) * 8192
        kind, body = form_of("photo", content)
        answer = client.ask(request("/upload", kind, method="POST", body=body))
        assert json.loads(answer.body) == {"title": "photo", "digest": hashlib.sha256(content).hexdigest()}
        assert client.ask(request("/state")).body == b'"open"'
        assert client.ask(request("/refused")).body == b'{"detail":"teapot"}'
        assert json.loads(client.ask(request("/openapi.json")).body)["openapi"]
        assert b"swagger" in client.ask(request("/docs")).body
        with WsClient(server.address, "/ws/blue") as ws:
            assert ws.message(b"\0").read().payload == b"blue\0"
        with WsClient(server.address, "/ws/blue") as ws:
            ws.message(b"\0").read()
            ws.send(close(1000)).rest()
        assert "uncaught" not in server.program.out


DJANGO = '''
import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import FileResponse, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

settings.configure(
    DEBUG=False, SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, DATA_UPLOAD_MAX_MEMORY_SIZE=None,
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
)

async def index(request):
    return HttpResponse(f"hello {request.path} {request.GET.get('q')} {request.META['REMOTE_ADDR']}")

def sync(request):
    return JsonResponse({"method": request.method, "script": request.META["SCRIPT_NAME"], "path": request.path_info})

async def body(request):
    return JsonResponse({"size": len(request.body)})

def upload(request):
    file = request.FILES["file"]
    return JsonResponse({"title": request.POST["title"], "size": file.size})

async def stream(request):
    async def pieces():
        for number in range(100):
            yield f"{number}," * 100
            await asyncio.sleep(0)
    return StreamingHttpResponse(pieces())

async def slow(request):
    said("slow begins")
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        said("slow cancelled")
        raise

def file(request):
    return FileResponse(open(__file__, "rb"))

async def fail(request):
    raise RuntimeError("a failure of the application")

urlpatterns = [
    path("", index), path("sync", sync), path("body", body), path("upload", upload), path("stream", stream),
    path("slow", slow), path("file", file), path("fail", fail),
]
kore.asgi(get_asgi_application(), path="/dj")
'''


@pytest.mark.parametrize("engine", ENGINES)
def test_django(tmp_path, engine):
    with mounting(tmp_path, engine, DJANGO, OPTIONS) as server, server.client() as client:
        assert client.ask(request("/dj/?q=x")).body == b"hello /dj/ x 127.0.0.1"
        answer = client.ask(request("/dj/sync", method="PUT"))
        assert json.loads(answer.body) == {"method": "PUT", "script": "/dj", "path": "/sync"}
        for size in (10, 3000000):
            assert client.ask(request("/dj/body", method="POST", body=b"x" * size)).body == b'{"size": %d}' % size
        kind, body = form_of("photo", b"\0" * 3000000)
        answer = client.ask(request("/dj/upload", kind, method="POST", body=body))
        assert json.loads(answer.body) == {"title": "photo", "size": 3000000}
        wanted = "".join(f"{number}," * 100 for number in range(100)).encode()
        assert client.ask(request("/dj/stream")).body == wanted
        assert client.ask(request("/dj/file")).body == (tmp_path / "app.py").read_bytes()
        assert client.ask(request("/dj/nothing")).status == 404
        assert client.ask(request("/dj/fail")).status == 500
        assert client.ask(request("/dj/")).status == 200
        fds = server.fds()
        with server.client() as other:
            other.send(request("/dj/slow"))
            server.program.wait_for("slow begins")
            other.reset()
        server.program.wait_for("slow cancelled")
        server.settle(fds)
        wait_until(lambda: client.ask(request("/dj/")).status == 200, "it serves on")
        assert "uncaught" not in server.program.out
