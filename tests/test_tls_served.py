"""HTTP over TLS as clients see it: requests of every kind, names, versions, ends, on both engines."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess

import pytest

from tests.engines import ENGINES
from tests.support import wait_until
from tests.tls_harness import Bare, authority, client_context, everything, get, server_pair, tls_server

pytestmark = pytest.mark.parametrize("engine", ENGINES)

VERSIONS = ["1.2", "1.3"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["rsa2048", "p256"])
def test_requests_are_answered(tmp_path, engine, version, kind):
    pairs = [server_pair("a.test", kind).save(tmp_path / "a.pem")]
    with tls_server(tmp_path, engine, ("a.test", {"pairs": pairs})) as server:
        with server.connect(context=client_context(version)) as client:
            for _ in range(3):
                answer = client.ask(get())
                assert answer.body == b"hello world"
                assert answer.fields["strict-transport-security"] == "max-age=31536000; includeSubDomains"
            assert client.ask(get("/slow")).body == b"slow"
            assert client.ask(get("/mirror", method="POST", body=b"x" * 100000)).body == b"x" * 100000
            assert client.ask(get("/stream?30")).body == b"x" * 300000
            assert client.ask(get("/large")).body == bytes(range(256)) * 4096


def test_curl(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        (tmp_path / "ca.pem").write_bytes(authority().pem)
        done = subprocess.run(
            ["curl", "-sS", "--cacert", str(tmp_path / "ca.pem"), "--resolve", f"a.test:{server.port}:127.0.0.1",
             f"https://a.test:{server.port}/", f"https://a.test:{server.port}/slow"],
            capture_output=True, timeout=20, check=False)
        assert done.stdout == b"hello worldslow", done.stderr


def test_hsts_can_be_switched_off_and_chosen_by_the_application(tmp_path, engine):
    with tls_server(tmp_path, engine, options={"http_hsts_enable": 0}) as server, server.connect() as client:
        assert "strict-transport-security" not in client.ask(get()).fields


def test_pipelined_requests_share_records(tmp_path, engine):
    with tls_server(tmp_path, engine) as server, server.connect() as client:
        client.ask(get())
        client.send(get() * 50 + get("/slow") + get() * 50)
        assert [client.read().body for _ in range(101)] == [b"hello world"] * 50 + [b"slow"] + [b"hello world"] * 50


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_cut_at_every_byte(tmp_path, engine, version):
    with tls_server(tmp_path, engine) as server, Bare(server, client_context(version), 1) as client:
        client.write(get(), pieces=1)
        assert client.read_until(b"hello world")


# --- names -----------------------------------------------------------------------------------------------------


NAMES = ["a.test", "*.a.test", "b.test", "www.a.test"]


@pytest.fixture
def named(tmp_path, engine):
    """Four domains, each with a certificate of its name."""
    domains = [
        (name, {"pairs": [server_pair(name, "p256").save(tmp_path / f"{number}.pem")]})
        for number, name in enumerate(NAMES)
    ]
    with tls_server(tmp_path, engine, *domains) as server:
        yield server


@pytest.mark.parametrize(("asked", "domain"), [
    ("a.test", 0), ("A.TEST", 0), ("x.a.test", 1), ("x.y.a.test", 1), ("b.test", 2), ("www.a.test", 3),
    ("unknown.test", 0), (None, 0),
])  # fmt: skip
def test_the_name_asked_for_chooses_the_certificate(named, asked, domain):
    with named.connect(asked) as client:
        assert client.sock.getpeercert(True) == server_pair(NAMES[domain], "p256").chain[0]
        host = asked or "a.test"
        answer = client.ask(get("/name", host=host))
        expected = (404, b"") if asked == "unknown.test" else (200, NAMES[domain].encode())
        assert (answer.status, answer.body) == expected


def test_a_request_for_another_name_is_misdirected(named):
    with named.connect("a.test") as client:
        for _ in range(3):
            assert client.ask(get(host="b.test")).status == 421
            assert client.ask(get(host="a.test")).status == 200
            assert client.ask(get(host="A.test.:443")).status == 200
        client.send(get(host="a.test") * 2 + get(host="b.test") * 2 + get(host="a.test"))
        assert [client.read().status for _ in range(5)] == [200, 200, 421, 421, 200]
        assert client.ask(get("/mirror", host="b.test", method="POST", body=b"x")).status == 421
        assert client.ask(get(host="b.test", method="HEAD"), method="HEAD").status == 421
    with named.connect("x.a.test") as client:  # the same certificate, but not who was asked for
        assert client.ask(get(host="y.a.test")).status == 421
    with named.connect("b.test") as client:  # on another connection what was refused is fine
        assert client.ask(get(host="b.test")).status == 200


def test_who_asks_for_nobody_may_ask_for_anybody(named):
    with named.connect(None) as client:
        for name in ("b.test", "a.test", "x.a.test"):
            assert client.ask(get(host=name)).status == 200
        assert client.ask(get(host="unknown.test")).status == 404


# --- ends ------------------------------------------------------------------------------------------------------


def test_renegotiation_is_refused(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        process = subprocess.Popen(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", "-tls1_2", "-servername", "a.test"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        found = b""
        while b"Verify return code" not in found:
            found += os.read(process.stdout.fileno(), 65536)
        process.stdin.write(b"R\n")
        process.stdin.flush()
        rest = process.communicate(timeout=20)[0]
        assert b"no renegotiation" in rest, rest
        with server.connect() as client:
            assert client.ask(get()).body == b"hello world"


def test_the_server_says_goodbye(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        for version in VERSIONS:
            with server.connect(context=client_context(version)) as client:
                assert client.ask(get("/close")).body == b"bye"
                assert client.sock.recv(1) == b""  # an end without close_notify would raise


@pytest.mark.parametrize("path", ["/", "/slow", "/large", "/stream?30"])
def test_the_last_answer_is_whole_and_followed_by_goodbye(tmp_path, engine, path):
    """Also when it waits for a client that reads slowly, and when that has sent more, which is not answered."""
    with tls_server(tmp_path, engine) as server:
        with server.connect() as client:
            expected = client.ask(get(path)).body
        for more in (b"", b"", get() * 3):
            with server.connect() as client:
                client.send(get(path, "Connection: close") + more)
                wait_until(lambda sock=client.sock: select.select([sock], [], [], 0)[0], "it answers")
                answer = client.read()
                assert answer.body == expected
                assert answer.fields["connection"] == "close"
                assert client.sock.recv(1) == b""


def test_a_client_that_says_goodbye_is_answered_what_it_asked_for(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        for clean in (True, False):
            with Bare(server, client_context()) as client:
                client.write(get("/slow") + get(), goodbye=clean)
                client.sock.shutdown(socket.SHUT_WR)
                answer = client.read_until(b"hello world")
            assert b"slow" in answer, (clean, answer)


def test_a_client_that_leaves_without_a_word_is_forgotten(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        for version in VERSIONS:
            for _ in range(5):
                client = server.connect(context=client_context(version))
                client.ask(get())
                client.reset()
                client = server.connect(context=client_context(version))
                client.sock.detach()
        wait_until(lambda: server.ask("len(app.server.connections)") == "10", "those that were reset are gone")


def test_what_is_forged_ends_the_connection_with_an_alert(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        for version in VERSIONS:
            client = server.connect(context=client_context(version))
            client.ask(get())
            fd = client.sock.detach()
            with socket.socket(fileno=fd) as sock:
                sock.settimeout(20)
                sock.sendall(b"\x17\3\3\0\x40" + b"f" * 64)
                answer = everything(sock)
                assert answer[:1] == (b"\x15" if version == "1.2" else b"\x17"), answer
        with server.connect() as client:
            assert client.ask(get()).body == b"hello world"


# --- much ------------------------------------------------------------------------------------------------------


def test_a_slow_reader_of_a_large_response_costs_a_bounded_amount(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        with server.connect() as client:
            client.ask(get("/large"))
        before = server.rss_kib()
        with server.connect() as client:
            client.send(get("/large?32") + get("/large?32"))
            client.sock.recv(1)
            stuck = "sum(c.stuck_at is not None for c in app.server.connections)"
            wait_until(lambda: server.ask(stuck) == "1", "it does not take it")
            for _ in range(20):
                server.ask("1")
            # The plaintext of one response, 32 MiB, and a piece of it encrypted.
            assert server.rss_kib() - before < 32 * 1024 + 4096
            assert client.sock.recv(0) == b""
            head, _, body = _more(client, 32 * 1048576)
            assert head.startswith(b"TTP/1.1 200")
            assert body == bytes(range(256)) * 4096 * 32
            assert client.read().body == bytes(range(256)) * 4096 * 32


def _more(client, size: int) -> tuple[bytes, bytes, bytes]:
    data = bytearray()
    while b"\r\n\r\n" not in data:
        data += client.sock.recv(1024)
    head, between, body = bytes(data).partition(b"\r\n\r\n")
    body = bytearray(body)
    while len(body) < size:
        body += client.sock.recv(min(65536, size - len(body)))
    return head, between, bytes(body)


def test_pipelined_large_responses_to_a_fast_reader(tmp_path, engine):
    with tls_server(tmp_path, engine) as server, server.connect() as client:
        client.ask(get("/large"))
        before = server.rss_kib()
        client.send(get("/large?8") * 20)
        for _ in range(20):
            assert client.read().body == bytes(range(256)) * 4096 * 8
        assert server.rss_kib() - before < 40 * 1024


def test_an_upload_of_a_gibibyte_is_bounded_in_memory(tmp_path, engine):
    size = 1 << 30
    options = {"http_body_max": size, "http_body_disk_offload": 65536, "http_body_disk_path": str(tmp_path)}
    with tls_server(tmp_path, engine, options=options) as server, server.connect() as client:
        client.ask(get("/mirror", method="POST", body=b"x" * 60000))
        before = server.rss_kib()
        client.send(get("/size", f"Content-Length: {size}", method="POST"))
        piece = bytes(1 << 20)
        peak = 0
        for number in range(size // len(piece)):
            client.send(piece)
            if not number % 64:
                peak = max(peak, server.rss_kib())
        assert client.read().body == str(size).encode()
        assert peak - before < 16 * 1024


def test_websockets(tmp_path, engine):
    with tls_server(tmp_path, engine) as server, server.connect() as client:
        key = "dGhlIHNhbXBsZSBub25jZQ=="
        client.send(get("/ws", "Upgrade: websocket", "Connection: upgrade", f"Sec-WebSocket-Key: {key}",
                        "Sec-WebSocket-Version: 13"))
        answer = client.read()
        assert answer.status == 101
        assert answer.fields["strict-transport-security"]
        for size in (1, 125):
            client.send(bytes([0x82, 0x80 | size]) + bytes(4) + b"m" * size)
            assert client._exactly(2 + size) == bytes([0x82, size]) + b"m" * size
        client.send(bytes([0x82, 0x80 | 126]) + struct.pack("!H", 10000) + bytes(4) + b"n" * 10000)
        assert client._exactly(4 + 10000) == bytes([0x82, 126]) + struct.pack("!H", 10000) + b"n" * 10000
        client.send(b"\x88\x82\0\0\0\0\3\xe8")
        assert client._exactly(4) == b"\x88\2\3\xe8"
        assert client.rest() == b""
