"""The server under proof, and what the kernel knows of its processes: memory, descriptors, connections, states.

Nothing here asks the server itself: what it says of itself comes through its diagnostic route.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kore import reactor
from kore.errors import EngineError
from tests.endurance.report import Unavailable
from tests.support import READY, Program, alive, children, free_port, pids_of, starter, wait_until

APP = Path(__file__).with_name("app.py")

QUIET_SECONDS_MAX = 30.0
"""The server lingers for 2 s after a refusal and keeps what is idle for 10 s."""


class Server:
    """A running server. Made by `serving`, which also ends it."""

    def __init__(self, program: Program, port: int) -> None:
        self.program = program
        self.address = ("127.0.0.1", port)
        self.pids = pids_of(program)
        self.journal = program.directory / "journal"

    @property
    def worker_lines(self) -> list[str]:
        """What the workers logged. The application logs nothing, so each line is a complaint."""
        return [line for line in self.program.out.splitlines() if "proc=[wrk" in line]

    @property
    def death_lines(self) -> list[str]:
        """The parent's reports of deaths."""
        return [line for line in self.program.out.splitlines() if re.search(r"worker \d+ \(pid \d+\) ", line)]


@contextlib.contextmanager
def serving(
    io: str, *, workers: int, journal: bool = False, prefix: tuple[str, ...] = (), app: Path = APP,
    arguments: tuple[str, ...] = (),
) -> Iterator[Server]:
    """A server of `app` on engine `io`, in a directory of its own; `prefix` is a command to run it under.

    `app` gets the port, the number of workers, `arguments`, and with `journal` the file for it.

    Raises Unavailable where there is no such engine.
    """
    try:
        reactor.select_engine(io)
    except EngineError as error:
        raise Unavailable(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="kore-endurance-") as folder, starter(Path(folder)) as start:
        port = free_port()
        words = [str(app), str(port), str(workers), *arguments]
        if journal:
            words.append(str(Path(folder) / "journal"))
        # What examines a worker reads its /proc, which is not for workers that are confined.
        environment = {"KORE_IO": io, "KORE_SANDBOX": "no"}
        if prefix:
            program = start.command(*prefix, sys.executable, "-m", "kore", *words, environment=environment)
        else:
            program = start.kore(*words, environment=environment)
        program.wait_for(READY)
        yield Server(program, port)


def pss(pid: int) -> int:
    """The proportional share of anonymous memory of a process (Pss_Anon), in bytes; 0 when it is gone.

    Without that of files: every other Python that starts on the machine takes its part of those.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in text.splitlines()[1:])}
    return sizes.get("Pss_Anon", sizes.get("Pss", 0)) * 1024


def descriptors(pid: int) -> int:
    """How many fds a process has open; 0 when it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def state(pid: int) -> str:
    """The letter of a process's state, "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def accepted(port: int) -> int:
    """The connections on `port` that a process has."""
    return sum(1 for inode in connections(port).values() if inode)


def held(server: Server) -> dict[int, dict[str, int]]:
    """What each worker holds once the last connection is gone; one, on which it is asked, is among its fds.

    ``pss`` is its memory after a collection and with nothing kept back by the allocator.

    The connections of clients that left disappear by the server's own deadlines. AssertionError when they do not.
    """
    found: dict[int, dict[str, int]] = {}
    deadline = time.monotonic() + QUIET_SECONDS_MAX
    while set(found) != set(server.pids) and time.monotonic() < deadline:
        wait_until(lambda: not accepted(server.address[1]), "the last connection is closed", QUIET_SECONDS_MAX)
        said = json.loads(ask(server.address, "/diagnose?objects")[1])
        found[said["pid"]] = said | {"pss": pss(said["pid"])}
    return found


def connections(port: int) -> dict[int, int]:
    """The server's connections on `port` as the kernel has them: the client's port to the socket's inode.

    The inode is 0 as long as no process has accepted the connection.
    """
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        own, peer = (int(field.partition(":")[2], 16) for field in fields[1:3])
        if own == port and peer:
            found[peer] = int(fields[9])
    return found


def accepted_by(pid: int, port: int) -> set[int]:
    """The client ports of the connections that process `pid` has accepted and not closed."""
    inodes = set()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{entry}"))
            if match:
                inodes.add(int(match[1]))
    return {peer for peer, inode in connections(port).items() if inode in inodes}


def ask(address: tuple[str, int], path: str, seconds: float = 20.0) -> tuple[dict[str, str], bytes]:
    """One GET on a connection of its own: the response's fields and its body."""
    with socket.create_connection(address, timeout=seconds) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    if not lines[0].startswith("HTTP/1.1 200 "):
        raise AssertionError(f"GET {path}: {lines[0]!r}")
    return dict(line.lower().split(": ", 1) for line in lines[1:]), body


__all__ = [
    "APP", "Server", "accepted", "accepted_by", "alive", "ask", "children", "connections", "descriptors", "held", "pss",
    "serving", "state", "wait_until",
]  # fmt: skip
