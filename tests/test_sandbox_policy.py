"""The table of a worker's system calls: what it says is so, and each attack on a worker fails where it should."""

from __future__ import annotations

import errno
import platform
import signal

import pytest

from kore.sandbox import policy
from kore.sandbox.machine import AARCH64, X86_64, known_anywhere, number_of
from kore.sandbox.policy import Features
from kore.sandbox.program import INSTRUCTIONS_MAX, assemble
from kore.sandbox.rules import ALLOW, KILL_PROCESS, NOTIFY, refuse
from tests import bpf
from tests.sandbox_harness import confined, values

pytest.importorskip("pyseccomp")

FULL = Features(files=True, write=True, connect=True, resolver=True)
MACHINES = [pytest.param(machine, id=machine.name) for machine in (X86_64, AARCH64)]
PID = 4321


def program(features=FULL, machine=X86_64, **options):
    rules = policy.worker_rules(features, PID, deadly=KILL_PROCESS, **options)
    return assemble(rules, policy.default(**options), machine)


def everywhere():
    """Each call that the table names, and the feature or the harm it stands under."""
    for table in (policy.ALLOWED, policy.DEADLY):
        for heading, calls in table.items():
            for call in calls:
                yield call, heading


def test_every_name_is_a_system_call_and_stands_in_one_place():
    names = [call for call, _ in everywhere()]
    assert len(names) == len(set(names))
    unknown = {name for name in (*names, *policy.CONDITIONED, *policy.RINGS) if not known_anywhere(name)}
    # Older than libseccomp's table for these machines, or newer than it; what is not known is not allowed anyway.
    assert unknown <= {"create_module", "nfsservctl", "stime", "lookup_dcookie", "process_mrelease", "quotactl_fd"}
    assert not {name for calls in policy.ALLOWED.values() for name in calls} & unknown


def test_every_allowed_call_says_what_it_is_for():
    assert all(reason.strip() for calls in policy.ALLOWED.values() for reason in calls.values())


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("engine", ["uring", "epoll"])
def test_allowed_calls_are_decided_by_the_kernel_alone(machine, engine):
    """Without a look at arguments, so that seccomp's action cache serves them."""
    features = Features(engine=engine, files=True, write=True, resolver=True)
    ours = program(features, machine)
    for heading in ("always", engine, "files", "write", "resolver"):
        for call in policy.ALLOWED[heading]:
            number = number_of(call, machine)
            if number is not None:
                found = bpf.run(ours, number, audit=machine.audit)
                assert (found, found.looked) == (ALLOW, False), call


@pytest.mark.parametrize("machine", MACHINES)
def test_the_whole_list_is_far_from_what_the_kernel_takes(machine):
    assert len(program(machine=machine)) // 8 < INSTRUCTIONS_MAX // 4
    assert len(program(machine=machine, tracing=True)) // 8 < INSTRUCTIONS_MAX // 4


def test_calls_of_a_feature_are_there_with_it_only():
    bare = program(Features("uring"))
    for heading, calls in policy.ALLOWED.items():
        expected = {ALLOW} if heading in ("always", "uring") else {refuse(errno.ENOSYS), refuse(errno.EACCES)}
        assert {bpf.run(bare, number_of(call, X86_64)) for call in calls} <= expected, heading


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_nowhere_does_not_exist(machine):
    ours = program(machine=machine)
    named = {number_of(call, machine) for call, _ in everywhere()}
    named |= {number_of(call, machine) for call in (*policy.CONDITIONED, *policy.RINGS, "socketpair")}
    decisions = {bpf.run(ours, number, audit=machine.audit) for number in set(range(600)) - named}
    assert decisions == {refuse(errno.ENOSYS)}


def test_tracing_refuses_nothing_that_is_not_expected_to_be_refused():
    traced = program(Features("uring"), tracing=True)
    expected = {"clone3", *policy.RINGS}
    for call in (*policy.CONDITIONED, *(call for calls in policy.DEADLY.values() for call in calls), "socketpair"):
        number = number_of(call, X86_64)
        if number is not None:
            wild = bpf.run(traced, number, [0x7FFFFFFF] * 6)
            assert (wild in (NOTIFY, ALLOW)) is (call not in expected), call
    assert bpf.run(traced, number_of("socket", X86_64), (16, 3, 0)) == refuse(errno.EAFNOSUPPORT)


def test_deadly_calls_are_all_heard_of_by_name():
    calls = sorted(call for calls in policy.DEADLY.values() for call in calls if number_of(call, X86_64) is not None)
    found = confined(
        f"for name in {calls!r}:\n    assert call(name, 0, 0, 0, 0, 0, 0) == 'EBADE', name",
        answer="notification.refuse(fds[0], found, errno.EBADE)",
    )
    assert found.status == 0, found.errors
    assert [text.partition("(")[0] for text in found.heard] == calls


# Attacks. Each line is an expression in a process under the filter of a worker.

ATTACKS = {
    "other processes are not made, with whatever flags": ("""
        call("fork")
        call("vfork")
        call("clone", signal.SIGCHLD, 0, 0, 0, 0)
        call("clone", 0x4000 | 0x100 | signal.SIGCHLD, 0, 0, 0, 0)
        call("clone", 0x3d0f00 & ~0x10000, 0, 0, 0, 0)
        call("clone", 0x3d0f00 | 0x10000000, 0, 0, 0, 0)
        call("clone", 0x3d0f00 | 0x40000000, 0, 0, 0, 0)
        call("clone", 1 << 32 | signal.SIGCHLD, 0, 0, 0, 0)
        """, ["EPERM"] * 8),
    "nor by a call whose flags can't be seen": ('call("clone3", 0, 0)', ["ENOSYS"]),
    "memory is never executable": ("""
        call("mmap", 0, 4096, 7, 0x22, -1, 0)
        call("mmap", 0, 4096, 5, 0x22, -1, 0)
        call("mmap", 0, 4096, 4, 0x22, -1, 0)
        call("mmap", 0, 4096, 1 << 32 | 4, 0x22, -1, 0)
        call("mmap", 0, 4096, 5, 0x02, os.open("/bin/true", os.O_RDONLY), 0)
        call("mprotect", libc_address, 4096, 5)
        call("mprotect", libc_address, 4096, 1 << 32 | 7)
        call("pkey_mprotect", libc_address, 4096, 5, -1)
        call("shmat", 0, 0, 0x8000)
        call("remap_file_pages", libc_address, 4096, 0, 0, 0)
        """, ["EACCES"] * 7 + ["ENOSYS"] * 3),
    "no ring beside its own": ("""
        call("io_uring_setup", 8, ctypes.create_string_buffer(120))
        call("io_uring_register", 3, 0, 0, 0)
        """, ["EPERM"] * 2),
    "signals go nowhere but here": ("""
        call("kill", 1, 0)
        call("kill", os.getppid(), 0)
        call("kill", 1 << 32 | os.getppid(), 0)
        call("kill", 0, 0)
        call("kill", -1, 0)
        call("tgkill", os.getppid(), os.getppid(), 0)
        call("tkill", os.getppid(), 0)
        call("rt_sigqueueinfo", os.getppid(), 0, ctypes.create_string_buffer(128))
        call("pidfd_open", os.getppid(), 0)
        call("pidfd_send_signal", 0, 0, 0, 0)
        call("kill", os.getpid(), 0)
        call("tgkill", os.getpid(), os.getpid(), 0)
        call("fcntl", 0, 8, os.getppid())
        call("fcntl", 0, 10, signal.SIGKILL)
        call("prctl", 1, signal.SIGKILL, 0, 0, 0)
        """, ["EPERM"] * 6 + ["ENOSYS"] * 4 + [0, 0] + ["EPERM"] * 2 + ["EINVAL"]),
    "files are not written to": ("""
        call("openat", -100, b"/dev/null", os.O_WRONLY, 0)
        call("openat", -100, b"/dev/null", os.O_RDWR, 0)
        call("openat", -100, b"/dev/null", 1 << 32 | os.O_RDWR, 0)
        call("openat", -100, b"/dev/null", 3, 0)
        call("openat", -100, b"/proc/self/mem", os.O_RDWR, 0)
        call("openat", -100, b"/tmp", os.O_TMPFILE, 0o600)
        call("openat", -100, b"/tmp/never", os.O_CREAT, 0o600)
        call("openat", -100, b"/dev/null", os.O_TRUNC, 0)
        call("open", b"/dev/null", os.O_RDWR, 0)
        call("open", b"/dev/null", 1 << 32 | os.O_CREAT, 0)
        call("creat", b"/tmp/never", 0o600)
        call("openat2", -100, b"/dev/null", bytes(24), 24)
        call("truncate", b"/tmp/never", 0)
        call("rename", b"/tmp/never", b"/tmp/never2")
        call("unlink", b"/tmp/never")
        call("mkdir", b"/tmp/never", 0)
        call("chmod", b"/tmp/never", 0)
        os.close(os.open("/dev/null", os.O_RDONLY | os.O_DIRECTORY * 0))
        """, ["EACCES"] * 10 + ["ENOSYS"] * 7 + [None]),
    "limits are read and not set": ("""
        call("prlimit64", 0, 7, 0, ctypes.create_string_buffer(16))
        call("prlimit64", os.getpid(), 7, 0, ctypes.create_string_buffer(16))
        call("prlimit64", 0, 7, ctypes.create_string_buffer(16), 0)
        call("prlimit64", os.getppid(), 7, 0, ctypes.create_string_buffer(16))
        call("setrlimit", 7, ctypes.create_string_buffer(16))
        """, [0, 0, "EPERM", "EPERM", "ENOSYS"]),
    "settings of the process stay": ("""
        call("prctl", 4, 1, 0, 0, 0)
        call("prctl", 1 << 32 | 4, 1, 0, 0, 0)
        call("prctl", 8, 1, 0, 0, 0)
        call("prctl", 22, 2, 0, 0, 0)
        call("prctl", 47, 2, 7, 0, 0)
        call("seccomp", 1, 0, 0)
        call("landlock_create_ruleset", 0, 0, 1)
        call("prctl", 15, b"a name", 0, 0, 0)
        """, ["EINVAL"] * 5 + ["ENOSYS"] * 2 + [0]),
    "devices are asked known questions": ("""
        call("ioctl", 0, 0x5412, b"x")
        call("ioctl", 0, 1 << 32 | 0x5412, b"x")
        call("ioctl", 0, 0x541c, b"x")
        call("ioctl", 0, 0x8946, b"x")
        os.isatty(0)
        call("ioctl", socket.socketpair()[0].detach(), 0x5411, ctypes.create_string_buffer(4))
        """, ["ENOTTY"] * 4 + [False, 0]),
    "no connection leads out where none is declared": ("""
        call("socket", socket.AF_INET, socket.SOCK_STREAM, 0)
        call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0)
        call("socket", socket.AF_PACKET, socket.SOCK_RAW, 0)
        call("socket", socket.AF_NETLINK, socket.SOCK_RAW, 0)
        call("connect", 0, 0, 0)
        call("bind", 0, 0, 0)
        call("listen", 0, 0)
        call("socketpair", socket.AF_INET, 1, 0, 0)
        call("socketpair", socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0, 0)
        [sock.close() for sock in socket.socketpair()]
        """, ["EACCES"] * 3 + ["EAFNOSUPPORT", "EACCES", "ENOSYS", "ENOSYS", "EACCES", "EACCES", [None, None]]),
    "no program gets into the kernel by a socket's options": ("""
        call("setsockopt", 0, 1, 26, 0, 0)
        call("setsockopt", 0, 1, 50, 0, 0)
        call("setsockopt", 0, 1, 51, 0, 0)
        call("setsockopt", 0, 1 << 32 | 1, 52, 0, 0)
        call("setsockopt", 0, 6, 31, b"tls", 3)
        call("setsockopt", 0, 0, 64, 0, 0)
        call("setsockopt", 0, 263, 1, 0, 0)
        call("setsockopt", 0, 41, 64, 0, 0)
        call("setsockopt", 0, 1, 2, 0, 4)
        call("setsockopt", 0, 0, 11, 0, 4)
        call("setsockopt", 0, 41, 25, 0, 4)
        call("setsockopt", 0, 41, 26, 0, 4)
        """, ["EPERM"] * 5 + ["ENOPROTOOPT"] * 3 + ["ENOTSOCK"] * 4),
}  # fmt: skip

LIBC_ADDRESS = "libc_address = ctypes.cast(libc.getpid, ctypes.c_void_p).value & ~4095"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="some of the calls are x86-64's own")
@pytest.mark.parametrize("what", ATTACKS)
def test_attacks_fail(what):
    body, expected = ATTACKS[what]
    lines = "\n".join(f"print(repr(({line.strip()})))" for line in body.strip().splitlines())
    found = confined(f"{LIBC_ADDRESS}\n{lines}")
    assert found.status == 0, found
    assert [eval(line) for line in found.said] == expected


def test_connections_are_of_known_kinds():
    body = """
    call("socket", socket.AF_INET, socket.SOCK_STREAM, 0) > 0
    call("socket", socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, socket.IPPROTO_TCP) != "EACCES"
    call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0) > 0
    call("socket", socket.AF_INET, socket.SOCK_DGRAM, 0)
    call("socket", socket.AF_INET, socket.SOCK_STREAM, 262)
    call("socket", socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
    call("socket", socket.AF_INET, 5, socket.IPPROTO_SCTP)
    call("socket", socket.AF_INET, socket.SOCK_RAW, 1)
    call("socket", socket.AF_PACKET, socket.SOCK_RAW, 0)
    call("socket", 1 << 32 | socket.AF_PACKET, socket.SOCK_RAW, 0)
    call("socket", socket.AF_VSOCK, socket.SOCK_STREAM, 0)
    call("socket", socket.AF_ALG, socket.SOCK_SEQPACKET, 0)
    call("socket", socket.AF_NETLINK, socket.SOCK_RAW, 0)
    call("sendto", 0, 0, 0, 0x20000000, 0, 0)
    call("sendto", 0, 0, 0, 0x60004000, 0, 0)
    call("sendmsg", 0, 0, 0x20000000)
    call("sendmsg", 0, 0, 0x40000000)
    """
    expected = [True] * 3 + ["EACCES"] * 9 + ["EAFNOSUPPORT"] + ["ENOTSUP"] * 3 + ["ENOTSOCK"]
    assert values(body, features="connect=True, paths=True") == expected
    body = 'call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0)'
    assert values(body, features="connect=True, resolver=True") == ["EACCES"], "without paths nobody bounds them"
    body = """
    call("socket", socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0) > 0
    call("socket", socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP) > 0
    call("socket", socket.AF_INET, socket.SOCK_DGRAM, 1)
    call("socket", socket.AF_INET, socket.SOCK_DGRAM, 136)
    """
    assert values(body, features="connect=True, resolver=True") == [True, True, "EACCES", "EACCES"]


def test_files_are_written_where_bodies_are_kept_in_files(tmp_path):
    path = str(tmp_path / "body")
    body = f"""
    os.close(os.open({path!r}, os.O_RDWR | os.O_CREAT | os.O_EXCL))
    os.unlink("body", dir_fd=os.open({str(tmp_path)!r}, os.O_RDONLY))
    """
    assert values(body, features="write=True") == [None, None]


def test_python_lives_under_it():
    body = """
    [thread for thread in [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(20)] if thread.start()]
    sum(len(bytearray(size)) for size in (10, 10 ** 5, 10 ** 7, 10 ** 8))
    len([bytes(100) for _ in range(100_000)])
    bytearray(10 ** 6).__iadd__(bytes(10 ** 7)).__len__()
    __import__("concurrent.futures").futures.ThreadPoolExecutor(8).submit(os.getpid).result() == os.getpid()
    len(os.urandom(10)), len(os.listdir("/proc/self")) > 5, os.path.exists("/nowhere"), os.access("/", os.R_OK)
    open("/proc/self/comm").read() != "", os.stat("/").st_mode > 0, os.path.realpath("/proc/self/cwd") == os.getcwd()
    __import__("traceback").format_exc()
    __import__("platform").machine() != ""
    __import__("gc").collect() >= 0
    __import__("resource").getrlimit(7)[0] > 0
    __import__("zoneinfo").ZoneInfo("UTC").key, time.localtime().tm_year > 2000, time.tzset()
    signal.raise_signal(signal.SIGWINCH), signal.signal(signal.SIGUSR1, lambda *_: None) == signal.SIG_DFL
    signal.raise_signal(signal.SIGUSR1), signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    [os.close(fd) for fd in os.pipe()], os.close(os.dup(0)), os.set_inheritable(0, True), os.set_blocking(0, True)
    select.select([], [], [], 0.01), select.poll().poll(1), time.sleep(0.001)
    """
    found = values(body, before="import resource")  # what is compiled must be loaded before
    assert len(found) == 17
    assert found[1] == 10 + 10**5 + 10**7 + 10**8


def test_abort_is_an_abort():
    found = confined("os.abort()")
    assert found.status & 0x7F == signal.SIGABRT
    assert not found.heard


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's other ABIs")
def test_other_abis_are_killed():
    """The x32 numbers of calls that are allowed; and the 32-bit entry, by code that was there before the filter."""
    assert confined('call(0x40000000 | 39)\nprint("alive")').status & 0x7F == signal.SIGSYS
    before = """
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
    entry = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    """
    found = confined('entry()\nprint("alive")', before=before)
    assert found.status & 0x7F in (signal.SIGSYS, signal.SIGSEGV)  # the latter where the kernel has no such entry
    assert not found.said
