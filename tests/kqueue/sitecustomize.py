"""Python's start-up hook: `select` gets the kqueue stand-in, in every program that has this folder in its PYTHONPATH.

``STANDIN_SYSTEM=openbsd`` goes further and takes away what only Linux has, so that the server runs as on a BSD: no
epoll, pidfd, splice, sendfile, memfd, accept4's flags ... Nothing in kore knows of either.
"""

from __future__ import annotations

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
    "select": ("epoll", "EPOLL*", "POLLRDHUP"),
    "os": (
        "pidfd_open", "P_PIDFD", "eventfd*", "EFD_*", "splice", "SPLICE_*", "sendfile", "memfd_create", "MFD_*",
        "sched_*affinity", "O_PATH", "O_TMPFILE", "O_DIRECT", "RWF_*", "posix_fadvise", "posix_fallocate", "preadv",
        "pwritev", "copy_file_range", "getrandom", "GRND_*", "*xattr", "setns", "unshare",
    ),
    "socket": (
        "MSG_CMSG_CLOEXEC", "SO_PEERCRED", "SO_DOMAIN", "SO_PROTOCOL", "TCP_USER_TIMEOUT", "TCP_KEEP*", "TCP_CORK",
        "TCP_QUICKACK", "TCP_DEFER_ACCEPT", "TCP_INFO", "AF_NETLINK", "AF_PACKET", "AF_ALG", "AF_VSOCK",
    ),
    "signal": ("pidfd_send_signal", "SIGPOLL", "SIGPWR", "SIGSTKFLT", "SIGRTM*"),
    "fcntl": ("F_*PIPE_SZ", "F_*_SEALS", "F_SEAL_*", "F_NOTIFY"),
}
"""What OpenBSD's Python has not. Patterns as fnmatch has them."""


def take_away() -> None:
    """Leave what a BSD has."""
    import fnmatch

    for module_name, patterns in LINUX_ONLY.items():
        for name in (module_name, "_" + module_name, "posix" if module_name == "os" else module_name):
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            for found in [each for each in vars(module) if any(fnmatch.fnmatch(each, one) for one in patterns)]:
                delattr(module, found)


for _name, _value in NAMES.items():
    setattr(select, _name, _value)

if os.environ.get("STANDIN_SYSTEM") == "openbsd":
    # What this system has not: children that are dead already, a filter for the program's own events.
    kqueue_notes.refuses_zombies = True
    kqueue_standin.KINDS.pop(kqueue_notes.FILTER_USER)
    take_away()
    sys.platform = "openbsd7"
    del selectors.EpollSelector

importlib.reload(selectors)  # it chose its DefaultSelector when `socket` was loaded, before there was a kqueue
