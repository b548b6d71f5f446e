"""Sends requests at a fixed rate and measures how long each answer takes, from when its request was due.

Arguments: port, path, connections, seconds, rate. wrk can't do this: its delay() counts in whole milliseconds, so that
tens of thousands of requests a second would come in bursts, and the bursts be measured. Here they are due at even
distances; one that finds no free connection waits and its wait counts (no coordinated omission). The process spins on
its own core instead of sleeping, for a sleep ends too late. `late` is the 99th percentile of its own lateness in
microseconds: what the generator itself adds, to be read beside the latency.
"""

from __future__ import annotations

import gc
import json
import select
import socket
import sys
import time
from collections import deque

LATE_SECONDS_MAX = 2.0  # when the server can't keep up: stop waiting for answers this long after the end


def percentile(values: list[float], part: float) -> float:
    """The value below which `part` of the sorted values lie."""
    return values[min(len(values) - 1, int(len(values) * part))] if values else 0.0


def answer_length(sock: socket.socket) -> int:
    """Read one answer; its length, head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536) or sys.exit("the server closed the connection")
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        sys.exit(f"no good answer: {head[:60]!r}")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
    length = int(fields[b"content-length"])
    while len(body) < length:
        body += sock.recv(65536) or sys.exit("the server closed the connection")
    return len(head) + 4 + length


class Generator:
    """Connections, and when the request on each of them was due."""

    def __init__(self, port: int, path: str, connections: int) -> None:
        self.request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        self.poller = select.epoll()
        self.free: deque[tuple[int, socket.socket]] = deque()
        self.sockets: dict[int, socket.socket] = {}
        for _ in range(connections):
            sock = socket.create_connection(("127.0.0.1", port), timeout=5)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sockets[sock.fileno()] = sock
            sock.sendall(self.request)
            self.length = answer_length(sock)  # the same for each that follows
            sock.setblocking(False)
            self.poller.register(sock.fileno(), select.EPOLLIN)
            self.free.append((sock.fileno(), sock))
        self.latencies: list[float] = []
        self.lateness: list[float] = []
        self.errors = 0

    def run(self, seconds: float, rate: float) -> float:
        """Send for `seconds`; the time until the last answer."""
        clock, distance = time.perf_counter, 1 / rate
        free, poll, request, sockets = self.free, self.poller.poll, self.request, self.sockets
        receive = {fd: sock.recv_into for fd, sock in sockets.items()}
        # A buffer that stays: to allocate a large one for each answer cost more than the system call.
        buffer, length, answered, late = bytearray(2 * self.length), self.length, self.latencies, self.lateness
        due_of: dict[int, float] = {}
        missing: dict[int, int] = {}  # of an answer that comes in pieces
        began = clock()
        due, end = began, began + seconds
        starving, available = False, began  # waiting for a free connection is the server's lateness, not ours
        while True:
            now = clock()
            if now >= end and (not due_of or now > end + LATE_SECONDS_MAX):
                break
            # A few at a time: answers are looked for in between even when there is a backlog.
            budget = 8
            while due <= now and due < end and free and budget:
                budget -= 1
                fd, sock = free.popleft()
                late.append(max(0.0, now - max(due, available)))
                sock.send(request)
                due_of[fd] = due
                due += distance
            starving = starving or (due <= now and due < end and not free)
            for fd, _event in poll(0):
                got = receive[fd](buffer)
                if got != length:
                    left = missing.pop(fd, length) - got
                    if got and left > 0:
                        missing[fd] = left
                        continue
                    if left:
                        self.errors += 1
                        self.poller.unregister(fd)
                        due_of.pop(fd, None)
                        continue
                arrived = clock()
                answered.append(arrived - due_of.pop(fd))
                free.append((fd, sockets[fd]))
                if starving:
                    starving, available = False, arrived
            if not free and not due_of:
                break
        self.errors += len(due_of)
        return clock() - began


def main() -> int:
    """Run and print one line of JSON."""
    port, path, connections, seconds, rate = sys.argv[1:6]
    generator = Generator(int(port), path, int(connections))
    gc.disable()
    took = generator.run(float(seconds), float(rate))
    latencies, lateness = sorted(generator.latencies), sorted(generator.lateness)
    print("RIG " + json.dumps({
        "requests": len(latencies), "seconds": took, "errors": generator.errors,
        **{f"p{part}": round(percentile(latencies, part / 100) * 1e6) for part in (50, 90, 99)},
        "late": round(percentile(lateness, 0.99) * 1e6),
    }), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
