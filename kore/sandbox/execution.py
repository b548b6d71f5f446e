"""Running a program by posix_spawn(3): looked for in PATH, with three descriptors and nothing else of ours.

posix_spawn borrows our memory until the program runs (CLONE_VFORK), where fork(2) copies its page tables, and tells in
the call why it does not run. In the child every signal has its default action again, and none is blocked.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping
from typing import Any

_ALL_SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


class NotInPathError(OSError):
    """A program that is in no directory of PATH, or in one without being executable."""


def find(program: str, environment: Mapping[str, str]) -> str:
    """The path of a program. Raises NotInPathError (ENOENT, EACCES) for one that PATH does not lead to."""
    if "/" in program:
        return program
    found = errno.ENOENT
    for directory in os.get_exec_path(environment):
        path = os.path.join(directory, program)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
        if os.path.isfile(path):
            found = errno.EACCES
    raise NotInPathError(found, f"{os.strerror(found)}, in no directory of PATH", program)


def execute(
    path: str, arguments: list[str] | list[bytes], environment: Mapping[Any, Any], *,
    stdin: int, stdout: int, stderr: int, new_session: bool = False,
) -> int:
    """Run a program; its pid. Raises OSError as execve(2) and fork(2) do.

    All our other descriptors must close on exec. None of the three may be a standard one, which the child's overwrite.
    """
    options: dict[str, Any] = {"setsid": True} if new_session else {}
    return os.posix_spawn(
        path, arguments, environment, setsigmask=[], setsigdef=_ALL_SIGNALS, **options,
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((stdin, stdout, stderr))])
