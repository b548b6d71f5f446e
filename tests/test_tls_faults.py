"""What goes wrong around a TLS server that serves: the clock, its key manager, its pairs. It goes on serving.

Faults of the files alone are in test_keymgr_served.py, those of ACME in test_process_acme.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.keymgr_harness import ask, key_server
from tests.support import ROOT, Program, alive, free_port, starter, wait_until
from tests.tls_harness import TlsClient, authority, client_context, issue, server_pair

CLOCK = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)

APP = """
import kore
from kore.process import keymgr

keymgr.REMARK_SECONDS = 0.5
kore.config.workers = 2
kore.config.deployment = "dev"
kore.server("tls", ip="127.0.0.1", port="{port}")
home = kore.domain("a.test", attach="tls", cert="a.pem", key="a.key")

@kore.route("/", domain=home, methods=["get"])
def index(req):
    req.response(200, b"hello")
"""


@pytest.mark.skipif(CLOCK is None, reason="faketime is not installed")
def test_the_clock_moves_past_expiry_and_back(tmp_path, engine, monkeypatch):
    """The certificate is served as before, which is what its clients may decide on; the log says that it expired.

    All clocks of the server but the monotonic ones are moved, nobody else's.
    """
    first, later = server_pair("a.test", "p256"), issue("a.test", issuer=authority(), days=(-1, 365))
    first.save(tmp_path / "a.pem")
    clock = tmp_path / "clock"
    clock.write_text("+0d")
    for name, value in (
        ("LD_PRELOAD", str(CLOCK)), ("FAKETIME_TIMESTAMP_FILE", str(clock)), ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ):
        monkeypatch.setenv(name, value)
    port = free_port()

    def move(offset: str) -> None:
        (tmp_path / "moved").write_text(offset)
        (tmp_path / "moved").rename(clock)

    def shown(version: str) -> bytes:
        with TlsClient(port, "a.test", client_context(version), None) as client:
            assert ask(client.sock) == b"hello"
            return client.sock.getpeercert(binary_form=True)

    def serves(pair) -> None:
        for version in ("1.2", "1.3") * 3:
            assert shown(version) == pair.chain[0]

    with starter(tmp_path) as start:
        program = start.app(APP.format(port=port), environment={"KORE_IO": engine, "KORE_SANDBOX": "no"})
        with TlsClient(port, "a.test", client_context(), None) as established:
            serves(first)
            assert "expired" not in program.out
            move("+60d")
            program.wait_for(r"proc=\[keymgr\] log=\[domain a\.test: .*its certificate expired on ")
            serves(first)
            assert ask(established.sock) == b"hello"
            later.save(tmp_path / "a.pem")
            program.signal(signal.SIGUSR1)
            program.wait_for("domain a.test: a new ec pair is in use")
            wait_until(lambda: shown("1.3") == later.chain[0], "the new one is shown")
            move("-1d")
            serves(later)
            assert ask(established.sock) == b"hello"
        program.signal(signal.SIGTERM)
        assert program.wait() == 0


@contextlib.contextmanager
def generating(port: int, seconds: float, mode: str) -> Iterator[subprocess.Popen[str]]:
    """The rig's generator of handshakes, sixteen at a time."""
    command = [sys.executable, "-m", "tests.perf.handshakes", str(port), str(seconds), "16", mode]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


@pytest.mark.parametrize("mode", ["full", "resumed"])
def test_a_key_manager_that_is_killed_under_load_fails_nothing(tmp_path, engine, mode):
    """Sixteen clients that shake hands as fast as they can, all in the sandbox: each handshake ends well."""
    with key_server(tmp_path, engine, kinds=("p256",), names=("localhost",)) as server:
        with generating(server.tls_port, 4.0, mode) as generator:
            for _ in range(2):
                wait_until(lambda: mode == "resumed" or busy(server.manager), "it is signing")
                manager = server.manager
                os.kill(manager, signal.SIGKILL)
                wait_until(lambda manager=manager: not alive(manager), "it is dead")
                wait_until(lambda manager=manager: server.manager != manager, "another takes its place")
            said, complaints = generator.communicate(timeout=60)
        assert generator.returncode == 0, complaints
        result = json.loads(said.removeprefix("RIG "))
        assert (result["errors"], complaints) == (0, "")
        assert result["requests"] > 100
        assert server.program.out.count("another takes its place") == 2
        assert "serves again" not in server.program.out, "no worker died of it"


def busy(pid: int) -> bool:
    """Whether a process has used the processor."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]) > 0


def test_a_key_manager_dies_while_the_pairs_on_disk_are_spoiled(tmp_path, engine):
    """Its successor has nothing to sign with for one domain: that one fails, with words, until its files are good."""
    with key_server(tmp_path, engine, kinds=("p256",), names=("a.test", "b.test")) as server:
        with server.connect("a.test") as established:
            server.write("a.test-p256.pem", os.urandom(3000))
            server.program.wait_for(r"domain a\.test: .*; the pair before stays")
            manager = server.manager
            os.kill(manager, signal.SIGKILL)
            wait_until(lambda: not alive(manager), "it is dead")
            server.program.wait_for("the key manager is there again")
            assert server.shown("b.test") == server_pair("b.test", "p256").chain[0]
            assert ask(established) == b"hello"
            with pytest.raises(OSError):
                server.connect("a.test", seconds=15)
            assert server.shown("b.test") == server_pair("b.test", "p256").chain[0]
            server.put("a.test-p256", server_pair("a.test", "p256"))
            server.program.signal(signal.SIGUSR1)
            wait_until(lambda: serves(server, "a.test"), "it is served again")
            assert ask(established) == b"hello"
        stopped(server.program)


def test_a_key_manager_dies_while_all_pairs_on_disk_are_spoiled(tmp_path, engine):
    """The server goes on for who is connected, and serves again when there is a good pair."""
    with key_server(tmp_path, engine, kinds=("p256",)) as server:
        with server.connect() as established:
            server.write("a.test-p256.key", b"")
            server.program.wait_for(r"domain a\.test: .*; the pair before stays")
            os.kill(server.manager, signal.SIGKILL)
            server.program.wait_for("the key manager is there again")
            for _ in range(20):
                assert ask(established) == b"hello"
            with pytest.raises(OSError):
                server.connect(seconds=15)
            server.put("a.test-p256", server_pair("a.test", "p256"))
            server.program.signal(signal.SIGUSR1)
            wait_until(lambda: serves(server, "a.test"), "it is served again")
            assert ask(established) == b"hello"
        stopped(server.program)


def serves(server, name: str) -> bool:
    """Whether a handshake ends well."""
    try:
        server.shown(name)
    except OSError:
        return False
    return True


def stopped(program: Program) -> None:
    """It stops as it should."""
    program.signal(signal.SIGTERM)
    assert program.wait() == 0, program.out + program.err
    assert "Traceback" not in program.out + program.err
