"""Calls a child makes of itself: its short name, the wish not to outlive its parent, memory that nobody else reads.

Through ctypes on the C library that is loaded anyway: a few calls in a process's life are not worth a dependency.
Elsewhere than on Linux they do nothing and say so.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
COMM_BYTES_MAX = 15  # TASK_COMM_LEN is 16, with the terminating NUL


def _prctl(option: int, argument: object) -> None:
    """Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(ctypes.c_int(option), argument, zero, zero, zero) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def set_comm(name: str) -> bool:
    """Set the kernel's name of this process (ps -o comm, top): at most 15 bytes of it. False where there is none."""
    if sys.platform != "linux":
        return False
    _prctl(PR_SET_NAME, ctypes.c_char_p(name.encode("utf-8", "replace")[:COMM_BYTES_MAX]))
    return True


def set_parent_death_signal(number: int) -> bool:
    """Have the kernel send signal `number` to this process when its parent dies. False where that is unknown.

    The kernel forgets it when the process changes its user (prctl(2)), and a parent that died before the call
    is not noticed: who calls this compares os.getppid() afterwards.
    """
    if sys.platform != "linux":
        return False
    _prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number))
    return True


def forbid_dumps() -> None:
    """No core dumps, and no looks at this process's memory by others of its user. Raises OSError."""
    if sys.platform == "linux":
        _prctl(PR_SET_DUMPABLE, ctypes.c_ulong(0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
