"""A storm: a thousand coroutines wait on each kind of socket and process operation and are killed in random order.

By `task_kill`, on a loop of the test; and by clients that leave a server, each in the middle of its handler's wait.
Afterwards nothing is there that was not there before: no descriptor, buffer, operation, task, process.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
from functools import partial
from pathlib import Path

import pytest
from driver_harness import fds
from reactor_harness import ENGINES, open_loop, run

import kore
from kore import reactor
from kore.reactor import tasks
from tests.conftest import children
from tests.http_server_harness import Client, request, serving
from tests.support import SANDBOXED, wait_until

COROUTINES = 1000
PROCESSES = 100
"""Each costs a process; three kinds of waits make three hundred of them at once."""


@pytest.fixture(params=ENGINES)
def loop(request):
    """A loop on each engine."""
    before = fds()
    for loop, _ in open_loop(request.param):
        yield loop
    gc.collect()
    assert fds() <= before


def in_flight(loop) -> int:
    """Operations and waits that the driver knows of, its own included."""
    driver = loop.driver
    if driver.name == "uring":
        return len(driver.live)
    return len(driver.table) + len(driver.begun) + len(driver.due)


def pairs(stack: contextlib.ExitStack, kind: int = socket.SOCK_STREAM, *, full: bool = False):
    """Endless unix sockets whose other ends are open; `full`: that take no byte more."""
    while True:
        near, _ = (stack.enter_context(sock) for sock in socket.socketpair(socket.AF_UNIX, kind))
        near.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while full:
                near.send(bytes(65536))
        yield near


def waits(kind: str, stack: contextlib.ExitStack, directory: Path):
    """Endless coroutine functions that wait for ever, one kind of operation each."""
    if kind in ("recv", "recvfrom", "recvmsg", "recv with a timeout"):
        method, *timeout = {"recv with a timeout": ("recv", 100_000)}.get(kind, (kind,))
        for near in pairs(stack, socket.SOCK_STREAM if kind == "recv" else socket.SOCK_DGRAM):
            yield partial(getattr(kore.socket_wrap(near), method), 4096, *timeout)
    elif kind == "send":
        for near in pairs(stack, full=True):
            yield partial(kore.socket_wrap(near).send, bytes(100_000))
    elif kind == "accept":
        while True:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            yield kore.socket_wrap(listener).accept
    elif kind == "connect":
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        while True:
            sock = stack.enter_context(socket.socket())
            yield partial(kore.socket_wrap(sock).connect, *listener.getsockname())
    elif kind == "sendto":
        yield from unix_sendto(stack, directory)
    else:
        operation = {
            "proc recv": lambda proc: proc.recv(4096), "proc reap": lambda proc: proc.reap(),
            "proc send": lambda proc: proc.send(bytes(100_000)),
        }[kind]
        while True:
            yield lambda: operation(kore.proc("sleep 1000", 600_000))


def unix_sendto(stack: contextlib.ExitStack, directory: Path):
    """Senders to a unix socket whose queue is full."""
    receiver = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    receiver.bind(str(directory / "s"))
    sender = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    sender.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sender.sendto(b"x", receiver.getsockname())
    while True:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        yield partial(kore.socket_wrap(sock).sendto, receiver.getsockname(), b"x")


@pytest.mark.parametrize("kind", [
    "recv", "recvfrom", "recvmsg", "recv with a timeout", "send", "sendto", "accept", "connect",
    "proc recv", "proc reap", "proc send",
])
def test_killed_in_random_order(loop, tmp_path, kind) -> None:
    """Every coroutine ends at its kill; then everything is as it was, though the sockets' other ends still live."""
    count = PROCESSES if kind.startswith("proc") else COROUTINES
    ended = []

    async def victim(wait):
        try:
            await wait()
            ended.append("by itself")
        finally:
            ended.append("ended")

    async def storm(stack):
        rng = random.Random(23)
        before = in_flight(loop)
        made = waits(kind, stack, tmp_path)
        numbers = [reactor.task_create(victim(next(made))) for _ in range(count)]
        made.close()
        rng.shuffle(numbers)
        for number in numbers[: count // 10]:
            assert reactor.task_kill(number)  # before its first step
        for at, number in enumerate(numbers[count // 10 :]):
            if at % (count // 10) == 0:
                await reactor.suspend(rng.choice((0, 1)))
            assert reactor.task_kill(number), "it waits"
        assert ended == ["ended"] * (count - count // 10)
        async with asyncio.timeout(20):
            while in_flight(loop) > before or children().keys() - known.keys():
                await reactor.suspend(1)

    known = children()
    with contextlib.ExitStack() as stack:
        run(loop, storm(stack), seconds=60)
    assert not tasks.live


APP = """
import gc, socket
from kore.reactor import tasks

listener = socket.create_server(("127.0.0.1", 0))

async def wait(req, op):
    kore.log(kore.LOG_INFO, "waits")
    await op
    req.response(200, b"not reached")

def pair():
    near, far = socket.socketpair()
    near.setblocking(False)
    return kore.socket_wrap(near), near, far

@kore.route("/recv", domain=home, methods=["get"])
async def recv(req):
    ksock, near, far = pair()
    await wait(req, ksock.recv(4096))

@kore.route("/recvmsg", domain=home, methods=["get"])
async def recvmsg(req):
    ksock, near, far = pair()
    await wait(req, ksock.recvmsg(4096, 600000))

@kore.route("/send", domain=home, methods=["get"])
async def send(req):
    ksock, near, far = pair()
    await wait(req, ksock.send(bytes(10000000)))

@kore.route("/accept", domain=home, methods=["get"])
async def accept(req):
    # A worker in the sandbox makes no server; this one is from before, and each handler has a duplicate of its own.
    await wait(req, kore.socket_wrap(listener.dup()).accept())

@kore.route("/proc", domain=home, methods=["get"])
async def proc(req):
    await wait(req, kore.proc("sleep 1000").recv(1))

@kore.route("/reap", domain=home, methods=["get"])
async def reap(req):
    await wait(req, kore.proc("sleep 1000", 600000).reap())

@kore.route("/left", domain=home, methods=["get"])
def left(req):
    gc.collect()
    driver = __import__("asyncio").get_running_loop().driver
    known = driver.live if driver.name == "uring" else driver.table
    req.response(200, b"%d %d" % (len(tasks.live), len(known)))
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_that_leave(tmp_path, engine) -> None:
    """Handlers in every kind of wait end when their clients go, by FIN or RST; the worker is as it was before."""
    each = 160
    paths = ["/recv", "/recvmsg", "/send", "/accept", "/proc", "/reap"]
    options = "kore.config.worker_rlimit_nofiles = 8192\nkore.config.worker_max_connections = 2000"
    with serving(tmp_path, engine, APP, options) as server:
        server.ask(request("/left"))
        before, fds_before = server.ask(request("/left")).body, server.fds()
        clients = [(Client(server.address), path) for path in paths for _ in range(each)]
        for client, path in clients:
            client.send(request(path))
        server.program.wait_for("waits", count=len(clients))
        wait_until(lambda: len(descendants(server.pid)) == 2 * each, "the children run")
        random.Random(5).shuffle(clients)
        for number, (client, _) in enumerate(clients):
            if number % 2:
                client.reset()
            else:
                client.sock.close()
        server.settle(fds_before)
        wait_until(lambda: not descendants(server.pid), "the children are gone, and reaped")
        wait_until(lambda: server.ask(request("/left")).body == before, "no task, no operation")
        assert "uncaught" not in server.program.out
        server.unharmed()


def descendants(pid: int) -> list[str]:
    """The programs that a worker runs, zombies too: its children; in the sandbox those of its spawner."""
    found = children_of(pid)
    return children_of(int(found[0])) if SANDBOXED and found else found


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if os.path.exists(f"/proc/{pid}") else []
