"""Proof: coroutines that wait, on whatever there is to wait for, can be killed in any order and leave nothing behind.

In each round a thousand of them wait on every kind of operation, half of them as handlers whose clients leave (with a
FIN or an RST), half as tasks that ``task_kill`` ends, all mixed and in random order, some when they have hardly begun.
Afterwards the worker holds what it held before: descriptors, tasks, operations, child processes; and PostgreSQL runs
no query and has no connection more than the pool may keep.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tests.endurance.report import Progress, Result, Unavailable
from tests.endurance.server import Server, accepted, ask, pss, serving, wait_until
from tests.endurance.storm_app import CONNECTIONS_MAX, SCARCE, WAITS
from tests.postgresql_server import PostgresServer
from tests.postgresql_server import Unavailable as NoPostgres
from tests.support import children

APP = Path(__file__).with_name("storm_app.py")

ROUND = 1000
"""Coroutines that wait at the same time."""

SCARCE_SHARE = 0.02
"""Of a round, each kind that takes a process."""

SETTLE_SECONDS_MAX = 30.0

GROWTH_BYTES_MAX = 6 << 20
"""Of one worker, from the end of the first round to that of the last: a kibibyte forgotten by each would be more."""

LISTENERS_MAX = 20
"""Connections that wait for notifications at once; PostgreSQL has 50 in all."""


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """A port where connections are taken by the kernel and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        yield listener.getsockname()[1]


def kinds(count: int, rng: random.Random) -> list[str]:
    """So many waits, every kind among them, those that take a process seldom."""
    few = max(1, min(LISTENERS_MAX // 2, int(count * SCARCE_SHARE)))
    found = [kind for kind in sorted(SCARCE) for _ in range(few)]
    many = sorted(set(WAITS) - SCARCE)
    found += [many[at % len(many)] for at in range(max(len(many), count - len(found)))]
    rng.shuffle(found)
    return found


class Storm:
    """One run against one worker."""

    def __init__(self, server: Server, postgres: PostgresServer, result: Result, seed: int, progress: Progress) -> None:
        self.server = server
        self.postgres = postgres
        self.result = result
        self.rng = random.Random(seed)
        self.progress = progress
        self.killed = 0

    def run(self, coroutines: int, size: int) -> None:
        """All rounds; the first is a warm-up, after which pools and threads are there."""
        before: dict[str, int] = {}
        rounds = max(2, -(-coroutines // size) + 1)
        memory = 0
        for number in range(rounds):
            self.progress(f"storm on {self.result.io}: round {number} of {rounds - 1}, {self.killed} killed")
            self.round(size)
            if number == 0:
                before = self.settled({})
                memory = pss(self.server.pids[0])
                self.killed = 0
            else:
                self.settled(before)
        grown = pss(self.server.pids[0]) - memory
        self.result.figures = {"killed": self.killed, "rounds": rounds - 1, "kinds": len(WAITS), **before,
                               "grown_kib": grown // 1024}
        self.result.check(grown <= GROWTH_BYTES_MAX, f"memory grew by {grown} bytes")

    def round(self, size: int) -> None:
        """Begin `size` waits and end them all."""
        waits = kinds(size, self.rng)
        half = len(waits) // 2
        clients: list[socket.socket] = []
        ids: list[int] = []
        # Some leave, or are killed, while others are still to come.
        for at, kind in enumerate(waits):
            if at < half:
                clients.append(self.client(kind))
            else:
                ids += json.loads(ask(self.server.address, f"/create/{kind}/1")[1])
            if at % 10 == 9 and self.rng.random() < 0.3:
                self.end_one(clients, ids)
        ask(self.server.address, "/diagnose")  # all of them have begun: requests are taken in their order or sooner
        while clients or ids:
            self.end_one(clients, ids)

    def client(self, kind: str) -> socket.socket:
        """A client that asks for a wait."""
        sock = socket.create_connection(self.server.address, timeout=20)
        sock.sendall(f"GET /wait/{kind} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return sock

    def end_one(self, clients: list[socket.socket], ids: list[int]) -> None:
        """End one or several waits, in one of the ways."""
        if clients and (not ids or self.rng.random() < 0.5):
            sock = clients.pop(self.rng.randrange(len(clients)))
            if self.rng.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            self.killed += 1
        elif ids:
            self.rng.shuffle(ids)
            count = self.rng.randint(1, 20)
            some, ids[:] = ids[:count], ids[count:]
            killed = int(self.post("/kill", json.dumps(some).encode()))
            self.result.check(killed == len(some), f"{killed} of {len(some)} tasks were there to be killed")
            self.killed += killed

    def post(self, path: str, body: bytes) -> bytes:
        """One POST on a connection of its own."""
        with socket.create_connection(self.server.address, timeout=20) as sock:
            fields = f"Host: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
            sock.sendall(f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode() + body)
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 200 "), answer[:200]
        return answer.partition(b"\r\n\r\n")[2]

    def settled(self, before: dict[str, int]) -> dict[str, int]:
        """What is held once nothing changes any more: it must be what was held before, if that is given."""
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        found: dict[str, int] = {}
        while time.monotonic() < deadline:
            last, found = found, self.held()
            if found == (before or last):
                break
            time.sleep(0.2)
        if before:
            for what, amount in found.items():
                self.result.check(amount <= before[what], f"{what}: {amount}, {before[what]} before")
        self.result.check(found["children"] == 0, f"{found['children']} child processes are left")
        self.result.check(found["queries"] == 0, f"PostgreSQL still runs {self.postgres.active()}")
        return found

    def held(self) -> dict[str, int]:
        """What the worker holds now, as it says, and as the system and PostgreSQL say."""
        wait_until(lambda: not accepted(self.server.address[1]), "the last connection is closed", SETTLE_SECONDS_MAX)
        said = json.loads(ask(self.server.address, "/diagnose")[1])
        database = self.postgres.connections()
        self.result.check(database <= CONNECTIONS_MAX + LISTENERS_MAX, f"{database} connections to PostgreSQL")
        return {
            # The pool keeps as many connections as it likes below its limit; each is a descriptor and an operation.
            "fds": said["fds"] - database,
            "operations": max(0, said["operations"] - database),
            "tasks": said["tasks"],
            "asyncio_tasks": said["asyncio_tasks"],
            "children": len(children(self.server.pids[0])),
            "queries": len(self.postgres.active()),
        }


def prove(io: str, *, coroutines: int, seed: int, progress: Progress, size: int = ROUND) -> Result:
    """The proof on one engine."""
    result = Result("storm", io)
    began = time.monotonic()
    try:
        postgres = PostgresServer()
    except NoPostgres as error:
        raise Unavailable(str(error)) from error
    try:
        postgres.start().set_up()
        with silent_server() as silent:
            with serving(io, workers=1, app=APP, arguments=(postgres.tcp, str(silent))) as server:
                Storm(server, postgres, result, seed, progress).run(coroutines, size)
                result.check(not server.death_lines, f"deaths: {server.death_lines}")
                result.check(not server.worker_lines, f"complaints: {server.worker_lines[:3]}")
                result.check(not server.program.err, f"standard error: {server.program.err[-500:]}")
    finally:
        postgres.remove()
    result.figures["seed"] = seed
    result.seconds = time.monotonic() - began
    return result
