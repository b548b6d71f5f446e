"""Which operations this kernel's io_uring knows, by IORING_REGISTER_PROBE; everything else is found by trying."""

from __future__ import annotations

import ctypes
import errno

from kore.errors import EngineError
from kore.uring.ring import HINTS, Ring
from kore.uring.structures import IO_URING_OP_SUPPORTED, IORING_REGISTER_PROBE, OPERATIONS

_ENTRIES = 256  # the opcode is one byte


def supported_operations(ring: Ring) -> frozenset[int]:
    """The opcodes the kernel says it supports (io_uring_register(2), struct io_uring_probe)."""
    probe = ctypes.create_string_buffer(16 + 8 * _ENTRIES)
    ring.register("IORING_REGISTER_PROBE", IORING_REGISTER_PROBE, ctypes.addressof(probe), _ENTRIES)
    raw = probe.raw
    last = raw[0]
    return frozenset(
        raw[16 + 8 * i] for i in range(last + 1) if raw[16 + 8 * i + 2] & IO_URING_OP_SUPPORTED
    )


def require_operations(ring: Ring) -> None:
    """Raise EngineError naming the first operation the driver needs and the kernel lacks."""
    there = supported_operations(ring)
    for name, opcode in OPERATIONS.items():
        if opcode not in there:
            raise EngineError(name, errno.EOPNOTSUPP, "operation not supported", HINTS[errno.EOPNOTSUPP])
