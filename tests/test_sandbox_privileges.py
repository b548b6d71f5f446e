"""What workers are left with: the kernel says who they are, where they live, what they may; none gets anything back."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from kore.errors import SandboxError, StartError
from kore.process import ahead
from kore.sandbox import privileges
from kore.sandbox.confinement import Confinement
from kore.sandbox.privileges import Identity, Rights
from tests.engines import ENGINES, skip_unconfined
from tests.http_server_harness import GET, request
from tests.privileges_harness import (
    CAPABILITY_SETS,
    a_user,
    confined,
    limits,
    needs_root,
    options,
    refusal,
    root_directory,
    status,
)
from tests.support import alive, children, http_get, open_files, pids_of, starter, wait_until

BACK = """
import ctypes

def attempts():
    libc = ctypes.CDLL(None, use_errno=True)
    def tried(call):
        try:
            call()
        except OSError as error:
            return error.strerror
        return "done"
    yield "setresuid", tried(lambda: os.setresuid(0, 0, 0))
    yield "seteuid", tried(lambda: os.seteuid(0))
    yield "setgroups", tried(lambda: os.setgroups([0]))
    yield "setresgid", tried(lambda: os.setresgid(0, 0, 0))
    yield "chroot", tried(lambda: os.chroot("/"))
    yield "securebits", libc.prctl(27, 0, 0, 0, 0)
    yield "unlock", libc.prctl(28, 0, 0, 0, 0)
    yield "new_privs", libc.prctl(38, 0, 0, 0, 0)
    yield "ambient", libc.prctl(47, 2, 0, 0, 0)
    yield "dumpable", libc.prctl(3, 0, 0, 0, 0)
    import resource
    def raise_limit(which):
        soft, hard = resource.getrlimit(which)
        try:
            resource.setrlimit(which, (soft, hard + 1))
        except ValueError:
            return "refused"
        return "done"
    yield "files", raise_limit(resource.RLIMIT_NOFILE)
    yield "core", raise_limit(resource.RLIMIT_CORE)
    signal = ctypes.c_int(0)
    libc.prctl(2, ctypes.byref(signal), 0, 0, 0)
    yield "pdeathsig", signal.value

@kore.route("/back", domain=home, methods=["get"])
def back(req):
    import json
    req.response(200, json.dumps(dict(attempts())).encode())

class App:
    def seccomp(self, s):
        s.bpf_stmt(0x06, 0x7fff0000)  # all calls: what is left must hold without the filter

koreapp = App()
"""
"""A handler that tries to get rights back, and tells how each attempt ended."""


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture
def inside(engine):
    """The engine, where its workers are in the sandbox."""
    skip_unconfined(engine)
    return engine


@pytest.fixture
def start(tmp_path):
    with starter(tmp_path) as programs:
        yield functools.partial(programs.serve, deployment="docker", workers=1)


def is_confined(pid: int, root: Path) -> None:
    """The process has the user, its root and nothing else."""
    user = a_user()
    found = status(pid)
    assert found["Uid"].split() == [str(user.pw_uid)] * 4
    assert found["Gid"].split() == [str(user.pw_gid)] * 4
    assert found["Groups"].split() == [str(user.pw_gid)]
    assert [int(found[name], 16) for name in CAPABILITY_SETS] == [0] * 5
    assert found["NoNewPrivs"] == "1"
    assert os.readlink(f"/proc/{pid}/root") == str(root)
    assert os.readlink(f"/proc/{pid}/cwd") == str(root)
    # proc(5): the files of a process that may not be dumped belong to root.
    assert os.stat(f"/proc/{pid}/environ").st_uid == 0


@pytest.fixture
def public_directory():
    """A directory that other users may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@needs_root
def test_every_worker_is_left_with_a_user_a_root_and_nothing_else(tmp_path, inside):
    with confined(tmp_path, inside, workers=2) as server:
        for pid in pids_of(server.program):
            is_confined(pid, tmp_path / "root")
        assert server.ask(GET).body == b"hello"
        server.program.signal(signal.SIGTERM)
        assert server.program.wait() == 0, server.program.out
        assert "goodbye" in server.program.out


@needs_root
def test_a_worker_that_replaces_a_dead_one_is_as_confined(tmp_path, inside):
    with confined(tmp_path, inside) as server:
        os.kill(server.pid, signal.SIGKILL)
        again = int(server.program.wait_for(r"worker 1 serves again, pid (\d+)")[1])
        assert again != server.pid
        is_confined(again, tmp_path / "root")
        assert server.ask(GET).body == b"hello"


@needs_root
def test_nothing_is_got_back(tmp_path, inside):
    with confined(tmp_path, inside, BACK) as server:
        found = server.ask(request("/back"))
        assert found.status == 200
        refused = "Operation not permitted"
        assert json.loads(found.body) == {
            "setresuid": refused, "seteuid": refused, "setgroups": refused, "setresgid": refused, "chroot": refused,
            "securebits": privileges.SECUREBITS, "unlock": -1, "new_privs": -1, "ambient": -1, "dumpable": 0,
            "files": "refused", "core": "refused", "pdeathsig": signal.SIGKILL,
        }  # fmt: skip


@needs_root
def test_limits_of_a_worker(tmp_path, inside):
    mine = limits(os.getpid())
    with confined(tmp_path, inside) as server:
        found = limits(server.pid)
        assert found["Max core file size"] == ("0", "0")
        assert found["Max open files"][0] == found["Max open files"][1]
        assert int(found["Max open files"][0]) >= 768
        assert found["Max locked memory"] == mine["Max locked memory"]
        assert found["Max processes"] == mine["Max processes"]  # it counts threads, which a worker has


@needs_root
def test_the_parent_keeps_what_it_needs_to_start_workers_and_no_more(tmp_path, inside):
    with confined(tmp_path, inside) as server:
        found = status(server.program.pid)
        wanted = {
            privileges.CAP_DAC_OVERRIDE, privileges.CAP_KILL, privileges.CAP_SETGID, privileges.CAP_SETUID,
            privileges.CAP_SETPCAP, privileges.CAP_SYS_CHROOT, privileges.CAP_SYS_PTRACE,
        }  # fmt: skip
        mask = sum(1 << number for number in wanted)
        have = privileges._capget()[1]
        assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == int(found["CapBnd"], 16) == mask & have
        assert int(found["CapInh"], 16) == int(found["CapAmb"], 16) == 0
        assert found["NoNewPrivs"] == "1"


@needs_root
def test_a_worker_dies_with_its_parent_though_it_changed_its_user(tmp_path, engine):
    with confined(tmp_path, engine, "def kore_worker_configure():\n    pass\n") as server:
        os.kill(server.program.pid, signal.SIGKILL)
        wait_until(lambda: not alive(server.pid), "the worker ends")


@needs_root
def test_descriptors_that_the_server_was_started_with_end_at_the_worker(tmp_path, inside):
    root = root_directory(tmp_path)
    with socket.socket(socket.AF_UNIX) as stray, starter(tmp_path) as programs:
        os.set_inheritable(stray.fileno(), True)
        number = stray.fileno()
        original = subprocess.Popen
        handed = functools.partial(original, pass_fds=[number])
        subprocess.Popen = handed
        try:
            program = programs.serve(options=options(root), deployment="docker", workers=1, io=inside)
        finally:
            subprocess.Popen = original
        name = os.readlink(f"/proc/self/fd/{number}")

        assert name in open_files(program.pid), "this test hands nothing over"
        assert name not in open_files(pids_of(program)[0])


@needs_root
def test_without_a_sandbox_root_and_user_change_all_the_same(tmp_path, engine):
    with confined(tmp_path, engine, "", "kore.config.sandbox = 'no'") as server:
        found = status(server.pid)
        assert found["Uid"].split() == [str(a_user().pw_uid)] * 4
        assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == 0  # the kernel sees to that, capabilities(7)
        assert int(found["CapBnd"], 16) != 0
        assert found["NoNewPrivs"] == "0"
        assert os.readlink(f"/proc/{server.pid}/root") == str(tmp_path / "root")


@pytest.mark.parametrize(
    ("deployment", "lines", "environment", "on"),
    [
        ("dev", "", {}, False),
        ("dev", "kore.config.sandbox = True", {}, True),
        ("dev", "", {"KORE_SANDBOX": "yes"}, True),
        ("docker", "", {}, True),
        ("docker", "kore.config.sandbox = False", {}, False),
        ("docker", "", {"KORE_SANDBOX": "no"}, False),
        ("docker", "kore.config.sandbox = True", {"KORE_SANDBOX": "no"}, False),
    ],
)
def test_when_the_sandbox_is_on(start, deployment, lines, environment, on):
    program = start("", "-rn", deployment=deployment, options=lines, environment=environment)
    assert status(pids_of(program)[0])["NoNewPrivs"] == str(int(on))
    assert status(program.pid)["NoNewPrivs"] == str(int(on))


def test_a_wrong_word_for_the_sandbox_is_one_line(start):
    assert "KORE_SANDBOX=perhaps: neither yes nor no" in refusal(
        start(deployment="dev", wait=False, environment={"KORE_SANDBOX": "perhaps"})
    )


@needs_root
def test_root_that_names_nobody_does_not_start_a_server_for_the_public(start):
    err = refusal(start(wait=False))
    assert "deployment docker was started as root, and no user is named to switch to" in err
    assert "kore.config.runas, or -r to stay root" in err
    assert "user root is root itself" in refusal(start(options="kore.config.runas = 'root'", wait=False))


@needs_root
def test_root_that_stays_root_has_no_capabilities(start):
    program = start("", "-r")
    program.wait_for("the workers stay root, without capabilities")
    found = status(pids_of(program)[0])
    assert found["Uid"].split() == ["0"] * 4
    assert [int(found[name], 16) for name in CAPABILITY_SETS] == [0] * 5
    assert http_get(program.address).endswith(b"hello")


@needs_root
def test_an_unset_deployment_of_root_serves_without_capabilities_and_says_so(tmp_path):
    with starter(tmp_path) as programs:
        text = "import kore\nkore.config.workers = 1\nkore.server('s', path='sock', tls=False)\nkore.domain('*')\n"
        program = programs.app(text)
        program.wait_for("the workers stay root, without capabilities: name a user with kore.config.runas")
        found = status(pids_of(program)[0])
        assert [int(found[name], 16) for name in CAPABILITY_SETS] == [0] * 5


@needs_root
@pytest.mark.parametrize(
    ("arguments", "chroot", "switched"),
    [((), True, True), (("-n",), False, True), (("-r",), True, False), (("-rn",), False, False)],
)
def test_the_command_line_comes_before_the_deployment(tmp_path, start, arguments, chroot, switched):
    root = root_directory(tmp_path)
    program = start("", *arguments, options=options(root))
    pid = pids_of(program)[0]
    assert os.readlink(f"/proc/{pid}/root") == (str(root) if chroot else "/")
    assert os.readlink(f"/proc/{pid}/cwd") == str(root)
    assert (status(pid)["Uid"].split()[0] != "0") is switched


@needs_root
@pytest.mark.parametrize(
    ("steps", "chroot", "switched"), [(["chroot"], False, True), (["runas"], True, False)]
)
def test_the_application_skips_a_step_for_its_workers(tmp_path, start, steps, chroot, switched):
    root = root_directory(tmp_path)
    program = start("", options=f"{options(root)}\nkore.privsep('worker', skip={steps})")
    pid = pids_of(program)[0]
    assert os.readlink(f"/proc/{pid}/root") == (str(root) if chroot else "/")
    assert (status(pid)["Uid"].split()[0] != "0") is switched


@needs_root
def test_without_a_root_the_current_directory_is_it(tmp_path, start):
    tmp_path.chmod(0o755)
    program = start(options=options())
    assert os.readlink(f"/proc/{pids_of(program)[0]}/root") == str(tmp_path)


@needs_root
@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("kore.config.runas = 'no-such-user'", "user 'no-such-user': there is no such user"),
        ("kore.config.runas = 4294967290", "user '4294967290': there is no such user"),
        ("kore.config.root = 'missing'", "root {here}/missing of the worker processes: no such directory"),
        ("kore.config.root = 'app.py'", "root {here}/app.py of the worker processes: no such directory"),
    ],
)
def test_what_is_not_there_is_found_before_anything_is_forked(tmp_path, start, lines, reason):
    user = "" if "runas" in lines else options()
    program = start(options=f"{user}\n{lines}", wait=False)
    assert reason.format(here=tmp_path) in refusal(program)
    assert "proc=" not in program.out


UNPRIVILEGED = [
    sys.executable, "-c",
    "import os, sys; os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534); "
    "os.execv(sys.executable, [sys.executable, '-m', 'kore', *sys.argv[1:]])",
]  # fmt: skip
"""kore without root: as itself where this is not root."""

LESS = [
    sys.executable, "-c",
    "import ctypes, os, sys; libc = ctypes.CDLL(None); number = int(sys.argv[1]); "
    "assert libc.prctl(24, number, 0, 0, 0) == 0; "
    "os.execv(sys.executable, [sys.executable, '-m', 'kore', *sys.argv[2:]])",
]  # fmt: skip
"""kore as root without one capability: root gets what the bounding set has, at execve(2)."""


@needs_root
def test_who_is_not_root_is_told_which_options_to_give(public_directory):
    with starter(public_directory) as programs:
        if programs.command(*UNPRIVILEGED, "-v").wait() != 0:
            pytest.skip("another user may not read the folder of this project")
        (public_directory / "app.py").write_text(
            "import kore\nkore.config.deployment = 'docker'\nkore.config.runas = 'daemon'\n"
            "kore.server('s', ip='127.0.0.1', port='0', tls=False)\nkore.domain('*')\n"
        )
        err = refusal(programs.command(*UNPRIVILEGED, "app.py"))
        assert f"cannot chroot to {public_directory} and switch to user daemon: " in err
        assert "not root (no CAP_SYS_CHROOT, CAP_SETGID, CAP_SETUID)" in err
        assert "with -n -r to go without" in err
        only = refusal(programs.command(*UNPRIVILEGED, "-n", "app.py"))
        assert "cannot switch to user daemon: not root (no CAP_SETGID, CAP_SETUID)" in only
        program = programs.command(*UNPRIVILEGED, "-rn", "app.py")
        assert status(pids_of(program)[0])["NoNewPrivs"] == "1"


@needs_root
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (privileges.CAP_SYS_CHROOT, "cannot chroot to {root}: root here lacks CAP_SYS_CHROOT"),
        (privileges.CAP_SETUID, "cannot switch to user {user}: root here lacks CAP_SETUID"),
        (privileges.CAP_SETGID, "cannot switch to user {user}: root here lacks CAP_SETGID"),
    ],
)
def test_root_without_a_capability_is_told_which(tmp_path, number, reason):
    root = root_directory(tmp_path)
    (tmp_path / "app.py").write_text(
        f"import kore\nkore.config.deployment = 'docker'\n{options(root)}\nkore.server('s', path='s', tls=False)\n"
    )
    with starter(tmp_path) as programs:
        err = refusal(programs.command(*LESS, str(number), "app.py"))
    assert reason.format(root=root, user=a_user().pw_name) in err


@needs_root
def test_root_that_may_not_change_the_bounding_set_is_confined_as_far_as_it_goes(tmp_path):
    root = root_directory(tmp_path)
    (tmp_path / "app.py").write_text(
        f"import kore\nkore.config.deployment = 'docker'\nkore.config.workers = 1\n{options(root)}\n"
        "kore.server('s', path='s', tls=False)\nkore.domain('*')\n"
    )
    with starter(tmp_path) as programs:
        program = programs.command(*LESS, str(privileges.CAP_SETPCAP), "app.py")
        pid = pids_of(program)[0]
        found = status(pid)
        assert found["NoNewPrivs"] == "1"
        assert int(found["CapPrm"], 16) == int(found["CapEff"], 16) == 0


@needs_root
def test_check_says_where_workers_would_live(tmp_path, start):
    root = root_directory(tmp_path)
    program = start("", "--check", options=options(root), wait=False)
    assert program.wait() == 0
    assert re.search(rf"^workers live in += {root} by chroot as user {a_user().pw_name} ", program.out, re.MULTILINE)
    assert re.search(r"^sandbox += yes ", program.out, re.MULTILINE)


@needs_root
def test_a_step_that_fails_in_a_worker_stops_the_server_and_is_named(tmp_path, start):
    """The root goes away between the start and a restart: no worker is left unconfined."""
    root = root_directory(tmp_path)
    program = start(options=options(root))
    root.rename(tmp_path / "elsewhere")
    os.kill(pids_of(program)[0], signal.SIGKILL)
    assert program.wait() == 1
    assert f"worker 1 cannot be confined: chroot to {root}: No such file or directory (errno 2)" in program.out
    assert children(program.pid) == []


def in_a_child(call) -> int:
    """The exit code of a forked process that does `call`: 0, or 3 for a SandboxError."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            call()
            code = 0
        except SandboxError as error:
            os.write(2, f"{error}\n".encode())
            code = 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@needs_root
@pytest.mark.parametrize(
    ("rights", "step"),
    [
        (Rights(root="/nonexistent", chroot=True), "chroot to /nonexistent: No such file or directory"),
        (Rights(root="/nonexistent"), "change to the directory /nonexistent: No such file or directory"),
        (Rights(identity=Identity("x", 2**32 - 2, 5), confined=False), ""),
    ],
)
def test_an_error_names_its_step(rights, step, capfd):
    code = in_a_child(lambda: privileges.give_up(rights))
    assert code == (3 if step else 0)
    assert step in capfd.readouterr().err


@needs_root
def test_a_user_switch_that_is_refused_names_its_step(capfd):
    def call():
        user = privileges.resolve(a_user().pw_name)
        privileges.give_up(Rights(identity=user))
        privileges.give_up(Rights(identity=Identity("root", 0, 0)))

    assert in_a_child(call) == 3
    assert "set the groups to 0 (user root): Operation not permitted (errno 1)" in capfd.readouterr().err


def test_without_root_everything_else_is_given_up():
    """As a user: no step needs more than that, and no_new_privs and the empty sets hold."""

    def call():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresuid(*[a_user().pw_uid] * 3)
        libc = ctypes.CDLL(None)
        libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: what a change of the user takes away by itself
        privileges.give_up(Rights())
        assert libc.prctl(3, 0, 0, 0, 0) == 0
        found = status(os.getpid())
        assert found["NoNewPrivs"] == "1"
        assert [int(found[name], 16) for name in CAPABILITY_SETS if name != "CapBnd"] == [0] * 4

    assert in_a_child(call) == 0


@needs_root
def test_a_process_that_may_have_no_children_has_none():
    """For the kinds of process that have neither threads nor programs; root is exempt, so it takes another user."""

    def call():
        privileges.give_up(Rights(identity=privileges.resolve(a_user().pw_name), processes_max=0))
        with pytest.raises(BlockingIOError):
            os.fork()

    assert in_a_child(call) == 0


@needs_root
def test_what_fails_with_the_rights_of_a_worker_is_found_before_there_is_one(public_directory):
    """What the kernel gives root it may refuse the user: a ring, for one (kernel.io_uring_disabled)."""
    identity = privileges.resolve(a_user().pw_name)
    mine = Confinement(process="worker", on=True, rights=Rights(identity=identity, root=str(public_directory)))
    assert ahead.try_as_worker(mine, lambda: os.listdir(".")) is None
    assert ahead.try_as_worker(mine, lambda: os.mkdir("x")) == "[Errno 13] Permission denied: 'x'"
    assert ahead.try_as_worker(mine, lambda: os._exit(7)) == "the process that tried it ended with 7"
    assert ahead.try_as_worker(Confinement(process="worker", on=False), lambda: os._exit(7)) is None
    gone = replace(mine, rights=Rights(root="/nonexistent", chroot=True))
    with pytest.raises(StartError, match="chroot to /nonexistent: No such file"):
        ahead.try_as_worker(gone, lambda: None)


@needs_root
@pytest.mark.parametrize(
    ("mode", "owner", "confined", "user", "enters"),
    [
        (0o755, "root", True, True, True),
        (0o750, "root", True, True, False),
        (0o711, "root", True, True, False),  # entered, not listed
        (0o700, "user", True, True, True),
        (0o075, "user", True, True, False),  # the owner's bits count for the owner
        (0o700, "user", True, False, False),  # root without capabilities is a user like others
        (0o700, "user", False, False, True),
    ],
)
def test_which_folders_a_worker_may_import_from(public_directory, mode, owner, confined, user, enters):
    found = a_user()
    inner = public_directory / "inner"
    inner.mkdir()
    if owner == "user":
        os.chown(inner, found.pw_uid, found.pw_gid)
    inner.chmod(mode)
    identity = privileges.resolve(found.pw_name) if user else None
    assert ahead._may_enter(str(inner), Rights(identity=identity, confined=confined)) is enters


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "prctl", None)
    with pytest.raises(SandboxError, match=r"python-prctl: .*pip install 'kore\[sandbox\]'.*config.sandbox = 'no'"):
        privileges.prepare()


def test_users_are_found_by_name_and_by_number():
    user = a_user()
    wanted = Identity(user.pw_name, user.pw_uid, user.pw_gid)
    assert privileges.resolve(user.pw_name) == privileges.resolve(str(user.pw_uid)) == wanted


def test_every_capability_the_kernel_has_is_dropped_by_number():
    """python-prctl knows those of its headers; the kernel's last one may be newer, and must go too."""
    if os.geteuid() != 0:
        pytest.skip("not root: the bounding set cannot be changed")
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())

    def call():
        privileges.give_up(Rights())
        libc = ctypes.CDLL(None)
        assert [libc.prctl(23, number, 0, 0, 0) for number in range(last + 1)] == [0] * (last + 1)

    assert in_a_child(call) == 0
