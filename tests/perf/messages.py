"""Sends WebSocket messages that are echoed, on connections that never rest, and measures each round trip.

Arguments: port, connections, seconds, bytes of a message. Every connection has one message under way, as wrk has one
request. Frames are masked with zeros, which costs the server the same and this generator nothing; it reads no more of
an answer than its length, after the first has been compared whole.
"""

from __future__ import annotations

import gc
import json
import select
import socket
import sys
import time

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


def run(port: int, connections: int, seconds: float, size: int) -> dict[str, float]:
    """Load for `seconds`; what came of it."""
    text = b"m" * size
    message, length = header(size, 0x80) + bytes(4) + text, len(header(size, 0)) + size
    socks = [opened(port, message, header(size, 0) + text) for _ in range(connections)]
    poller = select.epoll()
    for sock in socks:
        poller.register(sock.fileno(), select.EPOLLIN)
    by_fd = {sock.fileno(): (sock.send, sock.recv_into) for sock in socks}
    clock, buffer = time.perf_counter, bytearray(2 * length)
    sent_at, missing, latencies = {}, {}, []
    began = clock()
    end = began + seconds
    for sock in socks:
        sent_at[sock.fileno()] = clock()
        sock.send(message)
    open_ones = len(socks)
    while open_ones:
        ready = poller.poll(LAST_ANSWERS_SECONDS_MAX)
        if not ready:
            break
        for fd, _event in ready:
            send, receive = by_fd[fd]
            left = missing.pop(fd, length) - receive(buffer)
            if left:
                missing[fd] = left
                continue
            now = clock()
            latencies.append(now - sent_at[fd])
            if now < end:
                sent_at[fd] = now
                send(message)
            else:
                open_ones -= 1
    took = clock() - began
    latencies.sort()
    at = lambda part: latencies[int(len(latencies) * part)] * 1e6 if latencies else 0.0  # noqa: E731
    return {"requests": len(latencies), "seconds": took, "errors": open_ones, "p50": at(0.5), "p90": at(0.9),
            "p99": at(0.99)}


if __name__ == "__main__":
    gc.disable()
    port_, connections_, seconds_, size_ = sys.argv[1:]
    print("RIG", json.dumps(run(int(port_), int(connections_), float(seconds_), int(size_))))
