"""``kore.dbquery`` on a real server: what it gives, what it refuses, and what a query leaves behind."""

from __future__ import annotations

import pytest
from reactor_harness import run

import kore
from kore.clients.postgresql import session
from kore.clients.postgresql.errors import DatabaseError
from tests.postgresql_harness import PostgresServer, Relay, declare, loop

__all__ = ["loop"]


@pytest.fixture(params=["local", "tcp"])
def db(request, postgresql: PostgresServer) -> PostgresServer:
    """The shared server as the database "db", through its socket and over TCP; one connection."""
    declare(getattr(postgresql, request.param), conn_max=1)
    return postgresql


def ask(loop, query: str, **keywords):
    return run(loop, kore.dbquery("db", query, **keywords))


def refused(loop, query: str, **keywords) -> DatabaseError:
    with pytest.raises(RuntimeError) as caught:
        ask(loop, query, **keywords)
    assert isinstance(caught.value, DatabaseError)
    return caught.value


def pid(loop) -> str:
    return ask(loop, "SELECT pg_backend_pid() AS pid")[0]["pid"]


def test_rows_are_dicts_of_what_postgresql_prints(loop, db):
    """Columns by name, str, NULL as None; the same again from the statement that is prepared by then."""
    for _ in range(3):
        assert ask(loop, "SELECT 1 AS a, NULL AS b, true AS c, 1.50 AS d, 'ü' AS e") == [
            {"a": "1", "b": None, "c": "t", "d": "1.50", "e": "ü"}
        ]


def test_a_statement_without_rows_gives_an_empty_list(loop, db):
    assert ask(loop, "SELECT 1 WHERE false") == []
    assert ask(loop, "CREATE TABLE nothing (a int)") == []
    assert ask(loop, "INSERT INTO nothing VALUES (1), (2)") == []
    assert ask(loop, "DROP TABLE nothing") == []


def test_of_columns_with_one_name_the_last_is_kept(loop, db):
    assert ask(loop, "SELECT 1 AS a, 2 AS a") == [{"a": "2"}]


def test_a_row_without_columns_is_an_empty_dict(loop, db):
    assert ask(loop, "SELECT FROM generate_series(1, 2)") == [{}, {}]


# One expression for each kind of type there is; what psql prints for it is what must come.
EXPRESSIONS = """
1::int2; 1::int8; 'infinity'::float4; 1e300::float8; 0.1::float4; 1.10::numeric; 'NaN'::numeric; '12.5'::money; true
'c'::"char"; 'name'::name; 'x'::char(4); 'x'::varchar(4); E'tab\\t\\\\ "q"'::text; E'\\\\x00ff'::bytea; ''::text
'2024-02-29'::date; 'infinity'::date; '0044-03-15 BC'::date; '12:00:00.5'::time; '12:00+02'::timetz
'2024-02-29 12:00:00.123456'::timestamp; '2024-02-29 12:00:00+05'::timestamptz; '-infinity'::timestamptz
'1 year -2 days 03:04:05.6'::interval; '{"b": 1, "a": [null]}'::json; '{"b": 1, "a": [null]}'::jsonb; '$.a'::jsonpath
'<a>b</a>'::xml; 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid; '192.168.0.1/24'::inet; '10.0.0.0/8'::cidr
'08:00:2b:01:02:03'::macaddr; '08:00:2b:01:02:03:04:05'::macaddr8; B'101'::bit(3); B'1'::bit varying(5)
'(1,2)'::point; '{1,2,3}'::line; '[(1,2),(3,4)]'::lseg; '(3,4),(1,2)'::box; '((1,2),(3,4))'::path; '<(1,2),3>'::circle
'((1,2),(3,4),(5,6))'::polygon; 'a fat cat'::tsvector; 'fat & cat'::tsquery; '16/B374D848'::pg_lsn
'10:20:10,14'::pg_snapshot
'pg_class'::regclass; 'now'::regproc; 'int4'::regtype; '12'::oid; '1 2'::oidvector; '1 2'::int2vector; '(0,1)'::tid
'7'::xid
ARRAY[1, NULL, 3]; ARRAY[['a b', 'c"d'], ['', 'NULL']]; '{}'::int[]; '[0:1]={1,2}'::int[]; ARRAY['2024-01-01'::date]
ROW(1, 'a b', NULL); ROW(ARRAY[1], ROW('x', '')); '[1,5)'::int4range; 'empty'::int4range; '[2024-01-01,)'::tsrange
'{[1,2),[5,7)}'::int4multirange; 'happy'::mood; 7::positive; ROW(1, 'sad')::pair; ARRAY[ROW(1, 'sad')::pair]
ARRAY['sad', 'happy']::mood[]; ARRAY[7]::positive[]; '["a","b"]'::textrange; pg_sleep(0); NULL::pair
'Infinity'::numeric; '-Infinity'::numeric; '-0'::float8; '5e-324'::float8; 1e-7::numeric; repeat('9', 500)::numeric
'-1.5'::money; ''::bytea; E'\\\\x'::bytea; '0'::"char"; ''::"char"; E'\\\\377'::"char"; '{}'::text[]; '[1,1]'::int4range
'(,)'::numrange; '{}'::int4multirange; '0001-01-01 BC'::date; '4713-01-01 00:00:00 BC'::timestamp; '294276-12-31'::date
'0044-03-15 12:00:00+00 BC'::timestamptz; '24:00:00'::time; '-178000000 years'::interval; '00:00:00'::interval
'1e400'::jsonb; '"\\u00fc"'::json; '"\\u00fc"'::jsonb; ''::tsvector; 'a:1A b:2,3B'::tsvector; ''::xml; ROW(NULL)
ROW(''); ROW(ROW(1, ARRAY['a,b', '"', '\\'])); ARRAY[ROW('a"b', '(,)')]; ARRAY['[1,5)'::int4range]; ''::varbit
'::1'::inet; repeat('ü', 70000); repeat('x', 255); repeat('x', 254); ARRAY[[[1,2]],[[3,4]]]; ARRAY[NULL, NULL]::int[]
''::oidvector
"""


def test_every_type_comes_as_postgresql_prints_it(loop, db):
    """Also what no driver has a codec for: enums, domains, composites, ranges, arrays of them, unknown ones."""
    db.psql(
        "DROP TYPE IF EXISTS pair, mood, textrange CASCADE; DROP DOMAIN IF EXISTS positive;"
        "CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE DOMAIN positive AS int CHECK (VALUE > 0);"
        "CREATE TYPE pair AS (n int, m mood); CREATE TYPE textrange AS RANGE (subtype = text)"
    )
    expressions = [text.strip() for line in EXPRESSIONS.strip().splitlines() for text in line.split("; ")]
    printed = db.psql("; ".join(f"SELECT {text}" for text in expressions)).split("\n")
    assert len(printed) == len(expressions) == 117
    for text, value in zip(expressions, printed, strict=True):
        (row,) = ask(loop, f"SELECT {text} AS value")
        assert (row["value"] or "") == value, text
        (row,) = ask(loop, f"SELECT 1; SELECT {text} AS value")  # as several statements, which are sent in another way
        assert (row["value"] or "") == value, text
    assert ask(loop, "SELECT NULL::pair AS value") == [{"value": None}]


def test_a_str_fits_a_parameter_of_any_type(loop, db):
    """The server decides the types; text is read as PostgreSQL reads literals."""
    rows = ask(
        loop, "SELECT $1::int + 1 AS a, $2::date + 1 AS b, $3::bool AS c, $4::int[] AS d, $5 AS e",
        params=["41", "2024-02-28", "yes", "{1,2}", "ü\t"],
    )  # fmt: skip
    assert rows == [{"a": "42", "b": "2024-02-29", "c": "t", "d": "{1,2}", "e": "ü\t"}]


def test_bytes_are_a_parameter_s_binary_form_and_none_is_null(loop, db):
    rows = ask(loop, "SELECT $1::bytea AS a, $2::int AS b, $3::int AS c, $4::text AS d",
               params=[b"\0\xff", b"\0\0\1\0", None, bytearray(b"x")])
    assert rows == [{"a": "\\x00ff", "b": "256", "c": None, "d": "x"}]


def test_binary_columns_are_bytes_with_and_without_params(loop, db):
    assert ask(loop, "SELECT 258 AS a, NULL AS b, 'x' AS c", binary=True) == [{"a": b"\0\0\1\2", "b": None, "c": b"x"}]
    assert ask(loop, "SELECT $1::int AS a", params=["1"], binary=True) == [{"a": b"\0\0\0\1"}]
    assert ask(loop, "SELECT $1::int AS a", params=["1"]) == [{"a": "1"}]
    assert ask(loop, "SELECT 258 AS a, NULL AS b, 'x' AS c") == [{"a": "258", "b": None, "c": "x"}]


def test_typed_values_are_those_of_python(loop, db):
    rows = ask(loop, "SELECT $1::int AS a, $2::int[] AS b, $3::text AS c, $4::bytea AS d, NULL AS e",
               params=[41, [1, 2], "x", b"\0"], typed=True)
    assert rows == [{"a": 41, "b": [1, 2], "c": "x", "d": b"\0", "e": None}]
    assert ask(loop, "SELECT 1 AS a") == [{"a": "1"}]
    assert ask(loop, "SELECT 1 AS a WHERE false", typed=True) == []


def test_several_statements_give_the_rows_of_the_last_that_has_any(loop, db):
    assert ask(loop, "SELECT 1 AS a; SELECT 2 AS b; CREATE TABLE several (a int); DROP TABLE several;") == [{"b": "2"}]
    assert ask(loop, "SELECT 1 AS a; SELECT 2 AS b WHERE false") == []
    assert ask(loop, "SELECT ';' AS a") == [{"a": ";"}]
    assert ask(loop, "SELECT 1 AS a ; ") == [{"a": "1"}]


def test_an_error_anywhere_in_several_statements_is_an_error(loop, db):
    """And what came before it is undone: several statements in one string are one transaction."""
    ask(loop, "CREATE TABLE several (a int)")
    assert refused(loop, "INSERT INTO several VALUES (1); SELECT 1/0; SELECT 1").sqlstate == "22012"
    assert refused(loop, "SELECT 1; SELEC 2").sqlstate == "42601"
    assert ask(loop, "SELECT * FROM several") == []
    ask(loop, "DROP TABLE several")


def test_an_error_says_what_the_server_says(loop, db):
    error = refused(loop, "SELECT nowhere")
    assert error.sqlstate == "42703"
    assert str(error) == "database 'db': ERROR: column \"nowhere\" does not exist (SQLSTATE 42703); at character 8"
    error = refused(loop, "SELECT nowhere", typed=True)
    assert error.sqlstate == "42703"
    assert str(error) == "database 'db': ERROR: column \"nowhere\" does not exist (SQLSTATE 42703); at character 8"


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("query", ["", "  ", ";", "-- nothing", "/* nothing */ ;"])
def test_an_empty_query_is_an_error(loop, db, query, typed):
    assert "the query is empty" in str(refused(loop, query, typed=typed))


@pytest.mark.parametrize(
    ("query", "keywords", "sqlstate"),
    [
        ("SELECT $1::int", {"params": ["x"]}, "22P02"),
        ("SELECT $1::int", {"params": [b"x"]}, "08P01"),
        ("SELECT $1::int", {}, "08P01"),
        ("SELECT 1", {"params": ["x"]}, "08P01"),
        ("SELECT 1; SELECT 2", {"params": []}, "42601"),
        ("SELECT 1; SELECT 2", {"binary": True}, "42601"),
        ("SELECT $1::text", {"params": ["a\0b"]}, "22021"),
        ("SELECT $1::int", {"params": ["x"], "typed": True}, "22000"),
        ("COPY (SELECT 1) TO STDOUT", {}, None),
        ("COPY (SELECT 1) TO STDOUT", {"typed": True}, None),
        ("SELECT '0044-03-15 BC'::date", {"typed": True}, None),
        ("SELECT '294276-01-01'::timestamp", {"typed": True}, None),
        ("COPY pg_class TO STDOUT; SELECT 1", {}, None),
        ("CREATE TEMP TABLE c (a int); COPY c FROM STDIN", {}, None),
    ],
)
def test_after_an_error_the_connection_goes_on(loop, db, query, keywords, sqlstate):
    before = pid(loop)
    assert refused(loop, query, **keywords).sqlstate == sqlstate
    assert refused(loop, query, **keywords).sqlstate == sqlstate
    assert pid(loop) == before


@pytest.mark.parametrize("typed", [False, True])
def test_copy_from_stdin_by_itself_is_refused_and_the_connection_goes_on(loop, db, typed):
    ask(loop, "CREATE TABLE copied (a int)")
    before = pid(loop)
    for text in ("COPY copied FROM STDIN", " -- x\n/* y */ copy copied from stdin;"):
        assert "COPY FROM STDIN" in str(refused(loop, text, typed=typed))
    assert pid(loop) == before
    ask(loop, "DROP TABLE copied")


@pytest.mark.parametrize(
    ("arguments", "keywords", "kind"),
    [
        ((1, "SELECT 1"), {}, TypeError),
        (("db", b"SELECT 1"), {}, TypeError),
        (("db", "SELECT 1\0"), {}, ValueError),
        (("db", "SELECT '\ud800'"), {}, ValueError),
        (("db", "SELECT $1"), {"params": "x"}, RuntimeError),
        (("db", "SELECT $1"), {"params": [1]}, RuntimeError),
        (("db", "SELECT $1"), {"params": {"a": "b"}}, RuntimeError),
        (("db", "SELECT $1"), {"params": ["\ud800"]}, RuntimeError),
        (("db", "SELECT $1"), {"params": ["x"] * 65536}, RuntimeError),
        (("db", "SELECT 1"), {"binary": 1}, RuntimeError),
        (("db", "SELECT 1"), {"typed": None}, RuntimeError),
        (("db", "SELECT 1"), {"typed": True, "binary": True}, RuntimeError),
        (("db", "SELECT $1"), {"typed": True, "params": "x"}, RuntimeError),
        (("db",), {}, TypeError),
        (("db", "SELECT 1", ["x"]), {}, TypeError),
    ],
)
def test_wrong_arguments_are_errors_at_the_call(arguments, keywords, kind):
    with pytest.raises(kind):
        kore.dbquery(*arguments, **keywords)


def test_an_unknown_database_is_an_error_at_the_await(loop):
    for keywords in ({}, {"typed": True}):
        query = kore.dbquery("nowhere", "SELECT 1", **keywords)
        with pytest.raises(RuntimeError, match="no database 'nowhere'"):
            run(loop, query)


def test_queries_can_be_gathered(loop, postgresql):
    """They are coroutines, which is what kore.gather wants."""
    declare(postgresql.tcp, conn_max=2)

    async def several():
        return await kore.gather(*(kore.dbquery("db", f"SELECT {n} AS n") for n in range(5)))

    assert run(loop, several()) == [[{"n": str(n)}] for n in range(5)]


# Prepared statements.


def prepared(loop) -> list[str]:
    return [row["name"] for row in ask(loop, "SELECT name FROM pg_prepared_statements ORDER BY prepare_time")]


def test_the_same_text_is_prepared_once(loop, db):
    for _ in range(3):
        ask(loop, "SELECT 1")
    assert len(prepared(loop)) == 2


def test_prepared_statements_are_bounded_on_both_sides(loop, db):
    for n in range(session.STATEMENTS_MAX + 40):
        assert ask(loop, f"SELECT {n} AS n") == [{"n": str(n)}]
    assert len(prepared(loop)) <= session.STATEMENTS_MAX + 1
    assert ask(loop, "SELECT 0 AS n") == [{"n": "0"}]


def test_long_texts_are_not_kept(loop, db):
    text = "x" * session.STATEMENT_BYTES_MAX
    for _ in range(2):
        assert ask(loop, f"SELECT '{text}' AS a") == [{"a": text}]
    assert len(prepared(loop)) == 1


@pytest.mark.parametrize("typed", [False, True])
def test_a_table_that_was_altered_is_seen(loop, db, typed):
    """The server refuses a plan whose columns changed; it is made anew and the query runs again, unseen."""
    one = 1 if typed else "1"
    db.psql("DROP TABLE IF EXISTS altered; CREATE TABLE altered (a int); INSERT INTO altered VALUES (1)")
    assert ask(loop, "SELECT * FROM altered", typed=typed) == [{"a": one}]
    db.psql("ALTER TABLE altered ADD b text DEFAULT 'x'")
    assert ask(loop, "SELECT * FROM altered", typed=typed) == [{"a": one, "b": "x"}]
    db.psql("ALTER TABLE altered RENAME b TO c")
    assert ask(loop, "SELECT * FROM altered", typed=typed) == [{"a": one, "c": "x"}]
    db.psql("DROP TABLE altered")
    assert refused(loop, "SELECT * FROM altered", typed=typed).sqlstate == "42P01"


@pytest.mark.parametrize("statement", ["DEALLOCATE ALL", "DISCARD ALL"])
def test_statements_the_server_was_told_to_forget_are_prepared_again(loop, db, statement):
    for _ in range(2):
        assert ask(loop, "SELECT 1 AS a") == [{"a": "1"}]
        assert ask(loop, "SELECT 1 AS a", typed=True) == [{"a": 1}]
        ask(loop, statement)


# What a query leaves behind.


@pytest.mark.parametrize("left", ["BEGIN", "BEGIN; SELECT 1", "START TRANSACTION"])
def test_an_open_transaction_is_rolled_back_before_the_next_query(loop, db, left):
    ask(loop, "CREATE TABLE left_open (a int)")
    before = pid(loop)
    ask(loop, f"{left}; INSERT INTO left_open VALUES (1)")
    assert ask(loop, "SELECT * FROM left_open") == []
    assert pid(loop) == before
    ask(loop, "DROP TABLE left_open")


def test_a_failed_transaction_is_rolled_back_before_the_next_query(loop, db):
    assert refused(loop, "BEGIN; SELECT 1/0").sqlstate == "22012"
    assert ask(loop, "SELECT 1 AS a") == [{"a": "1"}]


def test_a_typed_query_that_leaves_a_transaction_is_rolled_back_too(loop, db):
    ask(loop, "BEGIN", typed=True)
    numbers = [ask(loop, "SELECT pg_current_xact_id() AS a", typed=typed)[0]["a"] for typed in (False, True, False)]
    assert len(set(map(str, numbers))) == 3


@pytest.mark.parametrize("typed", [False, True])
def test_what_a_query_changes_of_its_session_does_not_reach_the_next(loop, db, typed):
    before = pid(loop)
    for statement in ("SET search_path TO nowhere", "SET ROLE secret", "LISTEN somewhere", "PREPARE mine AS SELECT 1",
                      "CREATE TEMP TABLE mine (a int)", "SET DateStyle TO German"):
        ask(loop, statement, typed=typed)
    (row,) = ask(
        loop, "SELECT current_setting('search_path') AS path, current_user AS who, '2024-01-31'::date AS day,"
        " (SELECT count(*) FROM pg_listening_channels()) AS channels,"
        " (SELECT count(*) FROM pg_prepared_statements WHERE name = 'mine') AS statements, to_regclass('mine') AS mine",
    )  # fmt: skip
    assert row == {
        "path": '"$user", public', "who": "kore", "day": "2024-01-31", "channels": "0", "statements": "0", "mine": None,
    }  # fmt: skip
    assert pid(loop) == before


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize(
    "statement",
    ["CREATE TEMP TABLE mine AS SELECT 1 AS a", "create  local temporary table mine as select 1 AS a",
     "SELECT 1 AS a INTO TEMP mine", "SELECT 1 AS a INTO TEMPORARY TABLE mine",
     "CREATE TABLE pg_temp.mine AS SELECT 1 AS a", "SELECT set_config('search_path', 'nowhere', false)",
     "UPDATE pg_settings SET setting = 'nowhere' WHERE name = 'search_path'",
     "SELECT pg_advisory_lock(7)", "SELECT pg_try_advisory_lock_shared(7)"],
)  # fmt: skip
def test_neither_does_what_its_command_tag_does_not_tell(loop, db, statement, typed):
    before = pid(loop)
    for _ in range(2):
        ask(loop, statement, typed=typed)
        (row,) = ask(
            loop, "SELECT current_setting('search_path') AS path, to_regclass('mine') AS mine,"
            " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory') AS locks",
        )  # fmt: skip
        assert row == {"path": '"$user", public', "mine": None, "locks": "0"}
    assert pid(loop) == before


def test_a_text_that_only_names_such_words_costs_no_reset(loop, db):
    texts = ["SELECT 1 AS temp", "SELECT 'temperature' AS a", "SELECT count(*) AS a FROM pg_settings"]
    for _ in range(2):
        for text in texts:
            ask(loop, text)
    rows = ask(loop, "SELECT statement FROM pg_prepared_statements")
    assert {row["statement"] for row in rows} >= set(texts)


@pytest.mark.parametrize("typed", [False, True])
def test_another_encoding_is_refused_and_its_connection_given_up(loop, db, typed):
    before = pid(loop)
    text = "SET client_encoding TO 'LATIN1'" if typed else "SET client_encoding TO 'LATIN1'; SELECT 'ü' AS a"
    assert "client_encoding is LATIN1" in str(refused(loop, text, typed=typed))
    assert ask(loop, "SELECT 'ü' AS a", typed=typed) == [{"a": "ü"}]
    assert pid(loop) != before


# Sizes.


def test_large_results_and_parameters_arrive_whole(loop, db):
    text = "ü" * 3_000_000
    assert ask(loop, "SELECT $1 AS a, length($1) AS b", params=[text]) == [{"a": text, "b": "3000000"}]
    rows = ask(loop, "SELECT n, repeat('x', 50) AS t FROM generate_series(1, 50000) AS n")
    assert len(rows) == 50000
    assert rows[-1] == {"n": "50000", "t": "x" * 50}


def test_rows_of_every_length_around_those_that_are_read_quickly(loop, db):
    """The short ones, whose values' lengths fit a byte, are read in another way; NULLs before and behind."""
    query = "SELECT NULL AS a, repeat('x', $1::int) AS b, NULL AS c, 'ü' AS d"
    for size in (0, 1, 127, 128, *range(215, 262), 65535):
        assert ask(loop, query, params=[str(size)]) == [{"a": None, "b": "x" * size, "c": None, "d": "ü"}]


def test_a_result_beyond_the_limit_is_an_error(loop, db, monkeypatch):
    monkeypatch.setattr(session, "RESULT_BYTES_MAX", 1_000_000)
    before = pid(loop)
    assert "over 1000000 bytes" in str(refused(loop, "SELECT repeat('x', 2000000)"))
    assert "over 1000000 bytes" in str(refused(loop, "SELECT repeat('x', 100) FROM generate_series(1, 100000)"))
    assert ask(loop, "SELECT length(repeat('x', 2000000)) AS a") == [{"a": "2000000"}]
    assert pid(loop) != before
    db.wait_quiet()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_messages_may_be_cut_anywhere(loop, postgresql, size):
    """The server's bytes arrive in pieces of `size`."""
    with Relay(postgresql.port, piece=size) as relay:
        declare(f"host=127.0.0.1 port={relay.port} user=kore dbname=hello sslmode=disable", conn_max=1)
        for _ in range(2):
            assert ask(loop, "SELECT n, NULL AS x FROM generate_series(1, 3) AS n") == [
                {"n": str(n), "x": None} for n in (1, 2, 3)
            ]
            assert refused(loop, "SELECT 1/0").sqlstate == "22012"


def test_what_is_no_utf8_is_an_error_of_that_query(loop, postgresql):
    """A database without an encoding takes any bytes, and gives them to nobody who wants UTF-8."""
    if postgresql.psql("SELECT count(*) FROM pg_database WHERE datname = 'ascii'") == "0":
        postgresql.psql("CREATE DATABASE ascii ENCODING SQL_ASCII TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    declare(postgresql.tcp.replace("dbname=hello", "dbname=ascii"), conn_max=1)
    before = pid(loop)
    assert refused(loop, "SELECT convert_from('\\xfc'::bytea, 'SQL_ASCII') AS a").sqlstate == "22021"
    assert ask(loop, "SELECT convert_from('\\x61'::bytea, 'SQL_ASCII') AS a") == [{"a": "a"}]
    assert pid(loop) == before
