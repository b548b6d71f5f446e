"""Servers, connections, TLS, plain sockets and watched fds of the loop's asyncio face, on real sockets."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import ssl
import subprocess
import tempfile

import pytest
from driver_harness import fds
from reactor_harness import run


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
                loop.create_unix_server(asyncio.Protocol),
                loop.create_unix_server(asyncio.Protocol, "/tmp/x", sock=sock),
                loop.create_unix_server(asyncio.Protocol, sock=sock),
                loop.create_unix_connection(asyncio.Protocol),
                loop.create_unix_connection(asyncio.Protocol, "/tmp/x", sock=sock),
                loop.create_unix_connection(asyncio.Protocol, "/tmp/x", ssl=True),
                loop.create_unix_connection(asyncio.Protocol, "/tmp/x", server_hostname="x"),
            ):
                with pytest.raises(ValueError):
                    await wrong
        with pytest.raises(TypeError):
            await loop.create_unix_server(asyncio.Protocol, "/tmp/x", ssl=True)
        with pytest.raises(FileNotFoundError):
            await loop.create_unix_connection(asyncio.Protocol, "/nowhere/at/all")
        with pytest.raises(FileNotFoundError):
            await loop.create_unix_server(asyncio.Protocol, "/nowhere/at/all")

    run(loop, main())


def test_a_refused_connection(loop):
    async def main():
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])

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
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        transport, _ = await loop.create_connection(asyncio.Protocol, *server.sockets[0].getsockname()[:2])
        transport.write(b"x")
        await asyncio.sleep(0.01)
        return [sock._sock for sock in server.sockets] + [t._sock for t in loop._transports.values()]

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
