"""``kore doctor`` and ``kore check`` say what is true of this machine and of this application, and serve nothing."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import ssl
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kore.process import doctor
from kore.process.doctor import Finding, State
from kore.tls import libssl
from kore.tls.offload import offload
from tests.support import ROOT, free_port, starter

APP = """import kore

kore.config.http_body_max = 4096
kore.config.http_media_type = "text/x-one one"
kore.config.http_media_type = "text/x-two two"

class App:
    def configure(self, args):
        kore.config.workers = 3
        kore.config.deployment = "dev"
        kore.server("plain", ip="127.0.0.1", port="{port}", tls=False)
        domain = kore.domain("*", attach="plain")
        domain.route("/", self.index, methods=["get"])

    def index(self, req):
        req.response(200, b"hello")

koreapp = App()
"""


@pytest.fixture
def start(tmp_path):
    with starter(tmp_path) as programs:
        yield programs


def doctor_says(**kwargs) -> subprocess.CompletedProcess:
    """The command as people run it."""
    return subprocess.run(
        [sys.executable, "-m", "kore", "doctor"], cwd=ROOT, capture_output=True, text=True, timeout=60, **kwargs)


def row(text: str, what: str) -> str:
    """The line on `what`."""
    found = re.search(rf"^(ok|less|none) +{re.escape(what)} .*$", text, re.MULTILINE)
    assert found, text
    return found[0]


def test_every_part_is_told_of_and_the_exit_code_is_that_of_the_worst():
    done = doctor_says()
    assert not done.stderr
    parts = ("Python", "CPUs", "descriptors", "memlock", "seccomp", "Landlock", "user", "container", "epoll", "TLS")
    for what in parts:
        row(done.stdout, what)
    words = {line.split()[0] for line in done.stdout.splitlines()[1:-1] if not line.startswith(" ")}
    assert done.returncode == (doctor.EXIT_NONE if "none" in words else doctor.EXIT_LESS if "less" in words else 0)


def test_the_tls_that_servers_would_use_is_tried(monkeypatch):
    (found,) = doctor.tls()
    assert found == Finding("TLS", State.GOOD, f"{ssl.OPENSSL_VERSION}; keys can be held by the key manager")
    # What is behind another SSL_CTX has other options: as in a Python whose SSLContext begins with something else.
    monkeypatch.setattr(libssl.Library, "_check_layout", _otherwise)
    libssl.library.cache_clear()
    offload.cache_clear()
    try:
        (found,) = doctor.tls()
    finally:
        libssl.library.cache_clear()
        offload.cache_clear()
    assert found.state is State.LESS
    assert found.text == "TLS cannot be spoken by this Python: its SSLContext is not laid out as expected"
    assert "use Debian's python3" in found.mend


def _otherwise(self) -> None:
    raise libssl._unavailable("its SSLContext is not laid out as expected")


def forbid_rings() -> None:
    """A filter like those of containers: io_uring_setup(2) is EPERM."""
    number = struct.pack("=HBBI", 0x20, 0, 0, 0) + struct.pack("=HBBI", 0x15, 0, 1, 425)
    program = number + struct.pack("=HBBI", 0x06, 0, 0, 0x00050000 | errno.EPERM)
    program += struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
    memory = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(memory)))
    libc = ctypes.CDLL(None)
    libc.prctl(38, 1, 0, 0, 0)
    assert libc.prctl(22, 2, head) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="seccomp is Linux's")
def test_where_rings_are_forbidden_it_says_by_whom_and_that_a_server_starts_all_the_same():
    done = doctor_says(preexec_fn=forbid_rings)
    line = row(done.stdout, "io_uring")
    assert line.startswith("less")
    assert "io_uring_setup: Operation not permitted (errno 1)" in line
    assert "allow io_uring_setup" in done.stdout
    assert "this process has a filter already" in row(done.stdout, "seccomp")
    assert done.returncode == doctor.EXIT_LESS
    assert "a server starts here" in done.stdout.splitlines()[-1]


def test_too_few_descriptors_are_told_with_what_to_do():
    done = doctor_says(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)))
    assert row(done.stdout, "descriptors").startswith("less")
    assert "ulimit -Hn 576" in done.stdout
    assert done.returncode == doctor.EXIT_LESS


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_is_told_what_only_root_may(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", "import os; os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
         "from kore.process import doctor\nfor finding in doctor.user(): print(finding.text)"],
        cwd=ROOT, capture_output=True, text=True)
    if "ModuleNotFoundError" in found.stderr or "Permission" in found.stderr:
        pytest.skip("nobody may not read this checkout")
    assert "no chroot and no change of user" in found.stdout, found.stderr


@pytest.mark.parametrize(("path", "text", "kind"), [
    (".dockerenv", "", "Docker"),
    ("run/.containerenv", "", "Podman"),
    ("run/systemd/container", "systemd-nspawn\n", "systemd-nspawn"),
    ("proc/1/cgroup", "0::/kubepods/burstable/pod1\n", "Kubernetes"),
    ("proc/1/cgroup", "0::/init.scope\n", None),
])
def test_containers_are_known_by_their_marks(tmp_path: Path, path, text, kind):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    assert doctor.container_kind(str(tmp_path)) == kind


@pytest.mark.parametrize(("states", "code"), [
    ([State.GOOD, State.GOOD], 0), ([State.LESS, State.GOOD], 1), ([State.NONE, State.LESS], 2),
    ([State.LESS, State.NONE, State.GOOD], 2),
])
def test_the_exit_code_is_stable(states, code):
    lines: list[str] = []
    examination = lambda: iter(Finding("x", state, "y", "do") for state in states)  # noqa: E731 - one line says it
    assert doctor.report(lines.append, [examination]) == code
    assert sum("-> do" in line for line in lines) == len(states)


def test_check_shows_each_option_with_where_it_comes_from(start):
    (start.directory / "app.py").write_text(APP.format(port=free_port()))
    program = start.kore("check", "app.py")
    assert program.wait() == 0
    told = dict(re.findall(r"^(\w+) += (.*?) +# .*$", program.out, re.MULTILINE))
    origins = dict(re.findall(r"^(\w+) += .*?# (.*)$", program.out, re.MULTILINE))
    assert (told["http_body_max"], origins["http_body_max"]) == ("4096", "app.py:3")
    assert (told["workers"], origins["workers"]) == ("3", "app.py:9")
    assert (told["http_header_max"], origins["http_header_max"]) == ("4096", "default")
    assert origins["http_media_type"] == "app.py:4, app.py:5"
    assert told["engine"] in ("uring", "epoll")
    assert "server plain: http on http://127.0.0.1:" in program.out
    assert "ready" not in program.out


@pytest.mark.parametrize(("words", "said"), [
    (["check"], "no application given"), (["check", "missing.py"], "no such file"),
    (["doctor", "app.py"], "doctor takes no arguments"),
])
def test_a_misused_command_is_one_line_and_exit_code_1(start, words, said):
    program = start.kore(*words)
    assert program.wait() == 1
    assert said in program.err
    assert program.err.count("\n") == 1


def test_an_application_called_check_is_reached_by_its_path(start):
    package = start.directory / "check"
    package.mkdir()
    (package / "__init__.py").write_text(APP.format(port=free_port()))
    program = start.kore("check", "./check")
    assert program.wait() == 0
    assert "http_body_max" in program.out
