"""Bodies: where they go, how much of them is kept, and that nothing of them is left when their request has ended."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
from pathlib import Path

import pytest

from kore.errors import ConfigurationError
from kore.http.body import PREFIX, WRITE_BYTES, BodyStore, Passed, Stored
from kore.http.disk import Done, Job
from kore.http.request import Request
from tests.http_server_harness import ENGINES, GET, chunked, request, serving
from tests.support import starter, wait_until

OFFLOAD = 100_000
TEXT = """
import asyncio
import os

def told(req):
    where = req.body_path
    mode = oct(os.stat(where).st_mode & 0o777) if where else ""
    head = req.body_read(10)[1]
    return f"{where} {mode} {len(req.body)} {req.body_digest.hex()} {head.hex()}".encode()

@kore.route("/told", domain=home)
def handler(req):
    req.response(200, told(req))

@kore.route("/late", domain=home)
async def late(req):
    await asyncio.sleep(0.02)
    req.response(200, told(req))

@kore.route("/waits", domain=home)
async def waits(req):
    kore.log(kore.LOG_INFO, f"waits {req.body_path}")
    await kore.suspend(3600000)

@kore.route("/moves", domain=home)
def moves(req):
    os.rename(req.body_path, "kept")
    req.response(200, b"moved")

@kore.route("/digest", domain=home)
def digest(req):
    req.response(200, req.body_digest)

@kore.route("/read-late", domain=home)
async def reads_late(req):
    req.response(200, b"answered")
    await asyncio.sleep(0.02)
    kore.log(kore.LOG_INFO, f"read late {len(req.body)}")
"""


def files(directory: Path) -> list[str]:
    return sorted(os.listdir(directory / "tmp_files"))


@pytest.fixture(scope="module", params=ENGINES)
def place(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bodies")
    options = f"kore.config.http_body_disk_offload = {OFFLOAD}\nkore.config.http_body_max = 2**33"
    options += "\nkore.config.sandbox_write = '.'"  # one handler moves a file away
    with serving(directory, request.param, TEXT, options) as made:
        yield made, directory


@pytest.fixture
def server(place):
    return place[0]


@pytest.fixture
def directory(place):
    return place[1]


@pytest.mark.parametrize("path", ["/told", "/late"])
@pytest.mark.parametrize("size", [1, OFFLOAD, OFFLOAD + 1, 700_001])
@pytest.mark.parametrize("coding", ["length", "chunks"])
def test_a_body_is_in_memory_or_in_a_file_by_its_size(server, directory, path, size, coding):
    body = os.urandom(size)
    data = request(path, method="POST", body=body)
    if coding == "chunks":
        data = chunked(path, *(body[at : at + 30_000] for at in range(0, size, 30_000)))
    with server.client() as client:
        for _ in range(2):
            where, mode, length, digest, head = client.ask(data).body.decode().split(" ")
            assert (int(length), digest, head) == (size, hashlib.sha256(body).hexdigest(), body[:10].hex())
            if size > OFFLOAD:
                assert where.startswith(f"tmp_files/{PREFIX}")
                assert mode == "0o600"
            else:
                assert (where, mode) == ("None", "")
        client.alive()
    wait_until(lambda: files(directory) == [], "the files are removed")


def test_the_directory_is_the_workers_own(server, directory):
    assert stat.S_IMODE((directory / "tmp_files").stat().st_mode) == 0o700


def test_the_file_of_a_client_that_leaves_is_removed(server, directory):
    for number, data in enumerate((
        request("/waits", method="POST", body=bytes(OFFLOAD + 1)),
        request("/told", f"Content-Length: {OFFLOAD * 5}", method="POST") + bytes(OFFLOAD * 2),
    )):
        with server.client() as client:
            client.send(data)
            wait_until(lambda: len(files(directory)) == 1, "there is a file")
            if not number:
                server.program.wait_for(f"waits tmp_files/{PREFIX}")
            client.reset()
        wait_until(lambda: files(directory) == [], "it is removed")
    server.unharmed()


def test_a_refused_body_leaves_no_file(server, directory):
    head = request("/told", "Transfer-Encoding: chunked", method="POST")
    with server.client() as client:
        client.send(head + b"%x\r\n" % (OFFLOAD * 2) + bytes(OFFLOAD * 2))
        wait_until(lambda: len(files(directory)) == 1, "there is a file")
        assert client.ask(b"nonsense").status == 400
    wait_until(lambda: files(directory) == [], "it is removed")


def test_an_application_may_move_the_file_away(server, directory):
    body = os.urandom(OFFLOAD * 3)
    with server.client() as client:
        assert client.ask(request("/moves", method="POST", body=body)).body == b"moved"
        client.alive()
    assert (directory / "kept").read_bytes() == body
    assert files(directory) == []


def test_a_body_is_there_as_long_as_its_handler_runs(server, directory):
    with server.client() as client:
        assert client.ask(request("/read-late", method="POST", body=bytes(OFFLOAD * 2))).body == b"answered"
        server.program.wait_for(f"read late {OFFLOAD * 2}")
    wait_until(lambda: files(directory) == [], "it is removed")


def test_files_are_closed(server):
    fds = server.fds()
    with server.client() as client:
        for _ in range(30):
            client.ask(request("/told", method="POST", body=bytes(OFFLOAD + 1)))
    server.settle(fds)


def test_gigabytes_pass_in_constant_memory(server, directory):
    size = 600_000_000
    piece = bytes(1_000_000)
    digest = hashlib.sha256()
    with server.client() as client:
        client.ask(request("/told", method="POST", body=bytes(OFFLOAD * 2)))
        rss = server.rss_kib()
        most = rss
        client.send(request("/digest", f"Content-Length: {size}", method="POST"))
        for number in range(size // len(piece)):
            client.send(piece)
            digest.update(piece)
            if number % 100 == 0:
                most = max(most, server.rss_kib())
        assert client.read().body == digest.digest()
        assert max(most, server.rss_kib()) - rss < 4096
    wait_until(lambda: files(directory) == [], "it is removed")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_disk_is_a_500_and_told_once(tmp_path, engine):
    """RLIMIT_FSIZE stands for a disk: write(2) gives EFBIG as it would give ENOSPC."""
    text = TEXT + (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000))\n"
    )
    options = f"kore.config.http_body_disk_offload = {OFFLOAD}\nkore.config.http_body_max = 10**9"
    with serving(tmp_path, engine, text, options) as server:
        for data in (
            request("/told", "Content-Length: 400000", method="POST") + bytes(400_000),
            request("/told", "Content-Length: 90000000", method="POST") + bytes(1_000_000),
        ):
            with server.client() as client:
                found = client.ask(data)
                assert (found.status, found.fields["connection"]) == (500, "close")
                client.half_close().ended()
        assert server.ask(request("/told", method="POST", body=bytes(200_000))).status == 200
        wait_until(lambda: files(tmp_path) == [], "the files are removed")
        server.program.wait_for(r"a request body could not be stored: File too large \(errno 27\)")
        server.unharmed()
        assert server.program.out.count("could not be stored") == 1


def test_a_body_that_is_announced_too_long_is_refused_before_it_comes(tmp_path):
    options = f"kore.config.http_body_disk_offload = {OFFLOAD}\nkore.config.http_body_max = 200000"
    with serving(tmp_path, "epoll", TEXT, options) as server, server.client() as client:
        found = client.ask(request("/told", "Content-Length: 200001", method="POST"))
        assert (found.status, found.fields["connection"]) == (413, "close")
        assert files(tmp_path) == []


def test_what_dead_workers_left_is_swept_at_the_start_and_nothing_else(tmp_path):
    store = tmp_path / "tmp_files"
    store.mkdir()
    dead, living, other = store / f"{PREFIX}{'0' * 16}", store / f"{PREFIX}{'1' * 16}", store / "http_body.mine"
    fifo = store / f"{PREFIX}{'2' * 16}"
    os.mkfifo(fifo)
    for path in (dead, living, other):
        path.write_bytes(b"x")
    with living.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with serving(tmp_path, "epoll", TEXT, f"kore.config.http_body_disk_offload = {OFFLOAD}") as server:
            assert files(tmp_path) == sorted([living.name, other.name, fifo.name])
            server.unharmed()


def test_a_killed_workers_files_are_swept_by_the_next(tmp_path):
    options = f"kore.config.http_body_disk_offload = {OFFLOAD}"
    with serving(tmp_path, "epoll", TEXT, options) as server:
        with server.client() as client:
            client.send(request("/waits", method="POST", body=bytes(OFFLOAD + 1)))
            server.program.wait_for(f"waits tmp_files/{PREFIX}")
            os.kill(server.pid, 9)
            server.program.wait_for("worker 1 serves again")
        assert files(tmp_path) == []


def test_a_stopped_server_leaves_no_files(tmp_path):
    options = f"kore.config.http_body_disk_offload = {OFFLOAD}"
    with serving(tmp_path, "epoll", TEXT, options) as server, server.client() as client, server.client() as part:
        part.send(request("/told", f"Content-Length: {OFFLOAD * 5}", method="POST") + bytes(OFFLOAD * 2))
        client.send(request("/waits", method="POST", body=bytes(OFFLOAD + 1)))
        server.program.wait_for(f"waits tmp_files/{PREFIX}")
        wait_until(lambda: len(files(tmp_path)) == 2, "there are two files")
        for _ in range(2):  # the second time without waiting
            server.program.signal(15)
        server.program.wait()
        assert files(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with starter(tmp_path) as programs:
        options = 'kore.config.http_body_disk_offload = 1\nkore.config.http_body_disk_path = "file/x"'
        program = programs.serve(options=options, workers=1, wait=False)
        assert program.wait() != 0
        words = f"kore.config.http_body_disk_path = 'file/x': cannot use {tmp_path}/file/x: Not a directory"
        assert words in program.out + program.err
        assert "Traceback" not in program.out + program.err


# --- slow bodies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_body_that_makes_progress_has_time_and_one_that_does_not_has_none(tmp_path, engine):
    """http.md 19.3: the deadline of a body is about its progress."""
    with serving(tmp_path, engine, TEXT, "kore.config.http_body_timeout = 1") as server:
        with server.client() as client:
            client.send(request("/told", "Content-Length: 20000", method="POST"))
            begin = time.monotonic()
            for _ in range(10):  # twice the rate, three times the timeout
                client.send(bytes(2000))
                time.sleep(0.35)
            assert client.read().status == 200
            assert time.monotonic() - begin > 3
        with server.client() as client:
            client.send(request("/told", "Content-Length: 20000", method="POST") + bytes(10000))
            assert client.read().status == 408
            client.half_close().ended()


# --- the pieces ------------------------------------------------------------------------------------------------


class AtOnce:
    """A disk that is never waited for."""

    def run(self, job: Job, done: Done) -> None:
        job()
        done(None)


def make_store(tmp_path: Path, offload: int = 10) -> BodyStore:
    return BodyStore(str(tmp_path / "store"), offload, AtOnce())  # type: ignore[arg-type]


def stored(store: BodyStore) -> Stored:
    return Stored(store, Request(None, None, GET), lambda error: None)  # type: ignore[arg-type]


def test_a_stored_body_reads_at_any_place_until_it_is_closed(tmp_path):
    store = make_store(tmp_path)
    receiver = stored(store)
    for piece in (b"0123456789", b"abc", b"", b"def"):
        assert receiver.write(piece) is True
    body = receiver.end()
    assert not isinstance(body, bytes)
    assert (body.length, receiver.count) == (16, 16)
    assert body.path is not None
    assert Path(body.path).read_bytes() == body.read(0, 100) == b"0123456789abcdef"
    assert (body.read(14, 5), body.read(16, 5), body.read(3, 0)) == (b"ef", b"", b"")
    assert body.digest() == hashlib.sha256(b"0123456789abcdef").digest()
    for _ in range(2):
        body.close()
    assert not Path(body.path).exists()
    for use in (lambda: body.read(0, 1), body.digest):
        with pytest.raises(RuntimeError, match="the request has ended"):
            use()
    store.close()


def test_what_is_given_up_is_removed(tmp_path):
    store = make_store(tmp_path)
    receiver = stored(store)
    receiver.write(bytes(WRITE_BYTES))
    assert len(os.listdir(store.path)) == 1
    receiver.discard()
    assert os.listdir(store.path) == []
    store.close()


def test_a_store_that_may_not_be_written_to_is_refused(tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(ConfigurationError, match="http_body_disk_path"):
        make_store(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="http_body_disk_path"):
        BodyStore(str(link), 1, AtOnce())  # type: ignore[arg-type]


def test_a_passed_body_cannot_be_read_and_has_its_digest():
    pieces: list[bytes] = []
    receiver = Passed("request", lambda req, piece: pieces.append(piece) or req == "request")  # type: ignore[arg-type]
    assert receiver.write(b"ab") is True
    receiver.write(b"c")
    body = receiver.end()
    assert (body.length, body.path, body.digest()) == (3, None, hashlib.sha256(b"abc").digest())
    assert pieces == [b"ab", b"c"]
    with pytest.raises(RuntimeError, match="not stored"):
        body.read(0, 1)


def test_a_server_without_offload_makes_no_directory(tmp_path):
    with serving(tmp_path, "epoll", TEXT) as server:
        assert server.ask(request("/told", method="POST", body=bytes(500_000))).body.startswith(b"None  500000 ")
        assert not (tmp_path / "tmp_files").exists()
