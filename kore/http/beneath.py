"""Opening a file below a directory so that nothing leads out of it: no dot segment, no symbolic link, no race.

Comparing path texts is what lets a sibling directory with the same beginning leak, and a check before the open can be
outrun. So the kernel is asked to keep the lookup inside: openat2(2) with RESOLVE_BENEATH follows symbolic links as
long as they stay below the directory, and refuses the others. Where there is no openat2 (Linux before 5.6, a sandbox
that forbids it, other systems) the path is walked component by component, and no symbolic link is followed at all.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Callable
from typing import Any, Final

OPENAT2: Final = 437  # the same number on every architecture but alpha
AT_FDCWD: Final = -100
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_BENEATH: Final = 0x08

ATTEMPTS: Final = 8
"""Tries when openat2(2) says EAGAIN: somebody renames directories while ".." of a link is followed."""

O_PATH: Final = getattr(os, "O_PATH", os.O_RDONLY)
DIRECTORY_FLAGS: Final = O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
FILE_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
"""O_NONBLOCK: opening a FIFO returns at once, fifo(7). It means nothing to regular files."""

_HOW: Final = struct.Struct("=QQQ")  # struct open_how: flags, mode, resolve
_how_of_file = _HOW.pack(FILE_FLAGS, 0, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)


def open_directory(path: str | bytes) -> int:
    """An fd that stands for a directory and for nothing else. Raises OSError."""
    return os.open(path, DIRECTORY_FLAGS)


def open_beneath(directory: int, path: bytes) -> int:
    """Open `path` for reading, without waiting, below the directory whose fd is given; ``b"."`` is that itself.

    Raises OSError as openat2(2) does: EXDEV or ELOOP where a link leads out or may not be followed.
    """
    global _open  # which of the two it is shows when it is first needed, in the process that serves
    if _open is None:
        _open = _openat2() or walk
    return _open(directory, path)


def walk(directory: int, path: bytes) -> int:
    """The same without openat2(2): component by component, following no symbolic link. Raises OSError."""
    *parents, name = path.split(b"/")
    current = directory
    try:
        for component in parents:
            below = os.open(component, DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=current)
            if current != directory:
                os.close(current)
            current = below
        return os.open(name, FILE_FLAGS | os.O_NOFOLLOW, dir_fd=current)
    finally:
        if current != directory:
            os.close(current)


def _openat2() -> Callable[[int, bytes], int] | None:
    """The way through openat2(2), None where there is none. Tried, not looked up by version."""
    if not sys.platform.startswith("linux"):
        return None
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
    syscall.restype = ctypes.c_long
    how = _HOW.pack(DIRECTORY_FLAGS, 0, RESOLVE_NO_MAGICLINKS)
    fd = syscall(OPENAT2, AT_FDCWD, b".", how, len(how))
    if fd >= 0:
        os.close(fd)
    elif ctypes.get_errno() in (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.E2BIG):
        return None  # EPERM is what a seccomp filter that does not know the call may say
    return _through(syscall)


def _through(syscall: Any) -> Callable[[int, bytes], int]:
    how, size = _how_of_file, len(_how_of_file)

    def openat2(directory: int, path: bytes) -> int:
        for _ in range(ATTEMPTS):
            fd = int(syscall(OPENAT2, directory, path, how, size))
            if fd >= 0:
                return fd
            number = ctypes.get_errno()
            if number not in (errno.EAGAIN, errno.EINTR):
                break
        raise OSError(number, os.strerror(number), path)

    return openat2


_open: Callable[[int, bytes], int] | None = None
