"""The file descriptors of a worker: how many it may have, within the hard limit, and which it may not keep.

The option counts what the worker opens besides what is open already (process notes, 6.4). Fewer descriptors than
connections would make accept(2) fail under load, so the connections that are allowed are always paid for.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping

from kore.readiness.syscalls import possible_fds

SPARE = 64
"""Descriptors beyond one for each connection: files being sent, a database, the ring."""


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    count = 0
    for fd in possible_fds():
        try:
            os.fstat(fd)
        except OSError:
            continue  # not open, or that of the listing
        count += 1
    return count


def open_standard() -> None:
    """Open the standard streams that this process was started without, on /dev/null.

    Else what is opened first has their numbers, and is written to as if it were one of them. To be called before.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            assert os.open(os.devnull, os.O_RDWR) == number, "open(2) gives the lowest number there is"


def inherited() -> dict[int, tuple[int, int]]:
    """The descriptors this process was started with but for the standard streams: each with what it is, as far as told.

    Those that a service manager hands over on purpose (sd_listen_fds(3)) are not among them. To be called before
    anything is opened.
    """
    handed = os.environ.get("LISTEN_FDS", "")
    meant = range(3, 3 + int(handed)) if handed.isdecimal() and len(handed) < 6 else range(0)
    found = {}
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return {}
    for fd in map(int, names):
        if fd > 2 and fd not in meant and (identity := _identity(fd)) is not None:
            found[fd] = identity
    return found


def close_inherited(strays: Mapping[int, tuple[int, int]]) -> None:
    """Close those of `strays` that are what they were: the application may have closed one, and use its number."""
    for fd, identity in strays.items():
        if _identity(fd) == identity:
            os.close(fd)


def _identity(fd: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(fd)
    except OSError:
        return None  # the listing's own
    return found.st_dev, found.st_ino


def limit_descriptors(wanted: int, connections: int) -> str | None:
    """Set RLIMIT_NOFILE for `wanted` descriptors, or for `connections` and SPARE if that is more.

    Returns what the log should say when it is not as asked for, else None. Never raises the hard limit.
    """
    already = open_descriptors()
    goal = max(wanted, connections + SPARE) + already
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = goal if hard == resource.RLIM_INFINITY else min(goal, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError) as error:
        return f"RLIMIT_NOFILE could not be set to {limit}: {error}"
    if limit < goal:
        return (
            f"RLIMIT_NOFILE is {limit}, the hard limit, and not {goal}: {connections} connections "
            "(worker_max_connections) may not fit; raise the limit or lower the option"
        )
    return None
