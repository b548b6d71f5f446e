"""A worker's end of the messages, without a worker: what it refuses, and what becomes of it at the end."""

from __future__ import annotations

import threading
import time

import pytest

from kore.process.channel import Kind, channel_pair
from kore.process.pieces import OBJECT_BYTES_MAX, TO_ALL, Assembly
from kore.process.post import LAST_SECONDS, Post


@pytest.fixture
def pair():
    parent, child = channel_pair()
    yield parent, child
    parent.close()
    child.close()


def fill(post):
    """Send until it is refused; how many were taken."""
    count = 0
    with pytest.raises(RuntimeError, match="the parent is slow"):
        while count < 1000:
            post.send(Kind.OBJECT, TO_ALL, b"%d" % count + bytes(1_000_000))
            count += 1
    return count


def read_all(channel, found):
    assembly = Assembly()
    while True:
        try:
            message = channel.receive_message()
        except EOFError:
            return
        if message is not None and (whole := assembly.add(message)) is not None:
            found.append(whole.data().rstrip(b"\0"))


def test_what_waits_at_the_end_is_still_taken(pair):
    parent, child = pair
    post = Post(child)
    count = fill(post)
    found = []
    reader = threading.Thread(target=read_all, args=(parent, found))
    reader.start()
    post.close()
    child.close()
    reader.join()
    assert found == [b"%d" % number for number in range(count)]


def test_a_parent_that_reads_nothing_delays_the_end_by_a_moment_only(pair):
    _, child = pair
    post = Post(child)
    fill(post)
    begin = time.monotonic()
    post.close()
    post.close()
    assert LAST_SECONDS <= time.monotonic() - begin < LAST_SECONDS + 5


def test_a_parent_that_is_gone_delays_nothing(pair):
    parent, child = pair
    post = Post(child)
    fill(post)
    parent.close()
    post.close()
    with pytest.raises(RuntimeError, match="this worker has ended"):
        post.send(Kind.OBJECT, TO_ALL, b"late")


def test_what_is_too_long_is_refused_whole(pair):
    parent, child = pair
    post = Post(child)
    with pytest.raises(ValueError, match="at most 16777216"):
        post.send(Kind.OBJECT, TO_ALL, bytes(OBJECT_BYTES_MAX + 1))
    assert parent.receive_message() is None
