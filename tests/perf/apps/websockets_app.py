"""The echo server that the `websockets` package runs in the rig: its port, and the word uvloop to run on that."""

import asyncio
import http
import sys

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


if "uvloop" in sys.argv:
    import uvloop

    uvloop.run(main())
else:
    asyncio.run(main())
