"""Landlock: the files, TCP ports, processes and abstract sockets a process keeps, by raw system calls (landlock(7)).

What is not listed is refused by the kernel from then on, to this thread, to the threads and children it makes, and to
what they do through io_uring as well. It needs no privilege, cannot be taken back, and is asked when something is
opened: a file that was open before stays open. Call it while the process has one thread.

What it does not see, and who stops that: changes of mode, owner, times and extended attributes, stat(2) and chdir(2)
(the filter of system calls, the user the process runs as); UDP, and connections to sockets that have a path; listen(2)
on a socket that was not bound, which takes a port of the kernel's choice; and two ways of TCP to any port, tried on
Linux 6.18: sockets of IPPROTO_MPTCP, and a send(2) with MSG_FASTOPEN. The filter refuses both, and no ring may send
where connections are opened (kore.uring.restrictions).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from dataclasses import dataclass

from kore.errors import SandboxError

# The same numbers on every architecture: they came after the tables were made one.
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_ADD_RULE = 445
SYS_LANDLOCK_RESTRICT_SELF = 446

LANDLOCK_CREATE_RULESET_VERSION = 1 << 0
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_RULE_NET_PORT = 2

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_CHAR = 1 << 6
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_SOCK = 1 << 9
MAKE_FIFO = 1 << 10
MAKE_BLOCK = 1 << 11
MAKE_SYM = 1 << 12
REFER = 1 << 13
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15

BIND_TCP = 1 << 0
CONNECT_TCP = 1 << 1

SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0
SCOPE_SIGNAL = 1 << 1

OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""The rights that a rule on a file may give; any other, given for a file, is EINVAL."""

READING = READ_FILE | READ_DIR
EXECUTING = READING | EXECUTE  # a program is opened for reading as well
WRITING = READING | (
    WRITE_FILE | TRUNCATE | REFER | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM)
"""All but making devices, and running what was written. ioctl(2) on devices is given to nobody."""

FEATURES = (
    # ABI, Linux, rights on files, on the network, scopes, what is not restricted without them
    (1, "5.13", MAKE_SYM * 2 - 1, 0, 0, "files"),
    (2, "5.19", REFER, 0, 0, ""),  # before, no file can be moved between directories at all
    (3, "6.2", TRUNCATE, 0, 0, "truncating files"),
    (4, "6.7", 0, BIND_TCP | CONNECT_TCP, 0, "TCP ports"),
    (5, "6.10", IOCTL_DEV, 0, 0, "ioctl on devices"),
    (6, "6.12", 0, 0, SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL, "signals and abstract sockets"),
)
"""What each version of the interface brought. Later ones brought flags for logging and threads, not used here."""

RULESET = struct.Struct("=QQQ")
"""struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped. Older kernels take zeros at its end."""
PATH_BENEATH = struct.Struct("=Qi")
"""struct landlock_path_beneath_attr, packed: allowed_access, parent_fd"""
NET_PORT = struct.Struct("=QQ")
"""struct landlock_net_port_attr: allowed_access, port"""

PR_SET_NO_NEW_PRIVS = 38


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a process keeps; all else that Landlock knows of is given up. A directory counts with all beneath it."""

    read: tuple[str, ...] = ()
    """Files to read and directories to list."""
    execute: tuple[str, ...] = ()
    """Programs to run (and read)."""
    write: tuple[str, ...] = ()
    """Directories in which anything may be made, changed and removed (and read), and files to write."""
    connect_ports: tuple[int, ...] | None = ()
    """TCP ports to connect to; None: any."""
    bind_ports: tuple[int, ...] | None = ()
    """TCP ports to bind to; None: any."""
    scoped: bool = True
    """Whether signals and connections to abstract sockets reach only processes restricted by this very call."""


def _call(number: int, *arguments: object) -> int:
    """A raw system call. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def abi() -> int:
    """The version of Landlock that this kernel has; 0: none (before Linux 5.13, or switched off at boot)."""
    try:
        return _call(
            SYS_LANDLOCK_CREATE_RULESET, ctypes.c_void_p(None), ctypes.c_size_t(0),
            ctypes.c_uint(LANDLOCK_CREATE_RULESET_VERSION))
    except OSError:
        return 0


def handled(rules: Rules, version: int) -> tuple[int, int, int]:
    """The rights that `rules` take on a kernel of ABI `version`: on files, on the network, and scopes."""
    files = network = scopes = 0
    for since, _, of_files, of_network, of_scopes, _ in FEATURES:
        if since <= version:
            files, network, scopes = files | of_files, network | of_network, scopes | of_scopes
    if rules.connect_ports is None:
        network &= ~CONNECT_TCP
    if rules.bind_ports is None:
        network &= ~BIND_TCP
    return files, network, scopes if rules.scoped else 0


def missing(version: int) -> tuple[str, ...]:
    """What a kernel of ABI `version` cannot restrict, one line each."""
    if version < 1:
        return ("no Landlock (Linux 5.13, and landlock in lsm= at boot): neither files nor ports are restricted by it",)
    return tuple(
        f"Landlock (ABI {version} in this kernel) does not restrict {what}; Linux {linux} does"
        for since, linux, _, _, _, what in FEATURES if since > version and what)


def restrict_self(rules: Rules, *, strict: bool = False, version: int | None = None) -> tuple[str, ...]:
    """Give up all but `rules`, for good. What the kernel cannot do, and which paths are not there, one line each.

    Sets no_new_privs, without which the kernel would refuse (prctl(2)). With `strict` a missing path is an error.
    `version` is for tests: do as on a kernel of that ABI. Raises SandboxError.
    """
    version = abi() if version is None else version
    told = list(missing(version))
    if version < 1:
        return tuple(told)
    files, network, scopes = handled(rules, version)
    attributes = RULESET.pack(files, network, scopes)
    ruleset = _step(
        "landlock_create_ruleset", SYS_LANDLOCK_CREATE_RULESET, ctypes.c_char_p(attributes),
        ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    try:
        for rights, paths in ((READING, rules.read), (EXECUTING, rules.execute), (WRITING, rules.write)):
            for path in paths:
                refusal = _add_path(ruleset, path, rights & files)
                if refusal and strict:
                    raise SandboxError("Landlock", refusal)
                if refusal:
                    told.append(f"Landlock: {refusal}; it is out of reach")
        _add_ports(ruleset, CONNECT_TCP & network, rules.connect_ports)
        _add_ports(ruleset, BIND_TCP & network, rules.bind_ports)
        _no_new_privs()
        _step("landlock_restrict_self", SYS_LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
    finally:
        os.close(ruleset)
    return tuple(told)


def _step(name: str, number: int, *arguments: object) -> int:
    """A system call whose failure is a SandboxError."""
    try:
        return _call(number, *arguments)
    except OSError as error:
        hint = ": a process can be restricted sixteen times (landlock(7))" if error.errno == errno.E2BIG else ""
        raise SandboxError(f"Landlock: {name}", f"{error.strerror} (errno {error.errno}){hint}") from error


def _no_new_privs() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(ctypes.c_int(PR_SET_NO_NEW_PRIVS), ctypes.c_ulong(1), zero, zero, zero) != 0:
        raise SandboxError("Landlock: prctl(PR_SET_NO_NEW_PRIVS)", os.strerror(ctypes.get_errno()))


def _add_path(ruleset: int, path: str, rights: int) -> str | None:
    """One rule; what is wrong with the path if there can be none. A link counts as what it points to."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        return f"{path}: {error.strerror}"
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= OF_FILES
        _step(
            f"landlock_add_rule for {path}", SYS_LANDLOCK_ADD_RULE, ctypes.c_int(ruleset),
            ctypes.c_int(LANDLOCK_RULE_PATH_BENEATH), ctypes.c_char_p(PATH_BENEATH.pack(rights, fd)), ctypes.c_uint(0))
    finally:
        os.close(fd)
    return None


def _add_ports(ruleset: int, right: int, ports: tuple[int, ...] | None) -> None:
    """Rules for TCP ports; none where the kernel does not handle `right`."""
    if not right or ports is None:
        return
    for port in ports:
        _step(
            f"landlock_add_rule for port {port}", SYS_LANDLOCK_ADD_RULE, ctypes.c_int(ruleset),
            ctypes.c_int(LANDLOCK_RULE_NET_PORT), ctypes.c_char_p(NET_PORT.pack(right, port)), ctypes.c_uint(0))
