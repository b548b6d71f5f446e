"""Runs a module of CPython's own ``test.test_asyncio`` with kore's loop in place of the selector loop.

``python tests/asyncio_suite.py uring test_events`` writes one line of JSON a test: its name, how it ended (``ok``,
``failed``, ``skipped``), whether a loop of ours was made in it, and what was said. ``selector`` for an engine runs the
same with the stock loop; further arguments are the only tests to run. What is left out, and what may fail, stands in
tests/asyncio_exceptions.py, each with its reason.
"""

from __future__ import annotations

import asyncio
import faulthandler
import fnmatch
import json
import os
import sys
import time
import unittest
from asyncio import unix_events
from typing import Any

SECONDS_MAX = 120.0
"""For one module, some seconds' work for a machine that is not busy; a hang ends the process with its stack, and the
tests not reported are seen to be missing."""


REPORT_FD = 100
"""Where the lines go: far from 1, which is the number that a mock of a socket has for an fd."""


def substitute(io: str) -> list[int]:
    """Make every selector loop one of kore's on engine `io`; a list whose item counts them."""
    made = [0]
    if io == "selector":
        return made
    from kore.reactor import Loop, new_driver

    class KoreLoop(Loop):
        def __init__(self, selector: Any = None) -> None:
            if selector is not None:
                selector.close()
            made[0] += 1
            super().__init__(new_driver(io))

    for module in (asyncio, unix_events):
        for name in ("SelectorEventLoop", "EventLoop"):
            if hasattr(module, name):
                setattr(module, name, KoreLoop)
    # Policies take their loops from here; the suite sets the default policy again and again.
    unix_events._UnixDefaultEventLoopPolicy._loop_factory = KoreLoop
    return made


def replace_fakes_of_runners() -> None:
    """Have test_runners make the loops that `substitute` put in place; its own are fakes that cannot wait.

    It looks only whether they were closed, and their asynchronous generators before.
    """
    from test.test_asyncio import test_runners

    def new_loop(_test: object) -> asyncio.AbstractEventLoop:
        loop: Any = unix_events.SelectorEventLoop()
        shutdown = loop.shutdown_asyncgens
        loop.shutdown_ag_run = False

        async def shutdown_asyncgens() -> None:
            loop.shutdown_ag_run = True
            await shutdown()

        loop.shutdown_asyncgens = shutdown_asyncgens
        return loop

    test_runners.BaseTest.new_loop = new_loop


def replace_fakes() -> None:
    """The same for the fake loops that tests of tasks and futures run on, but for those whose clock is a script."""
    from test.test_asyncio import utils

    new_fake_loop = utils.TestCase.new_test_loop

    def new_test_loop(test: Any, gen: Any = None) -> asyncio.AbstractEventLoop:
        if gen is not None:
            return new_fake_loop(test, gen)
        loop: Any = unix_events.SelectorEventLoop()
        test.set_event_loop(loop)
        return loop

    utils.TestCase.new_test_loop = new_test_loop


FAKES = {"test_runners": replace_fakes_of_runners, "test_tasks": replace_fakes, "test_futures": replace_fakes}
"""Modules that hardly make a loop but a fake, and what has them make ours."""


def report(test: str, end: str, ours: bool, said: str, seconds: float) -> None:
    """Write one line."""
    line = {"test": test, "end": end, "ours": ours, "said": said, "seconds": round(seconds, 3)}
    os.write(REPORT_FD, (json.dumps(line) + "\n").encode())


class Result(unittest.TestResult):
    """Writes each test's end as it comes."""

    def __init__(self, made: list[int]) -> None:
        super().__init__()
        self.made = made
        self.before = 0
        self.began = time.monotonic()
        self.end: tuple[str, str] = ("ok", "")

    def startTest(self, test):
        super().startTest(test)
        self.before = self.made[0]
        self.began = time.monotonic()
        self.end = ("ok", "")

    def stopTest(self, test):
        super().stopTest(test)
        how, said = self.end
        report(short_name(test), how, self.made[0] > self.before, said, time.monotonic() - self.began)

    def _failed(self, test, err):
        self.end = ("failed", self._exc_info_to_string(err, test))

    def addError(self, test, err):
        if isinstance(test, unittest.TestCase):
            self._failed(test, err)
        else:  # a class or a module could not be set up
            report(str(test), "failed", False, self._exc_info_to_string(err, test), 0.0)

    def addFailure(self, test, err):
        self._failed(test, err)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self._failed(test, err)

    def addSkip(self, test, reason):
        self.end = ("skipped", reason)

    def addUnexpectedSuccess(self, test):
        self.end = ("failed", "unexpected success")


def short_name(test: unittest.TestCase) -> str:
    """``test_events.EPollEventLoopTests.test_close``."""
    return test.id().removeprefix("test.test_asyncio.")


def cases(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    """The tests in a suite, in order."""
    found = []
    for part in suite:
        found += cases(part) if isinstance(part, unittest.TestSuite) else [part]
    return found


def main(io: str, module: str, left_out: list[str], only: list[str]) -> None:
    """Run `module` but for what is `left_out`, or `only` these."""
    faulthandler.dump_traceback_later(SECONDS_MAX, exit=True)
    made = substitute(io)
    FAKES.get(module, lambda: None)()
    from test import support

    support.use_resources = ["cpu", "walltime"]
    suite = unittest.defaultTestLoader.loadTestsFromName(f"test.test_asyncio.{module}")
    chosen = unittest.TestSuite()
    for case in cases(suite):
        name = short_name(case)
        if (not only or name in only) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in left_out):
            chosen.addTest(case)
    chosen.run(Result(made))
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    os.dup2(1, REPORT_FD, inheritable=False)
    from asyncio_exceptions import LEFT_OUT

    main(sys.argv[1], sys.argv[2], list(LEFT_OUT), sys.argv[3:])
