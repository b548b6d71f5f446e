"""What others wrote for asyncio talks to databases in handlers: asyncpg, SQLAlchemy on it, redis. With real servers."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgresql_harness import DATABASE, USER, PostgresServer, postgresql  # noqa: F401 - a fixture

from tests.asgi_harness import mounting
from tests.http_server_harness import ENGINES, request
from tests.support import free_port, wait_until

ASYNCPG = '''
import asyncpg, json

class Pool:
    pool = None

async def opened():
    if Pool.pool is None:
        made = await asyncpg.create_pool(
            host="127.0.0.1", port=PORT, user=USER, database=DATABASE, min_size=0, max_size=5, ssl=False,
            server_settings={"application_name": "library"},
        )
        if Pool.pool is None:
            Pool.pool = made
    return Pool.pool

@kore.route("/value", domain=home)
async def value(req):
    pool = await opened()
    row = await pool.fetchrow("SELECT $1::int + 1 AS n, 'é'::text AS t, now() AS at, ARRAY[1,2] AS a", 41)
    req.response(200, json.dumps([row["n"], row["t"], row["a"]]))

@kore.route("/many", domain=home)
async def many(req):
    pool = await opened()
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("CREATE TEMP TABLE numbers (n int, t text) ON COMMIT DROP")
        await connection.copy_records_to_table("numbers", records=[(n, str(n)) for n in range(5000)])
        total = 0
        async for row in connection.cursor("SELECT n FROM numbers", prefetch=100):
            total += row["n"]
        try:
            async with connection.transaction():
                await connection.execute("SELECT 1/0")
        except asyncpg.DivisionByZeroError:
            pass
        req.response(200, json.dumps([total, await connection.fetchval("SELECT count(*) FROM numbers")]))

@kore.route("/listen", domain=home)
async def listen(req):
    pool = await opened()
    heard = asyncio.get_running_loop().create_future()
    async with pool.acquire() as one, pool.acquire() as other:
        await one.add_listener("news", lambda c, pid, channel, text: heard.set_result(text))
        await other.execute("NOTIFY news, 'something'")
        req.response(200, await asyncio.wait_for(heard, 10))
        await one.remove_listener("news", lambda *_: None)
        await one.reset()

@kore.route("/slow", domain=home)
async def slow(req):
    pool = await opened()
    said("slow begins")
    try:
        await pool.execute("SELECT pg_sleep(3600)")
    finally:
        said("slow ends")

@kore.route("/timeout", domain=home)
async def timeout(req):
    pool = await opened()
    try:
        async with asyncio.timeout(0.1):
            await pool.execute("SELECT pg_sleep(3600)")
    except TimeoutError:
        req.response(200, b"timed out")

class App:
    def workerstop(self):
        said("stopped")
koreapp = App()
'''


def database(text: str, server: PostgresServer) -> str:
    return f"PORT, USER, DATABASE = {server.port}, {USER!r}, {DATABASE!r}\n{text}"


def connecting(port: int) -> str:
    """Options for an application that connects there by itself, which kore knows nothing of."""
    return f"kore.config.sandbox_connect = {port}"


def sessions(server: PostgresServer, where: str) -> int:
    return int(server.psql(f"SELECT count(*) FROM pg_stat_activity WHERE application_name = 'library' AND {where}"))


@pytest.mark.parametrize("engine", ENGINES)
def test_asyncpg(tmp_path, engine, postgresql):  # noqa: F811 - the fixture
    """Queries, transactions, COPY, cursors, notifications, time limits; and nothing is left of clients that leave."""
    allowed = connecting(postgresql.port)
    with mounting(tmp_path, engine, database(ASYNCPG, postgresql), allowed) as server, server.client() as client:
        for _ in range(3):
            assert json.loads(client.ask(request("/value")).body) == [42, "é", [1, 2]]
        assert json.loads(client.ask(request("/many")).body) == [sum(range(5000)), 5000]
        assert client.ask(request("/listen")).body == b"something"
        assert client.ask(request("/timeout")).body == b"timed out"
        clients = [server.client() for _ in range(20)]
        for one in clients:
            one.send(request("/value"))
        assert [json.loads(one.read().body)[0] for one in clients] == [42] * 20
        for one in clients:
            one.sock.close()
        for number in range(10):
            with server.client() as other:
                other.send(request("/slow"))
                server.program.wait_for("slow begins", count=number + 1)
                # A library's request to cancel travels on a connection of its own, and may overtake its query.
                wait_until(lambda: sessions(postgresql, "state = 'active'"), "the query runs")
                other.reset()
            server.program.wait_for("slow ends", count=number + 1)
        wait_until(lambda: not sessions(postgresql, "state = 'active'"), "no query is left running")
        assert sessions(postgresql, "true") <= 5
        assert json.loads(client.ask(request("/value")).body)[0] == 42
        fds = server.fds()
        assert client.ask(request("/value")).status == 200
        assert server.fds() <= fds
        assert "uncaught" not in server.program.out
    wait_until(lambda: not sessions(postgresql, "true"), "no session outlives the server")


SQLALCHEMY = '''
import json
from sqlalchemy import ForeignKey, func, select, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

engine = create_async_engine(
    f"postgresql+asyncpg://{USER}@127.0.0.1:{PORT}/{DATABASE}", pool_size=4, max_overflow=0,
    connect_args={"ssl": False, "server_settings": {"application_name": "library"}},
)
Session = async_sessionmaker(engine, expire_on_commit=False)

class Base(DeclarativeBase):
    pass

class Author(Base):
    __tablename__ = TABLE
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    books: Mapped[list["Book"]] = relationship()

class Book(Base):
    __tablename__ = TABLE + "_book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))

@kore.route("/create", domain=home)
async def create(req):
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with Session() as session, session.begin():
        session.add(Author(name="Ann", books=[Book(title="A"), Book(title="B")]))
    req.response(201, b"")

@kore.route("/read", domain=home)
async def read(req):
    async with Session() as session:
        author = (await session.scalars(select(Author).options(selectinload(Author.books)))).one()
        count = await session.scalar(select(func.count()).select_from(Book))
        req.response(200, json.dumps([author.name, sorted(book.title for book in author.books), count]))

@kore.route("/stream", domain=home)
async def stream(req):
    async with engine.connect() as connection:
        result = await connection.stream(text("SELECT generate_series(1, 5000) AS n"))
        total = 0
        async for row in result:
            total += row.n
        req.response(200, str(total))

@kore.route("/undo", domain=home)
async def undo(req):
    try:
        async with Session() as session, session.begin():
            session.add(Author(name="Bob"))
            await session.flush()
            raise LookupError
    except LookupError:
        pass
    async with Session() as session:
        req.response(200, str(await session.scalar(select(func.count()).select_from(Author))))

@kore.route("/slow", domain=home)
async def slow(req):
    async with Session() as session:
        said("slow begins")
        try:
            await session.execute(text("SELECT pg_sleep(3600)"))
        finally:
            said("slow ends")

@kore.route("/used", domain=home)
async def used(req):
    req.response(200, str(engine.pool.checkedout()))

@kore.route("/dispose", domain=home)
async def dispose(req):
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
    await engine.dispose()
    req.response(200, b"")
'''


@pytest.mark.parametrize("engine", ENGINES)
def test_sqlalchemy(tmp_path, engine, postgresql):  # noqa: F811 - the fixture
    """An engine, sessions, relations, streams, rollbacks; a connection whose client left is not used by the next."""
    text = f"TABLE = 'author_{engine}'\n" + SQLALCHEMY
    allowed = connecting(postgresql.port)
    with mounting(tmp_path, engine, database(text, postgresql), allowed) as server, server.client() as client:
        assert client.ask(request("/create")).status == 201
        for _ in range(3):
            assert json.loads(client.ask(request("/read")).body) == ["Ann", ["A", "B"], 2]
        assert client.ask(request("/stream")).body == b"12502500"
        assert client.ask(request("/undo")).body == b"1"
        for number in range(6):  # more than the pool has
            with server.client() as other:
                other.send(request("/slow"))
                server.program.wait_for("slow begins", count=number + 1)
                # A library's request to cancel travels on a connection of its own, and may overtake its query.
                wait_until(lambda: sessions(postgresql, "state = 'active'"), "the query runs")
                other.reset()
            server.program.wait_for("slow ends", count=number + 1)
        assert json.loads(client.ask(request("/read")).body) == ["Ann", ["A", "B"], 2]
        wait_until(lambda: not sessions(postgresql, "state = 'active'"), "no query is left running")
        wait_until(lambda: client.ask(request("/used")).body == b"0", "all connections are back in the pool")
        assert client.ask(request("/dispose")).status == 200
        wait_until(lambda: not sessions(postgresql, "true"), "the pool is closed", 3)
        assert "uncaught" not in server.program.out


REDIS = '''
import json
import redis.asyncio as redis

class Shared:
    client = None

def opened():
    if Shared.client is None:
        Shared.client = redis.Redis(host="127.0.0.1", port=PORT, decode_responses=True, max_connections=20)
    return Shared.client

@kore.route("/commands", domain=home)
async def commands(req):
    client = opened()
    await client.set("x", "é")
    await client.hset("h", mapping={"a": 1, "b": 2})
    large = "x" * 3000000
    await client.set("large", large)
    found = [await client.get("x"), await client.hgetall("h"), await client.incr("n")]
    found.append(await client.get("large") == large)
    await client.delete("n")
    req.response(200, json.dumps(found))

@kore.route("/pipeline", domain=home)
async def pipeline(req):
    async with opened().pipeline(transaction=True) as pipe:
        for number in range(1000):
            pipe.set(f"key:{number}", number)
        for number in range(1000):
            pipe.get(f"key:{number}")
        found = await pipe.execute()
    req.response(200, str(sum(int(value) for value in found[1000:])))

@kore.route("/publish", domain=home)
async def publish(req):
    async with opened().pubsub() as pubsub:
        await pubsub.subscribe("news")
        await opened().publish("news", "one")
        await opened().publish("news", "two")
        heard = []
        async with asyncio.timeout(10):
            async for message in pubsub.listen():
                if message["type"] == "message":
                    heard.append(message["data"])
                    if len(heard) == 2:
                        break
    req.response(200, json.dumps(heard))

@kore.route("/block", domain=home)
async def block(req):
    said("block begins")
    try:
        await opened().blpop("nothing", timeout=0)
    finally:
        said("block ends")

@kore.route("/subscribe", domain=home)
async def subscribe(req):
    async with opened().pubsub() as pubsub:
        await pubsub.subscribe("silence")
        said("subscribed")
        try:
            async for message in pubsub.listen():
                pass
        finally:
            said("unsubscribed")

@kore.route("/close", domain=home)
async def close(req):
    await opened().aclose()
    req.response(200, b"")
'''


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[int]:
    """The port of a redis-server."""
    port = free_port()
    directory = tmp_path / "redis"
    directory.mkdir()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    log = directory / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or b"Ready to accept" in log.read_bytes(), "redis runs")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.mark.parametrize("engine", ENGINES)
def test_redis(tmp_path, engine, redis):
    """Commands, large values, a pipeline, published messages; and clients that leave in blocking commands."""
    (tmp_path / "app").mkdir()
    text = f"PORT = {redis}\n{REDIS}"
    with mounting(tmp_path / "app", engine, text, connecting(redis)) as server, server.client() as client:
        for _ in range(2):
            assert json.loads(client.ask(request("/commands")).body) == ["é", {"a": "1", "b": "2"}, 1, True]
            assert client.ask(request("/pipeline")).body == str(sum(range(1000))).encode()
            assert json.loads(client.ask(request("/publish")).body) == ["one", "two"]
        fds = 0
        for number in range(10):
            for path, begins, ends in (
                ("/block", "block begins", "block ends"), ("/subscribe", "subscribed", "unsubscribed"),
            ):
                with server.client() as other:
                    other.send(request(path))
                    server.program.wait_for(rf"\[{begins}", count=number + 1)
                    other.reset()
                server.program.wait_for(rf"\[{ends}", count=number + 1)
            assert json.loads(client.ask(request("/commands")).body)[0] == "é"
            if number == 4:
                fds = server.fds()
        server.settle(fds)
        assert client.ask(request("/close")).status == 200
        assert "uncaught" not in server.program.out
