"""A real PostgreSQL on loopback and in a socket directory, as tests, proofs and the rig start it.

PostgreSQL refuses to run as root, so one that root starts belongs to the user ``postgres``, else ``nobody``. initdb
takes two seconds; tests that restart or configure a server copy the directory that another one made.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

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


class Unavailable(Exception):
    """No server can be started here; the text says why."""


def binaries() -> Path:
    """Where initdb and postgres are. Raises Unavailable."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    where = found[-1] if found else shutil.which("initdb")
    if where is None:
        raise Unavailable("no PostgreSQL server: install postgresql")
    return Path(where).parent


def account() -> pwd.struct_passwd | None:
    """Who runs the server when we are root. Raises Unavailable."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise Unavailable("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")


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

    def set_up(self) -> PostgresServer:
        """Make the roles and the database; once for a directory, after the first start."""
        for statements in SETUP:
            self.psql(statements, "postgres")
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

    @property
    def uri(self) -> str:
        """The same as a URI."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{DATABASE}?sslmode=disable"

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
