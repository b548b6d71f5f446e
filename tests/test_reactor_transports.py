"""Transports, servers, connections and plain sockets of the asyncio face, on real sockets."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import ssl
import struct
import subprocess
import sys
import tempfile

import pytest
from driver_harness import fds
from reactor_harness import ENGINES, open_loop, run

from kore import reactor


@pytest.fixture(params=ENGINES)
def opened(request):
    """A loop on each engine, and its log."""
    yield from open_loop(request.param)


@pytest.fixture
def loop(opened):
    return opened[0]


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


async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_streams_echo(loop, host):
    async def main():
        server = await asyncio.start_server(echo, host if host != "localhost" else "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"hello\n")
            assert await reader.readline() == b"hello\n"
            assert writer.get_extra_info("peername")[1] == port
            assert writer.get_extra_info("sockname")[1] == writer.get_extra_info("socket").getsockname()[1]
            assert writer.get_extra_info("nothing", 5) == 5
            big = os.urandom(1 << 20) * 4

            async def send():
                for at in range(0, len(big), 100_000):
                    writer.write(big[at : at + 100_000])
                    await writer.drain()
                writer.write_eof()

            sent, back = await asyncio.gather(send(), reader.read())
            assert sent is None
            assert back == big
            writer.close()
            await writer.wait_closed()

    run(loop, main())


@pytest.mark.parametrize("abstract", [False, True])
def test_unix_servers(loop, abstract):
    with tempfile.TemporaryDirectory() as folder:
        path = f"\0kore-test-{os.getpid()}" if abstract else f"{folder}/socket"

        async def main():
            for _ in range(2):  # the second finds the stale file of the first
                server = await asyncio.start_unix_server(echo, path)
                reader, writer = await asyncio.open_unix_connection(path)
                writer.write(b"x")
                assert await reader.read(10) == b"x"
                writer.close()
                await writer.wait_closed()
                server.close()
                await server.wait_closed()
                # The driver lets go of an abstract name once its accept is over: some turns later.
                await asyncio.sleep(0.01)

        run(loop, main())


def test_wrong_unix_arguments(loop):
    async def main():
        with socket.socket() as sock:
            for wrong in (
                loop.create_unix_server(Recorder),
                loop.create_unix_server(Recorder, "/tmp/x", sock=sock),
                loop.create_unix_server(Recorder, sock=sock),
                loop.create_unix_connection(Recorder),
                loop.create_unix_connection(Recorder, "/tmp/x", sock=sock),
                loop.create_unix_connection(Recorder, "/tmp/x", ssl=True),
                loop.create_unix_connection(Recorder, "/tmp/x", server_hostname="x"),
            ):
                with pytest.raises(ValueError):
                    await wrong
        with pytest.raises(TypeError):
            await loop.create_unix_server(Recorder, "/tmp/x", ssl=True)
        with pytest.raises(FileNotFoundError):
            await loop.create_unix_connection(Recorder, "/nowhere/at/all")
        with pytest.raises(FileNotFoundError):
            await loop.create_unix_server(Recorder, "/nowhere/at/all")

    run(loop, main())


def test_a_refused_connection(loop):
    async def main():
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])

    run(loop, main())


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


@pytest.fixture(scope="module")
def certificate():
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost"],
            capture_output=True,
        )
        if made.returncode:
            pytest.skip(f"openssl: {made.stderr!r}")
        yield f"{folder}/cert.pem", f"{folder}/key.pem"


def test_tls(loop, certificate):
    """asyncio's own TLS protocol runs over these transports, also when a plain connection is upgraded."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(*certificate)
    client = ssl.create_default_context(cafile=certificate[0])

    async def main():
        server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=serving)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("localhost", port, ssl=client)
        data = os.urandom(300_000)
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
        assert writer.get_extra_info("ssl_object") is not None
        writer.close()
        await writer.wait_closed()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await writer.start_tls(client, server_hostname="localhost")
        writer.write(b"upgraded")
        assert await reader.read(100) == b"upgraded"
        writer.close()
        await writer.wait_closed()
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection("127.0.0.1", port, ssl=ssl.create_default_context())
        server.close()
        await server.wait_closed()

    loop.set_exception_handler(lambda _loop, _context: None)
    run(loop, main())


def test_many_connections_leave_no_fd_behind(loop):
    async def main():
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()[:2]

        async def client(n):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"%d\n" % n)
            assert await reader.readline() == b"%d\n" % n
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*(client(n) for n in range(3)))
        await asyncio.sleep(0.01)
        before = fds()
        for _ in range(3):
            await asyncio.gather(*(client(n) for n in range(50)))
        await asyncio.sleep(0.02)
        assert len(fds()) <= len(before)
        server.close()
        await server.wait_closed()
        assert not loop._transports

    run(loop, main())


def test_closing_the_loop_closes_its_sockets_once(opened):
    """Connections that are still open when the loop ends are closed, and no fd that is somebody else's by then."""
    loop, _ = opened

    async def main():
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        writer.write(b"x")
        await asyncio.sleep(0.01)
        return [sock._sock for sock in server.sockets] + [t._sock for t in loop._transports]

    sockets = run(loop, main())
    assert len(sockets) == 3
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert [sock.fileno() for sock in sockets[1:]] == [-1, -1]
    sockets.pop(0).close()
    gc.collect()
    pipes = [os.pipe() for _ in range(8)]
    del sockets
    gc.collect()
    for pair in pipes:
        for fd in pair:
            os.close(fd)


def test_plain_sockets(loop):
    async def main():
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        client = socket.socket()
        client.setblocking(False)
        accepted = asyncio.create_task(loop.sock_accept(listener))
        await loop.sock_connect(client, ("localhost", listener.getsockname()[1]))
        conn, address = await accepted
        assert address == client.getsockname()
        assert conn.gettimeout() == 0
        data = os.urandom(3_000_000)
        sending = asyncio.create_task(loop.sock_sendall(client, data))
        got = bytearray()
        while len(got) < len(data):
            got += await loop.sock_recv(conn, 1 << 20)
        await sending
        assert got == data
        buffer = bytearray(10)
        waiting = asyncio.create_task(loop.sock_recv_into(conn, buffer))
        await asyncio.sleep(0)
        client.send(b"into")
        assert await waiting == 4
        assert buffer[:4] == b"into"
        hopeless = asyncio.create_task(loop.sock_recv(conn, 1))
        await asyncio.sleep(0.001)
        hopeless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hopeless
        for sock in (conn, client, listener):
            sock.close()
        with socket.socket() as sock:
            sock.setblocking(False)
            with pytest.raises(ConnectionRefusedError):
                await loop.sock_connect(sock, ("127.0.0.1", 1))

    run(loop, main())


def test_datagrams_by_socket(loop):
    async def main():
        with socket.socket(type=socket.SOCK_DGRAM) as one, socket.socket(type=socket.SOCK_DGRAM) as two:
            for sock in (one, two):
                sock.setblocking(False)
                sock.bind(("127.0.0.1", 0))
            waiting = asyncio.create_task(loop.sock_recvfrom(two, 100))
            await asyncio.sleep(0)
            await loop.sock_sendto(one, b"datagram", two.getsockname())
            assert await waiting == (b"datagram", one.getsockname())
            await loop.sock_sendto(one, b"again", two.getsockname())
            buffer = bytearray(10)
            assert await loop.sock_recvfrom_into(two, buffer) == (5, one.getsockname())

    run(loop, main())


def test_readers_and_writers_are_level_triggered(loop):
    async def main():
        near, far = socket.socketpair()
        near.setblocking(False)
        seen = []
        done = loop.create_future()

        def readable(word):
            seen.append((word, near.recv(1)))
            if len(seen) == 3:
                assert loop.remove_reader(near)
                done.set_result(None)

        loop.add_reader(near, print)
        loop.add_reader(near, readable, "r")
        far.send(b"abcd")
        await done
        await asyncio.sleep(0.005)
        assert seen == [("r", b"a"), ("r", b"b"), ("r", b"c")]
        assert not loop.remove_reader(near)
        writable = []
        loop.add_writer(near.fileno(), writable.append, 1)
        while len(writable) < 3:
            await asyncio.sleep(0)
        assert loop.remove_writer(near)
        count = len(writable)
        await asyncio.sleep(0.005)
        assert len(writable) == count
        with pytest.raises(ValueError):
            loop.add_reader(-1, print)
        near.close()
        far.close()

    run(loop, main())


def test_a_server_out_of_fds_goes_on_later(loop, monkeypatch):
    """EMFILE ends the driver's accept; the listener tries again and serves what waited."""
    monkeypatch.setattr("kore.reactor.connections._ACCEPT_RETRY_SECONDS", 0.05)
    import resource

    contexts = []
    loop.set_exception_handler(lambda _loop, context: contexts.append(context))

    async def main():
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        client = socket.socket()
        client.setblocking(False)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(fds())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        fill = []
        try:
            while True:
                try:
                    fill.append(os.dup(0))
                except OSError:
                    break
            await loop.sock_connect(client, server.sockets[0].getsockname())
            while not contexts:
                await asyncio.sleep(0.005)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for fd in fill:
                os.close(fd)
        assert contexts[0]["exception"].errno == errno.EMFILE
        await loop.sock_sendall(client, b"hello")
        assert await loop.sock_recv(client, 10) == b"hello"
        client.close()
        server.close()
        await server.wait_closed()

    run(loop, main())


def test_a_closed_server_accepts_no_more(loop):
    async def main():
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        assert server.is_serving()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.01)
        with socket.socket() as sock:
            sock.setblocking(False)
            with pytest.raises(ConnectionRefusedError):
                await loop.sock_connect(sock, address)

    run(loop, main())


def test_what_is_not_there_yet_says_so(loop):
    async def main():
        with pytest.raises(NotImplementedError):
            await asyncio.create_subprocess_exec(sys.executable)

    assert reactor.Loop is type(loop)
    run(loop, main())
