"""Proof: a killed worker takes nothing along but its own connections, and a stopped server answers what it has read.

Two workers, and clients that check every answer. Again and again one of the workers gets SIGKILL in the middle of its
work. Whose connection it was that broke is not guessed: every answer names its process, and before every other kill the
victim is stopped for a moment and the kernel is asked which connections it has accepted. Only those may break.

Then connections are opened while both workers stand still, so that they wait in the listen queue, and one worker, the
other, and both are killed: every one of these has to be answered by who is left or by a successor.

In the end the parent gets SIGTERM under load: the server keeps a journal of the requests it has read, and each of them
must have been answered, whoever else was turned away.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import time
from dataclasses import dataclass, field

from tests.endurance.report import Progress, Result
from tests.endurance.server import Server, accepted_by, alive, children, connections, serving, state, wait_until
from tests.endurance.traffic import Bad, Client, Lost, Refused

KEPT = 12
"""Connections that ask again and again: some of them slow ones, so that a kill always finds requests in the middle."""

SLOW = 4
SHORT = 4
"""Clients that make a new connection for each request."""

QUEUED = 40
ASKED_MAX = 200
"""Requests on one connection; then a new one, so that a successor gets its share."""

SECONDS_MAX = 20.0
NOTICED_SECONDS = 2.0
"""How soon after a kill a client knows at the latest: the RST is under way when kill(2) returns."""

PAUSE_SECONDS = 0.002
"""Between two requests of a client: a load that leaves some of two processors to others."""


@dataclass
class Broken:
    """A connection that ended before an answer."""

    port: int
    pid: int  # that had answered on it, 0: none yet
    at: float
    number: int  # of the request that was not answered


@dataclass
class Seen:
    """What the clients saw."""

    answered: set[int] = field(default_factory=set)
    broken: list[Broken] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    connections: int = 0


@dataclass
class Kill:
    """One SIGKILL."""

    pid: int
    at: float
    accepted: set[int] | None  # the client ports of its connections, when it was asked for them
    uptime: float = 0.0


class Load:
    """The clients."""

    def __init__(self, server: Server) -> None:
        self.address = server.address
        self.seen = Seen()
        self.numbers = itertools.count(1)
        self.stopping = False

    async def run(self) -> None:
        """All of them, until `stopping`."""
        async with asyncio.TaskGroup() as group:
            for at in range(KEPT):
                group.create_task(self.client("/slow" if at < SLOW else "/ping", 20 if at < SLOW else ASKED_MAX))
            for _ in range(SHORT):
                group.create_task(self.client("/ping", 1))

    async def client(self, path: str, asked_max: int) -> None:
        """Connect, ask, and again."""
        while not self.stopping:
            try:
                client = await Client.open(self.address)
            except Refused:
                self.seen.refused.append(time.monotonic())
                return
            self.seen.connections += 1
            number = next(self.numbers)
            try:
                for _ in range(asked_max):
                    if self.stopping or client.over:
                        break
                    await self.ask(client, path, number)
                    number = next(self.numbers)
            except Lost:
                self.seen.broken.append(Broken(client.port, client.pid, time.monotonic(), number))
            except (Bad, TimeoutError) as error:
                self.seen.wrong.append(f"request {number} of {path}, process {client.pid}: {error!r}")
            finally:
                client.abort()

    async def ask(self, client: Client, path: str, number: int) -> None:
        """One request and its answer."""
        before = client.pid
        client.get(f"{path}?{number}")
        async with asyncio.timeout(SECONDS_MAX):
            body = await client.answer()
        if body != str(number).encode():
            raise Bad(f"the answer {body!r}")
        if before not in (0, client.pid):
            raise Bad(f"an answer of process {before} and one of {client.pid} on one connection")
        self.seen.answered.add(number)
        self.seen.pids.add(client.pid)
        await asyncio.sleep(PAUSE_SECONDS)


class Run:
    """One server, its kills and its end."""

    def __init__(self, server: Server, kills: int, result: Result, progress: Progress) -> None:
        self.server = server
        self.number = kills
        self.result = result
        self.progress = progress
        self.load = Load(server)
        self.kills: list[Kill] = []
        self.queue_kills = 0
        self.pids = list(server.pids)  # by worker
        self.born = dict.fromkeys(self.pids, time.monotonic())
        self.stopped_at = 0.0
        self.served_again = 0

    async def run(self) -> None:
        """Load, kills, queues, SIGTERM."""
        task = asyncio.create_task(self.load.run())
        try:
            await self.until(lambda: set(self.pids) <= self.load.seen.pids, "both workers answer")
            for number in range(self.number):
                self.progress(f"deaths on {self.result.io}: {number} of {self.number} workers killed")
                await self.kill(number % 2, examined=number % 2 == number // 2 % 2)
            for seats in ((0,), (1,), (0, 1)):
                self.progress(f"deaths on {self.result.io}: queued connections, workers {seats} killed")
                await self.queue(seats)
            await self.stop(task)
        finally:
            self.load.stopping = True
            task.cancel()
            await asyncio.wait([task])

    async def until(self, holds, what: str) -> None:
        """Wait for `holds()` while the clients go on."""
        await asyncio.get_running_loop().run_in_executor(None, wait_until, holds, what)

    async def kill(self, seat: int, *, examined: bool) -> None:
        """Kill the worker on a seat in the middle of its work, and wait until its successor serves."""
        pid = self.pids[seat]
        kill = Kill(pid, 0.0, None)
        if examined:
            os.kill(pid, signal.SIGSTOP)
            await self.until(lambda: state(pid) == "T", "the victim stands still")
            kill.accepted = accepted_by(pid, self.server.address[1])
        kill.at = time.monotonic()
        kill.uptime = kill.at - self.born[pid]
        os.kill(pid, signal.SIGKILL)
        self.kills.append(kill)
        await self.successor(seat)
        await self.until(lambda: self.pids[seat] in self.load.seen.pids, "the successor answers")

    async def successor(self, seat: int) -> None:
        """Wait for the parent's word that the seat is taken again."""
        self.served_again += 1
        pattern = r"worker (\d+) serves again, pid (\d+)"
        await self.until(
            lambda: len(re.findall(pattern, self.server.program.out)) >= self.served_again, "the successor is ready")
        for worker, pid in re.findall(pattern, self.server.program.out):
            if int(pid) not in self.born:
                self.born[int(pid)] = time.monotonic()
                self.pids[int(worker) - 1] = int(pid)

    async def queue(self, seats: tuple[int, ...]) -> None:
        """Connections that nobody has accepted when a worker dies are answered by another or by its successor."""
        victims = [self.pids[seat] for seat in seats]
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)
        await self.until(lambda: all(state(pid) == "T" for pid in self.pids), "both workers stand still")
        clients = [await Client.open(self.server.address) for _ in range(QUEUED)]
        for number, client in enumerate(clients):
            client.get(f"/ping?queued{number}")
        inodes = connections(self.server.address[1])
        waiting = [inodes.get(client.port) for client in clients]
        self.result.check(not any(waiting), f"accepted although both workers stand still: {waiting}")
        for pid in victims:
            self.kills.append(Kill(pid, time.monotonic(), accepted_by(pid, self.server.address[1]),
                                   time.monotonic() - self.born[pid]))
            os.kill(pid, signal.SIGKILL)
        for pid in set(self.pids) - set(victims):
            os.kill(pid, signal.SIGCONT)
        lost = 0
        for number, client in enumerate(clients):
            try:
                async with asyncio.timeout(SECONDS_MAX):
                    body = await client.answer()
                self.result.check(body == b"queued%d" % number, f"queued {number} was answered {body!r}")
            except (Lost, Bad, TimeoutError) as error:
                lost += 1
                self.result.fail(f"queued {number} of {QUEUED}, workers {seats} killed: {error!r}")
            client.abort()
        self.result.figures["queued_answered"] = self.result.figures.get("queued_answered", 0) + QUEUED - lost
        for seat in seats:
            await self.successor(seat)

    async def stop(self, task: asyncio.Task[None]) -> None:
        """SIGTERM under load."""
        self.progress(f"deaths on {self.result.io}: SIGTERM")
        self.stopped_at = time.monotonic()
        self.server.program.signal(signal.SIGTERM)
        code = await asyncio.get_running_loop().run_in_executor(None, self.server.program.wait)
        self.result.check(code == 0, f"exit code {code}")
        self.result.figures["stop_seconds"] = round(time.monotonic() - self.stopped_at, 2)
        self.load.stopping = True
        await asyncio.wait([task], timeout=SECONDS_MAX)
        self.result.check(task.done(), "a client still waits")

    # The judgement.

    def judge(self) -> None:
        """Everything that can be told only afterwards."""
        seen, result = self.load.seen, self.result
        result.figures |= {
            "kills": len(self.kills), "connections": seen.connections, "answers": len(seen.answered),
            "kills_examined": sum(1 for kill in self.kills if kill.accepted is not None),
            "broken_by_kills": sum(1 for each in seen.broken if each.at < self.stopped_at),
        }
        for text in seen.wrong:
            result.fail(text)
        early = [at for at in seen.refused if at < self.stopped_at]
        result.check(not early, f"{len(early)} connections were refused before SIGTERM")
        for broken in seen.broken:
            if broken.at < self.stopped_at:
                self.judge_broken(broken)
        self.judge_journal()
        self.judge_report()

    def judge_broken(self, broken: Broken) -> None:
        """It has to have been the connection of a killed worker."""
        kills = [kill for kill in self.kills if broken.at - NOTICED_SECONDS <= kill.at <= broken.at]
        if broken.pid:
            kills = [kill for kill in kills if kill.pid == broken.pid]
        if not kills:
            self.result.fail(f"{broken}: no kill of its process before it")
        elif all(kill.accepted is not None and broken.port not in kill.accepted for kill in kills):
            self.result.fail(f"{broken}: no killed process had accepted it, so it was lost out of the queue")

    def judge_journal(self) -> None:
        """What was read was answered, but by the killed."""
        killed = {kill.pid for kill in self.kills}
        read = [line.split() for line in self.server.journal.read_text().splitlines()]
        numbers = {int(number): int(pid) for pid, number in read if number.isdigit()}
        missing = {number: pid for number, pid in numbers.items() if number not in self.load.seen.answered}
        by_survivors = {number: pid for number, pid in missing.items() if pid not in killed}
        some = list(by_survivors.items())[:9]
        self.result.check(not some, f"read by a worker that was not killed, and not answered: {some}")
        late = [each for each in self.load.seen.broken if each.at >= self.stopped_at]
        self.result.figures |= {
            "read": len(numbers), "read_by_killed_and_lost": len(missing) - len(by_survivors),
            # The race of every server that closes idle connections: these requests met its FIN on the way.
            "unread_at_stop_on_kept_connections": sum(1 for each in late if each.number not in numbers and each.pid),
            "unaccepted_at_stop": sum(1 for each in late if each.number not in numbers and not each.pid),
            "refused_after_stop": sum(1 for at in self.load.seen.refused if at >= self.stopped_at),
        }
        self.result.check(len(numbers) > 10 * len(self.kills), f"only {len(numbers)} requests were read")

    def judge_report(self) -> None:
        """Each death stands in the log, with its signal, how long the worker lived, and what it was doing."""
        pattern = re.compile(
            r"worker \d+ \(pid (\d+)\) was killed by SIGKILL.*, while serving (.*), after ([\d.]+) (ms|s|min)\b")
        found = {int(match[1]): match for line in self.server.death_lines if (match := pattern.search(line))}
        self.result.check(
            len(self.server.death_lines) == len(self.kills),
            f"{len(self.kills)} kills, {len(self.server.death_lines)} reports of deaths")
        for kill in self.kills:
            match = found.get(kill.pid)
            if match is None:
                self.result.fail(f"no report of the death of process {kill.pid}")
                continue
            route = match[2].removesuffix(" or idle after it")
            routes = ("* /ping", "* /slow") if kill.pid in self.load.seen.pids else ("* /ping", "* /slow", "nothing")
            self.result.check(route in routes, f"process {kill.pid} died serving {route!r}")
            said = float(match[3]) * {"ms": 0.001, "s": 1, "min": 60}[match[4]]
            # A successor says that it is ready some time after its start.
            self.result.check(
                kill.uptime - 0.2 <= said <= kill.uptime + 2, f"it lived {said} s, not about {kill.uptime:.2f} s")
        self.result.check(not self.server.worker_lines, f"complaints: {self.server.worker_lines[:3]}")
        self.result.check(not self.server.program.err, f"standard error: {self.server.program.err[-500:]}")


def prove(io: str, *, kills: int, progress: Progress) -> Result:
    """The proof on one engine."""
    result = Result("deaths", io)
    began = time.monotonic()
    with serving(io, workers=2, journal=True) as server:
        run = Run(server, kills, result, progress)
        try:
            asyncio.run(run.run())
        except AssertionError as error:
            result.fail(str(error))
        left = [pid for pid in (server.program.pid, *run.born, *children(server.program.pid)) if alive(pid)]
        result.check(not left, f"processes left: {left}")
        run.judge()
    result.seconds = time.monotonic() - began
    return result
