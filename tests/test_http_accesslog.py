"""Access logs: a line for every response, that no client can forge, and that is never waited for."""

from __future__ import annotations

import json
import os
import re
import select
import socket
from io import FileIO
from pathlib import Path

import pytest

from kore.http import accesslog
from kore.http.accesslog import AccessLog, Entry, LogTarget, escaped
from kore.http.head import HeadParser
from tests.http_server_harness import ENGINES, GET, Client, request, serving
from tests.support import SECONDS, pids_of, skip_unless, starter, wait_until

TEXT = """
import asyncio

home.accesslog = "home.log"
home.redirect("^/old$", 301, "/")
home.filemaps({"/files/": "webroot"})

plain = kore.domain("plain.example", attach="plain")
plain.accesslog = "combined.log"
plain.accesslog_format = "combined"
plain.route("^/(.*)$", lambda req, rest: req.response(200, b"plain"))

data = kore.domain("json.example", attach="plain")
data.accesslog = "json.log"
data.accesslog_format = "json"

silent = kore.domain("silent.example", attach="plain")
silent.route("/", lambda req: req.response(200, b"silent"))

@kore.route("^/(.*)$", domain=data)
async def answer(req, rest):
    await asyncio.sleep(0.05)
    req.response(200, b"json")

@kore.route("/body", domain=home)
def body(req):
    req.response(201, req.body)

@kore.route("/late", domain=home, methods=["get"])
async def late(req):
    await asyncio.sleep(0.01)
    req.response(200, b"late")

@kore.route("/raises", domain=home)
def raises(req):
    raise ValueError("x")

@kore.route("/stream", domain=home)
def stream(req):
    req.response(200, ["abc", "defg"])

@kore.route("/endless", domain=home)
def endless(req):
    req.response(200, (bytes(10000) for _ in iter(int, 1)))

@kore.route("/empty", domain=home)
def empty(req):
    req.response(204, None)

@kore.route("/interim", domain=home)
def interim(req):
    req.response(103, None)
    req.response(200, b"x")

@kore.route("/closed", domain=home, auth={"type": "header", "value": "x", "verify": lambda req, value: True})
def closed(req):
    req.response(200, b"x")
"""

LINE = re.compile(
    r'(?P<client>\S+) - - \[(?P<time>[^\]]+)\] "(?P<request>[^"]*)" (?P<status>\d+) (?P<bytes>\d+) '
    r'"(?P<referer>[^"]*)" "(?P<agent>[^"]*)"'
)
OPTIONS = "kore.config.http_body_max = 100000\nkore.config.http_header_timeout = 1\nkore.config.http_body_timeout = 1"


@pytest.fixture(scope="module", params=ENGINES)
def place(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("accesslog")
    (directory / "webroot").mkdir()
    (directory / "webroot" / "a.txt").write_text("file")
    (directory / "webroot" / "large.bin").write_bytes(bytes(3_000_000))
    with serving(directory, request.param, TEXT, OPTIONS) as made:
        yield made, directory


class Log:
    """A log file, read from where it ended before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size

    def lines(self, count: int) -> list[str]:
        """The next `count` lines, once they are there; there must be no more of them."""
        def text() -> str:
            with self.path.open("rb") as file:
                file.seek(self.position)
                return file.read().decode("ascii")

        wait_until(lambda: text().count("\n") >= count, f"{count} lines in {self.path}")
        found = text()
        assert found[-1:] in ("", "\n")
        assert found.count("\n") == count, found
        self.position += len(found)
        return found.splitlines()

    def read(self, count: int) -> list[tuple[str, int, int]]:
        """What was asked, the status and the bytes of the next `count` lines."""
        return [(m["request"], int(m["status"]), int(m["bytes"])) for m in map(LINE.fullmatch, self.lines(count)) if m]


@pytest.fixture
def server(place):
    return place[0]


@pytest.fixture
def log(place):
    return Log(place[1] / "home.log")


def test_a_line_does_not_wait_for_others(server, log):
    """http.md 19.3: it took ten seconds, as only full buffers were written at once."""
    for _ in range(2):  # the second comes right after lines were written
        server.ask(request("/"))
        wait_until(lambda: log.path.stat().st_size > log.position, "it is written", seconds=5)
        log.lines(1)


def test_the_line_is_the_documented_one(server, log):
    server.ask(request("/?a=b", "Referer: http://x/", "User-Agent: test/1 (x)"))
    (line,) = log.lines(1)
    assert re.fullmatch(
        r'127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "GET / HTTP/1\.1" 200 5 '
        r'"http://x/" "test/1 \(x\)"', line)


def test_every_response_has_its_line(server, log):
    """kore-api.md 8.11, http.md 19.3: also 404, 405 and redirects; OPTIONS is called by its name."""
    cases = [
        (request("/"), "GET / HTTP/1.1", 200, 5),
        (request("/", version="1.0"), "GET / HTTP/1.0", 200, 5),
        (request("/", method="HEAD"), "HEAD / HTTP/1.1", 200, 0),
        (request("/late"), "GET /late HTTP/1.1", 200, 4),
        (request("/body", method="PUT", body=b"four"), "PUT /body HTTP/1.1", 201, 4),
        (request("/body", "Content-Length: 4", "Expect: 100-continue", method="POST") + b"four",
         "POST /body HTTP/1.1", 201, 4),
        (request("/raises"), "GET /raises HTTP/1.1", 500, 0),
        (request("/stream"), "GET /stream HTTP/1.1", 200, 7),
        (request("/stream", method="HEAD"), "HEAD /stream HTTP/1.1", 200, 0),
        (request("/empty"), "GET /empty HTTP/1.1", 204, 0),
        (request("/body", method="OPTIONS"), "OPTIONS /body HTTP/1.1", 201, 0),
        (request("*", method="OPTIONS"), "OPTIONS * HTTP/1.1", 200, 0),
        (request("/nowhere"), "GET /nowhere HTTP/1.1", 404, 0),
        (request("/", method="DELETE"), "DELETE / HTTP/1.1", 405, 0),
        (request("/old"), "GET /old HTTP/1.1", 301, 0),
        (request("/closed"), "GET /closed HTTP/1.1", 403, 0),
        (request("/closed", "x: y"), "GET /closed HTTP/1.1", 200, 1),
        (request("/nowhere", method="POST", body=b"body"), "POST /nowhere HTTP/1.1", 404, 0),
        (request("/files/a.txt"), "GET /files/a.txt HTTP/1.1", 200, 4),
        (request("/files/a.txt", "Range: bytes=1-2"), "GET /files/a.txt HTTP/1.1", 206, 2),
        (request("/files/a.txt", method="HEAD"), "HEAD /files/a.txt HTTP/1.1", 200, 0),
        (request("/files/none"), "GET /files/none HTTP/1.1", 404, 0),
        (request("/files/large.bin"), "GET /files/large.bin HTTP/1.1", 200, 3_000_000),
    ]  # fmt: skip
    for data, asked, _, _ in cases * 2:
        server.ask(data, asked.split(" ")[0])
    assert log.read(2 * len(cases)) == [case[1:] for case in cases * 2]


def test_responses_to_a_pipeline_have_their_lines(server, log):
    with server.client() as client:
        client.send(GET * 100)
        for _ in range(100):
            client.read()
        client.send(request("/late") + GET + request("/interim"))
        assert [client.read().status for _ in range(4)] == [200, 200, 103, 200]
    found = log.read(103)
    assert found[:100] == [("GET / HTTP/1.1", 200, 5)] * 100
    assert [asked for asked, _, _ in found[100:]] == [f"GET {path} HTTP/1.1" for path in ("/late", "/", "/interim")]


@pytest.mark.parametrize(("data", "asked", "status"), [
    (b"nonsense\r\n\r\n", "-", 400),
    (b"GET / HTTP/1.1\r\n\r\n", "-", 400),
    (b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", "-", 501),
    (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\n", "-", 414),
    (request("/", "A: " + "b" * 5000), "-", 431),
    (request("/", "Content-Length: 100001", "User-Agent: big", method="POST"), "POST / HTTP/1.1", 413),
    (request("/body", "Transfer-Encoding: chunked", method="POST") + b"zz\r\n", "POST /body HTTP/1.1", 400),
    (b"GET /", "-", 408),
    (request("/body", "Content-Length: 5", method="POST") + b"ab", "POST /body HTTP/1.1", 408),
])
def test_what_is_refused_early_has_its_line_too(server, log, data, asked, status):
    with server.client() as client:
        assert client.send(GET + data).read().status == 200
        assert client.read().status == status
    assert log.read(2) == [("GET / HTTP/1.1", 200, 5), (asked, status, 0)]


def test_what_a_client_broke_off_has_its_line(server, log):
    for path in ("/endless", "/files/large.bin"):
        with server.client(receive_bytes=4096) as client:
            client.send(request(path)).sock.recv(1000)
            client.reset()
        ((asked, status, size),) = log.read(1)
        assert (asked, status) == (f"GET {path} HTTP/1.1", 200)
        assert size > 0 or path != "/endless"  # of a file what the socket took is known once it took all of a piece


def test_an_idle_connection_that_is_closed_has_no_line(server, log):
    with server.client() as client:
        client.ended()  # nothing was asked
    server.ask(GET)
    assert len(log.read(1)) == 1


FORGED = '" 200 0 "-" "-"\\n127.0.0.1 - - [x] "GET /admin'


def test_no_client_can_forge_a_line(server, log):
    agent = 'a"b\\c\td\xe9'.encode() + b"\xff\x80"
    fields = b"Host: x\r\nUser-Agent: " + agent + b"\r\nReferer: " + FORGED.encode()
    server.ask(b"GET /\"\\x\xff\xc3\xa9 HTTP/1.1\r\n" + fields + b"\r\n\r\n")
    (line,) = log.lines(1)
    found = LINE.fullmatch(line)
    assert found is not None
    assert found["request"] == r"GET /\x22\x5cx\xff\xc3\xa9 HTTP/1.1"
    assert found["agent"] == r"a\x22b\x5cc\x09d\xc3\xa9\xff\x80"
    assert found["referer"] == FORGED.replace("\\", r"\x5c").replace('"', r"\x22")


def test_missing_fields_and_empty_ones_are_dashes(server, log):
    server.ask(request("/", "Referer:", "User-Agent: "))
    assert log.lines(1)[0].endswith('"GET / HTTP/1.1" 200 5 "-" "-"')


def test_domains_have_their_own_logs_and_formats(place):
    server, directory = place
    logs = {name: Log(directory / f"{name}.log") for name in ("home", "combined", "json")}
    for host in ("plain.example", "json.example", "silent.example"):
        fields = f"Host: {host}:80\r\nUser-Agent: \u00e9\"\r\nReferer: r\r\nX-Request-Id: id-7\r\n\r\n"
        server.ask(f"GET /a/?b=%22 HTTP/1.1\r\n{fields}".encode())
    (line,) = logs["combined"].lines(1)
    assert line.endswith(r'"GET /a/?b=%22 HTTP/1.1" 200 5 "r" "\xc3\xa9\x22"')
    (line,) = logs["json"].lines(1)
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert 50 <= found.pop("duration_ms") < 5000
    assert found == {
        "client": "127.0.0.1", "method": "GET", "path": "/a/", "query": "b=%22", "protocol": "HTTP/1.1", "status": 200,
        "bytes": 4, "route": "^/(.*)$", "user": None, "request_id": "id-7", "host": "json.example:80", "referer": "r",
        "agent": "\u00e9\"",
    }  # fmt: skip
    for _ in range(2):
        fields = b"Host: json.example\r\nX-Request-Id: " + b"a" * 200 + b"\r\nReferer: \xff\r\n\r\n"
        server.ask(b"DELETE /x HTTP/1.1\r\n" + fields)
    one, two = (json.loads(line) for line in logs["json"].lines(2))
    assert one["request_id"] != two["request_id"]
    assert (one["query"], one["agent"], one["referer"]) == (None, None, "\\xff")
    logs["home"].lines(0)


def test_what_belongs_to_no_domain_is_logged_by_the_catch_all(server, log):
    server.ask(b"GET /x HTTP/1.1\r\nHost: nobody.example\r\n\r\n")
    assert log.read(1) == [("GET /x HTTP/1.1", 404, 0)]
    server.ask(b"GET /x HTTP/1.0\r\n\r\n")
    assert log.read(1) == [("GET /x HTTP/1.0", 404, 0)]


@pytest.mark.parametrize("engine", ENGINES)
def test_lines_of_several_workers_are_whole_and_all_there(tmp_path, engine):
    skip_unless(engine)
    with starter(tmp_path) as programs:
        program = programs.serve('home.accesslog = "a.log"', workers=3, io=engine)
        assert len(pids_of(program)) == 3
        count = 40
        for number in range(count):
            with Client(program.address) as client:
                agents = [f"User-Agent: {number}-{n}-" + "x" * 500 for n in range(50)]
                client.send(b"".join(request(f"/?{number}", agent) for agent in agents))
                for _ in range(50):
                    client.read()
        program.signal(15)
        assert program.wait() == 0
        lines = (tmp_path / "a.log").read_text().splitlines()
    agents = [found["agent"] for line in lines if (found := LINE.fullmatch(line))]
    assert len(agents) == len(lines) == count * 50
    assert sorted(agents) == sorted(f"{a}-{b}-" + "x" * 500 for a in range(count) for b in range(50))


def test_a_unix_peer_is_a_dash(tmp_path):
    text = (
        'import kore\nkore.config.deployment = "dev"\nkore.config.workers = 1\n'
        'kore.server("unix", path="sock", tls=False)\n'
        'home = kore.domain("*", attach="unix")\nhome.accesslog = "a.log"\n'
        '@kore.route("/", domain=home)\ndef index(req):\n    req.response(200, b"hello")\n'
    )
    with starter(tmp_path) as programs:
        programs.app(text)
        log = Log(tmp_path / "a.log")
        with Client(str(tmp_path / "sock")) as client:
            client.alive()
            assert log.lines(1)[0].startswith("- - - [")
            client.send(b"nonsense\r\n\r\n").read()
        assert log.lines(1)[0].startswith("- - - [")


def test_a_log_may_be_a_fifo_that_somebody_reads(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with starter(tmp_path) as programs:
        program = programs.serve('home.accesslog = "fifo"', workers=1, wait=False)
        assert program.wait() != 0, "nobody reads it: an error, and no waiting"
        assert "cannot open accesslog" in program.out + program.err
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with serving(tmp_path, "epoll", 'home.accesslog = "fifo"') as server:
            server.ask(GET)
            assert select.select([reader], [], [], SECONDS)[0], "the line comes"
            assert b'"GET / HTTP/1.1" 200' in os.read(reader, 10000)
            for _ in range(20):  # more than a pipe holds, and nobody reads
                with server.client() as client:
                    client.send(request("/", "User-Agent: " + "x" * 2000) * 50)
                    for _ in range(50):
                        assert client.read().status == 200
            server.program.wait_for("access log 'fifo': Resource temporarily unavailable")
            server.unharmed()
    finally:
        os.close(reader)


# --- one worker's end ------------------------------------------------------------------------------------------


def entry(agent: str | None = None, status: int = 200) -> Entry:
    head = HeadParser().parse(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
    return Entry("1.2.3.4", head, status, 3, 0.001, "/x", {"user-agent": agent}.get)


def make(path: Path | str) -> tuple[AccessLog, list[str], FileIO]:
    told: list[str] = []
    file = FileIO(os.fspath(path), "ab")
    return AccessLog(LogTarget(file, "kore"), lambda _, text: told.append(text)), told, file


def test_lines_are_written_a_batch_at_a_time(tmp_path):
    log, told, file = make(tmp_path / "log")
    log.add(entry())
    assert file.tell() == 0
    log.flush()
    size = os.path.getsize(tmp_path / "log")
    assert size > 0
    for _ in range(accesslog.BATCH_BYTES // size):
        log.add(entry())
    assert os.path.getsize(tmp_path / "log") == size
    log.add(entry())
    assert os.path.getsize(tmp_path / "log") > accesslog.BATCH_BYTES
    log.flush()
    assert told == []
    assert all(LINE.fullmatch(line) for line in (tmp_path / "log").read_text().splitlines())
    file.close()


def test_a_full_disk_costs_lines_and_says_so_once_in_a_while(monkeypatch):
    """http.md 13: the C platform waits, a millisecond at a time, for the parent to write."""
    log, told, file = make("/dev/full")
    bound = 20_000
    monkeypatch.setattr(accesslog, "KEPT_BYTES_MAX", bound)
    for _ in range(1000):
        log.add(entry())
        log.flush()
        assert log._size + len(log._kept) < bound + 200
    assert len(told) == 1
    assert told[0].startswith("access log '/dev/full': No space left on device (errno 28); lines lost: ")
    target = os.open(os.devnull, os.O_WRONLY)
    os.dup2(target, file.fileno())  # as reopening does
    os.close(target)
    log.flush()
    assert len(told) == 2
    assert re.search(r"written again; lines lost: [1-9]\d*$", told[1])
    log.flush()
    assert len(told) == 2
    file.close()


def test_what_is_written_in_part_is_gone_on_with(tmp_path):
    """A pipe takes what it has room for; the rest of the line follows, and no line twice."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    told: list[str] = []
    file = FileIO(write_end, "ab")
    log = AccessLog(LogTarget(file, "kore"), lambda _, text: told.append(text))
    for number in range(2000):
        log.add(entry(f"agent {number}"))
    log.flush()
    text = b""
    while b"agent 1999" not in text:
        text += os.read(read_end, 1000)
        log.flush()
    agents = [found["agent"] for line in text.decode().splitlines() if (found := LINE.fullmatch(line))]
    assert agents == [f"agent {number}" for number in range(2000)]
    file.close()
    os.close(read_end)


def test_a_closed_log_hurts_nobody(tmp_path):
    log, told, file = make(tmp_path / "log")
    file.close()
    log.add(entry())
    log.flush()
    assert len(told) == 1


@pytest.mark.parametrize(("text", "wanted"), [
    ("", ""), ("plain ASCII ~!", "plain ASCII ~!"), ('"', r"\x22"), ("\\", r"\x5c"),
    ("\n\r\t\0\x7f", r"\x0a\x0d\x09\x00\x7f"),
    ("\u00e9", r"\xc3\xa9"), ("\udcff", r"\xff"), ("\u2028", r"\xe2\x80\xa8"),
])
def test_escapes(text, wanted):
    assert escaped(text) == wanted


def test_the_address_of_a_peer():
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        with socket.create_connection(listener.getsockname()[:2]) as one:
            assert accesslog.address(one.fileno()) == "::1"
            assert one.fileno() >= 0
        with socket.socket() as unconnected:
            assert accesslog.address(unconnected.fileno()) == "-"
