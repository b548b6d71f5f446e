"""When certificates are asked for, over years that pass in no time."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kore.tls.acme_schedule import (
    ASKED_SECONDS_MAX,
    FIRST_RETRY_SECONDS,
    LOOK_SECONDS_MAX,
    RETRY_SECONDS_MAX,
    Schedule,
    Standing,
    What,
    load,
)

NOW = 1_800_000_000.0
DAY = 86400.0
NAME = "a.example.org"
OTHER = "b.example.org"


def middle(low: float, high: float) -> float:
    """No chance in it: the middle of what would be drawn from."""
    return (low + high) / 2


def schedule(*names: str) -> Schedule:
    return Schedule(names or (NAME,), middle)


def when(plan: Schedule, what: What, start: float, limit: float = 400 * DAY) -> float:
    """The moment at which the first task of a kind comes, however long the waits before; other tasks are refused."""
    now = start
    while now < start + limit:
        found = plan.next(now)
        if isinstance(found, float):
            assert 0 < found <= LOOK_SECONDS_MAX
            now += found
        elif found[1] is what:
            return now
        else:
            plan.hinted(found[0], now, None, None)
    raise AssertionError("never")


def test_no_certificate_means_an_order_now() -> None:
    assert schedule().next(NOW) == (NAME, What.ORDER)


def test_a_third_of_the_life_is_left() -> None:
    """A certificate of 90 days is renewed when 30 are left; one of 6 days when 2 are."""
    for days in (90, 6):
        plan = schedule()
        plan.installed(NAME, NOW, NOW, NOW + days * DAY)
        assert when(plan, What.ORDER, NOW) == pytest.approx(NOW + days * DAY * 2 / 3, abs=1)


def test_the_authority_hint_moves_it() -> None:
    """The moment lies in the window that is suggested, and stays where it is while the window does."""
    plan = Schedule([NAME])
    plan.installed(NAME, NOW, NOW, NOW + 90 * DAY)
    window = (NOW + 50 * DAY, NOW + 52 * DAY)
    plan.hinted(NAME, NOW, window, None)
    chosen = plan.standings[NAME].renewal()
    assert window[0] <= chosen <= window[1]
    plan.hinted(NAME, NOW + DAY, window, None)
    assert plan.standings[NAME].renewal() == chosen
    # A revocation is announced: the window lies in the past, and the order is due at once.
    plan.hinted(NAME, NOW + 2 * DAY, (NOW - DAY, NOW), None)
    assert plan.next(NOW + 2 * DAY) == (NAME, What.ORDER)


def test_a_hint_is_not_followed_into_the_grave() -> None:
    plan = schedule()
    plan.installed(NAME, NOW, NOW, NOW + 90 * DAY)
    plan.hinted(NAME, NOW, (NOW + 500 * DAY, NOW + 501 * DAY), None)
    assert plan.standings[NAME].renewal() == NOW + 75 * DAY
    plan.hinted(NAME, NOW, (NOW + 2 * DAY, NOW + DAY), None)  # ends before it begins
    assert plan.standings[NAME].renewal() == NOW + 60 * DAY


def test_hints_are_asked_for_as_often_as_the_authority_says() -> None:
    plan = schedule()
    plan.installed(NAME, NOW, NOW, NOW + 90 * DAY)
    assert when(plan, What.HINT, NOW) == NOW + 6 * 3600
    for asked, expected in ((7200.0, 7200.0), (None, 6 * 3600.0), (0.0, 60.0), (1e9, DAY)):
        plan.hinted(NAME, NOW, None, asked)
        assert plan.standings[NAME].ask_at == NOW + expected
    plan.hinted(NAME, NOW, (NOW + DAY, NOW + 2 * DAY), None)
    plan.unhinted(NAME, NOW, None)  # what was suggested before still counts
    assert plan.standings[NAME].window == (NOW + DAY, NOW + 2 * DAY)
    assert plan.standings[NAME].ask_at == NOW + 6 * 3600.0


def test_no_hint_is_asked_for_an_expired_certificate() -> None:
    """RFC 9773, 4.3: never after it has expired. It is ordered instead."""
    plan = schedule()
    plan.installed(NAME, NOW - 90 * DAY, NOW - 90 * DAY, NOW - 1)
    plan.failed(NAME, NOW, "down")
    assert isinstance(plan.next(NOW), float)


def test_failures_wait_longer_each_time() -> None:
    """Two minutes, doubled, up to six hours; five tries in the first hour."""
    plan = Schedule([NAME], lambda _low, high: high)
    waits, now = [], NOW
    for _ in range(40):
        seconds = plan.failed(NAME, now, "down")
        assert when(plan, What.ORDER, now) == pytest.approx(now + seconds, abs=0.01)
        waits.append(seconds)
        now += seconds
    assert waits[:4] == [FIRST_RETRY_SECONDS * factor for factor in (1, 2, 4, 8)]
    assert waits[-1] == RETRY_SECONDS_MAX
    times = [sum(waits[:count]) for count in range(6)]
    assert sum(time < 3600 for time in times) == 5
    for _ in range(100_000):
        plan.failed(NAME, now, "down")
    assert plan.standings[NAME].failures == 100_040


def test_many_servers_do_not_come_back_together() -> None:
    plans = [Schedule([NAME]) for _ in range(50)]
    waits = {plan.failed(NAME, NOW, "down") for plan in plans}
    assert len(waits) > 40
    assert all(0.75 * FIRST_RETRY_SECONDS <= wait <= FIRST_RETRY_SECONDS for wait in waits)


def test_what_the_authority_asks_for_is_the_least() -> None:
    plan = schedule()
    assert plan.failed(NAME, NOW, "slow down", 1000.0) == pytest.approx(1050.0)
    assert plan.failed(NAME, NOW, "slow down", 1.0) >= FIRST_RETRY_SECONDS
    assert plan.failed(NAME, NOW, "for ever", 1e12) == ASKED_SECONDS_MAX
    assert plan.failed(NAME, NOW, "nonsense", -5.0) >= FIRST_RETRY_SECONDS


def test_a_success_forgets_the_failures() -> None:
    plan = schedule()
    plan.failed(NAME, NOW, "down")
    plan.installed(NAME, NOW, NOW, NOW + 90 * DAY)
    assert plan.standings[NAME] == Standing(NOW, NOW + 90 * DAY, ask_at=NOW + 6 * 3600, retry_at=NOW + 5)


def test_an_authority_that_always_suggests_now_gets_few_orders() -> None:
    """Whatever the certificate, its window lies in the past: that is an order every six hours, and no storm."""
    plan = schedule()
    now, orders = NOW, 0
    while now < NOW + DAY:
        found = plan.next(now)
        if isinstance(found, float):
            now += found
        elif found[1] is What.ORDER:
            orders += 1
            plan.installed(NAME, now, now, now + 90 * DAY)
        else:
            plan.hinted(NAME, now, (NOW - 2 * DAY, NOW - DAY), 0.0)
    assert orders == 4


def test_certificates_that_are_over_at_once_are_no_storm() -> None:
    """An authority that gives a second each time gets an order every five."""
    plan = schedule()
    now, orders = NOW, 0
    while now < NOW + 60:
        found = plan.next(now)
        if isinstance(found, float):
            now += found
        elif found[1] is What.ORDER:
            orders += 1
            plan.installed(NAME, now, now - 1, now)
        else:
            plan.hinted(NAME, now, None, None)
    assert orders == 12


def test_a_failing_renewal_leaves_the_others_their_turn() -> None:
    plan = schedule(NAME, OTHER)
    plan.failed(NAME, NOW, "down")
    assert plan.next(NOW) == (OTHER, What.ORDER)
    plan.failed(OTHER, NOW + 1, "down")
    assert isinstance(plan.next(NOW + 1), float)


def test_what_waits_for_longest_comes_first() -> None:
    plan = schedule(NAME, OTHER)
    plan.installed(NAME, NOW - 80 * DAY, NOW - 80 * DAY, NOW + 10 * DAY)
    plan.installed(OTHER, NOW - 85 * DAY, NOW - 85 * DAY, NOW + 5 * DAY)
    assert plan.next(NOW) == (OTHER, What.ORDER)


def test_the_clock_may_be_set() -> None:
    """Forward past the expiry: an order at once. Back before a delay began: the delay is not waited for twice."""
    plan = schedule()
    plan.installed(NAME, NOW, NOW, NOW + 90 * DAY)
    assert plan.next(NOW + 1000 * DAY) == (NAME, What.ORDER)
    plan.failed(NAME, NOW + 1000 * DAY, "down")
    plan.standings[NAME] = Standing(retry_at=NOW + 1000 * DAY)
    assert plan.next(NOW) == (NAME, What.ORDER)


def test_hurry_forgets_delays() -> None:
    plan = schedule()
    plan.failed(NAME, NOW, "down", 80000)
    plan.hurry()
    assert plan.next(NOW) == (NAME, What.ORDER)
    assert plan.standings[NAME].failures == 1


def test_the_disk_gives_back_what_it_was_given() -> None:
    plan = schedule()
    plan.installed(NAME, NOW, NOW, NOW + 90 * DAY)
    plan.hinted(NAME, NOW, (NOW + DAY, NOW + 2 * DAY), 60)
    plan.failed(NAME, NOW, "x" * 5000, 60)
    kept = plan.standings[NAME]
    assert load(kept.dump()) == kept
    later = schedule()
    later.restored(NAME, load(kept.dump()), NOW, NOW + 90 * DAY)
    assert later.standings[NAME] == kept
    # The certificate was replaced meanwhile: the window was for another, the failures are the authority's still.
    later.restored(NAME, load(kept.dump()), NOW + 1, NOW + 91 * DAY)
    assert later.standings[NAME].window is None
    assert later.standings[NAME].failures == 1


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_nonsense_on_the_disk_is_a_fresh_start(text: bytes) -> None:
    assert load(text) == Standing()


VALUES = st.none() | st.floats() | st.integers() | st.text(max_size=5) | st.lists(st.floats(), max_size=3)


@given(st.dictionaries(st.sampled_from(sorted(json.loads(Standing().dump()))), VALUES))
def test_half_nonsense_on_the_disk_never_raises(found: dict) -> None:
    """Whatever loads can be planned with."""
    standing = load(json.dumps(json.loads(Standing().dump()) | found).encode())
    plan = schedule()
    plan.restored(NAME, standing, 0.0, 0.0)
    assert plan.next(NOW) is not None
    assert plan.failed(NAME, NOW, "again") > 0


def test_nothing_to_do_is_a_look_at_the_clock_now_and_then() -> None:
    plan = schedule()
    plan.installed(NAME, NOW, NOW, NOW + 90 * DAY)
    plan.hinted(NAME, NOW, None, 1e9)
    assert plan.next(NOW) == LOOK_SECONDS_MAX
