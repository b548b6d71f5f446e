"""``kore.dbtransaction``: all of a block or nothing of it, savepoints, and those that leave in the middle."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from reactor_harness import run

import kore
from kore.clients.postgresql import pool as pool_module
from kore.clients.postgresql import transaction
from kore.clients.postgresql.errors import DatabaseError
from tests.postgresql_harness import PostgresServer, Relay, declare, loop
from tests.test_postgresql_pool import clean, until

__all__ = ["loop"]


@pytest.fixture
def db(postgresql: PostgresServer) -> PostgresServer:
    """The shared server with an empty table `t`; one connection."""
    postgresql.psql("DROP TABLE IF EXISTS t; CREATE TABLE t (a text)")
    declare(postgresql.tcp, conn_max=1)
    return postgresql


def rows(db) -> str:
    return db.psql("SELECT string_agg(a, ',' ORDER BY a) FROM t")


def insert(tx, value: str, **keywords):
    return tx.query("INSERT INTO t VALUES ($1)", params=[value], **keywords)


def test_leaving_the_block_commits(loop, db):
    async def block():
        async with kore.dbtransaction("db") as tx:
            assert await insert(tx, "one") == []
            assert await insert(tx, "two", typed=True) == []
            assert await tx.query("SELECT a FROM t ORDER BY a", binary=True) == [{"a": b"one"}, {"a": b"two"}]
            assert await asyncio.to_thread(rows, db) == ""

    run(loop, block())
    assert rows(db) == "one,two"
    clean(loop)


def test_all_is_one_transaction_on_one_connection(loop, db):
    async def block():
        ask = "SELECT pg_backend_pid() AS p, pg_current_xact_id()::text AS x"
        async with kore.dbtransaction("db") as tx:
            return await tx.query(ask), await tx.query(ask, typed=True)

    first, second = run(loop, block())
    assert str(first[0]["p"]) == str(second[0]["p"])
    assert first[0]["x"] == second[0]["x"]


@pytest.mark.parametrize("typed", [False, True])
def test_an_exception_rolls_back_and_goes_on(loop, db, typed):
    async def block():
        async with kore.dbtransaction("db") as tx:
            await insert(tx, "one", typed=typed)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(loop, block())
    clean(loop)
    assert rows(db) == ""


@pytest.mark.parametrize("typed", [False, True])
def test_an_error_of_the_server_rolls_back_and_goes_on(loop, db, typed):
    async def block():
        async with kore.dbtransaction("db") as tx:
            await insert(tx, "one")
            await tx.query("SELECT 1/0", typed=typed)

    with pytest.raises(DatabaseError, match="division by zero"):
        run(loop, block())
    clean(loop)
    assert rows(db) == ""


@pytest.mark.parametrize("typed", [False, True])
def test_a_block_that_ends_well_although_a_query_failed_is_an_error(loop, db, typed):
    async def block():
        async with kore.dbtransaction("db") as tx:
            await insert(tx, "one")
            with pytest.raises(DatabaseError):
                await tx.query("SELECT 1/0", typed=typed)
            with pytest.raises(DatabaseError, match="current transaction is aborted"):
                await tx.query("SELECT 1")

    with pytest.raises(DatabaseError, match="rolled back: a query of the transaction failed"):
        run(loop, block())
    clean(loop)
    assert rows(db) == ""


def test_a_wrong_value_that_never_reached_the_server_fails_nothing(loop, db):
    async def block():
        async with kore.dbtransaction("db") as tx:
            await insert(tx, "one")
            with pytest.raises(DatabaseError):
                await tx.query("SELECT $1::int", params=["x"], typed=True)

    run(loop, block())
    assert rows(db) == "one"


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize(
    ("change", "then"),
    [("ALTER TABLE changing ADD b int", 2), ("SET LOCAL search_path TO other", 3),
     ("SELECT set_config('search_path', 'other', true)", 3), ("DEALLOCATE ALL", 1), ("DROP TABLE changing", 1)],
)  # fmt: skip
def test_what_a_transaction_changes_it_sees(loop, db, change, then, typed):
    """A statement prepared before is prepared anew: the server's refusal of its plan would end the transaction."""
    db.psql(
        "DROP TABLE IF EXISTS changing; CREATE TABLE changing (a int); INSERT INTO changing VALUES (1);"
        "CREATE SCHEMA IF NOT EXISTS other; CREATE TABLE IF NOT EXISTS other.changing (a int, b int, c int);"
        "TRUNCATE other.changing; INSERT INTO other.changing VALUES (1)"
    )

    async def work() -> None:
        for _ in range(2):  # the second time with what the first left
            with pytest.raises(ZeroDivisionError):
                async with kore.dbtransaction("db") as tx:
                    assert len((await tx.query("SELECT * FROM changing", typed=typed))[0]) == 1
                    await tx.query(change, typed=typed)
                    if change.startswith("DROP"):
                        await tx.query("CREATE TABLE changing AS SELECT 'x' AS z", typed=typed)
                    assert len((await tx.query("SELECT * FROM changing", typed=typed))[0]) == then
                    raise ZeroDivisionError
            assert len((await kore.dbquery("db", "SELECT * FROM changing", typed=typed))[0]) == 1

    run(loop, work())


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("over", [False, True])
def test_a_query_that_outlives_its_transaction_reaches_nobody_else(loop, db, typed, over):
    """A task of the block goes on after its end: its query is cancelled, and the next user of the pool has peace."""

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            with pytest.raises(RuntimeError, match="another query runs"):
                async with kore.dbtransaction("db") as tx:
                    if over:
                        await tx.query("COMMIT")
                    left = group.create_task(failing(tx.query("SELECT pg_sleep(3600) AS a", typed=typed)))
                    await asyncio.to_thread(db.wait_active, 1)
            for number in range(3):
                assert await kore.dbquery("db", f"SELECT {number} AS a") == [{"a": str(number)}]
            await left

    async def failing(query) -> None:
        with pytest.raises(DatabaseError):
            await query

    run(loop, work())
    if not typed:
        db.wait_quiet()
    else:
        db.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'kore'")


@pytest.mark.parametrize("inner", [False, True])
def test_the_rollback_of_a_server_that_does_not_answer_ends_in_time(loop, postgresql, monkeypatch, inner):
    monkeypatch.setattr(transaction, "TIDY_SECONDS_MAX", 0.2)
    monkeypatch.setattr(pool_module, "CANCEL_SECONDS_MAX", 0.2)
    with Relay(postgresql.port) as relay:
        declare(f"host=127.0.0.1 port={relay.port} user=kore dbname=hello sslmode=disable", conn_max=1)

        async def work() -> None:
            with pytest.raises(ZeroDivisionError):
                async with kore.dbtransaction("db") as tx, AsyncExitStack() as stack:
                    if inner:
                        await stack.enter_async_context(tx.transaction())
                    relay.stalls.set()
                    raise ZeroDivisionError
            relay.stalls.clear()

        run(loop, work())
        assert run(loop, kore.dbquery("db", "SELECT 1 AS a")) == [{"a": "1"}]


def test_what_only_the_commit_finds_is_an_error(loop, db):
    db.psql("CREATE TABLE IF NOT EXISTS u (a int UNIQUE DEFERRABLE INITIALLY DEFERRED); DELETE FROM u")

    async def block():
        async with kore.dbtransaction("db") as tx:
            await tx.query("INSERT INTO u VALUES (1), (1)")

    with pytest.raises(DatabaseError) as caught:
        run(loop, block())
    assert caught.value.sqlstate == "23505"
    clean(loop)


def test_savepoints(loop, db):
    """An inner block fails by itself, or goes with the outer one."""

    async def block():
        async with kore.dbtransaction("db") as tx:
            await insert(tx, "outer")
            with pytest.raises(DatabaseError, match="division"):
                async with tx.transaction() as part:
                    await insert(part, "lost")
                    await part.query("SELECT 1/0")
            with pytest.raises(KeyError):
                async with tx.transaction() as part:
                    await insert(part, "lost")
                    raise KeyError
            async with tx.transaction() as part:
                await insert(part, "kept")
                with pytest.raises(ValueError, match="inner"):
                    async with part.transaction() as inner:
                        await insert(inner, "lost", typed=True)
                        raise ValueError("inner")
            with pytest.raises(DatabaseError, match="rolled back to the savepoint"):
                async with tx.transaction() as part:
                    await insert(part, "lost")
                    with pytest.raises(DatabaseError):
                        await part.query("SELECT 1/0")

    run(loop, block())
    assert rows(db) == "kept,outer"
    clean(loop)


@pytest.mark.parametrize("typed", [False, True])
def test_a_timeout_inside_leaves_a_transaction_that_can_go_back(loop, db, typed):
    """What timed out is cancelled on the server, and the next query waits until it is."""

    async def block():
        async with kore.dbtransaction("db") as tx:
            await insert(tx, "outer")
            with pytest.raises(TimeoutError):
                async with tx.transaction() as part, asyncio.timeout(0.1):
                    await insert(part, "lost")
                    await part.query("SELECT pg_sleep(3600)", typed=typed)
            await insert(tx, "after")

    run(loop, block())
    assert rows(db) == "after,outer"
    clean(loop)


@pytest.mark.parametrize("where", ["query", "elsewhere", "savepoint"])
@pytest.mark.parametrize("how", ["kill", "cancel"])
def test_who_is_killed_inside_is_rolled_back(loop, db, how, where):
    async def block():
        async with kore.dbtransaction("db") as tx:
            await insert(tx, "lost")
            if where == "query":
                await tx.query("SELECT pg_sleep(3600)")
            elif where == "elsewhere":
                await asyncio.sleep(3600)
            else:
                async with tx.transaction() as part:
                    await insert(part, "lost")
                    await part.query("SELECT pg_sleep(3600)", typed=True)

    async def leave():
        task = loop.start(block(), lambda _error: None)
        state = "idle in transaction" if where == "elsewhere" else "active"
        await asyncio.to_thread(db.wait_active, 1)
        await until(lambda: state in db.active()[0], "it is there")
        getattr(task, how)()
        await until(task.done, "it is dead")

    before = run(loop, kore.dbquery("db", "SELECT pg_backend_pid()"))
    run(loop, leave())
    clean(loop)
    db.wait_quiet()
    assert rows(db) == ""
    assert run(loop, kore.dbquery("db", "SELECT pg_backend_pid()")) == before


def test_a_connection_lost_inside_is_an_error_and_the_pool_goes_on(loop, db):
    async def block(commit: bool):
        async with kore.dbtransaction("db") as tx:
            await insert(tx, "lost")
            await asyncio.to_thread(db.psql, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
                                             "application_name = 'kore'")
            if not commit:
                await tx.query("SELECT 1")

    for commit in (True, False):
        with pytest.raises(DatabaseError, match="connection lost"):
            run(loop, block(commit))
    assert run(loop, kore.dbquery("db", "SELECT 1 AS a")) == [{"a": "1"}]
    clean(loop)


def test_one_query_at_a_time(loop, db):
    async def block():
        async with kore.dbtransaction("db") as tx:
            got = await asyncio.gather(tx.query("SELECT 1 AS a"), tx.query("SELECT 2"), return_exceptions=True)
            assert got[0] == [{"a": "1"}]
            assert "another query runs on this connection" in str(got[1])

    run(loop, block())
    clean(loop)


def test_wrong_uses_are_errors(loop, db):
    async def uses():
        tx = kore.dbtransaction("db")
        with pytest.raises(RuntimeError, match="inside its 'async with'"):
            tx.query("SELECT 1")
        async with tx:
            with pytest.raises(RuntimeError, match="entered once"):
                await tx.__aenter__()
            with pytest.raises(RuntimeError):
                tx.query("SELECT $1", params=[1])
            with pytest.raises(TypeError):
                tx.query(b"SELECT 1")
            part = tx.transaction()
        with pytest.raises(DatabaseError, match="the transaction is over"):
            await tx.query("SELECT 1")
        with pytest.raises(DatabaseError, match="the transaction is over"):
            await tx.query("SELECT 1", typed=True)
        with pytest.raises(DatabaseError, match="the transaction is over"):
            await part.__aenter__()
        with pytest.raises(RuntimeError, match="no database 'nowhere'"):
            async with kore.dbtransaction("nowhere"):
                pass
        with pytest.raises(TypeError):
            kore.dbtransaction(None)

    run(loop, uses())
    clean(loop)
