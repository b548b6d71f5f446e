"""The numbers and layouts of io_uring, as in <linux/io_uring.h> and <liburing.h>, under the kernel's own names.

Nothing here does anything. Entries are packed and read with `struct`, because a ctypes call costs more than a
whole entry; ctypes appears only where liburing itself wants a pointer.
"""

from __future__ import annotations

import struct

# --- io_uring_setup(2) flags -------------------------------------------------------------------------------
IORING_SETUP_CQSIZE = 1 << 3
IORING_SETUP_CLAMP = 1 << 4
IORING_SETUP_R_DISABLED = 1 << 6
IORING_SETUP_SUBMIT_ALL = 1 << 7
IORING_SETUP_COOP_TASKRUN = 1 << 8
IORING_SETUP_SINGLE_ISSUER = 1 << 12
IORING_SETUP_DEFER_TASKRUN = 1 << 13

# --- features the kernel reports at set-up -----------------------------------------------------------------
IORING_FEAT_NODROP = 1 << 1
IORING_FEAT_EXT_ARG = 1 << 8
IORING_FEAT_CQE_SKIP = 1 << 11

# --- io_uring_enter(2) flags -------------------------------------------------------------------------------
IORING_ENTER_GETEVENTS = 1 << 0
IORING_ENTER_EXT_ARG = 1 << 3
IORING_ENTER_REGISTERED_RING = 1 << 4

# --- io_uring_register(2) opcodes --------------------------------------------------------------------------
IORING_REGISTER_PROBE = 8
IORING_REGISTER_RESTRICTIONS = 11
IORING_REGISTER_ENABLE_RINGS = 12
IORING_UNREGISTER_RING_FDS = 21
IO_URING_OP_SUPPORTED = 1 << 0

# --- what a struct io_uring_restriction speaks of ----------------------------------------------------------
IORING_RESTRICTION_REGISTER_OP = 0
IORING_RESTRICTION_SQE_OP = 1
IORING_RESTRICTION_SQE_FLAGS_ALLOWED = 2

# --- operations --------------------------------------------------------------------------------------------
IORING_OP_NOP = 0
IORING_OP_POLL_ADD = 6
IORING_OP_SENDMSG = 9
IORING_OP_RECVMSG = 10
IORING_OP_TIMEOUT = 11
IORING_OP_ACCEPT = 13
IORING_OP_ASYNC_CANCEL = 14
IORING_OP_CONNECT = 16
IORING_OP_CLOSE = 19
IORING_OP_READ = 22
IORING_OP_WRITE = 23
IORING_OP_SEND = 26
IORING_OP_RECV = 27
IORING_OP_SPLICE = 30

OPERATIONS = {name: value for name, value in list(globals().items()) if name.startswith("IORING_OP_")}

# --- submission queue entry flags --------------------------------------------------------------------------
IOSQE_BUFFER_SELECT = 1 << 5
IOSQE_CQE_SKIP_SUCCESS = 1 << 6

IORING_RECV_MULTISHOT = 1 << 1
IORING_ACCEPT_MULTISHOT = 1 << 0
IORING_POLL_ADD_MULTI = 1 << 0
IORING_ASYNC_CANCEL_ALL = 1 << 0
IORING_TIMEOUT_ETIME_SUCCESS = 1 << 5

# --- completion queue entry flags --------------------------------------------------------------------------
IORING_CQE_F_BUFFER = 1 << 0
IORING_CQE_F_MORE = 1 << 1
IORING_CQE_BUFFER_SHIFT = 16

# --- IORING_SQ_* flags, written by the kernel --------------------------------------------------------------
IORING_SQ_CQ_OVERFLOW = 1 << 1

SQE = struct.Struct("<BBHiQQIIQHHiQQ")
"""opcode, flags, ioprio, fd, off, addr, len, op_flags, user_data, buf_index, personality, file_index, addr3, pad"""

SEND_SQE = struct.Struct("<Q8xQQQ24x")
"""The same 64 bytes of a send, mostly known beforehand: opcode to fd, addr, len and op_flags, user_data; zeros."""

CQE = struct.Struct("<QiHH")
"""user_data, res, flags: the lower half has the flags, the upper the buffer id (IORING_CQE_BUFFER_SHIFT)"""

BUF = struct.Struct("<QIHH")
"""struct io_uring_buf: addr, len, bid, resv (in entry 0 the tail of the ring)."""

BUF_REG = struct.Struct("<QIHH3Q")
"""struct io_uring_buf_reg: ring_addr, ring_entries, bgid, flags, resv[3]"""

GETEVENTS_ARG = struct.Struct("<QIIQ")
"""struct io_uring_getevents_arg: sigmask, sigmask_sz, min_wait_usec, ts"""

TIMESPEC = struct.Struct("<qq")
"""struct __kernel_timespec: seconds, nanoseconds"""

RESTRICTION = struct.Struct("<HB13x")
"""struct io_uring_restriction: opcode, register_op or sqe_op or sqe_flags, resv[13]"""

IOVEC = struct.Struct("<QQ")
IOVEC_PAIR = struct.Struct("<4Q")
MSGHDR = struct.Struct("<QI4xQQQQi4x")
"""struct msghdr: name, namelen, iov, iovlen, control, controllen, flags (64-bit layout)"""

CMSGHDR = struct.Struct("<Qii")
"""struct cmsghdr: len (with this head), level, type; the data follows, and the next head at a multiple of 8."""

# struct io_uring, as liburing lays it out since 2.0: two structs of pointers into the shared rings, then the fd.
URING_SIZE = 216
URING_SQ_POINTERS = struct.Struct("<8Q")  # khead ktail kring_mask kring_entries kflags kdropped array sqes
URING_CQ_POINTERS = struct.Struct("<7Q")  # khead ktail kring_mask kring_entries kflags koverflow cqes
URING_CQ_OFFSET = 104
URING_FLAGS_OFFSET = 192
URING_TAIL = struct.Struct("<IiIi")  # flags, ring_fd, features, enter_ring_fd

PARAMS_SIZE = 120  # struct io_uring_params
PARAMS_HEAD = struct.Struct("<III")  # sq_entries, cq_entries, flags
