"""The rig's generator of handshakes against a TLS library: what it counts must have happened, and as it says."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.perf import handshakes
from tests.perf.servers import EC_KEY, RSA_KEY, certificate
from tests.support import ROOT


class Server:
    """Python's ssl on a socket, one connection at a time: what each negotiated, and whether it was resumed."""

    def __init__(self, folder: Path, key: tuple[str, ...], body: bytes) -> None:
        certificate(folder, key)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        self.body = body
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self.resumed: list[bool | None] = []
        self.ciphers: set[str] = set()

    def serve(self) -> None:
        """Until the listening socket is shut."""
        while True:
            try:
                sock, _ = self.sock.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), sock, self.context.wrap_socket(sock, server_side=True) as tls:
                assert tls.recv(4096) == handshakes.REQUEST
                self.resumed.append(tls.session_reused)
                self.ciphers.add(tls.cipher()[0])
                tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n" + self.body)


@contextlib.contextmanager
def serving(folder: Path, key: tuple[str, ...], body: bytes = b"hello world") -> Iterator[Server]:
    server = Server(folder, key, body)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.sock.shutdown(socket.SHUT_RDWR)
        server.sock.close()
        thread.join()


def generate(port: int, mode: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.perf.handshakes", str(port), "0.3", "2", mode]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("mode", ["full", "resumed"])
@pytest.mark.parametrize("key", [EC_KEY, RSA_KEY], ids=["ec", "rsa"])
def test_each_handshake_it_counts_was_one(mode: str, key: tuple[str, ...], tmp_path: Path) -> None:
    """The server saw as many, each resumed or none but for the one of each process that brought the session."""
    with serving(tmp_path, key) as server:
        done = generate(server.port, mode)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.removeprefix("RIG "))
    first = 2 if mode == "resumed" else 0
    assert result["errors"] == 0
    assert result["requests"] == len(server.resumed) - first > 0
    assert sum(map(bool, server.resumed)) == (result["requests"] if mode == "resumed" else 0)
    assert server.ciphers == {"TLS_AES_256_GCM_SHA384"}


def test_a_server_without_tickets_is_no_case_of_resumption(tmp_path: Path) -> None:
    """It says so, and measures nothing."""
    with serving(tmp_path, EC_KEY) as server:
        server.context.num_tickets = 0
        done = generate(server.port, "resumed")
    assert done.returncode != 0
    assert "the server offers no session" in done.stderr
    assert "RIG" not in done.stdout


def test_a_session_that_is_not_resumed_is_an_error(tmp_path: Path) -> None:
    """A session of another server is refused by a full handshake: that must not be counted as a resumed one."""
    with serving(tmp_path, EC_KEY) as server:
        session = handshakes.Connection(handshakes.Client(server.port)).run(keep=True)
    other = tmp_path / "other"
    other.mkdir()
    with serving(other, EC_KEY) as server, pytest.raises(handshakes.Wrong, match="not resumed"):
        handshakes.Connection(handshakes.Client(server.port, session)).run()


def test_a_wrong_answer_is_an_error(tmp_path: Path) -> None:
    """What was not answered whole does not count."""
    with serving(tmp_path, EC_KEY, b"hello worl") as server:
        with pytest.raises(handshakes.Wrong, match="wrong answer"):
            handshakes.Connection(handshakes.Client(server.port)).run()
