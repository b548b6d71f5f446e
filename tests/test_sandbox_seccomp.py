"""The ``kore.seccomp`` object: its rules as programs, and as real calls of real processes."""

from __future__ import annotations

import errno
import signal

import pytest

import kore
from kore.sandbox import policy, seccomp
from kore.sandbox.machine import AARCH64, X86_64, number_of
from kore.sandbox.program import assemble
from kore.sandbox.rules import ALLOW, LOG, refuse
from tests import bpf
from tests.sandbox_harness import confined, values

pytest.importorskip("pyseccomp")

DEFAULT = refuse(errno.ENOSYS)


@pytest.fixture
def s():
    return seccomp.new_seccomp(X86_64)


def decide(s, call, *arguments):
    return bpf.run(assemble(seccomp.parts_of(s), DEFAULT, X86_64), number_of(call, X86_64), arguments)


def test_it_is_the_type_of_the_reference():
    assert kore.pyseccomp is seccomp.Seccomp
    assert repr(kore.pyseccomp) == "<class 'kore.seccomp'>"
    with pytest.raises(TypeError, match=r"cannot create 'kore\.seccomp' instances"):
        kore.pyseccomp()


def test_all_methods_return_none(s):
    calls = [
        s.allow("mkdir"), s.allow_arg("mkdir", 1, 2), s.allow_flag("mkdir", 1, 2), s.allow_mask("mkdir", 1, 2),
        s.deny("mkdir"), s.deny("mkdir", errno=1), s.deny_arg("mkdir", 1, 2), s.deny_flag("mkdir", 1, 2),
        s.deny_mask("mkdir", 1, 2), s.log("mkdir"), s.bpf_stmt(6, 0),
    ]  # fmt: skip
    assert calls == [None] * 11


def test_allow_and_deny(s):
    s.allow("mkdir")
    s.deny("rmdir")
    s.deny("rename", errno=errno.EROFS)
    s.deny("link", errno.ENOSPC)
    s.deny("symlink", errno="nonsense")
    s.deny("creat", errno=0)
    s.log("unlink")
    calls = ("mkdir", "rmdir", "rename", "link", "symlink", "creat", "unlink", "mknod")
    assert [decide(s, call) for call in calls] == [
        ALLOW, refuse(errno.EACCES), refuse(errno.EROFS), refuse(errno.ENOSPC), refuse(errno.EACCES), refuse(0), LOG,
        DEFAULT,
    ]  # fmt: skip


def test_an_allowed_argument_is_compared_whole(s):
    s.allow_arg("lseek", 1, 5)
    assert [decide(s, "lseek", 0, value) for value in (5, 1 << 32 | 5, 4)] == [ALLOW, DEFAULT, DEFAULT]


def test_a_negative_argument_is_allowed_as_an_int_and_as_a_long_and_as_nothing_else(s):
    """AT_FDCWD reaches the kernel as 0xffffff9c or with all bits above it, as the C library likes."""
    s.allow_arg("mkdirat", 0, -100)
    forms = (0xFFFFFF9C, 0xFFFFFFFFFFFFFF9C, 0x1FFFFFF9C, 100)
    assert [decide(s, "mkdirat", value) for value in forms] == [ALLOW, ALLOW, DEFAULT, DEFAULT]


@pytest.mark.parametrize("high", [0, 1 << 32, 0xFFFFFFFF << 32])
def test_a_deny_cannot_be_walked_around_with_high_bits(s, high):
    s.deny_arg("getpriority", 0, 10)
    s.deny_arg("getpriority", 1, -5, errno=2)
    s.deny_flag("getpriority", 2, 6, errno=3)
    s.deny_mask("getpriority", 3, 0x30, errno=4)
    assert decide(s, "getpriority", high | 10) == refuse(errno.EACCES)
    assert decide(s, "getpriority", 0, high | 0xFFFFFFFB, 0, 1) == refuse(2)
    assert decide(s, "getpriority", 0, 0, high | 7, 1) == refuse(3)
    assert decide(s, "getpriority", 0, 0, 2, high | 0x20) == refuse(4)
    assert decide(s, "getpriority", 0, 0, 2, high | 1) == DEFAULT


def test_a_deny_of_more_than_an_int_is_compared_whole(s):
    s.deny_arg("lseek", 1, 1 << 32 | 7)
    assert [decide(s, "lseek", 0, value) for value in (1 << 32 | 7, 7)] == [refuse(errno.EACCES), DEFAULT]


def test_flags_and_masks(s):
    s.allow_flag("madvise", 1, 6)
    s.allow_mask("msync", 1, 6)
    assert [decide(s, "madvise", 0, value) for value in (6, 7, 1 << 40 | 6, 4, 2, 0)] == [
        ALLOW, ALLOW, ALLOW, DEFAULT, DEFAULT, DEFAULT,
    ]  # fmt: skip
    assert [decide(s, "msync", 0, value) for value in (0, 2, 4, 6, 7, 1, 1 << 40)] == [
        ALLOW, ALLOW, ALLOW, ALLOW, DEFAULT, DEFAULT, DEFAULT,
    ]  # fmt: skip


def test_raw_statements(s):
    """LD args[0]; RET that: whatever stands there is done."""
    s.deny("rmdir")
    s.bpf_stmt(0x20, 16)
    s.bpf_stmt(0x16, 0)
    assert decide(s, "rmdir") == refuse(errno.EACCES)
    assert decide(s, "mkdir", 0x7FFF0000) == 0x7FFF0000


METHODS = ("allow", "deny", "log", "allow_arg", "allow_flag", "allow_mask", "deny_arg", "deny_flag", "deny_mask")


@pytest.mark.parametrize("method", METHODS)
def test_unknown_names_are_a_runtime_error(s, method):
    arguments = () if method in METHODS[:3] else (0, 0)
    for name in ("nonsense", "", "mkdir ", "Mkdir", "a\0b", "é", "\udc80", "mkdir\0"):
        with pytest.raises(RuntimeError, match="there is no system call .* anywhere"):
            getattr(s, method)(name, *arguments)
    with pytest.raises(TypeError):
        getattr(s, method)(b"mkdir", *arguments)
    assert seccomp.parts_of(s) == ()


def test_a_name_of_another_machine_is_a_runtime_error_that_says_so(s):
    with pytest.raises(RuntimeError, match="there is no system call 'open' on aarch64"):
        seccomp.new_seccomp(AARCH64).allow("open")
    with pytest.raises(RuntimeError, match="anywhere|on x86_64"):
        s.allow("_llseek")


@pytest.mark.parametrize("name", sorted(policy.DANGEROUS))
def test_what_opens_the_sandbox_must_be_meant(s, name):
    if number_of(name, X86_64) is None:
        pytest.skip(f"x86-64 has no {name}")
    for allow in (s.allow, s.log):
        with pytest.raises(RuntimeError, match=rf"allowing {name} opens the sandbox.*dangerous=True"):
            allow(name)
    for allow_arg in (s.allow_arg, s.allow_flag, s.allow_mask):
        with pytest.raises(RuntimeError, match="dangerous=True"):
            allow_arg(name, 0, 1)
    assert seccomp.parts_of(s) == ()
    s.deny(name)
    s.deny_arg(name, 0, 1)
    s.allow(name, dangerous=True)
    s.allow_arg(name, 0, 1, dangerous=True)


@pytest.mark.parametrize("idx", [-1, 6, 1 << 40, "0", 1.0, None, True])
def test_there_are_six_arguments(s, idx):
    for method in METHODS[3:]:
        with pytest.raises(ValueError, match="arguments 0 to 5"):
            getattr(s, method)("mkdir", idx, 1)


def test_values_beyond_a_register_and_errnos_beyond_the_kernels_are_refused(s):
    for method in METHODS[3:]:
        for value in (1 << 64, -(1 << 63) - 1):
            with pytest.raises(ValueError, match="no number of 64 bits"):
                getattr(s, method)("mkdir", 0, value)
    for number in (-1, 4096):
        with pytest.raises(ValueError, match="from 0 to 4095"):
            s.deny("mkdir", errno=number)


@pytest.mark.parametrize(("code", "k"), [(0x28, 0), (-1, 0), ("6", 0), (6, -1), (6, 1 << 32), (6, "0"), (0x20, None)])
def test_raw_statements_that_there_are_not(s, code, k):
    with pytest.raises(ValueError, match="bpf_stmt"):
        s.bpf_stmt(code, k)


# The same in real processes.


def test_the_first_rule_that_matches_decides_in_the_kernel_too():
    rules = """
    s.deny("getuid", errno=errno.EPERM)
    s.allow("getuid")
    s.deny_arg("getpriority", 0, 1, errno=errno.ENOSPC)
    s.deny_arg("getpriority", 1, 7, errno=errno.EDOM)
    s.deny_flag("getpriority", 1, 0x30, errno=errno.EXDEV)
    s.allow_mask("getpriority", 1, 0x0f)
    s.deny("getpriority", errno=errno.EROFS)
    """
    body = """
    call("getuid")
    call("getpriority", 1, 7)
    call("getpriority", 0, 7)
    call("getpriority", 1 << 32 | 1, 0)
    call("getpriority", 2, 0x31)
    call("getpriority", 9, 0x05)
    call("getpriority", 2, 0x11)
    """
    assert values(body, rules) == ["EPERM", "ENOSPC", "EDOM", "ENOSPC", "EXDEV", "EINVAL", "EROFS"]


def test_an_application_overrules_the_platform_both_ways(tmp_path):
    directory = str(tmp_path / "made")
    body = f"""
    call("mkdir", {directory.encode()!r}, 0o700)
    call("rmdir", {directory.encode()!r})
    call("uname", 0)
    """
    assert values(body, 's.allow("mkdir"); s.deny("uname")') == [0, "ENOSYS", "EACCES"]


def test_a_raw_return_in_front_allows_everything():
    assert values('call("mkdir", 0, 0)\ncall("rmdir", 0)', "s.bpf_stmt(0x06, 0x7fff0000)") == ["EFAULT", "EFAULT"]


def test_allowing_what_is_deadly_takes_it_off_the_list():
    assert values('call("chroot", 0)', 's.allow("chroot", dangerous=True)') == ["EFAULT"]


def test_the_filter_holds_for_threads_that_were_there_before_and_come_after():
    before = """
    go, seen = threading.Event(), []
    def ask():
        go.wait()
        seen.append(call("rmdir", 0))
    old = threading.Thread(target=ask)
    old.start()
    """
    body = """
    go.set()
    old.join()
    young = threading.Thread(target=ask)
    young.start()
    young.join()
    print(*seen)
    """
    assert confined(body, before=before).said == ["ENOSYS ENOSYS"]


def test_a_deadly_call_is_heard_of_with_its_arguments_and_never_made(tmp_path):
    ran = tmp_path / "ran"
    body = f"""
    print("before")
    os.execv("/bin/sh", ["sh", "-c", "touch {ran}"])
    print("after")
    """
    found = confined(body)
    assert found.said == ["before"]
    (heard,) = found.heard
    assert heard.startswith('execve("/bin/sh", 0x')
    assert found.status == signal.SIGKILL
    assert not ran.exists()


def test_the_process_keeps_no_listener():
    """With one it could answer for itself."""
    body = """
    print([os.readlink(f"/proc/self/fd/{fd}") for fd in range(64) if os.path.exists(f"/proc/self/fd/{fd}")])
    print(any(notification.is_listener(fd) for fd in range(1024)))
    """
    assert confined(body).said[-1] == "False"


def test_where_there_is_a_listener_already_deadly_calls_kill_without_a_word():
    """Some containers watch their processes so; there is one listener for a process, and it is theirs."""
    before = """
    from kore.sandbox.program import assemble
    from kore.sandbox.rules import ALLOW, NOTIFY, Rule
    fd = seccomp.install(assemble([Rule("rmdir", NOTIFY)], ALLOW, this_machine()), listener=True)
    socket.send_fds(theirs, [b"x"], [fd])
    """
    found = confined('print(call("mkdir", 0, 0))\ncall("ptrace", 0)\nprint("alive")', before=before)
    assert found.said == ["ENOSYS"]
    assert not found.heard
    assert found.status & 0x7F == signal.SIGSYS


def test_tracing_tells_of_everything_that_is_not_allowed_and_lets_it_go_on(tmp_path):
    directory = str(tmp_path / "made")
    body = f"""
    os.mkdir({directory!r})
    print(call("getpid") == os.getpid(), call("chroot", 0), call("prctl", 999, 0, 0, 0, 0), call("clone3", 0, 0))
    """
    found = confined(body, tracing=True, answer="notification.go_on(fds[0], found)")
    assert found.said == ["True EFAULT EINVAL ENOSYS"]
    assert found.heard == [f'mkdir("{directory}", 0777)', "chroot(NULL)", "prctl(999, 0, 0, 0, 0)"]
    assert found.status == 0
    assert (tmp_path / "made").is_dir()


def test_tracing_leaves_the_applications_own_denials_alone():
    found = confined('print(call("mkdir", 0, 0))', 's.deny("mkdir", errno=errno.EROFS)', tracing=True)
    assert found.said == ["EROFS"]
    assert not found.heard
