"""Requests to try: valid ones of every form, ones with a named defect, broken ones, and noise; and where to cut them.

Hypothesis draws the shape of a connection: which kinds of request in which order, how the bytes are cut, how the client
ends. What fills the shape comes from a seeded generator, which is a hundred times as quick and just as repeatable.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import h11
from hypothesis import strategies as st

from tests.endurance import model

TOKENS = "!#$%&'*+-.^_`|~" + string.digits + string.ascii_letters
VALUES = bytes([9, *range(0x20, 0x7F), *range(0x80, 0x100)]).decode("latin-1")
TARGETS = bytes([*range(0x21, 0x7F), 0x80, 0xC3, 0xA9, 0xFF]).decode("latin-1")
PATHS = ("/echo/now", "/echo/now", "/echo/named", "/echo/later", "/echo/async", "/echo/chunks", "/", "/only-get", "/no")
SPECIAL = b"\r\n\0 \t:;,=aA059\"\x7f\xff\x80/"
RESERVED = {
    "host", "connection", "content-length", "transfer-encoding", "expect", "upgrade", "te", "trailer", "keep-alive",
}


@dataclass(frozen=True)
class Made:
    """Bytes to send; `valid` is what is known of them by construction, None when only the model can tell."""

    data: bytes
    valid: bool | None
    statuses: frozenset[int] = frozenset()
    """What a defect may be refused with; empty: with anything that says no."""
    kind: str = ""
    seed: int = 0


@dataclass(frozen=True, repr=False)
class Conversation:
    """What one connection sends, in pieces, and whether the client's FIN comes before the answers."""

    made: tuple[Made, ...]
    pieces: tuple[bytes, ...]
    finish_early: bool

    def __repr__(self) -> str:
        return f"<{len(self.made)} requests in {len(self.pieces)} pieces>"

    @property
    def data(self) -> bytes:
        """All of it."""
        return b"".join(self.pieces)


def text(rng: random.Random, alphabet: str, low: int, high: int) -> str:
    """A random text."""
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


def path(rng: random.Random) -> str:
    """A target in origin form, mostly one that there is something at."""
    found = rng.choice(PATHS)
    if found.startswith("/echo") and rng.random() < 0.5:
        found += "/" + text(rng, TARGETS, 0, 20)
    elif rng.random() < 0.5:
        found += "?" + text(rng, TARGETS, 0, 20)
    return found


def method(rng: random.Random) -> str:
    """GET and POST more often than the others."""
    return rng.choice(("GET", "GET", "GET", "POST", "POST", *sorted(model.METHODS)))


def ordinary(rng: random.Random) -> list[str]:
    """Header lines that mean nothing to a server."""
    lines = []
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        name = text(rng, TOKENS, 1, 12)
        if name.lower() not in RESERVED:
            lines.append(f"{name}:{rng.choice(('', ' ', '  '))}{text(rng, VALUES, 0, 30)}")
    return lines


def content(rng: random.Random) -> str:
    """A body: mostly short, sometimes larger than any buffer on the way."""
    length = rng.choice((0, 1, 5, 60, 60, 60, 300, 5000)) if rng.random() < 0.98 else rng.choice((40_000, 100_000))
    return rng.randbytes(length).decode("latin-1")


def chunks(rng: random.Random, body: str) -> str:
    """`body` in chunks, with what the grammar allows besides."""
    sent = ""
    at = 0
    while at < len(body):
        size = rng.choice((1, 2, 10, 100, 4096)) if len(body) < 1000 else rng.choice((1000, 8192, 65536))
        piece = body[at : at + size]
        at += len(piece)
        sent += rng.choice((f"{len(piece):x}", f"{len(piece):X}", f"{len(piece):06x}"))
        sent += rng.choice(("", "", "", ";a", ';a="b\\"c"', " ; name = value"))
        sent += f"\r\n{piece}\r\n"
    return sent + rng.choice(("0", "000")) + "\r\n" + rng.choice(("", "", "X-Trailer: x\r\n")) + "\r\n"


def valid(rng: random.Random, also: tuple[str, ...] = (), minor: int = 1, target: str | None = None) -> str:
    """A valid request with the header lines `also`."""
    lines = [*ordinary(rng), *also]
    if not any(line.lower().startswith("host:") for line in lines):
        lines.insert(rng.randint(0, len(lines)), rng.choice((
            "Host: a.b:80", "Host: a.b:80", "host:localhost", "HOST: \t127.0.0.1:8888 ", "Host: [::1]:8888")))
    sent = ""
    form = rng.choice(("none", "none", "length", "chunked") if minor else ("none", "length"))
    name = method(rng)
    if form == "length":
        body = content(rng)
        lines.append(f"Content-Length: {len(body)}")
        sent = body
    elif form == "chunked":
        lines.append(rng.choice(("Transfer-Encoding: chunked", "transfer-encoding:\tCHUNKED ")))
        sent = chunks(rng, content(rng))
    rng.shuffle(lines)
    head = f"{name} {path(rng) if target is None else target} HTTP/1.{minor}\r\n"
    return head + "".join(line + "\r\n" for line in lines) + "\r\n" + sent


def plain(rng: random.Random) -> str:
    """The request of every benchmark, again and again the same."""
    return "GET / HTTP/1.1\r\nHost: 127.0.0.1:8888\r\n\r\n"


def by_h11(rng: random.Random) -> bytes:
    """What h11 sends."""
    client = h11.Connection(h11.CLIENT)
    body = content(rng).encode("latin-1")
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    framing = rng.choice((("Content-Length", str(len(body))), ("Transfer-Encoding", "chunked")))
    extra = [(f"X-{text(rng, string.ascii_letters, 1, 8)}", text(rng, string.ascii_letters, 1, 20))
             for _ in range(rng.randint(0, 5))]
    target = rng.choice(PATHS) + rng.choice(("", "?" + text(rng, string.ascii_letters + "&=%/?", 0, 20)))
    request = h11.Request(method=method(rng), target=target, headers=[("Host", "example.org"), *extra, framing])
    events: list[h11.Event] = [request, *(h11.Data(data=part) for part in parts), h11.EndOfMessage()]
    return b"".join(client.send(event) or b"" for event in events)


VALID: dict[str, Callable[[random.Random], str]] = {
    "valid": valid,
    "plain": plain,
    "old": lambda rng: valid(rng, minor=0),
    "old kept": lambda rng: valid(rng, ("Connection: Keep-Alive",), minor=0),
    "old nameless": lambda rng: "GET /echo/now?a HTTP/1.0\r\n\r\n",
    "close": lambda rng: valid(rng, ("connection: close",)),
    "close in list": lambda rng: valid(rng, ("Connection: x, Close",)),
    "expect": lambda rng: valid(rng, ("Expect: 100-continue",)),
    "absolute": lambda rng: valid(rng, target=f"http://c.d:81{path(rng)}"),
    "absolute bare": lambda rng: valid(rng, target=rng.choice(("http://c.d", "HTTPS://c.d?q"))),
    "asterisk": lambda rng: "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "empty lines before": lambda rng: rng.choice(("\r\n", "\r\n\r\n")) + valid(rng),
    "head at its limit": lambda rng: filled(rng, model.HEADER_MAX),
    "many fields": lambda rng: "GET /echo/now HTTP/1.1\r\nHost: a\r\n" + "A: b\r\n" * 99 + "\r\n",
    "length twice": lambda rng: "POST /echo/now HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 3\r\n\r\nabc",
}


def filled(rng: random.Random, size: int) -> str:
    """A head of exactly `size` bytes."""
    start = "GET /echo/now HTTP/1.1\r\nHost: a\r\nX-Fill: "
    return start + "f" * (size - len(start) - 4) + "\r\n\r\n"


def post(*lines: str, body: str = "abc") -> str:
    """A POST whose framing is as bad as `lines`."""
    return "POST /echo/now HTTP/1.1\r\nHost: a\r\n" + "".join(line + "\r\n" for line in lines) + "\r\n" + body


def get(*lines: str, line: str = "GET /echo/now HTTP/1.1") -> str:
    """A GET that is as bad as its lines."""
    return line + "\r\n" + "".join(each + "\r\n" for each in ("Host: a", *lines)) + "\r\n"


CHUNKED = "Transfer-Encoding: chunked"

# RFC 9112 and 9110, and what each defect has to be answered with.
DEFECTS: dict[str, tuple[str, int]] = {
    "version 2": (get(line="GET / HTTP/2.0"), 505),
    "version 1.2": (get(line="GET / HTTP/1.2"), 505),
    "no version": (get(line="GET /"), 400),
    "version in lower case": (get(line="GET / http/1.1"), 400),
    "two spaces": (get(line="GET  / HTTP/1.1"), 400),
    "space at the end": (get(line="GET / HTTP/1.1 "), 400),
    "unknown method": (get(line="BREW / HTTP/1.1"), 501),
    "method in lower case": (get(line="get / HTTP/1.1"), 501),
    "long method": (get(line="M" * 33 + " / HTTP/1.1"), 501),
    "relative target": (get(line="GET index HTTP/1.1"), 400),
    "asterisk for GET": (get(line="GET * HTTP/1.1"), 400),
    "user information": (get(line="GET http://u@a/ HTTP/1.1"), 400),
    "long target": (get(line=f"GET /{'t' * 1998} HTTP/1.1"), 414),
    "no host": ("GET / HTTP/1.1\r\nA: b\r\n\r\n", 400),
    "two hosts": (get("Host: a"), 400),
    "bad host": ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "bad port": ("GET / HTTP/1.1\r\nHost: a:99999\r\n\r\n", 400),
    "bare LF": ("GET / HTTP/1.1\r\nHost: a\n\r\n\r\n", 400),
    "bare CR": (get("A: b\rc"), 400),
    "NUL": (get("A: \0"), 400),
    "DEL": (get("A: \x7f"), 400),
    "folded": (get("A: b", " c"), 400),
    "space before colon": (get("A : b"), 400),
    "no colon": (get("Ab"), 400),
    "no name": (get(": b"), 400),
    "byte in name": (get("A\xe4: b"), 400),
    "101 fields": (get(*["A: b"] * 100), 431),
    "long head": (filled(random.Random(0), model.HEADER_MAX + 1), 431),
    "both lengths": (post("Content-Length: 3", CHUNKED), 400),
    "different lengths": (post("Content-Length: 3", "Content-Length: 4"), 400),
    "signed length": (post("Content-Length: +3"), 400),
    "octal length": (post("Content-Length: 03"), 400),
    "empty length": (post("Content-Length:"), 400),
    "huge length": (post(f"Content-Length: {10 ** 20}"), 413),
    "length above the limit": (post(f"Content-Length: {model.BODY_MAX + 1}"), 413),
    "chunks above the limit": (post(CHUNKED, body=f"{model.BODY_MAX + 1:x}\r\n"), 413),
    "unknown coding": (post("Transfer-Encoding: gzip"), 501),
    "chunked twice": (post("Transfer-Encoding: chunked, chunked"), 400),
    "chunked not last": (post("Transfer-Encoding: chunked, gzip"), 400),
    "coding in 1.0": (f"POST / HTTP/1.0\r\n{CHUNKED}\r\n\r\n0\r\n\r\n", 400),
    "unknown expectation": (post("Expect: tea", "Content-Length: 3"), 417),
    "bad chunk size": (post(CHUNKED, body="x\r\n"), 400),
    "LF after chunk size": (post(CHUNKED, body="1\na\r\n0\r\n\r\n"), 400),
    "chunk too long": (post(CHUNKED, body="1\r\nab\r\n0\r\n\r\n"), 400),
    "bad trailer": (post(CHUNKED, body="0\r\nA : b\r\n\r\n"), 400),
    "three empty lines": ("\r\n" * 3 + get(), 400),
    "TLS": ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
}


def broken(rng: random.Random, data: bytes) -> bytes:
    """`data` with a few bytes dropped, added, changed or doubled."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(found), 400) + 1)
        match rng.randrange(4):
            case 0:
                del found[at : at + 1]
            case 1:
                found.insert(at, rng.choice(SPECIAL))
            case 2:
                found[at : at + 1] = bytes([rng.choice(SPECIAL)])
            case _:
                found[at:at] = found[at : at + 20]
    return bytes(found)


def make(kind: str, seed: int) -> Made:
    """One request of a kind: ``make(kind, seed)`` gives the same bytes again."""
    return replace(_made(kind, seed), kind=kind, seed=seed)


def _made(kind: str, seed: int) -> Made:
    rng = random.Random(seed)
    if kind == "h11":
        return Made(by_h11(rng), valid=True)
    if kind in VALID:
        return Made(VALID[kind](rng).encode("latin-1"), valid=True)
    if kind in DEFECTS:
        sent, status = DEFECTS[kind]
        return Made(sent.encode("latin-1"), valid=False, statuses=frozenset((status,)))
    if kind == "broken":
        whole = VALID[rng.choice(("valid", "valid", "old kept", "expect", "absolute"))](rng).encode("latin-1")
        return Made(broken(rng, whole), valid=None)
    return Made(rng.choice((b"", b"GET / HTTP/1.1\r\n", post(CHUNKED, body="").encode())) + rng.randbytes(
        rng.randint(1, 300)), valid=None)


def cut(data: bytes, way: str, seed: int) -> tuple[bytes, ...]:
    """`data` in pieces."""
    rng = random.Random(seed)
    if not data:
        return ()
    if way == "bytes" and len(data) <= 1500:
        return tuple(data[at : at + 1] for at in range(len(data)))
    number = {"whole": 0, "one": 1}.get(way, rng.randint(2, 12))
    edges = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(number))})
    return tuple(data[begin:end] for begin, end in pairwise(edges))


kinds = st.one_of(
    st.sampled_from(["plain", "valid", "valid", "h11", "h11", "old kept", "expect", "absolute"]),
    st.sampled_from(["plain", "valid", "h11", *VALID]),
    st.sampled_from([*DEFECTS, *["broken"] * 15, *["noise"] * 3]),
)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """What one connection sends."""
    made = [make(kind, seed) for kind, seed in draw(st.lists(st.tuples(kinds, seeds), min_size=1, max_size=8))]
    if draw(st.integers(0, 7)) == 7:
        # The client ends in the middle of the last one.
        last = made[-1]
        made[-1] = replace(
            last, data=last.data[: draw(seeds) % (len(last.data) + 1)], valid=None, statuses=frozenset())
    data = b"".join(each.data for each in made)
    pieces = cut(data, draw(st.sampled_from(["whole", "one", "few", "few", "bytes"])), draw(seeds))
    return Conversation(tuple(made), pieces, draw(st.booleans()))
