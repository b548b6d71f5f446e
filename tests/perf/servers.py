"""Servers under measurement: how each is started and stopped, and what the kernel knows of its processes.

Every server gets one worker on one core, as many connections as any case opens, and no access log. All its processes
are on that core and counted, so kore's key manager too. Of kore only those that say so have the sandbox on: it is
compared with itself, and the peers have none. A server that can't be started is reported with the reason; nothing is
left out in silence.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
APPS = Path(__file__).resolve().parent / "apps"

START_SECONDS_MAX = 15.0
STOP_SECONDS_MAX = 5.0
FILES_MAX = 20_000  # 10,000 idle connections, 1024 busy ones, and room
TICK = 1 / os.sysconf("SC_CLK_TCK")
PR_SET_PDEATHSIG = 1

NGINX = """
worker_processes 1;
worker_rlimit_nofile 20000;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log crit;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 600s;
    sendfile on;
    tcp_nopush on;
    open_file_cache max=16;
    default_type text/plain;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} {ssl} backlog=4096;
        {certificate}
        location = / {{ return 200 "hello world"; }}
        location = /async {{ return 200 "hello world"; }}
        location = /1k {{ return 200 "{small}"; }}
        location / {{ root {folder}/www; }}
    }}
}}
"""


NGINX_CERTIFICATE = """
        ssl_certificate {folder}/cert.pem;
        ssl_certificate_key {folder}/key.pem;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384;
        ssl_prefer_server_ciphers on;
"""
"""Suites in the order that kore has them, so that both do the same work."""


class StartFailure(Exception):
    """A server did not come up; the text says why."""


@dataclass(frozen=True)
class Kind:
    """A server that can be run: `command(python, port, folder)` gives what to execute.

    With TLS `key` is what openssl(1) makes its key from; certificate and key are in the folder then, as cert.pem and
    key.pem.
    """

    name: str
    title: str
    command: Callable[[str, int, Path], list[str]]
    env: dict[str, str] = field(default_factory=dict)
    key: tuple[str, ...] = ()


EC_KEY = ("ec", "-pkeyopt", "ec_paramgen_curve:P-256")
RSA_KEY = ("rsa:2048",)


def certificate(folder: Path, key: tuple[str, ...]) -> None:
    """A self-signed certificate for the loopback address and for localhost."""
    done = subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-newkey", *key, "-keyout", str(folder / "key.pem"),
         "-out", str(folder / "cert.pem"), "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise StartFailure(f"openssl makes no certificate: {done.stderr.strip()[-200:]}")


def nginx(_python: str, port: int, folder: Path) -> list[str]:
    """An nginx of its own, all its files in `folder`; larger bodies come from files, a configuration can't hold them.

    Where there is a certificate in the folder it speaks TLS.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise StartFailure("nginx is not installed")
    files(folder / "www" / "files")
    (folder / "www" / "64k").write_bytes(b"k" * 65536)
    (folder / "www" / "1m").write_bytes(b"k" * (1 << 20))
    for path in (folder, folder / "www", folder / "www" / "files"):
        path.chmod(0o755)  # as root its worker is another user
    config = folder / "nginx.conf"
    tls = (folder / "cert.pem").exists()
    config.write_text(NGINX.format(
        folder=folder, port=port, small="k" * 1024, ssl="ssl" if tls else "",
        certificate=NGINX_CERTIFICATE.format(folder=folder) if tls else ""))
    return [program, "-e", f"{folder}/error.log", "-p", str(folder), "-c", str(config)]


def echo(loop: str, kind: str) -> Callable[[str, int, Path], list[str]]:
    """The asyncio server of apps/echo_app.py on one loop."""
    return lambda python, port, folder: [python, str(APPS / "echo_app.py"), loop, kind, str(port)]


def files(folder: Path) -> None:
    """What servers that serve files by themselves have in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "1k").write_bytes(b"k" * 1024)
    (folder / "64k").write_bytes(b"k" * 65536)
    (folder / "1m").write_bytes(b"k" * (1 << 20))


def kore(python: str, port: int, folder: Path) -> list[str]:
    """The server of this repository; with TLS where there is a certificate in the folder."""
    files(folder / "files")
    folder.chmod(0o755)  # in the sandbox, as root, its worker is another user
    pair = [str(folder / name) for name in ("cert.pem", "key.pem") if (folder / name).exists()]
    return [python, "-m", "kore", str(APPS / "kore_app.py"), str(port), *pair]


def own_app(name: str) -> Callable[[str, int, Path], list[str]]:
    """The server of this repository with another application."""
    return lambda python, port, folder: [python, "-m", "kore", str(APPS / name), str(port)]


def uvicorn(app: str) -> Callable[[str, int, Path], list[str]]:
    """An ASGI application on uvicorn."""
    return lambda python, port, folder: [
        python, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(port), "--loop", "uvloop", "--http", "httptools",
        "--ws", "none", "--lifespan", "off", "--no-access-log", "--log-level", "warning", "--backlog", "4096",
        "--timeout-keep-alive", "600",
        *(["--ssl-certfile", "cert.pem", "--ssl-keyfile", "key.pem"] if (folder / "cert.pem").exists() else []), app]


KINDS = {kind.name: kind for kind in (
    Kind("kore-uring", "kore on io_uring", kore, {"KORE_IO": "uring"}),
    Kind("kore-epoll", "kore on epoll", kore, {"KORE_IO": "epoll"}),
    *(Kind(f"kore-sandbox-{engine}", f"kore on {engine} in its sandbox", kore,
           {"KORE_IO": engine, "KORE_SANDBOX": "yes"}) for engine in ("uring", "epoll")),
    Kind("nginx", "nginx, return 200", nginx),
    Kind("fastwsgi", "fastwsgi (WSGI)", lambda python, port, folder: [python, str(APPS / "wsgi_app.py"), str(port)]),
    Kind("socketify", "socketify", lambda python, port, folder: [python, str(APPS / "socketify_app.py"), str(port)]),
    Kind("websockets", "websockets", lambda python, port, folder: [
        python, str(APPS / "websockets_app.py"), str(port)]),
    Kind("websockets-uvloop", "websockets on uvloop", lambda python, port, folder: [
        python, str(APPS / "websockets_app.py"), str(port), "uvloop"]),
    Kind("granian", "granian (RSGI)", lambda python, port, folder: [
        python, "-m", "granian", "--interface", "rsgi", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--runtime-threads", "1", "--runtime-mode", "st", "--loop", "uvloop", "--http", "1", "--no-ws",
        "--backlog", "4096", "--backpressure", "16384", "--log-level", "warning", "rsgi_app:app"]),
    Kind("uvicorn", "uvicorn (uvloop, httptools)", uvicorn("asgi_app:app")),
    *(Kind(f"kore-{kind}-{engine}", f"kore on {engine}, TLS, {kind.upper()} key", kore, {"KORE_IO": engine}, key)
      for kind, key in (("ec", EC_KEY), ("rsa", RSA_KEY)) for engine in ("uring", "epoll")),
    Kind("nginx-ec", "nginx, TLS, EC key", nginx, key=EC_KEY),
    Kind("nginx-rsa", "nginx, TLS, RSA key", nginx, key=RSA_KEY),
    Kind("uvicorn-ec", "uvicorn (uvloop, httptools), TLS, EC key", uvicorn("asgi_app:app"), key=EC_KEY),
    *(Kind(f"kore-{app}-{engine}", f"kore on {engine}, {app}_app.py", own_app(f"{app}_app.py"), {"KORE_IO": engine})
      for app in ("clients", "fastapi") for engine in ("uring", "epoll")),
    Kind("uvicorn-fastapi", "uvicorn (uvloop, httptools), FastAPI", uvicorn("fastapi_app:app")),
    *(Kind(f"uvloop-{kind}", f"asyncio on uvloop, {kind}", echo("uvloop", kind)) for kind in ("query", "proc")),
    *(Kind(f"{loop}-{kind}" + (f"-{engine}" if engine else ""), f"asyncio {kind} on {loop} {engine}".strip(),
           echo(loop, kind), {"KORE_IO": engine} if engine else {})
      for kind in ("protocol", "streams")
      for loop, engine in (("kore", "uring"), ("kore", "epoll"), ("uvloop", ""), ("selector", ""))),
)}


def free_port() -> int:
    """A port nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def pinned(core: int) -> Callable[[], None]:
    """For the child, before exec: one core, enough files, and an end when the rig itself is killed."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        os.sched_setaffinity(0, {core})
        raise_files_limit()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return prepare


def raise_files_limit() -> int:
    """Raise RLIMIT_NOFILE as far as needed and allowed; what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = FILES_MAX if hard == resource.RLIM_INFINITY else min(FILES_MAX, hard)
    if soft == resource.RLIM_INFINITY or soft >= allowed:
        return FILES_MAX
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


def tree(pid: int) -> list[int]:
    """The process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue  # ended meanwhile
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


@dataclass(frozen=True)
class Cpu:
    """CPU time of a server's processes so far, in seconds."""

    user: float
    system: float


class Server:
    """One server that runs: made by start(), ended by close(), which the rig calls on every way out."""

    def __init__(self, kind: Kind, python: str, core: int) -> None:
        self.kind = kind
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="kore-rig-"))
        self.output = self.folder / "output"
        self.process: subprocess.Popen[bytes] | None = None
        self.start_seconds = 0.0
        self.engine = ""
        self.tls: ssl.SSLContext | None = None
        try:
            self._start(python, core)
        except BaseException:
            self.close()
            raise

    def _start(self, python: str, core: int) -> None:
        if self.kind.key:
            certificate(self.folder, self.kind.key)
            self.tls = ssl.create_default_context(cafile=str(self.folder / "cert.pem"))
        command = self.kind.command(python, self.port, self.folder)
        paths = [str(ROOT), str(APPS)]
        env = {name: value for name, value in os.environ.items() if name not in ("KORE_IO", "PYTHONPATH")}
        env["KORE_SANDBOX"] = "no"
        env |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **self.kind.env}
        began = time.perf_counter()
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                preexec_fn=pinned(core), start_new_session=True,
            )
        while not self.answers("/"):
            # There is nothing to wait on but the answer itself: a listening socket is not yet a server.
            if self.process.poll() is not None:
                raise StartFailure(f"exit status {self.process.returncode}: {self.last_words()}")
            if time.perf_counter() - began > START_SECONDS_MAX:
                raise StartFailure(f"no answer within {START_SECONDS_MAX:.0f} s: {self.last_words()}")
            time.sleep(0.001)
        self.start_seconds = time.perf_counter() - began

    def last_words(self) -> str:
        """The last line of output, which usually is the reason."""
        lines = self.output.read_text(errors="replace").strip().splitlines() if self.output.exists() else []
        return lines[-1][-200:] if lines else "it said nothing"

    def answers(self, path: str) -> bytes | None:
        """The body of one GET, None when there is no good answer."""
        try:
            with self.connect() as sock:
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
                data = b""
                while b"\r\n\r\n" not in data:
                    piece = sock.recv(65536)
                    if not piece:
                        return None
                    data += piece
                head, _, body = data.partition(b"\r\n\r\n")
                fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
                length = int(fields.get(b"content-length", b"0"))
                while len(body) < length:
                    piece = sock.recv(65536)
                    if not piece:
                        return None
                    body += piece
                return body if head.startswith(b"HTTP/1.1 200") else None
        except (OSError, ValueError):
            return None

    def connect(self) -> socket.socket:
        """A connection as any client makes it: with TLS it trusts the server's certificate and no other."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=2)
        if self.tls is None:
            return sock
        try:
            return self.tls.wrap_socket(sock, server_hostname="127.0.0.1")  # no name is sent, as for the Host below
        except BaseException:
            sock.close()
            raise

    def negotiated(self) -> str:
        """What openssl(1) negotiates, asking for the best: version, cipher suite, signature, group; "" without TLS."""
        if self.tls is None:
            return ""
        command = ["openssl", "s_client", "-brief", "-servername", "localhost", "-connect", f"127.0.0.1:{self.port}"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=10)
        told = dict(line.split(": ", 1) for line in (done.stdout + done.stderr).splitlines() if ": " in line)
        # What it calls the key of the exchange changed its name with OpenSSL 3.5.
        group = told.get("Server Temp Key") or told.get("Peer Temp Key") or told.get("Negotiated TLS1.3 group", "?")
        return ", ".join([*(told.get(name, "?") for name in ("Protocol version", "Ciphersuite", "Signature type",
                                                            "Peer signature type") if name in told), group])

    @property
    def pids(self) -> list[int]:
        """All processes of the server."""
        return tree(self.process.pid) if self.process else []

    def cpu(self) -> Cpu:
        """CPU time of all its processes, those that ended under one of them included."""
        user = system = 0
        for pid in self.pids:
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            user += int(fields[11]) + int(fields[13])
            system += int(fields[12]) + int(fields[14])
        return Cpu(user * TICK, system * TICK)

    def memory(self) -> int:
        """Bytes of memory that its processes hold: their proportional shares, summed."""
        total = 0
        for pid in self.pids:
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
        return total * 1024

    def close(self) -> None:
        """Stop it: politely, then not; by the pids it has, and wait until they are gone."""
        process = self.process
        if process is not None:
            pids = self.pids
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS_MAX if process.poll() is None else 0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pid in pids[1:]:
                _kill_left(pid, str(self.folder), process.pid)
            self.process = None
        shutil.rmtree(self.folder, ignore_errors=True)


def _kill_left(pid: int, folder: str, session: int) -> None:
    """Kill a child that outlived its parent, if the number still is that child: same session, same directory."""
    try:
        if os.getsid(pid) == session or os.readlink(f"/proc/{pid}/cwd") == folder:
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass


def versions(python: str) -> dict[str, str]:
    """The versions of everything that takes part."""
    code = (
        "import sys, importlib.metadata as m\n"
        "print('python', sys.version.split()[0])\n"
        "for name in 'uvloop httptools uvicorn granian fastwsgi socketify websockets asyncpg fastapi'.split():\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: print(name, 'missing')\n"
    )
    found = dict(line.split() for line in subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines())
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program:
        found["nginx"] = subprocess.run([program, "-v"], capture_output=True, text=True).stderr.strip().split("/")[-1]
    else:
        found["nginx"] = "missing"
    wrk = shutil.which("wrk")
    if wrk:
        found["wrk"] = subprocess.run([wrk, "-v"], capture_output=True, text=True).stdout.split()[1]
    source = (ROOT / "kore" / "version.py").read_text()
    found["kore"] = source.split('"')[-2]
    return found


def default_python() -> str:
    """The interpreter of the rig's own environment, or the one that runs this."""
    own = ROOT / ".venv" / "rig" / "bin" / "python"
    return str(own) if own.exists() else sys.executable
