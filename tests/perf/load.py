"""Load on a server: wrk with a Lua script for each shape of request, and what one measurement yields.

wrk keeps a fixed number of connections busy and so finds the full load. It runs on the core that is not the server's.
Its own report goes through `done` of the script as one line of JSON, since the figures it prints are rounded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.perf.servers import Server, pinned

PIPELINED = 16
MESSAGE_BYTES = 125
HANDSHAKES_AT_ONCE = 16
UPLOAD_BYTES = 1 << 30

DONE = """
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('RIG {"requests": %d, "seconds": %.6f, "p50": %d, "p90": %d, "p99": %d, "errors": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(90), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""

# Shapes of request. `plain` leaves wrk's own request, which is made once.
SCRIPTS = {
    "plain": "",
    "pipelined": """
local batch
function init(args)
  local one = {}
  for i = 1, %d do one[i] = wrk.format() end
  batch = table.concat(one)
end
function request() return batch end
""" % PIPELINED,
    # Three fields whose values never come again, of the kind that differ in real traffic.
    "headers": """
local before, n = nil, 0
function init(args)
  before = "GET " .. wrk.path .. " HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nUser-Agent: rig\\r\\nAccept: */*\\r\\n"
end
function request()
  n = n + 1
  return string.format(
    "%sX-Request-Id: %08x-%06x\\r\\nCookie: session=%x; seen=%d\\r\\nX-Forwarded-For: 10.%d.%d.%d\\r\\n\\r\\n", before,
    n * 2654435761 % 4294967296, n, n * 40503, n, n % 251, n % 241, n % 239)
end
""",
    # The same number and size of fields, the same in each request: what differs between the two is only the values.
    "same-headers": """
local one
function init(args)
  one = "GET " .. wrk.path .. " HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nUser-Agent: rig\\r\\nAccept: */*\\r\\n" ..
    "X-Request-Id: 12345678-123456\\r\\nCookie: session=123456789; seen=123456\\r\\n" ..
    "X-Forwarded-For: 10.100.100.100\\r\\n\\r\\n"
end
function request() return one end
""",
}


@dataclass(frozen=True)
class Measurement:
    """What one run of load on one server gave. Latencies in microseconds, CPU in microseconds per request."""

    requests: int
    seconds: float
    errors: int
    p50: float
    p90: float
    p99: float
    cpu_user: float
    cpu_system: float
    extra: dict[str, float]

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def cpu(self) -> float:
        """Microseconds of CPU per request, user and system."""
        return self.cpu_user + self.cpu_system

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "rate": self.rate, "cpu": self.cpu}


class LoadFailure(Exception):
    """The load generator did not do its work; the text says why."""


def measured(server: Server, command: list[str], core: int, mark: str, **extra: float) -> Measurement:
    """Run a load generator that prints one line of JSON after `mark`, and take the server's CPU time around it."""
    before = server.cpu()
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, preexec_fn=pinned(core))
    after = server.cpu()
    line = next((line for line in done.stdout.splitlines() if line.startswith(mark)), None)
    if line is None:
        raise LoadFailure(f"{command[0]}: {(done.stderr or done.stdout).strip()[-200:]}")
    result = json.loads(line[len(mark):])
    requests = max(result["requests"], 1)
    own = ("requests", "seconds", "errors", "p50", "p90", "p99")
    return Measurement(
        **{name: result[name] for name in own},
        cpu_user=(after.user - before.user) / requests * 1e6,
        cpu_system=(after.system - before.system) / requests * 1e6,
        extra=extra | {name: value for name, value in result.items() if name not in own},
    )


def full(server: Server, core: int, *, path: str, connections: int, seconds: int, script: str) -> Measurement:
    """As many requests as the server answers: wrk, `connections` connections that never rest."""
    with tempfile.TemporaryDirectory(prefix="kore-rig-") as folder:
        lua = Path(folder, "load.lua")
        lua.write_text(SCRIPTS[script] + DONE)
        command = [
            "wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s", "--timeout", "5s",
            "--script", str(lua), f"{'https' if server.tls else 'http'}://127.0.0.1:{server.port}{path}",
        ]
        return measured(server, command, core, "RIG ")


def paced(server: Server, core: int, *, path: str, connections: int, seconds: float, rate: float) -> Measurement:
    """A fixed rate of requests, whatever the answers: paced.py says how and why."""
    command = [
        sys.executable, str(Path(__file__).with_name("paced.py")),
        str(server.port), path, str(connections), str(seconds), str(rate),
    ]
    return measured(server, command, core, "RIG ", rate_asked=rate)


def messages(server: Server, core: int, *, connections: int, seconds: int) -> Measurement:
    """WebSocket echoes: messages.py says how."""
    script = str(Path(__file__).with_name("messages.py"))
    command = [sys.executable, script, str(server.port), str(connections), str(seconds), str(MESSAGE_BYTES)]
    return measured(server, command, core, "RIG ")


def handshakes(server: Server, core: int, *, seconds: int, mode: str) -> Measurement:
    """New connections over TLS, `full` or `resumed`: handshakes.py says how."""
    script = str(Path(__file__).with_name("handshakes.py"))
    command = [sys.executable, script, str(server.port), str(seconds), str(HANDSHAKES_AT_ONCE), mode]
    return measured(server, command, core, "RIG ")


def upload(server: Server, core: int) -> Measurement:
    """One large body, and by how much the server's memory was larger meanwhile than before, in bytes."""
    before = server.memory()
    peak = [before]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], server.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        command = [sys.executable, str(Path(__file__).with_name("upload.py")), str(server.port), str(UPLOAD_BYTES)]
        one = measured(server, command, core, "RIG ")
    finally:
        over.set()
        watcher.join()
    one.extra["upload_growth"] = peak[0] - before
    return one


class IdleConnections:
    """Connections that have made one request and then only stay open, held by a process of their own."""

    def __init__(self, server: Server, core: int, count: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("idle.py")), str(server.port), str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=pinned(core), env=os.environ.copy(),
        )

    def wait(self) -> int:
        """How many are open, once all are or no more can be had."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise LoadFailure("the opener of idle connections ended")
        return int(line)

    def close(self) -> None:
        """Close them all."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
