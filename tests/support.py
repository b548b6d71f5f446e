"""Helpers to start a real server (or any program), hear what it says, and stop it by its own pid whatever happens.

Nothing here sleeps to give something time: readers wait for a line, with a deadline that fails the test.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kore import reactor
from kore.errors import EngineError
from tests.engines import ENGINES

ROOT = Path(__file__).resolve().parent.parent
READY = r"log=\[ready: "
SERVER_APP = """
import os
import kore

kore.config.deployment = "{deployment}"
kore.config.workers = {workers}
{options}

kore.server("plain", ip="127.0.0.1", port="{port}", tls=False)
home = kore.domain("*", attach="plain")

@kore.route("/", domain=home, methods=["get"])
def index(req):
    req.response(200, b"hello")

@kore.route("/pid", domain=home, methods=["get"])
def pid(req):
    req.response(200, str(os.getpid()).encode())

@kore.route("/spin", domain=home, methods=["get"])
def spin(req):
    while True:
        pass

@kore.route("/slow", domain=home, methods=["get"])
async def slow(req):
    kore.log(kore.LOG_INFO, "slow begins")
    await kore.suspend(500)
    req.response(200, b"slow")

@kore.route("/never", domain=home, methods=["get"])
async def never(req):
    kore.log(kore.LOG_INFO, "never begins")
    try:
        await kore.suspend(3600000)
    finally:
        kore.log(kore.LOG_INFO, "never ends")

{text}
"""
"""An application with a fast, a slow, an endless and a spinning route; `text` may add to it."""

SANDBOXED = os.environ.get("KORE_SANDBOX") == "yes"
"""Whether this run of the tests has the workers of all servers confined (KORE_SANDBOX=yes, which is passed on)."""

SECONDS = 20.0
"""How long a test waits for what should take milliseconds, on a machine that is busy."""

ONLY_ONE_SECONDS = 600.0
"""How long a test waits for others to be done with what there is only one of: minutes of a busy machine."""


_reserved: collections.deque[socket.socket] = collections.deque()
PORTS_RESERVED_MAX = 16
"""More than any test asks for, and few enough to be no burden on descriptors."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, and that the kernel gives to nobody else who asks for any port.

    The groups of `make test` run side by side. A socket stays bound to the port, and does not listen: who binds to it
    by its number may, with SO_REUSEADDR as all servers have it (socket(7)), and who asks for port 0 gets another.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    _reserved.append(sock)
    if len(_reserved) > PORTS_RESERVED_MAX:
        _reserved.popleft().close()
    return int(sock.getsockname()[1])


@contextlib.contextmanager
def only_one(name: str) -> Iterator[None]:
    """Be alone on this machine, among all who ask for it by this `name`, with what there is but one of: a fixed port.

    A file in the system's temporary directory is locked, whoever made it; it stays there.
    """
    path = os.path.join(tempfile.gettempdir(), f"kore-tests-{name}.lock")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # with O_CREAT not if it is another user's: proc_sys_fs(5)
    except FileNotFoundError:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CREAT, 0o644)

    def locked() -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    try:
        wait_until(locked, f"{path} is ours", ONLY_ONE_SECONDS)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing it is not enough where a forked child has it too
        os.close(fd)


def wait_until(holds: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """Look again and again until `holds()` is true; fail, saying `what`, when it never is."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"never happened within {seconds} s: {what}")
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether process `pid` exists and is no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def open_files(pid: int) -> list[str]:
    """What the descriptors of a process lead to, but for those that it closes meanwhile."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def children(pid: int) -> list[int]:
    """The pids of the children of `pid` that are alive."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [child for child in map(int, text.split()) if alive(child)]


class Program:
    """A started program: its output, line by line, and its end."""

    def __init__(self, command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> None:
        env = {
            key: value for key, value in os.environ.items() if key == "KORE_SANDBOX" or not key.startswith("KORE_")
        }
        paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
        env |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | (environment or {})
        self.process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.pid = self.process.pid
        self.address = ("", 0)
        self.directory = cwd
        self._text = {"out": "", "err": ""}
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in (("out", self.process.stdout), ("err", self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name, stream) -> None:
        while piece := os.read(stream.fileno(), 65536):
            with self._changed:
                self._text[name] += piece.decode("utf-8", "replace")
                self._changed.notify_all()

    @property
    def out(self) -> str:
        return self._text["out"]

    @property
    def err(self) -> str:
        return self._text["err"]

    def wait_for(self, pattern: str, seconds: float = SECONDS, count: int = 1) -> re.Match[str]:
        """The `count`-th match of `pattern` in the standard output, once it is there."""
        deadline = time.monotonic() + seconds
        matches: list[re.Match[str]] = []
        begin = 0
        with self._changed:
            while True:
                # Whole lines are looked at once: a flood must not be searched again for each piece of it.
                whole = self.out.rfind("\n") + 1
                matches += re.compile(pattern).finditer(self.out, begin, whole)
                begin = whole
                if len(matches) >= count:
                    return matches[count - 1]
                left = deadline - time.monotonic()
                if left <= 0 or (self.process.poll() is not None and not any(r.is_alive() for r in self._readers)):
                    raise AssertionError(f"no {pattern!r} (x{count}) in:\n{self.out}\n--- stderr:\n{self.err}")
                self._changed.wait(min(left, 0.1))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit code, once the program has ended and its output has been read."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(seconds)
        return code

    def stop(self) -> None:
        """Stop the program and its children, by pid; called by the fixture, whatever the test did."""
        family = [self.pid, *children(self.pid)]
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        for pid in family:
            if alive(pid) and (pid == self.pid or Path(f"/proc/{pid}/cwd").exists()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(SECONDS)
        for reader in self._readers:
            reader.join(SECONDS)
        for stream in (self.process.stdout, self.process.stderr):
            stream.close()


class Starter:
    """Starts programs in one directory and stops them all at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.programs: list[Program] = []

    def python(self, script: str, environment: dict[str, str] | None = None) -> Program:
        """Run a Python script given as text."""
        return self._start([sys.executable, "-c", script], self.directory, environment)

    def kore(
        self, *arguments: str, cwd: Path | None = None, environment: dict[str, str] | None = None
    ) -> Program:
        """Run ``python -m kore`` with these arguments."""
        return self._start([sys.executable, "-m", "kore", *arguments], cwd or self.directory, environment)

    def app(self, text: str, *arguments: str, environment: dict[str, str] | None = None) -> Program:
        """Write `text` to app.py, start it, and wait until it serves."""
        (self.directory / "app.py").write_text(text)
        program = self.kore(*arguments, "app.py", environment=environment)
        program.wait_for(READY)
        return program

    def serve(
        self, text: str = "", *arguments: str, workers: int = 2, options: str = "", deployment: str = "dev",
        io: str | None = None, wait: bool = True, environment: dict[str, str] | None = None,
    ) -> Program:
        """Start SERVER_APP on a free port, which is in the program's `address`."""
        port = free_port()
        source = SERVER_APP.format(text=text, workers=workers, options=options, port=port, deployment=deployment)
        (self.directory / "app.py").write_text(source)
        given = (environment or {}) | ({} if io is None else {"KORE_IO": io})
        program = self.kore(*arguments, "app.py", environment=given)
        program.address = ("127.0.0.1", port)
        if wait:
            program.wait_for(READY)
        return program

    def command(self, *command: str, environment: dict[str, str] | None = None) -> Program:
        """Run any command."""
        return self._start(list(command), self.directory, environment)

    def _start(self, command: list[str], cwd: Path, environment: dict[str, str] | None) -> Program:
        # What is kept for the user is kept for the test, such as an authority for development.
        program = Program(command, cwd, {"XDG_DATA_HOME": str(self.directory / "data")} | (environment or {}))
        self.programs.append(program)
        return program


@contextlib.contextmanager
def starter(directory: Path) -> Iterator[Starter]:
    """A Starter whose programs are all gone afterwards."""
    start = Starter(directory)
    try:
        yield start
    finally:
        for program in reversed(start.programs):
            program.stop()


def pids_of(program: Program) -> list[int]:
    """The pids of the workers, in their order, once they are ready."""
    return [int(pid) for pid in program.wait_for(r"ready: .* pid ([\d ]+)\]")[1].split()]


def skip_unless(engine: str) -> None:
    """Skip the test, naming the call that fails, where `engine` cannot be had."""
    try:
        reactor.select_engine(engine)
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of each engine."""
    skip_unless(request.param)
    return request.param


def http_get(address: tuple[str, int] | str, path: str = "/", seconds: float = SECONDS) -> bytes:
    """The whole response to one GET on a connection of its own; `address` as for a TCP or a unix socket."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(seconds)
        sock.connect(address)
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
        return answer
