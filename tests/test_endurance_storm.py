"""The proof on kills, small."""

from __future__ import annotations

import pytest

from tests.endurance import storm
from tests.endurance.report import Unavailable, silent


@pytest.mark.parametrize("io", ["uring", "epoll"])
def test_whatever_waits_can_be_killed_and_leaves_nothing(io: str) -> None:
    """Three rounds of some two hundred waits."""
    try:
        result = storm.prove(io, coroutines=400, seed=7, size=200, progress=silent)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not result.failed, result.text()
    assert result.figures["killed"] >= 400
