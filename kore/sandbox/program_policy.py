"""Which system calls the programs that kore.proc starts may not make: a deny-list, as nobody knows all that they need.

They are somebody else's programs, so what they may not do fails and ends nobody: no other users, roots, kernels and
processes (the list of what is deadly to workers), no rings, which no filter sees, no namespaces, in which a process has
rights again, and of the network only what Landlock can bound. Files, ports and signals are Landlock's.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Final

from kore.errors import SandboxError
from kore.sandbox.machine import STEP, this_machine
from kore.sandbox.policy import DEADLY, MSG_FASTOPEN, RINGS, SOCK_TYPE_MASK
from kore.sandbox.program import assemble
from kore.sandbox.rules import ALLOW, Rule, refuse, word_is, word_masked_is
from kore.sandbox.seccomp import install

NAMESPACES: Final = {
    0x00020000: "CLONE_NEWNS", 0x02000000: "CLONE_NEWCGROUP", 0x04000000: "CLONE_NEWUTS", 0x08000000: "CLONE_NEWIPC",
    0x10000000: "CLONE_NEWUSER", 0x20000000: "CLONE_NEWPID", 0x40000000: "CLONE_NEWNET",
}  # fmt: skip
"""Flags of clone(2)."""

STREAMS: Final = (0, socket.IPPROTO_TCP)
DATAGRAMS: Final = (0, socket.IPPROTO_UDP)


def program_rules(*, connect: bool, listed: bool) -> tuple[Rule, ...]:
    """The rules; what matches none of them is allowed.

    `connect` says whether programs may open connections at all, `listed` whether only those of a list may be run: a
    memfd has no path, so Landlock would let whatever is written there run.
    """
    rules = [
        Rule(call, refuse(errno.EPERM))
        for calls in DEADLY.values() for call in calls
        if call not in ("execve", "execveat")
    ]
    rules += [Rule(call, refuse(errno.EPERM)) for call in (*RINGS, "io_uring_enter")]
    rules.append(Rule("clone3", refuse(errno.ENOSYS)))  # its flags are behind a pointer; libc falls back to clone
    rules += [Rule("clone", refuse(errno.EPERM), (word_masked_is(0, flag, flag),)) for flag in NAMESPACES]
    if listed:
        rules.append(Rule("memfd_create", refuse(errno.EACCES)))
    return (*rules, *_sockets(connect=connect))


def _sockets(*, connect: bool) -> Iterator[Rule]:
    """Fast open connects past Landlock, as other protocols than TCP do; UDP goes where connections may go at all."""
    for call, flags in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
        yield Rule(call, refuse(errno.EOPNOTSUPP), (word_masked_is(flags, MSG_FASTOPEN, MSG_FASTOPEN),))
    yield Rule("socket", ALLOW, (word_is(0, socket.AF_UNIX),))
    if connect:
        for family in (socket.AF_INET, socket.AF_INET6):
            for kind, protocols in ((socket.SOCK_STREAM, STREAMS), (socket.SOCK_DGRAM, DATAGRAMS)):
                for protocol in protocols:
                    of_kind = word_masked_is(1, SOCK_TYPE_MASK, kind)
                    yield Rule("socket", ALLOW, (word_is(0, family), of_kind, word_is(2, protocol)))
    yield Rule("socket", refuse(errno.EAFNOSUPPORT))


def put_on(*, connect: bool, listed: bool) -> None:
    """Put these rules on this process, and so on all that it starts. Raises SandboxError."""
    rules = program_rules(connect=connect, listed=listed)
    try:
        install(assemble(rules, ALLOW, this_machine()), listener=False)
    except OSError as error:
        raise SandboxError(
            STEP,
            f"that of programs cannot be installed ({error}); it needs Linux 4.14 with CONFIG_SECCOMP_FILTER, or "
            "kore.config.sandbox = 'no'",
        ) from error
