"""A connected socket under readiness: one read for an event, one write for a turn.

The driver does the ordinary case itself, in its loop: an event that says "input" and nothing else, for a stream that
reads and on which nothing else waits (`plain`), is answered by one read; output leaves by one write. Everything
else comes here.

Changes of what the poller is asked are put off until an event shows that they matter: a handler that pauses, answers
and resumes costs no system call, nor does a peer whose FIN is answered by close().
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from errno import ECANCELED, ECONNRESET, EIO
from select import POLLERR, POLLIN, POLLOUT
from typing import TYPE_CHECKING

from kore.driver import Stream, StreamOwner
from kore.readiness.syscalls import SHUT_WR, shutdown
from kore.readiness.watch import GONE, NOT_REGISTERED, arm, let_go_on, wanted_by

if TYPE_CHECKING:
    from kore.readiness.driver import ReadinessDriver
    from kore.readiness.operation import Waiting

READ_BYTES_MAX = 65536
"""Bytes asked for by one read. A request is far smaller; a body of 10 MiB takes 160 reads."""

READS_MAX = 4
"""Reads for one event while each comes back full: one fast peer gets 256 KiB a turn before the others get theirs."""

IOV_MAX = 1024
"""Pieces one writev(2) takes: UIO_MAXIOV on Linux, IOV_MAX on the BSDs."""


class ReadinessStream(Stream):
    """See kore.driver.Stream."""

    __slots__ = ("mask", "plain", "deaf", "fin_sent", "held", "stall_told", "waiters")

    def __init__(self, driver: ReadinessDriver, fd: int, owner: StreamOwner) -> None:
        super().__init__(driver, fd, owner)
        self.mask = NOT_REGISTERED
        self.plain = POLLIN  # the event that one read answers, 0 when it takes more
        self.deaf = False  # hung up while paused: out of the poller, which would report it without end
        self.fin_sent = False
        self.held: list[bytes | memoryview] | None = None  # the `stuck` bytes
        self.stall_told = False  # the owner knows that some are stuck
        self.waiters: Sequence[Waiting] = ()  # operations on the same fd

    # --- input ---------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """See kore.driver.Stream. The poller is told when input arrives all the same."""
        self.reading = False
        self.plain = 0

    def resume(self) -> None:
        """See kore.driver.Stream."""
        if self.reading or self.gone:
            return
        self.reading = True
        self.deaf = False
        self.settle()
        if self.mask == NOT_REGISTERED or not self.mask & POLLIN:
            arm(self.driver.poller, self)

    def settle(self) -> None:
        """Is input a plain matter?"""
        self.plain = POLLIN if self.reading and not self.ended and not self.waiters else 0

    def wants(self) -> int:
        """What the poller should be asked."""
        wanted = wanted_by(self.waiters)
        if self.reading and not self.ended and self.received is not None:
            wanted |= POLLIN
        if self.stuck:
            wanted |= POLLOUT
        return NOT_REGISTERED if not wanted and self.deaf else wanted

    def ready(self, events: int) -> None:
        """An event that is not plain. Each step may end the stream, by a callback or by an error."""
        peer_is_gone = events & GONE and self.ended
        if events & (POLLIN | GONE) and self.reading and not self.ended:
            self.read()
        if events & (POLLOUT | GONE) and self.stuck and not self.gone:
            self.write_held()
        if self.fd < 0:
            return
        if peer_is_gone and not self.gone:
            # Both directions closed is the regular end, once we sent our FIN as well; otherwise the peer is dead.
            self.release(0 if self.fin_sent and not events & POLLERR else ECONNRESET)
            return
        if events & GONE and not self.reading:
            self.deaf = True
        if self.waiters:
            let_go_on(self.waiters, events)
            if self.fd < 0:
                return
        arm(self.driver.poller, self)

    def read(self) -> None:
        """Read until a read does not come back full, within bounds."""
        for _ in range(READS_MAX):
            received = self.received
            if received is None or not self.reading:
                return
            try:
                data = os.read(self.fd, READ_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError as error:
                self.release(error.errno or EIO)
                return
            if not data:
                self.ended = True
                self.plain = 0
            received(data)
            if len(data) < READ_BYTES_MAX:
                return

    # --- output --------------------------------------------------------------------------------------------

    def flush(self, pieces: list[bytes | memoryview], total: int) -> None:
        """Hand `pieces` of `total` bytes to the kernel in one call; what it does not take is held."""
        try:
            taken = os.writev(self.fd, pieces[:IOV_MAX]) if len(pieces) > 1 else os.write(self.fd, pieces[0])
        except BlockingIOError:
            taken = 0
        except OSError as error:
            self.release(error.errno or EIO)
            return
        self.hold(pieces, total, taken)

    def hold(self, pieces: list[bytes | memoryview], total: int, taken: int) -> None:
        """Keep what is left of `pieces` when `taken` of their `total` bytes have gone; ask for POLLOUT."""
        if not self.stuck and taken != total:
            self.driver.due.append((self.tell_stall, None))
        self.stuck = total - taken
        if not self.stuck:
            self.held = None
            return
        first = 0
        while taken >= len(pieces[first]):
            taken -= len(pieces[first])
            first += 1
        self.held = [memoryview(pieces[first])[taken:], *pieces[first + 1:]]
        if self.mask == NOT_REGISTERED or not self.mask & POLLOUT:
            arm(self.driver.poller, self)

    def tell_stall(self, _: object = None) -> None:
        """Let the owner know, once, that output is stuck."""
        if self.stuck and not self.stall_told and not self.gone and self.owner is not None:
            self.stall_told = True
            self.owner.stalled()

    def write_held(self) -> None:
        """The kernel takes output again: first what was held, with it what was written meanwhile."""
        self.tell_stall()
        if self.gone:
            return
        pieces, total, out = self.held or [], self.stuck, self.out
        if out is not None:
            self.out = None
            more = out if isinstance(out, list) else [out]
            pieces += more
            total += sum(map(len, more))
        self.flush(pieces, total)
        if self.stuck or self.fd < 0:
            return
        self.stall_told = False
        if self.closing:
            self.release(0)
            return
        if self.finishing:
            self.send_fin()
        if self.owner is not None:
            self.owner.drained()

    # --- the end -------------------------------------------------------------------------------------------

    def send_fin(self) -> None:
        """Our FIN, after the last byte of output."""
        if not self.fin_sent:
            self.fin_sent = True
            try:
                shutdown(self.fd, SHUT_WR)
            except OSError:
                pass  # ENOTCONN: the peer has reset the connection; the poller is about to say so

    def release(self, error: int) -> None:
        """Close the fd, for whatever reason, and tell the owner in this turn or the next. Called once."""
        driver, owner = self.driver, self.owner
        driver.close_stream(self)
        for waiter in self.waiters:
            waiter.conclude(-ECANCELED)
        if owner is not None:
            driver.due.append((owner.lost, 0 if self.closing else error))
        self.clear()

    def clear(self) -> None:
        """Forget everything: nobody finds anything here any more."""
        self.gone = self.closing = self.shut = True
        self.fd = -1
        self.mask = NOT_REGISTERED
        self.plain = self.stuck = 0
        self.owner = self.received = self.out = self.held = None
        self.waiters = ()
