"""The application that scanners of TLS look at. Arguments: port, workers, folder, tls_version, names of pairs.

It sends what scanners of web pages want of an application, so that what is left to say is about the server.
"""

from __future__ import annotations

from typing import Any

import kore


class Scanned:
    """The application object."""

    def configure(self, args: list[str]) -> None:
        folder, pairs = args[3], args[5:]
        kore.config.workers = int(args[2])
        kore.config.deployment = "dev"
        kore.config.tls_version = args[4]
        kore.server("tls", ip="127.0.0.1", port=args[1])
        home = kore.domain(
            "localhost", attach="tls", cert=tuple(f"{folder}/{name}.pem" for name in pairs),
            key=tuple(f"{folder}/{name}.key" for name in pairs))
        home.route("/", self.hello, methods=["get", "head"])

    def hello(self, req: Any) -> None:
        """The one page."""
        req.response_header("x-frame-options", "DENY")
        req.response_header("x-content-type-options", "nosniff")
        req.response_header("content-security-policy", "default-src 'self'")
        req.response(200, b"hello world")


koreapp = Scanned()
