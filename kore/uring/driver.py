"""The io_uring engine: kore.driver's contract on one ring.

A turn is one system call: everything queued is submitted, the kernel does what can be done at once, waits for the
first completion, and all completions there are by then are handled. Output written while they are handled leaves
with the next call. The loop over completions is the hottest code there is, so it is one function with local names.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from kore.driver import Child, DataResult, MessageResult, Result, StreamOwner
from kore.errors import EngineError
from kore.readiness.pidfd import PidfdChild
from kore.uring.buffers import Buffers
from kore.uring.operations import (
    BYTES_OFFSET,
    EVERYWHERE,
    AcceptOnceOperation,
    AcceptOperation,
    CallOperation,
    DataOperation,
    MessageOperation,
    RepeatedPoll,
    SpliceOperation,
    TimeoutOperation,
    UringOperation,
    sockaddr,
)
from kore.uring.probe import require_operations
from kore.uring.restrictions import OPEN, Restrictions
from kore.uring.ring import HINTS, Ring
from kore.uring.stream import HANGUP, KEY_MASK, REST, SEND, SEND_NOW, UringStream
from kore.uring.structures import (
    IORING_OP_CONNECT,
    IORING_OP_POLL_ADD,
    IORING_OP_READ,
    IORING_OP_RECV,
    IORING_OP_RECVMSG,
    IORING_OP_SEND,
    IORING_OP_SENDMSG,
    IORING_OP_TIMEOUT,
    IORING_OP_WRITE,
    IORING_TIMEOUT_ETIME_SUCCESS,
    IOSQE_CQE_SKIP_SUCCESS,
    IOVEC,
    IOVEC_PAIR,
    MSGHDR,
    SEND_SQE,
    TIMESPEC,
)

JOIN_BYTES_MAX = 16384
"""Pieces of output up to this many bytes together are joined; above it they are sent from where they lie."""

SEND_NOW_WORD = SEND_NOW << 32
"""The flags as they stand in an entry, above the length."""

IOV_MAX = 64
"""Pieces in one send; more are joined first. Far below the kernel's 1024 to bound the entry's own memory."""


def _address(data: bytes) -> int:
    return id(data) + BYTES_OFFSET


def _vector(buffers: Sequence[bytes]) -> bytes:
    """An array of struct iovec for `buffers`."""
    if len(buffers) == 2:  # head and body of a response, the usual case
        head, body = buffers
        return IOVEC_PAIR.pack(id(head) + BYTES_OFFSET, len(head), id(body) + BYTES_OFFSET, len(body))
    return b"".join([IOVEC.pack(_address(data), len(data)) for data in buffers])


class _Waker:
    """Owner of the stream that ends a wait: what arrives on it has done its work by arriving."""

    def received(self, data: bytes) -> None:
        pass

    def stalled(self) -> None:
        pass

    def drained(self) -> None:
        pass

    def lost(self, error: int) -> None:
        pass


class UringDriver:
    """See kore.driver.Driver. Raises EngineError when the kernel gives no usable ring.

    What `restrictions` does not list fails with EACCES.
    """

    name = "uring"

    def __init__(self, entries: int = 1024, restrictions: Restrictions = OPEN) -> None:
        self.accept_batch = 4  # accepts in flight a listener: enough to keep up, few enough to share
        self.live: dict[int, Any] = {}
        self.sends = IORING_OP_SEND in restrictions.operations  # else output leaves by system calls
        self.next_key = 1
        self.dirty: list[Any] = []
        self.ending: list[Any] = []
        self.losses: deque[tuple[StreamOwner, int]] = deque()
        self.starved: list[Any] = []
        self.resumed: list[UringStream] = []
        self.flying: list[tuple[Any, ...]] = []  # sends queued: stream key, data, what else must live with it
        self.flown: list[tuple[Any, ...]] = []  # sends the kernel has done
        self.batch: Iterator[tuple[int, int, int, int]] = iter(())
        self.unfinished = False  # `batch` is not used up
        self.out_of_buffers = False
        self.closed = False
        self.ring = Ring(entries)
        try:
            require_operations(self.ring)
            self.push = self.ring.push
            self.buffers = Buffers(self.ring)
            self.ring.enable(restrictions)
            self._wake_receiver, self._wake_sender = socket.socketpair()
            self._wake_sender.setblocking(False)
            self.wake_fd = self._wake_sender.fileno()
            self._waker = _Waker()
            self._try_out()
            self._wake_stream = self.stream(self._wake_receiver.detach(), self._waker)
        except BaseException:
            self.ring.close()
            raise

    def _try_out(self) -> None:
        """Send and receive once as every connection will.

        What cannot be probed is tried: multishot receive, the layout of bytes objects, unreported success.
        """
        here, there = socket.socketpair()
        here.setblocking(False)
        heard: list[bytes | int] = []

        class Owner(_Waker):
            def received(self, data: bytes) -> None:
                heard.append(data)

            def lost(self, error: int) -> None:
                heard.append(error)

        with there:
            stream = self.stream(here.detach(), Owner())
            there.sendall(b"ping")
            stream.write(b"po" + b"ng")
            self.wait(1.0)
            if heard != [b"ping"] or there.recv(8, socket.MSG_DONTWAIT) != b"pong":
                number = heard[0] if heard and isinstance(heard[0], int) and heard[0] else errno.EOPNOTSUPP
                raise EngineError("IORING_OP_RECV", number, os.strerror(number), HINTS[errno.EOPNOTSUPP])
            stream.abort()
            self.wait(0)

    # --- the turn ------------------------------------------------------------------------------------------

    def register(self, who: Any) -> int:
        """A key for `who`, never used before, under which completions find it."""
        key = self.next_key
        self.next_key = key + 1
        self.live[key] = who
        return key

    def wait(self, timeout: float | None) -> None:
        """See kore.driver.Driver."""
        ring = self.ring
        if self.unfinished:  # a callback raised: first what came behind it
            self._dispatch()
            timeout = 0.0
        if self.starved or self.resumed:
            if self.resumed:
                timeout = 0.0  # what was held back is heard now; its owner may want a turn
            self._restart()
        if self.dirty:
            self._flush()
        if ring.waiting:
            ring.make_room()
            timeout = 0.0
        if self.ending or self.resumed or self.losses:
            timeout = 0.0  # their sends are known to have succeeded only after this enter
        if ring.enter(0 if timeout == 0.0 else 1, timeout):
            self.flown, self.flying = self.flying, []  # sent, or a completion that is there now says how much
        if ring.cq_head[0] != ring.cq_tail[0]:
            self.batch = ring.reap()
            self.unfinished = True
            self._dispatch()
        if self.ending:
            self._end()
        if self.losses:
            self._tell_losses()

    def _dispatch(self) -> None:
        """Handle the batch. If a callback raises, the rest is handled in the next turn."""
        live = self.live.get
        buffers = self.buffers
        area, size = buffers.area, buffers.size
        used: list[int] = []
        try:
            for key, res, flags, bid in self.batch:
                if flags & 1:  # IORING_CQE_F_BUFFER: bytes arrived
                    start = bid * size
                    data = area[start : start + res]
                    used.append(bid)
                    stream = live(key)
                    if stream is not None:
                        if not flags & 2:  # no IORING_CQE_F_MORE: the receive is over
                            stream.armed = False
                            self.starved.append(stream)
                        received = stream.received
                        if received is not None:
                            received(data)
                else:
                    found = live(key)
                    if found is not None:
                        found.complete(res, flags)
                    elif key > KEY_MASK:
                        self._other(key, res, flags)
            self.unfinished = False
        finally:
            if used:
                buffers.give_back(used)

    def _other(self, key: int, res: int, flags: int) -> None:
        """A completion of a stream that is not its receive."""
        stream = self.live.get(key & KEY_MASK)
        kind = key & ~KEY_MASK
        if stream is None:
            return
        if kind == SEND:
            data = next((sent[1] for sent in self.flown if sent[0] == stream.key), None)
            if data is not None:
                stream.not_sent(res, data)
        elif kind == REST:
            stream.write_rest(res)
        elif kind == HANGUP:
            stream.hung_up(res, flags)

    def _flush(self) -> None:
        """Queue one send for each stream that was written to."""
        if not self.sends:
            self._write()
            return
        ring = self.ring
        dirty, self.dirty = self.dirty, []
        while len(dirty) > ring.room:
            room = ring.room
            self._queue_sends(dirty[:room])
            dirty = dirty[room:]
            if not ring.make_room():
                self.dirty[:0] = dirty
                return
        self._queue_sends(dirty)

    def _queue_sends(self, streams: list[Any]) -> None:
        """The same for no more streams than the queue has room for. Hot path: once for nearly every response."""
        ring = self.ring
        pack, sq, mask, flying = SEND_SQE.pack_into, ring.sq, ring.sq_mask << 6, self.flying
        tail = ring.tail
        for stream in streams:
            data = stream.out
            if type(data) is not bytes:
                if data is None:
                    continue
                if type(data) is not list:
                    data = bytes(data)
                elif sum(map(len, data)) > JOIN_BYTES_MAX and len(data) <= IOV_MAX:
                    stream.out = None
                    ring.tail = tail
                    self._send_pieces(stream, data)
                    tail = ring.tail
                    continue
                else:
                    data = b"".join(data)
            stream.out = None
            flying.append((stream.key, data))
            pack(sq, tail << 6 & mask, stream.send_head, id(data) + BYTES_OFFSET, len(data) | SEND_NOW_WORD,
                 stream.send_key)
            tail += 1
        ring.tail = tail

    def _send_pieces(self, stream: UringStream, pieces: list[bytes]) -> None:
        """Queue one send of several pieces: head and large body go out from where they lie."""
        for number, piece in enumerate(pieces):
            if type(piece) is not bytes:
                pieces[number] = bytes(piece)
        vector = _vector(pieces)
        header = MSGHDR.pack(0, 0, _address(vector), len(pieces), 0, 0, 0)
        self.flying.append((stream.key, pieces, vector, header))
        self.push(
            IORING_OP_SENDMSG, IOSQE_CQE_SKIP_SUCCESS, 0, stream.fd, 0, _address(header), 1, SEND_NOW, stream.send_key)

    def _write(self) -> None:
        """The same by write(2), for 0.65 us each more. An owner that raises leaves the rest to the next turn."""
        write = os.write
        for stream in self.dirty:
            data = stream.out
            if data is None or stream.stuck:
                continue  # flushed already; or what it holds goes first
            stream.out = None
            size = len(data)
            if type(data) is list:
                size = sum(map(len, data))
                if size <= JOIN_BYTES_MAX or len(data) > IOV_MAX:
                    data = b"".join(data)
            try:
                taken = os.writev(stream.fd, data) if type(data) is list else write(stream.fd, data)
            except BlockingIOError:
                taken = 0
            except OSError as error:
                self.tear_down(stream, error.errno or errno.EIO)
                continue
            if taken != size:
                stream.not_sent(taken, data)
        self.dirty.clear()

    def _restart(self) -> None:
        """Re-arm receives that ended while they are wanted; hand over what came to streams that were paused."""
        starved, self.starved = self.starved, []
        if self.out_of_buffers:
            self.out_of_buffers = False
            self.buffers.grow(self.buffers.count)
        for stream in starved:
            if type(stream) is UringStream and stream.reading and not (stream.armed or stream.ended or stream.closing):
                stream.arm()
        resumed, self.resumed = self.resumed, []
        for stream in resumed:
            stream.deliver_held()

    def _end(self) -> None:
        """Carry out finish(), close() and abort() of streams whose output has left."""
        ending, self.ending = self.ending, []
        for stream in ending:
            if stream.fd < 0:
                continue
            if stream.gone:
                self.tear_down(stream, 0)
            elif stream.stuck:
                pass  # comes back when the rest is sent
            elif stream.out is not None:
                self.ending.append(stream)
            elif stream.closing:
                self.tear_down(stream, 0)
            else:
                stream.shut_down()

    def tear_down(self, stream: UringStream, error: int) -> None:
        """The end of a stream: its fd is closed and its owner told, once, at the end of the turn."""
        if stream.fd < 0:
            return
        self.live.pop(stream.key, None)
        stream.release()
        if stream.owner is not None:
            self.losses.append((stream.owner, 0 if stream.closing else error))
        stream.gone = stream.closing = stream.shut = True
        stream.fd = -1
        stream.out = stream.received = stream.receiver = stream.owner = None
        stream.stuck = 0

    def _tell_losses(self) -> None:
        """Have the kernel close the fds, then tell the owners."""
        self.ring.enter(0, 0.0, reap=False)
        losses, self.losses = self.losses, deque()
        while losses:
            owner, error = losses.popleft()
            try:
                owner.lost(error)
            except BaseException:
                self.losses.extendleft(reversed(losses))  # the others hear of it in the next turn
                raise

    def submit(self) -> None:
        """See kore.driver.Driver. Completions stay where they are until the next wait."""
        if not self.closed:
            self.ring.enter(0, 0.0)

    def wake(self) -> None:
        """See kore.driver.Driver."""
        try:
            os.write(self.wake_fd, b"\0")
        except OSError:
            pass  # full: a wake-up is on its way already; closed: nobody waits any more

    def close(self) -> None:
        """See kore.driver.Driver."""
        if self.closed:
            return
        self.closed = True
        streams = [who for who in self.live.values() if isinstance(who, UringStream)]
        for who in self.live.values():
            if isinstance(who, UringOperation):
                who.abandon()
        self.ring.enter(0, 0.0)
        for key, res, _, _ in self.ring.reap():
            who = self.live.get(key)
            if isinstance(who, UringOperation):
                who.discard(res)
        self.ring.close()  # before their memory goes: until now the kernel may write in it
        self.live.clear()
        for stream in streams:
            os.close(stream.fd)
            stream.fd = -1
            stream.gone = stream.closing = stream.shut = True
            stream.out = stream.received = stream.receiver = stream.owner = None
        self.wake_fd = -1
        self._wake_sender.close()
        self.flying.clear()

    # --- operations ----------------------------------------------------------------------------------------

    def stream(self, fd: int, owner: StreamOwner) -> UringStream:
        """See kore.driver.Driver."""
        return UringStream(self, fd, owner)

    def accept(self, fd: int, callback: Result) -> AcceptOperation:
        """See kore.driver.Driver."""
        return AcceptOperation(self, fd, callback)

    def accept_once(self, sock: socket.socket, callback: Result) -> AcceptOnceOperation:
        """See kore.driver.Driver."""
        return AcceptOnceOperation(self, sock.fileno(), callback)

    def connect(self, sock: socket.socket, address: Any, callback: Result) -> UringOperation:
        """See kore.driver.Driver."""
        packed = sockaddr(sock.family, address)
        operation = UringOperation(self, callback, packed)
        self.push(IORING_OP_CONNECT, 0, 0, sock.fileno(), len(packed), _address(packed), 0, 0, operation.key)
        return operation

    def receive(self, fd: int, length: int, callback: DataResult) -> DataOperation:
        """See kore.driver.Driver."""
        operation = DataOperation(self, callback, length)
        operation.wait(IORING_OP_RECV, 0, 0, fd, 0, operation.address, length, 0, operation.key)
        return operation

    def recvmsg(self, sock: socket.socket, length: int, callback: MessageResult) -> MessageOperation:
        """See kore.driver.Driver."""
        operation = MessageOperation(self, callback, sock.family, length)
        operation.wait(
            IORING_OP_RECVMSG, 0, 0, sock.fileno(), 0, _address(operation.header), 1, socket.MSG_CMSG_CLOEXEC,
            operation.key)
        return operation

    def send(self, fd: int, data: bytes, callback: Result) -> CallOperation:
        """See kore.driver.Driver. The fd must be non-blocking."""
        return CallOperation(self, fd, lambda: os.write(fd, data), callback)

    def sendto(self, sock: socket.socket, data: bytes, address: Any, callback: Result) -> CallOperation:
        """See kore.driver.Driver. The socket must be non-blocking."""
        sockaddr(sock.family, address)  # what is malformed raises here and now
        unix = sock.family == socket.AF_UNIX  # such a sender is always writable
        return CallOperation(
            self, sock.fileno(), lambda: sock.sendto(data, socket.MSG_NOSIGNAL, address), callback, once=unix)

    def poll(self, fd: int, mask: int, callback: Result) -> UringOperation:
        """See kore.driver.Driver."""
        operation = UringOperation(self, callback)
        self.push(IORING_OP_POLL_ADD, 0, 0, fd, 0, 0, 0, mask, operation.key)
        return operation

    def poll_multishot(self, fd: int, mask: int, callback: Result) -> RepeatedPoll:
        """See kore.driver.Driver."""
        return RepeatedPoll(self, fd, mask, callback)

    def timeout(self, seconds: float, callback: Result) -> TimeoutOperation:
        """See kore.driver.Driver."""
        timespec = TIMESPEC.pack(int(seconds), int(seconds % 1 * 1e9))
        operation = TimeoutOperation(self, callback, timespec)
        self.push(
            IORING_OP_TIMEOUT, 0, 0, -1, 0, _address(timespec), 1, IORING_TIMEOUT_ETIME_SUCCESS, operation.key)
        return operation

    def read(self, fd: int, length: int, offset: int, callback: DataResult) -> DataOperation:
        """See kore.driver.Driver."""
        operation = DataOperation(self, callback, length)
        self.push(IORING_OP_READ, 0, 0, fd, offset & 0xFFFFFFFFFFFFFFFF, operation.address, length, 0, operation.key)
        return operation

    def write(self, fd: int, data: bytes, callback: Result) -> UringOperation:
        """See kore.driver.Driver."""
        data = bytes(data)
        operation = UringOperation(self, callback, data)
        self.push(IORING_OP_WRITE, 0, 0, fd, EVERYWHERE, _address(data), len(data), 0, operation.key)
        return operation

    def child(self, pid: int, callback: Result) -> Child:
        """See kore.driver.Driver."""
        return PidfdChild(self, pid, callback)

    def splice(self, fd_in: int, offset_in: int, fd_out: int, length: int, callback: Result) -> SpliceOperation:
        """See kore.driver.Driver."""
        return SpliceOperation(self, callback, (fd_in, offset_in, fd_out, length))
