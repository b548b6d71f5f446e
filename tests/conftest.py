"""What all tests share: which engines are under test, and a guard that finds child processes left behind.

A test that is parametrised over engines carries the engine's name as a parameter. With ``KORE_IO`` set only that
engine's variants are kept, so that ``make test`` can run the suite once for each engine.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from driver_harness import driver, each_pair, listener, pair
from reactor_harness import fake, faked, log, loop, opened

from tests.postgresql_harness import postgresql
from tests.support import engine

__all__ = [  # fixtures
    "driver", "each_pair", "engine", "fake", "faked", "listener", "log", "loop", "opened", "pair", "postgresql",
]

ENGINES = ("uring", "epoll", "kqueue")


def pytest_configure() -> None:
    """A shell puts programs in the background with SIGINT ignored; the tests of Ctrl-C want it as Python has it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """The first lines say which engine is asked for."""
    return f"KORE_IO: {os.environ.get('KORE_IO') or 'unset (each engine where a test asks for one)'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With KORE_IO set, deselect what is parametrised with another engine; with KORE_TESTS=engine all that has none."""
    wanted = os.environ.get("KORE_IO")
    if not wanted:
        return
    dependent = os.environ.get("KORE_TESTS") == "engine"
    kept, dropped = [], []
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        engines = {value.partition("-")[0] for value in parameters if isinstance(value, str)}  # "uring-bounded"
        named = engines & set(ENGINES)
        if named:
            keep = wanted in named
        else:
            keep = not dependent or _asks_for_engine(item.path)
        (kept if keep else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@functools.cache
def _asks_for_engine(path: Path) -> bool:
    """Whether tests in this file take the engine from the environment, themselves or by a harness that does."""
    text = path.read_text()
    return "KORE_IO" in text or any(harness in text for harness in ("asgi_harness", "attacks_harness"))


@pytest.fixture(scope="session")
def io() -> str | None:
    """The engine that KORE_IO asks for, None when it leaves the choice."""
    return os.environ.get("KORE_IO") or None


def children() -> dict[int, str]:
    """Direct children of this process, zombies too: pid and a word on each."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text()
        except OSError:
            continue  # it ended meanwhile
        name, _, rest = stat.partition("(")[2].rpartition(")")
        state, parent = rest.split()[:2]
        if int(parent) == os.getpid():
            found[int(entry)] = f"{name} (pid {entry}, {'zombie' if state == 'Z' else 'state ' + state})"
    return found


@pytest.fixture(autouse=True)
def no_children_left() -> Iterator[None]:
    """Fail a test after which a child process is still there that was not there before it."""
    before = children()
    yield
    left = {
        pid: word for pid, word in children().items()
        if pid not in before and "resource_tracker" not in _command(pid) and "forkserver" not in _command(pid)
    }
    if left:
        pytest.fail("child processes left behind: " + ", ".join(left.values()), pytrace=False)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
