"""Heads: what a block says, and that sharing heads never hides what it says."""

from __future__ import annotations

import pytest
from http_harness import parse, request, status

from kore.errors import ProtocolError
from kore.http import head as head_module
from kore.http.head import CHUNKED, METHODS, HeadParser, fields


def test_a_plain_request_says_everything_about_itself() -> None:
    head = parse(b"GET /a/b?c=d?e HTTP/1.1\r\nHost: ExAmple.org:8080\r\nAccept: */*\r\n\r\n")
    assert (head.method, head.method_name) == (1, "GET")
    assert (head.target, head.path, head.query) == ("/a/b?c=d?e", "/a/b", "c=d?e")
    assert (head.host, head.hostname, head.minor) == ("ExAmple.org:8080", "example.org", 1)
    assert (head.keep_alive, head.body_length, head.expect_continue, head.upgrade) == (True, 0, False, False)
    assert head.resolution is None


@pytest.mark.parametrize(("name", "number"), METHODS.items())
def test_each_method_has_its_number(name: str, number: int) -> None:
    head = parse(request(name.encode() + b" / HTTP/1.1"))
    assert (head.method, head.method_name, head.body_length) == (number, name, 0)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/", "/", None), (b"/?", "/", ""), (b"/a%20b/%zz/../c", "/a%20b/%zz/../c", None), (b"//x//", "//x//", None),
        (b"/a#b", "/a#b", None), (b"/?a?b", "/", "a?b"), ("/grün".encode(), "/grün", None),
        (b"/\xff\xfe", "/\udcff\udcfe", None), (b"/" + b"x" * 1997, "/" + "x" * 1997, None),
    ],
)  # fmt: skip
def test_the_target_is_kept_as_sent(target: bytes, path: str, query: str | None) -> None:
    head = parse(request(b"GET " + target + b" HTTP/1.1"))
    assert (head.path, head.query) == (path, query)
    assert head.target.encode("utf-8", "surrogateescape") == target


@pytest.mark.parametrize(
    ("line", "host", "path", "query"),
    [
        (b"GET http://B:81/p?q HTTP/1.1", "B:81", "/p", "q"), (b"GET HTTPS://b HTTP/1.1", "b", "/", None),
        (b"GET http://b?q HTTP/1.1", "b", "/", "q"), (b"OPTIONS http://b HTTP/1.1", "b", "*", None),
        (b"OPTIONS http://b/ HTTP/1.1", "b", "/", None), (b"OPTIONS * HTTP/1.1", "a", "*", None),
        (b"GET http://[::1]:80/p HTTP/1.1", "[::1]:80", "/p", None),
    ],
)
def test_absolute_and_asterisk_form(line: bytes, host: str, path: str, query: str | None) -> None:
    head = parse(request(line))
    assert (head.host, head.path, head.query) == (host, path, query)


@pytest.mark.parametrize(
    ("host", "hostname"),
    [
        (b"a", "a"), (b"A.B:80", "a.b"), (b"a.", "a"), (b"a.b.:1", "a.b"), (b"127.0.0.1:8888", "127.0.0.1"),
        (b"[::1]", "::1"), (b"[::1]:8888", "::1"), (b"[FE80:0:0:0:0:0:0:1]", "fe80::1"), (b"a:", "a"),
        (b"a_b", "a_b"), (b"%41", "%41"), (b"[::ffff:1.2.3.4]:65535", "::ffff:102:304"), (b"x" * 253, "x" * 253),
    ],
)  # fmt: skip
def test_hosts(host: bytes, hostname: str) -> None:
    head = parse(b"GET / HTTP/1.1\r\nHost:\t %s \t\r\n\r\n" % host)
    assert (head.host, head.hostname) == (host.decode(), hostname)


@pytest.mark.parametrize(
    "host",
    [
        b"", b" ", b":80", b"a b", b"a b/@", b"a/b", b"u@h", b"a,b", b"[::1", b"::1", b"[::1]x", b"[::1%eth0]",
        b"[:::]",
        b"a:8x", b"a:65536", b"a:000080", b"a:80:80", b"\xc3\xa4", b"x" * 254, b"%4", b"a?b", b"a#b", b"[]", b'"a"',
    ],
)  # fmt: skip
def test_malformed_hosts_are_refused(host: bytes) -> None:
    if host == b"a,b":
        assert parse(request(host=b"Host: a,b\r\n")).hostname == "a,b"  # RFC 3986 3.2.2: sub-delims are legal there
        return
    assert status(request(host=b"Host: " + host + b"\r\n")) == 400


@pytest.mark.parametrize(
    ("version", "lines", "expected"),
    [
        (b"1.1", [], True), (b"1.1", [b"Connection: close"], False),
        (b"1.1", [b"connection: Keep-Alive, CLOSE"], False),
        (b"1.1", [b"Connection: x", b"Connection: close"], False), (b"1.1", [b"Connection: closed"], True),
        (b"1.1", [b"Connection: keep-alive"], True), (b"1.1", [b"Connection:"], True),
        (b"1.1", [b"Connection: ,,"], True),
        (b"1.0", [], False), (b"1.0", [b"Connection: keep-alive"], True), (b"1.0", [b"CONNECTION:KEEP-ALIVE"], True),
        (b"1.0", [b"Connection: keep-alive, close"], False), (b"1.0", [b"Keep-Alive: 5"], False),
    ],
)  # fmt: skip
def test_keep_alive(version: bytes, lines: list[bytes], expected: bool) -> None:
    block = request(b"GET / HTTP/" + version, *lines)
    heads = HeadParser()
    assert [heads.parse(block).keep_alive for _ in range(3)] == [expected] * 3


@pytest.mark.parametrize(
    ("line", "lines", "expected"),
    [
        (b"GET / HTTP/1.1", [b"Connection: Upgrade", b"Upgrade: websocket"], True),
        (b"GET / HTTP/1.1", [b"Connection: keep-alive, upgrade", b"Upgrade: websocket"], True),
        (b"GET / HTTP/1.1", [b"Upgrade: websocket"], False), (b"GET / HTTP/1.1", [b"Connection: upgrade"], False),
        (b"GET / HTTP/1.1", [b"Connection: upgrade", b"Upgrade:"], False),
        (b"GET / HTTP/1.0", [b"Connection: upgrade", b"Upgrade: websocket"], False),
    ],
)
def test_upgrade(line: bytes, lines: list[bytes], expected: bool) -> None:
    assert parse(request(line, *lines)).upgrade is expected


def test_a_client_of_http_1_0_may_leave_out_its_host() -> None:
    head = parse(b"GET / HTTP/1.0\r\n\r\n")
    assert (head.host, head.hostname, head.minor, head.keep_alive) == ("", "", 0, False)


def test_expect_continue_counts_with_a_body_in_http_1_1_only() -> None:
    expecting = b"Expect: 100-Continue"
    assert parse(request(b"POST / HTTP/1.1", expecting, b"Content-Length: 1")).expect_continue
    assert parse(request(b"POST / HTTP/1.1", expecting, b"Transfer-Encoding: chunked")).expect_continue
    assert not parse(request(b"POST / HTTP/1.1", expecting)).expect_continue
    assert not parse(request(b"POST / HTTP/1.0", expecting, b"Content-Length: 1")).expect_continue
    assert parse(request(b"POST / HTTP/1.0", b"Expect: wonders")).minor == 0


def test_fields_are_trimmed_folded_and_decoded() -> None:
    block = request(b"GET / HTTP/1.1", b"X-A: \t b \t c\t ", b"x-a:", b"Latin: \xe4", "UTF: ä".encode())
    assert HeadParser().parse(block).path == "/"
    assert fields(block) == [("host", "a"), ("x-a", "b \t c"), ("x-a", ""), ("latin", "\udce4"), ("utf", "ä")]
    assert fields(b"GET / HTTP/1.0\r\n\r\n") == []


def test_a_head_in_the_hot_path_has_the_body_length_it_says() -> None:
    assert parse(request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked")).body_length == CHUNKED == -1


def test_requests_that_differ_in_ordinary_fields_share_one_head() -> None:
    heads = HeadParser()
    first = heads.parse(request(b"GET / HTTP/1.1", b"User-Agent: a", b"Connection: keep-alive"))
    first.resolution = "found"
    for number in range(5):
        block = request(b"GET / HTTP/1.1", b"User-Agent: %d" % number, b"X-%d: y" % number,
        b"Upgrade-Insecure-Requests: 1")
        assert heads.parse(block) is first
        assert heads.recognise(block) is first
    assert heads.recognise(request(b"GET /other HTTP/1.1")) is None
    assert heads.recognise(request() + request()) is None
    assert heads.recognise(request()[:-1]) is None
    post = request(b"POST / HTTP/1.1", b"A: b", b"Content-Length: 5")
    assert heads.parse(post) is heads.parse(post.replace(b"b", b"c"))
    assert heads.parse(post.replace(b"5", b"6")).body_length == 6


@pytest.mark.parametrize(
    "field",
    [b"Connection: close", b"connection: close", b"CONTENT-LENGTH: 1", b"Transfer-Encoding: chunked",
    b"eXPECT: 100-continue",
     b"hOST: a", b"Connection: keep-alive, close", b"Connection: keep-alive\r\nConnection: close", b"Content-Length:1"],
)  # fmt: skip
def test_a_known_head_never_hides_a_field_that_matters(field: bytes) -> None:
    heads = HeadParser()
    heads.parse(request())
    for block in (request(b"GET / HTTP/1.1", field), request(b"GET / HTTP/1.1", b"a: b", field, b"c: d")):
        assert heads.recognise(block) is None


@pytest.mark.parametrize("bad", [b"a", b"a : b", b": b", b" a: b", b"a: \x00", b"a: b\nc: d", b"a: \r", b"a: \x7f",
b"(: b"])
def test_a_known_head_never_hides_a_malformed_field(bad: bytes) -> None:
    heads = HeadParser()
    heads.parse(request())
    assert heads.recognise(request(b"GET / HTTP/1.1", bad)) is None
    with pytest.raises(ProtocolError):
        heads.parse(request(b"GET / HTTP/1.1", b"c: d", bad))


def test_http_1_0_keep_alive_is_not_taken_for_the_request_without() -> None:
    heads = HeadParser()
    for _ in range(3):
        assert heads.parse(request(b"GET / HTTP/1.0", b"Connection: keep-alive")).keep_alive
        assert not heads.parse(request(b"GET / HTTP/1.0")).keep_alive


def test_what_is_remembered_is_bounded() -> None:
    heads = HeadParser()
    for number in range(5000):
        heads.parse(request(b"GET /%d HTTP/1.1" % number))
        assert len(heads.known) <= head_module.HEADS_KEPT_MAX
    before = len(heads.known)
    heads.parse(request(b"GET /" + b"x" * 600 + b" HTTP/1.1"))
    assert len(heads.known) == before
