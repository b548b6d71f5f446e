"""The rig's generator of WebSocket messages against small servers: it counts echoes, and takes nothing else for one."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import SECONDS, skip_unless

CONNECTIONS, SIZE = 3, 200  # above 125 the header has four bytes
QUESTION, ECHO = 4 + 4 + SIZE, b"\x81\x7e" + SIZE.to_bytes(2, "big") + b"m" * SIZE
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"


@contextlib.contextmanager
def server(answer: Callable[[int], list[bytes]]) -> Iterator[tuple[int, list[int]]]:
    """Its port, and how many messages came on each connection. `answer(n)`: what goes back for the n-th, in pieces."""
    counts: list[int] = []
    threads: list[threading.Thread] = []

    def converse(sock: socket.socket, number: int) -> None:
        with sock, contextlib.suppress(ConnectionError):
            file = sock.makefile("rb")
            while file.readline().strip():
                pass
            sock.sendall(SWITCHED)
            while len(file.read(QUESTION)) == QUESTION:
                counts[number] += 1
                pieces = answer(counts[number])
                if not pieces:
                    return
                for piece in pieces:
                    sock.sendall(piece)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                counts.append(0)
                threads.append(threading.Thread(target=converse, args=(sock, len(counts) - 1)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()[1], counts
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join(SECONDS)
            for thread in threads:
                thread.join(SECONDS)


@pytest.fixture(params=["uring", "epoll"])
def generate(request, monkeypatch):
    """Runs the generator on an engine."""
    skip_unless(request.param)
    monkeypatch.setenv("KORE_IO", request.param)
    script = Path(__file__).with_name("perf") / "messages.py"

    def run(port: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(port), str(CONNECTIONS), "0.2", str(SIZE)]
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)

    return run


@pytest.mark.parametrize("pieces", [[ECHO], [ECHO[:1], ECHO[1:]]], ids=["whole", "in pieces"])
def test_every_echo_counts_once(generate, pieces) -> None:
    """As many as the server answered, but for the first of each connection, which is compared and not measured."""
    with server(lambda _: pieces) as (port, counts):
        done = generate(port)
    found = json.loads(done.stdout.removeprefix("RIG "))
    assert len(counts) == CONNECTIONS
    assert found["requests"] == sum(counts) - CONNECTIONS > 0
    assert found["errors"] == 0
    assert 0 < found["p50"] <= found["p90"] <= found["p99"]
    assert 0 < found["busy"] <= 1.1  # two clocks


@pytest.mark.parametrize(("answer", "reason"), [
    (lambda n: [ECHO[:-1] + b"x"], "no echo"),
    (lambda n: [ECHO if n < 5 else ECHO + b"x"], "1 bytes too many"),
    (lambda n: [ECHO] if n < 5 else [], "the server closed a connection"),
], ids=["wrong", "longer", "closed"])
def test_what_is_no_echo_ends_the_run(generate, answer, reason) -> None:
    """Nothing is measured then."""
    with server(answer) as (port, _):
        done = generate(port)
    assert (done.returncode, done.stdout) == (1, "")
    assert reason in done.stderr


def test_an_echo_that_never_comes_is_an_error(generate) -> None:
    """The others count."""
    with server(lambda n: [ECHO] if n < 5 else [ECHO[:-1]]) as (port, counts):
        done = generate(port)
    found = json.loads(done.stdout.removeprefix("RIG "))
    assert found["errors"] == CONNECTIONS
    assert found["requests"] == sum(counts) - 2 * CONNECTIONS
