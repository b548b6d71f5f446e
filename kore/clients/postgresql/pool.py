"""The connections of one worker to one database: opened when needed, each for one query at a time, first come first.

What waits here is the query itself and not its coroutine: a connection that has answered one query is sent the next
there and then, in the turn in which the answer came, before anybody is woken.

Nothing waits for ever. A query waits for a connection while there is one, or one is being made; when the last attempt
fails all that wait fail with its reason. Who leaves, by `abandon`, which never waits and so can be called from a
coroutine that is being killed, leaves the cancelling and tidying up to tasks of the pool, each with its limit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from kore.clients.postgresql.connecting import CANCEL_SECONDS_MAX, connect, driver, failures, request_cancel
from kore.clients.postgresql.conninfo import ConnectionInfo
from kore.clients.postgresql.errors import DatabaseError
from kore.clients.postgresql.session import IDLE, Query, Session

TIDY_SECONDS_MAX = 10.0
"""How long a rollback, and the reset of a session, may take; then the connection ends."""

CANCEL_AGAIN_SECONDS = 0.25
"""When a request to cancel is repeated: it travels on a connection of its own, and one that overtakes its query on a
busy server finds nothing to cancel, and the query would run on."""

TOO_MANY_CONNECTIONS = "53300"  # the SQLSTATE of a server that is full, PostgreSQL's manual, appendix A

FULL_PAUSES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Before each further attempt to reach a server that is full, in seconds. A connection that it refuses has a place
there for a moment, and so a burst may be refused whole, each for the sake of the others."""

CLOSE_SECONDS_MAX = 0.8
"""How long the end of the loop may wait for running queries to be cancelled; a worker has a second in all."""


class Lease:
    """Waits for a session of its own: for a transaction, or for asyncpg to run a query."""

    __slots__ = ("future", "number", "session")

    def __init__(self, future: asyncio.Future[Session]) -> None:
        self.future = future
        self.number = 0
        self.session: Session | None = None

    def start(self, session: Session) -> None:
        """Have `session`, which is free."""
        session.held = True
        self.session = session
        self.future.set_result(session)


class Pool:
    """Connections to the database `name`; on one loop, whose end ends it. Fails with DatabaseError."""

    def __init__(self, name: str, info: ConnectionInfo, conn_max: int, queue_max: int) -> None:
        self.name = name
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[Query | Lease] = deque()
        self.sessions: set[Session] = set()
        self.idle: list[Session] = []
        """The one used last is used first: others may be lost to a server's idle timeout without anybody waiting."""
        self._attempts: list[int] = []
        """To open a connection: of each, the last query that waited when it began."""
        self._disappointed = 0  # the last query whose own attempt has failed
        self._pauses: Iterator[float] | None = None  # of a server that is full: attempts are made one after the other
        self.closed = False
        self._info = info
        self._conn_max = conn_max  # 0: no limit
        self._queue_max = queue_max
        self._number = 0  # of the last that had to wait
        self._tasks: set[asyncio.Task[Any]] = set()
        self._all_lost = asyncio.Event()
        # Loops end their asynchronous generators when they end, and wait for them: asyncio.run and kore's workers do.
        self._life = self._live()
        with suppress(StopIteration):
            self._life.__anext__().__await__().send(None)

    async def _live(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self.close()

    # Queries come and go.

    def submit(self, query: Query | Lease) -> None:
        """Run `query` as soon as there is a session. Raises DatabaseError when too many wait already."""
        if self.idle:
            query.start(self.idle.pop())
            return
        if self.closed:
            raise DatabaseError("the event loop ends")
        self._number = query.number = self._number + 1
        self.waiting.append(query)
        self._grow()
        if len(self.waiting) - len(self._attempts) > self._queue_max:
            self.waiting.pop()
            raise DatabaseError(
                f"{len(self.waiting)} queries wait for {len(self.sessions)} connections already "
                f"(pgsql_queue_limit {self._queue_max}, pgsql_conn_max {self._conn_max})"
            )

    def abandon(self, query: Query | Lease) -> None:
        """Nobody waits for `query` any more: take it from the queue, or cancel it on the server. Never waits."""
        session = query.session
        if session is None:
            with suppress(ValueError):  # it is over
                self.waiting.remove(query)
        elif isinstance(query, Lease):
            self.give_back(session)
        else:
            # What the server says of it is for the canceller now.
            query.future = self.loop.create_future()
            query.future.add_done_callback(_seen)
            self._settle_by(session, partial(self._cancel, session, query.future))

    def abandon_lent(self, session: Session, text: str) -> None:
        """The same for `text`, which asyncpg runs on `session`."""
        self._settle_by(session, partial(self._cancel_lent, session, text))

    def give_back(self, session: Session) -> None:
        """Whoever held `session` is done with it, or dead."""
        session.held = False
        if session.settling is not None or session.gone:
            return
        if session.query is not None:  # of a task that outlives the transaction it was in
            self._settle_by(session, partial(self._cancel, session, session.query.future))
        elif session.lent:
            session.abort()
        else:
            self.released(session)

    # What sessions tell.

    def released(self, session: Session) -> None:
        """`session` has answered a query, and nobody holds it: give it the next."""
        if session.status != IDLE or session.touched:
            session.held = True
            self._spawn(self._tidy(session))
            return
        waiting = self.waiting
        while waiting:
            query = waiting.popleft()
            if not query.future.done():
                query.start(session)
                return
        self.idle.append(session)

    def lost(self, session: Session) -> None:
        """The connection is over."""
        self.sessions.discard(session)
        if session in self.idle:
            self.idle.remove(session)
        if not self.closed:
            self._grow()
        elif not self.sessions:
            self._all_lost.set()

    # Growing.

    def _grow(self) -> None:
        """Open another connection if somebody waits that no attempt is being made for."""
        if self._pauses is not None:
            return
        while len(self.waiting) > len(self._attempts) and (
            not self._conn_max or len(self.sessions) + len(self._attempts) < self._conn_max
        ):
            self._attempt()

    def _attempt(self, pause: float = 0.0) -> None:
        self._attempts.append(self._number)
        self._spawn(self._connect(self._number, pause))

    async def _connect(self, newest: int, pause: float) -> None:
        try:
            if pause:
                await asyncio.sleep(pause)
            connection = await connect(self._info)
        except DatabaseError as error:
            self._attempts.remove(newest)
            self._not_connected(error, newest)
            return
        except BaseException:
            self._attempts.remove(newest)
            self._pauses = None
            raise
        self._attempts.remove(newest)
        self._pauses = None
        session = Session(connection, self)
        self.sessions.add(session)
        self.released(session)

    def _not_connected(self, error: DatabaseError, newest: int) -> None:
        """An attempt failed that began when `newest` was the last to wait.

        Without a connection it was the chance of who waited then, but for other attempts as old: on a server that is
        nearly full some of a burst succeed. Younger ones do not count, or there might always be one. A server that is
        full is asked again, by one attempt at a time, before anybody is told.
        """
        self._disappointed = max(self._disappointed, newest)
        if self.sessions:
            return
        full = error.sqlstate == TOO_MANY_CONNECTIONS
        if full and self._pauses is None:
            self._pauses = iter(FULL_PAUSES)
        if self._attempts if self._pauses is not None else any(began <= self._disappointed for began in self._attempts):
            return
        if full and self._pauses is not None and not self.closed:
            pause = next(self._pauses, None)
            if pause is not None:
                self._attempt(pause)
                return
        self._pauses = None
        self._fail(error, self._disappointed)
        self._grow()

    def _fail(self, error: DatabaseError, newest: int) -> None:
        while self.waiting and self.waiting[0].number <= newest:
            future = self.waiting.popleft().future
            if not future.done():
                future.set_exception(DatabaseError(str(error), error.sqlstate))

    # Cleaning, in tasks of the pool.

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self.loop.is_closed():  # a coroutine that outlived its loop is collected
            work.close()
            return
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _settle_by(self, session: Session, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        session.settling = asyncio.Event()
        self._spawn(self._settle(session, work))

    async def _settle(self, session: Session, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have `work` free the session of what it runs, within the limit."""
        try:
            async with asyncio.timeout(CANCEL_SECONDS_MAX):
                await work()
        except failures():
            session.abort()  # it might answer the next query with what it says to this one
        except asyncio.CancelledError:
            # The loop ends, and `close` cancels what runs. Should it not end the connection does.
            self.loop.call_later(CANCEL_SECONDS_MAX, self._give_up, session)
            raise
        except BaseException:
            self._give_up(session)
            raise
        self._settled(session)
        if not session.held and not session.gone:
            self.released(session)

    def _give_up(self, session: Session) -> None:
        session.abort()
        self._settled(session)

    def _settled(self, session: Session) -> None:
        settling = session.settling
        session.settling = None
        if settling is not None:
            settling.set()

    async def _cancel(self, session: Session, answer: asyncio.Future[Any]) -> None:
        await request_cancel(session.connection)
        while not (await asyncio.wait([answer], timeout=CANCEL_AGAIN_SECONDS))[0]:
            await request_cancel(session.connection)

    async def _cancel_lent(self, session: Session, text: str) -> None:
        # asyncpg sends the request by itself, and waits for its end before it runs anything else.
        with suppress(driver().PostgresError):
            await session.connection.execute("SELECT 1")
        with suppress(DatabaseError):  # it is over then
            session.take_back(text)

    async def _tidy(self, session: Session) -> None:
        """End the transaction that a query left, and undo what it did to the session."""
        try:
            async with asyncio.timeout(TIDY_SECONDS_MAX):
                if session.status != IDLE:
                    await session.ask("ROLLBACK")
                if session.touched:
                    session.forget_statements()  # or they would be closed one by one
                    await session.ask("DISCARD ALL")
                    session.forget_statements()
        except (DatabaseError, TimeoutError):
            session.abort()
            return
        except BaseException:
            session.abort()
            raise
        session.touched = False
        self.give_back(session)

    async def close(self) -> None:
        """Cancel what runs and close all connections, within CLOSE_SECONDS_MAX. Called at the end of the loop."""
        self.closed = True
        self._fail(DatabaseError("the event loop ends"), self._number)
        running = [
            request_cancel(session.connection) if session.query is None
            else self._cancel(session, session.query.future)
            for session in self.sessions if session.busy
        ]
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await asyncio.gather(*running, return_exceptions=True)
                for session in list(self.sessions):
                    session.close()
                if self.sessions:
                    await self._all_lost.wait()
        for session in list(self.sessions):
            session.abort()
        for task in list(self._tasks):
            task.cancel()


def _seen(future: asyncio.Future[Any]) -> None:
    """Nobody may ever look at what this future got, and asyncio is not to complain."""
    if not future.cancelled():
        future.exception()
