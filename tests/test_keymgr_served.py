"""Handshakes with keys that another process holds: while it is killed, stopped, given other keys, and lied to."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from tests.keymgr_harness import ask, key_server, load
from tests.support import alive, skip_unless, wait_until
from tests.tls_harness import Pair, authority, client_context, issue, server_pair


@pytest.fixture
def server(tmp_path, engine):
    """Two workers, RSA and ECDSA, in the sandbox; afterwards it still serves, and stops cleanly."""
    with key_server(tmp_path, engine) as found:
        yield found
        with found.connect() as client:
            assert ask(client) == b"hello"
        found.program.signal(signal.SIGTERM)
        assert found.program.wait() == 0, found.program.out + found.program.err


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_handshakes_of_both_versions(server, version):
    with server.connect(version=version) as client:
        assert ask(client) == b"hello"
        assert ask(client) == b"hello"


def test_both_kinds_of_key(server):
    for kind, name in (("RSA", "rsa2048"), ("ECDSA", "p256")):
        assert server.shown(kind=kind) == server_pair("a.test", name).chain[0]


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_killed_key_manager_fails_no_handshake(server, version):
    """Under load: those that want a signature just then wait for its successor; what is established does not notice."""
    with server.connect() as established, load(server, threads=3, version=version) as clients:
        for _ in range(3):
            clients[0].more_done()
            manager = server.manager
            os.kill(manager, signal.SIGKILL)
            wait_until(lambda manager=manager: not alive(manager), "it is dead")
            assert ask(established) == b"hello"
            wait_until(lambda manager=manager: server.manager != manager, "another takes its place")
            clients[0].more_done()
    server.program.wait_for(r"the key manager \(pid \d+\) was killed by SIGKILL.*; another takes its place", count=3)
    server.program.wait_for("the key manager is there again", count=3)


def test_a_stopped_key_manager_keeps_no_client_from_being_served(server):
    """Connections that are established are served, although nobody signs; handshakes wait, and end well."""
    with server.connect() as established:
        os.kill(server.manager, signal.SIGSTOP)
        with load(server, threads=3) as clients:
            for _ in range(200):
                assert ask(established) == b"hello"
            assert not any(client.done for client in clients)
            os.kill(server.manager, signal.SIGCONT)
            clients[0].more_done()


MALFORMED = {
    "a decryption": ("rsa", 3, "bytes(256)", "no EMSA-PSS encoding"),
    "a hash of its own choice": ("rsa", 1, "bytes(32)", "no DigestInfo"),
    "an odd digest": ("ec", 0, "bytes(20)", "a digest of 20 bytes"),
    "a padding": ("ec", 1, "bytes(32)", "padding 1 with a key of kind ec"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_worker_that_asks_for_more_than_a_handshake_is_killed(server, what):
    """It is named with what it asked for, gets nothing, and the others go on."""
    kind, padding, block, reason = MALFORMED[what]
    code = f"return role.role.tls.link.sign(1, {kind!r}, {padding}, {block}).hex()"
    assert server.result(code) in ("killed: SIGKILL", "KeysUnavailable: the key manager is gone: end of the channel")
    server.program.wait_for(rf"worker \d \(pid \d+\) asks for what no honest worker asks for: .*{reason}")
    found = server.program.wait_for(rf"worker (\d) \(pid \d+\) is killed: it asked the key manager for .*{reason}")
    server.program.wait_for(rf"worker {found[1]} serves again")


FORGED = {
    "noise": "os.urandom(100)",
    "nothing but a kind": "b'\\1'",
    "an answer": "bytes((16,)) + bytes(40)",
    "a flood in one": "bytes((1,)) + bytes(60000)",
    "another domain": "Ask(1, 500, 'ec', 0, bytes(8), bytes(32)).message()",
    "a plain domain": "Ask(1, 0, 'ec', 0, bytes(8), bytes(32)).message()",
}


@pytest.mark.parametrize("what", FORGED)
def test_a_worker_that_forges_messages_is_killed(server, what):
    code = (
        "from kore.tls.messages import Ask\nlink = role.role.tls.link\n"
        f"link._socket.send({FORGED[what]})\nawait asyncio.sleep(30)"
    )
    assert server.result(code) == "killed: SIGKILL"
    server.program.wait_for(r"asks for what no honest worker asks for: ")


def test_a_new_pair_on_a_signal(server):
    """SIGUSR1 to the parent, under load: all workers show it, and no handshake fails."""
    old = server_pair("a.test", "p256")
    new = issue("a.test", kind="p256", issuer=authority())
    with load(server, threads=3) as clients, server.connect() as established:
        clients[0].more_done()
        assert server.shown(kind="ECDSA") == old.chain[0]
        server.put("a.test-p256", new)
        server.program.signal(signal.SIGUSR1)
        server.program.wait_for("domain a.test: a new ec pair is in use, until ")
        for _ in range(20):
            wait_until(lambda: server.shown(kind="ECDSA") == new.chain[0], "the new one is shown")
        clients[0].more_done()
        assert ask(established) == b"hello"
    assert server.shown(kind="RSA") == server_pair("a.test", "rsa2048").chain[0]


def test_a_new_pair_without_a_word(server):
    """Files that change are found; one after the other, as tools replace them."""
    new = issue("a.test", kind="rsa2048", issuer=authority())
    with load(server, threads=2, kind="RSA") as clients:
        clients[0].more_done()
        server.put("a.test-rsa2048", new, part="pem")
        server.put("a.test-rsa2048", new, part="key")
        server.program.wait_for("domain a.test: a new rsa pair is in use")
        wait_until(lambda: server.shown(kind="RSA") == new.chain[0], "it is shown")
        clients[0].more_done()


def spoil(server, what: str) -> str:
    """Spoil the pair on disk; what the log says."""
    path = server.keys / "a.test-p256.pem"
    match what:
        case "garbage":
            server.write(path.name, os.urandom(3000))
            return "a.test-p256.pem"
        case "half":
            server.put("a.test-p256", server_pair("b.test", "p256"), part="pem")
            return "the key does not belong to the certificate"
        case "missing":
            path.unlink()
            return "No such file or directory"
        case _:
            server.put("a.test-p256", issue("a.test", kind="p256", days=(-9, -1)))
            return "is not valid now"


@pytest.mark.parametrize("what", ["garbage", "half", "missing", "expired"])
@pytest.mark.parametrize("how", ["signal", "look"])
def test_a_spoiled_pair_changes_nothing(server, what, how):
    """What was good stays, the log says what is wrong and when it is looked at again, and a good one is taken."""
    good = server_pair("a.test", "p256")
    said = spoil(server, what)
    if how == "signal":
        server.program.signal(signal.SIGUSR1)
    server.program.wait_for(rf"domain a.test: .*{said}.*; the pair before stays .*looked at again when a file")
    for _ in range(4):
        assert server.shown(kind="ECDSA") == good.chain[0]
        assert server.shown(kind="RSA") == server_pair("a.test", "rsa2048").chain[0]
    mended = issue("a.test", kind="p256", issuer=authority())
    server.put("a.test-p256", mended)
    server.program.signal(signal.SIGUSR1)
    server.program.wait_for("a new ec pair is in use")
    wait_until(lambda: server.shown(kind="ECDSA") == mended.chain[0], "the mended one is shown")


def test_a_worker_that_is_started_again_has_all_of_it(server):
    """From the key manager, not from the parent."""
    for worker in server.workers_pids:
        os.kill(worker, signal.SIGKILL)
    server.program.wait_for("serves again", count=2)
    for _ in range(8):
        with server.connect() as client:
            assert ask(client) == b"hello"


def test_a_session_is_resumed_at_any_worker(server):
    """The masters of tickets come from the key manager, so all workers have the same."""
    context = client_context("1.2")
    session, seen = None, set()
    for _ in range(30):

        sock = socket.create_connection(("127.0.0.1", server.tls_port), timeout=20)
        with context.wrap_socket(sock, server_hostname="a.test", session=session) as client:
            assert client.session_reused == (session is not None)
            session = client.session
            seen.add(ask(client, "/pid"))
    assert len(seen) == 2


class Broken(Pair):
    """One whose key is none."""

    key_pem = b"nonsense"


PACED = "keymgr.SIGNATURES_PER_SECOND_MAX = 50"


def test_a_worker_that_asks_too_fast_is_kept_waiting(tmp_path, engine):
    """It is told of once, and the other worker does not notice."""
    with key_server(tmp_path, engine, early=PACED) as server:
        code = "return [len(role.role.tls.link.sign(1, 'ec', 0, bytes(32))) > 60 for _ in range(80)].count(True)"
        assert server.result(code) == "returned 80"
        said = r"worker \d \(pid \d+\) asks for more than 50 signatures a second: it is kept waiting"
        server.program.wait_for(said)
        with server.connect() as client:
            assert ask(client) == b"hello"
        assert server.program.out.count("kept waiting") == 1


def test_no_server_without_any_pair(tmp_path, engine):
    """At the first start that is an error; it says which file."""
    skip_unless(engine)
    broken = Broken(*server_pair("a.test", "p256"))
    with key_server(
        tmp_path, engine, kinds=("p256",), pairs={"a.test-p256": broken}, wait=r"log=\[goodbye\]"
    ) as server:
        assert server.program.wait() != 0
        server.program.wait_for("domain a.test: .*a.test-p256.key: .*there is no certificate to serve")
        server.program.wait_for("no domain has a certificate that can be served")


def test_one_bad_domain_stops_no_other(tmp_path, engine):
    broken = Broken(*server_pair("b.test", "p256"))
    with key_server(
        tmp_path, engine, kinds=("p256",), names=("a.test", "b.test"), pairs={"b.test-p256": broken}
    ) as server:
        server.program.wait_for("domain b.test: .*there is no certificate to serve")
        assert server.shown("a.test") == server_pair("a.test", "p256").chain[0]
        server.put("b.test-p256", server_pair("b.test", "p256"))
        server.program.signal(signal.SIGUSR1)
        wait_until(lambda: _shown(server, "b.test") == server_pair("b.test", "p256").chain[0], "it is served now")


def _shown(server, name: str) -> bytes:
    try:
        return server.shown(name)
    except OSError:
        return b""


@pytest.mark.parametrize("sandbox", ["yes", "no"])
def test_the_order_of_the_end(tmp_path, engine, sandbox):
    """The key manager ends after the workers, by itself: nothing is killed."""
    with key_server(tmp_path, engine, sandbox=sandbox) as server:
        manager = server.manager
        with server.connect() as client:
            assert ask(client) == b"hello"
            server.program.signal(signal.SIGTERM)
        assert server.program.wait() == 0
        assert not alive(manager)
        assert "killed" not in server.program.out
        assert "another takes its place" not in server.program.out


def test_the_key_manager_ends_with_its_parent(tmp_path, engine):
    with key_server(tmp_path, engine) as server:
        family = [server.manager, *server.workers_pids]
        server.program.signal(signal.SIGKILL)
        wait_until(lambda: not any(alive(pid) for pid in family), "nobody is left")
