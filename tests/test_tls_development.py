"""A TLS server without certificates, in development: curl trusts it by one file, and only its user has that key."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kore.tls import authority, certificates
from tests.engines import ENGINES, skip_unconfined
from tests.privileges_harness import a_user, needs_root, status
from tests.support import READY, ROOT, children, free_port, pids_of, skip_unless, starter, wait_until

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")

APP = """
import kore

class App:
    def configure(self, args):
        kore.config.deployment = "dev"
        kore.config.workers = 2
        {option}
        kore.server("secure", ip="127.0.0.1", port="{port}")
        domain = kore.domain("www.example.org", attach="secure")
        domain.route("/", self.index)

    def index(self, req):
        req.response(200, f"hello over {{req.protocol}}".encode())

koreapp = App()
"""


def write_app(directory: Path, option: str = "pass") -> int:
    port = free_port()
    (directory / "app.py").write_text(APP.format(port=port, option=option))
    return port


def curl(port: int, *words: str, name: str = "localhost") -> subprocess.CompletedProcess:
    """What curl says of https://name:port/."""
    return subprocess.run(
        ["curl", "-sS", "--resolve", f"www.example.org:{port}:127.0.0.1", *words, f"https://{name}:{port}/"],
        capture_output=True, timeout=30, text=True)


@pytest.fixture
def start(tmp_path):
    with starter(tmp_path) as programs:
        yield programs


def kept(directory: Path) -> Path:
    return directory / "data" / "kore" / "authority"


def command(pid: int) -> str:
    """The command line of a process; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def process_called(program, name: str) -> int:
    """The child that is called so."""
    (found,) = [pid for pid in children(program.pid) if name in command(pid)]
    return found


@pytest.mark.parametrize("sandbox", ["yes", "no"])
@pytest.mark.parametrize("engine", ENGINES)
def test_curl_trusts_it_by_the_file_that_the_log_names(start, engine, sandbox):
    """By every name it has; without the file it is refused; no browser is told to insist on TLS on localhost."""
    skip_unless(engine)
    if sandbox == "yes":
        skip_unconfined(engine)
    port = write_app(start.directory)
    program = start.kore("app.py", environment={"KORE_IO": engine, "KORE_SANDBOX": sandbox})
    program.wait_for(READY)
    found = program.wait_for(r"log=\[www\.example\.org: a certificate of the local authority .* curl --cacert (\S+),")
    assert found[1] == str(kept(start.directory) / "authority.pem")
    assert f"log=[serving https on https://127.0.0.1:{port}]" in program.out
    for name in ("localhost", "127.0.0.1", "www.example.org"):
        done = curl(port, "--cacert", found[1], "-i", name=name)
        assert done.returncode == 0, done.stderr
        assert "strict-transport-security" not in done.stdout
        # The certificate is for all of them, the domain for one.
        assert done.stdout.startswith(f"HTTP/1.1 {200 if name == 'www.example.org' else 404} "), done.stdout
    refused = curl(port)
    assert refused.returncode == 60, refused  # CURLE_PEER_FAILED_VERIFICATION


def test_each_start_has_a_key_of_its_own_and_the_same_authority(start):
    seen = []
    for _ in range(2):
        port = write_app(start.directory)
        program = start.kore("app.py")
        program.wait_for(READY)
        done = curl(port, "--cacert", str(kept(start.directory) / "authority.pem"), name="www.example.org")
        assert done.stdout == "hello over https", done.stderr
        shown = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}"], stdin=subprocess.DEVNULL, capture_output=True,
            timeout=30, check=True).stdout
        seen.append(shown[shown.index(b"-----BEGIN"):shown.index(b"-----END")])
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
    assert seen[0] != seen[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_key_manager_that_was_killed_is_replaced_by_one_that_is_trusted_as_well(start, engine):
    """It has another key: nobody gets a signature by that with the certificate of before."""
    skip_unless(engine)
    port = write_app(start.directory)
    program = start.kore("app.py", environment={"KORE_IO": engine})
    program.wait_for(READY)
    trust = str(kept(start.directory) / "authority.pem")
    for _ in range(3):
        os.kill(process_called(program, "[keymgr]"), signal.SIGKILL)
        wait_until(lambda: any("[keymgr]" in command(pid) for pid in children(program.pid)), "there is a new one")
        for _ in range(4):
            done = curl(port, "--cacert", trust, name="www.example.org")
            assert done.stdout == "hello over https", done.stderr
    assert program.out.count("a certificate of the local authority is served") == 1


def test_browsers_are_told_to_insist_where_that_is_asked_for(start):
    port = write_app(start.directory, "kore.config.http_hsts_enable = 60")
    start.kore("app.py").wait_for(READY)
    done = curl(port, "-i", "--insecure", name="www.example.org")
    assert "strict-transport-security: max-age=60; includeSubDomains" in done.stdout


def test_without_a_place_to_keep_it_there_is_one_for_this_start(start):
    (start.directory / "file").write_text("")
    port = write_app(start.directory)
    program = start.kore("app.py", environment={"XDG_DATA_HOME": str(start.directory / "file")})
    program.wait_for(READY)
    program.wait_for(r"proc=\[keymgr\] log=\[the local authority can't be kept: .*/file\S*: Not a directory\]")
    program.wait_for(r"no client can be made to trust it; curl --insecure asks none\]")
    assert curl(port, "--insecure", name="www.example.org").stdout == "hello over https"


def test_a_damaged_authority_is_one_line_that_says_what_to_do(start):
    folder = kept(start.directory)
    authority.opened(str(folder))
    (folder / "key.pem").write_text("garbage")
    write_app(start.directory)
    program = start.kore("app.py")
    assert program.wait() == 1
    said = program.out + program.err
    assert f"the local authority can't be used: {folder}/key.pem: holds no private key in PEM: remove {folder}" in said
    assert "log=[ready: " not in said


def test_a_server_that_runs_survives_damage_to_its_authority(start):
    """The next key manager serves what nobody trusts, and says so."""
    port = write_app(start.directory)
    program = start.kore("app.py")
    program.wait_for(READY)
    (kept(start.directory) / "key.pem").write_text("garbage")
    os.kill(process_called(program, "[keymgr]"), signal.SIGKILL)
    program.wait_for(r"proc=\[keymgr\] log=\[the local authority can't be used: .*; until the next start no client")
    assert curl(port, "--insecure", name="www.example.org").stdout == "hello over https"


def memory_of(pid: int) -> Iterator[bytes]:
    """All that a process has in memory and that can be read."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights = line.split()[:2]
            if "r" not in rights or line.rstrip().endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
                continue
            low, high = (int(end, 16) for end in span.split("-"))
            memory.seek(low)
            try:
                yield memory.read(high - low)
            except OSError:
                continue  # device memory, as of a ring


@needs_root
@pytest.mark.parametrize("engine", ENGINES)
def test_no_worker_and_not_the_parent_ever_has_the_key_of_the_authority(start, engine):
    """Not at the start that makes it, nor after handshakes; the scan finds what is there to be found."""
    skip_unless(engine)
    port = write_app(start.directory)
    program = start.kore("app.py", environment={"KORE_IO": engine})
    program.wait_for(READY)
    folder = kept(start.directory)
    assert curl(port, "--cacert", str(folder / "authority.pem"), name="www.example.org").returncode == 0
    text = (folder / "key.pem").read_bytes()
    number = certificates.load_key(text).private_numbers().private_value
    marks = [number.to_bytes(32, "big"), number.to_bytes(32, "little"), text.splitlines()[1][48:]]
    known = b"hello over "
    processes = [program.pid, *pids_of(program)]
    assert len(processes) == 3
    for pid in processes:
        blind = True
        for piece in memory_of(pid):
            blind = blind and known not in piece
            for mark in marks:
                assert mark not in piece, (pid, "has the key")
        assert not blind, (pid, "could not be read")


@needs_root
@pytest.mark.parametrize("engine", ENGINES)
def test_a_user_who_is_not_root_has_an_authority_of_his_own(engine):
    """No rights are needed, and nothing of it is another user's."""
    skip_unless(engine)
    user = a_user()
    directory = Path(tempfile.mkdtemp(prefix="kore-"))
    try:
        os.chown(directory, user.pw_uid, user.pw_gid)
        port = write_app(directory)
        words = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        with starter(directory) as programs:
            if subprocess.run([*words, sys.executable, "-c", "import kore"], cwd=ROOT, check=False).returncode:
                pytest.skip(f"{user.pw_name} may not read {ROOT}")
            program = programs.command(
                *words, sys.executable, "-m", "kore", "app.py", environment={"KORE_IO": engine})
            program.wait_for(READY)
            for pid in children(program.pid):
                assert set(status(pid)["Uid"].split()) == {str(user.pw_uid)}
            assert (kept(directory) / "key.pem").stat().st_uid == user.pw_uid
            done = curl(port, "--cacert", str(kept(directory) / "authority.pem"), name="www.example.org")
            assert done.stdout == "hello over https", done.stderr
    finally:
        shutil.rmtree(directory)
