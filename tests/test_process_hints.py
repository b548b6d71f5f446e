"""Who is refused something by the sandbox finds the option that allows it in the log, and with it, it is allowed."""

from __future__ import annotations

import os
import re
import socket
import threading

import pytest

from kore.process.hints import LINES_MAX, Hints
from kore.sandbox.confinement import Confinement
from tests.engines import ENGINES, skip_unconfined
from tests.http_server_harness import GET, request, serving
from tests.support import SECONDS

pytest.importorskip("pyseccomp")

TEXT = """
import asyncio, os, socket, sqlite3, subprocess, tempfile

@kore.route("/do", domain=home)
async def do(req):
    {code}
    req.response(200, b"done")
"""


@pytest.fixture(params=ENGINES)
def engine(request):
    skip_unconfined(request.param)
    return request.param


@pytest.fixture(autouse=True)
def inside(monkeypatch):
    monkeypatch.setenv("KORE_SANDBOX", "yes")


@pytest.fixture
def port():
    """A port of a server that takes a connection, answers it as an HTTP server, and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.settimeout(SECONDS)
                    client.recv(1000)
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(SECONDS)


FILES = {
    "read a file": "open({outside!r}).read()",
    "list a directory": "os.listdir({directory!r})",
    "write a file": "open('made', 'w').close()",
    "append to a file": "open('app.py', 'a').close()",
    "make a directory": "os.mkdir('made')",
    "a temporary file": "tempfile.NamedTemporaryFile(dir='.').close()",
    "a temporary directory": "tempfile.TemporaryDirectory(dir='.').cleanup()",
    "move a file": "os.rename('old', 'new')",
    "in a thread": "await asyncio.to_thread(open, {outside!r})",
}


@pytest.mark.parametrize("what", FILES)
def test_files(tmp_path, engine, what):
    """What the line names is enough: no more is opened than that."""
    app, outside = tmp_path / "app", tmp_path / "outside.txt"
    app.mkdir()
    (app / "old").touch()
    outside.write_text("x")
    text = TEXT.format(code=FILES[what].format(outside=str(outside), directory=str(tmp_path)))
    with serving(app, engine, text) as server:
        assert server.ask(request("/do")).status == 500
        line = server.program.wait_for(r"log=\[sandbox: .*?(kore\.config\.sandbox_\w+ = '.*?')")[1]
    with serving(app, engine, text, line) as server:
        assert server.ask(request("/do")).body == b"done", server.program.out
        assert "sandbox:" not in server.program.out


CONNECTIONS = {
    "asyncio": "(await asyncio.open_connection('127.0.0.1', {port}))[1].close()",
    "a plain socket": "socket.create_connection(('127.0.0.1', {port})).close()",
    "kore.httpclient": "await kore.httpclient('http://127.0.0.1:{port}/').get()",
    "kore.socket_wrap": "s = socket.socket(); s.setblocking(False); "
    "c = kore.socket_wrap(s); await c.connect('127.0.0.1', {port}); c.close()",
}


@pytest.mark.parametrize("others", ["", "kore.config.sandbox_connect = 1"], ids=["nowhere", "elsewhere"])
@pytest.mark.parametrize("what", CONNECTIONS)
def test_connections(tmp_path, engine, what, others, port):
    if "httpclient" in what:
        pytest.importorskip("pycurl")
    text = TEXT.format(code=CONNECTIONS[what].format(port=port))
    with serving(tmp_path, engine, text, others) as server:
        assert server.ask(request("/do")).status == 500
        line = server.program.wait_for(r"log=\[sandbox: .*(kore\.config\.sandbox_connect = )(\d+)")
        assert line[2] in (str(port), "5432"), "an example, where the port is not to be found out"
    with serving(tmp_path, engine, text, f"{line[1]}{port}") as server:
        assert server.ask(request("/do")).body == b"done", server.program.out


def test_a_database_in_a_file(tmp_path, engine):
    code = "db = sqlite3.connect('data/x.db'); db.execute('create table t(a)'); db.commit(); db.close()"
    (tmp_path / "data").mkdir()
    text = TEXT.format(code=code)
    with serving(tmp_path, engine, text) as server:
        assert server.ask(request("/do")).status == 500
        server.program.wait_for(r"sandbox: SQLite .*kore\.config\.sandbox_write")
    with serving(tmp_path, engine, text, "kore.config.sandbox_write = 'data'") as server:
        assert server.ask(request("/do")).body == b"done", server.program.out


OTHERS = {
    "a program": ("subprocess.run(['ls'])", r"kore\.proc"),
    "a process": ("os.fork()", r"kore\.proc"),
    "a server": ("s = socket.socket(); s.bind(('127.0.0.1', 0))", r"kore\.server\(\)"),
    "a name": ("await asyncio.open_connection('nowhere.invalid', 1)", r"kore\.config\.sandbox_connect"),
    "a system call": ("os.statvfs('/')", r"kore\.config\.seccomp_tracing"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_no_option_allows_has_another_way(tmp_path, engine, what):
    code, wanted = OTHERS[what]
    with serving(tmp_path, engine, TEXT.format(code=code)) as server:
        for _ in range(3):
            assert server.ask(request("/do")).status == 500
        server.program.wait_for(rf"log=\[sandbox: .*{wanted}")
        server.unharmed()
        assert server.program.out.count("[sandbox: ") == 1, "it is told once"


def test_without_a_sandbox_nothing_is_explained(tmp_path, engine, monkeypatch):
    monkeypatch.setenv("KORE_SANDBOX", "no")
    with serving(tmp_path, engine, TEXT.format(code="raise PermissionError(13, 'no', 'app.py')")) as server:
        assert server.ask(request("/do")).status == 500
        assert server.ask(GET).status == 200
        server.program.wait_for("uncaught exception")
        assert "sandbox:" not in server.program.out


def looked_at(*errors: BaseException, **options) -> list[str]:
    said: list[str] = []
    hints = Hints(Confinement(process="worker", on=True, **options), lambda _, text: said.append(text))
    for error in errors:
        hints.look(error)
    return said


@pytest.mark.parametrize("error", [
    ValueError("x"),
    PermissionError("not yours"),
    FileNotFoundError(2, "No such file", "/nothing"),
    ConnectionRefusedError(111, "Connection refused"),
    PermissionError(13, "no", "/etc/ssl/openssl.cnf"),  # may be read, and is nobody's to write but root's
    PermissionError(1, "name it with kore.config.sandbox_programs", "/bin/ls"),
], ids=repr)  # fmt: skip
def test_what_the_sandbox_has_nothing_to_do_with(error):
    assert looked_at(error, read=("/etc/ssl",), write=("/etc/ssl",)) == []


def test_a_chain_is_followed_and_a_ring_ends():
    low = PermissionError(13, "Connect call failed ('127.0.0.1', 7)")
    try:
        raise low
    except PermissionError as error:
        wrapped = RuntimeError("cannot reach it")
        wrapped.__cause__ = error
    low.__context__ = wrapped
    grouped = ExceptionGroup("x", [wrapped, wrapped])
    (line,) = looked_at(grouped, wrapped, low)
    assert "kore.config.sandbox_connect = 7 allows it" in line


def test_an_exception_whose_attributes_raise_harms_nobody():
    class Odd(OSError):
        errno = 13

        @property
        def strerror(self):
            raise LookupError

    assert looked_at(Odd()) == []


def test_hints_are_few(tmp_path):
    found = looked_at(*(FileNotFoundError(2, "x") for _ in range(3)))
    assert found == []
    many = [PermissionError(13, "no", os.fspath(tmp_path / str(number) / "x")) for number in range(LINES_MAX * 2)]
    for number in range(LINES_MAX * 2):
        (tmp_path / str(number)).mkdir()
    lines = looked_at(*many)
    assert len(lines) == LINES_MAX
    assert all(re.search(r"sandbox_write = '.*'", line) for line in lines)
