"""``kore.socket_wrap`` where operations of one kind meet the leavings of another, and at sockets that keep records."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from driver_harness import unix_pair
from reactor_harness import run

import kore
from kore import reactor

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning", "error::ResourceWarning")


async def given_up(loop, ksock, operation, bring) -> None:
    """Have an operation be killed that has brought something already."""

    async def wait():
        await operation()

    task = loop.start(wait())
    for _ in range(3):
        await reactor.suspend(0)
    bring()
    while ksock._in._result is reactor.lines.NOTHING:
        loop._driver.wait(0)
    task.kill()


@pytest.mark.parametrize("method", ["recv", "recvfrom", "recvmsg"])
def test_bytes_that_are_there_are_no_connection(loop, method) -> None:
    """accept() says what it is asked of, and the bytes that a killed receive has brought wait for the next one."""

    async def main():
        near, far = unix_pair()
        ksock = kore.socket_wrap(near)
        await given_up(loop, ksock, lambda: getattr(ksock, method)(10), lambda: far.send(b"kept"))
        with pytest.raises(RuntimeError, match=r"accept.*EINVAL"):
            await ksock.accept()
        assert await ksock.recv(10, 5000) == b"kept"
        for sock in (ksock, near, far):
            sock.close()

    run(loop, main())


@pytest.mark.parametrize("method", ["recv", "recvfrom", "recvmsg"])
def test_a_connection_that_is_there_is_no_data(loop, method) -> None:
    """A receive from a listener says so, and the connection that a killed accept has brought waits for the next one."""

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
            listener = kore.socket_wrap(listening)
            await given_up(loop, listener, listener.accept, lambda: client.connect(listening.getsockname()))
            with pytest.raises(RuntimeError, match=rf"{method}.*ENOTCONN"):
                await getattr(listener, method)(10)
            async with asyncio.timeout(5):
                conn = await listener.accept()
            await conn.send(b"kept")
            client.settimeout(5)
            assert client.recv(10) == b"kept"
            conn.close()
            listener.close()

    run(loop, main())


def test_a_datagram_keeps_its_sender(loop) -> None:
    """Brought by a recv() that was killed, which asks for no sender, and found by one who asks."""

    async def main():
        with contextlib.ExitStack() as stack:
            here, there = (stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
            here.bind(("127.0.0.1", 0))
            there.bind(("127.0.0.1", 0))
            ksock = kore.socket_wrap(here)
            for receive in (ksock.recvfrom, ksock.recvmsg):
                await given_up(
                    loop, ksock, lambda: ksock.recv(10), lambda: there.sendto(b"whose", here.getsockname()))
                result = await receive(10, 5000)
                assert getattr(result, "source_form", result)[:3] == (*there.getsockname(), b"whose")
            ksock.close()

    run(loop, main())


def test_passed_descriptors_of_datagrams_are_not_left_open_by_recv(loop) -> None:
    """recv() gives the bytes; the fds that came with them go, as recv(2) has it. The fixture counts."""

    async def main():
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ksock = kore.socket_wrap(near)
        for _ in range(3):
            socket.send_fds(far, [b"x"], [far.fileno()])
            assert await ksock.recv(10, 5000) == b"x"
        for sock in (ksock, near, far):
            sock.close()

    run(loop, main())


def test_sequenced_packets(loop, tmp_path) -> None:
    """Packets stay whole; the end is None for every receive; sendto() goes to the peer and waits for it to read."""

    async def main():
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening, socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET
        ) as sock:
            path = str(tmp_path / "s")
            listening.bind(path)
            listening.listen(0)
            listener, client = kore.socket_wrap(listening), kore.socket_wrap(sock)
            await client.connect(path)
            served = await listener.accept()
            sent = 0

            async def flood():
                nonlocal sent
                for number in range(1000):
                    await client.sendto(path, b"%d" % number)
                    sent += 1

            task = loop.start(flood())
            await reactor.suspend(50)
            assert 0 < sent < 1000, "the peer's queue is full"
            assert [await served.recv(10) for _ in range(1000)] == [b"%d" % number for number in range(1000)]
            await task
            client.close()
            sock.close()
            assert await served.recv(10) is None
            assert await served.recvfrom(10) == (None, None)
            assert await served.recvmsg(10) == (None, [])
            served.close()
            listener.close()

    run(loop, main())


def test_close_ends_a_sendto_that_waits_for_a_full_queue(loop, tmp_path) -> None:
    """With None and at once, though the receiver never reads; and so does a kill."""

    async def main():
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there, socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM
        ) as here:
            path = str(tmp_path / "s")
            there.bind(path)
            here.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    here.sendto(b"x", path)

            async def send(ksock):
                return await ksock.sendto(path, b"x")

            ksock = kore.socket_wrap(here)
            for _ in range(3):
                killed = loop.start(send(ksock))
                await reactor.suspend(5)
                killed.kill()
            task = loop.start(send(ksock))
            await reactor.suspend(5)
            assert not task.done()
            ksock.close()
            assert await task is None

    run(loop, main(), seconds=5)
