"""Transfers by libcurl on the event loop: one multi handle a worker, whose sockets are polled by the engine.

libcurl says which sockets to watch and when its next timer is due (libcurl-multi(3), "multi_socket"); the engine's
polls and one timer of the loop tell it when something happened. It owns the sockets, keeps connections for the next
transfer to the same server, and resolves names in threads of its own. The multi handle is made by a worker's first
transfer, so no process shares one with another. The protocols that cannot be run in this way are those of lanes.py.

A transfer that nobody waits for any more is taken out of the multi handle at once, which closes its socket; only while
libcurl itself is calling us that has to wait for the call's end (CURLM_RECURSIVE_API_CALL), as when the collector
closes a coroutine in the middle of one.
"""

from __future__ import annotations

import asyncio
import io
import select
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from kore.clients.easy import pycurl
from kore.clients.lanes import Lanes
from kore.driver import Driver, Operation

CONNECTIONS_MAX = 500
"""Connections of one worker, in use and kept for reuse (kore-api.md section 15). Above it transfers wait for one."""

RESOLVER_SECONDS_MAX = 60.0
"""For how long a thread may ask for a name that nobody wants any more: resolv.conf(5) has 10 s for each server."""

# libcurl's words for events (multi_socket: CURL_POLL_*, CURL_CSELECT_*) and those of poll(2).
POLL_MASKS = {1: select.POLLIN, 2: select.POLLOUT, 3: select.POLLIN | select.POLLOUT}
SELECT_IN, SELECT_OUT, SELECT_ERR = 1, 2, 4


class Limits(Protocol):
    """What a transfer may take where its options say nothing else."""

    @property
    def curl_timeout(self) -> int:
        """Seconds from the beginning to the end of a transfer; 0: no limit."""

    @property
    def curl_recv_max(self) -> int:
        """Bytes of a body, after decompression."""


@dataclass(frozen=True, slots=True)
class DefaultLimits:
    """Those of kore-api.md section 15."""

    curl_timeout: int = 60
    curl_recv_max: int = 2 * 1024 * 1024


limits: Limits = DefaultLimits()
"""Read as ``transfers.limits`` when a transfer begins: whoever knows of options puts them here."""


class Sink:
    """The body that a transfer receives: at most so many bytes, in one buffer, however small the pieces come."""

    __slots__ = ("buffer", "bytes_max", "full", "room")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.room = bytes_max
        self.full = False
        self.buffer = io.BytesIO()

    def write(self, data: bytes) -> int:
        """Called by libcurl; taking less than it offers ends the transfer (CURLOPT_WRITEFUNCTION(3))."""
        size = len(data)
        self.room -= size
        if self.room < 0:
            self.full = True
            self.buffer = io.BytesIO()
            return 0 if size else -1
        return self.buffer.write(data)


async def perform(easy: Any, url: str, *, lane: bool = False) -> bytes:
    """Run the transfer that `easy` describes and give the body. RuntimeError with `url` and the reason if it fails.

    With `lane` on a thread, for protocols in which libcurl itself waits.
    """
    transfers = of_loop(asyncio.get_running_loop())
    run = transfers.lanes.run if lane else transfers.run
    sink = Sink(limits.curl_recv_max)
    easy.setopt(pycurl().WRITEFUNCTION, sink.write)
    try:
        code, reason = await run(easy)
    except transfers.error as exc:
        raise RuntimeError(f"{url}: the transfer can't begin: {exc.args[-1]}") from None
    if sink.full:
        raise RuntimeError(f"{url}: the server sent more than curl_recv_max allows ({sink.bytes_max} bytes)")
    if code:
        raise RuntimeError(f"{url}: {reason or 'no reason given'} (libcurl error {code})")
    return sink.buffer.getvalue()


_of_loop: dict[Any, Transfers] = {}


def of_loop(loop: Any) -> Transfers:
    """The transfers of `loop`, which runs now. RuntimeError when it is not kore's."""
    transfers = _of_loop.get(loop)
    if transfers is None:
        if not hasattr(loop, "driver"):
            raise RuntimeError("transfers need kore's event loop (kore.reactor.new_event_loop)")
        for old in [transfers for transfers in _of_loop.values() if transfers._loop.is_closed()]:
            old.close()  # its loop ended without a word
        transfers = _of_loop[loop] = Transfers(loop)
    return transfers


class Transfers:
    """The multi handle of one loop and the transfers on it. The loop's end ends it."""

    def __init__(self, loop: Any) -> None:
        curl = pycurl()
        self._loop = loop
        self.lanes = Lanes(loop)
        self._driver: Driver = loop.driver
        self.error: type[Exception] = curl.error
        self._name_time: int = curl.NAMELOOKUP_TIME
        self._timed_out: int = curl.SOCKET_TIMEOUT
        self._context = Context()  # timers must not keep that of the handler which happens to begin a transfer
        self._waiting: dict[Any, asyncio.Future[tuple[int, str]]] = {}
        """Easy handles in the multi handle, and who waits for them."""
        self._abandoned: list[Any] = []
        """Easy handles that are to be taken out as soon as libcurl is not calling us."""
        self._called = False
        """Whether libcurl runs now, and so whatever is called meanwhile was called by it."""
        self._polls: dict[int, Operation] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._soon = False
        self._due: float | None = None
        self._resolving_until = 0.0
        self._closed = False
        self._multi = curl.CurlMulti()
        self._multi.setopt(curl.M_SOCKETFUNCTION, self._socket_changed)
        self._multi.setopt(curl.M_TIMERFUNCTION, self._timer_changed)
        self._multi.setopt(curl.M_MAXCONNECTS, CONNECTIONS_MAX)
        self._multi.setopt(curl.M_MAX_TOTAL_CONNECTIONS, CONNECTIONS_MAX)
        # Loops end their asynchronous generators when they end: asyncio.run does, and kore's workers do.
        self._life = self._live()
        with suppress(StopIteration):
            self._life.__anext__().__await__().send(None)

    async def _live(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.close()

    # Transfers.

    async def run(self, easy: Any) -> tuple[int, str]:
        """Run the transfer of `easy`: libcurl's error number (0: none) and its reason; `error` if it can't begin.

        Left in any other way, killed or cancelled, the transfer is over and its socket closed.
        """
        future = self._loop.create_future()
        self._waiting[easy] = future
        try:
            self._call(self._multi.add_handle, easy)
            result: tuple[int, str] = await future
        except self.error:
            self._waiting.pop(easy, None)
            raise
        finally:
            if self._waiting.pop(easy, None) is not None:
                self._abandon(easy)
        return result

    def _abandon(self, easy: Any) -> None:
        self._abandoned.append(easy)
        if not self._called:
            self._settle()

    def _note_resolver(self, easy: Any) -> None:
        """Before the end of a transfer that did not get so far as to know an address: a thread may go on asking."""
        if not easy.getinfo(self._name_time):
            self._resolving_until = self._loop.time() + RESOLVER_SECONDS_MAX

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call into libcurl, which may call `_socket_changed`, `_timer_changed` and the transfers' own functions."""
        self._called = True
        try:
            return function(*args)
        finally:
            self._called = False

    def _advance(self, fd: int, events: int) -> None:
        """Tell libcurl what happened, and the coroutines what came of it."""
        running = self._call(self._multi.socket_action, fd, events)[1]
        if running < len(self._waiting) + len(self._abandoned):
            self._finish()
        if self._abandoned:
            self._settle()

    def _finish(self) -> None:
        left = 1
        while left:
            left, done, failed = self._multi.info_read()
            for easy in done:
                self._end(easy, (0, ""))
            for easy, code, reason in failed:
                self._end(easy, (code, reason))

    def _end(self, easy: Any, result: tuple[int, str]) -> None:
        future = self._waiting.pop(easy, None)
        if future is None:
            return  # abandoned while libcurl ended it; `_settle` takes it out
        if result[0]:
            self._note_resolver(easy)
        self._call(self._multi.remove_handle, easy)
        if not future.done():
            future.set_result(result)

    def _settle(self) -> None:
        while self._abandoned:
            easy = self._abandoned.pop()
            self._note_resolver(easy)
            self._call(self._multi.remove_handle, easy)

    # What libcurl asks for.

    def _socket_changed(self, what: int, fd: int, _multi: Any, _data: Any) -> None:
        if self._closed:
            return  # on another thread, perhaps
        poll = self._polls.pop(fd, None)
        if poll is not None:
            poll.forget()
        mask = POLL_MASKS.get(what)
        if mask is not None:
            # Level-triggered polls: on epoll an event then costs no call but its own.
            self._polls[fd] = self._driver.poll_multishot(fd, mask, partial(self._ready, fd))

    def _ready(self, fd: int, events: int) -> None:
        if events < 0:  # the poll is over: libcurl finds out what is wrong with the socket
            del self._polls[fd]
            self._advance(fd, SELECT_ERR)
            return
        happened = 0
        if events & (select.POLLIN | select.POLLHUP):
            happened = SELECT_IN
        if events & select.POLLOUT:
            happened |= SELECT_OUT
        if events & (select.POLLERR | select.POLLNVAL):
            happened |= SELECT_ERR
        self._advance(fd, happened)

    def _timer_changed(self, milliseconds: int) -> None:
        # libcurl moves its one timer several times a transfer, mostly to later. So a timer of the loop that comes too
        # early is left to find that out, instead of being replaced each time.
        if milliseconds < 0 or self._closed:
            self._due = None
            return
        self._due = due = self._loop.time() + milliseconds / 1000
        if milliseconds == 0:
            if not self._soon:
                self._soon = True
                self._loop.call_soon(self._kick, context=self._context)
        elif self._timer is None or self._timer.when() > due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due, self._time_up, context=self._context)

    def _kick(self) -> None:
        self._soon = False
        if self._due is not None:
            self._expire()

    def _time_up(self) -> None:
        self._timer = None
        due = self._due
        if due is None:
            return
        if due > self._loop.time():
            self._timer = self._loop.call_at(due, self._time_up, context=self._context)
        else:
            self._expire()

    def _expire(self) -> None:
        self._due = None
        self._advance(self._timed_out, 0)
        self._look_at_timer()

    def _look_at_timer(self) -> None:
        if self._due is None and self._waiting:
            # Woken a little early by its own clock, libcurl goes on waiting for the same time and does not say so.
            left = self._multi.timeout()
            if left >= 0:
                self._timer_changed(max(left, 1))

    # The end.

    def close(self) -> None:
        """End all transfers and close their sockets. The loop's end calls it; nothing can be transferred afterwards."""
        if self._closed:
            return
        self._closed = True
        self.lanes.close()
        _of_loop.pop(self._loop, None)
        for poll in self._polls.values():
            if not self._loop.is_closed():
                poll.forget()
        self._polls.clear()
        if self._timer is not None:
            self._timer.cancel()
        for easy, future in list(self._waiting.items()):
            self._abandon(easy)
            if not future.done() and not self._loop.is_closed():
                future.cancel()
        self._waiting.clear()
        if self._loop.time() < self._resolving_until:
            # libcurl would wait here for threads that wait for a name server; let it do that while the process ends.
            threading.Thread(target=self._multi.close, daemon=True).start()
        else:
            self._multi.close()
