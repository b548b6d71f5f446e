"""What differs between systems in the calls the driver makes itself, and calls that Python has for socket objects only.

Flags that a system lacks are 0 here, and what they would have done is done after the call by who asks for it.
"""

from __future__ import annotations

import errno
import os
import resource
import socket as names
import sys
from socket import AF_UNIX, SHUT_WR, SO_ACCEPTCONN, SOCK_STREAM, SOL_SOCKET, socket

__all__ = ["MSG_CMSG_CLOEXEC", "MSG_NOSIGNAL", "SHUT_WR", "has_abstract_sockets", "listens", "possible_fds", "shutdown"]

MSG_CMSG_CLOEXEC: int = getattr(names, "MSG_CMSG_CLOEXEC", 0)
"""Not on macOS: there fds that came along are inherited by a program started in the moment before Python sees them."""

MSG_NOSIGNAL: int = getattr(names, "MSG_NOSIGNAL", 0)
"""Python ignores SIGPIPE; this is for programs that changed that. Not on macOS."""


def has_abstract_sockets() -> bool:
    """Whether unix sockets can have a name that is no file (unix(7)): on Linux alone."""
    return sys.platform == "linux"


def listens(sock: socket) -> bool:
    """Whether a socket listens; yes where the system does not say. Raises OSError for what is no socket."""
    try:
        return bool(sock.getsockopt(SOL_SOCKET, SO_ACCEPTCONN))
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return True


FDS_TRIED_MAX = 65536
"""The highest fd looked for where the system does not list them: a process with more has its own list."""


def possible_fds() -> list[int]:
    """The fds this process may have open: those it has where the system lists them, else all that there may be."""
    try:
        # Not /dev/fd: on the BSDs that shows the first few, open or not, unless fdescfs is mounted there.
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return list(range(FDS_TRIED_MAX if soft == resource.RLIM_INFINITY else min(soft, FDS_TRIED_MAX)))


def shutdown(fd: int, how: int) -> None:
    """shutdown(2). The family given to the socket object plays no part in it; giving one saves it from asking."""
    borrowed = socket(AF_UNIX, SOCK_STREAM, 0, fd)
    try:
        borrowed.shutdown(how)
    finally:
        borrowed.detach()
