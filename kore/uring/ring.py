"""One io_uring: set up by liburing, then written and read in the mapped memory itself.

liburing makes the mappings and enters the kernel. Submission entries are packed straight into the queue and
completions unpacked from it. With DEFER_TASKRUN completions appear only while this thread is inside the kernel, so
no memory barrier is ever needed here; without it x86 needs none either, and elsewhere the system call between
two looks is one.

It is made disabled: nothing can be submitted before enable(), which first tells the kernel what this ring may ever be
asked for (kore.uring.restrictions). From the outside a ring is a way around every filter of system calls, so that one
without such a list would make the filter worthless.

A ring belongs to the process and thread that made it. It is never used after a fork: its memory is not copied to
children, and a child closes its copy of the fd.
"""

from __future__ import annotations

import ctypes
import errno
import os
import weakref
from collections import deque
from collections.abc import Iterator

from kore.errors import EngineError
from kore.uring.restrictions import Restrictions
from kore.uring.structures import (
    CQE,
    GETEVENTS_ARG,
    IORING_ENTER_EXT_ARG,
    IORING_ENTER_GETEVENTS,
    IORING_ENTER_REGISTERED_RING,
    IORING_FEAT_CQE_SKIP,
    IORING_FEAT_EXT_ARG,
    IORING_FEAT_NODROP,
    IORING_REGISTER_ENABLE_RINGS,
    IORING_REGISTER_RESTRICTIONS,
    IORING_SETUP_CLAMP,
    IORING_SETUP_COOP_TASKRUN,
    IORING_SETUP_CQSIZE,
    IORING_SETUP_DEFER_TASKRUN,
    IORING_SETUP_R_DISABLED,
    IORING_SETUP_SINGLE_ISSUER,
    IORING_SETUP_SUBMIT_ALL,
    IORING_SQ_CQ_OVERFLOW,
    PARAMS_HEAD,
    PARAMS_SIZE,
    SQE,
    URING_CQ_OFFSET,
    URING_CQ_POINTERS,
    URING_FLAGS_OFFSET,
    URING_SIZE,
    URING_SQ_POINTERS,
    URING_TAIL,
)

LADDER = (
    IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,  # Linux 6.1
    IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN,  # Linux 6.0
    IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN,  # Linux 5.19
    IORING_SETUP_SUBMIT_ALL,
    0,
)
"""Set-up flags from the best to plain; the first the kernel takes is used. Never SQPOLL: a core for a thread."""

REQUIRED = {
    IORING_FEAT_NODROP: "IORING_FEAT_NODROP",
    IORING_FEAT_EXT_ARG: "IORING_FEAT_EXT_ARG",
    IORING_FEAT_CQE_SKIP: "IORING_FEAT_CQE_SKIP",
}

HINTS = {
    errno.ENOSYS: "this kernel has no io_uring, or a sandbox hides it",
    errno.EPERM: "forbidden by a seccomp filter or by kernel.io_uring_disabled (usual in containers)",
    errno.EACCES: "forbidden by a security module",
    errno.ENOMEM: "not enough memory, or RLIMIT_MEMLOCK too low (ulimit -l)",
    errno.EMFILE: "too many open files (ulimit -n)",
    errno.ENFILE: "too many open files in the system",
    errno.EINVAL: "the kernel is older than Linux 6.0",
    errno.EOPNOTSUPP: "the kernel is older than Linux 6.0",
    errno.ENOENT: "liburing.so.2 is not installed (Debian and Ubuntu: apt-get install liburing2)",
}


def engine_error(call: str, number: int) -> EngineError:
    """What failed, its errno, and the likely reason."""
    return EngineError(call, number, os.strerror(number), HINTS.get(number, "see io_uring(7)"))


_library: ctypes.CDLL | None = None


def liburing() -> ctypes.CDLL:
    """liburing.so.2, loaded once, with the argument types of the few functions used."""
    global _library
    if _library is None:
        try:
            library = ctypes.CDLL("liburing.so.2")
        except OSError as error:
            raise EngineError("dlopen(liburing.so.2)", errno.ENOENT, str(error), HINTS[errno.ENOENT]) from None
        try:
            enter = library.io_uring_enter2
        except AttributeError as error:
            hint = "liburing.so.2 is older than 2.3, which Debian 12 has"
            raise EngineError("dlsym", errno.ENOSYS, str(error), hint) from None
        pointer, unsigned = ctypes.c_void_p, ctypes.c_uint
        library.io_uring_queue_init_params.argtypes = [unsigned, pointer, pointer]
        library.io_uring_queue_exit.argtypes = [pointer]
        library.io_uring_queue_exit.restype = None
        library.io_uring_ring_dontfork.argtypes = [pointer]
        library.io_uring_register_ring_fd.argtypes = [pointer]
        library.io_uring_register_buf_ring.argtypes = [pointer, pointer, unsigned]
        library.io_uring_register.argtypes = [unsigned, unsigned, pointer, unsigned]
        # No argtypes: ints go as C ints by themselves, the rest is passed as ctypes objects made once. Checking six
        # arguments against their types would cost 0.55 us a call, more than the call itself.
        enter.restype = ctypes.c_int
        _library = library
    return _library


def view(address: int, length: int, kind: str = "B") -> memoryview:
    """`length` bytes of mapped memory as a memoryview of struct type `kind`."""
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B").cast(kind)  # type: ignore[call-overload, no-any-return]


class Ring:
    """A ring of `entries` submissions and `completions` completions, disabled until `enable()`.

    Raises EngineError when the kernel gives none. `close()` is called by whoever made it.
    """

    restricted = False
    """Whether the kernel holds this ring to a list."""

    def __init__(self, entries: int = 1024, completions: int = 8192) -> None:
        self._liburing = liburing()
        self._struct = ctypes.create_string_buffer(URING_SIZE + 256)  # room for a liburing that appends fields
        self._address = ctypes.addressof(self._struct)
        self.setup_flags = self._set_up(entries, completions)
        khead, ktail, kmask, kentries, kflags, _, array, sqes = URING_SQ_POINTERS.unpack_from(self._struct, 0)
        self.sq_head = view(khead, 4, "I")
        self.sq_tail = view(ktail, 4, "I")
        self.sq_flags = view(kflags, 4, "I")
        self.entries = view(kentries, 4, "I")[0]
        self.sq_mask = view(kmask, 4, "I")[0]
        self.sq = view(sqes, self.entries * SQE.size)
        view(array, self.entries * 4, "I")[:] = memoryview(bytearray().join(
            i.to_bytes(4, "little") for i in range(self.entries))).cast("I")
        khead, ktail, kmask, kentries, _, _, cqes = URING_CQ_POINTERS.unpack_from(self._struct, URING_CQ_OFFSET)
        self.cq_head = view(khead, 4, "I")
        self.cq_tail = view(ktail, 4, "I")
        self.cq_mask = view(kmask, 4, "I")[0]
        self.completions = view(kentries, 4, "I")[0]
        self.cq = view(cqes, self.completions * CQE.size)
        self.tail = self.sq_tail[0]  # ours; the kernel learns of it when we enter
        self.waiting: deque[bytes] = deque()  # entries that found the queue full, in order
        self._enter = self._liburing.io_uring_enter2
        self._timespec = (ctypes.c_int64 * 2)()
        self._wait_for_ever = ctypes.create_string_buffer(GETEVENTS_ARG.pack(0, 0, 0, 0), GETEVENTS_ARG.size)
        self._wait_until = ctypes.create_string_buffer(
            GETEVENTS_ARG.pack(0, 0, 0, ctypes.addressof(self._timespec)), GETEVENTS_ARG.size)
        self._for_ever = ctypes.c_void_p(ctypes.addressof(self._wait_for_ever))
        self._until = ctypes.c_void_p(ctypes.addressof(self._wait_until))
        self._no_argument = ctypes.c_void_p(None)
        self._argument_size = ctypes.c_size_t(GETEVENTS_ARG.size)
        _live.add(self)

    def _set_up(self, entries: int, completions: int) -> int:
        number = 0
        for flags in LADDER:
            flags |= IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP | IORING_SETUP_R_DISABLED  # Linux 5.10
            params = ctypes.create_string_buffer(PARAMS_SIZE)
            PARAMS_HEAD.pack_into(params, 0, 0, completions, flags)
            number = -self._liburing.io_uring_queue_init_params(entries, self._address, params)
            if number == 0:
                break
            if number != errno.EINVAL:
                raise engine_error("io_uring_setup", number)
        else:
            raise engine_error("io_uring_setup", number)
        _, self.fd, self.features, _ = URING_TAIL.unpack_from(self._struct, URING_FLAGS_OFFSET)
        for bit, name in REQUIRED.items():
            if not self.features & bit:
                self._liburing.io_uring_queue_exit(self._address)
                raise EngineError("io_uring_setup", errno.EOPNOTSUPP, f"no {name}", HINTS[errno.EOPNOTSUPP])
        # Children get no copy of the mapped rings: two processes writing one queue would corrupt it.
        self._liburing.io_uring_ring_dontfork(self._address)
        # A registered ring saves the kernel an fget() per enter; without it (before 5.18) the plain fd serves.
        registered = self._liburing.io_uring_register_ring_fd(self._address) == 1
        self._enter_fd = URING_TAIL.unpack_from(self._struct, URING_FLAGS_OFFSET)[3]
        self._enter_flags = IORING_ENTER_REGISTERED_RING if registered else 0
        return flags

    def register(self, call: str, opcode: int, argument: int, count: int) -> int:
        """io_uring_register(2); `call` names it in the EngineError."""
        result: int = self._liburing.io_uring_register(self.fd, opcode, argument, count)
        if result < 0:
            raise engine_error(call, -result)
        return result

    def register_buf_ring(self, registration: int) -> None:
        """io_uring_register_buf_ring(3)."""
        result = self._liburing.io_uring_register_buf_ring(self._address, registration, 0)
        if result < 0:
            raise engine_error("io_uring_register_buf_ring", -result)

    def enable(self, restrictions: Restrictions | None) -> None:
        """Take submissions from now on, of what `restrictions` lists and nothing else. Called once, by who submits.

        With SINGLE_ISSUER the calling thread is the one that may submit. None lists nothing: tests alone make such
        rings. `restricted` is false afterwards where this kernel cannot restrict (EINVAL). Raises EngineError.
        """
        if restrictions is not None:
            packed = restrictions.pack()
            table = ctypes.create_string_buffer(packed, len(packed))
            try:
                self.register(
                    "IORING_REGISTER_RESTRICTIONS", IORING_REGISTER_RESTRICTIONS, ctypes.addressof(table),
                    restrictions.count)
                self.restricted = True
            except EngineError as error:
                if error.errno != errno.EINVAL:
                    raise
        self.register("IORING_REGISTER_ENABLE_RINGS", IORING_REGISTER_ENABLE_RINGS, 0, 0)

    def push(
        self, opcode: int, flags: int, ioprio: int, fd: int, off: int, addr: int, length: int, op_flags: int,
        user_data: int, buf_group: int = 0, file_index: int = 0,
    ) -> None:
        """Queue one submission entry (the fields of struct io_uring_sqe, in its order). Never blocks.

        With the queue full the kernel is given what is there; if it will not take it, the entry waits outside.
        """
        full = self.waiting or (self.tail - self.sq_head[0]) & 0xFFFFFFFF >= self.entries
        if full and not self.make_room():
            self.waiting.append(SQE.pack(
                opcode, flags, ioprio, fd, off, addr, length, op_flags, user_data, buf_group, 0, file_index, 0, 0))
            return
        SQE.pack_into(
            self.sq, (self.tail & self.sq_mask) << 6,
            opcode, flags, ioprio, fd, off, addr, length, op_flags, user_data, buf_group, 0, file_index, 0, 0)
        self.tail += 1

    @property
    def room(self) -> int:
        """How many entries can be queued."""
        return 0 if self.waiting else self.entries - ((self.tail - self.sq_head[0]) & 0xFFFFFFFF)

    def make_room(self) -> bool:
        """Submit what is queued, then move waiting entries in. True when there is room for one more."""
        self.enter(0, 0.0, reap=False)
        while self.waiting and (self.tail - self.sq_head[0]) & 0xFFFFFFFF < self.entries:
            offset = (self.tail & self.sq_mask) << 6
            self.sq[offset : offset + 64] = self.waiting.popleft()
            self.tail += 1
        return not self.waiting and (self.tail - self.sq_head[0]) & 0xFFFFFFFF < self.entries

    def enter(self, wait: int, timeout: float | None, *, reap: bool = True) -> bool:
        """io_uring_enter(2): submit everything queued, wait for `wait` completions or `timeout` seconds.

        With `reap` false only submit. True when the kernel took everything that was queued.
        """
        tail = self.tail & 0xFFFFFFFF
        to_submit = (tail - self.sq_head[0]) & 0xFFFFFFFF
        self.sq_tail[0] = tail
        flags = self._enter_flags
        argument = self._no_argument
        if reap:
            flags |= IORING_ENTER_GETEVENTS
            if wait:
                flags |= IORING_ENTER_EXT_ARG
                if timeout is None:
                    argument = self._for_ever
                else:
                    argument = self._until
                    seconds = int(timeout)
                    self._timespec[0] = seconds
                    self._timespec[1] = int((timeout - seconds) * 1e9)
        result = self._enter(self._enter_fd, to_submit, wait, flags, argument, self._argument_size)
        if result < 0 and -result not in _TRANSIENT:
            raise OSError(-result, os.strerror(-result), "io_uring_enter")
        return self.sq_head[0] == tail

    def reap(self) -> Iterator[tuple[int, int, int, int]]:
        """The completions there are now, as (user_data, res, flags, buffer id).

        They are copied, so the kernel has their room.
        """
        head = self.cq_head[0]
        count = (self.cq_tail[0] - head) & 0xFFFFFFFF
        first = head & self.cq_mask
        if count == 1:
            one = CQE.unpack_from(self.cq, first << 4)
            self.cq_head[0] = (head + 1) & 0xFFFFFFFF
            return iter((one,))
        until = first + count
        if until <= self.completions:
            batch = bytes(self.cq[first << 4 : until << 4])
        else:
            batch = bytes(self.cq[first << 4 :]) + bytes(self.cq[: (until - self.completions) << 4])
        self.cq_head[0] = (head + count) & 0xFFFFFFFF
        return CQE.iter_unpack(batch)

    @property
    def overflown(self) -> bool:
        """The kernel keeps completions aside that found the queue full; the next enter brings them."""
        return bool(self.sq_flags[0] & IORING_SQ_CQ_OVERFLOW)

    def close(self) -> None:
        """Give the ring back; the kernel cancels what is in flight. Idempotent."""
        if self in _live:
            _live.discard(self)
            self._release_views()
            self._liburing.io_uring_queue_exit(self._address)

    def _release_views(self) -> None:
        # Any later use is a ValueError, not a write into memory that is no longer ours.
        for memory in (self.sq_head, self.sq_tail, self.sq_flags, self.sq, self.cq_head, self.cq_tail, self.cq):
            memory.release()

    def _leave_to_parent(self) -> None:
        self._release_views()
        os.close(self.fd)


_TRANSIENT = frozenset({errno.EINTR, errno.ETIME, errno.EAGAIN, errno.EBUSY})
_live: weakref.WeakSet[Ring] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for ring in list(_live):
        _live.discard(ring)
        ring._leave_to_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
