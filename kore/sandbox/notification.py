"""The other end of a filter: calls that wait for a word from outside, received, answered, or never answered.

A filter that was installed with a listener stops the thread that makes a call of the NOTIFY action until whoever
holds the listener's fd has answered (seccomp_unotify(2)). Whoever holds it decides, so the process that lives under
the filter must not keep it. When all copies of the fd are closed, such calls fail with ENOSYS.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import stat
import struct
from dataclasses import dataclass
from typing import Final

LISTENER_LINK: Final = "anon_inode:seccomp notify"
"""What /proc shows a listener as (kernel/seccomp.c, init_listener)."""

_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags; nr, arch, ip, args
_RESPONSE = struct.Struct("=QqiI")  # struct seccomp_notif_resp: id, val, error, flags
CONTINUE: Final = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | ord("!") << 8 | number


RECV: Final = _iowr(0, _NOTIFICATION.size)
SEND: Final = _iowr(1, _RESPONSE.size)
ID_VALID: Final = 1 << 30 | 8 << 16 | ord("!") << 8 | 2


@dataclass(frozen=True, slots=True)
class Notification:
    """A call that waits: its `id`, the thread that makes it as this process sees it, and what it asks for."""

    id: int
    thread: int
    number: int
    audit: int
    pointer: int
    """Where the instruction is that makes the call."""
    arguments: tuple[int, ...]


def is_listener(fd: int) -> bool:
    """Whether `fd` is a listener; False for everything else.

    Where there is no /proc, that is a file without a type, as anonymous inodes are, which has heard of notifications:
    no file or device is asked, whose driver might do something else at that number.
    """
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == LISTENER_LINK
    except OSError:
        pass
    try:
        if stat.S_IFMT(os.fstat(fd).st_mode):
            return False
        fcntl.ioctl(fd, ID_VALID, struct.pack("=Q", 0))
    except OSError as error:
        return error.errno == errno.ENOENT  # it looked for a notification of that number
    return True


def poll(fd: int) -> int:
    """What the listener has now, of select.POLLIN (a call waits) and select.POLLHUP (nobody is under the filter)."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    found = poller.poll(0)
    return found[0][1] if found else 0


def receive(fd: int) -> Notification | None:
    """The next call that waits; None when there is none, or it was interrupted meanwhile. Never waits."""
    if not poll(fd) & select.POLLIN:
        return None
    buffer = bytearray(_NOTIFICATION.size)  # the kernel wants it to be zero
    try:
        fcntl.ioctl(fd, RECV, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR, errno.ENOTCONN):
            return None  # the thread was killed between the two calls
        raise
    identity, thread, _, number, audit, pointer, *arguments = _NOTIFICATION.unpack(buffer)
    return Notification(identity, thread, number, audit, pointer, tuple(arguments))


def still_waits(fd: int, notification: Notification) -> bool:
    """Whether the call still waits: what was found out about its thread meanwhile is about that thread."""
    try:
        fcntl.ioctl(fd, ID_VALID, struct.pack("=Q", notification.id))
    except OSError:
        return False
    return True


def refuse(fd: int, notification: Notification, number: int) -> bool:
    """Have the call fail with errno `number`; False when it does not wait any more."""
    return _answer(fd, _RESPONSE.pack(notification.id, 0, -number, 0))


def go_on(fd: int, notification: Notification) -> bool:
    """Have the kernel make the call; False when it does not wait any more.

    For tracing and nothing else: what its pointers point to can change after it was looked at.
    """
    return _answer(fd, _RESPONSE.pack(notification.id, 0, 0, CONTINUE))


def _answer(fd: int, response: bytes) -> bool:
    try:
        fcntl.ioctl(fd, SEND, bytearray(response))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def process_of(thread: int) -> int | None:
    """The process that a thread belongs to; None when there is no such thread any more."""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            for line in file:
                if line.startswith(b"Tgid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return None


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_memory(thread: int, address: int, length: int) -> bytes | None:
    """Up to `length` bytes of a thread's memory, fewer where its page ends; None where they can't be read.

    process_vm_readv(2): a process that is not dumpable, as sandboxed ones are, is read by root alone.
    """
    length = min(length, 4096 - address % 4096)
    buffer = ctypes.create_string_buffer(length)
    local, remote = _Iovec(ctypes.addressof(buffer), length), _Iovec(address, length)
    readv = ctypes.CDLL(None).process_vm_readv
    readv.restype = ctypes.c_ssize_t
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    got = int(readv(ctypes.c_int(thread), ctypes.byref(local), one, ctypes.byref(remote), one, none))
    return buffer.raw[:got] if got > 0 else None
