"""The application of the proof on broadcasts: it passes on what it is told to, to whom it is told.

Arguments: the port and the number of workers.
"""

from __future__ import annotations

import os
from typing import Any

import kore


class Broadcasts:
    """The application object."""

    def configure(self, args: list[str]) -> None:
        kore.config.workers = int(args[2])
        kore.config.worker_set_affinity = 0  # the clients want their share of two cores
        kore.config.worker_max_connections = 4000  # all of them, should one worker get all
        kore.config.worker_rlimit_nofiles = 5000
        kore.server("plain", ip="127.0.0.1", port=args[1], tls=False)
        home = kore.domain("*", attach="plain")
        home.route("/", self.join, methods=["get"])

    def join(self, req: Any) -> None:
        """Tell the client which process serves it, then listen to it."""
        req.websocket_handshake(welcome, spread, None)


def welcome(c: Any) -> None:
    """The first message: this process."""
    c.websocket_send(kore.WEBSOCKET_OP_TEXT, str(os.getpid()))


def spread(c: Any, op: int, data: str | bytes) -> None:
    """The first character says to whom: L to this worker's clients, anything else to all."""
    local = data[:1] in ("L", b"L")
    scope = kore.WEBSOCKET_BROADCAST_LOCAL if local else kore.WEBSOCKET_BROADCAST_GLOBAL
    kore.websocket_broadcast(c, op, data, scope)


koreapp = Broadcasts()
