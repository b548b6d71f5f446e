"""The channel between parent and worker: whole messages, a bound, and an end that is noticed."""

from __future__ import annotations

import pytest

from kore.process import role
from kore.process.channel import MESSAGE_BYTES_MAX, ChannelError, Kind, channel_pair
from kore.process.log import LOG_ERR, TEXT_CHARACTERS_MAX


@pytest.fixture
def pair():
    parent, child = channel_pair()
    yield parent, child
    parent.close()
    child.close()


def test_messages_keep_their_borders_and_order(pair):
    parent, child = pair
    assert child.send(Kind.LOG, b"\x06one")
    assert child.send(Kind.READY)
    assert parent.receive() == (Kind.LOG, b"\x06one")
    assert parent.receive() == (Kind.READY, b"")
    assert parent.receive() is None


def test_what_was_sent_before_the_end_is_still_read(pair):
    parent, child = pair
    child.send(Kind.LOG, b"\x03last words")
    child.close()
    assert parent.receive() == (Kind.LOG, b"\x03last words")
    with pytest.raises(EOFError):
        parent.receive()
    assert parent.send(Kind.STOP, b"\x0f") is False


def test_a_full_channel_refuses_and_does_not_block(pair):
    parent, child = pair
    accepted = 0
    while child.send(Kind.LOG, b"\x06" + b"x" * 1000):
        accepted += 1
        assert accepted < 100_000, "there is no bound"
    assert accepted > 50
    assert parent.receive() is not None
    while parent.receive() is not None:
        pass
    assert child.send(Kind.READY)


def test_an_unknown_kind_and_an_oversized_message_are_refused(pair):
    parent, child = pair
    child.sock.send(b"\xffwhat")
    with pytest.raises(ChannelError, match="unknown kind 255"):
        parent.receive()
    child.sock.send(b"\x02" + b"x" * (MESSAGE_BYTES_MAX + 1))
    with pytest.raises(ChannelError, match="more than"):
        parent.receive()


@pytest.mark.parametrize("text", ["x" * (TEXT_CHARACTERS_MAX * 3), "\udc80" * (TEXT_CHARACTERS_MAX * 3), "🐎" * 9000])
def test_the_longest_log_line_fits_a_message(pair, text):
    parent, child = pair
    worker = role.WorkerRole(1, child)
    worker.log(300, text)
    assert worker.dropped == 0
    kind, body = parent.receive()
    assert kind is Kind.LOG
    priority, received = role.log_of_body(body)
    assert priority == 255
    assert "more characters" in received


def test_a_worker_counts_what_a_slow_parent_did_not_take_and_tells_it(pair):
    parent, child = pair
    worker = role.WorkerRole(7, child)
    for _ in range(3000):
        worker.log(LOG_ERR, "x" * 1000)
    lost = worker.dropped
    assert lost > 0
    read = 0
    while (message := parent.receive()) is not None:
        assert message[0] is Kind.LOG
        read += 1
    assert read + lost == 3000
    worker.log(LOG_ERR, "after")
    assert parent.receive() == (Kind.DROPPED, b"%d" % lost)
    assert parent.receive() == (Kind.LOG, b"\x03after")
    assert worker.dropped == 0


def test_a_log_message_of_a_broken_worker_is_read_all_the_same():
    assert role.log_of_body(b"") == (LOG_ERR, "")
    assert role.log_of_body(b"\x06\xff\xfe") == (6, r"\xff\xfe")
