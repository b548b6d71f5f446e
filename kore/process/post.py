"""A worker's end of the messages between workers: what it sends, and the hook that gets what arrives.

Sending never waits: what the channel does not take is kept, and when too much is kept the caller is told. What arrives
goes to ``koreapp.onmsg`` through the loop, in the order each sender sent it; an async hook makes a task of each
message, and while too many of them run nothing more is read, so that the parent's queue is what fills.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

from kore import reactor
from kore.process.channel import Channel, ChannelError, Kind
from kore.process.outbox import Outbox
from kore.process.pieces import OBJECT_BYTES_MAX, Assembly, Whole, cut

MESSAGES_PER_TURN = 64
"""Messages read before requests get their turn: as many as a connection's pipeline may be served in one."""

TASKS_MAX = 1000
"""Async hooks that run at a time before reading stops: as many as requests may by default."""

LAST_SECONDS = 0.5
"""For the parent to take what an ending worker still has to send."""

LABEL = "koreapp.onmsg"


class Post:
    """The messages of this worker. open() when there is a loop, close() before it goes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._outbox = Outbox(channel)
        self._piece_bytes = channel.piece_bytes()
        self._assembly = Assembly()
        # Threads of the executor may send too. Reentrant: a finalizer may send in the middle of a send.
        self._lock = threading.RLock()
        self._loop: reactor.Loop | None = None
        self._watching = False
        self._closed = False
        self._onmsg: Callable[..., Any] | None = None
        self._on_broadcast: Callable[[bytes], object] = lambda _: None
        self._tasks = 0
        self._paused = False

    def open(
        self, loop: reactor.Loop, onmsg: Callable[..., Any] | None, on_broadcast: Callable[[bytes], object]
    ) -> None:
        """Hear what arrives: objects for the hook, unpickled, and the bodies of broadcasts."""
        self._loop = loop
        self._onmsg = onmsg
        self._on_broadcast = on_broadcast
        loop.add_reader(self._channel.fileno(), self._hear)

    # Sending.

    def send(self, kind: Kind, target: int, data: bytes) -> None:
        """Send `data` as one object. Raises ValueError when it is too long, RuntimeError when there is no room now."""
        if len(data) > OBJECT_BYTES_MAX:
            raise ValueError(f"a message of {len(data)} bytes: at most {OBJECT_BYTES_MAX} can be sent")
        pieces = cut(kind, target, data, self._piece_bytes)
        with self._lock:
            if self._closed:
                raise RuntimeError("this worker has ended: nothing can be sent any more")
            self._outbox.flush()
            if not self._outbox.put(pieces):
                raise RuntimeError(f"the parent is slow: {self._outbox.bytes} bytes wait for it, and no more may")
            if self._outbox.waiting and not self._watching and self._loop is not None:
                self._watching = True
                self._loop.call_soon_threadsafe(self._watch)

    def _watch(self) -> None:
        if self._loop is not None:
            self._loop.add_writer(self._channel.fileno(), self._flush)

    def _flush(self) -> None:
        with self._lock:
            self._outbox.flush()
            if not self._outbox.waiting and self._loop is not None:
                self._watching = False
                self._loop.remove_writer(self._channel.fileno())

    # Receiving.

    def _hear(self) -> None:
        try:
            for _ in range(MESSAGES_PER_TURN):
                if self._paused:
                    return
                message = self._channel.receive_message()
                if message is None:
                    return
                whole = self._assembly.add(message)
                if whole is not None:
                    self._arrived(whole)
        except (EOFError, ChannelError):
            # The parent is gone; its other channel says so to who ends this worker.
            self._stop_reading()

    def _arrived(self, whole: Whole) -> None:
        if whole.kind is Kind.BROADCAST:
            self._on_broadcast(whole.data())
        elif self._onmsg is not None:
            try:
                # Any worker of an application may send anything: they are one program and one user.
                result = self._onmsg(pickle.loads(whole.data()))  # noqa: S301 (from our own workers only)
                if asyncio.iscoroutine(result):
                    self._begin(result)
            except BaseException as error:  # noqa: BLE001 (the matrix of section 4: logged, and the message dropped)
                reactor.report_exception(LABEL, error)

    def _begin(self, coroutine: Any) -> None:
        """Run the coroutine of an async hook; raises what it raises before its first wait."""
        assert self._loop is not None
        task = self._loop.begin(coroutine)
        if task is not None:
            task.on_end = self._ended
            self._tasks += 1
            if self._tasks >= TASKS_MAX:
                self._paused = True
                self._stop_reading()

    def _ended(self, error: BaseException | None) -> None:
        self._tasks -= 1
        if self._paused and self._loop is not None:
            self._paused = False
            self._loop.add_reader(self._channel.fileno(), self._hear)
        if error is not None and not isinstance(error, asyncio.CancelledError | GeneratorExit):
            reactor.report_exception(LABEL, error)

    def _stop_reading(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._channel.fileno())

    # The end.

    def close(self) -> None:
        """Stop hearing, and give the parent a moment to take what waits. Called once the loop has stopped."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._channel.fileno())
                self._loop.remove_writer(self._channel.fileno())
            self._loop = None
            deadline = time.monotonic() + LAST_SECONDS
            self._outbox.flush()
            while self._outbox.waiting and (left := deadline - time.monotonic()) > 0:
                self._channel.wait_for_room(left)
                self._outbox.flush()
