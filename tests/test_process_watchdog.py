"""What keeps a worker's loop from turning is told of, once for each place, and nothing else is."""

from __future__ import annotations

import re

import pytest

from tests.http_server_harness import ENGINES, request, serving
from tests.support import wait_until

APP = """
import asyncio
import functools
import hashlib
import time

def block(seconds):
    time.sleep(seconds)

def compute():
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        hashlib.sha256(b"x" * 100).digest()

@kore.route("/plain", domain=home, methods=["get"])
def plain(req):
    block(0.6)
    req.response(200, b"done")

@kore.route("/coroutine", domain=home, methods=["get"])
async def coroutine(req):
    await asyncio.sleep(0.01)
    compute()
    req.response(200, b"done")

@kore.route("/callback", domain=home, methods=["get"])
async def callback(req):
    gone = asyncio.get_running_loop().create_future()
    def late():
        block(0.6)
        gone.set_result(None)
    asyncio.get_running_loop().call_soon(late)
    await gone
    req.response(200, b"done")

@kore.route("/waits", domain=home, methods=["get"])
async def waits(req):
    await kore.suspend(700)
    req.response(200, b"done")

@kore.route("/executor", domain=home, methods=["get"])
async def executor(req):
    await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.7)
    req.response(200, b"done")

@kore.route("/busy", domain=home, methods=["get"])
async def busy(req):
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        await asyncio.sleep(0)
    req.response(200, b"done")

def wrapped_one(_):
    block(0.6)

def wrapped_two(_):
    block(0.6)

def in_library(function):
    @kore.route(f"/{function.__name__}", domain=home, methods=["get"])
    async def wrapped(req):
        asyncio.get_running_loop().call_soon(functools.singledispatch(function), None)
        await kore.suspend(1)
        req.response(200, b"done")

in_library(wrapped_one)
in_library(wrapped_two)

@kore.route("/until", domain=home, methods=["get"])
def until(req):
    while not os.path.exists(req.query):
        pass
    req.response(200, b"done")
"""

TOLD = re.compile(r"log=\[(\w+)\(\) has kept the event loop of this worker for (\d+) ms.*? it is at (.*?); await")


def told(server) -> list[tuple[str, str, str]]:
    return TOLD.findall(server.program.out)


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("watchdog"), request.param, APP, "kore.config.http_request_ms = 20") as made:
        yield made


@pytest.mark.parametrize(("path", "name", "innermost"), [
    ("/plain", "plain", "block"), ("/coroutine", "coroutine", "compute"), ("/callback", "late", "block"),
])
def test_what_blocks_the_loop_is_told_of_once_with_its_lines(server, path, name, innermost):
    for _ in range(2):
        assert server.ask(request(path)).body == b"done"
    wait_until(lambda: [line for line in told(server) if line[0] == name], "a line about it")
    server.ask(request())
    lines = [line for line in told(server) if line[0] == name]
    assert len(lines) == 1
    assert 200 <= int(lines[0][1]) <= 700
    places = lines[0][2].split(" < ")
    assert re.fullmatch(rf"app\.py:\d+ {innermost}\(\)", places[0])
    assert re.fullmatch(rf"app\.py:\d+ {name}\(\)", places[-1])


@pytest.mark.parametrize("name", ["wrapped_one", "wrapped_two"])
def test_who_is_called_by_a_library_is_told_of_by_name(server, name):
    """Each on its own, though the library's function in front is the same."""
    assert server.ask(request(f"/{name}")).body == b"done"
    server.program.wait_for(rf"log=\[{name}\(\) has kept .* block\(\) < app\.py:\d+ {name}\(\) < functools\.py")


@pytest.mark.parametrize("path", ["/waits", "/executor", "/busy"])
def test_what_lets_the_loop_turn_is_not_told_of(server, path):
    before = told(server)
    assert server.ask(request(path)).body == b"done"
    assert server.ask(request("/plain")).body == b"done"  # it would have been told before this
    assert [line for line in told(server) if line not in before and line[0] != "plain"] == []


def test_it_is_told_of_while_it_blocks(server, tmp_path):
    path = tmp_path / "go"
    with server.client() as client:
        client.send(request(f"/until?{path}"))
        server.program.wait_for(r"log=\[until\(\) has kept the event loop")
        path.touch()
        assert client.read().body == b"done"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_watch_can_be_switched_off(tmp_path, engine):
    with serving(tmp_path, engine, APP, "kore.config.http_request_ms = 0") as server:
        server.ask(request("/plain"))
        assert told(server) == []
