"""A thousand coroutines that wait on each kind of asyncio's operations are killed and cancelled in random order.

Half are tasks of kore's that are killed, half asyncio's that are cancelled; some before their first step, some while
they make what they would wait for, most while they wait. Nothing may be left: fds, operations of the engine, tasks,
processes, threads' work.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import ssl
import threading
import time

import pytest
from driver_harness import fds, link
from reactor_harness import SECONDS_MAX

from kore.reactor import tasks

COUNT = 1000
AT_ONCE = 250
"""How many are there at a time: a thousand of some kinds are more fds than a process may have."""


peers: list[object] = []
"""The other ends of what is waited for. They stay open until it is seen that nothing waits: their end would end it."""


def close_peers():
    while peers:
        peers.pop().close()


def operations(loop) -> int:
    """What is in flight on the loop's engine."""
    driver = loop.driver
    if driver.name == "uring":
        return len(driver.live)
    waiters = sum(len(entry.waiters) for entry in driver.table.values())
    return len(driver.table) + waiters + len(driver.begun) + len(driver.due)


async def settled(holds, what):
    """Turn after turn until `holds()`."""
    deadline = time.monotonic() + SECONDS_MAX
    while not holds():
        assert time.monotonic() < deadline, f"left over: {what()}"
        await asyncio.sleep(0.001)


def storm(loop, wait, count=COUNT, at_once=AT_ONCE):
    """`wait(number)` makes a coroutine; `count` of them are run and ended."""
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    idle = 0

    async def one_round(first, size):
        victims = []
        for number in range(first, first + size):
            coro = wait(number)
            victims.append(loop.start(coro, lambda error: None) if number % 2 else loop.create_task(coro))
        rng.shuffle(victims)
        early = rng.randrange(size // 5)
        for at, victim in enumerate(victims):
            if at >= early and rng.random() < 0.1:
                await asyncio.sleep(0)
            if isinstance(victim, tasks.Task):
                victim.kill()
            else:
                victim.cancel()
        ended = await asyncio.gather(*victims, return_exceptions=True)
        await asyncio.sleep(0)
        await settled(lambda: operations(loop) <= idle, lambda: (operations(loop), idle, seed))
        close_peers()
        # Those that were killed say so; none may have ended in any other way.
        assert {type(end) for end in ended} <= {GeneratorExit, asyncio.CancelledError}, (seed, set(map(repr, ended)))

    async def all_rounds():
        nonlocal idle
        idle = operations(loop)
        # What the first of a kind leaves for the others (an executor, a resolver) is not a leak.
        await one_round(0, 10)
        await asyncio.sleep(0.01)
        gc.collect()
        before = fds(), operations(loop)
        for first in range(0, count, at_once):
            await one_round(first, at_once)

        def left():
            gc.collect()
            return {fd: link(fd) for fd in fds() - before[0]}, operations(loop) - before[1]

        def gone():
            return operations(loop) <= before[1] and not (fds() - before[0]) and not loop._children

        await settled(gone, lambda: (left(), seed))
        assert asyncio.all_tasks(loop) == {asyncio.current_task()}
        assert not tasks.live

    loop.run_until_complete(all_rounds())
    assert not loop._transports
    assert not loop._readers
    assert not loop._writers


def end():
    """The end to wait on; its peer stays open."""
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    peers.append(far)
    return near


def test_streams(loop):
    async def wait(number):
        reader, writer = await asyncio.open_connection(sock=end())
        try:
            if number % 3:
                await reader.read()
            else:
                while True:
                    writer.write(bytes(100_000))
                    await writer.drain()
        finally:
            writer.transport.abort()

    storm(loop, wait)


def test_servers_and_connecting(loop):
    async def answer(reader, writer):
        try:
            await reader.read()
        finally:
            writer.transport.abort()

    async def begin():
        return await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1000)

    server = loop.run_until_complete(begin())
    address = server.sockets[0].getsockname()

    async def wait(_number):
        _, writer = await asyncio.open_connection(*address)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            writer.transport.abort()

    async def storms():
        for first in range(0, COUNT, AT_ONCE):
            victims = [loop.start(wait(n), lambda error: None) for n in range(first, first + AT_ONCE)]
            random.shuffle(victims)
            await asyncio.sleep(0.01)
            for victim in victims:
                if random.random() < 0.1:
                    await asyncio.sleep(0)
                victim.kill()
        # The server's own tasks end when they see their clients go.
        await settled(lambda: asyncio.all_tasks(loop) == {asyncio.current_task()}, lambda: asyncio.all_tasks(loop))
        await settled(lambda: not loop._transports, lambda: loop._transports)
        server.close()

    idle = operations(loop)
    loop.run_until_complete(storms())
    loop.run_until_complete(settled(lambda: operations(loop) < idle, lambda: (operations(loop), idle)))


def test_tls_handshakes(loop):
    context = ssl.create_default_context()

    async def wait(_number):
        await asyncio.open_connection(sock=end(), ssl=context, server_hostname="localhost")

    storm(loop, wait)


def test_datagrams(loop):
    async def wait(number):
        transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))
        try:
            for _ in range(number % 3):
                transport.sendto(b"x", transport.get_extra_info("sockname"))
            await loop.create_future()
        finally:
            transport.close()

    storm(loop, wait)


def test_pipes(loop):
    async def wait(number):
        read_fd, write_fd = os.pipe()
        read, write = os.fdopen(read_fd, "rb", 0), os.fdopen(write_fd, "wb", 0)
        reader = asyncio.StreamReader()
        mine, other = (read, write) if number % 3 else (write, read)
        peers.append(other)
        if mine is read:
            connecting = loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), mine)
        else:
            connecting = loop.connect_write_pipe(asyncio.streams.FlowControlMixin, mine)
        with ClosingUnlessDone(mine) as done:
            transport, protocol = await connecting
            done.append(True)
        try:
            if mine is read:
                await reader.read()
            while True:
                transport.write(bytes(50_000))
                await protocol._drain_helper()
        finally:
            transport.abort()

    storm(loop, wait)


class ClosingUnlessDone:
    """Closes a pipe whose transport was never made: asyncio's own rule is that it is the caller's until then."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.done = []

    def __enter__(self):
        return self.done

    def __exit__(self, *_):
        if not self.done:
            self.pipe.close()


def test_subprocesses(loop):
    async def wait(number):
        process = await asyncio.create_subprocess_exec(
            "sleep", "1000", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            if number % 3:
                await process.wait()
            else:
                await process.communicate(b"x" * 200_000)
        finally:
            process._transport.close()

    storm(loop, wait, at_once=100)


def test_executors(loop):
    go_on = threading.Event()

    async def wait(_number):
        await loop.run_in_executor(None, go_on.wait)

    async def release():
        go_on.set()
        await loop.run_in_executor(None, int)

    try:
        storm(loop, wait)
    finally:
        loop.run_until_complete(release())
    assert loop._default_executor._work_queue.empty()


@pytest.mark.parametrize("kind", ["recv", "recv_into", "recvfrom", "recvfrom_into", "sendall", "accept", "sendfile"])
def test_plain_sockets(loop, kind, tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 30)

    async def wait(_number):
        with end() as near:
            if kind == "recv":
                await loop.sock_recv(near, 10)
            elif kind == "recv_into":
                await loop.sock_recv_into(near, bytearray(10))
            elif kind == "recvfrom":
                await loop.sock_recvfrom(near, 10)
            elif kind == "recvfrom_into":
                await loop.sock_recvfrom_into(near, bytearray(10))
            elif kind == "sendall":
                await loop.sock_sendall(near, bytes(10_000_000))
            elif kind == "accept":
                await loop.sock_accept(listener)
            else:
                with large.open("rb") as file:
                    await loop.sock_sendfile(near, file)

    with listener:
        storm(loop, wait)


def test_sending_files_past_streams(loop, tmp_path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 30)

    async def wait(_number):
        with large.open("rb") as file:
            _, writer = await asyncio.open_connection(sock=end())
            try:
                await loop.sendfile(writer.transport, file)
            finally:
                writer.transport.abort()

    storm(loop, wait)


def test_connecting_to_a_listener_that_does_not_accept(loop):
    """The third connection and those after it hang in SYN_SENT: the queue of this listener has one place."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fill = [socket.socket() for _ in range(4)]
        for sock in fill:
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())

        async def wait(_number):
            with socket.socket() as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, listener.getsockname())

        storm(loop, wait)
        for sock in fill:
            sock.close()
