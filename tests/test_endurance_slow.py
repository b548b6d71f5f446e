"""The proof on slow clients, small: fifty of them, deadlines of three seconds, and no judgement of throughput."""

from __future__ import annotations

import pytest

from tests.endurance import slow
from tests.endurance.report import Result, Unavailable, silent
from tests.support import SECONDS

HEADERS, BODY, READ = slow.MODES


@pytest.fixture(autouse=True)
def beside_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has the lowest priority there does not come to fifty connections before the first of them is ended."""
    monkeypatch.setattr(slow, "NICE", ())
    monkeypatch.setattr(slow, "COME_SECONDS", SECONDS)


def prove(io: str, mode: slow.Mode) -> Result:
    try:
        # A second beside other tests says nothing of throughput; that honest clients are served without error it does.
        return slow.prove(io, connections=50, modes=(mode,), rounds=1, deadline=3, fall_max=1.0, progress=silent)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("mode", [HEADERS, BODY], ids=["headers", "body"])
@pytest.mark.parametrize("io", ["uring", "epoll"])
def test_slow_senders_are_ended_and_honest_clients_served(io: str, mode: slow.Mode) -> None:
    """The proof itself, a mode at a time."""
    result = prove(io, mode)
    assert not result.failed, result.text()
    assert 2 < result.figures[f"{mode.name}_ended_after_s"] < 3 + slow.LATE_SECONDS


@pytest.mark.parametrize("io", ["uring", "epoll"])
def test_slow_readers_are_ended(io: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes 8 bytes of 8 MiB every two seconds must not keep a connection for weeks."""
    monkeypatch.setattr(slow, "LATE_SECONDS", 5.0)
    result = prove(io, READ)
    assert not result.failed, result.text()


@pytest.mark.parametrize("missing", ["slowhttptest", "wrk"])
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Where a program is missing, the proof says which."""
    monkeypatch.setattr(slow.shutil, "which", lambda name: None if name == missing else f"/bin/{name}")
    with pytest.raises(Unavailable, match=missing):
        slow.prove("epoll", connections=1, progress=silent)
