"""Static files over real sockets: what is found under which path, with which fields, whole and in parts."""

from __future__ import annotations

import os
import re
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from kore.http.media_types import MediaTypes
from tests.files_harness import LARGE, content, file_server, write
from tests.http_server_harness import ENGINES, request
from tests.support import wait_until

OPTIONS = """
kore.config.filemap_ext = ".html"
kore.config.http_media_type = "text/x-own js own"
"""


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with file_server(tmp_path_factory.mktemp("files"), request.param, options=OPTIONS) as made:
        yield made


FOUND = [
    ("a.txt", b"hello a"),
    ("a.txt?query", b"hello a"),
    ("%61%2etxt", b"hello a"),
    ("a.txt", b"hello a"),
    ("page", b"<p>page</p>"),
    ("%70age", b"<p>page</p>"),  # http.md 19.3: the second look-up is of the decoded path, too
    ("sub/", b"index of sub"),
    ("sub/index.html", b"index of sub"),
    ("sub/.", b"index of sub"),
    ("sub/x.css", b"css"),
    ("deep/er/a.txt", b"deeper a"),  # the longest URL wins
    ("deep%2Fer/a.txt", b"deeper a"),
    ("deep//er/./x/../a.txt", b"deeper a"),
    ("../%C3%A4%20b/a.txt", b"odd a"),
    ("../files/a.txt", b"hello a"),
    ("a%20b+c%25d.txt", b"odd name"),  # http.md 19.3: "+" is a plus
    ("%c3%a4%E2%82%AC.txt", b"unicode name"),
    ("\u00e4\u20ac.txt", b"unicode name"),
    ("n" * 255, b"longest name"),
]


@pytest.mark.parametrize(("path", "body"), FOUND)
def test_found(server, path: str, body: bytes) -> None:
    """What a path means, twice: the second answer comes from memory."""
    with server.client() as client:
        for _ in range(2):
            answer = client.ask(request("/files/" + path))
            assert (answer.status, answer.body) == (200, body)


NOT_FOUND = [
    "", "nowhere", "nowhere/", "a.txt/", "a.txt/x", "a.txt.html/", "bare/", "a+b+c%25d.txt", "noextension/", "dir",
    "index.html", "n" * 256, "x/" * 400, "deep/er", "deep/", "secret.txt", "sub/../../secret.txt",
]  # fmt: skip


@pytest.mark.parametrize("path", NOT_FOUND)
def test_not_found(server, path: str) -> None:
    """404, on a connection that stays. A map's URL without its slash is another map's, where one claims it."""
    with server.client() as client:
        assert client.ask(request("/files/" + path)).status == 404
        client.alive()


BAD_PATHS = ["%00", "a.txt%00", "%0d%0aset-cookie:%20x", "%1f", "%7f", "%", "%4", "a.txt%", "%zz", "%u0041", "%%41"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_malformed_paths(server, path: str) -> None:
    """Control characters and escapes that are none: 400, on a connection that stays (http.md 18)."""
    with server.client() as client:
        assert client.ask(request("/files/" + path)).status == 400
        client.alive()


REDIRECTS = [
    ("/files/sub", "/files/sub/"),
    ("/files/sub?a=b&c", "/files/sub/?a=b&c"),  # http.md 12: the query was lost
    ("/files/sub?", "/files/sub/?"),
    ("/files/%73ub", "/files/sub/"),
    ("/files", "/files/"),
    ("//evil.example/..%2Ffiles/sub", "/files/sub/"),  # "//evil.example/" would be another host
    ("/files//evil.example/%2e%2e/sub", "/files/sub/"),
    ("/files/around/around", "/files/around/around/"),
    ("/%C3%A4%20b", "/%C3%A4%20b/"),
]


@pytest.mark.parametrize(("path", "location"), REDIRECTS)
def test_directories_get_their_slash(server, path: str, location: str) -> None:
    """302 with the slash and the query, as a path of this server whatever was sent."""
    answer = server.ask(request(path))
    assert (answer.status, answer.fields["location"], answer.body) == (302, location, b"")


def test_fields(server) -> None:
    """Type, date, tag and length of a file."""
    path = Path(server.program.directory, "www", "a.txt")
    answer = server.ask(request("/files/a.txt"))
    assert answer.fields["content-type"] == "text/plain; charset=utf-8"
    assert answer.fields["last-modified"] == formatdate(path.stat().st_mtime, usegmt=True)
    assert re.fullmatch(r'"[0-9a-f-]+"', answer.fields["etag"])
    assert answer.fields["accept-ranges"] == "bytes"
    assert answer.fields["content-length"] == "7"
    assert "vary" not in answer.fields
    assert "content-encoding" not in answer.fields


def test_an_empty_file(server) -> None:
    """http.md 19.3: 200 with a length of 0, where the C platform said 404."""
    for method in ("GET", "HEAD"):
        answer = server.ask(request("/files/empty.txt", method=method), method)
        assert (answer.status, answer.fields["content-length"], answer.body) == (200, "0", b"")


@pytest.mark.parametrize("path", ["a.txt", "large.bin", "mid.js", "sub/", "nowhere", "sub"])
def test_head_is_get_without_the_body(server, path: str) -> None:
    """The same status and fields."""
    get, head = (server.ask(request("/files/" + path, method=method), method) for method in ("GET", "HEAD"))
    for answer in (get, head):
        del answer.fields["date"]
    assert head.status == get.status
    assert head.fields == get.fields


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["a.txt", "nowhere"])
def test_other_methods(server, path: str, method: str) -> None:
    """http.md 19.2: 405 says what is allowed."""
    with server.client() as client:
        client.ask(request("/files/" + path))
        answer = client.ask(request("/files/" + path, method=method))
        assert answer.status == 405
        assert answer.fields["allow"] == "GET, HEAD"


def test_media_types(server) -> None:
    """kore-api.md 19 row 30: an application's types win over the built-in ones."""
    assert server.ask(request("/files/mid.js")).fields["content-type"] == "text/x-own; charset=utf-8"
    assert server.ask(request("/files/sub/x.css")).fields["content-type"] == "text/css; charset=utf-8"
    assert "content-type" not in server.ask(request("/files/noextension")).fields


TYPES = [
    (b"x.html", "text/html; charset=utf-8"), (b"x.HTM", "text/html; charset=utf-8"),
    (b"x.js", "text/javascript; charset=utf-8"), (b"a.b/x.json", "application/json"), (b"x.svg", "image/svg+xml"),
    (b"x.tar.gz", "application/gzip"), (b"x.woff2", "font/woff2"), (b"x.wasm", "application/wasm"),
    (b"x.own", "model/own"), (b"x.PNG", "image/own"), (b"x.jpg", "image/jpeg"),
    (b"x", None), (b"x.", None), (b".html", None), (b"d/.html", None), (b"a.html/x", None), (b"x.unknown", None),
    (b"x." + b"y" * 10_000, None), (b"", None), (b"x.\xff", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "media_type"), TYPES)
def test_the_table_of_types(name: bytes, media_type: str | None) -> None:
    """By the extension of the last component, in any case."""
    types = MediaTypes([("model/own", ["own"]), ("image/own", ["PNG"])])
    assert types.of(name) == media_type


# --- conditions and ranges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["a.txt", "large.bin"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_not_modified(server, path: str, method: str) -> None:
    """304 by tag and by date, without a body and without a length; 412; with HEAD as with GET."""
    with server.client() as client:
        first = client.ask(request("/files/" + path, method="HEAD"), "HEAD")
        tag, date = first.fields["etag"], first.fields["last-modified"]
        later = formatdate(time.time(), usegmt=True)
        for field in (
            f"If-None-Match: {tag}", f"if-none-match: W/{tag}", "IF-NONE-MATCH: *", f"If-Modified-Since: {date}",
            f"If-Modified-Since: {later}",
        ):
            answer = client.ask(request("/files/" + path, field, method=method), method)
            assert answer.status == 304, field
            assert answer.fields["etag"] == tag
            assert "content-length" not in answer.fields
            assert "content-type" not in answer.fields
        for field in ('If-Match: "x"', "If-Unmodified-Since: Thu, 01 Jan 1970 00:00:00 GMT"):
            assert client.ask(request("/files/" + path, field, method=method), method).status == 412
        for fields in (
            ('If-None-Match: "x"',), (f"If-Match: {tag}",), (f"If-None-Match: {tag[:-1]}",),
            ("If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT",), ('If-None-Match: "x"', f"If-Modified-Since: {date}"),
        ):  # fmt: skip
            assert client.ask(request("/files/" + path, *fields, method=method), method).status == 200
        assert client.ask(request("/files/" + path, 'If-None-Match: "x"', f"If-None-Match: {tag}")).status == 304


@pytest.mark.parametrize(("path", "whole"), [("mid.js", content(60_000)), ("large.bin", LARGE)])
def test_one_range(server, path: str, whole: bytes) -> None:
    """206 with just those bytes, from memory and from the file."""
    size = len(whole)
    with server.client() as client:
        for value, first, end in (
            ("0-0", 0, 1), ("100-49999", 100, 50_000), ("59000-", 59_000, size), ("-7", size - 7, size),
            ("0-", 0, size), (f"{size - 1}-{size + 5}", size - 1, size), ("1-20,10-30", 1, 31),
        ):  # fmt: skip
            answer = client.ask(request("/files/" + path, f"Range: bytes={value}"))
            assert answer.status == 206
            assert answer.body == whole[first:end]
            assert answer.fields["content-range"] == f"bytes {first}-{end - 1}/{size}"
        assert client.ask(request("/files/" + path, "Range: bytes=0-1", method="HEAD"), "HEAD").status == 200
        assert client.ask(request("/files/" + path, "Range: bytes=0-1", "Range: bytes=5-6")).body == whole
        assert client.ask(request("/files/" + path, "Range: lines=0-1")).body == whole


@pytest.mark.parametrize(("path", "whole"), [("mid.js", content(60_000)), ("large.bin", LARGE)])
def test_several_ranges(server, path: str, whole: bytes) -> None:
    """multipart/byteranges: parts in the order asked for, each with its place; its length is announced."""
    answer = server.ask(request("/files/" + path, "Range: bytes=50000-50999,0-9,-5"))
    assert answer.status == 206
    assert "content-range" not in answer.fields
    kind, _, boundary = answer.fields["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    before, *parts, after = answer.body.split(b"--" + boundary.encode())
    assert (before, after) == (b"", b"--\r\n")
    size, found = len(whole), []
    for part in parts:
        head, _, body = part.removesuffix(b"\r\n").partition(b"\r\n\r\n")
        place = re.search(rb"content-range: bytes (\d+)-(\d+)/(\d+)", head)
        assert place is not None
        first, last, total = map(int, place.groups())
        assert total == size
        assert body == whole[first : last + 1]
        assert b"content-type: " in head
        found.append((first, last))
    assert found == [(50_000, 50_999), (0, 9), (size - 5, size - 1)]


@pytest.mark.parametrize("path", ["a.txt", "large.bin", "empty.txt"])
def test_a_range_beyond_the_end(server, path: str) -> None:
    """416 says how long the file is."""
    answer = server.ask(request("/files/" + path, "Range: bytes=99999999-"))
    size = len(LARGE) if path == "large.bin" else 7 if path == "a.txt" else 0
    assert (answer.status, answer.fields["content-range"], answer.body) == (416, f"bytes */{size}", b"")


def test_a_thousand_ranges(server) -> None:
    """More ranges than are served: the whole file, once."""
    for path, whole in (("a.txt", b"hello a"), ("large.bin", LARGE)):
        answer = server.ask(request("/files/" + path, "Range: bytes=" + ",".join(["0-0"] * 1000)))
        assert (answer.status, answer.body) == (200, whole)


def test_if_range(server) -> None:
    """The part only of what the client has the rest of."""
    with server.client() as client:
        first = client.ask(request("/files/large.bin", method="HEAD"), "HEAD").fields
        for value, status in (
            (first["etag"], 206), (first["last-modified"], 206), ('"x"', 200), ("W/" + first["etag"], 200),
            ("Thu, 01 Jan 1970 00:00:00 GMT", 200),
        ):  # fmt: skip
            answer = client.ask(request("/files/large.bin", "Range: bytes=0-9", f"If-Range: {value}"))
            assert (answer.status, len(answer.body)) == (status, 10 if status == 206 else len(LARGE))


# --- compressed siblings -------------------------------------------------------------------------------------

ACCEPTED = [
    (None, ""), ("", ""), ("gzip", "gzip"), ("x-gzip", "gzip"), ("GZIP", "gzip"), ("br, gzip", "br"),
    ("gzip;q=1, br;q=0.5", "gzip"), ("gzip;q=0.001", "gzip"), ("gzip;q=0", ""), ("gzip; q=0.0", ""),
    ("*", "zstd"), ("*;q=0", ""), ("*;q=0, br", "br"), ("zstd;q=0, *", "br"), ("deflate", ""),
    ("identity, gzip;q=0.5", ""), ("identity;q=0.5, gzip", "gzip"), ("gzip;q=2", ""), ("gzip;q=x", ""),
    ("gzip, br, zstd", "zstd"), (",, ,gzip,", "gzip"), ("gzipx", ""), ("gzip;level=9", "gzip"),
]  # fmt: skip


@pytest.fixture(scope="module")
def siblings(server):
    www = Path(server.program.directory, "www")
    for name, size in (("packed.txt", 1000), ("packed.bin", 300_000)):
        write(www / name, content(size))
        for number, suffix in enumerate((".zst", ".br", ".gz")):
            write(www / (name + suffix), suffix.encode().ljust(4) * (size // 8 + number), 50)
    write(www / "stale.txt", b"new", 10)
    write(www / "stale.txt.gz", b"old", 20)
    write(www / "odd.txt", b"odd")
    (www / "odd.txt.gz").mkdir()
    (www / "odd.txt.br").symlink_to("../secret.txt")
    return server


@pytest.mark.parametrize(("accepted", "coding"), ACCEPTED)
def test_what_the_client_accepts(siblings, accepted: str | None, coding: str) -> None:
    """By weight, then by size; always with Vary; the same from memory and from the file."""
    fields = () if accepted is None else (f"Accept-Encoding: {accepted}",)
    suffix = {"": b"", "gzip": b".gz", "br": b".br", "zstd": b".zst"}[coding]
    for name, size in (("packed.txt", 1000), ("packed.bin", 300_000)):
        answer = siblings.ask(request(f"/files/{name}", *fields))
        assert answer.status == 200
        assert answer.fields.get("content-encoding", "") == coding
        assert answer.fields["vary"] == "accept-encoding"
        assert answer.fields["content-type"] in ("text/plain; charset=utf-8", "application/octet-stream")
        number = (b".zst", b".br", b".gz").index(suffix) if suffix else 0
        assert answer.body == (suffix.ljust(4) * (size // 8 + number) if suffix else content(size))


def test_each_form_has_its_own_tag(siblings) -> None:
    """And its own ranges; a tag of one form is not matched by another."""
    with siblings.client() as client:
        plain = client.ask(request("/files/packed.txt"))
        packed = client.ask(request("/files/packed.txt", "Accept-Encoding: gzip"))
        assert plain.fields["etag"] != packed.fields["etag"]
        tag = f"If-None-Match: {packed.fields['etag']}"
        answer = client.ask(request("/files/packed.txt", "Accept-Encoding: gzip", tag))
        assert (answer.status, answer.fields["vary"]) == (304, "accept-encoding")
        assert client.ask(request("/files/packed.txt", tag)).status == 200
        answer = client.ask(request("/files/packed.txt", "Accept-Encoding: gzip", "Range: bytes=0-4"))
        assert (answer.status, answer.body, answer.fields["content-encoding"]) == (206, packed.body[:5], "gzip")


@pytest.mark.parametrize(("name", "body"), [("stale.txt", b"new"), ("odd.txt", b"odd")])
def test_siblings_that_are_none(siblings, name: str, body: bytes) -> None:
    """Older than the file, no regular file, or a link that leads out: the file itself."""
    answer = siblings.ask(request(f"/files/{name}", "Accept-Encoding: gzip, br"))
    assert (answer.status, answer.body) == (200, body)
    assert "content-encoding" not in answer.fields


# --- changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 200_000])
def test_a_change_shows(server, size: int) -> None:
    """Within about a second, with another tag; also one that keeps size and time stamp but not the inode."""
    path = Path(server.program.directory, "www", f"change{size}.txt")
    write(path, b"1" * size)
    with server.client() as client:
        tags = [""]
        for digit in b"1", b"2", b"3":
            if digit != b"1":
                new = write(path.with_suffix(".new"), digit * size)
                os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
                new.rename(path)
            wait_until(lambda d=digit: client.ask(request(f"/files/{path.name}")).body == d * size, "the new bytes")
            tags.append(client.ask(request(f"/files/{path.name}")).fields["etag"])
            assert tags[-1] != tags[-2]
        path.unlink()
        wait_until(lambda: client.ask(request(f"/files/{path.name}")).status == 404, "gone")


def test_a_change_within_a_tick_of_the_file_system_shows(server) -> None:
    """The same inode, size and time stamp, other bytes: seen, because young files are not believed."""
    path = Path(server.program.directory, "www", "young.txt")
    path.write_bytes(b"1")
    stamp = path.stat().st_mtime_ns
    with server.client() as client:
        assert client.ask(request("/files/young.txt")).body == b"1"
        with path.open("r+b") as file:
            file.write(b"2")
        os.utime(path, ns=(stamp, stamp))
        wait_until(lambda: client.ask(request("/files/young.txt")).body == b"2", "the new byte")


def test_a_directory_that_is_replaced(server) -> None:
    """A map's directory is looked up anew: a deployment that renames it takes effect without a restart."""
    base = Path(server.program.directory)
    with server.client() as client:
        assert client.ask(request("/%C3%A4%20b/a.txt")).body == b"odd a"
        (base / "odd").rename(base / "odd.before")
        try:
            wait_until(lambda: client.ask(request("/%C3%A4%20b/a.txt")).status == 404, "no directory")
            write(base / "odd" / "a.txt", b"replaced")
            wait_until(lambda: client.ask(request("/%C3%A4%20b/a.txt")).body == b"replaced", "the new directory")
        finally:
            (base / "odd" / "a.txt").unlink(missing_ok=True)
            (base / "odd").rmdir()
            (base / "odd.before").rename(base / "odd")


# --- with everything else ------------------------------------------------------------------------------------


def test_pipelined(server) -> None:
    """Small, large, missing, handler: answered in their order, each whole."""
    paths = ["/files/" + name for name in ("a.txt", "large.bin", "nowhere", "../", "mid.js", "large.bin", "a.txt")]
    with server.client() as client:
        client.send(b"".join(request(path) for path in paths))
        found = [client.read().body for _ in paths]
    assert found == [b"hello a", LARGE, b"", b"", content(60_000), LARGE, b"hello a"]


@pytest.mark.parametrize("path", ["a.txt", "mid.js", "large.bin"])
def test_connections_that_close(server, path: str) -> None:
    """HTTP/1.0 and ``Connection: close``: the whole file, then the end."""
    for asked in (request("/files/" + path, version="1.0"), request("/files/" + path, "Connection: close")):
        with server.client() as client:
            answer = client.ask(asked)
            assert answer.fields["connection"] == "close"
            assert answer.body in (b"hello a", content(60_000), LARGE)
            client.ended()


def test_a_half_closed_client(server) -> None:
    """A client that has sent its FIN gets the file all the same."""
    with server.client() as client:
        client.send(request("/files/large.bin")).half_close()
        assert client.read().body == LARGE
        client.ended()


def test_routes_come_first(tmp_path: Path) -> None:
    """kore-api.md 8.8: a file never hides a handler; GET of a path that has a handler for POST alone is a file."""
    text = """
home.filemaps({"/": "www"})

@kore.route("/a.txt", domain=home, methods=["post"])
def a(req):
    req.response(200, b"handler")
"""
    with file_server(tmp_path, "epoll", text) as server:
        assert server.ask(request("/")).body == b"hello"
        assert server.ask(request("/a.txt")).body == b"hello a"
        assert server.ask(request("/a.txt", method="POST")).body == b"handler"
        answer = server.ask(request("/a.txt", method="DELETE"))
        assert (answer.status, answer.fields["allow"]) == (405, "GET, HEAD, POST")


def test_no_spelling_goes_around_authentication(tmp_path: Path) -> None:
    """A map with auth inside of one without: however its URL is written, the key is asked for."""
    text = """
def verify(req, value):
    return value == "open"

auth = {"type": "header", "value": "x-key", "verify": verify}
home.filemaps({"/": "www", "/sub/": ("www/sub", auth)})
"""
    with file_server(tmp_path, "epoll", text) as server, server.client() as client:
        for path in ("/sub/x.css", "/%73ub/x.css", "//sub/x.css", "/./sub//x.css", "/x/../sub/x.css", "/sub%2fx.css"):
            for _ in range(2):
                assert client.ask(request(path)).status == 403
                assert client.ask(request(path, "X-Key: open")).body == b"css"
                assert client.ask(request(path, "X-Key: wrong", "Range: bytes=0-1")).status == 403
        assert client.ask(request("/a.txt")).body == b"hello a"
