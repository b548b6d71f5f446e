"""``kore.dblisten``: what others tell a channel with NOTIFY, as an asynchronous iterator.

A listener has a connection of its own, beside the pool. It connects anew when that is lost, for as long as somebody
listens; what was told in between is lost, and the iterator says so by a notification without a payload.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self

from kore.clients.postgresql.connecting import connect, driver, failures
from kore.clients.postgresql.errors import DatabaseError, from_exception
from kore.clients.postgresql.queries import Database, check_text, find, named
from kore.reactor import trace

NOTIFICATIONS_MAX = 1000
"""Those that arrived and were not taken yet; what is over is dropped, and the iterator says so."""

RETRY_SECONDS_MIN = 0.1
RETRY_SECONDS_MAX = 5.0
"""Between two attempts to connect anew: the first pause, doubled each time up to the last."""


class Notification(NamedTuple):
    """What a NOTIFY told."""

    channel: str
    payload: str | None
    """Its text, perhaps empty; None: here notifications may be missing, look at the tables again."""
    pid: int
    """The server process of who told it; 0 with a payload of None."""


class _Feed:
    """The connection of a listener and what arrived on it. It does not know the listener, whose end ends it."""

    def __init__(self, database: Database, channel: str) -> None:
        self.database = database
        self.channel = channel
        self.arrived: deque[Notification] = deque()
        self.gap = Notification(channel, None, 0)
        self.changed = asyncio.Event()
        self.connected = asyncio.Event()
        self.error: DatabaseError | None = None
        self.connection: Any = None
        self.loop = asyncio.get_running_loop()
        self.task = self.loop.create_task(self._run())

    async def _run(self) -> None:
        delay = RETRY_SECONDS_MIN
        told = False
        where = f"database {self.database.name!r}: listening to {self.channel!r}"
        while True:
            try:
                lost = await self._connect()
            except DatabaseError as error:
                if not self.connected.is_set():
                    self.error = error
                    self.connected.set()
                    self.changed.set()
                    return
                if not told:
                    trace.log(trace.LOG_ERR, f"{where} failed: {error}; trying again")
                    told = True
                await asyncio.sleep(delay)
                delay = min(2 * delay, RETRY_SECONDS_MAX)
                continue
            if self.connected.is_set():
                trace.log(trace.LOG_NOTICE, f"{where} again")
                self._put(self.gap)
            self.connected.set()
            delay = RETRY_SECONDS_MIN
            told = False
            await lost.wait()
            self.connection = None
            trace.log(trace.LOG_NOTICE, f"{where} was interrupted: the connection is lost; connecting again")

    async def _connect(self) -> asyncio.Event:
        """Connect and listen; what is set when the connection is lost. Raises DatabaseError."""
        lost = asyncio.Event()
        self.connection = connection = await connect(self.database.info)
        connection.add_termination_listener(lambda _connection: lost.set())
        try:
            async with asyncio.timeout(self.database.info.connect_seconds):
                await connection.add_listener(self.channel, self._heard)
        except failures() as error:
            connection.terminate()
            raise from_exception(error) from None
        return lost

    def _heard(self, _connection: Any, pid: int, channel: str, payload: Any) -> None:
        self._put(Notification(channel, payload, pid))

    def _put(self, notification: Notification) -> None:
        arrived = self.arrived
        if len(arrived) < NOTIFICATIONS_MAX:
            arrived.append(notification)
        elif arrived[-1] is not self.gap:
            arrived.append(self.gap)
        self.changed.set()

    def close(self) -> None:
        """Stop listening. Called by whoever has the listener, and by its end."""
        if self.loop.is_closed():
            return
        self.task.cancel()
        if self.connection is not None:
            self.connection.terminate()


class Listener:
    """What ``kore.dblisten`` gives: an asynchronous iterator of `Notification`."""

    __slots__ = ("_channel", "_closed", "_db", "_feed")

    def __init__(self, db: str, channel: str) -> None:
        self._db = db
        self._channel = channel
        self._feed: _Feed | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> Notification:
        feed = await self._listen()
        while not feed.arrived:
            if self._closed:
                raise StopAsyncIteration
            feed.changed.clear()
            await feed.changed.wait()
        return feed.arrived.popleft()

    async def _listen(self) -> _Feed:
        """Be connected. Raises DatabaseError when the first connection cannot be made."""
        if self._closed:
            raise StopAsyncIteration
        if self._feed is None:
            database = find(self._db)
            driver()
            self._feed = _Feed(database, self._channel)
        feed = self._feed
        await feed.connected.wait()
        if feed.error is not None:
            raise named(self._db, feed.error)
        return feed

    def close(self) -> None:
        """Stop listening and close the connection; the iterator ends after what had arrived. Idempotent."""
        self._closed = True
        if self._feed is not None:
            self._feed.close()
            self._feed.changed.set()

    def __del__(self) -> None:
        # A loop that was left, and a coroutine that was killed in it, just drop the iterator.
        feed = getattr(self, "_feed", None)
        if feed is not None:
            with suppress(RuntimeError):  # the loop is gone
                feed.close()


def dblisten(db: str, channel: str) -> Listener:
    """Hear what is told to `channel` of the database `db`: ``async for note in kore.dblisten("db", "jobs"):``.

    Each `note` has a `channel`, a `payload` and the `pid` of the server process that told it. A payload of None says
    that notifications may be missing here: the connection was lost and made anew, or more than NOTIFICATIONS_MAX came
    faster than they were taken. The channel's name is taken as it stands (LISTEN "Jobs", not jobs).

    It listens from the first ``await`` on, or from entering it as ``async with kore.dblisten(...) as notes:``; leaving
    the loop, closing it and being killed ends it. Raises TypeError when an argument is no str and ValueError for an
    empty channel or a NUL; RuntimeError at the first await when the database is unknown or does not let us listen.
    """
    check_text("dblisten", db, channel)
    if not channel:
        raise ValueError("dblisten: the channel has no name")
    return Listener(db, channel)
