"""What the tests of the key manager share: a whole server with TLS whose keys another user has, and clients of it.

As root the workers and the key manager are two users in two roots, in the sandbox; else they are who we are. Code can
be run in a worker (POST /attack) and in the key manager: it reads the file "attack" beside its keys on SIGUSR1.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks_harness import AS_ROOT, KIT, Target
from tests.engines import skip_unconfined
from tests.http_server_harness import request
from tests.privileges_harness import a_user, root_directory
from tests.support import READY, Program, children, free_port, pids_of, skip_unless, starter, wait_until
from tests.tls_harness import Pair, client_context, server_pair

APP = KIT + """
import kore
from kore.process import keymgr

{early}

kore.config.deployment = "docker"
kore.config.workers = {workers}
{options}

kore.server("plain", ip="127.0.0.1", port="{port}", tls=False)
kore.server("secure", ip="127.0.0.1", port="{tls_port}")
home = kore.domain("*", attach="plain")
secure = [
{domains}
]

def index(req):
    req.response(200, b"hello")

def pid(req):
    req.response(200, str(os.getpid()).encode())

for domain in (home, *secure):
    domain.route("/", index, methods=["get"])
    domain.route("/pid", pid, methods=["get"])

@kore.route("/attack", domain=home, methods=["post"])
async def attacked(req):
    req.response(200, (await attack(bytes(req.body).decode())).encode())

noted, woken = keymgr.KeyManager._note_reload, keymgr.KeyManager._woken
asked = []

def note(manager, number, frame):
    asked.append(number)  # a flag of its own: what the key manager reads again may be asked for while this runs
    noted(manager, number, frame)

def within(manager):
    "On SIGUSR1 the key manager runs what stands beside its keys."
    while asked:
        asked.pop()
        if os.path.exists("attack"):
            found = attack(open("attack").read())
            try:
                found.send(None)
            except StopIteration as stop:
                role.role.log(6, f"attack: {stop.value}")
    woken(manager)

keymgr.KeyManager._note_reload = note
keymgr.KeyManager._woken = within
{text}
"""


def another_user() -> pwd.struct_passwd:
    """One that is neither root nor who the workers are."""
    return next(entry for entry in pwd.getpwall() if entry.pw_uid not in (0, a_user().pw_uid))


class KeyServer(Target):
    """A running server, its keys and its key manager."""

    def __init__(self, program: Program, port: int, tls_port: int, workers: int, keys: Path) -> None:
        super().__init__(program, port, workers)
        self.tls_port = tls_port
        self.keys = keys
        self.asked = 0
        self.killed = 0

    @property
    def workers_pids(self) -> list[int]:
        return pids_of(self.program)

    @property
    def manager(self) -> int:
        """The pid of the key manager that is there now."""
        found: list[int] = []

        def there() -> bool:
            found[:] = [pid for pid in children(self.program.pid) if b"[keymgr]" in cmdline(pid)]
            return len(found) == 1

        wait_until(there, "there is one key manager")
        return found[0]

    def put(self, stem: str, pair: Pair, *, part: str = "both") -> None:
        """Put a pair, or a half of it, in the place of another: whole files, by rename(2)."""
        for suffix, content in (("pem", pair.pem), ("key", pair.key_pem)):
            if part in ("both", suffix):
                self.write(f"{stem}.{suffix}", content)

    def write(self, name: str, content: bytes) -> None:
        fresh = self.keys / f"{name}.fresh"
        fresh.write_bytes(content)
        fresh.chmod(0o400)
        if AS_ROOT:
            os.chown(fresh, another_user().pw_uid, another_user().pw_gid)
        fresh.rename(self.keys / name)

    def connect(
        self, name: str = "a.test", *, version: str | None = None, kind: str | None = None, seconds: float = 20
    ) -> ssl.SSLSocket:
        """A connection that shook hands; with `kind` ("RSA", "ECDSA") by TLS 1.2 and that certificate."""
        context = client_context("1.2" if kind else version)
        if kind is not None:
            context.set_ciphers(f"ECDHE-{kind}-AES128-GCM-SHA256")
        sock = socket.create_connection(("127.0.0.1", self.tls_port), timeout=seconds)
        try:
            return context.wrap_socket(sock, server_hostname=name)
        except BaseException:
            sock.close()
            raise

    def shown(self, name: str = "a.test", kind: str | None = None) -> bytes:
        """The certificate of a domain, by a new handshake."""
        with self.connect(name, kind=kind) as client:
            return client.getpeercert(binary_form=True) or b""

    def within(self, code: str, **names: object) -> str:
        """Run `code` in the key manager; what became of it, or "killed: CALL"."""
        given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        self.write("attack", (given + code).encode())
        self.asked += 1
        os.kill(self.manager, signal.SIGUSR1)
        killed = r"the key manager \(pid \d+\) was killed for a system call its sandbox forbids, (\w+)"
        found = self.program.wait_for(rf"\[keymgr\] log=\[attack: (.*)\]|{killed}", count=self.asked)
        if found[1] is None:
            self.killed += 1
            self.program.wait_for("the key manager is there again", count=self.killed)
            (self.keys / "attack").unlink()
            return f"killed: {found[2]}"
        return found[1]


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def ask(client: ssl.SSLSocket, path: str = "/", host: str = "a.test") -> bytes:
    """The body of one answer on a connection that stays."""
    client.sendall(request(path).replace(b"Host: x", f"Host: {host}".encode()))
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = client.recv(65536)
        assert piece, answer
        answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += client.recv(65536)
    return body


class Load(threading.Thread):
    """Clients that shake hands, one after another, until they are stopped."""

    def __init__(self, server: KeyServer, **more: str) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.more = more
        self.done = 0
        self.failures: list[str] = []
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                with self.server.connect(**self.more) as client:
                    assert ask(client) == b"hello"
            except Exception as error:
                self.failures.append(repr(error))
            else:
                self.done += 1

    def more_done(self, count: int = 20) -> None:
        """Wait for that many more."""
        before = self.done
        wait_until(lambda: self.done >= before + count or self.failures, "handshakes go on")
        assert not self.failures, self.failures

    def end(self) -> None:
        self._stopped.set()
        self.join(20)


@contextlib.contextmanager
def load(server: KeyServer, threads: int = 2, **more: str) -> Iterator[list[Load]]:
    """Load that ends, of which no handshake may fail."""
    clients = [Load(server, **more) for _ in range(threads)]
    for client in clients:
        client.start()
    try:
        yield clients
    finally:
        for client in clients:
            client.end()
    for client in clients:
        assert not client.failures, client.failures
        assert client.done


@contextlib.contextmanager
def key_server(
    directory: Path, engine: str, *lines: str, workers: int = 2, text: str = "", early: str = "",
    kinds: tuple[str, ...] = ("rsa2048", "p256"), names: tuple[str, ...] = ("a.test",), sandbox: str = "yes",
    pairs: dict[str, Pair] | None = None, wait: str = READY,
) -> Iterator[KeyServer]:
    """A server with TLS domains `names`, each with pairs of the `kinds`, in files NAME-KIND.pem and NAME-KIND.key."""
    skip_unless(engine)
    if sandbox == "yes":
        skip_unconfined(engine)
        pytest.importorskip("pyseccomp")
    root, keys = root_directory(directory), directory / "keys"
    keys.mkdir()
    keys.chmod(0o755)
    port, tls_port = free_port(), free_port()
    while tls_port == port:
        tls_port = free_port()
    server = KeyServer(None, port, tls_port, workers, keys)  # type: ignore[arg-type] # it is about to be started
    domains = []
    for name in names:
        stems = [f"{name}-{kind}" for kind in kinds]
        for stem, kind in zip(stems, kinds, strict=True):
            server.put(stem, (pairs or {}).get(stem) or server_pair(name, kind))
        files = tuple(f"{stem}.pem" for stem in stems), tuple(f"{stem}.key" for stem in stems)
        domains.append(f"kore.domain({name!r}, attach='secure', cert={files[0]!r}, key={files[1]!r}),")
    options = [f"kore.config.root = {str(root)!r}", f"kore.config.keymgr_root = {str(keys)!r}"]
    arguments = []
    if AS_ROOT:
        options.append(f"kore.config.runas = {a_user().pw_name!r}")
        options.append(f"kore.config.keymgr_runas = {another_user().pw_name!r}")
    else:
        arguments = ["-n", "-r"]
    parts = {
        "workers": str(workers), "port": str(port), "tls_port": str(tls_port), "domains": "\n".join(domains),
        "options": "\n".join([*options, *lines]), "text": text, "early": early,
    }
    source = APP
    for key, value in parts.items():
        source = source.replace("{" + key + "}", value)
    (directory / "app.py").write_text(source)
    with starter(directory) as programs:
        server.program = programs.kore(*arguments, "app.py", environment={"KORE_SANDBOX": sandbox, "KORE_IO": engine})
        server.program.wait_for(wait)
        yield server
