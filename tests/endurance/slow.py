"""Proof: clients that send or read as slowly as they can take nothing from honest ones, and are ended by the deadlines.

slowhttptest in its three modes (slow heads, slow bodies, slow reading) holds some hundred connections of one worker,
while wrk asks on sixteen others: before, and when all the slow ones are there. The worker has one processor, both
clients share the other; slowhttptest polls, so it runs at the lowest priority, or it would take from wrk what the
server does not. Throughput must fall by less than a fifth; the best of several rounds are compared, as whatever else
runs on the machine can only take away.

In the end the tool must say that none of its connections is left, and the worker must be the one that it was.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.endurance.report import Progress, Result, Unavailable
from tests.endurance.server import Server, accepted, alive, ask, serving, wait_until

APP = Path(__file__).with_name("slow_app.py")

HONEST = 16
ROUNDS = 5
ROUND_SECONDS = 1
FALL_MAX = 0.20
"""By how much the throughput of honest clients may fall."""

RATE = 400
"""Slow connections that are opened in a second."""

COME_SECONDS = 5.0
"""Until all slow connections must be there; the shortest default deadline is 10 s."""

LATE_SECONDS = 30.0
"""Beyond the deadline: the last connection came later, and the tool looks every few seconds."""

NICE = ("nice", "-n", "19")


@dataclass(frozen=True, slots=True)
class Mode:
    """One mode of slowhttptest, its path, and the deadline that ends it, by default in seconds."""

    name: str
    options: tuple[str, ...]
    path: str
    deadline: int


MODES = (
    Mode("headers", ("-H", "-i", "2", "-x", "8"), "/", 10),
    Mode("body", ("-B", "-i", "2", "-x", "8", "-s", "8192", "-t", "POST"), "/upload", 60),
    Mode("read", ("-X", "-w", "16", "-y", "64", "-n", "2", "-z", "8", "-k", "1"), "/large", 60),
)


def require(name: str) -> str:
    """The path of a program. Raises Unavailable."""
    program = shutil.which(name)
    if program is None:
        raise Unavailable(f"{name} is not installed")
    return program


def measure(server: Server, seconds: int = ROUND_SECONDS) -> tuple[float, str]:
    """What wrk gets in one round: requests per second, and what went wrong."""
    url = "http://{}:{}/".format(*server.address)
    command = [require("wrk"), "-t1", f"-c{HONEST}", f"-d{seconds}s", "--timeout", "5s", url]
    said = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    errors = re.search(r"Socket errors:.*|Non-2xx.*", said)
    return float(rate[1]) if rate else 0.0, errors[0] if errors else "" if rate else f"wrk says {said!r}"


def measured(server: Server, rounds: int, result: Result, when: str) -> float:
    """The best of several rounds; every one of them without an error."""
    rates = []
    for _ in range(rounds):
        rate, errors = measure(server)
        rates.append(rate)
        result.check(not errors, f"{when}: {errors}")
    return max(rates)


class Attack:
    """A running slowhttptest. `close` ends it, whatever it did."""

    def __init__(self, server: Server, mode: Mode, connections: int, seconds: int) -> None:
        url = "http://{}:{}".format(*server.address) + mode.path
        self.report = server.program.directory / f"slowhttptest-{mode.name}"
        command = [
            *NICE, require("slowhttptest"), *mode.options, "-c", str(connections), "-r", str(RATE), "-l", str(seconds),
            "-p", "5", "-v", "1", "-u", url,
        ]  # fmt: skip
        with self.report.open("wb") as file:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    @property
    def said(self) -> str:
        """Everything it said, without what colours it."""
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.report.read_text(errors="replace"))

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def attack(
    server: Server, mode: Mode, result: Result, *, connections: int, deadline: int, rounds: int, fall_max: float
) -> None:
    """One mode: throughput before, throughput under attack, and the end of the attack."""
    before = measured(server, rounds, result, f"{mode.name}, before")
    running = Attack(server, mode, connections, deadline + round(LATE_SECONDS))
    began = time.monotonic()
    try:
        wait_until(lambda: accepted(server.address[1]) >= connections, "the slow clients are there", COME_SECONDS)
        during = measured(server, rounds, result, f"{mode.name}, under attack")
        held = accepted(server.address[1])
        in_time = time.monotonic() - began < deadline  # else the first of them may have been ended by then
        ask(server.address, "/")
        # Seen from the server: who reads eight bytes every two seconds hears of its end when all is read that had come.
        wait_until(lambda: not accepted(server.address[1]), "the slow clients are ended", deadline + LATE_SECONDS)
        seconds = time.monotonic() - began
        result.check(
            held >= connections * 0.9 or not in_time,
            f"{mode.name}: {held} of {connections} connections when wrk was done",
        )
        result.check("service available:   NO" not in running.said, f"{mode.name}: its probe was not served")
    finally:
        running.close()
    fall = 1 - during / before if before else 1.0
    result.check(fall < fall_max, f"{mode.name}: {before:.0f} requests per second before, {during:.0f} under attack")
    result.figures |= {
        f"{mode.name}_before": round(before), f"{mode.name}_during": round(during),
        f"{mode.name}_ended_after_s": round(seconds, 1),
    }


def prove(
    io: str, *, connections: int, progress: Progress, modes: tuple[Mode, ...] = MODES, rounds: int = ROUNDS,
    deadline: int = 0, fall_max: float = FALL_MAX,
) -> Result:
    """The proof on one engine; with a `deadline` in seconds, all are that short instead of the defaults."""
    for program in ("slowhttptest", "wrk", "nice"):
        require(program)
    result = Result("slow", io)
    began = time.monotonic()
    with serving(io, workers=1, app=APP, arguments=(str(deadline),) if deadline else ()) as server:
        measure(server)  # warm
        for mode in modes:
            progress(f"slow on {io}: {mode.name}")
            try:
                attack(
                    server, mode, result, connections=connections, deadline=deadline or mode.deadline, rounds=rounds,
                    fall_max=fall_max)
            except AssertionError as error:
                result.fail(f"{mode.name}: {error}")
        result.check(alive(server.pids[0]), "the worker is dead")
        result.check(not server.death_lines, f"deaths: {server.death_lines}")
        result.check(not server.worker_lines, f"complaints: {server.worker_lines[:3]}")
        result.check(not server.program.err, f"standard error: {server.program.err[-500:]}")
    result.seconds = time.monotonic() - began
    return result
