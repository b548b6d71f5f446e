"""What a ring refuses, on a real kernel: every operation, flag and registration that its driver does not use."""

from __future__ import annotations

import ast
import ctypes
import errno
import os
import socket
from pathlib import Path

import pytest
from driver_harness import SECONDS_MAX, Results, run, tcp_listener

from kore import reactor
from kore.errors import EngineError
from kore.uring import driver as driver_module
from kore.uring import operations as operations_module
from kore.uring import ring as ring_module
from kore.uring import stream as stream_module
from kore.uring import structures
from kore.uring.driver import UringDriver
from kore.uring.probe import supported_operations
from kore.uring.restrictions import CONNECTING, OPEN, SERVING, Restrictions
from kore.uring.ring import Ring
from kore.uring.structures import (
    IORING_OP_CONNECT,
    IORING_OP_NOP,
    IORING_OP_SEND,
    IORING_OP_SENDMSG,
    IORING_REGISTER_ENABLE_RINGS,
    IORING_REGISTER_PROBE,
    IORING_REGISTER_RESTRICTIONS,
    IORING_UNREGISTER_RING_FDS,
    IOSQE_BUFFER_SELECT,
    IOSQE_CQE_SKIP_SUCCESS,
)

LISTS = {"connecting": CONNECTING, "serving": SERVING, "open": OPEN}
REGISTERS_MAX = 64
"""More registrations than any kernel has yet (37 in Linux 6.18)."""
IOSQE_FLAGS = 8
NOTHING = ctypes.create_string_buffer(4096)


def make_ring() -> Ring:
    """A disabled ring."""
    try:
        return Ring(64, 1024)
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(params=LISTS)
def restricted(request):
    """A ring restricted to each list, the list, and the operations this kernel knows."""
    ring = make_ring()
    known = supported_operations(ring)
    ring.enable(LISTS[request.param])
    if not ring.restricted:
        pytest.skip("this kernel has no IORING_REGISTER_RESTRICTIONS")
    yield ring, LISTS[request.param], known
    ring.close()


def answer(ring: Ring, opcode: int, flags: int = 0) -> int:
    """The result of one entry, of zeros but for these."""
    ring.push(opcode, flags, 0, -1, 0, 0, 0, 0, 1)
    ring.enter(1, SECONDS_MAX)
    (completion,) = ring.reap()
    return completion[1]


def test_an_operation_that_is_not_listed_is_refused(restricted) -> None:
    """Each that the kernel knows, from the first to the last: EACCES, before anything of it is looked at."""
    ring, allowed, known = restricted
    assert max(known) > max(CONNECTING.operations), "the last is none of ours"
    refused = known - allowed.operations
    assert {number: answer(ring, number) for number in sorted(refused)} == dict.fromkeys(sorted(refused), -errno.EACCES)
    dangerous = {18, 28, 35, 36, 37, 38, 39, 42, 45, 46}  # openat(2), renameat to linkat, setxattr, socket, uring_cmd
    assert dangerous & known <= refused
    assert len(refused) > 15


def test_what_the_kernel_does_not_know_is_refused(restricted) -> None:
    """Opcodes beyond the last are EINVAL: no list can name what is not there."""
    ring, _, known = restricted
    for number in range(max(known) + 1, 256):
        assert answer(ring, number) in (-errno.EINVAL, -errno.EACCES)


def test_a_listed_operation_gets_through(restricted) -> None:
    """Their entries of zeros fail for other reasons, or succeed; so the refusals above are the list's doing."""
    ring, allowed, _ = restricted
    waiting = {structures.IORING_OP_POLL_ADD, structures.IORING_OP_TIMEOUT}
    for number in allowed.operations - waiting:
        assert answer(ring, number) != -errno.EACCES


def test_a_flag_that_is_not_listed_is_refused(restricted) -> None:
    """Fixed files, drains, links, threads of the kernel: on an operation that is listed."""
    ring, allowed, _ = restricted
    assert answer(ring, structures.IORING_OP_ASYNC_CANCEL) == -errno.ENOENT
    refused = [1 << bit for bit in range(IOSQE_FLAGS) if not allowed.flags & 1 << bit]
    assert len(refused) == IOSQE_FLAGS - 2
    for flag in refused:
        assert answer(ring, structures.IORING_OP_ASYNC_CANCEL, flag) in (-errno.EACCES, -errno.EINVAL)
    for flag in (1, 4, 8, 16):  # IOSQE_FIXED_FILE, IO_LINK, IO_HARDLINK, ASYNC: every kernel knows them
        assert answer(ring, structures.IORING_OP_ASYNC_CANCEL, flag) == -errno.EACCES


def registered(ring: Ring, opcode: int, count: int = 1) -> int:
    """What io_uring_register(2) says: 0 or an errno."""
    try:
        ring.register("test", opcode, ctypes.addressof(NOTHING), count)
    except EngineError as error:
        return int(error.errno)
    return 0


def test_registering_is_refused_afterwards(restricted) -> None:
    """All but dropping the process's own short name of the ring: no files, buffers, personalities, eventfds."""
    ring, allowed, _ = restricted
    assert allowed.registers == {IORING_UNREGISTER_RING_FDS}
    refusals = {number: registered(ring, number) for number in range(REGISTERS_MAX) if number not in allowed.registers}
    assert set(refusals.values()) <= {errno.EACCES, errno.EINVAL}, refusals
    assert {number for number, refusal in refusals.items() if refusal == errno.EINVAL}.isdisjoint(range(27)), \
        "known to every kernel that has what the driver needs"


def test_restrictions_cannot_be_loosened(restricted) -> None:
    """Neither replaced nor added to, nor is the ring enabled anew; the first list stays."""
    ring, _, _ = restricted
    wider = Restrictions(frozenset({IORING_OP_NOP, 18}), 0xFF, frozenset(range(32)))
    table = wider.pack()
    for opcode, count in (
        (IORING_REGISTER_RESTRICTIONS, wider.count), (IORING_REGISTER_RESTRICTIONS, 0),
        (IORING_REGISTER_ENABLE_RINGS, 0), (IORING_REGISTER_PROBE, 256),
    ):
        with pytest.raises(EngineError) as caught:
            ring.register("again", opcode, ctypes.addressof(ctypes.create_string_buffer(table, len(table))), count)
        assert caught.value.errno == errno.EACCES
    assert answer(ring, IORING_OP_NOP) == -errno.EACCES


def test_a_ring_is_of_no_use_before_it_is_enabled() -> None:
    """EBADFD: between its making and its list there is no moment in which it obeys."""
    ring = make_ring()
    try:
        ring.push(IORING_OP_NOP, 0, 0, -1, 0, 0, 0, 0, 1)
        with pytest.raises(OSError) as caught:
            ring.enter(1, 1.0)
        assert caught.value.errno == errno.EBADFD
        ring.enable(CONNECTING)
        with pytest.raises(EngineError):
            ring.enable(CONNECTING)
    finally:
        ring.close()


def test_the_list_is_what_the_driver_uses() -> None:
    """Neither more nor less: the names of operations in the driver's code, and of flags."""
    used = set()
    for module in (driver_module, operations_module, stream_module, ring_module):
        tree = ast.parse(Path(module.__file__).read_text())
        used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {vars(structures)[name] for name in used if name.startswith("IORING_OP_")} == OPEN.operations
    flags = {vars(structures)[name] for name in used if name.startswith("IOSQE_")}
    assert flags == {IOSQE_BUFFER_SELECT, IOSQE_CQE_SKIP_SUCCESS}
    assert sum(flags) == CONNECTING.flags == SERVING.flags == OPEN.flags
    assert OPEN.operations - SERVING.operations == {IORING_OP_CONNECT}
    assert OPEN.operations - CONNECTING.operations == {IORING_OP_SEND, IORING_OP_SENDMSG}
    assert CONNECTING.operations < OPEN.operations
    assert len(CONNECTING.pack()) == 16 * CONNECTING.count


def uring(**options):
    """A driver on a ring."""
    try:
        return reactor.new_driver("uring", **options)
    except EngineError as error:
        pytest.skip(str(error))


def connected(driver) -> int:
    """The result of a connect to a listener that is there."""
    results = Results()
    with tcp_listener() as listener, socket.socket() as sock:
        sock.setblocking(False)
        driver.connect(sock, listener.getsockname(), results)
        run(driver, lambda: results)
    return results[0]


def test_who_may_not_connect() -> None:
    """A loop of one's own connects; a driver made not to is told EACCES by the kernel."""
    driver = uring()
    assert driver.ring.restricted
    assert connected(driver) == 0
    driver.close()
    driver = uring(connects=False)
    assert connected(driver) == -errno.EACCES
    driver.close()
    driver = uring(bounded=True)
    assert connected(driver) == 0
    driver.close()
    loop = reactor.new_event_loop("uring")
    assert connected(loop.driver) == 0
    loop.close()


def test_a_closed_ring_is_gone() -> None:
    """Also with its short name registered: what was in flight on it holds no socket open."""
    for _ in range(20):  # the process has sixteen such names
        driver = uring()
        assert driver.ring._enter_flags, "the ring has a short name"
        here, there = socket.socketpair()
        results = Results()
        driver.receive(here.fileno(), 100, results)
        driver.wait(0)
        driver.close()
        here.close()
        there.settimeout(SECONDS_MAX)
        assert there.recv(1) == b""
        there.close()


def test_where_the_kernel_cannot_restrict(monkeypatch) -> None:
    """EINVAL before Linux 5.10: the ring serves, says so, and the log gets one line; other errors are errors."""
    number = errno.EINVAL
    real = Ring.register

    def register(self, call, opcode, argument, count):
        if opcode == IORING_REGISTER_RESTRICTIONS:
            raise ring_module.engine_error(call, number)
        return real(self, call, opcode, argument, count)

    make_ring().close()
    monkeypatch.setattr(Ring, "register", register)
    monkeypatch.delenv("KORE_IO", raising=False)
    engine, notice = reactor.select_engine()
    assert engine == "uring"
    assert "cannot restrict" in notice
    driver = UringDriver()
    assert not driver.ring.restricted
    assert connected(driver) == 0
    driver.close()
    before = len(os.listdir("/proc/self/fd"))
    number = errno.EPERM
    with pytest.raises(EngineError, match="IORING_REGISTER_RESTRICTIONS"):
        UringDriver()
    assert reactor.select_engine()[0] == "epoll"
    assert len(os.listdir("/proc/self/fd")) == before
