"""Making child processes: the one place where the server starts a program.

By posix_spawn(3), which borrows the worker's memory until the program runs (CLONE_VFORK) where fork(2) copies its
page tables, and tells in the call why it does not run. The child gets three descriptors and nothing else of the
worker's: every signal has its default action again, none is blocked, and all other descriptors close as it starts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Mapping
from typing import NamedTuple

from kore.readiness.syscalls import possible_fds

_CLOSE_RANGE_CLOEXEC = 1 << 2  # close_range(2), Linux 5.11, FreeBSD 14

_UINT_MAX = ctypes.c_uint(0xFFFFFFFF)

_close_range = getattr(ctypes.CDLL(None), "close_range", None)
"""glibc 2.34, FreeBSD; older kernels say ENOSYS or EINVAL."""

_ALL_SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


class Spawned(NamedTuple):
    """A child and our ends of its pipes, which do not block."""

    pid: int
    stdin: int
    """The writing end of its standard input."""
    stdout: int
    """The reading end of its standard output and error."""


def spawn(arguments: list[str], environment: dict[str, str] | None) -> Spawned:
    """Start a program with pipes for its input and output. Raises OSError as execve(2), pipe(2) and fork(2) do.

    A program without a slash is looked for in the PATH of `environment` (None: ours).
    """
    inherited: Mapping[str, str] = os.environ if environment is None else environment
    path = find(arguments[0], inherited)
    fds: list[int] = []
    try:
        fds += _pipe()
        fds += _pipe()
        child_in, stdin, stdout, child_out = fds
        os.set_blocking(stdin, False)
        os.set_blocking(stdout, False)
        _close_on_exec()
        pid = os.posix_spawn(
            path, arguments, inherited, setsigmask=[], setsigdef=_ALL_SIGNALS,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, child_in, 0),
                (os.POSIX_SPAWN_DUP2, child_out, 1),
                (os.POSIX_SPAWN_DUP2, child_out, 2),
            ])
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    os.close(child_in)
    os.close(child_out)
    return Spawned(pid, stdin, stdout)


def find(program: str, environment: Mapping[str, str]) -> str:
    """The path of a program. Raises FileNotFoundError or PermissionError."""
    if "/" in program:
        return program
    found = errno.ENOENT
    for directory in os.get_exec_path(environment):
        path = os.path.join(directory, program)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
        if os.path.isfile(path):
            found = errno.EACCES
    raise OSError(found, f"{os.strerror(found)}, in no directory of PATH", program)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are no standard descriptors, which the child's would overwrite: we may run without those."""
    ends = list(os.pipe())
    low = []
    try:
        for number, fd in enumerate(ends):
            if fd <= 2:
                low.append(fd)
                ends[number] = _above_standard(fd)
    finally:
        for fd in low:
            os.close(fd)
    return ends[0], ends[1]


def _above_standard(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def _close_on_exec() -> None:
    """Have no descriptor above the standard ones inherited. Python's are not anyway; those of C libraries may be."""
    if _close_range is not None and _close_range(3, _UINT_MAX, _CLOSE_RANGE_CLOEXEC) == 0:
        return
    for fd in possible_fds():
        if fd > 2:
            try:
                os.set_inheritable(fd, False)
            except OSError:
                continue  # not open, or that of the listing
