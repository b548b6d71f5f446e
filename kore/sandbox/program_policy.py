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
from kore.sandbox.policy import DEADLY, RINGS, kind_of, no_fast_open, pairs
from kore.sandbox.program import assemble
from kore.sandbox.rules import ALLOW, Rule, refuse, word_is, word_masked_is
from kore.sandbox.seccomp import install

NAMESPACES: Final = {
    0x00020000: "CLONE_NEWNS", 0x02000000: "CLONE_NEWCGROUP", 0x04000000: "CLONE_NEWUTS", 0x08000000: "CLONE_NEWIPC",
    0x10000000: "CLONE_NEWUSER", 0x20000000: "CLONE_NEWPID", 0x40000000: "CLONE_NEWNET",
}  # fmt: skip
"""Flags of clone(2)."""

TERMINAL_INPUT: Final = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX: what they put into a terminal, the shell of whoever started the server would read."""

STREAMS: Final = (0, socket.IPPROTO_TCP)
DATAGRAMS: Final = (0, socket.IPPROTO_UDP)


def program_rules(*, connect: bool, paths: bool, listed: bool) -> tuple[Rule, ...]:
    """The rules; what matches none of them is allowed.

    `connect` says whether programs may open connections at all, `paths` whether to sockets that have a path, of which
    neither Landlock nor a filter sees which; `listed` whether only programs of a list may be run: a memfd has no path,
    so Landlock would let whatever is written there run.
    """
    rules = [
        Rule(call, refuse(errno.EPERM))
        for calls in DEADLY.values() for call in calls
        if call not in ("execve", "execveat", "personality")  # the last is asked for what it is by many a program
    ]
    rules += [Rule(call, refuse(errno.EPERM)) for call in (*RINGS, "io_uring_enter")]
    rules.append(Rule("clone3", refuse(errno.ENOSYS)))  # its flags are behind a pointer; libc falls back to clone
    rules += [Rule("clone", refuse(errno.EPERM), (word_masked_is(0, flag, flag),)) for flag in NAMESPACES]
    rules += [Rule("ioctl", refuse(errno.EPERM), (word_is(1, command),)) for command in TERMINAL_INPUT]
    if listed:
        rules.append(Rule("memfd_create", refuse(errno.EACCES)))
    return (*rules, *_sockets(connect=connect, paths=paths))


def _sockets(*, connect: bool, paths: bool) -> Iterator[Rule]:
    """What Landlock bounds is TCP to ports; a socket that was never bound may listen past it, and so none may."""
    yield from no_fast_open()
    yield from pairs()
    yield Rule("listen", refuse(errno.EACCES))
    if paths:
        yield Rule("socket", ALLOW, (word_is(0, socket.AF_UNIX),))
    if connect:
        for family in (socket.AF_INET, socket.AF_INET6):
            for kind, protocols in ((socket.SOCK_STREAM, STREAMS), (socket.SOCK_DGRAM, DATAGRAMS)):
                for protocol in protocols:
                    yield Rule("socket", ALLOW, kind_of(family, kind, protocol))
    yield Rule("socket", refuse(errno.EACCES))


def put_on(*, connect: bool, paths: bool, listed: bool) -> None:
    """Put these rules on this process, and so on all that it starts. Raises SandboxError."""
    rules = program_rules(connect=connect, paths=paths, listed=listed)
    try:
        install(assemble(rules, ALLOW, this_machine()), listener=False)
    except OSError as error:
        raise SandboxError(
            STEP,
            f"that of programs cannot be installed ({error}); it needs Linux 4.14 with CONFIG_SECCOMP_FILTER, or "
            "kore.config.sandbox = 'no'",
        ) from error
