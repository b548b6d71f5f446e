"""Proof: on epoll no io_uring call is ever made, and on io_uring fewer of them than requests under load.

strace watches the whole life of the server, all its processes from the first instruction to the exit. It slows the
server down, which makes for larger batches; so the workers' turns are counted a second time without it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.endurance.report import Progress, Result, Unavailable
from tests.endurance.server import Server, ask, children, serving, wait_until
from tests.endurance.traffic import load

CALLS = ("io_uring_setup", "io_uring_enter", "io_uring_register")
CONNECTIONS = 64


def require_strace() -> str:
    """The path of strace. Raises Unavailable, with what it says, where processes can't be traced."""
    program = shutil.which("strace")
    if program is None:
        raise Unavailable("strace is not installed")
    command = [program, "-f", "-e", "trace=none", sys.executable, "-c", ""]
    tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode:
        raise Unavailable(f"ptrace: {tried.stderr.strip()[-200:]}")
    return program


def counted(text: str) -> dict[str, int]:
    """How often each call stands in a trace; a call that was interrupted by another thread's line counts once."""
    return {name: len(re.findall(rf"^\d+ +{name}\(", text, re.MULTILINE)) for name in CALLS}


def run_load(server: Server, requests: int) -> float:
    """The load; how many seconds it took."""
    began = time.monotonic()
    asyncio.run(asyncio.wait_for(load(server.address, requests, CONNECTIONS), 120 + requests / 500))
    return time.monotonic() - began


def trace(io: str, requests: int, result: Result) -> None:
    """One whole life under strace."""
    program = require_strace()
    with tempfile.TemporaryDirectory(prefix="kore-strace-") as folder:
        file = Path(folder) / "trace"
        options = ("-f", "-qq", "-e", "signal=none", "-e", f"trace={','.join(CALLS)}", "-o", str(file))
        with serving(io, workers=2, prefix=(program, *options)) as server:
            (parent,) = children(server.program.pid)
            before = file.stat().st_size
            seconds = run_load(server, requests)
            after = file.stat().st_size
            os.kill(parent, signal.SIGTERM)
            code = server.program.wait()
        text = file.read_text()
    result.check(code == 0, f"exit code {code}")
    under_load, whole = counted(text[before:after]), counted(text)
    result.figures |= {
        "requests": requests, "traced_seconds": round(seconds, 1),
        **{f"{name}_in_its_life": whole[name] for name in CALLS},
        "io_uring_enter_under_load": under_load["io_uring_enter"],
    }
    if io == "epoll":
        result.check(not text, f"io_uring is used: {text[:300]!r}")
        return
    result.check(whole["io_uring_setup"] >= 2, f"two workers, and {whole['io_uring_setup']} rings: the trace is blind")
    result.check(
        0 < under_load["io_uring_enter"] < requests,
        f"{under_load['io_uring_enter']} calls of io_uring_enter for {requests} requests",
    )


def enters(server: Server) -> int:
    """The turns of both workers' rings so far, as they count them themselves."""
    found: dict[int, int] = {}

    def both() -> bool:
        said = json.loads(ask(server.address, "/diagnose")[1])
        found[said["pid"]] = said["enters"]
        return len(found) == len(server.pids)

    wait_until(both, "both workers answer")
    return sum(found.values())


def count_undisturbed(requests: int, result: Result) -> None:
    """The same load without strace; the workers count."""
    with serving("uring", workers=2) as server:
        before = enters(server)
        seconds = run_load(server, requests)
        made = enters(server) - before
    result.figures |= {
        "undisturbed_seconds": round(seconds, 1), "undisturbed_enters": made,
        "undisturbed_enters_per_request": round(made / requests, 3),
    }
    result.check(0 < made < requests, f"undisturbed, {made} turns for {requests} requests")


def prove(io: str, *, requests: int, progress: Progress) -> Result:
    """The proof for one engine."""
    result = Result("syscalls", io)
    began = time.monotonic()
    progress(f"syscalls on {io}: under strace")
    trace(io, requests, result)
    if io == "uring":
        progress(f"syscalls on {io}: without strace")
        count_undisturbed(requests, result)
    result.seconds = time.monotonic() - began
    return result
