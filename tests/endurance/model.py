"""A second reader of requests, written to be obvious and not to be quick: what the bytes of one connection mean.

It knows RFC 9112, the limits of the server under proof and nothing of the server's code. It has the whole input at
once, so there is no state and no cut; what the server makes of the pieces has to be the same.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass, field, replace

HEADER_MAX = 4096
BODY_MAX = 100_000
TARGET_MAX = 1998
METHOD_MAX = 32
HOST_MAX = 253
FIELDS_MAX = 100
EMPTY_LINES_MAX = 2
CHUNK_LINE_MAX = 256

METHODS = {"GET": 1, "POST": 2, "PUT": 4, "DELETE": 16, "HEAD": 32, "OPTIONS": 64, "PATCH": 128}
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"

# What follows the last request that was understood.
NOTHING = "nothing"
INCOMPLETE = "incomplete"  # it may be refused already, or not yet
WRONG = "wrong"  # it has to be refused


class Wrong(Exception):
    """The bytes are no request and can't become one."""

    early: int | None = None
    """What may be answered for the head alone, which was in order."""


class Incomplete(Exception):
    """The bytes end before the request does."""

    early: int | None = None


@dataclass(frozen=True)
class Request:
    """One request as it was meant."""

    method: str
    target: str
    path: str
    query: str | None
    minor: int
    host: str
    fields: tuple[tuple[str, str], ...]
    body: bytes = field(repr=False)
    has_body: bool
    """Whether a body was announced that is not of length 0."""
    keep_alive: bool

    @property
    def seen(self) -> dict[str, object]:
        """What the application's echo says of it."""
        headers = {"host": self.host} if self.host else {}
        headers |= {name: value for name, value in self.fields if name != "host"}
        return {
            "method": METHODS[self.method], "path": self.path, "query": self.query, "host": self.host,
            "headers": headers, "length": len(self.body), "body": hashlib.sha256(self.body).hexdigest(),
        }

    @property
    def answer(self) -> int:
        """The status the application under proof answers with."""
        if self.path == "*":
            return 200
        if self.path == "/only-get":
            return 200 if self.method in ("GET", "HEAD") else 405
        return 200 if self.path == "/" or self.echoed else 404

    @property
    def unwanted(self) -> bool:
        """Whether there is no handler that could want a body: the answer need not wait for it."""
        return self.path == "*" or self.answer in (404, 405)

    @property
    def echoed(self) -> bool:
        """Whether the answer says what was asked."""
        return re.match("/echo/(now|named|later|async|chunks)", self.path) is not None


@dataclass
class Reading:
    """What was read: the requests, and what follows them, NOTHING, INCOMPLETE or WRONG."""

    requests: list[Request]
    rest: str = NOTHING
    early: int | None = None


def read(data: bytes) -> Reading:
    """Read the bytes of one connection."""
    text = data.decode("latin-1")
    found = Reading([])
    at = 0
    while True:
        try:
            start = skip_empty_lines(text, at)
            if start == len(text):
                return found
            request, at = read_request(text, start)
        except (Incomplete, Wrong) as error:
            found.rest = WRONG if isinstance(error, Wrong) else INCOMPLETE
            found.early = error.early
            return found
        found.requests.append(request)


def skip_empty_lines(text: str, at: int) -> int:
    """Where the request line begins (RFC 9112 2.2)."""
    for _ in range(EMPTY_LINES_MAX):
        if text.startswith("\r\n", at):
            at += 2
    if text[at:] == "\r":
        raise Incomplete
    if text.startswith("\r", at):
        raise Wrong
    return at


def read_request(text: str, at: int) -> tuple[Request, int]:
    """One request and where it ends."""
    end = text.find("\r\n\r\n", at)
    if end < 0:
        if len(text) - at >= HEADER_MAX:
            raise Wrong
        raise Incomplete
    if end + 4 - at > HEADER_MAX:
        raise Wrong
    line, *lines = text[at:end].split("\r\n")
    method, target, minor = request_line(line)
    fields = [field_line(each) for each in lines]
    if len(fields) > FIELDS_MAX:
        raise Wrong
    host = host_of([value for name, value in fields if name == "host"], minor)
    path, query, authority = resource(method, target)
    length = body_length(fields, minor)
    expectations(fields, minor)
    if length is not None and length > BODY_MAX:
        raise Wrong
    options = elements(fields, "connection")
    request = Request(
        method, as_sent(target), as_sent(path), None if query is None else as_sent(query), minor,
        as_sent(host if authority is None else authority), tuple((name, as_sent(value)) for name, value in fields), b"",
        length is None or length > 0, "close" not in options and (minor == 1 or "keep-alive" in options),
    )  # fmt: skip
    try:
        body, at = read_body(text, end + 4, length)
    except (Incomplete, Wrong) as error:
        error.early = request.answer if request.unwanted else None
        raise
    return replace(request, body=body.encode("latin-1")), at


def read_body(text: str, at: int, length: int | None) -> tuple[str, int]:
    """A body of a length, or in chunks, and where it ends."""
    if length is None:
        return read_chunks(text, at)
    if len(text) - at < length:
        raise Incomplete
    return text[at : at + length], at + length


def as_sent(text: str) -> str:
    """Text for an application: bytes from 0x80 as UTF-8, those that are none escaped."""
    return text.encode("latin-1").decode("utf-8", "surrogateescape")


def request_line(line: str) -> tuple[str, str, int]:
    """Method, target and minor version (RFC 9112 3)."""
    match = re.fullmatch(rf"({TOKEN}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])", line)
    if match is None or match[1] not in METHODS or len(match[2]) > TARGET_MAX:
        raise Wrong
    return match[1], match[2], int(match[3])


def resource(method: str, target: str) -> tuple[str, str | None, str | None]:
    """Path, query and authority of a target (RFC 9112 3.2)."""
    authority = None
    if target == "*":
        if method != "OPTIONS":
            raise Wrong
        return "*", None, None
    match = re.fullmatch(r"(?i:https?)://([^/?#]*)(.*)", target, re.DOTALL)
    if match is not None:
        authority = match[1]
        check_authority(authority)
        target = match[2]
        if target == "":
            return "*" if method == "OPTIONS" else "/", None, authority
        if target[0] == "#":
            raise Wrong
        if target[0] == "?":
            target = "/" + target
    elif target[0] != "/":
        raise Wrong
    path, mark, query = target.partition("?")
    return path, query if mark else None, authority


def field_line(line: str) -> tuple[str, str]:
    """Name and value (RFC 9112 5)."""
    match = re.fullmatch(rf"({TOKEN}):([\t\x20-\x7e\x80-\xff]*)", line)
    if match is None:
        raise Wrong
    return match[1].lower(), match[2].strip(" \t")


def host_of(hosts: list[str], minor: int) -> str:
    """The one Host (RFC 9112 3.2)."""
    if len(hosts) > 1 or (not hosts and minor == 1):
        raise Wrong
    if not hosts:
        return ""
    check_authority(hosts[0])
    return hosts[0]


def check_authority(authority: str) -> None:
    """RFC 3986 3.2: a name or an address, and a port or none."""
    if not authority or len(authority) > HOST_MAX:
        raise Wrong
    if authority[0] == "[":
        address, bracket, port = authority[1:].partition("]")
        try:
            ipaddress.IPv6Address(address)
        except ValueError:
            raise Wrong from None
        if not bracket or "%" in address or (port and port[0] != ":"):
            raise Wrong
        port = port[1:]
    else:
        name, _, port = authority.partition(":")
        if re.fullmatch(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})+", name) is None:
            raise Wrong
    if re.fullmatch(r"[0-9]{0,5}", port) is None or int(port or 0) > 65535:
        raise Wrong


def elements(fields: list[tuple[str, str]], wanted: str) -> set[str]:
    """The elements of a list-valued field in lower case."""
    found = {element.strip(" \t").lower() for name, value in fields if name == wanted for element in value.split(",")}
    return found - {""}


def expectations(fields: list[tuple[str, str]], minor: int) -> None:
    """RFC 9110 10.1.1: 100-continue is the only one; those of HTTP/1.0 are ignored."""
    if minor == 1 and elements(fields, "expect") - {"100-continue"}:
        raise Wrong


def body_length(fields: list[tuple[str, str]], minor: int) -> int | None:
    """The length of the body, None for chunks (RFC 9112 6.3)."""
    lengths = [value for name, value in fields if name == "content-length"]
    codings = [value for name, value in fields if name == "transfer-encoding"]
    if codings:
        if lengths or minor == 0 or ",".join(codings).strip(" \t").lower() != "chunked":
            raise Wrong
        return None
    if not lengths:
        return 0
    texts = {text.strip(" \t") for value in lengths for text in value.split(",")}
    text = texts.pop()
    if texts or re.fullmatch(r"0|[1-9][0-9]*", text) is None:
        raise Wrong
    return int(text)


def read_chunks(text: str, at: int) -> tuple[str, int]:
    """A chunked body and where its trailers end (RFC 9112 7.1)."""
    quoted = r'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
    size_line = re.compile(rf"([0-9A-Fa-f]{{1,16}})((?:[ \t]*;[ \t]*{TOKEN}(?:[ \t]*=[ \t]*(?:{TOKEN}|{quoted}))?)*)")
    body = ""
    overhead = 0
    while True:
        end = text.find("\r\n", at)
        if end < 0:
            raise Wrong if len(text) - at >= CHUNK_LINE_MAX else Incomplete
        match = size_line.fullmatch(text, at, end)
        if match is None or end + 2 - at > CHUNK_LINE_MAX:
            raise Wrong
        overhead += len(match[2])
        size = int(match[1], 16)
        if overhead > HEADER_MAX or len(body) + size > BODY_MAX:
            raise Wrong
        at = end + 2
        if not size:
            return body, read_trailers(text, at)
        body += text[at : at + size]
        at += size
        if text[at : at + 2] not in ("\r\n", "\r", ""):
            raise Wrong
        if len(text) < at + 2:
            raise Incomplete
        at += 2


def read_trailers(text: str, at: int) -> int:
    """Where the trailer section ends: fields like those of a head, of which nothing is used."""
    if text.startswith("\r\n", at):
        return at + 2
    end = text.find("\r\n\r\n", at)
    if end < 0:
        raise Wrong if len(text) - at >= HEADER_MAX else Incomplete
    if end + 4 - at > HEADER_MAX:
        raise Wrong
    lines = text[at:end].split("\r\n")
    if len(lines) > FIELDS_MAX:
        raise Wrong
    for line in lines:
        field_line(line)
    return end + 4
