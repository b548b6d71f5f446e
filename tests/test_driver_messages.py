"""Operations of the driver contract on whole sockets: one accept, messages in with all they carry, messages to."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket

import pytest
from driver_harness import (
    SECONDS_MAX,
    Results,
    fds,
    processor_time,
    run,
    tcp_listener,
    turns,
)

from kore.driver import passed_fds


@pytest.fixture
def listener():
    """A TCP listener that does not block."""
    with tcp_listener() as sock:
        sock.setblocking(False)
        yield sock


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["stream", "datagram"])
def pair(request):
    """Two ends of a unix connection, neither of which blocks."""
    near, far = socket.socketpair(socket.AF_UNIX, request.param)
    near.setblocking(False)
    far.setblocking(False)
    yield near, far
    near.close()
    far.close()


def bound(family: int, kind: int, address: object) -> socket.socket:
    """A bound socket that does not block; a skip where there is no such family."""
    sock = socket.socket(family, kind)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        pytest.skip(f"no socket at {address!r}: {error}")
    sock.setblocking(False)
    return sock


# --- accept_once ------------------------------------------------------------------------------------------------


def test_accept_once_takes_one(driver, listener) -> None:
    """One connection for each, non-blocking and close-on-exec; the others stay in the queue."""
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX))
            for _ in range(3)
        ]
        results = Results()
        for count in (1, 2, 3):
            driver.accept_once(listener, results)
            run(driver, lambda c=count: len(results) == c)
            turns(driver)
            assert len(results) == count
        for fd in results:
            assert not os.get_blocking(fd)
            assert not os.get_inheritable(fd)
        peers = {stack.enter_context(socket.socket(fileno=fd)).getpeername() for fd in results}
        assert peers == {client.getsockname() for client in clients}


def test_accept_once_waits_and_is_cancelled(driver, listener) -> None:
    """Given up it takes nothing: who asks next gets the connection."""
    cancelled, wanted = Results(), Results()
    operation = driver.accept_once(listener, cancelled)
    turns(driver)
    operation.cancel()
    run(driver, lambda: cancelled)
    assert cancelled == [-errno.ECANCELED]
    with socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX):
        driver.accept_once(listener, wanted)
        run(driver, lambda: wanted)
        os.close(wanted[0])


def test_accept_once_forgotten_in_the_turn_it_wins(driver, listener) -> None:
    """What was accepted for nobody is closed."""
    before = fds()
    for forget_first in (True, False):
        results = Results()
        with socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX):
            operation = driver.accept_once(listener, results)
            if not forget_first:
                turns(driver)
            operation.forget()
            turns(driver)
        assert not (forget_first and results)
        for fd in results:
            os.close(fd)
        assert fds() <= before


@pytest.mark.parametrize("way", ["accept", "accept_once"])
def test_who_is_always_too_late_goes_on_accepting(driver, listener, way) -> None:
    """Others take what wakes it: io_uring gives up after 128 times, with EAGAIN, of which nobody is to hear."""
    results = Results()
    getattr(driver, way)(listener.fileno() if way == "accept" else listener, results)
    turns(driver)
    for _ in range(600):
        with socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX):
            with contextlib.suppress(BlockingIOError):
                listener.accept()[0].close()
            driver.wait(0)
    assert not [result for result in results if result < 0]
    for fd in results:
        os.close(fd)
    results.clear()
    if way == "accept":
        with socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX):
            run(driver, lambda: results)
            os.close(results[0])


def test_accept_once_on_what_does_not_listen(driver, pair) -> None:
    """The kernel's error comes as a result, also from a socket that is never readable."""
    results = Results()
    driver.accept_once(pair[0], results)
    run(driver, lambda: results)
    assert results[0] in (-errno.EINVAL, -errno.EOPNOTSUPP)


# --- recvmsg ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["receive", "recvmsg"])
@pytest.mark.parametrize("end", ["hears", "is cancelled"])
def test_a_reader_of_a_shared_socket_waits_on_when_others_were_quicker(driver, way, end) -> None:
    """As often as that may be: on io_uring the kernel gives up after 128 times."""
    with bound(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)) as here, socket.socket(
        socket.AF_INET, socket.SOCK_DGRAM
    ) as there:
        results = Results()

        def begin() -> object:
            return getattr(driver, way)(here.fileno() if way == "receive" else here, 100, results)

        def heard() -> bytes:
            return results[0] if way == "receive" else results[0][0]

        operation = begin()
        turns(driver)
        for _ in range(300):
            there.sendto(b"for others", here.getsockname())
            try:
                assert here.recv(100) == b"for others"
                driver.wait(0)
            except BlockingIOError:  # a thread of the kernel was quicker, after the 128th time
                run(driver, lambda: results)
            if results:
                assert heard() == b"for others"
                results.clear()
                operation = begin()
                turns(driver)
        if end == "hears":
            there.sendto(b"hello", here.getsockname())
            run(driver, lambda: results)
            assert heard() == b"hello"
        else:
            operation.cancel()
            run(driver, lambda: results)
            assert results == [-errno.ECANCELED]


def test_recvmsg_says_who_sent_it(driver) -> None:
    """Internet senders, as socket.recvmsg has them."""
    for family, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0, 0, 0))):
        with bound(family, socket.SOCK_DGRAM, address) as here, bound(family, socket.SOCK_DGRAM, address) as there:
            results = Results()
            driver.recvmsg(here, 100, results)
            turns(driver)
            assert not results
            there.sendto(b"hello", here.getsockname())
            run(driver, lambda r=results: r)
            data, ancillary, _, sender = results[0]
            assert (data, ancillary, sender) == (b"hello", [], there.getsockname())


@pytest.mark.parametrize("name", ["path", "abstract", "unnamed"])
def test_recvmsg_from_unix_senders(driver, tmp_path, name: str) -> None:
    """The sender's name as socket.recvmsg gives it, compared with that."""
    with bound(socket.AF_UNIX, socket.SOCK_DGRAM, str(tmp_path / "here")) as here, socket.socket(
        socket.AF_UNIX, socket.SOCK_DGRAM
    ) as there:
        if name != "unnamed":
            there.bind(str(tmp_path / "there") if name == "path" else f"\0kore-{os.getpid()}-{id(driver)}")
        results = Results()
        for _ in range(2):
            there.sendto(b"hello", str(tmp_path / "here"))
        driver.recvmsg(here, 100, results)
        run(driver, lambda: results)
        assert results[0][0] == b"hello"
        assert results[0][3] == here.recvmsg(100)[3]


def test_recvmsg_brings_ancillary_data(driver, pair) -> None:
    """File descriptors arrive, close-on-exec; several messages of control data keep their boundaries."""
    near, far = pair
    near.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    socket.send_fds(far, [b"x"], [far.fileno(), far.fileno(), far.fileno()])
    results = Results()
    driver.recvmsg(near, 100, results)
    run(driver, lambda: results)
    fds_there = passed_fds(results[0])
    try:
        assert results[0][0] == b"x"
        assert len(fds_there) == 3
        assert not any(os.get_inheritable(fd) for fd in fds_there)
        found = {(level, kind): data for level, kind, data in results[0][1]}
        assert array.array("i", found[socket.SOL_SOCKET, socket.SCM_CREDENTIALS])[0] == os.getpid()
        assert set(found) == {
            (socket.SOL_SOCKET, socket.SCM_CREDENTIALS), (socket.SOL_SOCKET, socket.SCM_RIGHTS)}
    finally:
        for fd in fds_there:
            os.close(fd)


def test_recvmsg_forgotten_closes_what_it_brought(driver, pair) -> None:
    """Descriptors that come for nobody are closed, whichever of message and forget() is first."""
    near, far = pair
    before = fds()
    for number in range(20):
        results = Results()
        operation = driver.recvmsg(near, 100, results)
        if number % 2:
            driver.wait(0)
        socket.send_fds(far, [b"x"], [far.fileno()])
        operation.forget()
        turns(driver)
        assert not results
        with contextlib.suppress(BlockingIOError):
            for fd in socket.recv_fds(near, 100, 10)[1]:
                os.close(fd)
        assert fds() <= before


def test_recvmsg_cuts_datagrams_and_says_so(driver) -> None:
    """MSG_TRUNC in the flags; what did not fit is gone."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        near.setblocking(False)
        far.send(b"0123456789")
        far.send(b"next")
        results = Results()
        for length, count in ((4, 1), (1, 2)):
            driver.recvmsg(near, length, results)
            run(driver, lambda c=count: len(results) == c)
        cut = [(data, bool(flags & socket.MSG_TRUNC)) for data, _, flags, _ in results]
        assert cut == [(b"0123", True), (b"n", True)]


def test_recvmsg_at_the_end_of_a_stream_and_cancelled(driver) -> None:
    """No bytes and no address at the end; -ECANCELED when given up, with nothing taken."""
    near, far = socket.socketpair()
    with near:
        near.setblocking(False)
        cancelled, results = Results(), Results()
        operation = driver.recvmsg(near, 100, cancelled)
        turns(driver)
        operation.cancel()
        run(driver, lambda: cancelled)
        assert cancelled == [-errno.ECANCELED]
        far.send(b"x")
        far.close()
        for count in (1, 2):
            driver.recvmsg(near, 100, results)
            run(driver, lambda c=count: len(results) == c)
        seen = [(message[0], message[1], message[3] or None) for message in results]
        assert seen == [(b"x", [], None), (b"", [], None)]


# --- sendto -----------------------------------------------------------------------------------------------------


def test_sendto(driver, tmp_path) -> None:
    """To internet and unix addresses; the number of bytes; an empty datagram is one too."""
    places = [
        (socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0, 0, 0)), (socket.AF_UNIX, str(tmp_path / "s")),
        (socket.AF_UNIX, f"\0kore-sendto-{os.getpid()}-{id(driver)}"),
    ]
    for family, address in places:
        with bound(family, socket.SOCK_DGRAM, address) as there, socket.socket(family, socket.SOCK_DGRAM) as here:
            here.setblocking(False)
            target = there.getsockname()
            results = Results()
            driver.sendto(here, b"hello", target if family != socket.AF_UNIX else address, results)
            driver.sendto(here, b"", target if family != socket.AF_UNIX else address, results)
            run(driver, lambda r=results: len(r) == 2)
            assert results == [5, 0]
            assert [there.recv(10), there.recv(10)] == [b"hello", b""]


def test_sendto_nobody(driver, tmp_path) -> None:
    """The kernel's error as a result."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as here:
        here.setblocking(False)
        results = Results()
        driver.sendto(here, b"x", str(tmp_path / "nowhere"), results)
        run(driver, lambda: results)
    assert results == [-errno.ENOENT]


def test_sendto_a_full_unix_queue(driver, tmp_path) -> None:
    """-EAGAIN, and no turn after turn of trying: nothing tells a sender when the queue of its receiver has room."""
    path = str(tmp_path / "s")
    with bound(socket.AF_UNIX, socket.SOCK_DGRAM, path) as there, socket.socket(
        socket.AF_UNIX, socket.SOCK_DGRAM
    ) as here:
        here.setblocking(False)
        results = Results()
        while not results or results[-1] >= 0:
            count = len(results)
            driver.sendto(here, b"x", path, results)
            run(driver, lambda c=count: len(results) > c)
        assert results[-1] == -errno.EAGAIN
        before = processor_time()
        driver.wait(0.2)
        assert processor_time() - before < 0.1
        assert there.recv(10) == b"x"


def test_messages_race_their_cancels(driver) -> None:
    """A datagram arrives as the cancel is asked for: one answer each time, and no datagram is lost or doubled."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        near.setblocking(False)
        got = []
        for number in range(300):
            results = Results()
            operation = driver.recvmsg(near, 10, results)
            if number % 3:
                driver.wait(0)
            far.send(b"%d" % number)
            if number % 2:
                driver.wait(0)
            operation.cancel()
            run(driver, lambda r=results: r)
            turns(driver, 2)
            assert len(results) == 1
            if isinstance(results[0], tuple):
                got.append(results[0][0])
            else:
                assert results[0] == -errno.ECANCELED
            while len(got) <= number:
                driver.recvmsg(near, 10, results)
                run(driver, lambda r=results: len(r) == 2)
                got.append(results.pop()[0])
        assert got == [b"%d" % number for number in range(300)]


def test_memory_outlives_the_caller(driver) -> None:
    """Who forgot an operation and freed everything is not written over: the operation keeps its memory."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        near.setblocking(False)
        for _ in range(200):
            operation = driver.recvmsg(near, 4096, Results())
            driver.wait(0)
            operation.forget()
            del operation
            far.send(b"\xff" * 4096)
            fresh = [bytes(4096 + extra) for extra in range(0, 64, 8)]
            driver.wait(0)
            assert not any(map(any, fresh)), "the kernel wrote into memory that was given back"
            with contextlib.suppress(BlockingIOError):
                near.recv(4096)
