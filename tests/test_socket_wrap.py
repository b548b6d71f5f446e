"""``kore.socket_wrap``: every operation of a wrapped socket, its results, its errors and the rules at its call."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading

import pytest
from driver_harness import reset, tcp_pair, unix_pair
from reactor_harness import run

import kore
from kore import reactor


@pytest.fixture(params=["ipv4", "ipv6", "path", "abstract"])
def place(request, tmp_path):
    """A family and the arguments of connect() and bind() for a place nobody listens at; bind(port 0) for IP."""
    name = f"kore-{os.getpid()}-{request.node.name}"
    if request.param == "ipv6":
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError as error:
                pytest.skip(f"no IPv6 here: {error}")
    return {
        "ipv4": (socket.AF_INET, ("127.0.0.1", 0)), "ipv6": (socket.AF_INET6, ("::1", 0)),
        "path": (socket.AF_UNIX, str(tmp_path / "s")), "abstract": (socket.AF_UNIX, "\0" + name[:90]),
    }[request.param]


def words(sock: socket.socket) -> tuple:
    """Where a bound socket is, as kore's connect() and sendto() take it."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return ("@" + name[1:].decode() if isinstance(name, bytes) else name,)
    return name[:2]


@contextlib.contextmanager
def bound(place, kind=socket.SOCK_DGRAM):
    with socket.socket(place[0], kind) as sock:
        sock.bind(place[1])
        if kind == socket.SOCK_STREAM:
            sock.listen()
        yield sock


def test_a_stream_from_connect_to_end(loop, place) -> None:
    """connect, accept, send, recv, the end as None, on every family; any size in both directions at once."""
    text = os.urandom(3_000_000)

    async def serve(listener):
        conn = await listener.accept()
        assert type(conn) is kore.pysocket
        heard = b""
        while (piece := await conn.recv(100_000)) is not None:
            assert 0 < len(piece) <= 100_000
            await conn.send(piece)
            heard += piece
        conn.close()
        return heard

    async def read_all(ksock):
        heard = b""
        while len(heard) < len(text):
            heard += await ksock.recv(1 << 20)
        return heard

    async def main():
        with bound(place, socket.SOCK_STREAM) as listening, socket.socket(place[0]) as sock:
            listener = kore.socket_wrap(listening)
            server = loop.start(serve(listener))
            ksock = kore.socket_wrap(sock)
            assert await ksock.connect(*words(listening)) is None
            reader = loop.start(read_all(ksock))
            assert await ksock.send(text) is None
            assert await reader == text
            sock.shutdown(socket.SHUT_WR)
            assert await ksock.recv(10) is None
            assert await ksock.recv(10) is None
            assert await server == text
            assert ksock.close() is True
            assert listener.close() is True

    run(loop, main())


def test_datagrams(loop, place, tmp_path) -> None:
    """sendto and recvfrom on every family: who sent it, what it was, and an empty one."""

    async def main():
        with bound(place) as there, socket.socket(place[0], socket.SOCK_DGRAM) as here:
            if place[0] != socket.AF_UNIX:
                here.bind(place[1])
            elif place[1].startswith("\0"):
                here.bind(place[1] + "-2")
            else:
                here.bind(str(tmp_path / "here"))
            target, source = kore.socket_wrap(there), kore.socket_wrap(here)
            port = [str(words(there)[1])] if place[0] != socket.AF_UNIX else []
            assert await source.sendto(words(there)[0], *port, "text") is None
            assert await target.recvfrom(100) == (*words(here), b"text")
            await source.sendto(*words(there), b"")
            assert await target.recvfrom(100) == (*words(here), b"")
            await source.sendto(*words(there), bytearray(b"0123456789"))
            assert await target.recv(4) == b"0123"
            await source.connect(*words(there))
            await source.send(memoryview(b"connected"))
            assert await target.recv(100) == b"connected"
            await source.send(b"")
            assert await target.recv(100) is None
            for ksock in (target, source):
                ksock.close()

    run(loop, main())


def test_recvfrom_unnamed_and_streams(loop) -> None:
    """An unnamed unix sender is None; a stream's peer is known without being told; at the end all is None."""

    async def main():
        near, far = unix_pair()
        ksock = kore.socket_wrap(near)
        far.send(b"x")
        assert await ksock.recvfrom(10) == (None, b"x")
        far.close()
        path, data = await ksock.recvfrom(10)
        assert (path, data) == (None, None)
        ksock.close()
        near.close()
        near, far = tcp_pair()
        ksock = kore.socket_wrap(near)
        far.send(b"x")
        assert await ksock.recvfrom(10) == (*far.getsockname(), b"x")
        far.close()
        assert await ksock.recvfrom(10) == (None, None, None)
        ksock.close()
        near.close()

    run(loop, main())


def test_recvmsg(loop) -> None:
    """The pair of the reference, with the sender and the C platform's form beside it; None as data at the end."""

    async def main():
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ksock = kore.socket_wrap(near)
        socket.send_fds(far, [b"x"], [0])
        result = await ksock.recvmsg(1024)
        data, ancdata = result
        ((level, kind, raw),) = ancdata
        os.close(int.from_bytes(raw, "little"))
        assert (data, level, kind) == (b"x", socket.SOL_SOCKET, socket.SCM_RIGHTS)
        assert result.source_form == (None, b"x", [(len(raw), level, kind, raw)])
        assert (result.address, result.port) == (None, None)
        far.close()
        assert await ksock.recvmsg(1024) == (None, [])
        ksock.close()
        near.close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            ksock = kore.socket_wrap(sock)
            sock.sendto(b"", sock.getsockname())
            result = await ksock.recvmsg(1024, 10_000)
            assert result == (b"", [])
            assert (result.address, result.port) == sock.getsockname()
            assert result.source_form == (*sock.getsockname(), b"", [])
            ksock.close()

    run(loop, main())


@pytest.mark.parametrize("method", ["recv", "recvfrom", "recvmsg"])
def test_timeouts_count_from_the_call(loop, method) -> None:
    """TimeoutError at the await, after the time that ran since the call; nothing is lost, the socket goes on."""

    async def main():
        near, far = unix_pair()
        ksock = kore.socket_wrap(near)
        receive = getattr(ksock, method)
        began = loop.time()
        with pytest.raises(TimeoutError):
            await receive(10, 50)
        assert 0.045 < loop.time() - began < 5
        op = receive(10, 50)
        await asyncio.sleep(0.06)
        began = loop.time()
        with pytest.raises(TimeoutError):
            await op
        assert loop.time() - began < 0.045
        with pytest.raises(TimeoutError):
            await receive(10, 0)
        far.send(b"there")
        assert b"there" in await receive(10, 10_000)
        with pytest.raises(TimeoutError):
            await receive(10, 1)
        far.close()
        ksock.close()
        near.close()

    run(loop, main())


def test_one_operation_in_each_direction(loop) -> None:
    """A second receive or send at the call is a RuntimeError; the other direction is free; a dropped one is none."""

    async def main():
        near, far = unix_pair()
        ksock = kore.socket_wrap(near)

        async def receive():
            return await ksock.recv(10)

        receiver = loop.start(receive())
        await reactor.suspend(0)
        for call in (lambda: ksock.recv(1), lambda: ksock.recvfrom(1), lambda: ksock.recvmsg(1), ksock.accept):
            with pytest.raises(RuntimeError, match="recv.. is pending"):
                call()
        await ksock.send(b"out")
        assert far.recv(10) == b"out"
        far.send(b"in")
        assert await receiver == b"in"
        first = ksock.recv(10)
        with pytest.raises(RuntimeError, match="pending"):
            ksock.recv(10)
        with pytest.raises(RuntimeError, match="did not await"):
            ksock.send(b"x")
        del first
        op = ksock.send(b"again")
        await op
        with pytest.raises(RuntimeError, match="twice"):
            await op
        assert far.recv(10) == b"again"
        far.close()
        ksock.close()
        near.close()

    run(loop, main())


def test_operations_need_a_coroutine_and_an_open_socket(loop) -> None:
    """RuntimeErrors at the call: outside of coroutines, and on a socket that was closed."""
    near, far = unix_pair()
    ksock = kore.socket_wrap(near)
    for call in operations(ksock):
        with pytest.raises(RuntimeError, match="coroutine"):
            call()
    assert ksock.close() is True
    assert ksock.close() is True

    async def main():
        for call in operations(ksock):
            with pytest.raises(RuntimeError, match="closed"):
                call()

    run(loop, main())
    near.close()
    far.close()


def operations(ksock):
    return (
        lambda: ksock.recv(1), lambda: ksock.recvfrom(1), lambda: ksock.recvmsg(1, 5), ksock.accept,
        lambda: ksock.send(b"x"), lambda: ksock.sendto("/x", b"x"), lambda: ksock.connect("/x"),
    )


def test_arguments_are_checked_at_the_call(loop) -> None:
    """Wrong types and values, with the error each has."""

    async def main():
        with socket.socket() as inet, socket.socket(socket.AF_INET6) as inet6, socket.socket(socket.AF_UNIX) as local:
            v4, v6, unix = map(kore.socket_wrap, (inet, inet6, local))
            long = "/" + "x" * 107
            cases = [
                (ValueError, lambda: v4.connect("localhost", 80)), (ValueError, lambda: v4.connect("127.1", 80)),
                (ValueError, lambda: v4.connect("::1", 80)), (ValueError, lambda: v4.connect("", 80)),
                (ValueError, lambda: v6.connect("127.0.0.1", 80)), (ValueError, lambda: v6.connect("::1%nowhere", 80)),
                (RuntimeError, lambda: v4.connect("1.2.3.4", 65536)), (ValueError, lambda: v4.connect("1.2.3.4", "x")),
                (RuntimeError, lambda: v4.connect("127.0.0.1", -1)), (TypeError, lambda: v4.connect("1.2.3.4", 1.0)),
                (TypeError, lambda: v4.connect(b"127.0.0.1", 80)), (TypeError, v4.connect),
                (RuntimeError, lambda: v4.sendto("1.2.3.4", 0, b"")), (TypeError, lambda: v4.sendto("1.2.3.4", b"")),
                (RuntimeError, lambda: v4.sendto("1.2.3.4", "65536", b"")),
                (TypeError, lambda: v4.sendto("1.2.3.4", 1, 1)),
                (RuntimeError, lambda: unix.connect(long)), (RuntimeError, lambda: unix.sendto("@" + long, b"")),
                (ValueError, lambda: unix.connect("")), (ValueError, lambda: unix.connect("a\0b")),
                (TypeError, lambda: unix.sendto("/x", 1, b"")), (TypeError, lambda: unix.send(5)),
                (TypeError, lambda: unix.send(None)), (ValueError, lambda: unix.recv(0)),
                (ValueError, lambda: unix.recv(-1)), (TypeError, lambda: unix.recv("1")),
                (TypeError, lambda: unix.recv(1.0)),
                (TypeError, lambda: unix.recv(1, 1.5)), (ValueError, lambda: unix.recv(1, -2)), (TypeError, unix.recv),
                (TypeError, lambda: unix.recv(maxlen=1)), (TypeError, lambda: unix.accept(1)),
            ]  # fmt: skip
            for number, (error, call) in enumerate(cases):
                with pytest.raises(error):
                    pytest.fail(f"case {number} gave {call()!r}")
            for ksock in (v4, v6, unix):
                ksock.close()

    run(loop, main())


def test_what_can_be_wrapped(loop) -> None:
    """Attributes are looked up, families checked; a closed one and what is no socket are told."""

    class Like:
        family, proto = socket.AF_INET, 0

        def fileno(self) -> int:
            return os.open("/dev/null", os.O_RDONLY) if self is other else -1

    other = None
    with pytest.raises(AttributeError):
        kore.socket_wrap(object())
    with pytest.raises(RuntimeError, match="EBADF"):
        kore.socket_wrap(Like())
    other = Like()
    number = other.fileno()
    Like.fileno = lambda _: number
    with pytest.raises(RuntimeError, match="ENOTSOCK"):
        kore.socket_wrap(other)
    os.close(number)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock, pytest.raises(RuntimeError, match="AF_INET6"):
        kore.socket_wrap(sock)
    with socket.socket() as sock:
        ksock = kore.socket_wrap(sock)
        assert isinstance(ksock, kore.pysocket)
        assert type(ksock).__name__ == "socket"
        with pytest.raises(AttributeError):
            ksock.fd = 1


def test_what_the_kernel_says(loop, tmp_path) -> None:
    """Errors of the kernel are RuntimeErrors that name it, caused by the OSError."""

    async def main():
        with socket.socket() as sock, socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            ksock = kore.socket_wrap(sock)
            with pytest.raises(RuntimeError, match="ECONNREFUSED") as caught:
                await ksock.connect(*taken.getsockname())
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)
            with pytest.raises(RuntimeError, match="EPIPE"):
                await ksock.send(b"x")
            with pytest.raises(RuntimeError, match="EINVAL"):
                await ksock.accept()
            ksock.close()
        with socket.socket() as sock:
            ksock = kore.socket_wrap(sock)
            with pytest.raises(RuntimeError, match="ENOTCONN"):
                await ksock.recv(1)
            ksock.close()
        with socket.socket(socket.AF_UNIX) as sock:
            ksock = kore.socket_wrap(sock)
            with pytest.raises(RuntimeError, match="ENOENT"):
                await ksock.connect(str(tmp_path / "nowhere"))
            ksock.close()
        near, far = tcp_pair()
        ksock = kore.socket_wrap(near)
        reset(far)
        with pytest.raises(RuntimeError, match="ECONNRESET"):
            await ksock.recv(1)
        ksock.close()
        near.close()

    run(loop, main())


def test_a_peer_that_closes_during_a_send(loop) -> None:
    """RuntimeError, and no signal."""

    async def main():
        near, far = unix_pair()
        ksock = kore.socket_wrap(near)

        async def close_soon():
            await reactor.suspend(20)
            far.close()

        loop.start(close_soon())
        with pytest.raises(RuntimeError, match="EPIPE|ECONNRESET"):
            await ksock.send(bytes(10_000_000))
        ksock.close()
        near.close()

    run(loop, main())


def test_close_ends_what_is_pending_with_none(loop) -> None:
    """Both directions; the wrapped socket stays open, and the peer hears of nothing until it is closed as well."""

    async def main():
        near, far = unix_pair()
        ksock = kore.socket_wrap(near)

        async def receive():
            return await ksock.recv(10)

        async def send():
            return await ksock.send(bytes(10_000_000))

        pending = [loop.start(receive()), loop.start(send())]
        await reactor.suspend(20)
        ksock.close()
        assert await asyncio.gather(*pending) == [None, None]
        assert near.fileno() >= 0
        near.close()
        while far.recv(1 << 20):
            pass
        far.close()

    run(loop, main())


def test_closing_in_any_order_and_never(loop) -> None:
    """Python's socket first, or kore's, or only dropped: the other still works; after both the peer sees the end."""

    async def main():
        for order in ("sock", "ksock", "drop"):
            near, far = unix_pair()
            ksock = kore.socket_wrap(near)
            if order == "sock":
                near.close()
                await ksock.send(b"still")
                assert far.recv(10) == b"still"
                ksock.close()
            else:
                if order == "drop":
                    del ksock
                else:
                    ksock.close()
                near.setblocking(True)
                near.sendall(b"still")
                assert far.recv(10) == b"still"
                near.close()
            assert far.recv(10) == b""
            far.close()

    run(loop, main())


def test_blocking_sockets_become_non_blocking(loop) -> None:
    """A socket that blocks is made non-blocking for both, so that nothing can ever hold up the loop."""

    async def main():
        near, far = unix_pair()
        near.settimeout(None)
        ksock = kore.socket_wrap(near)
        assert near.gettimeout() == 0
        with pytest.raises(TimeoutError):
            await ksock.recv(10, 10)

        async def send():
            await ksock.send(bytes(5_000_000))

        sender = loop.start(send())
        await reactor.suspend(10)
        assert not sender.done()
        reader = threading.Thread(target=lambda: [far.recv(1 << 20) for _ in iter(sender.done, True)])
        reader.start()
        await sender
        far.shutdown(socket.SHUT_RDWR)
        await loop.run_in_executor(None, reader.join)
        ksock.close()
        near.close()
        far.close()

    run(loop, main())


def test_a_full_unix_queue_is_waited_for(loop, tmp_path) -> None:
    """sendto() goes on once the receiver has read, without keeping the processor busy until then."""

    async def main():
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there, socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM
        ) as here:
            path = str(tmp_path / "s")
            there.bind(path)
            there.setblocking(False)
            ksock = kore.socket_wrap(here)
            sent = 0

            async def flood():
                nonlocal sent
                for number in range(1000):
                    await ksock.sendto(path, b"%d" % number)
                    sent += 1

            task = loop.start(flood())
            await reactor.suspend(100)
            stuck = sent
            assert 0 < stuck < 1000
            before = sum(os.times()[:2])
            await reactor.suspend(200)
            assert sent == stuck
            assert sum(os.times()[:2]) - before < 0.1
            got = []
            receiver = kore.socket_wrap(there)
            while len(got) < 1000:
                got.append(await receiver.recv(10))
            await task
            assert got == [b"%d" % number for number in range(1000)]
            ksock.close()
            receiver.close()

    run(loop, main())


def test_asyncio_around_it(loop) -> None:
    """wait_for, timeout() and cancel() end an operation; what it would have brought is there for the next."""

    async def main():
        near, far = unix_pair()
        ksock = kore.socket_wrap(near)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ksock.recv(10), 0.01)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await ksock.recv(10)

        async def receive():
            return await ksock.recv(10)

        task = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        far.send(b"kept")
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            assert await task == b"kept"
            far.send(b"kept")
        assert await ksock.recv(10) == b"kept"
        ksock.close()
        near.close()
        far.close()

    run(loop, main())


def test_another_loop_is_refused() -> None:
    """On asyncio's own loop: RuntimeError that says what is needed."""
    near, far = unix_pair()
    ksock = kore.socket_wrap(near)

    async def main():
        with pytest.raises(RuntimeError, match="kore's event loop"):
            await ksock.recv(10)

    other = asyncio.SelectorEventLoop()
    other.run_until_complete(main())
    other.close()
    ksock.close()
    near.close()
    far.close()
