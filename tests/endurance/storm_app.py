"""The application of the proof on kills: a coroutine for everything there is to wait for, none of which ever comes.

Arguments: the port, the number of workers, how a PostgreSQL is reached, and the port of a server that never answers.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import kore
from kore.reactor import tasks

LONG_MS = 3_600_000
LONG_S = 3600.0
CONNECTIONS_MAX = 4

settings: dict[str, Any] = {}
gone = threading.Event()
held: list[Any] = []


class Storm:
    """The application object."""

    def configure(self, args: list[str]) -> None:
        settings["silent"] = int(args[4])
        kore.config.workers = int(args[2])
        kore.config.worker_set_affinity = 0
        kore.config.worker_max_connections = 4000
        kore.config.worker_rlimit_nofiles = 16000
        kore.config.http_request_limit = 4000
        kore.config.pgsql_conn_max = CONNECTIONS_MAX
        kore.config.pgsql_queue_limit = 4000
        kore.config.curl_timeout = 600
        kore.dbsetup("storm", args[3])
        kore.server("plain", ip="127.0.0.1", port=args[1], tls=False)
        home = kore.domain("*", attach="plain")
        home.route("^/wait/([a-z_]+)$", wait, methods=["get"])
        home.route("^/create/([a-z_]+)/([0-9]+)$", create, methods=["get"])
        home.route("/kill", kill, methods=["post"])
        home.route("/diagnose", diagnose, methods=["get"])

    def workerstart(self) -> None:
        settings["queue"] = kore.queue()
        settings["lock"] = kore.lock()
        kore.task_create(hold(settings["lock"]))


koreapp = Storm()


async def wait(req: Any, kind: str) -> None:
    """Wait until the client leaves."""
    await WAITS[kind]()
    req.response(500, f"{kind} has ended".encode())


def create(req: Any, kind: str, count: str) -> None:
    """Make so many tasks that wait; their ids."""
    req.response(200, json.dumps([kore.task_create(WAITS[kind]()) for _ in range(int(count))]).encode())


def kill(req: Any) -> None:
    """Kill the tasks whose ids are the body; how many of them were there."""
    req.response(200, str(sum(kore.task_kill(number) for number in json.loads(req.body))).encode())


def diagnose(req: Any) -> None:
    """What this worker holds."""
    found = {"garbage": gc.collect()}
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    driver: Any = asyncio.get_running_loop().driver  # type: ignore[attr-defined]
    ring_buffers = getattr(driver, "buffers", None)
    found |= {
        "pid": os.getpid(),
        "fds": len(os.listdir("/proc/self/fd")) - 1,
        "tasks": len(tasks.live),
        "asyncio_tasks": len(asyncio.all_tasks()),
        "operations": len(driver.live) if hasattr(driver, "live") else 0,
        "buffers_out": getattr(ring_buffers, "out", 0),
        "threads": threading.active_count(),
    }
    req.response(200, json.dumps(found).encode())


# What there is to wait for. Each cleans up after itself as an application would.


async def hold(lock: Any) -> None:
    """Have the lock that others wait for."""
    async with lock:
        await kore.suspend(LONG_MS)


async def suspend() -> None:
    await kore.suspend(LONG_MS)


async def pop() -> None:
    await settings["queue"].pop()


async def lock() -> None:
    async with settings["lock"]:
        raise AssertionError("the lock is held for ever")


async def gather() -> None:
    await kore.gather(kore_sleep(), asyncio.sleep(LONG_S), concurrency=1)


async def kore_sleep() -> None:
    await kore.suspend(LONG_MS)


def pair(kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets."""
    return socket.socketpair(socket.AF_UNIX, kind)


async def recv() -> None:
    one, other = pair()
    with one, other:
        await kore.socket_wrap(one).recv(1000)


async def recv_timeout() -> None:
    one, other = pair()
    with one, other:
        await kore.socket_wrap(one).recv(1000, LONG_MS)


async def recvfrom() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        await kore.socket_wrap(sock).recvfrom(1000)


async def recvmsg() -> None:
    one, other = pair(socket.SOCK_DGRAM)
    with one, other:
        await kore.socket_wrap(one).recvmsg(1000)


async def send() -> None:
    one, other = pair()
    with one, other:
        await kore.socket_wrap(one).send(bytes(1 << 20))


async def accept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await kore.socket_wrap(listener).accept()


async def proc_recv() -> None:
    await kore.proc(f"sleep {LONG_S:.0f}").recv(100)


async def proc_reap() -> None:
    await kore.proc(f"sleep {LONG_S:.0f}", LONG_MS).reap()


async def proc_send() -> None:
    await kore.proc(f"sleep {LONG_S:.0f}").send(bytes(1 << 20))


async def query() -> None:
    await kore.dbquery("storm", f"SELECT pg_sleep({LONG_S})")


async def typed_query() -> None:
    await kore.dbquery("storm", f"SELECT pg_sleep({LONG_S})", typed=True)


async def transaction() -> None:
    async with kore.dbtransaction("storm") as tx:
        await tx.query(f"SELECT pg_sleep({LONG_S})")


async def listen() -> None:
    async for _ in kore.dblisten("storm", "nobody"):
        raise AssertionError("nobody tells anything")


async def curl() -> None:
    await kore.curl(f"http://127.0.0.1:{settings['silent']}/").run()


async def httpclient() -> None:
    await kore.httpclient(f"http://127.0.0.1:{settings['silent']}/").post(body=b"x" * 100_000)


async def asyncio_sleep() -> None:
    await asyncio.sleep(LONG_S)


async def asyncio_task() -> None:
    await asyncio.create_task(asyncio.sleep(LONG_S))


async def timeout() -> None:
    async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as group:
        group.create_task(asyncio.Event().wait())


async def streams() -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", settings["silent"])
    try:
        await reader.read()
    finally:
        writer.transport.abort()


@asynccontextmanager
async def serving() -> AsyncIterator[Any]:
    """A server of asyncio's that nobody asks."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    try:
        yield server
    finally:
        server.close()


async def server() -> None:
    async with serving() as one:
        await one.serve_forever()


async def datagrams() -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))
    try:
        await loop.create_future()
    finally:
        transport.abort()


async def sock_recv() -> None:
    one, other = pair()
    with one, other:
        one.setblocking(False)
        await asyncio.get_running_loop().sock_recv(one, 100)


async def sock_accept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        await asyncio.get_running_loop().sock_accept(listener)


async def reader() -> None:
    loop = asyncio.get_running_loop()
    one, other = pair()
    with one, other:
        loop.add_reader(one, gone.set)
        try:
            await loop.create_future()
        finally:
            loop.remove_reader(one)


async def pipe() -> None:
    loop = asyncio.get_running_loop()
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb"):
        transport, _ = await loop.connect_read_pipe(asyncio.Protocol, os.fdopen(reading, "rb", buffering=0))
        try:
            await loop.create_future()
        finally:
            transport.close()


async def subprocess() -> None:
    child = await asyncio.create_subprocess_exec("sleep", f"{LONG_S:.0f}", stdout=asyncio.subprocess.PIPE)
    try:
        await child.communicate()
    finally:
        child._transport.close()  # type: ignore[attr-defined]


async def executor() -> None:
    await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.2)
    await kore.suspend(LONG_MS)


WAITS: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
    wait.__name__: wait for wait in (
        suspend, pop, lock, gather, recv, recv_timeout, recvfrom, recvmsg, send, accept, proc_recv, proc_reap,
        proc_send, query, typed_query, transaction, listen, curl, httpclient, asyncio_sleep, asyncio_task, timeout,
        streams, server, datagrams, sock_recv, sock_accept, reader, pipe, subprocess, executor,
    )
}  # fmt: skip

SCARCE = frozenset({"proc_recv", "proc_reap", "proc_send", "subprocess", "listen"})
"""Those that take a process or a connection of PostgreSQL each."""
