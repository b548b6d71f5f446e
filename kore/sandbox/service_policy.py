"""Which system calls the services of a server may make, by name of the service: the table to read beside policy.py.

A service runs none of the application's code, so its list is short and its own: what stands nowhere here does not
exist, and what is deadly to a worker is deadly here. None of them makes a socket unless its row says so.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from typing import Final

from kore.sandbox.policy import (
    CLONE_DETACHED,
    DEADLY,
    FCNTLS,
    IOCTLS,
    O_WRITES,
    PRCTLS,
    PROT_EXEC,
    RINGS,
    THREAD_FLAGS,
    kind_of,
    no_fast_open,
    options,
)
from kore.sandbox.rules import ALLOW, Rule, is_null, refuse, word_has_none, word_is, word_masked_is

CALLS: Final[Mapping[str, Mapping[str, str]]] = {
    "keymgr": {
        "read": "keys, certificates", "write": "what it is woken with", "close": "descriptors", "lseek": "files",
        "fstat": "sizes of files", "newfstatat": "files that change", "stat": "the same in musl",
        "brk": "malloc", "munmap": "malloc", "mremap": "malloc grows", "madvise": "malloc, stacks of threads",
        "futex": "locks", "set_robust_list": "start of a thread", "rseq": "start of a thread",
        "gettid": "start of a thread", "sched_getaffinity": "malloc asks for the CPUs",
        "exit": "end of a thread", "exit_group": "the end",
        "rt_sigaction": "handlers", "rt_sigprocmask": "start of a thread", "rt_sigreturn": "end of a handler",
        "sigaltstack": "start of a thread", "restart_syscall": "a wait goes on after SIGCONT",
        "clock_gettime": "where the vdso cannot", "gettimeofday": "the same", "clock_nanosleep": "who asks too fast",
        "nanosleep": "the same in musl", "poll": "the loop", "ppoll": "the same, aarch64",
        "getpid": "log", "getppid": "cannot fail", "getuid": "cannot fail", "geteuid": "cannot fail",
        "getgid": "cannot fail", "getegid": "cannot fail", "getrandom": "nonces of signatures, tickets",
        "recvfrom": "workers", "sendto": "workers, log", "recvmsg": "its end of a pair comes along",
        "sendmsg": "the listener of this filter, at the start",
    },
    "acme": {
        "read": "files of the resolver, the authority", "write": "the authority", "close": "descriptors",
        "lseek": "files", "fstat": "sizes of files", "newfstatat": "files of the resolver", "stat": "the same in musl",
        "readlink": "import", "readlinkat": "the same, aarch64", "getdents64": "import", "getcwd": "import",
        "access": "files of the resolver", "faccessat": "the same, aarch64", "faccessat2": "the same",
        "brk": "malloc", "munmap": "malloc", "mremap": "malloc grows", "madvise": "malloc",
        "futex": "locks", "gettid": "log", "exit_group": "the end",
        "rt_sigaction": "handlers", "rt_sigprocmask": "handlers", "rt_sigreturn": "end of a handler",
        "setitimer": "the end of a request", "restart_syscall": "a wait goes on after SIGCONT",
        "clock_gettime": "where the vdso cannot", "gettimeofday": "the same",
        "poll": "waits", "ppoll": "the same, aarch64", "select": "waits of urllib3",
        "getpid": "log", "getppid": "cannot fail", "getuid": "cannot fail", "geteuid": "cannot fail",
        "getgid": "cannot fail", "getegid": "cannot fail", "getrandom": "TLS", "uname": "the resolver",
        "recvfrom": "the authority, the key manager", "sendto": "the same, log", "recvmsg": "its end of a pair",
        "sendmsg": "the listener of this filter, at the start", "sendmmsg": "the resolver's questions",
        "connect": "the authority, the resolver; to which ports is Landlock's", "getpeername": "the authority",
        "getsockopt": "whether it is connected",
    },
}  # fmt: skip
"""By service: calls whose arguments do not matter, each with what it is for."""

WRITES: Final[Mapping[str, str]] = {
    "mkdir": "directories", "mkdirat": "the same, aarch64", "unlink": "files go", "unlinkat": "the same",
    "rename": "files are put in their place", "renameat": "the same, aarch64", "fsync": "files stay",
    "getdents64": "what is there",
}  # fmt: skip
"""Besides, where a service writes files; Landlock says which."""


CONNECTS: Final = frozenset({"acme"})
"""Services that make sockets: TCP, and UDP where names are looked up."""


def service_rules(role: str, *, write: bool, resolver: bool, pid: int, deadly: int) -> tuple[Rule, ...]:
    """The rules of the service `role` whose process id is `pid`; `deadly` is the action of deadly calls."""
    rules = [Rule("clone3", refuse(errno.ENOSYS))]  # its flags are behind a pointer; the C library falls back to clone
    rules += [Rule(call, refuse(errno.EPERM)) for call in (*RINGS, "io_uring_enter")]
    rules += _conditioned(write, pid)
    rules += _connecting(resolver) if role in CONNECTS else _isolated()
    rules += [Rule(call, ALLOW) for call in CALLS[role]]
    if write:
        rules += [Rule(call, ALLOW) for call in WRITES]
    rules += [Rule(call, deadly) for calls in DEADLY.values() for call in calls]
    return tuple(rules)


def _conditioned(write: bool, pid: int) -> Iterator[Rule]:
    for call, flags in (("openat", 2), ("open", 1)):  # the older one is musl's
        if not write:
            yield Rule(call, ALLOW, (word_has_none(flags, O_WRITES),))
            yield Rule(call, refuse(errno.EACCES))
        else:
            yield Rule(call, ALLOW)
    for call in ("mmap", "mprotect"):
        yield Rule(call, ALLOW, (word_has_none(2, PROT_EXEC),))
        yield Rule(call, refuse(errno.EACCES))
    yield Rule("clone", ALLOW, (word_masked_is(0, 0xFFFFFFFF & ~CLONE_DETACHED, THREAD_FLAGS),))
    for call in ("clone", "fork", "vfork"):
        yield Rule(call, refuse(errno.EPERM))
    for call in ("kill", "tgkill"):
        yield Rule(call, ALLOW, (word_is(0, pid),))
        yield Rule(call, refuse(errno.EPERM))
    for call, index, values, number in (
        ("ioctl", 1, IOCTLS, errno.ENOTTY), ("fcntl", 1, FCNTLS, errno.EPERM), ("prctl", 0, PRCTLS, errno.EINVAL),
    ):
        for value in values:
            yield Rule(call, ALLOW, (word_is(index, value),))
        yield Rule(call, refuse(number))
    yield Rule("prlimit64", ALLOW, (word_is(0, 0), is_null(2)))
    yield Rule("prlimit64", refuse(errno.EPERM))


def _connecting(resolver: bool) -> Iterator[Rule]:
    """Sockets as a worker's that connects (policy.py)."""
    # The C library asks the kernel for its addresses before a lookup, and does without where there is no netlink.
    yield Rule("socket", refuse(errno.EAFNOSUPPORT), (word_is(0, socket.AF_NETLINK),))
    yield from options()
    yield from no_fast_open()
    for family in (socket.AF_INET, socket.AF_INET6):
        for protocol in (0, socket.IPPROTO_TCP):
            yield Rule("socket", ALLOW, kind_of(family, socket.SOCK_STREAM, protocol))
        if resolver:
            for protocol in (0, socket.IPPROTO_UDP):
                yield Rule("socket", ALLOW, kind_of(family, socket.SOCK_DGRAM, protocol))
    yield Rule("getsockname", ALLOW)
    yield Rule("shutdown", ALLOW)  # it has no listener that others share
    for call in ("socket", "socketpair", "bind", "listen", "accept", "accept4"):
        yield Rule(call, refuse(errno.EACCES))


def _isolated() -> Iterator[Rule]:
    """No sockets but those that it was given."""
    # Nothing here talks to anybody but over what it was given. Python asks a socket that comes along what it is.
    for option in (socket.SO_DOMAIN, socket.SO_TYPE, socket.SO_PROTOCOL, socket.SO_SNDBUF):
        yield Rule("getsockopt", ALLOW, (word_is(1, socket.SOL_SOCKET), word_is(2, option)))
    yield Rule("getsockname", ALLOW)
    for call in ("socket", "socketpair", "connect", "bind", "listen", "accept", "accept4", "setsockopt", "shutdown"):
        yield Rule(call, refuse(errno.EACCES))
