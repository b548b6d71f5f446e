"""From a call that a filter refused to the line of the application's hook that allows it, and no more than it.

Most calls are refused as what they are, and the line names them. Some are refused for an argument, because with others
they are harmless; of those the line allows that argument's value alone. Which argument that is stands in a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kore.sandbox.policy import DANGEROUS, DEADLY, SOCKET_OPTIONS
from kore.sandbox.rules import WORD

ARGUMENT: Final[Mapping[str, int]] = {
    "open": 1, "openat": 2,  # flags
    "mmap": 2, "mprotect": 2,  # protection
    "clone": 0,  # flags
    "kill": 1, "tgkill": 2,  # the signal: whose pid it is changes with each run
    "ioctl": 1, "fcntl": 1, "prctl": 0, "prlimit64": 1,  # what is asked for
    "socket": 0, "socketpair": 0,  # family
    "sendto": 3, "sendmsg": 2, "sendmmsg": 3,  # flags
    "shutdown": 1,  # which direction
}  # fmt: skip
"""The argument for which the policy refuses a call that it allows otherwise."""

OCTAL: Final = frozenset({"open", "openat"})

PATHS: Final[Mapping[str, int]] = {
    "open": 0, "openat": 1, "creat": 0, "mkdir": 0, "mkdirat": 1, "rmdir": 0, "unlink": 0, "unlinkat": 1,
    "rename": 1, "renameat": 3, "renameat2": 3, "link": 1, "linkat": 3, "symlink": 1, "symlinkat": 2,
    "mknod": 0, "mknodat": 1, "truncate": 0,
}  # fmt: skip
"""Calls that change files below a path, and the argument that is the path."""

_DEADLY: Final = frozenset(call for calls in DEADLY.values() for call in calls)


def line_for(call: str, arguments: tuple[int, ...]) -> str | None:
    """The statement that allows `call` with such arguments; None for one without a name, which no rule can speak of."""
    if not call.isidentifier():
        return None
    meant = ", dangerous=True" if call in DANGEROUS else ""
    index = _index(call, arguments)
    if index is None:
        return f's.allow("{call}"{meant})'
    value = _value(arguments[index])
    return f's.allow_arg("{call}", {index}, {_number(call, value)}{meant})'


def is_deadly(call: str) -> bool:
    """Whether a process that makes this call is killed for it."""
    return call in _DEADLY


def _index(call: str, arguments: tuple[int, ...]) -> int | None:
    if call == "setsockopt":  # an option of a level whose others are allowed, or else the level
        return 2 if arguments[1] & WORD in SOCKET_OPTIONS else 1
    return ARGUMENT.get(call)


def _value(register: int) -> int:
    """What `register` holds as the rule has to name it: an int of C that was extended with its sign is that int."""
    return register - (1 << 64) if register >> 31 == (1 << 33) - 1 else register


def _number(call: str, value: int) -> str:
    if call in OCTAL:
        return oct(value)
    return str(value) if -4096 <= value < 4096 else hex(value)
