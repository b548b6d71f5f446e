"""Databases in a server: the reference's examples as they stand there, clients that leave, workers that end."""

from __future__ import annotations

import getpass
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import ENGINES
from tests.http_server_harness import Client, request
from tests.postgresql_harness import PostgresServer
from tests.support import Starter, http_get, only_one, pids_of, skip_unless, starter, wait_until

# The reference's two examples. PostgreSQL has no table "table" without quotes: that one name is another here.
SETUP = """\
kore.dbsetup("db", "host=/tmp dbname=hello")
"""

QUERY = """\
async def myquery(req):
    name = "bar"
    result = await kore.dbquery("db",
        "SELECT * FROM things WHERE foo = $1", params=[name])
    req.response(200, json.dumps(result).encode("utf-8"))
"""

ROUTES = """
@kore.route("/query", methods=["get"])
async def query(req):
    await myquery(req)

@kore.route("/sleep", methods=["get"])
async def sleep(req):
    await kore.dbquery("db", "SELECT pg_sleep(3600)")

@kore.route("/sleep/typed", methods=["get"])
async def sleep_typed(req):
    await kore.dbquery("db", "SELECT pg_sleep(3600)", typed=True)

@kore.route("/transaction", methods=["get"])
async def transaction(req):
    async with kore.dbtransaction("db") as tx:
        await tx.query("INSERT INTO things VALUES ('lost')")
        await tx.query("SELECT pg_sleep(3600)")

@kore.route("/error", methods=["get"])
async def error(req):
    await kore.dbquery("db", "SELECT nowhere")

@kore.route("/modules", methods=["get"])
def modules(req):
    import sys
    req.response(200, json.dumps([name in sys.modules for name in ("asyncpg", "pycurl")]).encode())
"""


class Place:
    """A server of PostgreSQL and how to start applications beside it."""

    def __init__(self, server: PostgresServer, start: Starter, io: str) -> None:
        self.server = server
        self.start = start
        self.io = io

    def serve(self, text: str, **options):
        return self.start.serve(f"import json\n{text}", io=self.io, workers=1, **options)


@pytest.fixture(scope="module")
def standard(postgresql: PostgresServer) -> Iterator[PostgresServer]:
    """A server where the examples look for it: port 5432, its socket in /tmp, and us as a user of it."""
    with only_one("postgresql"):
        yield from _standard(postgresql)


def _standard(postgresql: PostgresServer) -> Iterator[PostgresServer]:
    if Path("/tmp/.s.PGSQL.5432").exists():
        pytest.skip("something listens on /tmp/.s.PGSQL.5432, where the reference's examples connect")
    postgresql.psql("CHECKPOINT")
    server = PostgresServer(postgresql)
    server.port = 5432
    try:
        server.start("listen_addresses=", f"unix_socket_directories={server.directory},/tmp")
        server.psql(f'CREATE ROLE "{getpass.getuser()}" LOGIN SUPERUSER')
        server.psql("CREATE TABLE things (foo text, n int); INSERT INTO things VALUES ('bar', 1), ('bar', NULL)")
        yield server
    finally:
        server.remove()


@pytest.fixture(params=ENGINES)
def place(request, standard: PostgresServer, tmp_path: Path) -> Iterator[Place]:
    skip_unless(request.param)
    with starter(tmp_path) as start:
        yield Place(standard, start, request.param)


def body(program, path: str) -> bytes:
    head, _, rest = http_get(program.address, path).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    return rest


def test_the_reference_s_examples(place: Place):
    program = place.serve(SETUP + QUERY + ROUTES)
    for _ in range(3):
        assert json.loads(body(program, "/query")) == [{"foo": "bar", "n": "1"}, {"foo": "bar", "n": None}]
    place.server.wait_connections(1)


def test_errors_are_500_and_logged(place: Place):
    program = place.serve(SETUP + QUERY + ROUTES)
    assert http_get(program.address, "/error").startswith(b"HTTP/1.1 500 ")
    program.wait_for("column .*nowhere.* does not exist")
    assert b"bar" in body(program, "/query")


def test_a_string_that_cannot_be_used_stops_the_start(place: Place):
    program = place.serve('kore.dbsetup("db", "host=/tmp sslmod=require")', wait=False)
    assert program.wait() != 0
    assert "there is no option 'sslmod'" in program.out + program.err


@pytest.mark.parametrize("path", ["/sleep", "/sleep/typed", "/transaction"])
def test_a_client_that_leaves_has_its_query_cancelled(place: Place, path: str):
    program = place.serve(SETUP + QUERY + ROUTES)
    client = Client(program.address)
    client.send(request(path))
    place.server.wait_active(1)
    client.sock.close()
    place.server.wait_quiet()
    assert b"bar" in body(program, "/query")
    assert b"lost" not in place.server.psql("SELECT string_agg(foo, ' ') FROM things").encode()


@pytest.mark.parametrize("typed", ["", "/typed"])
def test_a_worker_that_ends_leaves_no_query_running(place: Place, typed: str):
    program = place.serve(SETUP + QUERY + ROUTES)
    with Client(program.address) as client:
        client.send(request(f"/sleep{typed}"))
        place.server.wait_active(1)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
    place.server.wait_quiet()
    place.server.wait_connections(0)


def test_a_worker_that_is_killed_leaves_no_connection_for_long(place: Place):
    """The kernel closes its sockets; an idle session ends then, and the next worker has connections of its own."""
    program = place.serve(SETUP + QUERY + ROUTES)
    body(program, "/query")
    (pid,) = pids_of(program)
    os.kill(pid, signal.SIGKILL)
    program.wait_for("serves again")
    wait_until(lambda: b"bar" in http_get(program.address, "/query"), "the next worker serves")
    place.server.wait_connections(1)


def test_asyncpg_is_loaded_by_those_that_name_a_database(place: Place):
    outside = {"KORE_SANDBOX": "no"}  # inside, what the text of the application mentions is loaded ahead
    program = place.serve(SETUP + QUERY + ROUTES, environment=outside)
    assert json.loads(body(program, "/modules")) == [True, False]
    program.stop()
    program = place.serve(ROUTES, environment=outside)
    assert json.loads(body(program, "/modules")) == [False, False]
