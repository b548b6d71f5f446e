"""Which system calls a process may make, by its role and by what the application declared: the table to read.

Four answers to a call. It is *allowed*, perhaps only with certain arguments. It is *refused* with an errno, where a
program has a way to go on without it. It is *deadly*: no worker makes it for an honest reason, so the process that does
is not ours any more and is ended, by name. And what stands nowhere here does not exist: ENOSYS, which is what libraries
expect of a kernel that is older than they are.

Allowed without conditions are calls that act on what the process has already, or only ask; what opens, creates or
changes rights has conditions. Io_uring is not seen here at all: the ring has its own list of operations.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from kore.sandbox.rules import (
    ALLOW,
    KILL_PROCESS,
    NOTIFY,
    Condition,
    Rule,
    is_null,
    refuse,
    word_has_none,
    word_is,
    word_masked_is,
)


@dataclass(frozen=True, slots=True)
class Features:
    """What a worker does, as far as its system calls tell; or a service, which has a list of its own."""

    engine: str = "uring"
    files: bool = False
    """It serves files."""
    write: bool = False
    """It writes files: large bodies of requests, or where sandbox_write names a place. Which ones is Landlock's."""
    connect: bool = False
    """It opens connections: databases, transfers, sandbox_connect. Where to is Landlock's."""
    resolver: bool = False
    """It looks up names, for which it needs UDP."""
    paths: bool = False
    """It connects to sockets that have a path. Which ones is nobody's: neither Landlock nor a filter sees the path."""
    role: str = "worker"
    """"worker", or the name of a service in service_policy.py: of that only `write` matters."""


ALLOWED: Final[Mapping[str, Mapping[str, str]]] = {
    "always": {
        # What is open.
        "read": "pipes, clients", "write": "pipes, logs", "close": "descriptors", "writev": "head and body at once",
        "pread64": "files at a place", "preadv2": "is it in memory already", "lseek": "files",
        "fstat": "sizes of files", "sendfile": "files, large responses", "splice": "files that are on a disk",
        "pipe2": "pipes to splice through", "dup3": "an access log that was opened again",
        "memfd_create": "large responses", "eventfd2": "libcurl, which then says itself that it may not connect",
        # Asking for files; opening them has conditions.
        "newfstatat": "import, files", "stat": "the same in musl", "lstat": "the same in musl",
        "access": "import, files", "faccessat": "the same, aarch64", "faccessat2": "the same as effective user",
        "getdents64": "import", "getcwd": "import",
        "readlink": "real paths", "readlinkat": "the same, aarch64",
        # Memory; what could make it executable has conditions.
        "brk": "malloc", "munmap": "malloc", "mremap": "malloc grows", "madvise": "malloc, stacks of threads",
        # Threads.
        "futex": "locks", "set_robust_list": "start of a thread", "rseq": "start of a thread",
        "gettid": "start of a thread", "sched_getaffinity": "size of a pool of threads",
        "exit": "end of a thread", "exit_group": "the end", "wait4": "end of the spawner",
        # Signals.
        "rt_sigaction": "handlers", "rt_sigprocmask": "start of a thread", "rt_sigreturn": "end of a handler",
        "sigaltstack": "faulthandler", "restart_syscall": "a wait goes on after SIGCONT",
        # Time.
        "clock_gettime": "where the vdso cannot", "gettimeofday": "the same", "clock_getres": "the loop's resolution",
        "clock_nanosleep": "time.sleep", "nanosleep": "the same in musl",
        "poll": "waits in threads", "ppoll": "the same, aarch64", "select": "the same in musl", "pselect6": "the same",
        # Itself. Some of these cannot fail, so that nobody looks whether they did.
        "getpid": "log, title", "getppid": "cannot fail", "getuid": "cannot fail", "geteuid": "cannot fail",
        "getgid": "cannot fail", "getegid": "cannot fail", "getrandom": "hashes, keys, names",
        "uname": "platform, clients", "sysinfo": "sorting in the C library", "getrusage": "metrics",
        # Sockets it has.
        "recvfrom": "clients", "sendto": "channel, clients", "recvmsg": "channel", "sendmsg": "channel",
        "accept4": "clients", "getsockname": "who is it", "getpeername": "who is it",
        "getsockopt": "errors, kinds",
    },
    "uring": {"io_uring_enter": "the one call of the loop"},
    "epoll": {"epoll_wait": "the loop", "epoll_pwait": "the loop, aarch64", "epoll_ctl": "the loop"},
    "files": {"openat2": "files below a root"},
    "write": {
        "flock": "whose file it is", "mkdir": "directories", "mkdirat": "the same, aarch64",
        "unlink": "files go", "unlinkat": "the same", "rmdir": "directories go",
        "rename": "files are put in their place", "renameat": "the same, aarch64",
        "pwrite64": "files at a place", "ftruncate": "files get shorter",
        "fsync": "files stay", "fdatasync": "the same",
    },
    "connect": {"connect": "connections"},
    "resolver": {"sendmmsg": "two questions at once"},
}  # fmt: skip
"""Calls by feature, each with what it is for. Their arguments do not matter, so the kernel decides them at once; but
where connections are opened, flags of those that send are looked at first."""

DEADLY: Final[Mapping[str, tuple[str, ...]]] = {
    "other programs": ("execve", "execveat"),
    "other processes": (
        "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease", "pidfd_getfd",
        "kcmp", "migrate_pages", "move_pages",
    ),
    "other users": (
        "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setfsuid", "setfsgid", "setgroups",
        "capset",
    ),
    "another root": (
        "chroot", "pivot_root", "mount", "umount2", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount",
        "fspick", "mount_setattr", "unshare", "setns", "open_by_handle_at", "name_to_handle_at", "quotactl",
        "quotactl_fd",
    ),
    "the kernel": (
        "init_module", "finit_module", "delete_module", "create_module", "kexec_load", "kexec_file_load", "bpf",
        "perf_event_open", "userfaultfd", "personality", "iopl", "ioperm", "modify_ldt", "lookup_dcookie", "nfsservctl",
    ),
    "keys": ("add_key", "request_key", "keyctl"),
    "the machine": (
        "reboot", "swapon", "swapoff", "acct", "syslog", "vhangup", "sethostname", "setdomainname", "settimeofday",
        "stime", "clock_settime", "adjtimex", "clock_adjtime",
    ),
}  # fmt: skip
"""Calls that end the process, by what they reach for."""

RINGS: Final = ("io_uring_setup", "io_uring_register")
"""A ring does what this filter forbids (process notes, 26.1), so there is none but the one that was made before it."""

CONDITIONED: Final = frozenset({
    "open", "openat", "openat2", "mmap", "mprotect", "pkey_mprotect", "shmat", "remap_file_pages",
    "clone", "clone3", "fork", "vfork",
    "kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open", "pidfd_send_signal",
    "prctl", "arch_prctl", "prlimit64", "setrlimit", "seccomp", "ioctl", "fcntl", "setsockopt", "socket",
})  # fmt: skip
"""Calls whose conditions are a part of the sandbox."""

DANGEROUS: Final = frozenset({*(call for calls in DEADLY.values() for call in calls), *RINGS, *CONDITIONED})
"""Calls that an application opens only if it says that it knows."""

# Numbers that are the same on x86-64 and aarch64; asm-generic and include/uapi.
PROT_EXEC: Final = 0x4
O_WRITES: Final = 0o3 | 0o100 | 0o1000 | 0o20000000  # O_ACCMODE, O_CREAT, O_TRUNC, __O_TMPFILE
THREAD_FLAGS: Final = 0x3D0F00
"""What the C library makes threads with: VM FS FILES SIGHAND THREAD SYSVSEM SETTLS PARENT_SETTID CHILD_CLEARTID."""
CLONE_DETACHED: Final = 0x400000  # means nothing; musl sets it
SOCK_TYPE_MASK: Final = 0xF
MSG_FASTOPEN: Final = 0x20000000
IOCTLS: Final = {
    0x5401: "TCGETS: is it a terminal", 0x5413: "TIOCGWINSZ: how wide is it", 0x541B: "FIONREAD: how much is there",
    0x5411: "TIOCOUTQ: how much is not acknowledged", 0x5421: "FIONBIO: do not block",
    0x5450: "FIONCLEX: for a child", 0x5451: "FIOCLEX: not for a child",
}  # fmt: skip
FCNTLS: Final = {
    0: "F_DUPFD", 1030: "F_DUPFD_CLOEXEC", 1: "F_GETFD", 2: "F_SETFD", 3: "F_GETFL", 4: "F_SETFL",
    1032: "F_GETPIPE_SZ", 1031: "F_SETPIPE_SZ",
}  # fmt: skip
"""Not among them: F_SETOWN and F_SETSIG, by which the kernel sends signals to others; leases; seals."""
LOCKS: Final = {5: "F_GETLK: who holds a part of a file", 6: "F_SETLK: SQLite", 7: "F_SETLKW: the same, waiting"}
"""Where files are written to as well: others may write to them too."""
PRCTLS: Final = {15: "PR_SET_NAME: names of threads", 16: "PR_GET_NAME"}
SOCKET_OPTIONS: Final = {socket.SOL_SOCKET: (26, 50, 51, 52), socket.IPPROTO_TCP: (19, 31)}
"""Levels whose options may be set, but for these: SO_ATTACH_* (programs in the kernel), TCP_REPAIR and TCP_ULP."""
FEW_OPTIONS: Final = {
    socket.IPPROTO_IP: {11: "IP_RECVERR: the resolver hears that nobody is there"},
    socket.IPPROTO_IPV6: {25: "IPV6_RECVERR: the same", 26: "IPV6_V6ONLY"},
}
"""Levels of which only these may be set."""


def worker_rules(features: Features, pid: int, *, deadly: int, tracing: bool = False) -> tuple[Rule, ...]:
    """The rules of a worker whose process id is `pid`; what matches none of them gets the default().

    `deadly` is the action of deadly calls. Tracing makes it, and every refusal that could surprise, NOTIFY.
    """
    parts = [*_files(features), *_memory(), *_threads(), *_signals(pid), *_settings(features, pid), *_sockets(features)]
    rules = [*_expected(), *(_traced(rule) if tracing else rule for rule in parts)]
    for feature in ("always", features.engine, *_declared(features)):
        rules += [Rule(call, ALLOW) for call in ALLOWED.get(feature, ())]
    rules += [Rule(call, NOTIFY if tracing else deadly) for calls in DEADLY.values() for call in calls]
    return tuple(rules)


def default(*, tracing: bool = False) -> int:
    """What becomes of calls that stand nowhere."""
    return NOTIFY if tracing else refuse(errno.ENOSYS)


def _declared(features: Features) -> Iterator[str]:
    for feature in ("files", "write", "connect", "resolver"):
        if getattr(features, feature):
            yield feature


def _traced(rule: Rule) -> Rule:
    return rule if rule.action in (ALLOW, KILL_PROCESS) else Rule(rule.call, NOTIFY, rule.conditions)


def _only(call: str, index: int, values: Mapping[int, str], number: int) -> Iterator[Rule]:
    """Allow `call` when its int argument `index` is one of the values, otherwise refuse it with errno `number`."""
    for value in values:
        yield Rule(call, ALLOW, (word_is(index, value),))
    yield Rule(call, refuse(number))


def _expected() -> Iterator[Rule]:
    """Refusals that programs count on; nobody needs to be told of them, not even in tracing."""
    yield Rule("clone3", refuse(errno.ENOSYS))  # its flags are behind a pointer; the C library falls back to clone
    for call in RINGS:
        yield Rule(call, refuse(errno.EPERM))  # what a ring's end asks for too, in vain and harmlessly
    # The C library asks the kernel for its addresses before a lookup, and does without where there is no netlink.
    yield Rule("socket", refuse(errno.EAFNOSUPPORT), (word_is(0, socket.AF_NETLINK),))


def _files(features: Features) -> Iterator[Rule]:
    """Reading is bounded by Landlock; writing is not even asked for where no body is ever written to a file.

    The flags of openat2 are behind a pointer, where no filter sees them; Landlock alone bounds those.
    """
    for call, flags in (("openat", 2), ("open", 1)):  # the older one is musl's
        if features.write:
            yield Rule(call, ALLOW)
        else:
            yield Rule(call, ALLOW, (word_has_none(flags, O_WRITES),))
            yield Rule(call, refuse(errno.EACCES))


def _memory() -> Iterator[Rule]:
    """No executable memory, new or changed. A file in memory could be mapped twice, so W^X alone would not hold."""
    for call in ("mmap", "mprotect"):
        yield Rule(call, ALLOW, (word_has_none(2, PROT_EXEC),))
        yield Rule(call, refuse(errno.EACCES))


def _threads() -> Iterator[Rule]:
    """Threads, and no processes."""
    yield Rule("clone", ALLOW, (word_masked_is(0, 0xFFFFFFFF & ~CLONE_DETACHED, THREAD_FLAGS),))
    for call in ("clone", "fork", "vfork"):
        yield Rule(call, refuse(errno.EPERM))


def _signals(pid: int) -> Iterator[Rule]:
    """Signals to itself, as abort(3), raise(3) and pthread_kill(3) send them."""
    for call in ("kill", "tgkill"):
        yield Rule(call, ALLOW, (word_is(0, pid),))
        yield Rule(call, refuse(errno.EPERM))


def _settings(features: Features, pid: int) -> Iterator[Rule]:
    """Calls with many purposes, of which a few are wanted."""
    yield from _only("ioctl", 1, IOCTLS, errno.ENOTTY)
    yield from _only("fcntl", 1, {**FCNTLS, **(LOCKS if features.write else {})}, errno.EPERM)
    yield from _only("prctl", 0, PRCTLS, errno.EINVAL)
    for mine in (0, pid):  # read limits, set none
        yield Rule("prlimit64", ALLOW, (word_is(0, mine), is_null(2)))
    yield Rule("prlimit64", refuse(errno.EPERM))


def _sockets(features: Features) -> Iterator[Rule]:
    """New sockets: pairs always, others where connections are opened at all.

    Protocols are named because Landlock bounds TCP and nothing else: SCTP or MPTCP would lead around it.
    """
    yield from pairs()
    yield from options()
    if features.connect:
        yield from no_fast_open()
        if features.paths:
            yield Rule("socket", ALLOW, (word_is(0, socket.AF_UNIX),))
        for family in (socket.AF_INET, socket.AF_INET6):
            for protocol in (0, socket.IPPROTO_TCP):
                yield Rule("socket", ALLOW, kind_of(family, socket.SOCK_STREAM, protocol))
            if features.resolver:
                for protocol in (0, socket.IPPROTO_UDP):
                    yield Rule("socket", ALLOW, kind_of(family, socket.SOCK_DGRAM, protocol))
    else:
        yield Rule("connect", refuse(errno.EACCES))
        # No socket here may be connected anew: a listener that is shut down for reading could, by fast open.
        yield Rule("shutdown", ALLOW, (word_is(1, socket.SHUT_WR),))
        yield Rule("shutdown", refuse(errno.EACCES))
    yield Rule("socket", refuse(errno.EACCES))


def pairs() -> Iterator[Rule]:
    """Pairs of sockets; not of datagrams, whose ends send to any socket that has a path, as if there were no pair."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        yield Rule("socketpair", ALLOW, (word_is(0, socket.AF_UNIX), word_masked_is(1, SOCK_TYPE_MASK, kind)))
    yield Rule("socketpair", refuse(errno.EACCES))


def no_fast_open() -> Iterator[Rule]:
    """Fast open connects while it sends, past Landlock (seen on Linux 6.18); the errno is that of where it is off."""
    for call, flags in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
        yield Rule(call, refuse(errno.EOPNOTSUPP), (word_masked_is(flags, MSG_FASTOPEN, MSG_FASTOPEN),))


def options() -> Iterator[Rule]:
    """Options of sockets."""
    for level, unwanted in SOCKET_OPTIONS.items():
        for option in unwanted:
            yield Rule("setsockopt", refuse(errno.EPERM), (word_is(1, level), word_is(2, option)))
        yield Rule("setsockopt", ALLOW, (word_is(1, level),))
    for level, wanted in FEW_OPTIONS.items():
        for option in wanted:
            yield Rule("setsockopt", ALLOW, (word_is(1, level), word_is(2, option)))
    yield Rule("setsockopt", refuse(errno.ENOPROTOOPT))


def kind_of(family: int, kind: int, protocol: int) -> tuple[Condition, ...]:
    """SOCK_NONBLOCK and SOCK_CLOEXEC stand in the upper bits of the type."""
    return (word_is(0, family), word_masked_is(1, SOCK_TYPE_MASK, kind), word_is(2, protocol))
