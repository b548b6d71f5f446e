"""A whole application over TLS, its workers in the sandbox and not: files, ASGI, WebSockets, logs, plain beside it."""

from __future__ import annotations

import hashlib
import os
import ssl
import subprocess

import pytest

from tests.engines import ENGINES
from tests.support import Program, free_port, skip_unless, starter
from tests.test_tls_clients import SUBJECT
from tests.tls_harness import TlsClient, authority, client_context, get, issue, server_pair

SIZES = [0, 1, 1024, 16384, 40000, 65536, 100000, 1 << 20, (1 << 20) + 7]
GIBIBYTE = 1 << 30

APP = """
import kore

kore.config.deployment = "dev"
kore.config.workers = 1
kore.config.sandbox = {sandbox}
kore.config.sandbox_read = {directory!r}

kore.server("plain", ip="127.0.0.1", port="{plain}", tls=False)
kore.server("secure", ip="127.0.0.1", port="{port}")
plain = kore.domain("*", attach="plain")
secure = kore.domain("a.test", attach="secure", cert=("ec.pem", "rsa.pem"), key=("ec.key", "rsa.key"))
known = kore.domain("known.test", attach="secure", cert="known.pem", key="known.key", client_verify="authority.pem")
known.accesslog = "access.log"

def index(req):
    req.response(200, req.protocol.encode())

async def app(scope, receive, send):
    await send({{"type": "http.response.start", "status": 200, "headers": []}})
    await send({{"type": "http.response.body", "body": scope["scheme"].encode()}})

for domain in (plain, secure, known):
    domain.route("/", index, methods=["get"])
    domain.filemaps({{"/files/": "files"}})
kore.asgi(app, domain=secure, path="/asgi")
"""


class Running:
    """The program, and clients of it."""

    def __init__(self, program: Program, port: int, plain: int) -> None:
        self.program = program
        self.port = port
        self.plain = plain

    def connect(self, name: str = "a.test", context: ssl.SSLContext | None = None) -> TlsClient:
        return TlsClient(self.port, name, context or client_context(), None)


@pytest.fixture(params=[False, True], ids=["open", "sandbox"])
def running(request, tmp_path, engine):
    skip_unless(engine)
    for stem, pair in (
        ("ec", server_pair("a.test", "p256")), ("rsa", server_pair("a.test", "rsa2048")),
        ("known", server_pair("known.test", "p384")),
    ):
        pair.save(tmp_path / f"{stem}.pem")
    (tmp_path / "authority.pem").write_bytes(authority().pem)
    files = tmp_path / "files"
    files.mkdir()
    for size in SIZES:
        (files / str(size)).write_bytes(os.urandom(size))
    port, plain = free_port(), free_port()
    text = APP.format(sandbox=request.param, directory=str(files), port=port, plain=plain)
    with starter(tmp_path) as programs:
        program = programs.app(text, environment={"KORE_IO": engine})
        yield Running(program, port, plain)


@pytest.mark.parametrize("engine", ENGINES)
def test_files_of_every_size(running, tmp_path):
    files = tmp_path / "files"
    for version in ("1.2", "1.3"):
        with running.connect(context=client_context(version)) as client:
            for _ in range(3):
                for size in SIZES:
                    answer = client.ask(get(f"/files/{size}"))
                    assert answer.status == 200
                    assert answer.body == (files / str(size)).read_bytes()
                    assert "strict-transport-security" in answer.fields
            for size in SIZES:  # pipelined
                client.send(get(f"/files/{size}") + get(f"/files/{size}", "Range: bytes=1-10") + get())
            for size in SIZES:
                assert client.read().body == (files / str(size)).read_bytes()
                part = client.read()
                assert part.status == (206 if size > 1 else 416)
                assert client.read().body == b"https"
    done = subprocess.run(
        ["curl", "-sS", f"http://127.0.0.1:{running.plain}/files/65536", "-D", str(tmp_path / "head")],
        capture_output=True, timeout=20, check=False)
    assert done.stdout == (files / "65536").read_bytes()
    assert "strict-transport-security" not in (tmp_path / "head").read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_of_a_gibibyte(running, tmp_path):
    path = tmp_path / "files" / "large"
    with path.open("wb") as file:
        file.truncate(GIBIBYTE)
        file.seek(GIBIBYTE - 5)
        file.write(b"the e")
    with running.connect() as client:
        client.send(get("/files/large"))
        data = b""
        while b"\r\n\r\n" not in data:
            data += client.sock.recv(1024)
        left = GIBIBYTE - len(data.partition(b"\r\n\r\n")[2])
        found = hashlib.sha256()
        buffer = bytearray(1 << 20)
        while left:
            size = client.sock.recv_into(buffer)
            assert size, left
            found.update(memoryview(buffer)[:size])
            left -= size
        assert buffer[:size].endswith(b"the e")
        assert client.ask(get()).body == b"https"


@pytest.mark.parametrize("engine", ENGINES)
def test_mounted_applications_know_the_scheme(running):
    with running.connect() as client:
        assert client.ask(get("/asgi")).body == b"https"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_access_log_names_who_it_was(running, tmp_path):
    user = issue("user", issuer=authority(), client=True, subject=SUBJECT)
    with running.connect("known.test", client_context("1.3", user, tmp_path)) as client:
        assert client.ask(get(host="known.test")).body == b"https"
    running.program.signal(15)
    running.program.wait()
    assert '127.0.0.1 - a\\x20user [' in (tmp_path / "access.log").read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_both_kinds_of_keys(running):
    for algorithm, kind in (("ECDSA+SHA256", "p256"), ("RSA-PSS+SHA256", "rsa2048")):
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{running.port}", "-servername", "a.test", "-sigalgs",
             algorithm], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
        assert ssl.DER_cert_to_PEM_cert(server_pair("a.test", kind).chain[0]).encode()[:200] in done.stdout
