"""One connection to a database, after asyncpg has made it: text and binary queries, one at a time.

A Session is the protocol of the connection's transport. It prepares each statement once and remembers its columns, so
that the next query with the same text is one message out and its rows in. While asyncpg runs a query whose results are
Python values the transport is lent back to asyncpg's own protocol.

What a query leaves behind decides what comes before the next: `status` tells an open or failed transaction, `touched`
that a statement may have changed the session (SET, LISTEN, CREATE TEMP ...).
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from kore.clients.postgresql import wire
from kore.clients.postgresql.errors import DatabaseError, from_server
from kore.clients.postgresql.texts import first_word, may_change_session

IDLE = ord("I")
OPEN = ord("T")
FAILED = ord("E")
"""What a session is in: no transaction, one that goes on, one that takes nothing but its end."""

STATEMENTS_MAX = 128
"""Prepared statements of one connection; both sides remember each. Beyond it the oldest is closed."""

STATEMENT_BYTES_MAX = 8192
"""Longer texts are prepared for one run only: they are mostly data, and seldom come again."""

RESULT_BYTES_MAX = 1 << 30
"""What one result may bring: the size of PostgreSQL's largest value. Beyond it the connection is given up."""

# The first letters of the command tags of statements that change nothing of the session but its transaction.
_HARMLESS = frozenset({
    b"SEL", b"INS", b"UPD", b"DEL", b"MER", b"BEG", b"STA", b"COM", b"ROL", b"SAV", b"REL", b"FET", b"MOV", b"CLO",
    b"SHO", b"EXP", b"COP", b"LOC", b"NOT",
})  # fmt: skip

_HARMLESS_WORDS = frozenset({tag.decode() for tag in _HARMLESS} | {"WIT", "VAL", "TAB", "ABO", "END"})
"""The same of statements: WITH, VALUES, TABLE, ABORT and END have other tags."""

_STALE = frozenset({
    "26000",  # the prepared statement is gone: somebody ran DEALLOCATE or DISCARD
    "0A000",  # "cached plan must not change result type": the table was altered
})

_IGNORED = frozenset(b"AKNt3s")  # notifications, key data, notices, parameter types, statement closed, portal suspended


class Owner(Protocol):
    """Who hears of a session."""

    def released(self, session: Session) -> None:
        """A query ended, nobody holds the session, and the next may run."""

    def lost(self, session: Session) -> None:
        """The connection is over."""

    def abandon(self, query: Query) -> None:
        """Nobody waits for `query` any more."""


class Query:
    """One query on its way: waiting for a session, running on `session`, or over, when `future` is done."""

    __slots__ = ("binary", "block", "future", "number", "retried", "session", "text")

    def __init__(self, text: str, block: bytes | None, binary: bool, future: asyncio.Future[Any]) -> None:
        self.text = text
        self.block = block
        """What `wire.values` made of the parameters; None: none were given, and there may be several statements."""
        self.binary = binary
        self.future = future
        self.number = 0
        """Its place among those that had to wait."""
        self.session: Session | None = None
        self.retried = False

    def start(self, session: Session) -> None:
        """Run on `session`, which is free."""
        session.run(self)


class _Statement:
    """A prepared statement: its name at the server, its columns, and the message that runs it without parameters."""

    __slots__ = ("columns", "name", "run")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.columns: tuple[str, ...] = ()
        self.run = wire.execute(name, wire.NO_VALUES, binary=False)


class Session(asyncio.Protocol):
    """A connection that runs queries. Made by the pool, which owns it and calls `close` or `abort`."""

    def __init__(self, connection: Any, owner: Owner) -> None:
        self.connection = connection
        """asyncpg's; its protocol keeps what a request to cancel needs."""
        self.owner = owner
        self.status = IDLE
        self.touched = False
        self.held = False
        """Whether somebody runs queries here one after the other: a transaction, or the pool, tidying up."""
        self.settling: asyncio.Event | None = None
        """Set when what was abandoned here has been cancelled; None when there is no such thing."""
        self.lent = False
        """Whether asyncpg's protocol has the transport."""
        self.gone = False
        self.query: Query | None = None
        self._transport: Any = connection._transport
        self._asyncpg: Any = connection._protocol
        self._statements: dict[str, _Statement] = {}
        self._preparing: _Statement | None = None
        self._number = 0
        self._closing: list[bytes] = []  # statements that go with the next query
        self._columns: tuple[str, ...] = ()
        self._binary = False
        self._bound = False
        self._rows: list[dict[str, str | bytes | None]] = []
        self._error: DatabaseError | None = None
        self._pieces: list[bytes] = []
        self._missing = 0
        self._result_bytes = 0
        self._transport.set_protocol(self)

    @property
    def busy(self) -> bool:
        """Whether the server may be running something for us."""
        return self.query is not None or self.lent

    def run(self, query: Query) -> None:
        """Send `query`; its future gets the result. One at a time."""
        self.query = query
        query.session = self
        self._binary = query.binary
        self._bound = False
        self._rows = []
        self._result_bytes = 0
        statement = self._statements.get(query.text)
        if statement is None or self._closing:
            self._run_new(query, statement)
            return
        self._columns = statement.columns
        block = query.block
        if (block is None or block is wire.NO_VALUES) and not query.binary:
            self._transport.write(statement.run)
        else:
            self._transport.write(wire.execute(statement.name, block or wire.NO_VALUES, binary=query.binary))

    def _run_new(self, query: Query, statement: _Statement | None) -> None:
        """Run what is not prepared yet, and close what was to be closed."""
        if may_change_session(query.text):
            self._touch()
            statement = None
        out = [wire.close_statement(name) for name in self._closing]
        self._closing.clear()
        text = query.text.encode()
        if statement is not None:
            self._columns = statement.columns
        elif query.block is None and not query.binary and b";" in text.rstrip(b"; \t\r\n"):
            # Perhaps several statements, which only a simple query takes; or a semicolon in quotes, which costs
            # nothing but the preparation.
            self._columns = ()
            self._transport.write(b"".join((*out, wire.simple_query(text))))
            return
        else:
            statement = self._new_statement(len(text))
            out.append(wire.prepare(statement.name, text))
        out.append(wire.execute(statement.name, query.block or wire.NO_VALUES, binary=query.binary))
        self._transport.write(b"".join(out))

    def _new_statement(self, size: int) -> _Statement:
        name = b""
        if size <= STATEMENT_BYTES_MAX:
            self._number += 1
            name = b"kore_%d" % self._number
        self._columns = ()
        self._preparing = statement = _Statement(name)
        return statement

    def _remember(self, text: str) -> None:
        """The statement is prepared: keep it, and have the oldest closed when there are too many."""
        statement = self._preparing
        self._preparing = None
        if statement is None:
            return
        statement.columns = self._columns
        if statement.name:
            self._statements[text] = statement
            if len(self._statements) > STATEMENTS_MAX:
                oldest = next(iter(self._statements))
                self._closing.append(self._statements.pop(oldest).name)

    def _touch(self) -> None:
        """A statement may have changed the session, or a table: the next may mean something else than when prepared.

        Outside a transaction the session is reset before anything else runs. Inside, a statement whose plan does not
        fit any more could not be tried again: its error would end the transaction.
        """
        self.touched = True
        self._closing += [statement.name for statement in self._statements.values()]
        self._statements.clear()
        self.connection._drop_local_statement_cache()

    def forget_statements(self) -> None:
        """The server has forgotten all prepared statements, or is about to (DISCARD ALL)."""
        self._statements.clear()
        self._closing.clear()
        self.connection._drop_local_statement_cache()

    def fail(self, error: DatabaseError) -> None:
        """Let the running query end with `error`, unless it failed before."""
        if self._error is None:
            self._error = error

    # What the transport tells.

    def data_received(self, data: bytes) -> None:  # noqa: C901 (hot path)
        """Messages, or parts of them. Hot path: short rows are decoded here, a call for each would cost 0.1 us."""
        if self._missing:
            data = self._put_together(data)
            if not data:
                return
        position = 0
        end = len(data)
        header = wire.HEADER
        while end - position >= 5:
            kind, length = header(data, position)
            after = position + 1 + length
            if after > end:
                break
            if kind == wire.DATA_ROW:
                if length < 256 and not self._binary:
                    # So every value's length is in the last of its four bytes, where 255 is that of NULL, -1.
                    at = position + 7
                    row: dict[str, str | bytes | None] = {}
                    try:
                        for column in self._columns:
                            size = data[at + 3]
                            at += 4
                            if size == 255:
                                row[column] = None
                            else:
                                to = at + size
                                row[column] = data[at:to].decode()
                                at = to
                    except UnicodeDecodeError as error:
                        self._not_utf8(error)
                    self._rows.append(row)
                else:
                    self._long_row(data, position + 7)
            elif kind == wire.READY_FOR_QUERY:
                self._ready(data[position + 5])
            elif kind == wire.BIND_COMPLETE:
                self._bound = True
            elif kind == wire.COMMAND_COMPLETE:
                if data[position + 5 : position + 8] not in _HARMLESS:
                    self._touch()
            elif kind not in _IGNORED:
                self._message(kind, data, position + 5, after)
            position = after
        if position < end:
            self._keep(data, position)
        elif self._rows:
            self._count(end)  # there is more to come of this result

    def _long_row(self, data: bytes, at: int) -> None:
        row: dict[str, str | bytes | None] = {}
        length_at = wire.LENGTH
        try:
            for column in self._columns:
                size = length_at(data, at)[0]
                at += 4
                if size < 0:
                    row[column] = None
                else:
                    value = data[at : at + size]
                    row[column] = value if self._binary else value.decode()
                    at += size
        except UnicodeDecodeError as error:
            self._not_utf8(error)
        self._rows.append(row)

    def _not_utf8(self, error: UnicodeDecodeError) -> None:
        self.fail(DatabaseError(f"a value is no UTF-8: {error.reason}"))

    def _message(self, kind: int, data: bytes, position: int, end: int) -> None:
        """The messages that do not come with every query."""
        if kind == wire.ROW_DESCRIPTION:
            self._columns = wire.column_names(data, position)
            if self._preparing is None:  # of a simple query: the last statement that gives rows is the result
                self._rows = []
            elif self.query is not None:
                self._remember(self.query.text)
        elif kind == wire.NO_DATA:
            if self.query is not None:
                self._remember(self.query.text)
        elif kind == wire.ERROR_RESPONSE:
            self.fail(from_server(wire.error_fields(data, position, end)))
        elif kind == wire.EMPTY_QUERY_RESPONSE:
            self.fail(DatabaseError("the query is empty"))
        elif kind == wire.COPY_IN_RESPONSE:
            self.fail(DatabaseError("COPY FROM STDIN is not offered: there is nothing to copy from"))
            # A prepared statement's Sync was taken for a part of the copy; the copy's end wants another.
            self._transport.write(wire.copy_fail(b"not offered") + (wire.SYNC if self._bound else b""))
        elif kind == wire.COPY_OUT_RESPONSE:
            self.fail(DatabaseError("COPY TO STDOUT is not offered; SELECT the rows"))
        elif kind == wire.PARAMETER_STATUS:
            name, value = data[position : end - 1].split(b"\0", 1)
            if name == b"client_encoding" and value != b"UTF8":
                # Told after the rows, which may have been no UTF-8 either: this is why.
                self._error = _wrong_encoding(value.decode())
                self.abort()

    def _keep(self, data: bytes, position: int) -> None:
        """Keep the beginning of a message whose end has not arrived."""
        rest = data[position:] if position else data
        needed = 5 if len(rest) < 5 else 1 + wire.HEADER(rest, 0)[1]
        self._pieces = [rest]
        self._missing = needed - len(rest)
        self._count(position, needed)

    def _count(self, arrived: int, expected: int = 0) -> None:
        self._result_bytes += arrived
        if self._result_bytes + expected > RESULT_BYTES_MAX:
            self.fail(DatabaseError(f"the result is over {RESULT_BYTES_MAX} bytes: connection given up"))
            self.abort()

    def _put_together(self, data: bytes) -> bytes:
        """The kept beginning with what arrived, once it is long enough to go on; else nothing."""
        self._pieces.append(data)
        self._missing -= len(data)
        if self._missing > 0:
            return b""
        self._missing = 0
        data = b"".join(self._pieces)
        self._pieces = []
        return data

    def _ready(self, status: int) -> None:
        """The server has answered a query whole."""
        self.status = status
        query = self.query
        if query is None:
            return
        self.query = query.session = None
        self._preparing = None
        error = self._error
        future = query.future
        if error is not None:
            self._error = None
            if error.sqlstate in _STALE and not self._bound and not query.retried and query.text in self._statements:
                self._closing.append(self._statements.pop(query.text).name)
                if status == IDLE and not future.done():
                    query.retried = True
                    self.run(query)
                    return
            if not future.done():
                future.set_exception(error)
        elif not future.done():
            future.set_result(self._rows)
        self._rows = []
        if not self.held and self.settling is None:
            self.owner.released(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over, by whichever side."""
        if self.gone:
            return
        self.gone = True
        if not self.connection.is_closed():
            self._asyncpg.connection_lost(exc)  # it has no transport to hear it from
        query = self.query
        self.query = None
        if query is not None:
            query.session = None
            if not query.future.done():
                said = self._error or exc or "the server closed it"
                sqlstate = self._error.sqlstate if self._error is not None else None
                query.future.set_exception(DatabaseError(f"connection lost: {said}", sqlstate))
        self._error = None
        self._pieces = []
        self.owner.lost(self)

    # What the pool and the holder ask for.

    async def ask(self, text: str, block: bytes | None = None, *, binary: bool = False) -> list[dict[str, Any]]:
        """Run one query for whoever holds the session; one at a time. Raises DatabaseError."""
        if self.gone:
            raise DatabaseError("connection lost")
        if self.busy:
            raise DatabaseError("another query runs on this connection; await it first")
        query = Query(text, block, binary, asyncio.get_running_loop().create_future())
        self.run(query)
        try:
            rows: list[dict[str, Any]] = await query.future
        except DatabaseError:
            raise
        except BaseException:
            self.owner.abandon(query)
            raise
        return rows

    def lend(self) -> Any:
        """Give the transport to asyncpg's protocol, and asyncpg's connection to the caller, until `take_back`."""
        self.lent = True
        self._transport.set_protocol(self._asyncpg)
        return self.connection

    def take_back(self, text: str, *, failed: bool = False) -> None:
        """asyncpg has no query under way any more; it ran `text`, which the server refused if `failed`.

        Raises DatabaseError, with the connection given up, when the query changed the encoding.
        """
        self._transport.set_protocol(self)
        self.lent = False
        if self.connection.is_closed():
            self.connection_lost(None)  # asyncpg's protocol heard of it
            return
        encoding = self.connection.get_settings().client_encoding
        if encoding != "UTF8":  # asyncpg would not hear of its reset, and read on in this one
            self._transport.abort()
            self.connection_lost(None)
            raise _wrong_encoding(encoding)
        # asyncpg tells whether there is a transaction, but not whether it failed, and no command tag.
        if not self._asyncpg.is_in_transaction():
            self.status = IDLE
        else:
            self.status = FAILED if failed else OPEN
        if first_word(text)[:3] not in _HARMLESS_WORDS or may_change_session(text):
            self._touch()

    def close(self) -> None:
        """Say goodbye to the server and close."""
        if not self.gone:
            self._transport.write(wire.TERMINATE)
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self.gone:
            return
        if self.lent:
            self.lent = False
            self._transport.set_protocol(self)
        self._transport.abort()
        if self.connection.is_closed():
            self.connection_lost(None)  # asyncpg's protocol heard of it


def _wrong_encoding(name: str) -> DatabaseError:
    return DatabaseError(f"client_encoding is {name}, must be UTF8: connection given up")
