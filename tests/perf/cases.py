"""The cases of the rig as data: what is measured on whom, and which ratios are aimed at.

An entry is one thing measured in each round; the entries of a case follow each other A B C A B C, so that what drifts
on the machine falls on all of them alike, and each ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

from dataclasses import dataclass

KORE = ("kore-uring", "kore-epoll")
SANDBOXED = tuple(f"kore-sandbox-{name.removeprefix('kore-')}" for name in KORE)
PEERS = ("nginx", "fastwsgi", "socketify", "granian", "uvicorn")  # those that answer every HTTP case
BUSY = 64  # connections, where the case is not about their number
IDLE_CONNECTIONS = 10_000
LATE_US_MAX = 250  # a generator that was itself later than this at its p99 measured a busy machine, not the server


@dataclass(frozen=True)
class Entry:
    """One load on one server."""

    label: str
    server: str
    path: str = "/"
    connections: int = BUSY
    script: str = "plain"
    """The shape of request (load.py), or another generator: messages, full or resumed handshakes."""


@dataclass(frozen=True)
class Case:
    """`how` names the way it is run: full, paced, idle, startup or upload.

    In a short run only `short` take part, and the minima do not count.
    """

    name: str
    title: str
    entries: tuple[Entry, ...]
    how: str = "full"
    short: tuple[str, ...] = ("kore-uring", "nginx")
    rounds_min: int = 1
    rounds_max: int = 100
    seconds_min: int = 1
    needs_database: bool = False


@dataclass(frozen=True)
class Target:
    """`ours` by `theirs` in a case should be at least `least`, and `aim` if it can be; `figure` says what of them."""

    name: str
    case: str
    ours: str
    theirs: str
    least: float | None
    aim: float | None
    figure: str = "ratio"


def on_all(path: str = "/", connections: int = BUSY, script: str = "plain") -> tuple[Entry, ...]:
    """The same load on every server."""
    return tuple(Entry(name, name, path, connections, script) for name in KORE + PEERS)


def on_files(path: str) -> tuple[Entry, ...]:
    """The same file from every server that serves files by itself."""
    return tuple(Entry(name, name, path) for name in (*KORE, "nginx"))


def on_tls(key: str, path: str = "/", script: str = "plain") -> tuple[Entry, ...]:
    """The same load on kore and on nginx with a key of one kind."""
    return tuple(Entry(f"{name}{engine}", f"{name}-{key}{engine}", path, script=script)
                 for name, engine in (("kore", "-uring"), ("kore", "-epoll"), ("nginx", "")))


def in_and_out(path: str = "/") -> tuple[Entry, ...]:
    """The same load on kore without its sandbox, as in all other cases, and as in production."""
    return tuple(
        entry for free, sandboxed in zip(KORE, SANDBOXED, strict=True)
        for entry in (Entry(free, free, path), Entry(f"{free} sandboxed", sandboxed, path)))


CASES = (
    Case("plain", "11-byte response, synchronous handler, 64 connections", on_all(),
         short=("kore-uring", "kore-epoll", "nginx", "fastwsgi", "granian", "uvicorn")),
    Case("async", "11-byte response, async handler that does not suspend", (
        Entry("kore-uring sync", "kore-uring"), Entry("kore-uring", "kore-uring", "/async"),
        Entry("kore-epoll", "kore-epoll", "/async"),
        Entry("granian", "granian", "/async"), Entry("uvicorn", "uvicorn", "/async")), short=("kore-uring",)),
    Case("headers", "three header fields whose values differ in every request", (
        Entry("kore-uring plain", "kore-uring"),
        Entry("kore-uring same", "kore-uring", script="same-headers"),
        *on_all(script="headers"))),
    Case("pipelined", "16 pipelined requests", (Entry("kore-uring plain", "kore-uring"), *on_all(script="pipelined"))),
    Case("protocol", "asyncio protocol on each loop, a fixed answer to each read", (
        Entry("kore-uring", "kore-protocol-uring"), Entry("kore-epoll", "kore-protocol-epoll"),
        Entry("uvloop", "uvloop-protocol"), Entry("selector", "selector-protocol")),
        short=("kore-protocol-uring", "uvloop-protocol")),
    Case("streams", "asyncio streams on each loop, a fixed answer to each read", (
        Entry("kore-uring", "kore-streams-uring"), Entry("kore-epoll", "kore-streams-epoll"),
        Entry("uvloop", "uvloop-streams"), Entry("selector", "selector-streams")),
        short=("kore-streams-uring", "uvloop-streams")),
    Case("paced", "latency at half of each server's own full load, 64 connections", on_all(), how="paced",
         rounds_min=15, seconds_min=2),  # a tail scatters more than a mean
    Case("idle", "10,000 idle connections beside 64 busy ones", on_all(), how="idle", rounds_max=3),
    Case("startup", "from the command to the first response", (
        *on_all(), Entry("kore-uring sandboxed", "kore-sandbox-uring")), how="startup",
         short=("kore-uring", "kore-epoll", "kore-sandbox-uring", "nginx", "granian", "uvicorn")),
    Case("one", "11-byte response, 1 connection", on_all(connections=1)),
    Case("many", "11-byte response, 1024 connections", on_all(connections=1024)),
    Case("1k", "1 KiB response", on_all("/1k")),
    Case("64k", "64 KiB response (nginx: a file, by sendfile)", on_all("/64k")),
    Case("file1k", "1 KiB static file", on_files("/files/1k")),
    Case("file64k", "64 KiB static file (nginx: sendfile)", on_files("/files/64k")),
    Case("messages", "echo of 125-byte WebSocket messages, 64 connections", tuple(
        Entry(name, name, "/ws", script="messages")
        for name in (*KORE, "websockets", "websockets-uvloop", "socketify")),
        short=("kore-uring", "websockets")),
    Case("query", "SELECT 1 for each request, 64 connections, 10 to the database, which shares the generator's core", (
        Entry("kore-uring", "kore-clients-uring", "/query"), Entry("kore-epoll", "kore-clients-epoll", "/query"),
        Entry("uvloop", "uvloop-query")), short=(), needs_database=True),
    Case("proc", "/bin/true for each request, 4 connections", (
        Entry("kore-uring", "kore-clients-uring", "/proc", 4), Entry("kore-epoll", "kore-clients-epoll", "/proc", 4),
        Entry("uvloop", "uvloop-proc", "/", 4)), short=()),
    Case("fastapi", "FastAPI, 11 bytes of text, 64 connections", (
        Entry("kore-uring", "kore-fastapi-uring"), Entry("kore-epoll", "kore-fastapi-epoll"),
        Entry("uvicorn", "uvicorn-fastapi")), short=("kore-fastapi-uring", "uvicorn-fastapi")),
    Case("sandboxfile", "1 KiB static file, in production's sandbox and without", in_and_out("/files/1k"), short=()),
    Case("tls", "11-byte response over TLS 1.3, P-256 certificate, 64 connections", (
        *on_tls("ec"), Entry("uvicorn", "uvicorn-ec")), short=("kore-ec-uring", "nginx-ec", "uvicorn-ec")),
    Case("tls1m", "1 MiB response over TLS (nginx: a file, as in kore's last row)", (
        *on_tls("ec", "/1m"), Entry("kore-uring file", "kore-ec-uring", "/files/1m")), short=()),
    Case("handshakes", "full handshakes, P-256: new connections with one request", on_tls("ec", script="full"),
         short=("kore-ec-uring", "nginx-ec")),
    Case("rsa", "full handshakes, RSA 2048: new connections with one request", on_tls("rsa", script="full"), short=()),
    Case("resumed", "resumed handshakes, P-256: new connections with one request", on_tls("ec", script="resumed"),
         short=()),
    # Last of those in a short run, which ends after its time.
    Case("sandbox", "11-byte response, in production's sandbox and without", in_and_out(),
         short=("kore-uring", "kore-sandbox-uring")),
    Case("upload", "an upload of 1 GiB, to disk", tuple(Entry(name, name, "/upload") for name in KORE), how="upload",
         short=(), rounds_max=1),
)

TARGETS = (
    Target("plain, by fastwsgi", "plain", "kore-uring", "fastwsgi", 1.0, None),
    Target("plain, by granian (RSGI)", "plain", "kore-uring", "granian", 2.0, None),
    Target("plain, by uvicorn", "plain", "kore-uring", "uvicorn", 2.0, None),
    Target("plain, by nginx `return 200`", "plain", "kore-uring", "nginx", None, 1.0),
    Target("async handler, by the sync one", "async", "kore-uring", "kore-uring sync", 0.9, 0.97),
    Target("differing headers, by plain", "headers", "kore-uring", "kore-uring plain", 0.85, 0.95),
    Target("differing headers, by the same fields unchanged", "headers", "kore-uring", "kore-uring same", None, None),
    Target("epoll, by uring", "plain", "kore-epoll", "kore-uring", 0.7, 0.8),
    Target("16 pipelined, by plain", "pipelined", "kore-uring", "kore-uring plain", 2.5, 4.0),
    Target("asyncio protocol, by uvloop", "protocol", "kore-uring", "uvloop", 0.85, 1.0),
    Target("asyncio protocol on epoll, by uvloop", "protocol", "kore-epoll", "uvloop", None, None),
    Target("asyncio streams, by uvloop", "streams", "kore-uring", "uvloop", 0.95, 1.1),
    Target("asyncio streams on epoll, by uvloop", "streams", "kore-epoll", "uvloop", None, None),
    Target("1 KiB static file, by nginx", "file1k", "kore-uring", "nginx", 0.8, None),
    Target("64 KiB static file, by nginx with sendfile", "file64k", "kore-uring", "nginx", 0.9, 1.1),
    Target("WebSocket echo, by websockets", "messages", "kore-uring", "websockets", 3.0, None),
    Target("WebSocket echo, by websockets on uvloop", "messages", "kore-uring", "websockets-uvloop", None, 3.0),
    Target("WebSocket echo, by socketify", "messages", "kore-uring", "socketify", None, 1.0),
    Target("SELECT 1, by asyncpg on uvloop without HTTP", "query", "kore-uring", "uvloop", 1.0, 1.3),
    Target("children, by uvloop without HTTP", "proc", "kore-uring", "uvloop", 1.0, None),
    Target("FastAPI, by uvicorn", "fastapi", "kore-uring", "uvicorn", 1.1, None),
    Target("TLS keep-alive, by uvicorn with TLS", "tls", "kore-uring", "uvicorn", 2.0, None),
    Target("TLS keep-alive, by nginx with TLS", "tls", "kore-uring", "nginx", None, 1.0),
    Target("full handshakes P-256, by nginx with the key inside", "handshakes", "kore-uring", "nginx", 0.8, None),
    Target("full handshakes RSA 2048, by nginx with the key inside", "rsa", "kore-uring", "nginx", 0.8, None),
    Target("resumed handshakes, by nginx", "resumed", "kore-uring", "nginx", 0.9, None),
    Target("1 MiB over TLS, by nginx", "tls1m", "kore-uring", "nginx", 0.9, None),
    *(Target(f"{what} in the sandbox on {engine}, by without", case, f"kore-{engine} sandboxed", f"kore-{engine}",
             0.95, None)
      for what, case in (("plain", "sandbox"), ("1 KiB file", "sandboxfile")) for engine in ("uring", "epoll")),
    Target("1 GiB uploaded: bytes of memory more", "upload", "kore-uring", "", 4 << 20, None, "upload_growth"),
    Target("10,000 idle: bytes each in the worker", "idle", "kore-uring", "", 4096, 2048, "idle_bytes"),
    Target("10,000 idle: throughput on 64 others, by before", "idle", "kore-uring", "", 0.9, None, "idle_rate"),
    Target("p99 at half load: µs above nginx", "paced", "kore-uring", "nginx", 100, 0, "p99_above"),
    Target("first response, seconds", "startup", "kore-uring", "", 0.4, 0.2, "start_seconds"),
    Target("first response with the sandbox, seconds", "startup", "kore-uring sandboxed", "", 0.4, 0.2,
           "start_seconds"),
)

LESS_IS_BETTER = {"idle_bytes", "p99_above", "start_seconds", "upload_growth"}
