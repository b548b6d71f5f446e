"""Operations in flight on a ring: each belongs to the driver until its last completion, whoever lost interest.

An operation keeps alive whatever memory the kernel reads or writes for it. Its key is its user_data: a number that
is never used twice, so that a late completion finds nobody instead of a stranger.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
from socket import AF_INET, AF_INET6, AF_UNIX, inet_pton
from typing import TYPE_CHECKING, Any

from kore.driver import DataResult, Result
from kore.uring.structures import (
    IORING_ASYNC_CANCEL_ALL,
    IORING_CQE_F_MORE,
    IORING_OP_ACCEPT,
    IORING_OP_ASYNC_CANCEL,
    IORING_OP_POLL_ADD,
    IORING_OP_SPLICE,
    IOSQE_CQE_SKIP_SUCCESS,
)

if TYPE_CHECKING:
    from kore.uring.driver import UringDriver

NOBODY = 0
"""user_data of entries whose completion nobody waits for; no operation has this key."""

EVERYWHERE = 0xFFFFFFFFFFFFFFFF
"""-1 as an unsigned offset: the file's position, or a pipe, which has none."""

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


class ReadOperation(UringOperation):
    """A read into memory of its own; the callback gets the bytes."""

    __slots__ = ("buffer", "data_callback", "address")

    def __init__(self, driver: UringDriver, callback: DataResult, buffer: bytearray) -> None:
        anchor = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        super().__init__(driver, self.deliver, anchor)
        self.address = ctypes.addressof(anchor)
        self.buffer = buffer
        self.data_callback: DataResult | None = callback

    def abandon(self) -> None:
        self.callback = self.data_callback = None

    def deliver(self, res: int) -> None:
        """What was read, or the error."""
        if self.data_callback is not None:
            self.data_callback(bytes(memoryview(self.buffer)[:res]) if res >= 0 else res)

    def forget(self) -> None:
        self.data_callback = None
        super().forget()


class ReceiveOperation(UringOperation):
    """One receive into a buffer the kernel chooses; the driver hands over the bytes."""

    __slots__ = ("armed", "data_callback")

    def __init__(self, driver: UringDriver, callback: DataResult) -> None:
        super().__init__(driver, self.deliver)
        self.armed = True  # as a stream has it, for the driver's receive path
        self.data_callback: DataResult | None = callback

    def abandon(self) -> None:
        self.callback = self.data_callback = None

    def deliver(self, res: int) -> None:
        """The end of input, or an error; ENOBUFS cannot last, so the caller simply tries again."""
        if self.data_callback is not None:
            self.data_callback(res if res else b"")

    def received(self, data: bytes) -> None:
        """The bytes, from the driver's receive path."""
        self.driver.live.pop(self.key, None)
        self.callback = None
        if self.data_callback is not None:
            self.data_callback(data)

    def forget(self) -> None:
        self.data_callback = None
        super().forget()


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
        if res >= 0 or res in (-errno.ECONNABORTED, -errno.EINTR):
            if res < 0:
                pass  # that client went away before it was accepted
            elif self.callback is not None:
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
            self.callback(res)
            if self.goes_on():
                self.submit()
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
