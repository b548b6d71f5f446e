"""Broadcasts over several workers: a thousand clients, every message exactly once, never to where it came from."""

from __future__ import annotations

import contextlib
import resource

import pytest

from tests.http_server_harness import ENGINES
from tests.support import skip_unless, starter
from tests.websocket_app import TEXT as APP
from tests.websocket_harness import PING, PONG, WsClient, frame

CLIENTS = 1000
MESSAGES = 10


@pytest.fixture
def descriptors():
    """Enough of them for both ends of all connections, where the hard limit allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CLIENTS + 200
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"RLIMIT_NOFILE: the hard limit is {hard}, less than {wanted}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_thousand_clients_on_two_workers(tmp_path, engine: str, descriptors) -> None:
    """kore-api.md 19 row 14: global broadcasts arrive once at everybody else, in the order of each source."""
    skip_unless(engine)
    options = f"kore.config.worker_max_connections = {CLIENTS}"
    with starter(tmp_path) as programs, contextlib.ExitStack() as opened:
        program = programs.serve(APP, workers=2, options=options, io=engine)
        clients = [opened.enter_context(WsClient(program.address, "/spread")) for _ in range(CLIENTS)]
        sources = clients[:: CLIENTS // MESSAGES]
        for number, source in enumerate(sources):
            for step in range(2):
                source.message(f"{number} {step}")
        for client in clients:
            expected = {f"{n} {step}" for n, source in enumerate(sources) for step in range(2) if source is not client}
            found = [client.text() for _ in expected]
            assert set(found) == expected
            for number in range(MESSAGES):
                mine = [text for text in found if text.startswith(f"{number} ")]
                assert mine == sorted(mine), "one source's messages in their order"
        for client in clients:
            client.send(frame(PING))
        for client in clients:
            assert client.read().op == PONG, "nothing came twice"
