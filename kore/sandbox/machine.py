"""Which machine this is, and what its system calls are called: names and numbers come from libseccomp.

A filter compares numbers, and each machine has its own. libseccomp knows them all, so no table of ours can grow old;
it is loaded through pyseccomp at the first question, which the parent asks before it forks.
"""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Final

from kore.errors import SandboxError

STEP: Final = "seccomp filter"
"""What errors call all of this."""

X32_BIT: Final = 0x40000000
"""Set in the numbers of the x32 ABI, which share x86-64's audit value (seccomp(2))."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine filters are made for: its name as uname(2) has it, and its AUDIT_ARCH value (linux/audit.h)."""

    name: str
    audit: int


X86_64: Final = Machine("x86_64", 0xC000003E)
AARCH64: Final = Machine("aarch64", 0xC00000B7)
MACHINES: Final = {machine.name: machine for machine in (X86_64, AARCH64)}


@cache
def this_machine() -> Machine:
    """The machine this runs on. Raises SandboxError where no filter can be made."""
    name = os.uname().machine
    if not sys.platform.startswith("linux") or name not in MACHINES or sys.maxsize < 2**32:
        raise SandboxError(
            STEP,
            f"filters are made for Linux on {' and '.join(MACHINES)}, in 64 bits; this is {sys.platform} on "
            f"{name}; serve without the sandbox (kore.config.sandbox = 'no')",
        )
    return MACHINES[name]


@cache
def libseccomp() -> ModuleType:
    """pyseccomp. Raises SandboxError where it or libseccomp is missing, with what installs it."""
    try:
        return import_module("pyseccomp")
    except ModuleNotFoundError:
        raise SandboxError(
            STEP, "the package pyseccomp is not installed; pip install 'kore[sandbox]' installs it"
        ) from None
    except (RuntimeError, OSError) as error:
        raise SandboxError(
            STEP,
            f"libseccomp.so.2 cannot be loaded ({error}); install it (Debian and Ubuntu: apt-get install libseccomp2)",
        ) from None


@cache
def number_of(name: str, machine: Machine) -> int | None:
    """The number of the system call `name`, or None when `machine` has none of that name."""
    if not name.isascii() or "\0" in name:
        return None
    number = int(libseccomp().resolve_syscall(machine.audit, name))
    return number if number >= 0 else None  # -1: unknown everywhere; below: libseccomp's word for "not here"


@cache
def name_of(number: int, machine: Machine) -> str:
    """The name of a system call; ``system call 999`` for one that libseccomp does not know."""
    try:
        name = libseccomp().resolve_syscall(machine.audit, number)
    except ValueError:
        return f"system call {number}"
    return name.decode("ascii") if isinstance(name, bytes) else str(name)


def known_anywhere(name: str) -> bool:
    """Whether some machine has a system call of this name."""
    return any(number_of(name, machine) is not None for machine in MACHINES.values())


def errno_name(number: int) -> str:
    """``EPERM`` for 1; ``errno 4000`` for what has no name."""
    return errno.errorcode.get(number, f"errno {number}")
