"""One rule of a filter: a system call, what becomes of it, and what its arguments must be for that.

Every comparison the platform knows (a value, a flag, a mask) is one and the same test, ``argument & mask == value``
on 64 bits; so there is one kind of condition, and libseccomp, which has it too, can be asked whether we are right.
Rules are kept in order, and the first that matches decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# linux/seccomp.h; the low 16 bits of a return value are its data.
KILL_PROCESS: Final = 0x80000000
ERRNO: Final = 0x00050000
NOTIFY: Final = 0x7FC00000
LOG: Final = 0x7FFC0000
ALLOW: Final = 0x7FFF0000
ACTION_MASK: Final = 0xFFFF0000
DATA_MASK: Final = 0x0000FFFF

ERRNO_MAX: Final = 4095
"""The kernel takes larger numbers for this one (seccomp(2))."""

ARGUMENTS: Final = 6
WORD: Final = 0xFFFFFFFF
LONG: Final = 0xFFFFFFFFFFFFFFFF


def refuse(number: int) -> int:
    """The action that fails a call with errno `number` and does not make it."""
    assert 0 <= number <= ERRNO_MAX, number
    return ERRNO | number


@dataclass(frozen=True, slots=True)
class Condition:
    """Holds when ``argument & mask == value``; `index` is 0 to 5, mask and value have 64 bits without a sign."""

    index: int
    mask: int
    value: int

    def __post_init__(self) -> None:
        assert 0 <= self.index < ARGUMENTS, self.index
        assert 0 <= self.mask <= LONG, self.mask
        assert self.value & ~self.mask == 0, "a bit that is not compared can't be asked for"


# The kernel reads an int from the low half of its register and ignores the rest, so for an int the low half is what
# is compared: a deny that looked at all 64 bits would be walked around with a bit in the upper half.


def word_is(index: int, value: int) -> Condition:
    """Argument `index` is an int of C, and this one."""
    return Condition(index, WORD, value & WORD)


def word_has_none(index: int, bits: int) -> Condition:
    """Argument `index` has none of these bits of its low half."""
    return Condition(index, bits & WORD, 0)


def word_masked_is(index: int, mask: int, value: int) -> Condition:
    """Argument `index`, of its low half the bits in `mask`, is `value`."""
    return Condition(index, mask & WORD, value)


def is_null(index: int) -> Condition:
    """Argument `index` is a pointer, and NULL."""
    return Condition(index, LONG, 0)


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of the system call named `call` when all conditions hold."""

    call: str
    action: int
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class Statement:
    """One instruction as it is, its jump offsets 0 (struct sock_filter: code and k)."""

    code: int
    k: int


Part = Rule | Statement
