"""What the tests of the driver contract share: an engine by name, a bounded run of its turns, and owners that remember.

Every wait here ends with the thing waited for, or fails the test when its bound is reached.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kore.errors import EngineError
from tests.engines import ENGINES as ENGINES

DRIVERS = [*ENGINES, "uring-bounded"]
"""The last is a ring as workers have it that may connect to some ports: its output leaves by system calls."""

SECONDS_MAX = 20.0


def make_driver(io: str):
    """The driver of that name; a skip that names the missing kernel feature where it can't be had."""
    try:
        if io.startswith("uring"):
            from kore.uring.driver import UringDriver
            from kore.uring.restrictions import CONNECTING, OPEN

            return UringDriver(restrictions=CONNECTING if io == "uring-bounded" else OPEN)
        if io == "kqueue":
            from kore.bsd.kqueue import KqueueDriver

            return KqueueDriver()
        from kore.readiness.epoll import EpollDriver

        return EpollDriver()
    except EngineError as error:
        pytest.skip(f"{io}: {error}")


def open_driver(io: str) -> Iterator[object]:
    """For fixtures: a driver that is closed afterwards, and leaves no fd behind."""
    before = fds()
    driver = make_driver(io)
    driver.wait(0)  # what it opened to try itself out is closed
    yield driver
    driver.close()
    left = fds() - before
    assert not left, f"fds left open: { {fd: link(fd) for fd in left} }"


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A driver of each engine."""
    yield from open_driver(request.param)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A TCP listener."""
    with tcp_listener() as sock:
        yield sock


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a unix connection, neither of which blocks."""
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    yield near, far
    near.close()
    far.close()


@pytest.fixture(params=["tcp", "unix"])
def each_pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection of each kind: the near one is for the driver."""
    near, far = tcp_pair() if request.param == "tcp" else unix_pair()
    yield near, far
    near.close()
    far.close()


def fds() -> set[int]:
    """The open fds of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # that of the listing itself
        found.add(int(name))
    return found


def link(fd: int) -> str:
    """What an fd is, as /proc shows it."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        return str(error)


def run(driver, until: Callable[[], object], seconds: float = SECONDS_MAX) -> None:
    """Turn after turn until something holds."""
    end = time.monotonic() + seconds
    while not until():
        left = end - time.monotonic()
        assert left > 0, "what was waited for did not happen"
        driver.wait(left)


def turns(driver, count: int = 4) -> None:
    """A few turns that do not wait: whatever is ready by now is handled."""
    for _ in range(count):
        driver.wait(0)


def run_until_lost(driver, owner: Owner) -> None:
    """Until a stream is over; an engine may close the fd with its next submission."""
    run(driver, lambda: owner.losses)
    driver.wait(0)


class Owner:
    """A stream's owner that remembers what it heard; `on_received` may answer."""

    def __init__(self, on_received: Callable[[Owner, bytes], None] | None = None) -> None:
        self.stream = None
        self.data = bytearray()
        self.ends = 0
        self.stalls = 0
        self.drains = 0
        self.losses: list[int] = []
        self.on_received = on_received
        self.on_drained: Callable[[], None] | None = None
        self.on_lost: Callable[[], None] | None = None

    def received(self, data: bytes) -> None:
        assert not self.losses, "received after lost"
        assert not self.ends, "received after the end of input"
        assert type(data) is bytes
        if data:
            self.data += data
        else:
            self.ends += 1
        if self.on_received is not None:
            self.on_received(self, data)

    def stalled(self) -> None:
        assert not self.losses, "stalled after lost"
        assert self.stalls == self.drains, "stalled twice, and not drained between"
        self.stalls += 1

    def drained(self) -> None:
        assert not self.losses, "drained after lost"
        self.drains += 1
        assert self.stalls == self.drains, "drained, and not stalled before"
        if self.on_drained is not None:
            self.on_drained()

    def lost(self, error: int) -> None:
        assert not self.losses, "lost twice"
        self.losses.append(error)
        if self.on_lost is not None:
            self.on_lost()


def echo(owner: Owner, data: bytes) -> None:
    """Answer with the same."""
    if data:
        owner.stream.write(data)


class Peer(threading.Thread):
    """The other side, which blocks. If the near side fails it gets an OSError; the test shows what is missing then."""

    def run(self) -> None:
        with contextlib.suppress(OSError):
            super().run()


def own(driver, sock: socket.socket, owner: Owner | None = None) -> Owner:
    """Hand a socket over to the driver as a stream."""
    owner = owner or Owner()
    sock.setblocking(False)
    owner.stream = driver.stream(sock.detach(), owner)
    return owner


def tcp_listener(backlog: int = 128) -> socket.socket:
    """A listener on a free port of 127.0.0.1."""
    return socket.create_server(("127.0.0.1", 0), backlog=backlog)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection; each with a bound on its blocking calls."""
    with tcp_listener() as listener:
        near = socket.create_connection(listener.getsockname(), timeout=SECONDS_MAX)
        far, _ = listener.accept()
    far.settimeout(SECONDS_MAX)
    for sock in (near, far):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def unix_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a unix connection."""
    near, far = socket.socketpair()
    near.settimeout(SECONDS_MAX)
    far.settimeout(SECONDS_MAX)
    return near, far


def reset(sock: socket.socket) -> None:
    """Close a TCP socket with a RST (SO_LINGER of zero seconds, socket(7))."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, (1).to_bytes(4, sys.byteorder) + bytes(4))
    sock.close()


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end of input."""
    data = bytearray()
    while piece := sock.recv(65536):
        data += piece
    return bytes(data)


def same(one: bytes, other: bytes) -> bool:
    """Are they equal? Asserting this and not the equality saves a failing test from printing megabytes."""
    return len(one) == len(other) and bytes(one) == bytes(other)


def wait_readable(fd: int) -> None:
    """Until poll(2) says that there is something to be read, or an end."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(SECONDS_MAX * 1000), "nothing arrived"


NOT_THERE = {errno.ECONNRESET, errno.EPIPE}
"""What a kernel says of a peer that is dead."""


class Results(list):
    """A list that is its own callback."""

    def __call__(self, result: object) -> None:
        self.append(result)


def processor_time() -> float:
    """Of this process, in seconds."""
    return sum(os.times()[:2])
