"""In containers, namespaces and on kernels that lack something: one line says what is missing, and all else works.

What is meant to be missing is taken away by tests/surroundings.py, a program that then becomes the server.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.http_server_harness import Client, Response, request
from tests.privileges_harness import CAPABILITY_SETS, a_user, needs_root, status
from tests.support import ROOT, SECONDS, Program, children, free_port, pids_of, starter, wait_until

pytest.importorskip("pyseccomp")

from kore.sandbox import landlock

SURROUNDINGS = str(ROOT / "tests" / "surroundings.py")

TEXT = """
import os
import kore

kore.config.workers = 2
kore.config.http_body_max = 1000000
{options}
kore.server("plain", ip="127.0.0.1", port="{port}", tls=False)
home = kore.domain("*", attach="plain")
home.filemaps({{"/files/": "files"}})

@kore.route("/", domain=home, methods=["get"])
def index(req):
    req.response(200, b"hello")

@kore.route("/put", domain=home, methods=["put"])
def put(req):
    req.response(200, str(len(req.body)).encode())

@kore.route("/outside", domain=home, methods=["get"])
def outside(req):
    with open({outside!r}) as file:
        req.response(200, file.read().encode())

@kore.route("/program", domain=home, methods=["get"])
async def program(req):
    proc = kore.proc("/bin/echo works", 20000)
    req.response(200, await proc.recv(100))

@kore.route("/deadly", domain=home, methods=["get"])
def deadly(req):
    os.execv("/bin/true", ["true"])
"""


@pytest.fixture
def place():
    """A directory that every user may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def programs(place):
    (place / "app" / "files").mkdir(parents=True)
    (place / "app" / "files" / "page.html").write_text("page")
    (place / "outside.txt").write_text("outside")
    with starter(place / "app") as made:
        yield made


@pytest.fixture
def enter(programs, place):
    """Starts a server in surroundings: words for surroundings.py, and a command to run it by."""

    def start(*words: str, by: tuple[str, ...] = (), options: str = "") -> Program:
        port = free_port()
        text = TEXT.format(port=port, options=options, outside=str(place / "outside.txt"))
        (place / "app" / "app.py").write_text(text)
        entering = [sys.executable, SURROUNDINGS, *words, "--"] if words else []
        program = programs.command(
            *by, *entering, sys.executable, "-m", "kore", "app.py", environment={"KORE_SANDBOX": "yes"}
        )
        program.address = ("127.0.0.1", port)
        return program

    return start


def ask(program: Program, data: bytes) -> Response:
    with Client(program.address) as client:
        return client.ask(data)


READABLE = r'execve\("/bin/true", \w+, \w+\)'
UNREADABLE = r"execve\(0x\w+, 0x\w+, 0x\w+\)"
"""How a deadly call is named where the parent has no right to read from a worker's memory."""
OWN = READABLE if os.geteuid() == 0 else UNREADABLE


def works(program: Program, *, landlocked: bool = True, name: str = READABLE) -> None:
    """Everything but what is missing: it serves, the sandbox holds, deaths have names, a stop is a stop."""
    pids_of(program)
    assert ask(program, request("/")).body == b"hello"
    assert ask(program, request("/files/page.html")).body == b"page"
    assert ask(program, request("/put", method="PUT", body=bytes(100_000))).body == b"100000"
    assert ask(program, request("/program")).body == b"works\n"
    if landlocked and landlock.abi():
        assert ask(program, request("/outside")).status == 500
        program.wait_for(r"sandbox: .*/outside\.txt may not be read; kore\.config\.sandbox_read")
    else:
        assert ask(program, request("/outside")).body == b"outside"
    with Client(program.address) as client:
        client.send(request("/deadly"))
        client.ended()
    if name:
        program.wait_for(rf"is killed: its sandbox forbids {name}\]")
    program.wait_for(r"was killed (by SIGSYS, a|for a) system call its sandbox forbids")
    program.wait_for("serves again")
    assert ask(program, request("/")).body == b"hello"


def ends(program: Program, pid: int | None = None) -> None:
    """Stopped by SIGTERM, it ends with exit code 0."""
    os.kill(pid or program.pid, signal.SIGTERM)
    assert program.wait() == 0, program.out + program.err
    assert program.out.count("goodbye") == 1
    assert program.err == ""


def told_once(program: Program, pattern: str) -> None:
    assert len(re.findall(pattern, program.out)) == 1, program.out


needs_landlock = pytest.mark.skipif(not landlock.abi(), reason="no Landlock in this kernel: it is missing already")
NO_RING = r"io_uring is not available, using epoll: io_uring_setup: Operation not permitted \(errno 1\)"


@needs_root
@pytest.mark.parametrize("further", [(), ("no-setpcap",), ("no-capabilities",)], ids=" ".join)
def test_in_a_container_of_docker(enter, further):
    """Without CAP_SYS_PTRACE nobody reads what a deadly call is about; the name of the call is enough."""
    program = enter("docker", *further)
    works(program, name=UNREADABLE)
    assert "engine epoll" in program.out
    told_once(program, NO_RING)
    for pid in children(program.pid):
        found = status(pid)
        assert found["NoNewPrivs"] == "1"
        assert found["Seccomp"] == "2"
        assert found["Seccomp_filters"] == "2", "ours and the container's"
        assert int(found["CapPrm"], 16) == int(found["CapEff"], 16) == 0
    ends(program)


@needs_root
@pytest.mark.parametrize("setpcap", [True, False])
def test_in_a_container_with_a_user_and_a_root(enter, place, setpcap):
    """Without CAP_SETPCAP the bounding set stays, which gives nothing to who has no_new_privs."""
    options = f"kore.config.deployment = 'docker'\nkore.config.root = '.'\nkore.config.runas = {a_user().pw_name!r}"
    program = enter("docker", *([] if setpcap else ["no-setpcap"]), options=options)
    for pid in pids_of(program):
        found = status(pid)
        assert found["Uid"].split() == [str(a_user().pw_uid)] * 4
        assert os.readlink(f"/proc/{pid}/root") == str(place / "app")
        sets = [int(found[name], 16) for name in CAPABILITY_SETS if name != "CapBnd"]
        assert sets == [0] * 4
        assert (int(found["CapBnd"], 16) == 0) is setpcap
        assert found["NoNewPrivs"] == "1"
    told_once(program, NO_RING)
    assert ask(program, request("/")).body == b"hello"
    assert ask(program, request("/files/page.html")).body == b"page"
    assert ask(program, request("/outside")).status == 500
    ends(program)


@needs_root
def test_in_a_container_without_capabilities_a_user_cannot_be_had(enter):
    options = f"kore.config.deployment = 'docker'\nkore.config.runas = {a_user().pw_name!r}"
    program = enter("docker", "no-capabilities", options=options)
    assert program.wait() == 1
    assert program.err.count("\n") == 1
    assert re.search(r"^kore: cannot chroot to .* and switch to user .*: root here lacks CAP_SYS_CHROOT", program.err)
    assert "-n -r" in program.err


@needs_landlock
@pytest.mark.parametrize("word", ["no-landlock", "landlock-off"])
def test_without_landlock_one_line_says_what_is_not_restricted(enter, word):
    program = enter(word)
    works(program, landlocked=False, name=OWN)
    told_once(program, r"no Landlock \(Linux 5\.13, and landlock in lsm= at boot\): neither files nor ports")
    assert "Landlock" not in program.out.partition("serves again")[2]
    ends(program)


def test_where_a_listener_is_there_already_deaths_have_no_name(enter):
    program = enter("listener")
    works(program, name="")
    told_once(program, "was killed by SIGSYS, a system call its sandbox forbids")
    ends(program)


def test_without_filters_there_is_no_start_and_the_way_without_them_is_named(enter):
    program = enter("no-filters")
    assert program.wait() == 1
    found = re.findall(r"worker \d cannot be confined: .*seccomp filter: .*cannot be installed .*", program.out)
    assert found
    assert all("kore.config.sandbox = 'no'" in line for line in found)
    assert "ready:" not in program.out


def test_without_memory_to_lock(enter):
    """Rings count as locked memory, for who has no CAP_IPC_LOCK (io_uring_setup(2))."""
    program = enter("no-locked-memory")
    works(program, name=UNREADABLE)
    if "engine epoll" in program.out:
        told_once(program, r"io_uring is not available.*RLIMIT_MEMLOCK too low \(ulimit -l\)")
    ends(program)


def unshare(*arguments: str) -> tuple[str, ...]:
    """A command that enters new namespaces; the test is skipped where that is not allowed."""
    command = ("unshare", *arguments)
    try:
        done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False, timeout=SECONDS)
    except FileNotFoundError:
        pytest.skip("unshare(1) is not installed")
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")
    return command


def test_as_root_of_a_user_namespace(enter):
    program = enter(by=unshare("--user", "--map-root-user"))
    works(program)
    told_once(program, "the workers stay root, without capabilities: name a user with kore.config.runas")
    ends(program)


@pytest.mark.parametrize("proc", [True, False], ids=["its own /proc", "the /proc of those outside"])
def test_as_process_1(enter, proc):
    mapped = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    by = unshare(*mapped, "--pid", "--fork", "--kill-child", *(["--mount-proc"] if proc else []))
    program = enter(by=by)
    works(program)
    told_once(program, r"pid 1\]")
    (first,) = children(program.pid)
    ends(program, first)


@needs_root
def test_on_a_root_that_is_read_only(enter):
    script = (
        "mount --make-rprivate / && mount -o remount,bind,ro / && mount --bind . . && mount -o remount,bind,ro $PWD"
        ' && cd $PWD && exec "$@"'
    )
    program = enter(by=(*unshare("--mount"), "sh", "-c", script, "sh"))
    works(program)
    told_once(program, r"no pidfile: pidfile .*: Read-only file system")
    ends(program)


@needs_root
def test_without_proc(enter):
    script = 'mount --make-rprivate / && mount -t tmpfs none /proc && exec "$@"'
    program = enter(by=(*unshare("--mount"), "sh", "-c", script, "sh"))
    works(program)
    ends(program)


@needs_root
def test_as_a_user_who_is_not_root(enter, place):
    """What takes root is not tried; no_new_privs, Landlock and the filter need none."""
    user = a_user()
    who = ("setpriv", "--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups")
    try:
        done = subprocess.run([*who, sys.executable, "-c", "import kore"], capture_output=True, cwd=ROOT, check=False)
    except FileNotFoundError:
        pytest.skip("setpriv(1) is not installed")
    if done.returncode:
        pytest.skip(f"{user.pw_name} may not run {sys.executable}")
    program = enter(by=who)
    works(program, name=UNREADABLE)
    told_once(program, r"no pidfile: pidfile .*: Permission denied")
    for pid in children(program.pid):
        assert status(pid)["Uid"].split() == [str(user.pw_uid)] * 4
        assert status(pid)["Seccomp"] == "2"
    ends(program)
    (place / "app" / "app.py").unlink()
    program = enter(by=who, options=f"kore.config.deployment = 'docker'\nkore.config.runas = {user.pw_name!r}")
    wait_until(lambda: program.process.poll() is not None, "it does not start")
    assert program.wait() == 1
    assert re.search(r"^kore: cannot chroot .* and switch to user .*: not root .*-n -r", program.err)
