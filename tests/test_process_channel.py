"""The channel between parent and worker: whole messages, a bound, and an end that is noticed."""

from __future__ import annotations

import array
import os
import socket

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


class Marking:
    """A socket that shows with which flags it was sent to."""

    def __init__(self, sock):
        self.sock = sock
        self.flags = []

    def send(self, data, flags=0):
        self.flags.append(flags)
        return self.sock.send(data, flags)

    def sendmsg(self, buffers, ancillary=(), flags=0):
        self.flags.append(flags)
        return self.sock.sendmsg(buffers, ancillary, flags)


def test_the_end_of_each_message_is_marked(pair):
    """FreeBSD 15 runs messages together that have no mark between them."""
    parent, child = pair
    sock, child.sock = child.sock, Marking(child.sock)
    assert child.send(Kind.READY)
    assert child.send_message(b"\x20piece")
    assert child.send_fd(Kind.REOPEN, b"7", 0)
    assert child.send_last(Kind.SHUTDOWN)
    assert child.sock.flags == [socket.MSG_EOR] * 4
    child.sock = sock
    assert [parent.receive_message() for _ in range(4)] == [b"\x01", b"\x20piece", b"\x127", b"\x04"]


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


def test_a_descriptor_travels_along_and_is_close_on_exec(pair, tmp_path):
    parent, child = pair
    with (tmp_path / "file").open("wb") as file:
        assert parent.send_fd(Kind.REOPEN, b"7", file.fileno())
        assert parent.send(Kind.STOP, b"\x0f")
        kind, body, fd = child.receive_fd()
        assert (kind, body) == (Kind.REOPEN, b"7")
        assert os.path.samestat(os.fstat(fd), os.fstat(file.fileno()))
        assert not os.get_inheritable(fd)
        os.close(fd)
    assert child.receive_fd() == (Kind.STOP, b"\x0f", None)
    assert child.receive_fd() is None


def open_fds():
    return set(os.listdir("/proc/self/fd"))


def test_descriptors_that_nobody_asked_for_are_closed(pair):
    parent, child = pair
    before = open_fds()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 200))
    for _ in range(3):
        child.sock.sendmsg([b"\x01"], [rights])
    assert parent.receive() == (Kind.READY, b"")
    assert parent.receive_message() == b"\x01"
    assert open_fds() == before
    *_, fd = parent.receive_fd()
    assert len(open_fds() - before) == 1, "one fits, the others are closed"
    os.close(fd)


def test_a_message_waits_for_room_and_an_end_is_an_error(pair):
    parent, child = pair
    while child.send_message(b"\x20" + bytes(child.piece_bytes() - 1)):
        pass
    child.wait_for_room(0.01)
    while parent.receive_message() is not None:
        pass
    child.wait_for_room(20)
    assert child.send_message(b"\x20")
    parent.close()
    with pytest.raises(OSError):
        child.send_message(b"\x20")


def test_pieces_fit_a_small_buffer_several_times(pair):
    _, child = pair
    child.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel gives its least
    piece = b"\x20" + bytes(child.piece_bytes() - 1)
    assert len(piece) >= 1024
    assert child.send_message(piece)


@pytest.mark.parametrize(
    "message",
    [b"\xee" + b"unknown kind", b"", bytes((Kind.LOG,)) + b"x" * MESSAGE_BYTES_MAX],
    ids=["unknown kind", "empty", "too long"],
)
def test_a_descriptor_that_came_with_nonsense_is_closed(message):
    """Whoever sends it is killed for it; the next one would send one more, until there are none left."""
    mine, theirs = channel_pair()
    try:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        socket.send_fds(theirs.sock, [message], [writing])
        os.close(writing)
        with pytest.raises((ChannelError, EOFError)):
            mine.receive_fd()
        assert os.read(reading, 1) == b"", "nobody has the other end any more"
        os.close(reading)
    finally:
        mine.close()
        theirs.close()
