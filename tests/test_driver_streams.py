"""The streams of the driver contract, on real sockets and on every engine."""

from __future__ import annotations

import gc
import os
import socket
import weakref

import pytest
from driver_harness import (
    SECONDS_MAX,
    Owner,
    Peer,
    echo,
    fds,
    own,
    processor_time,
    read_all,
    run,
    run_until_lost,
    same,
    tcp_listener,
    turns,
    unix_pair,
)

TEN_MIB = 10 << 20
PATTERN = bytes(range(256)) * 4096  # 1 MiB in which every shift shows


def test_echo(driver, each_pair) -> None:
    """What arrives can be answered at once, many times over."""
    near, far = each_pair
    owner = own(driver, near, Owner(echo))
    for number in range(100):
        far.sendall(b"%d" % number)
        run(driver, lambda n=number: owner.data.endswith(b"%d" % n))
        driver.wait(0)
        assert far.recv(64) == b"%d" % number
    assert not owner.losses


def test_nothing_is_called_inside_the_call_that_caused_it(driver, each_pair) -> None:
    """write, finish, close and abort call nobody back."""
    near, _ = each_pair
    owner = own(driver, near)
    owner.stream.write(b"x")
    owner.stream.finish()
    owner.stream.close()
    owner.stream.abort()
    assert not owner.losses
    run_until_lost(driver, owner)
    assert owner.losses == [0]


def test_pieces_leave_together_and_in_order(driver, each_pair) -> None:
    """Any number of pieces written in one turn, small, empty and large, arrive as they were written."""
    near, far = each_pair
    owner = own(driver, near)
    pieces = [b"a", b"", PATTERN, b"b" * 100, b"", *(b"%d;" % n for n in range(3000)), PATTERN[::-1]]
    received = []
    reader = Peer(target=lambda: received.append(read_all(far)))
    reader.start()
    for piece in pieces:
        owner.stream.write(piece)
    assert owner.stream.pending == sum(map(len, pieces))
    owner.stream.close()
    run_until_lost(driver, owner)
    reader.join(SECONDS_MAX)
    assert same(received[0], b"".join(pieces))


def test_empty_writes(driver, each_pair) -> None:
    """Writing nothing sends nothing and ends nothing."""
    near, far = each_pair
    owner = own(driver, near)
    owner.stream.write(b"")
    turns(driver)
    owner.stream.write(b"")
    owner.stream.write(b"")
    turns(driver)
    owner.stream.write(b"x")
    turns(driver)
    assert far.recv(8) == b"x"
    assert owner.stream.pending == 0
    assert not owner.losses


def test_ten_mib_to_a_slow_reader(driver, each_pair) -> None:
    """Output the kernel won't take is held, shown by `pending`, sent as room appears, and its end is told once."""
    near, far = each_pair
    owner = own(driver, near)
    for _ in range(TEN_MIB // len(PATTERN)):
        owner.stream.write(PATTERN)
    turns(driver)
    assert 0 < owner.stream.pending < TEN_MIB
    assert (owner.stalls, owner.drains) == (1, 0)
    owner.stream.write(b"the end")
    before = owner.stream.pending
    got = bytearray()
    far.setblocking(False)
    while len(got) < TEN_MIB + 7:
        driver.wait(0)
        try:
            got += far.recv(100_000)
        except BlockingIOError:
            driver.wait(0.01)
        if not owner.drains:
            assert owner.stream.pending <= before
    assert same(got, PATTERN * (TEN_MIB // len(PATTERN)) + b"the end")
    run(driver, lambda: owner.drains)
    assert owner.stream.pending == 0
    owner.stream.write(b"more")
    turns(driver)
    assert far.recv(16) == b"more"
    turns(driver)
    assert (owner.stalls, owner.drains) == (1, 1)


def test_what_a_callback_of_the_same_batch_writes_overtakes_nothing(driver, each_pair, tmp_path) -> None:
    """An operation that completes before it is known that the kernel did not take all: what it writes comes behind."""
    near, far = each_pair
    owner = own(driver, near)
    path = tmp_path / "file"
    path.write_bytes(PATTERN)
    fd = os.open(path, os.O_RDONLY)
    got = bytearray()
    far.setblocking(False)
    for _ in range(8):
        driver.read(fd, 131072, 0, lambda data: owner.stream.write(data + b"behind"))
        owner.stream.write(PATTERN * 4)
        turns(driver)
        expected = PATTERN * 4 + PATTERN[:131072] + b"behind"
        del got[:]

        def whole() -> bool:
            try:
                while True:
                    got.extend(far.recv(100_000))
            except BlockingIOError:
                return len(got) >= len(expected)  # noqa: B023

        while not whole():
            driver.wait(0.01)
        assert same(got, expected)
    os.close(fd)


def test_ten_mib_to_the_owner(driver, each_pair) -> None:
    """A fast sender's bytes all arrive, and in order."""
    near, far = each_pair
    owner = own(driver, near)

    def send() -> None:
        for _ in range(TEN_MIB // len(PATTERN)):
            far.sendall(PATTERN)
        far.shutdown(socket.SHUT_WR)

    sender = Peer(target=send)
    sender.start()
    run(driver, lambda: owner.ends)
    sender.join(SECONDS_MAX)
    assert same(owner.data, PATTERN * (TEN_MIB // len(PATTERN)))
    assert owner.ends == 1
    assert not owner.losses


def test_both_ways_at_once(driver, each_pair) -> None:
    """An echo of 10 MiB against a peer that reads while it writes."""
    near, far = each_pair
    own(driver, near, Owner(echo))
    received = []

    def read() -> None:
        got = bytearray()
        while len(got) < TEN_MIB:
            got += far.recv(65536)
        received.append(got)
        driver.wake()

    def send() -> None:
        for _ in range(TEN_MIB // len(PATTERN)):
            far.sendall(PATTERN)

    threads = [Peer(target=read), Peer(target=send)]
    for thread in threads:
        thread.start()
    run(driver, lambda: received)
    for thread in threads:
        thread.join(SECONDS_MAX)
    assert same(received[0], PATTERN * (TEN_MIB // len(PATTERN)))


def test_a_slow_stream_does_not_hold_up_another(driver, each_pair) -> None:
    """While one peer reads nothing, another is answered."""
    near, _ = each_pair
    slow = own(driver, near)
    slow.stream.write(bytes(TEN_MIB))
    other, peer = unix_pair()
    quick = own(driver, other, Owner(echo))
    for _ in range(5):
        peer.sendall(b"ping")
        run(driver, lambda: quick.data)
        driver.wait(0)
        assert peer.recv(8) == b"ping"
        quick.data.clear()
    assert slow.stream.pending > 0
    peer.close()


def test_pause_and_resume(driver, each_pair) -> None:
    """Nothing arrives while paused, nothing is lost by it, and resume() brings it without new input."""
    near, far = each_pair
    owner = own(driver, near)
    far.sendall(b"one")
    run(driver, lambda: owner.data == b"one")
    owner.stream.pause()
    turns(driver)
    far.sendall(b"two")
    turns(driver)
    driver.wait(0.05)
    turns(driver)
    assert owner.data == b"one"
    owner.stream.resume()
    assert owner.data == b"one", "resume() must not call back inside"
    run(driver, lambda: owner.data == b"onetwo")
    for _ in range(3):
        owner.stream.pause()
        owner.stream.resume()
    far.sendall(b"three")
    run(driver, lambda: owner.data == b"onetwothree")


def test_pause_inside_received(driver, each_pair) -> None:
    """An owner may pause at each piece; all of 1 MiB still arrives."""
    near, far = each_pair
    owner = own(driver, near, Owner(lambda me, data: me.stream.pause()))
    sender = Peer(target=lambda: (far.sendall(PATTERN), far.shutdown(socket.SHUT_WR)))
    sender.start()

    def resumed() -> bool:
        owner.stream.resume()
        return owner.ends == 1

    run(driver, resumed)
    sender.join(SECONDS_MAX)
    assert same(owner.data, PATTERN)


def test_paused_while_the_peer_leaves(driver, each_pair) -> None:
    """A peer that sends and closes while the owner is paused takes nothing of what it sent along. Nor does it spin."""
    near, far = each_pair
    owner = own(driver, near)
    owner.stream.pause()
    far.sendall(PATTERN[:50_000])
    far.close()
    turns(driver)
    before = processor_time()
    driver.wait(0.2)
    driver.wait(0.2)
    assert processor_time() - before < 0.1, "a paused stream whose peer left keeps the processor busy"
    assert not owner.losses
    owner.stream.resume()
    run(driver, lambda: owner.ends)
    assert same(owner.data, PATTERN[:50_000])


@pytest.mark.parametrize("act", ["close", "abort", "pause"])
def test_a_callback_acts_on_the_others_of_its_batch(driver, act: str) -> None:
    """Of many streams with input in one batch the first closes, aborts or pauses all others: they hear nothing more."""
    owners, peers = [], []

    def act_on_others(me: Owner, data: bytes) -> None:
        for other in owners:
            if other is not me and not other.data and not other.losses:
                getattr(other.stream, act)()

    for _ in range(20):
        near, far = unix_pair()
        far.sendall(b"x")
        owners.append(own(driver, near, Owner(act_on_others)))
        peers.append(far)
    run(driver, lambda: any(owner.data for owner in owners))
    turns(driver)
    assert sum(bool(owner.data) for owner in owners) == 1
    if act == "pause":
        for owner in owners:
            owner.on_received = None
            owner.stream.resume()
        run(driver, lambda: all(owner.data == b"x" for owner in owners))
    else:
        run(driver, lambda: sum(bool(owner.losses) for owner in owners) == 19)
        assert all(owner.losses in ([], [0]) for owner in owners)
    for peer in peers:
        peer.close()


def test_a_used_again_fd_number_meets_no_stranger(driver) -> None:
    """A stream closed in a batch, its number taken by a new connection: each hears its own, whatever was in flight."""
    seen: dict[bytes, bytes] = {}
    sockets = []
    for round_number in range(50):
        near, far = unix_pair()
        old = own(driver, near)
        fd = old.stream.fd
        far.sendall(b"for the old one")
        if round_number % 2:
            driver.wait(0)
        old.stream.abort()
        run(driver, lambda o=old: o.losses)
        turns(driver, 1)
        far.close()
        # The lowest free number is given out: the old one's, as a rule.
        near, far = unix_pair()
        word = b"for number %d" % round_number
        new = own(driver, near)
        seen[b"same" if new.stream.fd == fd else b"other"] = word
        far.sendall(word)
        run(driver, lambda n=new: n.data)
        assert new.data == word
        assert not new.ends
        assert not new.losses
        new.stream.close()
        run(driver, lambda n=new: n.losses)
        turns(driver, 1)
        sockets.append(far)
    for sock in sockets:
        sock.close()
    assert b"same" in seen, "the test did not bring about what it is for"


def test_a_copy_of_a_closed_fd_harms_nobody(driver) -> None:
    """A child about to exec may hold a copy of a closed fd: what its peer does reaches no one, and spins nothing."""
    near, far = unix_pair()
    copy = os.dup(near.fileno())
    old = own(driver, near)
    number = old.stream.fd
    turns(driver)
    old.stream.abort()
    run(driver, lambda: old.losses)
    turns(driver, 1)
    near, other = unix_pair()
    if near.fileno() != number:
        os.dup2(near.fileno(), number, inheritable=False)
        near.close()
        near = socket.socket(fileno=number)
    new = own(driver, near)
    far.sendall(b"for the copy")
    far.close()
    turns(driver)
    before = processor_time()
    driver.wait(0.2)
    assert processor_time() - before < 0.1, "events for a copy keep the processor busy"
    assert not new.data
    assert not new.losses
    other.sendall(b"for the new one")
    run(driver, lambda: new.data)
    assert new.data == b"for the new one"
    os.close(copy)
    other.close()


def test_connections_come_and_go_in_the_same_batch(driver) -> None:
    """Streams that end while an accept hands out their numbers again, hundreds of times: no word goes astray."""
    listener = tcp_listener()
    served = []

    def serve(me: Owner, data: bytes) -> None:
        if data:
            me.stream.write(data)
        else:
            me.stream.close()

    def accepted(fd: int) -> None:
        assert fd >= 0
        owner = Owner(serve)
        owner.stream = driver.stream(fd, owner)
        served.append(owner)

    operation = driver.accept(listener.fileno(), accepted)
    failures = []

    def client(number: int) -> None:
        for turn in range(40):
            word = b"%d-%d" % (number, turn)
            with socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX) as sock:
                sock.sendall(word)
                if sock.recv(64) != word:
                    failures.append(word)

    threads = [Peer(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    run(driver, lambda: len(served) == 320 and all(owner.losses for owner in served))
    for thread in threads:
        thread.join(SECONDS_MAX)
    operation.forget()
    turns(driver)
    listener.close()
    assert not failures
    assert all(owner.losses == [0] for owner in served)


def test_lost_may_write_to_others(driver) -> None:
    """What an owner does when it hears of a loss takes effect, without waiting for anything else to happen."""
    first, far_first = unix_pair()
    second, far_second = unix_pair()
    one, two = own(driver, first), own(driver, second)
    one.on_lost = lambda: two.stream.write(b"he is gone")
    one.stream.abort()
    run(driver, lambda: one.losses)
    driver.wait(0)
    assert far_second.recv(32, socket.MSG_DONTWAIT) == b"he is gone"
    far_first.close()
    far_second.close()


def test_an_exception_in_a_callback_loses_nothing(driver) -> None:
    """It comes out of wait(); streams after it in the batch still get their input, those before it their output."""
    raised = []

    def fail(me: Owner, data: bytes) -> None:
        me.stream.write(b"ok:" + data)
        raised.append(me)
        raise RuntimeError("from a callback")

    owners, peers = [], []
    for number in range(10):
        near, far = unix_pair()
        far.sendall(b"%d" % number)
        owners.append(own(driver, near, Owner(fail)))
        peers.append(far)
    failures = 0
    for _ in range(100):
        try:
            driver.wait(0)
        except RuntimeError:
            failures += 1
    assert failures == 10
    assert len(raised) == 10
    for number, far in enumerate(peers):
        assert far.recv(16, socket.MSG_DONTWAIT) == b"ok:%d" % number
        far.close()


def test_close_of_the_driver_calls_nobody(driver) -> None:
    """close() closes the streams' fds and calls nobody back; a second close() is nothing."""
    near, far = unix_pair()
    owner = own(driver, near)
    owner.stream.write(b"never sent")
    number = owner.stream.fd
    driver.close()
    driver.close()
    assert owner.losses == []
    assert number not in fds()
    far.settimeout(SECONDS_MAX)
    assert far.recv(16) == b""
    far.close()


def test_streams_that_are_over_are_not_kept(driver) -> None:
    """A driver holds on to nothing of a stream that is over."""

    def live() -> weakref.ref[Owner]:
        near, far = unix_pair()
        owner = own(driver, near)
        far.sendall(b"x")
        run(driver, lambda: owner.data)
        owner.stream.write(b"y")
        owner.stream.close()
        run_until_lost(driver, owner)
        far.close()
        owner.stream = None
        return weakref.ref(owner)

    reference = live()
    turns(driver)
    gc.collect()
    assert reference() is None
