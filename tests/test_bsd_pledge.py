"""pledge(2) and unveil(2): each role's promises, their order, and what a refusal says, told by our own C library."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import signal
import ssl
import subprocess
from urllib import request

import pytest

from kore.bsd import pledge
from kore.errors import StartError
from tests.engines import OPENBSD
from tests.support import READY, SECONDS, SERVER_APP, children, free_port, http_get, pids_of, starter

# Writes each call into the file that PLEDGE_RECORD names; what PLEDGE_REFUSE names is refused with EINVAL.
RECORDER = r"""
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int record(const char *name, const char *one, const char *two) {
    FILE *file = fopen(getenv("PLEDGE_RECORD"), "a");
    fprintf(file, "%s %s|%s\n", name, one ? one : "NULL", two ? two : "NULL");
    fclose(file);
    const char *refused = getenv("PLEDGE_REFUSE");
    if (refused && strcmp(refused, name) == 0) {
        errno = EINVAL;
        return -1;
    }
    return 0;
}

int pledge(const char *promises, const char *execpromises) { return record("pledge", promises, execpromises); }
int unveil(const char *path, const char *permissions) { return record("unveil", path, permissions); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    """The path of a shared object with both calls."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    folder = tmp_path_factory.mktemp("libc")
    (folder / "recorder.c").write_text(RECORDER)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "recorder.so", folder / "recorder.c"], check=True, timeout=60)
    return str(folder / "recorder.so")


@pytest.fixture
def record(tmp_path, monkeypatch):
    """What was called, in order, as (call, its first and second argument)."""
    path = tmp_path / "record"
    monkeypatch.setenv("PLEDGE_RECORD", str(path))
    return lambda: [tuple(line.replace("|", " | ").split(" ", 1)) for line in path.read_text().splitlines()]


@pytest.fixture
def libc(library, record):
    return ctypes.CDLL(library, use_errno=True)


PLAIN = {"transfers": False, "handed_files": False, "bodies_in_files": False}


@pytest.mark.parametrize(("arguments", "promises"), [
    ({}, "stdio rpath inet"),
    ({"transfers": True}, "stdio rpath inet dns"),
    ({"handed_files": True}, "stdio rpath inet recvfd"),
    ({"bodies_in_files": True}, "stdio rpath inet wpath cpath"),
    ({"further": ("proc exec", "unix")}, "stdio rpath inet proc exec unix"),
    ({"transfers": True, "handed_files": True, "bodies_in_files": True, "further": ("unix",)},
     "stdio rpath inet dns recvfd wpath cpath unix"),
])
def test_a_worker_promises_what_it_needs(libc, record, arguments, promises) -> None:
    """And each `pledge` option after that. The execution promises are left alone."""
    pledge.pledge_worker(**PLAIN | arguments, libc=libc)
    assert record() == [("pledge", f"{promises} | NULL")]


@pytest.mark.parametrize(("acme", "promises"), [
    (False, "stdio rpath recvfd"), (True, "stdio rpath recvfd wpath cpath"),
])
def test_the_key_manager_writes_only_with_acme(libc, record, acme: bool, promises: str) -> None:
    pledge.pledge_keymgr(acme=acme, libc=libc)
    assert record() == [("pledge", f"{promises} | NULL")]


def test_the_acme_process_sees_the_cas_alone(libc, record) -> None:
    """The veil first: after the promise there is no more unveiling."""
    pledge.pledge_acme(libc=libc)
    assert record() == [("unveil", "/etc/ssl/ | r"), ("pledge", "stdio inet dns rpath recvfd | NULL")]


def test_a_refusal_is_fatal_and_says_of_what(libc, record, monkeypatch) -> None:
    """A veil that is refused is not followed by a promise."""
    monkeypatch.setenv("PLEDGE_REFUSE", "pledge")
    with pytest.raises(StartError, match=r"^pledge\('stdio rpath inet nonsense', NULL\) is refused: Invalid argument"):
        pledge.pledge_worker(**PLAIN, further=("nonsense",), libc=libc)
    monkeypatch.setenv("PLEDGE_REFUSE", "unveil")
    with pytest.raises(StartError, match=r"^unveil\('/etc/ssl/', 'r'\) is refused"):
        pledge.pledge_acme(libc=libc)
    assert [call for call, _ in record()] == ["pledge", "unveil"]


@pytest.mark.skipif(hasattr(ctypes.CDLL(None), "pledge"), reason="this system has pledge(2)")
def test_a_system_without_it() -> None:
    """The C library that is loaded is asked when none is given."""
    assert not pledge.available()
    with pytest.raises(StartError, match=r"has no pledge\(2\)"):
        pledge.pledge_keymgr(acme=False)



@pytest.fixture
def openbsd(tmp_path, library):
    """Starts a server that takes this system for OpenBSD, whose C library has the two calls."""
    with starter(tmp_path) as programs:
        def start(options: str, **environment: str):
            port = free_port()
            source = SERVER_APP.format(text="", workers=1, options=options, port=port, deployment="dev")
            (tmp_path / "app.py").write_text(source)
            recorder = {"LD_PRELOAD": library, "PLEDGE_RECORD": str(tmp_path / "record")}
            program = programs.kore("app.py", environment=OPENBSD | recorder | environment)
            program.address = ("127.0.0.1", port)
            return program

        yield start


def test_a_worker_pledges_before_it_serves(openbsd, tmp_path) -> None:
    """Once, in the worker, with the options' lines; `dns` where pycurl is installed."""
    options = ('pledge = "unix"', 'pledge = "proc exec"', "http_body_disk_offload = 1")
    program = openbsd("\n".join(f"kore.config.{option}" for option in options))
    program.wait_for(READY)
    assert http_get(program.address).endswith(b"hello")
    (line,) = (tmp_path / "record").read_text().splitlines()
    assert (" dns" in line) == (importlib.util.find_spec("pycurl") is not None)
    assert line.replace(" dns", "") == "pledge stdio rpath inet wpath cpath unix proc exec|NULL"


def test_with_tls_the_key_manager_promises_as_well(openbsd, tmp_path) -> None:
    """Once it has read all keys. Each of its successors' ends is handed to the worker."""
    port = free_port()
    program = openbsd(
        f'kore.server("secure", ip="127.0.0.1", port="{port}")\n'
        'kore.domain("localhost", attach="secure").route("/", lambda req: req.response(200, b"secret"))')
    program.wait_for(READY)
    (manager,) = set(children(program.pid)) - set(pids_of(program))
    os.kill(manager, signal.SIGKILL)
    program.wait_for(r"the key manager is there again")
    trust = ssl.create_default_context(cafile=tmp_path / "data" / "kore" / "authority" / "authority.pem")
    with request.urlopen(f"https://localhost:{port}/", context=trust, timeout=SECONDS) as answer:
        assert answer.read() == b"secret"
    promised = [line.replace(" dns", "") for line in (tmp_path / "record").read_text().splitlines()]
    assert sorted(promised) == [
        "pledge stdio rpath inet recvfd|NULL", "pledge stdio rpath recvfd|NULL", "pledge stdio rpath recvfd|NULL"]


def test_a_refused_pledge_is_no_start(openbsd) -> None:
    """The line says what was promised and why it is refused; nothing is served."""
    program = openbsd('kore.config.pledge = "nonsense"', PLEDGE_REFUSE="pledge")
    assert program.wait() != 0
    assert "nonsense', NULL) is refused: Invalid argument" in program.out
    assert "ready" not in program.out


def test_elsewhere_the_option_does_nothing_and_says_so(tmp_path) -> None:
    """Silence would be a lie: whoever sets it believes that the workers are confined."""
    with starter(tmp_path) as programs:
        program = programs.serve(options='kore.config.pledge = "unix"', workers=1)
        program.wait_for(r"only OpenBSD has pledge\(2\)")
        assert "only OpenBSD" not in programs.serve(workers=1).out
    assert os.path.exists(tmp_path / "app.py")
