"""Domains of TLS servers as an application declares them, on the whole server: certificates, clients, users, roots."""

from __future__ import annotations

import os
import pwd
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import ENGINES
from tests.http_server_harness import request
from tests.privileges_harness import a_user, needs_root, status
from tests.support import READY, children, free_port, skip_unless, starter
from tests.tls_harness import Pair, TlsClient, authority, client_context, issue, server_pair

pytestmark = pytest.mark.parametrize("engine", ENGINES)

APP = """
import os
import kore

class App:
    def configure(self, args):
        kore.config.workers = 2
{options}
        kore.server("server", ip="127.0.0.1", port="{port}", tls=True)
{domains}

    def index(self, req):
        client = req.connection.x509dict
        name = client["subject"]["CN"] if client else "anybody"
        req.response(200, f"{{req.host}} {{req.protocol}} {{name}}".encode())

koreapp = App()
"""

# The reference's synopsis and example of kore.domain, with files that are there.
REFERENCE = """
        dom = kore.domain("kore.io", attach="server", cert="cert.pem", key="key.pem", acme=False,
            client_verify="ca.pem", verify_depth=1)
        dom.route("/", self.index, methods=["get"])
"""


@pytest.fixture
def start(tmp_path, engine):
    skip_unless(engine)
    with starter(tmp_path) as programs:
        yield programs


def serve(start, engine: str, domains: str, options: str = "kore.config.deployment = 'dev'", arguments=()):
    """A server with these domains: the program and its port."""
    port = free_port()
    shown = "\n".join(f"        {line}" for line in options.splitlines())
    (start.directory / "app.py").write_text(APP.format(port=port, domains=domains, options=shown))
    program = start.kore(*arguments, "app.py", environment={"KORE_IO": engine})
    program.wait_for(READY)
    return program, port


def write(pair: Pair, folder: Path, cert: str = "cert.pem", key: str = "key.pem", owner: int | None = None) -> None:
    (folder / cert).write_text("".join(map(ssl.DER_cert_to_PEM_cert, pair.chain)))
    (folder / key).write_bytes(pair.key_pem)
    (folder / key).chmod(0o600)
    if owner is not None:
        os.chown(folder / key, owner, owner)


def ask(port: int, name: str | None, context: ssl.SSLContext | None = None, host: str | None = None) -> str:
    """What is answered to a client that asks for `name`, by TLS, and `host`: status and body."""
    with TlsClient(port, name, context or client_context(), None) as client:
        answer = client.ask(request().replace(b"Host: x", b"Host: " + (host or name or "x").encode()))
        return f"{answer.status} {answer.body.decode()}"


def test_the_domain_of_the_reference(start, engine):
    """Its own certificate, and clients that have one of its authority; no others."""
    write(server_pair("kore.io", "rsa2048"), start.directory)
    clients = issue("clients", authority=True)
    (start.directory / "ca.pem").write_bytes(clients.pem)
    _, port = serve(start, engine, REFERENCE)
    client = client_context(None, issue("a new user", issuer=clients, client=True), start.directory)
    assert ask(port, "kore.io", client) == "200 kore.io https a new user"
    stranger = client_context(None, issue("a stranger", issuer=authority(), client=True), start.directory)
    for other in (client_context(), stranger):
        with pytest.raises((ssl.SSLError, OSError, AssertionError)):
            ask(port, "kore.io", other)
    assert ask(port, "kore.io", client) == "200 kore.io https a new user"


def test_each_domain_shows_its_own_certificate_and_each_client_the_kind_it_can_check(start, engine):
    for kind in ("rsa2048", "p384"):
        write(server_pair("both.example", kind), start.directory, f"{kind}.pem", f"{kind}.key")
    write(server_pair("*.pattern.example", "p256"), start.directory)
    _, port = serve(start, engine, """
        kore.domain("both.example", attach="server", cert=("rsa2048.pem", "p384.pem"),
                    key=("rsa2048.key", "p384.key")).route("/", self.index)
        kore.domain("*.pattern.example", attach="server", cert="cert.pem", key="key.pem").route("/", self.index)
    """)
    strict = client_context()
    strict.check_hostname = True
    assert ask(port, "both.example", strict) == "200 both.example https anybody"
    assert ask(port, "a.pattern.example", strict) == "200 a.pattern.example https anybody"
    assert ask(port, None, host="both.example") == "200 both.example https anybody", "the first is for who names none"
    assert ask(port, "both.example", host="a.pattern.example").startswith("421 ")
    for algorithm, kind in (("RSA-PSS+SHA256", "rsaEncryption"), ("ECDSA+SHA384", "id-ecPublicKey")):
        for version in ("-tls1_2", "-tls1_3"):
            # In TLS 1.2 with a cipher for each, as an old client has it.
            shown = subprocess.run(
                ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "both.example", version,
                 "-sigalgs", f"{algorithm}:RSA-PSS+SHA384" if "RSA" in algorithm else algorithm],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=30).stdout
            text = subprocess.run(
                ["openssl", "x509", "-noout", "-text"], input=shown, capture_output=True, timeout=30, check=True).stdout
            assert f"Public Key Algorithm: {kind}".encode() in text, (algorithm, version)


@pytest.fixture
def roots(tmp_path) -> Iterator[tuple[Path, Path]]:
    """A root for workers, and one for the key manager with a key that only it may read."""
    workers, keys = tmp_path / "workers", tmp_path / "keys"
    for folder in (workers, keys):
        folder.mkdir()
        folder.chmod(0o755)
    yield workers, keys
    shutil.rmtree(keys)


@needs_root
def test_keys_of_another_user_in_another_root(start, engine, roots):
    """As in production: two users, two roots, the whole sandbox; workers may not even enter where the keys are."""
    pytest.importorskip("pyseccomp")
    workers, keys = roots
    keeper = next(one for one in pwd.getpwall() if one.pw_uid not in (0, a_user().pw_uid))
    write(server_pair("kore.io", "p256"), keys, owner=keeper.pw_uid)
    write(server_pair("kore.io", "rsa2048"), keys, "rsa.pem", "rsa.key", owner=keeper.pw_uid)
    clients = issue("clients", authority=True)
    (workers / "ca.pem").write_bytes(clients.pem)
    words = ["openssl", "genpkey", "-genparam", "-algorithm", "DH", "-pkeyopt", "group:ffdhe2048"]
    (workers / "dh.pem").write_bytes(subprocess.run(words, capture_output=True, timeout=30, check=True).stdout)
    program, port = serve(start, engine, """
        kore.domain("kore.io", attach="server", cert=("cert.pem", "rsa.pem"), key=("key.pem", "rsa.key")).route(
            "/", self.index)
        kore.domain("admin.kore.io", attach="server", cert="cert.pem", key="key.pem", client_verify="ca.pem").route(
            "/", self.index)
    """, f"""kore.config.deployment = "docker"
kore.config.root = {str(workers)!r}
kore.config.runas = {a_user().pw_name!r}
kore.config.keymgr_root = {str(keys)!r}
kore.config.keymgr_runas = {keeper.pw_name!r}
kore.config.tls_dhparam = "dh.pem"
""")
    assert ask(port, "kore.io") == "200 kore.io https anybody"
    client = client_context(None, issue("a new user", issuer=clients, client=True), start.directory)
    assert ask(port, "admin.kore.io", client) == "200 admin.kore.io https a new user"
    old = client_context("1.2")
    old.set_ciphers("DHE-RSA-AES256-GCM-SHA384")
    assert ask(port, "kore.io", old) == "200 kore.io https anybody"
    users = {os.readlink(f"/proc/{pid}/root"): status(pid)["Uid"].split()[1] for pid in children(program.pid)}
    assert users == {str(workers): str(a_user().pw_uid), str(keys): str(keeper.pw_uid)}
    assert "may read this key" not in program.out
