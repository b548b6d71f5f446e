"""Static files against clients that want what they should not have, or too much; and the two ways to open a file."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from kore.errors import ConfigurationError
from kore.http import beneath
from kore.http.file_cache import MEMORY_FILES_MAX, Entry, FileCache, Variant
from kore.http.filemaps import FileMap, FileMaps, normal
from tests.files_harness import SECRET, content, file_server, tree
from tests.http_server_harness import ENGINES, request


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    options = "kore.config.http_header_max = 16384"
    with file_server(tmp_path_factory.mktemp("hostile"), request.param, options=options) as made:
        yield made


DOTS = ["..", "%2e%2e", "%2E.", ".%2e", "..%00", "%252e%252e", "%c0%ae%c0%ae", "..;", "....", "%uff0e%uff0e"]
SLASHES = ["/", "%2f", "%2F", "//", "%5c", "\\", "/./", "%252f", "%c0%af"]
ESCAPES = [f"{dots}{slash}" for dots in DOTS for slash in SLASHES]


@pytest.mark.parametrize("target", ["secret.txt", "www-secret/secret.txt", "wwwx", "outside/"])
def test_nothing_leads_out(server, target: str) -> None:
    """http.md 19.3: neither above the root nor to a sibling whose name begins as the root's does."""
    with server.client() as client:
        for escape in ESCAPES:
            for before in ("", "sub/", "sub/" + escape):
                answer = client.ask(request(f"/files/{before}{escape}{target}"))
                assert SECRET not in answer.body
                assert answer.status in (400, 404)
        for path in (f"/files/{'../' * 40}{target}", f"/files/..{'/' * 300}{target}", f"/files{target}",
                     f"/files-secret/{target}", f"/files/{server.program.directory}/{target}",
                     f"/files//{server.program.directory}/{target}"):  # fmt: skip
            assert client.ask(request(path)).status == 404


@pytest.mark.parametrize("name", ["link-out", "link-out-dir", "link-out-dir/", "link-out-dir/index.html", "link-abs",
                                  "loop", "ring1", "dangling", "link-proc", "link-null", "sub/link-up/../../secret.txt",
                                  "around/" * 60 + "a.txt", "loop/x"])  # fmt: skip
def test_links_that_lead_out(server, name: str) -> None:
    """404, and never the C platform's 500 or what happens to be cached. More than 40 links in one path are a loop."""
    with server.client() as client:
        for _ in range(2):
            answer = client.ask(request("/files/" + name))
            assert answer.status == 404
            assert answer.body == b""


@pytest.mark.parametrize(("name", "body"), [
    ("link-in", b"hello a"), ("link-in-dir/", b"index of sub"), ("link-in-dir/x.css", b"css"),
    ("sub/link-up", b"hello a"), ("around/around/a.txt", b"hello a"),
])  # fmt: skip
def test_links_that_stay_inside(server, name: str, body: bytes) -> None:
    """Followed where the system has openat2(2), the one policy there is."""
    if beneath._openat2() is None:
        pytest.skip("openat2(2): not available, links are not followed")
    answer = server.ask(request("/files/" + name))
    assert (answer.status, answer.body) == (200, body)


@pytest.mark.parametrize("name", ["fifo", "socket", "fifo/", "around/fifo"])
def test_what_is_no_file(server, name: str) -> None:
    """404 at once: opening a FIFO held up the whole worker of the C platform."""
    assert server.ask(request("/files/" + name)).status == 404
    server.unharmed()


def test_a_device(server) -> None:
    """404, without reading from it."""
    path = Path(server.program.directory, "www", "zero")
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        pytest.skip(f"mknod(2): {error.strerror}")
    assert server.ask(request("/files/zero")).status == 404


def test_an_unreadable_file(tmp_path: Path) -> None:
    """403. As root every file is readable, so the worker is somebody else."""
    if os.geteuid() == 0:
        pytest.skip("open(2): EACCES is not for root")
    with file_server(tmp_path, "epoll") as server:
        (tmp_path / "www" / "a.txt").chmod(0)
        assert server.ask(request("/files/a.txt")).status == 403


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EMFILE, errno.EIO, errno.ENAMETOOLONG])
def test_what_a_failing_open_is_answered_with(tmp_path: Path, number: int) -> None:
    """403 for what may not be read, 503 for what may pass, 500 and a line in the log for the rest."""
    text = f"""
import os
from kore.http import filemaps
def fails(root, path):
    raise OSError({number}, os.strerror({number}))
filemaps.open_beneath = fails
home.filemaps({{"/files/": "www"}})
"""
    status = {errno.EACCES: 403, errno.EPERM: 403, errno.EMFILE: 503, errno.EIO: 500, errno.ENAMETOOLONG: 404}[number]
    with file_server(tmp_path, "epoll", text) as server:
        with server.client() as client:
            assert client.ask(request("/files/a.txt")).status == status
            client.alive()
        if status >= 500:
            server.program.wait_for("GET /files/a.txt.*" + os.strerror(number))


def test_aliases_leak_no_fds(server) -> None:
    """http.md 19.3: each alias of a path cost the C platform an fd, until there were none."""
    with server.client() as client:
        client.ask(request("/files/a.txt"))
        client.ask(request("/files/large.bin", "Range: bytes=0-1"))
        before = server.fds()
        for number in range(300):
            name = ("a.txt", "large.bin")[number % 2]
            for alias in ("/" * (number % 50), "./" * (number % 50), "sub/../" * (number % 50), "%2e/"):
                answer = client.ask(request(f"/files/{alias}{name}", "Range: bytes=0-1"))
                assert answer.status == 206
        server.settle(before)
    server.unharmed()


@pytest.mark.parametrize("kind", ["missing", "query", "alias", "host"])
def test_ten_thousand_names(server, kind: str) -> None:
    """Made-up names, queries, spellings and hosts leave nothing behind."""
    def ask(client, number: int) -> None:
        path, host = f"/files/none{number}{'x' * 100}", "x"
        if kind == "query":
            path = f"/files/mid.js?{number}"
        elif kind == "alias":
            path = "/files/" + "".join("./" if number >> bit & 1 else "/" for bit in range(14)) + "mid.js"
        elif kind == "host":
            path, host = "/files/mid.js", f"h{number}.example"
        answer = client.ask(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.status == (404 if kind == "missing" else 200)

    with server.client() as client:
        for number in range(3000):  # fills what is bounded
            ask(client, number)
        before, fds = server.rss_kib(), server.fds()
        for number in range(3000, 10_000):
            ask(client, number)
        assert server.rss_kib() - before < 8000
        server.settle(fds)


def test_a_flood_of_ranges_costs_little(server) -> None:
    """A thousand fields of two thousand ranges take less than a second of the worker."""
    field = "Range: bytes=" + ",".join(["0-0"] * 2000)
    with server.client() as client:
        before = server.cpu_s()
        for _ in range(100):
            assert client.ask(request("/files/a.txt", field)).status == 200
        assert server.cpu_s() - before < 1.0


# --- the two ways to open ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def www(tmp_path_factory):
    base = tmp_path_factory.mktemp("beneath")
    tree(base)
    fd = beneath.open_directory(base / "www")
    yield fd
    os.close(fd)


def _opens():
    way = beneath._openat2()
    return [("openat2", way), ("walk", beneath.walk)]


def _opened(way, root: int, path: bytes) -> bytes:
    fd = way(root, path)
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("name", "way"), _opens())
def test_ways_to_open(www: int, name: str, way) -> None:
    """What is there is opened, what leads out is not; no fd is left either way."""
    if way is None:
        pytest.skip("openat2(2): not available")
    before = len(os.listdir("/proc/self/fd"))
    assert _opened(way, www, b"a.txt") == b"hello a"
    assert _opened(way, www, b"sub/index.html") == b"index of sub"
    for path in (b"link-out", b"link-out-dir/index.html", b"loop", b"ring1", b"link-abs", b"link-proc", b"dangling",
                 b"nowhere", b"sub/nowhere", b"nowhere/x", b"a.txt/x", b"n" * 256, b"link-null"):  # fmt: skip
        with pytest.raises(OSError, match=r"\[Errno"):
            way(www, path)
    os.close(way(www, b"."))
    os.close(way(www, b"sub"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_walking_follows_no_link(www: int) -> None:
    """Without openat2 a link is refused wherever it stands."""
    for path in (b"link-in", b"link-in-dir/x.css", b"sub/link-up", b"around/a.txt"):
        with pytest.raises(OSError, match=r"\[Errno"):
            beneath.walk(www, path)


def test_openat2_keeps_inside(www: int) -> None:
    """Even a path with dot segments, which never comes so far, does not lead out."""
    way = beneath._openat2()
    if way is None:
        pytest.skip("openat2(2): not available")
    for path in (b"../secret.txt", b"sub/../../secret.txt", b"/etc/passwd", b"sub/link-up/../../secret.txt"):
        with pytest.raises(OSError, match=r"\[Errno"):
            way(www, path)
    assert _opened(way, www, b"sub/link-up") == b"hello a"


# --- which map -----------------------------------------------------------------------------------------------

NORMAL = [
    ("/", ((), True)), ("/a", ((b"a",), False)), ("/a/", ((b"a",), True)), ("//a///b", ((b"a", b"b"), False)),
    ("/./a/.", ((b"a",), True)), ("/a/..", ((), True)), ("/../../a", ((b"a",), False)),
    ("/a%2fb", ((b"a", b"b"), False)),
    ("/%2e%2e/%61", ((b"a",), False)), ("/%252e", ((b"%2e",), False)), ("/a+b", ((b"a+b",), False)),
    ("/\u00e4", ((b"\xc3\xa4",), False)), ("/%ff\udcff", ((b"\xff\xff",), False)), ("/...", ((b"...",), False)),
    ("/%00", None), ("/%", None), ("/%g0", None), ("/%7f", None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "found"), NORMAL)
def test_normal(path: str, found: object) -> None:
    """A path is decoded once and resolved."""
    assert normal(path) == found


def test_every_spelling_meets_the_same_map() -> None:
    """A map with authentication can't be gone around by writing its URL differently."""
    maps = FileMaps([FileMap("/", "www"), FileMap("/private/", "www/private", "auth"), FileMap("/private/x/", "x")])
    for path in ("/private/f", "//private/f", "/%70rivate/f", "/./private/f", "/x/../private/f", "/private%2ff",
                 "/private/", "/private//", "/private/y/../f", "/%2e/private/x/../f"):  # fmt: skip
        found = maps.find(path)
        assert found is not None
        assert found.url == "/private/"
    for path in ("/private", "/privat/f", "/privatex", "/private/../f", "/f"):
        found = maps.find(path)
        assert found is not None
        assert found.url == "/"
    assert FileMaps([FileMap("/a/", "a")]).find("/b") is None
    bare = FileMaps([FileMap("/a/", "a")]).find("/a")
    assert bare is not None
    assert bare.url == "/a/"


@pytest.mark.parametrize("url", ["a/", "/a", "", "/%/", "/%00/"])
def test_urls_that_are_none(url: str) -> None:
    """A URL goes from slash to slash and can be decoded."""
    with pytest.raises(ConfigurationError):
        FileMap(url, "www")


# --- the cache -----------------------------------------------------------------------------------------------


def _entry(path: Path, size: int) -> Entry:
    path.write_bytes(content(size))
    os.utime(path, (1, 1))
    return Entry(Variant(path.name.encode(), path.stat(), None, "", varies=False), (), "now")


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    """By entries and by bytes; what goes takes its bytes along, also where requests still know it."""
    cache = FileCache(entries_max=3, bytes_max=10_000)
    entries = [_entry(tmp_path / str(number), 1000) for number in range(5)]
    for number, entry in enumerate(entries):
        cache.put(number, entry)
        cache.fill(number, entry, entry.plain, content(1000))
        cache.remember(number, entry.plain)
    assert len(cache) == 3
    assert cache.bytes_kept == 6000
    assert entries[0].plain.content is None
    assert entries[0].plain not in cache.fresh.values()
    big = _entry(tmp_path / "big", 4500)
    cache.put("big", big)
    cache.fill("big", big, big.plain, content(4500))
    assert cache.bytes_kept == 9000
    assert len(cache) == 1
    cache.put("big", _entry(tmp_path / "big", 10))
    assert cache.bytes_kept == 0
    assert big.plain.content is None


def test_responses_in_files_are_bounded(tmp_path: Path) -> None:
    """Each has an fd: no more than so many, those of earlier seconds make room, and none is left behind."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("memfd_create(2): not available")
    before = len(os.listdir("/proc/self/fd"))
    cache = FileCache()
    entries = [_entry(tmp_path / str(number), 40_000) for number in range(MEMORY_FILES_MAX + 5)]
    for number, entry in enumerate(entries):
        cache.put(number, entry)
        cache.make(entry.plain, b"head", content(40_000), "first")
    assert len(os.listdir("/proc/self/fd")) == before + MEMORY_FILES_MAX
    assert [entry.plain.memory is None for entry in entries[-6:]] == [False] + [True] * 5
    assert entries[-1].plain.whole == b"head" + content(40_000)
    late = "second"
    for entry in entries[-5:]:
        cache.make(entry.plain, b"head", content(40_000), late)
        cache.make(entry.plain, b"head", content(40_000), late)
    assert all(entry.plain.memory is not None for entry in entries[-5:])
    assert entries[0].plain.memory is None
    assert len(os.listdir("/proc/self/fd")) == before + MEMORY_FILES_MAX
    for number in range(len(entries)):
        cache.drop(number)
    assert len(os.listdir("/proc/self/fd")) == before


def test_bytes_are_inherited_only_by_the_same_file(tmp_path: Path) -> None:
    """A look-up that finds the file as it was keeps its bytes; a young or a changed file is read again."""
    before = _entry(tmp_path / "a", 100)
    before.plain.content = content(100)
    same, other = _entry(tmp_path / "a", 100), _entry(tmp_path / "a", 101)
    same.inherit(before)
    other.inherit(before)
    assert same.plain.content == content(100)
    assert same.bytes_kept == 200
    assert other.plain.content is None
    (tmp_path / "b").write_bytes(b"x")
    young = Entry(Variant(b"b", (tmp_path / "b").stat(), None, "", varies=False), (), "now")
    young.plain.content = b"x"
    again = Entry(Variant(b"b", (tmp_path / "b").stat(), None, "", varies=False), (), "now")
    again.inherit(young)
    assert again.plain.content is None


def test_a_socket_is_no_file(tmp_path: Path) -> None:
    """Opening one fails with ENXIO, which is a 404."""
    root = beneath.open_directory(tmp_path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        with pytest.raises(OSError, match=rf"\[Errno {errno.ENXIO}"):
            beneath.open_beneath(root, b"s")
    os.close(root)
