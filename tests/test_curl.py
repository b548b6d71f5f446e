"""``kore.curl`` against real servers: HTTP by nginx, FTP by pyftpdlib, and peers that misbehave."""

from __future__ import annotations

import asyncio
import gzip
import os
import socket
import threading
from pathlib import Path

import pytest
from transfer_harness import (
    ENGINES,
    Peer,
    answer,
    endless,
    ftp_server,
    limited,
    nginx,
    open_transfers,
    peer,
    run,
    stall,
)

import kore
from kore.version import __version__

pycurl = pytest.importorskip("pycurl")


@pytest.fixture(params=ENGINES)
def loop(request):
    yield from open_transfers(request.param)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    with nginx(tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture(scope="module")
def ftp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ftp")
    with ftp_server(folder) as url:
        yield url, folder


def fetch(loop, url: str, *options: tuple[int, object]) -> bytes:
    handle = kore.curl(url)
    for number, value in options:
        handle.setopt(number, value)
    return run(loop, handle.run())


# The reference's examples.


def test_the_examples_of_the_reference(loop, web):
    async def first(url):
        handle = kore.curl(url)
        # Run the libcurl handle.
        data = await handle.run()
        return data  # noqa: RET504 (as the reference has it)

    async def second(url):
        handle = kore.curl(url)
        handle.setopt(kore.CURLOPT_TIMEOUT, 10)
        return await handle.run()

    assert run(loop, first(f"{web.url}/hello.txt")) == b"hello from nginx\n"
    assert run(loop, second(f"{web.url}/hello.txt")) == b"hello from nginx\n"


def test_each_kind_of_option(loop, web):
    assert fetch(loop, f"{web.url}/seen") == f"GET|kore/{__version__}||".encode()
    options = (
        (kore.CURLOPT_USERAGENT, "somebody"), (kore.CURLOPT_HTTPHEADER, ["Content-Type: a/b"]),
        (kore.CURLOPT_CUSTOMREQUEST, "PURGE"), (kore.CURLOPT_NOPROGRESS, 1),
    )
    assert fetch(loop, f"{web.url}/seen", *options) == b"PURGE|somebody|a/b|"
    assert fetch(loop, f"{web.url}/seen", (kore.CURLOPT_NOBODY, 1)) == b""
    assert fetch(loop, f"{web.url}/hello.txt", (kore.CURLOPT_RANGE, "0-4")) == b"hello"


def test_a_status_is_no_failure_unless_asked_for(loop, web):
    assert fetch(loop, f"{web.url}/missing") == b"not here"
    assert fetch(loop, f"{web.url}/empty") == b""
    assert fetch(loop, f"{web.url}/nothing") == b""
    with pytest.raises(RuntimeError, match="404"):
        fetch(loop, f"{web.url}/missing", (kore.CURLOPT_FAILONERROR, 1))


def test_redirects_are_followed_only_when_asked_for(loop, web):
    assert b"302 Found" in fetch(loop, f"{web.url}/moved")
    assert fetch(loop, f"{web.url}/moved", (kore.CURLOPT_FOLLOWLOCATION, 1)) == b"hello from nginx\n"
    with pytest.raises(RuntimeError, match=r'"file" is disabled|Protocol "file"'):
        fetch(loop, f"{web.url}/moved-to-file", (kore.CURLOPT_FOLLOWLOCATION, 1))


def test_it_may_be_made_before_there_is_a_loop_and_run_on_several(web):
    handle = kore.curl(f"{web.url}/hello.txt")
    assert isinstance(handle, kore.pycurlhandle)
    for io in ENGINES:
        for loop in open_transfers(io):
            assert run(loop, handle.run()) == b"hello from nginx\n"


def test_other_loops_are_told_what_is_needed(web):
    async def other():
        with pytest.raises(RuntimeError, match="kore's event loop"):
            await kore.curl(f"{web.url}/hello.txt").run()

    asyncio.run(other())


def test_wrong_arguments():
    with pytest.raises(TypeError, match="str, not bytes"):
        kore.curl(b"http://localhost/")
    with pytest.raises(ValueError, match="NUL"):
        kore.curl("http://localhost/\0")
    handle = kore.curl("http://localhost/")
    for body in ("text", None, 1, ["x"]):
        with pytest.raises(TypeError, match="bytes"):
            handle.setbody(body)


# Running.


def test_a_handle_runs_again_and_keeps_its_options(loop):
    with peer() as server:
        handle = kore.curl(f"{server.url}/first")
        handle.setopt(kore.CURLOPT_HTTPHEADER, ["X-Kept: yes"])
        assert run(loop, handle.run()) == b"GET /first"
        assert run(loop, handle.run()) == b"GET /first"
        handle.setopt(kore.CURLOPT_URL, f"{server.url}/second")
        assert run(loop, handle.run()) == b"GET /second"
        assert [request.fields["x-kept"] for request in server.requests] == ["yes"] * 3
        assert server.connections == 1


def test_one_run_at_a_time(loop):
    let_go = threading.Event()

    def reply(_request, wire):
        wire.until(let_go)
        return answer(b"late")

    async def both():
        handle = kore.curl(server.url)
        first = loop.create_task(handle.run())
        await asyncio.sleep(0)
        for call in (lambda: handle.setopt(kore.CURLOPT_TIMEOUT, 1), lambda: handle.setbody(b"x")):
            with pytest.raises(RuntimeError, match="one transfer at a time"):
                call()
        with pytest.raises(RuntimeError, match="one transfer at a time"):
            await handle.run()
        let_go.set()
        return await first, await handle.run()

    with peer(reply) as server:
        assert run(loop, both()) == (b"late", b"late")


def test_many_at_once(loop):
    async def all_of_them():
        return await kore.gather(*(kore.curl(f"{server.url}/{number}").run() for number in range(50)))

    with peer() as server:
        assert run(loop, all_of_them()) == [f"GET /{number}".encode() for number in range(50)]


def test_connections_are_kept_for_the_next_transfer(loop):
    with peer() as server:
        for number in range(5):
            assert fetch(loop, f"{server.url}/{number}") == f"GET /{number}".encode()
        assert server.connections == 1


def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(loop):
    def reply(request, wire):
        if request.target == "/last":
            wire.send(answer(b"bye"))
            return None
        return answer(b"on")

    with peer(reply) as server:
        assert fetch(loop, f"{server.url}/last") == b"bye"
        assert fetch(loop, f"{server.url}/x") == b"on"
        assert server.connections == 2


# Uploads.


def uploaded(server: Peer) -> tuple[str, bytes]:
    request = server.requests[-1]
    return request.method, request.body


@pytest.mark.parametrize("size", [0, 1, 100_000, 3_000_000])
def test_a_body_is_put(loop, size):
    body = os.urandom(size)
    with peer() as server:
        handle = kore.curl(f"{server.url}/x")
        assert handle.setbody(body) is True
        assert run(loop, handle.run()) == b"PUT /x"
        assert uploaded(server) == ("PUT", body)
        assert server.requests[-1].fields.get("transfer-encoding") == "chunked"
        assert run(loop, handle.run()) == b"PUT /x"
        assert uploaded(server) == ("PUT", body)
        with pytest.raises(RuntimeError, match="before"):
            handle.setbody(b"again")


def test_a_body_of_known_size_and_a_posted_one(loop):
    with peer() as server:
        handle = kore.curl(server.url)
        handle.setbody(bytearray(b"12345"))
        handle.setopt(kore.CURLOPT_INFILESIZE, 5)
        run(loop, handle.run())
        assert uploaded(server) == ("PUT", b"12345")
        assert server.requests[-1].fields["content-length"] == "5"
        handle = kore.curl(server.url)
        handle.setbody(b"12345")
        handle.setopt(kore.CURLOPT_POST, 1)
        run(loop, handle.run())
        assert uploaded(server) == ("POST", b"12345")


def test_an_upload_without_a_body_reads_no_standard_input(loop):
    with peer() as server:
        assert fetch(loop, server.url, (kore.CURLOPT_UPLOAD, 1)) == b"PUT /"
        assert uploaded(server) == ("PUT", b"")


def test_a_body_is_sent_again_where_a_redirect_asks_for_it(loop):
    def reply(request, _wire):
        if request.target == "/old":
            return answer(b"", "307 Temporary Redirect", "Location: /new")
        return answer(request.body)

    with peer(reply) as server:
        handle = kore.curl(f"{server.url}/old")
        handle.setbody(b"once more")
        handle.setopt(kore.CURLOPT_FOLLOWLOCATION, 1)
        assert run(loop, handle.run()) == b"once more"


def test_bodies_into_nginx(loop, web):
    handle = kore.curl(f"{web.url}/upload/put.bin")
    handle.setbody(b"\0\1\2" * 1000)
    run(loop, handle.run())
    assert (web.folder / "www/upload/put.bin").read_bytes() == b"\0\1\2" * 1000


# Other protocols.


def test_ftp(loop, ftp):
    url, folder = ftp
    (folder / "down.txt").write_bytes(b"by FTP\n" * 5000)
    assert fetch(loop, f"{url}/down.txt") == b"by FTP\n" * 5000
    assert b"down.txt" in fetch(loop, f"{url}/", (kore.CURLOPT_DIRLISTONLY, 1)).split()
    handle = kore.curl(f"{url}/up.txt")
    handle.setbody(b"uploaded")
    assert run(loop, handle.run()) == b""
    assert (folder / "up.txt").read_bytes() == b"uploaded"
    fetch(loop, f"{url}/", (kore.CURLOPT_POSTQUOTE, ["DELE up.txt"]))
    assert not (folder / "up.txt").exists()
    with pytest.raises(RuntimeError, match=r"/none: .*RETR.*libcurl error 78|libcurl error 78"):
        fetch(loop, f"{url}/none")


def test_ftp_over_a_connection_of_the_servers(loop, ftp):
    """Active mode: the server connects to a socket that libcurl listens on."""
    url, folder = ftp
    (folder / "active.txt").write_bytes(b"active")
    assert fetch(loop, f"{url}/active.txt", (kore.CURLOPT_FTPPORT, "127.0.0.1")) == b"active"


def test_files(loop, tmp_path: Path):
    (tmp_path / "f").write_bytes(b"a file")
    assert fetch(loop, f"file://{tmp_path}/f") == b"a file"
    with pytest.raises(RuntimeError, match=r"Could.?n.t (open|read)|libcurl error 37"):
        fetch(loop, f"file://{tmp_path}/none")
    with pytest.raises(RuntimeError, match="disabled"):
        fetch(loop, f"file://{tmp_path}/f", (kore.CURLOPT_PROTOCOLS, 1 | 2))


# Failures.


@pytest.mark.parametrize(("url", "reason"), [
    ("http://127.0.0.1:1/", "connect"), ("nonsense://x/", "not supported"), ("http://[::1/", "URL"), ("", "URL"),
    ("http://127.0.0.1:99999/", "URL"), ("http://a b/", "URL"),
])
def test_failures_name_the_url_and_the_reason(loop, url, reason):
    with pytest.raises(RuntimeError) as caught:
        fetch(loop, url)
    assert str(caught.value).startswith(f"{url}: ")
    assert reason in str(caught.value)
    assert "libcurl error" in str(caught.value)


BROKEN = {
    "an end in the middle of the body": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
    "an end in the status line": b"HTTP/1.",
    "no answer": b"",
    "broken chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nx",
    "a length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 400_000,
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_servers_that_break_off(loop, data):
    with peer(lambda _request, wire: wire.send(data)) as server:
        with pytest.raises(RuntimeError, match=server.url):
            fetch(loop, server.url)
        handle = kore.curl(server.url)
        for _ in range(2):  # and a handle that failed runs again
            with pytest.raises(RuntimeError):
                run(loop, handle.run())


# Limits.


def test_more_than_curl_recv_max_fails_and_is_not_received(loop):
    with peer(endless) as server:
        with pytest.raises(RuntimeError, match=r"curl_recv_max.*2097152 bytes"):
            fetch(loop, server.url)
        assert server.sent < 64 * 1024 * 1024  # what is under way in buffers of sockets, and no more


@pytest.mark.parametrize(("size", "fits"), [(0, True), (999, True), (1000, True), (1001, False), (100_000, False)])
def test_curl_recv_max_is_exact(loop, size, fits):
    with limited(curl_recv_max=1000), peer(lambda *_: answer(b"x" * size)) as server:
        if fits:
            assert fetch(loop, server.url) == b"x" * size
        else:
            with pytest.raises(RuntimeError, match="1000 bytes"):
                fetch(loop, server.url)
        assert fetch(loop, server.url, (kore.CURLOPT_NOBODY, 1)) == b""


def test_curl_recv_max_counts_what_was_unpacked(loop):
    """A hundred KiB that unpack to a hundred MiB."""
    packed = gzip.compress(bytes(100 * 1024 * 1024))
    assert len(packed) < 200_000
    with peer(lambda *_: answer(packed, "200 OK", "Content-Encoding: gzip")) as server:
        assert fetch(loop, server.url) == packed
        with pytest.raises(RuntimeError, match="curl_recv_max"):
            fetch(loop, server.url, (kore.CURLOPT_ACCEPT_ENCODING, "gzip"))


def test_small_pieces_take_no_more_memory_than_large_ones(loop):
    pieces = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 200_000 + b"0\r\n\r\n"
    with peer(lambda *_: pieces) as server:
        assert fetch(loop, server.url) == b"x" * 200_000


@pytest.mark.parametrize("options", [
    (), ((kore.CURLOPT_TIMEOUT, 1),), ((kore.CURLOPT_TIMEOUT_MS, 100),), ((kore.CURLOPT_LOW_SPEED_TIME, 1),
                                                                       (kore.CURLOPT_LOW_SPEED_LIMIT, 1000)),
])
def test_a_server_that_stalls_is_left_in_time(loop, options):
    with limited(curl_timeout=60 if options else 1), peer(stall) as server:
        with pytest.raises(RuntimeError, match="libcurl error 28"):
            fetch(loop, server.url, *options)
        loop.run_until_complete(asyncio.sleep(0))
        for _ in range(1000):
            if server.left:
                break
            loop.run_until_complete(asyncio.sleep(0.01))
        assert server.left == 1


def test_own_timeouts_win_over_curl_timeout(loop):
    let_go = threading.Event()

    def reply(_request, wire):
        wire.until(let_go)
        return answer(b"late")

    async def go():
        handle = kore.curl(server.url)
        handle.setopt(kore.CURLOPT_TIMEOUT, 30)
        loop.call_later(1.3, let_go.set)
        return await handle.run()

    with limited(curl_timeout=1), peer(reply) as server:
        assert run(loop, go()) == b"late"
    with limited(curl_timeout=0), peer(reply) as server:
        assert fetch(loop, server.url) == b"late"


def test_cookies_stay_with_their_handle(loop):
    def reply(request, _wire):
        return answer(request.fields.get("cookie", "none").encode(), "200 OK", "Set-Cookie: a=b")

    with peer(reply) as server:
        handle = kore.curl(server.url)
        handle.setopt(kore.CURLOPT_COOKIEFILE, "")
        assert [run(loop, handle.run()) for _ in range(2)] == [b"none", b"a=b"]
        assert fetch(loop, server.url) == b"none"
        assert fetch(loop, server.url, (kore.CURLOPT_COOKIEFILE, "")) == b"none"


def test_no_protocol_makes_the_worker_wait(loop):
    """A server that takes the connection and says nothing, for each protocol: others go on meanwhile."""
    schemes = [name for name in pycurl.version_info()[8] if name != "file"]
    turns = 0

    async def turning():
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    async def ask(url):
        handle = kore.curl(url)
        handle.setopt(kore.CURLOPT_TIMEOUT_MS, 700)
        return await handle.run()

    async def all_of_them(port):
        other = loop.start(turning())
        results = await kore.gather(*(ask(f"{scheme}://127.0.0.1:{port}/x") for scheme in schemes))
        other.kill()
        return results

    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(silent.getsockname())  # for tftp
        results = run(loop, all_of_them(silent.getsockname()[1]))
    assert len(schemes) > 5
    assert turns > 10
    for scheme, result in zip(schemes, results, strict=True):
        assert "libcurl error 28" in str(result), scheme
