"""The request parser against hypothesis: made, mutated and senseless bytes, and h11 as a second opinion."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import h11
from http_harness import bounded, chunked, events, parse, shown
from hypothesis import given
from hypothesis import strategies as st

from kore.http.parser import END, METHODS, HeadParser

SEASONED = HeadParser()

token = st.text("!#$%&'*+-.^_`|~0123456789abcXYZ", min_size=1, max_size=12).map(str.encode)
value = st.lists(st.sampled_from([*range(0x20, 0x7F), 9, *range(0x80, 0x100)]), max_size=20).map(bytes)
ordinary = st.tuples(
    token.filter(lambda name: name.lower() not in (b"host", b"te", b"expect", b"upgrade", b"connection")), value
)
target = st.lists(st.sampled_from([*range(0x21, 0x7F), 0x80, 0xFF]), max_size=20).map(lambda t: b"/" + bytes(t))
content = st.binary(max_size=60)


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, tuple[Any, ...]]:
    """The bytes of a valid request and what must be read from them: method, target, fields, body."""
    method = draw(st.sampled_from(sorted(METHODS)))
    where = draw(target)
    lines = draw(st.lists(ordinary, max_size=6))
    lines.insert(draw(st.integers(0, len(lines))), (draw(st.sampled_from([b"Host", b"host", b"HOST"])), b"a.b:80"))
    data = draw(content)
    form = draw(st.sampled_from(["none", "length", "chunked"]))
    sent = b""
    if form == "length":
        lines.append((b"Content-Length", b"%d" % len(data)))
        sent = data
    elif form == "chunked":
        lines.append((b"Transfer-Encoding", b"chunked"))
        cuts = sorted({0, len(data), *draw(st.lists(st.integers(0, len(data)), max_size=4))})
        for begin, end in pairwise(cuts):
            sent += b"%x\r\n%b\r\n" % (end - begin, data[begin:end])
        sent += b"0\r\n" + draw(st.sampled_from([b"", b"T: u\r\n"])) + b"\r\n"
    else:
        data = b""
    spaces = st.sampled_from([b"", b" ", b"\t "])
    block = b"".join(name + b":" + draw(spaces) + text + draw(spaces) + b"\r\n" for name, text in lines)
    expected = [
        (name.lower().decode(), text.strip(b" \t").decode("utf-8", "surrogateescape")) for name, text in lines
    ]
    return method.encode() + b" " + where + b" HTTP/1.1\r\n" + block + b"\r\n" + sent, (method, where, expected, data)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in pairwise(edges)]


@bounded
@given(st.lists(requests(), min_size=1, max_size=3), st.lists(st.integers(0, 5000), max_size=6))
def test_valid_requests_are_read_back_however_cut(made: list[tuple[bytes, Any]], cuts: list[int]) -> None:
    data = b"".join(sent for sent, _ in made)
    found = events(*pieces(data, cuts))
    assert found == events(data)
    for _, (method, where, expected, sent) in made:
        head, listed = found.pop(0)
        assert head[1] == method
        assert head[2].encode("utf-8", "surrogateescape") == where
        assert listed == expected
        if sent:
            assert found.pop(0) == sent
        assert found.pop(0) is END
    assert not found


@bounded
@given(
    st.lists(requests(), min_size=1, max_size=2), st.lists(st.integers(0, 5000), max_size=4),
    st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(["drop", "put", "change", "double"]),
                       st.sampled_from([*b"\r\n\0 \t:;,=aA05\"\x7f\xff"])), min_size=1, max_size=4),
)  # fmt: skip
def test_mutations_raise_nothing_but_protocol_errors_and_the_same_however_cut(
    made: list[tuple[bytes, Any]], cuts: list[int], changes: list[tuple[int, str, int]]
) -> None:
    data = bytearray(b"".join(sent for sent, _ in made))
    for position, kind, byte in changes:
        at = position % (len(data) or 1)
        if kind == "drop":
            del data[at : at + 1]
        elif kind == "put":
            data.insert(at, byte)
        elif kind == "change" and data:
            data[at] = byte
        else:
            data[at:at] = data[at : at + 20]
    whole = events(bytes(data))
    # Known heads may not make a parser blind: one that has seen much refuses and accepts what a fresh one does.
    assert events(bytes(data), heads=SEASONED) == whole
    assert events(*pieces(bytes(data), cuts)) == whole
    assert events(*(bytes([byte]) for byte in data)) == whole


@bounded
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_noise_raises_nothing_but_protocol_errors(data: bytes, cuts: list[int]) -> None:
    for prefix in (b"", b"GET / HTTP/1.1\r\n", chunked(b"")):
        assert events(prefix + data) == events(*pieces(prefix + data, cuts))


@bounded
@given(requests(), st.integers(0, 5000), st.sampled_from([*b"\r\n\0 \t:a\x7f\xff"]))
def test_a_known_head_hides_no_wrong_byte(made: tuple[bytes, Any], position: int, byte: int) -> None:
    """The request is learnt, then comes again with one byte more: as a parser that knows nothing sees it."""
    heads = HeadParser()
    assert type(events(made[0], heads=heads)[0]) is tuple
    at = position % len(made[0])
    changed = made[0][:at] + bytes([byte]) + made[0][at:]
    assert events(changed, heads=heads) == events(changed)


@bounded
@given(requests())
def test_a_shared_head_says_what_a_fresh_one_says(made: tuple[bytes, Any]) -> None:
    """Interning is invisible: a parser that knows thousands of heads reads like one that knows none."""
    block = made[0][: made[0].index(b"\r\n\r\n") + 4]
    assert shown(SEASONED.parse(block)) == shown(parse(block)) == shown(SEASONED.parse(block))


@bounded
@given(
    st.sampled_from(sorted(METHODS)), st.text("abc/?=&%", max_size=20).map(lambda t: "/" + t),
    st.lists(st.tuples(st.from_regex(r"x-[a-z]{1,8}", fullmatch=True),
    st.from_regex(r"([!-~]([ -~]*[!-~])?)?", fullmatch=True)), max_size=5),
    st.lists(content, max_size=3), st.booleans(),
)  # fmt: skip
def test_what_h11_sends_is_what_is_read(
    method: str, where: str, lines: list[tuple[str, str]], parts: list[bytes], by_length: bool
) -> None:
    client = h11.Connection(h11.CLIENT)
    framing = ("Content-Length", str(sum(map(len, parts)))) if by_length else ("Transfer-Encoding", "chunked")
    headers = [("Host", "example.org"), *lines, framing]
    sent = client.send(h11.Request(method=method, target=where, headers=headers)) or b""
    for part in parts:
        sent += client.send(h11.Data(data=part)) or b""
    sent += client.send(h11.EndOfMessage()) or b""
    found = events(sent)
    head, listed = found[0]
    assert (head[1], head[2]) == (method, where)
    assert listed == [(name.lower(), text) for name, text in headers]
    assert b"".join(event for event in found[1:-1]) == b"".join(parts)
    assert found[-1] is END
