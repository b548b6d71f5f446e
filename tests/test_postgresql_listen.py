"""``kore.dblisten``: notifications arrive, losses are told, and leaving ends the connection."""

from __future__ import annotations

import asyncio

import pytest
from reactor_harness import run

import kore
from kore.clients.postgresql import listen
from kore.clients.postgresql.errors import DatabaseError
from tests.postgresql_harness import PostgresServer, declare, loop
from tests.support import free_port
from tests.test_postgresql_pool import until

__all__ = ["loop"]


@pytest.fixture
def db(postgresql: PostgresServer) -> PostgresServer:
    """The shared server as "db"."""
    declare(postgresql.tcp)
    postgresql.wait_connections(0)
    return postgresql


async def collected(notes, count: int) -> list:
    got = []
    async for note in notes:
        got.append(note)
        if len(got) == count:
            break
    return got


def test_notifications_arrive_in_order(loop, db):
    async def hear():
        async with kore.dblisten("db", "Jobs äö") as notes:
            for n in range(3):
                await kore.dbquery("db", "SELECT pg_notify('Jobs äö', $1)", params=[f"n{n} ü"])
            await kore.dbquery("db", 'NOTIFY "Jobs äö"')
            await kore.dbquery("db", "NOTIFY other")
            return await collected(notes, 4)

    got = run(loop, hear())
    assert [(note.channel, note.payload) for note in got] == [
        ("Jobs äö", "n0 ü"), ("Jobs äö", "n1 ü"), ("Jobs äö", "n2 ü"), ("Jobs äö", ""),
    ]  # fmt: skip
    assert all(note.pid > 0 for note in got)


def test_a_plain_loop_listens_from_its_first_wait(loop, db):
    async def hear(got: list) -> None:
        async for note in kore.dblisten("db", "jobs"):
            got.append(note.payload)
            if len(got) == 2:
                return

    async def both() -> list:
        got: list = []
        task = asyncio.ensure_future(hear(got))
        await asyncio.to_thread(db.wait_connections, 1)
        while not task.done():
            await asyncio.to_thread(db.psql, "NOTIFY jobs, 'x'")
        await task
        return got

    assert run(loop, both()) == ["x", "x"]
    db.wait_connections(0)


@pytest.mark.parametrize("how", ["kill", "cancel"])
def test_who_is_killed_while_listening_leaves_no_connection(loop, db, how):
    async def hear() -> None:
        async for _note in kore.dblisten("db", "jobs"):
            pass

    async def leave() -> None:
        task = loop.start(hear(), lambda _error: None)
        await asyncio.to_thread(db.wait_connections, 1)
        getattr(task, how)()
        await until(task.done, "it is dead")
        del task
        await asyncio.to_thread(db.wait_connections, 0)

    run(loop, leave())
    assert not [task for task in asyncio.all_tasks(loop) if not task.done()]


def test_a_lost_connection_is_made_anew_and_the_gap_is_told(loop, db):
    async def hear() -> list:
        async with kore.dblisten("db", "jobs") as notes:
            await asyncio.to_thread(db.psql, "NOTIFY jobs, 'before'")
            got = await collected(notes, 1)
            await asyncio.to_thread(db.psql, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
                                             "application_name = 'kore'")
            got += await collected(notes, 1)
            await asyncio.to_thread(db.psql, "NOTIFY jobs, 'after'")
            return got + await collected(notes, 1)

    assert [note.payload for note in run(loop, hear())] == ["before", None, "after"]
    texts = loop.log_lines.texts
    assert any("listening to 'jobs' was interrupted" in text for text in texts)
    assert any("listening to 'jobs' again" in text for text in texts)
    db.wait_connections(0)


def test_what_nobody_takes_is_dropped_and_told(loop, db, monkeypatch):
    monkeypatch.setattr(listen, "NOTIFICATIONS_MAX", 5)

    async def hear() -> list:
        async with kore.dblisten("db", "jobs") as notes:
            await asyncio.to_thread(db.psql, "SELECT pg_notify('jobs', n::text) FROM generate_series(1, 20) AS n")
            await until(lambda: len(notes._feed.arrived) == 6, "they arrived")
            got = await collected(notes, 6)
            await asyncio.to_thread(db.psql, "NOTIFY jobs, 'on'")
            return got + await collected(notes, 1)

    assert [note.payload for note in run(loop, hear())] == ["1", "2", "3", "4", "5", None, "on"]


def test_a_first_connection_that_fails_is_an_error(loop):
    declare(f"host=127.0.0.1 port={free_port()} user=kore")

    async def hear() -> None:
        async for _note in kore.dblisten("db", "jobs"):
            pass

    with pytest.raises(DatabaseError, match="database 'db': no connection to"):
        run(loop, hear())
    with pytest.raises(RuntimeError, match="no database 'nowhere'"):
        run(loop, anext(kore.dblisten("nowhere", "jobs")))
    for arguments, kind in ((("db", 1), TypeError), (("db", ""), ValueError), (("db", "a\0"), ValueError)):
        with pytest.raises(kind):
            kore.dblisten(*arguments)


def test_closing_ends_the_iterator(loop, db):
    async def hear() -> list:
        notes = kore.dblisten("db", "jobs")
        async with notes:
            await asyncio.to_thread(db.psql, "NOTIFY jobs, 'x'")
            await until(lambda: notes._feed.arrived, "it arrived")
            waiting = asyncio.ensure_future(collected(notes, 2))
            await asyncio.sleep(0)
            notes.close()
            return await waiting

    assert [note.payload for note in run(loop, hear())] == ["x"]
    db.wait_connections(0)
