"""The title of a process as ps and top show it: ``kore [wrk 1]``.

Linux shows the memory in which the kernel put the arguments, so that memory is written to; nothing else of the
process is touched: CPython and glibc copied the arguments at start and the environment lies behind them. The
place is named by /proc/self/stat (proc(5): arg_start, arg_end) and is compared with /proc/self/cmdline first.
"""

from __future__ import annotations

import ctypes
import os
import sys

from kore.process import prctl

# Fields 48 and 49 of proc(5) stat, counted from field 3, the first behind the parenthesised name.
ARG_START, ARG_END = 45, 46


def _argument_area() -> tuple[int, int] | None:
    """Address and length of the argument memory; None where it cannot be told for sure."""
    try:
        with open("/proc/self/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        with open("/proc/self/cmdline", "rb") as cmdline:
            shown = cmdline.read()
        start, end = int(fields[ARG_START]), int(fields[ARG_END])
    except (OSError, ValueError, IndexError):
        return None
    length = end - start
    if start == 0 or not 0 < length < 1 << 20 or len(shown) > length:
        return None
    return (start, length) if ctypes.string_at(start, len(shown)) == shown else None


def set_title(name: str, label: str) -> bool:
    """Show this process as ``name label`` and set its comm; False where the title cannot be set.

    A title longer than the original arguments is cut; a long name is cut in comm so that the label survives.
    """
    name = os.path.basename(name) or "kore"
    room = prctl.COMM_BYTES_MAX - len(label) - 1
    try:
        prctl.set_comm(f"{name.encode('utf-8', 'replace')[:room].decode('utf-8', 'ignore')} {label}")
    except OSError:
        pass  # a name is decoration: nothing depends on it
    if sys.platform != "linux":
        return False
    area = _argument_area()
    if area is None:
        return False
    start, length = area
    # The last byte stays NUL: otherwise the kernel shows the environment behind it as well.
    title = f"{name} {label}".encode("utf-8", "replace")[: length - 1]
    ctypes.memmove(start, title.ljust(length, b"\0"), length)
    return True
