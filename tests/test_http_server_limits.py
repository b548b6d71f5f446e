"""Options that bound or change what the server does: each on a server of its own."""

from __future__ import annotations

import contextlib
import re
import time

import pytest

from tests.http_server_harness import GET, Server, request, serving, since
from tests.support import READY, SECONDS, SERVER_APP, free_port, pids_of, starter, wait_until


@pytest.fixture
def start(tmp_path, engine):
    with contextlib.ExitStack() as stack:
        yield lambda text="", options="": stack.enter_context(serving(tmp_path, engine, text, options))


PAGES = """
@kore.route("/raise", domain=home, methods=["get"])
def fails(req):
    raise ValueError("x")

@kore.route("/own", domain=home, methods=["get"])
def own(req):
    req.response(404, b"own")

@kore.route("/ok", domain=home, methods=["get"])
def ok(req):
    req.response(200, None)
"""


def test_pretty_errors_are_pages_and_only_for_errors_without_a_body(start):
    server = start(PAGES, "kore.config.http_pretty_error = True\nkore.config.http_header_timeout = 1")
    page = "<!DOCTYPE html><html><head><title>{0}</title></head><body><h1>{0}</h1></body></html>"
    with server.client() as client:
        for path, text in (("/nothing", "404 Not Found"), ("/raise", "500 Internal Server Error")):
            found = client.ask(request(path))
            assert found.body.decode() == page.format(text)
            assert found.fields["content-type"] == "text/html; charset=utf-8"
            head = client.ask(request(path, method="HEAD"), "HEAD")
            assert head.fields["content-length"] == found.fields["content-length"]
        assert client.ask(request("/own")).body == b"own"
        assert client.ask(request("/ok")).body == b""
        assert client.ask(b"GET / HTTP/1.1\r\n\r\n").body.decode() == page.format("400 Bad Request")
        client.ended()
    with server.client() as client:
        assert client.ask(b"GET").body.decode() == page.format("408 Request Timeout")
    with server.client() as client:
        found = client.ask(request("/", "Content-Length: 9999999", method="HEAD"), "HEAD")
        assert found.status == 413
        client.ended()


def test_a_tracer_hears_instead_of_the_log(start):
    server = start(
        "def trace(kind, error, traceback):\n"
        "    kore.log(kore.LOG_INFO, f'traced {kind.__name__} {error} {traceback is not None}')\n"
        "kore.tracer(trace)\n"
        "@kore.route('^/raise/(.*)$', domain=home, methods=['get'])\n"
        "def fails(req, when):\n"
        "    if when == 'after':\n"
        "        req.response(200, b'answered')\n"
        "    raise ValueError(when)\n"
        "@kore.route('^/async/(.*)$', domain=home, methods=['get'])\n"
        "async def fails_later(req, when):\n"
        "    await kore.suspend(5)\n"
        "    fails(req, when)\n"
    )
    with server.client() as client:
        for path in ("raise", "async"):
            assert client.ask(request(f"/{path}/before")).status == 500
            assert client.ask(request(f"/{path}/after")).body == b"answered"
        client.alive()
    server.program.wait_for("traced ValueError before True", count=2)
    server.program.wait_for("traced ValueError after True", count=2)
    assert "uncaught" not in server.program.out


def test_more_handlers_at_a_time_than_allowed_are_answered_with_503(start):
    server = start(options="kore.config.http_request_limit = 3")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(5)]
        for client in clients[:3]:
            client.send(request("/slow"))
        server.program.wait_for("slow begins", count=3)
        for client in clients[3:]:
            assert client.ask(request("/slow")).status == 503
            client.alive()
        for client in clients[:3]:
            assert client.read().body == b"slow"
        assert clients[4].ask(request("/slow")).body == b"slow"


def test_no_more_connections_than_allowed_and_those_that_wait_are_served(start):
    """Beyond the limit clients wait in the listen queue, which costs the worker nothing."""
    most = 8
    server = start(options=f"kore.config.worker_max_connections = {most}")
    fds = server.fds()
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(server.client()) for _ in range(most)]
        for client in held:
            client.alive()
        waiting = [stack.enter_context(server.client()).send(GET) for _ in range(3 * most)]
        assert server.fds() - fds <= most + 3  # accepts that were under way
        before = server.cpu_s()
        waiting[-1].sock.settimeout(0.7)
        with pytest.raises(TimeoutError):
            waiting[-1].read()
        assert server.cpu_s() - before < 0.1
        for client in held:
            client.sock.close()
        for client in waiting:
            client.sock.settimeout(SECONDS)
            assert client.read().body == b"hello"
            assert server.fds() - fds <= most + 3
            client.sock.close()
    server.settle(fds)
    for _ in range(100):  # at the limit again and again
        with contextlib.ExitStack() as stack:
            for client in [stack.enter_context(server.client()) for _ in range(most + 2)]:
                client.send(GET).half_close()
    server.unharmed()
    assert "accept" not in server.program.out


def test_when_descriptors_run_out_clients_wait_and_the_worker_is_idle(tmp_path, engine):
    with starter(tmp_path) as programs:
        port = free_port()
        options = "kore.config.worker_max_connections = 10000"
        (tmp_path / "app.py").write_text(
            SERVER_APP.format(text="", workers=1, deployment="dev", port=port, options=options)
        )
        program = programs.python(
            "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)); "
            "os.execv(sys.executable, [sys.executable, '-m', 'kore', 'app.py'])",
            environment={"KORE_IO": engine},
        )
        program.wait_for(READY)
        server = Server(program, ("127.0.0.1", port), pids_of(program)[0])
        fds = server.fds()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(server.client()) for _ in range(150)]
            program.wait_for(r"server plain: accept: .*errno 24\); trying again")
            before = server.cpu_s()
            clients[-1].sock.settimeout(0.7)
            with pytest.raises(TimeoutError):
                clients[-1].ask(GET)
            assert server.cpu_s() - before < 0.1
            clients[0].alive()
            for client in clients[:-1]:
                client.sock.close()
            clients[-1].sock.settimeout(SECONDS)
            assert clients[-1].read().body == b"hello"
        server.settle(fds)
        assert len(re.findall("trying again", program.out)) == 1
        server.unharmed()


# --- the end of the server -------------------------------------------------------------------------------------


def test_idle_connections_do_not_delay_the_end(start):
    server = start()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(server.client()).alive()
        begin = time.monotonic()
        server.program.signal(15)
        assert server.program.wait() == 0
        assert since(begin) < 0.7


def test_the_end_waits_for_handlers_that_have_answered(start):
    server = start(
        "@kore.route('/goes-on', domain=home, methods=['get'])\n"
        "async def goes_on(req):\n"
        "    req.response(200, b'answered')\n"
        "    await kore.suspend(400)\n"
        "    kore.log(kore.LOG_INFO, 'went on')\n"
    )
    assert server.ask(request("/goes-on", "Connection: close")).body == b"answered"
    server.program.signal(15)
    assert server.program.wait() == 0
    assert "went on" in server.program.out


def test_a_request_on_its_way_is_answered_at_the_end(start):
    """On an idle connection and on a new one alike, and told that it was the last."""
    server = start()
    with server.client() as used, server.client() as fresh, server.client() as part:
        used.alive()
        part.send(GET[:10])
        wait_until(lambda: server.fds() > 3, "they are accepted")
        server.program.signal(15)
        server.program.wait_for("SIGTERM: stopping")
        for client in (used, fresh):
            try:
                found = client.ask(GET)
                while found.fields["connection"] != "close" and client is used:
                    found = client.ask(GET)  # the signal has not reached the worker yet
            except (AssertionError, ConnectionError):
                assert client is used, "a new connection is given half a second"
                continue  # idle ones are given 50 ms, which this machine may not have had
            assert (found.body, found.fields["connection"]) == (b"hello", "close")
            client.half_close().ended()
        found = part.ask(GET[10:])
        assert (found.body, found.fields["connection"]) == (b"hello", "close")
    assert server.program.wait() == 0
