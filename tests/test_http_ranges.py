"""Range fields against a length: which bytes are meant, what is refused, and that hostile ones cost nothing."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kore.http.ranges import GAP_BYTES, RANGES_MAX, content_range, part_heads, wanted

FAR = 100_000
CASES = [
    ("bytes=0-99", [(0, 100)]),
    ("BYTES=0-99", [(0, 100)]),
    ("bytes=0-0", [(0, 1)]),
    ("bytes=5-", [(5, FAR)]),
    ("bytes=-1", [(FAR - 1, FAR)]),
    ("bytes=-999999999", [(0, FAR)]),
    ("bytes=99999-", [(FAR - 1, FAR)]),
    ("bytes=0-99999999999999999999999999", [(0, FAR)]),
    ("bytes=00000000000000000000000000000005-6", [(5, 7)]),
    ("bytes= 0-1 , 5000-5001 ,", [(0, 2), (5000, 5002)]),
    ("bytes=5000-5001,0-1", [(5000, 5002), (0, 2)]),
    # Overlapping, touching, and closer than the head of a part: one.
    ("bytes=0-10,5-20", [(0, 21)]),
    ("bytes=0-10,11-20", [(0, 21)]),
    (f"bytes=0-10,{10 + GAP_BYTES}-200", [(0, 201)]),
    ("bytes=0-,0-,0-,0-", [(0, FAR)]),
    ("bytes=5000-5001,0-1,5000-5010", [(0, 2), (5000, 5011)]),
    # Parts beyond the end are left out; nothing left is 416.
    ("bytes=0-1,100000-", [(0, 2)]),
    ("bytes=100000-", []),
    ("bytes=-0", []),
    ("bytes=99999999999999999999999999999-", []),
    # Not a range of bytes that makes sense: as if there were none.
    ("bytes=5-4", None),
    ("bytes=", None),
    ("bytes=,", None),
    ("bytes=-", None),
    ("bytes=1", None),
    ("bytes=a-b", None),
    ("bytes=0x1-2", None),
    ("bytes=1-2-3", None),
    ("bytes=--1", None),
    ("bytes=+1-2", None),
    ("bytes=1 - 2", None),
    ("bytes=\u0661-\u0662", None),
    ("bytes 0-1", None),
    ("lines=0-1", None),
    ("", None),
]


@pytest.mark.parametrize(("value", "found"), CASES)
def test_a_field(value: str, found: list[tuple[int, int]] | None) -> None:
    """What a Range field means for a file of 100,000 bytes."""
    assert wanted(value, FAR) == found


def test_an_empty_file() -> None:
    """Nothing can be taken from an empty file; all that is asked for from behind is all there is."""
    assert wanted("bytes=0-", 0) == []
    assert wanted("bytes=-5", 0) is None


def test_a_thousand_ranges_are_ignored() -> None:
    """Up to the bound each counts; above it the field does not count."""
    def field(count: int) -> str:
        return "bytes=" + ",".join(f"{n * 1000}-{n * 1000 + 1}" for n in range(count))

    found = wanted(field(RANGES_MAX), 10**7)
    assert found is not None
    assert len(found) == RANGES_MAX
    assert wanted(field(RANGES_MAX + 1), 10**7) is None
    assert wanted("bytes=" + "0-0," * 1000, 10**7) is None


@pytest.mark.parametrize("value", ["bytes=" + "," * 60_000, "bytes=" + "9" * 60_000 + "-", "bytes=" + " " * 60_000])
def test_hostile_fields_cost_little(value: str) -> None:
    """Time grows with the bytes, no faster; Python's own limit on digits is not met."""
    begin = time.process_time()
    wanted(value, FAR)
    assert time.process_time() - begin < 0.5


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), min_size=1, max_size=10), st.integers(1, 2000))
def test_no_byte_is_lost_and_none_is_sent_twice(pairs: list[tuple[int, int]], length: int) -> None:
    """Whatever is joined, each wanted byte is there once; what comes besides lies in a gap."""
    pairs = [(min(pair), max(pair)) for pair in pairs]
    found = wanted("bytes=" + ",".join(f"{first}-{last}" for first, last in pairs), length)
    assert found is not None
    asked = {byte for first, last in pairs for byte in range(first, min(last + 1, length))}
    sent = [byte for first, end in found for byte in range(first, end)]
    assert asked <= set(sent)
    assert len(sent) == len(set(sent))
    assert all(0 <= first < end <= length for first, end in found)
    assert len(sent) - len(asked) <= GAP_BYTES * len(pairs)


def test_parts_are_framed() -> None:
    """A body of several parts as RFC 9110 14.6 shows it."""
    heads = part_heads([(0, 2), (5, 6)], 10, "text/plain", "B")
    assert heads == [
        b"--B\r\ncontent-type: text/plain\r\ncontent-range: bytes 0-1/10\r\n\r\n",
        b"\r\n--B\r\ncontent-type: text/plain\r\ncontent-range: bytes 5-5/10\r\n\r\n",
        b"\r\n--B--\r\n",
    ]
    assert b"content-type" not in part_heads([(0, 2)], 10, None, "B")[0]
    assert content_range((0, 2), 10) == "bytes 0-1/10"
