"""Logs after a rotation: SIGHUP puts new files in the place of the old ones, in the parent and in every worker."""

from __future__ import annotations

import functools
import os
import signal
from io import FileIO
from types import SimpleNamespace

import pytest

from kore.process import reopening
from kore.process.channel import Kind, channel_pair
from kore.process.log import DescriptorSink, Log
from kore.process.reopening import Reopening, access_logs
from kore.process.seat import Seat
from tests.support import http_get, pids_of, starter, wait_until

LOGS = """
home.accesslog = "access.log"
other = kore.domain("other.example", attach="plain")
other.accesslog = "other.log"

class App:
    # What the access log of this server does with a request: a line on the descriptor that everybody holds.
    def onmsg(self, text):
        for domain in (home, other):
            os.write(domain.accesslog_file.fileno(), f"{text} by {kore.worker()}\\n".encode())
        kore.log(kore.LOG_INFO, f"wrote {text}")

koreapp = App()

@kore.route("^/write/(.*)$", domain=home, methods=["get"])
def write(req, text):
    kore.sendobj(text)
    req.response(200, b"sent")
"""


@pytest.fixture
def start(tmp_path, engine):
    with starter(tmp_path) as programs:
        yield functools.partial(programs.serve, io=engine)


def lines(path):
    return sorted(path.read_text().splitlines())


def write(program, text, workers=2):
    http_get(program.address, f"/write/{text}")
    program.wait_for(rf"log=\[wrote {text}\]", count=workers)


def test_after_a_hangup_every_worker_writes_to_the_new_files(start):
    program = start(LOGS)
    pids_of(program)
    for name in ("access.log", "other.log"):
        (program.directory / name).rename(program.directory / f"{name}.1")
    write(program, "before")
    program.signal(signal.SIGHUP)
    program.wait_for("SIGHUP: logs were opened again")
    for name in ("access.log", "other.log"):
        wait_until((program.directory / name).exists, "the new file")
    # The descriptors go one way and the messages another: what is written next need not find them there yet.
    new = {str(program.directory / name) for name in ("access.log", "other.log")}
    for pid in pids_of(program):
        wait_until(functools.partial(has_files, pid, new), "the worker has the new ones")
        assert not [name for name in open_files(pid) if name.endswith(".1")]
    write(program, "after")
    for name in ("access.log", "other.log"):
        assert lines(program.directory / f"{name}.1") == ["before by 1", "before by 2"]
        assert lines(program.directory / name) == ["after by 1", "after by 2"]


def has_files(pid, names):
    return names <= set(open_files(pid))


def open_files(pid):
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
    return found


def test_a_worker_that_starts_later_writes_to_the_new_file_too(start):
    program = start(LOGS)
    first, _ = pids_of(program)
    (program.directory / "access.log").rename(program.directory / "moved")
    program.signal(signal.SIGHUP)
    program.wait_for("SIGHUP: logs were opened again")
    os.kill(first, signal.SIGKILL)
    pid = int(program.wait_for(r"worker 1 serves again, pid (\d+)")[1])
    assert str(program.directory / "access.log") in open_files(pid)
    assert str(program.directory / "moved") not in open_files(pid)


def test_a_worker_that_is_stuck_gets_them_when_it_wakes(start):
    program = start(LOGS)
    stuck, _ = pids_of(program)
    os.kill(stuck, signal.SIGSTOP)
    new = str(program.directory / "access.log")
    for number in range(3):
        (program.directory / "access.log").rename(program.directory / f"moved.{number}")
        program.signal(signal.SIGHUP)
        program.wait_for("SIGHUP: logs were opened again", count=number + 1)
    os.kill(stuck, signal.SIGCONT)
    wait_until(lambda: new in open_files(stuck), "it writes to the newest")
    assert not [name for name in open_files(stuck) if "moved" in name]


def test_one_that_cannot_be_opened_keeps_the_old_file_and_says_so(start):
    program = start(LOGS)
    pids_of(program)
    for name in ("access.log", "other.log"):
        (program.directory / name).rename(program.directory / f"{name}.1")
    (program.directory / "access.log").mkdir()
    program.signal(signal.SIGHUP)
    program.wait_for(r"access log \S+/access.log of domain '\*' cannot be opened again, the old one stays: Is a dir")
    wait_until((program.directory / "other.log").exists, "the other is opened")
    write(program, "still")
    assert lines(program.directory / "access.log.1") == ["still by 1", "still by 2"]


def test_a_fifo_without_a_reader_does_not_stop_the_parent(start):
    program = start(LOGS, options="kore.config.logfile = 'kore.log'", wait=False)
    log = program.directory / "kore.log"
    wait_until(lambda: log.exists() and "ready" in log.read_text(), "the start")
    for name in ("access.log", "kore.log"):
        (program.directory / name).rename(program.directory / f"{name}.1")
        os.mkfifo(program.directory / name)
    program.signal(signal.SIGHUP)
    old = program.directory / "kore.log.1"
    wait_until(lambda: old.read_text().count("cannot be opened again, the old one stays") == 2, "both are told")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_a_worker_whose_channel_is_full_is_offered_them_again(tmp_path):
    mine, theirs = channel_pair()
    later = []
    with FileIO(str(tmp_path / "log"), "ab") as file:
        log = Log(DescriptorSink(file.fileno()))
        logs = access_logs([SimpleNamespace(name="a", accesslog=file)])
        parents_part = Reopening(logs, log, lambda seconds, call: later.append(call))
        seat = Seat(worker=1)
        seat.taken(1, mine, theirs, None)
        while mine.send(Kind.STOP, b"\x0f" * 1000):
            pass
        for _ in range(3):
            parents_part.hangup([seat])
        assert len(later) == 1, "however often"
        later.pop()()
        assert len(later) == 1, "still no room"
        while theirs.receive() is not None:
            pass
        later.pop()()
        kind, body, fd = theirs.receive_fd()
        os.close(fd)
        assert (kind, body) == (Kind.REOPEN, b"%d" % file.fileno())
        assert later == []
        assert theirs.receive() is None
        seat.left()


def test_the_path_is_that_of_the_start_wherever_it_was_opened_from(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    with FileIO("one.log", "ab") as one, FileIO(str(tmp_path / "two.log"), "ab") as two:
        domains = [SimpleNamespace(name=name, accesslog=file) for name, file in (("a", one), ("b", two), ("c", None))]
        monkeypatch.chdir(tmp_path / "inner")
        logs = access_logs(domains)
        assert [(log.domain, log.path, log.fd) for log in logs] == [
            ("a", str(tmp_path / "one.log"), one.fileno()), ("b", str(tmp_path / "two.log"), two.fileno()),
        ]


def test_a_symbolic_link_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.log").symlink_to("target.log")
    with FileIO("link.log", "ab") as file:
        (log,) = access_logs([SimpleNamespace(name="a", accesslog=file)])
        assert log.path == str(tmp_path / "link.log")


def test_only_the_descriptor_of_a_log_is_ever_replaced(tmp_path):
    with FileIO(str(tmp_path / "log"), "ab") as log, FileIO(str(tmp_path / "other"), "ab") as other:
        for body in (b"%d" % other.fileno(), b"0", b"-1", b"999999"):
            fd = os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT)
            reopening.replace(body, fd, [log.fileno()])
            with pytest.raises(OSError):
                os.fstat(fd)
        assert os.path.samestat(os.fstat(other.fileno()), os.stat(tmp_path / "other"))
        fd = os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT)
        reopening.replace(b"%d" % log.fileno(), fd, [log.fileno()])
        log.write(b"new")
        assert (tmp_path / "new").read_text() == "new"
        assert not os.get_inheritable(log.fileno())
