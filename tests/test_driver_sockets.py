"""Operations of the driver contract on sockets: accept, connect, receive and send, on real kernels and every engine."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket

import pytest
from driver_harness import (
    SECONDS_MAX,
    Results,
    fds,
    processor_time,
    reset,
    run,
    tcp_listener,
    tcp_pair,
    turns,
    wait_readable,
)

# --- accept ---------------------------------------------------------------------------------------------------


def test_accept_goes_on(driver, listener) -> None:
    """One accept yields every connection: non-blocking, close-on-exec fds that work."""
    accepted = Results()
    operation = driver.accept(listener.fileno(), accepted)
    clients = []
    for _ in range(3):
        for _ in range(30):
            clients.append(socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX))
        run(driver, lambda: len(accepted) == len(clients))
    assert all(fd >= 0 for fd in accepted)
    for fd in accepted:
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
    assert {peer_of(fd) for fd in accepted} == {client.getsockname() for client in clients}
    operation.forget()
    turns(driver)
    for client in clients:
        client.close()
    for fd in accepted:
        os.close(fd)


@pytest.mark.parametrize("name", ["path", "abstract"])
def test_accept_on_a_unix_socket(driver, tmp_path, name: str) -> None:
    """Unix listeners, with a path or abstract."""
    address = str(tmp_path / "s") if name == "path" else f"\0kore-test-{os.getpid()}-{id(driver)}"
    accepted = Results()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(address)
        listener.listen()
        operation = driver.accept(listener.fileno(), accepted)
        client.connect(address)
        run(driver, lambda: accepted)
        operation.forget()
        turns(driver)
    os.close(accepted[0])


def test_accept_cancelled(driver, listener) -> None:
    """cancel() ends it with one -ECANCELED; the listener lives on and a second accept takes what came meanwhile."""
    first, second = Results(), Results()
    operation = driver.accept(listener.fileno(), first)
    turns(driver)
    operation.cancel()
    assert not first, "cancel() must not call back inside"
    run(driver, lambda: first)
    assert first == [-errno.ECANCELED]
    operation.cancel()
    with socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX):
        turns(driver)
        assert first == [-errno.ECANCELED]
        operation = driver.accept(listener.fileno(), second)
        run(driver, lambda: second)
        assert second[0] >= 0
    operation.forget()
    turns(driver)
    os.close(second[0])


def test_accept_cancelled_by_its_callback(driver, listener) -> None:
    """A callback that cancels: every connection handed out is good, the last word is -ECANCELED, none comes after."""
    results = Results()

    def accepted(result: int) -> None:
        results.append(result)
        operation.cancel()

    clients = [socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX) for _ in range(10)]
    operation = driver.accept(listener.fileno(), accepted)
    run(driver, lambda: results and results[-1] < 0)
    assert results[-1] == -errno.ECANCELED
    assert all(fd >= 0 for fd in results[:-1])
    turns(driver)
    count = len(results)
    clients.append(socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX))
    turns(driver)
    assert len(results) == count
    for fd in results[:-1]:
        os.close(fd)
    for client in clients:
        client.close()


def test_accept_forgotten(driver, listener) -> None:
    """After forget() nobody is called, and what was accepted all the same is closed."""
    accepted = Results()
    operation = driver.accept(listener.fileno(), accepted)
    turns(driver)
    before = fds()
    clients = [socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX) for _ in range(10)]
    operation.forget()
    turns(driver)
    assert not accepted
    for client in clients:
        client.close()
    turns(driver)
    assert fds() <= before


def test_accept_survives_a_client_that_left(driver, listener) -> None:
    """A connection reset while it waited in the queue is no error of the listener."""
    for _ in range(5):
        reset(socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX))
    accepted = Results()
    operation = driver.accept(listener.fileno(), accepted)
    with socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX) as client:
        def met() -> bool:
            return any(peer_of(fd) == client.getsockname() for fd in accepted)

        run(driver, met)
    assert all(fd >= 0 for fd in accepted)
    operation.forget()
    turns(driver)
    for fd in accepted:
        os.close(fd)


def peer_of(fd: int) -> object:
    """The address of the other end, None when there is none any more."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        try:
            return sock.getpeername()
        except OSError:
            return None


def test_accept_out_of_fds(driver, listener) -> None:
    """EMFILE ends the accept with that error; the connection waits, and the next accept takes it once there is room."""
    results = Results()
    with socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX) as client:
        lowest = os.dup(0)
        os.close(lowest)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            wait_readable(listener.fileno())
            driver.accept(listener.fileno(), results)
            run(driver, lambda: results)
            assert results == [-errno.EMFILE]
            turns(driver)
            before = processor_time()
            driver.wait(0.2)
            assert processor_time() - before < 0.1, "an accept that is over keeps the processor busy"
            assert results == [-errno.EMFILE]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        operation = driver.accept(listener.fileno(), results)
        run(driver, lambda: len(results) == 2)
        assert peer_of(results[1]) == client.getsockname()
    operation.forget()
    turns(driver)
    os.close(results[1])


def test_accept_on_what_does_not_listen(driver, pair) -> None:
    """The kernel's error comes as a result."""
    results = Results()
    driver.accept(pair[0].fileno(), results)
    run(driver, lambda: results)
    assert results[0] in (-errno.EINVAL, -errno.EOPNOTSUPP)
    turns(driver)
    assert len(results) == 1


# --- connect --------------------------------------------------------------------------------------------------


def test_connect(driver, listener) -> None:
    """0, and the socket is connected."""
    results = Results()
    with socket.socket() as sock:
        sock.setblocking(False)
        driver.connect(sock, listener.getsockname(), results)
        assert not results
        run(driver, lambda: results)
        assert results == [0]
        assert sock.getpeername() == listener.getsockname()


def test_connect_ipv6(driver) -> None:
    """An IPv6 address as socket.connect takes it."""
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    results = Results()
    with listener, socket.socket(socket.AF_INET6) as sock:
        sock.setblocking(False)
        driver.connect(sock, listener.getsockname(), results)
        run(driver, lambda: results)
        assert results == [0]


def test_connect_refused(driver, listener) -> None:
    """Nobody listens: -ECONNREFUSED."""
    address = listener.getsockname()
    listener.close()
    results = Results()
    with socket.socket() as sock:
        sock.setblocking(False)
        driver.connect(sock, address, results)
        run(driver, lambda: results)
    assert results == [-errno.ECONNREFUSED]


@pytest.mark.parametrize("kind", ["path", "abstract", "missing"])
def test_connect_unix(driver, tmp_path, kind: str) -> None:
    """A path, an abstract name, and a path where nothing is."""
    address = f"\0kore-connect-{os.getpid()}-{id(driver)}" if kind == "abstract" else str(tmp_path / "s")
    results = Results()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as sock:
        if kind != "missing":
            listener.bind(address)
            listener.listen()
        sock.setblocking(False)
        driver.connect(sock, address, results)
        run(driver, lambda: results)
    assert results == [-errno.ENOENT if kind == "missing" else 0]


def test_connect_cancelled(driver) -> None:
    """A connect to a listener whose queue is full hangs, and can be cancelled."""
    results = Results()
    with tcp_listener(backlog=0) as listener, contextlib.ExitStack() as stack:
        pending = []
        # The queue is full after one or two; what follows stays in SYN_SENT.
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            got = Results()
            pending.append((driver.connect(sock, listener.getsockname(), got), got))
        turns(driver)
        driver.wait(0.05)
        operation, results = pending[-1]
        assert not results
        operation.cancel()
        run(driver, lambda: results)
        assert results == [-errno.ECANCELED]
        for operation, _ in pending:
            operation.forget()
        turns(driver)


# --- receive, send --------------------------------------------------------------------------------------------


def test_receive(driver, pair) -> None:
    """At most `length` bytes, once; b"" at the end; what was left comes with the next."""
    near, far = pair
    results = Results()
    driver.receive(near.fileno(), 4, results)
    turns(driver)
    assert not results
    far.send(b"abcdef")
    run(driver, lambda: results)
    turns(driver)
    assert results == [b"abcd"]
    driver.receive(near.fileno(), 100, results)
    run(driver, lambda: len(results) == 2)
    far.close()
    driver.receive(near.fileno(), 100, results)
    run(driver, lambda: len(results) == 3)
    assert results[1:] == [b"ef", b""]


def test_receive_an_error(driver) -> None:
    """A RST comes as a negated errno."""
    near, far = tcp_pair()
    near.setblocking(False)
    results = Results()
    driver.receive(near.fileno(), 100, results)
    turns(driver)
    reset(far)
    run(driver, lambda: results)
    assert results == [-errno.ECONNRESET]
    near.close()


def test_receive_cancelled_and_forgotten(driver, pair) -> None:
    """A cancelled receive says so; a forgotten one is silent; the bytes are there for who asks next."""
    near, far = pair
    cancelled, forgotten, wanted = Results(), Results(), Results()
    operations = driver.receive(near.fileno(), 10, cancelled), driver.receive(near.fileno(), 10, forgotten)
    turns(driver)
    operations[0].cancel()
    operations[1].forget()
    run(driver, lambda: cancelled)
    turns(driver)
    far.send(b"x")
    driver.receive(near.fileno(), 10, wanted)
    run(driver, lambda: wanted)
    assert (cancelled, forgotten, wanted) == ([-errno.ECANCELED], [], [b"x"])


def test_cancel_before_it_began(driver, pair) -> None:
    """Cancelled in the turn it was asked for: one answer, either of the two."""
    near, far = pair
    far.send(b"x")
    results = Results()
    operation = driver.receive(near.fileno(), 10, results)
    operation.cancel()
    operation.cancel()
    run(driver, lambda: results)
    turns(driver)
    assert results in ([-errno.ECANCELED], [b"x"])
    if results != [b"x"]:
        driver.receive(near.fileno(), 10, results)
        run(driver, lambda: len(results) == 2)
        assert results[1] == b"x"


def test_cancel_racing_completion(driver, pair) -> None:
    """Bytes arrive as the cancel is asked for: exactly one answer each time, and no byte is lost or doubled."""
    near, far = pair
    got = bytearray()
    sent = 0
    for number in range(300):
        results = Results()
        operation = driver.receive(near.fileno(), 10, results)
        if number % 3:
            driver.wait(0)
        far.send(bytes([number % 256]))
        sent += 1
        if number % 2:
            driver.wait(0)
        operation.cancel()
        run(driver, lambda r=results: r)
        turns(driver, 2)
        assert len(results) == 1
        if isinstance(results[0], bytes):
            got += results[0]
        else:
            assert results[0] == -errno.ECANCELED
    while len(got) < sent:
        results = Results()
        driver.receive(near.fileno(), 1000, results)
        run(driver, lambda r=results: r)
        got += results[0]
    assert got == bytes(number % 256 for number in range(300))


def test_send(driver, pair) -> None:
    """The number of bytes taken; one after the other they leave in order."""
    near, far = pair
    results = Results()
    driver.send(near.fileno(), b"abc", results)
    run(driver, lambda: results)
    driver.send(near.fileno(), b"defgh", results)
    run(driver, lambda: len(results) == 2)
    assert results == [3, 5]
    assert far.recv(100) == b"abcdefgh"


def test_send_waits_for_room(driver, pair) -> None:
    """A full socket makes a send wait until the peer reads; another's input is served meanwhile."""
    near, far = pair
    with contextlib.suppress(BlockingIOError):
        while True:
            near.send(bytes(65536))
    results, heard = Results(), Results()
    driver.send(near.fileno(), b"x" * 1000, results)
    driver.receive(near.fileno(), 10, heard)
    turns(driver)
    assert not results
    far.send(b"hello")
    run(driver, lambda: heard)
    assert not results
    with contextlib.suppress(BlockingIOError):
        while True:
            far.recv(1 << 20)
    run(driver, lambda: results)
    assert heard == [b"hello"]
    assert 0 < results[0] <= 1000
    assert far.recv(2000) == b"x" * results[0]


def test_send_to_nobody(driver, pair) -> None:
    """-EPIPE, and no signal."""
    near, far = pair
    far.close()
    results = Results()
    driver.send(near.fileno(), b"x", results)
    driver.send(near.fileno(), b"y", results)
    run(driver, lambda: len(results) == 2)
    assert results == [-errno.EPIPE, -errno.EPIPE]


def test_bad_fd(driver) -> None:
    """An fd that is not open is an error of the operation, not of the driver."""
    fd = os.dup(0)
    os.close(fd)
    results = Results()
    driver.receive(fd, 10, results)
    driver.send(fd, b"x", results)
    driver.poll(fd, select.POLLIN, results)
    driver.read(fd, 10, 0, results)
    driver.accept(fd, results)
    driver.write(fd, b"x", results)
    run(driver, lambda: len(results) == 6)
    assert results == [-errno.EBADF] * 6
