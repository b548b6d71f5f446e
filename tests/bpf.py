"""A small interpreter of seccomp's BPF: what a program decides about a call, and whether it looked at arguments for it.

Written from linux/bpf_common.h and seccomp(2), and not from our assembler, so that the two can disagree.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

MASK = 0xFFFFFFFF


class Result(int):
    """The value a program returned; `looked` is true when it read more than the number and the architecture."""

    looked: bool


def instructions(program: bytes) -> list[tuple[int, int, int, int]]:
    """code, jt, jf, k of each."""
    assert len(program) % 8 == 0
    return list(struct.iter_unpack("=HBBI", program))


def run(program: bytes, number: int, arguments: Sequence[int] = (), *, audit: int = 0xC000003E, ip: int = 0) -> Result:
    """Interpret `program` for a call. Only what assemblers of filters use is there; the rest is a KeyError."""
    filled = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("=IIQ6Q", number & MASK, audit, ip, *filled)
    code = instructions(program)
    accumulator = index = pc = 0
    looked = False
    memory = [0] * 16
    while True:
        op, jt, jf, k = code[pc]
        pc += 1
        kind = op & 0x07
        operand = index if op & 0x08 and kind in (4, 5) else k
        if op == 0x20:  # ld [k]
            assert k in range(0, 64, 4)
            looked |= k >= 8
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif op == 0x80:
            accumulator = 64
        elif op == 0x00:
            accumulator = k
        elif op == 0x01:
            index = k
        elif op == 0x60:
            accumulator = memory[k]
        elif op == 0x61:
            index = memory[k]
        elif op == 0x02:
            memory[k] = accumulator
        elif op == 0x03:
            memory[k] = index
        elif op == 0x07:
            index = accumulator
        elif op == 0x87:
            accumulator = index
        elif kind == 4:
            accumulator = ALU[op & 0xF0](accumulator, operand) & MASK
        elif op == 0x05:
            pc += k
        elif kind == 5:
            pc += jt if JUMPS[op & 0xF0](accumulator, operand) else jf
        elif op in (0x06, 0x16):
            result = Result(k if op == 0x06 else accumulator)
            result.looked = looked
            return result
        else:
            raise KeyError(hex(op))


ALU = {
    0x00: lambda a, b: a + b, 0x10: lambda a, b: a - b, 0x20: lambda a, b: a * b, 0x30: lambda a, b: a // b,
    0x40: lambda a, b: a | b, 0x50: lambda a, b: a & b, 0x60: lambda a, b: a << b, 0x70: lambda a, b: a >> b,
    0x80: lambda a, b: -a, 0xA0: lambda a, b: a ^ b,
}  # fmt: skip
JUMPS = {0x10: lambda a, b: a == b, 0x20: lambda a, b: a > b, 0x30: lambda a, b: a >= b, 0x40: lambda a, b: a & b != 0}
