"""The ring on a real kernel: what it does, and every hazard that comes with it."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from kore.errors import EngineError
from kore.uring.driver import UringDriver
from kore.uring.probe import supported_operations
from kore.uring.restrictions import CONNECTING, OPEN
from kore.uring.ring import Ring
from kore.uring.structures import (
    IORING_ACCEPT_MULTISHOT,
    IORING_CQE_F_MORE,
    IORING_OP_ACCEPT,
    IORING_OP_ASYNC_CANCEL,
    IORING_OP_NOP,
    IORING_OP_POLL_ADD,
    IORING_OP_RECV,
    IORING_OP_SEND,
    IORING_POLL_ADD_MULTI,
)

DEADLINE_S = 10.0


@pytest.fixture
def ring() -> Iterator[Ring]:
    try:
        ring = Ring(8, 16)
    except EngineError as error:
        pytest.skip(str(error))
    ring.enable(None)
    yield ring
    ring.close()


@pytest.fixture(params=[OPEN, CONNECTING], ids=["sends", "writes"])
def driver(request: pytest.FixtureRequest) -> Iterator[UringDriver]:
    try:
        driver = UringDriver(64, request.param)
    except EngineError as error:
        pytest.skip(str(error))
    yield driver
    driver.close()


class Owner:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.ends: list[int] = []
        self.stalls = 0
        self.drains = 0

    def received(self, data: bytes) -> None:
        self.data.append(data)

    def stalled(self) -> None:
        self.stalls += 1

    def drained(self) -> None:
        self.drains += 1

    def lost(self, error: int) -> None:
        self.ends.append(error)


def turn_until(driver: UringDriver, condition: Callable[[], object]) -> None:
    """Turn until `condition` holds; fail when it does not in time."""
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        driver.wait(0.05)


def completions(ring: Ring, count: int) -> list[tuple[int, int, int, int]]:
    """Enter until `count` completions have been reaped."""
    found: list[tuple[int, int, int, int]] = []
    until = time.monotonic() + DEADLINE_S
    while len(found) < count and time.monotonic() < until:
        ring.enter(1, 0.2)
        found += ring.reap()
    return found


def test_nop_completes_with_its_user_data(ring: Ring) -> None:
    ring.push(IORING_OP_NOP, 0, 0, -1, 0, 0, 0, 0, 77)
    assert completions(ring, 1) == [(77, 0, 0, 0)]


def test_probe_knows_what_the_kernel_supports(ring: Ring) -> None:
    there = supported_operations(ring)
    assert {IORING_OP_ACCEPT, IORING_OP_RECV, IORING_OP_SEND, IORING_OP_NOP} <= there
    assert 255 not in there


def test_full_submission_queue_loses_nothing(ring: Ring) -> None:
    for number in range(1, 101):
        ring.push(IORING_OP_NOP, 0, 0, -1, 0, 0, 0, 0, number)
    found = completions(ring, 100)
    assert sorted(key for key, *_ in found) == list(range(1, 101))


def test_completion_queue_overflow_loses_nothing(ring: Ring) -> None:
    count = ring.completions * 4
    for number in range(count):
        ring.push(IORING_OP_NOP, 0, 0, -1, 0, 0, 0, 0, number + 1)
    ring.enter(0, 0.0, reap=False)
    assert ring.overflown, "the queue was meant to overflow"
    found = completions(ring, count)
    assert sorted(key for key, *_ in found) == list(range(1, count + 1))
    assert not ring.overflown


def test_wait_ends_after_its_timeout(ring: Ring) -> None:
    started = time.monotonic()
    ring.enter(1, 0.05)
    assert 0.04 < time.monotonic() - started < 5
    assert list(ring.reap()) == []


def test_cancel_ends_an_operation(ring: Ring) -> None:
    reader, writer = os.pipe()
    try:
        ring.push(IORING_OP_POLL_ADD, 0, 0, reader, 0, 0, 0, select.POLLIN, 5)
        ring.push(IORING_OP_ASYNC_CANCEL, 0, 0, -1, 0, 5, 0, 0, 6)
        found = {key: res for key, res, *_ in completions(ring, 2)}
        assert found == {5: -errno.ECANCELED, 6: 0}
    finally:
        os.close(reader)
        os.close(writer)


def test_multishot_accept_and_poll_answer_repeatedly(ring: Ring) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ring.push(IORING_OP_ACCEPT, 0, IORING_ACCEPT_MULTISHOT, listener.fileno(), 0, 0, 0, os.O_CLOEXEC, 9)
        clients = [socket.create_connection(listener.getsockname()) for _ in range(3)]
        found = completions(ring, 3)
        assert [key for key, *_ in found] == [9, 9, 9]
        assert all(flags & IORING_CQE_F_MORE for _, _, flags, _ in found)
        for _, fd, *_ in found:
            os.close(fd)
        for client in clients:
            client.close()
    reader, writer = os.pipe()
    ring.push(IORING_OP_POLL_ADD, 0, 0, reader, 0, 0, IORING_POLL_ADD_MULTI, select.POLLIN, 10)
    for _ in range(2):
        ring.enter(0, 0.0)
        os.write(writer, b"x")
        assert [(key, res) for key, res, *_ in completions(ring, 1)] == [(10, select.POLLIN)]
    os.close(reader)
    os.close(writer)


def test_closed_ring_refuses_use(ring: Ring) -> None:
    ring.close()
    with pytest.raises(ValueError, match="released"):
        ring.push(IORING_OP_NOP, 0, 0, -1, 0, 0, 0, 0, 1)
    ring.close()


def test_fork_leaves_the_ring_to_the_parent(driver: UringDriver) -> None:
    """A child neither writes the parent's queues nor keeps its ring alive, and the parent goes on."""
    here, there = socket.socketpair()
    owner = Owner()
    stream = driver.stream(here.detach(), owner)
    driver.wait(0)
    ring_fd = driver.ring.fd
    child = os.fork()
    if child == 0:
        verdict = 1
        try:
            os.fstat(ring_fd)
        except OSError:
            try:
                driver.wait(0)
            except ValueError:
                verdict = 0
        os._exit(verdict)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    there.sendall(b"after")
    stream.write(b"too")
    turn_until(driver, lambda: owner.data)
    assert owner.data == [b"after"]
    assert there.recv(10) == b"too"
    there.close()


def test_running_out_of_buffers_loses_nothing(driver: UringDriver) -> None:
    """More input in one turn than there are buffers: receives end with ENOBUFS and are armed again."""
    pairs = []
    for _ in range(20):
        here, there = socket.socketpair()
        owner = Owner()
        driver.stream(here.detach(), owner)
        pairs.append((there, owner))
    driver.wait(0)
    before = driver.buffers.count
    size = 10 * driver.buffers.size
    for there, _ in pairs:
        there.sendall(b"x" * size)
    turn_until(driver, lambda: all(sum(map(len, owner.data)) == size for _, owner in pairs))
    assert driver.buffers.count > before, "the buffers were meant to run out"
    for there, _ in pairs:
        there.close()
    turn_until(driver, lambda: all(owner.data[-1] == b"" for _, owner in pairs))


def test_operation_whose_owner_is_gone_disposes_of_its_result(driver: UringDriver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard: list[int] = []
        operation = driver.accept(listener.fileno(), heard.append)
        driver.wait(0)
        before = len(os.listdir("/proc/self/fd"))
        with socket.create_connection(listener.getsockname()) as client:
            operation.forget()
            del operation
            for _ in range(5):
                driver.wait(0.01)
            assert heard == []
            client.settimeout(DEADLINE_S)
            assert len(os.listdir("/proc/self/fd")) == before + 1, "the accepted fd was kept"


def test_memory_of_a_dropped_read_outlives_it(driver: UringDriver) -> None:
    """The kernel may still write to the buffer of an operation nobody waits for."""
    reader, writer = os.pipe()
    operation = driver.read(reader, 4096, -1, lambda result: pytest.fail("forgotten, yet called"))
    driver.wait(0)
    key = operation.key
    operation.forget()
    assert driver.live[key].keep is not None
    del operation
    os.write(writer, b"late")
    turn_until(driver, lambda: key not in driver.live)
    os.close(reader)
    os.close(writer)


def cancel_late(driver: UringDriver) -> None:
    """Cancel a poll whose completion is on its way."""
    reader, writer = os.pipe()
    heard: list[int] = []
    operation = driver.poll(reader, select.POLLIN, heard.append)
    driver.wait(0)
    os.write(writer, b"x")
    operation.cancel()
    turn_until(driver, lambda: heard)
    driver.wait(0)
    assert heard in ([select.POLLIN], [-errno.ECANCELED])
    os.close(reader)
    os.close(writer)


def test_cancel_racing_completion_calls_back_once(driver: UringDriver) -> None:
    for _ in range(50):
        cancel_late(driver)


def test_late_completion_finds_nobody(driver: UringDriver) -> None:
    """Keys are never used twice: input for a stream that is gone does not reach one made since."""
    here, there = socket.socketpair()
    old = Owner()
    driver.stream(here.detach(), old)
    driver.wait(0)
    there.sendall(b"for the old one")
    stream = next(who for who in driver.live.values() if getattr(who, "owner", None) is old)
    stream.abort()
    driver._end()
    here2, there2 = socket.socketpair()
    new = Owner()
    driver.stream(here2.detach(), new)
    for _ in range(5):
        driver.wait(0.01)
    assert old.data == []
    assert old.ends == [0]
    assert new.data == []
    there.close()
    there2.close()


def use_fd_again(driver: UringDriver, word: bytes) -> None:
    """Close a stream and make another on the same fd number."""
    here, there = socket.socketpair()
    owner = Owner()
    stream = driver.stream(here.detach(), owner)
    driver.wait(0)
    fd = stream.fd
    stream.abort()
    turn_until(driver, lambda: owner.ends)
    driver.wait(0)  # the close is submitted
    assert there.recv(1) == b""
    here2, there2 = socket.socketpair()
    if there2.fileno() == fd:
        here2, there2 = there2, here2
    if here2.fileno() == fd:
        here2.detach()
    else:
        os.dup2(here2.fileno(), fd)
        here2.close()
    second = Owner()
    again = driver.stream(fd, second)
    there2.sendall(word)
    turn_until(driver, lambda: second.data)
    assert second.data == [word]
    assert owner.data == []
    again.abort()
    turn_until(driver, lambda: second.ends)
    there.close()
    there2.close()


def test_closed_fd_number_used_again(driver: UringDriver) -> None:
    """A stream made on the fd number of one just closed gets its own input only."""
    for number in range(50):
        use_fd_again(driver, b"%d" % number)


def test_short_send_is_completed(driver: UringDriver) -> None:
    """Output beyond the socket's buffer: the unreported send says how much it took, the rest follows with room."""
    here, there = socket.socketpair()
    here.setblocking(False)
    owner = Owner()
    stream = driver.stream(here.detach(), owner)
    data = os.urandom(3_000_000)
    stream.write(data)
    stream.write(b"tail")
    driver.wait(0)
    driver.wait(0)
    assert owner.stalls == 1
    assert stream.pending > 0
    got = bytearray()
    there.setblocking(False)
    until = time.monotonic() + DEADLINE_S
    while len(got) < len(data) + 4 and time.monotonic() < until:
        driver.wait(0.001)
        try:
            got += there.recv(1 << 16)
        except BlockingIOError:
            pass
    assert bytes(got) == data + b"tail"
    turn_until(driver, lambda: owner.drains)
    assert stream.pending == 0
    there.close()


def test_several_pieces_that_are_cut_short(driver: UringDriver) -> None:
    """Too large to be joined, they leave in one send; what it did not take is the end of them, byte for byte."""
    here, there = socket.socketpair()
    here.setblocking(False)
    owner = Owner()
    stream = driver.stream(here.detach(), owner)
    pieces = [os.urandom(size) for size in (300, 90_000, 7, 400_000)]
    for piece in pieces:
        stream.write(piece)
    driver.wait(0)
    driver.wait(0)
    assert owner.stalls == 1
    got = bytearray()
    there.setblocking(False)
    while len(got) < sum(map(len, pieces)):
        turn_until(driver, lambda: select.select([there], [], [], 0)[0])
        got += there.recv(1 << 16)
    assert bytes(got) == b"".join(pieces)
    turn_until(driver, lambda: owner.drains)
    there.close()


def test_abort_while_output_waits_for_room(driver: UringDriver) -> None:
    """The peer gets what the kernel had taken, and the end; nothing of the rest is written to the fd's next owner."""
    here, there = socket.socketpair()
    here.setblocking(False)
    owner = Owner()
    stream = driver.stream(here.detach(), owner)
    stream.write(b"x" * 3_000_000)
    driver.wait(0)
    driver.wait(0)
    assert stream.stuck
    stream.abort()
    turn_until(driver, lambda: owner.ends)
    there.settimeout(DEADLINE_S)
    got = 0
    driver.wait(0)  # what was cancelled lets go of the socket
    while piece := there.recv(1 << 20):
        got += len(piece)
    assert 0 < got < 3_000_000
    there.close()


def test_exception_in_a_callback_loses_no_completion(driver: UringDriver) -> None:
    heard: list[str] = []

    def fail(_: int) -> None:
        heard.append("fail")
        raise LookupError("from a callback")

    driver.timeout(0.0, fail)
    driver.timeout(0.0, lambda _: heard.append("next"))
    with pytest.raises(LookupError):
        turn_until(driver, lambda: len(heard) == 2)
    turn_until(driver, lambda: heard == ["fail", "next"])


def test_signal_between_two_waits_is_not_missed(driver: UringDriver) -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: caught.append(number))
    fd_before = signal.set_wakeup_fd(driver.wake_fd)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        started = time.monotonic()
        driver.wait(DEADLINE_S)
        assert time.monotonic() - started < DEADLINE_S / 2
        assert caught == [signal.SIGUSR1]
    finally:
        signal.set_wakeup_fd(fd_before)
        signal.signal(signal.SIGUSR1, before)


FORBIDDEN = """
import ctypes, struct, sys
sys.path.insert(0, {root!r})
libc = ctypes.CDLL(None, use_errno=True)
def statement(code, jt, jf, k): return struct.pack("=HBBI", code, jt, jf, k)
program = (statement(0x20, 0, 0, 0) + statement(0x15, 0, 1, 425)  # io_uring_setup
           + statement(0x06, 0, 0, 0x00050000 | 1) + statement(0x06, 0, 0, 0x7fff0000))
buffer = ctypes.create_string_buffer(program)
filter_ = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.create_string_buffer(filter_), 0, 0) == 0
from kore.errors import EngineError
from kore.uring.driver import UringDriver
try:
    UringDriver()
except EngineError as error:
    print(error.call, error.errno, error.hint)
"""


def test_forbidden_ring_names_call_errno_and_reason() -> None:
    """Where a seccomp filter forbids io_uring, as in most containers, the error says so."""
    if struct.calcsize("P") != 8 or os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("the test's seccomp filter is written for x86_64 and aarch64")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    result = subprocess.run(
        [sys.executable, "-c", FORBIDDEN.format(root=root)], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout.startswith("io_uring_setup 1 forbidden by a seccomp filter"), result
