"""What the tests of the reactor share: a loop on each engine that leaves nothing behind, and one on a driver of ours.

The fake driver never waits: the fake loop's clock jumps to the time it was asked to wait until, so that the order of
timers is a matter of arithmetic.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest
from driver_harness import ENGINES, fds, link, make_driver

from kore.reactor import Loop, set_log, tasks, trace

SECONDS_MAX = 20.0

__all__ = ["ENGINES", "SECONDS_MAX", "FakeLoop", "Log", "closing", "forever", "open_loop", "run", "soon"]


class Log(list):
    """The lines that the reactor logged: (priority, text)."""

    def __call__(self, priority: int, text: str) -> None:
        self.append((priority, text))

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self]


class FakeDriver:
    """A driver without a kernel: a wait only remembers how long it would have been."""

    name = "fake"
    wake_fd = -1

    def __init__(self) -> None:
        self.waits: list[float | None] = []
        self.loop: FakeLoop | None = None
        self.closed = False

    def wait(self, timeout: float | None) -> None:
        self.waits.append(timeout)
        assert timeout is not None, "the loop would wait for ever"
        if timeout:
            self.loop.now += timeout

    def submit(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class FakeLoop(Loop):
    """A loop on a FakeDriver whose clock stands still between waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(FakeDriver())
        self._driver.loop = self

    def time(self) -> float:
        return self.now

    def _wake_on_signals(self) -> None:
        return None

    @property
    def waits(self) -> list[float | None]:
        return self._driver.waits


def closing(loop: Loop) -> Iterator[tuple[Loop, Log]]:
    """For fixtures: `loop` and the log; afterwards nothing of the test is left in the modules' tables."""
    log = Log()
    set_log(log)
    yield loop, log
    asyncio.set_event_loop(None)
    tasks.corotrace(False)
    trace.reset_tracer()
    set_log(None)
    for task in list(tasks.live.values()):
        task.kill()
    tasks.discard_pending()
    tasks.process_loop = None
    if not loop.is_closed():
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def open_loop(io: str) -> Iterator[tuple[Loop, Log]]:
    """The same with a loop on engine `io`; a skip that names the missing kernel feature where it can't be had."""
    yield from closing(Loop(make_driver(io)))


@pytest.fixture(params=ENGINES)
def opened(request: pytest.FixtureRequest) -> Iterator[tuple[Loop, Log]]:
    """A loop on each engine, and its log; no fd is left open by what ran on it."""
    before = fds()
    yield from open_loop(request.param)
    if not fds() <= before:
        gc.collect()
    left = fds() - before
    assert not left, f"fds left open: { {fd: link(fd) for fd in left} }"


@pytest.fixture
def loop(opened: tuple[Loop, Log]) -> Loop:
    """Its loop."""
    return opened[0]


@pytest.fixture
def log(opened: tuple[Loop, Log]) -> Log:
    """Its log."""
    return opened[1]


@pytest.fixture
def faked() -> Iterator[tuple[Loop, Log]]:
    """A loop whose clock is ours, and its log."""
    yield from closing(FakeLoop())


@pytest.fixture
def fake(faked: tuple[Loop, Log]) -> Loop:
    """A loop whose clock is ours."""
    return faked[0]


def begin_telling(loop, coro, on_end):
    """`loop.begin(coro)`, with `on_end` hearing of its end if it is not over with the first step."""
    task = loop.begin(coro)
    if task is not None:
        task.on_end = on_end
    return task


def soon(loop, function, *args):
    """Call `function` from a callback of the driver, as the server calls handlers; its result."""
    future = loop.create_future()

    def call(_result):
        try:
            future.set_result(function(*args))
        except BaseException as exc:
            future.set_exception(exc)

    loop.driver.timeout(0.0, call)
    return loop.run_until_complete(future)


async def forever():
    await asyncio.get_running_loop().create_future()


def run(loop: Loop, coro, seconds: float = SECONDS_MAX):
    """Run `coro` as a task of kore's, bounded; its result."""

    async def bounded():
        return await asyncio.wait_for(loop.start(coro), seconds)

    return loop.run_until_complete(bounded())
