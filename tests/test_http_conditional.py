"""Conditional requests as tables: dates in their three forms, entity tags, and the order of the preconditions."""

from __future__ import annotations

import time

import pytest

from kore.http.conditional import etag, http_date, outcome, range_applies

WHEN = 784111777  # the date of RFC 9110's examples
DATES = [
    ("Sun, 06 Nov 1994 08:49:37 GMT", WHEN),
    ("Sunday, 06-Nov-94 08:49:37 GMT", WHEN),
    ("Sun Nov  6 08:49:37 1994", WHEN),
    ("Sun Nov 16 08:49:37 1994", WHEN + 864000),
    ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
    ("Wed, 31 Dec 1969 23:59:59 GMT", -1),
    ("Tue, 29 Feb 2000 00:00:00 GMT", 951782400),
    ("Sat, 31 Dec 2016 23:59:60 GMT", 1483228800),
    ("Fri, 31 Dec 9999 23:59:59 GMT", 253402300799),
    ("Tue, 30 Feb 2000 00:00:00 GMT", None),
    ("Sun, 06 Nov 1994 24:00:00 GMT", None),
    ("Sun, 06 Nov 1994 08:60:00 GMT", None),
    ("Sun, 06 Nov 0000 08:49:37 GMT", None),
    ("Sun, 06 Nov 1994 08:49:37 UTC", None),
    ("Sun, 6 Nov 1994 08:49:37 GMT", None),
    ("sun, 06 nov 1994 08:49:37 gmt", None),
    ("Sun, 06 Nov 1994 08:49:37 GMT, Sun, 06 Nov 1994 08:49:37 GMT", None),
    ("Sun, 0\u0666 Nov 1994 08:49:37 GMT", None),
    ("784111777", None),
    ("", None),
    ("x" * 100_000, None),
]


@pytest.mark.parametrize(("text", "seconds"), DATES)
def test_a_date(text: str, seconds: int | None) -> None:
    """All three forms are read, anything else is no date."""
    assert http_date(text) == seconds


def test_two_digits_of_a_year() -> None:
    """More than 50 years ahead means the century before (RFC 9110 5.6.7)."""
    this_year = time.gmtime().tm_year
    for ahead in (0, 49, 51, 99):
        seconds = http_date(f"Sunday, 06-Nov-{(this_year + ahead) % 100:02} 08:49:37 GMT")
        assert seconds is not None
        assert time.gmtime(seconds).tm_year == this_year + ahead - (100 if ahead > 50 else 0)


def test_a_tag_is_strong_and_changes_with_the_file() -> None:
    """Quoted, without W/, and another for another time, size or inode."""
    tags = {etag(10**18, 5, 7), etag(10**18 + 1, 5, 7), etag(10**18, 6, 7), etag(10**18, 5, 8)}
    assert len(tags) == 4
    assert all(tag[0] == tag[-1] == '"' for tag in tags)


TAG = '"abc"'
BEFORE, AT, AFTER = "Sun, 06 Nov 1994 08:49:36 GMT", "Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:38 GMT"
OUTCOMES = [
    ({}, 200),
    ({"if-none-match": TAG}, 304),
    ({"if-none-match": "W/" + TAG}, 304),  # weak comparison
    ({"if-none-match": '"x", "y,z" ,"abc"'}, 304),
    ({"if-none-match": ', ,"x",, W/"abc"'}, 304),
    ({"if-none-match": "*"}, 304),
    ({"if-none-match": '"x"'}, 200),
    ({"if-none-match": "abc"}, 200),
    ({"if-none-match": '"abcd"'}, 200),
    ({"if-none-match": 'abc, "abc"'}, 200),  # malformed before it: never a smaller answer
    ({"if-none-match": ""}, 200),
    ({"if-modified-since": AT}, 304),
    ({"if-modified-since": AFTER}, 304),  # http.md 12: the C platform compared for equality
    ({"if-modified-since": "Sunday, 06-Nov-94 08:49:38 GMT"}, 304),
    ({"if-modified-since": "Sun Nov  6 08:49:38 1994"}, 304),
    ({"if-modified-since": BEFORE}, 200),
    ({"if-modified-since": "yesterday"}, 200),
    ({"if-none-match": '"x"', "if-modified-since": AFTER}, 200),  # the tag decides
    ({"if-none-match": TAG, "if-modified-since": BEFORE}, 304),
    ({"if-match": TAG}, 200),
    ({"if-match": "*"}, 200),
    ({"if-match": '"x", "abc"'}, 200),
    ({"if-match": "W/" + TAG}, 412),  # strong comparison
    ({"if-match": '"x"'}, 412),
    ({"if-match": "abc"}, 412),
    ({"if-match": TAG, "if-none-match": TAG}, 304),
    ({"if-match": '"x"', "if-none-match": TAG}, 412),
    ({"if-unmodified-since": AT}, 200),
    ({"if-unmodified-since": AFTER}, 200),
    ({"if-unmodified-since": BEFORE}, 412),
    ({"if-unmodified-since": "never"}, 200),
    ({"if-match": TAG, "if-unmodified-since": BEFORE}, 200),  # the tag decides
    ({"if-unmodified-since": BEFORE, "if-none-match": TAG}, 412),
    ({"if-range": '"x"'}, 200),
]


@pytest.mark.parametrize(("fields", "status"), OUTCOMES)
def test_preconditions(fields: dict[str, str], status: int) -> None:
    """Which status the fields lead to, in the order of RFC 9110 13.2.2."""
    assert outcome(fields, TAG, WHEN) == status


@pytest.mark.parametrize("value", ['"' * 60_000, '"a",' * 20_000, "W/" * 30_000, " ," * 30_000, ('"' + " ," * 30_000)])
def test_hostile_lists_cost_little(value: str) -> None:
    """Time grows with the bytes, no faster."""
    begin = time.process_time()
    outcome({"if-none-match": value, "if-match": value}, TAG, WHEN)
    assert time.process_time() - begin < 0.5


RANGE_APPLIES = [
    ({}, True),
    ({"if-range": TAG}, True),
    ({"if-range": "W/" + TAG}, False),
    ({"if-range": '"x"'}, False),
    ({"if-range": AT}, True),
    ({"if-range": AFTER}, False),  # exactly the date, or the whole file (RFC 9110 13.1.5)
    ({"if-range": BEFORE}, False),
    ({"if-range": "x"}, False),
    ({"if-range": ""}, False),
]


@pytest.mark.parametrize(("fields", "applies"), RANGE_APPLIES)
def test_if_range(fields: dict[str, str], applies: bool) -> None:
    """Whether a range counts."""
    assert range_applies(fields, TAG, WHEN) is applies


def test_a_date_of_this_second_is_weak() -> None:
    """A file that changed within this second may change again in it: its date does not vouch for its bytes."""
    now = int(time.time())
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now))
    assert not range_applies({"if-range": date}, TAG, now)
