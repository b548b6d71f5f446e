"""The operations of the readiness driver: a system call that is made once its fd is ready.

An operation begins when the driver next waits, as a submission to a ring would, and not inside the call that asked for
it: then nothing is closed or called back in the middle of a batch of events.

Three kinds: those that wait for readiness and then make their call (`Waiting`), those that try first because they
mostly succeed at once (`Trying`), and those that never wait (`Instant`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from select import POLLIN, POLLOUT, poll
from socket import AF_UNIX, SO_ERROR, SOL_SOCKET, socket
from typing import TYPE_CHECKING, Any

from kore.readiness.syscalls import MSG_NOSIGNAL, listens
from kore.readiness.watch import ALWAYS_READY

if TYPE_CHECKING:
    from kore.readiness.driver import ReadinessDriver

Attempt = Callable[[int], Any]
"""The system call of an operation, given what the poller reported; its result. It raises OSError."""

ABOUT_ONE_CONNECTION = frozenset({
    errno.ECONNABORTED, errno.EINTR, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM, getattr(errno, "ENONET", errno.ECONNABORTED),
})
"""Errors of accept(2) that tell of a connection which is no more, or which a firewall refused; the listener is well."""

UNKNOWN_TO_POLLER = frozenset({errno.EPERM})
"""epoll_ctl(2): EPERM, the fd does not support epoll; a regular file or a directory, which never make anyone wait."""


class Operation:
    """An operation in flight. `over` means that nothing more will come of it, save a result already on its way."""

    __slots__ = ("driver", "callback", "over")

    def __init__(self, driver: ReadinessDriver, callback: Callable[[Any], None]) -> None:
        self.driver = driver
        self.callback: Callable[[Any], None] | None = callback
        self.over = False

    def begin(self) -> None:
        """Make the call or start to wait. Called by the driver in its turn; calls nobody back."""

    def withdraw(self) -> None:
        """Wait no longer."""

    def finish(self, result: Any) -> None:
        """Give the one last result."""
        callback, self.callback = self.callback, None
        if callback is not None:
            callback(result)

    def conclude(self, result: Any) -> None:
        """It is over, and `result` is delivered in this turn or the next."""
        self.over = True
        self.driver.due.append((self.finish, result))

    def cancel(self) -> None:
        """See kore.driver.Operation."""
        if not self.over:
            self.withdraw()
            self.conclude(-errno.ECANCELED)

    def forget(self) -> None:
        """See kore.driver.Operation."""
        self.callback = None
        if not self.over:
            self.over = True
            self.withdraw()


class Instant(Operation):
    """A call that never waits for anyone. It is made even if cancelled: then only nobody hears of it."""

    __slots__ = ("attempt",)

    def __init__(self, driver: ReadinessDriver, callback: Callable[[Any], None], attempt: Callable[[], Any]) -> None:
        super().__init__(driver, callback)
        self.attempt = attempt

    def cancel(self) -> None:
        """Too late from the start."""

    def forget(self) -> None:
        """Only the result is dropped."""
        self.callback = None

    def begin(self) -> None:
        """Make the call."""
        try:
            result = self.attempt()
        except OSError as error:
            result = -(error.errno or errno.EIO)
        self.conclude(0 if result is None else result)


class Waiting(Operation):
    """A call that is made when the fd is ready for it."""

    __slots__ = ("fd", "want", "attempt")

    def __init__(
        self, driver: ReadinessDriver, callback: Callable[[Any], None], fd: int, want: int, attempt: Attempt,
    ) -> None:
        super().__init__(driver, callback)
        self.fd = fd
        self.want = want
        self.attempt = attempt

    def begin(self) -> None:
        """Wait for readiness."""
        try:
            self.driver.watch(self)
        except OSError as error:
            if error.errno in UNKNOWN_TO_POLLER and not self.want & ~ALWAYS_READY:
                self.always_ready()
            else:
                self.conclude(-(error.errno or errno.EIO))

    def always_ready(self) -> None:
        """The poller refuses a file that is always ready."""
        try:
            self.conclude(self.attempt(self.want))
        except OSError as error:
            self.conclude(-(error.errno or errno.EIO))

    def withdraw(self) -> None:
        """Wait no longer."""
        self.driver.unwatch(self)

    def ready(self, events: int, /) -> None:
        """The fd is ready: make the call, and call back unless it would block after all."""
        try:
            result = self.attempt(events)
        except BlockingIOError:
            return
        except OSError as error:
            result = -(error.errno or errno.EIO)
        self.over = True
        self.driver.unwatch(self)
        self.finish(result)


class Trying(Waiting):
    """A call that is made at once, because it mostly need not wait, and again when the fd is ready."""

    __slots__ = ()

    def begin(self) -> None:
        """Try."""
        try:
            result = self.attempt(0)
        except BlockingIOError:
            super().begin()
            return
        except OSError as error:
            result = -(error.errno or errno.EIO)
        self.conclude(result)


class RepeatedPoll(Waiting):
    """A poll that goes on until cancelled."""

    __slots__ = ()

    def always_ready(self) -> None:
        """What always holds cannot be waited for."""
        self.conclude(-errno.EPERM)

    def ready(self, events: int, /) -> None:
        """Report it; the level-triggered poller will do so again as long as it holds."""
        if self.callback is not None:
            self.callback(events)


class Accept(Waiting):
    """Connections from a listening socket, until cancelled."""

    __slots__ = ("listener",)

    def __init__(self, driver: ReadinessDriver, callback: Callable[[Any], None], fd: int) -> None:
        super().__init__(driver, callback, fd, POLLIN | driver.poller.listener_flags, self.ready)
        self.listener: socket | None = None

    def begin(self) -> None:
        """Wait for connections. Several processes may be woken for the same one, so the listener must not block."""
        try:
            self.listener = listener = socket(fileno=self.fd)
            listening = listens(listener)
        except OSError as error:
            self.conclude(-(error.errno or errno.EIO))
        else:
            if listening:
                super().begin()
            else:
                self.conclude(-errno.EINVAL)  # as accept(2) says; the poller would wait for ever
        if self.over:
            self.detach()

    def withdraw(self) -> None:
        """Wait no longer."""
        super().withdraw()
        self.detach()

    def detach(self) -> None:
        """Let go of the socket object, without which it would close the fd it was lent."""
        if self.listener is not None:
            self.listener.detach()
            self.listener = None

    def ready(self, _events: int, /) -> None:
        """Accept what waits, within bounds, and let another process be first next time."""
        assert self.listener is not None
        # Another process may have changed that, since they share it: one that waits in accept(2) answers nobody.
        self.listener.setblocking(False)
        accepted = 0
        # socket._accept is accept4(2) and nothing else; socket.accept() would wrap each fd for us to unwrap it.
        accept = self.listener._accept  # type: ignore[attr-defined]
        for _ in range(self.driver.accept_batch):
            try:
                fd, _ = accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in ABOUT_ONE_CONNECTION:
                    continue
                self.withdraw()
                self.over = True
                self.finish(-(error.errno or errno.EIO))
                return
            os.set_blocking(fd, False)
            accepted += 1
            if self.callback is not None:
                self.callback(fd)
            if self.over:
                return
        if accepted:
            self.driver.rotate(self)


class AcceptOnce(Waiting):
    """One connection from a listening socket that does not block."""

    __slots__ = ("listener",)

    def __init__(self, driver: ReadinessDriver, callback: Callable[[Any], None], listener: socket) -> None:
        want = POLLIN | driver.poller.listener_flags
        # No method of its own as the attempt: that would be a cycle, which only a collection frees.
        super().__init__(driver, callback, listener.fileno(), want, partial(accept_one, listener))
        self.listener = listener

    def begin(self) -> None:
        """Wait for it."""
        try:
            listening = listens(self.listener)
        except OSError as error:
            self.conclude(-(error.errno or errno.EIO))
            return
        if listening:
            super().begin()
        else:
            self.conclude(-errno.EINVAL)  # as accept(2) says; the poller would wait for ever


def accept_one(listener: socket, _events: int) -> int:
    """A connection, unless another process has taken it or it is no more."""
    try:
        fd: int = listener._accept()[0]  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in ABOUT_ONE_CONNECTION:
            raise BlockingIOError from error
        raise
    os.set_blocking(fd, False)
    return fd


class SendTo(Trying):
    """A sendto(2). To a unix socket it does not wait: a sender is always writable, its receiver's queue may be full."""

    __slots__ = ("unix",)

    def __init__(
        self, driver: ReadinessDriver, callback: Callable[[Any], None], sock: socket, data: bytes, address: Any,
    ) -> None:
        super().__init__(
            driver, callback, sock.fileno(), POLLOUT, lambda _: sock.sendto(data, MSG_NOSIGNAL, address))
        self.unix = sock.family == AF_UNIX

    def begin(self) -> None:
        """Try."""
        if not self.unix:
            super().begin()
            return
        try:
            result = self.attempt(0)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        self.conclude(result)


class Connect(Waiting):
    """A connect(2) that is under way: writability tells that it is decided, SO_ERROR how."""

    __slots__ = ("socket",)

    def __init__(self, driver: ReadinessDriver, callback: Callable[[Any], None], sock: socket) -> None:
        super().__init__(driver, callback, sock.fileno(), POLLOUT, self.outcome)
        self.socket = sock

    def outcome(self, _events: int) -> int:
        """0, or a negated errno."""
        return -self.socket.getsockopt(SOL_SOCKET, SO_ERROR)


class Splice(Trying):
    """A splice(2), which waits for whichever of its two ends is not ready."""

    __slots__ = ("fd_in", "fd_out", "offset_in", "length")

    def __init__(
        self, driver: ReadinessDriver, callback: Callable[[Any], None],
        fd_in: int, offset_in: int, fd_out: int, length: int,
    ) -> None:
        super().__init__(driver, callback, fd_in, POLLIN, self.move)
        self.fd_in = fd_in
        self.fd_out = fd_out
        self.offset_in = offset_in
        self.length = length

    def move(self, _events: int) -> int:
        """Move what can be moved."""
        return os.splice(
            self.fd_in, self.fd_out, self.length,
            None if self.offset_in < 0 else self.offset_in, None, os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)

    def begin(self) -> None:
        """Try; if it would block, find out where. splice(2) does not tell; a poll(2) that does not wait does."""
        try:
            result = self.move(0)
        except BlockingIOError:
            source = poll()
            source.register(self.fd_in, POLLIN)
            self.fd, self.want = (self.fd_out, POLLOUT) if source.poll(0) else (self.fd_in, POLLIN)
            Waiting.begin(self)
            return
        except OSError as error:
            result = -(error.errno or errno.EIO)
        self.conclude(result)

    def ready(self, _events: int, /) -> None:
        """One end is ready; the other may not be."""
        self.driver.unwatch(self)
        self.begin()


class Timeout(Operation):
    """A time to come."""

    __slots__ = ("when",)

    def __init__(self, driver: ReadinessDriver, callback: Callable[[Any], None], when: float) -> None:
        super().__init__(driver, callback)
        self.when = when

    def withdraw(self) -> None:
        """Its place in the heap is given up when its time comes, or when such places are the most of it."""
        self.driver.timeout_withdrawn()

    def fire(self) -> None:
        """Its time has come."""
        self.over = True
        self.finish(0)
