"""The FastAPI application of the rig: uvicorn runs `app`, kore the whole file; kore's argument is the port."""

import sys

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

app = FastAPI()


@app.get("/", response_class=PlainTextResponse)
async def hello():
    return "hello world"


class App:
    def configure(self, args):
        import kore

        kore.config.workers = 1
        kore.config.deployment = "dev"
        kore.config.worker_max_connections = 16384
        kore.config.worker_rlimit_nofiles = 17408
        kore.config.socket_backlog = 4096
        kore.config.http_keepalive_time = 600
        kore.server("rig", ip="127.0.0.1", port=args[1], tls=False)
        kore.asgi(app, path="/", domain=kore.domain("*", attach="rig"))


if "uvicorn" not in sys.modules:
    koreapp = App()
