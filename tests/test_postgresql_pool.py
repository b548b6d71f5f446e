"""The pool of connections: its limits and its order, cancelling on the server, and servers that fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import time
from operator import length_hint

import pytest
from reactor_harness import run

import kore
from kore.clients.postgresql import pool as pool_module
from kore.clients.postgresql.errors import DatabaseError
from kore.clients.postgresql.queries import databases
from kore.reactor.tasks import live
from tests.postgresql_harness import PostgresServer, Relay, declare, loop, own_postgresql
from tests.support import children, free_port

__all__ = ["loop", "own_postgresql"]


@pytest.fixture
def db(postgresql: PostgresServer) -> PostgresServer:
    """The shared server as the database "db", with two connections at most."""
    declare(postgresql.tcp)
    return postgresql


def ask(loop, query: str, **keywords):
    return run(loop, kore.dbquery("db", query, **keywords))


def refused(loop, query: str = "SELECT 1", **keywords) -> DatabaseError:
    with pytest.raises(RuntimeError) as caught:
        ask(loop, query, **keywords)
    return caught.value


async def results(*queries):
    return await asyncio.gather(*queries, return_exceptions=True)


async def until(holds, what: str) -> None:
    """Turn the loop until `holds()`; fail, saying `what`, when it never is."""
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.005)


def the_pool():
    return databases["db"].pool


def clean(loop) -> None:
    """The pool has all its connections back, and nobody waits."""
    pool = the_pool()
    run(loop, until(lambda: not pool._tasks, "the pool's tasks have ended"))
    assert not pool.waiting
    assert set(pool.idle) == pool.sessions
    assert not any(session.busy or session.held or session.settling for session in pool.sessions)


# Limits and order.


def test_nothing_is_connected_before_the_first_query(loop, db):
    assert the_pool() is None


def test_connections_are_opened_on_demand_up_to_the_limit(loop, db):
    ask(loop, "SELECT 1")
    ask(loop, "SELECT 1")
    assert len(the_pool().sessions) == 1
    rows = run(loop, results(*(kore.dbquery("db", "SELECT pg_backend_pid() AS p, pg_sleep(0.01)") for _ in range(10))))
    assert len({row[0]["p"] for row in rows}) == 2
    assert len(the_pool().sessions) == 2
    clean(loop)


def test_no_limit_of_connections(loop, postgresql):
    declare(postgresql.tcp, conn_max=0)
    run(loop, results(*(kore.dbquery("db", "SELECT pg_sleep(0.2)") for _ in range(12))))
    assert len(the_pool().sessions) == 12


def test_queries_wait_in_their_order(loop, postgresql):
    declare(postgresql.tcp, conn_max=1)
    order = []

    async def one(n: int) -> None:
        await kore.dbquery("db", f"SELECT {n}", typed=bool(n % 3))
        order.append(n)

    run(loop, results(*(one(n) for n in range(20))))
    assert order == list(range(20))


def test_too_many_that_wait_are_refused(loop, postgresql):
    """Those that wait for connections that are being made do not count."""
    declare(postgresql.tcp, conn_max=2, queue_max=3)
    got = run(loop, results(*(kore.dbquery("db", "SELECT 1 AS a") for _ in range(8))))
    assert got[:5] == [[{"a": "1"}]] * 5
    assert [str(error) for error in got[5:]] == [
        "database 'db': 5 queries wait for 0 connections already (pgsql_queue_limit 3, pgsql_conn_max 2)"
    ] * 3
    got = run(loop, results(*(kore.dbquery("db", "SELECT 1 AS a") for _ in range(8))))
    assert [type(result) for result in got] == [list] * 5 + [DatabaseError] * 3
    clean(loop)


def test_without_a_queue_a_connection_that_is_free_serves(loop, postgresql):
    declare(postgresql.tcp, conn_max=1, queue_max=0)
    assert ask(loop, "SELECT 1 AS a") == [{"a": "1"}]
    got = run(loop, results(*(kore.dbquery("db", "SELECT 1 AS a") for _ in range(2))))
    assert got[0] == [{"a": "1"}]
    assert isinstance(got[1], DatabaseError)


def test_a_pool_belongs_to_its_loop(loop, db):
    """The next loop of the process gets a pool of its own; the end of a loop closes its connections."""
    ask(loop, "SELECT 1")
    first = the_pool()
    loop.run_until_complete(loop.shutdown_asyncgens())
    assert first.closed
    loop.run_until_complete(asyncio.sleep(0))
    db.wait_connections(0)

    async def on_another():
        return await kore.dbquery("db", "SELECT 1 AS a")

    assert asyncio.run(on_another()) == [{"a": "1"}]
    assert the_pool() is not first
    db.wait_connections(0)


# Cancelling.


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("how", ["kill", "cancel"])
def test_a_query_nobody_waits_for_is_cancelled_on_the_server(loop, db, how, typed):
    """And its connection is used again."""

    async def leave() -> None:
        task = loop.start(kore.dbquery("db", "SELECT pg_sleep(3600)", typed=typed), lambda _error: None)
        await asyncio.to_thread(db.wait_active, 1)
        getattr(task, how)()
        await until(task.done, "the task has ended")

    before = ask(loop, "SELECT pg_backend_pid() AS p")
    run(loop, leave())
    clean(loop)
    db.wait_quiet()
    assert ask(loop, "SELECT pg_backend_pid() AS p") == before


def test_a_timeout_cancels_on_the_server_and_the_next_query_is_not_hit(loop, postgresql):
    declare(postgresql.tcp, conn_max=1)

    async def many() -> None:
        for n in range(50):
            # Some end before they are cancelled, some while: the request must never reach the query after them.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(n % 5 / 1000):
                    await kore.dbquery("db", "SELECT pg_sleep(0.003)")
                    await asyncio.sleep(3600)
            assert await kore.dbquery("db", "SELECT pg_sleep(0.001), 1 AS a") == [{"pg_sleep": "", "a": "1"}]

    run(loop, many())
    clean(loop)


def test_who_leaves_the_queue_is_never_asked_for(loop, postgresql):
    declare(postgresql.tcp, conn_max=1)

    async def leave() -> None:
        first = asyncio.ensure_future(kore.dbquery("db", "SELECT pg_sleep(0.2), 1 AS a"))
        await asyncio.sleep(0)
        tasks = [loop.start(kore.dbquery("db", f"CREATE TABLE never_{n} (a int)"), lambda _e: None) for n in range(10)]
        await asyncio.sleep(0)
        assert len(the_pool().waiting) == 11
        for task in tasks:
            task.kill()
        assert len(the_pool().waiting) <= 1
        await first

    run(loop, leave())
    clean(loop)
    assert postgresql.psql("SELECT count(*) FROM pg_class WHERE relname LIKE 'never%'") == "0"


def test_a_kill_storm_leaks_no_connection_and_leaves_no_query(loop, postgresql):
    """1,000 coroutines in the middle of all that there is to wait for, killed in random order."""
    declare(postgresql.tcp, conn_max=6, queue_max=1000)
    generator = random.Random(7)

    async def transaction() -> None:
        async with kore.dbtransaction("db") as tx:
            await tx.query("SELECT 1")
            async with tx.transaction() as part:
                await part.query("SELECT pg_sleep(0.02)", typed=generator.random() < 0.3)
            await tx.query("SELECT pg_sleep(3600)")

    def some():
        choice = generator.random()
        if choice < 0.3:
            return transaction()
        seconds = generator.choice(("0", "0.005", "3600"))
        return kore.dbquery("db", f"SELECT pg_sleep({seconds})", typed=choice < 0.5)

    async def storm() -> None:
        tasks = [loop.start(some(), lambda _error: None) for _ in range(1000)]
        await until(lambda: the_pool() and len(the_pool().sessions) == 6, "the pool is full")
        generator.shuffle(tasks)
        for number, task in enumerate(tasks):
            if task.done():
                continue
            task.kill() if generator.random() < 0.7 else task.cancel()
            if number % 20 == 0:
                await asyncio.sleep(0.002)
        await until(lambda: all(task.done() for task in tasks), "all are dead")

    before = len(live)
    run(loop, storm())
    clean(loop)
    postgresql.wait_quiet()
    assert len(live) == before
    assert len(the_pool().sessions) <= 6
    assert postgresql.connections() == len(the_pool().sessions)
    assert ask(loop, "SELECT 1 AS a") == [{"a": "1"}]


@pytest.mark.parametrize("typed", [False, True])
def test_the_end_of_the_loop_cancels_what_runs(loop, db, typed):
    task = loop.start(kore.dbquery("db", "SELECT pg_sleep(3600)", typed=typed), lambda _error: None)
    run(loop, asyncio.to_thread(db.wait_active, 1))
    loop.run_until_complete(loop.shutdown_asyncgens())
    db.wait_quiet()
    run(loop, until(task.done, "the query has ended"))


# Servers that fail.


def test_a_server_that_is_not_there_is_an_error_with_the_reason(loop):
    port = free_port()
    declare(f"host=127.0.0.1 port={port} user=kore dbname=hello")
    assert f"no connection to 127.0.0.1:{port}: " in str(refused(loop))
    assert "Connect call failed" in str(refused(loop, typed=True))
    declare(f"host=/nowhere port={port} user=kore dbname=hello", name="dir")
    with pytest.raises(RuntimeError, match=f"no connection to /nowhere:{port}: "):
        run(loop, kore.dbquery("dir", "SELECT 1"))


def test_all_that_wait_hear_of_a_server_that_is_not_there(loop):
    declare(f"host=127.0.0.1 port={free_port()} user=kore dbname=hello")
    got = run(loop, results(*(kore.dbquery("db", "SELECT 1") for _ in range(20))))
    assert all("no connection to" in str(error) for error in got)
    assert len({id(error) for error in got}) == 20


@pytest.mark.parametrize("user", ["secret", "secret_md5", "secret_clear"])
def test_passwords(loop, postgresql, user):
    where = f"host=127.0.0.1 port={postgresql.port} dbname=hello user={user}"
    declare(f"{where} password='pass word'")
    assert ask(loop, "SELECT current_user AS a") == [{"a": user}]
    declare(f"{where} password=wrong", name="wrong")
    with pytest.raises(RuntimeError, match="password authentication failed") as caught:
        run(loop, kore.dbquery("wrong", "SELECT 1"))
    assert caught.value.sqlstate == "28P01"
    declare(where, name="none")
    with pytest.raises(RuntimeError, match="no connection to"):
        run(loop, kore.dbquery("none", "SELECT 1"))


def test_a_database_that_is_not_there(loop, postgresql):
    declare(postgresql.tcp.replace("dbname=hello", "dbname=nowhere"))
    assert refused(loop).sqlstate == "3D000"


def test_a_server_that_never_answers_is_given_up_in_time(loop):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        declare(f"host=127.0.0.1 port={listener.getsockname()[1]} user=kore connect_timeout=2")
        begun = time.monotonic()
        got = run(loop, results(*(kore.dbquery("db", "SELECT 1") for _ in range(20))))
        assert all("no answer within 2 s" in str(error) for error in got)
        assert time.monotonic() - begun < 10


def test_the_next_host_is_tried(loop, postgresql):
    """One is not there, one never answers, one has another role than is wanted."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        ports = f"{free_port()},{deaf.getsockname()[1]},{postgresql.port}"
        hosts = f"host=127.0.0.1,127.0.0.1,{postgresql.directory} port={ports} user=kore dbname=hello"
        declare(f"{hosts} connect_timeout=2 target_session_attrs=primary")
        assert ask(loop, "SELECT 1 AS a") == [{"a": "1"}]
    declare(f"{postgresql.tcp} target_session_attrs=standby", name="standby")
    with pytest.raises(RuntimeError, match="no connection to"):
        run(loop, kore.dbquery("standby", "SELECT 1"))
    declare(f"{postgresql.tcp} target_session_attrs=prefer-standby", name="perhaps")
    assert run(loop, kore.dbquery("perhaps", "SELECT 1 AS a")) == [{"a": "1"}]


def test_a_server_that_is_full_serves_with_the_connections_there_are(loop, own_postgresql):
    server = own_postgresql.start("max_connections=5", "superuser_reserved_connections=2")
    server.psql("CREATE ROLE common LOGIN")
    declare(server.tcp.replace("user=kore", "user=common"), conn_max=20)
    got = run(loop, results(*(kore.dbquery("db", "SELECT pg_sleep(0.05), 1 AS a") for _ in range(30))))
    assert [row[0]["a"] for row in got] == ["1"] * 30
    assert len(the_pool().sessions) == 3


@pytest.mark.parametrize("typed", [False, True])
def test_a_connection_that_is_lost_under_a_query_is_an_error_and_is_replaced(loop, db, typed):
    async def lose() -> list:
        query = asyncio.ensure_future(kore.dbquery("db", "SELECT pg_sleep(3600)", typed=typed))
        await asyncio.to_thread(db.wait_active, 1)
        await asyncio.to_thread(db.psql, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
                                         "application_name = 'kore'")
        return await asyncio.gather(query, return_exceptions=True)

    (error,) = run(loop, lose())
    assert isinstance(error, DatabaseError)
    # Why it was closed the server says, and asyncpg hands it on from 0.31 on.
    assert ("connection was closed" if typed else "terminating connection due to administrator command") in str(error)
    assert ask(loop, "SELECT 1 AS a", typed=typed) == [{"a": 1 if typed else "1"}]
    clean(loop)


def test_a_connection_that_is_lost_while_idle_is_replaced_unseen(loop, db):
    ask(loop, "SELECT 1")
    db.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'kore'")
    run(loop, until(lambda: not the_pool().sessions, "the loss is noticed"))
    assert ask(loop, "SELECT 1 AS a") == [{"a": "1"}]
    clean(loop)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_a_server_restarted_under_load(loop, own_postgresql, how):
    """Each query ends with its rows or an error that says why; afterwards they all succeed."""
    server = own_postgresql.start()
    declare(server.tcp, conn_max=4)
    outcomes = {"rows": 0, "errors": 0}
    stop = asyncio.Event()

    async def client(number: int) -> None:
        while not stop.is_set():
            try:
                async with asyncio.timeout(15):
                    rows = await kore.dbquery("db", "SELECT pg_sleep(0.002), 1 AS a", typed=number % 4 == 0)
                assert str(rows[0]["a"]) == "1"
                outcomes["rows"] += 1
            except DatabaseError as error:
                assert str(error).startswith("database 'db': ")
                outcomes["errors"] += 1
                await asyncio.sleep(0.01)

    async def restart() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(32):
                group.create_task(client(number))
            await until(lambda: outcomes["rows"] > 100, "queries succeed")
            await asyncio.to_thread(server.stop, how)
            await until(lambda: outcomes["errors"] > 32, "queries fail")
            await asyncio.to_thread(server.start)
            before = outcomes["rows"]
            await until(lambda: outcomes["rows"] > before + 100, "queries succeed again")
            stop.set()

    run(loop, restart(), 60)
    assert ask(loop, "SELECT 1 AS a") == [{"a": "1"}]
    clean(loop)
    assert len(the_pool().sessions) <= 4


def signal_all(processes: list[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # a backend whose client had just gone
            os.kill(process, number)


def test_a_server_that_is_stopped_is_left_in_time_and_used_again_when_it_goes_on(loop, own_postgresql, monkeypatch):
    """SIGSTOP: the kernel still takes connections and data for it, and nothing answers."""
    monkeypatch.setattr(pool_module, "CANCEL_SECONDS_MAX", 0.5)
    server = own_postgresql.start()
    declare(f"{server.tcp} connect_timeout=2", conn_max=2)
    assert server.process is not None
    postmaster = server.process.pid

    async def timed(seconds: float) -> BaseException | list:
        try:
            async with asyncio.timeout(seconds):
                return await kore.dbquery("db", "SELECT 1 AS a")
        except (TimeoutError, DatabaseError) as error:
            return error

    async def stopped() -> None:
        await results(*(kore.dbquery("db", "SELECT pg_sleep(0.1)") for _ in range(2)))
        first = set(the_pool().sessions)
        frozen = [postmaster, *children(postmaster)]
        try:
            signal_all(frozen, signal.SIGSTOP)
            got = await results(*(timed(0.3) for _ in range(10)))
            assert all(isinstance(error, TimeoutError) for error in got)
            await until(lambda: all(session.gone for session in first), "the connections are given up")
            assert "no answer within 2 s" in str(await timed(15))
        finally:
            signal_all(frozen, signal.SIGCONT)
        assert await timed(15) == [{"a": "1"}]

    run(loop, stopped())
    clean(loop)
    frozen = [postmaster, *children(postmaster)]
    task = loop.start(kore.dbquery("db", "SELECT pg_sleep(3600)"), lambda _error: None)
    run(loop, asyncio.to_thread(server.wait_active, 1))
    signal_all(frozen, signal.SIGSTOP)
    try:
        loop.run_until_complete(loop.shutdown_asyncgens())  # nor does the end of a worker wait for it
        assert not the_pool().sessions
    finally:
        signal_all(frozen, signal.SIGCONT)
        task.kill()


def test_a_request_to_cancel_that_overtakes_its_query_is_repeated(loop, own_postgresql, monkeypatch):
    """They travel on two connections. A server process that was stopped meets the request first, without a query."""
    monkeypatch.setattr(pool_module, "CANCEL_AGAIN_SECONDS", 0.05)
    asked = []
    request_cancel = pool_module.request_cancel

    async def counted(connection) -> None:
        await request_cancel(connection)
        asked.append(connection)

    monkeypatch.setattr(pool_module, "request_cancel", counted)
    server = own_postgresql.start()
    declare(server.tcp, conn_max=1)
    backend = int(ask(loop, "SELECT pg_backend_pid() AS pid")[0]["pid"])
    os.kill(backend, signal.SIGSTOP)
    try:
        task = loop.start(kore.dbquery("db", "SELECT pg_sleep(3600)"), lambda _error: None)
        run(loop, until(lambda: any(session.busy for session in the_pool().sessions), "the query is sent"))
        task.kill()
        run(loop, until(lambda: asked, "the server has passed the request on"))
    finally:
        os.kill(backend, signal.SIGCONT)
    clean(loop)
    assert not server.active()
    assert ask(loop, "SELECT pg_backend_pid() AS pid") == [{"pid": str(backend)}]


def test_a_server_that_is_full_for_a_moment_is_asked_again(loop, own_postgresql):
    server = own_postgresql.start("max_connections=5", "superuser_reserved_connections=2")
    server.psql("CREATE ROLE common LOGIN")
    common = server.tcp.replace("user=kore", "user=common")
    declare(common, name="other", conn_max=3)
    run(loop, results(*(kore.dbquery("other", "SELECT pg_sleep(0.05)") for _ in range(3))))
    assert len(databases["other"].pool.sessions) == 3
    declare(common, conn_max=5)

    async def wait() -> list:
        answers = asyncio.gather(*(kore.dbquery("db", "SELECT 1 AS a") for _ in range(8)))
        await until(lambda: the_pool() is not None and 0 < length_hint(the_pool()._pauses) < 6, "refused three times")
        await databases["other"].pool.close()
        return await answers

    assert run(loop, wait()) == [[{"a": "1"}]] * 8


def test_a_server_without_room_for_any_connection_is_an_error(loop, own_postgresql):
    server = own_postgresql.start("max_connections=4", "superuser_reserved_connections=3")
    server.psql("CREATE ROLE common LOGIN")
    common = server.tcp.replace("user=kore", "user=common")
    declare(common, name="other", conn_max=1)

    async def at_last(name: str) -> list:
        while True:  # a backend keeps its place for a moment after its client has gone
            try:
                return await kore.dbquery(name, "SELECT 1 AS a")
            except DatabaseError as error:
                assert error.sqlstate == "53300"
                await asyncio.sleep(0.01)

    run(loop, at_last("other"))
    declare(common, conn_max=5)
    got = run(loop, results(*(kore.dbquery("db", "SELECT 1") for _ in range(8))))
    assert {error.sqlstate for error in got} == {"53300"}
    assert all("no connection to" in str(error) for error in got)
    run(loop, until(lambda: not the_pool()._tasks, "no attempt is left that could take the place"))
    run(loop, databases["other"].pool.close())
    assert run(loop, at_last("db")) == [{"a": "1"}]


def test_a_cancellation_that_the_server_does_not_answer_ends_in_time(loop, postgresql, monkeypatch):
    """The connection is given up: what it says later might be taken for another query's answer."""
    monkeypatch.setattr(pool_module, "CANCEL_SECONDS_MAX", 0.5)
    with Relay(postgresql.port) as relay:
        declare(f"host=127.0.0.1 port={relay.port} user=kore dbname=hello sslmode=disable", conn_max=1)
        ask(loop, "SELECT 1")
        (stuck,) = the_pool().sessions

        async def leave() -> None:
            query = asyncio.ensure_future(kore.dbquery("db", "SELECT pg_sleep(0.3)"))
            await asyncio.to_thread(postgresql.wait_active, 1)
            relay.stalls.set()
            query.cancel()
            await asyncio.gather(query, return_exceptions=True)
            await until(lambda: stuck.gone, "the connection is given up")

        run(loop, leave())
        relay.stalls.clear()
        assert ask(loop, "SELECT 1 AS a") == [{"a": "1"}]
        clean(loop)
    postgresql.wait_quiet()


def test_who_comes_while_a_server_does_not_answer_is_told_in_time_too(loop):
    """Attempts overlap where clients keep coming; nobody waits for longer than two of them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        declare(f"host=127.0.0.1 port={listener.getsockname()[1]} user=kore connect_timeout=2")
        waited = []

        async def one() -> None:
            begun = loop.time()
            with pytest.raises(DatabaseError, match="no answer within 2 s"):
                await kore.dbquery("db", "SELECT 1")
            waited.append(loop.time() - begun)

        async def come() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(15):
                    group.create_task(one())
                    await asyncio.sleep(0.2)

        run(loop, come())
    assert len(waited) == 15
    assert max(waited) < 5
