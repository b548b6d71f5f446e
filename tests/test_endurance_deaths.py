"""The proof on deaths, short, and that its judgement is one: each thing that must not happen is shown to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.endurance import deaths
from tests.endurance.deaths import Broken, Kill
from tests.endurance.report import Result, Unavailable, silent

REPORT = "t proc=[parent] log=[worker 1 (pid 10) was killed by SIGKILL, by hand, while serving * /ping, after 5.0 s, x]"


@pytest.mark.parametrize("io", ["uring", "epoll"])
def test_killed_workers_take_only_their_own_connections_along(io: str) -> None:
    """The proof itself, short."""
    try:
        result = deaths.prove(io, kills=2, progress=silent)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not result.failed, result.text()
    assert result.figures["kills"] == 6  # four of them with queued connections
    assert result.figures["queued_answered"] == 3 * deaths.QUEUED


@pytest.fixture
def run(tmp_path):
    """A run in which process 10 was killed at time 100, with the connection of port 1, and SIGTERM came at time 200."""
    journal = tmp_path / "journal"
    journal.write_text("".join(f"20 {number}\n" for number in range(1, 51)))
    program = SimpleNamespace(out="", err="", pid=1)
    server = SimpleNamespace(
        address=("", 0), pids=[10, 20], program=program, journal=journal, death_lines=[REPORT], worker_lines=[])
    run = deaths.Run(server, 1, Result("deaths", "x"), silent)
    run.kills = [Kill(10, 100.0, {1}, 5.0)]
    run.stopped_at = 200.0
    run.load.seen.pids = {10, 20}
    run.load.seen.answered = set(range(1, 51))
    run.load.seen.broken = [Broken(1, 10, 100.1, 99)]
    return run


def failures(run) -> str:
    run.judge()
    return "\n".join(run.result.failures)


def test_what_may_happen_is_accepted(run) -> None:
    """The connections of the killed break, accepted but not yet answered ones too; after SIGTERM others do."""
    run.load.seen.broken += [Broken(1, 0, 100.1, 98), Broken(7, 0, 200.1, 97), Broken(8, 20, 200.1, 96)]
    run.load.seen.refused = [201.0]
    assert failures(run) == ""


@pytest.mark.parametrize(("broken", "what"), [
    (Broken(2, 0, 100.1, 98), "lost out of the queue"),
    (Broken(2, 10, 100.1, 98), "lost out of the queue"),
    (Broken(1, 20, 100.1, 98), "no kill of its process"),
    (Broken(1, 0, 99.9, 98), "no kill of its process"),
    (Broken(1, 0, 150.0, 98), "no kill of its process"),
])
def test_other_connections_may_not_break(run, broken: Broken, what: str) -> None:
    """Neither those of a survivor, nor those that nobody had accepted, nor at another time."""
    run.load.seen.broken.append(broken)
    assert what in failures(run)


def test_refusals_wrong_answers_and_unanswered_requests_are_failures(run) -> None:
    """What a client sees, and what it does not see."""
    run.load.seen.refused = [150.0]
    run.load.seen.wrong = ["request 3: Bad"]
    run.load.seen.answered.remove(50)
    text = failures(run)
    assert "refused before SIGTERM" in text
    assert "request 3: Bad" in text
    assert "[(50, 20)]" in text


@pytest.mark.parametrize(("line", "what"), [
    (None, "no report of the death"),
    (REPORT.replace("SIGKILL", "SIGSEGV"), "no report of the death"),
    (REPORT.replace("pid 10", "pid 11"), "no report of the death"),
    (REPORT.replace("* /ping", "nothing"), "died serving 'nothing'"),
    (REPORT.replace("5.0 s", "50 ms"), "it lived 0.05 s"),
])
def test_the_report_of_a_death_is_read(run, line: str | None, what: str) -> None:
    """It has to be there, and name process, signal, route and time."""
    run.server.death_lines = [line] if line else []
    assert what in failures(run)
