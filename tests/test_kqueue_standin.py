"""The kqueue stand-in keeps what kqueue(2) documents, filter by filter and flag by flag."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "kqueue"))

import kqueue_notes
from kqueue_notes import (
    EV_ADD,
    EV_CLEAR,
    EV_DELETE,
    EV_DISABLE,
    EV_DISPATCH,
    EV_ENABLE,
    EV_EOF,
    EV_ERROR,
    EV_ONESHOT,
    EV_RECEIPT,
    FILTER_PROC,
    FILTER_READ,
    FILTER_SIGNAL,
    FILTER_TIMER,
    FILTER_USER,
    FILTER_WRITE,
    NOTE_ABSTIME,
    NOTE_EXIT,
    NOTE_FFAND,
    NOTE_FFCOPY,
    NOTE_FFOR,
    NOTE_MSECONDS,
    NOTE_NSECONDS,
    NOTE_SECONDS,
    NOTE_TRIGGER,
    NOTE_USECONDS,
)
from kqueue_standin import kevent, kqueue

from tests.driver_harness import fds, reset, tcp_listener, tcp_pair, unix_pair, wait_readable

SECONDS = 20


@pytest.fixture
def queue():
    """A kqueue, which leaves no fd behind."""
    before = fds()
    made = kqueue()
    yield made
    made.close()
    assert not fds() - before


@pytest.fixture
def pair(queue):
    """Two ends of a unix connection, closed before the queue's fds are counted."""
    near, far = unix_pair()
    yield near, far
    near.close()
    far.close()


def change(queue, *changes: kevent) -> None:
    """Apply changes and take no event."""
    assert queue.control(changes, 0) == []


def look(queue) -> list[kevent]:
    """What is there now."""
    return queue.control(None, 10, 0)


def wait(queue) -> kevent:
    """The one event that comes."""
    (event,) = queue.control(None, 10, SECONDS)
    return event


# --- flags -----------------------------------------------------------------------------------------------------------


def test_level_triggered_until_read(queue, pair) -> None:
    near, far = pair
    change(queue, kevent(near, FILTER_READ, EV_ADD, udata=7))
    assert look(queue) == []
    far.send(b"abc")
    assert wait(queue) == kevent(near, FILTER_READ, 0, 0, 3, 7)
    assert wait(queue).data == 3
    near.recv(10)
    assert look(queue) == []


def test_adding_again_changes_the_note(queue, pair) -> None:
    """One note, the new udata; EV_CLEAR stays what it was."""
    near, far = pair
    far.send(b"x")
    change(queue, kevent(near, FILTER_READ, EV_ADD, udata=1))
    change(queue, kevent(near, FILTER_READ, EV_ADD | EV_CLEAR, udata=2))
    assert [event.udata for event in look(queue)] == [2]
    assert len(look(queue)) == 1


def test_clear_reports_what_is_new(queue, pair) -> None:
    near, far = pair
    far.send(b"x")
    change(queue, kevent(near, FILTER_READ, EV_ADD | EV_CLEAR))
    assert wait(queue).data == 1
    assert look(queue) == []
    far.send(b"y")
    assert wait(queue).data == 2
    assert look(queue) == []
    change(queue, kevent(near, FILTER_READ, EV_ADD))
    assert wait(queue).data == 2


def test_oneshot_goes_with_its_event(queue, pair) -> None:
    near, far = pair
    change(queue, kevent(near, FILTER_READ, EV_ADD | EV_ONESHOT))
    far.send(b"x")
    assert wait(queue).flags & EV_ONESHOT
    assert look(queue) == []
    with pytest.raises(FileNotFoundError):
        change(queue, kevent(near, FILTER_READ, EV_DELETE))


def test_disabled_notes_are_silent_and_dispatch_disables(queue, pair) -> None:
    near, far = pair
    far.send(b"x")
    change(queue, kevent(near, FILTER_READ, EV_ADD | EV_DISABLE))
    assert look(queue) == []
    change(queue, kevent(near, FILTER_READ, EV_ENABLE))
    assert len(look(queue)) == 1
    change(queue, kevent(near, FILTER_READ, EV_DISABLE))
    assert look(queue) == []
    change(queue, kevent(near, FILTER_READ, EV_DELETE), kevent(near, FILTER_READ, EV_ADD | EV_DISPATCH))
    assert len(look(queue)) == 1
    assert look(queue) == []
    change(queue, kevent(near, FILTER_READ, EV_ENABLE))
    assert len(look(queue)) == 1


def test_errors_of_changes(queue, pair) -> None:
    """Raised without room, else events with EV_ERROR and the errno in data, which end the call; later changes count."""
    near, far = pair
    for flags in (EV_DELETE, EV_ENABLE, EV_DISABLE):
        with pytest.raises(FileNotFoundError):
            change(queue, kevent(near, FILTER_READ, flags))
    closed = os.dup(near.fileno())
    os.close(closed)
    for flags in (EV_ADD, EV_DELETE):
        with pytest.raises(OSError, match="Bad file") as caught:
            change(queue, kevent(closed, FILTER_READ, flags))
        assert caught.value.errno == errno.EBADF
    for filter_, flags in ((-99, EV_ADD), (FILTER_READ, EV_ADD | EV_ENABLE | EV_DISABLE)):
        with pytest.raises(OSError, match="Invalid"):
            change(queue, kevent(near, filter_, flags))
    far.send(b"x")
    told = queue.control([kevent(closed, FILTER_READ, EV_ADD, udata=3), kevent(near, FILTER_READ, EV_ADD)], 5, SECONDS)
    assert told == [kevent(closed, FILTER_READ, EV_ERROR, 0, errno.EBADF, 3)]
    assert wait(queue).ident == near.fileno()


def test_receipts(queue, pair) -> None:
    """EV_RECEIPT: one EV_ERROR of 0 a change and no pending event; without room what follows is not done."""
    near, far = pair
    far.send(b"x")
    changes = [kevent(near, kind, EV_ADD | EV_RECEIPT) for kind in (FILTER_READ, FILTER_WRITE)]
    assert queue.control(changes, 2, 0) == [kevent(near, kind, EV_ERROR) for kind in (FILTER_READ, FILTER_WRITE)]
    assert {event.filter for event in look(queue)} == {FILTER_READ, FILTER_WRITE}
    deletes = [kevent(near, kind, EV_DELETE | EV_RECEIPT) for kind in (FILTER_READ, FILTER_WRITE)]
    assert len(queue.control([*deletes, kevent(far, FILTER_READ, EV_ADD)], 1, 0)) == 1
    with pytest.raises(FileNotFoundError):
        change(queue, kevent(far, FILTER_READ, EV_DELETE))


def test_arguments(queue) -> None:
    with pytest.raises(ValueError, match="eventlist"):
        queue.control(None, -1)
    with pytest.raises(ValueError, match="timeout"):
        queue.control(None, 1, -1)
    assert queue.control(None, 0, SECONDS) == []
    other = kqueue()
    other.close()
    other.close()
    with pytest.raises(ValueError, match="closed"):
        other.control(None, 1, 0)
    with pytest.raises(OverflowError):
        kevent(-1)


# --- fds -------------------------------------------------------------------------------------------------------------


def test_two_filters_are_two_events(queue, pair) -> None:
    near, far = pair
    change(queue, *(kevent(near, kind, EV_ADD) for kind in (FILTER_READ, FILTER_WRITE)))
    assert [event.filter for event in look(queue)] == [FILTER_WRITE]
    far.send(b"x")
    assert sorted(event.filter for event in look(queue)) == [FILTER_WRITE, FILTER_READ]
    assert len(queue.control(None, 1, 0)) == 1


def test_notes_vanish_with_their_fd(queue, pair) -> None:
    """Also when there is a copy of it, and when its number is used again."""
    near, far = pair
    number = near.fileno()
    change(queue, kevent(near, FILTER_READ, EV_ADD))
    copy = near.dup()
    far.send(b"x")
    near.close()
    assert look(queue) == []
    again, other = unix_pair()
    try:
        assert again.fileno() == number
        other.send(b"y")
        assert look(queue) == []
        with pytest.raises(FileNotFoundError):
            change(queue, kevent(number, FILTER_READ, EV_DELETE))
        change(queue, kevent(number, FILTER_READ, EV_ADD))
        assert wait(queue).data == 1
    finally:
        copy.close()
        again.close()
        other.close()


def test_a_listener_tells_its_backlog(queue) -> None:
    with tcp_listener() as listener:
        change(queue, kevent(listener, FILTER_READ, EV_ADD))
        assert look(queue) == []
        clients = [socket.create_connection(listener.getsockname()) for _ in range(3)]
        assert wait(queue).data == 3
        listener.accept()[0].close()
        assert wait(queue).data == 2
        for client in clients:
            client.close()


@pytest.mark.parametrize("made", [tcp_pair, unix_pair])
def test_the_end_of_input_and_of_output(queue, made) -> None:
    """EV_EOF beside the bytes that are left; a FIN ends input alone, a dead peer both ways."""
    near, far = made()
    change(queue, *(kevent(near, kind, EV_ADD) for kind in (FILTER_READ, FILTER_WRITE)))
    far.send(b"abc")
    far.shutdown(socket.SHUT_WR)
    wait_readable(near.fileno())
    read = next(event for event in look(queue) if event.filter == FILTER_READ and event.flags & EV_EOF)
    write = next(event for event in look(queue) if event.filter == FILTER_WRITE)
    assert (read.data, read.fflags) == (3, 0)
    assert not write.flags & EV_EOF
    far.close()
    near.close()


def test_a_reset_tells_an_errno(queue) -> None:
    """In fflags, for both filters, and leaves it for who reads."""
    near, far = tcp_pair()
    change(queue, *(kevent(near, kind, EV_ADD) for kind in (FILTER_READ, FILTER_WRITE)))
    reset(far)
    wait_readable(near.fileno())
    events = look(queue)
    assert {event.filter for event in events} == {FILTER_READ, FILTER_WRITE}
    assert all(event.flags & EV_EOF and event.fflags == errno.ECONNRESET for event in events)
    with pytest.raises(ConnectionResetError):
        near.recv(1)
    near.close()


def test_a_refused_connection(queue) -> None:
    with tcp_listener() as listener:
        address = listener.getsockname()
    sock = socket.socket()
    sock.setblocking(False)
    change(queue, kevent(sock, FILTER_WRITE, EV_ADD | EV_CLEAR))
    assert look(queue) == [], "never connected is not writable"
    assert sock.connect_ex(address) == errno.EINPROGRESS
    event = wait(queue)
    assert event.flags & EV_EOF
    assert event.fflags
    sock.close()


def test_pipes(queue) -> None:
    """Room, bytes, and the other end that leaves: EV_EOF without an errno."""
    read_fd, write_fd = os.pipe()
    change(queue, kevent(read_fd, FILTER_READ, EV_ADD), kevent(write_fd, FILTER_WRITE, EV_ADD))
    assert wait(queue).data == 65536
    os.write(write_fd, b"xy")
    assert [(event.ident, event.data, event.flags) for event in look(queue)] == [
        (read_fd, 2, 0), (write_fd, 65534, 0)]
    os.close(read_fd)
    event = wait(queue)
    assert (event.ident, event.flags & EV_EOF, event.fflags) == (write_fd, EV_EOF, 0)
    os.close(write_fd)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EBADF])
def test_a_pipe_that_nobody_reads_any_more(queue, monkeypatch, number: int) -> None:
    """Can't be watched for writing any more, which the systems say in different ways."""
    monkeypatch.setattr(kqueue_notes, "no_reader", number)
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        change(queue, kevent(write_fd, FILTER_WRITE, EV_ADD))
    assert caught.value.errno == number
    with pytest.raises(FileNotFoundError):
        change(queue, kevent(write_fd, FILTER_WRITE, EV_DELETE))
    os.close(write_fd)


def test_an_end_of_a_pipe_has_one_way(queue) -> None:
    """A note for the other way can be added and never holds, also when the other end is closed."""
    ends = os.pipe(), os.pipe()
    changes = kevent(ends[0][1], FILTER_READ, EV_ADD), kevent(ends[1][0], FILTER_WRITE, EV_ADD)
    os.write(ends[1][1], b"x")
    change(queue, *changes)
    assert look(queue) == []
    os.close(ends[0][0])
    os.close(ends[1][1])
    assert look(queue) == []
    os.close(ends[0][1])
    os.close(ends[1][0])


def test_the_error_of_a_datagram_passes(queue) -> None:
    """It makes its socket readable and writable, without EV_EOF; whoever takes it ends that."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        address = gone.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send(b"x")
        change(queue, kevent(sock, FILTER_READ, EV_ADD))
        assert wait(queue) == kevent(sock, FILTER_READ, 0)
        with pytest.raises(ConnectionRefusedError):
            sock.recv(1)
        assert look(queue) == []


@pytest.mark.parametrize("made", [tcp_pair, unix_pair])
def test_who_has_shut_the_output_is_told_its_end(queue, made) -> None:
    near, far = made()
    change(queue, kevent(near, FILTER_WRITE, EV_ADD))
    assert not wait(queue).flags & EV_EOF
    near.shutdown(socket.SHUT_WR)
    event = wait(queue)
    assert (event.flags & EV_EOF, event.fflags) == (EV_EOF, 0)
    assert far.recv(1) == b""
    near.close()
    far.close()


def test_files(queue, tmp_path) -> None:
    """Readable while the position is not at the end, by so many bytes; always writable."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    change(queue, kevent(fd, FILTER_READ, EV_ADD))
    assert look(queue) == []
    os.write(fd, b"abc")
    os.lseek(fd, 1, os.SEEK_SET)
    assert wait(queue).data == 2
    change(queue, kevent(fd, FILTER_WRITE, EV_ADD))
    assert {event.filter for event in look(queue)} == {FILTER_READ, FILTER_WRITE}
    os.close(fd)


# --- processes, signals, timers, programs' own -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit(3)", 3 << 8), ("import os; os.abort()", signal.SIGABRT)])
def test_the_end_of_a_process(queue, code: str, status: int) -> None:
    """The status in data, once; the note goes with it; the child is still there to be waited for."""
    child = subprocess.Popen([sys.executable, "-c", f"import resource, sys; sys.stdin.read(); {code}"],
                             stdin=subprocess.PIPE)
    change(queue, kevent(child.pid, FILTER_PROC, EV_ADD, NOTE_EXIT))
    assert look(queue) == []
    child.stdin.close()
    event = wait(queue)
    assert (event.ident, event.fflags, event.data & ~0x80) == (child.pid, NOTE_EXIT, status)
    assert event.flags == EV_EOF | EV_ONESHOT | EV_CLEAR
    assert look(queue) == []
    with pytest.raises(FileNotFoundError):
        change(queue, kevent(child.pid, FILTER_PROC, EV_DELETE))
    assert child.wait() == (3 if status > 255 else -signal.SIGABRT)
    with pytest.raises(ProcessLookupError):
        change(queue, kevent(child.pid, FILTER_PROC, EV_ADD, NOTE_EXIT))


@pytest.mark.parametrize("refuses", [False, True])
def test_a_process_that_has_ended_already(queue, monkeypatch, refuses: bool) -> None:
    """Reported by some systems, ESRCH on others."""
    monkeypatch.setattr(kqueue_notes, "refuses_zombies", refuses)
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    added = kevent(child.pid, FILTER_PROC, EV_ADD, NOTE_EXIT)
    if refuses:
        with pytest.raises(ProcessLookupError):
            change(queue, added)
    else:
        change(queue, added)
        assert wait(queue).data == 0
    child.wait()


@pytest.mark.parametrize("ignored", [True, False])
def test_signals_are_counted(queue, ignored: bool) -> None:
    """Also ignored ones; a handler is called all the same and is back afterwards."""
    called = []

    def handler(number, _frame) -> None:
        called.append(number)

    wanted = signal.SIG_IGN if ignored else handler
    before = signal.signal(signal.SIGUSR1, wanted)
    try:
        change(queue, kevent(signal.SIGUSR1, FILTER_SIGNAL, EV_ADD))
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert wait(queue).data == 3
        assert look(queue) == []
        assert called == ([] if ignored else [signal.SIGUSR1] * 3)
        change(queue, kevent(signal.SIGUSR1, FILTER_SIGNAL, EV_DELETE))
        assert signal.getsignal(signal.SIGUSR1) == wanted
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_ignored_end_of_a_child_is_not_counted(queue) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        change(queue, kevent(signal.SIGCHLD, FILTER_SIGNAL, EV_ADD))
        os.kill(os.getpid(), signal.SIGCHLD)
        assert look(queue) == []
    finally:
        queue.close()
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(
    ("unit", "data"), [(NOTE_SECONDS, 1), (NOTE_MSECONDS, 1000), (NOTE_USECONDS, 10**6), (NOTE_NSECONDS, 10**9)])
def test_units_of_timers(queue, unit: int, data: int) -> None:
    """The same second in each of them; of nothing, once, it is over at once."""
    change(queue, kevent(1, FILTER_TIMER, EV_ADD | EV_ONESHOT, unit, data))
    (note,) = queue._notes.values()
    assert note.period == pytest.approx(1)
    change(queue, kevent(1, FILTER_TIMER, EV_ADD | EV_ONESHOT, unit, 0))
    assert wait(queue) == kevent(1, FILTER_TIMER, EV_ONESHOT | EV_CLEAR, 0, 1)


def test_times_that_are_none(queue) -> None:
    """EINVAL, and no note; a period of nothing is one of the unit."""
    for fflags, data in ((0, -1), (NOTE_SECONDS | NOTE_USECONDS, 1), (1 << 20, 1)):
        with pytest.raises(OSError, match="Invalid"):
            change(queue, kevent(1, FILTER_TIMER, EV_ADD, fflags, data))
        with pytest.raises(FileNotFoundError):
            change(queue, kevent(1, FILTER_TIMER, EV_DELETE))
    change(queue, kevent(1, FILTER_TIMER, EV_ADD, NOTE_SECONDS, 0))
    (note,) = queue._notes.values()
    assert note.period == 1


def test_a_timer_for_a_time_of_day(queue) -> None:
    """NOTE_ABSTIME: once, and for as long as nobody deletes it; what is past is now."""
    change(queue, kevent(1, FILTER_TIMER, EV_ADD, NOTE_ABSTIME | NOTE_SECONDS, int(time.time()) + 1000))
    assert look(queue) == []
    change(queue, kevent(1, FILTER_TIMER, EV_ADD, NOTE_ABSTIME | NOTE_SECONDS, 1))
    for _ in range(2):
        assert wait(queue) == kevent(1, FILTER_TIMER, 0, 0, 1)


def test_a_timer_that_is_added_again_forgets(queue) -> None:
    """What has expired is gone; to enable it alone changes nothing."""
    change(queue, kevent(1, FILTER_TIMER, EV_ADD | EV_ONESHOT | EV_DISABLE, 0, 0))
    assert look(queue) == []
    change(queue, kevent(1, FILTER_TIMER, EV_ENABLE, NOTE_SECONDS, 1000, udata=3))
    assert [(event.data, event.udata) for event in look(queue)] == [(1, 3)]
    change(queue, kevent(1, FILTER_TIMER, EV_ADD | EV_ONESHOT, 0, 0))
    change(queue, kevent(1, FILTER_TIMER, EV_ADD | EV_ONESHOT, NOTE_SECONDS, 1000))
    assert look(queue) == []


def test_timers(queue) -> None:
    """Milliseconds, again and again, counted while nobody looks; once with EV_ONESHOT."""
    started = time.monotonic()
    change(queue, kevent(1, FILTER_TIMER, EV_ADD | EV_ONESHOT, data=20))
    assert wait(queue).data == 1
    assert time.monotonic() - started >= 0.02
    assert look(queue) == []
    change(queue, kevent(2, FILTER_TIMER, EV_ADD, data=1))
    seen = 0
    while seen < 5:
        seen += wait(queue).data
    assert time.monotonic() - started >= 0.025
    change(queue, kevent(2, FILTER_TIMER, EV_DELETE))
    assert look(queue) == []


def test_user_events(queue) -> None:
    """Bits are combined as the two highest say; NOTE_TRIGGER makes the note hold, until told when not EV_CLEAR."""
    change(queue, kevent(9, FILTER_USER, EV_ADD, NOTE_FFCOPY | 0b1100, udata=5))
    assert look(queue) == []
    change(queue, kevent(9, FILTER_USER, 0, NOTE_FFOR | 0b0001))
    change(queue, kevent(9, FILTER_USER, 0, NOTE_FFAND | 0b0101))
    assert look(queue) == []
    change(queue, kevent(9, FILTER_USER, 0, NOTE_TRIGGER, 7, 6))
    for _ in range(2):
        assert [(event.fflags, event.data, event.udata) for event in look(queue)] == [(0b0101, 7, 6)]
    change(queue, kevent(9, FILTER_USER, EV_DELETE), kevent(9, FILTER_USER, EV_ADD | EV_CLEAR, 3))
    change(queue, kevent(9, FILTER_USER, 0, NOTE_TRIGGER))
    assert len(look(queue)) == 1
    assert look(queue) == []
    change(queue, kevent(9, FILTER_USER, 0, NOTE_TRIGGER))
    assert [event.fflags for event in look(queue)] == [3], "the program's bits stay"


def test_what_does_not_trigger(queue) -> None:
    """The call that adds the note, and one that says EV_CLEAR."""
    change(queue, kevent(9, FILTER_USER, EV_ADD, NOTE_TRIGGER))
    assert look(queue) == []
    change(queue, kevent(9, FILTER_USER, 0, NOTE_TRIGGER))
    change(queue, kevent(9, FILTER_USER, EV_CLEAR, NOTE_TRIGGER))
    assert look(queue) == []


def test_a_thread_triggers(queue) -> None:
    change(queue, kevent(0, FILTER_USER, EV_ADD | EV_CLEAR))
    thread = threading.Thread(target=change, args=(queue, kevent(0, FILTER_USER, 0, NOTE_TRIGGER)))
    thread.start()
    assert wait(queue).ident == 0
    thread.join()


def test_not_inherited_by_fork(queue, pair) -> None:
    """The child's is closed; the parent's goes on."""
    near, far = pair
    change(queue, kevent(near, FILTER_READ, EV_ADD))
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            queue.control(None, 1, 0)
        except ValueError:
            os.write(write_fd, b"closed")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read_fd, 10) == b"closed"
    far.send(b"x")
    assert wait(queue).ident == near.fileno()
    os.close(read_fd)
    os.close(write_fd)


def test_a_queue_can_be_polled(queue, pair) -> None:
    near, far = pair
    change(queue, kevent(near, FILTER_READ, EV_ADD))
    look(queue)
    poller = select.poll()
    poller.register(queue.fileno(), select.POLLIN)
    assert poller.poll(0) == []
    far.send(b"x")
    assert poller.poll(SECONDS * 1000)


def test_it_is_installed_by_the_environment_alone(tmp_path) -> None:
    """With the folder in PYTHONPATH programs have it and choose it; without, there is none."""
    code = "import select, selectors; print(hasattr(select, 'kqueue'), selectors.DefaultSelector.__name__)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for extra, said in (({}, "False EpollSelector"), (
            {"PYTHONPATH": str(Path(__file__).parent / "kqueue")}, "True KqueueSelector")):
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment | extra, cwd=tmp_path, capture_output=True, text=True,
            check=True)
        assert result.stdout.strip() == said


def test_struct_of_tcp_info() -> None:
    """The offset of tcpi_unacked, which is a listener's backlog (netinet/tcp.h)."""
    with tcp_listener() as listener, socket.create_connection(listener.getsockname()):
        wait_readable(listener.fileno())
        info = listener.getsockopt(socket.IPPROTO_TCP, kqueue_notes.TCP_INFO, 104)
        assert struct.unpack_from("I", info, kqueue_notes.TCP_UNACKED) == (1,)
