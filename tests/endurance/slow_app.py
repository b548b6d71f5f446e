"""The application of the proof on slow clients: a short answer for honest ones, a large one and uploads for the others.

Arguments: the port, and how many seconds a deadline has (not given: the defaults, which the proof is about).
"""

from __future__ import annotations

from typing import Any

import kore

LARGE_BYTES = 8 << 20
"""More than the kernel takes of one connection (tcp_wmem), so that who reads slowly keeps the server waiting."""

LARGE = b"0123456789abcdef" * (LARGE_BYTES // 16)


class Slow:
    """The application object."""

    def configure(self, args: list[str]) -> None:
        kore.config.workers = int(args[2])
        kore.config.worker_max_connections = 2000  # more than the attack, or it would be one on that
        kore.config.worker_rlimit_nofiles = 4000
        if len(args) > 3:
            kore.config.http_header_timeout = kore.config.http_body_timeout = kore.config.http_write_timeout = args[3]
        kore.server("plain", ip="127.0.0.1", port=args[1], tls=False)
        home = kore.domain("*", attach="plain")
        home.route("/", self.hello, methods=["get"])
        home.route("/large", self.large, methods=["get"])
        home.route("/upload", self.hello, methods=["post"])

    def hello(self, req: Any) -> None:
        """What honest clients ask for."""
        req.response(200, b"hello")

    def large(self, req: Any) -> None:
        """What those read who take their time."""
        req.response(200, LARGE)


koreapp = Slow()
