"""seccomp: the application's own rules, and the moment at which a process puts its filter on for good.

`confine` is that moment: it asks the application's hook, puts the hook's rules in front of the platform's, installs
the one program, and hands the listener of deadly calls to the parent before any code of the application runs again.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any, Final, NoReturn

from kore.errors import SandboxError
from kore.sandbox import policy, service_policy
from kore.sandbox.machine import STEP, Machine, known_anywhere, libseccomp, name_of, number_of, this_machine
from kore.sandbox.policy import DANGEROUS, Features
from kore.sandbox.program import STATEMENTS, assemble
from kore.sandbox.rules import (
    ALLOW,
    ARGUMENTS,
    ERRNO_MAX,
    KILL_PROCESS,
    LOG,
    LONG,
    NOTIFY,
    WORD,
    Condition,
    Part,
    Rule,
    Statement,
    refuse,
)

SECCOMP_NUMBER: Final = {"x86_64": 317, "aarch64": 277}
SET_MODE_FILTER: Final = 1
FLAG_TSYNC: Final = 1
FLAG_NEW_LISTENER: Final = 8
FLAG_TSYNC_ESRCH: Final = 16  # what makes the two above possible together (Linux 5.7)
PR_SET_NO_NEW_PRIVS: Final = 38

INSTRUCTION_BYTES: Final = 8


class Seccomp:
    """What ``koreapp.seccomp(s)`` is given: rules of the application, in their order, in front of the platform's.

    The first rule that matches a call decides; one whose argument does not match leaves it to those that follow.
    Names are those of the manual; one that this machine does not have is a RuntimeError. Values are ints of C. A deny
    looks at the low 32 bits of the argument, as the kernel does for an int; an allow at all 64, so that neither can
    be walked around. Source: kore-api.md 17.
    """

    __slots__ = ("_machine", "_parts")
    _machine: Machine
    _parts: list[Part]

    def allow(self, name: str, *, dangerous: bool = False) -> None:
        """Allow the system call `name`.

        Raises RuntimeError when there is none of that name, and for one that opens the sandbox, such as execve
        or io_uring_setup, unless `dangerous` is true.
        """
        self._allow(name, (), dangerous)

    def allow_arg(self, name: str, idx: int, value: int, *, dangerous: bool = False) -> None:
        """Allow it when argument `idx`, 0 to 5, is `value`. Raises as allow(); ValueError for what is no argument."""
        for bits in _signed_forms(value):
            self._allow(name, (Condition(_index(idx), LONG, bits),), dangerous)

    def allow_flag(self, name: str, idx: int, flag: int, *, dangerous: bool = False) -> None:
        """Allow it when the argument has all bits of `flag`. Raises as allow_arg()."""
        bits = _unsigned(flag)
        self._allow(name, (Condition(_index(idx), bits, bits),), dangerous)

    def allow_mask(self, name: str, idx: int, mask: int, *, dangerous: bool = False) -> None:
        """Allow it when the argument has no bit outside of `mask`. Raises as allow_arg()."""
        self._allow(name, (Condition(_index(idx), LONG & ~_unsigned(mask), 0),), dangerous)

    def deny(self, name: str, errno: Any = errno.EACCES) -> None:
        """Fail it with `errno`, and do not make it. An errno that is no int is EACCES, as in the reference.

        Raises RuntimeError when there is no call of that name, ValueError for an errno beyond 0 to 4095.
        """
        self._deny(name, (), errno)

    def deny_arg(self, name: str, idx: int, value: int, *, errno: Any = errno.EACCES) -> None:
        """Fail it when argument `idx`, 0 to 5, is `value`. Raises as deny(); ValueError for what is no argument."""
        width = _width(value)
        self._deny(name, (Condition(_index(idx), width, _unsigned(value) & width),), errno)

    def deny_flag(self, name: str, idx: int, flag: int, *, errno: Any = errno.EACCES) -> None:
        """Fail it when the argument has all bits of `flag`. Raises as deny_arg()."""
        bits = _unsigned(flag) & _width(flag)
        self._deny(name, (Condition(_index(idx), bits, bits),), errno)

    def deny_mask(self, name: str, idx: int, mask: int, *, errno: Any = errno.EACCES) -> None:
        """Fail it when the argument has no bit outside of `mask`. Raises as deny_arg()."""
        self._deny(name, (Condition(_index(idx), _width(mask) & ~_unsigned(mask), 0),), errno)

    def log(self, name: str, *, dangerous: bool = False) -> None:
        """Allow it, and have the kernel write each to its audit log (SECCOMP_RET_LOG). Raises as allow()."""
        self._open(name, dangerous)
        self._parts.append(Rule(name, LOG))

    def bpf_stmt(self, code: int, k: int) -> None:
        """Add one instruction of BPF with jump offsets 0 here in the order; nothing stops it from allowing all.

        After it the number of the call is loaded again, so that it changes nothing for the rules that follow but by
        returning. A jump (0x05) may jump over such statements only. Raises ValueError for what seccomp(2) does not
        take: `code` is an instruction that it knows, `k` has 32 bits.
        """
        if type(code) is not int or code not in STATEMENTS:
            raise ValueError(f"bpf_stmt: code = {code!r} is no instruction that seccomp takes")
        if type(k) is not int or not 0 <= k <= WORD:
            raise ValueError(f"bpf_stmt: k = {k!r} is not a number of 32 bits without a sign")
        self._parts.append(Statement(code, k))

    def _allow(self, name: str, conditions: tuple[Condition, ...], dangerous: bool) -> None:
        self._open(name, dangerous)
        self._parts.append(Rule(name, ALLOW, conditions))

    def _deny(self, name: str, conditions: tuple[Condition, ...], number: Any) -> None:
        self._check(name)
        if not isinstance(number, int):
            number = errno.EACCES
        if not 0 <= number <= ERRNO_MAX:
            raise ValueError(f"errno = {number} is not from 0 to {ERRNO_MAX}")
        self._parts.append(Rule(name, refuse(number), conditions))

    def _open(self, name: str, dangerous: bool) -> None:
        self._check(name)
        if not dangerous and name in DANGEROUS:
            raise RuntimeError(
                f"allowing {name} opens the sandbox; say that it is meant with dangerous=True, "
                "or do that work in another process"
            )

    def _check(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"the name of a system call is a str, not {type(name).__name__}")
        if number_of(name, self._machine) is None:
            where = f"on {self._machine.name}" if known_anywhere(name) else "anywhere"
            raise RuntimeError(f"there is no system call {name!r} {where}")


def _refuse(_cls: type, *_arguments: object, **_keywords: object) -> NoReturn:
    raise TypeError("cannot create 'kore.seccomp' instances")


# As the other public types are: shown by the reference's name, and made by nobody but the platform.
setattr(Seccomp, "__new__", _refuse)
Seccomp.__module__ = "kore"
Seccomp.__name__ = Seccomp.__qualname__ = "seccomp"


def new_seccomp(machine: Machine) -> Seccomp:
    """An object for one call of the hook; `parts_of` it afterwards."""
    made: Seccomp = object.__new__(Seccomp)
    made._machine = machine
    made._parts = []
    return made


def parts_of(rules: Seccomp) -> tuple[Part, ...]:
    """What the application added, in order."""
    return tuple(rules._parts)


def _index(value: int) -> int:
    if type(value) is not int or not 0 <= value < ARGUMENTS:
        raise ValueError(f"idx = {value!r}: a system call has the arguments 0 to {ARGUMENTS - 1}")
    return value


def _unsigned(value: int) -> int:
    """`value` as the 64 bits of a register: a negative one with its sign."""
    if not -(1 << 63) <= value <= LONG:
        raise ValueError(f"{value!r} is no number of 64 bits")
    return value & LONG


def _signed_forms(value: int) -> tuple[int, ...]:
    """What a register holds that has `value` in it: of a negative int the upper half may be filled or not."""
    bits = _unsigned(value)
    return (bits, bits & WORD) if -(1 << 31) <= value < 0 else (bits,)


def _width(value: int) -> int:
    """The bits a deny looks at: of an int those the kernel looks at, lest the others be a way around it."""
    return WORD if -(1 << 31) <= value <= WORD else LONG


def install(program: bytes, *, listener: bool) -> int | None:
    """Put the filter on, on all threads, for good; the listener's fd (close-on-exec), or None without one.

    Sets no_new_privs, without which only root may do it. Raises OSError: EBUSY when this process has a listener
    already, as in some containers; EINVAL for a program that the kernel does not take.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    one, zero = ctypes.c_ulong(1), ctypes.c_ulong(0)
    if libc.prctl(ctypes.c_int(PR_SET_NO_NEW_PRIVS), one, zero, zero, zero):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    instructions = ctypes.create_string_buffer(program, len(program))
    head = _Program(len(program) // INSTRUCTION_BYTES, ctypes.addressof(instructions))
    flags = FLAG_TSYNC | (FLAG_NEW_LISTENER | FLAG_TSYNC_ESRCH if listener else 0)
    libc.syscall.restype = ctypes.c_long
    number = SECCOMP_NUMBER[this_machine().name]
    result = int(
        libc.syscall(ctypes.c_long(number), ctypes.c_ulong(SET_MODE_FILTER), ctypes.c_ulong(flags), ctypes.byref(head))
    )
    if result > 0 and not listener:
        raise OSError(errno.ESRCH, f"thread {result} has a filter of its own")
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result if listener else None


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def preload() -> None:
    """What confine() needs, loaded: called in the parent, before the first fork. Raises SandboxError."""
    machine = this_machine()
    libseccomp()
    allowed = (*policy.ALLOWED.values(), *service_policy.CALLS.values(), service_policy.WRITES)
    for call in [*DANGEROUS, *(call for calls in allowed for call in calls)]:
        number_of(call, machine)
    name_of(0, machine)


def confine(
    hook: Callable[[Seccomp], None] | None,
    features: Features,
    tracing: bool,
    send_listener: Callable[[int], bool],
) -> None:
    """Let the application's `hook` add its rules, then put the filter on this process and all its threads, for good.

    `send_listener` hands the listener's fd to who answers for deadly calls (all forbidden ones, with `tracing`), and
    says whether that worked; this process keeps no copy. Where the kernel gives no listener, deadly calls kill this
    process unannounced, and tracing is impossible. What the hook raises is for who made it to catch. Raises
    SandboxError.
    """
    machine = this_machine()
    rules = new_seccomp(machine)
    if hook is not None:
        hook(rules)
    own = parts_of(rules)
    pid = os.getpid()
    try:
        listener = install(_program(own, features, pid, machine, NOTIFY, tracing), listener=True)
    except OSError as error:
        if tracing:
            raise SandboxError(STEP, f"seccomp_tracing needs a listener, and the kernel gives none ({error})") from None
        _install_without(own, features, pid, machine)
        return
    assert listener is not None
    try:
        sent = send_listener(listener)
    finally:
        os.close(listener)
    if not sent:
        raise SandboxError(
            STEP, "its listener did not reach the parent: the channel is full or closed, or the hook denies sendmsg"
        )


def _install_without(own: tuple[Part, ...], features: Features, pid: int, machine: Machine) -> None:
    try:
        install(_program(own, features, pid, machine, KILL_PROCESS, tracing=False), listener=False)
    except OSError as error:
        raise SandboxError(
            STEP,
            f"it cannot be installed ({error}); it needs Linux 4.14 with CONFIG_SECCOMP_FILTER, raw statements of the "
            "hook that the kernel takes, or kore.config.sandbox = 'no'",
        ) from None


def _program(
    own: tuple[Part, ...], features: Features, pid: int, machine: Machine, deadly: int, tracing: bool
) -> bytes:
    if features.role == "worker":
        rules = policy.worker_rules(features, pid, deadly=deadly, tracing=tracing)
    else:
        rules = service_policy.service_rules(
            features.role, write=features.write, resolver=features.resolver, pid=pid, deadly=deadly
        )
    return assemble([*own, *rules], policy.default(tracing=tracing), machine)
