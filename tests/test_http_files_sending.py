"""Large files on their way: back-pressure, deadlines, clients that leave, files that change, and splice that fails."""

from __future__ import annotations

import select
import signal
import socket
import threading
from pathlib import Path

import pytest

from tests.files_harness import LARGE, LARGE_BYTES, TEXT, content, file_server
from tests.http_server_harness import ENGINES, Client, Server, request
from tests.support import SECONDS, wait_until

HUGE_BYTES = 64 << 20
OPTIONS = "kore.config.http_write_timeout = 1\n"


SPLICING = """
from kore.http.send_file import FileSender
FileSender._in_memory = lambda *_: False  # as if each byte were on a disk
""" + TEXT


@pytest.fixture(scope="module", params=ENGINES)
def engine(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["sendfile", "splice"])
def server(request, engine: str, tmp_path_factory):
    text = TEXT if request.param == "sendfile" else SPLICING
    with file_server(tmp_path_factory.mktemp("sending"), engine, text, OPTIONS) as made:
        (Path(made.program.directory) / "www" / "huge.bin").write_bytes(content(1 << 20) * 64)
        yield made


def begin(server: Server, path: str, *fields: str) -> Client:
    """A client with a small window, which has read the beginning of the response."""
    client = server.client(receive_bytes=4096)
    client.send(request(path, *fields))
    client.data = client.sock.recv(1000)
    assert client.data.startswith(b"HTTP/1.1 20")
    return client


def wait_for_reset(client: Client) -> None:
    """Wait, without reading, until the server resets the connection."""
    poll = select.poll()
    poll.register(client.sock, 0)
    events = poll.poll(SECONDS * 1000)
    assert events, "never reset"
    assert events[0][1] & select.POLLERR


@pytest.fixture
def idle_fds(server) -> int:
    """The worker's descriptors when nothing is being sent, the pipes of before included."""
    with server.client() as client:
        client.ask(request("/files/large.bin"))
    count = server.fds()
    def steady() -> bool:
        nonlocal count
        before, count = count, server.fds()
        return before == count
    wait_until(steady, "no more descriptors come or go")
    return count


def test_memory_stays_flat(server) -> None:
    """64 MiB for ten slow clients at once: no byte of it in the worker."""
    with server.client() as client:
        client.ask(request("/files/large.bin"))
    before = server.rss_kib()
    clients = [begin(server, "/files/huge.bin") for _ in range(10)]
    for client in clients:
        client.sock.recv(1 << 20)
    assert server.rss_kib() - before < 4000
    for client in clients:
        client.sock.close()
    server.unharmed()


def test_others_are_served_meanwhile(server) -> None:
    """A transfer that stands still holds up nobody."""
    with begin(server, "/files/huge.bin"):
        server.unharmed()
        assert server.ask(request("/files/large.bin")).body == LARGE


def test_twenty_at_once(server) -> None:
    """Every client gets its own bytes."""
    found: list[object] = []

    def ask(number: int) -> None:
        first = number * 1000
        with server.client(receive_bytes=8192) as client:
            body = client.ask(request("/files/large.bin", f"Range: bytes={first}-")).body
        found.append(body == LARGE[first:])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


def test_more_at_once_than_there_are_pipes(tmp_path: Path) -> None:
    """What gets no pipe is read and written, with the same result."""
    text = "from kore.http import filemaps\nfilemaps.Pipes.__init__.__defaults__ = (2,)\n" + SPLICING
    with file_server(tmp_path, "epoll", text) as server:
        clients = [begin(server, "/files/large.bin") for _ in range(6)]
        fds = server.fds()
        assert [client.read().body == LARGE for client in clients] == [True] * 6
        assert fds < server.fds() + 6 + 2 * 3 + 2
        for client in clients:
            client.sock.close()


@pytest.mark.parametrize("way", ["reset", "close", "half-close and close"])
def test_a_client_that_leaves(server, idle_fds: int, way: str) -> None:
    """In the middle: all descriptors of the transfer are closed, and nobody else gets its bytes."""
    clients = [begin(server, "/files/huge.bin") for _ in range(8)]
    assert server.fds() > idle_fds
    for client in clients:
        if way == "reset":
            client.reset()
        else:
            if way != "close":
                client.half_close()
            client.sock.close()
        with server.client() as other:
            assert other.ask(request("/files/large.bin", "Range: bytes=9-200000")).body == LARGE[9:200_001]
    server.settle(idle_fds)
    assert server.ask(request("/files/large.bin")).body == LARGE
    server.unharmed()


def test_a_client_that_does_not_read(server, idle_fds: int) -> None:
    """http.md 19.3: deadlines hold while output is pending; the connection is reset and its descriptors closed."""
    with begin(server, "/files/huge.bin") as client:
        wait_for_reset(client)
    server.settle(idle_fds)
    server.unharmed()


def test_a_client_that_reads_slowly(server) -> None:
    """One that takes a little now and then lives on past the write deadline."""
    with begin(server, "/files/large.bin") as client:
        stop = threading.Event()
        data = bytearray(client.data)
        for _ in range(10):
            stop.wait(0.3)
            data += client.sock.recv(20_000)
        client.data = bytes(data)
        assert client.read().body == LARGE


@pytest.mark.parametrize("cut", [0, 1, 3_000_000])
def test_a_file_that_is_truncated(server, idle_fds: int, cut: int) -> None:
    """http.md 12: the C platform spun for ever. The connection ends early, so that the client knows; nothing spins."""
    path = Path(server.program.directory, "www", "cut.bin")
    path.write_bytes(content(20_000_000))
    with begin(server, "/files/cut.bin") as client:
        with path.open("r+b") as file:
            file.truncate(cut)
        data = bytearray(client.data)
        while piece := client.sock.recv(1 << 20):
            data += piece
        head, _, body = bytes(data).partition(b"\r\n\r\n")
        assert b"content-length: 20000000" in head
        assert len(body) < 20_000_000
        whole = content(20_000_000)
        # Pages that were on their way when the file was cut may read as zeros: truncate(2) clears them.
        assert all(byte in (0, expected) for byte, expected in zip(body[:1000], whole[:1000], strict=False))
    server.program.wait_for("GET /files/cut.bin.*truncated")
    server.settle(idle_fds)
    before = server.cpu_s()
    server.unharmed()
    assert server.cpu_s() - before < 0.5
    path.unlink()


def test_a_file_that_grows(server) -> None:
    """No more than was announced; the connection goes on."""
    path = Path(server.program.directory, "www", "grows.bin")
    path.write_bytes(content(20_000_000))
    with begin(server, "/files/grows.bin") as client:
        with path.open("ab") as file:
            file.write(b"more" * 1_000_000)
        assert client.read().body == content(20_000_000)
        client.alive()
    path.unlink()


def test_a_file_that_is_removed(server) -> None:
    """Who has begun gets it all."""
    path = Path(server.program.directory, "www", "removed.bin")
    path.write_bytes(content(20_000_000))
    with begin(server, "/files/removed.bin") as client:
        path.unlink()
        assert client.read().body == content(20_000_000)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", ["EINVAL", "ENOSYS"])
@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_where_splice_cannot_be_had(tmp_path: Path, engine: str, number: str, calls: int) -> None:
    """Refused at the file or at the socket, at once or later: reading and writing goes on where it stopped."""
    text = f"""
import errno
from kore.readiness.driver import ReadinessDriver
from kore.uring.driver import UringDriver

def refusing(splice):
    count = 0
    def attempt(self, fd_in, offset_in, fd_out, length, callback):
        nonlocal count
        count += 1
        if count % {calls}:
            return splice(self, fd_in, offset_in, fd_out, length, callback)
        return self.timeout(0.001, lambda _: callback(-errno.{number}))
    return attempt

for driver in (ReadinessDriver, UringDriver):
    driver.splice = refusing(driver.splice)
""" + SPLICING
    with file_server(tmp_path, engine, text) as server:
        with server.client() as client:
            client.ask(request("/files/a.txt"))
            fds = server.fds()
            for _ in range(2):
                assert client.ask(request("/files/large.bin")).body == LARGE
            answer = client.ask(request("/files/large.bin", "Range: bytes=7-3000000,4000000-4000009"))
            assert (answer.status, len(answer.body)) == (206, int(answer.fields["content-length"]))
            assert LARGE[7:3_000_001] in answer.body
            assert LARGE[4_000_000:4_000_010] in answer.body
        server.settle(fds + 16)


@pytest.mark.parametrize("engine", ENGINES)
def test_reading_instead(tmp_path: Path, engine: str) -> None:
    """Without splice: a slow client costs one piece of memory, a truncated file ends the connection, a reset all."""
    text = "from kore.http import filemaps\nfilemaps.Pipes.__init__.__defaults__ = (0,)\n" + SPLICING
    with file_server(tmp_path, engine, text, OPTIONS) as server:
        path = tmp_path / "www" / "huge.bin"
        path.write_bytes(content(1 << 20) * 64)
        assert server.ask(request("/files/large.bin")).body == LARGE
        before, fds = server.rss_kib(), server.fds()
        clients = [begin(server, "/files/huge.bin") for _ in range(10)]
        assert server.rss_kib() - before < 10 * 1024
        for client in clients[1:]:
            client.reset()
        with path.open("r+b") as file:
            file.truncate(5_000_000)
        data = bytearray(clients[0].data)
        while piece := clients[0].sock.recv(1 << 20):
            data += piece
        assert len(data) < 6_000_000
        clients[0].sock.close()
        server.settle(fds)
        client = begin(server, "/files/large.bin")
        server.settle(fds)  # it does not read
        client.sock.close()
        server.unharmed()


def test_requests_behind_a_large_file(server) -> None:
    """Pipelined behind it: held back until it is through, then answered in order."""
    with begin(server, "/files/large.bin") as client:
        client.send(request("/files/a.txt") * 3 + request("/"))
        assert client.read().body == LARGE
        assert [client.read().body for _ in range(4)] == [b"hello a"] * 3 + [b"hello"]


@pytest.mark.parametrize("path", ["mid.js", "large.bin", "a.txt"])
def test_a_pipeline_that_is_read_slowly(server, path: str) -> None:
    """Forty responses in one go to a client with a small window: each whole and in its place."""
    whole = {"mid.js": content(60_000), "large.bin": LARGE, "a.txt": b"hello a"}[path]
    count = 4 if path == "large.bin" else 40
    with server.client(receive_bytes=4096) as client:
        for number in range(3):
            client.send(request(f"/files/{path}") * (count // 2))
            client.send(request("/") + request(f"/files/{path}?{number}") * (count // 2))
            for place in range(count + 1):
                assert client.read().body == (b"hello" if place == count // 2 else whole)


def test_a_client_that_does_not_read_small_files(server, idle_fds: int) -> None:
    """The write deadline holds for what comes from memory as well."""
    with server.client(receive_bytes=4096) as client:
        client.send(request("/files/mid.js") * 400)
        wait_for_reset(client)
    server.settle(idle_fds)
    server.unharmed()


@pytest.mark.parametrize("engine", ENGINES)
def test_stopping_while_a_file_is_sent(tmp_path: Path, engine: str) -> None:
    """A file on its way is sent whole before the worker ends, and the connection is closed behind it."""
    with file_server(tmp_path, engine) as server:
        with begin(server, "/files/large.bin") as client:
            server.program.signal(signal.SIGTERM)
            server.program.wait_for("stopping|shutdown|draining|signal")
            answer = client.read()
            assert answer.body == LARGE
            assert len(answer.body) == LARGE_BYTES
            client.sock.settimeout(5)
            assert client.sock.recv(10) == b""
        assert server.program.wait() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_unix_socket(tmp_path: Path, engine: str) -> None:
    """Sent into a UNIX socket as well."""
    text = f"""
kore.server("local", path="{tmp_path}/sock", tls=False)
kore.domain("*", attach="local").filemaps({{"/": "www"}})
""" + TEXT
    with file_server(tmp_path, engine, text), Client(str(tmp_path / "sock")) as client:
        assert client.ask(request("/large.bin")).body == LARGE
        assert client.ask(request("/a.txt")).body == b"hello a"
        client.sock.shutdown(socket.SHUT_WR)
        client.ended()
