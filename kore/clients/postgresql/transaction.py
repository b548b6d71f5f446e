"""``kore.dbtransaction``: queries that belong together, on one connection, as ``async with``.

The end of the block is the end of the transaction: COMMIT, or ROLLBACK when an exception leaves it. A coroutine that is
killed inside cannot wait for a rollback; the pool makes one before anybody else gets the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from kore.clients.postgresql.errors import DatabaseError
from kore.clients.postgresql.pool import TIDY_SECONDS_MAX, Pool
from kore.clients.postgresql.queries import (
    Rows,
    check_text,
    check_typed,
    encode,
    fetch_typed,
    find,
    lease,
    named,
    typed_values,
)
from kore.clients.postgresql.session import FAILED, IDLE, Session


class _Held:
    """The session of a transaction and of the savepoints in it."""

    __slots__ = ("db", "over", "pool", "savepoints", "session")

    def __init__(self, db: str, pool: Pool, session: Session) -> None:
        self.db = db
        self.pool = pool
        self.session = session
        self.savepoints = 0
        self.over = False

    async def settled(self) -> None:
        """Wait until a query that was given up in here has been cancelled."""
        if self.over:
            raise DatabaseError(f"database {self.db!r}: the transaction is over")
        while self.session.settling is not None:
            await self.session.settling.wait()

    async def ask(self, text: str, block: bytes | None = None, *, binary: bool = False) -> Rows:
        await self.settled()
        try:
            return await self.session.ask(text, block, binary=binary)
        except DatabaseError as error:
            raise named(self.db, error) from None

    async def fetch_typed(self, text: str, params: Sequence[Any]) -> Rows:
        await self.settled()
        try:
            return await fetch_typed(self.pool, self.session, text, params)
        except DatabaseError as error:
            raise named(self.db, error) from None

    async def end(self, exc_type: type[BaseException] | None) -> None:
        """Commit, or roll back, and give the session back whatever happens."""
        try:
            if exc_type is None:
                await self.settled()
                if self.session.status == FAILED:
                    raise DatabaseError(f"database {self.db!r}: rolled back: a query of the transaction failed")
                await self.ask("COMMIT")
            elif issubclass(exc_type, Exception):
                with suppress(DatabaseError, TimeoutError):  # the exception that leaves the block tells more
                    async with asyncio.timeout(TIDY_SECONDS_MAX):
                        await self.ask("ROLLBACK")
        finally:
            self.over = True
            self.pool.give_back(self.session)


class Transaction:
    """What ``kore.dbtransaction`` gives: ``async with`` it for the object whose `query` runs inside."""

    __slots__ = ("_db", "_held")

    def __init__(self, db: str) -> None:
        self._db = db
        self._held: _Held | None = None

    async def __aenter__(self) -> Self:
        if self._held is not None:
            raise RuntimeError("a transaction is entered once: call dbtransaction() again, or transaction() inside")
        pool = find(self._db).open()
        try:
            session = await lease(pool)
        except DatabaseError as error:
            raise named(self._db, error) from None
        held = _Held(self._db, pool, session)
        try:
            await held.ask("BEGIN")
        except BaseException:
            pool.give_back(session)
            raise
        self._held = held
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._held is not None:
            await self._held.end(exc_type)

    def query(
        self,
        query: str,
        *,
        params: Sequence[Any] | None = None,
        binary: bool = False,
        typed: bool = False,
    ) -> Coroutine[Any, Any, Rows]:
        """Run one query in the transaction; as `kore.dbquery`, which has the meaning of the arguments.

        After one that failed the transaction takes only its end, or that of a savepoint: this is PostgreSQL's rule.
        """
        return _query(self._inside(), query, params, binary, typed)

    def transaction(self) -> Savepoint:
        """A transaction within this one: a savepoint, to which an exception that leaves its block goes back."""
        return Savepoint(self._inside())

    def _inside(self) -> _Held:
        if self._held is None:
            raise RuntimeError("a transaction is used inside its 'async with' block")
        return self._held


class Savepoint:
    """What ``tx.transaction()`` gives: ``async with`` it for a part of `tx` that can fail by itself."""

    __slots__ = ("_held", "_name")

    def __init__(self, held: _Held) -> None:
        self._held = held
        self._name = ""

    async def __aenter__(self) -> Self:
        held = self._held
        held.savepoints += 1
        self._name = f"kore_{held.savepoints}"
        await held.ask(f"SAVEPOINT {self._name}")
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        held = self._held
        if exc_type is None:
            await held.settled()
            if held.session.status != FAILED:
                await held.ask(f"RELEASE SAVEPOINT {self._name}")
                return
            await self._go_back()
            raise DatabaseError(f"database {held.db!r}: rolled back to the savepoint: a query after it failed")
        # A coroutine that is killed may not wait: the whole transaction ends with it. One that is cancelled may.
        if issubclass(exc_type, Exception | asyncio.CancelledError):
            with suppress(DatabaseError, TimeoutError):
                async with asyncio.timeout(TIDY_SECONDS_MAX):
                    await self._go_back()

    async def _go_back(self) -> None:
        if self._held.session.status != IDLE:
            await self._held.ask(f"ROLLBACK TO SAVEPOINT {self._name}; RELEASE SAVEPOINT {self._name}")

    def query(
        self,
        query: str,
        *,
        params: Sequence[Any] | None = None,
        binary: bool = False,
        typed: bool = False,
    ) -> Coroutine[Any, Any, Rows]:
        """As `Transaction.query`."""
        return _query(self._held, query, params, binary, typed)

    def transaction(self) -> Savepoint:
        """As `Transaction.transaction`: a savepoint within this one."""
        return Savepoint(self._held)


def _query(
    held: _Held, query: str, params: Sequence[Any] | None, binary: bool, typed: bool
) -> Coroutine[Any, Any, Rows]:
    check_text("query", held.db, query)
    check_typed("query", typed)
    if typed:
        return held.fetch_typed(query, typed_values("query", params, binary))
    return held.ask(query, encode("query", params, binary), binary=binary)


def dbtransaction(db: str) -> Transaction:
    """Queries that belong together on the database `db`: ``async with kore.dbtransaction("db") as tx:``.

    Inside, ``await tx.query(...)`` takes what `kore.dbquery` takes after the name; ``async with tx.transaction()`` is a
    savepoint. Leaving the block commits; an exception that leaves it, and a coroutine that is killed in it, rolls back.
    A block that ends well although a query in it failed raises RuntimeError, for nothing of it was kept.

    Raises TypeError when `db` is no str. Entering raises RuntimeError where `kore.dbquery` does. One connection of the
    pool is taken for as long as the block lasts.
    """
    check_text("dbtransaction", db, "")
    return Transaction(db)
