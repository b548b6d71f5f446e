"""Transports on real sockets: what a protocol is told, reading, writing, flow control, ends."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct

import pytest
from reactor_harness import run


class Recorder(asyncio.Protocol):
    """A protocol that remembers all it was told."""

    def __init__(self, keep_open=False):
        self.calls = []
        self.data = bytearray()
        self.transport = None
        self.keep_open = keep_open
        self.changed = asyncio.Event()
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        self.calls.append("made")

    def data_received(self, data):
        assert type(data) is bytes
        assert data
        self.data += data
        self.changed.set()

    def eof_received(self):
        self.calls.append("eof")
        self.changed.set()
        return self.keep_open

    def pause_writing(self):
        self.calls.append("pause")
        self.changed.set()

    def resume_writing(self):
        self.calls.append("resume")
        self.changed.set()

    def connection_lost(self, exc):
        self.calls.append(("lost", exc))
        self.changed.set()
        self.closed.set_result(exc)

    async def until(self, holds):
        while not holds(self):
            self.changed.clear()
            await self.changed.wait()


async def connected(factory=Recorder):
    """A protocol on our transport, and the plain, non-blocking socket at its other end."""
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    _, protocol = await asyncio.get_running_loop().connect_accepted_socket(factory, near)
    return protocol, far


def test_the_calls_a_protocol_gets(loop):
    async def main():
        protocol, far = await connected()
        assert protocol.calls == ["made"]
        assert not protocol.transport.is_closing()
        far.send(b"one")
        await protocol.until(lambda p: p.data == b"one")
        far.shutdown(socket.SHUT_WR)
        assert await protocol.closed is None
        assert protocol.calls == ["made", "eof", ("lost", None)]
        assert await loop.sock_recv(far, 10) == b""
        assert protocol.transport.is_closing()
        assert "closed" in repr(protocol.transport)
        protocol.transport.write(b"into the void")
        protocol.transport.close()
        protocol.transport.abort()
        far.close()

    run(loop, main())


def test_a_half_closed_connection_can_be_kept(loop):
    async def main():
        protocol, far = await connected(lambda: Recorder(keep_open=True))
        far.shutdown(socket.SHUT_WR)
        await protocol.until(lambda p: "eof" in p.calls)
        protocol.transport.write(b"still")
        assert await loop.sock_recv(far, 10) == b"still"
        protocol.transport.close()
        assert await protocol.closed is None
        far.close()

    run(loop, main())


def test_write_eof(loop):
    async def main():
        protocol, far = await connected()
        transport = protocol.transport
        assert transport.can_write_eof()
        transport.writelines([b"a", bytearray(b"b"), memoryview(b"c")])
        transport.write_eof()
        transport.write_eof()
        with pytest.raises(RuntimeError):
            transport.write(b"late")
        assert await loop.sock_recv(far, 10) == b"abc"
        assert await loop.sock_recv(far, 10) == b""
        far.send(b"on")
        await protocol.until(lambda p: p.data == b"on")
        transport.abort()
        await protocol.closed
        far.close()

    run(loop, main())


def test_what_was_written_is_sent_before_close_and_not_after_abort(loop):
    async def main():
        protocol, far = await connected()
        protocol.transport.write(b"last words")
        protocol.transport.close()
        protocol.transport.write(b"too late")
        await protocol.closed
        assert await loop.sock_recv(far, 100) == b"last words"
        assert await loop.sock_recv(far, 100) == b""
        far.close()
        protocol, far = await connected()
        protocol.transport.write(b"dropped")
        protocol.transport.abort()
        await protocol.closed
        assert await loop.sock_recv(far, 100) == b""
        far.close()

    run(loop, main())


def test_a_buffer_can_be_changed_after_write(loop):
    async def main():
        protocol, far = await connected()
        buffer = bytearray(b"before")
        protocol.transport.write(buffer)
        buffer[:] = b"after!"
        assert await loop.sock_recv(far, 10) == b"before"
        with pytest.raises(TypeError):
            protocol.transport.write("text")
        protocol.transport.write(b"")
        protocol.transport.abort()
        await protocol.closed
        far.close()

    run(loop, main())


def test_pausing_reading(loop):
    async def main():
        protocol, far = await connected()
        transport = protocol.transport
        assert transport.is_reading()
        transport.pause_reading()
        transport.pause_reading()
        assert not transport.is_reading()
        far.send(b"held back")
        far.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.02)
        assert protocol.data == b""
        assert protocol.calls == ["made"]
        transport.resume_reading()
        transport.resume_reading()
        await protocol.closed
        assert protocol.data == b"held back"
        assert protocol.calls == ["made", "eof", ("lost", None)]
        far.close()

    run(loop, main())


def test_a_protocol_that_pauses_in_connection_made_gets_nothing(loop):
    class Paused(Recorder):
        def connection_made(self, transport):
            super().connection_made(transport)
            transport.pause_reading()

    async def main():
        near, far = socket.socketpair()
        far.send(b"early")
        near.setblocking(False)
        _, protocol = await loop.connect_accepted_socket(Paused, near)
        await asyncio.sleep(0.01)
        assert protocol.data == b""
        protocol.transport.resume_reading()
        await protocol.until(lambda p: p.data == b"early")
        protocol.transport.abort()
        await protocol.closed
        far.close()

    run(loop, main())


def test_flow_control(loop):
    """Above the high mark the protocol is paused; once the peer has read, it is resumed; nothing is lost."""

    async def main():
        protocol, far = await connected()
        transport = protocol.transport
        assert transport.get_write_buffer_limits() == (16 * 1024, 64 * 1024)
        transport.write(bytes(4_000_000))
        assert protocol.calls == ["made", "pause"]
        assert transport.get_write_buffer_size() == 4_000_000
        await asyncio.sleep(0.01)
        transport.write(b"end")
        assert "resume" not in protocol.calls
        got = 0
        while got < 4_000_003:
            got += len(await loop.sock_recv(far, 1 << 20))
        await protocol.until(lambda p: "resume" in p.calls)
        assert transport.get_write_buffer_size() == 0
        assert protocol.calls == ["made", "pause", "resume"]
        transport.abort()
        await protocol.closed
        far.close()

    run(loop, main())


def test_flow_control_when_the_kernel_takes_all_at_once(loop):
    """No driver speaks up then; the protocol is resumed all the same."""

    async def main():
        protocol, far = await connected()
        protocol.transport.set_write_buffer_limits(high=10)
        assert protocol.transport.get_write_buffer_limits() == (2, 10)
        for _ in range(3):
            protocol.transport.write(b"x" * 9)
        await protocol.until(lambda p: "resume" in p.calls)
        assert protocol.calls == ["made", "pause", "resume"]
        protocol.transport.write(b"x" * 5)
        protocol.transport.set_write_buffer_limits(high=0)
        await protocol.until(lambda p: p.calls.count("resume") == 2)
        with pytest.raises(ValueError):
            protocol.transport.set_write_buffer_limits(high=1, low=2)
        protocol.transport.set_write_buffer_limits(low=5)
        assert protocol.transport.get_write_buffer_limits() == (5, 20)
        protocol.transport.abort()
        await protocol.closed
        far.close()

    run(loop, main())


def test_a_reset_is_an_error(loop):
    async def main():
        got = []

        def factory():
            got.append(Recorder())
            return got[0]

        server = await loop.create_server(factory, "127.0.0.1", 0)
        client = socket.create_connection(server.sockets[0].getsockname())
        while not got:
            await asyncio.sleep(0.001)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        exc = await got[0].closed
        assert isinstance(exc, ConnectionResetError)
        assert exc.errno == errno.ECONNRESET
        server.close()
        await server.wait_closed()

    run(loop, main())


@pytest.mark.parametrize("method", ["connection_made", "data_received", "eof_received", "connection_lost"])
def test_a_protocol_that_fails_loses_its_connection_only(loop, method):
    contexts = []
    loop.set_exception_handler(lambda _loop, context: contexts.append(context))

    async def main():
        class Broken(Recorder):
            pass

        def fail(self, *args):
            getattr(Recorder, method)(self, *args)
            raise KeyError(method)

        setattr(Broken, method, fail)
        protocol, far = await connected(Broken)
        if method != "connection_made":
            far.send(b"data")
        if method in ("eof_received", "connection_lost"):
            far.shutdown(socket.SHUT_WR)
        exc = await protocol.closed
        assert isinstance(exc, KeyError) == (method != "connection_lost")
        far.close()
        assert [context["exception"].args for context in contexts] == [(method,)]
        assert method in contexts[0]["message"] or method == "eof_received"

    run(loop, main())


class Buffered(asyncio.BufferedProtocol):
    """A protocol with small buffers of its own."""

    def __init__(self):
        self.buffer = bytearray(7)
        self.data = bytearray()
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport

    def get_buffer(self, _sizehint):
        return self.buffer

    def buffer_updated(self, size):
        self.data += self.buffer[:size]

    def connection_lost(self, exc):
        self.lost.set_result(exc)


def test_buffered_protocols(loop):
    async def main():
        protocol, far = await connected(Buffered)
        far.send(bytes(range(100)))
        far.shutdown(socket.SHUT_WR)
        await protocol.lost
        assert protocol.data == bytes(range(100))
        far.close()

    run(loop, main())


def test_switching_protocols(loop):
    async def main():
        class Switching(Buffered):
            def buffer_updated(self, size):
                super().buffer_updated(size)
                self.transport.set_protocol(plain)

        plain = Recorder()
        protocol, far = await connected(Switching)
        far.send(b"1234567and the rest")
        await plain.until(lambda p: p.data == b"and the rest")
        assert protocol.data == b"1234567"
        assert protocol.transport.get_protocol() is plain
        far.close()
        await plain.closed

    run(loop, main())


def test_a_protocol_is_what_its_methods_say(loop):
    """Whoever gives buffers is buffered without being a BufferedProtocol, as on uvloop."""

    class GivesBuffers(asyncio.BaseProtocol):
        get_buffer = Buffered.get_buffer
        buffer_updated = Buffered.buffer_updated

        def __init__(self):
            Buffered.__init__(self)

        def eof_received(self):
            pass

        def connection_lost(self, exc):
            self.lost.set_result(exc)

    async def main():
        protocols = []
        server = await loop.create_server(
            lambda: protocols.append(GivesBuffers()) or protocols[-1], "127.0.0.1", 0,
        )
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"more than seven bytes")
        writer.close()
        await writer.wait_closed()
        assert await protocols[0].lost is None
        assert protocols[0].data == b"more than seven bytes"
        server.close()
        await server.wait_closed()

    run(loop, main())


def test_a_protocol_that_takes_no_data_may_have_a_connection(loop):
    """It lives until data comes, and is then ended with a word to the protocol; the listener and its fds are sound."""
    contexts = []
    loop.set_exception_handler(lambda _loop, context: contexts.append(context))

    class TakesNothing(asyncio.BaseProtocol):
        def __init__(self):
            self.lost = loop.create_future()

        def connection_made(self, transport):
            transport.write(b"hello")

        def connection_lost(self, exc):
            self.lost.set_result(exc)

    async def main():
        protocols = []
        server = await loop.create_server(
            lambda: protocols.append(TakesNothing()) or protocols[-1], "127.0.0.1", 0,
        )
        for number in range(2):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            assert await reader.readexactly(5) == b"hello"
            assert not contexts[number:]
            writer.write(b"data")
            assert isinstance(await protocols[number].lost, TypeError)
            writer.close()
        assert "get_buffer()" in str(contexts[0]["exception"])
        server.close()
        await server.wait_closed()

    run(loop, main())
