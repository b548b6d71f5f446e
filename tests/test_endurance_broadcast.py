"""The proof on broadcasts, small, and that its judgement is one: each thing that must not happen is shown to it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from tests.endurance import broadcast
from tests.endurance.broadcast_clients import Journal, Sent
from tests.endurance.report import Result, Unavailable, silent

CLIENTS = 50


@pytest.mark.parametrize("io", ["uring", "epoll"])
def test_every_broadcast_comes_once_to_everybody_else(io: str) -> None:
    """The proof itself, with fifty clients; both workers are killed once."""
    try:
        result = broadcast.prove(io, clients=CLIENTS, messages=100, kills=2, seed=7, progress=silent)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not result.failed, result.text()
    assert result.figures["kills"] == 2
    assert result.figures["clients"] > CLIENTS  # some came again
    assert result.figures["local"] > 50
    assert result.figures["arrived"] > 50 * CLIENTS


def client(number: int, pid: int, got: list[int], first: int = 0, lost: bool = False):
    return SimpleNamespace(number=number, pid=pid, got=got, first=first, lost=lost)


@pytest.fixture
def run():
    """Four clients on processes 10 and 20; of 10, which was killed, messages 4 and 5 were under way."""
    program = SimpleNamespace(out="", err="")
    server = SimpleNamespace(pids=[10, 20], program=program, death_lines=["one"], worker_lines=[])
    run = broadcast.Run(server, 4, 1, Result("broadcast", "x"), silent)
    run.journal = Journal(random.Random(1))
    run.journal.sent = [
        Sent(number, source, 10 if source < 2 else 20, scope, 1, b"")
        for number, (source, scope) in enumerate([(0, "G"), (1, "L"), (2, "G"), (2, "L"), (0, "G"), (1, "G"), (3, "G")])
    ]
    run.killed = {10: 4}
    run.clients = [
        client(0, 10, [1, 2], lost=True), client(1, 10, [0, 2, 4], lost=True),
        client(2, 20, [0, 4, 6]), client(3, 20, [0, 2, 3, 4]),
    ]
    return run


def failures(run) -> str:
    run.judge()
    return "\n".join(run.result.failures)


def test_what_may_happen_is_accepted(run) -> None:
    """Message 4 came to all of the other worker, 5 to none; who joined later need not have what was before."""
    run.clients.append(client(4, 30, [6], first=6))
    assert failures(run) == ""
    assert run.result.figures["of_killed_and_lost"] == 1


@pytest.mark.parametrize(("at", "got", "what"), [
    (2, [0, 4, 6, 6], "got message 6 2 times"),
    (2, [0, 4, 6, 2], "got its own message 2"),
    (2, [0, 4, 6, 1], "which was for process 10 only"),
    (2, [4, 0, 6], "got message 0 after 4 of the same client"),
    (2, [0, 4], "did not get 1 messages: [6]"),
    (3, [0, 2, 4], "did not get 1 messages: [3]"),
    (0, [1], "did not get 1 messages: [2]"),
    (2, [0, 6], "came to 1 of the 2 clients of process 20"),
    (3, [0, 2, 3, 4, 5], "message 5 of the killed process 10 came to 1 of the 2"),
])
def test_what_must_not_happen_is_a_failure(run, at: int, got: list[int], what: str) -> None:
    """Twice, back to its source, beyond its scope, out of order, not at all, or by halves."""
    run.clients[at].got = got
    assert what in failures(run)


def test_lost_connections_and_complaints_are_failures(run) -> None:
    """A survivor's client that was thrown out, a frame that is none, a death that nobody caused."""
    run.clients[3].lost = True
    run.journal.wrong.append("client 3: a frame")
    run.server.death_lines.append("two")
    run.server.worker_lines.append("oh")
    text = failures(run)
    for what in ("nobody killed its worker", "client 3: a frame", "1 kills, 2 reports", "complaints"):
        assert what in text


def test_too_few_descriptors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a process may not have a thousand connections, the proof says so."""
    monkeypatch.setattr(broadcast.resource, "getrlimit", lambda _: (1024, 1024))
    with pytest.raises(Unavailable, match="RLIMIT_NOFILE"):
        broadcast.provide_descriptors(1000)
