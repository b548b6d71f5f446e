"""The turn of the driver contract: timeouts, waking, exceptions, the end, and processes that share a listener."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from driver_harness import (
    DRIVERS,
    SECONDS_MAX,
    Owner,
    Results,
    make_driver,
    own,
    run,
    tcp_listener,
    turns,
    unix_pair,
)

# --- timeouts -------------------------------------------------------------------------------------------------


def test_timeouts_come_in_order_and_not_early(driver) -> None:
    """Each 0, none before its time, the earlier first."""
    started = time.monotonic()
    fired = []
    for milliseconds in (60, 20, 40, 0, 20):
        driver.timeout(
            milliseconds / 1000, lambda result, ms=milliseconds: fired.append((ms, result, time.monotonic() - started)))
    assert not fired
    run(driver, lambda: len(fired) == 5)
    assert [ms for ms, _, _ in fired] == [0, 20, 20, 40, 60]
    assert all(result == 0 for _, result, _ in fired)
    assert all(after >= ms / 1000 for ms, _, after in fired)


def test_timeout_cancelled(driver) -> None:
    """-ECANCELED in place of 0; forgotten: nothing. They do not hold a wait back or bring it to an early end."""
    cancelled, forgotten, fired = Results(), Results(), Results()
    operation = driver.timeout(0.01, cancelled)
    driver.timeout(0.01, forgotten).forget()
    turns(driver)
    operation.cancel()
    driver.timeout(0.05, fired)
    run(driver, lambda: fired)
    turns(driver)
    assert (cancelled, forgotten, fired) == ([-errno.ECANCELED], [], [0])
    operation.cancel()
    turns(driver)
    assert cancelled == [-errno.ECANCELED]


def test_many_cancelled_timeouts(driver) -> None:
    """Thousands made and dropped, as deadlines are, and the ones that count still come."""
    fired = Results()
    driver.timeout(0.1, fired)
    for _ in range(20):
        batch = [driver.timeout(100 + number, fired) for number in range(200)]
        driver.wait(0)
        for operation in batch:
            operation.forget()
    run(driver, lambda: fired)
    turns(driver)
    assert fired == [0]


def test_a_timeout_asked_for_by_a_timeout(driver) -> None:
    """A chain of timeouts of zero seconds goes on from turn to turn, and lets others in between."""
    near, far = unix_pair()
    owner = own(driver, near)
    count = 0

    def again(_: int) -> None:
        nonlocal count
        count += 1
        if not owner.data:
            driver.timeout(0, again)

    driver.timeout(0, again)
    far.send(b"x")
    run(driver, lambda: owner.data)
    assert count < 100
    turns(driver)
    far.close()


def test_wait_is_as_long_as_asked(driver) -> None:
    """wait(0) only looks; wait(seconds) returns when they are over, not before, nor much later."""
    started = time.monotonic()
    driver.wait(0)
    assert time.monotonic() - started < SECONDS_MAX / 2
    started = time.monotonic()
    driver.wait(0.1)
    assert 0.09 <= time.monotonic() - started < SECONDS_MAX / 2
    driver.timeout(50, lambda _: None)
    started = time.monotonic()
    driver.wait(0.05)
    driver.wait(-1.0)
    assert time.monotonic() - started < SECONDS_MAX / 2


# --- the turn -------------------------------------------------------------------------------------------------


def test_wake_from_a_thread(driver) -> None:
    """wake() ends a wait that nothing else would, from another thread; many of them do no harm."""
    for _ in range(5):
        thread = threading.Timer(0.02, driver.wake)
        thread.start()
        started = time.monotonic()
        driver.wait(SECONDS_MAX)
        assert time.monotonic() - started < SECONDS_MAX / 2
        thread.join()
        turns(driver)
    for _ in range(100_000):
        driver.wake()
    for _ in range(200):
        driver.wait(0)
    started = time.monotonic()
    driver.wait(0.1)
    assert time.monotonic() - started >= 0.09, "old wake-ups go on ending waits"


def test_wake_before_the_wait_counts(driver) -> None:
    """A wake-up that comes before the wait is not lost."""
    driver.wake()
    started = time.monotonic()
    driver.wait(SECONDS_MAX)
    assert time.monotonic() - started < SECONDS_MAX / 2


def test_wake_by_a_signal(driver) -> None:
    """With wake_fd as the wakeup fd a signal ends the wait, and its handler has run then."""
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(True))
    old = signal.set_wakeup_fd(driver.wake_fd)
    try:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        run(driver, lambda: seen)
        timer.join()
    finally:
        signal.set_wakeup_fd(old)
        signal.signal(signal.SIGUSR1, before)


def test_wake_after_close() -> None:
    """A late wake() of a closed driver harms nobody, whoever has the number now."""
    for io in DRIVERS:
        try:
            driver = make_driver(io)
        except pytest.skip.Exception:
            continue
        near, far = unix_pair()
        far.setblocking(False)
        number = driver.wake_fd
        driver.close()
        os.dup2(near.fileno(), number, inheritable=False)
        driver.wake()
        with pytest.raises(BlockingIOError):
            far.recv(1)
        os.close(number)
        near.close()
        far.close()


def test_an_exception_of_an_operations_callback(driver, pair) -> None:
    """It comes out of wait() once; the other results of the turn are delivered all the same."""
    near, far = pair
    results = Results()

    def fail(_: object) -> None:
        raise RuntimeError("from a callback")

    driver.send(near.fileno(), b"x", results)
    driver.send(near.fileno(), b"y", fail)
    driver.send(near.fileno(), b"z", results)
    failures = 0
    for _ in range(20):
        try:
            driver.wait(0)
        except RuntimeError:
            failures += 1
    assert failures == 1
    assert results == [1, 1]
    assert far.recv(10) == b"xyz"


def test_close_with_operations_in_flight(driver, listener, pair) -> None:
    """close() ends them without a word; the listener is not the driver's and stays open."""
    results = Results()
    driver.accept(listener.fileno(), results)
    driver.receive(pair[0].fileno(), 10, results)
    driver.poll_multishot(pair[0].fileno(), select.POLLIN, results)
    driver.timeout(0.001, results)
    driver.timeout(100, results)
    turns(driver, 1)
    driver.send(pair[0].fileno(), b"x", results)
    driver.close()
    assert [result for result in results if result != 0] == []
    with socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX):
        listener.settimeout(SECONDS_MAX)
        listener.accept()[0].close()


# --- several processes on one listener --------------------------------------------------------------------------


def serve_connections(io: str, listener: socket.socket, ready_fd: int) -> None:
    """A worker: a byte when it accepts; to each connection its pid, then close. It ends when it is killed."""
    driver = make_driver(io)
    word = b"%d" % os.getpid()

    def answer(me: Owner, data: bytes) -> None:
        me.stream.close() if not data else me.stream.write(word)

    def accepted(fd: int) -> None:
        owner = Owner(answer)
        owner.stream = driver.stream(fd, owner)

    driver.accept(listener.fileno(), accepted)
    driver.wait(0)
    os.write(ready_fd, b"x")
    while True:
        driver.wait(None)


@pytest.mark.parametrize("io", DRIVERS)
@pytest.mark.parametrize("at_once", [1, 20])
def test_two_processes_share_a_listener(io: str, at_once: int) -> None:
    """Every one of 200 connections is answered, and each of two workers has more than a fifth of them.

    On kqueue all who wait are woken and nothing ranks them: which of two has how many is the scheduler's affair.
    """
    make_driver(io).close()  # skips here, in the parent
    workers = []
    shares: dict[bytes, int] = {}
    ready, ready_fd = os.pipe()
    with tcp_listener() as listener, open(ready, "rb"), open(ready_fd, "wb"):
        try:
            for _ in range(2):
                pid = os.fork()
                if pid == 0:
                    try:
                        serve_connections(io, listener, ready_fd)
                    finally:
                        os._exit(1)
                workers.append(pid)
            for _ in workers:
                os.read(ready, 1)
            for _ in range(200 // at_once):
                clients = [
                    socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX) for _ in range(at_once)]
                for client in clients:
                    client.sendall(b"who")
                for client in clients:
                    answer = client.recv(64)
                    shares[answer] = shares.get(answer, 0) + 1
                    client.close()
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    assert set(shares) <= {b"%d" % pid for pid in workers}
    assert sum(shares.values()) == 200
    if io == "kqueue":
        return
    assert len(shares) == 2, f"one worker had them all: {shares}"
    assert min(shares.values()) > 40, shares


def test_epoll_makes_no_io_uring_call() -> None:
    """The epoll engine imports nothing of the ring's, so it can make none of its calls."""
    code = (
        "import sys, kore.readiness.epoll; d = kore.readiness.epoll.EpollDriver(); d.wait(0); d.close(); "
        "print([name for name in sys.modules if 'uring' in name or name == 'ctypes'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
