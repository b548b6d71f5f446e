"""Python's start-up hook: `select` gets the kqueue stand-in, in every program that has this folder in its PYTHONPATH.

``STANDIN_SYSTEM=freebsd``, ``netbsd`` or ``openbsd`` goes further: the program takes its system for that one, kqueue
behaves as there, and what only Linux has is taken away: names of Python's modules (epoll, pidfd, splice ...), calls of
the C library, and the file systems /proc and /sys. Nothing in kore knows of it.
"""

from __future__ import annotations

import errno
import importlib
import os
import select
import selectors
import sys

import kqueue_notes
import kqueue_standin

NAMES = {
    "KQ_FILTER_READ": kqueue_notes.FILTER_READ, "KQ_FILTER_WRITE": kqueue_notes.FILTER_WRITE, "KQ_FILTER_AIO": -3,
    "KQ_FILTER_VNODE": -4, "KQ_FILTER_PROC": kqueue_notes.FILTER_PROC, "KQ_FILTER_SIGNAL": kqueue_notes.FILTER_SIGNAL,
    "KQ_FILTER_TIMER": kqueue_notes.FILTER_TIMER,
    "KQ_EV_ADD": kqueue_notes.EV_ADD, "KQ_EV_DELETE": kqueue_notes.EV_DELETE, "KQ_EV_ENABLE": kqueue_notes.EV_ENABLE,
    "KQ_EV_DISABLE": kqueue_notes.EV_DISABLE, "KQ_EV_ONESHOT": kqueue_notes.EV_ONESHOT,
    "KQ_EV_CLEAR": kqueue_notes.EV_CLEAR, "KQ_EV_SYSFLAGS": 0xF000, "KQ_EV_FLAG1": 0x2000,
    "KQ_EV_EOF": kqueue_notes.EV_EOF, "KQ_EV_ERROR": kqueue_notes.EV_ERROR,
    "KQ_NOTE_LOWAT": 1, "KQ_NOTE_EXIT": kqueue_notes.NOTE_EXIT, "KQ_NOTE_FORK": 0x40000000, "KQ_NOTE_EXEC": 0x20000000,
    "kqueue": kqueue_standin.kqueue, "kevent": kqueue_standin.kevent,
}

LINUX_ONLY = {
    "select": ("epoll", "EPOLL*", "POLLRDHUP", "POLLMSG"),
    "os": (
        "pidfd_open", "P_PIDFD", "splice", "SPLICE_*", "sched_getattr", "O_TMPFILE", "O_DIRECT", "O_NOATIME", "RWF_*",
        "*xattr", "XATTR_*", "setns", "unshare", "CLONE_*", "SCHED_BATCH", "SCHED_IDLE", "RTLD_DEEPBIND", "pipe2",
        "preadv", "pwritev", "waitid", "P_ALL", "P_PID", "P_PGID",
    ),
    "socket": (
        "MSG_CMSG_CLOEXEC", "MSG_NOSIGNAL", "SO_PEERCRED", "SO_DOMAIN", "SO_PROTOCOL",
        "SO_REUSEPORT", "TCP_*[!Y]", "AF_NETLINK", "AF_PACKET", "AF_ALG", "AF_VSOCK", "AF_CAN", "PF_*",
    ),
    "signal": ("pidfd_send_signal", "SIGPOLL", "SIGPWR", "SIGSTKFLT", "SIGRTM*", "sigtimedwait", "sigwaitinfo"),
    "fcntl": ("F_*PIPE_SZ", "F_*_SEALS", "F_SEAL_*", "F_NOTIFY", "F_OFD_*", "DN_*"),
    "resource": ("prlimit", "RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_RT*", "RLIMIT_SIGPENDING", "RUSAGE_THREAD"),
    "errno": (
        "ENONET", "ENOMEDIUM", "EMEDIUMTYPE", "EREMOTEIO", "EUCLEAN", "ENOKEY", "EKEY*", "ERESTART", "ENOSR", "ENOSTR",
        "ETIME", "ENODATA", "ENOPKG", "EADV", "ECOMM", "ESRMNT", "EBADF?", "ENOTUNIQ", "EREMCHG", "ELIB*", "ESTRPIPE",
        "EL2*", "EL3*", "ENOCSI", "EBADE", "EBADR*", "EXFULL", "ENOANO", "EBADSLT", "EBFONT", "EDOTDOT", "EISNAM",
    ),
    "mmap": ("MAP_POPULATE", "MAP_DENYWRITE", "MAP_EXECUTABLE", "MADV_*"),
    "time": ("CLOCK_BOOTTIME", "CLOCK_TAI", "CLOCK_MONOTONIC_RAW"),
}
"""What the Pythons of the BSDs have not, or not all of them at all times. Patterns as fnmatch has them."""

NOT_ON_OPENBSD = {
    "os": (
        "eventfd*", "EFD_*", "sendfile", "memfd_create", "MFD_*", "sched_*affinity", "O_PATH", "posix_fadvise",
        "posix_fallocate", "copy_file_range", "getrandom", "GRND_*",
    ),
}
"""Nor on NetBSD; FreeBSD has them by now."""

LINUX_CALLS = frozenset({"prctl", "syscall", "unshare", "setns"})
LINUX_FILES = ("/proc/", "/sys/")


def take_away(names) -> None:
    """Leave what a BSD has of the names of Python's modules."""
    import fnmatch

    for module_name, patterns in names.items():
        for name in (module_name, "_" + module_name, "posix" if module_name == "os" else module_name):
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            for found in [each for each in vars(module) if any(fnmatch.fnmatch(each, one) for one in patterns)]:
                delattr(module, found)


def is_linux_file(path) -> bool:
    """Whether this is below a file system of Linux's."""
    return isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(LINUX_FILES)


def refuse(event, arguments) -> None:
    """An audit hook: there is no file of Linux's, and its calls are not in the C library."""
    if event in ("open", "os.listdir", "os.scandir"):
        if is_linux_file(arguments[0]):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), arguments[0])
    elif event == "ctypes.dlsym":
        if arguments[1] in LINUX_CALLS:
            raise AttributeError(f"undefined symbol: {arguments[1]}")
    elif event == "ctypes.dlopen" and "liburing" in str(arguments[0]):
        raise OSError(f"{arguments[0]}: cannot open shared object file")


def readlink(path, *, dir_fd=None, readlink=os.readlink):
    """os.readlink, of which no audit hook hears."""
    if is_linux_file(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return readlink(path, dir_fd=dir_fd)


class SilentPoll:
    """poll(2) of NetBSD, which never says POLLHUP of a socket (sodopoll()).

    Of unix sockets it still does here: that their peer is gone getpeername(2) tells there, and does not on Linux.
    """

    def __init__(self, poll=select.poll) -> None:
        self._poll = poll()
        self.register, self.modify, self.unregister = self._poll.register, self._poll.modify, self._poll.unregister

    def poll(self, timeout=None):
        """See select.poll."""
        told = [
            (fd, bits & ~select.POLLHUP if bits & select.POLLHUP and is_internet(fd) else bits)
            for fd, bits in self._poll.poll(timeout)
        ]
        return [(fd, bits) for fd, bits in told if bits]


def is_internet(fd: int) -> bool:
    """Whether this is a socket, and no unix one."""
    import socket

    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    family = sock.family
    sock.detach()
    return family != socket.AF_UNIX


def pretend(system: str) -> None:
    """Have this program take its system for another, as far as a server can tell."""
    users = kqueue_standin.KINDS.pop(kqueue_notes.FILTER_USER)
    if system == "freebsd":
        sys.platform = "freebsd14"
        kqueue_standin.KINDS[kqueue_notes.FILTER_USER] = users
    elif system == "netbsd":
        sys.platform = "netbsd10"
        kqueue_standin.KINDS[8] = users
        kqueue_notes.refuses_zombies = True
        kqueue_notes.no_reader = errno.EBADF
        select.poll = SilentPoll
    else:
        sys.platform = "openbsd7"  # before 7.7: without a filter for the program's own events
        kqueue_notes.refuses_zombies = True
    take_away(LINUX_ONLY)
    if system != "freebsd":
        take_away(NOT_ON_OPENBSD)
    del selectors.EpollSelector
    os.readlink = readlink
    sys.addaudithook(refuse)


for _name, _value in NAMES.items():
    setattr(select, _name, _value)

if "STANDIN_SYSTEM" in os.environ:
    pretend(os.environ["STANDIN_SYSTEM"])

importlib.reload(selectors)  # it chose its DefaultSelector when `socket` was loaded, before there was a kqueue
