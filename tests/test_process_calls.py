"""kore.log, worker, fatal, shutdown, setname and sigtrap, as seen outside of a worker."""

from __future__ import annotations

import pytest

from kore.application.declared import application
from kore.process import calls, role
from kore.process.log import LOG_ERR, LOG_INFO, Log


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
