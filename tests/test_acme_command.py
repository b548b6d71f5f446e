"""kore acme status and kore acme test, against a real pebble."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.acme_harness import files_below
from tests.acme_proxy import problem, proxy
from tests.support import Starter, starter
from tests.test_process_acme import NAMES, Server, has_certificate, served


@pytest.fixture
def start(tmp_path: Path):
    with starter(tmp_path) as made:
        yield made


def acme(server: Server, *words: str) -> tuple[int, str]:
    """The exit code and what was said."""
    program = server.start.kore("acme", *words, "app.py", cwd=server.directory)
    code = program.wait()
    return code, program.out + program.err


def test_status_beside_the_server(tmp_path: Path, start: Starter) -> None:
    """What is there, until when, and what failed: while the server runs, and when it does not."""
    with served(tmp_path, start) as server, proxy(tmp_path, server.authority) as way:
        program = server.run(names=NAMES, provider=way.address, ca=way.ca)
        has_certificate(program, NAMES[0])
        has_certificate(program, NAMES[1])
        code, text = acme(server, "status")
        assert code == 0, text
        assert f"provider: {way.address}" in text
        assert f"account: https://127.0.0.1:{way.server_port}/" in text
        for name in NAMES:
            assert f"{name}:\n  certificate: from CN=Pebble" in text
        assert text.count("a third of its life is left then") == 2
        assert "days left" in text
        # One domain is lost, and cannot be had.
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        (server.directory / "certificates" / NAMES[0] / "fullchain.pem").unlink()
        way.faults = {"order": problem("rejectedIdentifier")}
        program = server.run(names=NAMES, provider=way.address, ca=way.ca)
        program.wait_for("no certificate for one")
        code, text = acme(server, "status")
        assert code == 1
        assert f"{NAMES[0]}:\n  certificate: none yet\n  failed: 1 times in a row, at " in text
        assert "rejectedIdentifier, says the test" in text
        assert "tried again: 2" in text
        assert "hello" in server.get(NAMES[1], server.authority.roots()).decode()


def test_status_of_nothing(tmp_path: Path, start: Starter) -> None:
    """Before the first start; and damage is told of."""
    with served(tmp_path, start) as server:
        server.authority.stop()
        server.run(wait=False).stop()
        for path in sorted(server.directory.rglob("*"), reverse=True):
            if path.name != "app.py":
                path.rmdir() if path.is_dir() else path.unlink()
        code, text = acme(server, "status")
        assert code == 1
        assert "account: none yet" in text
        assert "certificate: none yet\n  tried again: now, if the server runs" in text
        assert list(files_below(server.directory)) == ["app.py"]
        place = server.directory / "certificates" / NAMES[0]
        place.mkdir(parents=True)
        (place / "fullchain.pem").write_text("x")
        assert "certificate: damaged: " in acme(server, "status")[1]


def test_a_trial_installs_nothing(tmp_path: Path, start: Starter) -> None:
    """Each domain goes through its challenge on the application's own address; nothing is left, nothing is issued."""
    with served(tmp_path, start) as server:
        server.run(names=NAMES, wait=False).stop()
        before = files_below(server.directory)
        code, text = acme(server, "test")
        assert code == 0, text
        for name in NAMES:
            assert f"{name}: validated, nothing is installed" in text
        assert files_below(server.directory) == before
        assert "Issued certificate" not in server.authority.log
        server.authority.tell_dns("set-servfail", host=NAMES[0])
        code, text = acme(server, "test")
        assert code == 1
        assert f"{NAMES[0]}: failed: it could not validate {NAMES[0]}: " in text
        assert f"{NAMES[1]}: validated" in text


def test_a_trial_at_another_place_gets_certificates(tmp_path: Path, start: Starter) -> None:
    """As at a staging place: the order is gone through to its end."""
    with served(tmp_path, start) as server, proxy(tmp_path, server.authority) as way:
        server.run(wait=False, provider="https://127.0.0.1:1/dir", ca=way.ca).stop()
        code, text = acme(server, "test", "--provider", way.address)
        assert code == 0, text
        assert f"{NAMES[0]}: a certificate was issued, nothing is installed" in text
        assert "Issued certificate" in server.authority.log
        assert not (server.directory / "certificates" / NAMES[0] / "fullchain.pem").exists()


def test_a_trial_beside_the_server_is_refused(tmp_path: Path, start: Starter) -> None:
    with served(tmp_path, start) as server:
        server.run()
        code, text = acme(server, "test")
        assert code == 1
        assert "another program listens there" in text


def test_misuse(tmp_path: Path, start: Starter) -> None:
    """What is no command of it, and an application without ACME."""
    for words in (["acme"], ["acme", "renew", "app.py"]):
        program = start.kore(*words)
        assert program.wait() == 1
        assert "none of its commands, which are status and test" in program.err
    (tmp_path / "app.py").write_text('import kore\nkore.server("s", ip="127.0.0.1", port="0", tls=False)\n')
    program = start.kore("acme", "status", "app.py")
    assert program.wait() == 1
    assert "no domain of the application has acme=True" in program.err
