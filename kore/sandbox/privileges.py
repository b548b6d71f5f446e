"""What a process gives up of its user's rights, once and in order: root directory, user, capabilities, ways back.

A process that serves strangers needs none of what root may do. The order is forced by the kernel: a directory is
entered while that is still allowed, the bounding set and the securebits can be changed only with a capability, and
changing the user makes the kernel forget the parent-death signal and decide anew about core dumps (prctl(2)), so both
are said again afterwards. Every step is named in the error it may fail with.

python-prctl makes the calls it knows. It does not know ambient capabilities and their securebits, and of capabilities
only those of the kernel headers it was built with: dropping "all" with it would leave the newest. These go by number,
until the kernel says that there are no more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pwd
import resource
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from kore.errors import SandboxError

CAP_DAC_OVERRIDE: Final = 1
CAP_KILL: Final = 5
CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
CAP_SETPCAP: Final = 8
CAP_IPC_LOCK: Final = 14
CAP_SYS_CHROOT: Final = 18
CAP_SYS_PTRACE: Final = 19

NAMES: Final = {
    CAP_DAC_OVERRIDE: "CAP_DAC_OVERRIDE",
    CAP_KILL: "CAP_KILL",
    CAP_SETGID: "CAP_SETGID",
    CAP_SETUID: "CAP_SETUID",
    CAP_SETPCAP: "CAP_SETPCAP",
    CAP_IPC_LOCK: "CAP_IPC_LOCK",
    CAP_SYS_CHROOT: "CAP_SYS_CHROOT",
    CAP_SYS_PTRACE: "CAP_SYS_PTRACE",
}

CAPABILITIES_MAX: Final = 64
"""The sets have 64 bits, capget(2); the kernel ends the walk earlier, by EINVAL."""

_CAPABILITY_VERSION_3: Final = 0x20080522
_PR_CAPBSET_DROP: Final = 24
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_SECUREBITS: Final = 28

# capabilities(7): root is nobody special (NOROOT), changing the user changes no capabilities by itself
# (NO_SETUID_FIXUP), none are raised into the ambient set or kept (KEEP_CAPS off); each with the bit that locks it.
_NOROOT, _NO_SETUID_FIXUP, _KEEP_CAPS_LOCKED, _NO_AMBIENT_RAISE = 0x01 | 0x02, 0x04 | 0x08, 0x20, 0x40 | 0x80
SECUREBITS: Final = _NOROOT | _NO_SETUID_FIXUP | _KEEP_CAPS_LOCKED | _NO_AMBIENT_RAISE


@dataclass(frozen=True, slots=True)
class Identity:
    """A user of the passwd database, found while that could still be read."""

    name: str
    uid: int
    gid: int
    """The primary group: the only one that a process with this identity has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """What a process is to be left with."""

    root: str | None = None
    """The directory to live in, absolute; None: the current one."""
    chroot: bool = False
    """Whether `root` becomes "/" (chroot(2)) or only the current directory."""
    identity: Identity | None = None
    """None: the user stays who it is."""
    confined: bool = True
    """Whether capabilities, their ways back, dumps and limits go as well: the sandbox. Linux only."""
    processes_max: int | None = None
    """RLIMIT_NPROC, which counts threads too, all of the user's (getrlimit(2)); None: untouched."""
    locked_bytes_max: int | None = None
    """RLIMIT_MEMLOCK; None: untouched."""
    parent: int | None = None
    """The parent's pid: the process ends when the parent does. None: it does not care."""


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def resolve(name: str) -> Identity:
    """The user called `name`, or with that number. To be called before any chroot. Raises SandboxError."""
    try:
        numeric = name.isascii() and name.isdecimal()
        entry = pwd.getpwuid(int(name)) if numeric else pwd.getpwnam(name)
    except (KeyError, OverflowError, ValueError):
        reason = "there is no such user; name one of the passwd database (getent passwd)"
        raise SandboxError(f"user {name!r}", reason) from None
    return Identity(entry.pw_name, entry.pw_uid, entry.pw_gid)


def prepare() -> None:
    """Load what `give_up` needs, while it can be loaded. Raises SandboxError, which says how to install it."""
    _prctl()


def capabilities() -> frozenset[int]:
    """The effective capabilities of this process. Elsewhere than on Linux root has those named here, others none."""
    if sys.platform != "linux":
        return frozenset(NAMES) if os.geteuid() == 0 else frozenset()
    effective = _capget()[0]
    return frozenset(number for number in range(CAPABILITIES_MAX) if effective >> number & 1)


def missing_for(rights: Rights) -> list[str]:
    """The names of the capabilities that `give_up` would need and that this process does not have."""
    needed = [CAP_SYS_CHROOT] if rights.chroot else []
    if rights.identity is not None:
        needed += [CAP_SETGID, CAP_SETUID]
    have = capabilities()
    return [NAMES[number] for number in needed if number not in have]


def give_up(rights: Rights) -> None:
    """Give up everything but `rights`, for good. Called once in a process, before it has threads.

    Raises SandboxError, which names the step: the process must end then. Ends it (SystemExit) when the parent is gone.
    """
    if rights.confined:
        _limit("RLIMIT_CORE", 0)
        _limit("RLIMIT_NOFILE", resource.getrlimit(resource.RLIMIT_NOFILE)[0])  # as it is, and no higher
        if rights.processes_max is not None:
            _limit("RLIMIT_NPROC", rights.processes_max)
        if rights.locked_bytes_max is not None:
            _limit("RLIMIT_MEMLOCK", rights.locked_bytes_max)
    _enter(rights.root, rights.chroot)
    if rights.confined:
        with step("drop the bounding and ambient capabilities, lock the securebits"):
            _close_ways_back()
    if rights.identity is not None:
        _become(rights.identity)
    if rights.confined:
        with step("drop all capabilities"):
            _capset(frozenset())
        _forbid_gains()
    if rights.parent is not None:
        _die_with(rights.parent)


def restrain_parent(keep: Iterable[int]) -> None:
    """Leave this process no capabilities but `keep`, nor a way to others: for a parent, whose children do the rest.

    It stays root for the programs that it may start, within the bounding set: NOROOT would be inherited too early.
    Raises SandboxError.
    """
    kept = frozenset(keep)
    with step("drop the parent's capabilities"):
        if CAP_SETPCAP in capabilities():
            _drop_bounding(kept)
        _ambient_clear()
        _capset(kept)
    _forbid_gains()


def _enter(root: str | None, chroot: bool) -> None:
    if root is None:
        return
    if chroot:
        with step(f"chroot to {root}"):
            os.chroot(root)
        root = "/"
    with step(f"change to the directory {root}"):
        os.chdir(root)


def _become(identity: Identity) -> None:
    """Groups first: afterwards there is no right to change them. All three ids, so that no saved one leads back."""
    with step(f"set the groups to {identity.gid} (user {identity.name})"):
        os.setgroups([identity.gid])
        os.setresgid(identity.gid, identity.gid, identity.gid)
    with step(f"switch to user {identity.name}"):
        os.setresuid(identity.uid, identity.uid, identity.uid)
    ids = (*os.getresuid(), *os.getresgid())
    if ids != (identity.uid,) * 3 + (identity.gid,) * 3 or set(os.getgroups()) - {identity.gid}:
        raise SandboxError(f"switch to user {identity.name}", f"the ids are {ids} and the groups {os.getgroups()}")


def _close_ways_back() -> None:
    """Whoever has no right to is left with no_new_privs, which alone keeps an execve(2) from giving anything."""
    if CAP_SETPCAP in capabilities():
        _drop_bounding(frozenset())
        _ambient_clear()
        # With this, changing the user leaves the capabilities alone; they are dropped afterwards, all at once.
        _raw_prctl(_PR_SET_SECUREBITS, SECUREBITS)
    else:
        _ambient_clear()


def _forbid_gains() -> None:
    """no_new_privs and dumpable are said after the change of the user, which decides about dumpable itself."""
    prctl = _prctl()
    with step("set no_new_privs"):
        prctl.set_no_new_privs(1)
    with step("forbid core dumps and tracing"):
        prctl.set_dumpable(0)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        with step("set the parent-death signal"):
            _raw_prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(0)  # it died before the call above, which therefore never hears of it


def _limit(name: str, value: int) -> None:
    """Soft and hard limit: what is lowered only softly is raised again by whoever takes over the process."""
    with step(f"set {name} to {value}"):
        resource.setrlimit(getattr(resource, name), (value, value))


def _drop_bounding(keep: frozenset[int]) -> None:
    for number in range(CAPABILITIES_MAX):
        if number in keep:
            continue
        try:
            _raw_prctl(_PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return  # the kernel has no more
            raise


def _ambient_clear() -> None:
    try:
        _raw_prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 4.3 has no such set
            raise


def _capget() -> tuple[int, int, int]:
    """The effective, permitted and inheritable set."""
    data = (_Data * 2)()
    _call(_libc().capget, ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), data)
    low, high = data
    return (
        high.effective << 32 | low.effective,
        high.permitted << 32 | low.permitted,
        high.inheritable << 32 | low.inheritable,
    )


def _capset(keep: frozenset[int]) -> None:
    """Reduce the effective and the permitted set to what they have of `keep`; the inheritable one becomes empty."""
    mask = sum(1 << number for number in keep)
    effective, permitted, _ = _capget()
    data = (_Data * 2)()
    for half, shift in enumerate((0, 32)):
        data[half].effective = (effective & mask) >> shift & 0xFFFFFFFF
        data[half].permitted = (permitted & mask) >> shift & 0xFFFFFFFF
    _call(_libc().capset, ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), data)


def _raw_prctl(option: int, argument: int) -> None:
    """prctl(2) with one argument; the kernel wants zeros for the others. Raises OSError."""
    zero = ctypes.c_ulong(0)
    _call(_libc().prctl, ctypes.c_int(option), ctypes.c_ulong(argument), zero, zero, zero)


def _call(function: Any, *arguments: object) -> None:
    """Call a function of the C library that returns -1 and errno. Raises OSError."""
    if function(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_library: ctypes.CDLL | None = None


def _libc() -> ctypes.CDLL:
    global _library
    if _library is None:
        _library = ctypes.CDLL(None, use_errno=True)
    return _library


def _prctl() -> Any:
    """The module of python-prctl. Raises SandboxError."""
    try:
        return import_module("prctl")
    except ImportError as error:
        raise SandboxError(
            "the sandbox needs python-prctl",
            f"{error}; install it (it is compiled: apt-get install gcc python3-dev libcap-dev, then pip install "
            "'kore[sandbox]'), or set kore.config.sandbox = 'no'",
        ) from error


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Inside, what the kernel refuses becomes a SandboxError that says which step it was: `what`."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = f"{error.strerror} (errno {error.errno})" if isinstance(error, OSError) else str(error)
        raise SandboxError(what, reason) from error
