"""An asyncio server that parses nothing: each read is answered by one fixed HTTP response, so that wrk can drive it.

Arguments: the loop (kore, uvloop or selector), the kind (protocol or streams), the port. What differs between two of
them is the loop alone.
"""

import asyncio
import sys

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world"


class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(ANSWER)


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
    if kind == "protocol":
        server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", port, backlog=4096)
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
