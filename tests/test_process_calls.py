"""The functions that speak to the processes, as seen outside of a worker, and what they hand to one inside."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest

import kore
from kore.application.declared import application
from kore.http.peer import Peer
from kore.http.websocket import broadcast
from kore.process import calls, role
from kore.process.channel import Kind
from kore.process.log import LOG_ERR, LOG_INFO, Log
from kore.process.pieces import TO_ALL, TO_OTHERS


class Lines:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.lines = []

    def write(self, priority, label, text):
        self.lines.append((priority, label, text))
        return True

    def waiting_fd(self):
        return None


@pytest.fixture
def lines(monkeypatch):
    sink = Lines()
    monkeypatch.setattr(role, "role", role.Role(Log(sink)))
    yield sink.lines
    application.reset()


def test_the_parent_logs_directly_and_has_no_number(lines):
    assert calls.log(LOG_INFO, "text %s") is True
    assert lines == [(LOG_INFO, "[parent]", "text %s")]
    assert calls.worker() is None


@pytest.mark.parametrize("arguments", [("3", "text"), (3, b"text"), (3.0, "text"), (3, None)])
def test_log_refuses_what_it_cannot_log(lines, arguments):
    with pytest.raises(TypeError, match="^log: "):
        calls.log(*arguments)
    assert lines == []


def test_fatal_and_fatalx_end_the_parent_with_code_1_whatever_the_argument(lines):
    for call, argument in ((calls.fatal, "why"), (calls.fatalx, "why"), (calls.fatal, 7)):
        with pytest.raises(SystemExit) as ended:
            call(argument)
        assert ended.value.code == 1
    assert [text for _, _, text in lines] == ["why", "why", "fatal called without a reason (7)"]
    assert {priority for priority, _, _ in lines} == {LOG_ERR}


def test_shutdown_in_the_parent_is_fatal(lines):
    with pytest.raises(SystemExit):
        calls.shutdown()


def test_sigtrap_notes_a_signal_once_and_refuses_what_is_none(lines):
    calls.sigtrap(12)
    calls.sigtrap(12)
    assert application.signals == [12]
    for number in (0, -1, 9, 19, 1000):
        with pytest.raises(ValueError, match="cannot be trapped"):
            calls.sigtrap(number)
    with pytest.raises(TypeError):
        calls.sigtrap("12")


def test_setname_is_kept_for_the_titles(lines):
    assert calls.setname("shop") is None
    assert application.title == "shop"
    for wrong, error in ((7, TypeError), ("", ValueError)):
        with pytest.raises(error):
            calls.setname(wrong)


@pytest.mark.parametrize("worker", [True, "1", 1.0, b"1"])
def test_sendobj_takes_an_id_and_nothing_else(lines, worker):
    with pytest.raises(TypeError, match="^sendobj: worker is the id"):
        calls.sendobj("x", worker=worker)


@pytest.mark.parametrize("worker", [None, 1])
def test_sendobj_from_the_parent_is_an_error_and_no_crash(lines, worker):
    with pytest.raises(RuntimeError, match="^sendobj: workers send to workers"):
        calls.sendobj("x", worker=worker)


class Sent:
    """In the place of a worker's Post: keeps what is sent."""

    def __init__(self):
        self.sent = []

    def send(self, kind, target, data):
        self.sent.append((kind, target, data))


@pytest.fixture
def worker(lines):
    role.role.post, role.role.workers, role.role.worker = Sent(), 3, 1
    return role.role


@pytest.mark.parametrize("number", [0, -1, 4, 5, 1001, 1 << 70])
def test_sendobj_knows_the_ids(worker, number):
    with pytest.raises(RuntimeError, match="their ids are 1 to 3"):
        calls.sendobj("x", worker=number)


def test_sendobj_pickles_at_the_call(worker):
    thing = [1]
    assert calls.sendobj(thing, worker=3) is None
    thing.append(2)
    assert calls.sendobj(thing) is None
    assert [(kind, target, pickle.loads(data)) for kind, target, data in worker.post.sent] == [
        (Kind.OBJECT, 3, [1]), (Kind.OBJECT, TO_ALL, [1, 2]),
    ]
    with pytest.raises((AttributeError, pickle.PicklingError)):
        calls.sendobj(lambda: None)
    assert len(worker.post.sent) == 2


@pytest.fixture
def clients(worker, monkeypatch):
    """What is sent to the clients of this worker."""
    worker.server = object()
    sent = []
    monkeypatch.setattr(broadcast, "local", lambda server, src, op, data: sent.append((src, op, data)))
    return sent


def test_a_local_broadcast_stays_in_the_worker(worker, clients):
    src = Peer(SimpleNamespace(stream=None), -1)
    assert calls.websocket_broadcast(src, kore.WEBSOCKET_OP_TEXT, "é", kore.WEBSOCKET_BROADCAST_LOCAL) is True
    assert calls.websocket_broadcast(None, kore.WEBSOCKET_OP_BINARY, memoryview(b"raw"), 77) is True
    assert clients == [(src, 1, "é".encode()), (None, 2, b"raw")]
    assert worker.post.sent == []


def test_a_global_broadcast_goes_to_the_other_workers_too_and_not_back(worker, clients):
    src = Peer(SimpleNamespace(stream=None), -1)
    assert calls.websocket_broadcast(src, 2, bytearray(b"raw"), kore.WEBSOCKET_BROADCAST_GLOBAL) is True
    assert clients == [(src, 2, b"raw")]
    assert worker.post.sent == [(Kind.BROADCAST, TO_OTHERS, b"\x02raw")]
    worker.workers = 1
    calls.websocket_broadcast(None, 1, "alone", kore.WEBSOCKET_BROADCAST_GLOBAL)
    assert len(worker.post.sent) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("src", 1, "x", 1), (7, 1, "x", 1), (None, 0, "x", 1), (None, 8, "x", 1), (None, "1", "x", 1),
        (None, 1, None, 1), (None, 1, 5, 1), (None, 1, ["x"], 1), (None, 1, "x", "2"), (None, 1, "x", None),
    ],
)  # fmt: skip
def test_a_broadcast_of_something_else_is_a_type_error(clients, arguments):
    with pytest.raises(TypeError):
        calls.websocket_broadcast(*arguments)
    assert clients == []


@pytest.mark.parametrize("data", [b"\xff", "\udc80"])
def test_text_that_is_no_utf8_is_a_value_error_and_goes_to_nobody(worker, clients, data):
    with pytest.raises(ValueError):
        calls.websocket_broadcast(None, 1, data, kore.WEBSOCKET_BROADCAST_GLOBAL)
    assert clients == worker.post.sent == []


def test_a_broadcast_that_cannot_be_sent_to_all_is_sent_to_nobody(worker, clients, monkeypatch):
    def full(kind, target, data):
        raise RuntimeError("the parent is slow")

    monkeypatch.setattr(worker.post, "send", full, raising=False)
    with pytest.raises(RuntimeError, match="slow"):
        calls.websocket_broadcast(None, 1, "x", kore.WEBSOCKET_BROADCAST_GLOBAL)
    assert clients == []


def test_a_broadcast_from_the_parent_is_an_error(lines):
    with pytest.raises(RuntimeError, match="workers have clients"):
        calls.websocket_broadcast(None, 1, "x", 1)
