"""Opens many connections, makes one request on each, and holds them until its standard input ends.

Arguments: port, how many. Prints how many answered and stay open.
"""

from __future__ import annotations

import socket
import sys

REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
AT_ONCE = 256  # opened and answered before the next ones, so that no listen queue overflows


def main() -> int:
    """Open, ask, hold."""
    port, wanted = int(sys.argv[1]), int(sys.argv[2])
    held: list[socket.socket] = []
    try:
        while len(held) < wanted:
            count = min(AT_ONCE, wanted - len(held))
            batch = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(count)]
            for sock in batch:
                sock.sendall(REQUEST)
            held += [sock for sock in batch if sock.recv(65536).startswith(b"HTTP/1.1 200")]
            if len(held) % AT_ONCE and len(held) < wanted:
                break  # some were refused: what is there is what is there
    except OSError as error:
        print(error, file=sys.stderr)
    print(len(held), flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
