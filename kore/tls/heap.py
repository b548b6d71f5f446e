"""Has the C library keep the memory it gave out for large responses, in place of giving it back after each piece.

Encrypting makes a fresh copy of every byte that leaves, in pieces of 64 KiB. As the C library is set, the last piece
that goes takes the end of the heap with it and the next has the kernel clear it anew: 800 brk(2) for 1000 pieces, and
a third of all CPU time of large responses (1,350 against 930 us for 1 MiB).
"""

from __future__ import annotations

import ctypes
from typing import Final

# malloc.h, mallopt(3); the GNU C library's alone.
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3

KEPT_BYTES: Final = 16 << 20
"""Free memory at the end of the heap that is kept: the pieces of 64 clients that read at once."""

MAPPED_BYTES: Final = 4 << 20
"""From this size on an allocation is mapped by itself, and given back as soon as it is freed."""


def keep_heap() -> None:
    """Set it, for this process; nothing where the C library has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
