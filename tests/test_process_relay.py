"""The relay on real channels: to whom, in what order, once; and what a worker that does not read costs the others."""

from __future__ import annotations

import resource
import selectors

import pytest

from kore.process.channel import ChannelError, Kind, channel_pair
from kore.process.log import Log
from kore.process.outbox import WAITING_BYTES_MAX, Outbox
from kore.process.pieces import HEADER, TO_ALL, TO_OTHERS, Assembly, cut
from kore.process.relay import MESSAGES_PER_TURN, Relay


class Lines:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.lines = []

    def write(self, priority, label, text):
        self.lines.append(text)
        return True

    def waiting_fd(self):
        return None


class House:
    """A relay with its selector, and the workers' ends of the channels."""

    def __init__(self):
        self.selector = selectors.DefaultSelector()
        self.sink = Lines()
        self.later = []
        self.relay = Relay(self.selector, Log(self.sink), lambda seconds, call: self.later.append(call))
        self.ends = {}
        self.parents_ends = {}
        self.nonsense = []

    def join(self, worker):
        mine, theirs = channel_pair()
        self.relay.join(worker, mine, lambda error: self.nonsense.append((worker, str(error))))
        self.ends[worker], self.parents_ends[worker] = theirs, mine

    def leave(self, worker):
        self.ends.pop(worker).close()
        self.relay.leave(worker)
        self.parents_ends.pop(worker).close()

    def send(self, worker, target, data, kind=Kind.OBJECT):
        for piece in cut(kind, target, data, self.ends[worker].piece_bytes()):
            while not self.ends[worker].send_message(piece):
                self.turn()

    def turn(self):
        """Everything that is ready now, once."""
        for key, _ in self.selector.select(0):
            key.data()

    def settle(self):
        while self.selector.select(0):
            self.turn()

    def received(self, worker):
        """What a worker gets when it reads to the end."""
        assembly, found = Assembly(), []
        while True:
            message = self.ends[worker].receive_message()
            if message is None:
                self.turn()
                message = self.ends[worker].receive_message()
                if message is None:
                    return found
            whole = assembly.add(message)
            if whole is not None:
                found.append(whole.data())

    def close(self):
        for end in (*self.ends.values(), *self.parents_ends.values()):
            end.close()
        self.selector.close()


@pytest.fixture
def house():
    house = House()
    for worker in (1, 2, 3):
        house.join(worker)
    yield house
    house.close()


def test_an_object_goes_to_whom_it_is_for(house):
    house.send(1, TO_ALL, b"all")
    house.send(1, 2, b"two")
    house.send(1, 1, b"self")
    house.send(1, TO_OTHERS, b"others", Kind.BROADCAST)
    house.send(1, 9, b"nobody")
    house.settle()
    assert house.received(1) == [b"all", b"self"]
    assert house.received(2) == [b"all", b"two", b"others"]
    assert house.received(3) == [b"all", b"others"]
    assert house.sink.lines == []


def test_objects_of_one_sender_stay_in_order_also_when_they_had_to_wait(house):
    sent = [b"%d " % number * (number % 50 * 300) for number in range(300)]
    for data in sent:
        house.send(1, 2, data)
    house.settle()
    assert house.received(2) == sent


def test_pieces_of_several_senders_do_not_mix(house):
    one, two = b"a" * 300_000, b"b" * 300_000
    pieces = [cut(Kind.OBJECT, 3, data, 60_000) for data in (one, two)]
    for first, second in zip(*pieces, strict=True):
        assert house.ends[1].send_message(first)
        assert house.ends[2].send_message(second)
        house.settle()
    assert sorted(house.received(3)) == [one, two]


def test_a_worker_that_does_not_read_loses_its_own_and_stalls_nobody(house):
    data = b"x" * 1_000_000
    for number in range(60):
        house.send(1, TO_OTHERS, b"%d" % number + data)
        assert house.received(3) == [b"%d" % number + data], "the one that reads gets everything at once"
    assert house.sink.lines == []
    while house.later:
        house.later.pop()()
    (line,) = house.sink.lines
    lost = int(line.split()[0])
    assert line == f"{lost} messages for worker 2 were dropped: it does not take them fast enough"
    got = house.received(2)
    assert got == [b"%d" % number + data for number in range(60 - lost)], "whole objects, in order, from the first on"
    assert lost > 30
    house.send(1, 2, b"afterwards")
    house.settle()
    assert house.received(2) == [b"afterwards"]


def test_losses_are_told_once_a_while_and_not_once_each(house):
    for _ in range(100):
        house.send(1, 2, bytes(1_000_000))
        house.settle()
    assert len(house.later) == 1


def test_many_small_objects_are_bounded_by_what_they_cost(house):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = 0
    while not house.later:
        house.send(1, 2, b"")
        house.settle()
        sent += 1
        assert sent < 1_000_000, "there is no bound"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 3 * WAITING_BYTES_MAX


def test_one_that_floods_leaves_the_others_their_turn(house):
    for _ in range(2 * MESSAGES_PER_TURN):
        house.send(1, 3, b"flood")
    house.send(2, 3, b"one word")
    house.turn()
    got = []
    while (message := house.ends[3].receive_message()) is not None:
        got.append(message[HEADER.size :])
    assert b"one word" in got
    assert got.count(b"flood") == MESSAGES_PER_TURN


def test_what_a_dead_worker_had_sent_is_passed_on_and_what_it_had_begun_is_not(house):
    house.send(1, 2, b"whole")
    begun, *_ = cut(Kind.OBJECT, 2, b"half" * 100_000, 60_000)
    assert house.ends[1].send_message(begun)
    house.leave(1)
    assert house.received(2) == [b"whole"]
    house.join(1)
    house.send(1, 2, b"from the successor")
    house.settle()
    assert house.received(2) == [b"from the successor"]


def test_a_successor_gets_what_is_sent_from_its_start_on_once(house):
    for _ in range(3):
        house.send(1, 2, b"to the first")
        house.settle()
        house.leave(2)
        house.send(1, 2, b"to nobody")
        house.settle()
        house.join(2)
        house.send(1, TO_ALL, b"to the successor")
        house.settle()
        assert house.received(2) == [b"to the successor"]
        assert house.received(1) == [b"to the successor"]


def test_what_waited_for_a_dead_worker_is_told(house):
    for _ in range(5):
        house.send(1, 2, bytes(1_000_000))
        house.settle()
    house.leave(2)
    (line,) = house.sink.lines
    assert line.endswith("messages for worker 2 were not taken before it died")


def test_a_worker_whose_end_is_seen_before_its_death_costs_nothing(house):
    house.ends[2].close()
    house.settle()
    house.send(1, TO_ALL, b"still here")
    house.settle()
    assert house.received(1) == [b"still here"]
    assert house.received(3) == [b"still here"]
    assert house.selector.select(0) == []
    house.leave(2)


@pytest.mark.parametrize("message", [b"\xfa", b"\x02\x06a log line", b"\x20\x00"])
def test_nonsense_is_told_and_read_no_further(house, message):
    assert house.ends[1].send_message(message)
    house.send(1, 2, b"after it")
    house.settle()
    ((worker, _),) = house.nonsense
    assert worker == 1
    assert house.received(2) == []


def test_an_outbox_takes_an_object_whole_or_not_at_all():
    mine, theirs = channel_pair()
    try:
        outbox = Outbox(mine)
        taken = 0
        while outbox.put(cut(Kind.OBJECT, 1, b"%d" % taken + bytes(3_000_000), mine.piece_bytes())):
            taken += 1
            assert taken < 100, "there is no bound"
        assert outbox.waiting
        assert 0 < outbox.bytes <= WAITING_BYTES_MAX
        assembly, found = Assembly(), []
        while (message := theirs.receive_message()) is not None or outbox.waiting:
            if message is None:
                outbox.flush()
            elif (whole := assembly.add(message)) is not None:
                found.append(whole.data())
        assert [data.rstrip(b"\0") for data in found] == [b"%d" % number for number in range(taken)]
        assert outbox.bytes == 0
    finally:
        mine.close()
        theirs.close()


def test_an_outbox_whose_peer_is_gone_takes_everything_and_keeps_nothing():
    mine, theirs = channel_pair()
    theirs.close()
    try:
        outbox = Outbox(mine)
        assert outbox.put([b"x"])
        assert outbox.gone
        assert outbox.put([b"y" * 1000])
        assert not outbox.waiting
    finally:
        mine.close()


def test_an_outbox_may_be_put_into_while_it_sends():
    mine, theirs = channel_pair()

    class Reentrant:
        """Puts another object in the middle of the first one, as a finalizer of the application might."""

        def __init__(self):
            self.again = True

        def send_message(self, message):
            if self.again:
                self.again = False
                outbox.put([b"two-1", b"two-2"])
            return mine.send_message(message)

    try:
        outbox = Outbox(Reentrant())
        outbox.put([b"one-1", b"one-2"])
        assert [theirs.receive_message() for _ in range(5)] == [b"one-1", b"one-2", b"two-1", b"two-2", None]
    finally:
        mine.close()
        theirs.close()


def test_an_assembly_error_names_what_came(house):
    with pytest.raises(ChannelError, match="READY"):
        Assembly().add(b"\x01")
