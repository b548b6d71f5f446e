"""``kore.dbquery`` on a real server: what it gives, what it refuses, and what it leaves behind."""

from __future__ import annotations

import pytest
from reactor_harness import run

import kore
from kore.clients.postgresql.errors import DatabaseError
from tests.postgresql_harness import PostgresServer, declare, loop

__all__ = ["loop"]


@pytest.fixture(params=["local", "tcp"])
def db(request, postgresql: PostgresServer) -> PostgresServer:
    """The shared server as the database "db", through its socket and over TCP."""
    declare(getattr(postgresql, request.param))
    return postgresql


def ask(loop, query: str, **keywords):
    return run(loop, kore.dbquery("db", query, **keywords))


def refused(loop, query: str, **keywords) -> DatabaseError:
    with pytest.raises(RuntimeError) as caught:
        ask(loop, query, **keywords)
    return caught.value


def test_rows_are_dicts_of_what_postgresql_prints(loop, db):
    """Columns by name, str, NULL as None; the same again from the statement that is prepared by then."""
    for _ in range(3):
        assert ask(loop, "SELECT 1 AS a, NULL AS b, true AS c, 1.50 AS d, 'ü' AS e") == [
            {"a": "1", "b": None, "c": "t", "d": "1.50", "e": "ü"}
        ]


def test_a_statement_without_rows_gives_an_empty_list(loop, db):
    assert ask(loop, "SELECT 1 WHERE false") == []
    assert ask(loop, "CREATE TABLE IF NOT EXISTS nothing (a int)") == []
    assert ask(loop, "DROP TABLE nothing") == []
