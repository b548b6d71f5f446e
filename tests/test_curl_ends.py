"""Transfers that end before they are done: killed, cancelled, left by a client, stalled, and what is left of them.

Also what shares a worker with them: name servers that never answer, children, storms, the end of the loop.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transfer_harness import (
    ENGINES,
    answer,
    easies,
    limited,
    open_transfers,
    peer,
    run,
    socket_fds,
    sockets,
    stall,
    wait_until,
)

import kore
from kore.clients import transfers
from kore.version import __version__
from tests.http_server_harness import Client, serving
from tests.http_server_harness import request as http_request
from tests.support import READY, SECONDS, SERVER_APP, free_port, skip_unless, starter

pytest.importorskip("pycurl")


@pytest.fixture(params=ENGINES)
def loop(request):
    yield from open_transfers(request.param)


def turn_until(loop, holds, what: str) -> None:
    """Run the loop until something holds."""
    async def wait():
        end = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < end, f"never happened: {what}"
            await asyncio.sleep(0.002)

    loop.run_until_complete(wait())


def begun(loop, coro) -> tuple[object, list[BaseException | None]]:
    """A task of kore's for `coro`, and the list its end will be put into."""
    ends: list[BaseException | None] = []
    return loop.start(coro, ends.append), ends


# Kill and cancel.


def test_a_killed_transfer_closes_its_socket_at_once(loop):
    with peer(stall) as server:
        task, ends = begun(loop, kore.curl(server.url).run())
        turn_until(loop, lambda: server.requests, "the request is there")
        ours = sockets()
        task.kill()
        assert isinstance(ends[0], GeneratorExit)
        turn_until(loop, lambda: server.left == 1, "the server sees the end")
        assert sockets() < ours


def test_a_cancelled_transfer_closes_its_socket_at_once(loop):
    with peer(stall) as server:
        async def cancelled():
            task = asyncio.ensure_future(kore.httpclient(server.url).get())
            while not server.requests:
                await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        run(loop, cancelled())
        turn_until(loop, lambda: server.left == 1, "the server sees the end")


@pytest.mark.parametrize("turns", range(6))
def test_killed_and_cancelled_at_every_step(loop, turns):
    """Before the first step, after it, while it connects, after the answer has come but before anybody woke."""
    async def ends():
        for kill in (True, False):
            task = loop.start(kore.httpclient(server.url).get(), lambda _: None)
            for _ in range(turns):
                await asyncio.sleep(0)
            if kill:
                task.kill()
            else:
                task.cancel()
            with pytest.raises((asyncio.CancelledError, GeneratorExit)):
                assert await task == (200, b"GET /")
                raise GeneratorExit

        return await kore.httpclient(server.url).get()

    with peer() as server:
        assert run(loop, ends()) == (200, b"GET /")
        assert not transfers.of_loop(loop)._waiting


def test_a_handle_whose_run_was_killed_runs_again(loop):
    def reply(request, wire):
        return stall(request, wire) if len(server.requests) == 1 else answer(b"second")

    with peer(reply) as server:
        handle = kore.curl(server.url)
        task, _ = begun(loop, handle.run())
        turn_until(loop, lambda: server.requests, "the request is there")
        task.kill()
        assert run(loop, handle.run()) == b"second"


def test_a_transfer_abandoned_while_libcurl_calls_is_taken_out_afterwards(loop):
    """The collector may close a waiting coroutine at any allocation, so also while libcurl delivers data."""
    with peer(stall) as other, peer() as server:
        task, ends = begun(loop, kore.curl(other.url).run())
        turn_until(loop, lambda: other.requests, "the request is there")
        ours = transfers.of_loop(loop)

        class Killer(transfers.Sink):
            def write(self, data):
                assert ours._called
                task.kill()
                assert len(ours._abandoned) == 1
                return super().write(data)

        plain, transfers.Sink = transfers.Sink, Killer
        try:
            assert run(loop, kore.curl(server.url).run()) == b"GET /"
        finally:
            transfers.Sink = plain
        assert isinstance(ends[0], GeneratorExit)
        assert not ours._abandoned
        turn_until(loop, lambda: other.left == 1, "the other server sees the end")


def test_a_coroutine_that_the_collector_closes_leaves_nothing(loop):
    before = easies()
    with peer(stall) as server:
        def drop():
            coro = kore.curl(server.url).run()

            async def wait():
                coro.send(None)
                while not server.requests:
                    await asyncio.sleep(0.002)

            run(loop, wait())

        drop()
        gc.collect()
        turn_until(loop, lambda: server.left == 1, "the server sees the end")
        assert easies() == before


# Many.


@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm_of_a_thousand_killed_transfers(loop, seed):
    """In every state: waiting for a connection, connecting, sending, stalled, receiving; in random order."""
    chance = random.Random(seed)

    def reply(request, wire):
        number = int(request.target[1:])
        if number % 3 == 0:
            return answer(b"done")
        if number % 3 == 1:
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 1000)
        wire.until_left()
        return None

    with peer(reply) as server:
        ends = []
        tasks = []
        for number in range(1000):
            client = kore.httpclient(f"{server.url}/{number}")
            coro = client.post(body=b"x" * 5000) if number % 2 else client.get()
            tasks.append(loop.start(coro, ends.append))

        async def storm():
            order = list(tasks)
            chance.shuffle(order)
            for number, task in enumerate(order):
                if number % 7 == 0:
                    await asyncio.sleep(0)
                if number % 2:
                    task.kill()
                else:
                    task.cancel()
            while len(ends) < 1000:
                await asyncio.sleep(0)

        run(loop, storm())
        ours = transfers.of_loop(loop)
        assert len(ends) == 1000
        assert not ours._waiting
        assert not ours._abandoned
        assert run(loop, kore.httpclient(f"{server.url}/0").get()) == (200, b"done")
        turn_until(loop, lambda: len(server.open) <= transfers.CONNECTIONS_MAX, "the connections are gone")
        tasks.clear()


def test_no_more_than_so_many_connections_and_the_others_wait(loop, monkeypatch):
    monkeypatch.setattr(transfers, "CONNECTIONS_MAX", 5)
    most = 0

    def reply(request, _wire):
        nonlocal most
        most = max(most, len(server.open))
        return answer(request.target.encode())

    async def all_of_them():
        return await kore.gather(*(kore.curl(f"{server.url}/{number}").run() for number in range(40)))

    with peer(reply) as server:
        assert run(loop, all_of_them()) == [f"/{number}".encode() for number in range(40)]
        assert most <= 5
    with peer(stall) as server, limited(curl_timeout=1):
        # Those that wait for a connection wait no longer than those that have one.
        results = run(loop, all_of_them())
        assert all("libcurl error 28" in str(result) for result in results)


def test_idle_polls_and_timers_cost_nothing(loop):
    """A transfer that is done leaves neither a poll nor a timer that keeps the loop turning."""
    with peer() as server:
        run(loop, kore.curl(server.url).run())
        ours = transfers.of_loop(loop)
        assert not ours._polls
        turns = 0
        wait = loop.driver.wait

        def counted(timeout):
            nonlocal turns
            turns += 1
            return wait(timeout)

        loop.driver.wait = counted
        try:
            loop.run_until_complete(asyncio.sleep(0.3))
        finally:
            del loop.driver.wait
        assert turns < 10


# The end of the loop, and of the process.


def test_the_end_of_the_loop_ends_transfers(loop):
    with peer(stall) as server:
        task, ends = begun(loop, kore.curl(server.url).run())
        turn_until(loop, lambda: server.requests, "the request is there")
        loop.run_until_complete(loop.shutdown_asyncgens())
        turn_until(loop, lambda: ends, "the coroutine hears of it")
        assert isinstance(ends[0], asyncio.CancelledError)
        wait_until(lambda: server.left == 1, "the server sees the end")
        del task


def test_sockets_of_transfers_are_not_inherited_by_children(loop):
    with peer(stall) as server:
        task, _ = begun(loop, kore.curl(server.url).run())
        turn_until(loop, lambda: server.requests, "the request is there")
        code = "import os, sys; print(*[fd for fd in map(int, sys.argv[1:]) if os.path.exists(f'/proc/self/fd/{fd}')])"
        ours = [str(fd) for fd in socket_fds()]
        command = [sys.executable, "-c", code, *ours]
        shown = subprocess.run(
            command, close_fds=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS,
            check=True).stdout
        assert ours
        assert shown.split() == []
        task.kill()


# In a worker.

WORKER = '''
client = kore.httpclient("{url}")  # in the parent, before there are workers
handle = kore.curl("{url}")
handle.setopt(kore.CURLOPT_USERAGENT, "a handle of the parent")

@kore.route("/fetch", methods=["get"])
async def fetch(req):
    status, body = await client.get()
    req.response(status, body)

@kore.route("/handle", methods=["get"])
async def by_handle(req):
    req.response(200, await handle.run())

@kore.route("/itself", methods=["get"])
async def itself(req):
    port = req.request_header("x-port")
    answers = await kore.gather(*(kore.httpclient(f"http://127.0.0.1:{port}/pid").get() for _ in range(10)))
    req.response(200, b" ".join(body for status, body in answers))

@kore.route("/stuck", methods=["get"])
async def stuck(req):
    kore.log(kore.LOG_INFO, "stuck begins")
    try:
        await kore.curl("{url}/stuck").run()
    finally:
        kore.log(kore.LOG_INFO, "stuck ends")

@kore.route("/slow-name", methods=["get"])
async def slow_name(req):
    kore.log(kore.LOG_INFO, "name begins")
    try:
        await kore.httpclient("http://slow.example.org/").get()
    except RuntimeError as error:
        req.response(502, str(error))

@kore.route("/endless", methods=["get"])
async def endless(req):
    try:
        await kore.httpclient("{url}/endless").get()
    except RuntimeError as error:
        req.response(502, str(error))
'''


WORKER = "kore.config.sandbox_connect = 'any'\n" + WORKER


def served(request, wire):
    if request.target == "/stuck":
        return stall(request, wire)
    if request.target == "/endless":
        wire.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            wire.send(bytes(65536))
    return answer(b"from the other server")


@pytest.mark.parametrize("engine", ENGINES)
def test_handlers_transfer_and_clients_that_leave_end_that(engine, tmp_path: Path):
    with peer(served) as other, serving(tmp_path, engine, WORKER.replace("{url}", other.url)) as server:
        assert server.ask(http_request("/fetch")).body == b"from the other server"
        fds = server.fds()
        clients = [server.client().send(http_request("/stuck")) for _ in range(20)]
        server.program.wait_for("stuck begins", count=20)
        wait_until(lambda: len(other.requests) == 21, "all are under way")
        for client in clients:
            client.sock.close()
        server.program.wait_for("stuck ends", count=20)
        wait_until(lambda: other.left == 20, "the other server sees their ends")
        server.settle(fds)
        server.unharmed()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_made_in_the_parent_runs_in_every_worker(engine, tmp_path: Path):
    with peer(served) as other, starter(tmp_path) as start:
        skip_unless(engine)
        program = start.serve(WORKER.replace("{url}", other.url), workers=2, io=engine)
        pids = set()
        end = time.monotonic() + SECONDS
        while len(pids) < 2 and time.monotonic() < end:
            with Client(program.address) as client:
                for path in ("/fetch", "/handle", "/handle"):
                    assert client.ask(http_request(path)).body == b"from the other server"
                pids.add(client.ask(http_request("/pid")).body)
        assert len(pids) == 2
        assert {r.fields["user-agent"] for r in other.requests} == {f"kore/{__version__}", "a handle of the parent"}
        assert other.connections <= 2  # each worker has its own


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_asks_itself(engine, tmp_path: Path):
    """Nothing of a transfer blocks the worker, or it could not answer its own request."""
    with peer(served) as other, serving(tmp_path, engine, WORKER.replace("{url}", other.url)) as server:
        found = server.ask(http_request("/itself", f"X-Port: {server.address[1]}"))
        assert found.body.split() == [str(server.pid).encode()] * 10


@pytest.mark.parametrize("engine", ENGINES)
def test_the_options_of_the_application_are_the_limits(engine, tmp_path: Path):
    options = "kore.config.curl_timeout = 1\nkore.config.curl_recv_max = 300_000"
    with peer(served) as other, serving(tmp_path, engine, WORKER.replace("{url}", other.url), options) as server:
        before = server.rss_kib()
        found = server.ask(http_request("/endless"))
        assert found.status == 502
        assert b"300000 bytes" in found.body
        assert server.rss_kib() - before < 30 * 1024
        assert server.ask(http_request("/stuck")).status == 500
        server.program.wait_for("libcurl error 28")
        server.unharmed()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_that_is_stopped_in_the_middle_of_transfers_ends(engine, tmp_path: Path):
    with peer(served) as other, serving(tmp_path, engine, WORKER.replace("{url}", other.url)) as server:
        with server.client() as client:
            client.send(http_request("/stuck"))
            server.program.wait_for("stuck begins")
            wait_until(lambda: other.requests, "it is under way")
            os.kill(server.pid, 9)  # another worker takes its place, and its transfers are its own
            server.program.wait_for(r"died|killed|signal", 20)
        wait_until(lambda: other.left == 1, "the other server sees the end")
        wait_until(lambda: _answers(server), "the next worker serves")


def _answers(server) -> bool:
    try:
        return server.ask(http_request("/fetch")).body == b"from the other server"
    except (AssertionError, OSError):
        return False


# Name servers.


@pytest.mark.parametrize("engine", ENGINES)
def test_a_name_server_that_never_answers_stops_nobody(engine, tmp_path: Path):
    """In a mount namespace whose resolv.conf(5) names a server that takes questions and says nothing."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("no mount namespace (unshare -m): needs root")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        try:
            silent.bind(("127.9.9.9", 53))
        except OSError as error:
            pytest.skip(f"port 53 of 127.9.9.9: {error.strerror}")
        (tmp_path / "resolv.conf").write_text("nameserver 127.9.9.9\noptions timeout:25 attempts:1\n")
        (tmp_path / "run").mkdir()
        script = tmp_path / "kore.sh"
        script.write_text(
            f"#!/bin/sh\nmount --bind {tmp_path}/resolv.conf /etc/resolv.conf && exec {sys.executable} \"$@\"\n")
        script.chmod(0o755)
        with peer(served) as other:
            _silent(engine, tmp_path, [unshare, "-m", str(script)], other.url)


def _silent(engine: str, folder: Path, prefix: list[str], url: str) -> None:
    port = free_port()
    app = SERVER_APP.format(
        text=WORKER.replace("{url}", url), workers=1, options="kore.config.curl_timeout = 2", port=port,
        deployment="dev")
    (folder / "app.py").write_text(app)
    with starter(folder) as start:
        program = start.command(*prefix, "-m", "kore", "app.py", environment={"KORE_IO": engine})
        program.wait_for(READY)
        begun_at = time.monotonic()
        clients = [Client(("127.0.0.1", port)) for _ in range(30)]
        for client in clients:
            client.send(http_request("/slow-name"))
        program.wait_for("name begins", count=30)
        with Client(("127.0.0.1", port)) as other:
            for _ in range(20):
                asked_at = time.monotonic()
                assert other.ask(http_request("/")).body == b"hello"
                assert other.ask(http_request("/fetch")).body == b"from the other server"
                assert time.monotonic() - asked_at < 1.0
            for client in clients[:10]:
                client.sock.close()  # their transfers are killed; the threads go on asking
            for client in clients[10:]:
                found = client.read()
                assert found.status == 502
                assert b"http://slow.example.org/: " in found.body
                assert b"libcurl error 28" in found.body
                client.sock.close()
            assert time.monotonic() - begun_at < 15
            assert other.ask(http_request("/")).body == b"hello"
        # The end of the server does not wait for the threads either.
        stopped_at = time.monotonic()
        program.signal(15)
        assert program.wait() == 0
        assert time.monotonic() - stopped_at < 10
