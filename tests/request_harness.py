"""What the tests of what a request carries share: requests without a connection, routes with rules, stored bodies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from kore.application.route_options import declare
from kore.http.head import HeadParser
from kore.http.request import Request
from kore.http.routes import Route
from kore.http.server import Prepared

FORM = "Content-Type: application/x-www-form-urlencoded"


def route(**keywords: Any) -> Route:
    """A route declared with these parameters: ``get={...}``, ``qs={...}``."""
    declared = declare("/", print, None, keywords)
    return Route("/", print, parameters=declared.parameters)


def request(
    target: str = "/", *fields: str, method: str = "GET", body: Any = b"", of: Route | None = None, **rules: Any
) -> Request:
    """A request of a route with these rules; nobody hears its answer."""
    text = "\r\n".join([f"{method} {target} HTTP/1.1", "Host: a", *fields, "", ""])
    block = text.encode("utf-8", "surrogateescape")
    made = Request(None, Prepared(HeadParser().parse(block), of or route(**rules), print, ()), block)  # type: ignore[arg-type]
    if len(body) if isinstance(body, bytes) else body.length:
        made._body = body
    return made


def form(body: str | bytes, *fields: str, method: str = "POST", kind: str = FORM, **rules: Any) -> Request:
    """A request with an urlencoded body; its rules are its method's unless others are given."""
    data = body.encode() if isinstance(body, str) else body
    if not isinstance(next(iter(rules.values()), None), Mapping):
        rules = {method.lower(): rules}
    return request("/", *filter(None, [kind]), *fields, method=method, body=data, **rules)


class FileBody:
    """A body on disk, as the server keeps large ones."""

    def __init__(self, path: Path) -> None:
        self.path: str | None = str(path)
        self.fd = os.open(path, os.O_RDONLY)
        self.length = os.fstat(self.fd).st_size
        self.largest = 0  # bytes read at once

    def read(self, position: int, count: int) -> bytes:
        if self.fd < 0:
            raise RuntimeError("the request is over, and its body is gone")
        self.largest = max(self.largest, count)
        return os.pread(self.fd, count, position)

    def digest(self) -> bytes:
        return sha256(self.read(0, self.length)).digest()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class TakenBody:
    """A body that went to on_body_chunk."""

    path = None
    length = 5

    def read(self, position: int, count: int) -> bytes:
        raise RuntimeError("the body went to on_body_chunk")

    def digest(self) -> bytes:
        return sha256(b"hello").digest()

    def close(self) -> None:
        pass
