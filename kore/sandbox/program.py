"""The assembler: from rules in order to one BPF program in which the first rule that matches decides.

libseccomp's rules are a set; what the platform promises is an order, which only a program of our own can keep. Rules
on different calls do not care for each other's order, so between two raw statements each call has one block:

    nr == this call?  no: on to the next block
    conditions of its first rule -> its action
    conditions of its second rule -> its action ...

Blocks that look at arguments come first. A call that is allowed whatever its arguments are is found out by the
kernel when the filter is installed, and the program does not even run for it (Linux 5.11, seccomp's action cache);
so how many of those there are costs nothing, and the few others are decided after a few comparisons.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

from kore.errors import SandboxError
from kore.sandbox.machine import STEP, X32_BIT, X86_64, Machine, number_of
from kore.sandbox.rules import ALLOW, KILL_PROCESS, WORD, Condition, Part, Rule, Statement

INSTRUCTIONS_MAX: Final = 4096
"""BPF_MAXINSNS: the kernel takes no longer program."""

JUMP_MAX: Final = 255
"""Offsets of conditional jumps have 8 bits."""

# struct seccomp_data, on a little-endian machine, as both that we know are.
NR_OFFSET: Final = 0
ARCH_OFFSET: Final = 4
ARGUMENTS_OFFSET: Final = 16

# linux/bpf_common.h
LD_ABS: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
JMP_JA: Final = 0x05
JMP_JEQ: Final = 0x15
JMP_JGE: Final = 0x35
ALU_AND: Final = 0x54
RET_K: Final = 0x06
RET_A: Final = 0x16

STATEMENTS: Final = {
    0x20: "ld [k]", 0x80: "ld len", 0x81: "ldx len", 0x06: "ret k", 0x16: "ret a",
    0x04: "add k", 0x0C: "add x", 0x14: "sub k", 0x1C: "sub x", 0x24: "mul k", 0x2C: "mul x", 0x34: "div k",
    0x3C: "div x", 0x54: "and k", 0x5C: "and x", 0x44: "or k", 0x4C: "or x", 0xA4: "xor k", 0xAC: "xor x",
    0x64: "lsh k", 0x6C: "lsh x", 0x74: "rsh k", 0x7C: "rsh x", 0x84: "neg",
    0x00: "ld imm", 0x01: "ldx imm", 0x07: "tax", 0x87: "txa", 0x60: "ld mem", 0x61: "ldx mem", 0x02: "st",
    0x03: "stx", 0x05: "ja", 0x15: "jeq k", 0x1D: "jeq x", 0x35: "jge k", 0x3D: "jge x", 0x25: "jgt k", 0x2D: "jgt x",
    0x45: "jset k", 0x4D: "jset x",
}  # fmt: skip
"""The instructions seccomp takes (kernel/seccomp.c, seccomp_check_filter)."""

_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter: code, jt, jf, k
Instruction = tuple[int, int, int, int]

_LOAD_NR: Final = (LD_ABS, 0, 0, NR_OFFSET)


def assemble(parts: Iterable[Part], default: int, machine: Machine) -> bytes:
    """The program for `machine`: the action of the first part that matches, else `default`; other machines die.

    Calls that the machine does not have are left out. Raises SandboxError when it comes out longer than the kernel
    takes, and for a raw jump that leaves its run of raw statements.
    """
    program: list[Instruction] = [
        (LD_ABS, 0, 0, ARCH_OFFSET),
        (JMP_JEQ, 1, 0, machine.audit),
        (RET_K, 0, 0, KILL_PROCESS),
        _LOAD_NR,
    ]
    if machine is X86_64:  # the x32 ABI: the same calls under other numbers, which no rule below would see
        program += [(JMP_JGE, 0, 1, X32_BIT), (RET_K, 0, 0, KILL_PROCESS)]
    for run in _runs(parts):
        if isinstance(run[0], Statement):
            program += _raw([part for part in run if isinstance(part, Statement)])
            program.append(_LOAD_NR)  # who knows what is in the accumulator now
        else:
            program += _blocks([part for part in run if isinstance(part, Rule)], machine)
    program.append((RET_K, 0, 0, default))
    if len(program) > INSTRUCTIONS_MAX:
        raise SandboxError(
            STEP,
            f"it has {len(program)} instructions, more than the {INSTRUCTIONS_MAX} the kernel takes; "
            "the seccomp hook must add fewer rules",
        )
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)


def _runs(parts: Iterable[Part]) -> list[list[Part]]:
    """Cut where rules and raw statements meet: nothing may be moved across."""
    runs: list[list[Part]] = []
    for part in parts:
        if runs and isinstance(part, Statement) is isinstance(runs[-1][0], Statement):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _raw(statements: Sequence[Statement]) -> list[Instruction]:
    for position, statement in enumerate(statements):
        if statement.code == JMP_JA and position + statement.k + 1 > len(statements):
            raise SandboxError(
                STEP, f"bpf_stmt(0x05, {statement.k}) jumps behind the statements around it; it may jump over those"
            )
    return [(statement.code, 0, 0, statement.k) for statement in statements]


def _blocks(rules: Sequence[Rule], machine: Machine) -> list[Instruction]:
    by_number: dict[int, list[Rule]] = {}
    for rule in rules:
        number = number_of(rule.call, machine)
        if number is not None:
            by_number.setdefault(number, []).append(rule)
    blocks: list[Instruction] = []
    for number, mine in sorted(by_number.items(), key=lambda item: _weight(item[1])):
        body = _body(mine)
        if len(body) <= JUMP_MAX:
            blocks.append((JMP_JEQ, 0, len(body), number))
        else:
            blocks += [(JMP_JEQ, 1, 0, number), (JMP_JA, 0, 0, len(body))]
        blocks += body
    return blocks


def _weight(rules: Sequence[Rule]) -> int:
    """The order of blocks: what looks at arguments, then what is allowed always, then what is not worth a hurry."""
    if rules[0].conditions:
        return 0
    return 1 if rules[0].action == ALLOW else 2


def _body(rules: Sequence[Rule]) -> list[Instruction]:
    """The rules on one call, in order; what follows the first without conditions can't be reached and is left out."""
    body: list[Instruction] = []
    for rule in rules:
        tests = [test for condition in rule.conditions for test in _tests(condition)]
        left = sum(map(len, tests)) + 1
        for test in tests:
            left -= len(test)
            body += test[:-1]
            code, jt, _, k = test[-1]
            body.append((code, jt, left, k))  # it does not hold: on to the next rule
        body.append((RET_K, 0, 0, rule.action))
        if not tests:
            return body
    return [*body, _LOAD_NR]


def _tests(condition: Condition) -> list[list[Instruction]]:
    """The halves of an argument that are looked at: each is loaded, masked and compared."""
    tests = []
    offset = ARGUMENTS_OFFSET + 8 * condition.index
    for where, shift in ((offset, 0), (offset + 4, 32)):
        mask, value = condition.mask >> shift & WORD, condition.value >> shift & WORD
        if mask:
            masking = [(ALU_AND, 0, 0, mask)] if mask != WORD else []
            tests.append([(LD_ABS, 0, 0, where), *masking, (JMP_JEQ, 0, 0, value)])
    return tests
