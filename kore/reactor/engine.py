"""Which engine this process runs on: io_uring where the kernel gives a ring, else the system's poller, or KORE_IO's.

The poller is epoll on Linux and kqueue on the BSDs and macOS, where nobody looks for a ring.

Whether a ring can be had is found by making one, not by asking for a version: containers forbid the call, old kernels
lack flags, limits on locked memory refuse the mapping. The trial ring is closed at once, so none exists across a fork.
"""

from __future__ import annotations

import errno
import os
import select

from kore.driver import Driver
from kore.errors import ConfigurationError, EngineError

ENGINES = ("uring", "epoll", "kqueue")

ELSEWHERE = {
    "epoll": "only Linux has it; unset KORE_IO, or use kqueue",
    "kqueue": "only the BSDs and macOS have it; unset KORE_IO, or use uring or epoll",
}
"""Where the system calls of these engines are, for those that are told that this is not there."""


def _wanted(io: str | None) -> str | None:
    wanted = io or os.environ.get("KORE_IO") or None
    if wanted is not None and wanted not in ENGINES:
        raise ConfigurationError(f"KORE_IO={wanted!r}: must be one of {', '.join(ENGINES)}")
    return wanted or (None if hasattr(select, "epoll") else "kqueue")


def _make(name: str, connects: bool = True, bounded: bool = False) -> Driver:
    if name == "uring":
        # Imported here so that an epoll process never loads liburing.
        from kore.uring.driver import UringDriver
        from kore.uring.restrictions import CONNECTING, OPEN, SERVING

        restrictions = SERVING if not connects else CONNECTING if bounded else OPEN
        uring: Driver = UringDriver(restrictions=restrictions)
        return uring
    if not hasattr(select, name):
        raise EngineError(name, errno.ENOSYS, f"there is no {name} on this system", ELSEWHERE[name])
    # Imported here because each needs names that only its own system has.
    if name == "kqueue":
        from kore.bsd.kqueue import KqueueDriver

        kqueue: Driver = KqueueDriver()
        return kqueue
    from kore.readiness.epoll import EpollDriver

    epoll: Driver = EpollDriver()
    return epoll


def new_driver(io: str | None = None, *, connects: bool = True, bounded: bool = False) -> Driver:
    """A driver of the engine `io` ("uring", "epoll" or "kqueue"), or of $KORE_IO, or of the best this kernel gives.

    With `connects` false the kernel refuses every connect on the ring (EACCES). `bounded` is for a process that
    Landlock bounds: the ring then connects by connect alone. Epoll has no ring to restrict: there the process's filter
    and Landlock say what it may connect to.

    Raises EngineError when a named engine cannot be had, ConfigurationError for an unknown name.
    """
    wanted = _wanted(io)
    if wanted is not None:
        return _make(wanted, connects, bounded)
    try:
        return _make("uring", connects, bounded)
    except EngineError:
        return _make("epoll")


def select_engine(io: str | None = None) -> tuple[str, str | None]:
    """The engine all workers are to use, and what is to be said of it in the log (one line), or None.

    That is why it is not io_uring, when that was tried and refused; or that the kernel cannot restrict rings.
    Tries for real and closes the trial at once: call it in the parent, before the first fork. Raises as `new_driver`.
    """
    wanted = _wanted(io)
    if wanted is not None:
        return wanted, _try(wanted)
    try:
        return "uring", _try("uring")
    except EngineError as exc:
        _try("epoll")
        return "epoll", f"io_uring is not available, using epoll: {exc}"


def _try(name: str) -> str | None:
    """Make a driver and close it; what the log should say. Raises EngineError."""
    driver = _make(name)
    driver.close()
    ring = getattr(driver, "ring", None)
    if ring is not None and not ring.restricted:
        return "this kernel cannot restrict rings (IORING_REGISTER_RESTRICTIONS): no filter sees what io_uring does"
    return None
