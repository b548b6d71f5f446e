"""Context variables reach protocols: each is called back in the context in which its transport was asked for.

The selector loop calls them in a copy of it, and so do servers and libraries expect it: what is set before
``start_server`` is there in each of its connections.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextvars import ContextVar

import pytest
from reactor_harness import SECONDS_MAX, run

WHERE = ContextVar("WHERE", default="outside")


class Asking(asyncio.SubprocessProtocol):
    """A protocol of every kind that remembers what WHERE was when each of its methods was called."""

    def __init__(self):
        self.found = {"factory": WHERE.get()}
        self.lost = asyncio.get_running_loop().create_future()
        self.changed = asyncio.Event()
        self.transport = None

    def note(self, method):
        self.found[method] = WHERE.get()
        self.changed.set()

    async def until(self, *methods):
        async def wait():
            while not self.found.keys() >= set(methods):
                self.changed.clear()
                await self.changed.wait()

        await asyncio.wait_for(wait(), SECONDS_MAX)
        assert self.found == dict.fromkeys(self.found, "inside")

    def connection_made(self, transport):
        self.transport = transport
        self.note("connection_made")

    def data_received(self, _data):
        self.note("data_received")

    def datagram_received(self, _data, _address):
        self.note("datagram_received")

    def error_received(self, _exc):
        self.note("error_received")

    def eof_received(self):
        self.note("eof_received")

    def pause_writing(self):
        # Called by write(), in the context of whom that is: not of interest here.
        self.found["pause_writing"] = "inside"
        self.changed.set()

    def resume_writing(self):
        self.note("resume_writing")

    def pipe_data_received(self, _fd, _data):
        self.note("pipe_data_received")

    def pipe_connection_lost(self, _fd, _exc):
        self.note("pipe_connection_lost")

    def process_exited(self):
        self.note("process_exited")

    def connection_lost(self, exc):
        self.note("connection_lost")
        self.lost.set_result(exc)


async def inside(coro):
    """The result of `coro`, run where WHERE is "inside"; its own task does not change the caller's context."""

    async def there():
        WHERE.set("inside")
        return await coro

    return await asyncio.get_running_loop().create_task(there())


async def fill_and_drain(protocol, peer):
    """Have the protocol paused and resumed by a peer that reads late."""
    loop = asyncio.get_running_loop()
    protocol.transport.write(bytes(4_000_000))
    await protocol.until("pause_writing")
    left = 4_000_000
    while left:
        left -= len(await loop.sock_recv(peer, 1 << 20))
    await protocol.until("resume_writing")


def test_a_connection_that_was_taken_over(loop):
    async def main():
        near, far = socket.socketpair()
        far.setblocking(False)
        _, protocol = await inside(loop.connect_accepted_socket(Asking, near))
        await fill_and_drain(protocol, far)
        far.send(b"x")
        await protocol.until("data_received")
        far.close()
        await protocol.lost
        await protocol.until("factory", "connection_made", "eof_received", "connection_lost")
        assert WHERE.get() == "outside"

    run(loop, main())


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_the_connections_of_a_server(loop, tmp_path, kind):
    """Each has a copy of its own: what one sets, the next does not see."""

    class Setting(Asking):
        def connection_lost(self, exc):
            super().connection_lost(exc)
            WHERE.set("left behind")

    async def main():
        protocols = []

        def factory():
            protocols.append(Setting())
            return protocols[-1]

        if kind == "tcp":
            server = await inside(loop.create_server(factory, "127.0.0.1", 0))
        else:
            server = await inside(loop.create_unix_server(factory, str(tmp_path / "s")))
        listening = server.sockets[0]
        for _ in range(3):
            with socket.socket(listening.family) as client:
                client.setblocking(False)
                await loop.sock_connect(client, listening.getsockname())
                while not protocols:
                    await asyncio.sleep(0)
                protocol = protocols.pop()
                await loop.sock_sendall(client, b"x")
                await protocol.until("data_received")
            await asyncio.wait_for(protocol.lost, SECONDS_MAX)
            await protocol.until("connection_made", "eof_received", "connection_lost")
        server.close()
        await server.wait_closed()

    run(loop, main())


def test_the_tasks_of_start_server(loop):
    async def main():
        found = loop.create_future()

        async def client_connected(_reader, writer):
            found.set_result(WHERE.get())
            writer.close()

        server = await inside(asyncio.start_server(client_connected, "127.0.0.1", 0))
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        assert await asyncio.wait_for(found, SECONDS_MAX) == "inside"
        writer.close()
        server.close()
        await server.wait_closed()

    run(loop, main())


def test_datagrams(loop):
    async def main():
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        transport, protocol = await inside(loop.create_datagram_endpoint(Asking, sock=near))
        far.send(b"x")
        await protocol.until("factory", "connection_made", "datagram_received")
        for _ in range(40):
            transport.sendto(bytes(50_000))
        await protocol.until("pause_writing")
        far.setblocking(False)

        async def drain():
            while True:
                await loop.sock_recv(far, 50_000)

        draining = loop.create_task(drain())
        await protocol.until("resume_writing")
        draining.cancel()
        await asyncio.wait([draining])
        far.close()
        transport.abort()
        await protocol.until("connection_lost")

    run(loop, main())


def test_pipes(loop):
    async def main():
        read, write = os.pipe()
        _, reading = await inside(loop.connect_read_pipe(Asking, os.fdopen(read, "rb", 0)))
        transport, writing = await inside(loop.connect_write_pipe(Asking, os.fdopen(write, "wb", 0)))
        transport.write(bytes(1_000_000))
        await writing.until("factory", "connection_made", "pause_writing", "resume_writing")
        transport.close()
        await writing.until("connection_lost")
        await reading.until("factory", "connection_made", "data_received", "eof_received", "connection_lost")

    run(loop, main())


def test_a_child(loop):
    async def main():
        code = "import sys; sys.stdout.write(sys.stdin.read())"
        transport, protocol = await inside(loop.subprocess_exec(Asking, sys.executable, "-S", "-c", code, stderr=None))
        transport.get_pipe_transport(0).write(b"x")
        transport.get_pipe_transport(0).close()
        await protocol.until(
            "factory", "connection_made", "pipe_data_received", "pipe_connection_lost", "process_exited",
            "connection_lost",
        )
        transport.close()

    run(loop, main())
