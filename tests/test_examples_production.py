"""The example of a server in production: started as root, it is confined as its text says, and serves all the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.engines import ENGINES, skip_unconfined
from tests.http_server_harness import Client, request
from tests.privileges_harness import CAPABILITY_SETS, needs_root, status
from tests.support import ROOT, children, free_port, skip_unless, starter, wait_until

FORM = "Content-Type: application/x-www-form-urlencoded"


def ready(log: Path) -> bool:
    return log.exists() and "ready: 2 workers" in log.read_text()


@needs_root
@pytest.mark.parametrize("engine", ENGINES)
def test_production(tmp_path, monkeypatch, engine):
    """In the foreground, as a test must end it; on a free port, and with its folders in ours."""
    skip_unless(engine)
    skip_unconfined(engine)
    pytest.importorskip("pyseccomp")
    pytest.importorskip("prctl")
    monkeypatch.delenv("KORE_SANDBOX", raising=False)  # the deployment says so
    text, port = (ROOT / "examples" / "production.py").read_text(), free_port()
    for here, there in (
        ('port="8888"', f'port="{port}"'), ('"/srv/', f'"{tmp_path}/'), ('"/var/log/', f'"{tmp_path}/'),
        ('"/run/', f'"{tmp_path}/'),
    ):
        assert text.count(here) == 1
        text = text.replace(here, there)
    (tmp_path / "production.py").write_text(text)
    root, log = tmp_path / "kore-example", tmp_path / "kore-example.log"
    with starter(tmp_path) as programs:
        program = programs.kore("-f", "production.py", environment={"KORE_IO": engine})
        wait_until(lambda: ready(log) or program.process.poll() is not None, "it is ready or ends")
        assert program.process.poll() is None, program.err
        for pid in children(program.pid):
            found = status(pid)
            assert "0" not in found["Uid"].split()
            assert {int(found[name], 16) for name in CAPABILITY_SETS} == {0}
            assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
            assert os.readlink(f"/proc/{pid}/root") == str(root)
            assert not children(pid)  # nobody who would start programs
        with Client(("127.0.0.1", port)) as client:
            assert b"In production" in client.ask(request("/")).body
            assert client.ask(request("/notes")).body == b""
            for body, code in ((b"text=hello", 201), (b"text=again", 201), (b"text=", 422), (b"", 422)):
                assert client.ask(request("/notes", FORM, method="POST", body=body)).status == code
            assert client.ask(request("/notes")).body == b"hello\nagain\n"
            assert client.ask(request("/who")).body.endswith(b"in a root that holds ['notes', 'public']\n")
        assert (root / "notes" / "all").stat().st_uid == (root / "notes").stat().st_uid != 0
