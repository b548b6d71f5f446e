"""Proof: a broadcast reaches every other WebSocket client of all workers exactly once, and never the one it came from.

A thousand clients on two workers; clients taken at random have numbered messages of both kinds and of several sizes
sent to all, or to their worker's clients only. Then each worker is killed in the middle of that, and its clients come
again. What a killed worker had been told is passed on to all clients of the other or to none of them, once at most; for
everything else nothing changes, for who is new it holds from its welcome on. Messages of one client keep their order.

A stretch of traffic ends with two barriers for each worker. What comes from one worker stays in its order, so a client
that has all barriers has got whatever there was for it, twice if it was sent twice.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.endurance.broadcast_clients import Client, Journal, Sent, join
from tests.endurance.report import Progress, Result, Unavailable
from tests.endurance.server import Server, serving

APP = Path(__file__).with_name("broadcast_app.py")

JOINING = 50
"""Clients that make their handshake at the same time."""

BACKLOG = 30
"""Messages on their way to each client when the next is sent: the bound of what a slow client holds is far off."""

BACKLOG_SECONDS_MAX = 0.1
"""What a killed worker takes along never arrives, so the next message is sent after this time at the latest."""

LOCAL_SHARE = 4
"""One message in so many is for the clients of one worker."""

SHARE_MIN = 2
EXTRA_MAX = 300
"""Who accepts a connection is the kernel's choice; so many more are made until each worker has a few clients."""

SECONDS_MAX = 30.0
DESCRIPTORS_SPARE = 200


class Run:
    """One server and its clients. `messages` are sent in each stretch."""

    def __init__(self, server: Server, clients: int, messages: int, result: Result, progress: Progress) -> None:
        self.server = server
        self.wanted = clients
        self.messages = messages
        self.result = result
        self.progress = progress
        self.journal = Journal(random.Random(0))
        self.clients: list[Client] = []
        self.pids = list(server.pids)  # by worker
        self.killed: dict[int, int] = {}
        """The killed processes, each with the number of messages of which nothing was under way any more."""
        self.shares: list[str] = []
        self.on_their_way = 0
        self.settled = 0

    async def run(self, seed: int, kills: int) -> None:
        """Quiet traffic, then kills under traffic."""
        self.journal.rng.seed(seed)
        task = asyncio.current_task()
        assert task is not None
        # An exception raised by the signal's handler would come anywhere, also where the loop then loses a task's turn.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            await self.complete()
            self.progress(f"broadcast on {self.result.io}: {len(self.clients)} clients")
            await self.traffic()
            await self.settle()
            for number in range(kills):
                self.progress(f"broadcast on {self.result.io}: {number} of {kills} workers killed")
                await self.kill(number % 2)
        finally:
            for client in self.clients:
                client.reset()
            await asyncio.sleep(0)

    @property
    def alive(self) -> list[Client]:
        """The clients whose connection has not ended."""
        return [client for client in self.clients if not client.lost]

    async def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait until `holds()`. Raises AssertionError."""
        deadline = time.monotonic() + SECONDS_MAX
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"never happened within {SECONDS_MAX} s: {what}")
            await asyncio.sleep(0.01)

    async def complete(self) -> None:
        """Connect as many clients as are missing, and see that each worker has some."""
        while (missing := self.wanted - len(self.alive)) > 0:
            numbers = range(len(self.clients), len(self.clients) + min(missing, JOINING))
            self.clients += await asyncio.gather(*(join(self.server.address, self.journal, at) for at in numbers))
        share = Counter(client.pid for client in self.alive)
        for _ in range(EXTRA_MAX):
            if min(share[pid] for pid in self.pids) >= SHARE_MIN:
                break
            self.clients.append(await join(self.server.address, self.journal, len(self.clients)))
            share[self.clients[-1].pid] += 1
        self.shares.append("+".join(str(share[pid]) for pid in self.pids))
        few = min(share[pid] for pid in self.pids) < SHARE_MIN or set(share) != set(self.pids)
        self.result.check(not few, f"clients are on {dict(share)}, the workers are {self.pids}")

    async def traffic(self) -> None:
        """One stretch: random clients, one message after the other."""
        base = self.journal.arrived
        self.on_their_way = 0
        for _ in range(self.messages):
            people = self.alive
            scope = "L" if self.journal.rng.randrange(LOCAL_SHARE) == 0 else "G"
            source = self.journal.rng.choice(people)
            source.broadcast(scope)
            self.on_their_way += len(people) if scope == "G" else sum(1 for each in people if each.pid == source.pid)
            began = time.monotonic()
            await asyncio.sleep(0)
            while (
                self.on_their_way - (self.journal.arrived - base) > BACKLOG * len(people)
                and time.monotonic() - began < BACKLOG_SECONDS_MAX
            ):
                await asyncio.sleep(0.001)

    async def settle(self) -> None:
        """Wait until nothing is under way: every client has the barriers of every worker."""
        barriers: list[Sent] = []
        for client in self.alive:
            client.mark = len(client.got)
        for pid in self.pids:
            sources = [client for client in self.alive if client.pid == pid][:2]
            barriers += [source.broadcast("G") for source in sources]
        begin = barriers[0].number
        wanted = {
            client: {sent.number for sent in barriers if sent.source != client.number} for client in self.alive
        }

        def everywhere() -> bool:
            for client in [each for each, numbers in wanted.items() if numbers <= set(each.got[each.mark :])]:
                del wanted[client]
            return not wanted

        try:
            await self.until(everywhere, f"the barriers from message {begin} on are everywhere")
        except AssertionError as error:
            self.result.fail(f"{error}: {len(wanted)} clients wait")
        self.settled = len(self.journal.sent)

    async def kill(self, seat: int) -> None:
        """Kill a worker under traffic; its clients come again, and a stretch with them follows."""
        pid = self.pids[seat]
        served_again = len(self.killed) + 1
        stretch = asyncio.create_task(self.traffic())
        half = self.settled + self.messages // 2
        await self.until(lambda: len(self.journal.sent) >= half, "half of the messages are sent")
        self.killed[pid] = self.settled
        os.kill(pid, signal.SIGKILL)
        lost = [client for client in self.clients if client.pid == pid]
        await self.until(lambda: all(client.lost for client in lost), "its clients know that it was killed")
        pattern = r"worker \d+ serves again, pid (\d+)"
        await self.until(
            lambda: len(re.findall(pattern, self.server.program.out)) >= served_again, "the successor is ready")
        self.pids[seat] = int(re.findall(pattern, self.server.program.out)[served_again - 1])
        await self.complete()
        await stretch
        await self.traffic()
        await self.settle()

    # The judgement.

    def judge(self) -> None:
        """What each client got against what it had to get."""
        journal, result = self.journal, self.result
        for text in journal.wrong:
            result.fail(text)
        for client in self.clients:
            self.judge_client(client)
        self.judge_killed()
        result.figures |= {
            "clients": len(self.clients), "kills": len(self.killed), "messages": len(journal.sent),
            "local": sum(1 for sent in journal.sent if sent.scope == "L"), "arrived": journal.arrived,
            "clients_by_worker": " then ".join(self.shares),
            "of_killed_and_lost": self.lost_with_killed(),
        }
        deaths = len(self.server.death_lines)
        result.check(deaths == len(self.killed), f"{len(self.killed)} kills, {deaths} reports of deaths")
        result.check(not self.server.worker_lines, f"complaints: {self.server.worker_lines[:3]}")
        result.check(not self.server.program.err, f"standard error: {self.server.program.err[-500:]}")

    def certain(self, sent: Sent) -> bool:
        """Whether it must have arrived: not when it was under way in a worker that was killed."""
        return sent.number < self.killed.get(sent.pid, len(self.journal.sent))

    def judge_client(self, client: Client) -> None:
        """Nothing twice, nothing of its own, nothing that was for others, nothing missing, and in order."""
        name = f"client {client.number} of process {client.pid}"
        end = self.killed.get(client.pid, len(self.journal.sent))
        if client.lost and client.pid not in self.killed:
            self.result.fail(f"{name} lost its connection, and nobody killed its worker")
        latest: dict[int, int] = {}
        for number, count in Counter(client.got).items():  # in the order of their first coming
            sent = self.journal.sent[number]
            if count > 1:
                self.result.fail(f"{name} got message {number} {count} times")
            if sent.source == client.number:
                self.result.fail(f"{name} got its own message {number}")
            if sent.scope == "L" and sent.pid != client.pid:
                self.result.fail(f"{name} got message {number}, which was for process {sent.pid} only")
            if number < latest.get(sent.source, -1):
                self.result.fail(f"{name} got message {number} after {latest[sent.source]} of the same client")
            latest[sent.source] = number
        got = set(client.got)
        missing = [
            sent.number for sent in self.journal.sent[client.first : end]
            if sent.number not in got and sent.source != client.number and self.certain(sent)
            and (sent.scope == "G" or sent.pid == client.pid)
        ]
        self.result.check(not missing, f"{name} did not get {len(missing)} messages: {missing[:5]}")

    def audience(self, sent: Sent) -> dict[int, list[bool]]:
        """Whether it came, client by client of each process that lives on and that it was for."""
        found: dict[int, list[bool]] = {}
        for client in self.clients:
            if client.pid not in self.killed and client.first <= sent.number and sent.scope == "G":
                found.setdefault(client.pid, []).append(sent.number in client.got)
        return found

    def judge_killed(self) -> None:
        """What a killed worker had under way came to all clients of another worker or to none of them."""
        for sent in self.journal.sent:
            if not self.certain(sent):
                for pid, came in self.audience(sent).items():
                    if any(came) and not all(came):
                        self.result.fail(
                            f"message {sent.number} of the killed process {sent.pid} came to "
                            f"{sum(came)} of the {len(came)} clients of process {pid}")

    def lost_with_killed(self) -> int:
        """Messages that nobody got, their worker having been killed."""
        return sum(
            1 for sent in self.journal.sent
            if not self.certain(sent) and sent.scope == "G" and not any(map(any, self.audience(sent).values()))
        )


def provide_descriptors(clients: int) -> None:
    """Let this process have as many connections. Raises Unavailable when it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = clients + DESCRIPTORS_SPARE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise Unavailable(f"{wanted} descriptors are wanted, the limit is {hard} (RLIMIT_NOFILE)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def prove(io: str, *, clients: int, messages: int, kills: int, seed: int, progress: Progress) -> Result:
    """The proof on one engine."""
    result = Result("broadcast", io)
    began = time.monotonic()
    provide_descriptors(clients)
    with serving(io, workers=2, app=APP) as server:
        run = Run(server, clients, messages, result, progress)
        before = signal.getsignal(signal.SIGTERM)
        try:
            asyncio.run(run.run(seed, kills))
        except (AssertionError, OSError) as error:
            result.fail(f"{type(error).__name__}: {error}")
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            signal.signal(signal.SIGTERM, before)
        run.judge()
    result.seconds = time.monotonic() - began
    return result
