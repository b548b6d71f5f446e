"""What is peculiar to the readiness driver: its table, its timeouts, and the platform's poller under it."""

from __future__ import annotations

import errno
import os
import select
import socket

import pytest
from driver_harness import (
    ENGINES,
    Owner,
    Results,
    fds,
    make_driver,
    open_driver,
    own,
    processor_time,
    run,
    tcp_listener,
    turns,
    unix_pair,
)

from kore.errors import EngineError
from kore.readiness.driver import WITHDRAWN_TIMEOUTS_MIN
from kore.readiness.epoll import EpollDriver, EpollPoller
from kore.readiness.operation import Instant
from kore.readiness.watch import NOT_REGISTERED

POLLING = [name for name in ENGINES if name != "uring"]


@pytest.fixture(params=POLLING)
def driver(request):
    """The readiness driver on each poller."""
    yield from open_driver(request.param)


@pytest.fixture
def pair():
    """Two ends of a unix connection."""
    near, far = unix_pair()
    yield near, far
    near.close()
    far.close()


def test_the_table_is_empty_when_nothing_waits(driver, pair) -> None:
    """Operations and streams that are over leave no entry behind, save the wake pipe's."""
    near, far = pair
    own_entry = set(driver.table)
    results = Results()
    far.send(b"x")
    driver.receive(near.fileno(), 10, results)
    driver.poll(near.fileno(), select.POLLOUT, results)
    driver.poll_multishot(near.fileno(), select.POLLPRI, results).cancel()
    run(driver, lambda: len(results) == 3)
    assert set(driver.table) == own_entry
    owner = own(driver, near)
    assert set(driver.table) > own_entry
    owner.stream.close()
    run(driver, lambda: owner.losses)
    assert set(driver.table) == own_entry


def test_forgotten_before_it_began(driver, pair) -> None:
    """An operation forgotten in the turn it was asked for makes no call, and takes no input from others."""
    near, far = pair
    near.setblocking(False)
    far.send(b"y")
    results = Results()
    driver.receive(near.fileno(), 10, results).forget()
    driver.accept(near.fileno(), results).forget()
    driver.send(near.fileno(), b"x", results).forget()
    turns(driver)
    driver.receive(near.fileno(), 10, results)
    run(driver, lambda: results)
    assert results == [b"y"]
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)


def test_output_of_the_wrong_type_harms_only_itself(driver) -> None:
    """What is no bytes is a TypeError out of wait(), once; other streams' output leaves, in order and not twice."""
    pairs = [unix_pair() for _ in range(3)]
    owners = [own(driver, near) for near, _ in pairs]
    owners[0].stream.write(bytes(10 << 20))
    owners[1].stream.write("text")
    owners[2].stream.write(b"two")
    with pytest.raises(TypeError):
        driver.wait(0)
    owners[0].stream.write(b"end")
    got = bytearray()
    pairs[0][1].setblocking(False)
    while not got.endswith(b"end"):
        driver.wait(0)
        try:
            got += pairs[0][1].recv(1 << 20)
        except BlockingIOError:
            driver.wait(0.001)
    assert len(got) == (10 << 20) + 3
    assert pairs[2][1].recv(10) == b"two"
    for _, far in pairs:
        far.close()


def test_withdrawn_timeouts_are_swept(driver) -> None:
    """The heap does not grow with timeouts that were cancelled long before their time."""
    kept = driver.timeout(1000, lambda _: None)
    for _ in range(10_000):
        driver.timeout(1000, lambda _: None).forget()
    assert len(driver.timeouts) <= 2 * WITHDRAWN_TIMEOUTS_MIN + 1
    assert any(item[2] is kept for item in driver.timeouts)


def test_timeouts_forgotten_while_they_fire(driver) -> None:
    """A timeout may forget hundreds of others in its callback, and those after them still come."""
    fired = Results()
    others = []

    def forget_all(_: int) -> None:
        for other in others:
            other.forget()

    driver.timeout(0, forget_all)
    others += [driver.timeout(0, fired) for _ in range(500)]
    driver.timeout(0.001, fired)
    run(driver, lambda: fired)
    turns(driver)
    assert fired == [0]
    assert not driver.timeouts


def test_poll_on_a_regular_file(driver, tmp_path) -> None:
    """poll(2) calls a file always ready; polling it for ever is refused as epoll_ctl(2) does."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    once, for_ever = Results(), Results()
    driver.poll(fd, select.POLLIN, once)
    driver.poll_multishot(fd, select.POLLIN, for_ever)
    run(driver, lambda: once and for_ever)
    os.close(fd)
    assert (once, for_ever) == ([select.POLLIN], [-errno.EPERM])


def test_two_accepts_and_a_poll_on_one_listener(driver) -> None:
    """A listener can be waited on by several, although EPOLLEXCLUSIVE cannot be modified (epoll_ctl(2))."""
    accepted, polled = Results(), Results()
    with tcp_listener() as listener:
        operations = [driver.accept(listener.fileno(), accepted)]
        turns(driver)
        operations.append(driver.accept(listener.fileno(), accepted))
        driver.poll(listener.fileno(), select.POLLIN, polled)
        turns(driver)
        for count in (1, 2, 3):
            with socket.create_connection(listener.getsockname()):
                run(driver, lambda n=count: len(accepted) == n)
            if count == 2:
                operations[0].forget()
        operations[1].forget()
        turns(driver)
        assert polled == [select.POLLIN]
        assert listener.fileno() not in driver.table
    for fd in accepted:
        os.close(fd)


def test_the_burst_of_one_event_is_bounded(driver) -> None:
    """At most `accept_batch` connections a turn, so that other workers get theirs."""
    driver.accept_batch = 3
    accepted = Results()
    with tcp_listener() as listener:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(8)]
        operation = driver.accept(listener.fileno(), accepted)
        counts = []
        while len(accepted) < 8:
            driver.wait(5)
            counts.append(len(accepted))
        operation.forget()
    assert counts == [3, 6, 8]
    for client in clients:
        client.close()
    for fd in accepted:
        os.close(fd)


def test_a_poll_left_on_a_closed_fd(driver, pair) -> None:
    """An owner that closes a polled fd without a word, a mistake, does not harm the next user of its number."""
    near, _ = pair
    number = near.fileno()
    driver.poll(number, select.POLLIN, Results())
    turns(driver)
    near.close()
    near, other = unix_pair()
    assert near.fileno() == number
    results = Results()
    driver.poll(number, select.POLLIN, results)
    turns(driver)
    other.send(b"x")
    run(driver, lambda: results)
    assert results == [select.POLLIN]
    near.close()
    other.close()


def test_operations_on_a_stream_that_ends(driver, pair) -> None:
    """An operation on the fd of a stream ends with it."""
    near, _ = pair
    results = Results()
    owner = own(driver, near)
    driver.poll(owner.stream.fd, select.POLLPRI, results)
    turns(driver)
    owner.stream.abort()
    run(driver, lambda: owner.losses and results)
    assert results == [-errno.ECANCELED]


def test_a_poll_for_input_beside_a_stream(driver, pair) -> None:
    """Who polls a stream's fd for input hears of it although the stream reads it."""
    near, far = pair
    results = Results()
    owner = own(driver, near)
    driver.poll(owner.stream.fd, select.POLLIN, results)
    turns(driver)
    far.send(b"x")
    run(driver, lambda: owner.data and results)
    assert results == [select.POLLIN]
    far.send(b"y")
    run(driver, lambda: owner.data == b"xy")


def test_pausing_costs_no_system_call(driver, pair) -> None:
    """pause() and resume() in between events change nothing in the poller; paused input is asked about no more."""
    near, far = pair
    owner = own(driver, near)
    stream = owner.stream
    changes = []
    change = driver.poller.change
    driver.poller.change = lambda *arguments: (changes.append(arguments), change(*arguments))
    for _ in range(3):
        stream.pause()
        stream.resume()
    assert not changes
    stream.pause()
    far.send(b"x")
    turns(driver)
    assert changes == [(stream.fd, select.POLLIN, 0)]
    before = processor_time()
    driver.wait(0.1)
    assert processor_time() - before < 0.05
    stream.resume()
    run(driver, lambda: owner.data)


@pytest.mark.parametrize("io", POLLING)
def test_closing_the_driver_from_a_callback(io: str, pair) -> None:
    """close() in the middle of a batch: nobody else is called, and no fd is left."""
    before = fds()
    driver = make_driver(io)
    called = []
    peers = []

    def close(owner: Owner, data: bytes) -> None:
        called.append(data)
        driver.close()

    for _ in range(5):
        near, far = unix_pair()
        far.send(b"x")
        own(driver, near, Owner(close))
        peers.append(far)
    driver.timeout(0, called.append)
    driver.wait(1)
    assert called == [b"x"]
    for far in peers:
        far.close()
    assert fds() == before


def test_the_poller_copes_with_what_the_kernel_forgot_or_kept() -> None:
    """Changing what was forgotten registers it; registering what was kept begins anew."""
    poller = EpollPoller()
    near, far = unix_pair()
    fd = near.fileno()
    poller.change(fd, select.POLLIN, select.POLLIN)
    poller.change(fd, NOT_REGISTERED, select.POLLIN | select.POLLOUT)
    assert poller.poll(0, 10) == [(fd, select.POLLOUT)]
    poller.change(fd, select.POLLIN, NOT_REGISTERED)
    assert poller.poll(0, 10) == []
    poller.rotate(fd, select.POLLOUT)
    assert poller.poll(0, 10) == [(fd, select.POLLOUT)]
    poller.close()
    near.close()
    far.close()


def test_no_epoll_to_be_had(monkeypatch) -> None:
    """EngineError names the call and the errno."""
    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("kore.readiness.epoll.epoll", refuse)
    with pytest.raises(EngineError, match="epoll_create1") as caught:
        EpollDriver()
    assert caught.value.errno == errno.EMFILE


def test_splice_where_there_is_none(driver, monkeypatch) -> None:
    """-ENOSYS, as a kernel without it would say."""
    monkeypatch.delattr(os, "splice")
    results = Results()
    assert isinstance(driver.splice(0, -1, 1, 10, results), Instant)
    run(driver, lambda: results)
    assert results == [-errno.ENOSYS]
