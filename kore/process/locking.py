"""Keeping the key manager's memory out of swap, as far as the limits allow it: mlockall(2).

With a limit on locked memory the kernel refuses what would go beyond it, unless a capability is there that the process
is about to give up. Then everything it has by now is locked, and the heap, which is made large before, serves what
comes later; only what outgrows that is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from typing import Final

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4  # mman.h; the last: pages when they are first touched (Linux 4.4)

HEAP_BYTES: Final = 16 << 20
"""Room in the heap for what is allocated later: pairs of a hundred domains."""

# malloc.h. One arena for all threads, nothing outside the heap, and nothing of it given back.
MALLOC_OPTIONS: Final = {-8: 1, -4: 0, -1: 2 * HEAP_BYTES}  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD


def allow() -> None:
    """Let this process and its children lock all their memory, where it has the right to say so."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def lock_memory() -> str | None:
    """Keep what this process touches, now and later, out of swap; None, or what is not and why."""
    if sys.platform != "linux":
        return "memory is not locked: there is no mlockall with MCL_ONFAULT here"
    libc = ctypes.CDLL(None, use_errno=True)
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = limit == resource.RLIM_INFINITY
    if not unlimited:
        _grow_heap(libc)
    if libc.mlockall(ctypes.c_int(MCL_CURRENT | MCL_ONFAULT | (MCL_FUTURE if unlimited else 0))) != 0:
        return f"memory is not locked: {os.strerror(ctypes.get_errno())}, the limit is {limit} bytes"
    return None if unlimited else f"what outgrows {HEAP_BYTES} bytes is not locked: the limit is {limit} bytes"


def _grow_heap(libc: ctypes.CDLL) -> None:
    try:
        for option, value in MALLOC_OPTIONS.items():
            libc.mallopt(ctypes.c_int(option), ctypes.c_int(value))
    except AttributeError:
        return  # musl
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.free(libc.malloc(ctypes.c_size_t(HEAP_BYTES)))
