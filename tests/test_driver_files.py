"""Operations of the driver contract on any fd: poll, read, write and splice, on every engine."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time

import pytest
from driver_harness import (
    SECONDS_MAX,
    Results,
    own,
    processor_time,
    run,
    turns,
    unix_pair,
)


@pytest.fixture
def pipe():
    """A non-blocking pipe: reading end, writing end."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield read_fd, write_fd
    for fd in (read_fd, write_fd):
        with contextlib.suppress(OSError):
            os.close(fd)


# --- poll -----------------------------------------------------------------------------------------------------


def test_poll_once(driver, pair) -> None:
    """The events, once."""
    near, far = pair
    results = Results()
    driver.poll(near.fileno(), select.POLLIN, results)
    turns(driver)
    assert not results
    far.send(b"x")
    run(driver, lambda: results)
    turns(driver)
    assert results == [select.POLLIN]
    driver.poll(near.fileno(), select.POLLOUT, results)
    run(driver, lambda: len(results) == 2)
    assert results[1] == select.POLLOUT


def test_poll_multishot_is_level_triggered(driver, pair) -> None:
    """At least one call a turn while it holds, none while it does not, until cancelled."""
    near, far = pair
    results = Results()
    operation = driver.poll_multishot(near.fileno(), select.POLLIN, results)
    turns(driver)
    assert not results
    far.send(b"xy")
    run(driver, lambda: results)
    for _ in range(5):
        count = len(results)
        driver.wait(1.0)
        assert len(results) > count, "the event holds, and nobody was called"
    near.recv(1)
    count = len(results)
    driver.wait(1.0)
    assert len(results) > count
    near.recv(1)
    turns(driver)
    count = len(results)
    turns(driver)
    assert len(results) == count
    far.send(b"z")
    run(driver, lambda: len(results) > count)
    assert all(result & select.POLLIN for result in results)
    operation.cancel()
    run(driver, lambda: results[-1] == -errno.ECANCELED)
    count = len(results)
    turns(driver)
    assert len(results) == count


def test_poll_tells_of_a_hangup(driver, pair) -> None:
    """POLLHUP comes without being asked for (poll(2))."""
    near, far = pair
    results = Results()
    driver.poll(near.fileno(), select.POLLPRI, results)
    turns(driver)
    far.close()
    run(driver, lambda: results)
    assert results[0] & select.POLLHUP


def test_two_polls_on_one_fd(driver, pair) -> None:
    """Input and output of one fd can be waited for apart; each hears only its own, and ending one leaves the other."""
    near, far = pair
    readable, writable = Results(), Results()
    reading = driver.poll_multishot(near.fileno(), select.POLLIN, readable)
    writing = driver.poll_multishot(near.fileno(), select.POLLOUT, writable)
    run(driver, lambda: writable)
    assert not readable
    writing.forget()
    turns(driver)
    writable.clear()
    far.send(b"x")
    run(driver, lambda: readable)
    assert not writable
    reading.forget()
    turns(driver)


def test_a_callback_cancels_the_other_poll(driver) -> None:
    """Of two fds ready in one batch, the first to be told forgets the other, which then hears nothing."""
    pairs = [unix_pair(), unix_pair()]
    operations = {}
    heard = []

    def told(name: int) -> None:
        heard.append(name)
        operations[1 - name].forget()

    for name, (near, far) in enumerate(pairs):
        near.setblocking(False)
        far.send(b"x")
        operations[name] = driver.poll_multishot(near.fileno(), select.POLLIN, lambda _, n=name: told(n))
    run(driver, lambda: heard)
    turns(driver)
    assert len(set(heard)) == 1
    operations[heard[0]].forget()
    turns(driver)
    for near, far in pairs:
        near.close()
        far.close()


def test_poll_on_a_closed_and_reused_fd(driver) -> None:
    """A number that was polled, closed and given out again: the new poll works."""
    for _ in range(20):
        near, far = unix_pair()
        near.setblocking(False)
        results = Results()
        operation = driver.poll_multishot(near.fileno(), select.POLLIN, results)
        far.send(b"x")
        run(driver, lambda r=results: r)
        operation.forget()
        near.close()
        far.close()


def test_poll_on_a_streams_fd(driver, pair) -> None:
    """An operation may wait on the fd of a stream: the stream keeps its input, the operation gets its event."""
    near, far = pair
    results = Results()
    owner = own(driver, near)
    operation = driver.poll(owner.stream.fd, select.POLLOUT, results)
    run(driver, lambda: results)
    assert results == [select.POLLOUT]
    far.send(b"x")
    run(driver, lambda: owner.data == b"x")
    operation = driver.poll_multishot(owner.stream.fd, select.POLLOUT, results)
    far.send(b"y")
    run(driver, lambda: owner.data == b"xy")
    operation.forget()
    turns(driver)
    far.send(b"z")
    run(driver, lambda: owner.data == b"xyz")


# --- files, splice, shutdown, close ---------------------------------------------------------------------------


def test_read_a_file(driver, tmp_path) -> None:
    """At an offset, at its position, past its end."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    results = Results()
    fd = os.open(path, os.O_RDONLY)
    for length, offset in ((4, 2), (3, -1), (100, -1), (100, -1), (10, 100)):
        count = len(results)
        driver.read(fd, length, offset, results)
        assert len(results) == count
        run(driver, lambda c=count: len(results) > c)
    os.close(fd)
    assert results == [b"2345", b"012", b"3456789", b"", b""]


def test_read_a_directory(driver, tmp_path) -> None:
    """-EISDIR as a result."""
    results = Results()
    fd = os.open(tmp_path, os.O_RDONLY)
    driver.read(fd, 10, 0, results)
    driver.read(fd, 10, -1, results)
    run(driver, lambda: len(results) == 2)
    os.close(fd)
    assert results == [-errno.EISDIR] * 2


@pytest.mark.parametrize("blocking", [True, False])
def test_read_a_pipe(driver, pipe, blocking: bool) -> None:
    """A read from an empty pipe waits for bytes without holding up anyone, also when the pipe is in blocking mode."""
    read_fd, write_fd = pipe
    os.set_blocking(read_fd, blocking)
    results = Results()
    driver.read(read_fd, 100, -1, results)
    turns(driver)
    assert not results
    os.write(write_fd, b"abc")
    run(driver, lambda: results)
    os.close(write_fd)
    driver.read(read_fd, 100, -1, results)
    run(driver, lambda: len(results) == 2)
    assert results == [b"abc", b""]


def test_splice_a_file_to_a_socket(driver, pair, pipe, tmp_path) -> None:
    """A file through a pipe into a socket, in as many steps as the kernel wants, with a reader who takes its time."""
    near, far = pair
    read_fd, write_fd = pipe
    content = os.urandom(1 << 20)
    path = tmp_path / "file"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    state = {"offset": 0, "piped": 0, "sent": 0}
    errors = []

    def piped(result: int) -> None:
        if result < 0:
            errors.append(result)
            return
        state["offset"] += result
        state["piped"] = result
        driver.splice(read_fd, -1, near.fileno(), result, sent)

    def sent(result: int) -> None:
        if result <= 0:
            errors.append(result)
            return
        state["sent"] += result
        state["piped"] -= result
        if state["piped"]:
            driver.splice(read_fd, -1, near.fileno(), state["piped"], sent)
        elif state["offset"] < len(content):
            driver.splice(fd, state["offset"], write_fd, 65536, piped)

    driver.splice(fd, 0, write_fd, 65536, piped)
    turns(driver, 20)
    got = bytearray()

    def everything() -> bool:
        with contextlib.suppress(BlockingIOError):
            got.extend(far.recv(30_000))
        if not got or len(got) < len(content):
            driver.wait(0)
        return bool(errors) or len(got) == len(content)

    deadline = time.monotonic() + SECONDS_MAX
    while not everything():
        assert time.monotonic() < deadline
        driver.wait(0.001)
    os.close(fd)
    assert not errors
    assert bytes(got) == content, "what came out is not what went in"


def test_splice_waits_for_input(driver, pair, pipe) -> None:
    """From an idle socket into a pipe: it waits, without holding up others or spinning."""
    near, far = pair
    results = Results()
    driver.splice(near.fileno(), -1, pipe[1], 100, results)
    turns(driver)
    before = processor_time()
    driver.wait(0.2)
    assert processor_time() - before < 0.1
    assert not results
    far.send(b"hello")
    run(driver, lambda: results)
    assert results == [5]
    assert os.read(pipe[0], 100) == b"hello"


def test_splice_waits_for_room_in_the_pipe(driver, pair, pipe) -> None:
    """From a socket with input into a full pipe: it waits for the pipe."""
    near, far = pair
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe[1], bytes(4096))
    far.send(b"hello")
    results = Results()
    operation = driver.splice(near.fileno(), -1, pipe[1], 100, results)
    turns(driver)
    assert not results
    with contextlib.suppress(BlockingIOError):
        while True:
            os.read(pipe[0], 65536)
    run(driver, lambda: results)
    assert results == [5]
    operation.cancel()
    turns(driver)
    assert results == [5]


def test_splice_cancelled(driver, pair, pipe) -> None:
    """A splice that waits can be given up."""
    results = Results()
    operation = driver.splice(pair[0].fileno(), -1, pipe[1], 100, results)
    turns(driver)
    operation.cancel()
    run(driver, lambda: results)
    assert results == [-errno.ECANCELED]


def test_splice_needs_a_pipe(driver, pair, tmp_path) -> None:
    """-EINVAL as splice(2) has it."""
    results = Results()
    driver.splice(pair[0].fileno(), -1, pair[1].fileno(), 10, results)
    run(driver, lambda: results)
    assert results == [-errno.EINVAL]


def test_write_to_a_pipe(driver, pipe) -> None:
    """What fits is taken at once; a full pipe is waited for without holding up anyone; nobody left is -EPIPE."""
    read_fd, write_fd = pipe
    results = Results()
    driver.write(write_fd, b"abc", results)
    run(driver, lambda: results)
    assert results == [3]
    assert os.read(read_fd, 10) == b"abc"
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_fd, bytes(4096))
    driver.write(write_fd, b"x" * 1000, results)
    turns(driver)
    assert len(results) == 1
    os.read(read_fd, 65536)
    run(driver, lambda: len(results) == 2)
    assert results[1] == 1000
    os.close(read_fd)
    driver.write(write_fd, b"x", results)
    run(driver, lambda: len(results) == 3)
    assert results[2] == -errno.EPIPE


def test_write_cancelled(driver, pipe) -> None:
    """A write to a full pipe can be given up, and has then written nothing."""
    read_fd, write_fd = pipe
    held = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            held += os.write(write_fd, bytes(4096))
    results = Results()
    operation = driver.write(write_fd, b"x" * 1000, results)
    turns(driver)
    operation.cancel()
    run(driver, lambda: results)
    assert results == [-errno.ECANCELED]
    assert os.read(read_fd, held + 1000) == bytes(held)
