"""Uploads one large body as fast as the server takes it, while another thread of this rig watches the server's memory.

Arguments: port, bytes. The body is one buffer sent again and again; the answer must be the number of its bytes.
"""

from __future__ import annotations

import json
import socket
import sys
import time

PIECE = bytes(1 << 20)


def run(port: int, size: int) -> dict[str, float]:
    """One upload; what came of it."""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(f"POST /upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {size}\r\n\r\n".encode())
        left = size
        while left:
            left -= sock.send(PIECE[: min(left, len(PIECE))])
        data = b""
        while b"\r\n\r\n" not in data or not data.endswith(str(size).encode()):
            data += sock.recv(4096) or sys.exit(f"the server closed the connection: {data[:80]!r}")
    took = time.perf_counter() - began
    return {"requests": 1, "seconds": took, "errors": 0, "p50": took * 1e6, "p90": took * 1e6, "p99": took * 1e6}


if __name__ == "__main__":
    print("RIG", json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
