"""The access log of a domain: one line for every response, written whole, whatever a client sends.

Each worker appends to the file that was opened before the fork (open(2), O_APPEND: lines of several workers don't
mix), a batch at a time. Nothing waits for the log: what a full disk or a full pipe does not take is kept up to a bound,
then lines are lost, and the server's own log says how many.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from io import FileIO
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from kore.http.head import Head

FORMATS: Final = ("kore", "combined", "json")

BATCH_BYTES = 32768
"""Lines gathered before they are written at once; what is less waits for the clock, half a second."""

KEPT_BYTES_MAX = 1024 * 1024
"""Lines kept while the file does not take them: some seconds of a busy worker. Further ones are lost."""

TELL_S = 10.0
"""How often it is told that lines are lost, in seconds: a full disk may stay full for hours."""

REQUEST_ID_MAX = 128
"""Characters of a client's X-Request-Id; a longer one is not taken for an id."""

LOG_ERR = 3

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_harmless = re.compile(r"[ !#-\[\]-~]*").fullmatch
_harmful = re.compile(rb"[^ !#-\[\]-~]").sub
_request_id = re.compile(rf"[!-~]{{1,{REQUEST_ID_MAX}}}").fullmatch

time.localtime()  # reads the time zone now: a worker may live in a root without it


class LogTarget(NamedTuple):
    """Where the access log of a domain goes and what its lines look like: `format` is one of `FORMATS`."""

    file: FileIO
    format: str


class Entry(NamedTuple):
    """One response, as far as it is known: a head that was not understood leaves None."""

    client: str
    """The client's address, "-" without one."""
    head: Head | None
    status: int
    body_bytes: int
    """Bytes of the response's body, without what frames it."""
    duration_s: float | None
    """Seconds from the head of the request to the end of the response, as far as this server hands it over."""
    route: str | None
    """The path or pattern of the route."""
    field: Callable[[str], str | None]
    """The first field of the request of that name."""
    user: str | None = None
    """The common name in the client's certificate, where it has shown one."""


class AccessLog:
    """One worker's end of an access log. `tell(priority, text)` takes lines for the server's own log."""

    __slots__ = (
        "_file", "_kept", "_line", "_lines", "_lost", "_second", "_size", "_stamp", "_tell", "_tell_at",
    )  # fmt: skip

    def __init__(self, target: LogTarget, tell: Callable[[int, str], object]) -> None:
        self._file = target.file
        self._line = _LINES[target.format]
        self._tell = tell
        self._lines: list[bytes] = []
        self._size = 0
        self._kept = b""  # what the file took a part of, or would not take
        self._lost = 0
        self._tell_at = 0.0
        self._second = -1
        self._stamp = ""

    def add(self, entry: Entry) -> None:
        """Log a response; written by the next `flush` at the latest."""
        if self._size + len(self._kept) >= KEPT_BYTES_MAX:
            self._lost += 1
            return
        line = self._line(self, entry)
        self._lines.append(line)
        self._size += len(line)
        if self._size >= BATCH_BYTES and not self._kept:
            self.flush()

    def flush(self) -> None:
        """Write what there is. Never raises, never waits for more than a write(2) to a file does."""
        if not self._lines and not self._kept:
            return
        data = self._kept + b"".join(self._lines)
        self._lines.clear()
        self._size = 0
        self._kept = b""
        try:
            while data:
                written = os.write(self._file.fileno(), data[: _whole_lines(data)])
                data = data[written:]
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            self._kept = data
            why = getattr(error, "strerror", None) or str(error)
            self._tell_lost(f"{why} (errno {getattr(error, 'errno', None)})")
        else:
            if self._lost:
                self._tell_at = 0.0
                self._tell_lost("written again")

    def _tell_lost(self, why: str) -> None:
        now = time.monotonic()
        if now >= self._tell_at:
            self._tell_at = now + TELL_S
            self._tell(LOG_ERR, f"access log {self._file.name!r}: {why}; lines lost: {self._lost}")
            self._lost = 0

    def stamp(self) -> str:
        """The local time as ``dd/Mon/yyyy:HH:MM:SS +zzzz``, made once a second."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            t = time.localtime(second)
            sign = "-" if t.tm_gmtoff < 0 else "+"
            zone = abs(t.tm_gmtoff) // 60
            self._stamp = (
                f"{t.tm_mday:02}/{_MONTHS[t.tm_mon - 1]}/{t.tm_year}:{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} "
                f"{sign}{zone // 60:02}{zone % 60:02}"
            )
        return self._stamp


def address(fd: int) -> str:
    """The IP address of the peer of socket `fd`, "-" for a UNIX socket or one that is not connected any more."""
    sock = socket.socket(fileno=fd)
    try:
        return "-" if sock.family == socket.AF_UNIX else str(sock.getpeername()[0])
    except OSError:
        return "-"
    finally:
        sock.detach()


def escaped(text: str) -> str:
    r"""`text` without anything that could end a field or a line: such bytes, and those from 0x7f, become ``\xhh``."""
    if _harmless(text):
        return text
    octets = text.encode("utf-8", "surrogateescape")
    return _harmful(lambda octet: b"\\x%02x" % octet[0][0], octets).decode("ascii")


def _whole_lines(data: bytes) -> int:
    """How much of `data` to write at once: whole lines of about a batch."""
    if len(data) <= BATCH_BYTES:
        return len(data)
    end = data.rfind(b"\n", 0, BATCH_BYTES) + 1
    return end or data.find(b"\n") + 1 or len(data)


def _kore(log: AccessLog, entry: Entry) -> bytes:
    """The documented line (http.md 13): the path without the query."""
    return _common(log, entry, "path")


def _combined(log: AccessLog, entry: Entry) -> bytes:
    """What other servers call "combined": the request target as it came."""
    return _common(log, entry, "target")


def _common(log: AccessLog, entry: Entry, what: str) -> bytes:
    head = entry.head
    request = "-" if head is None else f"{head.method_name} {escaped(getattr(head, what))} HTTP/1.{head.minor}"
    referer, agent = entry.field("referer"), entry.field("user-agent")
    user = escaped(entry.user).replace(" ", r"\x20") if entry.user else "-"
    return (
        f'{entry.client} - {user} [{log.stamp()}] "{request}" {entry.status} {entry.body_bytes} '
        f'"{escaped(referer) if referer else "-"}" "{escaped(agent) if agent else "-"}"\n'
    ).encode("ascii", "backslashreplace")


_numbers = count(1)
_worker_id: list[str] = []  # made by each worker when it first needs one


def _json(_log: AccessLog, entry: Entry) -> bytes:
    """One JSON object a line (RFC 8259), in ASCII; null where nothing is known."""
    import json  # only who wants it pays for loading it

    if not _worker_id:
        _worker_id.append(f"{os.getpid():x}-{int(time.time()):x}")
    head = entry.head
    given = entry.field("x-request-id")
    duration = entry.duration_s
    second = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)) + f".{int(second * 1000) % 1000:03}Z"
    found: dict[str, Any] = {
        "time": stamp,
        "client": None if entry.client == "-" else entry.client,
        "user": entry.user,
        "method": head.method_name if head else None,
        "path": head.path if head else None,
        "query": head.query if head else None,
        "protocol": f"HTTP/1.{head.minor}" if head else None,
        "status": entry.status,
        "bytes": entry.body_bytes,
        "duration_ms": None if duration is None else round(duration * 1000, 3),
        "route": entry.route,
        "request_id": given if given and _request_id(given) else f"{_worker_id[0]}-{next(_numbers):x}",
        "host": (head.host or None) if head else None,
        "referer": entry.field("referer"),
        "agent": entry.field("user-agent"),
    }
    for name, value in found.items():
        if isinstance(value, str) and not value.isascii():
            # What is not UTF-8 would become half a surrogate pair, which RFC 8259 8.2 warns of.
            found[name] = value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return json.dumps(found, separators=(",", ":")).encode("ascii") + b"\n"


_LINES: Final = {"kore": _kore, "combined": _combined, "json": _json}
