"""What a ring may be asked for: operations, flags of entries, and calls of io_uring_register(2).

A seccomp filter sees system calls, and what is done through a ring is none: whoever runs code in a process with an
unrestricted ring opens files, makes sockets and renames directories through it, whatever the filter says. So the
kernel is told, before a ring is enabled, what its driver uses, and it refuses everything else with EACCES, for as
long as the ring lives (io_uring_register(2), IORING_REGISTER_RESTRICTIONS). The list names operations and not what
they are about: which address may be connected to is for Landlock to say. It is not asked about a send that connects
(MSG_FASTOPEN), so where connections are bounded no ring sends: the driver makes system calls for that, whose flags a
filter sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from kore.uring.structures import (
    IORING_OP_ACCEPT,
    IORING_OP_ASYNC_CANCEL,
    IORING_OP_CLOSE,
    IORING_OP_CONNECT,
    IORING_OP_POLL_ADD,
    IORING_OP_READ,
    IORING_OP_RECV,
    IORING_OP_RECVMSG,
    IORING_OP_SEND,
    IORING_OP_SENDMSG,
    IORING_OP_SPLICE,
    IORING_OP_TIMEOUT,
    IORING_OP_WRITE,
    IORING_RESTRICTION_REGISTER_OP,
    IORING_RESTRICTION_SQE_FLAGS_ALLOWED,
    IORING_RESTRICTION_SQE_OP,
    IORING_UNREGISTER_RING_FDS,
    IOSQE_BUFFER_SELECT,
    IOSQE_CQE_SKIP_SUCCESS,
    RESTRICTION,
)


@dataclass(frozen=True, slots=True)
class Restrictions:
    """All that one ring may be asked for."""

    operations: frozenset[int]
    """Opcodes of submission entries."""
    flags: int
    """Flags (IOSQE_*) that entries may bear."""
    registers: frozenset[int]
    """Opcodes of io_uring_register(2)."""

    @property
    def count(self) -> int:
        """How many rows the table has."""
        return len(self.operations) + len(self.registers) + 1

    def pack(self) -> bytes:
        """The table as the kernel wants it: an array of struct io_uring_restriction."""
        rows = [(IORING_RESTRICTION_SQE_OP, operation) for operation in sorted(self.operations)]
        rows += [(IORING_RESTRICTION_REGISTER_OP, register) for register in sorted(self.registers)]
        rows.append((IORING_RESTRICTION_SQE_FLAGS_ALLOWED, self.flags))
        return b"".join([RESTRICTION.pack(*row) for row in rows])


_BASE = frozenset({
    IORING_OP_ACCEPT, IORING_OP_RECV, IORING_OP_RECVMSG, IORING_OP_POLL_ADD, IORING_OP_TIMEOUT, IORING_OP_ASYNC_CANCEL,
    IORING_OP_CLOSE, IORING_OP_READ, IORING_OP_WRITE, IORING_OP_SPLICE,
})
_SENDS = frozenset({IORING_OP_SEND, IORING_OP_SENDMSG})
_FLAGS = IOSQE_BUFFER_SELECT | IOSQE_CQE_SKIP_SUCCESS
# The process drops its own short name of the ring, else the kernel would hold the ring, and all that is in flight
# on it, until the thread ends. It can be used for nothing else. Buffers are registered before, once and for all.
_REGISTERS = frozenset({IORING_UNREGISTER_RING_FDS})

SERVING = Restrictions(_BASE | _SENDS, _FLAGS, _REGISTERS)
"""For a process that is only spoken to: the sockets it has are connected, so that no send connects them."""

CONNECTING = Restrictions(_BASE | {IORING_OP_CONNECT}, _FLAGS, _REGISTERS)
"""For a process that connects where Landlock lets it, by IORING_OP_CONNECT and in no other way."""

OPEN = Restrictions(_BASE | _SENDS | {IORING_OP_CONNECT}, _FLAGS, _REGISTERS)
"""For a process that may connect anywhere."""
