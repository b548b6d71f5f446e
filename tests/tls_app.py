"""A worker that serves HTTP over TLS, without the application and process floors: python -m tests.tls_app CONFIG.

CONFIG is a file of Python: a dict with "io", the engine; "domains", a list of (name, settings), which may have "pairs",
"authorities", "verify_depth", "crl"; "options" of HttpSettings, "tls" of TlsSettings, "tickets". The keys are held by a
process of its own. Lines of the standard input are run as Python.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

from kore import reactor
from kore.http import secure
from kore.http.routes import Domain, Route, Router
from kore.http.server import HttpServer
from kore.http.settings import HttpSettings
from kore.process.worker import GC_THRESHOLDS
from kore.tls.contexts import Contexts, TlsDomain, TlsSettings
from tests.tls_harness import KeyProcess, Pair, load_pair

LARGE = bytes(range(256)) * 4096  # 1 MiB


def hello(req: Any) -> None:
    req.response(200, b"hello world")


def large(req: Any) -> None:
    req.response(200, LARGE * int(req.query or 1))


def mirror(req: Any) -> None:
    req.response(200, req.body)


def size(req: Any) -> None:
    body = req.body
    found = len(body) if isinstance(body, bytes) else os.fstat(body.fileno()).st_size
    req.response(200, str(found).encode())


def who(req: Any) -> None:
    connection = req.connection
    names = connection.x509dict
    shown = connection.x509
    req.response(200, repr((req.protocol, None if shown is None else len(shown), names)).encode())


async def slow(req: Any) -> None:
    await reactor.suspend(50)
    req.response(200, b"slow")


def stream(req: Any) -> None:
    req.response(200, (b"x" * 10000 for _ in range(int(req.query or 100))))


def socket_opened(req: Any) -> None:
    req.websocket_handshake(None, lambda peer, op, data: peer.websocket_send(op, data), None)


def close(req: Any) -> None:
    req.response_header("connection", "close")
    req.response(200, b"bye")


def routes(name: str) -> list[Route]:
    handlers = {
        "/": hello, "/large": large, "/mirror": mirror, "/size": size, "/who": who, "/slow": slow, "/stream": stream,
        "/ws": socket_opened, "/close": close, "/name": lambda req: req.response(200, name.encode()),
    }
    return [Route(path, handler) for path, handler in handlers.items()]


class App:
    """The worker."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.domains = config["domains"]
        self.pairs: dict[tuple[int, str], Pair] = {}
        for index, (_, settings) in enumerate(self.domains):
            for path in settings.get("pairs", ()):
                pair = load_pair(path)
                self.pairs[index, pair.kind] = pair
        self.keys = KeyProcess(self.pairs)
        self.loop = reactor.Loop(reactor.new_driver(config["io"]))
        self.server = HttpServer(self.loop, HttpSettings(**config.get("options", {})), log=self.log)
        described = [
            TlsDomain(name, tuple(given.get("authorities", ())), given.get("verify_depth", 1), given.get("crl", False))
            for name, given in self.domains
        ]
        self.contexts = Contexts(TlsSettings(**config.get("tls", {})), described, self.keys, self.log)
        self.router = Router(Domain(name, routes(name), files=None) for name, _ in self.domains)

    def log(self, priority: int, text: str) -> None:
        print(f"log {priority} {text}", flush=True)

    def tell(self) -> None:
        """What the key manager tells at start."""
        self.contexts.tickets(self.config.get("tickets", [os.urandom(32)]))
        for index, (_, settings) in enumerate(self.domains):
            for kind in settings.get("crls", ()):
                self.contexts.revoked(index, [kind])
            chains = [list(pair.chain) for (domain, _), pair in self.pairs.items() if domain == index]
            if chains:
                self.contexts.certificates(index, chains)
        self.contexts.complete()

    def _order(self) -> None:
        data = os.read(0, 65536)
        if not data:
            self.loop.stop()
            return
        for line in data.decode().splitlines():
            exec(line, {"app": self, "os": os})
            print("done", flush=True)

    def exchange(self, path: str) -> None:
        """Another pair for the first domain, and a new process that holds it."""
        pair = load_pair(path)
        self.pairs.clear()
        self.pairs[0, pair.kind] = pair
        self.contexts.certificates(0, [list(pair.chain)])
        self.restart_keys()

    def restart_keys(self) -> None:
        self.keys._start()
        for function in self.keys.on_available:
            function()


def main() -> None:
    config = eval(open(sys.argv[1]).read())
    gc.set_threshold(*GC_THRESHOLDS)
    app = App(config)
    import socket

    sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    secure.listen(app.server, sock, app.router, "tls", app.contexts, list(range(len(app.domains))))
    app.loop.add_reader(0, app._order)
    app.loop.call_soon(app.tell)
    print(f"listening {sock.getsockname()[1]}", flush=True)
    try:
        app.loop.run_forever()
    finally:
        app.keys.close()


if __name__ == "__main__":
    main()
