"""Surroundings that servers meet elsewhere, made here: run as a program, it enters some by name and becomes a command.

    python surroundings.py docker no-landlock -- python -m kore app.py

What a container's filter of system calls refuses is written with libseccomp, from the profile that Docker has by
default (moby, profiles/seccomp/default.json), and not with what kore has for that. The order is that of the words.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys

import pyseccomp

DOCKER_CAPABILITIES = frozenset({0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31})
"""CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE
SETFCAP: what root has in a container (moby, oci/caps/defaults.go)."""
CAP_SETPCAP = 8

DOCKER_REFUSES = (
    "acct", "add_key", "bpf", "clock_adjtime", "clock_settime", "delete_module", "fanotify_init", "finit_module",
    "fsconfig", "fsmount", "fsopen", "fspick", "init_module", "io_uring_enter", "io_uring_register", "io_uring_setup",
    "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "lookup_dcookie", "mount", "mount_setattr",
    "move_mount", "move_pages", "nfsservctl", "open_by_handle_at", "open_tree", "perf_event_open", "pivot_root",
    "quotactl", "quotactl_fd", "reboot", "request_key", "setdomainname", "sethostname", "setns", "settimeofday",
    "swapoff", "swapon", "syslog", "umount2", "unshare", "userfaultfd", "vhangup",
)  # fmt: skip
"""Calls that fail with EPERM for who has no CAP_SYS_ADMIN and its like."""
CLONE_NEW = 0x7E020000
"""The flags of clone(2) that make namespaces."""

PR_CAPBSET_DROP = 24
PR_SET_SECCOMP = 22


def drop_bounding(kept: frozenset[int]) -> None:
    """Root that is executed from here on has these capabilities and no others (capabilities(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    for number in range(64):
        if number not in kept and libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0) != 0:
            if ctypes.get_errno() == errno.EINVAL:
                return  # there are no more
            raise OSError(ctypes.get_errno(), "PR_CAPBSET_DROP")


def refusing(calls: dict[str, int]) -> pyseccomp.SyscallFilter:
    """A filter that fails these calls with an errno and allows all else; calls this machine has not are left out."""
    made = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    # Who may needs no no_new_privs, and a container does not set it.
    made.set_attr(pyseccomp.Attr.CTL_NNP, int(os.geteuid() != 0))
    for call, number in calls.items():
        if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call) >= 0:
            made.add_rule(pyseccomp.ERRNO(number), call)
    return made


def docker() -> None:
    """What Docker gives a container's root by default: its capabilities, and its filter."""
    made = refusing(dict.fromkeys(DOCKER_REFUSES, errno.EPERM) | {"clone3": errno.ENOSYS})
    for bit in range(32):
        if CLONE_NEW >> bit & 1:
            flag = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, 1 << bit, 1 << bit)
            made.add_rule(pyseccomp.ERRNO(errno.EPERM), "clone", flag)
    made.load()
    if os.geteuid() == 0:
        drop_bounding(DOCKER_CAPABILITIES)


def no_setpcap() -> None:
    """Without CAP_SETPCAP, as with docker run --cap-drop: the bounding set can't be made smaller any more."""
    drop_bounding(DOCKER_CAPABILITIES - {CAP_SETPCAP})


def no_capabilities() -> None:
    """Root by name alone, as with docker run --cap-drop ALL."""
    drop_bounding(frozenset())


def no_landlock() -> None:
    """A kernel without Landlock, before Linux 5.13."""
    refusing(dict.fromkeys(LANDLOCK, errno.ENOSYS)).load()


def landlock_off() -> None:
    """A kernel that has Landlock and was started without it (lsm= at boot)."""
    refusing(dict.fromkeys(LANDLOCK, errno.EOPNOTSUPP)).load()


LANDLOCK = ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")


def no_filters() -> None:
    """A kernel without seccomp filters, or a container that allows none."""
    refusing({"seccomp": errno.EINVAL}).load()


def listener() -> None:
    """A container whose filter has a listener already: the kernel gives a process but one (seccomp_unotify(2))."""
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    allow = ctypes.create_string_buffer((0x06).to_bytes(2, "little") + b"\0\0" + (0x7FFF0000).to_bytes(4, "little"), 8)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, "seccomp")
    program = Program(1, ctypes.addressof(allow))
    fd = libc.syscall(ctypes.c_long(number), ctypes.c_ulong(1), ctypes.c_ulong(1 << 3), ctypes.byref(program))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    os.set_inheritable(fd, True)  # as long as it is open anywhere there can be no other


def no_locked_memory() -> None:
    """RLIMIT_MEMLOCK 0, which rings counted against before Linux 5.12; and no CAP_IPC_LOCK, which overrules it."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    if os.geteuid() == 0:
        drop_bounding(DOCKER_CAPABILITIES)


WORDS = {
    "docker": docker, "no-setpcap": no_setpcap, "no-capabilities": no_capabilities, "no-landlock": no_landlock,
    "landlock-off": landlock_off, "no-filters": no_filters, "listener": listener,
    "no-locked-memory": no_locked_memory,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Enter what the words say, and become the command after ``--``."""
    end = arguments.index("--")
    for word in arguments[:end]:
        WORDS[word]()
    command = arguments[end + 1 :]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
