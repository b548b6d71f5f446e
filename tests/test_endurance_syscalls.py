"""The proof on system calls, short: nothing of io_uring on epoll, and fewer calls than requests on io_uring."""

from __future__ import annotations

import pytest

from tests.endurance import syscalls
from tests.endurance.report import Unavailable, silent


@pytest.mark.parametrize("io", ["uring", "epoll"])
def test_calls_of_io_uring(io: str) -> None:
    """The proof itself, short."""
    try:
        result = syscalls.prove(io, requests=2000, progress=silent)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not result.failed, result.text()


def test_calls_are_counted_once() -> None:
    """A call that another process interrupts takes two lines of the trace."""
    text = (
        "11 io_uring_setup(64, {...}) = 3\n"
        "12 io_uring_enter(3, 1, 1, IORING_ENTER_GETEVENTS, NULL, 8 <unfinished ...>\n"
        "11 io_uring_enter(4, 0, 1, 0, NULL, 8) = 1\n"
        "12 <... io_uring_enter resumed>) = 1\n"
    )
    assert syscalls.counted(text) == {"io_uring_setup": 1, "io_uring_enter": 2, "io_uring_register": 0}


def test_no_strace_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes can't be traced, the proof says so."""
    monkeypatch.setattr(syscalls.shutil, "which", lambda _: None)
    with pytest.raises(Unavailable, match="strace"):
        syscalls.require_strace()
    monkeypatch.setattr(syscalls.shutil, "which", lambda _: "/bin/false")
    with pytest.raises(Unavailable, match="ptrace"):
        syscalls.require_strace()
