"""Operations in flight on a ring: each belongs to the driver until its last completion, whoever lost interest.

An operation keeps alive whatever memory the kernel reads or writes for it. Its key is its user_data: a number that
is never used twice, so that a late completion finds nobody instead of a stranger.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import sys
from collections.abc import Callable
from socket import AF_INET, AF_INET6, AF_UNIX, inet_ntop, inet_pton
from typing import TYPE_CHECKING, Any

from kore.driver import CONTROL_BYTES, DataResult, Message, MessageResult, Result, passed_fds
from kore.uring.structures import (
    CMSGHDR,
    IORING_ASYNC_CANCEL_ALL,
    IORING_CQE_F_MORE,
    IORING_OP_ACCEPT,
    IORING_OP_ASYNC_CANCEL,
    IORING_OP_POLL_ADD,
    IORING_OP_SPLICE,
    IOSQE_CQE_SKIP_SUCCESS,
    IOVEC,
    MSGHDR,
)

if TYPE_CHECKING:
    from kore.uring.driver import UringDriver

NOBODY = 0
"""user_data of entries whose completion nobody waits for; no operation has this key."""

EVERYWHERE = 0xFFFFFFFFFFFFFFFF
"""-1 as an unsigned offset: the file's position, or a pipe, which has none."""

BUFFER_BYTES_MIN = 16
"""The smallest buffer. Bytes objects of no or one byte are shared by the whole interpreter, not ours to write in."""

SOCKADDR_BYTES_MAX = 128
"""struct sockaddr_storage."""

BYTES_OFFSET = bytes.__basicsize__ - 1
"""Where the bytes of a `bytes` object start behind its address: CPython's layout, tried by the driver at set-up."""


class UringOperation:
    """An operation with one completion."""

    __slots__ = ("driver", "key", "callback", "keep")

    def __init__(self, driver: UringDriver, callback: Result, keep: Any = None) -> None:
        self.driver = driver
        self.callback: Result | None = callback
        self.keep = keep
        self.key = driver.register(self)

    def complete(self, res: int, flags: int) -> None:  # noqa: ARG002 -- streams and accepts look at the flags
        """The kernel is done with it."""
        self.driver.live.pop(self.key, None)
        callback, self.callback, self.keep = self.callback, None, None
        if callback is not None:
            callback(res)
        else:
            self.discard(res)

    def discard(self, res: int) -> None:
        """Dispose of a result nobody wants."""

    def abandon(self) -> None:
        """The driver closes: nobody is called any more."""
        self.callback = None

    def cancel(self) -> None:
        """See kore.driver.Operation."""
        if self.key in self.driver.live:
            self.driver.push(
                IORING_OP_ASYNC_CANCEL, IOSQE_CQE_SKIP_SUCCESS, 0, -1, 0, self.key, 0, IORING_ASYNC_CANCEL_ALL, NOBODY)

    def forget(self) -> None:
        """See kore.driver.Operation."""
        self.callback = None
        self.cancel()


class TimeoutOperation(UringOperation):
    """A timeout: it ends with ETIME, which is what was asked for."""

    __slots__ = ()

    def complete(self, res: int, flags: int) -> None:
        super().complete(0 if res == -errno.ETIME else res, flags)


class InputOperation(UringOperation):
    """What waits for input at a socket, for as long as it takes: `wait` begins it.

    The kernel gives up with EAGAIN when others have taken what woke it, 128 times in a row (APOLL_MAX_RETRY,
    io_uring/poll.c), as happens to sockets that processes share. Then it is asked again. EINTR is the end of one that
    had come to a thread of the kernel.
    """

    __slots__ = ("entry", "over")

    def __init__(self, driver: UringDriver, callback: Result, keep: Any = None) -> None:
        super().__init__(driver, callback, keep)
        self.entry: tuple[int, ...] | None = None
        self.over = False

    def wait(self, *entry: int) -> None:
        """Queue the entry, whose last part is this operation's key."""
        self.entry = entry
        self.driver.push(*entry)

    def complete(self, res: int, flags: int) -> None:
        if res not in (-errno.EAGAIN, -errno.EINTR) or self.entry is None:
            super().complete(res, flags)
        elif self.over:
            super().complete(-errno.ECANCELED, flags)
        else:
            self.driver.push(*self.entry)

    def cancel(self) -> None:
        self.over = True
        super().cancel()


class DataOperation(InputOperation):
    """A read or a receive into memory of its own; the callback gets the bytes.

    The kernel writes into a bytes object that nobody has seen yet, as C extensions do: it is never cleared (calloc), so
    what waits long in a large buffer holds no pages, and nothing is copied when it comes back full.
    """

    __slots__ = ("buffer", "data_callback")

    def __init__(self, driver: UringDriver, callback: DataResult, length: int) -> None:
        self.buffer = bytes(max(length, BUFFER_BYTES_MIN))
        super().__init__(driver, self.deliver, self.buffer)
        self.data_callback: DataResult | None = callback

    @property
    def address(self) -> int:
        """Where the kernel is to write."""
        return id(self.buffer) + BYTES_OFFSET

    def abandon(self) -> None:
        self.callback = self.data_callback = None

    def deliver(self, res: int) -> None:
        """What was read, or the error."""
        if self.data_callback is not None:
            self.data_callback(self.buffer[:res] if res >= 0 else res)

    def forget(self) -> None:
        self.data_callback = None
        super().forget()


class MessageOperation(InputOperation):
    """A recvmsg(2) into memory of its own; the callback gets what `socket.recvmsg` would give."""

    __slots__ = ("control", "data", "family", "header", "message_callback", "name")

    def __init__(self, driver: UringDriver, callback: MessageResult, family: int, length: int) -> None:
        self.family = family
        self.name, self.control = bytes(SOCKADDR_BYTES_MAX), bytes(CONTROL_BYTES)
        self.data = bytes(max(length, BUFFER_BYTES_MIN))
        vector = IOVEC.pack(id(self.data) + BYTES_OFFSET, length)
        self.header = MSGHDR.pack(
            id(self.name) + BYTES_OFFSET, SOCKADDR_BYTES_MAX, id(vector) + BYTES_OFFSET, 1,
            id(self.control) + BYTES_OFFSET, CONTROL_BYTES, 0)
        super().__init__(driver, self.deliver, vector)
        self.message_callback: MessageResult | None = callback

    def abandon(self) -> None:
        self.callback = self.message_callback = None

    def deliver(self, res: int) -> None:
        """The message, or the error."""
        callback = self.message_callback
        if callback is None:
            self.discard(res)
        else:
            callback(res if res < 0 else self.message(res))

    def message(self, length: int) -> Message:
        """What the kernel wrote."""
        _, name_length, _, _, _, control_length, flags = MSGHDR.unpack(self.header)
        address = from_sockaddr(self.family, self.name[:name_length])
        return self.data[:length], ancillary(self.control[:control_length]), flags, address

    def discard(self, res: int) -> None:
        if res >= 0:
            for fd in passed_fds(self.message(res)):
                os.close(fd)

    def forget(self) -> None:
        self.message_callback = None
        super().forget()


class CallOperation(UringOperation):
    """A system call that sends, made when its fd can be written to.

    A ring on which sends are restricted has none; and a call may be longer than an entry, since few are made this way.
    """

    __slots__ = ("attempt", "fd", "once", "over")

    def __init__(
        self, driver: UringDriver, fd: int, attempt: Callable[[], int], callback: Result, *, once: bool = False,
    ) -> None:
        super().__init__(driver, callback)
        self.attempt = attempt
        self.fd = fd
        self.once = once
        """Whether EAGAIN is the result, since waiting would say nothing."""
        self.over = False
        self.submit()

    def submit(self) -> None:
        """Wait until it can be written to."""
        self.driver.push(IORING_OP_POLL_ADD, 0, 0, self.fd, 0, 0, 0, select.POLLOUT, self.key)

    def complete(self, res: int, flags: int) -> None:
        if self.over:
            res = -errno.ECANCELED
        elif res >= 0:
            try:
                res = self.attempt()
            except BlockingIOError:
                if not self.once:
                    self.submit()
                    return
                res = -errno.EAGAIN
            except OSError as error:
                res = -(error.errno or errno.EIO)
        super().complete(res, flags)

    def cancel(self) -> None:
        self.over = True
        super().cancel()


NOT_ACCEPTED = frozenset({-errno.ECONNABORTED, -errno.EAGAIN, -errno.EINTR})
"""No errors of the listener: the client went away before, or others took what woke this accept (InputOperation)."""


class AcceptOnceOperation(UringOperation):
    """One connection. What comes although nobody wants it any more is closed."""

    __slots__ = ("fd", "over")

    def __init__(self, driver: UringDriver, fd: int, callback: Result) -> None:
        super().__init__(driver, callback)
        self.fd = fd
        self.over = False
        self.submit()

    def submit(self) -> None:
        """Ask for it."""
        self.driver.push(
            IORING_OP_ACCEPT, 0, 0, self.fd, 0, 0, 0, os.O_CLOEXEC | os.O_NONBLOCK, self.key)  # SOCK_* are O_* on Linux

    def complete(self, res: int, flags: int) -> None:
        if res in NOT_ACCEPTED and not self.over:
            self.submit()
        else:
            super().complete(res, flags)

    def discard(self, res: int) -> None:
        if res >= 0:
            os.close(res)

    def cancel(self) -> None:
        self.over = True
        super().cancel()


class AcceptOperation(UringOperation):
    """Accept until cancelled, by a few one-shot accepts at a time.

    Workers share a listener, and the kernel wakes its waiters in queue order. A multishot accept keeps its place at
    the head, so that the first worker would get every connection; a one-shot accept that is submitted again goes to
    the end, and the workers take turns.
    """

    __slots__ = ("fd", "in_flight", "over")

    def __init__(self, driver: UringDriver, fd: int, callback: Result) -> None:
        super().__init__(driver, callback)
        self.fd = fd
        self.in_flight = 0
        self.over = 0  # the error that ended it
        for _ in range(driver.accept_batch):
            self.submit()

    def submit(self) -> None:
        """One more accept."""
        self.in_flight += 1
        self.driver.push(
            IORING_OP_ACCEPT, 0, 0, self.fd, 0, 0, 0, os.O_CLOEXEC | os.O_NONBLOCK, self.key)  # SOCK_* are O_* on Linux

    def complete(self, res: int, flags: int) -> None:
        if not flags & IORING_CQE_F_MORE:
            self.in_flight -= 1
        if res >= 0 or res in NOT_ACCEPTED:
            if res >= 0:
                if self.callback is not None:
                    self.callback(res)
                else:
                    self.discard(res)
            if not self.over and self.key in self.driver.live:
                self.submit()
        elif not self.over:
            self.over = res
            if self.in_flight:
                super().cancel()
        if not self.in_flight:
            self.driver.live.pop(self.key, None)
            callback, self.callback = self.callback, None
            if callback is not None and self.over:
                callback(self.over)

    def discard(self, res: int) -> None:
        if res >= 0:
            os.close(res)

    def cancel(self) -> None:
        if not self.over:
            self.over = -errno.ECANCELED
            super().cancel()


class SpliceOperation(UringOperation):
    """A splice. Between non-blocking fds the kernel gives up (EAGAIN) instead of waiting: then both are polled."""

    __slots__ = ("over", "splicing", "to_poll", "what")

    def __init__(self, driver: UringDriver, callback: Result, what: tuple[int, int, int, int]) -> None:
        super().__init__(driver, callback)
        self.what = what
        self.over = False
        self.splicing = False  # else a poll is in flight
        self.to_poll: list[tuple[int, int]] = []  # before the next try
        self.submit()

    def submit(self) -> None:
        """Try, or poll first."""
        fd_in, offset_in, fd_out, length = self.what
        if self.to_poll:
            fd, mask = self.to_poll.pop()
            self.splicing = False
            self.driver.push(IORING_OP_POLL_ADD, 0, 0, fd, 0, 0, 0, mask, self.key)
        else:
            self.splicing = True
            self.driver.push(
                IORING_OP_SPLICE, 0, 0, fd_out, EVERYWHERE, offset_in & EVERYWHERE, length, 0, self.key,
                file_index=fd_in)

    def complete(self, res: int, flags: int) -> None:
        if self.splicing and res != -errno.EAGAIN:
            super().complete(res, flags)
        elif self.over or (res < 0 and not self.splicing):
            super().complete(-errno.ECANCELED if self.over else res, flags)
        else:
            if self.splicing:
                self.to_poll = [(self.what[2], select.POLLOUT), (self.what[0], select.POLLIN)]
            self.submit()

    def cancel(self) -> None:
        self.over = True
        super().cancel()


class RepeatedPoll(UringOperation):
    """Poll until cancelled, level-triggered: a poll that is asked for again after each answer."""

    __slots__ = ("fd", "mask", "over")

    def __init__(self, driver: UringDriver, fd: int, mask: int, callback: Result) -> None:
        super().__init__(driver, callback)
        self.fd = fd
        self.mask = mask
        self.over = False
        self.submit()

    def submit(self) -> None:
        """One more poll."""
        self.driver.push(IORING_OP_POLL_ADD, 0, 0, self.fd, 0, 0, 0, self.mask, self.key)

    def complete(self, res: int, flags: int) -> None:
        if res >= 0 and not self.over and self.callback is not None:
            try:
                self.callback(res)
            finally:  # a KeyboardInterrupt in the callback is not its end
                if self.goes_on():
                    self.submit()
                else:
                    super().complete(-errno.ECANCELED, flags)
            return
        super().complete(res if res < 0 else -errno.ECANCELED, flags)

    def goes_on(self) -> bool:
        """Whether the callback left it running."""
        return not self.over

    def cancel(self) -> None:
        self.over = True
        super().cancel()


def sockaddr(family: int, address: Any) -> bytes:
    """A struct sockaddr for a numeric address as `socket.connect` takes it. Raises OSError or ValueError."""
    if family == AF_INET:
        host, port = address
        return struct.pack("=H", family) + struct.pack("!H", port) + inet_pton(AF_INET, host or "0.0.0.0") + bytes(8)
    if family == AF_INET6:
        host, port, flow, scope = (*address, 0, 0)[:4]
        host, _, zone = host.partition("%")
        if zone and not scope:
            import socket

            scope = int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
        packed = inet_pton(AF_INET6, host or "::")
        return struct.pack("=H", family) + struct.pack("!HI", port, flow) + packed + struct.pack("=I", scope)
    if family == AF_UNIX:
        path = os.fsencode(address)
        if len(path) > 107:
            raise OSError(errno.ENAMETOOLONG, "AF_UNIX path too long", address)
        # An abstract name is as long as it is; a path ends with a NUL.
        return struct.pack("=H", family) + (path if path[:1] == b"\0" else path + b"\0")
    raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))


def from_sockaddr(family: int, raw: bytes) -> Any:
    """A struct sockaddr as `socket.recvmsg` shows it; None when there is none."""
    if not raw:
        return None
    if family == AF_UNIX:
        path = raw[2:]
        return path if path[:1] == b"\0" else os.fsdecode(path.partition(b"\0")[0])
    if family == AF_INET:
        return inet_ntop(AF_INET, raw[4:8]), int.from_bytes(raw[2:4], "big")
    port, flow = struct.unpack_from("!HI", raw, 2)
    scope = int.from_bytes(raw[24:28], sys.byteorder)
    host = inet_ntop(AF_INET6, raw[8:24])
    if scope:
        import socket

        try:
            host += "%" + socket.if_indextoname(scope)
        except OSError:
            host += f"%{scope}"  # the interface has gone
    return host, port, flow, scope


def ancillary(control: bytes) -> list[tuple[int, int, bytes]]:
    """The control messages in `control` (cmsg(3)): level, type and data of each."""
    found = []
    at = 0
    while at + CMSGHDR.size <= len(control):
        length, level, kind = CMSGHDR.unpack_from(control, at)
        if length < CMSGHDR.size:
            break
        found.append((level, kind, control[at + CMSGHDR.size : at + length]))
        at += length + 7 & ~7
    return found
