"""The application of the long proofs: it says what it was asked, keeps handlers waiting, and shows what it holds.

Every answer names the process that gave it, so that a client can tell whose connections a killed worker took along.
Arguments: the port, the number of workers, and a file for the journal (see `journal`) or nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator

import kore

BIG = b"0123456789abcdef" * 65536  # 1 MiB: more than the kernel takes at once
PIECE = b"x" * 8192
PIECES = 64
SLOW_MS = 300

settings: dict[str, int] = {}
enters = [0]


class Endurance:
    """The application object."""

    def configure(self, args: list[str]) -> None:
        port, workers = args[1], int(args[2])
        settings["journal"] = os.open(args[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if len(args) > 3 else -1
        kore.config.workers = workers
        kore.config.worker_set_affinity = 0  # the client wants its share of two cores
        kore.config.worker_max_connections = 2000
        kore.config.worker_rlimit_nofiles = 4000
        kore.config.http_body_max = 100_000
        kore.config.http_header_timeout = 5
        kore.config.http_body_timeout = 5
        kore.config.http_keepalive_time = 10
        kore.config.http_request_ms = 0  # to count is to collect garbage first, and the log must stay empty
        kore.server("plain", ip="127.0.0.1", port=port, tls=False)
        home = kore.domain("*", attach="plain")
        for path, handler in ROUTES.items():
            home.route(path, handler)
        home.route("/only-get", hello, methods=["get"])

    def workerstart(self) -> None:
        count_enters()


koreapp = Endurance()


def count_enters() -> None:
    """Count the turns of a worker's ring where it is called, so that a figure exists that strace does not disturb."""
    ring = getattr(getattr(asyncio.get_running_loop(), "driver", None), "ring", None)
    if ring is None:
        return
    enter = ring._enter

    def counted(*arguments: object) -> int:
        enters[0] += 1
        result: int = enter(*arguments)
        return result

    ring._enter = counted


def stamp(req: kore.pyhttp_request) -> None:
    """Name the process in the answer."""
    req.response_header("x-pid", str(os.getpid()))


def journal(req: kore.pyhttp_request) -> None:
    """Note that the request was read, before anything is done about it: what stands there has to be answered."""
    if settings["journal"] >= 0 and req.query:
        os.write(settings["journal"], f"{os.getpid()} {req.query}\n".encode())


def seen(req: kore.pyhttp_request) -> bytes:
    """The request as the application sees it."""
    return json.dumps({
        "method": req.method, "path": req.path, "query": req.query, "host": req.host, "headers": req.headers(),
        "length": len(req.body), "body": hashlib.sha256(req.body).hexdigest(),
    }).encode()


def hello(req: kore.pyhttp_request) -> None:
    """The quick path, as applications have it."""
    req.response(200, b"hello")


def echo(req: kore.pyhttp_request) -> None:
    """What was asked, at once."""
    req.response(200, seen(req))


def echo_named(req: kore.pyhttp_request) -> None:
    """The same with a field of the application's."""
    stamp(req)
    req.response(200, seen(req))


async def echo_later(req: kore.pyhttp_request) -> None:
    """The same, after a wait."""
    await kore.suspend(1)
    req.response(200, seen(req))


async def echo_async(req: kore.pyhttp_request) -> None:
    """The same from a coroutine that does not wait."""
    req.response(200, seen(req))


def echo_chunks(req: kore.pyhttp_request) -> None:
    """The same in chunks."""
    text = seen(req)
    req.response(200, (text[at : at + 50] for at in range(0, len(text), 50)))


def ping(req: kore.pyhttp_request) -> None:
    """Answer with the number of the request."""
    journal(req)
    stamp(req)
    req.response(200, (req.query or "").encode())


async def slow(req: kore.pyhttp_request) -> None:
    """The same after a while."""
    journal(req)
    stamp(req)
    await kore.suspend(SLOW_MS)
    req.response(200, (req.query or "").encode())


def big(req: kore.pyhttp_request) -> None:
    """A body that does not go out at once."""
    req.response(200, BIG)


def pieces(req: kore.pyhttp_request) -> None:
    """A body that is produced as it is taken."""
    def produce() -> Iterator[bytes]:
        for _ in range(PIECES):
            yield PIECE

    req.response(200, produce())


async def busy(req: kore.pyhttp_request) -> None:
    """Everything a handler can wait for, one after the other; with ``?left`` without an asynchronous generator.

    Before CPython 3.13 closing a coroutine does not close the asynchronous generator that it is in the middle of: its
    finally blocks never run, and asyncio complains that it is "already running" when it comes to collect it.
    """
    line = kore.queue()
    guard = kore.lock()

    async def put(item: int) -> int:
        async with guard:
            await kore.suspend(2)
            line.push(item)
        return item

    results = await kore.gather(*(put(item) for item in range(3)), concurrency=2)
    popped = [await line.pop() for _ in results]
    task = asyncio.ensure_future(asyncio.sleep(0.001, "slept"))
    async with asyncio.timeout(5):
        word = await task
    count = 0
    if req.query != "left":
        async for _ in numbers():
            count += 1
    req.response(200, f"{results} {sorted(popped)} {word} {count}".encode())


async def numbers() -> AsyncIterator[int]:
    """An asynchronous generator, whose end the loop has to see to."""
    for number in range(3):
        await asyncio.sleep(0)
        yield number


async def never(req: kore.pyhttp_request) -> None:
    """Wait until the client has gone."""
    await kore.suspend(3_600_000)
    req.response(200, b"never")


def diagnose(req: kore.pyhttp_request) -> None:
    """What this process holds; with ``?objects`` also how many objects there are, after a collection.

    Then the allocator gives back what nobody holds: what is resident afterwards is held.
    """
    from kore.reactor import tasks

    found = {
        "pid": os.getpid(),
        "fds": len(os.listdir("/proc/self/fd")) - 1,  # without the one that lists them
        "tasks": len(tasks.live),
        "asyncio_tasks": len(asyncio.all_tasks()),
        "enters": enters[0],
    }
    if req.query == "objects":
        found["garbage"] = gc.collect()
        found |= {"objects": len(gc.get_objects()), "blocks": sys.getallocatedblocks()}
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
    req.response(200, json.dumps(found).encode())


ROUTES = {
    "/": hello,
    "^/echo/now": echo,
    "^/echo/named": echo_named,
    "^/echo/later": echo_later,
    "^/echo/async": echo_async,
    "^/echo/chunks": echo_chunks,
    "/ping": ping,
    "/slow": slow,
    "/big": big,
    "/pieces": pieces,
    "/busy": busy,
    "/never": never,
    "/diagnose": diagnose,
}
