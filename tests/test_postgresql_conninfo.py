"""Connection strings: what libpq documents is honoured or refused by name; files and environment complete them."""

from __future__ import annotations

import asyncio
import os
import pwd
from pathlib import Path

import pytest
from reactor_harness import run

import kore
from kore.clients.postgresql.conninfo import CONNECT_SECONDS, ConnectionInfo, parse
from kore.clients.postgresql.errors import DatabaseError
from kore.clients.postgresql.queries import databases
from kore.errors import ConfigurationError
from tests.postgresql_harness import PostgresServer, declare, loop

__all__ = ["loop"]

ME = pwd.getpwuid(os.geteuid()).pw_name


def understood(text: str, **environment: str) -> ConnectionInfo:
    return parse(text, environment)


def places(info: ConnectionInfo) -> list[tuple[str, int]]:
    return [(host.host, host.port) for host in info.hosts]


@pytest.mark.parametrize(
    ("text", "hosts", "user", "database", "password"),
    [
        ("host=/tmp dbname=hello", [("/tmp", 5432)], ME, "hello", None),
        ("  host = a  port=1 user\n=\tu dbname = 'd b' ", [("a", 1)], "u", "d b", None),
        (r"host=a user=u password='it\'s \\ ok'", [("a", 5432)], "u", "u", r"it's \ ok"),
        (r"host=a user=u password=it\'s\ ok", [("a", 5432)], "u", "u", "it's ok"),
        ("host=a user=u password='a=b'", [("a", 5432)], "u", "u", "a=b"),
        ("host=a user=u password='' dbname=''", [("a", 5432)], "u", "u", None),
        ("host=a user=first user=second", [("a", 5432)], "second", "second", None),
        ("host=a,b port=1,2 user=u", [("a", 1), ("b", 2)], "u", "u", None),
        ("host=a,b port=7 user=u", [("a", 7), ("b", 7)], "u", "u", None),
        ("host=a,/tmp port=,2 user=u", [("a", 5432), ("/tmp", 2)], "u", "u", None),
        ("hostaddr=10.0.0.1 user=u", [("10.0.0.1", 5432)], "u", "u", None),
        ("host=a,b hostaddr=10.0.0.1,10.0.0.2 user=u", [("10.0.0.1", 5432), ("10.0.0.2", 5432)], "u", "u", None),
        ("postgresql://a", [("a", 5432)], ME, ME, None),
        ("postgres://u@a/d", [("a", 5432)], "u", "d", None),
        ("postgresql://u:p@a:1/d", [("a", 1)], "u", "d", "p"),
        ("postgresql://u%40x:p%3A%2F%3F@a/d%20b", [("a", 5432)], "u@x", "d b", "p:/?"),
        ("postgresql://u@[::1]:7/d", [("::1", 7)], "u", "d", None),
        ("postgresql://u@a:1,b:2,[::2]/d", [("a", 1), ("b", 2), ("::2", 5432)], "u", "d", None),
        ("postgresql://u@%2Ftmp:7/d", [("/tmp", 7)], "u", "d", None),
        ("postgresql:///d?host=/tmp&port=7&user=u", [("/tmp", 7)], "u", "d", None),
        ("postgresql://u@a/d?password=p%26q&application_name=x", [("a", 5432)], "u", "d", "p&q"),
        ("postgresql://u@a?dbname=d", [("a", 5432)], "u", "d", None),
    ],
)
def test_strings_and_uris(text, hosts, user, database, password):
    info = understood(text)
    assert places(info) == hosts
    assert (info.user, info.database) == (user, database)
    assert {host.password for host in info.hosts} == {password}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("host", "missing '='"),
        ("host=a password='open", "missing '='"),
        ("host=a nonsense=1", "no option 'nonsense'"),
        ("Host=a", "no option 'Host'"),
        ("postgresql://a?nonsense=1", "no option 'nonsense'"),
        ("postgresql://a?user", "missing '='"),
        ("postgresql://a%zz/", "'%'"),
        ("postgresql://a%00/", "%00"),
        ("host=a port=x", "port"),
        ("host=a port=0", "port"),
        ("host=a port=65536", "port"),
        ("host=a,b port=1,2,3", "2 hosts, but 3 values for port"),
        ("host=a,b hostaddr=10.0.0.1", "2 hosts, but 1 values for hostaddr"),
        ("host=a hostaddr=10.0.0.1 sslmode=verify-full", "hostaddr"),
        ("host=@abstract", "abstract"),
        ("host=a sslmode=maybe", "allow, disable, prefer, require, verify-ca, verify-full"),
        ("host=a sslrootcert=system", "sslrootcert"),
        ("host=a channel_binding=require", "channel_binding='require'"),
        ("host=a gssencmode=require", "gssencmode"),
        ("host=a client_encoding=LATIN1", "client_encoding='LATIN1'"),
        ("host=a replication=database", "replication"),
        ("host=a requirepeer=postgres", "requirepeer is not offered"),
        ("host=a require_auth=scram-sha-256", "require_auth is not offered"),
        ("host=a sslcrldir=/x", "sslcrldir is not offered"),
        ("host=a sslsni=0", "sslsni"),
        ("host=a target_session_attrs=best", "target_session_attrs"),
        ("host=a connect_timeout=soon", "connect_timeout"),
        ("host=a keepalives_idle=x", "keepalives_idle"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(text, word):
    with pytest.raises(ConfigurationError) as caught:
        understood(text)
    assert word in str(caught.value)


def test_a_refusal_does_not_show_the_password():
    for text in ("host=a password='open", "host=a user=u password=hidden extra"):
        with pytest.raises(ConfigurationError) as caught:
            understood(text)
        assert "open" not in str(caught.value)
        assert "hidden" not in str(caught.value)
    assert "hidden" not in repr(understood("host=a user=u password=hidden"))


def test_every_option_libpq_has_is_known():
    """Taken from libpq itself, as it is installed here."""
    ctypes = pytest.importorskip("ctypes")
    try:
        libpq = ctypes.CDLL("libpq.so.5")
    except OSError as error:
        pytest.skip(f"no libpq: {error}")

    class Option(ctypes.Structure):
        _fields_ = [(name, ctypes.c_char_p) for name in ("keyword", "envvar", "compiled", "val", "label", "dispchar")]
        _fields_.append(("dispsize", ctypes.c_int))

    libpq.PQconndefaults.restype = ctypes.POINTER(Option)
    options = libpq.PQconndefaults()
    from kore.clients.postgresql.conninfo import _OPTIONS

    index = 0
    while options[index].keyword:
        name = options[index].keyword.decode()
        variable = options[index].envvar.decode() if options[index].envvar else None
        if name not in ("authtype", "tty"):  # without a meaning for twenty years
            assert name in _OPTIONS, name
            if variable not in (None, "PGREQUIRESSL"):
                assert _OPTIONS[name][0] == variable, name
        index += 1
    assert index > 30


def test_options_that_are_honoured():
    info = understood(
        "host=a user=u connect_timeout=7 application_name=app options='-c work_mem=64kB' target_session_attrs=standby "
        "load_balance_hosts=random keepalives=0 keepalives_idle=5 tcp_user_timeout=900 client_encoding=UTF8"
    )
    assert info.connect_seconds == 7
    assert info.server_settings == {"application_name": "app", "options": "-c work_mem=64kB"}
    assert info.target_session_attrs == "standby"
    assert info.shuffle
    assert info.keepalive == {"keepalives": 0, "keepalives_idle": 5, "tcp_user_timeout": 900}
    tls = understood("host=a sslmode=verify-ca sslrootcert=/x/y sslpassword='a&b'").tls
    assert tls == "postgresql://?sslmode=verify-ca&sslrootcert=%2Fx%2Fy&sslpassword=a%26b"
    assert understood("postgresql://a?ssl=true").tls == "postgresql://?sslmode=require"


@pytest.mark.parametrize(
    ("value", "seconds"), [("0", CONNECT_SECONDS), ("-1", CONNECT_SECONDS), ("1", 2), ("2", 2), ("90", 90)]
)
def test_connecting_always_has_a_limit(value, seconds):
    assert understood(f"host=a connect_timeout={value}").connect_seconds == seconds
    assert understood("host=a").connect_seconds == CONNECT_SECONDS


def test_the_name_that_the_server_shows():
    assert understood("host=a").server_settings["application_name"] == "kore"
    assert understood("host=a fallback_application_name=b").server_settings["application_name"] == "b"
    assert understood("host=a application_name=c fallback_application_name=b").server_settings[
        "application_name"] == "c"


def test_the_environment_completes_a_string():
    info = understood(
        "dbname=d", PGHOST="a,b", PGPORT="7", PGUSER="u", PGDATABASE="not", PGPASSWORD="p", PGSSLMODE="disable",
        PGAPPNAME="app", PGCONNECT_TIMEOUT="9", PGOPTIONS="-c a=b", PGTZ="UTC", PGDATESTYLE="German",
    )  # fmt: skip
    assert places(info) == [("a", 7), ("b", 7)]
    assert (info.user, info.database, info.hosts[0].password) == ("u", "d", "p")
    assert info.tls == "postgresql://?sslmode=disable"
    assert info.connect_seconds == 9
    assert info.server_settings == {
        "application_name": "app", "options": "-c a=b", "timezone": "UTC", "datestyle": "German",
    }  # fmt: skip
    with pytest.raises(ConfigurationError, match="from PGCHANNELBINDING"):
        understood("host=a", PGCHANNELBINDING="require")


def test_without_a_host_the_directories_of_sockets_are_tried():
    assert places(understood("port=1")) == [("/var/run/postgresql", 1)]


PASSWORDS = r"""
# a comment:5432:d:u:no
a:5432:d:u:first
a:*:*:u:it's \: and \\ and:more
*:5432:other:*:third
localhost:7:*:*:socket
"""


@pytest.mark.parametrize(
    ("text", "password"),
    [
        ("host=a user=u dbname=d", "first"),
        ("host=a user=u dbname=x", r"it's : and \ and:more"),
        ("host=b user=v dbname=other", "third"),
        ("host=b user=v dbname=d", None),
        ("host=/tmp port=7 user=v dbname=d", "socket"),
        ("host=a user=u dbname=d password=given", "given"),
        ("host=a hostaddr=10.0.0.1 user=u dbname=d", "first"),
    ],
)
def test_the_password_file(tmp_path, text, password):
    path = tmp_path / "passwords"
    path.write_text(PASSWORDS)
    path.chmod(0o600)
    assert understood(f"{text} passfile={path}").hosts[0].password == password
    assert understood(text, PGPASSFILE=str(path)).hosts[0].password == password
    path.rename(tmp_path / ".pgpass")
    assert understood(text, HOME=str(tmp_path)).hosts[0].password == password


def test_each_host_has_the_password_of_its_line(tmp_path):
    path = tmp_path / "passwords"
    path.write_text("a:*:*:*:for a\nb:*:*:*:for b\n")
    path.chmod(0o600)
    assert [host.password for host in understood(f"host=a,b,c passfile={path}").hosts] == ["for a", "for b", None]


def test_a_password_file_that_others_may_read_is_not_used(tmp_path, capsys):
    path = tmp_path / "passwords"
    path.write_text("*:*:*:*:seen\n")
    path.chmod(0o644)
    assert understood(f"host=a passfile={path}").hosts[0].password is None
    assert f"password file {path} is not used" in capsys.readouterr().err


SERVICES = """
# comment
[other]
host=no

[mine]
host=a
port=7
dbname = d
user=u
"""


def test_a_service_completes_a_string(tmp_path):
    path = tmp_path / ".pg_service.conf"
    path.write_text(SERVICES)
    for text, environment in (
        (f"service=mine user=v servicefile={path}", {}),
        ("service=mine user=v", {"PGSERVICEFILE": str(path)}),
        ("user=v", {"HOME": str(tmp_path), "PGSERVICE": "mine", "PGHOST": "not", "PGDATABASE": "not"}),
        (f"postgresql://v@?service=mine&servicefile={path}", {}),
    ):
        info = understood(text, **environment)
        assert (places(info), info.user, info.database) == ([("a", 7)], "v", "d")
    path.rename(tmp_path / "pg_service.conf")
    assert places(understood("service=mine", PGSYSCONFDIR=str(tmp_path))) == [("a", 7)]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[other]\n", "'mine' is in none of"),
        ("[mine]\nhost\n", "line 2: missing '='"),
        ("[mine]\nnonsense=1\n", "no option 'nonsense'"),
        ("[mine]\nservice=other\n", "cannot name another"),
    ],
)
def test_a_service_that_cannot_be_used(tmp_path, text, word):
    path = tmp_path / "services"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=word):
        understood(f"service=mine servicefile={path}")
    with pytest.raises(ConfigurationError, match="there is no such file"):
        understood(f"service=mine servicefile={tmp_path}/missing")


# dbsetup, and strings on a real server.


def test_dbsetup_keeps_the_first_string(loop, postgresql: PostgresServer):
    assert kore.dbsetup("db", postgresql.local) is True
    assert kore.dbsetup("db", "host=/nowhere") is True
    assert kore.dbsetup("db", "not even a string") is True
    assert run(loop, kore.dbquery("db", "SELECT 1 AS a")) == [{"a": "1"}]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ((1, "host=a"), TypeError), (("db", None), TypeError), (("db",), TypeError), (("db", "host=a", 1), TypeError),
        (("d\0b", "host=a"), ValueError), (("db", "host=a\0"), ValueError), (("db", "nonsense=1"), ValueError),
    ],
)  # fmt: skip
def test_dbsetup_refuses_at_the_call(arguments, kind):
    with pytest.raises(kind):
        kore.dbsetup(*arguments)
    assert not databases


def test_dbsetup_takes_its_limit_when_called(loop, postgresql):
    before = kore.config.pgsql_conn_max
    try:
        kore.config.pgsql_conn_max = 7
        kore.dbsetup("db", postgresql.local)
    finally:
        kore.config.pgsql_conn_max = before
    assert databases["db"].conn_max == 7
    assert databases["db"].queue_max() == kore.config.pgsql_queue_limit


@pytest.mark.parametrize(
    "form",
    [
        "host={directory} port={port} user=kore dbname=hello",
        "postgresql://kore@127.0.0.1:{port}/hello?sslmode=disable",
        "postgresql://kore@127.0.0.1:{port}/hello",
        "postgresql:///hello?host={directory}&port={port}&user=kore",
        "postgresql://kore@{quoted}:{port}/hello",
        "host=localhost hostaddr=127.0.0.1 port={port} user=kore dbname=hello sslmode=allow keepalives_idle=60",
    ],
)
def test_strings_that_connect(loop, postgresql, form):
    quoted = str(postgresql.directory).replace("/", "%2F")
    declare(form.format(directory=postgresql.directory, port=postgresql.port, quoted=quoted))
    assert run(loop, kore.dbquery("db", "SELECT current_database() AS d, current_user AS u")) == [
        {"d": "hello", "u": "kore"}
    ]


def test_what_a_string_sets_of_the_session_survives_its_reset(loop, postgresql, monkeypatch):
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")
    declare(f"{postgresql.local} options='-c work_mem=123kB'", conn_max=1)
    show = "SELECT current_setting('work_mem') AS m, current_setting('timezone') AS z"
    for _ in range(2):
        assert run(loop, kore.dbquery("db", show)) == [{"m": "123kB", "z": "Asia/Tokyo"}]
        run(loop, kore.dbquery("db", "SET work_mem = '1MB'"))


def test_a_password_from_the_file_lets_in(loop, postgresql, tmp_path: Path):
    path = tmp_path / "passwords"
    path.write_text("127.0.0.1:*:*:secret:pass word\n")
    path.chmod(0o600)
    declare(f"host=127.0.0.1 port={postgresql.port} user=secret dbname=hello passfile={path}")
    path.unlink()  # read when declared: a worker may not be allowed to
    assert run(loop, kore.dbquery("db", "SELECT 1 AS a")) == [{"a": "1"}]


def test_keepalives_the_kernel_refuses_leave_no_connection(loop, postgresql):
    declare(f"{postgresql.tcp} keepalives_idle=99999999")
    for _ in range(3):
        with pytest.raises(DatabaseError, match=r"no connection to 127\.0\.0\.1:\d+: .*Invalid argument"):
            run(loop, kore.dbquery("db", "SELECT 1"))
    postgresql.wait_connections(0)


def test_a_host_name_that_can_be_none_is_an_error_and_the_next_is_tried(loop, postgresql):
    name = "x" * 70
    declare(f"host={name} port=1 user=kore")
    with pytest.raises(DatabaseError, match=f"no connection to {name}:1: "):
        run(loop, kore.dbquery("db", "SELECT 1"))
    with pytest.raises(DatabaseError, match=f"no connection to {name}:1: "):
        run(loop, asyncio.wait_for(anext(kore.dblisten("db", "jobs")), 15))
    declare(postgresql.tcp.replace("host=", f"host={name},"), name="two")
    assert run(loop, kore.dbquery("two", "SELECT 1 AS a")) == [{"a": "1"}]


def test_keepalives_are_set_on_the_socket(loop, postgresql):
    import socket

    declare(f"{postgresql.tcp} keepalives_idle=61 keepalives_interval=7 keepalives_count=3 tcp_user_timeout=9000")
    run(loop, kore.dbquery("db", "SELECT 1"))
    (session,) = databases["db"].pool.sessions
    sock = session._transport.get_extra_info("socket")
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    for option, value in (("KEEPIDLE", 61), ("KEEPINTVL", 7), ("KEEPCNT", 3), ("USER_TIMEOUT", 9000)):
        assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}")) == value
