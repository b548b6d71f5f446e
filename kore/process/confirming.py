"""Waiting until all workers have a challenge's certificate: the authority is not to look before.

A worker says so when it has it. One that does not within the time there is, is named; one that is gone need not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

CONFIRM_SECONDS_MAX: Final = 10.0
"""For a worker to say that it has it; one that is blocked takes no connection either."""

Done = Callable[[list[str]], object]
"""Called once, with the names of the workers that have not confirmed it."""


@dataclass(slots=True)
class _Awaited:
    domain: int
    id: bytes
    deadline: float
    done: Done


class Confirmations:
    """What is awaited, and from whom. `confirmed` may be called on any thread, all else on one."""

    def __init__(self) -> None:
        self._awaited: list[_Awaited] = []
        self._have: dict[object, dict[int, bytes]] = {}
        """By worker's process: the last challenge of each domain that it has."""

    def join(self, who: object) -> None:
        """A worker's process is there."""
        self._have[who] = {}

    def leave(self, who: object) -> None:
        """It is gone."""
        self._have.pop(who, None)

    def confirmed(self, who: object, domain: int, number: bytes) -> None:
        """It has it."""
        have = self._have.get(who)
        if have is not None:
            have[domain] = number

    def wait(self, domain: int, number: bytes, done: Done) -> None:
        """Call `done` when all have it that are there now; `look` does."""
        self._awaited.append(_Awaited(domain, number, time.monotonic() + CONFIRM_SECONDS_MAX, done))

    def look(self) -> None:
        """See what is complete, or late."""
        for one in list(self._awaited):
            missing = [who for who, have in self._have.items() if have.get(one.domain) != one.id]
            if not missing or one.deadline <= time.monotonic():
                self._awaited.remove(one)
                one.done(_names(missing))


def _names(missing: Iterable[object]) -> list[str]:
    return [str(who) for who in missing]
