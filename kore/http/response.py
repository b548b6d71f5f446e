"""Responses as bytes: the head in its fixed order of fields, and the framing that HTTP asks for.

Nearly every response of an application has the same head but for its length, and the date changes once a second. So
heads are made once for each status and length and kept until the second is over; a response is then one look-up and one
concatenation.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

from kore.http.settings import HttpSettings
from kore.http.status import reason

HEADS_MAX = 4096
"""Heads kept within a second: more lengths than that in a second gain nothing from being kept."""

JOIN_BYTES_MAX = 16384
"""Bodies up to this size are joined to their head; larger ones are sent from where they lie."""

CHUNKED = "chunked"
"""The length of a body whose end shows only when it comes."""

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

_name = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
_value = re.compile(r"[\t\x20-\x7e\x80-\U0010ffff]*").fullmatch

COMPUTED = frozenset({"content-length", "transfer-encoding", "keep-alive", "connection"})
"""Fields that follow from the framing; an application's own are left out, except that ``connection: close`` closes."""


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def imf_fixdate(seconds: int) -> str:
    """Seconds since the epoch as RFC 9110 5.6.7 has it; email.utils would cost 17 ms to import."""
    t = time.gmtime(seconds)
    month = _MONTHS[t.tm_mon - 1]
    return f"{_DAYS[t.tm_wday]}, {t.tm_mday:02} {month} {t.tm_year} {t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} GMT"


def check_header(name: str, value: str) -> None:
    """Raise ValueError for what would break the head apart (RFC 9110 5.1, 5.5)."""
    if _name(name) is None:
        raise ValueError(f"response header name {name!r}: it must be a token (RFC 9110 5.1)")
    if _value(value) is None:
        raise ValueError(f"response header {name}: control characters are not allowed in {value!r} (RFC 9110 5.5)")


def has_no_body(status: int) -> bool:
    """Whether a response of this status never has a body (RFC 9110 6.4.1)."""
    return status < 200 or status in (204, 304)


def pretty_page(status: int) -> bytes:
    """The small HTML page of ``http_pretty_error``."""
    text = f"{status} {reason(status)}".strip()
    return (
        f"<!DOCTYPE html><html><head><title>{text}</title></head><body><h1>{text}</h1></body></html>"
    ).encode()


def chunk(data: bytes) -> bytes:
    """`data`, not empty, as one chunk (RFC 9112 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Heads:
    """Makes response heads for one server's settings.

    `hsts_seconds`: for how long browsers are told to use TLS only (RFC 6797); 0: not, as where there is no TLS.
    """

    def __init__(self, settings: HttpSettings, hsts_seconds: int = 0) -> None:
        self.server = settings.http_server_version
        self.hsts = f"strict-transport-security: max-age={hsts_seconds}; includeSubDomains" if hsts_seconds else None
        self.keepalive_time = settings.http_keepalive_time
        # By status and length, the common ones: HTTP/1.1, kept alive, no fields of the application.
        self.plain: dict[tuple[int, int], bytes] = {}
        self.large: dict[tuple[int, int], bytes] = {}  # those of bodies that are not joined to them
        self.closing: dict[tuple[int, int], bytes] = {}  # the common ones when the connection ends with it
        self.others: dict[Any, bytes] = {}  # by what an application of ASGI says, and the length
        self.keeping = True
        self.date = ""
        self._second = -1
        self.tick()

    def tick(self) -> None:
        """Called at least every half second: the date may have changed, and with it every head."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self.date = imf_fixdate(second)
            self._forget()

    def _forget(self) -> None:
        for kept in (self.plain, self.large, self.closing, self.others):
            kept.clear()

    def keep(self, key: Any, head: bytes) -> None:
        """Keep a head among `others` for the rest of the second."""
        if self.keeping and len(self.others) < HEADS_MAX:
            self.others[key] = head

    def stop_keeping(self) -> None:
        """From now on every head is made anew: connections are being closed, which none of the kept ones says."""
        self.keeping = False
        self._forget()

    def build(
        self, status: int, minor: int, keep_alive: bool, fields: Iterable[tuple[str, str]], length: int | str | None
    ) -> bytes:
        """A head with its empty line. `length` is that of the body, `CHUNKED`, or None for neither field."""
        lines = [f"HTTP/1.{minor} {status} {reason(status)}", f"server: {self.server}", f"date: {self.date}"]
        if status == 101:
            pass  # the handshake's own connection field is among `fields`
        elif keep_alive:
            lines.append(f"connection: keep-alive\r\nkeep-alive: timeout={self.keepalive_time}")
        else:
            lines.append("connection: close")
        if self.hsts is not None:
            lines.append(self.hsts)
        for name, value in fields:
            lower = name.lower()
            if lower in ("server", "date"):
                lines[1 if lower == "server" else 2] = f"{name}: {value}"
            elif lower == "strict-transport-security" and self.hsts in lines:
                lines[lines.index(self.hsts)] = f"{name}: {value}"
            elif lower not in COMPUTED or status == 101:
                lines.append(f"{name}: {value}")
        if length is CHUNKED:
            lines.append("transfer-encoding: chunked")
        elif length is not None:
            lines.append(f"content-length: {length}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")

    def plain_head(self, status: int, length: int, keep_alive: bool = True) -> bytes:
        """The common head for this status and length, kept for the rest of the second."""
        joined = length <= JOIN_BYTES_MAX
        if not (joined or keep_alive):
            return self.build(status, 1, False, (), length)
        kept = self.closing if not keep_alive else self.plain if joined else self.large
        head = kept.get((status, length))
        if head is None:
            head = self.build(status, 1, keep_alive, (), length)
            if self.keeping and len(kept) < HEADS_MAX:
                kept[status, length] = head
        return head

    def interim(self, status: int, fields: Iterable[tuple[str, str]]) -> bytes:
        """An interim response (RFC 9110 15.2): the status and the application's fields, no others.

        Those that are computed belong to the response that follows; in this one they are forbidden (RFC 9110 8.6, RFC
        9112 6.1), and who believed them would take that response for a body.
        """
        kept = (f"{name}: {value}" for name, value in fields if name.lower() not in COMPUTED)
        lines = [f"HTTP/1.1 {status} {reason(status)}", *kept]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")
