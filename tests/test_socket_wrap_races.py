"""Coroutines that are killed or time out just as what they wait for arrives: nothing is lost, nobody else is hit.

Each case is tried many times with the kill at another point: before the operation is submitted, while it waits, in the
turn in which its result comes, and after it was woken.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket

import pytest
from driver_harness import unix_pair
from reactor_harness import run

import kore
from kore import reactor
from kore.driver import passed_fds

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning", "error::ResourceWarning")


async def some_turns(count: int) -> None:
    for _ in range(count):
        await reactor.suspend(0)


async def race(loop, receive, send, got: list, rounds: int) -> None:
    """Start a receive, let something be sent, and kill it: each at one of three points. What it got goes to `got`."""
    rng = random.Random(7)
    for number in range(rounds):

        async def receiver():
            got.append(await receive())

        task = loop.start(receiver())
        before, between = rng.choice((0, 1, 2)), rng.choice((0, 0, 1, 2))
        await some_turns(before)
        send(number)
        await some_turns(between)
        task.kill()
        await some_turns(rng.choice((0, 1)))


def test_a_killed_recv_loses_no_byte(loop) -> None:
    """A stream read by coroutines that are killed again and again, with lengths that differ, comes whole."""

    async def main():
        near, far = unix_pair()
        ksock = kore.socket_wrap(near)
        rng = random.Random(11)
        got: list[bytes] = []
        await race(
            loop, lambda: ksock.recv(rng.choice((1, 5, 100))), lambda number: far.send(b"%06d" % number), got, 600)
        assert len(got) < 600, "no receive was killed"
        while len(b"".join(got)) < 3600:
            got.append(await ksock.recv(rng.choice((1, 2, 1000)), 5000))
        assert b"".join(got) == b"".join(b"%06d" % number for number in range(600))
        ksock.close()
        near.close()
        far.close()

    run(loop, main())


@pytest.mark.parametrize("method", ["recv", "recvfrom", "recvmsg"])
def test_a_killed_receive_loses_no_datagram(loop, method) -> None:
    """Each datagram comes once, in order, whoever asks in whatever way."""

    async def main():
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ksock = kore.socket_wrap(near)
        got: list = []
        await race(loop, lambda: getattr(ksock, method)(100), lambda number: far.send(b"%d" % number), got, 200)
        while len(got) < 200:
            got.append(await ksock.recvmsg(100, 5000))
        words = [result if isinstance(result, bytes) else next(filter(None, result)) for result in got]
        assert words == [b"%d" % number for number in range(200)]
        ksock.close()
        near.close()
        far.close()

    run(loop, main())


def test_a_killed_recvmsg_loses_no_descriptor(loop) -> None:
    """File descriptors that were passed arrive with their message, or are closed with the socket."""

    async def main():
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ksock = kore.socket_wrap(near)
        got: list = []
        await race(
            loop, lambda: ksock.recvmsg(100), lambda _: socket.send_fds(far, [b"x"], [far.fileno()]), got, 100)
        while len(got) < 100:
            got.append(await ksock.recvmsg(100, 5000))
        found = [passed_fds((*message, 0, None)) for message in got]
        assert all(len(one) == 1 for one in found)
        for one in found:
            os.close(one[0])
        await race(
            loop, lambda: ksock.recvmsg(100), lambda _: socket.send_fds(far, [b"x"], [far.fileno()]), rest := [], 10)
        for message in rest:
            os.close(passed_fds((*message, 0, None))[0])
        ksock.close()
        near.close()
        far.close()

    run(loop, main())


def test_a_killed_accept_loses_no_connection(loop) -> None:
    """Every client is accepted once; one that was accepted for nobody is closed with the listener."""

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as stack:
            listener = kore.socket_wrap(listening)

            def connect(_number: int) -> None:
                stack.enter_context(client := socket.socket())
                client.connect(listening.getsockname())
                clients.append(client)

            clients: list[socket.socket] = []
            got: list = []
            await race(loop, listener.accept, connect, got, 200)
            while len(got) < 200:
                got.append(await listener.accept())
            for conn in got:
                await conn.send(b"hello")
            for client in clients:
                client.settimeout(5)
                assert client.recv(10) == b"hello"
            await race(loop, listener.accept, connect, got, 20)
            listener.close()

    run(loop, main())


def test_timeouts_lose_nothing(loop) -> None:
    """Receives that time out all the time beside a peer that sends all the time."""

    async def main():
        near, far = unix_pair()
        ksock = kore.socket_wrap(near)
        timeouts = 0

        async def sender():
            for number in range(500):
                far.send(b"%04d" % number)
                if number % 3 == 0:
                    await reactor.suspend(number % 4)

        task = loop.start(sender())
        heard = b""
        while len(heard) < 2000:
            try:
                heard += await ksock.recv(7, len(heard) % 3)
            except TimeoutError:
                timeouts += 1
        await task
        assert heard == b"".join(b"%04d" % number for number in range(500))
        assert timeouts
        ksock.close()
        near.close()
        far.close()

    run(loop, main())


def test_nothing_reaches_a_stranger_on_the_same_number(loop) -> None:
    """Killed, closed and its number given to another socket, all in one turn: the other gets and loses nothing."""

    async def main():
        rng = random.Random(3)
        for _ in range(200):
            near, far = unix_pair()
            ksock = kore.socket_wrap(near)

            async def receive(ksock=ksock):
                await ksock.recv(100)

            async def send(ksock=ksock):
                await ksock.send(b"not for you")

            tasks = [loop.start(receive()), loop.start(send())]
            await some_turns(rng.choice((0, 1, 1, 2)))
            if rng.random() < 0.5:
                ksock.close()
                near.close()
            else:
                near.close()
                del ksock
            for task in tasks:
                task.kill()
            del task
            tasks.clear()
            strangers = [unix_pair() for _ in range(3)]
            for one, other in strangers:
                one.send(b"mine")
                other.send(b"yours")
            await some_turns(2)
            for one, other in strangers:
                assert (one.recv(100), other.recv(100)) == (b"yours", b"mine")
                for sock in (one, other):
                    sock.setblocking(False)
                    with pytest.raises(BlockingIOError):
                        sock.recv(100)
            for sock in (far, *(sock for pair in strangers for sock in pair)):
                sock.close()

    run(loop, main())


def test_sends_keep_their_order_around_a_killed_one(loop) -> None:
    """What follows a killed send comes after all that it sent, never within it."""

    async def main():
        for turns in (0, 1, 2, 3):
            near, far = unix_pair()
            ksock = kore.socket_wrap(near)

            async def send(ksock=ksock):
                await ksock.send(b"a" * 5_000_000)

            async def read(far=far):
                far.setblocking(False)
                heard = b""
                while not heard.endswith(b"b" * 1000):
                    heard += await loop.sock_recv(far, 1 << 20)
                return heard

            task = loop.start(send())
            await some_turns(turns)
            task.kill()
            reader = loop.start(read())
            await ksock.send(b"b" * 1000)
            heard = await reader
            assert heard == heard.rstrip(b"b") + b"b" * 1000
            assert set(heard.rstrip(b"b")) <= {ord("a")}
            ksock.close()
            near.close()
            far.close()

    run(loop, main())


def test_the_loop_closed_in_the_middle(loop) -> None:
    """A loop that is closed with operations in flight leaves no descriptor behind."""
    near, far = unix_pair()
    ksock = kore.socket_wrap(near)
    listening = socket.create_server(("127.0.0.1", 0))
    listener = kore.socket_wrap(listening)

    async def receive():
        return await ksock.recv(100)

    async def accept():
        await listener.accept()

    async def main():
        loop.start(receive())
        loop.start(accept())
        await some_turns(2)

    run(loop, main())
    for task in list(reactor.tasks.live.values()):
        task.kill()
    loop.close()
    far.send(b"for another loop")
    other = reactor.Loop(reactor.new_driver(loop.driver.name))
    assert run(other, receive()) == b"for another loop"
    other.close()
    for sock in (near, far, listening):
        sock.close()
