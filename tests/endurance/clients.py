"""The mixed load: every kind of client there is, polite and not, each at its own pace.

Each kind is one coroutine that has one exchange with the server on a fresh connection and says what must hold; the
table MIX says how many of them there are and how long each rests between two. Together they make some thousand requests
a second, far from what the server can do: what is looked for adds up, it does not hurry.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from tests.endurance.traffic import Bad, Client, Lost

Address = tuple[str, int]

BIG_BYTES = 1 << 20
PIECES_BYTES = 64 * 8192
BUSY = b"[0, 1, 2] [0, 1, 2] slept 3"
EXCHANGE_SECONDS_MAX = 20.0
SLOW_RECEIVE_BYTES = 8192


async def check(client: Client, wanted: bytes, status: int = 200) -> None:
    """The next answer has to be this one."""
    body = await client.answer(status)
    if body != wanted:
        raise Bad(f"{body[:100]!r}, not {wanted[:100]!r}")


async def keep_alive(client: Client, rng: random.Random) -> None:
    """Many requests on one connection."""
    for _ in range(50):
        client.get("/")
        await check(client, b"hello")
        await asyncio.sleep(0.004)


async def short(client: Client, rng: random.Random) -> None:
    """A connection for one request, closed by the server."""
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    await check(client, b"hello")
    await client.end()


async def waiting(client: Client, rng: random.Random) -> None:
    """Handlers that wait: queues, locks, gather, asyncio's own."""
    for _ in range(5):
        client.get("/busy")
        await check(client, BUSY)


async def slow_reader(client: Client, rng: random.Random) -> None:
    """A large body, read in small pieces with rests between them."""
    path, length = rng.choice((("/big", BIG_BYTES), ("/pieces", PIECES_BYTES)))
    client.send(f"GET {path} HTTP/1.0\r\nHost: a\r\n\r\n".encode())
    head = await client.reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.0 200 "):
        raise Bad(f"{head[:50]!r}")
    found = 0
    while piece := await client.reader.read(32768):
        found += len(piece)
        await asyncio.sleep(0.01)
    if found != length:
        raise Bad(f"{found} bytes of {length}")


async def half_closed(client: Client, rng: random.Random) -> None:
    """A FIN right behind the request: the answer comes all the same."""
    path, wanted = rng.choice((("/", b"hello"), ("/busy", BUSY), ("/slow?a", b"a")))
    client.get(path)
    client.finish()
    await check(client, wanted)
    await client.end()


async def pipelined(client: Client, rng: random.Random) -> None:
    """Many requests at once, some of them slower than those behind them."""
    paths = [rng.choice(("/ping", "/ping", "/slow")) if rng.random() < 0.1 else "/ping" for _ in range(16)]
    for number, path in enumerate(paths):
        client.get(f"{path}?{number}")
    for number in range(len(paths)):
        await check(client, b"%d" % number)


async def upload(client: Client, rng: random.Random) -> None:
    """A body in chunks, piece by piece; the answer tells its length."""
    client.send(b"POST /echo/now HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    length = 0
    for _ in range(rng.randint(1, 10)):
        size = rng.randint(1, 9000)
        length += size
        client.send(b"%x\r\n%b\r\n" % (size, bytes(size)))
        await asyncio.sleep(0.001)
    client.send(b"0\r\n\r\n")
    body = await client.answer()
    if b'"length": %d,' % length not in body:
        raise Bad(f"{length} bytes, and the answer {body[-150:]!r}")


async def refused(client: Client, rng: random.Random) -> None:
    """Bytes that are no request: a status that says no, and the end."""
    sent, status = rng.choice((
        (b"GET / HTTP/1.1\r\n\r\n", 400), (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 501), (b"\x16\x03\x01\x00\x05", 400),
        (b"GET /none HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999\r\n\r\n" + bytes(5000), 413),
    ))
    client.send(sent)
    await check(client, b"", status)
    await client.end()


async def leaving(client: Client, rng: random.Random) -> None:
    """A client that goes in the middle of something, with an RST or a FIN. Nothing is owed to it."""
    sent = rng.choice((
        b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /never HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /slow?1 HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /busy?left HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /pieces HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /echo/now HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n\r\nabc",
        b"POST /echo/now HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"GET /ping?1 HTTP/1.1\r\nHost: a\r\n\r\n" * 40 + b"GET /slow?1 HTTP/1.1\r\nHost: a\r\n\r\n" * 5,
    ))
    client.send(sent)
    await asyncio.sleep(rng.choice((0, 0.0005, 0.01, 0.05)))
    if rng.random() < 0.3 and sent.startswith((b"GET /big", b"GET /pieces")):
        await client.reader.read(20_000)
    if rng.random() < 0.5:
        client.abort()


async def silent(client: Client, rng: random.Random) -> None:
    """A client that says nothing, or not enough, until the server's deadline."""
    client.send(rng.choice((b"", b"GET / HTTP/1.1\r\nHost", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")))
    while await client.reader.read(65536):
        pass


Kind = Callable[[Client, random.Random], Awaitable[None]]

# How many at a time, and the rest between two exchanges in seconds.
MIX: tuple[tuple[Kind, int, float], ...] = (
    (keep_alive, 4, 0.05),
    (short, 3, 0.03),
    (waiting, 2, 0.1),
    (slow_reader, 2, 0.2),
    (half_closed, 2, 0.1),
    (pipelined, 2, 0.1),
    (upload, 2, 0.1),
    (refused, 1, 0.1),
    (leaving, 4, 0.05),
    (silent, 2, 0.1),
)


class Mix:
    """The load: how much of each kind there was, and what went wrong."""

    FAILURES_MAX = 50

    def __init__(self, address: Address) -> None:
        self.address = address
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    async def run(self, seconds: float) -> None:
        """All kinds at once, for so long. The silent ones are not waited for: they are ended."""
        until = time.monotonic() + seconds
        patient: list[asyncio.Task[None]] = []
        others: list[asyncio.Task[None]] = []
        for kind, number, rest in MIX:
            for at in range(number):
                task = asyncio.create_task(self.repeat(kind, rest, until, random.Random(f"{kind.__name__} {at}")))
                (patient if kind is silent else others).append(task)
        try:
            await asyncio.gather(*others)
        finally:
            for task in (*patient, *others):
                task.cancel()
            await asyncio.wait((*patient, *others))

    async def repeat(self, kind: Kind, rest: float, until: float, rng: random.Random) -> None:
        """One client of a kind, again and again."""
        while time.monotonic() < until:
            try:
                async with asyncio.timeout(EXCHANGE_SECONDS_MAX):
                    await self.exchange(kind, rng)
            except (Bad, Lost, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self.failed(kind, error)
            self.counts[kind.__name__] += 1
            await asyncio.sleep(rest * rng.uniform(0.5, 1.5))

    async def exchange(self, kind: Kind, rng: random.Random) -> None:
        """One connection, which is closed whatever happens."""
        client = await Client.open(self.address, receive_bytes=SLOW_RECEIVE_BYTES if kind is slow_reader else 0)
        try:
            await kind(client, rng)
            await client.close()
        finally:
            client.abort()

    def failed(self, kind: Kind, error: Exception) -> None:
        """Keep it, unless nothing was owed."""
        if kind is leaving and isinstance(error, ConnectionError):
            return
        if len(self.failures) < self.FAILURES_MAX:
            self.failures.append(f"{kind.__name__}: {error!r}")
