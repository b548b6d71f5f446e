"""The ASGI application that uvicorn runs in the rig."""

from bodies import BODIES

STARTS = {
    path: {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())],
    }
    for path, body in BODIES.items()
}
ENDS = {path: {"type": "http.response.body", "body": body} for path, body in BODIES.items()}


async def app(scope, receive, send):
    path = scope["path"]
    await send(STARTS[path])
    await send(ENDS[path])
