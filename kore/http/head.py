"""A request head: the block of bytes up to the empty line becomes one `Head`, or is refused.

The parser is strict because everything a lenient one lets through is read differently by somebody else: bare LF,
a second Host, a length beside a coding, a space before a colon are how requests are smuggled past a proxy
(RFC 9112 11.2). So there is one grammar, it covers every byte of the block, and there is no repair.

Two facts make it fast. A `Head` holds only what framing and routing need, so requests that differ only in ordinary
fields (agents, cookies, dates) share one object, found again by their first bytes. And a head whose other fields are
all ordinary is recognised by a single pattern without backtracking. Everything else takes the general way, which
checks the same grammar and keeps what it made for the next request of the same shape.

Errors are those of the first wrong byte: what a whole block is refused for is what the same bytes are refused for
when they trickle in. `HeadScan` sees to that; it runs only on heads that are incomplete or wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import AddressValueError, IPv6Address
from itertools import takewhile
from typing import Any, Final, NoReturn

from kore.errors import ProtocolError

CHUNKED: Final = -1
"""The `body_length` of a request whose body comes in chunks: its length shows only at its end."""

METHODS: Final[dict[str, int]] = {
    "GET": 1,
    "POST": 2,
    "PUT": 4,
    "DELETE": 16,
    "HEAD": 32,
    "OPTIONS": 64,
    "PATCH": 128,
}
"""The methods served and their numbers, the HTTP_METHOD_* constants: bits, so that a route holds a set of them."""

METHOD_BYTES_MAX: Final = 32  # the longest registered method has 17 (UPDATEREDIRECTREF)
TARGET_BYTES_MAX: Final = 1998  # the platform's documented limit; 1999 gets 414
HOST_BYTES_MAX: Final = 253  # the longest name DNS can hold, as text
FIELDS_MAX: Final = 100  # what other servers allow; a browser sends about 20
LENGTH_DIGITS_MAX: Final = 19  # 2**63 - 1 has 19 digits: the largest length a file or the settings can hold
LENGTH_MAX: Final = 2**63 - 1
HEADS_KEPT_MAX: Final = 1024  # with HEAD_KEY_BYTES_MAX about 3 MB at worst; more than a busy site's hot URLs
HEAD_KEY_BYTES_MAX: Final = 512  # longer ones are rarely asked for twice, and cheap to fill memory with

_TCHAR = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_VALUE = rb"[\t -~\x80-\xff]*+"
_FIELD = _TCHAR + rb"++:" + _VALUE + rb"\r\n"
_LINE = _TCHAR + rb"{1,32}+ [!-~\x80-\xff]{1,1998}+ HTTP/"

def _any_case(*words: bytes) -> bytes:
    """A pattern for one of `words` in any case: (?i:...) folds each byte it looks at, a set is one table look-up."""
    return b"|".join(re.sub(rb"[a-z]", lambda m: b"[" + m[0] + m[0].upper() + b"]", word) for word in words)


# "Connection: keep-alive" is every browser's and says nothing in HTTP/1.1, the only version kept for these patterns.
_MEANINGFUL = (
    rb"[hHcCtTeE](?:"
    + _any_case(b"ost", b"ontent-length", b"ransfer-encoding", b"xpect")
    + rb"|" + _any_case(b"onnection") + rb"(?!: [kK]eep-[aA]live\r)):"
)  # fmt: skip
_START = _any_case(b"host") + rb":[^\r]*+"

ORDINARY: Final = re.compile(
    rb"([^\r]++\r\n" + _START + rb")\r\n(?:(?!" + _MEANINGFUL + rb")" + _FIELD + rb"){0,99}\r\n"
)
"""A head block of which only the first two lines, group 1, can matter for framing.

They are only delimited here: they count when found, byte for byte, among those `HeadParser.learn` accepted. One
pattern for the rest: 0.28 us for an 81-byte head, against 0.43 us when Host may stand anywhere. Repeats of one
character are possessive, those of groups never: Python before 3.11.5 lets such a repeat match half of the group
(python/cpython#106052), and Debian 12 has 3.11.2. They have only one way to match, so going back costs little.
"""

ORDINARY_END: Final = re.compile(rb"(?:(?!" + _MEANINGFUL + rb")" + _FIELD + rb"){0,49}\r\n")
"""What may follow on the first lines of such a block, up to fifty fields, for the whole to be one as well."""

_ordinary = ORDINARY.fullmatch
_plain_start = re.compile(rb"(" + _LINE + rb"1\.1)\r\n" + _any_case(b"host") + rb":(" + _VALUE + rb")").fullmatch
_valid = re.compile(rb"(" + _LINE + rb"[0-9]\.[0-9])\r\n(?:" + _FIELD + rb"){0,100}\r\n").fullmatch
_framing_fields = re.compile(
    rb"\r\n([hHcCtTeEuU](?:"
    + _any_case(b"ost", b"ontent-length", b"onnection", b"ransfer-encoding", b"xpect", b"pgrade")
    + rb")):([^\r]*+)"
).findall
_token_run = re.compile(_TCHAR + rb"*+").match
_target_run = re.compile(rb"[!-~\x80-\xff]*+").match
_version_start = re.compile(
    rb"(?:H(?:T(?:T(?:P(?:/(?:[0-9](?:\.(?:[0-9](?:\r\n?)?)?)?)?)?)?)?)?)?"
).fullmatch
_illegal = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n").search
_field_block = re.compile(rb"(?:" + _FIELD + rb"){1,100}\r\n").fullmatch
_absolute_form = re.compile(r"https?://([^/?#]*)([/?].*)?", re.IGNORECASE | re.DOTALL).fullmatch
_host = re.compile(
    r"(?:\[([0-9A-Fa-f:.]{2,45})\]|((?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})+))(?::([0-9]*))?"
).fullmatch  # RFC 3986 3.2.2 and 3.2.3, without user information (RFC 9110 4.2.4)


@dataclass(slots=True, eq=False)
class Head:
    """What framing and routing need of a request head. Shared by all requests alike in this, and never changed but for
    `resolution`, where the connection keeps what the router found as long as the head is `kept`: what is found refers
    to its head, and a circle that nobody opens lives on until a collection.

    `path`, `query` and `target` are as sent, not decoded; bytes from 0x80 are UTF-8 with surrogateescape.
    """

    method: int
    """One of `METHODS`' numbers."""
    method_name: str
    target: str
    path: str
    """Up to the first "?"; "*" for the asterisk form."""
    query: str | None
    """What follows the first "?", None without one."""
    minor: int
    """1 for HTTP/1.1, 0 for HTTP/1.0."""
    host: str
    """As sent, port included; the target's authority where it has one (RFC 9112 3.2.2); "" when absent."""
    hostname: str
    """The host for choosing a domain: lower case, without port, brackets and a final dot."""
    keep_alive: bool
    """Whether the client allows another request on the connection (RFC 9112 9.3)."""
    body_length: int
    """In bytes; 0 for none, `CHUNKED` when only its end will tell."""
    expect_continue: bool
    """The client waits for 100 (Continue) before it sends its body (RFC 9110 10.1.1)."""
    upgrade: bool
    """The client offers to change the protocol (RFC 9110 7.8)."""
    resolution: Any = None
    kept: bool = False
    """It is in its parser's memory."""


def common_lines(block: bytes, other: bytes) -> bytes:
    """The lines that two head blocks both begin with, at most the request line and fifty fields."""
    lines = zip(block.splitlines(True)[:51], other.splitlines(True), strict=False)
    return b"".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], lines))


def fields(block: bytes) -> list[tuple[str, str]]:
    """The fields of a head block the parser accepted, in order: lower-case names, values without white space around.

    Bytes from 0x80 (obs-text, RFC 9110 5.5) are decoded as UTF-8 with surrogateescape: what clients mean today, and
    ``value.encode("utf-8", "surrogateescape")`` gives the exact bytes back.
    """
    found = []
    for line in block.decode("utf-8", "surrogateescape").split("\r\n")[1:-2]:
        name, _, value = line.partition(":")
        found.append((name.lower(), value.strip(" \t")))
    return found


class HeadParser:
    """Parses complete head blocks and remembers their heads. One for each listener: heads carry its routes.

    `header_bytes_max` bounds a block, its final empty line included. `known` holds the heads by what decided them: an
    ordinary block's first two lines, else request line and framing fields.
    """

    __slots__ = ("header_bytes_max", "known")

    def __init__(self, header_bytes_max: int = 4096) -> None:
        self.header_bytes_max = header_bytes_max
        self.known: dict[object, Head] = {}

    def recognise(self, data: bytes) -> Head | None:
        """The head of `data` if that is exactly one head block, known and without fields that matter; else None.

        The hot path: 0.4 us for 81 bytes. None says nothing about `data`.
        """
        match = _ordinary(data)
        if match is None or len(data) > self.header_bytes_max:
            return None
        return self.known.get(match[1])

    def parse(self, block: bytes) -> Head:
        """The head of a block that ends with its first empty line. Raises `ProtocolError`."""
        head = self.recognise(block)
        return self.learn(block) if head is None else head

    def learn(self, block: bytes) -> Head:
        """The same for a block that `recognise` does not know."""
        if len(block) > self.header_bytes_max:
            self._refuse(block)
        # POST, PUT and PATCH come with fields that matter: it would be a look for nothing.
        ordinary = _ordinary(block) if block[0] != 0x50 else None
        if ordinary is not None:
            start = _plain_start(ordinary[1])
            if start is not None:
                head = _head(start[1], ((b"host", start[2]),))
                self._keep(ordinary[1], head, len(ordinary[1]))
                return head
        match = _valid(block)
        if match is None:
            self._refuse(block)
        line = match[1]
        framing = tuple(_framing_fields(block))
        head_or_none = self.known.get((line, framing))
        if head_or_none is not None:
            return head_or_none
        head = _head(line, framing)
        self._keep((line, framing), head, len(line) + sum(len(value) for _, value in framing))
        return head

    def _keep(self, key: object, head: Head, key_bytes: int) -> None:
        """Remember `head`. A full table is emptied: unlike refusing new ones, that heals after a flood of made-up
        targets, and costs nothing on a hit, as a least-recently-used order would.
        """
        if key_bytes <= HEAD_KEY_BYTES_MAX:
            if len(self.known) >= HEADS_KEPT_MAX:
                self._forget()
            self.known[key] = head
            head.kept = True

    def _forget(self) -> None:
        for head in self.known.values():
            head.kept = False
            head.resolution = None
        self.known.clear()

    def _refuse(self, block: bytes) -> NoReturn:
        """Raise the error of the first wrong byte of `block`."""
        scan = HeadScan(self.header_bytes_max)
        scan.advance(block, 0, min(len(block), self.header_bytes_max))
        if len(block) > self.header_bytes_max:
            scan.refuse_size()
        refuse_fields(block[block.index(b"\r\n") + 2 :])


class HeadScan:
    """Looks once at each byte of a head that is not complete yet, and raises as soon as it can't become valid.

    So a TLS hello on a plain port is refused at its first byte instead of waiting for a deadline, and a client that
    sends byte by byte costs no more than its bytes. Positions are relative to the start of the head.
    """

    __slots__ = ("_bytes_max", "_check", "_at", "_target")

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._check = 0
        self._at = 0
        self._target = 0

    def advance(self, data: bytes | bytearray, base: int, stop: int) -> None:
        """Look at what is new in ``data[base:stop]``, the head so far."""
        while self._check < 4 and _CHECKS[self._check](self, data, base, stop):
            self._check += 1

    def refuse_size(self) -> NoReturn:
        """Raise for a head that fills its limit: with 414 if that is its request line's fault."""
        if self._check < 3:
            raise ProtocolError(414, f"request line longer than {self._bytes_max} bytes")
        raise ProtocolError(431, f"head longer than {self._bytes_max} bytes")

    def _method(self, data: bytes | bytearray, base: int, stop: int) -> bool:
        match = _token_run(data, base + self._at, stop)
        end = match.end() if match else base
        if end - base > METHOD_BYTES_MAX:
            # RFC 9112 3: a method longer than any implemented one is a method not implemented.
            raise ProtocolError(501, f"method longer than {METHOD_BYTES_MAX} bytes")
        self._at = end - base
        if end >= stop:
            return False
        if end == base or data[end] != 0x20:
            raise ProtocolError(400, f"byte 0x{data[end]:02x} in the method")
        self._at = self._target = end + 1 - base
        return True

    def _request_target(self, data: bytes | bytearray, base: int, stop: int) -> bool:
        match = _target_run(data, base + self._at, stop)
        end = match.end() if match else base
        start = base + self._target
        if end - start > TARGET_BYTES_MAX:
            raise ProtocolError(414, f"target longer than {TARGET_BYTES_MAX} bytes")
        self._at = end - base
        if end >= stop:
            return False
        if end == start or data[end] != 0x20:
            raise ProtocolError(400, f"byte 0x{data[end]:02x} in the request target")
        self._at = end + 1 - base
        return True

    def _version(self, data: bytes | bytearray, base: int, stop: int) -> bool:
        start = base + self._at
        piece = data[start : min(stop, start + 10)]
        if not _version_start(piece):
            raise ProtocolError(400, "malformed protocol version")
        if len(piece) < 10:
            return False
        _request_line(bytes(data[base : start + 8]))
        self._at = start + 10 - base
        return True

    def _fields(self, data: bytes | bytearray, base: int, stop: int) -> bool:
        refuse_illegal(data, base + self._at, stop)
        # A CR at the end is looked at again, with what follows it.
        self._at = max(self._at, stop - base - (data[stop - 1] == 0x0D))
        return False


_CHECKS = (HeadScan._method, HeadScan._request_target, HeadScan._version, HeadScan._fields)


def refuse_illegal(data: bytes | bytearray, start: int, stop: int) -> None:
    """Raise if ``data[start:stop]``, part of a field block, holds a byte no field block has."""
    match = _illegal(data, start, stop)
    if match:
        byte = data[match.start()]
        what = {0x0D: "CR without LF", 0x0A: "LF without CR"}.get(byte, f"control character 0x{byte:02x}")
        # RFC 9110 5.5 calls CR, LF and NUL in values dangerous; RFC 9112 2.2 allows a bare LF as a line end to
        # nobody's gain.
        raise ProtocolError(400, f"{what} in the header fields")


def check_fields(block: bytes) -> None:
    """Raise unless `block` is at least one field line and an empty line: a trailer section."""
    if not _field_block(block):
        refuse_fields(block)


def refuse_fields(block: bytes) -> NoReturn:
    """Raise for a block of field lines and its empty line that has no illegal byte and is wrong all the same."""
    lines = block.split(b"\r\n")[:-2]
    if len(lines) > FIELDS_MAX:
        raise ProtocolError(431, f"more than {FIELDS_MAX} header fields")
    for line in lines:
        name, colon, _ = line.partition(b":")
        if line[:1] in (b" ", b"\t"):
            raise ProtocolError(400, "folded header line")  # RFC 9112 5.2
        if not colon:
            raise ProtocolError(400, "header line without a colon")
        if not name:
            raise ProtocolError(400, "header field without a name")
        if name[-1:] in (b" ", b"\t"):
            raise ProtocolError(400, "white space before the colon of a header field")  # RFC 9112 5.1
        match = _token_run(name)
        if match is None or match.end() != len(name):
            raise ProtocolError(400, "invalid character in a header name")
    raise ProtocolError(400, "malformed header fields")


def _head(line: bytes, framing: tuple[tuple[bytes, bytes], ...]) -> Head:
    """Make the head of a request line and the fields that matter, both free of bytes that may not be there."""
    method_name, target, minor, authority, path, query = _request_line(line)
    values: dict[bytes, list[bytes]] = {}
    for name, value in framing:
        values.setdefault(name.lower(), []).append(value.strip(b" \t"))
    host, hostname = _host_field(values.pop(b"host", None), minor)
    if authority is not None:
        host, hostname = authority, _hostname(authority)
    head = Head(
        METHODS[method_name], method_name, target, path, query,
        minor, host, hostname, minor == 1, 0, False, False,
    )  # fmt: skip
    if values:
        _frame(head, values)
    return head


def _frame(head: Head, values: dict[bytes, list[bytes]]) -> None:
    """Enter what the fields other than Host say."""
    minor = head.minor
    head.body_length = _body_length(values, minor)
    # RFC 9110 10.1.1 and 7.8: an HTTP/1.0 client's expectations and offers are ignored.
    expected = minor == 1 and _expected(values.get(b"expect", []))
    options = _elements(values.get(b"connection", []))
    head.keep_alive = b"close" not in options and (minor == 1 or b"keep-alive" in options)
    head.expect_continue = expected and head.body_length != 0
    head.upgrade = minor == 1 and b"upgrade" in options and any(values.get(b"upgrade", []))


def _request_line(line: bytes) -> tuple[str, str, int, str | None, str, str | None]:
    """Method, target, minor version, authority, path and query of a well-formed request line (RFC 9112 3)."""
    method, target, version = line.decode("utf-8", "surrogateescape").split(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise ProtocolError(505, f"version {version}")
    if method not in METHODS:
        raise ProtocolError(501, f"method {method}")
    authority = None
    resource = target
    if target == "*":
        if method != "OPTIONS":
            raise ProtocolError(400, "asterisk target for another method than OPTIONS")  # RFC 9112 3.2.4
    elif target[0] != "/":
        match = _absolute_form(target)
        if match is None:
            raise ProtocolError(400, "malformed request target")
        authority = match[1]
        _hostname(authority)
        resource = match[2] or ("*" if method == "OPTIONS" else "/")  # RFC 9112 3.2.4, last paragraph
        if resource[0] == "?":
            resource = "/" + resource
    path, mark, query = resource.partition("?")
    return method, target, int(version[-1]), authority, path, query if mark else None


def _host_field(hosts: list[bytes] | None, minor: int) -> tuple[str, str]:
    """The Host as sent and as a name to look up (RFC 9112 3.2)."""
    if hosts is None:
        if minor == 1:
            raise ProtocolError(400, "no Host")
        return "", ""
    if len(hosts) > 1:
        raise ProtocolError(400, "more than one Host")
    host = hosts[0].decode("utf-8", "surrogateescape")
    return host, _hostname(host)


@lru_cache(maxsize=256)  # a server has few names; at 253 bytes each this is bounded, and refusals are not kept
def _hostname(authority: str) -> str:
    """The name in ``name[:port]``: lower case, no brackets, no final dot; IPv6 in its shortest form."""
    match = _host(authority)
    # Empty is refused although RFC 9112 3.2 has a use for it: no served resource lacks an authority.
    if match is None or len(authority) > HOST_BYTES_MAX:
        raise ProtocolError(400, "malformed Host")
    address, name, port = match.groups()
    if port and (len(port) > 5 or int(port) > 65535):
        raise ProtocolError(400, "malformed Host")
    if address is None:
        return str(name).lower().removesuffix(".")
    try:
        return IPv6Address(address).compressed
    except AddressValueError:
        raise ProtocolError(400, "malformed Host") from None


def _body_length(values: dict[bytes, list[bytes]], minor: int) -> int:
    """How the body is delimited (RFC 9112 6.3), the same for every method."""
    lengths = values.get(b"content-length")
    codings = values.get(b"transfer-encoding")
    if codings is not None:
        # RFC 9112 6.1 and 6.3: both lengths present, or a coding in HTTP/1.0, is an attack, not a choice.
        if lengths is not None:
            raise ProtocolError(400, "both Content-Length and Transfer-Encoding")
        if minor == 0:
            raise ProtocolError(400, "Transfer-Encoding in HTTP/1.0")
        return _chunked(b",".join(codings))
    if lengths is None:
        return 0
    texts = {text.strip(b" \t") for value in lengths for text in value.split(b",")}
    if len(texts) > 1:
        raise ProtocolError(400, "differing Content-Lengths")
    text = texts.pop()
    # Leading zeros: legal, sent by nobody, and octal to some parsers.
    if not text.isdigit() or (len(text) > 1 and text[0] == 0x30):
        raise ProtocolError(400, "malformed Content-Length")
    if len(text) > LENGTH_DIGITS_MAX or int(text) > LENGTH_MAX:
        raise ProtocolError(413, "Content-Length beyond 2**63 - 1")
    return int(text)


def _chunked(value: bytes) -> int:
    """CHUNKED if that is the one coding of a Transfer-Encoding."""
    codings = [coding.strip(b" \t").lower() for coding in value.split(b",")]
    if codings == [b"chunked"]:
        return CHUNKED
    # RFC 9112 6.1 and 6.3: chunked twice or not last leaves the length unknown. Empty elements and parameters
    # are read differently by different servers.
    if b"" in codings or b"chunked" in codings[:-1] or any(c.startswith(b"chunked;") for c in codings):
        raise ProtocolError(400, "malformed Transfer-Encoding")
    raise ProtocolError(501, "unknown transfer coding")


def _expected(values: list[bytes]) -> bool:
    """Whether 100-continue, the only expectation there is, was expected (RFC 9110 10.1.1)."""
    expectations = _elements(values)
    if expectations - {b"100-continue"}:
        raise ProtocolError(417, "unknown expectation")
    return bool(expectations)


def _elements(values: list[bytes]) -> set[bytes]:
    """The elements of a list-valued field, in lower case; empty ones do not count (RFC 9110 5.6.1)."""
    elements = {element.strip(b" \t").lower() for value in values for element in value.split(b",")}
    elements.discard(b"")
    return elements
