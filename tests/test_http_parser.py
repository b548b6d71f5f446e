"""The request parser: tables of bytes and events, each cut at every byte."""

from __future__ import annotations

import re
import time

import pytest
from http_harness import body, chunked, cut_everywhere, parse, request, status

from kore.errors import ProtocolError
from kore.http.parser import END, METHODS, Head, HeadParser, RequestParser

LINES = [
    (b"GET  / HTTP/1.1", 400), (b"GET /  HTTP/1.1", 400), (b" GET / HTTP/1.1", 400), (b"GET / HTTP/1.1 ", 400),
    (b"GET / HTTP/1.1 x", 400), (b"GET /a b HTTP/1.1", 400), (b"GET\t/ HTTP/1.1", 400), (b"GET /", 400), (b"GET", 400),
    (b"", 400), (b"G@T / HTTP/1.1", 400), (b"GET /\x00 HTTP/1.1", 400), (b"GET /\x7f HTTP/1.1", 400),
    (b"GET /\t HTTP/1.1", 400), (b"GET / http/1.1", 400), (b"GET / HTTP/1", 400), (b"GET / HTTP/11", 400),
    (b"GET / HTTP/1.10", 400), (b"GET / HTTP/x.1", 400), (b"GET / HTTPS/1.1", 400), (b"GET / ", 400),
    (b"GET / HTTP/1.2", 505), (b"GET / HTTP/2.0", 505), (b"GET / HTTP/0.9", 505), (b"FOO / HTTP/3.0", 505),
    (b"get / HTTP/1.1", 501), (b"TRACE / HTTP/1.1", 501), (b"CONNECT a:80 HTTP/1.1", 501), (b"FOO / HTTP/1.1", 501),
    (b"M" * 33 + b" / HTTP/1.1", 501), (b"M" * 32 + b" / HTTP/1.1", 501), (b"M" * 4000 + b" / HTTP/1.1", 501),
    (b"GET /" + b"x" * 1998 + b" HTTP/1.1", 414), (b"GET /" + b"x" * 5000 + b" HTTP/1.1", 414),
    (b"GET * HTTP/1.1", 400), (b"GET a:80 HTTP/1.1", 400), (b"GET a/b HTTP/1.1", 400), (b"GET ftp://a/ HTTP/1.1", 400),
    (b"GET http:/// HTTP/1.1", 400), (b"GET http://u@a/ HTTP/1.1", 400), (b"GET http://a#b HTTP/1.1", 400),
    (b"GET ?a HTTP/1.1", 400), (b"PRI * HTTP/2.0", 505), (b"GET / HTTP/1.1\x00", 400), (b"GET /\r HTTP/1.1", 400),
    (b"GET / HTTP/1.1\r", 400),
]  # fmt: skip

FIELDS = [
    (b"a", 400), (b": a", 400), (b"a : b", 400), (b"a\t: b", 400), (b" a: b", 400), (b"\ta: b", 400), (b"a b: c", 400),
    (b"a: b\r\n c", 400), (b"a: b\r\n\tc", 400), (b"a: b\nc: d", 400), (b"a: b\rc: d", 400), (b"a: \x00", 400),
    (b"a: \x01", 400), (b"a: \x7f", 400), (b"a: \x0b", 400), (b"a\x00: b", 400), (b"\xc3\xa4: b", 400),
    (b"(a): b", 400),
    (b"a: b\n", 400), (b"\n", 400), (b"a: b\r\r", 400),
    (b"Host: a", 400), (b"HOST: b", 400), (b"host:", 400),
    (b"Content-Length: ", 400), (b"Content-Length: +5", 400), (b"Content-Length: -5", 400),
    (b"Content-Length: 5 5", 400),
    (b"Content-Length: 0x5", 400), (b"Content-Length: 5,6", 400), (b"Content-Length: 5,", 400),
    (b"Content-Length: 1_0", 400), (b"Content-Length: 005", 400), (b"Content-Length: \xb2", 400),
    (b"Content-Length: 5\r\nContent-Length: 6", 400), (b"Content-Length: 5\r\ncontent-length: ", 400),
    (b"Content-Length: 9223372036854775808", 413), (b"Content-Length: " + b"9" * 2000, 413),
    (b"Content-Length: 1001", 413),
    (b"Transfer-Encoding: chunked\r\nContent-Length: 5", 400), (b"Content-Length: 5\r\nTransfer-Encoding: x", 400),
    (b"Transfer-Encoding: gzip", 501), (b"Transfer-Encoding: gzip, chunked", 501),
    (b"Transfer-Encoding: xchunked", 501),
    (b"Transfer-Encoding: identity", 501), (b"Transfer-Encoding: chunked, gzip", 400),
    (b"Transfer-Encoding: chunked, chunked", 400), (b"Transfer-Encoding: chunked\r\ntransfer-encoding: chunked", 400),
    (b"Transfer-Encoding: ", 400), (b"Transfer-Encoding: chunked,", 400), (b"Transfer-Encoding: chunked;a=b", 400),
    (b"Expect: wonders", 417), (b"Expect: 100-continue, wonders", 417), (b"Expect: 100-continue=1", 417),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_request_lines_that_are_refused(line: bytes, expected: int) -> None:
    assert status(request(line)) == expected


@pytest.mark.parametrize(("field", "expected"), FIELDS)
def test_fields_that_are_refused(field: bytes, expected: int) -> None:
    assert status(request(b"POST / HTTP/1.1", field)) == expected
    assert status(request(b"POST / HTTP/1.1", b"Accept: x", field, b"Accept: y")) == expected


def test_http_1_1_needs_a_host_even_with_an_absolute_target() -> None:
    assert status(request(host=b"")) == 400
    assert status(request(b"GET http://b/ HTTP/1.1", host=b"")) == 400
    assert status(request(b"GET http://b/ HTTP/1.1", host=b"Host: @\r\n")) == 400
    assert status(request(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked", host=b"")) == 400


@pytest.mark.parametrize(
    "start",
    [b"\x16", b"\x00", b"\x80", b"\n", b"GET /\n", b"GET \n", b"GET / HTTP/1.1\n", b"GET / X", b"{",
    b"GET / HTTP/1.1\r\n\n",
     b"M" * 33, b"GET /" + b"x" * 1998, b"FOO / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\n",
     b"GET / HTTP/1.1\r\nHost: \x00",
     b"SSH-2.0-x\r", b"\rG", b"GET / HTTP/1.1\r\nHost: a\r\n\n"],
)  # fmt: skip
def test_what_cannot_become_a_request_is_refused_at_once(start: bytes) -> None:
    """At the first byte that makes it impossible, not at the end of the head or by a deadline."""
    assert status(start) in (400, 414, 501)
    assert status(start[:-1]) == 0


def test_limits_of_the_head() -> None:
    room = 4096 - len(request(b"GET / HTTP/1.1", b"X: "))
    assert status(request(b"GET / HTTP/1.1", b"X: " + b"x" * room)) == 0
    assert status(request(b"GET / HTTP/1.1", b"X: " + b"x" * (room + 1))) == 431
    assert status(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 5000) == 431
    assert status(request(b"GET /" + b"x" * 300 + b" HTTP/1.1"), header_bytes_max=200) == 414
    assert status(request(b"GET / HTTP/1.1", *[b"a:"] * 99)) == 0
    assert status(request(b"GET / HTTP/1.1", *[b"a:"] * 100)) == 431
    assert status(request(b"GET / HTTP/2.0", *[b"a:"] * 100)) == 505
    assert status(request(b"GET / HTTP/1.1", *[b"a:"] * 1500)) == 431
    assert status(request(b"GET / HTTP/1.1", *[b"a:"] * 1500, b"\x00"), header_bytes_max=65535) == 400


def test_known_heads_are_still_held_to_the_limit() -> None:
    heads = HeadParser(100)
    head = heads.parse(request())
    assert heads.recognise(request(b"GET / HTTP/1.1", b"A: b")) is head
    assert heads.recognise(request(b"GET / HTTP/1.1", b"A: " + b"b" * 100)) is None
    with pytest.raises(ProtocolError) as error:
        heads.parse(request(b"GET / HTTP/1.1", b"A: " + b"b" * 100))
    assert error.value.status == 431


def test_up_to_two_empty_lines_before_a_request_are_skipped() -> None:
    assert [type(event) for event in cut_everywhere(b"\r\n\r\n" + request())] == [tuple, type(END)]
    assert status(b"\r\n" * 3 + request()) == 400
    assert status(b"\n" + request()) == 400
    assert len(cut_everywhere((b"\r\n\r\n" + request()) * 3)) == 6


@pytest.mark.parametrize("method", [name.encode() for name in METHODS])
def test_every_method_frames_its_body_alike(method: bytes) -> None:
    line = method + b" / HTTP/1.1"
    assert body(request(line, b"Content-Length: 5") + b"hello") == b"hello"
    assert body(request(line, b"Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n") == b"hello"
    assert body(request(line)) == b""


def test_repeated_equal_lengths_collapse() -> None:
    """In either order: who takes the first field alone cannot read a list."""
    for lengths in ((b"5", b"5, 5"), (b"5, 5", b"5"), (b"5,5",)):
        assert body(request(b"POST / HTTP/1.1", *(b"content-length: " + one for one in lengths)) + b"hello") == b"hello"


def test_a_body_over_its_limit_is_refused_at_the_head() -> None:
    assert body(request(b"POST / HTTP/1.1", b"Content-Length: 1000") + b"x" * 1000) == b"x" * 1000
    parser = RequestParser(HeadParser(), 1000)
    parser.feed(request(b"PUT / HTTP/1.0", b"Content-Length: 1001"))
    with pytest.raises(ProtocolError) as error:
        parser.next()
    assert error.value.status == 413
    assert parser.head is not None
    assert (parser.head.method_name, parser.head.minor) == ("PUT", 0)
    assert body(request(b"POST / HTTP/1.1", b"Content-Length: 0"), body_bytes_max=0) == b""
    assert body(request(b"POST / HTTP/1.1", b"Content-Length: 1") + b"x", body_bytes_max=0) == 413


def test_pieces_of_a_body_leave_as_they_come_and_are_not_held() -> None:
    parser = RequestParser(HeadParser(), 10**9)
    parser.feed(request(b"POST / HTTP/1.1", b"Content-Length: 1000000"))
    assert type(parser.next()) is Head
    for _ in range(10):
        assert parser.next() is None
        piece = b"x" * 100000
        parser.feed(piece)
        assert parser.next() is piece
        assert parser.buffered == 0
    assert parser.next() is END


def test_idle_says_that_no_part_of_a_request_is_held() -> None:
    parser = RequestParser(HeadParser(), 1000)
    assert parser.idle
    parser.feed(b"")
    assert parser.idle
    parser.feed(b"\r\n")
    assert not parser.idle
    assert parser.next() is None
    assert parser.idle
    block = request(b"POST / HTTP/1.1", b"Content-Length: 2")
    for byte in block[:-1]:
        parser.feed(bytes([byte]))
        assert parser.next() is None
        assert not parser.idle
    assert parser.buffered == len(block) - 1
    parser.feed(block[-1:])
    assert parser.next() is parser.head
    assert parser.block == block
    assert not parser.idle
    parser.feed(b"ab")
    assert parser.next() == b"ab"
    assert parser.next() is END
    assert parser.idle
    parser.feed(request() + b"G")
    assert type(parser.next()) is Head
    assert parser.next() is END
    assert not parser.idle
    assert parser.next() is None
    assert parser.buffered == 1


def test_a_request_not_understood_has_no_head() -> None:
    parser = RequestParser(HeadParser(), 1000)
    parser.feed(request() + b"G(")
    assert type(parser.next()) is Head
    assert parser.next() is END
    with pytest.raises(ProtocolError):
        parser.next()
    assert parser.head is None


@pytest.mark.parametrize("fill", [b"x", b"\r\n", b"a:b\r\n", b"\r"])
def test_byte_by_byte_input_costs_no_more_than_its_bytes(fill: bytes) -> None:
    """Four times the input takes about four times as long; a quadratic search takes sixteen."""
    def seconds(size: int) -> float:
        best = 9.0
        for _ in range(3):
            parser = RequestParser(HeadParser(65535), 1000)
            data = b"GET / HTTP/1.1\r\nHost: a\r\n" + (b"X: " + b"x" * size if fill == b"x" else (fill * size)[:size])
            begin = time.process_time()
            try:
                for i in range(len(data)):
                    parser.feed(data[i : i + 1])
                    while parser.next() is not None:
                        pass
            except ProtocolError:
                pass
            best = min(best, time.process_time() - begin)
        return best

    assert seconds(48000) < 9 * seconds(12000) + 0.01


# The list of http.md 19.1 ---------------------------------------------------------------------------------------------


def test_19_1_1_chunked_is_decoded_and_ambiguous_codings_are_refused() -> None:
    assert body(chunked(b"3\r\nabc\r\n0\r\n\r\n")) == b"abc"
    assert body(chunked(b"3\r\nabc\r\n0\r\n\r\n"), body_bytes_max=2) == 413
    assert status(request(b"POST / HTTP/1.1", b"Content-Length: 3", b"Transfer-Encoding: chunked") + b"abc") == 400
    assert status(request(b"POST / HTTP/1.1", b"Transfer-Encoding: br")) == 501
    assert status(request(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked")) == 400


@pytest.mark.parametrize("value", [b"+5", b"005", b"5 ", b"5\r\nContent-Length: 6", b"five", b"5,6", b""])
def test_19_1_2_content_length_is_digits_and_only_one_value(value: bytes) -> None:
    data = request(b"POST / HTTP/1.1", b"Content-Length: " + value) + b"hello"
    assert body(data) == (b"hello" if value == b"5 " else 400)


def test_19_1_3_delete_is_framed_like_every_method() -> None:
    assert body(request(b"DELETE / HTTP/1.1")) == b""
    assert body(request(b"DELETE / HTTP/1.1", b"Content-Length: x")) == 400
    assert body(request(b"DELETE / HTTP/1.1", b"Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\n\r\n") == b"a"


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS"])
def test_19_1_4_bodies_of_get_head_and_options_are_consumed(method: bytes) -> None:
    found = cut_everywhere(request(method + b" / HTTP/1.1",
    b"Content-Length: 20") + b"GET /evil HTTP/1.1\r\n" + request())
    assert found[1:3] == [b"GET /evil HTTP/1.1\r\n", END]
    assert found[3][0][3] == "/"


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\n\r", b"\r\r\n"])
def test_19_1_5_only_crlf_ends_a_line(end: bytes) -> None:
    block = request(b"GET / HTTP/1.1", b"A: b")
    positions = [match.start() for match in re.finditer(b"\r\n", block)]
    assert len(positions) == 4
    for position in positions:
        assert status(block[:position] + end + block[position + 2 :] + b"rest") == 400
    assert status(block.replace(b"\r\n", end)) == 400


def test_19_1_6_nul_is_refused_wherever_it_stands() -> None:
    block = request(b"GET / HTTP/1.1", b"A: b")
    for position in range(len(block)):
        assert status(block[:position] + b"\0" + block[position:]) == 400


def test_19_1_7_a_length_after_many_fields_is_seen_and_too_many_are_431() -> None:
    many = [b"X-%d: y" % number for number in range(98)]
    assert body(request(b"POST / HTTP/1.1", *many, b"Content-Length: 5") + b"hello") == b"hello"
    assert status(request(b"POST / HTTP/1.1", *many, b"X: y", b"Content-Length: 5") + b"hello") == 431


def test_19_1_8_host_is_one_exact_valid_field() -> None:
    assert status(request(host=b"HostFoo: x\r\n")) == 400
    assert status(request(host=b"Host: a\r\nHost: a\r\n")) == 400
    assert status(request(host=b"Host: a b/@\r\n")) == 400
    assert parse(request(b"GET / HTTP/1.1", b"HostFoo: x")).host == "a"


def test_19_1_9_exactly_two_single_spaces() -> None:
    for line in (b"GET /  HTTP/1.1", b"GET  / HTTP/1.1", b"GET / HTTP/1.1 more", b"GET / more HTTP/1.1"):
        assert status(request(line)) == 400


def test_19_1_10_an_empty_name_is_refused() -> None:
    assert status(request(b"GET / HTTP/1.1", b": x")) == 400


def test_19_1_11_what_follows_a_body_is_the_next_request() -> None:
    found = cut_everywhere(request(b"POST / HTTP/1.1",
    b"Content-Length: 5") + b"hello" + request(b"GET /next HTTP/1.1"))
    assert [found[1], found[2], found[3][0][3], found[4]] == [b"hello", END, "/next", END]
    found = cut_everywhere(chunked(b"1\r\na\r\n0\r\n\r\n") + request(b"GET /next HTTP/1.1"))
    assert [found[1], found[2], found[3][0][3], found[4]] == [b"a", END, "/next", END]


def test_19_1_12_pipelined_requests_come_out_in_order() -> None:
    data = b"".join(request(b"GET /%d HTTP/1.1" % number) for number in range(20))
    found = cut_everywhere(data)
    assert [event[0][3] for event in found[::2]] == [f"/{number}" for number in range(20)]
    assert found[1::2] == [END] * 20
