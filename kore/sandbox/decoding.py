"""A system call as a line that people read: ``execve("/bin/sh", 0x7f31..., 0)``, ``socket(AF_PACKET, SOCK_RAW, 0)``.

The kernel tells six numbers. How many of them a call has, and which are words, sets of flags or paths, stands in one
table for the calls that a filter stops most; of any other the arguments are shown as they came. What a path
says is read from the caller's memory, where that may be read.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Final

from kore.sandbox.machine import Machine, name_of

PATH_BYTES_MAX: Final = 256
"""Of a path, what is shown."""

ADDRESS_BYTES_MAX: Final = 110
"""struct sockaddr_un, the longest of those that are shown (unix(7))."""

SIGNS: Final[dict[str, str]] = {
    # Letters: d an int, u a size or number, x a pointer or address, s a path or name, o a mode, F a socket family,
    # T a socket type, P a protection, O flags of open, C flags of clone, G a signal, A an fd of a directory,
    # N the address of a socket, whose length is the next argument.
    "execve": "sxx", "execveat": "AsxxX", "fork": "", "vfork": "", "clone": "Cxxxx", "clone3": "xu",
    "ptrace": "ddxx", "process_vm_readv": "dxuxuu", "process_vm_writev": "dxuxuu", "kcmp": "ddduu",
    "pidfd_open": "du", "pidfd_getfd": "ddu", "pidfd_send_signal": "dGxu",
    "kill": "dG", "tkill": "dG", "tgkill": "ddG", "rt_sigqueueinfo": "dGx", "rt_tgsigqueueinfo": "ddGx",
    "bpf": "dxu", "perf_event_open": "xdddu", "userfaultfd": "X", "io_uring_setup": "ux", "io_uring_register": "duxu",
    "seccomp": "dux", "prctl": "dxxxx", "personality": "X",
    "unshare": "C", "setns": "dC", "mount": "sssXx", "umount2": "sX", "pivot_root": "ss", "chroot": "s",
    "open_tree": "AsX", "move_mount": "AsAsX", "fsopen": "sX", "fsmount": "dXX", "fspick": "AsX",
    "open_by_handle_at": "dxO", "name_to_handle_at": "AsxxX", "swapon": "sX", "swapoff": "s", "acct": "s",
    "quotactl": "Xsdx", "init_module": "xus", "finit_module": "dsX", "delete_module": "sX",
    "kexec_load": "uuxX", "kexec_file_load": "dduxX", "reboot": "XXXx", "iopl": "d", "ioperm": "uud",
    "add_key": "ssxud", "request_key": "sssd", "keyctl": "dxxxx",
    "setuid": "d", "setgid": "d", "setreuid": "dd", "setregid": "dd", "setresuid": "ddd", "setresgid": "ddd",
    "setfsuid": "d", "setfsgid": "d", "setgroups": "ux", "capset": "xx", "setrlimit": "dx", "prlimit64": "ddxx",
    "sethostname": "su", "setdomainname": "su", "settimeofday": "xx", "clock_settime": "dx", "adjtimex": "x",
    "clock_adjtime": "dx", "syslog": "dxu", "vhangup": "",
    "open": "sOo", "openat": "AsOo", "openat2": "Asxu", "creat": "so", "mkdir": "so", "mkdirat": "Aso", "rmdir": "s",
    "unlink": "s", "unlinkat": "AsX", "rename": "ss", "renameat": "AsAs", "renameat2": "AsAsX", "link": "ss",
    "linkat": "AsAsX", "symlink": "ss", "symlinkat": "sAs", "mknod": "sou", "mknodat": "Asou", "chmod": "so",
    "fchmod": "do", "fchmodat": "Aso", "chown": "sdd", "lchown": "sdd", "fchown": "ddd", "fchownat": "AsddX",
    "truncate": "su", "ftruncate": "du", "utimensat": "AsxX", "access": "so", "faccessat": "Aso", "chdir": "s",
    "readlink": "sxu", "readlinkat": "Asxu", "stat": "sx", "lstat": "sx", "newfstatat": "AsxX", "statx": "AsXXx",
    "statfs": "sx", "inotify_add_watch": "dsX", "setxattr": "ssxuX", "memfd_create": "sX", "umask": "o",
    "socket": "FTd", "socketpair": "FTdx", "bind": "dNu", "listen": "dd", "connect": "dNu",
    "sendto": "dxuXNu", "setsockopt": "dddxu",
    "mmap": "xuPXdu", "mprotect": "xuP", "pkey_mprotect": "xuPd", "mremap": "xuuXx", "ioctl": "dXx", "fcntl": "ddx",
    "dup": "d", "dup2": "dd", "close_range": "uuX", "wait4": "dxXx", "waitid": "ddxXx", "eventfd2": "uX",
    "arch_prctl": "Xx", "set_tid_address": "x", "setsid": "", "setpgid": "dd", "times": "x", "pause": "",
    "fsync": "d", "fdatasync": "d", "flock": "dX", "pwrite64": "dxuu", "sync": "", "sched_yield": "",
    "epoll_create1": "X", "epoll_wait": "dxdd", "epoll_ctl": "dddx", "timerfd_create": "dX", "inotify_init1": "X",
}  # fmt: skip
"""What the arguments of a call are, a letter each."""

_OPEN_FLAGS: Final = {
    "O_CREAT": 0o100, "O_EXCL": 0o200, "O_NOCTTY": 0o400, "O_TRUNC": 0o1000, "O_APPEND": 0o2000, "O_NONBLOCK": 0o4000,
    "O_CLOEXEC": 0o2000000,
}  # fmt: skip  # what is the same on both machines
_CLONE_FLAGS: Final = {
    "CLONE_VM": 0x100, "CLONE_FS": 0x200, "CLONE_FILES": 0x400, "CLONE_SIGHAND": 0x800, "CLONE_VFORK": 0x4000,
    "CLONE_THREAD": 0x10000, "CLONE_NEWNS": 0x20000, "CLONE_SYSVSEM": 0x40000, "CLONE_SETTLS": 0x80000,
    "CLONE_PARENT_SETTID": 0x100000, "CLONE_CHILD_CLEARTID": 0x200000, "CLONE_CHILD_SETTID": 0x1000000,
    "CLONE_NEWCGROUP": 0x2000000, "CLONE_NEWUTS": 0x4000000, "CLONE_NEWIPC": 0x8000000, "CLONE_NEWUSER": 0x10000000,
    "CLONE_NEWPID": 0x20000000, "CLONE_NEWNET": 0x40000000,
}  # fmt: skip
_PROTECTION: Final = {"PROT_READ": 1, "PROT_WRITE": 2, "PROT_EXEC": 4}
_ACCESS: Final = ("O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE")

ReadMemory = Callable[[int, int], bytes | None]
"""Bytes of the caller's memory from an address on, up to so many; None when they can't be read."""


def call_text(number: int, arguments: tuple[int, ...], machine: Machine, read: ReadMemory | None = None) -> str:
    """The call with its arguments. Nothing in it but printable ASCII, whatever the caller's memory holds."""
    name = name_of(number, machine)
    signs = SIGNS.get(name, "XXXXXX")
    shown = []
    for index, (sign, value) in enumerate(zip(signs, arguments, strict=False)):
        if sign == "N":
            shown.append(_address(value, arguments[index + 1], read))
        else:
            shown.append(_shown(sign, value, read))
    return f"{name}({', '.join(shown)})"


def path_text(address: int, read: ReadMemory) -> str | None:
    """The path at an address; None when it can't be read to its end, or is no plain text."""
    text, end, _ = (read(address, PATH_BYTES_MAX) or b"").partition(b"\0")
    return text.decode("ascii") if end and text.isascii() and text.decode("ascii").isprintable() else None


def _shown(sign: str, value: int, read: ReadMemory | None) -> str:
    word = value & 0xFFFFFFFF
    number = word - (1 << 32) if word >> 31 else word
    match sign:
        case "s":
            return _text(value, read)
        case "d":
            return str(number)
        case "u":
            return str(value)
        case "o":
            return f"0{word:o}" if word else "0"
        case "A":
            return "AT_FDCWD" if number == -100 else str(number)
        case "F":
            return _enumerated(socket.AddressFamily, word)
        case "T":
            flags = {"SOCK_NONBLOCK": 0o4000, "SOCK_CLOEXEC": 0o2000000}
            return _flags(flags, word & ~0xF, [_enumerated(socket.SocketKind, word & 0xF)])
        case "G":
            return _enumerated(signal.Signals, word)
        case "P":
            return _flags(_PROTECTION, word, []) if word else "PROT_NONE"
        case "O":
            return _flags(_OPEN_FLAGS, word & ~3, [_ACCESS[word & 3]])
        case "C":
            ends_with = [_enumerated(signal.Signals, word & 0xFF)] if word & 0xFF else []
            return _flags(_CLONE_FLAGS, word & ~0xFF, ends_with)
        case _:
            return hex(value) if value else "0"


def _text(address: int, read: ReadMemory | None) -> str:
    """What is written at an address: "path", "the begin of a long on"..., or the address."""
    found = read(address, PATH_BYTES_MAX) if read is not None and address else None
    if found is None:
        return hex(address) if address else "NULL"
    text, end, _ = found.partition(b"\0")
    return f'"{_printable(text)}"' + ("" if end else "...")


def _address(address: int, length: int, read: ReadMemory | None) -> str:
    """Where a socket is bound or connected to: ``{127.0.0.1:5432}``, ``{/run/db.sock}``, or where that is written."""
    raw = read(address, min(length & 0xFFFFFFFF, ADDRESS_BYTES_MAX)) if read is not None and address else None
    if raw is None or len(raw) < 2:
        return hex(address) if address else "NULL"
    family = int.from_bytes(raw[:2], sys.byteorder)
    port = int.from_bytes(raw[2:4], "big")
    if family == socket.AF_INET and len(raw) >= 8:
        return f"{{{socket.inet_ntop(family, raw[4:8])}:{port}}}"
    if family == socket.AF_INET6 and len(raw) >= 24:
        return f"{{[{socket.inet_ntop(family, raw[8:24])}]:{port}}}"
    if family == socket.AF_UNIX:
        name = raw[2:]
        if name[:1] == b"\0":
            return f"{{@{_printable(name[1:])}}}"
        return f"{{{_printable(name.partition(bytes(1))[0])}}}"
    return f"{{{_enumerated(socket.AddressFamily, family)}}}"


def _printable(text: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in text)


def _enumerated(kind: Callable[[int], object], value: int) -> str:
    try:
        return str(getattr(kind(value), "name", value))
    except ValueError:
        return str(value)


def _flags(names: Mapping[str, int], value: int, shown: list[str]) -> str:
    for name, bit in names.items():
        if value & bit:
            shown.append(name)
            value &= ~bit
    if value or not shown:
        shown.append(hex(value) if value else "0")
    return "|".join(shown)
