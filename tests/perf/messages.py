"""Sends WebSocket messages that are echoed, on connections that never rest, and measures each round trip.

Arguments: port, connections, seconds, bytes of a message. Every connection has one message under way, as wrk has one
request. It stands on the streams of kore's drivers, on a ring where one can be had (KORE_IO as everywhere), since
nothing else in Python drives as many on one core. The frame is made once, and masked with zeros, which costs the server
the same and the generator nothing. Each connection's first echo is compared whole, of all others the length counts: an
answer that is longer than the question ends the run. A round trip lasts from the turn in which its message is queued
to the turn in which the end of its echo is handled, the generator's own work between the two included. `busy` is the
share of its core that it used: near 1, it was the generator that was measured.
"""

from __future__ import annotations

import gc
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]  # it is run as a file

from kore.reactor.engine import new_driver  # noqa: E402

if TYPE_CHECKING:
    from kore.driver import Driver, Stream

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
LAST_ANSWERS_SECONDS_MAX = 2.0


def header(size: int, mask: int) -> bytes:
    """The header of a whole text message (RFC 6455 5.2)."""
    if size < 126:
        return bytes((0x81, mask | size))
    return bytes((0x81, mask | 126)) + size.to_bytes(2, "big")


def opened(port: int, sent: bytes, expected: bytes) -> socket.socket:
    """A connection that has shaken hands and echoed one message rightly."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(HANDSHAKE)
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(4096) or sys.exit("the server closed the connection at the handshake")
    if not data.startswith(b"HTTP/1.1 101"):
        sys.exit(f"no handshake: {data[:80]!r}")
    sock.sendall(sent)
    data = b""
    while len(data) < len(expected):
        data += sock.recv(65536) or sys.exit("the server closed the connection at the first message")
    if data != expected:
        sys.exit(f"no echo: {data[:40]!r}")
    sock.setblocking(False)
    return sock


class Load:
    """What all connections share."""

    def __init__(self, message: bytes, length: int) -> None:
        self.message, self.length = message, length
        self.latencies: list[float] = []
        self.end = 0.0
        self.open = 0
        """Connections that wait for an echo."""
        self.wrong = ""


class Connection:
    """The owner of one stream: each echo is followed by the next message until the time is over."""

    def __init__(self, load: Load, sock: socket.socket, driver: Driver) -> None:
        self.load = load
        self.over = False
        self.received, self.begin = self._conversation()
        self.stream: Stream = driver.stream(sock.detach(), self)

    def _conversation(self) -> tuple[Callable[[bytes], None], Callable[[], None]]:
        """What is called for each piece of input, and what begins: all they need is in cells, the run is made of it."""
        load = self.load
        message, length, clock, told = load.message, load.length, time.perf_counter, load.latencies.append
        missing, sent_at, end = length, 0.0, 0.0

        def begin() -> None:
            nonlocal sent_at, end
            load.open += 1
            end, sent_at = load.end, clock()
            self.stream.write(message)

        def received(data: bytes) -> None:
            nonlocal missing, sent_at
            if len(data) != missing:
                missing -= len(data)
                if missing < 0 or not data:
                    self.fail(f"{-missing} bytes too many" if data else "the server closed a connection")
                return
            missing = length
            now = clock()
            told(now - sent_at)
            if now < end:
                sent_at = now
                self.stream.write(message)
            else:
                self.over = True
                load.open -= 1

        return received, begin

    def fail(self, what: str) -> None:
        """This connection is of no use any more; what the run says in the end."""
        self.load.wrong = self.load.wrong or what
        if not self.over:
            self.over = True
            self.load.open -= 1

    def stalled(self) -> None:
        """See kore.driver.StreamOwner: one message under way fits into any buffer."""

    def drained(self) -> None:
        """See kore.driver.StreamOwner."""

    def lost(self, error: int) -> None:
        """See kore.driver.StreamOwner."""
        self.fail(f"a connection was lost (errno {error})")


def run(port: int, connections: int, seconds: float, size: int) -> dict[str, float]:
    """Load for `seconds`; what came of it. SystemExit says what was wrong with an answer."""
    text = b"m" * size
    message, echo = header(size, 0x80) + bytes(4) + text, header(size, 0) + text
    load = Load(message, len(echo))
    driver = new_driver()
    try:
        owners = [Connection(load, opened(port, message, echo), driver) for _ in range(connections)]
        clock = time.perf_counter
        began, cpu = clock(), time.process_time()
        load.end = began + seconds
        for owner in owners:
            owner.begin()
        last = load.end + LAST_ANSWERS_SECONDS_MAX
        while load.open and not load.wrong and (left := last - clock()) > 0:
            driver.wait(left)
        took, busy = clock() - began, time.process_time() - cpu
        if load.wrong:
            sys.exit(load.wrong)
    finally:
        driver.close()
    latencies = sorted(load.latencies)
    at = lambda part: latencies[int(len(latencies) * part)] * 1e6 if latencies else 0.0  # noqa: E731
    return {"requests": len(latencies), "seconds": took, "errors": load.open, "p50": at(0.5), "p90": at(0.9),
            "p99": at(0.99), "busy": busy / took}


if __name__ == "__main__":
    gc.disable()
    port_, connections_, seconds_, size_ = sys.argv[1:]
    print("RIG", json.dumps(run(int(port_), int(connections_), float(seconds_), int(size_))))
