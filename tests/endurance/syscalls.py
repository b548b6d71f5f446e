"""Proof: on epoll no io_uring call is ever made, and on io_uring fewer of them than requests under load.

strace watches the whole life of the server, all its processes from the first instruction to the exit. It slows the
server down, which makes for larger batches; so the turns of a worker are counted a second time without it.
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
from tests.endurance.server import Server, ask, children, serving
from tests.endurance.traffic import load

CALLS = ("io_uring_setup", "io_uring_enter", "io_uring_register")
CONNECTIONS = 64
WRK_SECONDS = 1


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
    """The turns of the one worker's ring so far, as it counts them itself."""
    count: int = json.loads(ask(server.address, "/diagnose")[1])["enters"]
    return count


def count_undisturbed(result: Result) -> None:
    """Full load without strace, by wrk since nothing in Python keeps a worker busy; the worker counts."""
    wrk = shutil.which("wrk")
    if wrk is None:
        result.figures["undisturbed"] = "not counted: wrk is not installed"
        return
    with serving("uring", workers=1) as server:
        before = enters(server)
        url = "http://{}:{}/".format(*server.address)
        command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{WRK_SECONDS}s", url]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        made = enters(server) - before
    found = re.search(r"(\d+) requests in", said)
    requests = int(found[1]) if found else 0
    result.check(found and "Non-2xx" not in said and "Socket errors" not in said, f"wrk says {said!r}")
    result.figures |= {
        "undisturbed_requests": requests, "undisturbed_enters": made,
        "undisturbed_enters_per_request": round(made / max(requests, 1), 3),
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
        count_undisturbed(result)
    result.seconds = time.monotonic() - began
    return result
