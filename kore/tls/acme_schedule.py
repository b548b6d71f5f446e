"""When each certificate is to be asked for: a table of what is known of each name, which is told the time and decides.

Nothing here waits, reads a clock or talks to anybody, so years of it pass in a test in no time. Times are seconds since
1970, as certificates have them; the system's clock may be set meanwhile, in both directions, so nothing is computed
once and then waited for: whoever asks is told how long to wait at most, and asks again.

A certificate is renewed when a third of its life is left, or at a moment of the window that its authority suggests
(RFC 9773, ARI). What fails is tried again after a time that doubles, is never exact, so that many servers that
failed together do not come back together, and is at least what the authority asked for. There is one entry for a name,
hence never more than one order for it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, Final

FIRST_RETRY_SECONDS: Final = 120.0
"""After the first failure. Five tries in the first hour, which is what Let's Encrypt allows of failed validations."""

RETRY_SECONDS_MAX: Final = 6 * 3600.0
"""The longest that is waited for our own reasons: a month is left when the first attempt of a renewal fails."""

ASKED_SECONDS_MAX: Final = 86400.0
"""The longest that an authority may have us wait (Retry-After): by then it may have been mended."""

LOOK_SECONDS_MAX: Final = 3600.0
"""The longest between two looks at the clock, which may be set meanwhile."""

HINT_SECONDS: Final = 6 * 3600.0
"""Between two questions for the window when the authority does not say (RFC 9773, 4.3.2)."""

HINT_SECONDS_MIN: Final = 60.0

LEFT_OF_LIFE: Final = 1 / 3
"""What is left of a certificate's life when it is renewed."""

LEFT_OF_LIFE_MIN: Final = 1 / 6
"""A window that the authority suggests is followed up to here: later, failures would have no time to be mended."""

ERROR_CHARACTERS_MAX: Final = 1000


class What(Enum):
    """What is to be done for a name."""

    ORDER = "order"
    HINT = "hint"


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of one name. All of it is on disk, so that a restart neither forgets a delay nor an error."""

    not_before: float = 0.0
    not_after: float = 0.0
    """Of the certificate that is installed; 0: there is none."""
    window: tuple[float, float] | None = None
    """What the authority suggests for this certificate."""
    chosen: float = 0.0
    """The moment in that window."""
    ask_at: float = 0.0
    """When the authority is asked for it again."""
    failures: int = 0
    """In a row."""
    retry_at: float = 0.0
    error: str = ""
    """Of the last attempt, when it failed."""
    error_at: float = 0.0

    def renewal(self) -> float:
        """When the certificate is to be renewed, failures apart; 0 when there is none."""
        life = self.not_after - self.not_before
        if not self.not_after or life <= 0:
            return 0.0
        if self.window is not None:
            return min(self.chosen, self.not_after - life * LEFT_OF_LIFE_MIN)
        return self.not_after - life * LEFT_OF_LIFE

    def due(self, now: float) -> float:
        """When the next order is to be made. A time to try again that is too far away was written by another clock."""
        held = self.retry_at if self.retry_at <= now + ASKED_SECONDS_MAX else 0.0
        return max(self.renewal(), held)

    def dump(self) -> bytes:
        """For the disk."""
        return json.dumps(asdict(self), indent=1).encode()


def load(text: bytes) -> Standing:
    """What dump() wrote; a fresh one when the text is anything else, which only costs a try that comes too early."""
    try:
        found = json.loads(text)
        window = found.pop("window")
        numbers = {name: _time(found[name]) for name in ("not_before", "not_after", "chosen", "ask_at", "retry_at")}
        return Standing(
            **numbers,
            window=None if window is None else (_time(window[0]), _time(window[1])),
            failures=max(0, int(found["failures"])),
            error=str(found["error"])[:ERROR_CHARACTERS_MAX],
            error_at=_time(found["error_at"]),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        return Standing()


def matching(standing: Standing, not_before: float, not_after: float) -> Standing:
    """`standing`, for a certificate with these times. A window is for the certificate that it was asked for alone."""
    if (standing.not_before, standing.not_after) != (not_before, not_after):
        standing = replace(standing, window=None, chosen=0.0, ask_at=0.0)
    return replace(standing, not_before=not_before, not_after=not_after)


def _time(value: Any) -> float:
    """Raises ValueError, TypeError."""
    seconds = float(value)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"no time: {value!r}")
    return seconds


class Schedule:
    """The standings of all names."""

    def __init__(self, names: Iterable[str], uniform: Callable[[float, float], float] = random.uniform) -> None:
        self.standings = {name: Standing() for name in names}
        self._uniform = uniform

    def next(self, now: float) -> tuple[str, What] | float:
        """What is to be done now, or the seconds to wait before asking again.

        Orders come before questions, and what has been due for longest before the rest.
        """
        orders = [(standing.due(now), name) for name, standing in self.standings.items()]
        hints = [
            (min(standing.ask_at, now + ASKED_SECONDS_MAX), name)
            for name, standing in self.standings.items()
            if standing.not_after > now
        ]
        for what, entries in ((What.ORDER, orders), (What.HINT, hints)):
            due, name = min(entries, default=(math.inf, ""))
            if due <= now:
                return name, what
        return min(LOOK_SECONDS_MAX, min(due for due, _ in orders + hints) - now)

    def restored(self, name: str, standing: Standing, not_before: float, not_after: float) -> None:
        """Take what was on disk, and the times of the certificate that is there."""
        self.standings[name] = matching(standing, not_before, not_after)

    def installed(self, name: str, not_before: float, not_after: float) -> None:
        """A new certificate is in place.

        Its window is asked for later: an authority that suggests to renew at once, whatever the certificate, gets an
        order now and then, and not one after the other.
        """
        asked = not_before + min(HINT_SECONDS, (not_after - not_before) * LEFT_OF_LIFE_MIN)
        self.standings[name] = Standing(not_before, not_after, ask_at=asked)

    def failed(self, name: str, now: float, error: str, retry_after: float | None = None) -> float:
        """An order failed; the seconds until the next. `retry_after`: what the authority asked for, in seconds."""
        standing = self.standings[name]
        # The exponent is bounded before it is used: a failure for years must not compute 2**100000.
        seconds = min(RETRY_SECONDS_MAX, FIRST_RETRY_SECONDS * 2.0 ** min(standing.failures, 16))
        seconds = self._uniform(seconds * 0.75, seconds)
        if retry_after is not None:
            asked = min(max(0.0, retry_after), ASKED_SECONDS_MAX)
            seconds = max(seconds, min(ASKED_SECONDS_MAX, asked + self._uniform(0.0, asked / 10)))
        self.standings[name] = replace(
            standing,
            failures=standing.failures + 1,
            retry_at=now + seconds,
            error=error[:ERROR_CHARACTERS_MAX],
            error_at=now,
        )
        return seconds

    def postponed(self, name: str, now: float, seconds: float) -> None:
        """An order could not be made, through no fault of the authority's: try again, and count nothing."""
        self.standings[name] = replace(self.standings[name], retry_at=now + seconds)

    def hinted(self, name: str, now: float, window: tuple[float, float] | None, ask_again: float | None) -> None:
        """The authority suggested a window for the renewal (None: it has nothing to say), and when to ask again.

        The moment is chosen once for a window: choosing at each question would favour the early ones.
        """
        standing = self.standings[name]
        seconds = HINT_SECONDS if ask_again is None else min(max(ask_again, HINT_SECONDS_MIN), ASKED_SECONDS_MAX)
        if window is not None and window[0] > window[1]:
            window = None  # RFC 9773, 4.2: no window at all
        chosen = standing.chosen
        if window != standing.window:
            chosen = self._uniform(*window) if window is not None else 0.0
        self.standings[name] = replace(standing, window=window, chosen=chosen, ask_at=now + seconds)

    def unhinted(self, name: str, now: float, ask_again: float | None) -> None:
        """The question failed: what was suggested before still counts."""
        standing = self.standings[name]
        seconds = HINT_SECONDS if ask_again is None else min(max(ask_again, HINT_SECONDS_MIN), ASKED_SECONDS_MAX)
        self.standings[name] = replace(standing, ask_at=now + seconds)

    def hurry(self) -> None:
        """Forget delays: whoever mended something does not want to wait."""
        for name, standing in self.standings.items():
            self.standings[name] = replace(standing, retry_at=0.0, ask_at=0.0)
