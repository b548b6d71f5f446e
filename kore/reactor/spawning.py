"""Making child processes: the one place where the server starts a program.

By posix_spawn(3) from the worker itself; or, in the sandbox, by its spawner, because the worker's filter lets no
program be started. The child gets three descriptors and nothing else of the worker's: every signal has its default
action again, none is blocked, and all other descriptors close as it starts.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from kore.reactor.children import Child, OwnChild
from kore.sandbox.execution import execute, find

if TYPE_CHECKING:
    from kore.sandbox.spawner import Program, SpawnerClient

from kore.readiness.syscalls import possible_fds

_CLOSE_RANGE_CLOEXEC = 1 << 2  # close_range(2), Linux 5.11, FreeBSD 14

_UINT_MAX = ctypes.c_uint(0xFFFFFFFF)

_close_range = getattr(ctypes.CDLL(None), "close_range", None)
"""glibc 2.34, FreeBSD; older kernels say ENOSYS or EINVAL."""

_spawner: SpawnerClient | None = None
_refusal = ""


class Spawned(NamedTuple):
    """A child and our ends of its pipes, which do not block."""

    child: Child
    stdin: int
    """The writing end of its standard input."""
    stdout: int
    """The reading end of its standard output and error."""


def use(spawner: SpawnerClient | None) -> None:
    """Have programs started by `spawner` from now on; None: by this process itself."""
    global _spawner, _refusal
    _spawner = spawner
    _refusal = ""


def refuse(reason: str) -> None:
    """Have no program started from now on: who tries is told `reason`."""
    global _refusal
    _refusal = reason


def in_sandbox() -> bool:
    """Whether this process cannot start programs itself."""
    return _spawner is not None or bool(_refusal)


def start(
    program: str, arguments: list[str], environment: Mapping[str, str], streams: tuple[int, int, int], *,
    directory: str | None = None, new_session: bool = False,
) -> Program:
    """In the sandbox: have a program started on three descriptors. Raises OSError, PermissionError when refused."""
    if _refusal or _spawner is None:
        raise PermissionError(errno.EPERM, _refusal or "there is no spawner", program)
    return _spawner.spawn(
        program, arguments, environment, streams, directory=directory, new_session=new_session)


def close() -> None:
    """The end of the worker: the spawner ends, and what it has started."""
    spawner = _spawner
    use(None)
    if spawner is not None:
        spawner.close()


def spawn(arguments: list[str], environment: dict[str, str] | None) -> Spawned:
    """Start a program with pipes for its input and output. Raises OSError as execve(2), pipe(2) and fork(2) do.

    A program without a slash is looked for in the PATH of `environment` (None: ours).
    """
    inherited: Mapping[str, str] = os.environ if environment is None else environment
    if _refusal:
        raise PermissionError(errno.EPERM, _refusal, arguments[0])
    fds: list[int] = []
    try:
        fds += _pipe()
        fds += _pipe()
        child_in, stdin, stdout, child_out = fds
        os.set_blocking(stdin, False)
        os.set_blocking(stdout, False)
        if _spawner is not None:
            child: Child = start(arguments[0], arguments, inherited, (child_in, child_out, child_out))
        else:
            child = _start_here(arguments, inherited, child_in, child_out)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    os.close(child_in)
    os.close(child_out)
    return Spawned(child, stdin, stdout)


def _start_here(arguments: list[str], environment: Mapping[str, str], child_in: int, child_out: int) -> OwnChild:
    path = find(arguments[0], environment)
    _close_on_exec()
    return OwnChild(execute(path, arguments, environment, stdin=child_in, stdout=child_out, stderr=child_out))


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
