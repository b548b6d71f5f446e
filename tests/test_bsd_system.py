"""The server on a system without anything that only Linux has: it starts, on kqueue, and serves all the same.

The programs started here take their system for FreeBSD, NetBSD or OpenBSD: tests/kqueue/sitecustomize.py takes away
what those have not.
"""

from __future__ import annotations

import errno
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys

import pytest

import kore
from kore.process.channel import BUFFER_BYTES, enlarge
from kore.process.descriptors import open_descriptors
from kore.readiness.syscalls import listens, possible_fds
from tests.driver_harness import fds
from tests.engines import OPENBSD, taken_for
from tests.http_server_harness import Client, chunked, request
from tests.privileges_harness import a_user, needs_root, root_directory
from tests.support import free_port, starter, wait_until
from tests.websocket_harness import WsClient

# No pledge here: that is another test's.
APP = """
import asyncio
import os
import kore
from kore.bsd import pledge

pledge.available = lambda: False
kore.config.deployment = "dev"
kore.config.workers = 2
kore.config.http_body_max = 10_000_000
kore.config.http_body_disk_offload = 1000

kore.server("plain", ip="127.0.0.1", port="{port}", tls=False)
kore.server("unix", path="{path}", tls=False)
home = kore.domain("*", attach="plain")
home.accesslog = "access.log"
local = kore.domain("*", attach="unix")

@kore.route("/", domain=local, methods=["get"])
@kore.route("/", domain=home, methods=["get"])
def index(req):
    req.response(200, b"hello")

@kore.route("/echo", domain=home, methods=["post"])
def echo(req):
    req.response(200, req.body)

@kore.route("/large", domain=home, methods=["get"])
def large(req):
    req.response(200, bytes(3_000_000))

@kore.route("/proc", domain=home, methods=["get"])
async def proc(req):
    child = kore.proc("cat")
    await child.send("through a child")
    text = await child.recv(100)
    child.close_stdin()
    status = await child.reap()
    quick = kore.proc("false")
    req.response(200, b"%s %d %d" % (text, status, await quick.reap()))

@kore.route("/killed", domain=home, methods=["get"])
async def killed(req):
    child = kore.proc("sleep 1000")
    child.kill()
    req.response(200, b"%d" % await child.reap())

@kore.route("/asyncio", domain=home, methods=["get"])
async def of_asyncio(req):
    made = await asyncio.create_subprocess_exec("sh", "-c", "echo out; exit 3", stdout=asyncio.subprocess.PIPE)
    text, _ = await made.communicate()
    await asyncio.sleep(0.01)
    req.response(200, b"%s%d" % (text, made.returncode))

@kore.route("/client", domain=home, methods=["get"])
async def client(req):
    reader, writer = await asyncio.open_connection("127.0.0.1", {port})
    writer.write(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    answer = await reader.read()
    writer.close()
    req.response(200, answer[-5:])

@kore.route("/abstract", domain=home, methods=["get"])
async def abstract(req):
    try:
        await kore.socket_wrap(__import__("socket").socket(__import__("socket").AF_UNIX)).connect("@name")
    except RuntimeError as error:
        req.response(200, str(error).encode())

@kore.route("/system", domain=home, methods=["get"])
def system(req):
    import select, sys
    names = [hasattr(os, "pidfd_open"), hasattr(select, "epoll"), hasattr(os, "pipe2"), hasattr(os, "splice")]
    try:
        os.listdir("/proc/self")
    except OSError as error:
        req.response(200, f"{{sys.platform}} {{any(names)}} {{error.strerror}}".encode())

@kore.route("/ws", domain=home)
def ws(req):
    req.websocket_handshake(None, lambda c, op, data: c.websocket_send(op, data), None)

class App:
    def onmsg(self, text):
        kore.log(kore.LOG_INFO, f"{{kore.worker()}} got {{len(text)}}")

koreapp = App()

@kore.route("/tell", domain=home, methods=["get"])
def tell(req):
    kore.sendobj("x" * 300_000)
    kore.sendobj("the word")
    req.response(200, b"%d" % kore.worker())

home.filemaps({{"/files/": "."}})
"""


PUBLIC = """
import os
import kore
from kore.bsd import pledge

pledge.available = lambda: False
kore.config.deployment = "docker"
kore.config.workers = 1
kore.config.root = "{root}"
kore.config.runas = "{user}"
kore.server("plain", ip="127.0.0.1", port="{port}", tls=False)
home = kore.domain("*", attach="plain")

@kore.route("/", domain=home, methods=["get"])
def index(req):
    req.response(200, f"{{os.getuid()}} {{os.listdir('/')}}".encode())
"""


@pytest.fixture(scope="module", params=["freebsd", "netbsd", "openbsd"])
def server(request, tmp_path_factory):
    """A running server, its TCP address, its unix path and the beginning of its sys.platform."""
    folder = tmp_path_factory.mktemp("bsd")
    port = free_port()
    with starter(folder) as programs:
        program = programs.app(APP.format(port=port, path=folder / "socket"), environment=taken_for(request.param))
        program.address = ("127.0.0.1", port)
        program.system = request.param
        yield program


def ask(server, path: str, **more) -> bytes:
    """The body of one response."""
    with Client(server.address) as client:
        answer = client.send(request(path, **more)).read()
        assert answer.status == 200
        return answer.body


def test_it_is_such_a_system(server) -> None:
    """Nothing of Linux's is there, and kqueue is what the server chose by itself, without a word about rings."""
    assert re.fullmatch(rf"{server.system}\d+ False No such file or directory", ask(server, "/system").decode())
    assert "engine kqueue" in server.out
    assert "io_uring" not in server.out


@pytest.mark.parametrize(("path", "body"), [
    ("/", b"hello"), ("/proc", b"through a child 0 1"), ("/killed", b"9"), ("/asyncio", b"out\n3"),
    ("/client", b"hello"), ("/large", bytes(3_000_000)),
])
def test_what_handlers_do(server, path: str, body: bytes) -> None:
    for _ in range(3):
        assert ask(server, path) == body


def test_bodies_in_memory_and_in_files(server) -> None:
    for size in (10, 5_000_000):
        assert ask(server, "/echo", method="POST", body=b"x" * size) == b"x" * size
    with Client(server.address) as client:
        assert client.send(chunked("/echo", b"a" * 3000, b"b")).read().body == b"a" * 3000 + b"b"


@pytest.mark.parametrize("size", [0, 10, 200_000, 3_000_000])
def test_files(server, size: int) -> None:
    """Without sendfile, splice and memfd they are read and written; asked for twice, the second may be remembered."""
    content = os.urandom(size)
    (server.directory / f"file{size}").write_bytes(content)
    for _ in range(2):
        assert ask(server, f"/files/file{size}") == content
    (server.directory / "link").unlink(missing_ok=True)


def test_websockets(server) -> None:
    with WsClient(server.address, "/ws") as ws:
        assert ws.message("there and back").text() == "there and back"


def test_messages_between_workers(server) -> None:
    """Whole ones, in order, however many pieces they are cut into."""
    teller = int(ask(server, "/tell"))
    other = 3 - teller
    server.wait_for(rf"log=\[{other} got 8\]")
    assert re.findall(rf"log=\[{other} got (\d+)\]", server.out) == ["300000", "8"]


def test_logs_are_opened_again(server) -> None:
    """The parent opens the file and hands it over with a message (SCM_RIGHTS): each worker writes to the new one."""
    old, new = server.directory / "access.old", server.directory / "access.log"
    ask(server, "/")
    wait_until(lambda: new.exists() and new.read_text(), "a line")
    new.rename(old)
    server.signal(signal.SIGHUP)
    wait_until(lambda: (ask(server, "/"), new.exists() and new.read_text())[1], "a line in the new file")


@needs_root
@pytest.mark.parametrize("system", ["freebsd", "netbsd", "openbsd"])
def test_root_and_user_change(tmp_path, system: str) -> None:
    """For the public, without a word about the sandbox, which is Linux's."""
    root = root_directory(tmp_path)
    (tmp_path / "app.py").write_text(PUBLIC.format(port=(port := free_port()), root=root, user=a_user().pw_name))
    with starter(tmp_path) as programs:
        program = programs.kore("app.py", environment=taken_for(system))
        program.wait_for("ready: 1 worker")
        with Client(("127.0.0.1", port)) as client:
            assert client.send(request("/")).read().body == b"%d []" % a_user().pw_uid
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "sandbox" not in program.out + program.err


def test_unix_sockets_have_paths(server) -> None:
    """One with a path serves; an abstract name is refused with a word, where a socket would get no name at all."""
    with Client(str(server.directory / "socket")) as client:
        assert client.send(request("/")).read().body == b"hello"
    assert b"only Linux has abstract sockets" in ask(server, "/abstract")


def test_an_abstract_listener_is_no_start(tmp_path) -> None:
    with starter(tmp_path) as programs:
        (tmp_path / "app.py").write_text('import kore\nkore.server("unix", path="@name", tls=False)\n')
        program = programs.kore("app.py", environment=OPENBSD)
        assert program.wait() == 1
        assert "only Linux has abstract sockets" in program.err
        assert program.err.count("\n") == 1


def test_epoll_is_refused_there(tmp_path) -> None:
    """In one line, when it is asked for."""
    with starter(tmp_path) as programs:
        (tmp_path / "app.py").write_text(APP.format(port=free_port(), path=tmp_path / "socket"))
        program = programs.kore("app.py", environment=OPENBSD | {"KORE_IO": "epoll"})
        assert program.wait() == 1
        assert program.err.startswith("kore: KORE_IO=epoll: epoll: there is no epoll on this system")
        assert program.err.count("\n") == 1


def test_every_module_can_be_loaded(tmp_path) -> None:
    """Save those of the engines that the system has not, which are loaded only when they are asked for."""
    optional = ("kore.uring.", "kore.readiness.epoll")
    names = [
        found.name for found in pkgutil.walk_packages(kore.__path__, "kore.")
        if not found.name.startswith(optional) and found.name != "kore.__main__"
    ]
    assert len(names) > 100
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)\nprint('all')"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | OPENBSD, cwd=tmp_path, capture_output=True, text=True,
        check=False)
    assert result.stdout == "all\n", result.stderr


def test_workers_are_replaced_and_stopped(tmp_path) -> None:
    """The parent's selector is a kqueue as well: it hears of a death, starts another, and stops all."""
    with starter(tmp_path) as programs:
        program = programs.app(APP.format(port=free_port(), path=tmp_path / "socket"), environment=OPENBSD)
        pid = int(program.wait_for(r"ready: .* pid (\d+) \d+\]")[1])
        os.kill(pid, 9)
        program.wait_for(r"serves again")
        program.signal(15)
        assert program.wait() == 0


# --- answers that this system does not give ------------------------------------------------------------------------


class Refusing:
    """A socket of a system that refuses some options."""

    def __init__(self, refused: int, bytes_max: int = 0) -> None:
        self.refused = refused
        self.bytes_max = bytes_max
        self.size = 8192

    def getsockopt(self, level: int, option: int) -> int:
        if not self.bytes_max:
            raise OSError(self.refused, os.strerror(self.refused))
        return self.size

    def setsockopt(self, level: int, option: int, size: int) -> None:
        if size > self.bytes_max:
            raise OSError(self.refused, os.strerror(self.refused))
        self.size = size


def test_the_largest_buffer_that_is_allowed() -> None:
    """ENOBUFS, which Linux never says, means less; never less than there is; another error is one."""
    for allowed, size in ((300_000, BUFFER_BYTES // 4), (BUFFER_BYTES, BUFFER_BYTES), (10_000, 8192)):
        sock = Refusing(errno.ENOBUFS, allowed)
        enlarge(sock, socket.SO_RCVBUF)
        assert sock.size == size
    with pytest.raises(OSError, match="Invalid"):
        enlarge(Refusing(errno.EINVAL, 10), socket.SO_RCVBUF)


def test_a_system_that_does_not_say_what_listens() -> None:
    """It is taken to listen: accept(2) will tell."""
    assert listens(Refusing(errno.ENOPROTOOPT))
    with pytest.raises(OSError, match="Bad file"):
        listens(Refusing(errno.EBADF))


def test_a_system_that_does_not_list_fds(monkeypatch) -> None:
    """All that there may be are tried; those that are open are the same."""
    counted = open_descriptors()
    before = fds()

    def refuse(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        tried, again = set(possible_fds()), open_descriptors()
    assert before <= tried
    assert again == counted
