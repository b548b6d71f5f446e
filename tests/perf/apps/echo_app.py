"""An asyncio server that parses nothing: each read is answered by one fixed HTTP response, so that wrk can drive it.

Arguments: the loop (kore, uvloop or selector), the kind, the port. What differs between two of them is the loop alone.
Of the kinds, protocol and streams answer at once; query asks a database first, by a pool of asyncpg's, and proc runs a
child, both in a task for each read, as the servers do that handlers are written for.
"""

import asyncio
import os
import sys

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world"


class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(ANSWER)


class Later(asyncio.Protocol):
    """Answers once what it waits for has ended."""

    def __init__(self, wait):
        self.wait = wait
        self.tasks = set()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        task = asyncio.create_task(self.answer())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def answer(self):
        await self.wait()
        self.transport.write(ANSWER)


async def waiting(kind):
    """What connections of this kind wait for."""
    if kind == "proc":

        async def run():
            child = await asyncio.create_subprocess_exec("/bin/true")
            assert await child.wait() == 0

        return run
    import asyncpg

    async def nothing(connection):
        """Instead of the RESET that the pool sends after each query: kore sends one only where it is needed."""

    pool = await asyncpg.create_pool(os.environ["RIG_DATABASE_URI"], min_size=10, max_size=10, reset=nothing)

    async def query():
        rows = await pool.fetch("SELECT 1 AS one")
        assert rows[0]["one"] == 1

    return query


async def converse(reader, writer):
    try:
        while await reader.read(65536):
            writer.write(ANSWER)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def main(kind, port):
    loop = asyncio.get_running_loop()
    if kind == "protocol":
        server = await loop.create_server(Echo, "127.0.0.1", port, backlog=4096)
    elif kind in ("query", "proc"):
        wait = await waiting(kind)
        server = await loop.create_server(lambda: Later(wait), "127.0.0.1", port, backlog=4096)
    else:
        server = await asyncio.start_server(converse, "127.0.0.1", port, backlog=4096)
    async with server:
        await server.serve_forever()


def loop_factory(name):
    if name == "kore":
        import kore.reactor

        return kore.reactor.new_event_loop
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    return asyncio.SelectorEventLoop


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory(sys.argv[1])) as runner:
        runner.run(main(sys.argv[2], int(sys.argv[3])))
