"""``kore.dbquery``: one query on a database that ``kore.dbsetup`` named (reference: kore.dbquery)."""

from __future__ import annotations

import asyncio
from asyncio import events
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from kore.clients.postgresql import wire
from kore.clients.postgresql.connecting import driver, failures
from kore.clients.postgresql.conninfo import ConnectionInfo, parse
from kore.clients.postgresql.errors import DatabaseError, from_exception
from kore.clients.postgresql.pool import Lease, Pool
from kore.clients.postgresql.session import Query, Session
from kore.clients.postgresql.texts import first_word, is_blank

Rows = list[dict[str, Any]]


class Database:
    """What ``dbsetup`` declared, and the pool of this process once it is used."""

    __slots__ = ("conn_max", "info", "name", "pool", "queue_max")

    def __init__(self, name: str, info: ConnectionInfo, conn_max: int, queue_max: Callable[[], int]) -> None:
        self.name = name
        self.info = info
        self.conn_max = conn_max
        self.queue_max = queue_max
        self.pool: Pool | None = None

    def open(self) -> Pool:
        """The pool on the running loop."""
        pool = self.pool
        if pool is None or pool.loop is not events.get_running_loop():
            driver()
            self.pool = pool = Pool(self.name, self.info, self.conn_max, self.queue_max())
        return pool


databases: dict[str, Database] = {}
"""By the names that ``dbsetup`` gave them; set up in the parent they are there in every worker."""


def declare(name: str, conninfo: str, conn_max: int, queue_max: Callable[[], int]) -> None:
    """Name a database; a name that is known keeps its first string.

    Raises TypeError for what is no str, ValueError for a NUL, ConfigurationError for a string that cannot be used,
    RuntimeError when asyncpg is missing.
    """
    for what, value in (("name", name), ("connection string", conninfo)):
        if not isinstance(value, str):
            raise TypeError(f"dbsetup: the {what} is a str, not {type(value).__name__}")
        if "\0" in value:
            raise ValueError(f"dbsetup: the {what} has a NUL in it")
    if name not in databases:
        info = parse(conninfo)
        driver()
        databases[name] = Database(name, info, conn_max, queue_max)


def find(name: str) -> Database:
    """The database `name`. Raises RuntimeError."""
    database = databases.get(name)
    if database is None:
        known = ", ".join(map(repr, databases)) or "none"
        raise RuntimeError(f"there is no database {name!r}: name it with dbsetup() (known: {known})")
    return database


def dbquery(
    db: str,
    query: str,
    *,
    params: Sequence[Any] | None = None,
    binary: bool = False,
    typed: bool = False,
) -> Coroutine[Any, Any, Rows]:
    """Run `query` on the database `db`: awaited, the rows as dicts, ``[]`` from a statement that gives none.

    `params` fill ``$1``, ``$2`` ...; the server decides their types. A str is text as PostgreSQL reads it, bytes are
    its binary form, None is NULL. Columns are str as PostgreSQL prints them, bytes with `binary`, and None where NULL.
    Without `params` there may be several statements (not with `binary`): the rows of the last that gives any.
    With `typed` both are Python values as asyncpg converts them.

    The query runs on any connection of the worker. What it leaves of a transaction is rolled back, and what it changed
    of the session (SET, LISTEN, PREPARE, temporary tables, set_config(), advisory locks) is undone, before the next one
    runs there; not undone is what only a function that it calls does of these. Use `kore.dbtransaction` for statements
    that belong together.

    At the call: TypeError when `db` or `query` is no str, ValueError for a NUL or a lone surrogate in them,
    RuntimeError for `params`, `binary` or `typed` of another type. At the await: RuntimeError (DatabaseError, with
    `sqlstate`) for what the server says, when it cannot be reached, and when pgsql_queue_limit queries wait. A
    coroutine that is cancelled or killed has its query cancelled on the server. Source: kore-api.md 14.2.
    """
    check_text("dbquery", db, query)
    check_typed("dbquery", typed)
    if typed:
        return _typed_query(db, query, typed_values("dbquery", params, binary))
    return _query(db, query, encode("dbquery", params, binary), binary)


def check_text(what: str, db: str, query: str) -> None:
    """Raise TypeError or ValueError for a name or a query that can be none."""
    if type(query) is str and type(db) is str and "\0" not in query and query.isascii():
        return
    for name, value in (("database's name", db), ("query", query)):
        if not isinstance(value, str):
            raise TypeError(f"{what}: the {name} is a str, not {type(value).__name__}")
        if "\0" in value:
            raise ValueError(f"{what}: the {name} has a NUL in it")
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: the query cannot be sent as UTF-8: {error.reason}") from None


def check_typed(what: str, typed: object) -> None:
    """Raise RuntimeError for what is no bool."""
    if typed is not False and typed is not True:
        raise RuntimeError(f"{what}: typed is True or False, not {typed!r}")


def encode(what: str, params: Sequence[Any] | None, binary: bool) -> bytes | None:
    """What `wire.values` makes of `params`; None for None. Raises RuntimeError, as the reference's platform does."""
    if binary is not False and binary is not True:
        raise RuntimeError(f"{what}: binary is True or False, not {binary!r}")
    if params is None:
        return None
    if not isinstance(params, list | tuple):
        raise RuntimeError(f"{what}: params is a list, not {type(params).__name__}")
    if len(params) > wire.PARAMETERS_MAX:
        raise RuntimeError(f"{what}: {len(params)} params; PostgreSQL takes {wire.PARAMETERS_MAX}")
    for index, param in enumerate(params, 1):
        if param is not None and not isinstance(param, str | bytes | bytearray | memoryview):
            raise RuntimeError(f"{what}: ${index} is str, bytes or None, not {type(param).__name__} (but with typed)")
    try:
        return wire.values(params)
    except UnicodeEncodeError as error:
        raise RuntimeError(f"{what}: a param cannot be sent as UTF-8: {error.reason}") from None


def typed_values(what: str, params: Sequence[Any] | None, binary: bool) -> Sequence[Any]:
    """`params` as asyncpg takes them. Raises RuntimeError."""
    if binary is not False:
        raise RuntimeError(f"{what}: binary and typed exclude each other")
    if params is None:
        return ()
    if not isinstance(params, list | tuple):
        raise RuntimeError(f"{what}: params is a list, not {type(params).__name__}")
    return params


async def _query(db: str, text: str, block: bytes | None, binary: bool) -> Rows:
    # Hot path: no call that is not needed; the pool is asked for its loop so that it is not one that has ended.
    loop = events.get_running_loop()
    database = databases.get(db)
    pool = None if database is None else database.pool
    if pool is None or pool.loop is not loop:
        pool = find(db).open()
    query = Query(text, block, binary, loop.create_future())
    try:
        pool.submit(query)
        rows: Rows = await query.future
    except DatabaseError as error:
        raise named(db, error) from None
    except BaseException:
        pool.abandon(query)
        raise
    return rows


def named(db: str, error: DatabaseError) -> DatabaseError:
    """The error with the database's name before it."""
    return DatabaseError(f"database {db!r}: {error}", error.sqlstate)


async def lease(pool: Pool) -> Session:
    """A session that the caller holds until it calls ``pool.give_back``. Raises DatabaseError."""
    waiting = Lease(asyncio.get_running_loop().create_future())
    try:
        pool.submit(waiting)
        return await waiting.future
    except DatabaseError:
        raise
    except BaseException:
        pool.abandon(waiting)
        raise


async def _typed_query(db: str, text: str, params: Sequence[Any]) -> Rows:
    pool = find(db).open()
    try:
        session = await lease(pool)
        try:
            return await fetch_typed(pool, session, text, params)
        finally:
            pool.give_back(session)
    except DatabaseError as error:
        raise named(db, error) from None


async def fetch_typed(pool: Pool, session: Session, text: str, params: Sequence[Any]) -> Rows:
    """Have asyncpg run a query on `session`, which the caller holds. Raises DatabaseError."""
    if session.gone:
        raise DatabaseError("connection lost")
    if session.busy:
        raise DatabaseError("another query runs on this connection; await it first")
    if is_blank(text):
        raise DatabaseError("the query is empty")
    if not params and first_word(text) == "COPY":  # asyncpg would wait for ever for the answer to COPY FROM STDIN
        return await session.ask(text, wire.NO_VALUES)
    connection = session.lend()
    try:
        records = await connection.fetch(text, *params)
    except failures() as error:
        session.take_back(text, failed=isinstance(error, driver().PostgresError))
        raise from_exception(error) from None
    except Exception as error:  # a value that Python's type cannot hold: a date BC
        pool.abandon_lent(session, text)
        raise DatabaseError(f"asyncpg: {type(error).__name__}: {error}") from error
    except BaseException:
        pool.abandon_lent(session, text)
        raise
    session.take_back(text)
    return [dict(record) for record in records]

