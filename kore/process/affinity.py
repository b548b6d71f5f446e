"""How many CPUs this server may use and which worker sits on which: the allowed mask and the cgroup's quota.

The number of CPUs of the machine says little in a container: the mask of sched_getaffinity(2) and the quota of
the cgroup (cgroups(7), cpu.max or cpu.cfs_quota_us) decide, and workers beyond them only take turns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator


def allowed_cpus() -> list[int]:
    """The CPUs this process may run on, in order; those of the machine where there is no mask."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_of_worker(worker: int, cpus: list[int]) -> int:
    """The CPU of worker 1, 2 ...: the k-th allowed one, again from the first when they are used up."""
    return cpus[(worker - 1) % len(cpus)]


def pin(cpu: int) -> str | None:
    """Pin this process to `cpu`. The reason when that failed, None when done; nothing to do where there is no call."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    try:
        os.sched_setaffinity(0, {cpu})
    except OSError as error:
        return error.strerror
    return None


def default_workers(root: str = "/") -> int:
    """Workers when nobody says: the allowed CPUs, no more than the cgroup's quota pays for (rounded up), at least 1."""
    cpus = len(allowed_cpus())
    quota = cpu_quota(root)
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def cpu_quota(root: str = "/") -> float | None:
    """CPUs' worth of time the cgroups of this process allow, the least on the way to the root; None: no limit.

    `root` is where /proc and /sys are looked for.
    """
    quotas = [quota for directory in _cgroup_directories(root) if (quota := _quota(directory)) is not None]
    return min(quotas, default=None)


def _cgroup_directories(root: str) -> Iterator[str]:
    """The directories of the cgroup that limits CPU time and of its ancestors, version 1 and 2."""
    mounts = list(_cgroup_mounts(root))
    for line in _read(os.path.join(root, "proc/self/cgroup")).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for kind, mount_root, mount_point in mounts:
            if (kind == "cgroup2") == (not controllers):
                # Inside a container the path may be told as the host sees it; the mount shows part of it only.
                inner = os.path.relpath(path, mount_root) if _inside(path, mount_root) else "."
                yield from _upwards(os.path.join(root, mount_point.lstrip("/")), inner)


def _cgroup_mounts(root: str) -> Iterator[tuple[str, str, str]]:
    """(type, root of the mount, mount point) of the mounts that carry a cpu controller (proc(5), mountinfo)."""
    for line in _read(os.path.join(root, "proc/self/mountinfo")).splitlines():
        front, _, back = line.partition(" - ")
        fields, tail = front.split(), back.split()
        if len(fields) < 5 or len(tail) < 3:
            continue
        if tail[0] == "cgroup2" or (tail[0] == "cgroup" and "cpu" in tail[2].split(",")):
            yield tail[0], fields[3], fields[4]


def _inside(path: str, ancestor: str) -> bool:
    return path == ancestor or path.startswith(ancestor.rstrip("/") + "/")


def _upwards(top: str, inner: str) -> Iterator[str]:
    parts = [] if inner == "." else inner.split("/")
    if ".." in parts:
        parts = []
    for depth in range(len(parts), -1, -1):
        yield os.path.join(top, *parts[:depth])


def _quota(directory: str) -> float | None:
    words = _read(os.path.join(directory, "cpu.max")).split()
    if not words:
        words = [
            _read(os.path.join(directory, "cpu.cfs_quota_us")).strip(),
            _read(os.path.join(directory, "cpu.cfs_period_us")).strip(),
        ]
    try:
        quota, period = int(words[0]), int(words[1])
    except (ValueError, IndexError):
        return None  # "max", or no such file: no limit
    return quota / period if quota > 0 and period > 0 else None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
