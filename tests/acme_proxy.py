"""A way to pebble on which each step can be made to fail, to wait, or to be answered by somebody else.

pebble makes addresses from the Host it is asked by, so whoever asks here stays here.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.acme_harness import Pebble, make_authority

STEPS = {
    "/dir": "directory", "/nonce-plz": "nonce", "/sign-me-up": "account", "/order-plz": "order", "/authZ/": "authz",
    "/chalZ/": "challenge", "/finalize-order/": "finalize", "/my-order/": "poll", "/certZ/": "certificate",
    "/ari": "window",
}
"""pebble's addresses, by their beginning."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        step = next((step for start, step in STEPS.items() if self.path.startswith(start)), "other")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy = self.server
        proxy.seen.append(step)
        with contextlib.suppress(OSError):
            if step in proxy.held:
                proxy.reached.set()
                proxy.released.wait(30)
            fault = proxy.faults.get(step)
            if fault is None:
                self.pass_on(body)
            else:
                fault(self)

    do_POST = do_HEAD = do_GET  # noqa: N815 (the names that http.server calls)

    def log_message(self, *_: object) -> None:
        pass

    def pass_on(self, body: bytes) -> None:
        proxy = self.server
        way = http.client.HTTPSConnection("127.0.0.1", proxy.authority.port, context=proxy.trust, timeout=20)
        try:
            way.request(self.command, self.path, body, dict(self.headers.items()))
            answer = way.getresponse()
            text = answer.read()
        except OSError:
            self.close_connection = True
            return
        finally:
            way.close()
        if self.path.startswith("/dir") and proxy.window is not None:
            text = json.dumps(json.loads(text) | {"renewalInfo": f"https://{self.headers['Host']}/ari"}).encode()
        ours = ("content-length", "transfer-encoding")
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in ours}
        self.answer(text, answer.status, headers)

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Proxy(ThreadingHTTPServer):
    """`faults` answer a step instead of pebble; steps in `held` wait for release()."""

    daemon_threads = True

    def __init__(self, directory: Path, authority: Pebble) -> None:
        directory.mkdir()
        super().__init__(("127.0.0.1", 0), Handler)
        self.authority = authority
        self.ca, certificate, key = make_authority(directory, "127.0.0.1", "localhost")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(certificate), str(key))
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.trust = ssl.create_default_context(cafile=str(authority.ca))
        self.faults: dict[str, Callable[[Handler], None]] = {}
        self.held: set[str] = set()
        self.seen: list[str] = []
        self.window: object = None
        """Whether pebble is said to have ARI, which it has not; answered by the fault "window"."""
        self.reached, self.released = threading.Event(), threading.Event()

    @property
    def address(self) -> str:
        return f"https://127.0.0.1:{self.server_port}/dir"

    def hold(self, step: str) -> None:
        self.reached.clear()
        self.released.clear()
        self.held = {step}

    def release(self) -> None:
        self.held = set()
        self.released.set()

    def handle_error(self, *_: object) -> None:
        pass  # clients leave when they have had enough


def status(number: int, body: bytes = b"", **headers: str) -> Callable[[Handler], None]:
    found = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.answer(body, number, found)


def problem(kind: str, number: int = 403, **headers: str) -> Callable[[Handler], None]:
    body = json.dumps({"type": f"urn:ietf:params:acme:error:{kind}", "detail": f"{kind}, says the test"}).encode()
    return status(number, body, Content_Type="application/problem+json", **headers)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


@contextlib.contextmanager
def proxy(directory: Path, authority: Pebble) -> Iterator[Proxy]:
    made = Proxy(directory / "proxy", authority)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.release()
        made.shutdown()
        thread.join()
        made.server_close()
