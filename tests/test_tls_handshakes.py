"""Handshakes over real sockets: versions, protocols, resumption, and everything a client may send in their place."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import threading
import time

import pytest

from kore.tls.hello import HELLO_BYTES_MAX
from tests.engines import ENGINES
from tests.support import wait_until
from tests.test_tls_hello import hello, real_hello, records, sni
from tests.tls_harness import TlsServer, client_context, everything, get, raw, server_pair, tls_server

pytestmark = pytest.mark.parametrize("engine", ENGINES)

VERSIONS = ["1.2", "1.3"]


# --- protocols -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offered", "chosen"), [
    (["http/1.1"], "http/1.1"), (["h2", "http/1.1"], "http/1.1"), ([], None),
])  # fmt: skip
def test_alpn(tmp_path, engine, offered, chosen):
    context = client_context()
    context.set_alpn_protocols(offered)
    with tls_server(tmp_path, engine) as server, server.connect(context=context) as client:
        assert client.sock.selected_alpn_protocol() == chosen
        assert client.ask(get()).body == b"hello world"


@pytest.mark.parametrize("offered", [["h2"], ["acme-tls/1"], ["spdy/3", "h2"]])
def test_protocols_that_are_not_spoken_are_refused(tmp_path, engine, offered):
    context = client_context()
    context.set_alpn_protocols(offered)
    with tls_server(tmp_path, engine) as server, pytest.raises(ssl.SSLError, match="no application protocol"):
        server.connect(context=context)


def test_the_challenge_of_acme_is_shown_to_who_asks_for_it_alone(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        server.order("app.contexts.challenge(0, [app.pairs[0, 'ec'].chain[0]])")
        context = client_context()
        context.set_alpn_protocols(["acme-tls/1"])
        with server.connect(context=context) as client:
            assert client.sock.selected_alpn_protocol() == "acme-tls/1"
            client.ended()
        server.wait_for("the challenge certificate was shown")
        with server.connect() as client:
            assert client.ask(get()).body == b"hello world"
        server.order("app.contexts.challenge(0, None)")
        with pytest.raises(ssl.SSLError, match="no application protocol"):
            server.connect(context=context)


@pytest.mark.parametrize(("given", "offered"), [("1.3", "1.2"), ("1.2", "1.3")])
def test_versions(tmp_path, engine, given, offered):
    with tls_server(tmp_path, engine, tls={"version": given}) as server:
        with server.connect(context=client_context(given)) as client:
            assert client.ask(get()).body == b"hello world"
        with pytest.raises(ssl.SSLError, match="(?i)protocol.version"):
            server.connect(context=client_context(offered))


def test_the_server_prefers_the_quicker_cipher(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        for version, cipher in (("1.2", "ECDHE-ECDSA-AES128-GCM-SHA256"), ("1.3", "TLS_AES_128_GCM_SHA256")):
            with server.connect(context=client_context(version)) as client:
                assert client.sock.cipher()[0] == cipher


def test_old_versions_and_weak_ciphers_are_refused(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        for arguments in (["-tls1_1"], ["-tls1"], ["-tls1_2", "-cipher", "AES128-SHA:ECDHE-ECDSA-AES128-SHA"]):
            if "-cipher" not in arguments:
                arguments = [*arguments, "-cipher", "DEFAULT@SECLEVEL=0"]
            done = subprocess.run(
                ["openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", *arguments],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
            assert done.returncode, arguments
            assert b"alert" in done.stderr, done.stderr


# --- resumption ------------------------------------------------------------------------------------------------


def session_of(server: TlsServer, context: ssl.SSLContext, name: str = "a.test") -> ssl.SSLSession:
    with server.connect(name, context) as client:
        client.ask(get(host=name))
        return client.sock.session


@pytest.mark.parametrize("version", VERSIONS)
def test_sessions_are_resumed_at_another_worker_and_never_at_another_domain(tmp_path, engine, version):
    names = ["a.test", "b.test"]
    domains = [(name, {"pairs": [server_pair(name, "p256").save(tmp_path / f"{name}.pem")]}) for name in names]
    master = os.urandom(32)
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    with (
        tls_server(tmp_path / "one", engine, *domains, tickets=[master]) as one,
        tls_server(tmp_path / "two", engine, *domains, tickets=[master]) as two,
    ):
        context = client_context(version)
        session = session_of(one, context)
        asked = two.ask("app.keys.asked")
        with two.connect("a.test", context, session) as client:
            assert client.sock.session_reused
            assert client.ask(get()).body == b"hello world"
        assert two.ask("app.keys.asked") == asked  # without a signature
        with two.connect("b.test", context, session) as client:
            assert not client.sock.session_reused
        # New masters: the old one is still known, and no more when it is gone.
        two.order("app.contexts.tickets([os.urandom(32), app.config['tickets'][0]])")
        with two.connect("a.test", context, session) as client:
            assert client.sock.session_reused
        session = session_of(two, context)
        with two.connect("a.test", context, session) as client:
            assert client.sock.session_reused
        two.order("app.contexts.tickets([os.urandom(32)])")
        with two.connect("a.test", context, session) as client:
            assert not client.sock.session_reused


# --- what is no handshake ----------------------------------------------------------------------------------------


def test_a_request_in_clear_text_is_told_so(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        for data in (b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n", b"P", b"OPTIONS"):
            with raw(server) as sock:
                sock.sendall(data)
                answer = everything(sock)
            assert answer.startswith(b"HTTP/1.1 400 "), answer
            assert b"https://" in answer
        with server.connect() as client:
            assert client.ask(get()).body == b"hello world"


ALERT = re.compile(rb"\x15\x03.\x00\x02\x02(.)", re.DOTALL)


@pytest.mark.parametrize(("data", "alerts"), [
    (records(hello(sni(b"a.test"))[:-1]) + records(b"\1"), {40, 50, 70, 109}),  # a ClientHello that cannot be agreed on
    (records(hello(sni(b"a", b"b"))), {50, 112}),
    (records(hello(b"\0\0\0\5abc")), {50}),
    (b"\x16\3\1\0\0", {10, 50}),
    (b"\x15\3\1\0\2\1\0", {10}),
    (b"\x17\3\3\0\1x", {10}),
    (b"\x16\3\1\xff\xff" + b"x" * 65535, {22, 10, 50}),
    (records(b"\1" + (HELLO_BYTES_MAX + 1).to_bytes(3, "big")), {50}),
    (b"\xff" * 100, {70, 10, 50}),
    (b"\x80\x2e\1\0\2" + b"x" * 100, {70, 10, 50, 47}),
])  # fmt: skip
def test_hostile_hellos_are_refused_with_an_alert_at_any_cut(tmp_path, engine, data, alerts):
    with tls_server(tmp_path, engine) as server:
        for cut in (0, 1, 4, 5, 6, 9, len(data) // 2):
            with raw(server) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    sock.sendall(data[:cut])
                    sock.sendall(data[cut:])
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # refused before it was whole
                answer = everything(sock)
            found = {match[1][0] for match in ALERT.finditer(answer)}
            assert found <= alerts, (cut, answer)
            assert not answer or found, answer
        with server.connect() as client:
            assert client.ask(get()).body == b"hello world"


def test_random_bytes_and_broken_handshakes_end_nobody_else(tmp_path, engine):
    with tls_server(tmp_path, engine) as server, server.connect() as other:
        good = real_hello("a.test")
        for at in range(0, len(good), 7):
            with raw(server) as sock:
                sock.sendall(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
                sock.shutdown(socket.SHUT_WR)
                everything(sock)
            if not at % 70:
                assert other.ask(get()).body == b"hello world"
        with raw(server) as sock:  # a ClientHello, then garbage in the place of the rest
            sock.sendall(good)
            assert sock.recv(65536)
            sock.sendall(b"\x17\3\3\0\x20" + b"g" * 32)
            everything(sock)  # there is an end
        assert other.ask(get()).body == b"hello world"


def test_slow_handshakes_have_a_deadline(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        begin = time.monotonic()
        socks = [raw(server) for _ in range(4)]
        socks[1].sendall(real_hello("a.test")[:50])
        socks[2].sendall(real_hello("a.test"))  # and never goes on
        dripping = threading.Event()

        def drip() -> None:
            for byte in real_hello("a.test"):
                try:
                    socks[3].sendall(bytes([byte]))
                except OSError:
                    break
                if dripping.wait(0.25):
                    break

        thread = threading.Thread(target=drip)
        thread.start()
        for sock in socks:
            everything(sock)
            sock.close()
        assert 8 < time.monotonic() - begin < 16
        dripping.set()
        thread.join()
        with server.connect() as other:
            assert other.ask(get()).body == b"hello world"


def test_a_server_that_stops_does_not_wait_for_who_never_speaks(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        with raw(server) as silent, raw(server) as half, server.connect() as client:
            half.sendall(real_hello("a.test"))
            assert half.recv(1)
            client.ask(get())
            begin = time.monotonic()
            server.order("app.server.drain(lambda: print('drained', flush=True))")
            server.wait_for("drained")
            assert time.monotonic() - begin < 8  # seconds before their deadline
            everything(silent)
            everything(half)


def test_half_open_handshakes_are_bounded_in_number_and_memory(tmp_path, engine):
    options = {"worker_max_connections": 1500}
    with tls_server(tmp_path, engine, options=options) as server:
        with server.connect() as client:
            client.ask(get())
        before = server.rss_kib()
        opening = real_hello("a.test")
        socks = []
        for _ in range(1490):
            sock = raw(server)
            sock.sendall(opening)
            socks.append(sock)
        for sock in socks:
            assert sock.recv(1)
        grown = (server.rss_kib() - before) / len(socks)
        assert grown < 80, grown  # KiB each: what OpenSSL keeps in the middle of a handshake
        with server.connect() as client:
            assert client.ask(get()).body == b"hello world"
        for sock in socks:
            sock.close()
        wait_until(lambda: int(server.ask("len(app.server.connections)")) <= 1, "all of them are gone")


# --- keys that are away ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("groups", ["X25519:P-256", "P-521:P-384:P-256"])  # the second: a HelloRetryRequest in TLS 1.3
def test_a_handshake_waits_for_keys_that_come_back(tmp_path, engine, version, groups):
    with tls_server(tmp_path, engine) as server:
        server.order("app.keys.process.kill()")
        processes = [
            subprocess.Popen(
                ["openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", "-servername", "a.test", "-groups",
                 groups, f"-tls{version.replace('.', '_')}", "-quiet", "-ign_eof"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(20)
        ]
        wait_until(lambda: server.ask("len(app.server.services[0].parked)") == "20", "all of them wait")
        assert server.ask("app.keys.available") == "False"
        server.order("app.restart_keys()")
        for process in processes:
            process.stdin.write(get("/close"))
            process.stdin.flush()
            out, err = process.communicate(timeout=20)
            assert out.endswith(b"bye"), err
        assert server.ask("len(app.server.services[0].parked)") == "0"


def test_resumption_needs_no_keys(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        context = client_context()
        session = session_of(server, context)
        server.order("app.keys.process.kill()")
        with server.connect("a.test", context, session) as client:
            assert client.sock.session_reused
            assert client.ask(get()).body == b"hello world"


def test_a_certificate_that_comes_while_handshakes_wait_is_the_one_they_get(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        new = server_pair("new.test", "rsa2048")
        new.save(tmp_path / "new.pem")
        server.order("app.keys.process.kill()")
        found = []

        def connect() -> None:
            with server.connect() as client:
                found.append(client.sock.getpeercert(True))

        thread = threading.Thread(target=connect)
        thread.start()
        wait_until(lambda: server.ask("len(app.server.services[0].parked)") == "1", "it waits")
        server.order(f"app.exchange({str(tmp_path / 'new.pem')!r})")
        thread.join()
        assert found == [new.chain[0]]


def test_handshakes_that_wait_have_their_deadline_too(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        server.order("app.keys.process.kill()")
        with raw(server) as sock:
            sock.sendall(real_hello("a.test"))
            assert everything(sock) == b""
        assert server.ask("len(app.server.services[0].parked)") == "0"


def test_a_key_that_is_refused_fails_the_handshake_and_is_told(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        server.order("app.keys.sign = None")
        with pytest.raises(ssl.SSLError, match="(?i)internal error"):
            server.connect()
        server.wait_for("domain a.test: a handshake failed for want of a signature: 'NoneType' object is not callable")


def test_a_domain_without_a_certificate_ends_no_other(tmp_path, engine):
    domains = [("a.test", {"pairs": [server_pair("a.test", "p256").save(tmp_path / "a.pem")]}), ("b.test", {})]
    with tls_server(tmp_path, engine, *domains) as server:
        with pytest.raises(ssl.SSLError, match="(?i)internal error"):
            server.connect("b.test")
        server.wait_for("domain b.test: there is no certificate for it yet")
        with server.connect() as client:
            assert client.ask(get()).body == b"hello world"
        server.order("app.contexts.certificates(0, [[b'nonsense']])")
        server.wait_for("the last state stays")
        with server.connect() as client:
            assert client.ask(get()).body == b"hello world"
