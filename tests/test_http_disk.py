"""Bodies on a disk that does not take them: their clients wait and nobody else, and in the end all is well."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from tests.http_server_harness import ENGINES, GET, chunked, request, serving
from tests.support import wait_until

OFFLOAD = 100_000
TEXT = """
import os
import time
import kore.http.body
import kore.http.multipart

def stalled(function):
    # A disk that stands still for as long as there is a file of this name.
    def wait(*arguments):
        while os.path.exists("stall"):
            time.sleep(0.002)
        return function(*arguments)
    return wait

kore.http.body.StoredBody.append = stalled(kore.http.body.StoredBody.append)
kore.http.body.StoredBody.remove = stalled(kore.http.body.StoredBody.remove)

most = 0
feed = kore.http.multipart.FormReader.feed

def counted(reader, piece):
    global most
    most = max(most, len(piece))
    feed(reader, piece)

kore.http.multipart.FormReader.feed = counted

def free(req):
    kore.log(kore.LOG_INFO, f"free {req.query}")

@kore.route("/digest", domain=home, hooks={"on_free": free})
def digest(req):
    kore.log(kore.LOG_INFO, f"handles {req.query}")
    req.response(200, req.body_digest.hex())

@kore.route("/form", domain=home, post={"a": "."})
def form(req):
    global most
    before, most = most, 0
    if req.query != "no":
        req.populate_multi()
    file = req.file_lookup("f")
    found = [before, most, req.argument("a"), file and file.length, file and file.read(10)[1].hex()]
    req.response(200, " ".join(map(str, found)))
"""
OPTIONS = f"kore.config.http_body_disk_offload = {OFFLOAD}\nkore.config.http_body_max = 2**33\n"


class Disk:
    """The directory of a server, whose disk can be made to stand still."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def stall(self) -> None:
        (self.directory / "stall").touch()

    def go_on(self) -> None:
        (self.directory / "stall").unlink(missing_ok=True)

    def files(self) -> list[str]:
        return os.listdir(self.directory / "tmp_files")


@pytest.fixture(scope="module", params=ENGINES)
def place(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("disk")
    with serving(directory, request.param, TEXT, OPTIONS) as made:
        yield made, Disk(directory)


@pytest.fixture
def server(place):
    return place[0]


@pytest.fixture
def disk(place):
    yield place[1]
    place[1].go_on()
    wait_until(lambda: not place[1].files(), "the files are removed")


@pytest.fixture(scope="module")
def names():
    return (f"n{number}" for number in range(1000))


def push(client, data: bytes) -> int:
    """Send until the server takes no more, for half a second: how much it was."""
    sent = 0
    client.sock.settimeout(0.5)
    try:
        while sent < len(data):
            sent += client.sock.send(data[sent : sent + (1 << 20)])
    except TimeoutError:
        pass
    client.sock.settimeout(20)
    return sent


def test_the_client_is_not_read_and_the_others_are_served(server, disk, names):
    """Bounded memory, and the body is whole once the disk goes on."""
    name, body = next(names), os.urandom(30_000_000)
    rss = server.rss_kib()
    disk.stall()
    with server.client() as client, server.client() as other:
        client.send(request(f"/digest?{name}", f"Content-Length: {len(body)}", method="POST"))
        sent = push(client, body)
        assert sent < 20_000_000, "what the kernel's buffers hold"
        for _ in range(20):
            other.alive()
        assert other.ask(request("/digest", method="POST", body=body[:OFFLOAD])).status == 200
        assert server.rss_kib() - rss < 4096
        disk.go_on()
        client.send(body[sent:])
        assert client.read().body == hashlib.sha256(body).hexdigest().encode()
        client.alive()


@pytest.mark.parametrize("coding", ["length", "chunks"])
@pytest.mark.parametrize("size", [OFFLOAD + 1, OFFLOAD * 2])
@pytest.mark.parametrize("fin", [False, True])
def test_all_of_it_is_stored_before_the_handler_and_the_next_request_waits(server, disk, names, coding, size, fin):
    """A body that has come whole: its end waits for the disk, and what follows it for its response."""
    name, body = next(names), os.urandom(size)
    data = request(f"/digest?{name}", method="POST", body=body)
    if coding == "chunks":
        data = chunked(f"/digest?{name}", body[:50_000], body[50_000:])
    disk.stall()
    with server.client() as client, server.client() as other:
        client.send(data + GET)
        if fin:
            client.half_close()
        for _ in range(20):
            other.alive()
        assert f"handles {name}" not in server.program.out
        disk.go_on()
        found = client.read()
        while found.status == 100:  # it was asked whether it is still there
            found = client.read()
        assert found.body == hashlib.sha256(body).hexdigest().encode()
        assert client.read().body == b"hello"
        if fin:
            client.ended()


@pytest.mark.parametrize("whole", [False, True])
def test_a_client_that_leaves_meanwhile_leaves_nothing(server, disk, names, whole):
    """The file belongs to the thread that writes it, and is removed and closed when that has ended."""
    name = next(names)
    fds = server.fds()
    disk.stall()
    client = server.client()
    length = OFFLOAD * 2 if whole else OFFLOAD * 9
    client.send(request(f"/digest?{name}", f"Content-Length: {length}", method="POST") + bytes(OFFLOAD * 2))
    wait_until(disk.files, "it is being written")
    client.reset()
    server.program.wait_for(f"free {name}")
    assert f"handles {name}" not in server.program.out
    server.unharmed()
    disk.go_on()
    wait_until(lambda: not disk.files(), "the file is removed")
    server.settle(fds)


def test_a_refusal_meanwhile_leaves_nothing(server, disk):
    """The disk is at the first piece and not behind: what comes is read, and refused."""
    fds = server.fds()
    disk.stall()
    with server.client() as client:
        client.send(request("/digest", "Transfer-Encoding: chunked", method="POST"))
        client.send(b"%x\r\n" % (OFFLOAD + 1) + bytes(OFFLOAD + 1))
        wait_until(disk.files, "it is being written")
        assert client.ask(b"nonsense").status == 400
        client.half_close().ended()
        server.unharmed()
        disk.go_on()
    wait_until(lambda: not disk.files(), "the file is removed")
    server.settle(fds)


def test_many_at_once(server, disk, names):
    """Each file gets its own bytes, in order, whatever the threads do."""
    bodies = [os.urandom(OFFLOAD * 3 + 1000 * number) for number in range(20)]
    found: dict[int, bytes] = {}

    def upload(number: int) -> None:
        with server.client() as client:
            found[number] = client.ask(request("/digest?many", method="POST", body=bodies[number])).body

    threads = [threading.Thread(target=upload, args=(number,), daemon=True) for number in range(len(bodies))]
    disk.stall()
    for thread in threads:
        thread.start()
    wait_until(disk.files, "they are being written")
    disk.go_on()
    for thread in threads:
        thread.join(20)
    assert [found[number].decode() for number in range(20)] == [hashlib.sha256(body).hexdigest() for body in bodies]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [OFFLOAD * 2, OFFLOAD * 100])
def test_a_disk_that_never_goes_on_is_a_500(tmp_path, engine, size):
    """It has as long as the client has: http_body_timeout. And it does not keep the worker from stopping."""
    with serving(tmp_path, engine, TEXT, OPTIONS + "kore.config.http_body_timeout = 1") as server:
        disk = Disk(tmp_path)
        disk.stall()
        with server.client() as client:
            client.send(request("/digest?dead", f"Content-Length: {size}", method="POST"))
            push(client, bytes(size))
            found = client.read()
            assert (found.status, found.fields["connection"]) == (500, "close")
        server.program.wait_for("a request body could not be stored: the disk took nothing for 1 s")
        assert "handles dead" not in server.program.out
        server.unharmed()
        assert server.ask(request("/digest", method="POST", body=b"small")).status == 200
        for _ in range(2):
            server.program.signal(15)
        assert server.program.wait() == 0


# --- forms -----------------------------------------------------------------------------------------------------

MULTIPART = "Content-Type: multipart/form-data; boundary=BOUND"
HEAD = b'--BOUND\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n'
TAIL = b'\r\n--BOUND\r\nContent-Disposition: form-data; name="a"\r\n\r\nfield\r\n--BOUND--\r\n'
TURN_BYTES = 1 << 19
"""What may be taken apart at once: far less than a form may have, and about what one turn reads."""


@pytest.mark.parametrize("offload", [0, OFFLOAD, 3_000_000])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_large_form_is_taken_apart_while_it_comes(tmp_path, engine, offload):
    """Nothing is left for the handler, whether it is in memory, on disk or gets there in the middle."""
    options = f"kore.config.http_body_disk_offload = {offload}\nkore.config.http_body_max = 2**33\n"
    content = os.urandom(1000) * 10_000
    body = HEAD + content + TAIL
    wanted = f"0 field {len(content)} {content[:10].hex()}"
    with serving(tmp_path, engine, TEXT, options) as server, server.client() as client:
        for data in (
            request("/form", MULTIPART, method="POST", body=body),
            chunked("/form", *(body[at : at + 70_000] for at in range(0, len(body), 70_000))).replace(
                b"\r\n", f"\r\n{MULTIPART}\r\n".encode(), 1),
        ):
            most, _, rest = client.ask(data).body.decode().partition(" ")
            assert rest == wanted
            assert 0 < int(most) <= TURN_BYTES
        small = request("/form", MULTIPART, method="POST", body=HEAD + content[:1000] + TAIL)
        assert client.ask(small).body.decode() == f"0 {len(HEAD + TAIL) + 1000} field 1000 {content[:10].hex()}"
        client.alive()


@pytest.mark.parametrize(("tail", "status"), [
    (b"", 400),
    (b"\r\n--BOUNDx\r\n" + TAIL, 400),
    (b"\r\n--BOUND\r\nbad\r\n\r\n" + TAIL, 400),
    (b'\r\n--BOUND\r\nContent-Disposition: form-data; name="a"\r\n\r\n--BOUND\r\n' + TAIL, 400),
    (b'\r\n--BOUND\r\nContent-Disposition: form-data; name="a"\r\n\r\nx' * 1001 + TAIL, 413),
    (b'\r\n--BOUND\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * (9 << 20) + TAIL, 413),
])
def test_what_is_wrong_with_it_is_told_to_who_asks_for_it(server, disk, tail, status):
    """As for any form; a handler that does not ask never hears of it, and the connection goes on."""
    body = HEAD + bytes(OFFLOAD * 4) + tail
    with server.client() as client:
        for _ in range(2):
            assert client.ask(request("/form", MULTIPART, method="POST", body=body)).status == status
            found = client.ask(request("/form?no", MULTIPART, method="POST", body=body))
            assert (found.status, found.body.split(b" ", 1)[1]) == (200, b"0 None None None")
        client.alive()


@pytest.mark.parametrize("field", ["Content-Type: multipart/form-data", "Content-Type: text/plain", "x: y"])
def test_what_is_no_form_is_not_read_as_one(server, disk, field):
    body = HEAD + bytes(OFFLOAD * 4) + TAIL
    with server.client() as client:
        found = client.ask(request("/form", field, method="POST", body=body))
        assert found.status == (400 if "multipart" in field else 200)
        if found.status == 200:
            assert found.body == b"0 0 None None None"
        client.alive()
