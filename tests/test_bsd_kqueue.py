"""What is peculiar to the engine on kqueue: hang-ups without a filter, two events an fd, children, and the wake-up.

Run with KORE_IO=kqueue and the stand-in in PYTHONPATH (tests/kqueue), or on a BSD.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading

import pytest
from driver_harness import (
    Owner,
    Results,
    make_driver,
    open_driver,
    own,
    processor_time,
    reset,
    run,
    tcp_pair,
    turns,
    unix_pair,
    wait_readable,
)

from kore.errors import EngineError

if not hasattr(select, "kqueue"):
    pytest.skip("there is no kqueue here: PYTHONPATH=$PWD/tests/kqueue gives a stand-in", allow_module_level=True)

from kore.bsd import kqueue as engine
from kore.readiness.watch import NOT_REGISTERED


@pytest.fixture(params=["kqueue"])
def driver(request):
    """The driver on kqueue."""
    yield from open_driver(request.param)


@pytest.fixture
def poller():
    """The poller alone, with its trigger taken."""
    made = engine.KqueuePoller()
    yield made
    made.close()


@pytest.fixture
def pair():
    """Two ends of a TCP connection."""
    near, far = tcp_pair()
    yield near, far
    near.close()
    far.close()


def counted(poller) -> list:
    """The changes that a poller makes from now on: (ident, filter, flags)."""
    changes = []
    control = poller.control

    def count(changed, *arguments):
        changes.extend((change.ident, change.filter, change.flags) for change in changed or ())
        return control(changed, *arguments)

    poller.control = count
    return changes


def child() -> subprocess.Popen:
    """A child that ends when its input does."""
    return subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)


def brief_child() -> subprocess.Popen:
    """A child that ends at once."""
    return subprocess.Popen([sys.executable, "-c", ""])


# --- readiness -------------------------------------------------------------------------------------------------------


def test_input_and_room_are_one_pair(poller, pair) -> None:
    """Two events of one fd come as one, as from epoll: what is done for the first may close it."""
    near, far = pair
    poller.change(near.fileno(), NOT_REGISTERED, select.POLLIN | select.POLLOUT)
    assert poller.poll(0, 10) == [(near.fileno(), select.POLLOUT)]
    far.send(b"x")
    wait_readable(near.fileno())
    assert poller.poll(0, 10) == [(near.fileno(), select.POLLIN | select.POLLOUT)]


def test_waiting_for_nothing_hears_of_hangups_alone(poller, pair) -> None:
    """Mask 0: neither input nor a peer's FIN is an event; a dead peer is."""
    near, far = pair
    poller.change(near.fileno(), NOT_REGISTERED, 0)
    far.send(b"x")
    wait_readable(near.fileno())
    assert poller.poll(0, 10) == []
    far.shutdown(socket.SHUT_WR)
    while near.recv(1):
        pass
    assert all(not events & (select.POLLHUP | select.POLLERR | select.POLLIN) for _, events in poller.poll(0, 10))
    near.send(b"y")
    wait_readable(far.fileno())
    reset(far)
    ((fd, events),) = poller.poll(20, 10)
    assert fd == near.fileno()
    assert events & select.POLLHUP
    assert events & select.POLLERR


def test_a_fin_is_no_hangup_and_both_ends_are(poller, pair) -> None:
    near, far = pair
    poller.change(near.fileno(), NOT_REGISTERED, select.POLLIN)
    far.shutdown(socket.SHUT_WR)
    ((_, events),) = poller.poll(20, 10)
    assert events & select.POLLIN
    assert not events & (select.POLLHUP | select.POLLERR)
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    ((_, events),) = poller.poll(20, 10)
    assert events & select.POLLHUP
    assert not events & select.POLLERR


POLL = select.poll


class SilentPoll:
    """poll(2) of NetBSD, which never says POLLHUP of a socket (sodopoll())."""

    def __init__(self) -> None:
        self.real = POLL()
        self.register = self.real.register

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        """What is left."""
        told = [(fd, bits & ~select.POLLHUP) for fd, bits in self.real.poll(timeout)]
        return [(fd, bits) for fd, bits in told if bits]


# Of a unix socket that poll says nothing of, Linux still knows the peer that is gone; the BSDs say ENOTCONN.
@pytest.mark.parametrize(("poll", "made"), [(POLL, tcp_pair), (POLL, unix_pair), (SilentPoll, tcp_pair)])
def test_both_ends_closed_are_a_hangup(driver, monkeypatch, poll, made) -> None:
    """The regular end of a stream that has sent its FIN: nobody is left to tell it anything."""
    monkeypatch.setattr(select, "poll", poll)
    near, far = made()
    owner = own(driver, near)
    owner.stream.finish()
    turns(driver)
    assert far.recv(1) == b""
    assert not owner.losses
    far.close()
    run(driver, lambda: owner.losses)
    assert (owner.losses, owner.ends) == ([0], 1)


def test_a_fin_alone_is_none_where_poll_says_nothing(poller, pair, monkeypatch) -> None:
    monkeypatch.setattr(select, "poll", SilentPoll)
    near, far = pair
    poller.change(near.fileno(), NOT_REGISTERED, select.POLLIN)
    far.shutdown(socket.SHUT_WR)
    ((_, events),) = poller.poll(20, 10)
    assert events & select.POLLIN
    assert not events & (select.POLLHUP | select.POLLERR)


# --- pipes without a reader ------------------------------------------------------------------------------------------


@pytest.fixture(params=[errno.EPIPE, errno.EBADF], ids=["EPIPE", "EBADF"])
def unread(request, monkeypatch):
    """The writing end of a pipe whose reader is gone; systems differ in how they refuse a note on it."""
    if standin := sys.modules.get("kqueue_notes"):
        monkeypatch.setattr(standin, "no_reader", request.param)
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    yield write_fd
    os.close(write_fd)


@pytest.mark.parametrize("mask", [select.POLLOUT, 0])
def test_a_pipe_that_nobody_reads(driver, unread: int, mask: int) -> None:
    """Hung up from the start, though no note can be had: told to a poll, and again and again while it is asked."""
    results, repeated = Results(), Results()
    driver.poll(unread, mask, results)
    run(driver, lambda: results)
    assert results[0] & (select.POLLHUP | select.POLLERR)
    operation = driver.poll_multishot(unread, mask, repeated)
    for _ in range(3):
        count = len(repeated)
        driver.wait(20)
        assert len(repeated) > count
    operation.cancel()
    driver.wait(20)
    fired = Results()
    driver.timeout(0.02, fired)
    driver.wait(20)
    assert fired == [0], "it was told though nobody asks"


def test_a_pipe_that_was_closed_is_not_hung_up(poller, unread: int) -> None:
    """Its number is another's by now, of which nothing was asked."""
    copy = os.dup(unread)
    poller.change(copy, NOT_REGISTERED, select.POLLOUT)
    assert [fd for fd, _ in poller.poll(None, 10)] == [copy]
    os.close(copy)
    assert poller.poll(0, 10) == []
    with pytest.raises(OSError, match="Bad file"):
        poller.change(copy, NOT_REGISTERED, select.POLLOUT)


# --- notes -----------------------------------------------------------------------------------------------------------


def test_a_quiet_note_becomes_a_loud_one(poller, pair) -> None:
    """EV_CLEAR can't be changed by adding again, so the note is made anew; what waits is told again and again."""
    near, far = pair
    poller.change(near.fileno(), NOT_REGISTERED, 0)
    far.send(b"x")
    wait_readable(near.fileno())
    assert poller.poll(0, 10) == []
    poller.change(near.fileno(), 0, select.POLLIN)
    for _ in range(3):
        assert poller.poll(0, 10) == [(near.fileno(), select.POLLIN)]
    poller.change(near.fileno(), select.POLLIN, 0)
    assert poller.poll(0, 10) == []
    poller.change(near.fileno(), 0, NOT_REGISTERED)
    far.close()
    assert poller.poll(0, 10) == []


def test_only_what_changes_is_changed(poller, pair) -> None:
    near, _ = pair
    fd = near.fileno()
    poller.change(fd, NOT_REGISTERED, select.POLLIN)
    changes = counted(poller)
    poller.change(fd, select.POLLIN, select.POLLIN | select.POLLOUT)
    poller.change(fd, select.POLLIN | select.POLLOUT, select.POLLIN)
    assert changes == [
        (fd, select.KQ_FILTER_WRITE, select.KQ_EV_ADD), (fd, select.KQ_FILTER_WRITE, select.KQ_EV_DELETE)]


def test_what_went_with_its_fd_is_asked_again(poller, pair) -> None:
    """Changing or taking away notes that are gone is no error; asking the same again makes them."""
    near, far = pair
    fd = near.fileno()
    poller.change(fd, select.POLLIN | select.POLLOUT, select.POLLIN)
    poller.change(fd, select.POLLIN, NOT_REGISTERED)
    poller.change(fd, select.POLLIN, select.POLLIN)
    poller.rotate(fd, select.POLLIN)
    far.send(b"x")
    assert poller.poll(20, 10) == [(fd, select.POLLIN)]


def test_files_are_always_ready(poller, tmp_path) -> None:
    """A note on a file is about its position: the poller refuses files, and devices that have no events."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for old in (NOT_REGISTERED, select.POLLIN):
        with pytest.raises(PermissionError):
            poller.change(fd, old, select.POLLIN)
    os.close(fd)
    with open(os.devnull, "rb") as null, pytest.raises(PermissionError):
        poller.change(null.fileno(), NOT_REGISTERED, select.POLLIN)
    with pytest.raises(OSError, match="Bad file"):
        poller.change(fd, NOT_REGISTERED, select.POLLIN)


def test_a_paused_stream_that_is_written_to_costs_nothing(driver, pair) -> None:
    """Input for a paused stream is an event once, and no time is spent on it afterwards."""
    near, far = pair
    owner = own(driver, near)
    turns(driver)
    owner.stream.pause()
    far.send(b"x")
    wait_readable(owner.stream.fd)
    turns(driver)
    before = processor_time()
    driver.wait(0.1)
    assert processor_time() - before < 0.05
    assert not owner.data
    owner.stream.resume()
    run(driver, lambda: owner.data)


def test_a_reset_after_a_fin_ends_a_stream_that_waits(driver, pair) -> None:
    """The peer has ended its input and then dies: nothing is read or written any more, and it is heard of."""
    near, far = pair
    owner = own(driver, near, Owner())
    far.shutdown(socket.SHUT_WR)
    run(driver, lambda: owner.ends)
    owner.stream.write(b"answer")
    turns(driver)
    wait_readable(far.fileno())
    assert not owner.losses
    reset(far)
    run(driver, lambda: owner.losses)
    assert owner.losses == [errno.ECONNRESET]


# --- children --------------------------------------------------------------------------------------------------------


def test_the_end_of_a_child(driver) -> None:
    """0, once, to each who asked; waitpid(2) is theirs."""
    process, results = child(), Results()
    ends = [driver.child(process.pid, results) for _ in range(2)]
    turns(driver)
    assert not results
    process.stdin.close()
    run(driver, lambda: len(results) == 2)
    assert results == [0, 0]
    assert process.wait(0) == 0
    turns(driver)
    for end in ends:
        end.close()
    assert len(results) == 2


@pytest.mark.parametrize("refuses", [False, True], ids=["reported", "refused"])
def test_a_child_that_has_ended_already(driver, monkeypatch, refuses: bool) -> None:
    """Whether the system reports the dead or says ESRCH; also when asked again, because the first answer was early."""
    standin = pytest.importorskip("kqueue_notes", reason="only the stand-in can be either kind of system")
    monkeypatch.setattr(standin, "refuses_zombies", refuses)
    process, results = brief_child(), Results()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    end = driver.child(process.pid, results)
    assert not results
    run(driver, lambda: results)
    end.wait(results)
    run(driver, lambda: len(results) == 2)
    assert results == [0, 0]
    assert process.wait() == 0


def test_no_child_of_that_number(driver) -> None:
    """waitpid(2) will say so; here it has simply ended."""
    process, results = brief_child(), Results()
    process.wait()
    driver.child(process.pid, results)
    run(driver, lambda: results)
    assert results == [0]


def test_a_kill_reaches_the_child_and_nobody_else(driver) -> None:
    """Once somebody has reaped it, its number is not signalled any more."""
    process, results = child(), Results()
    end = driver.child(process.pid, results)
    end.kill()
    run(driver, lambda: results)
    assert process.wait() == -signal.SIGKILL
    process.stdin.close()
    with pytest.raises(ProcessLookupError):
        end.kill()


def test_closing_the_driver_forgets_children() -> None:
    """Nobody is called back, and the child goes on."""
    driver = make_driver("kqueue")
    process, results = child(), Results()
    driver.child(process.pid, results)
    driver.close()
    assert process.poll() is None
    process.stdin.close()
    assert process.wait() == 0
    assert not results


# --- waking, and no kqueue -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filtered", [True, False], ids=["by-filter", "by-pipe"])
def test_wake(driver, monkeypatch, filtered: bool) -> None:
    """By EVFILT_USER, or through the pipe where the system has no such filter: before the wait or during it, once."""
    assert driver.kqueue.user_filter is not None
    if not filtered:
        monkeypatch.setattr(driver.kqueue, "user_filter", None)
    driver.wake()
    driver.wake()
    driver.wait(20)
    thread = threading.Thread(target=driver.wake)
    thread.start()
    driver.wait(20)
    thread.join()
    fired = Results()
    driver.timeout(0.02, fired)
    driver.wait(20)
    assert fired == [0], "a wake-up was left over"
    os.write(driver.wake_fd, b"\0")  # as set_wakeup_fd does
    driver.wait(20)


def test_a_system_without_the_filter(monkeypatch) -> None:
    """EINVAL when its note is added: the pipe is used."""
    monkeypatch.setitem(engine.USER_FILTERS, sys.platform, -99)
    driver = make_driver("kqueue")
    assert driver.kqueue.user_filter is None
    driver.wake()
    driver.wait(20)
    driver.close()
    driver.wake()


def test_no_kqueue_to_be_had(monkeypatch) -> None:
    """EngineError names the call and the errno."""
    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(engine, "kqueue", refuse)
    with pytest.raises(EngineError, match="kqueue") as caught:
        engine.KqueueDriver()
    assert caught.value.errno == errno.EMFILE


def test_unix_peers_that_leave(driver) -> None:
    """A unix peer's close is the end of input and then a hang-up."""
    near, far = unix_pair()
    owner = own(driver, near)
    far.send(b"last")
    far.close()
    run(driver, lambda: owner.ends)
    assert bytes(owner.data) == b"last"
    owner.stream.close()
    run(driver, lambda: owner.losses)
    assert owner.losses == [0]
