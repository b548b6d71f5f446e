"""A connected socket on the ring: a multishot receive in, and output that costs one entry and no completion.

Output leaves by a send that may not wait (MSG_DONTWAIT) and must be whole (MSG_WAITALL), whose success is not
reported (IOSQE_CQE_SKIP_SUCCESS). The kernel does such a send inside io_uring_enter, so when that returns either all
was taken, or a completion says how much. Only then a poll waits for room, and write(2) sends what is left. An ordinary
response so costs no completion, no object and no bookkeeping beyond its turn. On a ring that may not send
(kore.uring.restrictions) write(2) does it. IORING_OP_WRITE would not do: its EAGAIN comes through the task work of a
later enter, and by then the next output may have overtaken what was not taken.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from select import POLLOUT
from typing import TYPE_CHECKING

from kore.driver import Stream, StreamOwner
from kore.readiness.syscalls import SHUT_WR, shutdown
from kore.uring.operations import NOBODY
from kore.uring.structures import (
    IORING_ASYNC_CANCEL_ALL,
    IORING_CQE_F_MORE,
    IORING_OP_ASYNC_CANCEL,
    IORING_OP_CLOSE,
    IORING_OP_POLL_ADD,
    IORING_OP_RECV,
    IORING_OP_SEND,
    IORING_POLL_ADD_MULTI,
    IORING_RECV_MULTISHOT,
    IOSQE_BUFFER_SELECT,
    IOSQE_CQE_SKIP_SUCCESS,
)

if TYPE_CHECKING:
    from kore.uring.driver import UringDriver

# What a completion of a stream is about, in the top bits of its user_data; the rest is the stream's key.
RECEIVE = 0
SEND = 1 << 62  # a send that failed or was short
REST = 2 << 62  # a poll for room for what was left
HANGUP = 3 << 62  # a poll for the peer's death after its FIN
KEY_MASK = (1 << 62) - 1

SEND_HEAD = IORING_OP_SEND | IOSQE_CQE_SKIP_SUCCESS << 8
MSG_NOSIGNAL = 0x4000
MSG_WAITALL = 0x100
MSG_DONTWAIT = 0x40
SEND_NOW = MSG_NOSIGNAL | MSG_WAITALL | MSG_DONTWAIT

POLLERR_OR_HUP = 0x008 | 0x010


class UringStream(Stream):
    """See kore.driver.Stream."""

    __slots__ = ("key", "send_head", "send_key", "armed", "watching", "rest", "rest_offset", "held", "receiver")

    def __init__(self, driver: UringDriver, fd: int, owner: StreamOwner) -> None:
        super().__init__(driver, fd, owner)
        self.key = driver.register(self)
        self.send_head = SEND_HEAD | fd << 32
        self.send_key = self.key | SEND
        self.armed = False  # a multishot receive is with the kernel
        self.watching = False  # a poll for the peer's death is with the kernel
        self.rest: bytes | None = None  # what waits for room
        self.rest_offset = 0
        self.held: list[bytes] | None = None  # input that came while paused
        self.receiver: Callable[[bytes], None] | None = None  # who gets it on resume
        self.arm()

    # --- input ---------------------------------------------------------------------------------------------

    def arm(self) -> None:
        """Submit the multishot receive."""
        self.armed = True
        self.driver.push(
            IORING_OP_RECV, IOSQE_BUFFER_SELECT, IORING_RECV_MULTISHOT, self.fd, 0, 0, 0, 0, self.key)

    def disarm(self) -> None:
        """Ask for the end of the multishot receive; its last completion is still to come."""
        self.driver.push(
            IORING_OP_ASYNC_CANCEL, IOSQE_CQE_SKIP_SUCCESS, 0, -1, 0, self.key, 0, IORING_ASYNC_CANCEL_ALL, NOBODY)

    def complete(self, res: int, flags: int) -> None:
        """A completion of the receive that carries no bytes: the end of input, of the operation, or an error."""
        if not flags & IORING_CQE_F_MORE:
            self.armed = False
        if res == 0:
            if not self.ended and not self.closing:
                self.ended = True
                self.input(b"")
                if not self.closing:
                    self.watch()
        elif res == -errno.ENOBUFS:
            self.driver.out_of_buffers = True
            self.driver.starved.append(self)
        elif res == -errno.ECANCELED or res > 0:
            if self.reading and not self.armed:
                self.driver.starved.append(self)
        elif not self.gone:
            self.driver.tear_down(self, -res)

    def input(self, data: bytes) -> None:
        """Hand over what arrived."""
        if self.received is not None:
            self.received(data)

    def pause(self) -> None:
        if self.reading and not self.closing:
            self.reading = False
            if self.held is None:
                self.held = []
                self.receiver = self.received
                self.received = self.held.append
            if self.armed:
                self.disarm()

    def resume(self) -> None:
        if not self.reading and not self.closing:
            self.reading = True
            self.driver.resumed.append(self)

    def listening(self) -> bool:
        """Whether input is wanted."""
        return self.reading and not self.closing

    def deliver_held(self) -> None:
        """Hand over what came while paused, then read on. Called by the driver in its turn."""
        held, receiver = self.held, self.receiver
        if held is None or receiver is None:
            return
        while self.listening():
            if not held:
                break
            receiver(held.pop(0))
        else:
            return
        self.held = self.receiver = None
        self.received = receiver
        if not (self.armed or self.ended):
            self.arm()

    def watch(self) -> None:
        """After the peer's FIN: hear of its death. The poll reports the FIN itself as well, so it must go on."""
        if not self.watching:
            self.watching = True
            self.driver.push(
                IORING_OP_POLL_ADD, 0, 0, self.fd, 0, 0, IORING_POLL_ADD_MULTI, POLLERR_OR_HUP, self.key | HANGUP)

    def hung_up(self, res: int, flags: int) -> None:
        """A completion of that poll."""
        if not flags & IORING_CQE_F_MORE:
            self.watching = False
        if res < 0 or self.gone:
            return
        if res & POLLERR_OR_HUP:
            # Both directions closed is the regular end when we sent our FIN as well; otherwise the peer is dead.
            self.driver.tear_down(self, 0 if self.finishing or self.closing else errno.ECONNRESET)
        elif not self.watching:
            self.watch()

    # --- output --------------------------------------------------------------------------------------------

    def not_sent(self, res: int, data: bytes | list[bytes]) -> None:
        """The send of `data` that may not wait was short (`res` bytes were taken) or failed."""
        if self.gone:
            return
        if res < 0 and res != -errno.EAGAIN:
            self.driver.tear_down(self, -res)
            return
        sent = max(res, 0)
        if isinstance(data, list):
            # Usually the head has gone and what is left is of one large body: that is not copied.
            first = 0
            while sent >= len(data[first]):
                sent -= len(data[first])
                first += 1
            data = data[first] if first == len(data) - 1 else b"".join(data[first:])
        self.rest = bytes(data)  # what is not bytes may change while it waits
        self.rest_offset = sent
        self.stuck = len(data) - sent
        if self.out is not None:
            # Written by a callback of the same batch that came before this: it waits behind the rest.
            self.driver.dirty.remove(self)
        self.wait_for_room()
        if self.owner is not None:
            self.owner.stalled()

    def wait_for_room(self) -> None:
        """Submit the poll before the next write of what is left."""
        self.driver.push(IORING_OP_POLL_ADD, 0, 0, self.fd, 0, 0, 0, POLLOUT, self.key | REST)

    def write_rest(self, res: int) -> None:
        """A completion of that poll: there is room, or an error, which the write will tell."""
        if self.gone or self.rest is None:
            return
        try:
            if res < 0:
                raise OSError(-res, os.strerror(-res))
            sent = os.write(self.fd, memoryview(self.rest)[self.rest_offset :])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.driver.tear_down(self, error.errno or errno.EIO)
            return
        self.rest_offset += sent
        self.stuck -= sent
        if self.stuck:
            self.wait_for_room()
            return
        self.rest = None
        if self.out is not None:
            self.driver.dirty.append(self)
        if self.finishing or self.closing:
            self.driver.ending.append(self)
        if self.owner is not None and not self.closing:
            self.owner.drained()

    # --- the end -------------------------------------------------------------------------------------------

    def shut_down(self) -> None:
        """Our FIN, after the output."""
        # Not by the ring: IORING_OP_SHUTDOWN always goes to a thread of the kernel (REQ_F_FORCE_ASYNC), which looks the
        # fd up when it comes to it. By then it may have been closed, and be that of the next connection.
        try:
            shutdown(self.fd, SHUT_WR)
        except OSError:
            pass  # ENOTCONN: the peer has reset the connection; the receive is about to say so

    def release(self) -> None:
        """Cancel what is in flight and close the fd, by the ring, in that order."""
        if self.armed:
            self.disarm()
        if self.watching:
            self.driver.push(
                IORING_OP_ASYNC_CANCEL, IOSQE_CQE_SKIP_SUCCESS, 0, -1, 0, self.key | HANGUP, 0, 0, NOBODY)
        if self.rest is not None:
            self.rest = None
            self.driver.push(
                IORING_OP_ASYNC_CANCEL, IOSQE_CQE_SKIP_SUCCESS, 0, -1, 0, self.key | REST, 0, 0, NOBODY)
        self.driver.push(IORING_OP_CLOSE, IOSQE_CQE_SKIP_SUCCESS, 0, self.fd, 0, 0, 0, 0, NOBODY)
