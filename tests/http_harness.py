"""What the tests of the HTTP parsers share: feeding bytes cut anywhere, and requests to cut."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from kore.errors import ProtocolError
from kore.http.parser import END, Head, HeadParser, RequestParser, fields

EXAMPLES = int(os.environ.get("KORE_EXAMPLES", "150"))
"""How many examples hypothesis makes for each property; 100000 for the long run."""

bounded = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

HOST = b"Host: a\r\n"


def shown(head: Head) -> tuple[Any, ...]:
    """What a head says, to compare."""
    return tuple(getattr(head, name) for name in Head.__slots__ if name not in ("resolution", "kept"))


def events(
    *pieces: bytes, body_bytes_max: int = 1000, header_bytes_max: int = 4096, heads: HeadParser | None = None
) -> list[Any]:
    """The events of the pieces fed one after the other: heads, whole bodies, END, and an error as (status, reason)."""
    parser = RequestParser(heads or HeadParser(header_bytes_max), body_bytes_max)
    found: list[Any] = []
    for piece in pieces:
        parser.feed(piece)
        try:
            while (event := parser.next()) is not None:
                if type(event) is bytes:
                    assert event
                    if found and type(found[-1]) is bytes:
                        event = found.pop() + event
                found.append((shown(event), fields(parser.block)) if type(event) is Head else event)
        except ProtocolError as error:
            found.append((error.status, error.reason))
            with pytest.raises(ProtocolError) as again:
                parser.next()
            assert again.value is error
            break
    return found


def cut_everywhere(data: bytes, **limits: int) -> list[Any]:
    """The events of `data`, after checking that they are the same in two pieces cut anywhere, and byte by byte."""
    whole = events(data, **limits)
    step = max(1, len(data) // 300)  # long inputs: every few bytes; the byte-by-byte run covers the rest
    for cut in range(1, len(data), step):
        assert events(data[:cut], data[cut:], **limits) == whole, cut
    assert events(*(data[i : i + 1] for i in range(len(data))), **limits) == whole
    return whole


def status(data: bytes, **limits: int) -> int:
    """The status `data` is refused with, 0 when it is not."""
    found = cut_everywhere(data, **limits)
    return found[-1][0] if found and type(found[-1]) is tuple and type(found[-1][0]) is int else 0


def parse(block: bytes) -> Head:
    """The head of one block."""
    return HeadParser().parse(block)


def request(line: bytes = b"GET / HTTP/1.1", *lines: bytes, host: bytes = HOST) -> bytes:
    """A head block."""
    return line + b"\r\n" + host + b"".join(part + b"\r\n" for part in lines) + b"\r\n"


def body(data: bytes, **limits: int) -> Any:
    """The body of the one request in `data`, or the status it is refused with."""
    found = cut_everywhere(data, **limits)
    if type(found[-1]) is tuple and type(found[-1][0]) is int:
        return found[-1][0]
    assert found[-1] is END
    assert len(found) <= 3
    return found[1] if len(found) == 3 else b""


def chunked(data: bytes) -> bytes:
    return request(b"POST / HTTP/1.1", b"Transfer-Encoding: Chunked") + data
