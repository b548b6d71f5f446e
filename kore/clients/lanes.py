"""Transfers by protocols in which libcurl itself waits, on threads: FTP, mail, SSH, telnet, files.

For HTTP and its like libcurl waits nowhere. But for the last answer to an FTP transfer (226), for those to the goodbyes
(QUIT, LOGOUT, the end of an SSH session) and in all of telnet the thread that called it waits, and a server that keeps
silent then would stop the whole worker, for up to curl_timeout; and a file may be a pipe. So each of these transfers
has a thread to itself, a lane, whose multi handle keeps connections for the lane's next transfer and says the goodbyes
there.
"""

from __future__ import annotations

import asyncio
import queue
import re
import select
import socket
import threading
from collections import deque
from contextlib import suppress
from typing import Any

from kore.clients.easy import pycurl

LANES_MAX = 64
"""Transfers of one worker by these protocols at a time; others wait for one of them to end."""

LANES_IDLE_MAX = 8
"""Lanes that stay, with their connections, when they have nothing to do."""

ENGINE_SCHEMES = frozenset({
    "dict", "gopher", "gophers", "http", "https", "mqtt", "mqtts", "rtsp", "tftp", "ws", "wss",
})  # fmt: skip
"""Protocols for which libcurl waits nowhere. Of others, and of those that it has still to learn, nobody knows."""

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):/")
_GUESSED = ("ftp.", "imap.", "pop3.", "smtp.")  # CURLOPT_URL(3): hosts that tell the protocol where no scheme does

_MASKS = {1: select.POLLIN, 2: select.POLLOUT, 3: select.POLLIN | select.POLLOUT}  # CURL_POLL_*
_SELECT_IN, _SELECT_OUT, _SELECT_ERR = 1, 2, 4  # CURL_CSELECT_*


def libcurl_waits(url: str) -> bool:
    """Whether a transfer to `url` is one for a lane."""
    scheme = _SCHEME.match(url)
    if scheme is not None:
        return scheme[1].lower() not in ENGINE_SCHEMES
    return url.lstrip().lower().startswith(_GUESSED)


class _Job:
    """One transfer, and who waits for it."""

    __slots__ = ("_left", "easy", "future", "lane", "result")

    def __init__(self, easy: Any, future: asyncio.Future[tuple[int, str]]) -> None:
        self.easy = easy
        self.future = future
        self.lane: _Lane | None = None
        self.result: tuple[int, str] | Exception = (0, "")
        self._left = left = threading.Event()
        curl = pycurl()
        # Called each second at least, also where libcurl waits; True ends the transfer. It must not hold the job, which
        # has the handle.
        easy.setopt(curl.XFERINFOFUNCTION, lambda *_sizes: left.is_set())
        easy.setopt(curl.NOPROGRESS, 0)

    @property
    def left(self) -> bool:
        """Whether nobody waits for it any more; looked at by the lane."""
        return self._left.is_set()

    def leave(self) -> None:
        self._left.set()
        if self.lane is not None:
            self.lane.wake()


class _Lane:
    """A thread with a multi handle, for one transfer at a time."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._heard, self._waker = socket.socketpair()
        self._heard.setblocking(False)
        self._waker.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._heard, select.POLLIN)
        threading.Thread(target=self._work, name="kore transfer", daemon=True).start()

    def start(self, job: _Job) -> None:
        job.lane = self
        self._jobs.put(job)

    def end(self) -> None:
        """Say goodbye to the servers, on the thread, and end it."""
        self._jobs.put(None)

    def wake(self) -> None:
        with suppress(OSError):  # full: it is awake; closed: it is over
            self._waker.send(b"!")

    # On the thread.

    def _work(self) -> None:
        curl = pycurl()
        multi = curl.CurlMulti()
        multi.setopt(curl.M_SOCKETFUNCTION, self._socket_changed)
        multi.setopt(curl.M_TIMERFUNCTION, lambda _milliseconds: None)  # asked for instead
        while (job := self._jobs.get()) is not None:
            try:
                job.result = self._transfer(multi, job)
            except Exception as error:  # noqa: BLE001 (whoever waits has to hear of it)
                job.result = error
            self._lanes.tell(self, job)
            if job.left:
                # libcurl keeps a connection whose last answer it was told not to wait for: the next transfer would read
                # that. So the lane ends.
                break
            del job  # the handle is not this thread's to keep
        job = None
        multi.close()
        self._heard.close()
        self._waker.close()

    def _transfer(self, multi: Any, job: _Job) -> tuple[int, str]:
        timed_out = pycurl().SOCKET_TIMEOUT
        multi.add_handle(job.easy)
        try:
            running = multi.socket_action(timed_out, 0)[1]
            while running and not job.left:
                milliseconds = multi.timeout()
                events = self._poll.poll(milliseconds if milliseconds >= 0 else None)
                for fd, event in events:
                    if fd == self._heard.fileno():
                        with suppress(OSError):
                            self._heard.recv(4096)
                    else:
                        running = multi.socket_action(fd, _happened(event))[1]
                if not events:
                    running = multi.socket_action(timed_out, 0)[1]
            _, _, failed = multi.info_read()
            return (failed[0][1], failed[0][2]) if failed else (0, "")
        finally:
            multi.remove_handle(job.easy)

    def _socket_changed(self, what: int, fd: int, _multi: Any, _data: Any) -> None:
        mask = _MASKS.get(what)
        if mask is not None:
            self._poll.register(fd, mask)
        else:
            with suppress(KeyError):
                self._poll.unregister(fd)


def _happened(events: int) -> int:
    happened = 0
    if events & (select.POLLIN | select.POLLHUP):
        happened = _SELECT_IN
    if events & select.POLLOUT:
        happened |= _SELECT_OUT
    if events & (select.POLLERR | select.POLLNVAL):
        happened |= _SELECT_ERR
    return happened


class Lanes:
    """The lanes of one loop. `close` is called by the transfers of that loop, at its end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[_Job] = deque()
        self._idle: list[_Lane] = []
        self._running: dict[Any, tuple[_Job, asyncio.Event]] = {}
        """By their easy handles: transfers whose thread is not done with them, waited for or left."""
        self._closed = False

    async def run(self, easy: Any) -> tuple[int, str]:
        """As `Transfers.run`. Left in any other way, the transfer is over within a second."""
        job = _Job(easy, self._loop.create_future())
        self._waiting.append(job)
        try:
            self._start()
            return await job.future
        finally:
            if job.lane is None:
                with suppress(ValueError):
                    self._waiting.remove(job)
            elif easy in self._running:
                job.leave()

    async def settled(self, easy: Any) -> None:
        """Wait until no thread has `easy` any more: that of a transfer which was left ends within a second."""
        while (running := self._running.get(easy)) is not None:
            await running[1].wait()

    def _start(self) -> None:
        while self._waiting and not self._closed and len(self._running) < LANES_MAX:
            lane = self._idle.pop() if self._idle else _Lane(self)
            job = self._waiting.popleft()
            self._running[job.easy] = (job, asyncio.Event())
            lane.start(job)

    def tell(self, lane: _Lane, job: _Job) -> None:
        """Called by a lane, on its thread, when `job` is over."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._over, lane, job)

    def _over(self, lane: _Lane, job: _Job) -> None:
        self._running.pop(job.easy)[1].set()
        if not job.future.done():
            if isinstance(job.result, Exception):
                job.future.set_exception(job.result)
            else:
                job.future.set_result(job.result)
        if self._closed or job.left or len(self._idle) >= LANES_IDLE_MAX:
            lane.end()
        else:
            self._idle.append(lane)
        self._start()

    def close(self) -> None:
        """End all: nobody waits for the threads."""
        self._closed = True
        for lane in self._idle:
            lane.end()
        self._idle.clear()
        for job, _ in self._running.values():
            job.leave()
            if job.lane is not None:
                job.lane.end()
        for job in (*self._waiting, *(job for job, _ in self._running.values())):
            if not job.future.done() and not self._loop.is_closed():
                job.future.cancel()
