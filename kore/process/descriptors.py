"""How many file descriptors a worker may have open: what the options ask for, within the hard limit.

The option counts what the worker opens besides what is open already (process notes, 6.4). Fewer descriptors than
connections would make accept(2) fail under load, so the connections that are allowed are always paid for.
"""

from __future__ import annotations

import os
import resource

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
