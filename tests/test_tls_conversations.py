"""What clients may not say is answered with the right alert, what they may is served, and nobody else notices."""

from __future__ import annotations

import pytest

from tests import tls_conversations_client, tls_conversations_hello, tls_conversations_later, tls_conversations_served
from tests.support import alive, free_port, open_files, pids_of, skip_unless, starter, wait_until
from tests.tls_conversations import ROWS, Row
from tests.tls_harness import issue
from tests.tls_wire import Client, hello13

APP = """
import kore

kore.config.workers = 1
kore.config.deployment = "dev"
kore.server("tls", ip="127.0.0.1", port="{port}")
home = kore.domain("localhost", attach="tls", cert=("ec.pem", "rsa.pem"), key=("ec.key", "rsa.key"))

asking = kore.domain("clients.test", attach="tls", cert="ec.pem", key="ec.key", client_verify="clients.pem")

@kore.route("/", domain=asking, methods=["get"])
@kore.route("/", domain=home, methods=["get"])
def index(req):
    req.response(200, b"hello")
"""


PARTS = (tls_conversations_served, tls_conversations_hello, tls_conversations_later)


@pytest.fixture(params=["uring", "epoll"], scope="module")
def server(request, tmp_path_factory):
    """A server with keys of both kinds, and a connection of before everything that is said to it."""
    skip_unless(request.param)
    folder = tmp_path_factory.mktemp("conversations")
    for kind, name in (("p256", "ec"), ("rsa2048", "rsa")):
        issue("localhost", tls_conversations_client.NAME, kind=kind).save(folder / f"{name}.pem")
    (folder / "clients.pem").write_bytes(tls_conversations_client.clients().pem)
    port = free_port()
    with starter(folder) as start:
        program = start.app(APP.format(port=port), environment={"KORE_IO": request.param})
        program.address = ("127.0.0.1", port)
        with Client(port) as before:
            before.shake13(hello13(before.key))
            before.finish13()
            program.before = before
            yield program


def test_the_table_is_whole():
    """Every part of it has entered its rows, none twice."""
    assert len({row.name for row in ROWS}) == len(ROWS) > 150
    assert {part.__name__ for part in PARTS} <= {row.talk.__module__ for row in ROWS}


@pytest.mark.parametrize("row", [*ROWS, *tls_conversations_client.ROWS], ids=lambda row: row.name)
def test_it_is_answered_as_the_protocol_says(server, row: Row):
    """The conversation itself; the connection of before is served, by the same worker, which says nothing of it."""
    assert row.hold(server.address[1]) == ""
    server.before.ask()
    (worker,) = pids_of(server)
    assert alive(worker)
    assert "Traceback" not in server.out + server.err
    assert f"proc=[parent] log=[worker {worker}" not in server.out


def test_no_connection_is_left_behind(server):
    """Of all who were refused nobody holds a descriptor of the worker; only they come and go here."""
    (worker,) = pids_of(server)
    row = next(row for row in ROWS if row.name == "TLS 1.1 is refused")
    before = sockets(worker)
    for _ in range(100):
        assert row.hold(server.address[1]) == ""
    wait_until(lambda: sockets(worker) <= before, "the refused connections are closed")


def sockets(pid: int) -> int:
    return sum(name.startswith("socket:") for name in open_files(pid))
