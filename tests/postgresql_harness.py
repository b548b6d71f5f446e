"""What the tests of PostgreSQL share: a real server on loopback and in a socket directory, started once a session.

PostgreSQL refuses to run as root, so a test run by root gives it the user ``postgres``, else ``nobody``. initdb takes
two seconds; tests that restart or configure a server copy the directory that the first one made.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from reactor_harness import open_loop

from kore.clients.postgresql import queries
from tests.support import free_port, wait_until

USER = "kore"
DATABASE = "hello"

HBA = """
local all  all          trust
host  all  secret       127.0.0.1/32 scram-sha-256
host  all  secret_md5   127.0.0.1/32 md5
host  all  secret_clear 127.0.0.1/32 password
host  all  all          127.0.0.1/32 trust
"""

SETUP = (
    "CREATE DATABASE hello OWNER kore",
    "CREATE ROLE secret LOGIN PASSWORD 'pass word'; CREATE ROLE secret_clear LOGIN PASSWORD 'pass word'",
    "SET password_encryption = 'md5'; CREATE ROLE secret_md5 LOGIN PASSWORD 'pass word'",
)


def binaries() -> Path:
    """Where initdb and postgres are; a skip where there are none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    where = found[-1] if found else shutil.which("initdb")
    if where is None:
        pytest.skip("no PostgreSQL server: install postgresql")
    return Path(where).parent


def account() -> pwd.struct_passwd | None:
    """Who runs the server when we are root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    pytest.skip("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")


class PostgresServer:
    """One server: its directory, its port, its process."""

    def __init__(self, template: PostgresServer | None = None) -> None:
        self.bin = binaries()
        self.account = account()
        self.directory = Path(tempfile.mkdtemp(prefix="kore-postgresql-"))
        self.data = self.directory / "data"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        if self.account is not None:
            os.chown(self.directory, self.account.pw_uid, self.account.pw_gid)
        os.chmod(self.directory, 0o755)
        if template is None:
            self.run(str(self.bin / "initdb"), "-D", str(self.data), "-U", USER, "-N", "-E", "UTF8", "--locale=C.UTF-8")
            (self.data / "pg_hba.conf").write_text(HBA)
        else:
            self.run("cp", "-a", str(template.data), str(self.data))
            (self.data / "postmaster.pid").unlink(missing_ok=True)

    def as_account(self, *command: str) -> list[str]:
        """The command, run as the server's user, and ended with us if we die."""
        if self.account is None:
            return list(command)
        ids = [f"--reuid={self.account.pw_uid}", f"--regid={self.account.pw_gid}", "--clear-groups"]
        return ["setpriv", *ids, "--pdeathsig=INT", *command]

    def run(self, *command: str) -> None:
        done = subprocess.run(self.as_account(*command), capture_output=True, text=True, timeout=120, cwd="/")
        assert done.returncode == 0, done.stderr

    def start(self, *options: str) -> PostgresServer:
        """Start, and wait until it takes connections. `options`: ``name=value`` settings."""
        settings = [
            "fsync=off", "autovacuum=off", "max_connections=50", "listen_addresses=127.0.0.1", f"port={self.port}",
            f"unix_socket_directories={self.directory}", "logging_collector=off", "log_min_messages=fatal", *options,
        ]  # fmt: skip
        arguments = [word for setting in settings for word in ("-c", setting)]
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                self.as_account(str(self.bin / "postgres"), "-D", str(self.data), *arguments),
                cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(self.ready, f"PostgreSQL takes connections; see {self.directory}/log")
        return self

    def ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "log").read_text()
        command = [str(self.bin / "pg_isready"), "-q", "-h", str(self.directory), "-p", str(self.port)]
        return subprocess.run(command, timeout=60).returncode == 0

    def stop(self, how: int = signal.SIGINT) -> None:
        """SIGINT: end all sessions and stop; SIGQUIT: at once, as after a crash."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)

    def psql(self, sql: str, database: str = DATABASE) -> str:
        """What psql prints for `sql`, unaligned and without heads; asked in the socket directory."""
        command = [
            str(self.bin / "psql"), "-h", str(self.directory), "-p", str(self.port), "-U", USER, "-d", database,
            "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix("\n")

    @property
    def local(self) -> str:
        """A connection string through the socket directory."""
        return f"host={self.directory} port={self.port} user={USER} dbname={DATABASE}"

    @property
    def tcp(self) -> str:
        """A connection string over TCP."""
        return f"host=127.0.0.1 port={self.port} user={USER} dbname={DATABASE} sslmode=disable"

    def active(self) -> list[str]:
        """The queries that run now on connections of kore's, and the transactions that are open."""
        return self.psql(
            "SELECT pid, state, query FROM pg_stat_activity WHERE application_name = 'kore' AND state <> 'idle'"
        ).splitlines()

    def connections(self) -> int:
        """How many connections of kore's there are."""
        return int(self.psql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'kore'"))

    def wait_connections(self, count: int) -> None:
        """Until there are so many connections of kore's."""
        wait_until(lambda: self.connections() == count, f"there are {count} connections")

    def wait_active(self, count: int) -> None:
        """Until so many queries of kore's run."""
        wait_until(lambda: len(self.active()) == count, f"{count} queries run")

    def wait_quiet(self) -> None:
        """Until no query of kore's runs and no transaction is open."""
        wait_until(lambda: not self.active(), "no query is left running")


class Relay:
    """A listener that passes all on to a server, in small pieces if told so, until it `stalls`."""

    def __init__(self, port: int, *, piece: int = 65536) -> None:
        self._target = port
        self._piece = piece
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.stalls = threading.Event()
        """Once set nothing is passed on any more, in either direction, and nobody is told."""
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            server = socket.create_connection(("127.0.0.1", self._target))
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            for source, sink, piece in ((client, server, 65536), (server, client, self._piece)):
                thread = threading.Thread(target=self._pass, args=(source, sink, piece), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pass(self, source: socket.socket, sink: socket.socket, piece: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(piece):
                if not self.stalls.is_set():
                    sink.sendall(data)
            if not self.stalls.is_set():
                sink.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
        for sock in self._sockets:
            sock.close()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """The server that most tests share; they leave it as they found it."""
    server = PostgresServer()
    try:
        server.start()
        for statements in SETUP:
            server.psql(statements, "postgres")
        yield server
    finally:
        server.remove()


@pytest.fixture
def own_postgresql(postgresql: PostgresServer) -> Iterator[PostgresServer]:
    """A server for one test alone, which may restart it; not started. Made of a copy."""
    postgresql.psql("CHECKPOINT")
    server = PostgresServer(postgresql)
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture(params=["uring", "epoll"])
def loop(request) -> Iterator:
    """A loop on each engine; afterwards its pools are closed, and no database is declared any more."""
    opened = open_loop(request.param)
    made, log = next(opened)
    made.log_lines = log
    try:
        yield made
    finally:
        if not made.is_closed():
            made.run_until_complete(made.shutdown_asyncgens())
        queries.databases.clear()
        for _ in opened:
            pass


def declare(conninfo: str, *, name: str = "db", conn_max: int = 2, queue_max: int = 1000) -> None:
    """``dbsetup`` with limits of the test's own."""
    queries.declare(name, conninfo, conn_max, lambda: queue_max)
