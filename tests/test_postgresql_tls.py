"""TLS to the database: every sslmode, with certificates of our own, cancelling included."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from reactor_harness import run

import kore
from kore.clients.postgresql.errors import DatabaseError
from tests.postgresql_harness import PostgresServer, declare, loop
from tests.test_postgresql_pool import clean

__all__ = ["loop"]


class TlsServer(PostgresServer):
    """A server that takes TLS for "localhost", from clients with a certificate or without."""

    def secure(self) -> None:
        authority = trustme.CA()
        stranger = trustme.CA()
        self.root = self._keep("root.pem", authority.cert_pem)
        self.wrong_root = self._keep("wrong.pem", stranger.cert_pem)
        certificate = authority.issue_cert("localhost")
        self._keep("server.pem", *certificate.cert_chain_pems)
        self._keep("server.key", certificate.private_key_pem, secret=True)
        client = authority.issue_cert("kore@example.org", common_name="kore")
        self.client_certificate = self._keep("client.pem", *client.cert_chain_pems)
        self.client_key = self._keep("client.key", client.private_key_pem)
        (self.data / "pg_hba.conf").write_text(
            "local all all trust\n"
            "hostssl certonly all 127.0.0.1/32 cert\n"
            "host all all 127.0.0.1/32 trust\n"
        )

    def _keep(self, name: str, *pems: trustme.Blob, secret: bool = False) -> Path:
        path = self.directory / name
        path.write_bytes(b"".join(pem.bytes() for pem in pems))
        if secret:
            path.chmod(0o600)
            if self.account is not None:
                os.chown(path, self.account.pw_uid, self.account.pw_gid)
        return path


@pytest.fixture(scope="module")
def tls(postgresql: PostgresServer) -> Iterator[TlsServer]:
    postgresql.psql("CHECKPOINT")
    server = TlsServer(postgresql)
    try:
        server.secure()
        server.start(
            "ssl=on", f"ssl_cert_file={server.directory}/server.pem", f"ssl_key_file={server.directory}/server.key",
            f"ssl_ca_file={server.root}",
        )  # fmt: skip
        server.psql("CREATE DATABASE certonly")
        yield server
    finally:
        server.remove()


def string(server: PostgresServer, options: str) -> str:
    return f"host=localhost port={server.port} user=kore dbname=hello {options}"


SECURED = "SELECT ssl AS s FROM pg_stat_ssl WHERE pid = pg_backend_pid()"


@pytest.mark.parametrize(
    ("options", "secured"),
    [
        ("sslmode=disable", "f"),
        ("sslmode=allow", "f"),
        ("", "t"),
        ("sslmode=prefer", "t"),
        ("sslmode=require", "t"),
        ("sslmode=verify-ca sslrootcert={root}", "t"),
        ("sslmode=verify-full sslrootcert={root}", "t"),
        ("sslmode=verify-full sslrootcert={root} ssl_min_protocol_version=TLSv1.3", "t"),
    ],
)
def test_each_mode(loop, tls, options, secured):
    declare(string(tls, options.format(root=tls.root)))
    for _ in range(2):
        assert run(loop, kore.dbquery("db", SECURED)) == [{"s": secured}]
        assert run(loop, kore.dbquery("db", SECURED, typed=True)) == [{"s": secured == "t"}]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("sslmode=verify-ca sslrootcert={wrong_root}", "certificate verify failed"),
        ("sslmode=require sslrootcert={wrong_root}", "certificate verify failed"),
        ("sslmode=verify-full sslrootcert={root} host=127.0.0.1", "IP address mismatch"),
        ("sslmode=verify-full sslrootcert=/nowhere", "No such file"),
        ("sslmode=require dbname=certonly", "certificate"),
    ],
)
def test_what_must_not_be_trusted_is_refused(loop, tls, options, reason):
    declare(string(tls, options.format(root=tls.root, wrong_root=tls.wrong_root)))
    with pytest.raises(DatabaseError, match=reason):
        run(loop, kore.dbquery("db", "SELECT 1"))


def test_a_client_s_certificate_lets_in(loop, tls):
    files = f"sslcert={tls.client_certificate} sslkey={tls.client_key} sslrootcert={tls.root}"
    declare(string(tls, f"dbname=certonly sslmode=verify-full {files}"))
    assert run(loop, kore.dbquery("db", "SELECT current_user AS u")) == [{"u": "kore"}]


def test_a_server_without_tls_is_refused_where_it_is_required(loop, postgresql):
    declare(string(postgresql, "sslmode=require"))
    with pytest.raises(DatabaseError, match="rejected SSL upgrade"):
        run(loop, kore.dbquery("db", "SELECT 1"))
    declare(string(postgresql, "sslmode=prefer"), name="prefer")
    assert run(loop, kore.dbquery("prefer", "SELECT 1 AS a")) == [{"a": "1"}]


@pytest.mark.parametrize("typed", [False, True])
def test_cancelling_goes_over_tls_too(loop, tls, typed):
    declare(string(tls, "sslmode=require"), conn_max=1)

    async def leave() -> None:
        query = asyncio.ensure_future(kore.dbquery("db", "SELECT pg_sleep(3600)", typed=typed))
        await asyncio.to_thread(tls.wait_active, 1)
        query.cancel()
        await asyncio.gather(query, return_exceptions=True)

    before = run(loop, kore.dbquery("db", "SELECT pg_backend_pid()"))
    run(loop, leave())
    clean(loop)
    tls.wait_quiet()
    assert run(loop, kore.dbquery("db", "SELECT pg_backend_pid()")) == before


def test_large_results_over_tls(loop, tls):
    declare(string(tls, "sslmode=require"), conn_max=1)
    text = "ü" * 1_000_000
    assert run(loop, kore.dbquery("db", "SELECT $1 AS a", params=[text])) == [{"a": text}]
