"""``kore acme status`` and ``test``: what they say is so, they run beside the server, and change nothing."""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import ssl
import threading
from pathlib import Path

import pytest

from kore.process import acme_report
from kore.tls import acme_files, certificates
from tests.acme_harness import pebble
from tests.support import free_port, starter, wait_until
from tests.test_process_acme import NAMES, Server, has_certificate, served

NAME = NAMES[0]
DAY = datetime.timedelta(days=1)


@pytest.fixture
def start(tmp_path):
    with starter(tmp_path) as programs:
        yield programs


def said(server: Server, command: str) -> tuple[int, str]:
    """Exit code and standard output of a command, where the server lives."""
    program = server.start.kore("acme", command, "app.py", cwd=server.directory)
    code = program.wait()
    assert program.err == ""
    return code, program.out


def seen(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """All files below a directory, with what they are."""
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


def test_status_beside_a_server_that_has_its_certificate(tmp_path, start):
    with served(tmp_path, start) as server:
        program = server.run()
        has_certificate(program)
        standing = server.directory / acme_files.folder(NAME) / acme_files.STANDING
        wait_until(lambda: json.loads(standing.read_bytes())["ask_at"], "all of it is noted")
        shown = server.certificate(NAME)
        before = seen(server.directory)
        code, out = said(server, "status")
        assert code == 0, out
        assert seen(server.directory) == before
        assert re.search(rf"^account: https://127\.0\.0\.1:{server.authority.port}/my-account/", out, re.MULTILINE)
        until = f"{shown.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        assert re.search(rf"^{NAME}:\n  certificate: by Pebble .*, until {until} \(\d+ days left\)$", out, re.MULTILINE)
        assert re.search(r"^  renewal: 20\d\d-\d\d-\d\d \d\d:\d\d UTC, (as the provider wishes|by its age)$", out,
                         re.MULTILINE)
        assert "failed" not in out


def test_status_while_the_provider_is_away(tmp_path, start):
    with served(tmp_path, start) as server:
        server.authority.stop()
        program = server.run()
        program.wait_for(f"no certificate for {NAME}")
        code, out = said(server, "status")
        assert code == 1
        assert "account: none yet; it is made with the first order\n" in out
        assert "  certificate: none yet; a self-signed one is served\n" in out
        assert re.search(r"^  failed: 1 in a row, last at .* UTC: .*Connection refused", out, re.MULTILINE)
        assert re.search(r"^  tried again: .* UTC, or on SIGUSR1$", out, re.MULTILINE)


def test_status_of_a_certificate_that_expired(tmp_path, start):
    with served(tmp_path, start) as server:
        server.authority.stop()
        program = server.run()
        program.wait_for(f"no certificate for {NAME}")
        key = certificates.new_key()
        old = certificates.self_signed([NAME], key, lifetime=-datetime.timedelta(minutes=1))
        folder = server.directory / acme_files.folder(NAME)
        (folder / acme_files.CHAIN).write_bytes(certificates.chain_pem(old.chain))
        code, out = said(server, "status")
        assert code == 1
        assert re.search(rf"^  certificate: by {NAME}, until .* UTC \(expired\)$", out, re.MULTILINE)
        (folder / acme_files.CHAIN).write_bytes(b"garbage")
        code, out = said(server, "status")
        assert code == 1
        assert "  fullchain.pem: holds no certificate in PEM\n" in out


@pytest.mark.parametrize("bound", [False, True], ids=["open", "bound"])
def test_the_provider_is_asked_for_its_directory_alone(tmp_path, start, bound):
    with pebble(tmp_path, free_port(), eab=bound) as authority:
        home = tmp_path / "home"
        home.mkdir()
        server = Server(start, home, authority, free_port())
        server.run(wait=False).stop()
        before = seen(home)
        code, out = said(server, "test")
        assert code == 1, "the name leads nowhere"
        assert seen(home) == before
        assert f"provider: {authority.address}: answers\n" in out
        assert "terms, which using it agrees to: 'data:text/plain,Do%20what%20thou%20wilt'\n" in out
        assert f"{NAME}: leads nowhere: " in out
        assert ("set acme_eab_kid and acme_eab_key" in out) is bound
        assert "new-acct" not in authority.log
        authority.stop()
        code, out = said(server, "test")
        assert code == 1
        assert f"provider: {authority.address}: cannot be asked: [Errno 111] Connection refused\n" in out


def test_a_provider_that_nobody_vouches_for_is_not_asked(tmp_path, start):
    with pebble(tmp_path, free_port()) as authority:
        home = tmp_path / "home"
        home.mkdir()
        stranger = certificates.new_authority("stranger", certificates.new_key(), lifetime=DAY)
        (home / "other.pem").write_bytes(stranger.public_bytes(certificates.Encoding.PEM))
        server = Server(start, home, authority, free_port())
        server.run(wait=False, ca=home / "other.pem").stop()
        code, out = said(server, "test")
        assert code == 1
        assert "cannot be asked: [SSL: CERTIFICATE_VERIFY_FAILED]" in out


class Shower:
    """A server that shows a certificate to who comes, until it is closed."""

    def __init__(self, folder: Path, pair: certificates.Pair) -> None:
        (folder / "shown.pem").write_bytes(certificates.chain_pem(pair.chain) + certificates.key_pem(pair.key))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "shown.pem")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        sock, _ = self.listener.accept()
        with self.context.wrap_socket(sock, server_side=True) as secure:
            secure.recv(1)

    def __enter__(self) -> int:
        return self.listener.getsockname()[1]

    def __exit__(self, *_: object) -> None:
        self.thread.join()
        self.listener.close()


def test_whether_a_name_leads_to_this_server_is_told_by_its_key(tmp_path, monkeypatch):
    key = certificates.new_key()
    pair = certificates.self_signed(["localhost"], key, lifetime=DAY)
    folder = tmp_path / acme_files.folder("localhost")

    def reached() -> acme_report.Line:
        with Shower(tmp_path, pair) as port:
            monkeypatch.setattr(acme_report, "TLS_PORT", port)
            return acme_report._reached("localhost", str(tmp_path))

    assert reached() == acme_report.Line(
        "localhost: leads to 127.0.0.1, where somebody speaks TLS; start the server to see whether it does")
    folder.mkdir(parents=True)
    (folder / acme_files.KEY).write_bytes(certificates.key_pem(key))
    assert reached() == acme_report.Line("localhost: leads to 127.0.0.1 and to this server")
    (folder / acme_files.KEY).write_bytes(certificates.key_pem(certificates.new_key()))
    line = reached()
    assert not line.good
    assert line.text.endswith("where another certificate is served than this server's")
    line = acme_report._reached("localhost", str(tmp_path))  # nobody listens any more
    assert not line.good
    assert "nobody speaks TLS at port" in line.text


def test_an_application_without_acme_is_told_so(start):
    for text in ("", "kore.server('s', ip='127.0.0.1', port='443', tls=False); kore.domain('*')"):
        (start.directory / "app.py").write_text(f"import kore\n{text}\n")
        program = start.kore("acme", "status", "app.py")
        assert program.wait() == 1
        assert program.err == "kore: no domain of this application has acme=True\n"


def test_servers_with_a_path_are_left_alone(start):
    """Asking does not replace the socket file of a server that runs."""
    path = start.directory / "sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        inode = os.stat(path).st_ino
        (start.directory / "app.py").write_text(
            f"import kore\nkore.config.deployment = 'dev'\nkore.server('s', path={str(path)!r})\n"
            "kore.domain('a.example', attach='s', acme=True)\n")
        program = start.kore("acme", "status", "app.py")
        assert program.wait() == 1
        assert "none yet" in program.out
        assert os.stat(path).st_ino == inode
