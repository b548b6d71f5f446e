"""A FastAPI application beside a route of kore's own, on http://127.0.0.1:8888, started with `kore examples/asgi.py`.

FastAPI is to be installed: `pip install fastapi`. Try

    curl http://127.0.0.1:8888/ping
    curl http://127.0.0.1:8888/api/notes -H 'content-type: application/json' -d '{"text": "buy milk"}'
    curl http://127.0.0.1:8888/api/notes
    curl -N http://127.0.0.1:8888/api/seconds

or open http://127.0.0.1:8888/api/docs.
"""

import asyncio
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

import kore

NOTES_MAX = 1000


class Note(BaseModel):
    text: str


@asynccontextmanager
async def lifespan(app):
    """Around the life of each worker: what it yields is in the state of its requests."""
    kore.log(kore.LOG_INFO, "the notebook is open")
    yield {"notes": []}
    kore.log(kore.LOG_INFO, "the notebook is closed")


api = FastAPI(lifespan=lifespan)


@api.get("/notes")
async def notes(request: Request) -> list[Note]:
    return request.state.notes


@api.post("/notes", status_code=201)
async def add(request: Request, note: Note) -> Note:
    if len(request.state.notes) >= NOTES_MAX:
        raise HTTPException(507, "the notebook is full")
    request.state.notes.append(note)
    return note


@api.get("/seconds")
async def seconds():
    async def count():
        for number in range(10):
            yield f"{number}\n"
            await asyncio.sleep(1)

    return StreamingResponse(count(), media_type="text/plain")


@api.websocket("/echo")
async def echo(socket: WebSocket):
    await socket.accept()
    try:
        while True:
            await socket.send_text(await socket.receive_text())
    except WebSocketDisconnect:
        pass


kore.config.workers = 1  # the notes are in the memory of one worker
kore.config.deployment = "dev"
kore.server("web", ip="127.0.0.1", port="8888", tls=False)
home = kore.domain("*", attach="web")
kore.asgi(api, path="/api", domain=home)


@kore.route("/ping", domain=home, methods=["get"])
def ping(req):
    req.response(200, b"pong\n")
