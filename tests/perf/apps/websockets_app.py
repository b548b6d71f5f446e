"""The echo server that the `websockets` package runs in the rig; the argument is the port."""

import asyncio
import http
import sys

import uvloop
from websockets.asyncio.server import serve


def answer(connection, request):
    """Plain requests, by which the rig sees that the server is up."""
    return connection.respond(http.HTTPStatus.OK, "hello world") if request.path == "/" else None


async def echo(connection):
    """Every message goes back."""
    async for message in connection:
        await connection.send(message)


async def main():
    """Serve until killed. Compression off, as for the others."""
    async with serve(echo, "127.0.0.1", int(sys.argv[1]), process_request=answer, compression=None, ping_interval=None):
        await asyncio.get_running_loop().create_future()


uvloop.run(main())
