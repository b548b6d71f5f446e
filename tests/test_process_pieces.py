"""Objects cut into messages and put together again: any length, any size of piece, and nothing that does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kore.process import pieces
from kore.process.channel import ChannelError, Kind
from kore.process.outbox import WAITING_BYTES_MAX
from kore.process.pieces import HEADER, OBJECT_BYTES_MAX, TO_ALL, TO_OTHERS, Assembly, cost, cut, is_last

LEAST_PIECE = 1024  # the least send buffer the kernel gives (socket(7): SO_SNDBUF), by four, is more


def put_together(messages):
    assembly = Assembly()
    *before, last = [assembly.add(message) for message in messages]
    assert before == [None] * (len(messages) - 1)
    return last


@given(st.binary(max_size=300), st.integers(HEADER.size + 1, 40), st.sampled_from([TO_ALL, 1, 7, TO_OTHERS]))
@settings(max_examples=200, deadline=None)
def test_what_is_cut_is_put_together_again(data, piece_bytes, target):
    messages = cut(Kind.OBJECT, target, data, piece_bytes)
    assert all(len(message) <= piece_bytes for message in messages)
    assert [is_last(message) for message in messages] == [False] * (len(messages) - 1) + [True]
    whole = put_together(messages)
    assert (whole.kind, whole.target, whole.data()) == (Kind.OBJECT, target, data)


@pytest.mark.parametrize("length", [0, 1, 95, 96, 97, 192, 193])
def test_no_piece_is_empty_but_the_only_one(length):
    messages = cut(Kind.BROADCAST, TO_OTHERS, b"x" * length, 100)
    assert len(messages) == max(1, -(-length // 96))


def test_an_assembly_is_empty_after_each_object():
    assembly = Assembly()
    for text in (b"one", b"two" * 100, b""):
        for message in cut(Kind.OBJECT, 3, text, 50):
            whole = assembly.add(message)
        assert whole.data() == text


def test_the_longest_object_fits_every_bound_however_small_its_pieces():
    messages = cut(Kind.OBJECT, TO_ALL, bytes(OBJECT_BYTES_MAX), LEAST_PIECE)
    assert sum(map(cost, messages)) <= WAITING_BYTES_MAX
    assert len(put_together(messages).data()) == OBJECT_BYTES_MAX


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([b"\x02\x06text"], "a LOG of 6 bytes among the messages for workers"),
        ([b"\xfe\x00\x00\x00"], "unknown kind 254"),
        ([b"\x20\x00\x01"], "a OBJECT of 3 bytes"),
        ([HEADER.pack(Kind.OBJECT, 1, 1), HEADER.pack(Kind.OBJECT, 2, 0)], "different objects"),
        ([HEADER.pack(Kind.OBJECT, 1, 1), HEADER.pack(Kind.BROADCAST, 1, 0)], "different objects"),
    ],
)
def test_nonsense_is_refused(messages, why):
    assembly = Assembly()
    with pytest.raises(ChannelError, match=why):
        for message in messages:
            assembly.add(message)


@pytest.mark.parametrize("data", [b"", b"x" * 1000])
def test_an_object_without_an_end_is_refused_even_in_empty_pieces(data):
    assembly = Assembly()
    message = HEADER.pack(Kind.OBJECT, 1, 1) + data
    with pytest.raises(ChannelError, match="an object of more than"):
        for _ in range(1 + 2 * OBJECT_BYTES_MAX // pieces.PIECE_COST):
            assembly.add(message)
