"""The lifespan of an application in a worker: state, refusal to serve, shutdown, and what takes no part in it."""

from __future__ import annotations

import signal

import pytest

from tests.asgi_harness import mounting, start
from tests.http_server_harness import ENGINES, GET, request
from tests.support import skip_unless, starter

HELLO = '''
async def hello(send, body=b"hello"):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": body})
'''

APP = HELLO + '''
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        assert (await receive())["type"] == "lifespan.startup"
        said("startup")
        await asyncio.sleep(0.05)
        scope["state"].update(number=1, shared=[])
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        said("shutdown")
        await asyncio.sleep(0.05)
        said("shut down")
        await send({"type": "lifespan.shutdown.complete"})
        return
    scope["state"]["number"] += 1
    scope["state"]["shared"].append("x")
    if scope["path"] == "/slow":
        said("slow begins")
        await asyncio.sleep(0.5)
    if scope["path"] == "/never":
        said("never begins")
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            said("never ends")
    await hello(send, repr(scope["state"]).encode())

kore.asgi(app)
kore.asgi(app, path="/again")
'''


@pytest.mark.parametrize("engine", ENGINES)
def test_from_startup_to_shutdown(tmp_path, engine):
    """Once for an application mounted twice; before the first request, after the last; state is for requests."""
    with mounting(tmp_path, engine, APP) as server:
        out = server.program.out
        assert out.index("log=[startup]") < out.index("log=[ready")
        assert server.ask(GET).body == b"{'number': 2, 'shared': ['x']}"
        assert server.ask(request("/again")).body == b"{'number': 2, 'shared': ['x', 'x']}"
        with server.client() as client:
            client.send(request("/slow"))
            server.program.wait_for("slow begins")
            server.program.signal(signal.SIGTERM)
            assert client.read().status == 200
        assert server.program.wait() == 0
        out = server.program.out
        assert out.count("log=[startup]") == out.count("log=[shutdown]") == out.count("log=[shut down]") == 1
        assert "uncaught" not in out


@pytest.mark.parametrize("engine", ENGINES)
def test_what_does_not_end_is_cancelled(tmp_path, engine):
    """A request that never ends keeps the worker no longer than the time there is; its clean-up may await."""
    with mounting(tmp_path, engine, APP) as server:
        with server.client() as client:
            client.send(request("/never"))
            server.program.wait_for("never begins")
            server.program.signal(signal.SIGTERM)
            assert server.program.wait() == 0
        out = server.program.out
        assert "never ends" in out
        assert "uncaught" not in out
        assert "did not end in time" not in out


FAILURES = {
    "says": ('''await send({"type": "lifespan.startup.failed", "message": "no database"})''', "no database"),
    "raises": ('''raise OSError("no disk")''', r"OSError\('no disk'\)"),
    "suspends and raises": ('''await asyncio.sleep(0.01); raise OSError("no disk")''', r"OSError\('no disk'\)"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", FAILURES)
def test_a_startup_that_fails(tmp_path, engine, how):
    """The server does not start, and says why."""
    skip_unless(engine)
    code, reason = FAILURES[how]
    text = f"async def app(scope, receive, send):\n    await receive()\n    {code}\nkore.asgi(app)\n"
    with starter(tmp_path) as programs:
        server = start(programs, engine, text, wait=False)
        assert server.program.wait() != 0
        server.program.wait_for(rf"ASGI application app:app: startup failed: {reason}")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", ["raise ValueError('http only')", "return", "assert scope['type'] == 'http'"])
def test_applications_without_one(tmp_path, engine, what):
    """What raises before it asks for the first message, or returns, serves all the same and is not reported."""
    text = HELLO + f'''
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        {what}
    await hello(send)
kore.asgi(app)
'''
    with mounting(tmp_path, engine, text) as server:
        assert server.ask(GET).body == b"hello"
        server.program.signal(signal.SIGTERM)
        assert server.program.wait() == 0
        assert "uncaught" not in server.program.out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["says", "raises", "sleeps"])
def test_a_shutdown_that_fails(tmp_path, engine, how):
    """It is reported; one that takes too long is cancelled."""
    code = {
        "says": '''await send({"type": "lifespan.shutdown.failed", "message": "left a mess"})''',
        "raises": '''raise OSError("left a mess")''',
        "sleeps": '''
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            said("left a mess")''',
    }[how]
    text = HELLO + f'''
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({{"type": "lifespan.startup.complete"}})
        await receive()
        {code}
        return
    await hello(send)
kore.asgi(app)
'''
    with mounting(tmp_path, engine, text) as server:
        assert server.ask(GET).body == b"hello"
        server.program.signal(signal.SIGTERM)
        assert server.program.wait() == 0
        server.program.wait_for("left a mess")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["raises", "says and raises"])
def test_a_lifespan_that_ends_in_between(tmp_path, engine, how):
    """It is reported when it happens and once, whatever the application says of it; requests are served as before."""
    says = 'await send({"type": "lifespan.shutdown.failed", "message": "lost it"})' if how != "raises" else "pass"
    text = HELLO + f'''
lost = asyncio.Event()
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({{"type": "lifespan.startup.complete"}})
        await lost.wait()
        {says}
        raise OSError("lost it")
    lost.set()
    await hello(send)
kore.asgi(app)
'''
    with mounting(tmp_path, engine, text) as server:
        assert server.ask(GET).body == b"hello"
        server.program.wait_for(r"lifespan: uncaught exception: OSError\('lost it'\)")
        assert server.ask(GET).body == b"hello"
        server.program.signal(signal.SIGTERM)
        assert server.program.wait() == 0
        assert server.program.out.count("uncaught exception") == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_while_it_starts(tmp_path, engine):
    """It is cancelled, and the server ends at once."""
    skip_unless(engine)
    text = '''
async def app(scope, receive, send):
    await receive()
    said("startup begins")
    try:
        await asyncio.sleep(3600)
    finally:
        said("startup ends")
kore.asgi(app)
'''
    with starter(tmp_path) as programs:
        server = start(programs, engine, text, wait=False)
        server.program.wait_for("startup begins")
        server.program.signal(signal.SIGTERM)
        server.program.wait()
        server.program.wait_for("startup ends")
